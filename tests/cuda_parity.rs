//! The CUDA backend as a whole: its logits beside a forward pass in f64 and beside the CPU's, and
//! that a sequence's bits depend on nothing but the sequence (I7).
//!
//! The tests of the device itself are ignored unless asked for (`--ignored`), and then fail where
//! there is none. Without a GPU they run over a stand-in for the driver, which proves the host's
//! side and not the kernels.
#![cfg(feature = "cuda")]

#[path = "common/gguf_file.rs"]
mod gguf_file;
#[path = "common/mod.rs"]
mod model;
mod reference;
#[path = "cpu_support/mod.rs"]
mod support;

use std::path::Path;
use std::process::Command;

use forebay::device::cpu::Isa;
use forebay::device::cuda::driver::{Gpu, devices};
use forebay::device::cuda::{CudaBackend, CudaOptions};
use forebay::device::{Backend, BackendDescription};
use forebay::message::{Step, StepFailure};
use forebay::model::{Gguf, Tokenizer};
use forebay::request::{SamplingParams, TokenId};
use gguf_file::{BF16, F16, Numbers, Q4_0, Q4_1, Q8_0, Shape, random_model};
use reference::compare::{Comparison, Expected, texts};
use support::{Driver, Shown, options};

impl Shown for CudaBackend {
    fn row(&mut self, sampled: usize) -> Vec<f32> {
        self.logits(sampled).expect("between steps").expect("the device answers")
    }
}

fn cuda_options() -> CudaOptions {
    CudaOptions {
        kv_blocks: 40,
        rows_max: 8,
        step_tokens_max: 256,
        context_max: 512,
        sampled_rows_max: 8,
        graphs: true,
    }
}

fn backend(gguf: &Gguf, options: &CudaOptions) -> CudaBackend {
    let devices = devices().expect("these tests need a GPU and its driver");
    let gpu = Gpu::open(&devices[0]).expect("the device opens");
    let thread = std::thread::current();
    let ring = Box::new(move || thread.unpark());
    CudaBackend::load(gguf, gpu, devices[0].name.clone(), options, ring).expect("the model loads")
}

fn driver(gguf: &Gguf) -> Driver<CudaBackend> {
    Driver::over(backend(gguf, &cuda_options()), cuda_options().rows_max as u16)
}

/// Every head width, groups of several sizes, rows that leave the last tile half empty.
fn model(kind: usize) -> Gguf {
    let shape = |heads, kv_heads, head_dim, tied| Shape {
        layers: 2,
        hidden: 96,
        ffn: 160,
        heads,
        kv_heads,
        head_dim,
        vocab: 100,
        context: 512,
        tied,
    };
    let (shape, matrices, embedding) = [
        (shape(3, 1, 64, true), Q4_1, Q8_0),
        (shape(4, 4, 64, false), Q4_0, Q4_0),
        (shape(4, 2, 96, false), Q8_0, F16),
        (shape(4, 1, 128, true), BF16, Q4_1),
    ][kind];
    let mut file = random_model(&shape, matrices, embedding, 11);
    if kind == 0 {
        // Products whose parts are stored differently, as real files have them.
        let other = random_model(&shape, Q8_0, embedding, 12);
        for name in ["blk.0.attn_v.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"] {
            let tensor = other.tensors.iter().find(|tensor| tensor.name == name).expect("there");
            *file.tensor_mut(name) = tensor.clone();
        }
    }
    Gguf::from_bytes(file.bytes()).expect("a valid file")
}

const KINDS: usize = 4;

fn prompt(vocab: u64, len: usize, seed: u64) -> Vec<TokenId> {
    let mut numbers = Numbers(seed);
    (0..len).map(|_| numbers.below(vocab) as TokenId).collect()
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..Default::default() }
}

/// Logits at the end of every one of `sequences`' positions from `first` on, teacher-forced.
fn forced<B: Shown>(
    driver: &mut Driver<B>,
    sequences: &[Vec<TokenId>],
    mut each: impl FnMut(usize, usize, Vec<f32>),
) {
    for sequence in sequences {
        driver.add(&sequence[..1], &greedy());
    }
    let longest = sequences.iter().map(Vec::len).max().expect("sequences");
    for position in 0..longest {
        let rows = (0..sequences.len()).filter(|&index| position < sequences[index].len());
        let rows: Vec<(usize, usize)> = rows.map(|index| (index, 1)).collect();
        driver.advance(&rows);
        for (index, _) in rows {
            // Whatever was sampled, the text's own token comes next.
            let sequence = &mut driver.sequences[index];
            sequence.tokens.pop().expect("a sampled token");
            sequence.tokens.extend(sequences[index].get(position + 1));
            let bits = sequence.logits.pop().expect("a sampled token's");
            each(index, position, bits.into_iter().map(f32::from_bits).collect());
        }
    }
}

