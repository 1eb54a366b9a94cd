//! Every kernel on every path of this machine: against sums in f64, against the portable path bit
//! for bit where that is promised, alone and among neighbours.

use proptest::prelude::*;

use super::*;
use crate::device::cpu::logits::CHUNK;
use crate::device::cpu::pack::Matrix;
use crate::device::cpu::rows::{bf16_from, bf16_to};
use crate::model::{DType, Tensor, quant};

/// A seeded generator for test data (Knuth's constants).
pub(crate) struct Noise(pub u64);

impl Noise {
    pub(crate) fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 32) as u32
    }

    /// Roughly normal, of unit variance: the sum of four uniform numbers.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f64 = (0..4).map(|_| f64::from(self.bits()) / f64::from(u32::MAX) - 0.5).sum();
        (sum * 3f64.sqrt()) as f32
    }

    pub(crate) fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }
}

/// A panel of weights in the file's form, and packed into memory aligned as panels are.
struct Panel {
    matrix: Matrix,
    /// [`PANEL_ROWS`] rows of numbers.
    rows: Vec<Vec<f32>>,
    memory: crate::device::cpu::memory::Region<u8>,
}

fn panel(dtype: DType, blocks: usize, noise: &mut Noise) -> Panel {
    let columns = blocks * BLOCK;
    let mut data = Vec::new();
    for _ in 0..PANEL_ROWS * blocks {
        let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
        let scale = half(0.01 * noise.normal());
        match dtype {
            DType::Bf16 => {
                for value in noise.normals(BLOCK) {
                    data.extend(bf16_from(value * 0.1).to_le_bytes());
                }
            }
            DType::Q8_0 => {
                data.extend(scale);
                // Now and then the extremes, which overflow what computes too narrowly.
                let extreme = noise.bits().is_multiple_of(4);
                data.extend((0..32).map(|_| if extreme { 0x80 } else { noise.bits() as u8 }));
            }
            _ => {
                data.extend(scale);
                if dtype == DType::Q4_1 {
                    data.extend(half(0.1 * noise.normal()));
                }
                let extreme = noise.bits().is_multiple_of(4);
                data.extend((0..16).map(|_| if extreme { 0xff } else { noise.bits() as u8 }));
            }
        }
    }
    let tensor = Tensor { name: "panel", dtype, shape: &[columns, PANEL_ROWS], data: &data };
    let matrix = Matrix::of(&tensor, 0);
    let mut memory = crate::device::cpu::memory::Region::new(matrix.panel_bytes()).expect("memory");
    matrix.pack_panel(&tensor, 0, memory.as_mut_slice());
    let row = |row| {
        let mut values = vec![0.0; columns];
        quant::dequantize_row(dtype, tensor.row(row), &mut values);
        values
    };
    Panel { matrix, rows: (0..PANEL_ROWS).map(row).collect(), memory }
}

/// Quantised rows; every fifth block is at its extremes.
fn acts(tokens: usize, stride: usize, noise: &mut Noise) -> Vec<ActBlock> {
    let mut blocks = vec![ActBlock::ZERO; tokens * stride];
    for (index, block) in blocks.iter_mut().enumerate() {
        let mut values = noise.normals(BLOCK);
        if index % 5 == 0 {
            values.iter_mut().for_each(|value| *value = 3.0f32.copysign(*value));
        }
        if index % 15 == 0 {
            values.fill(-3.0);
        }
        crate::device::cpu::rows::quantise(&values, std::slice::from_mut(block));
    }
    blocks
}

/// Runs an integer GEMM into memory filled with `start`, checks what lies between the results.
fn gemm(
    kernels: &Kernels,
    panel: &Panel,
    x: &[ActBlock],
    (blocks, x_stride, tokens): (usize, usize, usize),
    (out_stride, start): (usize, Option<f32>),
) -> Vec<[f32; PANEL_ROWS]> {
    assert!(x.len() >= (tokens - 1) * x_stride + blocks);
    let canary = 1234.5;
    let mut out = vec![canary; tokens * out_stride];
    if let Some(start) = start {
        for row in out.chunks_mut(out_stride) {
            row[..PANEL_ROWS].fill(start);
        }
    }
    // SAFETY: the panel has its blocks, `x` is long enough (asserted), and so is `out`.
    unsafe {
        kernels.gemm(
            panel.matrix.packing,
            &GemmArgs {
                panel: panel.memory.at(0, panel.matrix.panel_bytes()),
                blocks,
                x: x.as_ptr(),
                x_stride,
                tokens,
                out: out.as_mut_ptr(),
                out_stride,
                add: start.is_some(),
            },
        );
    }
    let rows = out.chunks(out_stride);
    assert!(rows.clone().all(|row| row[PANEL_ROWS..].iter().all(|&value| value == canary)));
    rows.map(|row| row[..PANEL_ROWS].try_into().expect("a panel's rows")).collect()
}

