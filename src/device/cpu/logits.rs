//! Passes over a whole row of logits, compiled once per instruction-set path by `kernels`.
//!
//! They look at chunks of [`CHUNK`] tokens: with the largest logit of each chunk known, later
//! passes skip all chunks that cannot matter.

use crate::device::cpu::rows::exp2;

/// Tokens in a chunk.
pub const CHUNK: usize = 64;

/// The largest logit of each chunk; logits that are no numbers do not count.
#[inline(always)]
pub fn maxima(row: &[f32], out: &mut [f32]) {
    assert_eq!(out.len(), row.len().div_ceil(CHUNK));
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    for (chunk, out) in row.chunks(CHUNK).zip(out) {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (whole, rest) = chunk.as_chunks::<16>();
        for values in whole {
            for (lane, value) in lanes.iter_mut().zip(values) {
                *lane = larger(*value, *lane);
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane = larger(*value, *lane);
        }
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                lanes[lane] = larger(lanes[lane + half], lanes[lane]);
            }
        }
        *out = lanes[0];
    }
}

/// The sum of 2^((logit - max)·factor) over each chunk.
#[inline(always)]
pub fn powers(row: &[f32], max: f32, factor: f32, out: &mut [f32]) {
    assert_eq!(out.len(), row.len().div_ceil(CHUNK));
    for (chunk, out) in row.chunks(CHUNK).zip(out) {
        let mut lanes = [0.0f32; 16];
        let (whole, rest) = chunk.as_chunks::<16>();
        for values in whole {
            for (lane, value) in lanes.iter_mut().zip(values) {
                *lane += power(*value, max, factor);
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane += power(*value, max, factor);
        }
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
        }
        *out = lanes[0];
    }
}

/// A token's weight relative to the most likely one; 0 for a logit that is no number.
#[inline(always)]
pub fn power(logit: f32, max: f32, factor: f32) -> f32 {
    let power = exp2((logit - max) * factor);
    if logit <= max { power } else { 0.0 }
}
