//! How fast the CPU backend is: `cargo bench --bench kernels`. Takes about three minutes.
//!
//! - `gemm/…`: one thread, one matrix shape of SmolLM2-135M times M tokens. Weights rotate over
//!   64 MB, so that they come from where a step finds them, not from the second cache level.
//!   `elem/s` are integer operations a second, two a multiply-add; at M = 1 reading weights binds
//!   (a Q4_1 weight is 5 bits: GB/s = Gop/s × 0.31), from M ≈ 8 on arithmetic does.
//! - `gemm-cached/…`: the same kernel on a panel in the first cache level: what it could do at
//!   best.
//! - `attention/…`: one thread; `B/s` are bytes of keys and values read. Blocks lie scattered over
//!   a pool larger than the caches.
//! - `sample/…`: one row of 49,152 logits; `elem/s` are logits a second.
//! - `step/…`: whole steps of the real model on every CPU, `elem/s` are tokens a second: decode of
//!   M sequences with 256 positions each, and a prompt of 512 tokens.
//!
//! Machines differ and drift: compare only figures of one run.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use forebay::device::Backend;
use forebay::device::cpu::attention::{AttentionScratch, Queries, attend};
use forebay::device::cpu::kernels::{GemmArgs, Kernels, PANEL_ROWS, Packing};
use forebay::device::cpu::kv::{KvLayout, KvPool};
use forebay::device::cpu::memory::Region;
use forebay::device::cpu::rows::{ActBlock, BLOCK};
use forebay::device::cpu::sample::{History, Scratch, choose};
use forebay::device::cpu::{CpuBackend, CpuOptions, Isa};
use forebay::message::{BLOCK_POSITIONS, PlanRow, SeqKey, SlotSetup, Step};
use forebay::model::Gguf;
use forebay::request::SamplingParams;

#[path = "../tests/common/mod.rs"]
mod model;

const SHAPES: [(&str, Packing, usize, usize); 5] = [
    ("qkv-576x960", Packing::Q4Min, 576, 960),
    ("o-576x576", Packing::Q4Min, 576, 576),
    ("gate-up-576x3072", Packing::Q4Min, 576, 3072),
    ("down-1536x576", Packing::Q4Min, 1536, 576),
    ("head-576x49152", Packing::Q8, 576, 49152),
];

/// Weights of many copies of a matrix, tokens, and a result.
struct Product {
    packing: Packing,
    blocks: usize,
    panels: usize,
    weights: Region<u8>,
    acts: Vec<ActBlock>,
    out: Vec<f32>,
}

impl Product {
    fn new(packing: Packing, columns: usize, rows: usize, bytes: usize) -> Product {
        let (blocks, panels) = (columns / BLOCK, rows / PANEL_ROWS);
        let panel_bytes = blocks * packing.block_bytes();
        let copies = bytes.div_ceil(panels * panel_bytes).max(1);
        let mut weights = Region::new(copies * panels * panel_bytes).expect("memory");
        // As a half-precision number 0x2222 is 0.01: any byte will do for a quant.
        weights.as_mut_slice().fill(0x22);
        let kernels = Kernels::of(Isa::best()).expect("available");
        let mut acts = vec![ActBlock::ZERO; 128 * blocks];
        let values: Vec<f32> = (0..BLOCK).map(|i| (i as f32 * 0.7).sin()).collect();
        for act in &mut acts {
            kernels.quantise(&values, std::slice::from_mut(act));
        }
        Product { packing, blocks, panels, weights, acts, out: vec![0.0; 128 * rows] }
    }

    fn copies(&self) -> usize {
        self.weights.len() / (self.panels * self.blocks * self.packing.block_bytes())
    }

    fn run(&mut self, kernels: &Kernels, copy: usize, tokens: usize) {
        let panel_bytes = self.blocks * self.packing.block_bytes();
        let stride = self.panels * PANEL_ROWS;
        for panel in 0..self.panels {
            let at = (copy * self.panels + panel) * panel_bytes;
            let out = &mut self.out[panel * PANEL_ROWS..];
            assert!(tokens <= 128 && out.len() >= (tokens - 1) * stride + PANEL_ROWS);
            // SAFETY: the panel is there (checked by `at`), there are 128 rows of activations, and
            // the result is long enough (asserted).
            unsafe {
                kernels.gemm(
                    self.packing,
                    &GemmArgs {
                        panel: self.weights.at(at, panel_bytes),
                        blocks: self.blocks,
                        x: self.acts.as_ptr(),
                        x_stride: self.blocks,
                        tokens,
                        out: out.as_mut_ptr(),
                        out_stride: stride,
                        add: false,
                    },
                );
            }
        }
        black_box(&mut self.out);
    }
}

