//! What does not wait behind requests: credits, cancels, returned batches; and time: deadlines,
//! stalls, the drain.

use crate::base::Instant;
use crate::message::{ControlMessage, SeqKey};
use crate::request::{FinishReason, RejectReason};

use super::record::Flight;
use super::sequence::State;
use super::{Drain, EngineCore};

impl EngineCore {
    /// Empties every control ring. Bounded: a ring holds so much, and what a front core adds
    /// meanwhile waits for the next tick.
    pub(super) fn handle_control(&mut self, now: Instant) -> bool {
        let mut busy = false;
        for front in 0..self.fronts.len() {
            for _ in 0..self.fronts[front].port.control.len() {
                let Some(message) = self.fronts[front].port.control.pop() else { break };
                busy = true;
                match message {
                    ControlMessage::Credit { seq, tokens } => self.handle_credit(seq, tokens, now),
                    ControlMessage::Cancel { seq, reason } => self.handle_cancel(seq, reason, now),
                    ControlMessage::Return(batch) => self.fronts[front].handle_return(batch),
                }
            }
            busy |= self.handle_departed_front(front, now);
        }
        busy
    }

    fn handle_credit(&mut self, seq: SeqKey, tokens: u32, now: Instant) {
        let Some(index) = self.sequences.live(seq) else {
            self.counters.stale_messages += 1;
            return;
        };
        let sequence = &mut self.sequences[index];
        // A window larger than allowed would let more output pile up than memory was set aside
        // for. The front core counts the same way, so this does not happen; if it does, it shows.
        let window = self.limits.stream_window_tokens_max;
        let granted = tokens.min(window.saturating_sub(sequence.credit));
        self.counters.excess_credit += u64::from(tokens - granted);
        sequence.credit += granted;
        if sequence.state == State::Parked && sequence.credit > 0 {
            self.resume(index, now);
        }
    }

    fn handle_cancel(&mut self, seq: SeqKey, reason: FinishReason, now: Instant) {
        match self.sequences.live(seq) {
            Some(index) => self.finish(index, reason, now),
            None => self.counters.stale_messages += 1,
        }
    }

    /// A front core that is gone takes its sequences with it: nobody is left to tell.
    fn handle_departed_front(&mut self, front: usize, now: Instant) -> bool {
        if self.fronts[front].departed || !self.fronts[front].port.events.is_abandoned() {
            return false;
        }
        self.fronts[front].departed = true;
        self.note(now, Flight::FrontGone, [front as u64, 0, 0]);
        for index in 0..self.sequences.capacity() as u32 {
            let sequence = &self.sequences[index];
            if usize::from(sequence.front) == front && sequence.is_live() {
                self.finish(index, FinishReason::Cancelled, now);
            }
        }
        true
    }

    /// Ends what has waited too long. Looks at every sequence, but only when the earliest known
    /// expiry has come.
    pub(super) fn handle_timeouts(&mut self, now: Instant) -> bool {
        let mut busy = false;
        if now >= self.expiry {
            busy = true;
            self.expiry = Instant::NEVER;
            for index in 0..self.sequences.capacity() as u32 {
                if self.sequences[index].expires(self.limits.stall_timeout_ms) <= now {
                    self.expire(index, now);
                } else {
                    self.watch(index);
                }
            }
        }
        if self.hung_at() <= now && self.breaker.retry_ns(now).is_none() {
            busy = true;
            self.breaker.handle_hang(now);
            self.note(now, Flight::StepHangs, [self.device.submitted, 0, 0]);
        }
        if let Drain::Until(deadline) = self.drain
            && now >= deadline
        {
            busy = true;
            self.drain = Drain::Over;
            for index in 0..self.sequences.capacity() as u32 {
                if self.sequences[index].is_live() {
                    self.finish(index, FinishReason::ShuttingDown, now);
                }
            }
        }
        busy
    }

    /// When the step at the device counts as hung.
    fn hung_at(&self) -> Instant {
        let is_watched =
            self.steps_in_flight() > 0 && !self.device.lost && self.limits.breaker_failures_max > 0;
        match is_watched {
            true => self.device.since.plus_ms(self.limits.hung_step_ms),
            false => Instant::NEVER,
        }
    }

    /// When the breaker wants to be asked again: as long as it is open, when that is over.
    pub(super) fn breaker_timeout(&self) -> Instant {
        self.breaker.opens_at(self.ticked).unwrap_or_else(|| self.hung_at())
    }

    fn expire(&mut self, index: u32, now: Instant) {
        let sequence = &self.sequences[index];
        let past_deadline = sequence.times.deadline <= now;
        if sequence.is_admitted() {
            let why = if past_deadline { FinishReason::Deadline } else { FinishReason::Stalled };
            self.finish(index, why, now);
        } else if past_deadline {
            self.reject(index, RejectReason::DeadlineExpired, None, now);
        } else {
            let ahead = u64::from(self.ledger.held().0);
            let wait_ns = self.meter.wait_ns(now, ahead).unwrap_or(0);
            let retry_after_ms = self.promise(self.sequences[index].client, wait_ns, now);
            self.reject(index, RejectReason::QueueTtlExpired, retry_after_ms, now);
        }
    }

    /// From now on nothing new comes in. What has not been admitted is refused at once, so that
    /// its client can go elsewhere early; what is admitted may finish until `deadline`, then it
    /// ends as [`FinishReason::ShuttingDown`]. A second call can only move the deadline.
    pub fn begin_drain(&mut self, now: Instant, deadline: Instant) {
        if self.drain == Drain::Over {
            return;
        }
        let begun = self.drain != Drain::Off;
        self.drain = Drain::Until(deadline);
        if begun {
            return;
        }
        self.note(now, Flight::Drain, [deadline.ns_since(now), 0, 0]);
        for index in 0..self.sequences.capacity() as u32 {
            if matches!(self.sequences[index].state, State::Granted | State::Queued) {
                self.reject(index, RejectReason::ShuttingDown, None, now);
            }
        }
    }

    /// Whether a drain has begun.
    pub fn is_draining(&self) -> bool {
        self.drain != Drain::Off
    }

    /// Whether a drain is complete: every sequence is over and its end is on its way.
    pub fn is_drained(&self) -> bool {
        self.is_draining()
            && self.sequences.len() == 0
            && self.fronts.iter().all(|front| front.answers.is_empty())
            && (self.steps_in_flight() == 0 || self.device.lost)
    }
}
