//! A finished step: sampled tokens become output, and some of them ends.

use crate::base::Instant;
use crate::message::{Logprob, Sampled, Step, StepFailure};
use crate::request::{FinishReason, RejectReason, TokenId};

use super::EngineCore;
use super::plan;
use super::record::Flight;
use super::sequence::State;
use super::stats::Counters;

impl EngineCore {
    /// Takes in every step that has come back.
    pub(super) fn handle_results(&mut self, now: Instant) -> bool {
        let mut busy = false;
        // Asked before the ring is emptied: what a device core pushed before it went still counts.
        let gone = self.device.port.results.is_abandoned();
        while let Some(step) = self.device.port.results.pop() {
            busy = true;
            self.handle_step(&step, now);
            self.device.idle.push(step);
        }
        if gone && !self.device.lost {
            busy = true;
            self.lose_device(now);
        }
        busy
    }

    fn handle_step(&mut self, step: &Step, now: Instant) {
        let ended = |counters: &Counters| counters.finished.iter().sum::<u64>();
        let ended_before = ended(&self.counters);
        self.blocks.complete(step.plan.number);
        self.counters.steps_completed += 1;
        self.counters.device_ns += step.result.elapsed_ns;
        // What the device had the step for and did not work was lost on the way there and back.
        let had_ns = now.ns_since(self.device.since);
        self.counters.device_gap_ns += had_ns.saturating_sub(step.result.elapsed_ns);
        self.device.since = now;
        let (rows, took_ns) = (step.plan.rows.len() as u64, step.result.elapsed_ns);
        self.note(now, Flight::StepFinished, [step.plan.number, rows, took_ns]);
        if step.result.failure.is_none() {
            let load = plan::load(&step.plan);
            self.counters.step_foreseen.observe(self.pace.predict_ns(load), took_ns);
            self.learn(load, took_ns);
        }
        match step.result.failure {
            None if self.matches_its_plan(step) => {
                self.breaker.handle_success();
                self.handle_samples(step, now);
            }
            // A device that answers something else than it was asked is no better than one that
            // refuses: the rows' sequences cannot go on, the others can.
            None | Some(StepFailure::InvalidPlan) => self.fail_step(step, now),
            Some(StepFailure::DeviceLost) => {
                self.counters.step_failures += 1;
                self.lose_device(now);
            }
        }
        self.load.served(ended(&self.counters) - ended_before, step.result.elapsed_ns);
    }

    /// Whether the result has one token for each row that samples, in the rows' order.
    fn matches_its_plan(&self, step: &Step) -> bool {
        let mut sampled = step.result.sampled.iter();
        let mut top_left = step.result.top.len();
        for row in step.plan.rows.iter().filter(|row| row.sample) {
            let Some(sample) = sampled.next() else { return false };
            let Some(left) = top_left.checked_sub(usize::from(sample.top_count)) else {
                return false;
            };
            top_left = left;
            if sample.seq != row.seq || sample.token >= self.vocab {
                return false;
            }
        }
        sampled.next().is_none() && top_left == 0
    }

    fn handle_samples(&mut self, step: &Step, now: Instant) {
        let mut top = step.result.top.as_slice();
        for sample in &step.result.sampled {
            let (its_top, rest) = top.split_at(usize::from(sample.top_count));
            top = rest;
            // Rows of a sequence that has ended meanwhile are discarded.
            if let Some(index) = self.sequences.live(sample.seq) {
                self.sequences[index].samples_in_flight -= 1;
                self.handle_sample(index, sample, its_top, now);
            }
        }
    }

    fn handle_sample(
        &mut self,
        index: u32,
        sample: &Sampled,
        top: &[(TokenId, f32)],
        now: Instant,
    ) {
        let token = sample.token;
        self.time_token(index, now);
        let sequence = &mut self.sequences[index];
        if self.table.is_end(token) && !sequence.ignore_eos {
            self.finish(index, FinishReason::EndOfText, now);
            return;
        }
        assert!(sequence.tokens.len() < sequence.tokens.capacity(), "checked when submitted");
        sequence.tokens.push(token);
        self.counters.tokens_out += 1;
        self.tenants.produce(&sequence.bill);
        if sequence.wants_logprobs() {
            let kept = top.len().min(sequence.egress.top.capacity() - sequence.egress.top.len());
            sequence.egress.top.extend_from_slice(&top[..kept]);
            let entry = Logprob { logprob: sample.logprob, top_count: kept as u8 };
            sequence.egress.logprobs.push(entry);
        }
        let bytes = self.table.bytes(token);
        let text_before = sequence.egress.text_total;
        sequence.egress.text_total += bytes.len() as u64;
        let hit = sequence.matcher.feed(&sequence.stop, bytes, &mut self.borders);
        if let Some(hit) = hit {
            sequence.egress.text_total = text_before + hit.consumed as u64 - hit.length as u64;
            self.finish(index, FinishReason::StopString, now);
            return;
        }
        let held = sequence.matcher.held_bytes() as u64;
        sequence.egress.text_ready = sequence.egress.text_total - held;
        if sequence.output_tokens() >= sequence.output_max {
            let asked = sequence.asked_max_tokens;
            let as_asked = asked != 0 && sequence.output_tokens() >= asked;
            let full = sequence.tokens.len() >= self.context as usize;
            let why = match full && !as_asked {
                true => FinishReason::ContextFull,
                false => FinishReason::MaxTokens,
            };
            self.finish(index, why, now);
            return;
        }
        self.tell(index);
    }

    /// Notes when a token came.
    fn time_token(&mut self, index: u32, now: Instant) {
        let sequence = &mut self.sequences[index];
        let before = std::mem::replace(&mut sequence.times.last_token, now);
        if sequence.times.first_token.is_some() {
            self.histograms.itl.observe(now.ns_since(before));
            return;
        }
        sequence.times.first_token = Some(now);
        let ttft_ns = now.ns_since(sequence.times.arrived);
        self.histograms.ttft.observe(ttft_ns);
        let foreseen = sequence.foreseen;
        self.observe_ttft(foreseen, ttft_ns);
        let seq = self.sequences.key(index).recorded();
        self.note(now, Flight::FirstToken, [seq, ttft_ns, 0]);
    }

    /// Nothing of the step was computed: its sequences' KV is not what the engine thinks.
    fn fail_step(&mut self, step: &Step, now: Instant) {
        self.counters.step_failures += 1;
        self.breaker.handle_failure(now);
        for row in &step.plan.rows {
            if let Some(index) = self.sequences.live(row.seq) {
                self.finish(index, FinishReason::DeviceFailed, now);
            }
        }
    }

    /// The device is gone, and all KV with it. Whoever is admitted ends, whoever waits is told to
    /// go elsewhere, and nobody comes in any more.
    pub(super) fn lose_device(&mut self, now: Instant) {
        self.device.lost = true;
        self.note(now, Flight::DeviceLost, [0; 3]);
        (self.blocked_until, self.expiry) = (Instant::NEVER, Instant::NEVER);
        for index in 0..self.sequences.capacity() as u32 {
            match self.sequences[index].state {
                State::Free | State::Ended => {}
                State::Granted | State::Queued => {
                    self.reject(index, RejectReason::NoCapacity, None, now);
                }
                State::Running { .. } | State::Waiting | State::Parked => {
                    self.finish(index, FinishReason::DeviceFailed, now);
                }
            }
        }
    }
}
