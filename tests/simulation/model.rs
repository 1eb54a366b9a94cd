//! The model that the simulated device runs, and the same model in plain sight: what a request's
//! answer must be, whatever happens to it on the way.
//!
//! The next token is a hash of *everything it may depend on*: the whole text before it (a chain of
//! hashes, one link a position, kept where a real device keeps KV), the seed, and the counts that
//! penalties look at. So a wrong block, a position computed twice or not at all, a slot that was
//! not told its history: each changes the answer, and the client notices.

use std::sync::Arc;

use forebay::base::TokenTable;
use forebay::request::{FinishReason, SamplingParams, TokenId};

/// Tokens 0 and 1 end a text.
pub const ENDS: [TokenId; 2] = [0, 1];

pub const VOCAB: u32 = 256 + 40;

/// Ids up to 255 stand for one byte each, the way [`forebay::front::ByteTokeniser`] has them, but
/// for the two that end a text; the rest are pieces that begin, end and contain each other, so
/// that stop strings are met and nearly met all the time.
pub fn token_table() -> Arc<TokenTable> {
    let mut tokens: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
    tokens[0].clear();
    tokens[1].clear();
    let letters = b"ab\n";
    for n in 0..VOCAB as usize - 256 {
        let len = 1 + n % 4;
        tokens.push((0..len).map(|at| letters[(n / 3_usize.pow(at as u32)) % 3]).collect());
    }
    // Half of a character each: only together are they text.
    tokens[256 + 6] = "é".as_bytes()[..1].to_vec();
    tokens[256 + 7] = "é".as_bytes()[1..].to_vec();
    Arc::new(TokenTable::new(tokens.iter().map(Vec::as_slice), &ENDS))
}

pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The next link of the chain: what "KV" of a position is.
pub fn chain(before: u64, position: u32, token: TokenId) -> u64 {
    mix(before ^ mix(u64::from(position) << 32 | u64::from(token)))
}

/// What penalties see of the tokens so far: a sum, since counting does not depend on the order.
pub fn seen(sampling: &SamplingParams, tokens: &[TokenId]) -> u64 {
    if !sampling.has_penalties() {
        return 0;
    }
    tokens.iter().fold(0, |sum, &token| sum.wrapping_add(mix(u64::from(token) + 1)))
}

/// The token after a text whose last link and seen tokens these are. `top_k`, which means nothing
/// else here, says how rarely the text ends: once in so many tokens; never for 0.
pub fn next_token(link: u64, seen: u64, sampling: &SamplingParams) -> TokenId {
    let hash = mix(link ^ seen.rotate_left(17) ^ mix(sampling.seed));
    if sampling.top_k > 0 && hash.is_multiple_of(u64::from(sampling.top_k)) {
        return ENDS[(hash >> 40) as usize % ENDS.len()];
    }
    256 + ((hash >> 20) % u64::from(VOCAB - 256)) as u32
}

/// A token's log-probability and alternatives, as far as anybody can check them.
pub fn logprob(token: TokenId) -> f32 {
    -(token as f32) / 16.0
}

pub fn alternatives(token: TokenId, count: u8) -> impl Iterator<Item = (TokenId, f32)> {
    (0..u32::from(count)).map(move |n| (token / 2 + n, -(n as f32)))
}

/// All that decides an answer.
#[derive(Clone, Debug)]
pub struct Question {
    pub prompt: Vec<TokenId>,
    pub sampling: SamplingParams,
    pub stop: Vec<Box<[u8]>>,
    pub ignore_eos: bool,
    /// 0: not said.
    pub max_tokens: u32,
}

/// What must come back if nothing ends it early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub tokens: Vec<TokenId>,
    pub text: Vec<u8>,
    pub finish: FinishReason,
}

/// The answer, worked out one token at a time with nothing clever.
pub fn answer(question: &Question, context: u32, table: &TokenTable) -> Answer {
    let mut tokens = question.prompt.clone();
    let mut text = Vec::new();
    let mut link = 0;
    for (position, &token) in (0..).zip(&tokens) {
        link = chain(link, position, token);
    }
    let finish = loop {
        let next = next_token(link, seen(&question.sampling, &tokens), &question.sampling);
        if table.is_end(next) && !question.ignore_eos {
            break FinishReason::EndOfText;
        }
        link = chain(link, tokens.len() as u32, next);
        tokens.push(next);
        let before = text.len();
        text.extend_from_slice(table.bytes(next));
        if let Some(end) = first_stop(&question.stop, &text, before) {
            text.truncate(end);
            break FinishReason::StopString;
        }
        let produced = (tokens.len() - question.prompt.len()) as u32;
        if question.max_tokens > 0 && produced >= question.max_tokens {
            break FinishReason::MaxTokens;
        }
        if tokens.len() >= context as usize {
            break FinishReason::ContextFull;
        }
    };
    Answer { tokens: tokens.split_off(question.prompt.len()), text, finish }
}

/// Where the text ends if a stop string is complete at any byte after `from`.
fn first_stop(stops: &[Box<[u8]>], text: &[u8], from: usize) -> Option<usize> {
    (from + 1..=text.len()).find_map(|end| {
        let matching = stops.iter().filter(|stop| text[..end].ends_with(stop));
        matching.map(|stop| end - stop.len()).min()
    })
}