fn gemm(criterion: &mut Criterion) {
    let kernels = Kernels::of(Isa::best()).expect("available");
    let mut group = criterion.benchmark_group("gemm");
    for (name, packing, columns, rows) in SHAPES {
        let mut product = Product::new(packing, columns, rows, 64 << 20);
        for tokens in [1, 8, 64] {
            group.throughput(Throughput::Elements(2 * (columns * rows * tokens) as u64));
            group.bench_function(format!("{name}/M={tokens}"), |bencher| {
                let mut copy = 0;
                bencher.iter(|| {
                    product.run(kernels, copy, tokens);
                    copy = (copy + 1) % product.copies();
                });
            });
        }
    }
    group.finish();
    let mut group = criterion.benchmark_group("gemm-cached");
    for isa in Isa::available() {
        let kernels = Kernels::of(isa).expect("available");
        for packing in [Packing::Q4Min, Packing::Q4, Packing::Q8] {
            let mut product = Product::new(packing, 576, PANEL_ROWS, 0);
            group.throughput(Throughput::Elements(2 * 576 * PANEL_ROWS as u64 * 12));
            group.bench_function(format!("{isa}/{packing:?}/M=12"), |bencher| {
                bencher.iter(|| product.run(kernels, 0, 12));
            });
        }
    }
    group.finish();
}

/// SmolLM2's heads: three queries a kv head, 64 values each.
fn attention(criterion: &mut Criterion) {
    const DIM: usize = 64;
    let (layers, heads, blocks) = (30, 3, 128);
    let pool = KvPool::new(KvLayout::new(layers, heads, DIM), blocks).expect("memory");
    let mut group = criterion.benchmark_group("attention");
    for isa in Isa::available() {
        let kernels = Kernels::of(isa).expect("available");
        // Decode: 3 queries. Prefill: 6, of two tokens.
        for (name, context, count) in [("decode", 256, 3), ("decode", 1024, 3), ("prefill", 512, 6)]
        {
            let values = vec![0x3c00u16; count * DIM];
            let mut scratch = AttentionScratch::new(DIM);
            let mut out = vec![0.0; count * DIM];
            let bytes = context * DIM * 2 * 2;
            group.throughput(Throughput::Bytes(bytes as u64));
            group.bench_function(format!("{isa}/{name}/{context}"), |bencher| {
                let mut at = 0;
                bencher.iter(|| {
                    at += 1;
                    let (layer, kv_head) = (at % layers, at / layers % heads);
                    // Another sequence's blocks each time, spread over the pool.
                    let first = (at * 37) as u32;
                    let table: [u32; 16] = std::array::from_fn(|i| (first + i as u32 * 7) % blocks);
                    let queries = Queries {
                        values: &values,
                        position: context - 2,
                        first_head: 0,
                        group: 3,
                        blocks: &table[..context / BLOCK_POSITIONS],
                        layer,
                        kv_head,
                    };
                    // SAFETY: nobody writes to the pool.
                    unsafe { attend(kernels, &pool, &queries, &mut scratch, &mut out) };
                    black_box(&mut out);
                });
            });
        }
    }
    group.finish();
}

