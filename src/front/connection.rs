//! One client's connection, from accept to close.

use super::egress::Egress;
use super::{ConnId, FrontSettings};
use crate::base::{Instant, SlabKey};
use crate::protocol::{
    Capabilities, ClientFrame, Decoder, ErrorCode, Hello, ProtocolError, ServerFrame, Side,
    VERSION, Welcome,
};

/// Requests that a client may have sent and not had answered. Each takes a place in the stream
/// table and its body's bytes of the ingest budget; 32 keep a load generator busy over 10 ms of
/// distance at 3,000 requests a second.
const REQUEST_CREDIT_MAX: u32 = 32;

/// Input that is kept while an ask is unanswered, before reading pauses. One piece as the net
/// shell reads them: a small request with its body comes in one and pauses nothing.
const HELD_BYTES_MAX: usize = 4096;

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// Before HELLO.
    Handshake,
    /// After WELCOME.
    Open,
    /// Our last words go out, then it is closed. Input is thrown away.
    Closing,
    /// The shell was told to close it.
    Closed,
}

/// How the shell is to close a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseHow {
    /// At once; the peer may see a reset.
    Now,
    /// What was handed over goes out first.
    Linger,
}

/// What the shell is to do for a connection. See [`super::FrontCore::poll_action`].
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send the bytes; report with `handle_sent`. Never while another send of this connection is
    /// under way.
    Send {
        /// To whom.
        conn: ConnId,
        /// What; not empty.
        bytes: Vec<u8>,
    },
    /// Read no more until told.
    PauseReading {
        /// From whom.
        conn: ConnId,
    },
    /// Read again.
    ResumeReading {
        /// From whom.
        conn: ConnId,
    },
    /// End the connection; report with `handle_closed`.
    Close {
        /// Which.
        conn: ConnId,
        /// How.
        how: CloseHow,
    },
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) life: Life,
    pub(super) decoder: Decoder,
    /// Input that was not taken yet, because an ask or a reply must go first.
    pub(super) held: Vec<u8>,
    /// Open streams by number, ascending: numbers only grow.
    pub(super) streams: Vec<(u32, SlabKey)>,
    /// The highest number used.
    stream_highest: u32,
    capabilities: Capabilities,
    /// Requests that the client may still send.
    request_credit: u32,
    /// Request credit to be given back with the next send.
    request_credit_due: u32,
    pub(super) egress: Egress,
    /// Reading is paused, as the shell was told.
    is_paused: bool,
    /// It stands in the list of connections with something for the shell.
    pub(super) is_in_action_list: bool,
    /// The last sign of life: a whole frame from the client, or the end of its last stream.
    pub(super) active_at: Instant,
    /// When handshake or closing must be over.
    limit: Instant,
    /// Closing took too long: no more waiting for what is being sent.
    pub(super) is_overdue: bool,
    /// The one entry it has in the timers, if any.
    pub(super) timer: Option<Instant>,
}

impl Connection {
    pub(super) fn new(settings: &FrontSettings, now: Instant) -> Connection {
        Connection {
            life: Life::Handshake,
            decoder: Decoder::new(Side::FromClient, settings.limits.frame_bytes_max),
            held: Vec::new(),
            streams: Vec::new(),
            stream_highest: 0,
            capabilities: Capabilities::default(),
            request_credit: 0,
            request_credit_due: 0,
            egress: Egress::default(),
            is_paused: false,
            is_in_action_list: false,
            active_at: now,
            limit: now.plus_ms(settings.limits.handshake_timeout_ms),
            is_overdue: false,
            timer: None,
        }
    }

    /// When something must be done about it if nothing happens. `idle_timeout_ms` counts only
    /// while it has no streams: those have deadlines of their own.
    pub(super) fn next_timeout(&self, settings: &FrontSettings) -> Instant {
        match self.life {
            Life::Handshake | Life::Closing => self.limit,
            Life::Open if self.streams.is_empty() => {
                self.active_at.plus_ms(settings.limits.idle_timeout_ms)
            }
            // Looked at again when that could be due at the earliest.
            Life::Open => self.active_at.plus_ms(settings.limits.idle_timeout_ms),
            Life::Closed => Instant::NEVER,
        }
    }

