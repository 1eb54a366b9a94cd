//! Attention over the paged cache: one recurrence for prefill and decode alike.
//!
//! A query at position t goes through the 64-position blocks of its sequence in order. Each block
//! gives a partial result that depends on nothing before it (its own maximum m, sum l and weighted
//! values o); partials are then merged in block order by
//! `M' = max(M, m); L' = L·2^(M-M') + l·2^(m-M'); O' = O·2^(M-M') + o·2^(m-M')`.
//! Blocks are absolute and queries do not meet, so neither chunking nor neighbours nor threads
//! change a bit (I7). Queries are scaled by log2(e)/√head_dim beforehand: exponentials are 2^x.
#![allow(unsafe_code)]

use crate::device::cpu::kernels::{GROUP_MAX, Kernels, PairArgs};
use crate::device::cpu::kv::KvPool;
use crate::device::cpu::rows::exp2;
use crate::message::{BLOCK_POSITIONS, BlockId};

/// Some queries of one sequence that share a kv head.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// Scaled and rotated queries, one after the other, each `padded_dim` values in bf16.
    pub values: &'a [u16],
    /// Absolute position of the first query's token.
    pub position: usize,
    /// How many heads of the first token are left, itself included: then the next token's follow.
    pub first_head: usize,
    /// Query heads that share the kv head; consecutive queries are those of a token.
    pub group: usize,
    /// The sequence's blocks.
    pub blocks: &'a [BlockId],
    /// Which layer.
    pub layer: usize,
    /// Which kv head.
    pub kv_head: usize,
}

/// Working memory of one worker.
pub struct AttentionScratch {
    scores: [[f32; BLOCK_POSITIONS]; GROUP_MAX],
    powers: [[u16; BLOCK_POSITIONS]; GROUP_MAX],
    /// Weighted values of one block: `GROUP_MAX` × padded_dim.
    partial: Vec<f32>,
}

impl AttentionScratch {
    /// For heads of `padded_dim` values.
    pub fn new(padded_dim: usize) -> AttentionScratch {
        AttentionScratch {
            scores: [[0.0; BLOCK_POSITIONS]; GROUP_MAX],
            powers: [[0; BLOCK_POSITIONS]; GROUP_MAX],
            partial: vec![0.0; GROUP_MAX * padded_dim],
        }
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        (size_of::<AttentionScratch>() + self.partial.len() * 4) as u64
    }
}

/// A query's merged state.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
}

/// Attends with at most [`GROUP_MAX`] queries; `out` gets `padded_dim` values for each.
///
/// # Safety
/// Nobody writes to the blocks' parts of this layer and kv head meanwhile.
///
/// # Panics
/// When the slices do not fit together or the blocks do not reach the last query's position.
pub unsafe fn attend(
    kernels: &Kernels,
    pool: &KvPool,
    queries: &Queries<'_>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let dim = pool.layout().padded_dim();
    let count = queries.values.len() / dim;
    assert!((1..=GROUP_MAX).contains(&count) && queries.values.len() == count * dim);
    assert!(out.len() == count * dim && scratch.partial.len() >= count * dim);
    let position_of =
        |query: usize| queries.position + (queries.first_head + query) / queries.group;
    let last = position_of(count - 1);
    assert!(queries.blocks.len() > last / BLOCK_POSITIONS, "blocks for every position");
    out.fill(0.0);
    let mut states = [State { max: f32::NEG_INFINITY, sum: 0.0 }; GROUP_MAX];
    for (index, &block) in queries.blocks[..=last / BLOCK_POSITIONS].iter().enumerate() {
        let start = index * BLOCK_POSITIONS;
        let part = pool.part(block, queries.layer, queries.kv_head);
        // SAFETY: queries and scores are as long as said (asserted), the keys are a part's
        // (padded_dim / 2 lines of 64 pairs), and nobody writes to them (the caller's word).
        unsafe {
            kernels.pairs(&PairArgs {
                a: queries.values.as_ptr().cast(),
                a_stride: dim / 2,
                rows: count,
                b: part.keys,
                columns: BLOCK_POSITIONS,
                pairs: dim / 2,
                out: scratch.scores.as_mut_ptr().cast(),
                out_stride: BLOCK_POSITIONS,
                add: false,
            });
        }
        let mut maxima = [0.0; GROUP_MAX];
        let mut sums = [0.0; GROUP_MAX];
        for query in 0..count {
            let scores = &mut scratch.scores[query];
            let visible = (position_of(query) + 1).saturating_sub(start).min(BLOCK_POSITIONS);
            scores[visible..].fill(f32::NEG_INFINITY);
            maxima[query] = kernels.max64(scores);
            // Without a finite maximum nothing of the block counts (all masked, or no numbers).
            let shift = if maxima[query].is_finite() { maxima[query] } else { 0.0 };
            sums[query] = kernels.powers64(scores, shift, &mut scratch.powers[query]);
        }
        // Positions past the last query hold anything, so they are left out of the sum over pairs.
        let visible = (last + 1 - start).min(BLOCK_POSITIONS);
        // SAFETY: as above; the values are `64 / 2` lines of padded_dim pairs, of which the first
        // ⌈visible / 2⌉ are used, and the partial results fit (asserted).
        unsafe {
            kernels.pairs(&PairArgs {
                a: scratch.powers.as_ptr().cast(),
                a_stride: BLOCK_POSITIONS / 2,
                rows: count,
                b: part.values,
                columns: dim,
                pairs: visible.div_ceil(2),
                out: scratch.partial.as_mut_ptr(),
                out_stride: dim,
                add: false,
            });
        }
        for query in 0..count {
            let range = query * dim..(query + 1) * dim;
            let partial = &scratch.partial[range.clone()];
            merge(
                kernels,
                &mut states[query],
                maxima[query],
                sums[query],
                &mut out[range],
                partial,
            );
        }
    }
    for (state, out) in states.iter().zip(out.chunks_exact_mut(dim)) {
        let inverse = if state.sum > 0.0 { 1.0 / state.sum } else { 0.0 };
        for value in out {
            *value *= inverse;
        }
    }
}

