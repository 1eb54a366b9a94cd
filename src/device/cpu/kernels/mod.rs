//! The compute kernels, one set per instruction-set path, behind one table of functions.
//!
//! Weights come in *panels* of [`PANEL_ROWS`] output rows, one sequential stream over blocks of
//! [`BLOCK`] columns (see `pack`). A GEMM kernel multiplies one panel with any number of tokens;
//! what it computes for a (token, row) never depends on the other tokens.
//!
//! Integer GEMM, per block of 32 columns, in this order and without fusing:
//! `sum += float(dot) * (d * scale)`, then for weights with a minimum `sum += m * scaled_sum`,
//! where `dot` is exact. So all paths agree bit for bit.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
#[cfg(test)]
pub(crate) mod tests;

use crate::device::cpu::isa::Isa;
use crate::device::cpu::rows::{ActBlock, BLOCK};

/// Output rows in a panel: two 512-bit vectors of 16 lanes.
pub const PANEL_ROWS: usize = 32;

/// How the weights of a matrix are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Unsigned bytes, 128 above the value, and a scale: Q8_0.
    Q8,
    /// Nibbles, 8 above the value, and a scale: Q4_0.
    Q4,
    /// Nibbles, a scale and a minimum: Q4_1.
    Q4Min,
    /// Pairs of bf16: F16, BF16 and F32 tensors.
    Bf16,
}

impl Packing {
    /// Bytes of one panel's block: 32 rows × 32 columns. A multiple of 64 for every packing.
    pub const fn block_bytes(self) -> usize {
        match self {
            Packing::Q8 => PANEL_ROWS * BLOCK + PANEL_ROWS * 2,
            Packing::Q4 => PANEL_ROWS * BLOCK / 2 + PANEL_ROWS * 2,
            Packing::Q4Min => PANEL_ROWS * BLOCK / 2 + PANEL_ROWS * 4,
            Packing::Bf16 => PANEL_ROWS * BLOCK * 2,
        }
    }

    /// Whether the activations are quantised blocks; otherwise they are bf16.
    pub const fn is_integer(self) -> bool {
        !matches!(self, Packing::Bf16)
    }
}

/// One panel of integer weights times some tokens.
#[derive(Clone, Copy, Debug)]
pub struct GemmArgs {
    /// The panel: `blocks` blocks, 64-byte aligned.
    pub panel: *const u8,
    /// Columns / 32.
    pub blocks: usize,
    /// Activations of the first token: `blocks` blocks.
    pub x: *const ActBlock,
    /// From one token to the next, in blocks.
    pub x_stride: usize,
    /// How many tokens.
    pub tokens: usize,
    /// Result of the first token: [`PANEL_ROWS`] values.
    pub out: *mut f32,
    /// From one token's result to the next's, in values.
    pub out_stride: usize,
    /// Whether to add to what is there rather than to overwrite it.
    pub add: bool,
}

/// Rows of bf16 pairs times a matrix of bf16 pairs: `out[r][c] = Σ a[r][p]·b[p][c]` over pairs
/// p, each of two products. Serves bf16 weights, queries times keys, probabilities times values.
#[derive(Clone, Copy, Debug)]
pub struct PairArgs {
    /// First row: `pairs` pairs of bf16.
    pub a: *const u32,
    /// From one row to the next, in pairs.
    pub a_stride: usize,
    /// How many rows.
    pub rows: usize,
    /// The matrix: `pairs` × `columns` pairs of bf16, one after the other.
    pub b: *const u32,
    /// Columns of the matrix, a multiple of 32.
    pub columns: usize,
    /// Length of the sums in pairs.
    pub pairs: usize,
    /// First row of the result: `columns` values.
    pub out: *mut f32,
    /// From one row of the result to the next, in values.
    pub out_stride: usize,
    /// Whether to add to what is there rather than to overwrite it.
    pub add: bool,
}

/// Tokens that one pass over a panel serves: 6 × 2 vectors of integer and as many of float sums
/// leave 8 of 32 registers for weights and activations.
pub const GROUP_MAX: usize = 6;

/// Calls `group(first, count)` for groups of at most `max` that cover 0..`total`, evenly.
#[inline(always)]
fn groups(total: usize, max: usize, mut group: impl FnMut(usize, usize)) {
    let groups = total.div_ceil(max);
    let mut first = 0;
    for index in 0..groups {
        let count = (total - first).div_ceil(groups - index);
        group(first, count);
        first += count;
    }
}