    /// The stream with this number, if it is open.
    pub(super) fn find(&self, number: u32) -> Option<SlabKey> {
        let index = self.streams.binary_search_by_key(&number, |&(number, _)| number).ok()?;
        Some(self.streams[index].1)
    }

    /// The stream with this number: `None` when it was open once (its last frame and the client's
    /// crossed); an error when it never was.
    pub(super) fn find_known(
        &self,
        number: u32,
        frame: &'static str,
    ) -> Result<Option<SlabKey>, ProtocolError> {
        if number > self.stream_highest {
            let message = format!("{frame} for a stream that was never opened");
            return Err(ProtocolError::new(ErrorCode::StreamNumber, number, message));
        }
        Ok(self.find(number))
    }

    /// Takes a new stream's number and one request credit.
    pub(super) fn open_number(&mut self, number: u32) -> Result<(), ProtocolError> {
        if number <= self.stream_highest {
            let message = format!(
                "a new stream's number must be above {}, the highest so far",
                self.stream_highest
            );
            return Err(ProtocolError::new(ErrorCode::StreamNumber, number, message));
        }
        if self.request_credit == 0 {
            return Err(ProtocolError::new(
                ErrorCode::RequestCreditExceeded,
                number,
                "a REQUEST needs request credit, and all of it is used",
            ));
        }
        self.stream_highest = number;
        self.request_credit -= 1;
        Ok(())
    }

    /// A request was answered: the client may send another.
    pub(super) fn give_request_credit(&mut self) {
        self.request_credit += 1;
        self.request_credit_due += 1;
    }

    /// Forgets a stream.
    pub(super) fn remove(&mut self, number: u32, now: Instant) {
        let index = self.streams.binary_search_by_key(&number, |&(number, _)| number);
        let index = index.expect("an open stream stands in its connection's table");
        self.streams.remove(index);
        self.active_at = now;
    }

    /// Answers HELLO.
    pub(super) fn welcome(
        &mut self,
        settings: &FrontSettings,
        hello: &Hello<'_>,
        now: Instant,
    ) -> Result<(), ProtocolError> {
        if !settings.token.as_ref().is_none_or(|token| same(token, hello.token)) {
            return Err(ProtocolError::new(
                ErrorCode::Unauthenticated,
                0,
                "the token in HELLO is missing or wrong",
            ));
        }
        let limits = &settings.limits;
        self.capabilities = Capabilities::ALL.common(hello.capabilities);
        self.request_credit = limits.streams_per_connection_max.min(REQUEST_CREDIT_MAX);
        self.life = Life::Open;
        self.active_at = now;
        let welcome = ServerFrame::Welcome(Welcome {
            version: VERSION,
            capabilities: self.capabilities,
            frame_bytes_max: limits.frame_bytes_max,
            request_bytes_max: settings.request_bytes_max(),
            streams_max: limits.streams_per_connection_max,
            window_tokens_max: limits.stream_window_tokens_max,
            request_credit: self.request_credit,
            vocab_tokens: settings.vocab_tokens,
            context_tokens: limits.context_max,
            idle_timeout_ms: u32::try_from(limits.idle_timeout_ms).unwrap_or(u32::MAX),
            model: &settings.model,
            server: &settings.server,
        });
        self.egress.reply(|out| welcome.encode(out));
        Ok(())
    }

    pub(super) fn has(&self, capability: Capabilities) -> bool {
        self.capabilities.contains(capability)
    }

    /// Reads a whole frame, of which only HELLO may come first, and never again.
    pub(super) fn expect_frame(&self, frame: &ClientFrame<'_>) -> Result<(), ProtocolError> {
        let is_hello = matches!(frame, ClientFrame::Hello(_));
        match (self.life, is_hello) {
            (Life::Handshake, false) => {
                Err(ProtocolError::new(ErrorCode::NotForebay, 0, "a connection starts with HELLO"))
            }
            (Life::Open, true) => Err(ProtocolError::new(
                ErrorCode::UnexpectedFrame,
                0,
                "HELLO comes once, at the start",
            )),
            _ => Ok(()),
        }
    }