/// Adds one block's partial result to a query's state.
fn merge(
    kernels: &Kernels,
    state: &mut State,
    max: f32,
    sum: f32,
    out: &mut [f32],
    partial: &[f32],
) {
    if !max.is_finite() {
        return;
    }
    let merged = if state.max > max { state.max } else { max };
    let (before, now) = (exp2(state.max - merged), exp2(max - merged));
    state.sum = state.sum * before + sum * now;
    state.max = merged;
    kernels.blend(out, before, partial, now);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::cpu::isa::Isa;
    use crate::device::cpu::kernels::tests::Noise;
    use crate::device::cpu::kv::KvLayout;

    const LAYERS: usize = 2;
    const KV_HEADS: usize = 2;

    /// A sequence's rotated queries, keys and values, and a pool that holds it.
    struct Sequence {
        head_dim: usize,
        group: usize,
        /// `[position][head in group][dim]`.
        queries: Vec<f32>,
        keys: Vec<f32>,
        values: Vec<f32>,
        blocks: Vec<BlockId>,
        pool: KvPool,
    }

    impl Sequence {
        /// `used`: an earlier owner left the blocks full.
        fn new(positions: usize, head_dim: usize, group: usize, seed: u64, used: bool) -> Sequence {
            let mut noise = Noise(seed);
            let queries = noise.normals(positions * group * head_dim);
            let keys = noise.normals(positions * head_dim);
            let values = noise.normals(positions * head_dim);
            let count = positions.div_ceil(BLOCK_POSITIONS) as u32;
            let layout = KvLayout::new(LAYERS, KV_HEADS, head_dim);
            let pool = KvPool::new(layout, count + 3).expect("memory");
            let blocks: Vec<BlockId> = (0..count).map(|index| count + 2 - index).collect();
            let sequence = Sequence { head_dim, group, queries, keys, values, blocks, pool };
            if used {
                let old = [f32::MAX, -2e30].repeat(head_dim / 2);
                for position in 0..sequence.blocks.len() * BLOCK_POSITIONS {
                    sequence.write(position, &old, &old);
                }
            }
            for position in 0..positions {
                let range = position * head_dim..(position + 1) * head_dim;
                let (key, value) = (&sequence.keys[range.clone()], &sequence.values[range]);
                sequence.write(position, key, value);
            }
            sequence
        }

        fn write(&self, position: usize, key: &[f32], value: &[f32]) {
            let place = (self.blocks[position / BLOCK_POSITIONS], 1, 1);
            // SAFETY: the test has the pool alone.
            unsafe { self.pool.write(place, position % BLOCK_POSITIONS, key, value) };
        }

        /// Queries `first` to `first + count`, counted over positions and heads.
        fn attend(&self, kernels: &Kernels, first: usize, count: usize) -> Vec<f32> {
            let dim = self.pool.layout().padded_dim();
            let scale = std::f32::consts::LOG2_E / (self.head_dim as f32).sqrt();
            let mut values = vec![0u16; count * dim];
            for (index, out) in values.chunks_mut(dim).enumerate() {
                let query = &self.queries[(first + index) * self.head_dim..][..self.head_dim];
                let scaled: Vec<f32> = query.iter().map(|value| value * scale).collect();
                kernels.to_bf16(&scaled, out);
            }
            let position = first / self.group;
            let last = (first + count - 1) / self.group;
            let queries = Queries {
                values: &values,
                position,
                first_head: first % self.group,
                group: self.group,
                blocks: &self.blocks[..last / BLOCK_POSITIONS + 1],
                layer: 1,
                kv_head: 1,
            };
            let mut scratch = AttentionScratch::new(dim);
            let mut out = vec![f32::NAN; count * dim];
            // SAFETY: the test has the pool alone.
            unsafe { attend(kernels, &self.pool, &queries, &mut scratch, &mut out) };
            let heads = out.chunks(dim);
            assert!(heads.clone().all(|head| head[self.head_dim..].iter().all(|&x| x == 0.0)));
            heads.flat_map(|head| head[..self.head_dim].to_vec()).collect()
        }

        /// The query's answer, and the same with the values' sizes, which rounding is relative to.
        fn exact(&self, query: usize) -> (Vec<f64>, Vec<f64>) {
            let dim = self.head_dim;
            let head = |of: &[f32], at: usize| -> Vec<f64> {
                of[at * dim..(at + 1) * dim].iter().map(|&x| f64::from(x)).collect()
            };
            let q = head(&self.queries, query);
            let visible = query / self.group + 1;
            let scores = (0..visible).map(|position| {
                let dot: f64 = head(&self.keys, position).iter().zip(&q).map(|(k, q)| k * q).sum();
                (dot / (dim as f64).sqrt()).exp()
            });
            let scores: Vec<f64> = scores.collect();
            let total: f64 = scores.iter().sum();
            let (mut out, mut size) = (vec![0.0; dim], vec![0.0; dim]);
            for (position, score) in scores.iter().enumerate() {
                for (at, value) in head(&self.values, position).into_iter().enumerate() {
                    out[at] += score / total * value;
                    size[at] += score / total * value.abs();
                }
            }
            (out, size)
        }

        /// Size of the error of the answers to the queries from `first` on, relative to the size
        /// of what was added up: values of both signs cancel, their rounding does not.
        fn error(&self, first: usize, answers: &[f32]) -> f64 {
            let (mut error, mut size) = (0.0, 0.0);
            for (index, answer) in answers.chunks(self.head_dim).enumerate() {
                let (exact, sizes) = self.exact(first + index);
                let errors = answer.iter().zip(&exact).map(|(&x, exact)| f64::from(x) - exact);
                error += errors.map(|e| e * e).sum::<f64>();
                size += sizes.iter().map(|s| s * s).sum::<f64>();
            }
            (error / size).sqrt()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Queries, keys, values and probabilities are each rounded to bf16 (2^-9 at most, a
        /// third of it on average): together well below 5e-3.
        #[test]
        fn attention_equals_its_definition_and_no_query_meets_another(
            positions in 1usize..200, dim in 0usize..4, group in 1usize..5, seed: u64,
            used: bool, start in 0.0f64..1.0, count in 1usize..=GROUP_MAX,
        ) {
            let head_dim = [64, 16, 80, 128][dim];
            let sequence = Sequence::new(positions, head_dim, group, seed, used);
            let fresh = Sequence::new(positions, head_dim, group, seed, false);
            let total = positions * group;
            let first = ((start * total as f64) as usize).min(total - 1);
            let count = count.min(total - first);
            for isa in Isa::available() {
                let kernels = Kernels::of(isa).expect("available");
                let out = sequence.attend(kernels, first, count);
                let error = sequence.error(first, &out);
                prop_assert!(error < 5e-3, "{}: {}", isa, error);
                prop_assert_eq!(&out, &fresh.attend(kernels, first, count));
                for (index, out) in out.chunks(head_dim).enumerate() {
                    let alone = sequence.attend(kernels, first + index, 1);
                    prop_assert_eq!(&alone[..], out, "{}, query {}", isa, first + index);
                }
            }
        }
    }

    #[test]
    fn long_contexts_and_scores_far_apart_stay_accurate() {
        let mut sequence = Sequence::new(3000, 64, 3, 5, false);
        // Scores in the hundreds: all but one or two probabilities vanish.
        for value in &mut sequence.queries {
            *value *= 40.0;
        }
        for isa in Isa::available() {
            let kernels = Kernels::of(isa).expect("available");
            for query in [8999, 4000, 191, 192, 0] {
                let out = sequence.attend(kernels, query, 1);
                assert!(out.iter().all(|value| value.is_finite()));
                // A score of 300 rounded at 2^-9 is off by up to half: only roughly right.
                let error = sequence.error(query, &out);
                assert!(error < 0.5, "{isa}, query {query}: {error}");
            }
        }
    }

    #[test]
    fn what_is_no_number_reaches_no_later_owner_of_the_block() {
        let head_dim = 64;
        let poisoned = Sequence::new(9, head_dim, 1, 3, false);
        let bad = [f32::NAN, f32::INFINITY].repeat(head_dim / 2);
        for position in 0..BLOCK_POSITIONS {
            poisoned.write(position, &bad, &bad);
        }
        for position in 0..9 {
            let range = position * head_dim..(position + 1) * head_dim;
            let (key, value) = (&poisoned.keys[range.clone()], &poisoned.values[range]);
            poisoned.write(position, key, value);
        }
        let clean = Sequence::new(9, head_dim, 1, 3, false);
        for isa in Isa::available() {
            let kernels = Kernels::of(isa).expect("available");
            for query in 0..9 {
                let out = poisoned.attend(kernels, query, 1);
                assert_eq!(out, clean.attend(kernels, query, 1), "{isa}, query {query}");
            }
        }
    }
}