/// Passes over a row of logits.
#[derive(Clone, Copy, Debug)]
pub struct LogitKernels {
    /// See [`crate::device::cpu::logits::maxima`].
    pub maxima: unsafe fn(&[f32], &mut [f32]),
    /// See [`crate::device::cpu::logits::powers`].
    pub powers: unsafe fn(&[f32], f32, f32, &mut [f32]),
}

/// The kernels of one path. A table is only ever handed out when the machine has its path, which
/// is what makes calling its functions sound.
#[derive(Debug)]
pub struct Kernels {
    isa: Isa,
    gemm_q8: unsafe fn(&GemmArgs),
    gemm_q4: unsafe fn(&GemmArgs),
    gemm_q4_min: unsafe fn(&GemmArgs),
    pairs: unsafe fn(&PairArgs),
    quantise: unsafe fn(&[f32], &mut [ActBlock]),
    to_bf16: unsafe fn(&[f32], &mut [u16]),
    rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    swiglu: unsafe fn(&[f32], &[f32], &mut [f32]),
    swiglu_tile: unsafe fn(&[[f32; 2 * PANEL_ROWS]], *mut ActBlock, usize),
    add: unsafe fn(&[f32], &mut [f32]),
    rotate: unsafe fn(&mut [f32], &[f32]),
    max64: unsafe fn(&[f32; 64]) -> f32,
    powers64: unsafe fn(&[f32; 64], f32, &mut [u16; 64]) -> f32,
    blend: unsafe fn(&mut [f32], f32, &[f32], f32),
    logits: LogitKernels,
}

