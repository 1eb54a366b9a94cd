//! What the engine tells, as frames.

use super::connection::Connection;
use super::core::FrontCore;
use super::record::Flight;
use super::stream::{Phase, slab_key};
use crate::base::{Instant, SlabKey};
use crate::message::{Event, EventBatch, SeqKey};
use crate::protocol::{
    Accepted, Done, Rejected, ServerFrame, TokensWriter, limits::TOKENS_PER_FRAME_MAX,
};
use crate::request::{FinishReason, RejectReason, Timings, Usage};

/// Where in a batch's shared runs the next event's part begins.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    tokens: usize,
    text: usize,
    logprobs: usize,
    top: usize,
}

/// One stream's output in a batch.
struct Output<'a> {
    tokens: &'a [u32],
    text: &'a [u8],
    logprobs: &'a [crate::message::Logprob],
    top: &'a [(u32, f32)],
}

impl Cursor {
    /// The parts of the next [`Event::Tokens`].
    fn take<'a>(
        &mut self,
        batch: &'a EventBatch,
        token_count: u32,
        text_bytes: u32,
        logprob_count: u32,
    ) -> Output<'a> {
        let mut after = *self;
        after.tokens += token_count as usize;
        after.text += text_bytes as usize;
        after.logprobs += logprob_count as usize;
        let logprobs = &batch.logprobs[self.logprobs..after.logprobs];
        after.top += logprobs.iter().map(|entry| usize::from(entry.top_count)).sum::<usize>();
        let output = Output {
            tokens: &batch.tokens[self.tokens..after.tokens],
            text: &batch.text[self.text..after.text],
            logprobs,
            top: &batch.top[self.top..after.top],
        };
        *self = after;
        output
    }
}

impl FrontCore {
    pub(super) fn handle_batch(&mut self, batch: &EventBatch, now: Instant) {
        let mut cursor = Cursor::default();
        for &event in &batch.events {
            self.handle_event(batch, event, &mut cursor, now);
        }
        assert_eq!(cursor.tokens, batch.tokens.len(), "every token belongs to an event");
        assert_eq!(cursor.text, batch.text.len(), "every byte of text belongs to an event");
    }

    fn handle_event(
        &mut self,
        batch: &EventBatch,
        event: Event,
        cursor: &mut Cursor,
        now: Instant,
    ) {
        let front = self.settings.front;
        match event {
            Event::Grant { stream, seq } => self.handle_grant(slab_key(front, stream), seq, now),
            Event::Reject { stream, reason, retry_after_ms } => {
                self.handle_reject(slab_key(front, stream), reason, retry_after_ms, now);
            }
            Event::Accepted { stream, position, prompt_tokens } => {
                self.handle_accepted_event(slab_key(front, stream), position, prompt_tokens);
            }
            Event::Tokens { stream, token_count, text_bytes, logprob_count } => {
                let output = cursor.take(batch, token_count, text_bytes, logprob_count);
                self.handle_output(slab_key(front, stream), &output);
            }
            Event::Paused { stream } => {
                let key = slab_key(front, stream);
                self.put_output(key, 0, |number, out| {
                    ServerFrame::Paused { stream: number }.encode(out);
                });
            }
            Event::Resumed { stream } => {
                let key = slab_key(front, stream);
                self.put_output(key, 0, |number, out| {
                    ServerFrame::Resumed { stream: number }.encode(out);
                });
            }
            Event::Done { stream, finish, usage, timings } => {
                let key = slab_key(front, stream);
                self.counters.requests_done += 1;
                let (its, seq) = self.recorded(key);
                self.note(now, Flight::Done, [its, seq, finish as u64]);
                self.finish_text(key);
                let done = Done { finish, usage, timings };
                self.tell_last(key, now, |number, out| {
                    ServerFrame::Done { stream: number, done }.encode(out);
                });
                self.forget(key);
            }
        }
    }

