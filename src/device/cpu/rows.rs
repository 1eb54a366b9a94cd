//! Element-wise arithmetic on one token's row: norms, quantisation, SwiGLU, rotation, softmax.
//!
//! Plain Rust in a shape that vectorises; `kernels` compiles each routine once per instruction-set
//! path. Products and sums are never fused here and every sum has one fixed order, so that all
//! paths give the same bits.

use crate::device::cpu::memory::Plain;

/// Values in a quantised block, of weights and activations alike.
pub const BLOCK: usize = 32;

/// 32 activations of one token as signed bytes with a scale; what integer kernels multiply.
///
/// Scale and sums lie beside the bytes so that a kernel needs one pointer a token.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(16))]
pub struct ActBlock {
    /// The values divided by `scale`, from -127 to 127.
    pub quants: [i8; BLOCK],
    /// What a quant of one stands for.
    pub scale: f32,
    /// `scale` times `sum`: what a weight block's minimum is multiplied with.
    pub scaled_sum: f32,
    /// Sum of the quants: what a weight block's zero point is multiplied with.
    pub sum: i32,
    pad: i32,
}

#[allow(unsafe_code)]
// SAFETY: integers and floats only, no padding bytes (32 + 4·4 = 48 = 3·16), no drop glue.
unsafe impl Plain for ActBlock {}

impl ActBlock {
    /// All values zero.
    pub const ZERO: ActBlock =
        ActBlock { quants: [0; BLOCK], scale: 0.0, scaled_sum: 0.0, sum: 0, pad: 0 };
}

/// Adding 1.5·2^23 leaves the nearest integer (ties to even) in a float's low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// The larger one; the second where either is NaN. Maps to one instruction, unlike `f32::max`.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Quantises a row; a last partial block is filled with zeroes.
#[inline(always)]
pub fn quantise(values: &[f32], out: &mut [ActBlock]) {
    let (whole, rest) = values.as_chunks::<BLOCK>();
    assert!(out.len() >= whole.len() + usize::from(!rest.is_empty()));
    for (block, out) in whole.iter().zip(out.iter_mut()) {
        quantise_block(block, out);
    }
    if !rest.is_empty() {
        let mut block = [0.0; BLOCK];
        block[..rest.len()].copy_from_slice(rest);
        quantise_block(&block, &mut out[whole.len()]);
    }
}

/// Quantises one block: the largest magnitude becomes ±127, the others are rounded to nearest.
#[inline(always)]
pub fn quantise_block(values: &[f32; BLOCK], out: &mut ActBlock) {
    let mut lanes = [0.0f32; 16];
    for half in values.as_chunks::<16>().0 {
        for (lane, value) in lanes.iter_mut().zip(half) {
            *lane = larger(value.abs(), *lane);
        }
    }
    let mut max = lanes[0];
    for &lane in &lanes[1..] {
        max = larger(lane, max);
    }
    let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
    let mut sum = 0i32;
    let mut rounded = [0i32; BLOCK];
    for (rounded, value) in rounded.iter_mut().zip(values) {
        let bits = (value * inverse + ROUND).to_bits() as i32;
        *rounded = bits.wrapping_sub(ROUND.to_bits() as i32);
    }
    for (quant, rounded) in out.quants.iter_mut().zip(&rounded) {
        // Only a value that is no number falls outside; then any quant is as good.
        *quant = *rounded as i8;
        sum += i32::from(*rounded as i8);
    }
    out.scale = max / 127.0;
    out.sum = sum;
    out.scaled_sum = out.scale * sum as f32;
}

/// The nearest bf16 to a finite value, ties to even; NaN stays NaN.
#[inline(always)]
pub fn bf16_from(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) as u16
}

