//! Admission: ask → grant or refusal; submission → the queue.

use crate::base::Instant;
use crate::flow::Closed;
use crate::flow::calendar::HORIZON_MS;
use crate::message::{Ask, RequestMessage, Submission};
use crate::request::{RejectReason, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX};

use super::EngineCore;
use super::foresight::{Entry, Foreseen};
use super::ledger::{DrainMeter, Permit, Shortage};
use super::record::Flight;
use super::retry::{client, is_named};
use super::sequence::State;
use super::tenants::{Bill, Refusal};

/// While the breaker is half-open, and enough are in to see: a step later it is decided.
const PROBE_RETRY_MS: u32 = 1_000;

/// What somebody comes in with.
struct Entered {
    bill: Bill,
    permit: Permit,
    client: u64,
    foreseen: Foreseen,
}

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
        if let Some(Closed { reason, retry_after_ms }) = self.closed_gate(now) {
            return Err((reason, retry_after_ms));
        }
        if !self.breaker_lets_in(self.ledger.held().0 + self.batch.in_line(), now) {
            // Those who are in are to find out; then it is open again, or closed.
            return Err((RejectReason::NoCapacity, Some(PROBE_RETRY_MS)));
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
            Ok(entered) => {
                self.tenants.charge(&entered.bill, now);
                self.begin(front, &ask, entered, now);
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
    ) -> Result<Entered, (RejectReason, Option<u32>)> {
        let bill = self
            .tenants
            .quote(ask, bill, self.context, now)
            .map_err(|refusal| self.tenant_refusal(refusal))?;
        let client = client(ask);
        match self.enter(ask, bill.tenant, client, now) {
            Ok((permit, foreseen)) => Ok(Entered { bill, permit, client, foreseen }),
            Err((reason, wait_ns)) => {
                let retry_after_ms = wait_ns.and_then(|ns| self.promise(client, ns, now));
                Err((reason, retry_after_ms))
            }
        }
    }

    /// A stream begins, as a sequence that may be submitted.
    fn begin(&mut self, front: usize, ask: &Ask, entered: Entered, now: Instant) {
        self.meter.handle_arrival(now);
        self.counters.grants += 1;
        let index = self.sequences.take().expect("there was room");
        let sequence = &mut self.sequences[index];
        sequence.state = State::Granted;
        sequence.front = front as u8;
        sequence.stream = ask.stream;
        sequence.class = ask.class;
        sequence.arrival = self.arrivals;
        sequence.permit = entered.permit;
        sequence.client = entered.client;
        sequence.foreseen = entered.foreseen;
        sequence.bill = entered.bill;
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

    /// What a tenant is told that may not have more now. When a bucket has enough is known, however
    /// long it takes, and nobody but the tenant itself can take it away meanwhile: that needs no
    /// place in the calendar. Of streams one must end first: at the pace of now, and if they began
    /// one after the other, in an answer's time by their number.
    fn tenant_refusal(&self, refusal: Refusal) -> (RejectReason, Option<u32>) {
        let to_ms = |ns: u64| ns.div_ceil(1_000_000).max(1);
        let (reason, wait_ms) = match refusal {
            Refusal::Rate { wait_ns } => (RejectReason::TenantRate, to_ms(wait_ns)),
            Refusal::Streams(live) => {
                let wait_ns = self.answer_ns() / u64::from(live.max(1));
                (RejectReason::TooManyStreams, to_ms(wait_ns).min(HORIZON_MS))
            }
        };
        (reason, Some(u32::try_from(wait_ms).unwrap_or(u32::MAX)))
    }

    /// Lets somebody in who is not too late and finds room; otherwise says why not, and how long
    /// it takes until that is over. A place in the calendar is used up either way, unless no place
    /// could have helped.
    fn enter(
        &mut self,
        ask: &Ask,
        tenant: u32,
        client: u64,
        now: Instant,
    ) -> Result<(Permit, Foreseen), (RejectReason, Option<u64>)> {
        let entry = match self.calendar.has_place(client, now) {
            true => Entry::Place,
            false => Entry::Newcomer { kept_free: self.calendar.kept_free(now) },
        };
        let entered = self.find_room(ask, entry, tenant, now);
        let is_final = matches!(entered, Err((_, None)));
        match entry {
            Entry::Place if !is_final => self.calendar.settle(client, entered.is_ok(), now),
            // Those who give no name share their places, and must not use up each other's.
            Entry::Newcomer { .. } if entered.is_ok() && is_named(ask) => {
                self.calendar.charge(client);
            }
            Entry::Place | Entry::Newcomer { .. } => {}
        }
        entered
    }

    fn find_room(
        &mut self,
        ask: &Ask,
        entry: Entry,
        tenant: u32,
        now: Instant,
    ) -> Result<(Permit, Foreseen), (RejectReason, Option<u64>)> {
        let foreseen =
            self.foresee(ask, entry, tenant, now).map_err(|(reason, excess_ns)| match reason {
                // What is past does not come back.
                RejectReason::DeadlineExpired => (reason, None),
                _ => (reason, Some(excess_ns)),
            })?;
        let full = |meter: &DrainMeter, shortage| match meter.room_ns(now, shortage) {
            None => (RejectReason::ExceedsCapacity, None),
            wait_ns => (RejectReason::QueueFull, wait_ns),
        };
        if self.sequences.room() == 0 {
            // Only while the ends of others are still to be told: a moment.
            return Err(full(&self.meter, Shortage::Requests(1)));
        }
        // More tokens than the context are cut off: the permit need not allow for them.
        let tokens = ask.input_tokens.min(self.context);
        let kept_free = match entry {
            Entry::Place => 0,
            Entry::Newcomer { kept_free } => kept_free,
        };
        let permit = self.ledger.take(ask.class, tokens, ask.input_bytes, kept_free);
        permit.map(|permit| (permit, foreseen)).map_err(|shortage| full(&self.meter, shortage))
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