/// Compiles the element-wise routines for a path and gathers its table.
macro_rules! table {
    ($name:ident, $isa:expr, $gemms:ident, $pairs:path $(, $features:literal)?) => {
        pub(super) static $name: Kernels = {
            use $crate::device::cpu::{logits, rows};
            $(#[target_feature(enable = $features)])?
            unsafe fn quantise(values: &[f32], out: &mut [rows::ActBlock]) {
                rows::quantise(values, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn to_bf16(values: &[f32], out: &mut [u16]) {
                rows::to_bf16(values, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rms_norm(row: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                rows::rms_norm(row, weight, eps, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
                rows::swiglu(gate, up, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn swiglu_tile(
                tile: &[[f32; 2 * PANEL_ROWS]],
                out: *mut rows::ActBlock,
                stride: usize,
            ) {
                for (token, values) in tile.iter().enumerate() {
                    // SAFETY: the block of this token, for which the caller vouched.
                    let out = unsafe { &mut *out.add(token * stride) };
                    let (gate, up) = values.split_at(PANEL_ROWS);
                    let mut inner = [0.0; PANEL_ROWS];
                    rows::swiglu(gate, up, &mut inner);
                    rows::quantise_block(&inner, out);
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn add(row: &[f32], out: &mut [f32]) {
                rows::add(row, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rotate(head: &mut [f32], turns: &[f32]) {
                rows::rotate(head, turns);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn max64(scores: &[f32; 64]) -> f32 {
                rows::max64(scores)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn powers64(scores: &[f32; 64], max: f32, out: &mut [u16; 64]) -> f32 {
                rows::powers64(scores, max, out)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn blend(sum: &mut [f32], by: f32, other: &[f32], other_by: f32) {
                rows::blend(sum, by, other, other_by);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn maxima(row: &[f32], out: &mut [f32]) {
                logits::maxima(row, out);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn powers(row: &[f32], max: f32, factor: f32, out: &mut [f32]) {
                logits::powers(row, max, factor, out);
            }
            Kernels {
                isa: $isa,
                gemm_q8: $gemms::gemm_q8,
                gemm_q4: $gemms::gemm_q4,
                gemm_q4_min: $gemms::gemm_q4_min,
                pairs: $pairs,
                quantise,
                to_bf16,
                rms_norm,
                swiglu,
                swiglu_tile,
                add,
                rotate,
                max64,
                powers64,
                blend,
                logits: LogitKernels { maxima, powers },
            }
        };
    };
}

table!(PORTABLE, Isa::Portable, portable, portable::pairs);
#[cfg(target_arch = "x86_64")]
table!(AVX2, Isa::Avx2, avx2, avx2::pairs, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
table!(
    AVX512,
    Isa::Avx512,
    avx512,
    avx2::pairs,
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
);
#[cfg(target_arch = "x86_64")]
table!(
    AVX512_BF16,
    Isa::Avx512Bf16,
    avx512,
    avx512::pairs,
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"
);

impl Kernels {
    /// The kernels of a path; `None` when this machine lacks it.
    pub fn of(isa: Isa) -> Option<&'static Kernels> {
        if !isa.is_available() {
            return None;
        }
        match isa {
            Isa::Portable => Some(&PORTABLE),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Some(&AVX2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Some(&AVX512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Some(&AVX512_BF16),
            #[cfg(not(target_arch = "x86_64"))]
            _ => None,
        }
    }

    /// Which path.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// One panel of integer weights times some tokens.
    ///
    /// # Safety
    /// Everything that `args` describes is valid to read, the results to write, and nobody else
    /// uses the results meanwhile. `packing` is the panel's, and an integer one.
    pub unsafe fn gemm(&self, packing: Packing, args: &GemmArgs) {
        let kernel = match packing {
            Packing::Q8 => self.gemm_q8,
            Packing::Q4 => self.gemm_q4,
            Packing::Q4Min => self.gemm_q4_min,
            Packing::Bf16 => unreachable!("bf16 weights are multiplied as pairs"),
        };
        // SAFETY: the machine has the path (see `of`); the rest is the caller's word.
        unsafe { kernel(args) }
    }

    /// Rows of bf16 pairs times a matrix of bf16 pairs.
    ///
    /// # Safety
    /// As for [`Kernels::gemm`].
    pub unsafe fn pairs(&self, args: &PairArgs) {
        // SAFETY: the machine has the path (see `of`); the rest is the caller's word.
        unsafe { (self.pairs)(args) }
    }

    /// See `rows::quantise`.
    pub fn quantise(&self, values: &[f32], out: &mut [ActBlock]) {
        // SAFETY: the machine has the path (see `of`); so for the functions below.
        unsafe { (self.quantise)(values, out) }
    }

    /// See `rows::to_bf16`.
    pub fn to_bf16(&self, values: &[f32], out: &mut [u16]) {
        // SAFETY: as for `quantise`.
        unsafe { (self.to_bf16)(values, out) }
    }

    /// See `rows::rms_norm`.
    pub fn rms_norm(&self, row: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: as for `quantise`.
        unsafe { (self.rms_norm)(row, weight, eps, out) }
    }

    /// See `rows::swiglu`.
    pub fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: as for `quantise`.
        unsafe { (self.swiglu)(gate, up, out) }
    }

    /// SwiGLU of a tile, quantised: per token, a panel of gates and a panel of ups give one block.
    ///
    /// # Safety
    /// `out` points at the first token's block, the next token's is `stride` blocks on; they are
    /// valid to write and nobody else uses them meanwhile.
    pub unsafe fn swiglu_tile(
        &self,
        tile: &[[f32; 2 * PANEL_ROWS]],
        out: *mut ActBlock,
        stride: usize,
    ) {
        // SAFETY: the machine has the path (see `of`); the rest is the caller's word.
        unsafe { (self.swiglu_tile)(tile, out, stride) }
    }

    /// See `rows::add`.
    pub fn add(&self, row: &[f32], out: &mut [f32]) {
        // SAFETY: as for `quantise`.
        unsafe { (self.add)(row, out) }
    }

    /// See `rows::rotate`.
    pub fn rotate(&self, head: &mut [f32], turns: &[f32]) {
        // SAFETY: as for `quantise`.
        unsafe { (self.rotate)(head, turns) }
    }

    /// See `rows::max64`.
    pub fn max64(&self, scores: &[f32; 64]) -> f32 {
        // SAFETY: as for `quantise`.
        unsafe { (self.max64)(scores) }
    }

    /// See `rows::powers64`.
    pub fn powers64(&self, scores: &[f32; 64], max: f32, out: &mut [u16; 64]) -> f32 {
        // SAFETY: as for `quantise`.
        unsafe { (self.powers64)(scores, max, out) }
    }

    /// See `rows::blend`.
    pub fn blend(&self, sum: &mut [f32], by: f32, other: &[f32], other_by: f32) {
        // SAFETY: as for `quantise`.
        unsafe { (self.blend)(sum, by, other, other_by) }
    }

    /// See `logits::maxima`.
    pub fn maxima(&self, row: &[f32], out: &mut [f32]) {
        // SAFETY: as for `quantise`.
        unsafe { (self.logits.maxima)(row, out) }
    }

    /// See `logits::powers`.
    pub fn powers(&self, row: &[f32], max: f32, factor: f32, out: &mut [f32]) {
        // SAFETY: as for `quantise`.
        unsafe { (self.logits.powers)(row, max, factor, out) }
    }
}