/// The value of a bf16.
#[inline(always)]
pub fn bf16_to(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds a row to bf16; what is left of `out` is filled with zeroes.
#[inline(always)]
pub fn to_bf16(values: &[f32], out: &mut [u16]) {
    let (out, rest) = out.split_at_mut(values.len());
    for (out, value) in out.iter_mut().zip(values) {
        *out = bf16_from(*value);
    }
    rest.fill(0);
}

/// Sum of a row in a fixed order: 16 interleaved partial sums, folded by halves.
#[inline(always)]
fn sum_of(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (whole, rest) = values.as_chunks::<16>();
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += term(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += term(*value);
    }
    fold(lanes)
}

#[inline(always)]
fn fold(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// Root-mean-square norm of a row: out = row / sqrt(mean(row²) + eps) · weight.
#[inline(always)]
pub fn rms_norm(row: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(row.len() == weight.len() && row.len() == out.len());
    let mean = sum_of(row, |value| value * value) / row.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((out, value), weight) in out.iter_mut().zip(row).zip(weight) {
        *out = value * scale * weight;
    }
}

/// 2^x for x up to 127, 0 below -126 (a normal number's range), within 2 units in the last place.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    let clamped = if x > -126.0 { x } else { -126.0 };
    let clamped = if clamped < 127.0 { clamped } else { 127.0 };
    let shifted = clamped + ROUND;
    let fraction = clamped - (shifted - ROUND);
    // Taylor's series of 2^f, f from -0.5 to 0.5; the first term left out is below 2^-26.
    let mut power = 1.540_353e-4;
    #[expect(clippy::approx_constant, reason = "a coefficient, rounded as the others are")]
    for coefficient in [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 0.240_226_5, 0.693_147_2, 1.0] {
        power = power * fraction + coefficient;
    }
    // The integer part sits in the low bits of `shifted`: move it to the exponent.
    let scaled = f32::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < -126.0 { 0.0 } else { scaled }
}

/// out = silu(gate) · up.
#[inline(always)]
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len());
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        let sigmoid = 1.0 / (1.0 + exp2(-gate * std::f32::consts::LOG2_E));
        *out = gate * sigmoid * up;
    }
}

/// out += row.
#[inline(always)]
pub fn add(row: &[f32], out: &mut [f32]) {
    assert_eq!(row.len(), out.len());
    for (out, value) in out.iter_mut().zip(row) {
        *out += value;
    }
}

/// Rotates adjacent pairs of one head's first values; `turns` holds (cosine, sine) of each pair.
#[inline(always)]
pub fn rotate(head: &mut [f32], turns: &[f32]) {
    let (pairs, _) = head.as_chunks_mut::<2>();
    let (turns, _) = turns.as_chunks::<2>();
    for ([x, y], [cosine, sine]) in pairs.iter_mut().zip(turns) {
        (*x, *y) = (*x * cosine - *y * sine, *x * sine + *y * cosine);
    }
}

/// The largest of a row of 64 scores, negative infinity when none is a number.
#[inline(always)]
pub fn max64(scores: &[f32; 64]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in scores.as_chunks::<16>().0 {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*score, *lane);
        }
    }
    let mut max = lanes[0];
    for &lane in &lanes[1..] {
        max = larger(lane, max);
    }
    max
}

/// Turns scores into bf16 powers of two, 2^(score - max), and returns the sum of what was stored.
#[inline(always)]
pub fn powers64(scores: &[f32; 64], max: f32, out: &mut [u16; 64]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, _) = scores.as_chunks::<16>();
    let (outs, _) = out.as_chunks_mut::<16>();
    for (chunk, out) in chunks.iter().zip(outs) {
        for lane in 0..16 {
            let bits = bf16_from(exp2(chunk[lane] - max));
            out[lane] = bits;
            lanes[lane] += bf16_to(bits);
        }
    }
    fold(lanes)
}

