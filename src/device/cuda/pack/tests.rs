use proptest::prelude::*;

use super::*;

/// The layout as `abi.h` lists it, value by value: (row, column) of each of a lane's eight.
fn listed(lane: usize, step: usize) -> [(usize, usize); 8] {
    let (g, t, s) = (lane / 4, lane % 4, 16 * step);
    [
        (g, s + 2 * t),
        (g, s + 2 * t + 1),
        (g + 8, s + 2 * t),
        (g + 8, s + 2 * t + 1),
        (g, s + 2 * t + 8),
        (g, s + 2 * t + 9),
        (g + 8, s + 2 * t + 8),
        (g + 8, s + 2 * t + 9),
    ]
}

fn half_at(bytes: &[u8], index: usize) -> f32 {
    f16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32()
}

/// Reads a band back by the list above, as a kernel's lane would.
fn unpack(matrix: &Matrix, tiles: &[u8], scales: &[u8]) -> Vec<Vec<f32>> {
    let mut rows = vec![vec![f32::NAN; matrix.columns]; TILE_ROWS];
    for tile in 0..matrix.columns / TILE_COLUMNS {
        let bytes = &tiles[tile * matrix.storage.tile_bytes()..][..matrix.storage.tile_bytes()];
        let scales = &scales[tile * matrix.storage.scale_bytes()..];
        for (lane, step, i) in (0..32 * 2 * 8).map(|n| (n / 16, n / 8 % 2, n % 8)) {
            let (row, column) = listed(lane, step)[i];
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
            let nibble =
                || ((word(8 * lane + 4 * step) >> (4 * (i / 2) + 16 * (i % 2))) & 15) as f32;
            let pair = row % 8 * 2 + row / 8;
            rows[row][tile * TILE_COLUMNS + column] = match matrix.storage {
                Storage::Bf16 => {
                    let at = 2 * (step * 256 + lane * 8 + i);
                    bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
                }
                Storage::Q8 => {
                    let quant = bytes[lane * 16 + step * 8 + i] as i8;
                    half_at(scales, pair) * f32::from(quant)
                }
                Storage::Q4 => half_at(scales, pair) * (nibble() - 8.0),
                Storage::Q4Min => {
                    let four = row % 8 * 4 + row / 8;
                    half_at(scales, four) * nibble() + half_at(scales, four + 2)
                }
            };
        }
    }
    rows
}

const DTYPES: [DType; 6] =
    [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::F16, DType::Bf16, DType::F32];

/// Random bytes as a tensor whose floats are finite and below 2.
fn data(dtype: DType, rows: usize, columns: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let bytes = dtype.row_bytes(columns).expect("whole blocks") * rows;
    let floats = match dtype {
        DType::Q4_1 => 4,
        DType::Q4_0 | DType::Q8_0 => 2,
        _ => dtype.block_bytes(),
    };
    let float_bytes = if dtype == DType::F32 { 4 } else { 2 };
    let mut byte = |at: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at = at % dtype.block_bytes();
        let is_exponent = at < floats && at % float_bytes == float_bytes - 1;
        (state >> 56) as u8 & if is_exponent { 0xbf } else { 0xff }
    };
    (0..bytes).map(&mut byte).collect()
}

struct Stored {
    dtype: DType,
    shape: [usize; 2],
    data: Vec<u8>,
}

impl Stored {
    fn new(dtype: DType, rows: usize, columns: usize, seed: u64) -> Stored {
        Stored { dtype, shape: [columns, rows], data: data(dtype, rows, columns, seed) }
    }

    fn tensor(&self) -> Tensor<'_> {
        Tensor { name: "t", dtype: self.dtype, shape: &self.shape, data: &self.data }
    }

    fn row(&self, row: usize) -> Vec<f32> {
        let mut values = vec![0.0; self.shape[0]];
        quant::dequantize_row(self.dtype, self.tensor().row(row), &mut values);
        values
    }
}

