//! A sequence: a request as the engine knows it, and the table of all of them.
//!
//! ```text
//!            Ask                Submit                first prefill planned
//!   (free) ───────► Granted ───────────► Queued ───────────────► Running ◄──────┐ slot free,
//!      ▲               │                   │                     │  │  │        │ blocks there
//!      │               │ cancelled,        │ evicted,            │  │  └──► Waiting ◄─┐
//!      │               │ expired           │ cancelled           │  │ preempted       │ credit
//!      │               ▼                   ▼                     │  └────► Parked ────┘
//!      └──────────── Ended ◄───────────────┴──── finished,  ◄────┘ no credit   │
//!        terminal event     ◄─────────────────── cancelled  ◄──────────────────┘
//!        on its way
//! ```
//!
//! Running, Waiting and Parked are the *admitted* states. Only Running has a batch slot; all three
//! may hold KV blocks. Ended holds neither blocks nor permits, only output not yet sent, and the
//! terminal event (I5): the slot is free when that event was pushed.

use std::ops::{Index, IndexMut};
use std::sync::Arc;

use crate::base::Instant;
use crate::message::{BLOCK_POSITIONS, BlockId, Logprob, SeqKey, StreamKey};
use crate::request::{Class, FinishReason, RejectReason, SamplingParams, Timings, TokenId, Usage};

use super::foresight::Foreseen;
use super::ledger::Permit;
use super::stop::StopMatcher;
use super::tenants::Bill;

/// No sequence: the end of a linked list, an empty batch slot.
pub(super) const NONE: u32 = u32::MAX;

/// Tokens with log-probabilities that a sequence may hold unsent: such a sequence sits out a step
/// rather than exceed it. Its events leave with the same tick, so one would nearly do.
pub(super) const LOGPROBS_UNSENT_MAX: usize = 4;

/// Alternatives held with them.
const TOP_UNSENT_MAX: usize = LOGPROBS_UNSENT_MAX * SamplingParams::TOP_LOGPROBS_MAX as usize;

/// KV blocks for so many positions.
pub(super) const fn blocks_for(positions: usize) -> usize {
    positions.div_ceil(BLOCK_POSITIONS)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The table's slot is unused.
    Free,
    /// May submit.
    Granted,
    /// Accepted; waits for admission.
    Queued,
    /// Admitted, in this slot of the batch.
    Running { slot: u16 },
    /// Admitted; could run, and waits for a slot or for blocks.
    Waiting,
    /// Admitted; out of the batch for want of stream credit.
    Parked,
    /// Over. What is left to do is to say so.
    Ended,
}

impl State {
    /// The word for it in reports.
    pub const fn name(self) -> &'static str {
        match self {
            State::Free => "free",
            State::Granted => "granted",
            State::Queued => "queued",
            State::Running { .. } => "running",
            State::Waiting => "waiting",
            State::Parked => "parked",
            State::Ended => "ended",
        }
    }
}

/// How a sequence ends, as its stream will be told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Terminal {
    Done { finish: FinishReason, usage: Usage, timings: Timings },
    Reject { reason: RejectReason, retry_after_ms: Option<u32> },
}

/// When things happened.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    pub arrived: Instant,
    pub admitted: Option<Instant>,
    pub first_token: Option<Instant>,
    /// When its newest token came, moved on by the time that its client kept it parked since.
    pub last_token: Instant,
    /// Since when it is parked, or waits: meaningful in these two states.
    pub left_batch: Instant,
    pub parked_ns: u64,
    /// While parked: since when the stream has had all of its output and knows that it is paused.
    /// Only from then on is it the client that keeps everybody waiting.
    pub stalled_since: Option<Instant>,
    /// The client's own deadline, [`Instant::NEVER`] without one.
    pub deadline: Instant,
    /// Until then it must be admitted.
    pub queue_until: Instant,
}

