//! The storage formats of weights, and the plain functions that turn a row into numbers.
//!
//! These functions are the meaning of a weight: every kernel, packed layout and test is held
//! against them.
//!
//! Core: none; it runs while loading, and in tests.

use half::{bf16, f16};

use crate::model::gguf::DType;

/// Values in a block of the quantised formats.
pub const BLOCK_VALUES: usize = 32;
/// Q8_0: a half-precision scale d, then 32 signed bytes q; value = d·q.
pub const Q8_0_BYTES: usize = 2 + 32;
/// Q4_0: a half-precision scale d, then 16 bytes of nibbles q; value = d·(q − 8). Byte j holds
/// value j in its low nibble and value j + 16 in its high one.
pub const Q4_0_BYTES: usize = 2 + 16;
/// Q4_1: a half-precision scale d and minimum m, then nibbles as in Q4_0; value = d·q + m.
pub const Q4_1_BYTES: usize = 4 + 16;

/// Turns a row of `dtype` into numbers.
///
/// Every product here is exact in single precision (11 significant bits times at most 8); Q4_1
/// rounds once, in its addition.
///
/// # Panics
/// When `dtype` is unsupported, or `row` is not exactly as long as `values.len()` values are.
pub fn dequantize_row(dtype: DType, row: &[u8], values: &mut [f32]) {
    assert_eq!(dtype.row_bytes(values.len()), Some(row.len()), "a row of {dtype} and its values");
    match dtype {
        DType::F32 => {
            for (value, bytes) in values.iter_mut().zip(row.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        DType::F16 => {
            for (value, bytes) in values.iter_mut().zip(row.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        DType::Bf16 => {
            for (value, bytes) in values.iter_mut().zip(row.as_chunks::<2>().0) {
                *value = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        DType::Q8_0 => each_block::<Q8_0_BYTES>(row, values, q8_0_block),
        DType::Q4_0 => each_block::<Q4_0_BYTES>(row, values, q4_0_block),
        DType::Q4_1 => each_block::<Q4_1_BYTES>(row, values, q4_1_block),
        DType::Unsupported(_) => panic!("{dtype} cannot be dequantised"),
    }
}

fn each_block<const BYTES: usize>(
    row: &[u8],
    values: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; BLOCK_VALUES]),
) {
    let (blocks, _) = row.as_chunks::<BYTES>();
    let (outputs, _) = values.as_chunks_mut::<BLOCK_VALUES>();
    for (bytes, output) in blocks.iter().zip(outputs) {
        block(bytes, output);
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn q8_0_block(bytes: &[u8; Q8_0_BYTES], values: &mut [f32; BLOCK_VALUES]) {
    let scale = half_at(bytes, 0);
    for (value, &quant) in values.iter_mut().zip(&bytes[2..]) {
        *value = scale * f32::from(quant as i8);
    }
}

fn q4_0_block(bytes: &[u8; Q4_0_BYTES], values: &mut [f32; BLOCK_VALUES]) {
    let scale = half_at(bytes, 0);
    for (j, &pair) in bytes[2..].iter().enumerate() {
        values[j] = scale * (f32::from(pair & 15) - 8.0);
        values[j + 16] = scale * (f32::from(pair >> 4) - 8.0);
    }
}

fn q4_1_block(bytes: &[u8; Q4_1_BYTES], values: &mut [f32; BLOCK_VALUES]) {
    let (scale, min) = (half_at(bytes, 0), half_at(bytes, 2));
    for (j, &pair) in bytes[4..].iter().enumerate() {
        values[j] = scale * f32::from(pair & 15) + min;
        values[j + 16] = scale * f32::from(pair >> 4) + min;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dequantize(dtype: DType, row: &[u8]) -> Vec<f32> {
        let values = row.len() / dtype.block_bytes() * dtype.block_values();
        let mut out = vec![f32::NAN; values];
        dequantize_row(dtype, row, &mut out);
        out
    }

    #[test]
    fn plain_types_are_read_as_they_are() {
        assert_eq!(dequantize(DType::F32, &1.5f32.to_le_bytes()), [1.5]);
        assert_eq!(dequantize(DType::F16, &f16::from_f32(-0.25).to_le_bytes()), [-0.25]);
        assert_eq!(dequantize(DType::Bf16, &bf16::from_f32(3.0).to_le_bytes()), [3.0]);
    }

    #[test]
    fn q8_0_scales_signed_bytes() {
        let mut row = f16::from_f32(0.5).to_le_bytes().to_vec();
        row.extend((0..32u8).map(|i| i.wrapping_sub(16)));
        let expected: Vec<f32> = (0..32).map(|i| 0.5 * (i as f32 - 16.0)).collect();
        assert_eq!(dequantize(DType::Q8_0, &row), expected);
    }

    #[test]
    fn q4_0_has_its_zero_at_nibble_eight_and_its_second_half_in_the_high_nibbles() {
        let mut row = f16::from_f32(2.0).to_le_bytes().to_vec();
        row.extend((0..16u8).map(|j| j | (15 - j) << 4));
        let low = (0..16).map(|j| 2.0 * (j as f32 - 8.0));
        let high = (0..16).map(|j| 2.0 * (7.0 - j as f32));
        assert_eq!(dequantize(DType::Q4_0, &row), low.chain(high).collect::<Vec<f32>>());
    }

    #[test]
    fn q4_1_adds_its_minimum() {
        let mut row = f16::from_f32(0.25).to_le_bytes().to_vec();
        row.extend(f16::from_f32(-1.0).to_le_bytes());
        row.extend([0x0f; 16]);
        let expected: Vec<f32> =
            std::iter::repeat_n(2.75, 16).chain(std::iter::repeat_n(-1.0, 16)).collect();
        assert_eq!(dequantize(DType::Q4_1, &row), expected);
    }

    #[test]
    fn several_blocks_in_a_row_each_use_their_own_scale() {
        let mut row = Vec::new();
        for scale in [1.0f32, 3.0] {
            row.extend(f16::from_f32(scale).to_le_bytes());
            row.extend([1u8; 32]);
        }
        let out = dequantize(DType::Q8_0, &row);
        assert_eq!((out[0], out[31], out[32], out[63]), (1.0, 1.0, 3.0, 3.0));
    }

    #[test]
    #[should_panic(expected = "a row of Q8_0")]
    fn a_row_of_the_wrong_length_is_a_programming_error() {
        dequantize_row(DType::Q8_0, &[0; 33], &mut [0.0; 32]);
    }
}
