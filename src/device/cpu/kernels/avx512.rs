//! 512-bit kernels: byte dot products (VNNI) and bf16 dot products.
//!
//! Lanes are output rows, so no sum ever crosses lanes. Written with intrinsics because the
//! compiler finds neither dot product by itself.

use std::arch::x86_64::*;

use super::{GROUP_MAX, GemmArgs, Packing, PairArgs, groups};
use crate::device::cpu::rows::ActBlock;

/// Kinds of integer weights, as a constant parameter of the kernel.
const Q8: u8 = 0;
const Q4: u8 = 1;
const Q4_MIN: u8 = 2;

/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ and VNNI; otherwise as for [`super::Kernels::gemm`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
pub(super) unsafe fn gemm_q8(args: &GemmArgs) {
    // SAFETY: the caller's word.
    unsafe { gemm::<Q8>(args) }
}

/// # Safety
/// As for [`gemm_q8`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
pub(super) unsafe fn gemm_q4(args: &GemmArgs) {
    // SAFETY: the caller's word.
    unsafe { gemm::<Q4>(args) }
}

/// # Safety
/// As for [`gemm_q8`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
pub(super) unsafe fn gemm_q4_min(args: &GemmArgs) {
    // SAFETY: the caller's word.
    unsafe { gemm::<Q4_MIN>(args) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
#[inline]
unsafe fn gemm<const KIND: u8>(args: &GemmArgs) {
    groups(args.tokens, GROUP_MAX, |first, count| {
        // SAFETY: tokens `first` to `first + count` are among those that the caller vouched for.
        unsafe {
            let x = args.x.add(first * args.x_stride);
            let out = args.out.add(first * args.out_stride);
            match count {
                1 => group::<KIND, 1>(args, x, out),
                2 => group::<KIND, 2>(args, x, out),
                3 => group::<KIND, 3>(args, x, out),
                4 => group::<KIND, 4>(args, x, out),
                5 => group::<KIND, 5>(args, x, out),
                _ => group::<KIND, 6>(args, x, out),
            }
        }
    });
}

/// `R` tokens times the panel's two vectors of rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")]
unsafe fn group<const KIND: u8, const R: usize>(
    args: &GemmArgs,
    x: *const ActBlock,
    out: *mut f32,
) {
    // SAFETY: every load is inside block `b` of the panel or of a token's activations, every
    // store inside a token's 32 results; the caller vouched for all of them.
    unsafe {
        let mut w = args.panel;
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let tokens: [*const ActBlock; R] = std::array::from_fn(|r| x.add(r * args.x_stride));
        for b in 0..args.blocks {
            let acts: [*const ActBlock; R] = std::array::from_fn(|r| tokens[r].add(b));
            let dots = if KIND == Q8 { dots_q8(w, &acts) } else { dots_q4::<R>(w, &acts) };
            let dots = if KIND == Q4_MIN { dots } else { centred::<KIND, R>(dots, &acts) };
            let scales = w.add(if KIND == Q8 { 1024 } else { 512 });
            let d: [__m512; 2] = std::array::from_fn(|v| load_halves(scales.add(32 * v)));
            for r in 0..R {
                let scale = _mm512_set1_ps((*acts[r]).scale);
                for v in 0..2 {
                    let dot = _mm512_cvtepi32_ps(dots[r][v]);
                    let product = _mm512_mul_ps(dot, _mm512_mul_ps(d[v], scale));
                    sums[r][v] = _mm512_add_ps(sums[r][v], product);
                }
            }
            if KIND == Q4_MIN {
                let m: [__m512; 2] = std::array::from_fn(|v| load_halves(scales.add(64 + 32 * v)));
                for r in 0..R {
                    let scaled_sum = _mm512_set1_ps((*acts[r]).scaled_sum);
                    for v in 0..2 {
                        sums[r][v] = _mm512_add_ps(sums[r][v], _mm512_mul_ps(m[v], scaled_sum));
                    }
                }
            }
            w = w.add(match KIND {
                Q8 => Packing::Q8.block_bytes(),
                Q4 => Packing::Q4.block_bytes(),
                _ => Packing::Q4Min.block_bytes(),
            });
        }
        for (r, sums) in sums.iter().enumerate() {
            let out = out.add(r * args.out_stride);
            store(out, sums[0], args.add);
            store(out.add(16), sums[1], args.add);
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store(at: *mut f32, sum: __m512, add: bool) {
    // SAFETY: the caller points at 16 values of its results.
    unsafe {
        let sum = if add { _mm512_add_ps(_mm512_loadu_ps(at), sum) } else { sum };
        _mm512_storeu_ps(at, sum);
    }
}

#[target_feature(enable = "avx512f,f16c")]
#[inline]
unsafe fn load_halves(at: *const u8) -> __m512 {
    // SAFETY: the caller points at 32 bytes of scales or minima.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
}

/// Four bytes of a token's quants, in every lane.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn four(acts: *const ActBlock, k: usize) -> __m512i {
    // SAFETY: the quants are the block's first 32 bytes and `k` is below 29.
    unsafe { _mm512_set1_epi32(acts.cast::<u8>().add(k).cast::<i32>().read_unaligned()) }
}

/// Dot products of bytes that are 128 too high.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
unsafe fn dots_q8<const R: usize>(w: *const u8, acts: &[*const ActBlock; R]) -> [[__m512i; 2]; R] {
    let mut dots = [[_mm512_setzero_si512(); 2]; R];
    for step in 0..8 {
        // SAFETY: step `step` of the two vectors of rows; the block has 2 × 8 × 64 bytes of them.
        unsafe {
            let low = _mm512_loadu_si512(w.add(64 * step).cast());
            let high = _mm512_loadu_si512(w.add(512 + 64 * step).cast());
            for r in 0..R {
                let x = four(acts[r], 4 * step);
                dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], low, x);
                dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], high, x);
            }
        }
    }
    dots
}

/// Dot products of nibbles.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
unsafe fn dots_q4<const R: usize>(w: *const u8, acts: &[*const ActBlock; R]) -> [[__m512i; 2]; R] {
    let mut dots = [[_mm512_setzero_si512(); 2]; R];
    let mask = _mm512_set1_epi8(15);
    for step in 0..4 {
        // SAFETY: load `step` of the two vectors of rows; the block has 2 × 4 × 64 bytes of them.
        unsafe {
            let a = _mm512_loadu_si512(w.add(64 * step).cast());
            let b = _mm512_loadu_si512(w.add(256 + 64 * step).cast());
            let (a_low, b_low) = (_mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
            for r in 0..R {
                let x = four(acts[r], 4 * step);
                dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], a_low, x);
                dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], b_low, x);
            }
            let a_high = _mm512_and_si512(_mm512_srli_epi16::<4>(a), mask);
            let b_high = _mm512_and_si512(_mm512_srli_epi16::<4>(b), mask);
            for r in 0..R {
                let x = four(acts[r], 16 + 4 * step);
                dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], a_high, x);
                dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], b_high, x);
            }
        }
    }
    dots
}

