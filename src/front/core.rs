//! The front core: what the shell tells it, what it tells the shell, and its turn.

use std::collections::VecDeque;
use std::sync::Arc;

use super::ConnId;
use super::connection::{Action, Connection, Connections, Life};
use super::pipeline::Pipeline;
use super::record::Flight;
use super::settings::{FrontCounters, FrontSettings, FrontStats};
use super::stream::Phase;
use super::timers::{Timer, Timers};
use super::tokenise::Tokenise;
use crate::base::{Instant, Pen, Recorder};
use crate::message::EVENT_BATCHES;
use crate::ports::FrontEnds;
use crate::protocol::{ErrorCode, ProtocolError, ServerFrame};
use crate::request::FinishReason;

/// Event batches worked off in one turn: all there can be.
const BATCHES_PER_TICK_MAX: usize = EVENT_BATCHES;

/// The front core. Calls, in any order but from one thread:
///
/// - `handle_*`: what happened on the sockets;
/// - [`FrontCore::tick`] after them, again while it returns `true`, and when the core's doorbell
///   rang or [`FrontCore::next_timeout`] has come;
/// - [`FrontCore::poll_action`] after each of these, until it returns `None`.
///
/// `now` never goes backwards.
pub struct FrontCore {
    pub(super) settings: FrontSettings,
    pub(super) connections: Connections,
    pub(super) pipeline: Pipeline,
    pub(super) timers: Timers,
    /// Connections with something for the shell, each once.
    pub(super) action_list: VecDeque<ConnId>,
    /// Connections whose held input may go on, perhaps.
    pub(super) unheld: VecDeque<ConnId>,
    pub(super) counters: FrontCounters,
    /// Draining since it is set: when the engine cancels what is left.
    draining_until: Option<Instant>,
    /// The engine is gone; everybody was told.
    engine_is_gone: bool,
    pub(super) pen: Pen,
}

impl FrontCore {
    /// A front core without connections.
    pub fn new(settings: FrontSettings, tokenise: Box<dyn Tokenise>, ends: FrontEnds) -> FrontCore {
        let needed = FrontEnds::control_capacity(&settings.limits);
        assert!(ends.control.capacity() >= needed, "the control ring has room for {needed}");
        assert!(settings.limits.stream_window_tokens_max > 0, "a stream needs a window");
        let pipeline = Pipeline::new(&settings, tokenise, ends);
        FrontCore {
            settings,
            connections: Connections::default(),
            pipeline,
            timers: Timers::default(),
            action_list: VecDeque::new(),
            unheld: VecDeque::new(),
            counters: FrontCounters::default(),
            draining_until: None,
            engine_is_gone: false,
            pen: Recorder::start("front", Flight::KINDS),
        }
    }

    /// A client connected.
    pub fn handle_accepted(&mut self, conn: ConnId, now: Instant) {
        self.counters.connections_accepted += 1;
        let open = self.connections.len() as u64;
        self.note(now, Flight::Open, [conn.recorded(), open, 0]);
        let is_full = self.connections.len() >= self.settings.limits.connections_max as usize;
        self.connections.insert(conn, Connection::new(&self.settings, now));
        if is_full {
            let error = ProtocolError::new(
                ErrorCode::TooManyConnections,
                0,
                "the server holds as many connections as it may",
            );
            self.fail(conn, &error, now);
        }
        self.set_timer(conn);
    }

