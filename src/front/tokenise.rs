//! Prompts become tokens here, a slice at a time: a long prompt must not hold up the streams that
//! share its core.
//!
//! Core: front.

use std::collections::VecDeque;

use crate::base::SlabKey;
use crate::protocol::{BodyError, Prompt};
use crate::request::TokenId;

/// Input bytes of one slice. A byte-level BPE does 1 to 3 MB/s: 1 KiB is at most about a
/// millisecond, the length of a slice in which nobody else on this core is served.
pub const SLICE_BYTES: usize = 1024;

/// A model's way from prompts to tokens.
pub trait Tokenise {
    /// Token ids are below this.
    fn vocab_tokens(&self) -> u32;

    /// Most tokens that a prompt may have beyond its bytes: what the chat template adds by itself,
    /// and marks of beginning and end. (A message's own markup is covered by the 5 bytes of its
    /// head on the wire.) An upper bound: a prompt that turns out larger is refused.
    fn template_tokens_max(&self) -> u32;

    /// Begins with a prompt of messages or text (never of token ids). Copies what it needs.
    ///
    /// # Errors
    /// When the prompt does not suit the model; the message goes to the client.
    fn begin(&mut self, prompt: &Prompt<'_>) -> Result<Box<dyn TokeniseJob>, BodyError>;
}

/// One prompt on its way.
pub trait TokeniseJob {
    /// Works through about `bytes_max` more bytes of input and appends their tokens. `true` when
    /// the prompt is done.
    ///
    /// # Errors
    /// As for [`Tokenise::begin`].
    fn advance(&mut self, bytes_max: usize, tokens: &mut Vec<TokenId>) -> Result<bool, BodyError>;
}

/// A prompt's tokens, or what is wrong with it.
pub(super) type Tokenised = Result<Vec<TokenId>, TokeniseFailure>;

/// Why a prompt has no tokens.
#[derive(Debug)]
pub(super) enum TokeniseFailure {
    /// It can never be right.
    Invalid(BodyError),
    /// It has more tokens than the context: at least so many.
    TooLong(usize),
}

struct Job {
    stream: SlabKey,
    work: Box<dyn TokeniseJob>,
    tokens: Vec<TokenId>,
}

/// Jobs that wait for their next slice, round-robin: a short prompt passes a long one.
#[derive(Default)]
pub(super) struct TokeniseQueue {
    jobs: VecDeque<Job>,
}

impl TokeniseQueue {
    pub(super) fn push(&mut self, stream: SlabKey, work: Box<dyn TokeniseJob>) {
        self.jobs.push_back(Job { stream, work, tokens: Vec::new() });
    }

    /// Forgets a stream's job.
    pub(super) fn cancel(&mut self, stream: SlabKey) {
        self.jobs.retain(|job| job.stream != stream);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Does one slice of one job. Returns the job's stream and result when that ended it.
    pub(super) fn advance(&mut self, context_max: u32) -> Option<(SlabKey, Tokenised)> {
        let mut job = self.jobs.pop_front()?;
        match job.work.advance(SLICE_BYTES, &mut job.tokens) {
            Err(error) => Some((job.stream, Err(TokeniseFailure::Invalid(error)))),
            // Tokens beyond the context decide: no use in counting the rest.
            Ok(_) if job.tokens.len() > context_max as usize => {
                Some((job.stream, Err(TokeniseFailure::TooLong(job.tokens.len()))))
            }
            Ok(true) => Some((job.stream, Ok(job.tokens))),
            Ok(false) => {
                self.jobs.push_back(job);
                None
            }
        }
    }
}

/// One token a byte, for the simulator and for tests: the ids are the bytes, and each message
/// becomes role, colon, content, newline.
#[derive(Clone, Copy, Debug)]
pub struct ByteTokeniser {
    vocab_tokens: u32,
}

impl ByteTokeniser {
    /// A tokeniser that says it has `vocab_tokens` (at least 256) tokens.
    pub fn new(vocab_tokens: u32) -> ByteTokeniser {
        assert!(vocab_tokens >= 256, "a byte is a token");
        ByteTokeniser { vocab_tokens }
    }
}

impl Tokenise for ByteTokeniser {
    fn vocab_tokens(&self) -> u32 {
        self.vocab_tokens
    }

    fn template_tokens_max(&self) -> u32 {
        0
    }

    fn begin(&mut self, prompt: &Prompt<'_>) -> Result<Box<dyn TokeniseJob>, BodyError> {
        let bytes = match prompt {
            Prompt::Text(text) => text.as_bytes().to_vec(),
            Prompt::Messages(messages) => {
                let mut bytes = Vec::new();
                for message in messages {
                    // The first letter of the role: with colon and newline 3 tokens, within the
                    // 5 bytes of a message's head.
                    bytes.push(message.role.name().as_bytes()[0]);
                    bytes.push(b':');
                    bytes.extend_from_slice(message.content.as_bytes());
                    bytes.push(b'\n');
                }
                bytes
            }
            Prompt::Tokens(_) => return Err(BodyError("token ids are not tokenised".into())),
        };
        Ok(Box::new(ByteJob { bytes, next: 0 }))
    }
}

struct ByteJob {
    bytes: Vec<u8>,
    next: usize,
}

impl TokeniseJob for ByteJob {
    fn advance(&mut self, bytes_max: usize, tokens: &mut Vec<TokenId>) -> Result<bool, BodyError> {
        let end = self.bytes.len().min(self.next + bytes_max.max(1));
        tokens.extend(self.bytes[self.next..end].iter().map(|&byte| TokenId::from(byte)));
        self.next = end;
        Ok(end == self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(slot: u32) -> SlabKey {
        SlabKey { slot, generation: 0 }
    }

    fn job(bytes: usize) -> Box<dyn TokeniseJob> {
        let text = "x".repeat(bytes);
        ByteTokeniser::new(256).begin(&Prompt::Text(&text)).unwrap()
    }

    #[test]
    fn a_short_prompt_passes_a_long_one() {
        let mut queue = TokeniseQueue::default();
        queue.push(key(1), job(SLICE_BYTES * 5));
        queue.push(key(2), job(3));
        let mut ended = Vec::new();
        while !queue.is_empty() {
            if let Some((stream, tokens)) = queue.advance(u32::MAX) {
                ended.push((stream.slot, tokens.unwrap().len()));
            }
        }
        assert_eq!(ended, [(2, 3), (1, SLICE_BYTES * 5)]);
    }

    #[test]
    fn a_prompt_beyond_the_context_is_not_worked_through() {
        let mut queue = TokeniseQueue::default();
        queue.push(key(1), job(SLICE_BYTES * 500));
        let (_, tokens) = queue.advance(10).unwrap();
        assert!(matches!(tokens, Err(TokeniseFailure::TooLong(SLICE_BYTES))));
    }

    #[test]
    fn a_cancelled_job_never_ends() {
        let mut queue = TokeniseQueue::default();
        queue.push(key(1), job(3));
        queue.push(key(2), job(3));
        queue.cancel(key(1));
        assert_eq!(queue.advance(100).unwrap().0, key(2));
        assert!(queue.is_empty());
    }
}
