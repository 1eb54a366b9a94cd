//! Clients as byte strings, the engine as calls, time as a number.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::Instant;
use crate::flow::{GateKeeper, Receiver};
use crate::front::{Action, ByteTokeniser, CloseHow, ConnId, FrontCore, FrontSettings};
use crate::limits::Limits;
use crate::message::{
    Ask, ControlMessage, EVENT_BATCHES, Event, EventBatch, RequestMessage, SeqKey, StreamKey,
    Submission,
};
use crate::ports::{FrontPort, connect_front};
use crate::protocol::{
    Accepted, Capabilities, ClientFrame, Decoder, Done, Hello, Piece, Request, RequestPrompt,
    ServerFrame, Side, encode_body, encode_body_frame, encode_request, encode_request_frame,
};
use crate::request::{FinishReason, RejectReason, Timings, Usage};
use crate::ring::{Consumer, Doorbell, Producer, ring};

/// A frame as a client got it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Got {
    Welcome { request_credit: u32 },
    RequestCredit(u32),
    Pong(u64),
    Stats(Vec<(String, u64)>),
    GoingAway(u32),
    Error(u16),
    Accepted(u32, Accepted),
    Tokens(u32, Vec<u32>, String),
    Logprobs(u32, Vec<(f32, Vec<(u32, f32)>)>),
    Paused(u32),
    Resumed(u32),
    Done(u32, FinishReason),
    Rejected(u32, RejectReason, Option<u32>, String),
}

/// A front core, its clients' ends and the engine's.
pub(super) struct Harness {
    pub(super) core: FrontCore,
    pub(super) now: Instant,
    requests: Receiver<RequestMessage>,
    control: Consumer<ControlMessage>,
    pub(super) gate: GateKeeper,
    events: Producer<Box<EventBatch>>,
    #[expect(clippy::vec_box, reason = "the ring carries boxes")]
    boxes: Vec<Box<EventBatch>>,
    decoders: BTreeMap<ConnId, Decoder>,
    received: BTreeMap<ConnId, Vec<u8>>,
    /// Sends that the "kernel" has not taken.
    pub(super) under_way: BTreeMap<ConnId, Vec<u8>>,
    /// Clients that do not read: their sends stay under way.
    pub(super) stalled: BTreeSet<ConnId>,
    pub(super) paused: BTreeSet<ConnId>,
    pub(super) closed: BTreeMap<ConnId, CloseHow>,
    next_seq: u32,
    next_conn: u32,
    controls: Vec<ControlMessage>,
}

pub(super) fn small_limits() -> Limits {
    Limits { context_max: 64, ..Limits::tiny() }
}

impl Harness {
    pub(super) fn new() -> Harness {
        Harness::with(FrontSettings::new(small_limits(), "bytes", 300))
    }

    pub(super) fn with(settings: FrontSettings) -> Harness {
        let (port, ends) = connect_front(&settings.limits, &Doorbell::new(), &Doorbell::new());
        let FrontPort { requests, control, gate, events, .. } = port;
        Harness {
            core: FrontCore::new(settings, Box::new(ByteTokeniser::new(300)), ends),
            now: Instant::ZERO,
            requests,
            control,
            gate,
            events,
            boxes: (0..EVENT_BATCHES).map(|_| Box::default()).collect(),
            decoders: BTreeMap::new(),
            received: BTreeMap::new(),
            under_way: BTreeMap::new(),
            stalled: BTreeSet::new(),
            paused: BTreeSet::new(),
            closed: BTreeMap::new(),
            next_seq: 0,
            next_conn: 0,
            controls: Vec::new(),
        }
    }

    /// A connected client.
    pub(super) fn connect(&mut self) -> ConnId {
        let conn = ConnId { slot: self.next_conn, generation: 7 };
        self.next_conn += 1;
        self.decoders.insert(conn, Decoder::new(Side::FromServer, 0));
        self.received.insert(conn, Vec::new());
        self.core.handle_accepted(conn, self.now);
        self.settle();
        conn
    }

    /// A client that has had its WELCOME.
    pub(super) fn welcomed(&mut self) -> ConnId {
        let conn = self.connect();
        self.send(conn, &hello(""));
        let got = self.got(conn);
        assert!(matches!(got[..], [Got::Welcome { .. }]), "{got:?}");
        conn
    }

    pub(super) fn send(&mut self, conn: ConnId, bytes: &[u8]) {
        self.core.handle_received(conn, bytes, self.now);
        self.settle();
    }

    pub(super) fn send_frame(&mut self, conn: ConnId, frame: ClientFrame<'_>) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.send(conn, &bytes);
    }

    pub(super) fn request(&mut self, conn: ConnId, number: u32, request: &Request) {
        let mut bytes = Vec::new();
        encode_request(&mut bytes, number, request, 1 << 20);
        self.send(conn, &bytes);
    }

    pub(super) fn close(&mut self, conn: ConnId) {
        self.core.handle_closed(conn, self.now);
        self.settle();
    }

    pub(super) fn wait_ms(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
        self.settle();
    }

