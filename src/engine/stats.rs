//! What the engine has counted. Plain integers, copied out whole.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::flow::Load;
use crate::flow::calendar::Kept;
use crate::request::{Class, FinishReason, RejectReason};

/// Counters since the start. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Asks seen.
    pub asks: u64,
    /// Refusals by front cores at a closed gate: part of `asks` and `rejected`.
    pub gate_refusals: u64,
    /// Asks granted.
    pub grants: u64,
    /// Asks treated as a less urgent class than they named: their tenant may not use that.
    pub classes_lowered: u64,
    /// Submissions accepted into the queue.
    pub accepted: u64,
    /// Sequences whose first prefill was planned.
    pub admitted: u64,
    /// Requests refused or evicted, by [`RejectReason`]'s number.
    pub rejected: [u64; RejectReason::ALL.len()],
    /// Sequences ended otherwise, by [`FinishReason`]'s number.
    pub finished: [u64; FinishReason::ALL.len()],
    /// Steps sent to the device.
    pub steps: u64,
    /// Steps that came back.
    pub steps_completed: u64,
    /// Time that the device worked on them.
    pub device_ns: u64,
    /// Rows of all steps.
    pub rows: u64,
    /// Prompt tokens of requests whose first prefill was planned.
    pub prompt_tokens: u64,
    /// Input tokens of all steps: prompts, decodes and what had to be computed again.
    pub tokens_in: u64,
    /// Output tokens sampled and kept.
    pub tokens_out: u64,
    /// Times a running sequence lost its KV for want of blocks.
    pub preemptions: u64,
    /// Times a sequence that had been preempted too often entered the batch with its whole
    /// remainder reserved.
    pub reservations: u64,
    /// Times a sequence out of the batch lost its KV for want of blocks.
    pub kv_drops: u64,
    /// Positions that have to be computed again because of either.
    pub recomputed_tokens: u64,
    /// Times a sequence left the batch for want of stream credit.
    pub parks: u64,
    /// Times such a sequence got credit again.
    pub resumes: u64,
    /// Batches of events sent to front cores.
    pub event_batches: u64,
    /// Messages that named a sequence which is over: late, and harmless.
    pub stale_messages: u64,
    /// Credit beyond a stream's largest window, not granted: a front core's account is wrong.
    pub excess_credit: u64,
    /// Steps that failed.
    pub step_failures: u64,
}

/// Where things stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Counted since the start.
    pub counters: Counters,
    /// λ, μ and their ratio, in requests: asks that came, whether granted or not, against requests
    /// that ended while the device worked.
    pub load: Load,
    /// The circuit breaker: 0 closed, 1 half-open, 2 open.
    pub breaker: u64,
    /// How often it has opened.
    pub breaker_trips: u64,
    /// What became of the places promised to refused clients.
    pub promises: Kept,
    /// How much longer first tokens took than the model of steps foresaw, of late.
    pub wait_correction_permille: u64,
    /// Sequences with a grant and no submission yet.
    pub granted: u32,
    /// Sequences in the queue, by class, most urgent first.
    pub queued: [u32; Class::ALL.len()],
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences admitted that wait for a slot or for blocks.
    pub waiting: u32,
    /// Sequences admitted that wait for stream credit.
    pub parked: u32,
    /// Prompt tokens that hold permits: granted or queued.
    pub queued_tokens: u64,
    /// Body bytes that hold permits.
    pub queued_bytes: u64,
    /// KV blocks that can be taken.
    pub blocks_free: u32,
    /// KV blocks that a step in flight still names.
    pub blocks_retiring: u32,
    /// KV blocks in all.
    pub blocks_total: u32,
    /// Steps at the device.
    pub steps_in_flight: u32,
    /// Asks of tenants and users for whom there was no room for an account of their own. Only
    /// grows.
    pub shared_asks: u64,
}

/// How many numbers [`EngineStats::named`] has.
pub const NAMED: usize = 47;

