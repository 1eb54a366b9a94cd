//! One request of one connection, from its REQUEST frame to its last frame.

use super::ConnId;
use super::credit::StreamCredit;
use crate::base::{Instant, SlabKey};
use crate::message::{SeqKey, StreamKey, Submission};
use crate::model::Utf8Assembler;
use crate::protocol::Prelude;
use crate::request::FinishReason;

/// How far a request is.
///
/// ```text
/// WaitingToAsk ─ask─► Asked ─grant─► Body ─all of it─► Tokenising ─► WaitingToSubmit ─► Submitted
///                       │             │                   │                │              │
///                     reject        cancel              cancel           cancel         cancel
///                       ▼             └──────────────►  Ending  ◄──────────┴──────────────┘
///                     (gone)                              └─ the engine's last event ─► (gone)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Waits for room on the request link, or for an earlier ask's answer. The engine does not
    /// know of it.
    WaitingToAsk,
    /// The engine will answer.
    Asked,
    /// Granted; the body is coming in.
    Body,
    /// The body is being tokenised.
    Tokenising,
    /// Waits for room on the request link.
    WaitingToSubmit,
    /// Queued, running or parked, as the engine knows best.
    Submitted,
    /// The engine was, or will be, told to cancel a granted sequence; its last event will come.
    Ending,
}

/// A request.
#[derive(Debug)]
pub(super) struct Stream {
    /// Its connection; `None` when nobody is to be told any more (the client is gone, or has had
    /// its last frame).
    pub(super) conn: Option<ConnId>,
    /// Its number on the connection.
    pub(super) number: u32,
    pub(super) phase: Phase,
    pub(super) prelude: Prelude,
    /// Upper estimate of the prompt's tokens, as asked.
    pub(super) input_tokens: u32,
    pub(super) deadline: Option<Instant>,
    /// From grant on.
    pub(super) seq: Option<SeqKey>,
    /// What came of the body so far; its capacity is all of it.
    pub(super) body: Vec<u8>,
    /// Bytes of body not announced yet by a frame: a frame that announces more breaks the rules.
    pub(super) body_unannounced: u64,
    /// Bytes it holds of the core's ingest budget.
    pub(super) ingest_bytes: u64,
    /// When the body must be complete.
    pub(super) body_deadline: Option<Instant>,
    /// Ready to go, in [`Phase::WaitingToSubmit`].
    pub(super) submission: Option<Box<Submission>>,
    /// The output limit as submitted.
    pub(super) max_tokens: u32,
    /// The client has had ACCEPTED, and its request credit back.
    pub(super) is_answered: bool,
    /// Set once it is to end early: what to report.
    pub(super) cancel: Option<FinishReason>,
    pub(super) credit: StreamCredit,
    /// Credit taken from `credit` for the engine and not on the ring yet.
    pub(super) credit_to_send: u32,
    /// The cancel is not on the ring yet.
    pub(super) has_cancel_to_send: bool,
    /// It stands in the list of streams with something for the control ring.
    pub(super) is_in_control_list: bool,
    pub(super) utf8: Utf8Assembler,
}

impl Stream {
    pub(super) fn new(
        conn: ConnId,
        number: u32,
        prelude: Prelude,
        window_tokens_max: u32,
        now: Instant,
    ) -> Stream {
        let deadline_ms = u64::from(prelude.deadline_ms);
        Stream {
            conn: Some(conn),
            number,
            phase: Phase::WaitingToAsk,
            prelude,
            input_tokens: 0,
            deadline: (deadline_ms > 0).then(|| now.plus_ms(deadline_ms)),
            seq: None,
            body: Vec::new(),
            body_unannounced: prelude.body_bytes(),
            ingest_bytes: 0,
            body_deadline: None,
            submission: None,
            max_tokens: 0,
            is_answered: false,
            cancel: None,
            credit: StreamCredit::new(window_tokens_max, prelude.window_tokens),
            credit_to_send: 0,
            has_cancel_to_send: false,
            is_in_control_list: false,
            utf8: Utf8Assembler::default(),
        }
    }

    /// Whether its body may not be taken yet: its ask has no answer.
    pub(super) fn holds_body(&self) -> bool {
        matches!(self.phase, Phase::WaitingToAsk | Phase::Asked)
    }
}

pub(super) fn stream_key(front: u8, key: SlabKey) -> StreamKey {
    StreamKey { front, slot: key.slot, generation: key.generation }
}

pub(super) fn slab_key(front: u8, key: StreamKey) -> SlabKey {
    assert_eq!(key.front, front, "an event for another front core");
    SlabKey { slot: key.slot, generation: key.generation }
}