fn relative_l2(found: &[f32], expected: &[f32]) -> f64 {
    let square = |value: f32| f64::from(value) * f64::from(value);
    let difference = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum::<f64>();
    (difference / expected.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
}

#[test]
#[ignore = "needs a GPU"]
fn logits_are_those_of_a_forward_pass_in_f64() {
    for kind in 0..KINDS {
        let gguf = model(kind);
        let sequences: Vec<Vec<TokenId>> =
            [300, 65, 1].iter().zip(1..).map(|(&len, seed)| prompt(100, len, seed)).collect();
        let expected = Expected::of(&gguf, sequences.clone());
        let mut comparison = Comparison::default();
        forced(&mut driver(&gguf), &sequences, |index, position, logits| {
            comparison.add(expected.log_probs(index, position), &logits);
        });
        println!("model {kind}: {comparison}");
        // Activations are rounded to bf16 before every product: 2^-9 each.
        assert!(comparison.mean_kl() <= 1e-3, "model {kind}: {comparison}");
        assert!(comparison.confident_agreement() >= 0.97, "model {kind}: {comparison}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_cpu_backend_agrees() {
    for kind in 0..KINDS {
        let gguf = model(kind);
        let sequences = vec![prompt(100, 200, 7), prompt(100, 70, 8)];
        let mut expected = Vec::new();
        let mut cpu = Driver::new(&gguf, &options(2, Isa::best()));
        forced(&mut cpu, &sequences, |_, _, logits| expected.push(logits));
        let (mut at, mut worst) = (0, 0.0f64);
        forced(&mut driver(&gguf), &sequences, |_, _, logits| {
            worst = worst.max(relative_l2(&logits, &expected[at]));
            at += 1;
        });
        println!("model {kind}: relative distance at most {worst:.4}");
        // The CPU rounds activations to 8 bits for quantised weights.
        assert!(worst <= 0.06, "model {kind}: {worst}");
    }
}

fn sampling(which: usize) -> SamplingParams {
    let base = SamplingParams { seed: 5 + which as u64, logprobs: Some(3), ..Default::default() };
    match which % 4 {
        0 => SamplingParams { temperature: 0.0, ..base },
        1 => SamplingParams { temperature: 0.8, top_p: 0.9, ..base },
        2 => SamplingParams {
            repetition_penalty: 1.2,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            top_k: 20,
            ..base
        },
        _ => SamplingParams { logit_bias: vec![(3, 2.0), (7, -4.0)], min_p: 0.02, ..base },
    }
}

/// Prompts around block and split boundaries.
const PROMPTS: [usize; 4] = [5, 64, 250, 191];
const OUTPUT: usize = 12;

fn add_all(driver: &mut Driver<CudaBackend>) {
    for (which, &len) in PROMPTS.iter().enumerate() {
        driver.add(&prompt(100, len, which as u64), &sampling(which));
    }
}

fn assert_same(found: &Driver<CudaBackend>, expected: &Driver<CudaBackend>, what: &str) {
    for (index, expected) in expected.sequences.iter().enumerate() {
        let found = &found.sequences[index];
        assert_eq!(found.output()[..OUTPUT], *expected.output(), "{what}: tokens of {index}");
        assert!(found.logits[..OUTPUT] == expected.logits, "{what}: logits of {index}");
        assert!(found.logprobs[..OUTPUT] == expected.logprobs, "{what}: logprobs of {index}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn neighbours_chunks_slots_blocks_and_padding_change_no_bit() {
    for kind in 0..KINDS {
        let gguf = model(kind);
        let mut alone = driver(&gguf);
        add_all(&mut alone);
        for index in 0..PROMPTS.len() {
            alone.generate(index, usize::MAX, OUTPUT);
            alone.park(index);
        }
        for chunk in [1, 7, 60] {
            let mut driver = driver(&gguf);
            driver.free_slots.rotate_left(chunk % 8);
            driver.free_blocks.rotate_left(chunk % 40);
            add_all(&mut driver);
            // All together; those that are done go on, as neighbours.
            while driver.sequences.iter().any(|sequence| sequence.output().len() < OUTPUT) {
                driver.advance(&[(0, chunk), (1, chunk), (2, chunk), (3, chunk)]);
            }
            assert_same(&driver, &alone, &format!("model {kind}, chunks of {chunk}"));
        }
        let unrecorded = CudaOptions { graphs: false, ..cuda_options() };
        let mut parked = Driver::over(backend(&gguf, &unrecorded), 8);
        add_all(&mut parked);
        for round in 0..OUTPUT {
            for index in 0..PROMPTS.len() {
                parked.generate(index, 50, round + 1);
                if (round + index) % 3 == 0 {
                    parked.park(index);
                }
            }
        }
        assert_same(&parked, &alone, &format!("model {kind}, parked and computed again"));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_broken_plan_is_refused_and_the_next_one_runs() {
    let gguf = model(0);
    let mut driver = driver(&gguf);
    driver.add(&prompt(100, 10, 1), &greedy());
    driver.advance(&[(0, 10)]);
    let mut broken = Box::<Step>::default();
    broken.plan.tokens = vec![100];
    broken.plan.rows.push(forebay::message::PlanRow {
        seq: forebay::message::SeqKey { slot: 0, generation: 1 },
        slot: 7,
        sample: true,
        token_start: 0,
        token_count: 1,
        position: 10,
        block_start: 0,
        block_count: 1,
    });
    let result = driver.backend.run(broken).result;
    assert_eq!(result.failure, Some(StepFailure::InvalidPlan));
    assert!(driver.backend.run(Box::default()).result.failure.is_none(), "an empty plan is a step");
    driver.generate(0, 1, 3);
    let BackendDescription { name, kv_block_bytes, .. } = *driver.backend.description();
    assert_eq!((name, kv_block_bytes), ("cuda", 2 * 2 * 64 * 64 * 2));
}

/// The default model, or the one that `FOREBAY_TEST_MODEL` names.
fn real_model() -> Gguf {
    let named = std::env::var_os("FOREBAY_TEST_MODEL").map(std::path::PathBuf::from);
    Gguf::open(&named.unwrap_or_else(model::smollm2)).expect("the model's file")
}

#[test]
#[ignore = "needs a GPU"]
fn the_real_model_follows_text_as_the_cpu_does_and_knows_a_capital() {
    let gguf = real_model();
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("a supported tokenizer");
    let sequences: Vec<Vec<TokenId>> = texts(&gguf)
        .into_iter()
        .map(|(_, mut tokens)| {
            tokens.truncate(256);
            tokens
        })
        .collect();
    let mut cpu = Driver::new(&gguf, &options(2, Isa::best()));
    let mut expected = Vec::new();
    forced(&mut cpu, &sequences, |_, _, logits| expected.push(logits));
    let (mut at, mut agreeing, mut sum) = (0, 0, 0.0);
    let most = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    forced(&mut driver(&gguf), &sequences, |_, _, logits| {
        sum += relative_l2(&logits, &expected[at]);
        agreeing += usize::from(most(&logits) == most(&expected[at]));
        at += 1;
    });
    let (mean, agreement) = (sum / at as f64, agreeing as f64 / at as f64);
    println!("{at} positions: mean relative distance {mean:.4}, same token {agreement:.4}");
    assert!(mean <= 0.05 && agreement >= 0.93, "{mean}, {agreement}");
    let mut driver = driver(&gguf);
    driver.add(&tokenizer.encode("The capital of France is"), &greedy());
    driver.generate(0, usize::MAX, 2);
    assert_eq!(driver.sequences[0].output(), tokenizer.encode(" Paris."));
}

#[test]
fn the_program_does_not_link_with_the_driver() {
    let program = env!("CARGO_BIN_EXE_forebay");
    let read = Command::new("readelf").args(["-d", program]).output().expect("binutils");
    let needed = String::from_utf8_lossy(&read.stdout);
    assert!(needed.contains("libc.so"), "{needed}");
    assert!(!needed.contains("libcuda"), "{needed}");
}

/// Runs all of the above but the real model over the stand-in, in a process of its own: a driver
/// is loaded once.
#[test]
fn over_a_stand_in_for_the_driver_all_of_it_holds() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stand-in");
    std::fs::create_dir_all(&folder).expect("a folder below target");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_stand_in/driver.cpp");
    let built = Command::new("c++")
        .args(["-std=c++17", "-O3", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(folder.join("libcuda.so.1"))
        .arg(source)
        .status();
    assert!(built.expect("a C++ compiler, which nvcc needs too").success());
    let ran = Command::new(std::env::current_exe().expect("its path"))
        .args(["--ignored", "--skip", "the_real_model", "--test-threads", "1"])
        .env("LD_LIBRARY_PATH", &folder)
        .output()
        .expect("this test's own program");
    let said = String::from_utf8_lossy(&ran.stdout);
    let complained = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.contains("4 passed"), "{said}{complained}");
}
