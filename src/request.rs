//! The vocabulary of a request: what a client may ask for, and how a request may end.
//!
//! Shared by the wire protocol, the client library and every core; depends on nothing but `base`,
//! so that the client library builds alone.

use std::fmt;

use crate::base::numbered;

/// A token of the model's vocabulary.
pub type TokenId = u32;

numbered! {
    /// Priority class, most urgent first.
    #[derive(Default)]
    pub enum Class: u8 {
        /// The operator's own traffic: probes, warm-up.
        System = 0 => "system",
        /// Somebody is watching the text appear.
        Interactive = 1 => "interactive",
        /// Everything that does not say otherwise.
        #[default]
        Default = 2 => "default",
        /// Work that waits gladly.
        Bulk = 3 => "bulk",
    }
}

/// A tenant's or user's name, held inline so that messages carry it without an allocation:
/// at most [`Name::BYTES_MAX`] bytes of UTF-8 without control characters. Empty means "not said".
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    len: u8,
    bytes: [u8; Name::BYTES_MAX],
}

impl Name {
    /// 63 bytes and a length make 64: one cache line. A UUID is 36, an e-mail address mostly < 40.
    pub const BYTES_MAX: usize = 63;
    /// No name.
    pub const EMPTY: Name = Name { len: 0, bytes: [0; Name::BYTES_MAX] };

    /// `None` when the text is longer than [`Name::BYTES_MAX`] bytes or holds a control character.
    pub fn new(text: &str) -> Option<Name> {
        if text.len() > Name::BYTES_MAX || text.chars().any(char::is_control) {
            return None;
        }
        let mut bytes = [0; Name::BYTES_MAX];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Some(Name { len: text.len() as u8, bytes })
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).expect("checked when made")
    }
}

impl Default for Name {
    fn default() -> Name {
        Name::EMPTY
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// How the next token is chosen from the logits. The defaults leave the distribution as it is.
///
/// Order of application: penalties and bias on raw logits, then temperature, then top-k, then
/// top-p, then min-p over what is left, then one draw keyed by (`seed`, position).
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy: the highest logit, the lowest id among equals. Range 0 to 100.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose mass reaches this. Range (0, 1].
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely one. Range [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output.
    /// 1 is off; range (0, 10].
    pub repetition_penalty: f32,
    /// Subtracted once per earlier occurrence in the output. Range [-2, 2].
    pub frequency_penalty: f32,
    /// Subtracted once if the token occurs in the output. Range [-2, 2].
    pub presence_penalty: f32,
    /// Key of the draws: the same request with the same seed gives the same text.
    pub seed: u64,
    /// `None`: no log-probabilities. `Some(n)`: that of the chosen token and of the n most likely
    /// (n up to [`SamplingParams::TOP_LOGPROBS_MAX`]), from the distribution before temperature,
    /// penalties and filters.
    pub logprobs: Option<u8>,
    /// Added to the logits of single tokens; at most [`SamplingParams::LOGIT_BIAS_MAX`] entries.
    pub logit_bias: Vec<(TokenId, f32)>,
}

impl SamplingParams {
    /// As many alternatives as OpenAI's interface allows.
    pub const TOP_LOGPROBS_MAX: u8 = 20;
    /// As many biased tokens as OpenAI's interface allows.
    pub const LOGIT_BIAS_MAX: usize = 300;

    /// Names the first value that is out of range, and the range.
    pub fn check(&self) -> Result<(), &'static str> {
        let within = |x: f32, low: f32, high: f32| x >= low && x <= high; // false for NaN
        if !within(self.temperature, 0.0, 100.0) {
            return Err("temperature must be from 0 to 100");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err("top_p must be above 0 and at most 1");
        }
        if !within(self.min_p, 0.0, 1.0) {
            return Err("min_p must be from 0 to 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= 10.0) {
            return Err("repetition_penalty must be above 0 and at most 10");
        }
        if !within(self.frequency_penalty, -2.0, 2.0) {
            return Err("frequency_penalty must be from -2 to 2");
        }
        if !within(self.presence_penalty, -2.0, 2.0) {
            return Err("presence_penalty must be from -2 to 2");
        }
        if self.logprobs.is_some_and(|n| n > SamplingParams::TOP_LOGPROBS_MAX) {
            return Err("logprobs must be at most 20");
        }
        if self.logit_bias.len() > SamplingParams::LOGIT_BIAS_MAX {
            return Err("logit_bias must have at most 300 entries");
        }
        if self.logit_bias.iter().any(|&(_, bias)| !within(bias, -100.0, 100.0)) {
            return Err("every logit_bias must be from -100 to 100");
        }
        Ok(())
    }

    /// Whether the choice depends on which tokens came before.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
    }
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
            logprobs: None,
            logit_bias: Vec::new(),
        }
    }
}

