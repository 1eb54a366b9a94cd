//! Any bytes as what a client, or a server, sends: through the decoder, through a front core with
//! an engine that answers everything, and through the client's core.

use std::collections::BTreeMap;

use forebay::base::Instant;
use forebay::client::{ClientCore, ClientOptions, Request, RequestPrompt};
use forebay::flow::{Receiver, gate, link};
use forebay::front::{Action, ByteTokeniser, ConnId, FrontCore, FrontLinks, FrontSettings};
use forebay::limits::Limits;
use forebay::message::{
    ControlMessage, EVENT_BATCHES, Event, EventBatch, RequestMessage, SeqKey, StreamKey,
};
use forebay::protocol::{ClientFrame, Decoder, Piece, ServerFrame, Side, decode_body};
use forebay::request::{FinishReason, Timings, Usage};
use forebay::ring::{Consumer, Doorbell, Producer, ring};

/// How far a client's bytes got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// No handshake.
    Refused,
    /// A handshake.
    Welcomed,
    /// A request was answered.
    Answered,
    /// A request was accepted.
    Accepted,
}

/// The first byte says how the rest is cut. Panics only when something that must hold does not.
pub fn run(bytes: &[u8]) -> Stage {
    let Some((&cut, bytes)) = bytes.split_first() else { return Stage::Refused };
    let part_bytes = usize::from(cut) + 1;
    decode(Side::FromClient, bytes, part_bytes);
    decode(Side::FromServer, bytes, part_bytes);
    be_the_client(bytes, part_bytes);
    be_the_server(bytes, part_bytes)
}

/// Whatever can be read can be written, and is read again as the same.
fn decode(side: Side, bytes: &[u8], part_bytes: usize) {
    let mut decoder = Decoder::new(side, 4096);
    for part in bytes.chunks(part_bytes) {
        let mut input = part;
        while let Ok(Some(piece)) = decoder.next(&mut input) {
            match piece {
                Piece::Frame { header, payload } => {
                    let mut again = Vec::new();
                    if side == Side::FromClient {
                        let Ok(frame) = ClientFrame::decode(header, payload) else { continue };
                        frame.encode(&mut again);
                        let again = ClientFrame::decode(header, &again[12..]);
                        assert_eq!(again, Ok(frame), "written as it was read");
                    } else {
                        let Ok(frame) = ServerFrame::decode(header, payload) else { continue };
                        frame.encode(&mut again);
                        // NaN is not equal to itself: compare what is written.
                        let mut third = Vec::new();
                        let decoded = ServerFrame::decode(header, &again[12..]).unwrap();
                        decoded.encode(&mut third);
                        assert_eq!(again, third, "written as it was read");
                    }
                }
                Piece::Request { prelude: Ok(prelude), .. } if prelude.body_bytes() < 4096 => {
                    // The bytes that follow, whatever they are, as its body.
                    let length = prelude.body_bytes() as usize;
                    let body: Vec<u8> = bytes.iter().copied().cycle().take(length).collect();
                    let _ = decode_body(&prelude, &body);
                }
                _ => {}
            }
        }
        if !input.is_empty() {
            return;
        }
    }
}

fn be_the_client(bytes: &[u8], part_bytes: usize) {
    let mut core = ClientCore::new(&ClientOptions::default());
    let request = Request::new(RequestPrompt::Text("x".repeat(100)));
    let streams: Vec<u32> = (0..3).map(|_| core.start(&request).unwrap()).collect();
    core.cancel(streams[2]);
    for part in bytes.chunks(part_bytes) {
        let result = core.handle_received(part);
        let sent = core.outgoing().len();
        core.handle_sent(sent);
        for &stream in &streams {
            while let Ok(Some(_)) = core.poll_event(stream) {}
        }
        if result.is_err() {
            assert!(core.error().is_some());
            return;
        }
    }
}

/// The engine's ends, and what it knows.
struct Engine {
    requests: Receiver<RequestMessage>,
    control: Consumer<ControlMessage>,
    events: Producer<Box<EventBatch>>,
    #[expect(clippy::vec_box, reason = "the ring carries boxes")]
    idle: Vec<Box<EventBatch>>,
    /// Credit and stream of each sequence that lives.
    sequences: BTreeMap<u32, (StreamKey, u32)>,
    sequence_next: u32,
}

impl Engine {
    fn tell(&mut self, fill: impl FnOnce(&mut EventBatch)) {
        let mut batch = self.idle.pop().expect("batches come back");
        fill(&mut batch);
        self.events.push(batch).expect("room for all that circulate");
    }

    fn end(&mut self, slot: u32) {
        if let Some((stream, _)) = self.sequences.remove(&slot) {
            let (usage, timings) = (Usage::default(), Timings::default());
            let finish = FinishReason::Cancelled;
            self.tell(|batch| {
                batch.events.push(Event::Done { stream, finish, usage, timings });
            });
        }
    }

