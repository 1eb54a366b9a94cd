//! What a front core's flight recorder keeps.

use super::ConnId;
use super::core::FrontCore;
use super::stream::stream_key;
use crate::base::recorder::{self, VALUES, recorded_events};
use crate::base::{Instant, SlabKey};
use crate::message::SeqKey;
use crate::request::{FinishReason, RejectReason};

recorded_events!(
    /// What happens on a front core.
    Flight {
        Open = "open", ["conn" Key, "connections" Number];
        Fail = "fail", ["conn" Key, "error" Number];
        Close = "close", ["conn" Key, "streams" Number];
        Request = "request", ["conn" Key, "number" Number, "stream" Stream];
        RefuseHere = "refuse here", ["conn" Key, "number" Number, "reason" Word(rejection)];
        AtGate = "refuse at gate", ["conn" Key, "number" Number, "reason" Word(rejection)];
        Ask = "ask", ["stream" Stream];
        Granted = "granted", ["stream" Stream, "seq" Key];
        RefuseGranted = "refuse granted", ["stream" Stream, "reason" Word(rejection)];
        Submit = "submit", ["stream" Stream, "seq" Key, "prompt_tokens" Number];
        Rejected = "rejected", ["stream" Stream, "reason" Word(rejection), "retry_ms" Number];
        Done = "done", ["stream" Stream, "seq" Key, "finish" Word(finish)];
        LinkFull = "link full", ["to_submit" Number, "to_ask" Number];
        Drain = "drain", ["for" Ns];
        EngineGone = "engine gone", [];
    }
);

fn rejection(number: u64) -> &'static str {
    RejectReason::from_wire(number as u8).map_or("?", RejectReason::name)
}

fn finish(number: u64) -> &'static str {
    FinishReason::from_wire(number as u8).map_or("?", FinishReason::name)
}

impl ConnId {
    pub(super) fn recorded(self) -> u64 {
        recorder::key(self.slot, self.generation)
    }
}

impl FrontCore {
    pub(super) fn note(&mut self, now: Instant, what: Flight, values: [u64; VALUES]) {
        self.pen.record(now, what as u16, values);
    }

    /// A stream as it is recorded, and the sequence it has at the engine (0.0 without one).
    pub(super) fn recorded(&self, key: SlabKey) -> (u64, u64) {
        let seq = self.pipeline.streams.get(key).and_then(|stream| stream.seq);
        let stream = stream_key(self.settings.front, key).recorded();
        (stream, seq.map_or(0, SeqKey::recorded))
    }
}
