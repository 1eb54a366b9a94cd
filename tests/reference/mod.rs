//! The forward pass as plainly as it can be written, in double precision over the dequantised
//! weights: what every backend's logits are held against.
//!
//! It shares with the program only the file reader, the row dequantisers and the rotary
//! frequencies. All positions of all sequences go through a layer together, so that each weight
//! row is dequantised a few times and not once a token; beyond that nothing is done for speed.

#![allow(dead_code)]

pub mod compare;
mod matrix;

use forebay::model::{Gguf, ModelConfig, Rope, quant};

use matrix::{in_parallel, times_rows};

/// Positions whose logits are worked out together: 64 rows of 49,152 are 25 MB.
const LOGIT_ROWS: usize = 64;

/// Calls `each` with (sequence, position, logits) for every position of every sequence, in order.
/// Each sequence is a context of its own.
pub fn forward(gguf: &Gguf, sequences: &[Vec<u32>], mut each: impl FnMut(usize, usize, &[f64])) {
    let config = gguf.config().expect("a supported model");
    let model = Model { gguf, rope: config.rope(gguf).expect("valid"), config };
    let spans = spans(sequences);
    let mut stream = model.embedded(sequences);
    for layer in 0..model.config.layers {
        model.attend(layer, &mut stream, &spans);
        model.feed_forward(layer, &mut stream);
    }
    let hidden = model.config.hidden;
    let normed = model.normed(&stream, "output_norm.weight");
    let head = if model.config.tied_output { "token_embd.weight" } else { "output.weight" };
    let places =
        spans.iter().enumerate().flat_map(|(at, span)| (0..span.len).map(move |p| (at, p)));
    let mut places = places;
    for rows in normed.chunks(LOGIT_ROWS * hidden) {
        let logits = model.times(head, rows);
        for row in logits.chunks_exact(model.config.vocab) {
            let (sequence, position) = places.next().expect("one place a row");
            each(sequence, position, row);
        }
    }
}

/// Where a sequence's rows are.
#[derive(Clone, Copy)]
struct Span {
    start: usize,
    len: usize,
}

fn spans(sequences: &[Vec<u32>]) -> Vec<Span> {
    let mut start = 0;
    let span = |sequence: &Vec<u32>| {
        let span = Span { start, len: sequence.len() };
        start += sequence.len();
        span
    };
    sequences.iter().map(span).collect()
}

struct Model<'a> {
    gguf: &'a Gguf,
    config: ModelConfig,
    rope: Rope,
}

