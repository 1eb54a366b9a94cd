//! The way out: what sequences have to tell becomes event batches.
//!
//! Each sequence holds what it has still to tell in a fixed place: its grant, its queue position,
//! its unsent tokens, whether it is paused, its end. So a front core that is slow to return
//! batches costs nothing but time, and what happens meanwhile (paused and resumed, say) merges.

use std::collections::VecDeque;

use crate::base::{Instant, TokenTable};
use crate::limits::Limits;
use crate::message::{EVENT_BATCHES, Event, EventBatch, SeqKey, StreamKey};
use crate::ports::FrontPort;
use crate::request::{RejectReason, SamplingParams};

use super::EngineCore;
use super::bounded;
use super::record::Flight;
use super::sequence::{Sequence, State, Terminal};

/// A front core as the engine sees it.
#[derive(Debug)]
pub(super) struct FrontLink {
    pub port: FrontPort,
    /// Batches not on their way: holding one is the credit to send it.
    #[expect(clippy::vec_box, reason = "the box is what travels")]
    idle: Vec<Box<EventBatch>>,
    /// Refusals of asks that never became sequences, oldest first.
    pub answers: VecDeque<Answer>,
    answers_max: usize,
    /// Sequences with something to tell, each once.
    pub listed: VecDeque<u32>,
    /// There was something to tell and no batch for it; recorded when it begins.
    is_held_up: bool,
    /// Nobody is there any more.
    pub departed: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    stream: StreamKey,
    reason: RejectReason,
    retry_after_ms: Option<u32>,
}

impl FrontLink {
    pub fn new(port: FrontPort, limits: &Limits) -> FrontLink {
        let answers_max = limits.asks_max as usize;
        FrontLink {
            port,
            idle: (0..EVENT_BATCHES).map(|_| new_batch(limits)).collect(),
            answers: bounded(answers_max),
            answers_max,
            listed: bounded(limits.sequences_max() as usize),
            is_held_up: false,
            departed: false,
        }
    }

    /// How many more refusals there is room for.
    pub fn answers_room(&self) -> usize {
        self.answers_max - self.answers.len()
    }

    pub fn answer(&mut self, stream: StreamKey, reason: RejectReason, retry_after_ms: Option<u32>) {
        debug_assert!(self.answers_room() > 0);
        self.answers.push_back(Answer { stream, reason, retry_after_ms });
    }

    /// A batch is back.
    pub fn handle_return(&mut self, mut batch: Box<EventBatch>) {
        assert!(self.idle.len() < EVENT_BATCHES, "more batches come back than were sent (I1)");
        batch.clear();
        self.idle.push(batch);
    }

    pub fn batches_idle(&self) -> usize {
        self.idle.len()
    }
}

/// A batch with room for what one step can produce, and for a full load of answers. What does not
/// fit goes with the next.
fn new_batch(limits: &Limits) -> Box<EventBatch> {
    let rows = limits.running_max as usize;
    // A step's tokens, once more for what piled up, and at least a handful.
    let tokens = (2 * rows).max(16);
    let logprobs = tokens;
    Box::new(EventBatch {
        // Tokens, paused or resumed, and end of every row, and an answer to every ask.
        events: Vec::with_capacity(3 * rows + 2 * limits.asks_max as usize + 16),
        tokens: Vec::with_capacity(tokens),
        // Tokens of prose have 4 to 5 bytes.
        text: Vec::with_capacity(tokens * 16),
        logprobs: Vec::with_capacity(logprobs),
        top: Vec::with_capacity(logprobs * usize::from(SamplingParams::TOP_LOGPROBS_MAX)),
    })
}

fn room<T>(list: &Vec<T>) -> usize {
    list.capacity() - list.len()
}

impl EngineCore {
    /// Sends each front core one batch with what there is to tell, if it has returned one.
    pub(super) fn flush_events(&mut self, now: Instant) -> bool {
        let mut busy = false;
        for front in 0..self.fronts.len() {
            busy |= self.flush_front(front, now);
        }
        busy
    }

    fn flush_front(&mut self, front: usize, now: Instant) -> bool {
        let link = &self.fronts[front];
        if link.answers.is_empty() && link.listed.is_empty() {
            return false;
        }
        if link.departed {
            self.forget_front(front);
            return true;
        }
        let Some(mut batch) = self.fronts[front].idle.pop() else {
            self.note_held_up(front, now);
            return false;
        };
        self.fronts[front].is_held_up = false;
        while room(&batch.events) > 0
            && let Some(answer) = self.fronts[front].answers.pop_front()
        {
            let Answer { stream, reason, retry_after_ms } = answer;
            batch.events.push(Event::Reject { stream, reason, retry_after_ms });
        }
        while let Some(&index) = self.fronts[front].listed.front() {
            let key = self.sequences.key(index);
            if !write_events(&mut batch, key, &mut self.sequences[index], &self.table) {
                break;
            }
            self.fronts[front].listed.pop_front();
            self.sequences[index].egress.listed = false;
            match self.sequences[index].state {
                State::Ended => self.forget(index),
                State::Parked => {
                    self.sequences[index].times.stalled_since.get_or_insert(now);
                    self.watch(index);
                }
                _ => {}
            }
        }
        let link = &mut self.fronts[front];
        match link.port.events.push(batch) {
            Ok(()) => {
                self.counters.event_batches += 1;
                link.port.bell.ring();
            }
            // The ring has room for every batch that circulates (I2); so the front core is gone,
            // which the next tick will see.
            Err(refused) => link.idle.push(refused.into_item()),
        }
        true
    }

