//! Kernels in plain Rust, written so that the compiler vectorises them for whatever the build's
//! baseline is. They are also the reference that the other paths must equal.

use super::{GemmArgs, PANEL_ROWS, Packing, PairArgs};
use crate::device::cpu::rows::{ActBlock, BLOCK, bf16_to};

/// A block's weights, one line of all rows per column.
type Columns = [[i16; PANEL_ROWS]; BLOCK];

/// Tokens that share the unpacking of a block.
const GROUP: usize = 8;

/// # Safety
/// As for [`super::Kernels::gemm`].
pub(super) unsafe fn gemm_q8(args: &GemmArgs) {
    // SAFETY: the caller's word.
    unsafe { gemm(args, Packing::Q8, unpack_q8) }
}

/// # Safety
/// As for [`super::Kernels::gemm`].
pub(super) unsafe fn gemm_q4(args: &GemmArgs) {
    // SAFETY: the caller's word.
    unsafe { gemm(args, Packing::Q4, |block, columns| unpack_q4(block, 8, columns)) }
}

/// # Safety
/// As for [`super::Kernels::gemm`].
pub(super) unsafe fn gemm_q4_min(args: &GemmArgs) {
    // SAFETY: the caller's word.
    unsafe { gemm(args, Packing::Q4Min, |block, columns| unpack_q4(block, 0, columns)) }
}

#[inline(always)]
unsafe fn gemm(args: &GemmArgs, packing: Packing, unpack: impl Fn(&[u8], &mut Columns)) {
    let block_bytes = packing.block_bytes();
    // SAFETY: the caller vouched for the panel.
    let panel = unsafe { std::slice::from_raw_parts(args.panel, args.blocks * block_bytes) };
    let mut first = 0;
    while first < args.tokens {
        let count = GROUP.min(args.tokens - first);
        let mut sums = [[0.0f32; PANEL_ROWS]; GROUP];
        for (b, block) in panel.chunks_exact(block_bytes).enumerate() {
            let mut columns = [[0; PANEL_ROWS]; BLOCK];
            unpack(block, &mut columns);
            let scales = match packing {
                Packing::Q8 => &block[PANEL_ROWS * BLOCK..],
                _ => &block[PANEL_ROWS * BLOCK / 2..],
            };
            let d = halves(scales);
            for (t, sums) in sums[..count].iter_mut().enumerate() {
                // SAFETY: block `b` of token `first + t`, for which the caller vouched.
                let acts = unsafe { &*args.x.add((first + t) * args.x_stride + b) };
                add_block(&columns, &d, acts, sums);
                if packing == Packing::Q4Min {
                    let m = halves(&scales[PANEL_ROWS * 2..]);
                    for row in 0..PANEL_ROWS {
                        sums[row] += m[row] * acts.scaled_sum;
                    }
                }
            }
        }
        for (t, sums) in sums[..count].iter().enumerate() {
            // SAFETY: the results of token `first + t`, for which the caller vouched.
            unsafe { store(args.out.add((first + t) * args.out_stride), sums, args.add) };
        }
        first += count;
    }
}

#[inline(always)]
unsafe fn store<const N: usize>(at: *mut f32, sums: &[f32; N], add: bool) {
    // SAFETY: the caller points at N values of its results; an array of floats has their alignment.
    let out = unsafe { &mut *at.cast::<[f32; N]>() };
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = if add { *out + sum } else { *sum };
    }
}

#[inline(always)]
fn add_block(
    columns: &Columns,
    d: &[f32; PANEL_ROWS],
    acts: &ActBlock,
    sums: &mut [f32; PANEL_ROWS],
) {
    let mut dots = [0i32; PANEL_ROWS];
    for (column, &quant) in columns.iter().zip(&acts.quants) {
        for (dot, &weight) in dots.iter_mut().zip(column) {
            *dot += i32::from(weight) * i32::from(i16::from(quant));
        }
    }
    for row in 0..PANEL_ROWS {
        sums[row] += dots[row] as f32 * (d[row] * acts.scale);
    }
}

#[inline(always)]
fn unpack_q8(block: &[u8], columns: &mut Columns) {
    for half in 0..2 {
        for step in 0..8 {
            let line = &block[512 * half + 64 * step..][..64];
            for row in 0..16 {
                for j in 0..4 {
                    columns[4 * step + j][16 * half + row] = i16::from(line[4 * row + j]) - 128;
                }
            }
        }
    }
}

#[inline(always)]
fn unpack_q4(block: &[u8], zero: i16, columns: &mut Columns) {
    for half in 0..2 {
        for step in 0..4 {
            let line = &block[256 * half + 64 * step..][..64];
            for row in 0..16 {
                for j in 0..4 {
                    let byte = line[4 * row + j];
                    columns[4 * step + j][16 * half + row] = i16::from(byte & 15) - zero;
                    columns[16 + 4 * step + j][16 * half + row] = i16::from(byte >> 4) - zero;
                }
            }
        }
    }
}

/// Half-precision numbers of a panel's rows.
#[inline(always)]
fn halves(bytes: &[u8]) -> [f32; PANEL_ROWS] {
    let mut out = [0.0; PANEL_ROWS];
    for (out, half) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *out = half_to(u16::from_le_bytes(*half));
    }
    out
}

/// The value of a finite half-precision number: its bits moved to where a float has them, and the
/// difference of the exponents' biases (127 - 15) multiplied in, which is exact for subnormals too.
#[inline(always)]
pub(crate) fn half_to(bits: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13);
    let scaled = magnitude * f32::from_bits((127 + 112) << 23);
    f32::from_bits(scaled.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// # Safety
/// As for [`super::Kernels::pairs`].
pub(super) unsafe fn pairs(args: &PairArgs) {
    for row in 0..args.rows {
        for column in (0..args.columns).step_by(16) {
            let mut sums = [0.0f32; 16];
            for p in 0..args.pairs {
                // SAFETY: pair `p` of a row and of 16 columns, for which the caller vouched.
                let (a, b) = unsafe {
                    let a = args.a.add(row * args.a_stride + p).read();
                    let b = args.b.add(p * args.columns + column).cast::<[u32; 16]>();
                    (a, &*b)
                };
                let (a_first, a_second) = (bf16_to(a as u16), bf16_to((a >> 16) as u16));
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum += a_first * f32::from_bits(b << 16);
                    *sum += a_second * f32::from_bits(b & 0xffff_0000);
                }
            }
            // SAFETY: 16 values of a row of the result, for which the caller vouched.
            unsafe { store(args.out.add(row * args.out_stride + column), &sums, args.add) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_half_precision_number_is_converted_exactly() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits);
            if expected.is_finite() {
                assert_eq!(half_to(bits).to_bits(), expected.to_f32().to_bits(), "{bits:#x}");
            }
        }
    }
}
