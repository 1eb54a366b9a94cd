//! What the engine has counted. Plain integers, copied out whole, and the one table of their names.

use crate::base::board::{Kind, Label, Number, Tell};
use crate::base::histogram::histograms;
use crate::flow::Load;
use crate::flow::calendar::Kept;
use crate::request::{Class, FinishReason, RejectReason, Timings, Usage};

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
    /// Time without a step at the device.
    pub device_idle_ns: u64,
    /// Time that it had a step and did not work: lost on the rings and in waking up.
    pub device_gap_ns: u64,
    /// Times to the first token as foreseen at the ask, against what they came to.
    pub ttft_foreseen: Accuracy,
    /// Steps' times as foreseen, against what they took.
    pub step_foreseen: Accuracy,
}

/// How good a prediction was, summed up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accuracy {
    /// Predictions that came to be compared.
    pub count: u64,
    /// Sum of what was predicted.
    pub predicted_ns: u64,
    /// Sum of what it came to.
    pub actual_ns: u64,
    /// Sum of the differences, whichever was larger.
    pub error_ns: u64,
}

impl Accuracy {
    pub(super) fn observe(&mut self, predicted_ns: u64, actual_ns: u64) {
        self.count += 1;
        // A guess without any bound must not stop the server.
        self.predicted_ns = self.predicted_ns.saturating_add(predicted_ns);
        self.actual_ns = self.actual_ns.saturating_add(actual_ns);
        self.error_ns = self.error_ns.saturating_add(predicted_ns.abs_diff(actual_ns));
    }
}

histograms! {
    /// How long requests and tokens took, and how long requests were. Of admitted requests only.
    Histograms {
        /// From the ask to the first token.
        ttft: 15 = "engine_ttft", "ms" of 1_000_000 "ns",
            [1 5 10 25 50 100 250 500 1000 2000 4000 8000 15000 30000 60000],
            "from the ask to the first token";
        /// Between two tokens of a sequence; time parked is not counted.
        itl: 15 = "engine_itl", "ms" of 1_000_000 "ns",
            [1 2 4 6 8 10 15 20 30 50 75 100 200 500 1000],
            "between two tokens of a sequence, without the time that its client kept it parked";
        /// A finished sequence's mean time for each token after its first.
        token_time: 15 = "engine_token_time", "ms" of 1_000_000 "ns",
            [1 2 4 6 8 10 15 20 30 50 75 100 200 500 1000],
            "mean time for each token after the first, of a finished sequence";
        /// From the ask to the end.
        total: 15 = "engine_total", "ms" of 1_000_000 "ns",
            [10 50 100 250 500 1000 2000 4000 8000 15000 30000 60000 120000 300000 600000],
            "from the ask to the end, of admitted requests";
        /// From the ask to the plan of the first prefill.
        queue: 15 = "engine_queue", "ms" of 1_000_000 "ns",
            [1 5 10 25 50 100 250 500 1000 2000 4000 8000 15000 30000 60000],
            "from the ask to the first prefill";
        /// Tokens of prompts.
        prompt: 12 = "engine_prompt_length", "tokens" of 1 "tokens",
            [1 16 64 128 256 512 1024 2048 4096 8192 32768 131072],
            "prompt tokens of a finished sequence";
        /// Tokens of answers.
        output: 12 = "engine_output_length", "tokens" of 1 "tokens",
            [1 16 64 128 256 512 1024 2048 4096 8192 32768 131072],
            "output tokens of a finished sequence";
    }
}

impl Histograms {
    /// An admitted request is over.
    pub(super) fn ended(&mut self, usage: &Usage, timings: &Timings) {
        self.total.observe(timings.total_ns);
        self.prompt.observe(usage.prompt_tokens.into());
        self.output.observe(usage.output_tokens.into());
        let later = usage.output_tokens.saturating_sub(1);
        if later > 0 {
            let decode_ns = timings.total_ns - timings.ttft_ns;
            let unparked_ns = decode_ns.saturating_sub(timings.parked_ns);
            self.token_time.observe(unparked_ns / u64::from(later));
        }
    }
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
    /// How close each resource is to where it makes others wait.
    pub saturation: Saturation,
    /// When an ordinary request that comes now would get its first token, its own prefill left out.
    pub wait_foreseen_ns: u64,
    /// What was seen of times and lengths.
    pub histograms: Histograms,
    /// Asks of tenants and users for whom there was no room for an account of their own. Only
    /// grows.
    pub shared_asks: u64,
}

