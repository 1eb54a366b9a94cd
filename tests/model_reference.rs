//! The reference forward pass itself: against an independent one, and on real text.

#[path = "common/gguf_file.rs"]
mod gguf_file;
#[path = "common/mod.rs"]
mod model;
mod reference;

use forebay::model::Gguf;
use reference::compare::{Comparison, Expected};
use serde::Deserialize;

#[derive(Deserialize)]
struct Vectors {
    tokens: Vec<u32>,
    ids: Vec<usize>,
    argmax: Vec<usize>,
    logits: Vec<Vec<f64>>,
}

fn most_likely(logits: &[f64]) -> usize {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("not empty")
}

#[test]
fn logits_are_those_of_an_independent_forward_pass() {
    let vectors: Vectors =
        serde_json::from_str(include_str!("vectors/logits_smollm2.json")).expect("valid vectors");
    let gguf = Gguf::open(&model::smollm2()).expect("the default model");
    let mut position_next = 0;
    reference::forward(&gguf, std::slice::from_ref(&vectors.tokens), |sequence, position, row| {
        assert_eq!((sequence, position), (0, position_next));
        position_next += 1;
        assert_eq!(most_likely(row), vectors.argmax[position], "position {position}");
        for (&id, expected) in vectors.ids.iter().zip(&vectors.logits[position]) {
            let difference = (row[id] - expected).abs();
            assert!(difference < 1e-6, "position {position}, token {id}: off by {difference}");
        }
    });
    assert_eq!(position_next, vectors.tokens.len());
}

#[test]
fn sequences_that_run_together_do_not_see_each_other() {
    let bytes = gguf_file::random_model(&gguf_file::SMALL, gguf_file::Q4_1, gguf_file::Q8_0, 3);
    let gguf = Gguf::from_bytes(bytes.bytes()).expect("valid");
    let sequences = vec![vec![1, 2, 3, 4, 5], vec![9], vec![1, 2, 3, 7]];
    let together = Expected::of(&gguf, sequences.clone());
    for (at, sequence) in sequences.iter().enumerate() {
        let alone = Expected::of(&gguf, vec![sequence.clone()]);
        for position in 0..sequence.len() {
            assert_eq!(together.log_probs(at, position), alone.log_probs(0, position));
        }
    }
    assert_eq!(together.log_probs(0, 2), together.log_probs(2, 2), "the same beginning");
    assert_ne!(together.log_probs(0, 3), together.log_probs(2, 3), "not the same any more");
}

#[test]
fn comparing_counts_what_it_says() {
    let mut comparison = Comparison::default();
    let log = |p: f32| p.ln();
    // The same distribution, shifted: no divergence, the same choice, a clear margin.
    comparison
        .add(&[log(0.5), log(0.3), log(0.2)], &[log(0.5) + 3.0, log(0.3) + 3.0, log(0.2) + 3.0]);
    assert!(comparison.mean_kl().abs() < 1e-6);
    // Another choice where the reference has no clear opinion: margin ln(0.4 / 0.39) = 0.025.
    comparison.add(&[log(0.39), log(0.4), log(0.21)], &[log(0.4), log(0.39), log(0.21)]);
    assert_eq!((comparison.positions(), comparison.agreement()), (2, 0.5));
    assert_eq!(comparison.confident_agreement(), 1.0);
    // Another choice where it has: KL = 0.6 ln(0.6 / 0.2) + 0.2 ln(0.2 / 0.6).
    let mut far = Comparison::default();
    far.add(&[log(0.6), log(0.2), log(0.2)], &[log(0.2), log(0.6), log(0.2)]);
    assert!((far.mean_kl() - 0.4 * 3f64.ln()).abs() < 1e-6);
    assert_eq!((far.agreement(), far.confident_agreement()), (0.0, 0.0));
}

#[test]
fn the_texts_are_long_enough_and_the_model_reads_them_well() {
    let gguf = Gguf::open(&model::smollm2()).expect("the default model");
    let texts = reference::compare::texts(&gguf);
    let tokens: usize = texts.iter().map(|(_, tokens)| tokens.len()).sum();
    assert!(tokens >= 2_000, "{tokens} tokens");
    // The first tokens of each are enough to see that the model knows its languages: a guess
    // without any model costs ln 49152 = 10.8 nats.
    let sequences: Vec<Vec<u32>> =
        texts.iter().map(|(_, tokens)| tokens[..tokens.len().min(64)].to_vec()).collect();
    let expected = Expected::of(&gguf, sequences);
    let (mut surprise, mut count) = (0.0, 0);
    for (at, sequence) in expected.sequences.iter().enumerate() {
        for (position, pair) in sequence.windows(2).enumerate() {
            surprise -= expected.log_probs(at, position)[pair[1] as usize];
            count += 1;
        }
    }
    let mean = surprise / count as f32;
    assert!(mean > 1.0 && mean < 4.5, "{mean} nats a token");
}
