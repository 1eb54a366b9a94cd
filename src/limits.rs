//! Every bound of the program, with its reason.
//!
//! Memory is bounded by configuration (I9): what each bound costs in bytes is summed in the
//! [`Envelope`] and printed at start.

mod envelope;
mod quota;

use crate::message::BLOCK_POSITIONS;
pub use envelope::{Bound, Envelope, Kind, ModelShape, Sizes, show_bytes};
pub use quota::{Quota, Quotas};

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
    /// A step with decode rows in it takes no more prefill than is expected to end by then: it is
    /// what a long prompt may add to the time between two tokens of everybody else.
    pub step_target_ms: u64,
    /// Longest sequence, prompt and output together: the model's context unless set lower.
    pub context_max: u32,
    /// A request whose first token is foreseen to come later is refused at once, unless its
    /// prompt would take a third of that on an idle engine, or its class is bulk. 0: nobody is.
    pub ttft_target_ms: u64,
    /// A request that has waited this long is evicted.
    pub queue_ttl_ms: u64,
    /// After so many failed steps in a row the breaker opens and refuses everybody for a while;
    /// 0: never.
    pub breaker_failures_max: u32,
    /// How long it is open at first.
    pub breaker_open_ms: u64,
    /// A step that takes longer opens it, too.
    pub hung_step_ms: u64,
    /// A parked sequence's client has this long to give credit.
    pub stall_timeout_ms: u64,
    /// Tenants (and users, where those have quotas) whose accounts are kept: whoever has rested
    /// longest makes room for a new one.
    pub tenants_max: u32,
    /// What each of them may take.
    pub quotas: Quotas,
    /// Who of the queue is admitted next.
    pub policy: Policy,
    /// A request ranks as if it had come this much later for each class below the top, and so
    /// passes more urgent ones that come still later. 0: a more urgent class always comes first.
    pub ageing_ms: u64,
}

/// Who of the queue is admitted next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The more urgent class, with ageing; within it, first come, first served.
    Priority,
    /// First come, first served, whatever the class.
    Fcfs,
    /// As by priority, but within a class tenants take turns by what they were served.
    Fair,
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
            step_target_ms: 50,
            context_max: 8192,
            ttft_target_ms: 2_000,
            queue_ttl_ms: 30_000,
            breaker_failures_max: 3,
            breaker_open_ms: 1_000,
            hung_step_ms: 10_000,
            stall_timeout_ms: 120_000,
            tenants_max: 1024,
            quotas: Quotas::default(),
            policy: Policy::Priority,
            ageing_ms: 10_000,
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
            step_target_ms: 50,
            context_max: 512,
            ttft_target_ms: 1_000,
            queue_ttl_ms: 5_000,
            breaker_failures_max: 3,
            breaker_open_ms: 100,
            hung_step_ms: 1_000,
            stall_timeout_ms: 2_000,
            tenants_max: 4,
            quotas: Quotas::default(),
            policy: Policy::Priority,
            ageing_ms: 1_000,
        }
    }

    /// Sequences the engine may know at once: queued (granted ones count as queued), running,
    /// parked.
    pub fn sequences_max(&self) -> u32 {
        self.queued_requests_max + self.running_max + self.parked_max
    }

    /// These limits on a model of `model_context` tokens with a pool of `kv_blocks` blocks: no
    /// sequence is longer than the model was made for, nor than the whole pool holds, or it could
    /// never end. Says what was lowered and why.
    ///
    /// # Errors
    /// When not even the smallest sequence fits.
    pub fn fitted(&self, model_context: u64, kv_blocks: u64) -> Result<Fitted, TooSmall> {
        let pool = kv_blocks.saturating_mul(BLOCK_POSITIONS as u64);
        let wanted = u64::from(self.context_max);
        let context = wanted.min(model_context).min(pool);
        // A prompt of one token and one token of output.
        if context < 2 {
            return Err(TooSmall { kv_blocks, model_context });
        }
        let mut limits = self.clone();
        limits.context_max = u32::try_from(context).expect("at most what a u32 held");
        let lowered = match context {
            _ if context == wanted => None,
            _ if context == model_context => Some(Lowered::ToModelContext),
            _ => Some(Lowered::ToPool),
        };
        Ok(Fitted { limits, lowered })
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
            (self.step_tokens_max <= self.running_max).then_some(BrokenRelation {
                field: "step_tokens_max",
                relation: "above",
                than: "running_max",
                reason: "a step holds one token of every running sequence, and some prefill",
            }),
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

/// [`Limits`] as a model and a KV pool allow them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fitted {
    /// With `context_max` as it is in force.
    pub limits: Limits,
    /// Why it is lower than it was.
    pub lowered: Option<Lowered>,
}

/// What a sequence's length was lowered to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lowered {
    /// The model was made for no longer ones.
    ToModelContext,
    /// The KV pool holds no longer ones.
    ToPool,
}

/// The KV pool holds no sequence at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no sequence fits: the KV pool has {kv_blocks} blocks of 64 positions and the model a context \
     of {model_context} tokens; raise kv.pool_bytes"
)]
pub struct TooSmall {
    /// Blocks in the pool.
    pub kv_blocks: u64,
    /// The model's context.
    pub model_context: u64,
}

/// Two bounds that contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenRelation {
    /// The field that is too small or too large.
    pub field: &'static str,
    /// "above", "at least" or "at most".
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
    fn the_context_is_the_least_of_limit_model_and_pool() {
        let limits = Limits { context_max: 1000, ..Limits::tiny() };
        let fitted = |model, blocks| {
            let fitted = limits.fitted(model, blocks).unwrap();
            (fitted.limits.context_max, fitted.lowered)
        };
        assert_eq!(fitted(1000, 16), (1000, None));
        assert_eq!(fitted(999, 16), (999, Some(Lowered::ToModelContext)));
        assert_eq!(fitted(2000, 15), (960, Some(Lowered::ToPool)));
        assert_eq!(fitted(2000, u64::MAX), (1000, None));
        let refused = limits.fitted(2000, 0).unwrap_err();
        assert!(refused.to_string().contains("raise kv.pool_bytes"));
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
            broken(|l| l.running_max = l.step_tokens_max),
            [("step_tokens_max", "running_max")]
        );
        assert_eq!(broken(|l| l.running_max = l.step_tokens_max - 1), []);
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
