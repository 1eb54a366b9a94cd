//! Activations between stages, in the form that the weights they meet are multiplied with.
#![allow(unsafe_code)]

use std::io;

use crate::device::cpu::kernels::{GemmArgs, Kernels, PANEL_ROWS, Packing, PairArgs};
use crate::device::cpu::memory::Region;
use crate::device::cpu::pack::Matrix;
use crate::device::cpu::rows::{ActBlock, BLOCK};
use crate::device::cpu::weights::Weights;

/// Rows of activations, one a token: quantised, or bf16, or both where a stage needs both.
pub struct Acts {
    blocks: usize,
    quants: Option<Region<ActBlock>>,
    halves: Option<Region<u16>>,
}

/// Where a product goes.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// First token's first value.
    pub at: *mut f32,
    /// From one token to the next.
    pub stride: usize,
    /// Whether to add to what is there.
    pub add: bool,
}

impl Acts {
    /// Room for `tokens` rows of `columns` values, to be multiplied with all of `matrices`.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(tokens: usize, columns: usize, matrices: &[&Matrix]) -> io::Result<Acts> {
        let blocks = columns.div_ceil(BLOCK);
        let has_integers = matrices.iter().any(|matrix| matrix.packing.is_integer());
        let has_pairs = matrices.iter().any(|matrix| !matrix.packing.is_integer());
        let quants = has_integers.then(|| Region::backed(tokens * blocks)).transpose()?;
        let halves = has_pairs.then(|| Region::backed(tokens * blocks * BLOCK)).transpose()?;
        Ok(Acts { blocks, quants, halves })
    }

    /// Bytes taken from the system.
    pub fn mapped_bytes(&self) -> u64 {
        self.quants.as_ref().map_or(0, Region::mapped_bytes)
            + self.halves.as_ref().map_or(0, Region::mapped_bytes)
    }

    /// Puts values into a token's row from block `first` on; the last block is filled up with
    /// zeroes.
    ///
    /// # Safety
    /// Nobody else uses these blocks meanwhile.
    pub unsafe fn store(&self, kernels: &Kernels, token: usize, first: usize, values: &[f32]) {
        let count = values.len().div_ceil(BLOCK);
        assert!(first + count <= self.blocks);
        let at = token * self.blocks + first;
        if let Some(quants) = &self.quants {
            // SAFETY: the caller has these blocks alone.
            kernels.quantise(values, unsafe { quants.slice_mut(at, count) });
        }
        if let Some(halves) = &self.halves {
            // SAFETY: the caller has these blocks alone.
            kernels.to_bf16(values, unsafe { halves.slice_mut(at * BLOCK, count * BLOCK) });
        }
    }

    /// Puts one block of the feed-forward's inner layer, from gates and ups, into the rows of
    /// tokens from `first` on.
    ///
    /// # Safety
    /// Nobody else uses this block of these tokens meanwhile.
    pub unsafe fn store_swiglu(
        &self,
        kernels: &Kernels,
        tile: &[[f32; 2 * PANEL_ROWS]],
        first: usize,
        block: usize,
    ) {
        assert!(block < self.blocks && !tile.is_empty());
        let at = first * self.blocks + block;
        if let Some(quants) = &self.quants {
            let out = quants.at(at, (tile.len() - 1) * self.blocks + 1);
            // SAFETY: in range (checked by `at`); the caller has these blocks alone.
            unsafe { kernels.swiglu_tile(tile, out, self.blocks) };
        }
        if let Some(halves) = &self.halves {
            for (token, values) in tile.iter().enumerate() {
                let (gate, up) = values.split_at(PANEL_ROWS);
                let mut inner = [0.0; PANEL_ROWS];
                kernels.swiglu(gate, up, &mut inner);
                let at = (at + token * self.blocks) * BLOCK;
                // SAFETY: the caller has these blocks alone.
                kernels.to_bf16(&inner, unsafe { halves.slice_mut(at, BLOCK) });
            }
        }
    }

    /// Multiplies a panel of a matrix with the rows of `count` tokens from `first` on.
    ///
    /// # Safety
    /// Nobody writes to these rows meanwhile; `out` has [`PANEL_ROWS`] values for each token that
    /// are valid to read and write and that nobody else uses.
    ///
    /// # Panics
    /// When the matrix was not named to [`Acts::new`], or the rows are not there.
    pub unsafe fn multiply(
        &self,
        kernels: &Kernels,
        weights: &Weights,
        (matrix, panel): (&Matrix, usize),
        (first, count): (usize, usize),
        out: Output,
    ) {
        assert_eq!(matrix.blocks(), self.blocks);
        let Output { at, stride, add } = out;
        let panel = weights.panel(matrix, panel);
        let (first, len) = (first * self.blocks, count * self.blocks);
        if matrix.packing == Packing::Bf16 {
            let halves = self.halves.as_ref().expect("made for this matrix");
            let pairs = self.blocks * BLOCK / 2;
            // SAFETY: the rows are in range (checked by `at`) and a row is whole pairs of bf16,
            // its start aligned to 64 bytes; the panel is `pairs` lines of 32 pairs; the rest is
            // the caller's word.
            unsafe {
                kernels.pairs(&PairArgs {
                    a: halves.at(first * BLOCK, len * BLOCK).cast(),
                    a_stride: pairs,
                    rows: count,
                    b: panel.as_ptr().cast(),
                    columns: PANEL_ROWS,
                    pairs,
                    out: at,
                    out_stride: stride,
                    add,
                });
            }
        } else {
            let quants = self.quants.as_ref().expect("made for this matrix");
            // SAFETY: the rows are in range (checked by `at`); the panel is `blocks` blocks of
            // this packing; the rest is the caller's word.
            unsafe {
                kernels.gemm(
                    matrix.packing,
                    &GemmArgs {
                        panel: panel.as_ptr(),
                        blocks: self.blocks,
                        x: quants.at(first, len),
                        x_stride: self.blocks,
                        tokens: count,
                        out: at,
                        out_stride: stride,
                        add,
                    },
                );
            }
        }
    }
}
