//! How far a backend's logits are from the reference's.

use forebay::model::{Gguf, Tokenizer};

/// A margin between the two most likely tokens, in log-probability, above which the reference
/// has an opinion.
const CONFIDENT_MARGIN: f64 = 0.15;

/// The texts that backends are compared on, tokenised: (name, tokens).
pub fn texts(gguf: &Gguf) -> Vec<(&'static str, Vec<u32>)> {
    let tokenizer = Tokenizer::from_gguf(gguf).expect("a supported tokenizer");
    [
        ("novel", include_str!("../vectors/texts/novel.txt")),
        ("technical", include_str!("../vectors/texts/technical.txt")),
        ("code", include_str!("../vectors/texts/code.txt")),
        ("mixed", include_str!("../vectors/texts/mixed.txt")),
    ]
    .map(|(name, text)| (name, tokenizer.encode(text)))
    .to_vec()
}

/// The reference's log-probabilities for every position of some sequences, in single precision:
/// their rounding, 1e-6, is far below what is compared.
pub struct Expected {
    /// The sequences themselves.
    pub sequences: Vec<Vec<u32>>,
    /// First row of each sequence.
    starts: Vec<usize>,
    log_probs: Vec<f32>,
    vocab: usize,
}

impl Expected {
    /// Runs the reference. Takes 4 bytes a position and vocabulary entry: 0.5 GB for the texts of
    /// [`texts`] and SmolLM2.
    pub fn of(gguf: &Gguf, sequences: Vec<Vec<u32>>) -> Expected {
        let vocab = gguf.config().expect("a supported model").vocab;
        let rows: usize = sequences.iter().map(Vec::len).sum();
        let mut log_probs = Vec::with_capacity(rows * vocab);
        super::forward(gguf, &sequences, |_, _, logits| {
            let total = log_sum_exp(logits.iter().copied());
            log_probs.extend(logits.iter().map(|logit| (logit - total) as f32));
        });
        let mut start = 0;
        let starts = sequences.iter().map(|sequence| {
            start += sequence.len();
            start - sequence.len()
        });
        Expected { starts: starts.collect(), sequences, log_probs, vocab }
    }

    /// The log-probabilities of what follows `position` in sequence `sequence`.
    pub fn log_probs(&self, sequence: usize, position: usize) -> &[f32] {
        let row = self.starts[sequence] + position;
        &self.log_probs[row * self.vocab..][..self.vocab]
    }
}

fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = values.clone().fold(f64::NEG_INFINITY, f64::max);
    largest + values.map(|value| (value - largest).exp()).sum::<f64>().ln()
}

/// Accumulates a comparison, position by position.
#[derive(Clone, Copy, Debug, Default)]
pub struct Comparison {
    positions: usize,
    agreeing: usize,
    confident: usize,
    confident_agreeing: usize,
    kl_sum: f64,
}

impl Comparison {
    /// Adds a position: the reference's log-probabilities and a backend's logits.
    ///
    /// # Panics
    /// When the backend's are not all finite, or not as many.
    pub fn add(&mut self, reference: &[f32], logits: &[f32]) {
        assert_eq!(reference.len(), logits.len(), "one logit a vocabulary entry");
        assert!(logits.iter().all(|logit| logit.is_finite()), "all logits are finite");
        let total = log_sum_exp(logits.iter().map(|&logit| f64::from(logit)));
        let kl = reference.iter().zip(logits).map(|(&expected, &logit)| {
            let (expected, found) = (f64::from(expected), f64::from(logit) - total);
            expected.exp() * (expected - found)
        });
        self.kl_sum += kl.sum::<f64>();
        let (first, second) = two_most_likely(reference);
        let agrees = two_most_likely(logits).0 == first;
        let is_confident =
            f64::from(reference[first]) - f64::from(reference[second]) > CONFIDENT_MARGIN;
        self.positions += 1;
        self.agreeing += usize::from(agrees);
        self.confident += usize::from(is_confident);
        self.confident_agreeing += usize::from(is_confident && agrees);
    }

    /// Positions compared.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Mean Kullback-Leibler divergence of the backend from the reference, in nats.
    pub fn mean_kl(&self) -> f64 {
        self.kl_sum / self.positions as f64
    }

    /// Share of all positions where both have the same most likely token.
    pub fn agreement(&self) -> f64 {
        self.agreeing as f64 / self.positions as f64
    }

    /// The same, of positions where the reference's margin is above 0.15 in log-probability.
    pub fn confident_agreement(&self) -> f64 {
        self.confident_agreeing as f64 / self.confident as f64
    }
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} positions: mean KL {:.5}, top-1 agreement {:.2} % of all, {:.2} % of the {} where \
             the reference's margin is over {CONFIDENT_MARGIN}",
            self.positions,
            self.mean_kl(),
            100.0 * self.agreement(),
            100.0 * self.confident_agreement(),
            self.confident,
        )
    }
}

/// Indices of the two largest values, the first among equals.
fn two_most_likely(values: &[f32]) -> (usize, usize) {
    let (mut first, mut second) = (0, 1);
    if values[1] > values[0] {
        (first, second) = (1, 0);
    }
    for (at, &value) in values.iter().enumerate().skip(2) {
        if value > values[first] {
            (first, second) = (at, first);
        } else if value > values[second] {
            second = at;
        }
    }
    (first, second)
}
