//! Every message that crosses a ring, in the order data takes: front → engine → device and back.
//!
//! Boxes travel in circles: an [`EventBatch`] or a [`Step`] is allocated at start, filled by one
//! side, emptied by the other and sent back. Holding the box *is* holding the credit to send.

use std::sync::Arc;

use crate::base::{Instant, recorder};
use crate::request::{
    Class, FinishReason, Name, RejectReason, SamplingParams, Timings, TokenId, Usage,
};

/// A request as its front core knows it: a slot in that core's stream table. The generation
/// guards against a late message for a slot that was used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamKey {
    /// Which front core.
    pub front: u8,
    /// Index into that core's stream table.
    pub slot: u32,
    /// Counts reuses of the slot.
    pub generation: u32,
}

impl StreamKey {
    /// As a flight recorder keeps it.
    pub const fn recorded(self) -> u64 {
        recorder::stream(self.front, self.slot, self.generation)
    }
}

/// A request as the engine knows it: a slot in the sequence table, with its generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqKey {
    /// Index into the sequence table.
    pub slot: u32,
    /// Counts reuses of the slot.
    pub generation: u32,
}

impl SeqKey {
    /// As a flight recorder keeps it.
    pub const fn recorded(self) -> u64 {
        recorder::key(self.slot, self.generation)
    }
}

/// A KV block: [`BLOCK_POSITIONS`] consecutive positions of one sequence, all layers.
pub type BlockId = u32;

/// Positions in a KV block. 64 positions of one (layer, kv head) are 8 to 16 KB in a row: enough
/// to hide memory latency, and the unit over which attention's recurrence runs (I7).
pub const BLOCK_POSITIONS: usize = 64;

// ---------------------------------------------------------------------------- front → engine

/// Front → engine, on the request ring.
#[derive(Debug)]
pub enum RequestMessage {
    /// May this come in? Answered by [`Event::Grant`] or [`Event::Reject`], always and promptly.
    Ask(Ask),
    /// The tokenised request of a grant.
    Submit(Box<Submission>),
}

/// The little that admission needs to know before anything is tokenised.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Whom to answer.
    pub stream: StreamKey,
    /// Priority class.
    pub class: Class,
    /// Who pays.
    pub tenant: Name,
    /// On whose behalf, within the tenant.
    pub user: Name,
    /// Length of the request's body.
    pub input_bytes: u32,
    /// Upper estimate of the prompt in tokens: min(bytes + template, context).
    pub input_tokens: u32,
    /// What the client asked for; 0 when it did not say.
    pub max_tokens: u32,
    /// When the client stops caring.
    pub deadline: Option<Instant>,
    /// First credit: tokens that may be sent before the client gives more.
    pub window_tokens: u32,
}

/// A tokenised request.
#[derive(Debug)]
pub struct Submission {
    /// Whose it is.
    pub stream: StreamKey,
    /// The sequence that the grant named.
    pub seq: SeqKey,
    /// The prompt, not empty. Its capacity is prompt + `max_tokens`: the engine appends the
    /// output to it and never reallocates.
    pub tokens: Vec<TokenId>,
    /// Output limit, at least 1 and already clamped so that prompt + output fit the context.
    pub max_tokens: u32,
    /// How to choose tokens. Shared with the device's slot.
    pub sampling: Arc<SamplingParams>,
    /// Stop strings, none empty; see [`crate::request::STOP_STRINGS_MAX`].
    pub stop: Vec<Box<[u8]>>,
    /// Go on past the end-of-text token (for load tests).
    pub ignore_eos: bool,
}

/// Front → engine, on the control ring, which never waits behind requests.
#[derive(Debug)]
pub enum ControlMessage {
    /// The client can take this many more tokens.
    Credit {
        /// Whose stream.
        seq: SeqKey,
        /// How many more.
        tokens: u32,
    },
    /// Stop, whatever state it is in. A [`Event::Done`] or [`Event::Reject`] still comes.
    Cancel {
        /// Which.
        seq: SeqKey,
        /// What to report.
        reason: FinishReason,
    },
    /// An emptied batch on its way back: the engine's credit to send the next one.
    Return(Box<EventBatch>),
}

// ---------------------------------------------------------------------------- engine → front

/// Batches that circulate between the engine and one front core: one being filled, one being
/// emptied, and two on the way, so that a late front core does not hold up the next step's events.
pub const EVENT_BATCHES: usize = 4;

/// Everything the engine tells one front core in one go: at most one a step, plus answers.
#[derive(Debug, Default)]
pub struct EventBatch {
    /// What happened, in order.
    pub events: Vec<Event>,
    /// Token ids of all [`Event::Tokens`], back to back in event order.
    pub tokens: Vec<TokenId>,
    /// Text of all [`Event::Tokens`], back to back in event order. Bytes: a token may hold half
    /// a character, and the front core assembles.
    pub text: Vec<u8>,
    /// Log-probability of each token in `tokens` of streams that asked, back to back.
    pub logprobs: Vec<Logprob>,
    /// Alternatives of each entry in `logprobs`, back to back.
    pub top: Vec<(TokenId, f32)>,
}

impl EventBatch {
    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.events.clear();
        self.tokens.clear();
        self.text.clear();
        self.logprobs.clear();
        self.top.clear();
    }
}

/// A chosen token's log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logprob {
    /// Natural logarithm of its probability before temperature, penalties and filters.
    pub logprob: f32,
    /// How many entries of [`EventBatch::top`] belong to it.
    pub top_count: u8,
}

