//! I7 on the CPU backend: a sequence's tokens and logits are the same bits whatever else runs,
//! however its prompt is cut, wherever it lies, and however many workers there are.

#[path = "common/gguf_file.rs"]
mod gguf_file;
#[path = "cpu_support/mod.rs"]
mod support;

use forebay::device::cpu::Isa;
use forebay::model::Gguf;
use forebay::request::{SamplingParams, TokenId};
use gguf_file::{BF16, F16, F32, Numbers, Q4_0, Q4_1, Q8_0, SMALL, Shape, random_model};
use proptest::prelude::*;
use support::{Driver, options};

/// Heads as wide as a quantised block, three queries a key head, a head of its own.
const WIDER: Shape = Shape {
    layers: 2,
    hidden: 96,
    ffn: 160,
    heads: 6,
    kv_heads: 2,
    head_dim: 32,
    vocab: 100,
    context: 512,
    tied: false,
};

fn model(kind: usize) -> Gguf {
    let (shape, matrices, embedding) = [
        (WIDER, Q4_1, Q8_0),
        (WIDER, Q4_0, Q4_0),
        (WIDER, Q8_0, F16),
        (SMALL, F32, F32),
        (WIDER, BF16, Q4_1),
    ][kind];
    let mut file = random_model(&shape, matrices, embedding, 11);
    if kind == 2 {
        // One stage with weights of both families.
        let other = random_model(&shape, F16, embedding, 12);
        for name in ["blk.0.attn_k.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"] {
            let tensor = other.tensors.iter().find(|tensor| tensor.name == name).expect("there");
            *file.tensor_mut(name) = tensor.clone();
        }
    }
    Gguf::from_bytes(file.bytes()).expect("a valid file")
}

const KINDS: usize = 5;

fn prompt(vocab: u64, len: usize, seed: u64) -> Vec<TokenId> {
    let mut numbers = Numbers(seed);
    (0..len).map(|_| numbers.below(vocab) as TokenId).collect()
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

/// The sequences of these tests: prompts around block boundaries.
const PROMPTS: [usize; 4] = [5, 64, 130, 191];
const OUTPUT: usize = 12;

fn add_all(driver: &mut Driver) {
    let vocab = driver.backend.config().vocab as u64;
    for (which, &len) in PROMPTS.iter().enumerate() {
        driver.add(&prompt(vocab, len, which as u64), &sampling(which));
    }
}

/// Each sequence alone, its prompt in one piece, one worker.
fn alone(gguf: &Gguf, isa: Isa) -> Driver {
    let mut driver = Driver::new(gguf, &options(1, isa));
    add_all(&mut driver);
    for index in 0..PROMPTS.len() {
        driver.generate(index, usize::MAX, OUTPUT);
        driver.park(index);
    }
    driver
}

fn assert_same(found: &Driver, expected: &Driver, what: &str) {
    for (index, expected) in expected.sequences.iter().enumerate() {
        let found = &found.sequences[index];
        assert_eq!(found.output()[..OUTPUT], *expected.output(), "{what}: tokens of {index}");
        assert!(found.logits[..OUTPUT] == expected.logits, "{what}: logits of {index}");
        assert!(found.logprobs[..OUTPUT] == expected.logprobs, "{what}: logprobs of {index}");
    }
}

fn is_done(driver: &Driver, index: usize) -> bool {
    driver.sequences[index].output().len() >= OUTPUT
}

#[test]
fn neighbours_chunks_slots_blocks_and_workers_change_no_bit() {
    for kind in 0..KINDS {
        let gguf = model(kind);
        for isa in Isa::available() {
            let expected = alone(&gguf, isa);
            for (workers, chunk) in [(1, 1), (2, 7), (3, 64), (2, 80)] {
                let mut driver = Driver::new(&gguf, &options(workers, isa));
                driver.free_slots.rotate_left(workers);
                driver.free_blocks.rotate_left(chunk % 40);
                add_all(&mut driver);
                // All together; those that are done go on, as neighbours.
                while (0..PROMPTS.len()).any(|index| !is_done(&driver, index)) {
                    let rows: Vec<(usize, usize)> =
                        (0..PROMPTS.len()).map(|index| (index, chunk)).collect();
                    driver.advance(&rows);
                }
                let what = format!("model {kind}, {isa}, {workers} workers, chunks of {chunk}");
                assert_same(&driver, &expected, &what);
            }
        }
    }
}

#[test]
fn a_sequence_that_was_parked_and_computed_again_goes_on_as_if_nothing_had_been() {
    for kind in [0, 3] {
        let gguf = model(kind);
        let isa = Isa::best();
        let expected = alone(&gguf, isa);
        let mut driver = Driver::new(&gguf, &options(2, isa));
        add_all(&mut driver);
        for round in 0..OUTPUT {
            for index in 0..PROMPTS.len() {
                driver.generate(index, 50, round + 1);
                if (round + index) % 3 == 0 {
                    driver.park(index);
                }
            }
        }
        assert_same(&driver, &expected, &format!("model {kind}"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_schedule_gives_the_same_bits(
        kind in 0usize..KINDS, workers in 1usize..4,
        steps in proptest::collection::vec(
            proptest::collection::vec((0usize..4, 1usize..120, 0u8..12), 1..4), 1..60),
    ) {
        let gguf = model(kind);
        let isa = Isa::best();
        let expected = alone(&gguf, isa);
        let mut driver = Driver::new(&gguf, &options(workers, isa));
        add_all(&mut driver);
        for step in steps {
            let mut rows: Vec<(usize, usize)> = Vec::new();
            for (index, tokens, parks) in step {
                let in_step = rows.iter().any(|&(other, _)| other == index);
                let budget = 256 - rows.iter().map(|row| row.1).sum::<usize>();
                if in_step || is_done(&driver, index) || budget == 0 {
                    continue;
                }
                if parks == 0 {
                    driver.park(index);
                }
                rows.push((index, tokens.min(budget)));
            }
            if !rows.is_empty() {
                driver.advance(&rows);
            }
        }
        for index in 0..PROMPTS.len() {
            driver.generate(index, 33, OUTPUT);
        }
        assert_same(&driver, &expected, "a random schedule");
    }
}

#[test]
fn integer_models_give_the_same_embedding_products_on_every_path() {
    // One token: attention over one position has a probability of exactly 1, so everything but
    // bf16 rounding of values is integer arithmetic and element-wise routines: all equal.
    let gguf = model(0);
    let logits = |isa| {
        let mut driver = Driver::new(&gguf, &options(1, isa));
        driver.add(&[9], &SamplingParams { temperature: 0.0, ..Default::default() });
        driver.advance(&[(0, 1)]);
        driver.sequences.remove(0).logits
    };
    let expected = logits(Isa::Portable);
    for isa in Isa::available() {
        assert!(logits(isa) == expected, "{isa}");
    }
}