/// What its stream has been told, and what it is still to be told.
#[derive(Debug, Default)]
pub(super) struct Egress {
    /// In the front core's list of sequences with something to tell.
    pub listed: bool,
    pub grant_due: bool,
    /// Queue position to report.
    pub accepted_due: Option<u32>,
    /// Whether the stream counts itself paused.
    pub paused_told: bool,
    /// Output tokens whose ids were sent.
    pub tokens_sent: u32,
    /// Bytes of output text so far; after a stop string, up to that.
    pub text_total: u64,
    /// How much of it may be sent: the rest might be the start of a stop string.
    pub text_ready: u64,
    pub text_sent: u64,
    /// Where `text_sent` lies: in which output token, and after how many of its bytes.
    pub cursor_token: u32,
    pub cursor_bytes: u32,
    /// Log-probabilities of the unsent tokens, and their alternatives; capacity is never exceeded.
    pub logprobs: Vec<Logprob>,
    pub top: Vec<(TokenId, f32)>,
    pub terminal: Option<Terminal>,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub generation: u32,
    pub state: State,
    pub stream: StreamKey,
    /// The front core that asked for it.
    pub front: u8,
    pub class: Class,
    /// Counts asks: the order within a class.
    pub arrival: u64,
    /// Counts admissions, from 1; 0 before. The order of precedence among the admitted.
    pub admission: u64,
    pub times: Times,
    pub permit: Permit,
    /// Whose place it would be in the calendar.
    pub client: u64,
    /// What was foreseen when it came.
    pub foreseen: Foreseen,
    /// Who pays, and what was charged so far.
    pub bill: Bill,
    /// What the client asked for; 0 when it did not say.
    pub asked_max_tokens: u32,

    /// Prompt, then output. Never grows beyond its capacity.
    pub tokens: Vec<TokenId>,
    pub prompt_tokens: u32,
    /// Output limit, with the context taken into account.
    pub output_max: u32,
    pub sampling: Option<Arc<SamplingParams>>,
    pub stop: Vec<Box<[u8]>>,
    pub ignore_eos: bool,
    pub matcher: StopMatcher,

    /// Its block table.
    pub blocks: Vec<BlockId>,
    /// Positions whose KV is in the blocks, or will be when the steps in flight are done.
    pub kv_planned: u32,
    /// The newest step with a row of it.
    pub last_step: u64,
    /// The batch slot does not know it yet.
    pub setup_due: bool,
    /// Rows at the device that sample a token: 0 or 1.
    pub samples_in_flight: u8,
    /// Times it lost its KV while running. From [`PREEMPTIONS_MAX`](super::reclaim) on it
    /// enters the batch with its whole remainder reserved, and stays.
    pub preemptions: u8,
    /// Tokens that may still be sampled: the stream's credit.
    pub credit: u32,

    pub egress: Egress,
    /// Neighbours in the queue's list of its class.
    pub previous: u32,
    pub next: u32,
}

/// Bytes of a sequence's place in the table, with the buffers that always come with it.
pub(super) const BYTES: usize = size_of::<Sequence>()
    + LOGPROBS_UNSENT_MAX * size_of::<Logprob>()
    + TOP_UNSENT_MAX * size_of::<(TokenId, f32)>();

impl Sequence {
    /// An unused slot, with no memory behind its tables yet.
    fn blank() -> Sequence {
        let stream = StreamKey { front: 0, slot: 0, generation: 0 };
        Sequence {
            generation: 0,
            state: State::Free,
            stream,
            front: 0,
            class: Class::Default,
            arrival: 0,
            admission: 0,
            times: Times::default(),
            permit: Permit::default(),
            client: 0,
            foreseen: Foreseen::default(),
            bill: Bill::NONE,
            asked_max_tokens: 0,
            tokens: Vec::new(),
            prompt_tokens: 0,
            output_max: 0,
            sampling: None,
            stop: Vec::new(),
            ignore_eos: false,
            matcher: StopMatcher::default(),
            blocks: Vec::new(),
            kv_planned: 0,
            last_step: 0,
            setup_due: false,
            samples_in_flight: 0,
            preemptions: 0,
            credit: 0,
            egress: Egress::default(),
            previous: NONE,
            next: NONE,
        }
    }

    /// Forgets everything but the generation, and keeps the tables' memory.
    fn clear(&mut self) {
        assert!(self.blocks.is_empty(), "a sequence's slot is freed before its blocks");
        let mut blank = Sequence::blank();
        std::mem::swap(&mut blank.blocks, &mut self.blocks);
        std::mem::swap(&mut blank.egress.logprobs, &mut self.egress.logprobs);
        std::mem::swap(&mut blank.egress.top, &mut self.egress.top);
        blank.egress.logprobs.clear();
        blank.egress.top.clear();
        blank.generation = self.generation;
        *self = blank;
    }

    /// Admitted and not over.
    pub fn is_admitted(&self) -> bool {
        matches!(self.state, State::Running { .. } | State::Waiting | State::Parked)
    }

    /// Not over yet.
    pub fn is_live(&self) -> bool {
        !matches!(self.state, State::Free | State::Ended)
    }

    /// Tokens produced.
    pub fn output_tokens(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt_tokens
    }

    /// Output tokens whose ids were not sent yet.
    pub fn tokens_unsent(&self) -> u32 {
        self.output_tokens() - self.egress.tokens_sent
    }