/// One thing that the engine tells about one stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// The ask is granted: tokenise, then submit under this key.
    Grant {
        /// Whose ask.
        stream: StreamKey,
        /// The sequence that now exists.
        seq: SeqKey,
    },
    /// Refused at the door, or evicted before admission. Terminal.
    Reject {
        /// Whose request.
        stream: StreamKey,
        /// Why.
        reason: RejectReason,
        /// When coming back has a chance; `None` when waiting cannot help.
        retry_after_ms: Option<u32>,
    },
    /// The submission is in the queue.
    Accepted {
        /// Whose request.
        stream: StreamKey,
        /// Requests ahead of it.
        position: u32,
        /// Tokens of its prompt.
        prompt_tokens: u32,
    },
    /// New output.
    Tokens {
        /// Whose.
        stream: StreamKey,
        /// How many entries of [`EventBatch::tokens`].
        token_count: u32,
        /// How many bytes of [`EventBatch::text`]; may lag the tokens while a stop string might
        /// be beginning.
        text_bytes: u32,
        /// How many entries of [`EventBatch::logprobs`]: `token_count` or 0.
        logprob_count: u32,
    },
    /// The stream has no credit left: its sequence left the batch.
    Paused {
        /// Whose.
        stream: StreamKey,
    },
    /// It is back in the batch, or waiting to be.
    Resumed {
        /// Whose.
        stream: StreamKey,
    },
    /// The end of an accepted request. Terminal.
    Done {
        /// Whose.
        stream: StreamKey,
        /// Why.
        finish: FinishReason,
        /// What it used.
        usage: Usage,
        /// Where the time went.
        timings: Timings,
    },
}

// ---------------------------------------------------------------------------- engine → device

/// A step on its way to the device and back: one forward pass over every row of the plan.
#[derive(Debug, Default)]
pub struct Step {
    /// What to compute.
    pub plan: StepPlan,
    /// What came of it.
    pub result: StepResult,
}

/// What one step computes. All vectors keep their capacity from step to step.
#[derive(Debug, Default)]
pub struct StepPlan {
    /// Counts steps; strictly increasing.
    pub number: u64,
    /// Batch slots that change hands before the rows run.
    pub setups: Vec<SlotSetup>,
    /// One row a sequence: a decode row has one token, a prefill row a chunk.
    pub rows: Vec<PlanRow>,
    /// Input tokens of all rows, back to back.
    pub tokens: Vec<TokenId>,
    /// Block tables of all rows, back to back: each covers positions 0 up to the end of the row.
    pub blocks: Vec<BlockId>,
    /// Earlier tokens of all setups, back to back.
    pub history: Vec<TokenId>,
}

impl StepPlan {
    /// Empties the plan and keeps its memory.
    pub fn clear(&mut self) {
        self.setups.clear();
        self.rows.clear();
        self.tokens.clear();
        self.blocks.clear();
        self.history.clear();
    }
}

/// A batch slot gets a sequence: sampling state starts over.
#[derive(Clone, Debug)]
pub struct SlotSetup {
    /// Which slot, below `running_max`.
    pub slot: u16,
    /// The new owner.
    pub seq: SeqKey,
    /// How it samples.
    pub sampling: Arc<SamplingParams>,
    /// First of its entries in [`StepPlan::history`].
    pub history_start: u32,
    /// How many: the prompt and all output so far when penalties need them, else 0. (The rows'
    /// own tokens are never counted again; only sampled tokens are, by the device itself.)
    pub history_count: u32,
    /// How many of them are prompt.
    pub history_prompt_count: u32,
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanRow {
    /// Whose.
    pub seq: SeqKey,
    /// Its batch slot.
    pub slot: u16,
    /// Whether to sample a token from the last position's logits.
    pub sample: bool,
    /// First of its entries in [`StepPlan::tokens`].
    pub token_start: u32,
    /// How many tokens: 1 for decode, up to the chunk limit for prefill.
    pub token_count: u32,
    /// Absolute position of the first token: how many positions are in the KV blocks already.
    pub position: u32,
    /// First of its entries in [`StepPlan::blocks`].
    pub block_start: u32,
    /// ⌈(position + token_count) / [`BLOCK_POSITIONS`]⌉.
    pub block_count: u32,
}

// ---------------------------------------------------------------------------- device → engine

/// What a step produced.
#[derive(Debug, Default)]
pub struct StepResult {
    /// One entry per row with `sample`, in row order.
    pub sampled: Vec<Sampled>,
    /// Alternatives of all entries, back to back, most likely first.
    pub top: Vec<(TokenId, f32)>,
    /// How long the device worked on it.
    pub elapsed_ns: u64,
    /// Set when the step failed: nothing else in the result counts.
    pub failure: Option<StepFailure>,
}

impl StepResult {
    /// Empties the result and keeps its memory.
    pub fn clear(&mut self) {
        self.sampled.clear();
        self.top.clear();
        self.elapsed_ns = 0;
        self.failure = None;
    }
}

/// A sampled token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// Whose.
    pub seq: SeqKey,
    /// The token.
    pub token: TokenId,
    /// Its log-probability, when the sequence asked for it, else 0.
    pub logprob: f32,
    /// How many entries of [`StepResult::top`] belong to it.
    pub top_count: u8,
}

/// Why a step failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepFailure {
    /// The plan broke the contract of [`StepPlan`]; nothing was computed.
    InvalidPlan,
    /// The device is gone; its KV with it.
    DeviceLost,
}
