//! 256-bit kernels for machines without byte dot products.
//!
//! Lanes are output rows as in the 512-bit kernels, 8 of them, over the same packed panels.
//! Everything stays exact: products of nibbles and quants are at most 15·127, so eight pairs of
//! them (30,480) fit 16 bits; bytes are multiplied as magnitudes times signed quants
//! (128·127·2 = 32,512 fits) and widened at once.

use std::arch::x86_64::*;

use super::{GROUP_MAX, GemmArgs, PANEL_ROWS, Packing, PairArgs, groups};
use crate::device::cpu::rows::ActBlock;

const Q8: u8 = 0;
const Q4: u8 = 1;
const Q4_MIN: u8 = 2;

/// Tokens of one pass: 4 integer and 4 float sums, and 16 registers for everything.
const GROUP: usize = 4;

/// # Safety
/// The machine has AVX2, FMA and F16C; otherwise as for [`super::Kernels::gemm`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn gemm_q8(args: &GemmArgs) {
    // SAFETY: the caller's word.
    unsafe { gemm::<Q8>(args) }
}

/// # Safety
/// As for [`gemm_q8`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn gemm_q4(args: &GemmArgs) {
    // SAFETY: the caller's word.
    unsafe { gemm::<Q4>(args) }
}

/// # Safety
/// As for [`gemm_q8`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn gemm_q4_min(args: &GemmArgs) {
    // SAFETY: the caller's word.
    unsafe { gemm::<Q4_MIN>(args) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn gemm<const KIND: u8>(args: &GemmArgs) {
    groups(args.tokens, GROUP, |first, count| {
        for eight in 0..PANEL_ROWS / 8 {
            // SAFETY: tokens `first` to `first + count` and the panel's rows from 8·`eight` are
            // among what the caller vouched for.
            unsafe {
                let x = args.x.add(first * args.x_stride);
                let out = args.out.add(first * args.out_stride + 8 * eight);
                match count {
                    1 => group::<KIND, 1>(args, eight, x, out),
                    2 => group::<KIND, 2>(args, eight, x, out),
                    3 => group::<KIND, 3>(args, eight, x, out),
                    _ => group::<KIND, 4>(args, eight, x, out),
                }
            }
        }
    });
}

/// `R` tokens times eight rows of the panel.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn group<const KIND: u8, const R: usize>(
    args: &GemmArgs,
    eight: usize,
    x: *const ActBlock,
    out: *mut f32,
) {
    let block_bytes = match KIND {
        Q8 => Packing::Q8.block_bytes(),
        Q4 => Packing::Q4.block_bytes(),
        _ => Packing::Q4Min.block_bytes(),
    };
    // Rows 0 to 15 come first in a block, then 16 to 31; each 64-byte line holds 16 rows.
    let (half_bytes, scales) = if KIND == Q8 { (512, 1024) } else { (256, 512) };
    let line = (eight / 2) * half_bytes + (eight % 2) * 32;
    // SAFETY: every load is inside block `b` of the panel or of a token's activations, every
    // store inside eight of a token's results; the caller vouched for all of them.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); R];
        let tokens: [*const ActBlock; R] = std::array::from_fn(|r| x.add(r * args.x_stride));
        for b in 0..args.blocks {
            let block = args.panel.add(b * block_bytes);
            let acts: [*const ActBlock; R] = std::array::from_fn(|r| tokens[r].add(b));
            let dots = match KIND {
                Q8 => dots_q8::<R>(block.add(line), &acts),
                _ => dots_q4::<R>(block.add(line), &acts),
            };
            let d = load_halves(block.add(scales + 16 * eight));
            for r in 0..R {
                let zero = if KIND == Q4 { (*acts[r]).sum * 8 } else { 0 };
                let dot = _mm256_sub_epi32(dots[r], _mm256_set1_epi32(zero));
                let scale = _mm256_mul_ps(d, _mm256_set1_ps((*acts[r]).scale));
                let product = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale);
                sums[r] = _mm256_add_ps(sums[r], product);
            }
            if KIND == Q4_MIN {
                let m = load_halves(block.add(scales + 64 + 16 * eight));
                for r in 0..R {
                    let product = _mm256_mul_ps(m, _mm256_set1_ps((*acts[r]).scaled_sum));
                    sums[r] = _mm256_add_ps(sums[r], product);
                }
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            store(out.add(r * args.out_stride), *sum, args.add);
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store(at: *mut f32, sum: __m256, add: bool) {
    // SAFETY: the caller points at 8 values of its results.
    unsafe {
        let sum = if add { _mm256_add_ps(_mm256_loadu_ps(at), sum) } else { sum };
        _mm256_storeu_ps(at, sum);
    }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn load_halves(at: *const u8) -> __m256 {
    // SAFETY: the caller points at 16 bytes of scales or minima.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
}

/// Four bytes of a token's quants, in every lane.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn four(acts: *const ActBlock, k: usize) -> __m256i {
    // SAFETY: the quants are the block's first 32 bytes and `k` is below 29.
    unsafe { _mm256_set1_epi32(acts.cast::<u8>().add(k).cast::<i32>().read_unaligned()) }
}

/// Dot products of signed weights, stored 128 too high.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn dots_q8<const R: usize>(w: *const u8, acts: &[*const ActBlock; R]) -> [__m256i; R] {
    let mut dots = [_mm256_setzero_si256(); R];
    let ones = _mm256_set1_epi16(1);
    let top_bit = _mm256_set1_epi8(i8::MIN);
    for step in 0..8 {
        // SAFETY: step `step` of the rows' lines.
        unsafe {
            let weights = _mm256_xor_si256(_mm256_loadu_si256(w.add(64 * step).cast()), top_bit);
            let magnitudes = _mm256_abs_epi8(weights);
            for r in 0..R {
                let x = _mm256_sign_epi8(four(acts[r], 4 * step), weights);
                let pairs = _mm256_maddubs_epi16(magnitudes, x);
                dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    dots
}

/// Dot products of nibbles.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn dots_q4<const R: usize>(w: *const u8, acts: &[*const ActBlock; R]) -> [__m256i; R] {
    let mut pairs = [_mm256_setzero_si256(); R];
    let mask = _mm256_set1_epi8(15);
    for step in 0..4 {
        // SAFETY: load `step` of the rows' lines.
        unsafe {
            let weights = _mm256_loadu_si256(w.add(64 * step).cast());
            let low = _mm256_and_si256(weights, mask);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(weights), mask);
            for r in 0..R {
                let x = four(acts[r], 4 * step);
                pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(low, x));
                let x = four(acts[r], 16 + 4 * step);
                pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(high, x));
            }
        }
    }
    let ones = _mm256_set1_epi16(1);
    std::array::from_fn(|r| _mm256_madd_epi16(pairs[r], ones))
}