impl Model<'_> {
    /// The embeddings of all tokens, row after row.
    fn embedded(&self, sequences: &[Vec<u32>]) -> Vec<f64> {
        let table = self.gguf.tensor("token_embd.weight").expect("checked");
        let mut row = vec![0.0f32; self.config.hidden];
        let mut stream = Vec::new();
        for &token in sequences.iter().flatten() {
            quant::dequantize_row(table.dtype, table.row(token as usize), &mut row);
            stream.extend(row.iter().map(|&value| f64::from(value)));
        }
        stream
    }

    /// `rows` times the transposed matrix `name`.
    fn times(&self, name: &str, rows: &[f64]) -> Vec<f64> {
        times_rows(&self.gguf.tensor(name).expect("checked"), rows)
    }

    fn vector(&self, name: &str) -> Vec<f64> {
        let tensor = self.gguf.tensor(name).expect("checked");
        let mut values = vec![0.0f32; tensor.columns()];
        quant::dequantize_row(tensor.dtype, tensor.data, &mut values);
        values.into_iter().map(f64::from).collect()
    }

    /// Each row divided by its root mean square and scaled.
    fn normed(&self, stream: &[f64], scale: &str) -> Vec<f64> {
        let scale = self.vector(scale);
        let mut normed = Vec::with_capacity(stream.len());
        for row in stream.chunks_exact(self.config.hidden) {
            let mean_square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let factor = 1.0 / (mean_square + f64::from(self.config.norm_eps)).sqrt();
            normed.extend(row.iter().zip(&scale).map(|(x, scale)| x * factor * scale));
        }
        normed
    }

    /// Turns the pairs of every head by their position in the sequence.
    fn rotate(&self, rows: &mut [f64], width: usize, spans: &[Span]) {
        for span in spans {
            let rows = &mut rows[span.start * width..][..span.len * width];
            for (position, row) in rows.chunks_exact_mut(width).enumerate() {
                for head in row.chunks_exact_mut(self.config.head_dim) {
                    for (pair, frequency) in head.chunks_exact_mut(2).zip(&self.rope.frequencies) {
                        let (sin, cos) = (position as f64 * frequency).sin_cos();
                        let (sin, cos) = (sin * self.rope.magnitude, cos * self.rope.magnitude);
                        let (x, y) = (pair[0], pair[1]);
                        (pair[0], pair[1]) = (x * cos - y * sin, x * sin + y * cos);
                    }
                }
            }
        }
    }

    fn attend(&self, layer: usize, stream: &mut [f64], spans: &[Span]) {
        let config = &self.config;
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let normed = self.normed(stream, &name("attn_norm"));
        let mut queries = self.times(&name("attn_q"), &normed);
        let mut keys = self.times(&name("attn_k"), &normed);
        let values = self.times(&name("attn_v"), &normed);
        self.rotate(&mut queries, config.query_width(), spans);
        self.rotate(&mut keys, config.kv_width(), spans);
        let heads = in_parallel(spans.len() * config.heads, |job| {
            let (span, head) = (spans[job / config.heads], job % config.heads);
            self.head(span, head, &queries, &keys, &values)
        });
        let mut mixed = vec![0.0; queries.len()];
        for (job, output) in heads.into_iter().enumerate() {
            let (span, head) = (spans[job / config.heads], job % config.heads);
            for (position, row) in output.chunks_exact(config.head_dim).enumerate() {
                let at = (span.start + position) * config.query_width() + head * config.head_dim;
                mixed[at..at + config.head_dim].copy_from_slice(row);
            }
        }
        let added = self.times(&name("attn_output"), &mixed);
        stream.iter_mut().zip(added).for_each(|(x, added)| *x += added);
    }

    /// One head's output for one sequence: each position's values so far, weighted.
    fn head(
        &self,
        span: Span,
        head: usize,
        queries: &[f64],
        keys: &[f64],
        values: &[f64],
    ) -> Vec<f64> {
        let config = &self.config;
        let dim = config.head_dim;
        let kv_head = head / config.group();
        let query_at = |row: usize| row * config.query_width() + head * dim;
        let kv_at = |row: usize| row * config.kv_width() + kv_head * dim;
        let scale = 1.0 / (dim as f64).sqrt();
        let mut output = Vec::with_capacity(span.len * dim);
        for position in 0..span.len {
            let query = &queries[query_at(span.start + position)..][..dim];
            let rows = span.start..=span.start + position;
            let mut weights: Vec<f64> =
                rows.clone().map(|row| dot(query, &keys[kv_at(row)..][..dim]) * scale).collect();
            let largest = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            weights.iter_mut().for_each(|weight| *weight = (*weight - largest).exp());
            let sum: f64 = weights.iter().sum();
            let mut mixed = vec![0.0; dim];
            for (weight, row) in weights.iter().zip(rows) {
                let value = &values[kv_at(row)..][..dim];
                mixed.iter_mut().zip(value).for_each(|(x, value)| *x += weight / sum * value);
            }
            output.extend(mixed);
        }
        output
    }

    fn feed_forward(&self, layer: usize, stream: &mut [f64]) {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let normed = self.normed(stream, &name("ffn_norm"));
        let mut inner = self.times(&name("ffn_gate"), &normed);
        let up = self.times(&name("ffn_up"), &normed);
        for (gate, up) in inner.iter_mut().zip(up) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
        let added = self.times(&name("ffn_down"), &inner);
        stream.iter_mut().zip(added).for_each(|(x, added)| *x += added);
    }
}

/// A sum of products, in eight partial sums so that it is not one chain of additions.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a_parts, a_rest) = a.as_chunks::<8>();
    let (b_parts, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_parts.iter().zip(b_parts) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}
