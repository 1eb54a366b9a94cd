//! Admission: ask → grant or refusal; submission → the queue.

use crate::base::Instant;
use crate::message::{Ask, RequestMessage, Submission};
use crate::request::{RejectReason, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX};

use super::EngineCore;
use super::ledger::Shortage;
use super::record::Flight;
use super::sequence::State;

/// Requests read from one front core in one tick. A submission costs a few microseconds (its
/// tokens are checked): so many are a small part of a step.
const REQUESTS_PER_TICK: usize = 32;

impl EngineCore {
    /// Reads requests, a bounded number from each front core in turn. A front core whose answers
    /// pile up is not read from until it has returned a batch: it waits only for itself (I3).
    pub(super) fn handle_requests(&mut self, now: Instant) -> bool {
        let mut busy = self.count_refusals(now);
        let count = self.fronts.len();
        for turn in 0..count {
            let front = (self.front_first + turn) % count;
            for _ in 0..REQUESTS_PER_TICK {
                let link = &mut self.fronts[front];
                if link.answers_room() == 0 {
                    break;
                }
                let Some(message) = link.port.requests.receive() else { break };
                link.port.requests.give_back(1);
                busy = true;
                match message {
                    RequestMessage::Ask(ask) => self.handle_ask(front, &ask, now),
                    RequestMessage::Submit(submission) => self.handle_submit(*submission, now),
                }
            }
        }
        self.front_first = if count == 0 { 0 } else { (self.front_first + 1) % count };
        busy
    }

    fn handle_ask(&mut self, front: usize, ask: &Ask, now: Instant) {
        self.counters.asks += 1;
        self.load.arrived(1, now);
        let (stream, class) = (ask.stream.recorded(), ask.class as u64);
        self.note(now, Flight::Ask, [stream, class, ask.input_tokens.into()]);
        if let Err((reason, retry_after_ms)) = self.grant(front, ask, now) {
            self.counters.rejected[reason as usize] += 1;
            self.load.turned_away(1);
            let retry_ms = u64::from(retry_after_ms.unwrap_or(0));
            self.note(now, Flight::Refuse, [stream, reason as u64, retry_ms]);
            self.fronts[front].answer(ask.stream, reason, retry_after_ms);
        }
    }

    fn grant(
        &mut self,
        front: usize,
        ask: &Ask,
        now: Instant,
    ) -> Result<(), (RejectReason, Option<u32>)> {
        if self.is_draining() {
            return Err((RejectReason::ShuttingDown, None));
        }
        if self.device.lost {
            return Err((RejectReason::NoCapacity, None));
        }
        // Without credit it would be admitted only to park; so the first credit comes first.
        if ask.window_tokens == 0 {
            return Err((RejectReason::Invalid, None));
        }
        let ttft_foreseen_ns = self.foresee(ask, now)?;
        if self.sequences.room() == 0 {
            // Only while the ends of others are still to be told: a moment.
            return Err((RejectReason::QueueFull, self.retry(now, Shortage::Requests(1))));
        }
        // More tokens than the context are cut off: the permit need not allow for them.
        let tokens = ask.input_tokens.min(self.context);
        let permit = match self.ledger.take(ask.class, tokens, ask.input_bytes) {
            Ok(permit) => permit,
            Err(Shortage::Forever) => return Err((RejectReason::ExceedsCapacity, None)),
            Err(shortage) => return Err((RejectReason::QueueFull, self.retry(now, shortage))),
        };
        self.meter.handle_arrival(now);
        self.counters.grants += 1;
        let index = self.sequences.take().expect("there was room");
        let sequence = &mut self.sequences[index];
        sequence.state = State::Granted;
        sequence.front = front as u8;
        sequence.stream = ask.stream;
        sequence.class = ask.class;
        sequence.arrival = self.arrivals;
        sequence.permit = permit;
        sequence.asked_max_tokens = ask.max_tokens;
        sequence.ttft_foreseen_ns = ttft_foreseen_ns;
        sequence.credit = ask.window_tokens.min(self.limits.stream_window_tokens_max);
        sequence.times.arrived = now;
        sequence.times.deadline = ask.deadline.unwrap_or(Instant::NEVER);
        sequence.times.queue_until = now.plus_ms(self.limits.queue_ttl_ms);
        sequence.egress.grant_due = true;
        self.arrivals += 1;
        let seq = self.sequences.key(index).recorded();
        self.note(now, Flight::Grant, [ask.stream.recorded(), seq, 0]);
        self.watch(index);
        self.tell(index);
        Ok(())
    }

    fn retry(&mut self, now: Instant, shortage: Shortage) -> Option<u32> {
        self.meter.retry_after_ms(now, shortage)
    }

    fn handle_submit(&mut self, submission: Submission, now: Instant) {
        let granted = |&index: &u32| {
            let sequence = &self.sequences[index];
            sequence.state == State::Granted && sequence.stream == submission.stream
        };
        let Some(index) = self.sequences.live(submission.seq).filter(granted) else {
            // Its grant has expired, or was cancelled; the stream has been told.
            self.counters.stale_messages += 1;
            return;
        };
        if let Err(reason) = self.check_submission(index, &submission) {
            self.reject(index, reason, None, now);
            return;
        }
        let prompt_tokens = submission.tokens.len() as u32;
        let sequence = &mut self.sequences[index];
        self.ledger.shrink(&mut sequence.permit, prompt_tokens);
        sequence.state = State::Queued;
        sequence.prompt_tokens = prompt_tokens;
        sequence.output_max = submission.max_tokens.min(self.context - prompt_tokens);
        sequence.tokens = submission.tokens;
        sequence.sampling = Some(submission.sampling);
        sequence.stop = submission.stop;
        sequence.ignore_eos = submission.ignore_eos;
        let position = self.queue.push(&mut self.sequences, index);
        self.sequences[index].egress.accepted_due = Some(position);
        self.counters.accepted += 1;
        let seq = submission.seq.recorded();
        self.note(now, Flight::Accept, [seq, prompt_tokens.into(), position.into()]);
        self.tell(index);
    }

    fn check_submission(&self, index: u32, submission: &Submission) -> Result<(), RejectReason> {
        let (tokens, max_tokens) = (&submission.tokens, submission.max_tokens as usize);
        if tokens.len() as u64 >= u64::from(self.context) {
            return Err(RejectReason::ExceedsCapacity);
        }
        let stops_fit = submission.stop.len() <= STOP_STRINGS_MAX
            && submission.stop.iter().all(|s| (1..=STOP_STRING_BYTES_MAX).contains(&s.len()));
        let well_formed = !tokens.is_empty()
            && max_tokens >= 1
            && tokens.len() <= self.sequences[index].permit.tokens() as usize
            // The engine appends the output, and must not allocate for it.
            && tokens.capacity()
                >= tokens.len() + max_tokens.min(self.context as usize - tokens.len())
            && tokens.iter().all(|&token| token < self.vocab)
            && stops_fit
            && submission.sampling.check().is_ok();
        if well_formed { Ok(()) } else { Err(RejectReason::Invalid) }
    }
}