/// # Safety
/// The machine has AVX2 and FMA; otherwise as for [`super::Kernels::pairs`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn pairs(args: &PairArgs) {
    groups(args.rows, GROUP_MAX, |first, count| {
        for column in (0..args.columns).step_by(16) {
            // SAFETY: rows `first` to `first + count` and 16 columns from `column` are among what
            // the caller vouched for.
            unsafe {
                let a = args.a.add(first * args.a_stride);
                let out = args.out.add(first * args.out_stride + column);
                match count {
                    1 => pair_tile::<1>(args, a, args.b.add(column), out),
                    2 => pair_tile::<2>(args, a, args.b.add(column), out),
                    3 => pair_tile::<3>(args, a, args.b.add(column), out),
                    4 => pair_tile::<4>(args, a, args.b.add(column), out),
                    5 => pair_tile::<5>(args, a, args.b.add(column), out),
                    _ => pair_tile::<6>(args, a, args.b.add(column), out),
                }
            }
        }
    });
}

/// `R` rows times 16 columns: the pairs' halves are widened to floats, which is exact.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn pair_tile<const R: usize>(
    args: &PairArgs,
    a: *const u32,
    mut b: *const u32,
    out: *mut f32,
) {
    // SAFETY: pair `p` of each row and of 16 columns is inside what the caller vouched for.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        let rows: [*const u32; R] = std::array::from_fn(|r| a.add(r * args.a_stride));
        let upper = _mm256_set1_epi32(0xffff_0000u32 as i32);
        for p in 0..args.pairs {
            for (v, half) in [0, 8].into_iter().enumerate() {
                let columns = _mm256_loadu_si256(b.add(half).cast());
                let first = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(columns));
                let second = _mm256_castsi256_ps(_mm256_and_si256(columns, upper));
                for r in 0..R {
                    let x = rows[r].add(p).read();
                    let x_first = _mm256_set1_ps(f32::from_bits(x << 16));
                    let x_second = _mm256_set1_ps(f32::from_bits(x & 0xffff_0000));
                    sums[r][v] = _mm256_fmadd_ps(x_first, first, sums[r][v]);
                    sums[r][v] = _mm256_fmadd_ps(x_second, second, sums[r][v]);
                }
            }
            b = b.add(args.columns);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                store(out.add(r * args.out_stride + 8 * v), *sum, args.add);
            }
        }
    }
}