    /// The front core sits on all batches: what its streams are told waits.
    fn note_held_up(&mut self, front: usize, now: Instant) {
        let link = &mut self.fronts[front];
        let waiting = (link.answers.len() + link.listed.len()) as u64;
        if !std::mem::replace(&mut link.is_held_up, true) {
            self.note(now, Flight::BatchesOut, [front as u64, waiting, 0]);
        }
    }

    /// Nobody listens: what there is to tell is told to nobody.
    fn forget_front(&mut self, front: usize) {
        self.fronts[front].answers.clear();
        while let Some(index) = self.fronts[front].listed.pop_front() {
            self.sequences[index].egress.listed = false;
            if self.sequences[index].state == State::Ended {
                self.forget(index);
            }
        }
    }

    /// A sequence's end is told: its slot and its place among the admitted are free.
    fn forget(&mut self, index: u32) {
        if self.sequences[index].admission > 0 {
            self.batch.admitted -= 1;
        }
        self.sequences.give(index);
    }
}

/// Writes all that the sequence has to tell, in the order in which it happened. Returns false if
/// the batch is full before that; the rest stays with the sequence.
fn write_events(
    batch: &mut EventBatch,
    key: SeqKey,
    sequence: &mut Sequence,
    table: &TokenTable,
) -> bool {
    let stream = sequence.stream;
    if sequence.egress.grant_due {
        if room(&batch.events) == 0 {
            return false;
        }
        sequence.egress.grant_due = false;
        batch.events.push(Event::Grant { stream, seq: key });
    }
    if let Some(position) = sequence.egress.accepted_due {
        if room(&batch.events) == 0 {
            return false;
        }
        sequence.egress.accepted_due = None;
        let prompt_tokens = sequence.prompt_tokens;
        batch.events.push(Event::Accepted { stream, position, prompt_tokens });
    }
    if !write_output(batch, sequence, table) {
        return false;
    }
    let paused = sequence.state == State::Parked;
    if paused != sequence.egress.paused_told && sequence.is_live() {
        if room(&batch.events) == 0 {
            return false;
        }
        sequence.egress.paused_told = paused;
        let event = if paused { Event::Paused { stream } } else { Event::Resumed { stream } };
        batch.events.push(event);
    }
    if let Some(terminal) = sequence.egress.terminal {
        if room(&batch.events) == 0 {
            return false;
        }
        sequence.egress.terminal = None;
        batch.events.push(match terminal {
            Terminal::Done { finish, usage, timings } => {
                Event::Done { stream, finish, usage, timings }
            }
            Terminal::Reject { reason, retry_after_ms } => {
                Event::Reject { stream, reason, retry_after_ms }
            }
        });
    }
    true
}

/// Writes unsent tokens and text as far as they fit. Returns whether all of it did.
fn write_output(batch: &mut EventBatch, sequence: &mut Sequence, table: &TokenTable) -> bool {
    let unsent = sequence.tokens_unsent() as usize;
    let text_unsent = sequence.egress.text_ready - sequence.egress.text_sent;
    if unsent == 0 && text_unsent == 0 {
        return true;
    }
    if room(&batch.events) == 0 {
        return false;
    }
    let mut token_count = unsent.min(room(&batch.tokens));
    let mut logprob_count = 0;
    if sequence.wants_logprobs() {
        token_count = write_logprobs(batch, sequence, token_count);
        logprob_count = token_count;
    }
    let first = (sequence.prompt_tokens + sequence.egress.tokens_sent) as usize;
    batch.tokens.extend_from_slice(&sequence.tokens[first..first + token_count]);
    sequence.egress.tokens_sent += token_count as u32;
    let text_bytes = write_text(batch, sequence, table, text_unsent as usize);
    if token_count > 0 || text_bytes > 0 {
        batch.events.push(Event::Tokens {
            stream: sequence.stream,
            token_count: token_count as u32,
            text_bytes: text_bytes as u32,
            logprob_count: logprob_count as u32,
        });
    }
    token_count == unsent && text_bytes == text_unsent as usize
}

/// Moves the log-probabilities of up to `limit` tokens into the batch; returns of how many.
fn write_logprobs(batch: &mut EventBatch, sequence: &mut Sequence, limit: usize) -> usize {
    let (mut count, mut top_count) = (0, 0);
    for entry in sequence.egress.logprobs.iter().take(limit.min(room(&batch.logprobs))) {
        let with_it = top_count + usize::from(entry.top_count);
        if with_it > room(&batch.top) {
            break;
        }
        (count, top_count) = (count + 1, with_it);
    }
    batch.logprobs.extend(sequence.egress.logprobs.drain(..count));
    batch.top.extend(sequence.egress.top.drain(..top_count));
    count
}

/// Copies up to `limit` bytes of the sequence's text, token by token, from where it was left: the
/// text of tokens that were sent, no more, since text may lag its tokens and never run ahead.
fn write_text(
    batch: &mut EventBatch,
    sequence: &mut Sequence,
    table: &TokenTable,
    limit: usize,
) -> usize {
    let limit = limit.min(room(&batch.text));
    let egress = &mut sequence.egress;
    let mut written = 0;
    while written < limit && egress.cursor_token < egress.tokens_sent {
        let at = (sequence.prompt_tokens + egress.cursor_token) as usize;
        let left = &table.bytes(sequence.tokens[at])[egress.cursor_bytes as usize..];
        let count = left.len().min(limit - written);
        batch.text.extend_from_slice(&left[..count]);
        written += count;
        if count == left.len() {
            egress.cursor_token += 1;
            egress.cursor_bytes = 0;
        } else {
            egress.cursor_bytes += count as u32;
        }
    }
    egress.text_sent += written as u64;
    written
}
