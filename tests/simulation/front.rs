//! A front core and its clients in one, speaking messages straight to the engine: it can do what
//! a correct front core does, at the worst moments, and from several cores at once.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay::base::{Instant, Prng, TokenTable};
use forebay::limits::Limits;
use forebay::message::{
    Ask, ControlMessage, EVENT_BATCHES, Event, EventBatch, RequestMessage, StreamKey, Submission,
};
use forebay::ports::FrontEnds;
use forebay::request::{FinishReason, RejectReason};

use crate::options::Options;
use crate::request::{Cursor, End, Plan, Request};
use crate::side::Side;
use crate::world::Seen;

pub struct Front {
    number: u8,
    requests: Vec<Request>,
    ends: FrontEnds,
    limits: Limits,
    context: u32,
    table: Arc<TokenTable>,
    prng: Prng,
    batch_held_us: u64,
    held: VecDeque<(Instant, Box<EventBatch>)>,
    asks_unanswered: u32,
    faults: bool,
    draining: bool,
}

impl Front {
    pub fn new(
        number: u8,
        ends: FrontEnds,
        options: &Options,
        context: u32,
        table: &Arc<TokenTable>,
        prng: Prng,
        plans: Vec<Plan>,
    ) -> Front {
        let key = |slot| StreamKey { front: number, slot, generation: slot ^ 0x55 };
        let requests = (0..)
            .zip(plans)
            .map(|(slot, plan)| Request::new(plan, key(slot), options.limits.stall_timeout_ms));
        Front {
            number,
            requests: requests.collect(),
            ends,
            limits: options.limits.clone(),
            context,
            table: Arc::clone(table),
            prng,
            batch_held_us: options.batch_held_us,
            held: VecDeque::new(),
            asks_unanswered: 0,
            faults: true,
            draining: false,
        }
    }

    fn lines(&self) -> impl Iterator<Item = String> {
        self.requests.iter().filter(|request| !request.is_over()).map(|request| {
            format!(
                "front {}: stream {} asked {:?} granted {:?} submitted {} cancelled {} tokens {} \
                 credit given {} paused {:?}",
                self.number,
                request.key.slot,
                request.asked_at.map(Instant::as_ns),
                request.granted.map(|(seq, _)| seq),
                request.submitted,
                request.cancelled,
                request.output_tokens(),
                request.credit_given,
                request.paused_at.map(Instant::as_ns),
            )
        })
    }

    fn receive(&mut self, now: Instant) -> Result<bool, String> {
        let mut busy = false;
        while let Some(batch) = self.ends.events.pop() {
            busy = true;
            let mut cursor = Cursor::default();
            for event in &batch.events {
                let key = stream_of(event);
                let Some(request) = self.requests.get_mut(key.slot as usize) else {
                    return Err(format!("{event:?} for nobody"));
                };
                if request.key != key {
                    return Err(format!("{event:?} for a key that never was"));
                }
                let answers = matches!(event, Event::Grant { .. })
                    || matches!(event, Event::Reject { .. }) && request.granted.is_none();
                self.asks_unanswered -= u32::from(answers);
                request
                    .handle(event, &batch, &mut cursor, now, &self.table)
                    .map_err(|what| format!("request {key:?}: {what}"))?;
            }
            if !cursor.is_at_end(&batch) {
                return Err("a batch holds more than its events say".into());
            }
            let most_us = if self.faults { self.batch_held_us } else { 0 };
            let until = now.plus_ns(1_000 * self.prng.between(0, most_us));
            let until = self.held.back().map_or(until, |(last, _)| until.max(*last));
            self.held.push_back((until, batch));
        }
        Ok(busy)
    }

    fn give_back(&mut self, now: Instant) -> bool {
        let mut busy = false;
        while let Some((until, _)) = self.held.front()
            && *until <= now
            && let Some((_, batch)) = self.held.pop_front()
        {
            let pushed = self.ends.control.push(ControlMessage::Return(batch));
            assert!(pushed.is_ok(), "there is always room for batches on their way back");
            busy = true;
        }
        busy
    }

    /// Does what is due for one request.
    fn advance(&mut self, at: usize, now: Instant) -> bool {
        let request = &mut self.requests[at];
        if request.is_over() || request.plan.at > now {
            return false;
        }
        if request.asked_at.is_none() {
            return self.ask(at, now);
        }
        let mut busy = request.read(now, self.faults);
        let Some((seq, granted_at)) = request.granted else { return busy };
        // Batches on their way back always find room.
        let room = self.ends.control.free().saturating_sub(EVENT_BATCHES);
        if room == 0 {
            return busy;
        }
        if !request.cancelled && request.cancel_at().is_some_and(|at| at <= now) {
            request.cancelled = true;
            request.must_end(now);
            let cancel = ControlMessage::Cancel { seq, reason: FinishReason::Cancelled };
            assert!(self.ends.control.push(cancel).is_ok());
            return true;
        }
        if request.credit_due > 0 {
            let tokens = std::mem::take(&mut request.credit_due);
            request.credit_given += tokens;
            request.credit_given_at = now;
            assert!(self.ends.control.push(ControlMessage::Credit { seq, tokens }).is_ok());
            busy = true;
        }
        let due = granted_at.plus_ns(request.plan.tokenise_ns) <= now;
        if due && request.plan.submits && !request.submitted && !request.cancelled {
            busy |= self.submit(at);
        }
        busy
    }