/// Demand over supply in thousandths: 1,000 is the set point, beyond it requests wait for this
/// resource. Not clamped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saturation {
    /// Sequences that have or want a batch slot, of the slots.
    pub slots: u64,
    /// KV blocks that cannot be taken, of the pool.
    pub kv: u64,
    /// The queue's fullest bound: requests, tokens or bytes.
    pub queue: u64,
    /// Time that the prompts before a newcomer take, of the target for the first token (without a
    /// target, of the queue's time to live).
    pub prefill: u64,
    /// Parked sequences, of the places for them.
    pub egress: u64,
}

/// `a` of `b` in thousandths; nothing of nothing is nothing, something of nothing too much.
pub(super) fn permille(a: u64, b: u64) -> u64 {
    match (a, b) {
        (0, _) => 0,
        (_, 0) => 1_000,
        _ => u64::try_from(u128::from(a) * 1_000 / u128::from(b)).unwrap_or(u64::MAX),
    }
}

/// Names for each value of a numbered enum, `prefix` before them.
macro_rules! labelled {
    ($kind:ident, $family:literal, $label:literal, $help:literal, [$($value:literal),+ $(,)?]) => {
        [$(Number {
            name: concat!($family, "_", $value),
            kind: Kind::$kind(Label { family: $family, label: $label, value: $value }),
            help: $help,
        }),+]
    };
}

const QUEUED: [Number; Class::ALL.len()] = labelled!(
    GaugeOf,
    "engine_queued",
    "class",
    "sequences in the queue",
    ["system", "interactive", "default", "bulk"]
);

const REJECTED: [Number; RejectReason::ALL.len()] = labelled!(
    CounterOf,
    "engine_rejected",
    "reason",
    "requests refused or evicted",
    [
        "queue_full",
        "exceeds_capacity",
        "invalid",
        "too_many_streams",
        "shutting_down",
        "no_capacity",
        "deadline_unattainable",
        "queue_ttl_expired",
        "deadline_expired",
        "ttft_unattainable",
        "tenant_rate",
    ]
);

const FINISHED: [Number; FinishReason::ALL.len()] = labelled!(
    CounterOf,
    "engine_finished",
    "reason",
    "sequences ended otherwise",
    [
        "end_of_text",
        "stop_string",
        "max_tokens",
        "context_full",
        "cancelled",
        "deadline",
        "stalled",
        "shutting_down",
        "device_failed",
        "operator",
    ]
);

const SATURATION: [Number; 5] = [
    saturation("engine_saturation_slots_permille", "slots"),
    saturation("engine_saturation_kv_permille", "kv"),
    saturation("engine_saturation_queue_permille", "queue"),
    saturation("engine_saturation_prefill_permille", "prefill"),
    saturation("engine_saturation_egress_permille", "egress"),
];

const fn saturation(name: &'static str, value: &'static str) -> Number {
    let label = Label { family: "engine_saturation_permille", label: "resource", value };
    let help = "demand over supply: at 1 the resource is full, beyond it requests wait for it";
    Number { name, kind: Kind::GaugeOf(label), help }
}

impl Tell for EngineStats {
    fn tell(&self, mut put: impl FnMut(Number, u64)) {
        let mut family = |numbers: &[Number], values: &[u64]| {
            for (&number, &value) in numbers.iter().zip(values) {
                put(number, value);
            }
        };
        family(&QUEUED, &self.queued.map(u64::from));
        let Saturation { slots, kv, queue, prefill, egress } = self.saturation;
        family(&SATURATION, &[slots, kv, queue, prefill, egress]);
        family(&REJECTED, &self.counters.rejected);
        family(&FINISHED, &self.counters.finished);
        self.tell_gauges(&mut put);
        self.counters.tell(&mut put);
        self.tell_promises(&mut put);
        self.histograms.tell(&mut put);
    }
}