/// Takes the weights' zero point out of dot products: exact, so when it happens does not matter.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn centred<const KIND: u8, const R: usize>(
    mut dots: [[__m512i; 2]; R],
    acts: &[*const ActBlock; R],
) -> [[__m512i; 2]; R] {
    for r in 0..R {
        // SAFETY: the caller's blocks.
        let sum = unsafe { (*acts[r]).sum };
        let excess = _mm512_set1_epi32(sum * if KIND == Q8 { 128 } else { 8 });
        for dot in &mut dots[r] {
            *dot = _mm512_sub_epi32(*dot, excess);
        }
    }
    dots
}

/// # Safety
/// The machine has AVX-512 F and BF16; otherwise as for [`super::Kernels::pairs`].
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn pairs(args: &PairArgs) {
    groups(args.rows, GROUP_MAX, |first, count| {
        // SAFETY: rows `first` to `first + count` are among those that the caller vouched for.
        unsafe {
            let a = args.a.add(first * args.a_stride);
            let out = args.out.add(first * args.out_stride);
            match count {
                1 => pair_rows::<1>(args, a, out),
                2 => pair_rows::<2>(args, a, out),
                3 => pair_rows::<3>(args, a, out),
                4 => pair_rows::<4>(args, a, out),
                5 => pair_rows::<5>(args, a, out),
                _ => pair_rows::<6>(args, a, out),
            }
        }
    });
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn pair_rows<const R: usize>(args: &PairArgs, a: *const u32, out: *mut f32) {
    let mut column = 0;
    // SAFETY: columns `column` and on, a multiple of 32 of them, are left of the matrix and of
    // every row of the result.
    unsafe {
        while column + 64 <= args.columns {
            pair_tile::<R, 4>(args, a, args.b.add(column), out.add(column));
            column += 64;
        }
        if column < args.columns {
            pair_tile::<R, 2>(args, a, args.b.add(column), out.add(column));
        }
    }
}

/// `R` rows times `V` vectors of 16 columns. Per pair: V loads, R broadcasts, R·V dot products.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn pair_tile<const R: usize, const V: usize>(
    args: &PairArgs,
    a: *const u32,
    mut b: *const u32,
    out: *mut f32,
) {
    // SAFETY: pair `p` of each row and of the columns is inside what the caller vouched for.
    // bf16 vectors and integer vectors are both 512 bits without invalid patterns.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        let rows: [*const u32; R] = std::array::from_fn(|r| a.add(r * args.a_stride));
        for p in 0..args.pairs {
            let columns: [__m512bh; V] =
                std::array::from_fn(|v| as_bf16(_mm512_loadu_si512(b.add(16 * v).cast())));
            for r in 0..R {
                let x = as_bf16(_mm512_set1_epi32(rows[r].add(p).read() as i32));
                for v in 0..V {
                    sums[r][v] = _mm512_dpbf16_ps(sums[r][v], columns[v], x);
                }
            }
            b = b.add(args.columns);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                store(out.add(r * args.out_stride + 16 * v), *sum, args.add);
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn as_bf16(vector: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes in which every pattern is valid; there is no intrinsic for it.
    unsafe { std::mem::transmute(vector) }
}
