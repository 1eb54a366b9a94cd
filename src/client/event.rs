//! What a client hears.

use crate::protocol::{Accepted, Capabilities, Done, TokensFrame, Welcome};
use crate::request::{RejectReason, TokenId};

/// The server, as it introduced itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerInfo {
    /// The model's name.
    pub model: String,
    /// The server's name and version.
    pub server: String,
    /// What both sides understand.
    pub capabilities: Capabilities,
    /// Longest payload of a frame.
    pub frame_bytes_max: u32,
    /// Longest body of a request.
    pub request_bytes_max: u32,
    /// Streams that may be open at once.
    pub streams_max: u32,
    /// Largest window of a stream.
    pub window_tokens_max: u32,
    /// Requests that may be sent before any is answered.
    pub request_credit: u32,
    /// Token ids are below this.
    pub vocab_tokens: u32,
    /// Prompt and output together.
    pub context_tokens: u32,
    /// Silence without streams after which the server closes.
    pub idle_timeout_ms: u32,
}

impl From<Welcome<'_>> for ServerInfo {
    fn from(welcome: Welcome<'_>) -> ServerInfo {
        ServerInfo {
            model: welcome.model.to_owned(),
            server: welcome.server.to_owned(),
            capabilities: welcome.capabilities,
            frame_bytes_max: welcome.frame_bytes_max,
            request_bytes_max: welcome.request_bytes_max,
            streams_max: welcome.streams_max,
            window_tokens_max: welcome.window_tokens_max,
            request_credit: welcome.request_credit,
            vocab_tokens: welcome.vocab_tokens,
            context_tokens: welcome.context_tokens,
            idle_timeout_ms: welcome.idle_timeout_ms,
        }
    }
}

/// Something that happened to one request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It is in the queue.
    Accepted(Accepted),
    /// Output.
    Tokens(Tokens),
    /// No credit is left at the server: its sequence left the batch.
    Paused,
    /// It goes on.
    Resumed,
    /// Its end. No event follows.
    Done(Done),
    /// It was refused, or evicted before it was admitted. No event follows.
    Rejected(Rejection),
}

impl Event {
    /// Whether no event follows.
    pub const fn is_last(&self) -> bool {
        matches!(self, Event::Done(_) | Event::Rejected(_))
    }
}

/// Output of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// The tokens.
    pub ids: Vec<TokenId>,
    /// Whole characters of their text; may lag behind the ids.
    pub text: String,
    /// One entry for each id when they were asked for, else none.
    pub logprobs: Vec<TokenLogprob>,
}

impl From<TokensFrame<'_>> for Tokens {
    fn from(frame: TokensFrame<'_>) -> Tokens {
        let logprobs = frame.logprobs.iter();
        Tokens {
            ids: frame.ids.iter().collect(),
            text: frame.text.to_owned(),
            logprobs: logprobs
                .map(|entry| TokenLogprob { logprob: entry.logprob, top: entry.top().collect() })
                .collect(),
        }
    }
}

/// A token's log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Natural logarithm.
    pub logprob: f32,
    /// The likeliest tokens in its place, likeliest first.
    pub top: Vec<(TokenId, f32)>,
}

/// Why a request has no (further) answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Why.
    pub reason: RejectReason,
    /// When coming back has a chance; `None` when waiting cannot help.
    pub retry_after_ms: Option<u32>,
    /// For a person.
    pub message: String,
}
