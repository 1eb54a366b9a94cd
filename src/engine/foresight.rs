//! Foresight: how long would a request that comes now wait for its first token? What would wait
//! longer than its class may, or than its own deadline, is refused at once, and told when to come
//! back: an early refusal costs microseconds, a late one everything that was computed for it.
//!
//! Two things can stand before the first token, and the slower one counts: batch slots (as many
//! answers must end as requests are ahead, less the free slots) and prefill (the prompts ahead
//! take their share of every step). Then comes the request's own prefill. On an idle engine only
//! that is left, and the target is at least [`IDLE_TIMES`] times as long: a slow machine never
//! refuses a long prompt while it has nothing else to do.
//!
//! What was foreseen is compared with what came, and the difference is foreseen the next time.

use crate::base::Instant;
use crate::flow::StepLoad;
use crate::message::Ask;
use crate::request::{Class, RejectReason};

use super::EngineCore;
use super::scheduler::LONG_PREFILL_TOKENS;
use super::stats::permille;

/// A prompt may take this many times what it takes on an idle engine, whatever the target is.
const IDLE_TIMES: u64 = 3;
/// Of a target, the part that may be foreseen to be used up: the rest is for what nobody foresees
/// (longer answers than of late, a step beside a longer chunk).
const FORESEEN_PERCENT: u64 = 80;
/// Steps to be seen before anybody is refused for what the model of their time says.
const STEPS_SEEN_MIN: u64 = 8;

const MS: u64 = 1_000_000;

/// What is foreseen for a request, as the model of step times has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Foreseen {
    /// Until its prefill begins.
    pub wait_ns: u64,
    /// Its prefill.
    pub prefill_ns: u64,
    /// Until its first token, corrected by hindsight: what was said at the ask. 0: nothing was.
    pub ttft_ns: u64,
}

/// How much longer than foreseen the waits of late were: what the model leaves out (sequences that
/// join the batch meanwhile, answers longer than of late, a machine with other work) it leaves out
/// again and again. Integer mean of the ratio over about the last sixteen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hindsight {
    /// Range: [`Hindsight::PARTS`] / 2 ..= 4 * `PARTS`.
    ratio: u64,
}

impl Hindsight {
    const PARTS: u64 = 1024;
    const OVER: u64 = 16;
    /// Shorter waits are a step more or less, and say nothing.
    const WAIT_NS_MIN: u64 = 100 * MS;

    fn observe(&mut self, foreseen_ns: u64, took_ns: u64) {
        if foreseen_ns >= Hindsight::WAIT_NS_MIN {
            let (least, most) = (Hindsight::PARTS / 2, 4 * Hindsight::PARTS);
            let ratio = took_ns.saturating_mul(Hindsight::PARTS) / foreseen_ns;
            let ratio = ratio.clamp(least, most);
            self.ratio = (self.ratio * (Hindsight::OVER - 1) + ratio) / Hindsight::OVER;
            self.ratio = self.ratio.clamp(least, most);
        }
    }

    fn corrected(&self, wait_ns: u64) -> u64 {
        wait_ns.saturating_mul(self.ratio) / Hindsight::PARTS
    }
}

impl Hindsight {
    /// The ratio, for people.
    pub fn permille(self) -> u64 {
        self.ratio * 1_000 / Hindsight::PARTS
    }
}

impl Default for Hindsight {
    fn default() -> Hindsight {
        Hindsight { ratio: Hindsight::PARTS }
    }
}

