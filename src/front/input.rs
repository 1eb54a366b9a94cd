//! Input of a connection: pieces of frames, judged one by one.

use std::borrow::Cow;

use super::ConnId;
use super::connection::Life;
use super::core::FrontCore;
use super::events::reject_message;
use super::record::Flight;
use super::stream::{Phase, Stream};
use super::timers::Timer;
use crate::base::board::Tell;
use crate::base::{Instant, SlabKey};
use crate::protocol::{
    BodyError, Capabilities, ClientFrame, ErrorCode, Header, Piece, Prelude, PromptKind,
    ProtocolError, ServerFrame, Stat,
};
use crate::request::{FinishReason, RejectReason};

/// When to come back after a refusal for want of room here: bodies and asks are gone in
/// milliseconds, streams of one's own in seconds. The engine, which knows λ and μ, computes its
/// own.
const RETRY_AFTER_MS: u32 = 1_000;

/// Why a request is refused: reason, when to come back, and a message.
type Refusal = (RejectReason, Option<u32>, Cow<'static, str>);

impl FrontCore {
    /// Takes as much of `input` as may be taken now; the rest must be held.
    pub(super) fn take_input(&mut self, conn: ConnId, input: &mut &[u8], now: Instant) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        // The decoder lends out its buffer while the rest of the core works on the piece.
        let spare = crate::protocol::Decoder::new(crate::protocol::Side::FromClient, 0);
        let mut decoder = std::mem::replace(&mut connection.decoder, spare);
        while !self.must_hold(conn, decoder.body_stream()) {
            let result = match decoder.next(input) {
                Ok(None) => break,
                Ok(Some(piece)) => self.handle_piece(conn, piece, now),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                self.fail(conn, &error, now);
            }
        }
        if let Some(connection) = self.connections.get_mut(conn) {
            connection.decoder = decoder;
        }
    }

    /// Whether no input may be taken now: the next bytes are the body of an unanswered ask, or
    /// the client does not read our replies, or the connection is over.
    fn must_hold(&mut self, conn: ConnId, body_stream: Option<u32>) -> bool {
        let Some(connection) = self.connections.get_mut(conn) else { return true };
        if matches!(connection.life, Life::Closing | Life::Closed) {
            return true;
        }
        if connection.must_wait_for_replies() {
            return true;
        }
        let key = body_stream.and_then(|number| connection.find(number));
        let stream = key.and_then(|key| self.pipeline.streams.get(key));
        stream.is_some_and(Stream::holds_body)
    }

    /// Keeps what [`FrontCore::take_input`] left.
    pub(super) fn hold(&mut self, conn: ConnId, rest: &[u8]) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if !rest.is_empty() && matches!(connection.life, Life::Handshake | Life::Open) {
            connection.held.extend_from_slice(rest);
        }
    }

    /// Goes on with held input.
    pub(super) fn take_held(&mut self, conn: ConnId, now: Instant) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        let held = std::mem::take(&mut connection.held);
        let mut input = &held[..];
        self.take_input(conn, &mut input, now);
        let left = input.len();
        if left < held.len() {
            self.hold(conn, &held[held.len() - left..]);
        } else if let Some(connection) = self.connections.get_mut(conn)
            && matches!(connection.life, Life::Handshake | Life::Open)
        {
            connection.held = held;
        }
        self.put_in_action_list(conn);
    }

    fn handle_piece(
        &mut self,
        conn: ConnId,
        piece: Piece<'_>,
        now: Instant,
    ) -> Result<(), ProtocolError> {
        let connection = self.connections.get_mut(conn).expect("it has input");
        if connection.life == Life::Handshake && !matches!(piece, Piece::Frame { .. }) {
            return Err(ProtocolError::new(
                ErrorCode::NotForebay,
                0,
                "a connection starts with HELLO",
            ));
        }
        match piece {
            Piece::Frame { header, payload } => {
                connection.active_at = now;
                self.handle_frame(conn, header, payload, now)
            }
            Piece::Request { stream, prelude, body_bytes } => {
                connection.active_at = now;
                if let Some(key) = self.handle_request(conn, stream, prelude, now)? {
                    self.announce_body(Some(key), stream, body_bytes)?;
                }
                Ok(())
            }
            Piece::Body { stream, body_bytes } => {
                let key = connection.find_known(stream, "BODY")?;
                self.announce_body(key, stream, body_bytes)
            }
            Piece::BodyPart { stream, bytes } => {
                let key = connection.find(stream);
                self.handle_body_part(key, bytes, now);
                Ok(())
            }
        }
    }

    fn handle_frame(
        &mut self,
        conn: ConnId,
        header: Header,
        payload: &[u8],
        now: Instant,
    ) -> Result<(), ProtocolError> {
        let frame = ClientFrame::decode(header, payload)?;
        let connection = self.connections.get_mut(conn).expect("it has input");
        connection.expect_frame(&frame)?;
        match frame {
            ClientFrame::Hello(hello) => {
                connection.welcome(&self.settings, &hello, now)?;
                self.set_timer(conn);
                self.say_going_away(conn, now);
            }
            ClientFrame::Ping(number) => {
                connection.egress.reply(|out| ServerFrame::Pong(number).encode(out));
            }
            ClientFrame::Pong(_) => {}
            ClientFrame::Stats => self.reply_stats(conn)?,
            // The client gave up on the connection: nothing that is said now matters.
            ClientFrame::Error { .. } => {
                self.end_streams(conn);
                self.close_politely(conn, now);
            }
            ClientFrame::Credit { stream: number, tokens } => {
                if let Some(key) = connection.find_known(number, "CREDIT")? {
                    self.handle_credit(key, number, tokens)?;
                }
            }
            ClientFrame::Cancel { stream: number } => {
                if let Some(key) = connection.find_known(number, "CANCEL")? {
                    self.handle_cancel(conn, key, now);
                }
            }
        }
        Ok(())
    }

    fn reply_stats(&mut self, conn: ConnId) -> Result<(), ProtocolError> {
        let mut stats = Vec::new();
        self.stats().tell(|number, value| stats.push(Stat { name: number.name, value }));
        if let Some(board) = &self.settings.stats {
            stats.extend(board.read().map(|(number, value)| Stat { name: number.name, value }));
        }
        let connection = self.connections.get_mut(conn).expect("it has input");
        if !connection.has(Capabilities::STATS) {
            return Err(ProtocolError::new(
                ErrorCode::UnexpectedFrame,
                0,
                "STATS was not among the client's capabilities in HELLO",
            ));
        }
        connection.egress.reply(|out| ServerFrame::encode_stats(out, stats));
        Ok(())
    }

    fn handle_credit(
        &mut self,
        key: SlabKey,
        number: u32,
        tokens: u32,
    ) -> Result<(), ProtocolError> {
        let stream = self.pipeline.streams.get_mut(key).expect("an open stream is in the table");
        if !stream.credit.give(tokens) {
            let message = format!(
                "at most {} tokens of credit may be outstanding",
                self.settings.limits.stream_window_tokens_max
            );
            return Err(ProtocolError::new(ErrorCode::WindowExceeded, number, message));
        }
        self.pipeline.update_credit(key);
        Ok(())
    }

    /// The client does not want a stream any more; it gets DONE all the same.
    fn handle_cancel(&mut self, conn: ConnId, key: SlabKey, now: Instant) {
        let stream = self.pipeline.streams.get(key).expect("an open stream is in the table");
        if stream.phase == Phase::WaitingToAsk {
            // The engine does not know of it: its end is ours to tell.
            self.tell_done(key, FinishReason::Cancelled, now);
            self.forget(key);
            self.unheld.push_back(conn);
        } else {
            self.cancel(key, FinishReason::Cancelled);
        }
    }

    /// A request begins: refused here (then there is no stream), or on its way to ask.
    fn handle_request(
        &mut self,
        conn: ConnId,
        number: u32,
        prelude: Result<Prelude, BodyError>,
        now: Instant,
    ) -> Result<Option<SlabKey>, ProtocolError> {
        let connection = self.connections.get_mut(conn).expect("it has input");
        connection.open_number(number)?;
        self.counters.requests += 1;
        let judged = prelude
            .map_err(|error| (RejectReason::Invalid, None, error.0))
            .and_then(|prelude| self.judge(conn, &prelude).map(|()| prelude));
        let prelude = match judged {
            Ok(prelude) => prelude,
            Err((reason, retry_after_ms, message)) => {
                self.refuse_here(conn, number, reason, retry_after_ms, &message, now);
                return Ok(None);
            }
        };
        if let Some((reason, retry_after_ms)) = self.pipeline.refuse_at_gate(prelude.class) {
            self.counters.requests_rejected += 1;
            self.note(now, Flight::AtGate, [conn.recorded(), number.into(), reason as u64]);
            self.tell_refused(conn, number, reason, retry_after_ms, reject_message(reason));
            return Ok(None);
        }
        let window = self.settings.limits.stream_window_tokens_max;
        let mut stream = Stream::new(conn, number, prelude, window, now);
        stream.input_tokens = self.pipeline.estimate_tokens(&prelude);
        stream.ingest_bytes = prelude.body_bytes();
        let Some(key) = self.pipeline.insert(stream) else {
            let message = "too many requests are being taken in";
            let retry = Some(RETRY_AFTER_MS);
            self.refuse_here(conn, number, RejectReason::QueueFull, retry, message, now);
            return Ok(None);
        };
        let its = self.recorded(key).0;
        self.note(now, Flight::Request, [conn.recorded(), number.into(), its]);
        let connection = self.connections.get_mut(conn).expect("it has input");
        connection.streams.push((number, key));
        Ok(Some(key))
    }

    /// What can be said of a request from its prelude alone.
    fn judge(&mut self, conn: ConnId, prelude: &Prelude) -> Result<(), Refusal> {
        let limits = &self.settings.limits;
        let connection = self.connections.get_mut(conn).expect("it has input");
        let open = connection.streams.len();
        let knows_ids = connection.has(Capabilities::TOKEN_PROMPTS);
        let bytes_max = self.settings.request_bytes_max();
        if self.is_draining() {
            return Err((RejectReason::ShuttingDown, None, "the server is draining".into()));
        }
        if open >= limits.streams_per_connection_max as usize {
            let message = format!("{open} streams are open, as many as a connection may have");
            return Err((RejectReason::TooManyStreams, Some(RETRY_AFTER_MS), message.into()));
        }
        if prelude.kind == PromptKind::Tokens && !knows_ids {
            let message = "a prompt of token ids needs capability bit 2 in HELLO".into();
            return Err((RejectReason::Invalid, None, message));
        }
        // Without credit it would be admitted only to park.
        if prelude.window_tokens == 0 || prelude.window_tokens > limits.stream_window_tokens_max {
            let message =
                format!("window_tokens must be from 1 to {}", limits.stream_window_tokens_max);
            return Err((RejectReason::Invalid, None, message.into()));
        }
        if prelude.body_bytes() > u64::from(bytes_max) {
            let message = format!("the body of a request has at most {bytes_max} bytes");
            return Err((RejectReason::ExceedsCapacity, None, message.into()));
        }
        if self.pipeline.ingest_bytes + prelude.body_bytes() > limits.ingest_bytes_max {
            let message = "too many bytes of requests are being taken in".into();
            return Err((RejectReason::QueueFull, Some(RETRY_AFTER_MS), message));
        }
        Ok(())
    }

    /// A frame brings `body_bytes` of a stream's body: no more than its prelude said.
    fn announce_body(
        &mut self,
        key: Option<SlabKey>,
        number: u32,
        body_bytes: u32,
    ) -> Result<(), ProtocolError> {
        // A stream that has ended here skips what is still on its way.
        let Some(key) = key else { return Ok(()) };
        let stream = self.pipeline.streams.get_mut(key).expect("an open stream is in the table");
        match stream.body_unannounced.checked_sub(u64::from(body_bytes)) {
            Some(rest) => {
                stream.body_unannounced = rest;
                Ok(())
            }
            None => Err(ProtocolError::new(
                ErrorCode::Malformed,
                number,
                "the body is longer than its prelude announced",
            )),
        }
    }

    fn handle_body_part(&mut self, key: Option<SlabKey>, bytes: &[u8], now: Instant) {
        let Some(key) = key else { return };
        let stream = self.pipeline.streams.get_mut(key).expect("an open stream is in the table");
        if stream.phase != Phase::Body {
            // Only a stream that was cancelled meanwhile: unanswered ones hold their input.
            assert_eq!(stream.phase, Phase::Ending, "a body part out of turn");
            return;
        }
        stream.body.extend_from_slice(bytes);
        if stream.body.len() as u64 == stream.prelude.body_bytes() {
            if let Some(at) = stream.body_deadline.take() {
                self.timers.clear(at, Timer::Body(key));
            }
            self.begin_tokenising(key, now);
        }
    }

    /// Refuses a request by what this front core knows.
    fn refuse_here(
        &mut self,
        conn: ConnId,
        number: u32,
        reason: RejectReason,
        retry_after_ms: Option<u32>,
        message: &str,
        now: Instant,
    ) {
        self.counters.requests_refused += 1;
        self.note(now, Flight::RefuseHere, [conn.recorded(), number.into(), reason as u64]);
        self.tell_refused(conn, number, reason, retry_after_ms, message);
    }

    /// REJECTED for a request that has no place in the stream table.
    fn tell_refused(
        &mut self,
        conn: ConnId,
        number: u32,
        reason: RejectReason,
        retry_after_ms: Option<u32>,
        message: &str,
    ) {
        let connection = self.connections.get_mut(conn).expect("it has input");
        connection.give_request_credit();
        let rejected = crate::protocol::Rejected { reason, retry_after_ms, message };
        let frame = ServerFrame::Rejected { stream: number, rejected };
        connection.egress.reply(|out| frame.encode(out));
    }
}
