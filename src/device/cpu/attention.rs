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
