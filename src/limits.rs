//! Every bound of the program, with its reason.
//!
//! Memory is bounded by configuration (I9): what each bound costs in bytes is summed in the
//! [`Envelope`] and printed at start.

//mod envelope;

//pub use envelope::{Bound, Envelope, Kind, ModelShape, Sizes};

/// All bounds that the cores work under. Built once from the configuration, then read only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections a front core holds open.
    pub connections_max: u32,
    /// Streams open at once on one connection.
    pub streams_per_connection_max: u32,
    /// Largest frame a client may send: 8,192 tokens of prose are about 40 KB; 1 MiB leaves room
    /// for long contexts and token ids.
    pub frame_bytes_max: u32,
    /// Bytes of request bodies that a front core holds between grant and submission.
    pub ingest_bytes_max: u64,
    /// Asks that a front core may have unanswered.
    pub asks_max: u32,
    /// A client that has not finished its handshake by then is closed.
    pub handshake_timeout_ms: u64,
    /// A connection without streams and without a frame for this long is closed.
    pub idle_timeout_ms: u64,
    /// Largest credit window of a stream, in tokens: what one stream may have sent and unread.
    pub stream_window_tokens_max: u32,
    /// Requests that wait in the queue.
    pub queued_requests_max: u32,
    /// Prompt tokens that wait in the queue.
    pub queued_tokens_max: u64,
    /// Body bytes that wait in the queue.
    pub queued_bytes_max: u64,
    /// Rows of the batch.
    pub running_max: u32,
    /// Admitted sequences out of the batch.
    pub parked_max: u32,
    /// Tokens (decode rows and prefill chunks together) in one step.
    pub step_tokens_max: u32,
    /// Longest prefill chunk of one sequence in one step.
    pub chunk_tokens_max: u32,
    /// Longest sequence, prompt and output together: the model's context unless set lower.
    pub context_max: u32,
    /// A request that has waited this long is evicted.
    pub queue_ttl_ms: u64,
    /// A parked sequence's client has this long to give credit.
    pub stall_timeout_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections_max: 1024,
            streams_per_connection_max: 128,
            frame_bytes_max: 1 << 20,
            ingest_bytes_max: 64 << 20,
            asks_max: 64,
            handshake_timeout_ms: 5_000,
            idle_timeout_ms: 300_000,
            stream_window_tokens_max: 256,
            queued_requests_max: 500,
            queued_tokens_max: 1 << 20,
            queued_bytes_max: 64 << 20,
            running_max: 64,
            parked_max: 512,
            step_tokens_max: 512,
            chunk_tokens_max: 512,
            context_max: 8192,
            queue_ttl_ms: 30_000,
            stall_timeout_ms: 120_000,
        }
    }
}

impl Limits {
    /// Bounds so small that every edge is met all the time: for the simulator.
    pub fn tiny() -> Limits {
        Limits {
            connections_max: 8,
            streams_per_connection_max: 4,
            frame_bytes_max: 4096,
            ingest_bytes_max: 8192,
            asks_max: 2,
            handshake_timeout_ms: 1_000,
            idle_timeout_ms: 10_000,
            stream_window_tokens_max: 8,
            queued_requests_max: 4,
            queued_tokens_max: 1024,
            queued_bytes_max: 8192,
            running_max: 3,
            parked_max: 3,
            step_tokens_max: 96,
            chunk_tokens_max: 64,
            context_max: 512,
            queue_ttl_ms: 5_000,
            stall_timeout_ms: 2_000,
        }
    }

    /// Sequences the engine may know at once: queued (granted ones count as queued), running, parked.
    pub fn sequences_max(&self) -> u32 {
        self.queued_requests_max + self.running_max + self.parked_max
    }

    /// The relations between bounds that do not hold. All must, or some request that one bound
    /// lets in could never pass the next.
    pub fn broken_relations(&self) -> Vec<BrokenRelation> {
        let at_least = |field, value: u64, than, least: u64, reason| {
            (value < least).then_some(BrokenRelation { field, relation: "at least", than, reason })
        };
        let at_most = |field, value: u64, than, most: u64, reason| {
            (value > most).then_some(BrokenRelation { field, relation: "at most", than, reason })
        };
        [
            at_least(
                "step_tokens_max",
                self.step_tokens_max.into(),
                "running_max",
                self.running_max.into(),
                "a step holds one token of every running sequence",
            ),
            at_most(
                "chunk_tokens_max",
                self.chunk_tokens_max.into(),
                "step_tokens_max",
                self.step_tokens_max.into(),
                "a chunk is part of a step",
            ),
            at_least(
                "queued_tokens_max",
                self.queued_tokens_max,
                "context_max",
                self.context_max.into(),
                "the queue must take the longest prompt when it is empty",
            ),
            at_least(
                "queued_bytes_max",
                self.queued_bytes_max,
                "frame_bytes_max",
                self.frame_bytes_max.into(),
                "the queue must take the largest request when it is empty",
            ),
            at_least(
                "ingest_bytes_max",
                self.ingest_bytes_max,
                "frame_bytes_max",
                self.frame_bytes_max.into(),
                "the largest request must be readable",
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Two bounds that contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenRelation {
    /// The field that is too small or too large.
    pub field: &'static str,
    /// "at least" or "at most".
    pub relation: &'static str,
    /// The field it is compared with.
    pub than: &'static str,
    /// Why it must be so.
    pub reason: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_limits_contradict_nothing() {
        assert_eq!(Limits::default().broken_relations(), []);
        assert_eq!(Limits::tiny().broken_relations(), []);
    }

    #[test]
    fn every_relation_is_found_broken_on_its_own() {
        let broken = |change: fn(&mut Limits)| {
            let mut limits = Limits::tiny();
            change(&mut limits);
            let names: Vec<_> =
                limits.broken_relations().iter().map(|b| (b.field, b.than)).collect();
            names
        };
        assert_eq!(
            broken(|l| l.running_max = l.step_tokens_max + 1),
            [("step_tokens_max", "running_max")]
        );
        assert_eq!(broken(|l| l.running_max = l.step_tokens_max), []);
        assert_eq!(
            broken(|l| l.chunk_tokens_max = l.step_tokens_max + 1),
            [("chunk_tokens_max", "step_tokens_max")]
        );
        assert_eq!(
            broken(|l| l.queued_tokens_max = u64::from(l.context_max) - 1),
            [("queued_tokens_max", "context_max")]
        );
        assert_eq!(
            broken(|l| l.queued_bytes_max = u64::from(l.frame_bytes_max) - 1),
            [("queued_bytes_max", "frame_bytes_max")]
        );
        assert_eq!(
            broken(|l| l.ingest_bytes_max = u64::from(l.frame_bytes_max) - 1),
            [("ingest_bytes_max", "frame_bytes_max")]
        );
    }
}