    /// Answers one message; `false` when there is none.
    fn turn(&mut self) -> bool {
        while let Some(message) = self.control.pop() {
            match message {
                ControlMessage::Return(batch) => self.idle.push(batch),
                ControlMessage::Credit { seq, tokens } => {
                    if let Some((_, credit)) = self.sequences.get_mut(&seq.slot) {
                        *credit += tokens;
                    }
                }
                ControlMessage::Cancel { seq, .. } => {
                    self.end(seq.slot);
                    return true;
                }
            }
        }
        let Some(message) = self.requests.receive() else { return false };
        self.requests.give_back(1);
        match message {
            RequestMessage::Ask(ask) => {
                let seq = SeqKey { slot: self.sequence_next, generation: 0 };
                self.sequence_next += 1;
                self.sequences.insert(seq.slot, (ask.stream, ask.window_tokens));
                self.tell(|batch| {
                    batch.events.push(Event::Grant { stream: ask.stream, seq });
                });
            }
            RequestMessage::Submit(submission) => {
                let stream = submission.stream;
                let prompt_tokens = submission.tokens.len() as u32;
                assert!(submission.max_tokens >= 1, "at least one token of output");
                let room = submission.tokens.capacity() as u32;
                assert!(room >= prompt_tokens + submission.max_tokens, "no reallocation");
                let Some((_, credit)) = self.sequences.get_mut(&submission.seq.slot) else {
                    return true;
                };
                let count = (*credit).min(submission.max_tokens);
                *credit -= count;
                self.tell(|batch| {
                    batch.events.push(Event::Accepted { stream, position: 0, prompt_tokens });
                    batch.events.push(Event::Tokens {
                        stream,
                        token_count: count,
                        text_bytes: count,
                        logprob_count: 0,
                    });
                    batch.tokens.extend(0..count);
                    batch.text.extend((0..count).map(|n| 0x80 | n as u8));
                });
            }
        }
        true
    }
}

/// A front core, its only client and its engine.
struct World {
    core: FrontCore,
    engine: Engine,
    conn: ConnId,
    now: Instant,
    sent: Vec<u8>,
    is_closed: bool,
}

impl World {
    fn new() -> World {
        let limits = Limits { context_max: 200, ..Limits::tiny() };
        let bell = Doorbell::new();
        let (sender, requests) = link("requests", 4, Doorbell::new(), bell);
        let (control_in, control) = ring(FrontLinks::control_capacity(&limits));
        let (events, consumer) = ring(EVENT_BATCHES);
        let links = FrontLinks {
            requests: sender,
            control: control_in,
            gate: gate().1,
            events: consumer,
            engine_bell: Doorbell::new(),
        };
        let settings = FrontSettings::new(limits, "bytes", 300);
        let mut core = FrontCore::new(settings, Box::new(ByteTokeniser::new(300)), links);
        let conn = ConnId { slot: 0, generation: 0 };
        core.handle_accepted(conn, Instant::ZERO);
        let engine = Engine {
            requests,
            control,
            events,
            idle: (0..EVENT_BATCHES).map(|_| Box::default()).collect(),
            sequences: BTreeMap::new(),
            sequence_next: 0,
        };
        World { core, engine, conn, now: Instant::ZERO, sent: Vec::new(), is_closed: false }
    }

    fn settle(&mut self) {
        loop {
            let mut did = self.core.tick(self.now);
            while let Some(action) = self.core.poll_action() {
                did = true;
                match action {
                    Action::Send { conn, bytes } => {
                        self.sent.extend_from_slice(&bytes);
                        let taken = bytes.len();
                        self.core.handle_sent(conn, bytes, taken, self.now);
                    }
                    Action::PauseReading { .. } | Action::ResumeReading { .. } => {}
                    Action::Close { conn, .. } => {
                        self.is_closed = true;
                        self.core.handle_closed(conn, self.now);
                    }
                }
            }
            did |= self.engine.turn();
            if !did {
                return;
            }
        }
    }
}

fn be_the_server(bytes: &[u8], part_bytes: usize) -> Stage {
    let mut world = World::new();
    for part in bytes.chunks(part_bytes) {
        if world.is_closed {
            break;
        }
        world.core.handle_received(world.conn, part, world.now);
        world.settle();
    }
    // Time passes; then the client is gone, and nothing may be left of it.
    world.now = world.now.plus_ms(100_000);
    world.settle();
    if !world.is_closed {
        world.core.handle_closed(world.conn, world.now);
        world.settle();
    }
    for slot in 0..world.engine.sequence_next {
        world.engine.end(slot);
        world.settle();
    }
    assert_eq!((world.core.streams(), world.core.connections()), (0, 0));
    assert_eq!(world.core.next_timeout(), None, "no timer without a connection");
    judge_output(&world.sent)
}

/// What the server sent keeps the protocol: whole frames, one last frame a stream, and none after.
fn judge_output(sent: &[u8]) -> Stage {
    let mut decoder = Decoder::new(Side::FromServer, 0);
    let mut input = sent;
    let mut stage = Stage::Refused;
    let mut over = std::collections::BTreeSet::new();
    while let Some(piece) = decoder.next(&mut input).expect("the server keeps the protocol") {
        let Piece::Frame { header, payload } = piece else { panic!("a server sent {piece:?}") };
        match ServerFrame::decode(header, payload).expect("the server keeps the protocol") {
            ServerFrame::Welcome(_) => stage = stage.max(Stage::Welcomed),
            ServerFrame::Accepted { .. } => stage = Stage::Accepted,
            ServerFrame::Done { stream, .. } | ServerFrame::Rejected { stream, .. } => {
                stage = stage.max(Stage::Answered);
                assert!(over.insert(stream), "two last frames");
                continue;
            }
            _ => {}
        }
        assert!(header.stream == 0 || !over.contains(&header.stream), "a frame after the last");
    }
    assert!(decoder.is_between_frames(), "the last frame is whole");
    stage
}