/// Packs all bands and gives, for each row of tiles, what comes back.
fn packed_and_unpacked(matrix: &Matrix, parts: &[Tensor<'_>]) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for band in 0..matrix.bands() {
        let mut tiles = vec![0; matrix.band_bytes()];
        let mut scales = vec![0; matrix.band_scale_bytes()];
        matrix.pack_band(parts, band, &mut tiles, &mut scales);
        rows.extend(unpack(matrix, &tiles, &scales));
    }
    rows
}

fn rounded(values: &[f32], storage: Storage) -> Vec<f32> {
    let round = |value: &f32| match storage {
        Storage::Bf16 => bf16::from_f32(*value).to_f32(),
        _ => *value,
    };
    values.iter().map(round).collect()
}

proptest! {
    #[test]
    fn every_row_comes_back_as_the_plain_functions_read_it(
        rows in 1usize..50, blocks in 1usize..4, kind in 0usize..6, seed: u64,
    ) {
        let stored = Stored::new(DTYPES[kind], rows, blocks * 32, seed);
        let matrix = Matrix::of(&[stored.tensor()], Order::Plain);
        let back = packed_and_unpacked(&matrix, &[stored.tensor()]);
        prop_assert_eq!(back.len() % 16, 0);
        for (row, back) in back.iter().enumerate() {
            if row < rows {
                prop_assert_eq!(&rounded(&stored.row(row), matrix.storage), back);
            } else {
                prop_assert!(back.iter().all(|&value| value == 0.0), "padding is zero");
            }
        }
    }

    #[test]
    fn pairs_of_a_head_lie_eight_rows_apart_whatever_types_the_parts_have(
        heads in 1usize..4, kinds in [0usize..6, 0usize..6, 0usize..6], seed: u64,
    ) {
        let parts = [
            Stored::new(DTYPES[kinds[0]], heads * 8, 64, seed),
            Stored::new(DTYPES[kinds[1]], 8, 64, seed ^ 1),
            Stored::new(DTYPES[kinds[2]], 8, 64, seed ^ 2),
        ];
        let tensors = parts.each_ref().map(Stored::tensor);
        let matrix = Matrix::of(&tensors, Order::PairedRows);
        let all: Vec<Vec<f32>> =
            parts.iter().flat_map(|part| (0..part.shape[1]).map(|row| part.row(row))).collect();
        let back = packed_and_unpacked(&matrix, &tensors);
        for pair in 0..all.len() / 2 {
            let at = pair / 8 * 16 + pair % 8;
            for second in 0..2 {
                let expected = rounded(&all[2 * pair + second], matrix.storage);
                prop_assert_eq!(&expected, &back[at + 8 * second]);
            }
        }
    }

    #[test]
    fn gate_and_up_meet_in_pairs(ffn in 1usize..40, kind in 0usize..6, seed: u64) {
        let parts = [
            Stored::new(DTYPES[kind], ffn, 32, seed),
            Stored::new(DTYPES[kind], ffn, 32, !seed),
        ];
        let tensors = parts.each_ref().map(Stored::tensor);
        let matrix = Matrix::of(&tensors, Order::PairedParts);
        let back = packed_and_unpacked(&matrix, &tensors);
        for (index, back) in back.iter().enumerate() {
            let (pair, part) = (index / 16 * 8 + index % 8, index % 16 / 8);
            let expected = if pair < ffn { parts[part].row(pair) } else { vec![0.0; 32] };
            let expected = rounded(&expected, matrix.storage);
            if pair < ffn {
                prop_assert_eq!(&expected, back);
            } else {
                prop_assert!(back.iter().all(|&value| value == 0.0));
            }
        }
    }
}

#[test]
fn types_that_meet_keep_their_values_where_they_can() {
    let common = |a: DType, b: DType| Storage::of(a).common(Storage::of(b));
    assert_eq!(common(DType::Q4_0, DType::Q8_0), Storage::Q8);
    assert_eq!(common(DType::Q4_1, DType::Q4_0), Storage::Q4Min);
    assert_eq!(common(DType::Q4_1, DType::Q8_0), Storage::Bf16);
    assert_eq!(common(DType::Q8_0, DType::F16), Storage::Bf16);
    assert_eq!(common(DType::Q8_0, DType::Q8_0), Storage::Q8);
}
