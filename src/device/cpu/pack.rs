//! Repacking a matrix from the file's rows into the panels that kernels read.
//!
//! A panel is [`PANEL_ROWS`] output rows; its blocks of 32 columns follow one another, so a kernel
//! reads one sequential stream. Within a block:
//!
//! - integers: for rows 0–15, then 16–31, lines of 64 bytes = 16 rows × 4 consecutive columns
//!   (byte dot products take four columns a lane); a nibble line holds columns 4s to 4s+3 in its
//!   low nibbles and those 16 further on in its high ones. Then 32 scales, then 32 minima, in
//!   half precision.
//! - bf16: 16 lines, one per pair of columns, of 32 rows × 2.
//!
//! Rows that pad the last panel and columns that pad the last block are zero.

use crate::device::cpu::kernels::{PANEL_ROWS, Packing};
use crate::device::cpu::rows::{BLOCK, bf16_from, bf16_to};
use crate::model::{DType, Tensor, quant};

/// Where a packed matrix lies in the weights' memory, and its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// How it is packed.
    pub packing: Packing,
    /// Output rows.
    pub rows: usize,
    /// Input columns.
    pub columns: usize,
    /// First byte.
    pub at: usize,
}

impl Matrix {
    /// The matrix that `tensor` becomes, at byte `at` of the weights' memory.
    ///
    /// # Panics
    /// When the tensor's type is unsupported: the model's configuration was not checked.
    pub fn of(tensor: &Tensor<'_>, at: usize) -> Matrix {
        let packing = match tensor.dtype {
            DType::Q8_0 => Packing::Q8,
            DType::Q4_0 => Packing::Q4,
            DType::Q4_1 => Packing::Q4Min,
            DType::F32 | DType::F16 | DType::Bf16 => Packing::Bf16,
            DType::Unsupported(_) => panic!("{} cannot be run", tensor.dtype),
        };
        Matrix { packing, rows: tensor.rows(), columns: tensor.columns(), at }
    }

    /// Blocks of columns.
    pub fn blocks(&self) -> usize {
        self.columns.div_ceil(BLOCK)
    }

    /// Panels of rows.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }

    /// Bytes of a panel.
    pub fn panel_bytes(&self) -> usize {
        self.blocks() * self.packing.block_bytes()
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// First byte of a panel.
    pub fn panel_at(&self, panel: usize) -> usize {
        debug_assert!(panel < self.panels());
        self.at + panel * self.panel_bytes()
    }

    /// Packs one panel of `tensor` into `out`, which is zero.
    pub fn pack_panel(&self, tensor: &Tensor<'_>, panel: usize, out: &mut [u8]) {
        assert_eq!(out.len(), self.panel_bytes());
        let first = panel * PANEL_ROWS;
        let mut values = vec![0.0; if self.packing == Packing::Bf16 { self.columns } else { 0 }];
        for row in first..self.rows.min(first + PANEL_ROWS) {
            let source = tensor.row(row);
            match self.packing {
                Packing::Bf16 => {
                    quant::dequantize_row(tensor.dtype, source, &mut values);
                    pack_pairs(&values, row - first, out);
                }
                packing => {
                    let blocks = out.chunks_exact_mut(packing.block_bytes());
                    let block_bytes = tensor.dtype.block_bytes();
                    for (source, out) in source.chunks_exact(block_bytes).zip(blocks) {
                        pack_block(packing, source, row - first, out);
                    }
                }
            }
        }
    }

    /// Turns a row of the packed matrix back into numbers: `panel` is the packed panel that holds
    /// `row`.
    pub fn unpack_row(&self, panel: &[u8], row: usize, out: &mut [f32]) {
        assert!(panel.len() == self.panel_bytes() && row < self.rows && out.len() == self.columns);
        let lane = row % PANEL_ROWS;
        let blocks = panel.chunks_exact(self.packing.block_bytes());
        for (block, out) in blocks.zip(out.chunks_mut(BLOCK)) {
            unpack_block(self.packing, block, lane, out);
        }
    }
}

/// Bytes of the quants in a block, before scales and minima.
const fn quant_bytes(packing: Packing) -> usize {
    match packing {
        Packing::Q8 => PANEL_ROWS * BLOCK,
        _ => PANEL_ROWS * BLOCK / 2,
    }
}

/// Where a row's part of line `line` starts.
fn line_at(packing: Packing, lane: usize, line: usize) -> usize {
    (lane / 16) * (quant_bytes(packing) / 2) + line * 64 + (lane % 16) * 4
}

/// The file's block of one row: scale, then minimum if any, then quants.
fn pack_block(packing: Packing, source: &[u8], lane: usize, out: &mut [u8]) {
    let (scale, source) = source.split_at(2);
    let scales = quant_bytes(packing);
    out[scales + 2 * lane..][..2].copy_from_slice(scale);
    let quants = if packing == Packing::Q4Min {
        let (min, quants) = source.split_at(2);
        out[scales + 2 * PANEL_ROWS + 2 * lane..][..2].copy_from_slice(min);
        quants
    } else {
        source
    };
    // The file pairs the nibbles of columns j and j + 16 in byte j, as the lines do.
    for (line, four) in quants.as_chunks::<4>().0.iter().enumerate() {
        let flip = if packing == Packing::Q8 { 0x80 } else { 0 };
        let four = four.map(|byte| byte ^ flip);
        out[line_at(packing, lane, line)..][..4].copy_from_slice(&four);
    }
}

fn pack_pairs(values: &[f32], lane: usize, out: &mut [u8]) {
    for (column, &value) in values.iter().enumerate() {
        let at = ((column / 2) * PANEL_ROWS + lane) * 4 + (column % 2) * 2;
        out[at..at + 2].copy_from_slice(&bf16_from(value).to_le_bytes());
    }
}

fn unpack_block(packing: Packing, block: &[u8], lane: usize, out: &mut [f32]) {
    let half = |at: usize| half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let scale_at = quant_bytes(packing) + 2 * lane;
    for (column, out) in out.iter_mut().enumerate() {
        *out = match packing {
            Packing::Q8 => {
                let byte = block[line_at(packing, lane, column / 4) + column % 4];
                half(scale_at) * f32::from((byte ^ 0x80) as i8)
            }
            Packing::Q4 | Packing::Q4Min => {
                let byte = block[line_at(packing, lane, column % 16 / 4) + column % 4];
                let nibble = f32::from(if column < 16 { byte & 15 } else { byte >> 4 });
                if packing == Packing::Q4 {
                    half(scale_at) * (nibble - 8.0)
                } else {
                    half(scale_at) * nibble + half(scale_at + 2 * PANEL_ROWS)
                }
            }
            Packing::Bf16 => {
                let at = ((column / 2) * PANEL_ROWS + lane) * 4 + (column % 2) * 2;
                bf16_to(u16::from_le_bytes([block[at], block[at + 1]]))
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Random bytes as a tensor whose scales are moderate numbers.
    fn data(dtype: DType, rows: usize, columns: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let bytes = dtype.row_bytes(columns).expect("whole blocks") * rows;
        let mut out: Vec<u8> = (0..bytes)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        let size = dtype.block_bytes();
        for (at, byte) in out.iter_mut().enumerate() {
            let halves = match dtype {
                DType::F16 => 2,
                DType::Q4_1 => 4,
                DType::Q4_0 | DType::Q8_0 => 2,
                _ => 0,
            };
            // Clears the top exponent bit of half-precision numbers: finite, below 2.
            if at % size < halves && at % 2 == 1 {
                *byte &= 0xbf;
            }
            // The same for bf16 and single precision.
            if matches!(dtype, DType::Bf16 | DType::F32) && at % size == size - 1 {
                *byte &= 0xbf;
            }
        }
        out
    }

    proptest! {
        #[test]
        fn every_row_comes_back_as_the_plain_functions_read_it(
            rows in 1usize..80, blocks in 1usize..4, odd in 0usize..31, seed: u64,
            kind in 0usize..6,
        ) {
            let dtype = [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::F16, DType::Bf16, DType::F32]
                [kind];
            let columns = blocks * BLOCK - if dtype.is_plain() { odd } else { 0 };
            let data = data(dtype, rows, columns, seed);
            let tensor = Tensor { name: "t", dtype, shape: &[columns, rows], data: &data };
            let matrix = Matrix::of(&tensor, 0);
            let mut plain = vec![0.0; columns];
            let mut unpacked = vec![0.0; columns];
            for panel in 0..matrix.panels() {
                let mut packed = vec![0; matrix.panel_bytes()];
                matrix.pack_panel(&tensor, panel, &mut packed);
                for row in panel * PANEL_ROWS..rows.min((panel + 1) * PANEL_ROWS) {
                    quant::dequantize_row(dtype, tensor.row(row), &mut plain);
                    if dtype.is_plain() {
                        for value in &mut plain {
                            *value = bf16_to(bf16_from(*value));
                        }
                    }
                    matrix.unpack_row(&packed, row, &mut unpacked);
                    prop_assert_eq!(&plain, &unpacked);
                }
            }
        }
    }
}
