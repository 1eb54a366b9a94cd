//! Repacking matrices from the file's rows into the tiles that kernels read (`kernels/abi.h`,
//! "weights"): 16 rows by 32 columns, each lane's operands of two matrix instructions in a row.

use half::{bf16, f16};

use crate::device::cuda::abi;
use crate::model::{DType, Tensor, quant};

/// Rows of a tile.
pub const TILE_ROWS: usize = abi::FB_TILE_ROWS as usize;
/// Columns of a tile: a block of every quantised type.
pub const TILE_COLUMNS: usize = abi::FB_TILE_COLS as usize;
const TILE_VALUES: usize = TILE_ROWS * TILE_COLUMNS;

/// How a matrix is stored on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// 16-bit floats.
    Bf16,
    /// d·q, q of 8 bits.
    Q8,
    /// d·(q − 8), q of 4 bits.
    Q4,
    /// d·q + m, q of 4 bits.
    Q4Min,
}

impl Storage {
    /// What a tensor of this type is stored as when it stands alone.
    fn of(dtype: DType) -> Storage {
        match dtype {
            DType::Q8_0 => Storage::Q8,
            DType::Q4_0 => Storage::Q4,
            DType::Q4_1 => Storage::Q4Min,
            DType::F32 | DType::F16 | DType::Bf16 | DType::Unsupported(_) => Storage::Bf16,
        }
    }

    /// What both can be stored as. Files mix types within a layer (values often have more bits
    /// than keys), and one product has one type: 4-bit values without a minimum are exact as 8-bit
    /// ones and, with m = −8d, as those with a minimum; all else is rounded to bf16.
    fn common(self, other: Storage) -> Storage {
        match (self, other) {
            (a, b) if a == b => a,
            (Storage::Q4, Storage::Q8) | (Storage::Q8, Storage::Q4) => Storage::Q8,
            (Storage::Q4, Storage::Q4Min) | (Storage::Q4Min, Storage::Q4) => Storage::Q4Min,
            _ => Storage::Bf16,
        }
    }

    /// Its number in `abi.h`.
    pub fn number(self) -> abi::fb_weight_type {
        match self {
            Storage::Bf16 => abi::FB_BF16,
            Storage::Q8 => abi::FB_Q8,
            Storage::Q4 => abi::FB_Q4,
            Storage::Q4Min => abi::FB_Q4M,
        }
    }

    /// Its name in those of kernels.
    pub fn name(self) -> &'static str {
        match self {
            Storage::Bf16 => "bf16",
            Storage::Q8 => "q8",
            Storage::Q4 => "q4",
            Storage::Q4Min => "q4m",
        }
    }

    /// Bytes of a tile without its scales.
    fn tile_bytes(self) -> usize {
        match self {
            Storage::Bf16 => 2 * TILE_VALUES,
            Storage::Q8 => TILE_VALUES,
            Storage::Q4 | Storage::Q4Min => TILE_VALUES / 2,
        }
    }

    /// Bytes of a tile's scales.
    fn scale_bytes(self) -> usize {
        match self {
            Storage::Bf16 => 0,
            Storage::Q8 | Storage::Q4 => 2 * TILE_ROWS,
            Storage::Q4Min => 4 * TILE_ROWS,
        }
    }
}

/// Which row of the parts lies where in the tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other.
    Plain,
    /// Rows 2j and 2j + 1 of all parts together are 8 apart in a tile.
    PairedRows,
    /// Row j of the first part and row j of the second are 8 apart in a tile.
    PairedParts,
}

/// A matrix as the device stores it: one tensor, or several with the same columns in one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// How values are stored.
    pub storage: Storage,
    /// Output rows, of all parts together.
    pub rows: usize,
    /// Input columns, a multiple of [`TILE_COLUMNS`].
    pub columns: usize,
    /// Where rows lie.
    pub order: Order,
}