    /// Runs the core and plays the kernel until nothing moves.
    pub(super) fn settle(&mut self) {
        loop {
            let mut did = self.core.tick(self.now);
            while let Some(action) = self.core.poll_action() {
                self.act(action);
                did = true;
            }
            did |= self.take_sends();
            if !did {
                break;
            }
        }
        while let Some(message) = self.control.pop() {
            match message {
                ControlMessage::Return(batch) => self.boxes.push(batch),
                other => self.controls.push(other),
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send { conn, bytes } => {
                assert!(!bytes.is_empty());
                assert!(self.under_way.insert(conn, bytes).is_none(), "two sends at once");
            }
            Action::PauseReading { conn } => assert!(self.paused.insert(conn)),
            Action::ResumeReading { conn } => assert!(self.paused.remove(&conn)),
            Action::Close { conn, how } => {
                assert!(self.closed.insert(conn, how).is_none());
                self.core.handle_closed(conn, self.now);
            }
        }
    }

    fn take_sends(&mut self) -> bool {
        let ready = |conn: &&ConnId| !self.stalled.contains(*conn);
        let Some(&conn) = self.under_way.keys().find(ready) else { return false };
        let buffer = self.under_way.remove(&conn).unwrap();
        self.received.get_mut(&conn).unwrap().extend_from_slice(&buffer);
        let taken = buffer.len();
        self.core.handle_sent(conn, buffer, taken, self.now);
        true
    }

    /// What the client got since the last time.
    pub(super) fn got(&mut self, conn: ConnId) -> Vec<Got> {
        let bytes = std::mem::take(self.received.get_mut(&conn).unwrap());
        let decoder = self.decoders.get_mut(&conn).unwrap();
        let mut input = &bytes[..];
        let mut got = Vec::new();
        while let Some(piece) = decoder.next(&mut input).expect("the server keeps the protocol") {
            let Piece::Frame { header, payload } = piece else { panic!("a server sent {piece:?}") };
            owned(ServerFrame::decode(header, payload).unwrap(), &mut got);
        }
        got
    }

    // ------------------------------------------------------------------ the engine's side

    fn next_request(&mut self) -> Option<RequestMessage> {
        let message = self.requests.receive()?;
        self.requests.give_back(1);
        Some(message)
    }

    pub(super) fn next_ask(&mut self) -> Option<Ask> {
        match self.next_request()? {
            RequestMessage::Ask(ask) => Some(ask),
            other => panic!("an ask, not {other:?}"),
        }
    }

    pub(super) fn ask(&mut self) -> Ask {
        self.settle();
        self.next_ask().expect("an ask")
    }

    pub(super) fn no_request(&mut self) {
        self.settle();
        let message = self.next_request();
        assert!(message.is_none(), "{message:?}");
    }

    pub(super) fn submission(&mut self) -> Box<Submission> {
        self.settle();
        match self.next_request() {
            Some(RequestMessage::Submit(submission)) => submission,
            other => panic!("a submission, not {other:?}"),
        }
    }

    /// Credits and cancels since the last time.
    pub(super) fn controls(&mut self) -> Vec<ControlMessage> {
        self.settle();
        std::mem::take(&mut self.controls)
    }

    pub(super) fn tell(&mut self, event: Event) {
        self.tell_batch(|batch| batch.events.push(event));
    }

    pub(super) fn tell_batch(&mut self, fill: impl FnOnce(&mut EventBatch)) {
        let mut batch = self.boxes.pop().expect("batches come back");
        fill(&mut batch);
        self.events.push(batch).expect("room for all batches");
        self.settle();
    }

    /// A client's frame, at a time when the engine reads nothing of what is for it.
    pub(super) fn send_unheard(&mut self, conn: ConnId, frame: ClientFrame<'_>) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.core.handle_received(conn, &bytes, self.now);
        while self.core.tick(self.now) {}
    }

    /// Sends every batch there is, and returns how many came back before anything was read of
    /// what is for the engine.
    pub(super) fn batches_back_from_a_deaf_engine(&mut self) -> usize {
        for batch in self.boxes.drain(..) {
            self.events.push(batch).expect("room for all batches");
        }
        while self.core.tick(self.now) {}
        self.settle();
        self.boxes.len()
    }

    pub(super) fn grant(&mut self, ask: &Ask) -> SeqKey {
        let seq = SeqKey { slot: self.next_seq, generation: 1 };
        self.next_seq += 1;
        self.tell(Event::Grant { stream: ask.stream, seq });
        seq
    }

    pub(super) fn tokens(&mut self, stream: StreamKey, tokens: &[u32], text: &[u8]) {
        self.tell_batch(|batch| {
            batch.events.push(Event::Tokens {
                stream,
                token_count: tokens.len() as u32,
                text_bytes: text.len() as u32,
                logprob_count: 0,
            });
            batch.tokens.extend_from_slice(tokens);
            batch.text.extend_from_slice(text);
        });
    }

    pub(super) fn done(&mut self, stream: StreamKey, finish: FinishReason) {
        self.tell(Event::Done {
            stream,
            finish,
            usage: Usage::default(),
            timings: Timings::default(),
        });
    }

    /// The next request message, whatever it is.
    pub(super) fn next_message(&mut self) -> Option<RequestMessage> {
        self.settle();
        self.next_request()
    }

    /// Asks of other clients take all credits of the request link.
    pub(super) fn fill_request_link(&mut self, conn: ConnId) {
        // The receiver takes and keeps: credits do not come back.
        for number in 1.. {
            self.request(conn, number, &text_request("x"));
            let Some(message) = self.requests.receive() else { break };
            let RequestMessage::Ask(ask) = message else { panic!("only asks: {message:?}") };
            self.tell(Event::Reject {
                stream: ask.stream,
                reason: RejectReason::QueueFull,
                retry_after_ms: None,
            });
        }
        self.close(conn);
    }

    /// Ends a stream at the engine unless it has ended.
    pub(super) fn end_if_open(&mut self, stream: StreamKey) {
        let key = crate::front::stream::slab_key(0, stream);
        if self.core.pipeline.streams.contains(key) {
            self.done(stream, FinishReason::Cancelled);
        }
    }

    /// No stream of this connection is left.
    pub(super) fn expect_streams_without(&mut self, conn: ConnId) {
        let left = |(_, stream): &(_, &crate::front::stream::Stream)| stream.conn == Some(conn);
        let streams = &self.core.pipeline.streams;
        assert_eq!(streams.iter().filter(left).count(), 0);
        let ingest: u64 = streams.iter().map(|(_, stream)| stream.ingest_bytes).sum();
        assert_eq!(ingest, self.core.pipeline.ingest_bytes);
    }

    /// The engine's ends go away.
    pub(super) fn drop_engine(&mut self) {
        let (events, consumer) = ring(1);
        drop(std::mem::replace(&mut self.events, events));
        drop(consumer);
        self.wait_ms(1);
    }

    /// A client whose request is submitted and accepted; gone through ask and grant.
    pub(super) fn running(&mut self, conn: ConnId, number: u32) -> (StreamKey, SeqKey) {
        self.request(conn, number, &text_request("hello"));
        let ask = self.ask();
        let seq = self.grant(&ask);
        let submission = self.submission();
        assert_eq!(submission.stream, ask.stream);
        self.tell(Event::Accepted { stream: ask.stream, position: 0, prompt_tokens: 5 });
        (ask.stream, seq)
    }
}

fn owned(frame: ServerFrame<'_>, got: &mut Vec<Got>) {
    let one = match frame {
        ServerFrame::Welcome(welcome) => Got::Welcome { request_credit: welcome.request_credit },
        ServerFrame::RequestCredit(count) => Got::RequestCredit(count),
        ServerFrame::Ping(_) => panic!("this server does not ping"),
        ServerFrame::Pong(number) => Got::Pong(number),
        ServerFrame::StatsReply(list) => {
            Got::Stats(list.iter().map(|stat| (stat.name.to_owned(), stat.value)).collect())
        }
        ServerFrame::GoingAway { deadline_ms } => Got::GoingAway(deadline_ms),
        ServerFrame::Error { code, .. } => Got::Error(code),
        ServerFrame::Accepted { stream, accepted } => Got::Accepted(stream, accepted),
        ServerFrame::Tokens { stream, tokens } => {
            if !tokens.logprobs.is_empty() {
                let entries = tokens.logprobs.iter();
                let entries = entries.map(|entry| (entry.logprob, entry.top().collect()));
                got.push(Got::Logprobs(stream, entries.collect()));
            }
            Got::Tokens(stream, tokens.ids.iter().collect(), tokens.text.to_owned())
        }
        ServerFrame::Paused { stream } => Got::Paused(stream),
        ServerFrame::Resumed { stream } => Got::Resumed(stream),
        ServerFrame::Done { stream, done: Done { finish, .. } } => Got::Done(stream, finish),
        ServerFrame::Rejected { stream, rejected } => Got::Rejected(
            stream,
            rejected.reason,
            rejected.retry_after_ms,
            rejected.message.to_owned(),
        ),
    };
    got.push(one);
}

pub(super) fn hello(token: &str) -> Vec<u8> {
    hello_of(token, Capabilities::ALL)
}

pub(super) fn hello_with(capabilities: Capabilities) -> Vec<u8> {
    hello_of("", capabilities)
}

fn hello_of(token: &str, capabilities: Capabilities) -> Vec<u8> {
    let mut bytes = Vec::new();
    let hello = Hello { version_min: 1, version_max: 1, capabilities, client: "test", token };
    ClientFrame::Hello(hello).encode(&mut bytes);
    bytes
}

pub(super) fn text_request(text: &str) -> Request {
    let mut request = Request::new(RequestPrompt::Text(text.to_owned()));
    request.window_tokens = 8;
    request
}

/// A request as its REQUEST frame, without any body, and one BODY frame with all of it.
pub(super) fn in_two(number: u32, request: &Request) -> (Vec<u8>, Vec<u8>) {
    let (mut body, mut head, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    let prelude = encode_body(request, &mut body);
    encode_request_frame(&mut head, number, &prelude, &[]);
    encode_body_frame(&mut rest, number, &body);
    (head, rest)
}