fn sampling(criterion: &mut Criterion) {
    let kernels = Kernels::of(Isa::best()).expect("available");
    let vocab = 49_152;
    // Logits like a model's: a few likely tokens above a broad bulk.
    let mut state = 1u64;
    let row: Vec<f32> = (0..vocab)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let uniform = (state >> 40) as f32 / (1u32 << 24) as f32;
            -3.0 * (uniform + 1e-6).ln()
        })
        .collect();
    let base = SamplingParams { seed: 3, ..Default::default() };
    let cases = [
        ("greedy", SamplingParams { temperature: 0.0, ..base.clone() }),
        ("temperature", SamplingParams { temperature: 0.8, ..base.clone() }),
        ("top-k-40", SamplingParams { top_k: 40, ..base.clone() }),
        ("top-p-0.9", SamplingParams { top_p: 0.9, ..base.clone() }),
        ("min-p-0.05", SamplingParams { min_p: 0.05, ..base.clone() }),
        ("greedy-top-20-logprobs", SamplingParams { temperature: 0.0, logprobs: Some(20), ..base }),
    ];
    let mut group = criterion.benchmark_group("sample");
    let history = History::new(vocab, 1024);
    let mut scratch = Scratch::new(vocab, 1024);
    let mut copy = row;
    group.throughput(Throughput::Elements(vocab as u64));
    for (name, params) in cases {
        let mut position = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                position += 1;
                choose(kernels, &mut copy, &params, &history, position, &mut scratch)
            });
        });
    }
    group.finish();
}

/// A backend whose first steps have filled the cache.
struct Steps {
    backend: CpuBackend,
    step: Option<Box<Step>>,
}

const CONTEXT: usize = 256;

impl Steps {
    fn new(sequences: usize) -> Steps {
        let gguf = Gguf::open(&model::smollm2()).expect("the default model");
        let workers = std::thread::available_parallelism().map_or(2, usize::from);
        let options = CpuOptions {
            cpus: (0..workers).map(Some).collect(),
            kv_blocks: (sequences * 8) as u32,
            rows_max: sequences,
            step_tokens_max: 512,
            context_max: 512,
            sampled_rows_max: sequences,
            isa: None,
        };
        let backend = CpuBackend::load(&gguf, &options, Box::new(|| {})).expect("the model loads");
        let mut step = Box::<Step>::default();
        for slot in 0..sequences as u16 {
            step.plan.setups.push(SlotSetup {
                slot,
                seq: SeqKey { slot: slot.into(), generation: 0 },
                sampling: Arc::new(SamplingParams { temperature: 0.0, ..Default::default() }),
                history_start: 0,
                history_count: 0,
                history_prompt_count: 0,
            });
        }
        Steps { backend, step: Some(step) }
    }

    /// Runs a step of `sequences` rows, `tokens` each, from `position` on; how long it took.
    fn run(&mut self, sequences: usize, tokens: usize, position: usize) -> Duration {
        let mut step = self.step.take().expect("between steps");
        let plan = &mut step.plan;
        for row in 0..sequences as u32 {
            let count = (position + tokens).div_ceil(BLOCK_POSITIONS) as u32;
            plan.rows.push(PlanRow {
                seq: SeqKey { slot: row, generation: 0 },
                slot: row as u16,
                sample: true,
                token_start: plan.tokens.len() as u32,
                token_count: tokens as u32,
                position: position as u32,
                block_start: plan.blocks.len() as u32,
                block_count: count,
            });
            plan.tokens.extend((0..tokens as u32).map(|token| 500 + (token * 7 + row) % 9000));
            plan.blocks.extend((0..count).map(|block| row * 8 + block));
        }
        let start = Instant::now();
        let mut step = self.backend.run(step);
        let elapsed = start.elapsed();
        assert_eq!(step.result.failure, None);
        step.plan.clear();
        step.result.clear();
        self.step = Some(step);
        elapsed
    }
}

fn steps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step");
    let mut steps = Steps::new(64);
    for start in (0..CONTEXT).step_by(8) {
        steps.run(64, 8, start);
    }
    for sequences in [1, 8, 32, 64] {
        group.throughput(Throughput::Elements(sequences as u64));
        group.bench_function(format!("decode/M={sequences}"), |bencher| {
            bencher.iter_custom(|iterations| {
                (0..iterations).map(|_| steps.run(sequences, 1, CONTEXT)).sum()
            });
        });
    }
    group.throughput(Throughput::Elements(512));
    group.bench_function("prefill/512", |bencher| {
        bencher.iter_custom(|iterations| (0..iterations).map(|_| steps.run(1, 512, 0)).sum());
    });
    group.finish();
}

fn settings() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20)
}

criterion_group! { name = all; config = settings(); targets = gemm, attention, sampling, steps }
criterion_main!(all);
