//! Admission: ask → grant or refusal; submission → the queue.

use crate::base::Instant;
use crate::flow::gate::RETRY_MAX_MS;
use crate::message::{Ask, RequestMessage, Submission};
use crate::request::{RejectReason, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX};

use super::EngineCore;
use super::ledger::{Permit, Shortage};
use super::record::Flight;
use super::sequence::State;
use super::tenants::{Bill, Refusal};

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
        let bill = self.tenants.bill_for(ask, now);
        let class = self.tenants.class_for(&bill, ask.class);
        self.counters.classes_lowered += u64::from(class != ask.class);
        let ask = Ask { class, ..*ask };
        match self.permit(&ask, bill, now) {
            Ok((bill, permit)) => {
                self.tenants.charge(&bill, now);
                self.begin(front, &ask, bill, permit, now);
                Ok(())
            }
            Err(refusal) => {
                self.tenants.refuse(&bill);
                Err(refusal)
            }
        }
    }

    /// Asks all who have a say. Takes the queue's permit, and that last, so that a refusal takes
    /// nothing from anybody.
    fn permit(
        &mut self,
        ask: &Ask,
        bill: Bill,
        now: Instant,
    ) -> Result<(Bill, Permit), (RejectReason, Option<u32>)> {
        let bill = self
            .tenants
            .quote(ask, bill, self.context, now)
            .map_err(|refusal| self.tenant_refusal(refusal))?;
        self.foresee(ask, bill.tenant, now)?;
        if self.sequences.room() == 0 {
            // Only while the ends of others are still to be told: a moment.
            return Err((RejectReason::QueueFull, self.retry(now, Shortage::Requests(1))));
        }
        // More tokens than the context are cut off: the permit need not allow for them.
        let tokens = ask.input_tokens.min(self.context);
        match self.ledger.take(ask.class, tokens, ask.input_bytes) {
            Ok(permit) => Ok((bill, permit)),
            Err(Shortage::Forever) => Err((RejectReason::ExceedsCapacity, None)),
            Err(shortage) => Err((RejectReason::QueueFull, self.retry(now, shortage))),
        }
    }

    /// A stream begins, as a sequence that may be submitted.
    fn begin(&mut self, front: usize, ask: &Ask, bill: Bill, permit: Permit, now: Instant) {
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
        sequence.bill = bill;
        sequence.asked_max_tokens = ask.max_tokens;
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
    }

    /// What a tenant is told that may not have more now. Of streams one must end first: at the
    /// pace of now, and if they began one after the other, in an answer's time by their number.
    fn tenant_refusal(&self, refusal: Refusal) -> (RejectReason, Option<u32>) {
        let (reason, wait_ns) = match refusal {
            Refusal::Rate { wait_ns } => (RejectReason::TenantRate, wait_ns),
            Refusal::Streams(live) => {
                (RejectReason::TooManyStreams, self.answer_ns() / u64::from(live.max(1)))
            }
        };
        (reason, Some(wait_ns.div_ceil(1_000_000).clamp(1, RETRY_MAX_MS.into()) as u32))
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
        self.tenants.shrink(&mut sequence.bill, prompt_tokens, now);
        sequence.state = State::Queued;
        sequence.prompt_tokens = prompt_tokens;
        sequence.output_max = submission.max_tokens.min(self.context - prompt_tokens);
        sequence.tokens = submission.tokens;
        sequence.sampling = Some(submission.sampling);
        sequence.stop = submission.stop;
        sequence.ignore_eos = submission.ignore_eos;
        let position = self.queue.push(&mut self.sequences, &mut self.tenants.shares, index);
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