/// At most this many stop strings in a request.
pub const STOP_STRINGS_MAX: usize = 16;
/// A stop string's length limit: text that might be the start of one is held back, so this bounds
/// what a stream withholds.
pub const STOP_STRING_BYTES_MAX: usize = 256;

numbered! {
    /// Why a request that was accepted ended.
    pub enum FinishReason: u8 {
        /// The model ended its answer.
        EndOfText = 0 => "end_of_text",
        /// One of the request's stop strings appeared; the text ends before it.
        StopString = 1 => "stop_string",
        /// `max_tokens` were produced.
        MaxTokens = 2 => "max_tokens",
        /// The model's context is full.
        ContextFull = 3 => "context_full",
        /// The client cancelled, or its connection ended.
        Cancelled = 4 => "cancelled",
        /// The request's own deadline passed.
        Deadline = 5 => "deadline",
        /// The client gave no credit for `stall_timeout_ms`.
        Stalled = 6 => "stalled",
        /// The server ended while the request ran (end of the drain time).
        ShuttingDown = 7 => "shutting_down",
        /// The device failed and the sequence could not be continued.
        DeviceFailed = 8 => "device_failed",
        /// An operator cancelled it.
        Operator = 9 => "operator",
    }
}

impl FinishReason {
    /// Whether the answer is whole: the model, the request or the context ended it.
    pub const fn is_natural(self) -> bool {
        use FinishReason::{ContextFull, EndOfText, MaxTokens, StopString};
        matches!(self, EndOfText | StopString | MaxTokens | ContextFull)
    }
}

numbered! {
    /// Why a request was refused, or evicted before it was admitted.
    pub enum RejectReason: u8 {
        /// The queue is at its bound in requests, tokens or bytes.
        QueueFull = 0 => "queue_full",
        /// Prompt and at least one token of output can never fit the context or the KV pool.
        ExceedsCapacity = 1 => "exceeds_capacity",
        /// The request is malformed or out of range; the message says how.
        Invalid = 2 => "invalid",
        /// The connection, tenant or user has as many streams as it may.
        TooManyStreams = 3 => "too_many_streams",
        /// The server is draining.
        ShuttingDown = 4 => "shutting_down",
        /// No device is ready: still loading, or lost.
        NoCapacity = 5 => "no_capacity",
        /// The deadline would pass before the first token.
        DeadlineUnattainable = 6 => "deadline_unattainable",
        /// It waited longer than the queue's time to live.
        QueueTtlExpired = 7 => "queue_ttl_expired",
        /// Its deadline passed while it waited.
        DeadlineExpired = 8 => "deadline_expired",
        /// Its first token would come later than its class may wait.
        TtftUnattainable = 9 => "ttft_unattainable",
        /// Its tenant, or user, takes more in a time than it may.
        TenantRate = 10 => "tenant_rate",
    }
}

/// What a finished request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, template included.
    pub prompt_tokens: u32,
    /// Tokens of the prompt that were not computed because a cache held them.
    pub cached_tokens: u32,
    /// Tokens produced, the end-of-text token not counted.
    pub output_tokens: u32,
}

/// Where a finished request's time went, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// From arrival at the engine to the plan of its first prefill.
    pub queue_ns: u64,
    /// From arrival at the engine to its first token.
    pub ttft_ns: u64,
    /// From arrival at the engine to its end.
    pub total_ns: u64,
    /// Out of the batch because the client gave no credit.
    pub parked_ns: u64,
}
