//! Foresight: how long would a request that comes now wait for its first token? What would wait
//! longer than its class may, or than its own deadline, is refused at once, and told when to come
//! back: an early refusal costs microseconds, a late one everything that was computed for it.
//!
//! Two things can stand before the first token, and the slower one counts: batch slots (as many
//! answers must end as requests are ahead, less the free slots) and prefill (the prompts ahead
//! take their share of every step). Then comes the request's own prefill. On an idle engine only
//! that is left, and the target is at least [`IDLE_TIMES`] times as long: a slow machine never
//! refuses a long prompt while it has nothing else to do.

use crate::base::Instant;
use crate::flow::StepLoad;
use crate::message::Ask;
use crate::request::{Class, RejectReason};

use super::EngineCore;
use super::stats::permille;

/// A prompt may take this many times what it takes on an idle engine, whatever the target is.
const IDLE_TIMES: u64 = 3;
/// Of a target, the part that may be foreseen to be used up: the rest is for what nobody foresees
/// (longer answers than of late, a step beside a longer chunk).
const FORESEEN_PERCENT: u64 = 80;
/// Steps to be seen before anybody is refused for what the model of their time says.
const STEPS_SEEN_MIN: u64 = 8;

const MS: u64 = 1_000_000;

/// How long prompts and answers were of late: integer means over about the last 32 answers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Typical {
    /// In 1/[`Typical::PARTS`] of a token.
    prompt: u64,
    output: u64,
    /// Range: 0 ..= [`Typical::SPAN`].
    seen: u64,
}

impl Typical {
    const PARTS: u64 = 1024;
    const SPAN: u64 = 32;

    /// An answer of `output` tokens to a prompt of `prompt` tokens has ended.
    pub fn observe(&mut self, prompt: u32, output: u32) {
        self.seen = (self.seen + 1).min(Typical::SPAN);
        let mean = |old: u64, new: u32| {
            (old * (self.seen - 1) + u64::from(new) * Typical::PARTS) / self.seen
        };
        (self.prompt, self.output) = (mean(self.prompt, prompt), mean(self.output, output));
    }

    /// Tokens of a prompt and of an answer; `None` before an answer has ended.
    fn tokens(&self) -> Option<(u32, u64)> {
        let whole = |parts: u64| parts.div_ceil(Typical::PARTS);
        (self.seen > 0).then(|| (whole(self.prompt) as u32, whole(self.output).max(1)))
    }
}

/// What stands before a newcomer's own prefill.
struct Wait {
    /// Until enough answers have ended for it to get a slot.
    slots_ns: u64,
    /// Until the prompts before it are computed.
    backlog_ns: u64,
    /// What its prefill shares the steps with.
    beside: StepLoad,
}

/// See [`EngineCore::outlook`].
pub(super) struct Outlook {
    /// Until an ordinary newcomer's own prefill begins.
    pub wait_ns: u64,
    /// The prompts before it, of the time that it may wait.
    pub prefill_permille: u64,
}

impl EngineCore {
    /// Refuses what would get its first token too late, by the estimate of now; returns the
    /// estimate, if there is one yet.
    pub(super) fn foresee(
        &mut self,
        ask: &Ask,
        now: Instant,
    ) -> Result<Option<u64>, (RejectReason, Option<u32>)> {
        if ask.deadline.is_some_and(|deadline| deadline <= now) {
            return Err((RejectReason::DeadlineExpired, None));
        }
        if self.pace.observed() < STEPS_SEEN_MIN {
            return Ok(None);
        }
        let tokens = ask.input_tokens.min(self.context);
        let ttft_ns = self.ttft_ns(ask.class, tokens);
        let deadline_ns = ask.deadline.map(|deadline| deadline.ns_since(now));
        if let Some(allowed) = deadline_ns.filter(|&allowed| ttft_ns > allowed) {
            let wait = self.wait_for(ttft_ns - allowed, now);
            return Err((RejectReason::DeadlineUnattainable, wait));
        }
        match self.ttft_allowed_ns(ask.class, tokens) {
            Some(allowed) if ttft_ns > allowed => {
                let wait = self.wait_for(ttft_ns - allowed, now);
                Err((RejectReason::TtftUnattainable, wait))
            }
            _ => Ok(Some(ttft_ns)),
        }
    }

    /// How long the resources of now would keep a newcomer, for whoever watches.
    pub(super) fn outlook(&self) -> Outlook {
        let wait = self.wait_ns(Class::Default);
        let target_ms = match self.limits.ttft_target_ms {
            0 => self.limits.queue_ttl_ms,
            target_ms => target_ms,
        };
        let prefill = permille(wait.backlog_ns, target_ms.saturating_mul(MS));
        Outlook { wait_ns: wait.slots_ns.max(wait.backlog_ns), prefill_permille: prefill }
    }