    /// Bytes came from a client.
    pub fn handle_received(&mut self, conn: ConnId, bytes: &[u8], now: Instant) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if matches!(connection.life, Life::Closing | Life::Closed) {
            return;
        }
        self.counters.received_bytes += bytes.len() as u64;
        if !connection.held.is_empty() {
            connection.held.extend_from_slice(bytes);
        } else {
            let mut input = bytes;
            self.take_input(conn, &mut input, now);
            self.hold(conn, input);
        }
        self.put_in_action_list(conn);
    }

    /// The kernel took `taken` bytes of a buffer that [`Action::Send`] handed out. What it did
    /// not take goes out again with the next send.
    pub fn handle_sent(&mut self, conn: ConnId, buffer: Vec<u8>, taken: usize, _now: Instant) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        self.counters.sent_bytes += taken as u64;
        let pipeline = &mut self.pipeline;
        connection.egress.handle_sent(buffer, taken, |stream, tokens| {
            pipeline.handle_taken(stream, tokens);
        });
        if !connection.held.is_empty() {
            self.unheld.push_back(conn);
        }
        self.put_in_action_list(conn);
    }

    /// The shell cannot send on a connection: it is ending. Nothing more is asked for it but to
    /// close it.
    pub fn handle_send_refused(&mut self, conn: ConnId, now: Instant) {
        self.end_streams(conn);
        self.close_politely(conn, now);
        if let Some(connection) = self.connections.get_mut(conn) {
            connection.is_overdue = true;
        }
    }

    /// A connection ended; whatever it had going on is cancelled.
    pub fn handle_closed(&mut self, conn: ConnId, now: Instant) {
        let Some(connection) = self.connections.remove(conn) else { return };
        let streams = connection.streams.len() as u64;
        self.note(now, Flight::Close, [conn.recorded(), streams, 0]);
        if let Some(at) = connection.timer {
            self.timers.clear(at, Timer::Connection(conn));
        }
        for &(_, key) in &connection.streams {
            self.counters.requests_abandoned += 1;
            self.detach(key);
        }
    }

    /// Begins to drain: every client is told, no new request is taken, and connections end with
    /// their last stream. The engine cancels what is left at `until`.
    pub fn begin_drain(&mut self, now: Instant, until: Instant) {
        if self.draining_until.is_some() {
            return;
        }
        self.draining_until = Some(until);
        self.note(now, Flight::Drain, [until.ns_since(now), 0, 0]);
        for conn in self.connections.ids() {
            self.say_going_away(conn, now);
        }
    }

    /// Whether drain has begun.
    pub fn is_draining(&self) -> bool {
        self.draining_until.is_some()
    }

    /// Whether drain has ended: no connection and no request is left.
    pub fn is_drained(&self) -> bool {
        self.is_draining() && self.connections.len() == 0 && self.pipeline.streams.is_empty()
    }

    /// Connections that are open.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Requests that are known, those included that only wait for the engine's last word.
    pub fn streams(&self) -> usize {
        self.pipeline.streams.len()
    }

    /// What was seen so far.
    pub fn counters(&self) -> FrontCounters {
        self.counters
    }

    /// Where it stands.
    pub fn stats(&self) -> FrontStats {
        let limits = &self.settings.limits;
        let connections_open = self.connections.len() as u64;
        let ingest_bytes = self.pipeline.ingest_bytes;
        let of = |held: u64, bound: u64| held.saturating_mul(1_000) / bound.max(1);
        FrontStats {
            counters: self.counters,
            connections_open,
            streams_open: self.pipeline.streams.len() as u64,
            ingest_bytes,
            saturation_permille: of(connections_open, limits.connections_max.into())
                .max(of(ingest_bytes, limits.ingest_bytes_max)),
        }
    }

    /// Its flight recorder, to be read from anywhere.
    pub fn recorder(&self) -> Arc<Recorder> {
        self.pen.recorder()
    }

    /// One bounded turn. `true` when there may be more to do at once.
    pub fn tick(&mut self, now: Instant) -> bool {
        let mut did = false;
        for _ in 0..BATCHES_PER_TICK_MAX {
            let Some(batch) = self.pipeline.receive() else { break };
            self.handle_batch(&batch, now);
            self.pipeline.give_back(batch);
            did = true;
        }
        did |= self.check_engine(now);
        for _ in 0..self.unheld.len() {
            let conn = self.unheld.pop_front().expect("counted");
            self.take_held(conn, now);
            did = true;
        }
        did |= self.advance_tokenising(now);
        did |= self.advance_requests(now);
        did |= self.pipeline.send_control();
        self.pipeline.announce_refusals();
        while let Some(timer) = self.timers.take_due(now) {
            self.handle_timer(timer, now);
            did = true;
        }
        did
    }

    /// When [`FrontCore::tick`] must be called if nothing else happens.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// What the shell is to do next; `None` when there is nothing.
    pub fn poll_action(&mut self) -> Option<Action> {
        loop {
            let conn = *self.action_list.front()?;
            if let Some(connection) = self.connections.get_mut(conn) {
                if let Some(action) = connection.poll_action(conn) {
                    return Some(action);
                }
                connection.is_in_action_list = false;
            }
            self.action_list.pop_front();
        }
    }

    pub(super) fn put_in_action_list(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if !connection.is_in_action_list {
            connection.is_in_action_list = true;
            self.action_list.push_back(conn);
        }
    }

    /// Ends a connection with an ERROR.
    pub(super) fn fail(&mut self, conn: ConnId, error: &ProtocolError, now: Instant) {
        self.counters.connections_failed += 1;
        let until = now.plus_ms(self.settings.limits.handshake_timeout_ms);
        let Some(connection) = self.connections.get_mut(conn) else { return };
        connection.fail(error, until);
        self.note(now, Flight::Fail, [conn.recorded(), error.code as u64, 0]);
        self.end_streams(conn);
        self.set_timer(conn);
        self.put_in_action_list(conn);
    }

    /// Ends a connection without an ERROR, when its buffers are empty.
    pub(super) fn close_politely(&mut self, conn: ConnId, now: Instant) {
        let until = now.plus_ms(self.settings.limits.handshake_timeout_ms);
        let Some(connection) = self.connections.get_mut(conn) else { return };
        connection.begin_close(until);
        self.set_timer(conn);
        self.put_in_action_list(conn);
    }

    /// Cancels all streams of a connection that is not to be told about them.
    pub(super) fn end_streams(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        for (_, key) in std::mem::take(&mut connection.streams) {
            self.counters.requests_abandoned += 1;
            self.detach(key);
        }
    }

    /// Nobody is to be told about this stream any more: it is cancelled.
    fn detach(&mut self, key: crate::base::SlabKey) {
        let stream = self.pipeline.streams.get_mut(key).expect("an open stream is in the table");
        stream.conn = None;
        self.cancel(key, FinishReason::Cancelled);
    }

    pub(super) fn say_going_away(&mut self, conn: ConnId, now: Instant) {
        let Some(until) = self.draining_until else { return };
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if connection.life != Life::Open {
            return;
        }
        // 0 means "not known": a deadline that is here already is told as 1 ms.
        let deadline_ms = u32::try_from(until.ms_since(now)).unwrap_or(u32::MAX).max(1);
        connection.egress.reply(|out| ServerFrame::GoingAway { deadline_ms }.encode(out));
        self.close_if_drained(conn, now);
        self.put_in_action_list(conn);
    }

    /// While draining, a connection without streams has no reason to stay.
    pub(super) fn close_if_drained(&mut self, conn: ConnId, now: Instant) {
        if self.draining_until.is_none() {
            return;
        }
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if connection.life == Life::Open && connection.streams.is_empty() {
            self.close_politely(conn, now);
        }
    }

    /// Sets a connection's one timer to when it must be looked at.
    pub(super) fn set_timer(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        let at = connection.next_timeout(&self.settings);
        if let Some(before) = connection.timer.replace(at) {
            self.timers.clear(before, Timer::Connection(conn));
        }
        if at == Instant::NEVER {
            connection.timer = None;
        } else {
            self.timers.set(at, Timer::Connection(conn));
        }
    }

    fn handle_timer(&mut self, timer: Timer, now: Instant) {
        match timer {
            Timer::Body(key) => self.handle_body_timeout(key, now),
            Timer::Connection(conn) => {
                let Some(connection) = self.connections.get_mut(conn) else { return };
                connection.timer = None;
                self.handle_connection_timer(conn, now);
            }
        }
    }

    fn handle_connection_timer(&mut self, conn: ConnId, now: Instant) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        let is_due = connection.next_timeout(&self.settings) <= now;
        match connection.life {
            Life::Handshake if is_due => {
                let ms = self.settings.limits.handshake_timeout_ms;
                let message = format!("HELLO must come within {ms} ms");
                let error = ProtocolError::new(ErrorCode::HandshakeTimeout, 0, message);
                self.fail(conn, &error, now);
            }
            Life::Open if is_due && connection.streams.is_empty() => {
                let ms = self.settings.limits.idle_timeout_ms;
                let message = format!("no stream and no frame for {ms} ms");
                let error = ProtocolError::new(ErrorCode::IdleTimeout, 0, message);
                self.fail(conn, &error, now);
            }
            Life::Closing if is_due => {
                // It does not read its last words: no reason to keep its place.
                connection.is_overdue = true;
                self.put_in_action_list(conn);
            }
            Life::Open if is_due => {
                connection.active_at = now;
                self.set_timer(conn);
            }
            _ => self.set_timer(conn),
        }
    }

    /// Once the engine is gone nothing will ever be answered: every client is told.
    fn check_engine(&mut self, now: Instant) -> bool {
        if self.engine_is_gone || !self.pipeline.engine_is_gone() {
            return false;
        }
        self.engine_is_gone = true;
        self.note(now, Flight::EngineGone, [0; 3]);
        let error = ProtocolError::new(ErrorCode::Internal, 0, "the engine ended");
        for conn in self.connections.ids() {
            self.fail(conn, &error, now);
        }
        // No last word will come for these.
        self.pipeline.forget_all();
        true
    }
}

impl std::fmt::Debug for FrontCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let phases = |phase: Phase| {
            self.pipeline.streams.iter().filter(|(_, stream)| stream.phase == phase).count()
        };
        f.debug_struct("FrontCore")
            .field("connections", &self.connections.len())
            .field("waiting_to_ask", &phases(Phase::WaitingToAsk))
            .field("asked", &phases(Phase::Asked))
            .field("body", &phases(Phase::Body))
            .field("tokenising", &phases(Phase::Tokenising))
            .field("waiting_to_submit", &phases(Phase::WaitingToSubmit))
            .field("submitted", &phases(Phase::Submitted))
            .field("ending", &phases(Phase::Ending))
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}