impl EngineStats {
    fn tell_gauges(&self, mut put: impl FnMut(Number, u64)) {
        let mut gauge = |name, value, help| put(Number { name, kind: Kind::Gauge, help }, value);
        let load = &self.load;
        gauge("engine_granted", self.granted.into(), "sequences granted and not yet submitted");
        gauge("engine_running", self.running.into(), "sequences in the batch");
        gauge("engine_waiting", self.waiting.into(), "admitted, waiting for a slot or for blocks");
        gauge("engine_parked", self.parked.into(), "admitted, waiting for their client's credit");
        gauge("engine_queued_tokens", self.queued_tokens, "prompt tokens that hold permits");
        gauge("engine_queued_bytes", self.queued_bytes, "body bytes that hold permits");
        gauge("engine_kv_blocks_free", self.blocks_free.into(), "KV blocks that can be taken");
        let retiring = "KV blocks that a step in flight still names";
        gauge("engine_kv_blocks_retiring", self.blocks_retiring.into(), retiring);
        gauge("engine_kv_blocks_total", self.blocks_total.into(), "KV blocks");
        gauge("engine_steps_in_flight", self.steps_in_flight.into(), "steps at the device");
        let arrivals = "lambda: requests that come";
        gauge("engine_arrivals_per_1000_seconds", load.arrivals_per_1000_seconds, arrivals);
        let effective = "lambda effective: requests let into the batch";
        gauge("engine_effective_per_1000_seconds", load.effective_per_1000_seconds, effective);
        let service = "mu: requests served for each second of the device's work";
        gauge("engine_service_per_1000_seconds", load.service_per_1000_seconds, service);
        let jobs = "L = lambda W: requests in the system by Little's law, refused ones included";
        gauge("engine_jobs_milli", load.jobs_milli, jobs);
        let utilisation = "lambda / mu: above 1 more comes than can be served";
        gauge("engine_utilisation_permille", load.utilisation_permille, utilisation);
        let wait = "foreseen time to the first token of an ordinary request that comes now, \
                    its own prefill left out";
        gauge("engine_wait_foreseen_ns", self.wait_foreseen_ns, wait);
        let correction = "how much longer first tokens took than the model of steps foresaw";
        gauge("engine_wait_correction_permille", self.wait_correction_permille, correction);
        gauge("engine_breaker", self.breaker, "circuit breaker: 0 closed, 1 half-open, 2 open");
    }
}

impl EngineStats {
    /// What is counted elsewhere than in `counters`.
    fn tell_promises(&self, mut put: impl FnMut(Number, u64)) {
        let mut count = |name, value, help| put(Number { name, kind: Kind::Counter, help }, value);
        count("engine_breaker_trips", self.breaker_trips, "times the circuit breaker opened");
        let shared = "asks of tenants and users without room for an account of their own";
        count("engine_shared_account_asks", self.shared_asks, shared);
        let Kept { booked, kept, broken, missed, full } = self.promises;
        count("engine_promises", booked, "places promised to refused clients");
        count("engine_promises_kept", kept, "of these, clients let in as promised");
        count("engine_promises_broken", broken, "of these, clients refused all the same");
        count(
            "engine_promises_missed",
            missed,
            "places nobody came for in time; some are kept or broken later",
        );
        count("engine_promises_denied", full, "refusals without a place, since all were taken");
    }
}

