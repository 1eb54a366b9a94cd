//! Choosing a token from a row of logits: pure functions of the row, the parameters, what came
//! before, and the position. Nothing of the batch enters.
//!
//! All filters keep a prefix of the tokens in order of likelihood (ties: lowest id first), so each
//! is a *cut* in that order and the tightest one wins. Finding a cut takes a selection among the
//! few chunks that can matter; the vocabulary is never sorted. The draw walks the kept tokens in
//! order of id.

use std::cmp::Ordering;
use std::f32::consts::LOG2_E;

use crate::device::cpu::kernels::Kernels;
use crate::device::cpu::logits::{CHUNK, power};
use crate::request::{SamplingParams, TokenId};

/// What a batch slot remembers of its sequence's earlier tokens, for penalties.
#[derive(Debug)]
pub struct History {
    /// For each token of the vocabulary: occurrences in the output, and [`IN_PROMPT`].
    counts: Vec<u32>,
    /// Tokens whose count is not zero.
    seen: Vec<TokenId>,
}

/// Set in a count when the token occurs in the prompt.
const IN_PROMPT: u32 = 1 << 31;

impl History {
    /// Room for `vocab` tokens, of which `seen_max` different ones may occur.
    pub fn new(vocab: usize, seen_max: usize) -> History {
        History { counts: vec![0; vocab], seen: Vec::with_capacity(seen_max.min(vocab)) }
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        ((self.counts.len() + self.seen.capacity()) * 4) as u64
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for token in self.seen.drain(..) {
            self.counts[token as usize] = 0;
        }
    }

    /// Counts a token of the prompt; one outside the vocabulary is ignored.
    pub fn add_prompt(&mut self, token: TokenId) {
        self.update(token, |count| count | IN_PROMPT);
    }

    /// Counts a token of the output; one outside the vocabulary is ignored.
    pub fn add_output(&mut self, token: TokenId) {
        self.update(
            token,
            |count| if count & !IN_PROMPT < IN_PROMPT - 1 { count + 1 } else { count },
        );
    }

    fn update(&mut self, token: TokenId, next: impl FnOnce(u32) -> u32) {
        let Some(count) = self.counts.get_mut(token as usize) else { return };
        if *count == 0 {
            if self.seen.len() == self.seen.capacity() {
                return;
            }
            self.seen.push(token);
        }
        *count = next(*count);
    }
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    token: TokenId,
}

impl Candidate {
    /// Most likely first, lowest id among equals. Candidates are numbers.
    fn order(&self, other: &Candidate) -> Ordering {
        let by_logit = other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal);
        by_logit.then(self.token.cmp(&other.token))
    }
}

/// Working memory of one worker, sized once.
#[derive(Debug)]
pub struct Scratch {
    /// Largest logit of each chunk.
    maxima: Vec<f32>,
    /// A copy of `maxima` to select in, or sums over chunks.
    chunks: Vec<f32>,
    candidates: Vec<Candidate>,
    /// Logits before penalties and bias.
    changed: Vec<(TokenId, f32)>,
    /// Most likely tokens of the raw distribution.
    top: Vec<(TokenId, f32)>,
}

impl Scratch {
    /// For rows of `vocab` logits and sequences of at most `context_max` tokens.
    pub fn new(vocab: usize, context_max: usize) -> Scratch {
        let chunks = vocab.div_ceil(CHUNK);
        Scratch {
            maxima: vec![0.0; chunks],
            chunks: vec![0.0; chunks],
            candidates: Vec::with_capacity(vocab),
            changed: Vec::with_capacity(context_max.min(vocab) + SamplingParams::LOGIT_BIAS_MAX),
            top: Vec::with_capacity(usize::from(SamplingParams::TOP_LOGPROBS_MAX)),
        }
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        (self.maxima.len() * 8
            + self.candidates.capacity() * size_of::<Candidate>()
            + (self.changed.capacity() + self.top.capacity()) * 8) as u64
    }
}