/// sum = sum·by + other·other_by: brings two partial sums to a common scale.
#[inline(always)]
pub fn blend(sum: &mut [f32], by: f32, other: &[f32], other_by: f32) {
    assert_eq!(sum.len(), other.len());
    for (sum, other) in sum.iter_mut().zip(other) {
        *sum = *sum * by + other * other_by;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exp2_is_within_two_units_in_the_last_place_over_its_whole_range() {
        let mut worst = 0.0f64;
        for step in 0..=2_530_000 {
            let x = -126.0 + step as f32 * 1e-4;
            let exact = f64::from(x).exp2();
            worst = worst.max((f64::from(exp2(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2.4e-7, "{worst}");
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(-3.0), 0.125);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn a_block_of_zeroes_has_scale_zero() {
        let mut out = ActBlock { sum: 7, scale: 1.0, ..ActBlock::ZERO };
        quantise_block(&[0.0; BLOCK], &mut out);
        assert_eq!(out, ActBlock::ZERO);
    }

    #[test]
    fn values_that_are_no_numbers_do_not_panic() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; BLOCK];
            values[5] = bad;
            quantise_block(&values, &mut { ActBlock::ZERO });
            let mut out = [0.0; BLOCK];
            rms_norm(&values, &[1.0; BLOCK], 1e-5, &mut out);
            assert!(bf16_to(bf16_from(bad)).is_nan() == bad.is_nan());
        }
    }

    #[test]
    fn a_rotation_keeps_lengths_and_turns_the_first_axis_onto_the_angle() {
        let (sine, cosine) = 0.3f32.sin_cos();
        let mut head = [1.0, 0.0, 3.0, 4.0, 9.0];
        rotate(&mut head, &[cosine, sine, cosine, sine]);
        assert_eq!(head[..2], [cosine, sine]);
        assert!((head[2].hypot(head[3]) - 5.0).abs() < 1e-6);
        assert_eq!(head[4], 9.0);
    }

    proptest! {
        #[test]
        fn a_quant_is_within_half_a_step_of_its_value(
            values in proptest::array::uniform32(-1e3f32..1e3),
        ) {
            let mut out = ActBlock::ZERO;
            quantise_block(&values, &mut out);
            for (value, quant) in values.iter().zip(out.quants) {
                let error = f64::from(*value) - f64::from(out.scale) * f64::from(quant);
                prop_assert!(error.abs() <= f64::from(out.scale) * 0.50001);
            }
            prop_assert_eq!(out.sum, out.quants.iter().map(|&q| i32::from(q)).sum::<i32>());
        }

        #[test]
        fn bf16_is_the_nearest_with_ties_to_even(value in any::<f32>()) {
            let expected = half::bf16::from_f32(value);
            if value.is_nan() {
                prop_assert!(bf16_to(bf16_from(value)).is_nan());
            } else {
                prop_assert_eq!(bf16_from(value), expected.to_bits());
            }
        }

        #[test]
        fn a_norm_equals_its_definition(row in proptest::collection::vec(-9f32..9.0, 1..200)) {
            let weight: Vec<f32> = (0..row.len()).map(|i| 0.5 + i as f32 / 64.0).collect();
            let mut out = vec![0.0; row.len()];
            rms_norm(&row, &weight, 1e-5, &mut out);
            let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let root = (square / row.len() as f64 + 1e-5).sqrt();
            for ((&x, &w), &y) in row.iter().zip(&weight).zip(&out) {
                let exact = f64::from(x) / root * f64::from(w);
                prop_assert!((exact - f64::from(y)).abs() <= 2e-6 * (1.0 + exact.abs()));
            }
        }

        #[test]
        fn swiglu_equals_its_definition(
            gate in proptest::collection::vec(-90f32..90.0, 1..70), up in -5f32..5.0,
        ) {
            let ups = vec![up; gate.len()];
            let mut out = vec![0.0; gate.len()];
            swiglu(&gate, &ups, &mut out);
            for (&g, &y) in gate.iter().zip(&out) {
                let exact = f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(up);
                // Rounding the exponent of 2 costs half a unit of it: relative to the result,
                // |gate| times half a unit.
                let bound = 2e-7 * (2.0 + f64::from(g).abs());
                prop_assert!((exact - f64::from(y)).abs() <= bound * exact.abs() + 1e-30);
            }
        }
    }
}