impl Tell for Counters {
    fn tell(&self, mut put: impl FnMut(Number, u64)) {
        let mut count = |name, value, help| put(Number { name, kind: Kind::Counter, help }, value);
        count("engine_asks", self.asks, "asks seen");
        let gate = "refusals at a closed gate, part of asks and refusals";
        count("engine_gate_refusals", self.gate_refusals, gate);
        count("engine_grants", self.grants, "asks granted");
        let lowered = "asks treated as a less urgent class than they named";
        count("engine_classes_lowered", self.classes_lowered, lowered);
        count("engine_accepted", self.accepted, "submissions taken into the queue");
        count("engine_admitted", self.admitted, "sequences whose first prefill was planned");
        count("engine_rejected", self.rejected.iter().sum(), "requests refused or evicted");
        count("engine_finished", self.finished.iter().sum(), "sequences ended otherwise");
        count("engine_steps", self.steps, "steps sent to the device");
        count("engine_steps_completed", self.steps_completed, "steps that came back");
        count("engine_step_failures", self.step_failures, "steps that failed");
        count("engine_device_ns", self.device_ns, "time that the device worked");
        count("engine_device_idle_ns", self.device_idle_ns, "time without a step at the device");
        let gap = "time that the device had a step and did not work: lost on the way";
        count("engine_device_gap_ns", self.device_gap_ns, gap);
        count("engine_rows", self.rows, "rows of all steps");
        count("engine_prompt_tokens", self.prompt_tokens, "prompt tokens of admitted sequences");
        count("engine_tokens_in", self.tokens_in, "input tokens of all steps");
        count("engine_tokens_out", self.tokens_out, "output tokens sampled and kept");
        count("engine_preemptions", self.preemptions, "times a running sequence lost its KV");
        let drops = "times a sequence out of the batch lost its KV";
        count("engine_kv_drops", self.kv_drops, drops);
        let again = "wasted: positions that have to be computed again because of either";
        count("engine_recomputed_tokens", self.recomputed_tokens, again);
        count("engine_parks", self.parks, "times a sequence left the batch for want of credit");
        count("engine_resumes", self.resumes, "times such a sequence got credit again");
        let reserved = "times a sequence entered the batch with its whole remainder reserved";
        count("engine_reservations", self.reservations, reserved);
        let Accuracy { count: foreseen, predicted_ns, actual_ns, error_ns } = self.ttft_foreseen;
        count("engine_ttft_foreseen", foreseen, "first tokens whose time was foreseen at the ask");
        count("engine_ttft_foreseen_ns", predicted_ns, "sum of these times as foreseen");
        count("engine_ttft_foreseen_actual_ns", actual_ns, "sum of what they came to");
        count("engine_ttft_foreseen_error_ns", error_ns, "sum of the differences' sizes");
        let Accuracy { count: foreseen, predicted_ns, actual_ns, error_ns } = self.step_foreseen;
        count("engine_step_foreseen", foreseen, "steps whose time was foreseen");
        count("engine_step_foreseen_ns", predicted_ns, "sum of these times as foreseen");
        count("engine_step_foreseen_actual_ns", actual_ns, "sum of what they took");
        count("engine_step_foreseen_error_ns", error_ns, "sum of the differences' sizes");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn labels_are_the_reasons_own_names_in_their_order() {
        let value = |number: &Number| match number.kind {
            Kind::GaugeOf(label) | Kind::CounterOf(label) => label.value,
            _ => panic!("{number:?}"),
        };
        assert_eq!(QUEUED.each_ref().map(value), Class::ALL.map(|class| class.name()));
        assert_eq!(REJECTED.each_ref().map(value), RejectReason::ALL.map(|reason| reason.name()));
        assert_eq!(FINISHED.each_ref().map(value), FinishReason::ALL.map(|reason| reason.name()));
    }

    #[test]
    fn every_number_has_a_name_of_its_own_and_all_fit_a_reply() {
        let mut names = Vec::new();
        EngineStats::default().tell(|number, _| names.push(number.name));
        let unique: BTreeSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len(), "{names:?}");
        // The front core's numbers come before them.
        assert!(names.len() + 24 <= 256, "{} numbers", names.len());
    }

    #[test]
    fn saturation_is_not_clamped_and_never_divides_by_nothing() {
        assert_eq!((permille(0, 0), permille(1, 0), permille(3, 2)), (0, 1_000, 1_500));
        assert_eq!(permille(u64::MAX, 1), u64::MAX);
    }
}