    fn handle_grant(&mut self, key: SlabKey, seq: SeqKey, now: Instant) {
        self.pipeline.end_ask();
        let stream = self.pipeline.streams.get_mut(key).expect("an ask keeps its stream");
        assert_eq!(stream.phase, Phase::Asked, "a grant without an ask");
        stream.seq = Some(seq);
        let conn = stream.conn;
        let cancel = stream.cancel;
        let (its, seq) = self.recorded(key);
        self.note(now, Flight::Granted, [its, seq, 0]);
        self.begin_body(key, now);
        if let Some(reason) = cancel {
            self.cancel(key, reason);
        }
        self.unheld.extend(conn);
    }

    fn handle_reject(
        &mut self,
        key: SlabKey,
        reason: RejectReason,
        retry_after_ms: Option<u32>,
        now: Instant,
    ) {
        let stream = self.pipeline.streams.get_mut(key).expect("its last event is this one");
        if stream.phase == Phase::Asked {
            self.pipeline.end_ask();
        }
        self.counters.requests_rejected += 1;
        let (its, retry_ms) = (self.recorded(key).0, u64::from(retry_after_ms.unwrap_or(0)));
        self.note(now, Flight::Rejected, [its, reason as u64, retry_ms]);
        let stream = self.pipeline.streams.get_mut(key).expect("looked up above");
        let conn = stream.conn;
        if let Some(finish) = stream.cancel {
            // The client asked for an end before it was refused: that is what it hears.
            self.tell_done(key, finish, now);
        } else {
            let rejected = Rejected { reason, retry_after_ms, message: reject_message(reason) };
            self.tell_last(key, now, |number, out| {
                ServerFrame::Rejected { stream: number, rejected }.encode(out);
            });
        }
        self.forget(key);
        self.unheld.extend(conn);
    }

    fn handle_accepted_event(&mut self, key: SlabKey, position: u32, prompt_tokens: u32) {
        let stream = self.pipeline.streams.get_mut(key).expect("its last event is to come");
        let Some(conn) = stream.conn else { return };
        let number = stream.number;
        let accepted = Accepted { position, prompt_tokens, max_tokens: stream.max_tokens };
        assert!(!stream.is_answered, "accepted twice");
        stream.is_answered = true;
        let connection = self.connections.get_mut(conn).expect("a stream's connection is there");
        let frame = ServerFrame::Accepted { stream: number, accepted };
        connection.egress.reply(|out| frame.encode(out));
        connection.give_request_credit();
        self.put_in_action_list(conn);
    }

    fn handle_output(&mut self, key: SlabKey, output: &Output<'_>) {
        let count = output.tokens.len() as u32;
        let stream = self.pipeline.streams.get_mut(key).expect("its last event is to come");
        assert!(stream.credit.produced(count), "{count} tokens without credit");
        let mut text = String::new();
        stream.utf8.push(output.text, &mut text);
        self.counters.output_tokens += u64::from(count);
        if stream.conn.is_none() {
            stream.credit.taken(count);
            return;
        }
        if count > 0 || !text.is_empty() {
            self.put_output(key, count, |number, out| write_tokens(out, number, output, &text));
        }
        self.pipeline.update_credit(key);
    }

    /// Half a character at the end of a text becomes a replacement character.
    fn finish_text(&mut self, key: SlabKey) {
        let stream = self.pipeline.streams.get_mut(key).expect("its last event is this one");
        let mut text = String::new();
        stream.utf8.finish(&mut text);
        if !text.is_empty() {
            self.put_output(key, 0, |number, out| {
                TokensWriter::begin(out, number, [].into_iter(), &text).end();
            });
        }
    }

    /// Appends frames of a stream to its connection, if it is still to be told.
    fn put_output(&mut self, key: SlabKey, tokens: u32, write: impl FnOnce(u32, &mut Vec<u8>)) {
        let stream = self.pipeline.streams.get(key).expect("its last event is to come");
        let Some(conn) = stream.conn else { return };
        let number = stream.number;
        let connection = self.connections.get_mut(conn).expect("a stream's connection is there");
        connection.egress.output(key, tokens, |out| write(number, out));
        self.put_in_action_list(conn);
    }