fn paths() -> Vec<&'static Kernels> {
    Isa::available().into_iter().map(|isa| Kernels::of(isa).expect("available")).collect()
}

/// √(Σ(a-b)² / Σb²); not a number anywhere gives infinity.
pub(crate) fn relative_l2(found: impl Iterator<Item = f64>, exact: &[f64]) -> f64 {
    let (mut difference, mut norm, mut count) = (0.0, 0.0, 0);
    for (found, exact) in found.zip(exact) {
        difference += (found - exact) * (found - exact);
        norm += exact * exact;
        count += 1;
    }
    assert_eq!(count, exact.len());
    let result = (difference / norm).sqrt();
    if result.is_nan() { f64::INFINITY } else { result }
}

const INTEGER_TYPES: [DType; 3] = [DType::Q8_0, DType::Q4_0, DType::Q4_1];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A dot of 32 products is exact; what rounds is one sum of `blocks` (Q4_1: twice as many)
    /// terms in single precision, so the error grows with √blocks from half a unit: 6e-8.
    #[test]
    fn integer_gemms_equal_sums_in_f64_and_each_other_bit_for_bit(
        kind in 0usize..3, blocks in 1usize..20, tokens in 1usize..15, pad in 0usize..3, seed: u64,
    ) {
        let mut noise = Noise(seed);
        let panel = panel(INTEGER_TYPES[kind], blocks, &mut noise);
        let (x_stride, out_stride) = (blocks + pad, PANEL_ROWS + 16 * pad);
        let x = acts(tokens, x_stride, &mut noise);
        let mut exact = Vec::new();
        for row in x.chunks(x_stride) {
            for weights in &panel.rows {
                let dots = weights.chunks(BLOCK).zip(row).map(|(weights, acts)| {
                    let products = weights.iter().zip(acts.quants);
                    let dot = products.map(|(&w, q)| f64::from(w) * f64::from(q)).sum::<f64>();
                    dot * f64::from(acts.scale)
                });
                exact.push(dots.sum::<f64>());
            }
        }
        let shape = (blocks, x_stride, tokens);
        let reference = gemm(paths()[0], &panel, &x, shape, (out_stride, None));
        let found = reference.as_flattened().iter().map(|&value| f64::from(value));
        prop_assert!(relative_l2(found, &exact) < 1e-6);
        for kernels in paths() {
            let isa = kernels.isa();
            let out = gemm(kernels, &panel, &x, shape, (out_stride, None));
            prop_assert_eq!(&out, &reference, "{}", isa);
            for token in 0..tokens {
                let x = &x[token * x_stride..];
                let alone = gemm(kernels, &panel, x, (blocks, x_stride, 1), (out_stride, None));
                prop_assert_eq!(alone[0], out[token], "{}, token {}", isa, token);
            }
            let added = gemm(kernels, &panel, &x, shape, (out_stride, Some(0.75)));
            let both = added.as_flattened().iter().zip(out.as_flattened());
            prop_assert!(both.clone().all(|(&sum, &out)| sum == 0.75 + out), "{}", isa);
        }
    }

    /// Products of bf16 are exact in single precision; each path adds 2·pairs of them in its own
    /// way, which costs at most some units times √(2·pairs) of the sum of magnitudes.
    #[test]
    fn products_of_pairs_equal_sums_in_f64_and_do_not_depend_on_neighbours(
        pairs in 1usize..80, columns in 1usize..6, rows in 1usize..14, seed: u64,
    ) {
        let (columns, mut noise) = (columns * 32, Noise(seed));
        let mut random = |count| -> Vec<u32> {
            (0..count).map(|_| {
                let (first, second) = (bf16_from(noise.normal()), bf16_from(noise.normal()));
                u32::from(first) | u32::from(second) << 16
            }).collect()
        };
        let (a, b) = (random(rows * pairs), random(pairs * columns));
        let halves = |pair: u32| [pair as u16, (pair >> 16) as u16].map(|h| f64::from(bf16_to(h)));
        let mut exact = Vec::new();
        for row in a.chunks(pairs) {
            for column in 0..columns {
                exact.push(row.iter().enumerate().map(|(p, &x)| {
                    let (x, y) = (halves(x), halves(b[p * columns + column]));
                    x[0] * y[0] + x[1] * y[1]
                }).sum());
            }
        }
        for kernels in paths() {
            let run = |a: &[u32], rows: usize, add: bool| {
                let mut out = vec![if add { 0.5f32 } else { f32::NAN }; rows * columns];
                // SAFETY: all slices have the lengths that the arguments say.
                unsafe {
                    kernels.pairs(&PairArgs {
                        a: a.as_ptr(), a_stride: pairs, rows, b: b.as_ptr(), columns, pairs,
                        out: out.as_mut_ptr(), out_stride: columns, add,
                    });
                }
                out
            };
            let out = run(&a, rows, false);
            let error = relative_l2(out.iter().map(|&value| f64::from(value)), &exact);
            prop_assert!(error < 6e-8 * (2.0 * pairs as f64).sqrt() * 3.0, "{error}");
            for (row, out) in out.chunks(columns).enumerate() {
                let alone = run(&a[row * pairs..(row + 1) * pairs], 1, false);
                prop_assert_eq!(&alone, out);
            }
            let added = run(&a, rows, true);
            prop_assert!(added.iter().zip(&out).all(|(&sum, &out)| sum == 0.5 + out));
        }
    }

    #[test]
    fn element_wise_routines_give_the_same_bits_on_every_path(
        len in 1usize..300, seed: u64, scale in 1e-3f32..1e3,
    ) {
        let mut noise = Noise(seed);
        let mut random = |count: usize| -> Vec<f32> {
            noise.normals(count).into_iter().map(|value| value * scale).collect()
        };
        let (x, y) = (random(len), random(len));
        let scores: [f32; 64] = random(64).try_into().expect("64");
        let tile: [f32; 2 * PANEL_ROWS] = random(2 * PANEL_ROWS).try_into().expect("64");
        let results = |kernels: &Kernels| {
            let mut quants = vec![ActBlock::ZERO; len.div_ceil(BLOCK)];
            kernels.quantise(&x, &mut quants);
            let mut halves = vec![0; len + 3];
            kernels.to_bf16(&x, &mut halves);
            let mut floats = vec![[0.0; 1].repeat(len); 5];
            kernels.rms_norm(&x, &y, 1e-5, &mut floats[0]);
            kernels.swiglu(&x, &y, &mut floats[1]);
            for out in &mut floats[2..] {
                out.copy_from_slice(&y);
            }
            kernels.add(&x, &mut floats[2]);
            kernels.rotate(&mut floats[3], &x);
            kernels.blend(&mut floats[4], 0.3, &x, 0.7);
            let max = kernels.max64(&scores);
            let mut powers = [0; 64];
            floats.push(vec![max, kernels.powers64(&scores, max, &mut powers)]);
            halves.extend(powers);
            let mut chunks = vec![0.0; len.div_ceil(CHUNK)];
            kernels.maxima(&x, &mut chunks);
            floats.push(chunks.clone());
            kernels.powers(&x, chunks[0], 0.9, &mut chunks);
            floats.push(chunks);
            // SAFETY: one token, one block.
            unsafe { kernels.swiglu_tile(&[tile], &mut quants[0], 1) };
            let bits: Vec<u32> = floats.as_slice().concat().iter().map(|f| f.to_bits()).collect();
            (quants, halves, bits)
        };
        let reference = results(paths()[0]);
        for kernels in paths() {
            prop_assert_eq!(&results(kernels), &reference, "{}", kernels.isa());
        }
    }
}

