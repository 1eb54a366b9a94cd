//! What the engine's flight recorder keeps.

use crate::base::Instant;
use crate::base::recorder::{VALUES, recorded_events};
use crate::request::{Class, FinishReason, RejectReason};

use super::EngineCore;

recorded_events!(
    /// What happens on the engine core.
    Flight {
        Ask = "ask", ["stream" Stream, "class" Word(class), "input_tokens" Number];
        Grant = "grant", ["stream" Stream, "seq" Key];
        Refuse = "refuse", ["stream" Stream, "reason" Word(rejection), "retry_ms" Number];
        Accept = "accept", ["seq" Key, "prompt_tokens" Number, "position" Number];
        Admit = "admit", ["seq" Key, "waited" Ns];
        FirstToken = "first token", ["seq" Key, "ttft" Ns];
        Park = "park", ["seq" Key, "output_tokens" Number];
        Resume = "resume", ["seq" Key, "parked" Ns];
        Preempt = "preempt", ["seq" Key, "times" Number];
        Evict = "evict", ["seq" Key, "reason" Word(rejection), "retry_ms" Number];
        Done = "done", ["seq" Key, "finish" Word(finish), "output_tokens" Number];
        StepPlanned = "step planned", ["step" Number, "rows" Number, "tokens" Number];
        StepFinished = "step finished", ["step" Number, "rows" Number, "took" Ns];
        BatchesOut = "batches out", ["front" Number, "waiting" Number];
        StepHangs = "step hangs", ["step" Number];
        GateClosed = "gate closed", ["reason" Word(rejection)];
        GateOpened = "gate opened", [];
        FrontGone = "front gone", ["front" Number];
        DeviceLost = "device lost", [];
        Drain = "drain", ["for" Ns];
    }
);

fn class(number: u64) -> &'static str {
    Class::from_wire(number as u8).map_or("?", Class::name)
}

fn finish(number: u64) -> &'static str {
    FinishReason::from_wire(number as u8).map_or("?", FinishReason::name)
}

fn rejection(number: u64) -> &'static str {
    RejectReason::from_wire(number as u8).map_or("?", RejectReason::name)
}

impl EngineCore {
    pub(super) fn note(&mut self, now: Instant, what: Flight, values: [u64; VALUES]) {
        self.pen.record(now, what as u16, values);
    }
}