impl EngineStats {
    /// The numbers that STATS_REPLY shows, by name. Those of `counters` only grow.
    pub fn named(&self) -> [(&'static str, u64); NAMED] {
        let counters = &self.counters;
        let [system, interactive, default, bulk] = self.queued.map(u64::from);
        [
            ("engine_granted", self.granted.into()),
            ("engine_queued_system", system),
            ("engine_queued_interactive", interactive),
            ("engine_queued_default", default),
            ("engine_queued_bulk", bulk),
            ("engine_running", self.running.into()),
            ("engine_waiting", self.waiting.into()),
            ("engine_parked", self.parked.into()),
            ("engine_queued_tokens", self.queued_tokens),
            ("engine_queued_bytes", self.queued_bytes),
            ("engine_kv_blocks_free", self.blocks_free.into()),
            ("engine_kv_blocks_retiring", self.blocks_retiring.into()),
            ("engine_kv_blocks_total", self.blocks_total.into()),
            ("engine_asks", counters.asks),
            ("engine_gate_refusals", counters.gate_refusals),
            ("engine_grants", counters.grants),
            ("engine_admitted", counters.admitted),
            ("engine_rejected", counters.rejected.iter().sum()),
            ("engine_rejected_tenant_rate", counters.rejected[RejectReason::TenantRate as usize]),
            ("engine_classes_lowered", counters.classes_lowered),
            ("engine_shared_account_asks", self.shared_asks),
            ("engine_finished", counters.finished.iter().sum()),
            ("engine_steps", counters.steps),
            ("engine_steps_completed", counters.steps_completed),
            ("engine_step_failures", counters.step_failures),
            ("engine_device_ns", counters.device_ns),
            ("engine_rows", counters.rows),
            ("engine_prompt_tokens", counters.prompt_tokens),
            ("engine_tokens_in", counters.tokens_in),
            ("engine_tokens_out", counters.tokens_out),
            ("engine_preemptions", counters.preemptions),
            ("engine_kv_drops", counters.kv_drops),
            ("engine_recomputed_tokens", counters.recomputed_tokens),
            ("engine_parks", counters.parks),
            ("engine_resumes", counters.resumes),
            ("engine_reservations", counters.reservations),
            ("engine_arrivals_per_1000_seconds", self.load.arrivals_per_1000_seconds),
            ("engine_service_per_1000_seconds", self.load.service_per_1000_seconds),
            ("engine_utilisation_permille", self.load.utilisation_permille),
            ("engine_breaker", self.breaker),
            ("engine_breaker_trips", self.breaker_trips),
            ("engine_promises", self.promises.booked),
            ("engine_promises_kept", self.promises.kept),
            ("engine_promises_broken", self.promises.broken),
            ("engine_promises_missed", self.promises.missed),
            ("engine_promises_denied", self.promises.full),
            ("engine_wait_correction_permille", self.wait_correction_permille),
        ]
    }
}

/// The engine's numbers where other cores can read them at any time. One writer; each number is
/// true by itself, but two of them may be of different ticks.
#[derive(Debug)]
pub struct StatsBoard {
    values: [AtomicU64; NAMED],
}

impl Default for StatsBoard {
    fn default() -> StatsBoard {
        StatsBoard { values: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl StatsBoard {
    /// Shows new numbers.
    pub fn show(&self, stats: &EngineStats) {
        for (value, (_, new)) in self.values.iter().zip(stats.named()) {
            // Relaxed: nothing is concluded from one number about another.
            value.store(new, Ordering::Relaxed);
        }
    }

    /// The numbers as last shown, by name.
    pub fn read(&self) -> [(&'static str, u64); NAMED] {
        let mut named = EngineStats::default().named();
        for ((_, value), shown) in named.iter_mut().zip(&self.values) {
            *value = shown.load(Ordering::Relaxed);
        }
        named
    }
}