    /// Begins to close, with an ERROR as last words.
    pub(super) fn fail(&mut self, error: &ProtocolError, until: Instant) {
        self.egress.reply(|out| error.code.frame(error.stream, &error.message).encode(out));
        self.begin_close(until);
    }

    /// Begins to close: what is in the buffers goes out until `until`.
    pub(super) fn begin_close(&mut self, until: Instant) {
        self.life = Life::Closing;
        self.limit = until;
        self.held = Vec::new();
    }

    /// Whether input must wait for replies to be read.
    pub(super) fn must_wait_for_replies(&self) -> bool {
        self.egress.replies_are_too_many()
    }

    /// What the shell is to do next for this connection.
    pub(super) fn poll_action(&mut self, conn: ConnId) -> Option<Action> {
        if self.life == Life::Closed {
            return None;
        }
        if self.is_overdue {
            self.life = Life::Closed;
            return Some(Action::Close { conn, how: CloseHow::Now });
        }
        let due = self.request_credit_due;
        if due > 0 && self.life == Life::Open && !self.egress.replies_are_too_many() {
            self.request_credit_due = 0;
            self.egress.reply(|out| ServerFrame::RequestCredit(due).encode(out));
        }
        if let Some(bytes) = self.egress.take_send() {
            return Some(Action::Send { conn, bytes });
        }
        if self.life == Life::Closing {
            if !self.egress.is_empty() {
                return None;
            }
            self.life = Life::Closed;
            return Some(Action::Close { conn, how: CloseHow::Linger });
        }
        let wants_pause = self.held.len() > HELD_BYTES_MAX
            || (!self.held.is_empty() && self.must_wait_for_replies());
        if wants_pause == self.is_paused {
            return None;
        }
        self.is_paused = wants_pause;
        Some(match wants_pause {
            true => Action::PauseReading { conn },
            false => Action::ResumeReading { conn },
        })
    }
}

/// Compares without telling by its duration how much was right.
fn same(secret: &str, given: &str) -> bool {
    let (secret, given) = (secret.as_bytes(), given.as_bytes());
    let differing = secret.iter().zip(given).fold(0, |all, (a, b)| all | (a ^ b));
    secret.len() == given.len() && differing == 0
}

/// The connections of a front core, by the place that the shell gave them.
#[derive(Debug, Default)]
pub(super) struct Connections {
    places: Vec<Option<(u32, Connection)>>,
    open: usize,
}

impl Connections {
    pub(super) fn insert(&mut self, conn: ConnId, connection: Connection) {
        let index = conn.slot as usize;
        if index >= self.places.len() {
            self.places.resize_with(index + 1, || None);
        }
        let before = self.places[index].replace((conn.generation, connection));
        assert!(before.is_none(), "{conn:?} was accepted in a place that is in use");
        self.open += 1;
    }

    pub(super) fn get_mut(&mut self, conn: ConnId) -> Option<&mut Connection> {
        match self.places.get_mut(conn.slot as usize) {
            Some(Some((generation, connection))) if *generation == conn.generation => {
                Some(connection)
            }
            _ => None,
        }
    }

    pub(super) fn remove(&mut self, conn: ConnId) -> Option<Connection> {
        self.get_mut(conn)?;
        self.open -= 1;
        self.places[conn.slot as usize].take().map(|(_, connection)| connection)
    }

    pub(super) fn len(&self) -> usize {
        self.open
    }

    /// All ids, in the order of their places.
    pub(super) fn ids(&self) -> Vec<ConnId> {
        let places = self.places.iter().enumerate();
        places
            .filter_map(|(slot, place)| {
                let (generation, _) = place.as_ref()?;
                Some(ConnId { slot: slot as u32, generation: *generation })
            })
            .collect()
    }
}