    /// Tokens whose KV is not planned yet; the next token can be sampled when it is 0.
    pub fn tokens_unplanned(&self) -> usize {
        self.tokens.len() - self.kv_planned as usize
    }

    /// Blocks that it needs to have its whole text computed.
    pub fn blocks_for_text(&self) -> usize {
        blocks_for(self.tokens.len())
    }

    /// Blocks that it may need until its end. The last token is never computed, only sampled.
    pub fn blocks_for_remainder(&self) -> usize {
        blocks_for((self.prompt_tokens + self.output_max) as usize - 1).max(self.blocks_for_text())
    }

    /// Whether the client asked for log-probabilities.
    pub fn wants_logprobs(&self) -> bool {
        self.sampling.as_ref().is_some_and(|sampling| sampling.logprobs.is_some())
    }

    /// Whether its next sampled token would find room in the log-probabilities' buffer.
    pub fn has_logprob_room(&self) -> bool {
        !self.wants_logprobs()
            || self.egress.logprobs.len() + usize::from(self.samples_in_flight)
                < LOGPROBS_UNSENT_MAX
    }

    /// When it must be looked at again if nothing happens: the earliest of what limits it.
    pub fn expires(&self, stall_timeout_ms: u64) -> Instant {
        match self.state {
            State::Free | State::Ended => Instant::NEVER,
            State::Granted | State::Queued => self.times.deadline.min(self.times.queue_until),
            State::Running { .. } | State::Waiting => self.times.deadline,
            State::Parked => {
                let stall_ends = |since: Instant| since.plus_ms(stall_timeout_ms);
                self.times.stalled_since.map_or(Instant::NEVER, stall_ends).min(self.times.deadline)
            }
        }
    }

    /// What its client is told at the end about its use and its time.
    pub fn account(&self, now: Instant) -> (Usage, Timings) {
        let times = &self.times;
        let parked_now = match self.state {
            State::Parked => now.ns_since(times.left_batch),
            _ => 0,
        };
        let usage = Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: 0,
            output_tokens: self.output_tokens(),
        };
        let timings = Timings {
            queue_ns: times.admitted.unwrap_or(now).ns_since(times.arrived),
            ttft_ns: times.first_token.map_or(0, |first| first.ns_since(times.arrived)),
            total_ns: now.ns_since(times.arrived),
            parked_ns: times.parked_ns + parked_now,
        };
        (usage, timings)
    }
}

/// All sequences that the engine knows. Never allocates after construction.
#[derive(Debug)]
pub(super) struct SequenceTable {
    sequences: Vec<Sequence>,
    free: Vec<u32>,
}

impl SequenceTable {
    /// Room for `capacity` sequences with up to `blocks_max` KV blocks each.
    pub fn new(capacity: u32, blocks_max: usize) -> SequenceTable {
        let make = |_| {
            let mut sequence = Sequence::blank();
            sequence.blocks.reserve_exact(blocks_max);
            sequence.egress.logprobs.reserve_exact(LOGPROBS_UNSENT_MAX);
            sequence.egress.top.reserve_exact(TOP_UNSENT_MAX);
            sequence
        };
        SequenceTable {
            sequences: (0..capacity).map(make).collect(),
            free: (0..capacity).rev().collect(),
        }
    }

    /// How many slots are in use.
    pub fn len(&self) -> usize {
        self.sequences.len() - self.free.len()
    }

    /// How many slots are not.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    pub fn capacity(&self) -> usize {
        self.sequences.len()
    }

    /// Takes a free slot, if there is one.
    pub fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Frees a slot; keys to it are stale from now on.
    pub fn give(&mut self, index: u32) {
        let sequence = &mut self[index];
        sequence.clear();
        sequence.generation = sequence.generation.wrapping_add(1);
        self.free.push(index);
    }

    pub fn key(&self, index: u32) -> SeqKey {
        SeqKey { slot: index, generation: self[index].generation }
    }

    /// The index of a sequence that is not over; `None` for a stale key.
    pub fn live(&self, key: SeqKey) -> Option<u32> {
        let sequence = self.sequences.get(key.slot as usize)?;
        (sequence.generation == key.generation && sequence.is_live()).then_some(key.slot)
    }

    /// Every slot, used or not.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Sequence)> {
        (0..).zip(&self.sequences)
    }
}

impl Index<u32> for SequenceTable {
    type Output = Sequence;

    fn index(&self, index: u32) -> &Sequence {
        &self.sequences[index as usize]
    }
}

impl IndexMut<u32> for SequenceTable {
    fn index_mut(&mut self, index: u32) -> &mut Sequence {
        &mut self.sequences[index as usize]
    }
}