/// How somebody comes to the door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// With a place in the calendar that is due.
    Place,
    /// Without; so many places are kept free for others.
    Newcomer { kept_free: u32 },
}

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
    /// Refuses what would get its first token too late, by the estimate of now; says by how much.
    /// With a place in the calendar the whole target may be used up, without one only its usual
    /// part, and not what is kept free for those with places.
    pub(super) fn foresee(
        &self,
        ask: &Ask,
        entry: Entry,
        tenant: u32,
        now: Instant,
    ) -> Result<Foreseen, (RejectReason, u64)> {
        if ask.deadline.is_some_and(|deadline| deadline <= now) {
            return Err((RejectReason::DeadlineExpired, 0));
        }
        if self.pace.observed() < STEPS_SEEN_MIN {
            return Ok(Foreseen::default());
        }
        let tokens = ask.input_tokens.min(self.context);
        let (kept_free, percent) = match entry {
            Entry::Place => (0, 100),
            Entry::Newcomer { kept_free } => (kept_free, FORESEEN_PERCENT),
        };
        let foreseen = self.foreseen(ask.class, tenant, tokens, kept_free);
        let wait_ns = self.hindsight.corrected(foreseen.wait_ns);
        let ttft_ns = wait_ns.saturating_add(foreseen.prefill_ns);
        let deadline_ns = ask.deadline.map(|deadline| deadline.ns_since(now));
        if let Some(allowed) = deadline_ns.filter(|&allowed| ttft_ns > allowed) {
            return Err((RejectReason::DeadlineUnattainable, ttft_ns - allowed));
        }
        match self.ttft_allowed_ns(ask.class, tokens, percent) {
            Some(allowed) if ttft_ns > allowed => {
                Err((RejectReason::TtftUnattainable, ttft_ns - allowed))
            }
            _ => Ok(Foreseen { ttft_ns, ..foreseen }),
        }
    }

    /// How long the resources of now would keep a newcomer, for whoever watches; fair shares and
    /// kept places left out.
    pub(super) fn outlook(&self) -> Outlook {
        let wait =
            self.wait_behind(self.ledger.ahead_of(Class::Default), 0, LONG_PREFILL_TOKENS as u32);
        let target_ms = match self.limits.ttft_target_ms {
            0 => self.limits.queue_ttl_ms,
            target_ms => target_ms,
        };
        let prefill_permille = permille(wait.backlog_ns, target_ms.saturating_mul(MS));
        let wait_ns = self.hindsight.corrected(wait.slots_ns.max(wait.backlog_ns));
        Outlook { wait_ns, prefill_permille }
    }

    /// What may be foreseen for a prompt of this class, given what part of the target may be;
    /// `None`: anything.
    fn ttft_allowed_ns(&self, class: Class, tokens: u32, percent: u64) -> Option<u64> {
        // Bulk work has no target: it waits until its time to live is over.
        if class == Class::Bulk || self.limits.ttft_target_ms == 0 {
            return None;
        }
        let target_ns = self.limits.ttft_target_ms.saturating_mul(MS) / 100 * percent;
        let idle_ns = self.prefill_ns(StepLoad::default(), 0, tokens);
        Some(target_ns.max(idle_ns.saturating_mul(IDLE_TIMES)))
    }

    /// Requests and prompt tokens that come before a newcomer of this class and tenant. Those of
    /// less urgent classes that have aged past it are left out: with them it waits a little longer.
    fn ahead_of(&self, class: Class, tenant: u32) -> (u32, u64) {
        let class = if self.queue.knows_classes() { class } else { Class::Bulk };
        let (requests, tokens) = self.ledger.ahead_of(class);
        if !self.queue.is_fair() {
            return (requests, tokens);
        }
        let own = self.queue.len_of(class, tenant);
        let turns = self.queue.turns_before(class, tenant, own).min(requests);
        (turns, tokens * u64::from(turns) / u64::from(requests.max(1)))
    }

    /// The wait for a prompt of this class that comes now, if so many others who are expected were
    /// here before it; and its own prefill.
    fn foreseen(&self, class: Class, tenant: u32, tokens: u32, expected: u32) -> Foreseen {
        let wait = self.wait_behind(self.ahead_of(class, tenant), expected, tokens);
        let wait_ns = wait.slots_ns.max(wait.backlog_ns);
        let prefill_ns = self.prefill_ns(wait.beside, 0, tokens);
        Foreseen { wait_ns, prefill_ns, ttft_ns: 0 }
    }

    /// What stands before a prompt of `tokens` with so many requests and prompt tokens ahead.
    fn wait_behind(&self, (ahead, ahead_tokens): (u32, u64), expected: u32, tokens: u32) -> Wait {
        let ahead = u64::from(ahead) + u64::from(expected) + self.batch.waiting.len() as u64;
        let free = self.batch.slots_free().len() as u64;
        let slots_ns = match (ahead + 1).saturating_sub(free) {
            0 => 0,
            ends => self.ends_ns(ends),
        };
        let mut beside = StepLoad::default();
        let typical_prompt = self.typical.tokens().map_or(0, |(prompt, _)| u64::from(prompt));
        let mut backlog = ahead_tokens + u64::from(expected) * typical_prompt;
        let mut long = 0;
        for &index in self.batch.running.iter().chain(&self.batch.waiting) {
            let sequence = &self.sequences[index];
            match sequence.tokens_unplanned() {
                0 | 1 => beside = beside.plus_decode(sequence.kv_planned),
                left @ 2..=LONG_PREFILL_TOKENS => backlog += left as u64,
                left => long += left as u64,
            }
        }
        // While shorter ones wait, long prompts take half of every step: as much as they get.
        backlog += match tokens as usize {
            0..=LONG_PREFILL_TOKENS => long.min(backlog + u64::from(tokens)),
            _ => long,
        };
        Wait { slots_ns, backlog_ns: self.prefill_ns(beside, backlog, 0), beside }
    }

    /// A sequence whose wait was foreseen has its first token after `ttft_ns`.
    pub(super) fn observe_ttft(&mut self, foreseen: Foreseen, ttft_ns: u64) {
        if foreseen.ttft_ns > 0 {
            self.counters.ttft_foreseen.observe(foreseen.ttft_ns, ttft_ns);
        }
        self.hindsight.observe(foreseen.wait_ns, ttft_ns.saturating_sub(foreseen.prefill_ns));
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

    /// About how long an answer takes, beside all that run now.
    pub(super) fn answer_ns(&self) -> u64 {
        self.ends_ns((self.batch.running.len() as u64).max(1))
    }

    /// Time for prefilling `backlog` tokens of many prompts and one prompt of `tokens`, in steps
    /// that compute `beside` too.
    fn prefill_ns(&self, beside: StepLoad, backlog: u64, tokens: u32) -> u64 {
        let backlog = u32::try_from(backlog).unwrap_or(u32::MAX - tokens);
        let total = backlog.saturating_add(tokens);
        if total == 0 {
            return 0;
        }
        let steps = u64::from(total.div_ceil(self.prefill_a_step(beside)));
        let beside_ns = self.pace.predict_ns(beside);
        // A backlog is of many prompts, each short against the step's other costs: what they read
        // of their own KV is left out.
        let load = StepLoad { prefill_tokens: backlog, ..beside }.plus_prefill(0, tokens);
        let work_ns = self.pace.predict_ns(load).saturating_sub(beside_ns);
        steps.saturating_mul(beside_ns).saturating_add(work_ns)
    }
}