    /// What may be foreseen for a prompt of this class; `None`: anything.
    fn ttft_allowed_ns(&self, class: Class, tokens: u32) -> Option<u64> {
        // Bulk work has no target: it waits until its time to live is over.
        if class == Class::Bulk || self.limits.ttft_target_ms == 0 {
            return None;
        }
        let target_ns = self.limits.ttft_target_ms.saturating_mul(MS) / 100 * FORESEEN_PERCENT;
        let idle_ns = self.prefill_ns(StepLoad::default(), 0, tokens);
        Some(target_ns.max(idle_ns.saturating_mul(IDLE_TIMES)))
    }

    /// Time to the first token of a prompt of this class that comes now.
    fn ttft_ns(&self, class: Class, tokens: u32) -> u64 {
        let Wait { slots_ns, backlog_ns, beside } = self.wait_ns(class);
        slots_ns.max(backlog_ns).saturating_add(self.prefill_ns(beside, 0, tokens))
    }

    /// What stands before the prefill of a prompt of this class that comes now.
    fn wait_ns(&self, class: Class) -> Wait {
        let (ahead, ahead_tokens) = self.ledger.ahead_of(class);
        let ahead = u64::from(ahead) + self.batch.waiting.len() as u64;
        let free = self.batch.slots_free().len() as u64;
        let slots_ns = match (ahead + 1).saturating_sub(free) {
            0 => 0,
            ends => self.ends_ns(ends),
        };
        let mut beside = StepLoad::default();
        let mut backlog = ahead_tokens;
        for &index in self.batch.running.iter().chain(&self.batch.waiting) {
            let sequence = &self.sequences[index];
            match sequence.tokens_unplanned() {
                0 | 1 => beside = beside.plus_decode(sequence.kv_planned),
                left => backlog += left as u64,
            }
        }
        Wait { slots_ns, backlog_ns: self.prefill_ns(beside, backlog, 0), beside }
    }

    /// Time until `ends` answers have ended: all that run advance together, a token a step, and
    /// for each that ends another prompt is computed. Answers are as long as those of late, or,
    /// before any has ended, as long as those that run may become.
    ///
    /// The rate of ends seen of late would be no guide: with few running it is that of a server
    /// with nothing to do, not of one that is full.
    fn ends_ns(&self, ends: u64) -> u64 {
        let running = &self.batch.running;
        let count = (running.len() as u64).max(1);
        let mut load = StepLoad::default();
        let (mut prompts, mut outputs) = (0, 0);
        for &index in running {
            let sequence = &self.sequences[index];
            load = load.plus_decode(sequence.kv_planned);
            prompts += u64::from(sequence.prompt_tokens);
            outputs += u64::from(sequence.output_max);
        }
        let (prompt, output) =
            self.typical.tokens().unwrap_or(((prompts / count) as u32, outputs / count));
        let answer_ns = self.pace.predict_ns(load).saturating_mul(output) / count;
        let prompt_ns = self
            .prefill_ns(StepLoad::default(), u64::from(prompt), 0)
            .saturating_sub(self.pace.predict_ns(StepLoad::default()));
        answer_ns.saturating_add(prompt_ns).saturating_mul(ends)
    }

    /// Time for prefilling `backlog` tokens of many prompts and one prompt of `tokens`, in steps
    /// that compute `beside` too.
    fn prefill_ns(&self, beside: StepLoad, backlog: u64, tokens: u32) -> u64 {
        let backlog = u32::try_from(backlog).unwrap_or(u32::MAX - tokens);
        let total = backlog.saturating_add(tokens);
        if total == 0 {
            return 0;
        }
        let budget = self.limits.step_tokens_max.saturating_sub(beside.decode_rows).max(1);
        let steps = u64::from(total.div_ceil(budget.min(self.limits.chunk_tokens_max).max(1)));
        let beside_ns = self.pace.predict_ns(beside);
        // A backlog is of many prompts, each short against the step's other costs: what they read
        // of their own KV is left out.
        let load = StepLoad { prefill_tokens: backlog, ..beside }.plus_prefill(0, tokens);
        let work_ns = self.pace.predict_ns(load).saturating_sub(beside_ns);
        steps.saturating_mul(beside_ns).saturating_add(work_ns)
    }

    /// When somebody who would come `excess_ns` too early should come back.
    fn wait_for(&mut self, excess_ns: u64, now: Instant) -> Option<u32> {
        Some(self.meter.retry_after_excess_ms(now, excess_ns.div_ceil(MS)))
    }
}