impl Matrix {
    /// The matrix that `parts` become.
    pub fn of(parts: &[Tensor<'_>], order: Order) -> Matrix {
        let storages = parts.iter().map(|part| Storage::of(part.dtype));
        let storage = storages.reduce(Storage::common).expect("a matrix has a part");
        let columns = parts[0].columns();
        assert!(
            columns.is_multiple_of(TILE_COLUMNS) && parts.iter().all(|p| p.columns() == columns)
        );
        Matrix { storage, rows: parts.iter().map(Tensor::rows).sum(), columns, order }
    }

    /// Rows of tiles.
    pub fn bands(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    fn tiles_per_band(&self) -> usize {
        self.columns / TILE_COLUMNS
    }

    /// Bytes of a row of tiles.
    pub fn band_bytes(&self) -> usize {
        self.tiles_per_band() * self.storage.tile_bytes()
    }

    /// Bytes of the scales of a row of tiles.
    pub fn band_scale_bytes(&self) -> usize {
        self.tiles_per_band() * self.storage.scale_bytes()
    }

    /// Bytes of all tiles.
    pub fn tile_bytes(&self) -> usize {
        self.bands() * self.band_bytes()
    }

    /// Bytes of all scales.
    pub fn scale_bytes(&self) -> usize {
        self.bands() * self.band_scale_bytes()
    }

    /// Which row, of all parts one after the other, is row `row` of a band's tiles; `None` for
    /// padding.
    fn source(&self, band: usize, row: usize) -> Option<usize> {
        let half = TILE_ROWS / 2;
        let pair = band * half + row % half;
        let is_second = row >= half;
        let source = match self.order {
            Order::Plain => band * TILE_ROWS + row,
            Order::PairedRows => 2 * pair + usize::from(is_second),
            Order::PairedParts if pair >= self.rows / 2 => return None,
            Order::PairedParts => pair + if is_second { self.rows / 2 } else { 0 },
        };
        (source < self.rows).then_some(source)
    }

    /// Packs one row of tiles: `tiles` and `scales` are its places, zero before.
    pub fn pack_band(
        &self,
        parts: &[Tensor<'_>],
        band: usize,
        tiles: &mut [u8],
        scales: &mut [u8],
    ) {
        assert_eq!((tiles.len(), scales.len()), (self.band_bytes(), self.band_scale_bytes()));
        let mut values = vec![0.0; if self.storage == Storage::Bf16 { self.columns } else { 0 }];
        for row in 0..TILE_ROWS {
            let Some(mut source) = self.source(band, row) else { continue };
            let part = parts.iter().find(|part| {
                let is_here = source < part.rows();
                source -= if is_here { 0 } else { part.rows() };
                is_here
            });
            let part = part.expect("the source is one of the parts' rows");
            let bytes = part.row(source);
            if self.storage == Storage::Bf16 {
                quant::dequantize_row(part.dtype, bytes, &mut values);
                let blocks = values.as_chunks::<TILE_COLUMNS>().0;
                for (block, tile) in blocks.iter().zip(tiles.chunks_exact_mut(2 * TILE_VALUES)) {
                    pack_floats(block, row, tile);
                }
                continue;
            }
            let tiles = tiles.chunks_exact_mut(self.storage.tile_bytes());
            let scales = scales.chunks_exact_mut(self.storage.scale_bytes());
            let blocks = bytes.chunks_exact(part.dtype.block_bytes());
            for (block, (tile, scales)) in blocks.zip(tiles.zip(scales)) {
                let block = Block::read(part.dtype, block).stored_as(self.storage);
                block.put(self.storage, row, tile, scales);
            }
        }
    }
}

/// A quantised block of the file: value = scale · q + min.
struct Block {
    quants: [i8; TILE_COLUMNS],
    scale: f16,
    /// Only with [`Storage::Q4Min`].
    min: f16,
    storage: Storage,
}

impl Block {
    fn read(dtype: DType, bytes: &[u8]) -> Block {
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let nibbles = |bytes: &[u8]| {
            std::array::from_fn(|i| {
                let byte = bytes[i % 16];
                (if i < 16 { byte & 15 } else { byte >> 4 }) as i8
            })
        };
        let storage = Storage::of(dtype);
        let (quants, min) = match storage {
            Storage::Q8 => (std::array::from_fn(|i| bytes[2 + i] as i8), f16::ZERO),
            Storage::Q4 => (nibbles(&bytes[2..]), f16::ZERO),
            Storage::Q4Min => (nibbles(&bytes[4..]), half(2)),
            Storage::Bf16 => panic!("{dtype} has no quantised blocks"),
        };
        Block { quants, scale: half(0), min, storage }
    }

    /// The same values in another type; see [`Storage::common`].
    fn stored_as(mut self, storage: Storage) -> Block {
        match (self.storage, storage) {
            (from, to) if from == to => {}
            (Storage::Q4, Storage::Q8) => self.quants = self.quants.map(|quant| quant - 8),
            (Storage::Q4, Storage::Q4Min) => {
                // Exact: eight times a half-precision number, unless it overflows, which a scale
                // of a weight is far from.
                self.min = f16::from_f32(-8.0 * self.scale.to_f32());
            }
            (from, to) => panic!("{from:?} is never stored as {to:?} by blocks"),
        }
        self.storage = storage;
        self
    }

    fn put(&self, storage: Storage, row: usize, tile: &mut [u8], scales: &mut [u8]) {
        let scale = self.scale.to_le_bytes();
        // Those of a lane's two rows side by side: one load.
        let (lane_row, is_second) = (row % 8, row / 8);
        if storage == Storage::Q4Min {
            scales[2 * (4 * lane_row + is_second)..][..2].copy_from_slice(&scale);
            let min = self.min.to_le_bytes();
            scales[2 * (4 * lane_row + 2 + is_second)..][..2].copy_from_slice(&min);
        } else {
            scales[2 * (2 * lane_row + is_second)..][..2].copy_from_slice(&scale);
        }
        for (column, &quant) in self.quants.iter().enumerate() {
            let Place { step, lane, value } = Place::of(row, column);
            if storage == Storage::Q8 {
                tile[16 * lane + 8 * step + value] = quant as u8;
            } else {
                // Even values in the word's low half, odd ones in its high half.
                let byte = 2 * (value % 2) + value / 4;
                tile[8 * lane + 4 * step + byte] |= (quant as u8) << (4 * (value / 2 % 2));
            }
        }
    }
}

fn pack_floats(block: &[f32; TILE_COLUMNS], row: usize, tile: &mut [u8]) {
    for (column, &number) in block.iter().enumerate() {
        let Place { step, lane, value } = Place::of(row, column);
        let at = 2 * ((32 * step + lane) * 8 + value);
        tile[at..at + 2].copy_from_slice(&bf16::from_f32(number).to_le_bytes());
    }
}

/// Where an element of a tile lies: which matrix instruction, whose lane, which of its eight.
struct Place {
    step: usize,
    lane: usize,
    value: usize,
}

impl Place {
    /// Lane 4g + t has rows g and g + 8, and of a step's 16 columns 2t, 2t + 1, 2t + 8, 2t + 9;
    /// a register is two neighbouring columns, and the rows change faster than the columns' halves.
    fn of(row: usize, column: usize) -> Place {
        let within = column % 16;
        Place {
            step: column / 16,
            lane: 4 * (row % 8) + within % 8 / 2,
            value: within % 2 + 2 * (row / 8) + 4 * (within / 8),
        }
    }
}

#[cfg(test)]
mod tests;