    /// Appends a stream's last frame, if it is still to be told: from then on it is nobody's.
    fn tell_last(&mut self, key: SlabKey, now: Instant, write: impl FnOnce(u32, &mut Vec<u8>)) {
        let stream = self.pipeline.streams.get_mut(key).expect("it is in the table");
        let Some(conn) = stream.conn.take() else { return };
        let number = stream.number;
        let is_answered = stream.is_answered;
        let connection: &mut Connection =
            self.connections.get_mut(conn).expect("a stream's connection is there");
        // A reply, not output: a client that asks and never reads must be stopped by it.
        connection.egress.reply(|out| write(number, out));
        connection.remove(number, now);
        if !is_answered {
            connection.give_request_credit();
        }
        self.put_in_action_list(conn);
        self.close_if_drained(conn, now);
    }

    /// DONE for a request that the engine never ran.
    pub(super) fn tell_done(&mut self, key: SlabKey, finish: FinishReason, now: Instant) {
        let done = Done { finish, usage: Usage::default(), timings: Timings::default() };
        self.tell_last(key, now, |number, out| {
            ServerFrame::Done { stream: number, done }.encode(out);
        });
    }

    /// REJECTED for a request that the engine granted and cannot run: it is cancelled there.
    pub(super) fn refuse_granted(
        &mut self,
        key: SlabKey,
        reason: RejectReason,
        message: &str,
        now: Instant,
    ) {
        self.counters.requests_refused += 1;
        let its = self.recorded(key).0;
        self.note(now, Flight::RefuseGranted, [its, reason as u64, 0]);
        let rejected = Rejected { reason, retry_after_ms: None, message };
        self.tell_last(key, now, |number, out| {
            ServerFrame::Rejected { stream: number, rejected }.encode(out);
        });
        self.cancel(key, FinishReason::Cancelled);
    }
}

/// Writes one stream's output of a step: one frame, or more where the ids are beyond its bound.
/// The text goes with the last ids.
fn write_tokens(out: &mut Vec<u8>, number: u32, output: &Output<'_>, text: &str) {
    let mut top = output.top;
    let mut logprobs = output.logprobs;
    let mut tokens = output.tokens;
    loop {
        let (now, later) = tokens.split_at(tokens.len().min(TOKENS_PER_FRAME_MAX));
        tokens = later;
        let text = if tokens.is_empty() { text } else { "" };
        let mut writer = TokensWriter::begin(out, number, now.iter().copied(), text);
        let (entries, rest) = logprobs.split_at(logprobs.len().min(now.len()));
        logprobs = rest;
        for entry in entries {
            let (alternatives, rest) = top.split_at(usize::from(entry.top_count));
            top = rest;
            writer.logprob(entry.logprob, alternatives.iter().copied());
        }
        writer.end();
        if tokens.is_empty() {
            return;
        }
    }
}

/// What a rejection by the engine means, for a person.
pub(super) fn reject_message(reason: RejectReason) -> &'static str {
    match reason {
        RejectReason::QueueFull => "the queue is full",
        RejectReason::ExceedsCapacity => "prompt and output can never fit the KV cache",
        RejectReason::Invalid => "the request is invalid",
        RejectReason::TooManyStreams => "the tenant has as many requests as it may",
        RejectReason::ShuttingDown => "the server is draining",
        RejectReason::NoCapacity => "no device is ready",
        RejectReason::DeadlineUnattainable => "the deadline would pass before the first token",
        RejectReason::QueueTtlExpired => "it waited as long as a request may wait",
        RejectReason::DeadlineExpired => "its deadline passed while it waited",
        RejectReason::TtftUnattainable => "its first token would come too late",
        RejectReason::TenantRate => "the tenant takes more in this time than it may",
    }
}