/// A quant's error is uniform within a step of max/127; the largest of 32 normal values is 2.1:
/// 2.1 / 127 / √12 = 0.48 %.
#[test]
fn quantised_activations_cost_about_half_a_percent() {
    let mut noise = Noise(7);
    let panel = panel(DType::Q4_1, 18, &mut noise);
    let x = noise.normals(18 * BLOCK);
    let mut quants = vec![ActBlock::ZERO; 18];
    for kernels in paths() {
        kernels.quantise(&x, &mut quants);
        let out = gemm(kernels, &panel, &quants, (18, 18, 1), (PANEL_ROWS, None));
        let exact: Vec<f64> = panel
            .rows
            .iter()
            .map(|weights| weights.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum())
            .collect();
        let found = out[0].iter().map(|&value| f64::from(value));
        let error = relative_l2(found, &exact);
        assert!(error < 6e-3 && error > 1e-3, "{error}");
    }
}

#[test]
fn groups_cover_everything_once_and_evenly() {
    for total in 0..50 {
        let mut next = 0;
        groups(total, GROUP_MAX, |first, count| {
            assert!(first == next && (1..=GROUP_MAX).contains(&count));
            assert!(count + 1 >= total.div_ceil(total.div_ceil(GROUP_MAX)));
            next += count;
        });
        assert_eq!(next, total);
    }
}