    fn ask(&mut self, at: usize, now: Instant) -> bool {
        if self.asks_unanswered == self.limits.asks_max || self.ends.requests.credits() == 0 {
            return false;
        }
        let request = &mut self.requests[at];
        let prompt = request.plan.question.prompt.len() as u32;
        let ask = Ask {
            stream: request.key,
            class: request.plan.class,
            tenant: request.plan.tenant,
            user: request.plan.user,
            input_bytes: 4 * prompt,
            input_tokens: prompt + self.prng.between(0, 20) as u32,
            max_tokens: request.plan.question.max_tokens,
            deadline: request.plan.deadline,
            window_tokens: request.plan.window,
        };
        let sent = self.ends.requests.send(RequestMessage::Ask(ask));
        if sent.is_err() {
            // The engine never goes; so this is a link that lies about its credits.
            request.end = Some(End::Rejected(RejectReason::NoCapacity));
            return false;
        }
        request.asked_at = Some(now);
        self.asks_unanswered += 1;
        true
    }

    fn submit(&mut self, at: usize) -> bool {
        if self.ends.requests.credits() == 0 {
            return false;
        }
        let request = &mut self.requests[at];
        let question = &request.plan.question;
        let (seq, _) = request.granted.expect("asked for");
        let prompt = question.prompt.len() as u32;
        // What a front core would do: the context bounds what was not said. It may even say more
        // than fits; the engine knows better.
        let fitting = self.context.saturating_sub(prompt).max(1);
        let max_tokens = match question.max_tokens {
            0 => fitting,
            asked => asked,
        };
        let mut tokens = Vec::with_capacity((prompt + max_tokens) as usize);
        tokens.extend_from_slice(&question.prompt);
        let submission = Submission {
            stream: request.key,
            seq,
            tokens,
            max_tokens,
            sampling: Arc::new(question.sampling.clone()),
            stop: question.stop.clone(),
            ignore_eos: question.ignore_eos,
        };
        let sent = self.ends.requests.send(RequestMessage::Submit(Box::new(submission)));
        assert!(sent.is_ok(), "there was a credit");
        request.submitted = true;
        request.submitted_late = self.draining;
        true
    }
}

impl Side for Front {
    fn tick(&mut self, now: Instant) -> Result<bool, String> {
        let mut busy = self.receive(now)?;
        if let Some(late) = self.requests.iter().find(|request| request.is_overdue(now)) {
            return Err(format!("request {:?} is overdue: cancelled or drained", late.key));
        }
        busy |= self.give_back(now);
        for at in 0..self.requests.len() {
            busy |= self.advance(at, now);
        }
        if busy {
            self.ends.engine_bell.ring();
        }
        Ok(busy)
    }

    /// What is due already waits for the engine: for an answer, or for room on a ring.
    fn next_timeout(&self, now: Instant) -> Option<Instant> {
        let held = self.held.front().map(|(until, _)| *until);
        let requests = self.requests.iter().filter(|request| !request.is_over());
        let of_request = |request: &Request| {
            let ask = request.asked_at.is_none().then_some(request.plan.at);
            let submit = match request.granted {
                Some((_, at)) if request.plan.submits && !request.submitted => {
                    Some(at.plus_ns(request.plan.tokenise_ns))
                }
                _ => None,
            };
            let cancel = request.cancel_at().filter(|_| !request.cancelled);
            let read = request.next_read(self.faults);
            [ask, submit, cancel, read].into_iter().flatten().filter(|at| *at > now).min()
        };
        requests.filter_map(of_request).chain(held).filter(|at| *at > now).min()
    }

    fn become_calm(&mut self) {
        self.faults = false;
    }

    /// Clients are told nothing: the engine refuses and ends what it must.
    fn begin_drain(&mut self, _now: Instant, until: Instant) {
        self.draining = true;
        self.requests.iter_mut().for_each(|request| request.must_end(until));
    }

    fn is_over(&self) -> bool {
        self.requests.iter().all(Request::is_over)
    }

    fn is_empty(&self) -> bool {
        self.is_over()
    }

    fn batches_held(&self) -> usize {
        self.held.len()
    }

    fn check_links(&mut self, batches_idle: usize) -> Result<(), String> {
        let here = batches_idle + self.held.len() + self.ends.events.len();
        // Batches on their way back are in the control ring, with other messages.
        let control = self.ends.control.capacity() - self.ends.control.free();
        if here > EVENT_BATCHES || here + control < EVENT_BATCHES {
            return Err(format!("front {}: not {EVENT_BATCHES} batches (I1)", self.number));
        }
        Ok(())
    }

    fn check_links_at_end(&mut self) -> Result<(), String> {
        let (credits, capacity) = (self.ends.requests.credits(), self.ends.requests.capacity());
        if credits != capacity {
            return Err(format!("front {}: {credits} of {capacity} credits (I1)", self.number));
        }
        Ok(())
    }

    fn work(&self) -> (u64, u64) {
        self.requests.iter().fold((0, 0), |(tokens, read_ms), request| {
            let Plan { question, answer, read_ns, .. } = &request.plan;
            let output = answer.tokens.len() as u64;
            (tokens + question.prompt.len() as u64 + output, read_ms + read_ns * output / 1_000_000)
        })
    }

    fn count(&self, seen: &mut Seen) {
        self.requests.iter().filter_map(|request| request.end).for_each(|end| seen.count(end));
    }

    fn rejected(&self) -> Option<u64> {
        None
    }

    fn pending(&self) -> Vec<String> {
        self.lines().collect()
    }
}

fn stream_of(event: &Event) -> StreamKey {
    match *event {
        Event::Grant { stream, .. }
        | Event::Reject { stream, .. }
        | Event::Accepted { stream, .. }
        | Event::Tokens { stream, .. }
        | Event::Paused { stream }
        | Event::Resumed { stream }
        | Event::Done { stream, .. } => stream,
    }
}