/// A chosen token. The alternatives lie in the scratch memory: see [`Scratch::top`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: TokenId,
    /// Its log-probability in the raw distribution, when asked for, else 0.
    pub logprob: f32,
}

impl Scratch {
    /// The most likely tokens of the last row in the raw distribution, with log-probabilities; as
    /// many as its parameters asked for.
    pub fn top(&self) -> &[(TokenId, f32)] {
        &self.top
    }
}

/// A number in [0, 1) from a seed and the absolute position of the token to choose: the same
/// wherever, whenever and beside whatever it is drawn.
pub fn uniform(seed: u64, position: u32) -> f64 {
    let key = mix(seed ^ 0x9e37_79b9_7f4a_7c15);
    let bits = mix(key ^ mix(u64::from(position).wrapping_mul(0xd1b5_4a32_d192_ed03)));
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// A bijection of 64 bits in which every input bit reaches every output bit (splitmix64's).
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Chooses the token at `position` from a row of logits, which is changed on the way (penalties
/// and bias). Never panics, whatever the logits and parameters are; without a single number among
/// the logits, token 0 is chosen.
pub fn choose(
    kernels: &Kernels,
    row: &mut [f32],
    params: &SamplingParams,
    history: &History,
    position: u32,
    scratch: &mut Scratch,
) -> Choice {
    scratch.top.clear();
    scratch.changed.clear();
    kernels.maxima(row, &mut scratch.maxima);
    let log_total = params.logprobs.map(|count| {
        let log_total = log_total(kernels, row, scratch);
        find_top(row, usize::from(count), log_total, scratch);
        log_total
    });
    if adjust(row, params, history, scratch) {
        kernels.maxima(row, &mut scratch.maxima);
    }
    let token = pick(kernels, row, params, position, scratch);
    let raw = scratch.changed.iter().find(|&&(changed, _)| changed == token);
    let raw = raw.map_or(row[token as usize], |&(_, logit)| logit);
    let logprob = log_total.map_or(0.0, |log_total| (f64::from(raw) - log_total) as f32);
    Choice { token, logprob }
}

/// Penalties and bias; `false` when there are none.
fn adjust(
    row: &mut [f32],
    params: &SamplingParams,
    history: &History,
    scratch: &mut Scratch,
) -> bool {
    let has_penalties = params.has_penalties();
    if has_penalties {
        for &token in &history.seen {
            let Some(logit) = row.get_mut(token as usize) else { continue };
            scratch.changed.push((token, *logit));
            if *logit > 0.0 {
                *logit /= params.repetition_penalty;
            } else {
                *logit *= params.repetition_penalty;
            }
            let count = history.counts[token as usize] & !IN_PROMPT;
            if count > 0 {
                *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
            }
        }
    }
    for &(token, bias) in params.logit_bias.iter().take(SamplingParams::LOGIT_BIAS_MAX) {
        let Some(logit) = row.get_mut(token as usize) else { continue };
        scratch.changed.push((token, *logit));
        *logit += bias;
    }
    has_penalties || !params.logit_bias.is_empty()
}

/// Logarithm of the sum of the exponentials of all logits.
fn log_total(kernels: &Kernels, row: &[f32], scratch: &mut Scratch) -> f64 {
    let max = largest(&scratch.maxima);
    kernels.powers(row, max, LOG2_E, &mut scratch.chunks);
    f64::from(max) + total(&scratch.chunks).ln()
}

fn total(chunks: &[f32]) -> f64 {
    chunks.iter().map(|&sum| f64::from(sum)).sum()
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(f32::NEG_INFINITY, |max, &value| if value > max { value } else { max })
}

/// Fills `scratch.top` with the `count` most likely tokens, most likely first.
fn find_top(row: &[f32], count: usize, log_total: f64, scratch: &mut Scratch) {
    let count = count.min(usize::from(SamplingParams::TOP_LOGPROBS_MAX));
    keep_most_likely(row, count, scratch);
    scratch.candidates.sort_unstable_by(Candidate::order);
    for candidate in &scratch.candidates {
        let logprob = (f64::from(candidate.logit) - log_total) as f32;
        scratch.top.push((candidate.token, logprob));
    }
}

/// Leaves the `count` most likely tokens in `scratch.candidates`, in any order.
fn keep_most_likely(row: &[f32], count: usize, scratch: &mut Scratch) {
    if count == 0 {
        scratch.candidates.clear();
        return;
    }
    // At least `count` chunks reach the count-th largest maximum, so as many tokens do.
    let mut bound = f32::NEG_INFINITY;
    if count <= scratch.maxima.len() {
        scratch.chunks.copy_from_slice(&scratch.maxima);
        let by_size = |a: &f32, b: &f32| b.partial_cmp(a).unwrap_or(Ordering::Equal);
        bound = *scratch.chunks.select_nth_unstable_by(count - 1, by_size).1;
    }
    gather(row, bound, scratch);
    if count < scratch.candidates.len() {
        scratch.candidates.select_nth_unstable_by(count - 1, Candidate::order);
        scratch.candidates.truncate(count);
    }
}

/// Collects all tokens whose logit is at least `bound`, by id.
fn gather(row: &[f32], bound: f32, scratch: &mut Scratch) {
    scratch.candidates.clear();
    for (index, chunk) in row.chunks(CHUNK).enumerate() {
        if scratch.maxima[index] < bound {
            continue;
        }
        for (offset, &logit) in chunk.iter().enumerate() {
            if logit >= bound {
                let token = (index * CHUNK + offset) as TokenId;
                scratch.candidates.push(Candidate { logit, token });
            }
        }
    }
}

fn pick(
    kernels: &Kernels,
    row: &[f32],
    params: &SamplingParams,
    position: u32,
    scratch: &mut Scratch,
) -> TokenId {
    let max = largest(&scratch.maxima);
    // Not greater takes a temperature that is no number for greedy, too.
    if !max.is_finite() || params.temperature.partial_cmp(&0.0) != Some(Ordering::Greater) {
        return greedy(row, max, &scratch.maxima);
    }
    // An infinite factor would turn the most likely token's 0 into no number.
    let factor = (LOG2_E / params.temperature).min(1e30);
    let cut = find_cut(kernels, row, params, max, factor, scratch);
    draw(kernels, row, uniform(params.seed, position), max, factor, cut, scratch)
}

/// The lowest id among the largest logits.
fn greedy(row: &[f32], max: f32, maxima: &[f32]) -> TokenId {
    let chunk = maxima.iter().position(|&value| value == max).unwrap_or(0);
    let within = row[chunk * CHUNK..].iter().position(|&logit| logit == max).unwrap_or(0);
    (chunk * CHUNK + within) as TokenId
}

/// The least likely token that the filters keep; `None` when they keep all.
fn find_cut(
    kernels: &Kernels,
    row: &[f32],
    params: &SamplingParams,
    max: f32,
    factor: f32,
    scratch: &mut Scratch,
) -> Option<Candidate> {
    let mut cut = None;
    let top_k = params.top_k as usize;
    let has_top_k = top_k > 0 && top_k < row.len();
    if has_top_k {
        keep_most_likely(row, top_k, scratch);
        cut = least_likely(&scratch.candidates);
    }
    if params.top_p < 1.0 {
        let mass: f64 = if has_top_k {
            let powers = scratch.candidates.iter().map(|c| power(c.logit, max, factor));
            powers.map(f64::from).sum()
        } else {
            kernels.powers(row, max, factor, &mut scratch.chunks);
            let mass = total(&scratch.chunks);
            // Tokens below (1 - p)/V of the mass have less than 1 - p of it together, so none of
            // them is needed to reach p. The 0.9 pays for rounding.
            let least = (1.0 - f64::from(params.top_p)) * mass / row.len() as f64 * 0.9;
            gather(row, max + (least.log2() / f64::from(factor)) as f32, scratch);
            mass
        };
        let kept = nucleus(&mut scratch.candidates, f64::from(params.top_p) * mass, max, factor);
        scratch.candidates.truncate(kept);
        cut = least_likely(&scratch.candidates);
    }
    if params.min_p > 0.0 {
        let bound = f64::from(max) + f64::from(params.min_p.min(1.0)).log2() / f64::from(factor);
        // The smallest float that is not below the bound.
        let rounded = bound as f32;
        let logit = if f64::from(rounded) < bound { rounded.next_up() } else { rounded };
        let by_min_p = Candidate { logit, token: TokenId::MAX };
        cut = match cut {
            Some(cut) if cut.order(&by_min_p) == Ordering::Less => Some(cut),
            _ => Some(by_min_p),
        };
    }
    cut
}

fn least_likely(candidates: &[Candidate]) -> Option<Candidate> {
    candidates.iter().copied().max_by(Candidate::order)
}

/// How many of the most likely candidates reach `target`; moves those to the front.
///
/// Halves the range that holds the answer until it is short, then sorts that: linear in all.
fn nucleus(candidates: &mut [Candidate], target: f64, max: f32, factor: f32) -> usize {
    let weight = |candidate: &Candidate| f64::from(power(candidate.logit, max, factor));
    let (mut start, mut end, mut before) = (0, candidates.len(), 0.0);
    while end - start > 32 {
        let middle = (end - start) / 2;
        candidates[start..end].select_nth_unstable_by(middle, Candidate::order);
        let mass: f64 = candidates[start..start + middle].iter().map(weight).sum();
        if before + mass >= target {
            end = start + middle;
        } else {
            before += mass;
            start += middle;
        }
    }
    candidates[start..end].sort_unstable_by(Candidate::order);
    for (index, candidate) in candidates[start..end].iter().enumerate() {
        before += weight(candidate);
        if before >= target {
            return start + index + 1;
        }
    }
    end
}

/// Draws among the tokens not beyond the cut, in order of id.
fn draw(
    kernels: &Kernels,
    row: &[f32],
    uniform: f64,
    max: f32,
    factor: f32,
    cut: Option<Candidate>,
    scratch: &mut Scratch,
) -> TokenId {
    let weight = |token: usize, logit: f32| {
        let candidate = Candidate { logit, token: token as TokenId };
        let is_cut = cut.is_some_and(|cut| candidate.order(&cut) == Ordering::Greater);
        if is_cut { 0.0 } else { power(logit, max, factor) }
    };
    match cut {
        None => kernels.powers(row, max, factor, &mut scratch.chunks),
        Some(cut) => {
            for (index, chunk) in row.chunks(CHUNK).enumerate() {
                scratch.chunks[index] = 0.0;
                if scratch.maxima[index] >= cut.logit {
                    let weights = chunk.iter().enumerate();
                    let weights = weights.map(|(i, &logit)| weight(index * CHUNK + i, logit));
                    scratch.chunks[index] = weights.sum();
                }
            }
        }
    }
    let mut left = uniform * total(&scratch.chunks);
    let mut last = None;
    for (index, &sum) in scratch.chunks.iter().enumerate() {
        if sum <= 0.0 {
            continue;
        }
        if left >= f64::from(sum) {
            left -= f64::from(sum);
            last = Some(index);
            continue;
        }
        last = Some(index);
        break;
    }
    let Some(index) = last else { return greedy(row, max, &scratch.maxima) };
    // Within the chunk the weights may add up to a little less than the chunk's sum, which was
    // rounded in another order: then the last token with any weight is it.
    let mut choice = index * CHUNK;
    for (offset, &logit) in row[index * CHUNK..].iter().take(CHUNK).enumerate() {
        let weight = f64::from(weight(index * CHUNK + offset, logit));
        if weight <= 0.0 {
            continue;
        }
        choice = index * CHUNK + offset;
        if left < weight {
            break;
        }
        left -= weight;
    }
    choice as TokenId
}

#[cfg(test)]
mod tests;
