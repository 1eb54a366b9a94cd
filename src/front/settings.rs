//! What a front core is told at its start, and what it counts.

use std::sync::Arc;

use crate::base::Board;
use crate::base::board::{Kind, Number, Tell};
use crate::limits::Limits;

/// How a front core is to be.
#[derive(Clone)]
pub struct FrontSettings {
    /// Which front core it is.
    pub front: u8,
    /// The program's bounds.
    pub limits: Limits,
    /// The model's name, for WELCOME.
    pub model: String,
    /// The server's name and version, for WELCOME.
    pub server: String,
    /// The model's vocabulary, for WELCOME.
    pub vocab_tokens: u32,
    /// A token that every client must present; `None` lets everybody in.
    pub token: Option<String>,
    /// A granted request's body must be there by then.
    pub body_timeout_ms: u64,
    /// More numbers for STATS_REPLY.
    pub stats: Option<Arc<Board>>,
}

impl FrontSettings {
    /// Settings with defaults for what is not told.
    pub fn new(limits: Limits, model: &str, vocab_tokens: u32) -> FrontSettings {
        FrontSettings {
            front: 0,
            limits,
            model: model.to_owned(),
            server: concat!("forebay/", env!("CARGO_PKG_VERSION")).to_owned(),
            vocab_tokens,
            token: None,
            // 1 MiB at 300 kbit/s; until then it holds a place in the engine's queue.
            body_timeout_ms: 30_000,
            stats: None,
        }
    }

    /// Longest body of a request: what fits one frame, and a fair part of the ingest budget.
    pub fn request_bytes_max(&self) -> u32 {
        let ingest = u32::try_from(self.limits.ingest_bytes_max).unwrap_or(u32::MAX);
        self.limits.frame_bytes_max.min(ingest)
    }

    /// Requests that a front core may know at once: those that wait to ask (as many as there are
    /// connections; beyond that they are refused), those asked, and those the engine has.
    pub fn streams_max(&self) -> usize {
        let limits = &self.limits;
        (limits.connections_max + limits.asks_max + limits.sequences_max()) as usize
    }
}

/// What a front core has seen. All but the `_open` ones only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontCounters {
    /// Connections accepted.
    pub connections_accepted: u64,
    /// Connections that broke the protocol or let a time-out pass.
    pub connections_failed: u64,
    /// REQUEST frames.
    pub requests: u64,
    /// Requests refused here, before the engine was asked or after its grant.
    pub requests_refused: u64,
    /// Requests refused or evicted by the engine, or at its gate.
    pub requests_rejected: u64,
    /// Requests whose client went away before their end.
    pub requests_abandoned: u64,
    /// Requests that ended with DONE.
    pub requests_done: u64,
    /// Prompt tokens submitted.
    pub prompt_tokens: u64,
    /// Output tokens framed.
    pub output_tokens: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes the kernel took.
    pub sent_bytes: u64,
}

/// A front core's counters, and where it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontStats {
    /// Counted since the start.
    pub counters: FrontCounters,
    /// Connections that are open.
    pub connections_open: u64,
    /// Streams that are open.
    pub streams_open: u64,
    /// Bytes of request bodies held.
    pub ingest_bytes: u64,
    /// The fuller one of two bounds, connections and request bodies, in thousandths.
    pub saturation_permille: u64,
}

impl Tell for FrontStats {
    fn tell(&self, mut put: impl FnMut(Number, u64)) {
        let counters = &self.counters;
        let mut count = |name, value, help| put(Number { name, kind: Kind::Counter, help }, value);
        count("front_connections_accepted", counters.connections_accepted, "connections accepted");
        let failed = "connections that broke the protocol or let a time-out pass";
        count("front_connections_failed", counters.connections_failed, failed);
        count("front_requests", counters.requests, "REQUEST frames");
        let refused = "requests refused before the engine was asked or after its grant";
        count("front_requests_refused", counters.requests_refused, refused);
        let rejected = "requests refused or evicted by the engine, or at its gate";
        count("front_requests_rejected", counters.requests_rejected, rejected);
        let abandoned = "requests whose client went away before their end";
        count("front_requests_abandoned", counters.requests_abandoned, abandoned);
        count("front_requests_done", counters.requests_done, "requests that ended with DONE");
        count("front_prompt_tokens", counters.prompt_tokens, "prompt tokens submitted");
        count("front_output_tokens", counters.output_tokens, "output tokens framed");
        count("front_received_bytes", counters.received_bytes, "bytes received");
        count("front_sent_bytes", counters.sent_bytes, "bytes that the kernel took");
        let mut gauge = |name, value, help| put(Number { name, kind: Kind::Gauge, help }, value);
        gauge("front_connections_open", self.connections_open, "connections that are open");
        gauge("front_streams_open", self.streams_open, "streams that are open");
        gauge("front_ingest_bytes", self.ingest_bytes, "bytes of request bodies held");
        let saturation = "the fuller one of two bounds: connections, bytes of request bodies";
        gauge("front_saturation_permille", self.saturation_permille, saturation);
    }
}
