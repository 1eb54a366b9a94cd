//! What a front core is told at its start, and what it counts.

use std::sync::Arc;

use crate::limits::Limits;

/// More numbers for STATS_REPLY, from elsewhere in the program: appends name and value. Must be
/// quick and touch nothing but memory.
pub type StatsSource = Arc<dyn Fn(&mut Vec<(&'static str, u64)>) + Send + Sync>;

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
    pub stats: Option<StatsSource>,
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

impl FrontCounters {
    /// The counters by name.
    pub fn named(&self) -> [(&'static str, u64); 11] {
        [
            ("front_connections_accepted", self.connections_accepted),
            ("front_connections_failed", self.connections_failed),
            ("front_requests", self.requests),
            ("front_requests_refused", self.requests_refused),
            ("front_requests_rejected", self.requests_rejected),
            ("front_requests_abandoned", self.requests_abandoned),
            ("front_requests_done", self.requests_done),
            ("front_prompt_tokens", self.prompt_tokens),
            ("front_output_tokens", self.output_tokens),
            ("front_received_bytes", self.received_bytes),
            ("front_sent_bytes", self.sent_bytes),
        ]
    }
}
