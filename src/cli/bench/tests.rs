//! The generator against a stand-in server that speaks the protocol and computes nothing.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::drive::{DriveError, Plan, run};
use super::tally::{Slo, Tally};
use super::workload::{Arrivals, Lengths};
use crate::protocol::{
    Accepted, Capabilities, ClientFrame, Decoder, Done, Piece, Rejected, ServerFrame, Side,
    TokensWriter, VERSION, Welcome,
};
use crate::request::{Class, FinishReason, Name, RejectReason, Timings, Usage};

/// How the stand-in behaves.
#[derive(Clone, Copy, Default)]
struct Manner {
    /// Refuses each request whose number is a multiple of this.
    reject_every: Option<u64>,
    /// Closes the connection at each request whose number is a multiple of this.
    close_every: Option<u64>,
    /// Never answers a request.
    mute: bool,
    /// Request credit at the start.
    request_credit: u32,
}

/// What the stand-in saw.
#[derive(Default)]
struct Seen {
    requests: AtomicU64,
    prompt_bytes: AtomicU64,
    /// Rules of the protocol that the generator broke.
    broken_rules: AtomicU64,
}

fn server(manner: Manner) -> (SocketAddr, Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Seen::default());
    let shared = seen.clone();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let seen = shared.clone();
            thread::spawn(move || serve(socket.unwrap(), manner, &seen));
        }
    });
    (address, seen)
}

struct Stream {
    credit: u32,
    wanted: u32,
    body_rest: u64,
    is_answered: bool,
}

fn serve(mut socket: TcpStream, manner: Manner, seen: &Seen) {
    let mut decoder = Decoder::new(Side::FromClient, 1 << 20);
    let mut streams: BTreeMap<u32, Stream> = BTreeMap::new();
    let mut buffer = vec![0; 1 << 16];
    let mut out = Vec::new();
    loop {
        let count = match socket.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let mut input = &buffer[..count];
        while let Some(piece) = decoder.next(&mut input).expect("the generator keeps the rules") {
            match piece {
                Piece::Request { stream, prelude, .. } => {
                    let prelude = prelude.expect("a right prelude");
                    let number = seen.requests.fetch_add(1, Ordering::Relaxed) + 1;
                    seen.prompt_bytes.fetch_add(prelude.prompt_bytes.into(), Ordering::Relaxed);
                    if manner.close_every.is_some_and(|n| number.is_multiple_of(n)) {
                        return;
                    }
                    if manner.reject_every.is_some_and(|n| number.is_multiple_of(n)) {
                        let reason = RejectReason::QueueFull;
                        let rejected = Rejected { reason, retry_after_ms: Some(1), message: "" };
                        ServerFrame::Rejected { stream, rejected }.encode(&mut out);
                        ServerFrame::RequestCredit(1).encode(&mut out);
                        continue;
                    }
                    let credit = prelude.window_tokens;
                    let (wanted, body_rest) = (prelude.max_tokens, prelude.body_bytes());
                    let is_answered = false;
                    streams.insert(stream, Stream { credit, wanted, body_rest, is_answered });
                    let unanswered = streams.values().filter(|s| !s.is_answered).count();
                    let over = unanswered > manner.request_credit.max(1) as usize;
                    seen.broken_rules.fetch_add(over.into(), Ordering::Relaxed);
                }
                Piece::Body { .. } => {}
                Piece::BodyPart { stream, bytes } => {
                    let Some(stream) = streams.get_mut(&stream) else { continue };
                    stream.body_rest -= bytes.len() as u64;
                }
                Piece::Frame { header, payload } => {
                    match ClientFrame::decode(header, payload).unwrap() {
                        ClientFrame::Hello(_) => welcome(manner).encode(&mut out),
                        ClientFrame::Credit { stream, tokens } => {
                            // Credit for a stream that has just ended is in order.
                            if let Some(stream) = streams.get_mut(&stream) {
                                stream.credit += tokens;
                                let over = stream.credit > 16;
                                seen.broken_rules.fetch_add(over.into(), Ordering::Relaxed);
                            }
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
        if !manner.mute {
            streams.retain(|&number, stream| answer(number, stream, &mut out));
        }
        if socket.write_all(&out).is_err() {
            return;
        }
        out.clear();
    }
}

fn welcome(manner: Manner) -> ServerFrame<'static> {
    ServerFrame::Welcome(Welcome {
        version: VERSION,
        capabilities: Capabilities::ALL,
        frame_bytes_max: 4096,
        request_bytes_max: 1 << 20,
        streams_max: 8,
        window_tokens_max: 16,
        request_credit: manner.request_credit.max(1),
        vocab_tokens: 1000,
        context_tokens: 5000,
        idle_timeout_ms: 1000,
        model: "stand-in",
        server: "stand-in/0",
    })
}

/// Sends as many tokens as there is credit for, two a frame. Returns whether the stream goes on.
fn answer(stream: u32, state: &mut Stream, out: &mut Vec<u8>) -> bool {
    if state.body_rest > 0 {
        return true;
    }
    if !state.is_answered {
        let accepted = Accepted { position: 0, prompt_tokens: 1, max_tokens: 1 };
        ServerFrame::Accepted { stream, accepted }.encode(out);
        ServerFrame::RequestCredit(1).encode(out);
        state.is_answered = true;
    }
    while state.wanted > 0 && state.credit > 0 {
        let count = state.wanted.min(state.credit).min(2);
        TokensWriter::begin(out, stream, (0..count).collect::<Vec<_>>().into_iter(), "x").end();
        state.wanted -= count;
        state.credit -= count;
    }
    if state.wanted > 0 {
        return true;
    }
    let finish = FinishReason::MaxTokens;
    let done = Done { finish, usage: Usage::default(), timings: Timings::default() };
    ServerFrame::Done { stream, done }.encode(out);
    false
}

fn plan(target: SocketAddr, arrivals: Arrivals) -> Plan {
    Plan {
        tenant: Name::EMPTY,
        class: Class::Default,
        target,
        connections: 2,
        arrivals,
        prompt: Lengths::Fixed(2000),
        output: Lengths::Uniform(1, 100),
        seed: 1,
        warm_up: Duration::from_millis(20),
        duration: Duration::from_millis(200),
        grace: Duration::from_secs(30),
        slo: Slo { ttft_ns: u64::MAX, itl_ns: u64::MAX },
    }
}

fn drive(plan: &Plan) -> Tally {
    run(plan, &mut |_, _| {}).unwrap().tally
}

#[test]
fn a_closed_loop_keeps_its_places_busy_and_completes_everything() {
    let (target, seen) = server(Manner { request_credit: 4, ..Manner::default() });
    let outcome = run(&plan(target, Arrivals::Closed(6)), &mut |_, _| {}).unwrap();
    let tally = outcome.tally;
    assert_eq!(outcome.server.model, "stand-in");
    assert!(tally.requests > 6 && tally.completed == tally.requests);
    assert_eq!(tally.good, tally.completed);
    assert!(tally.output_tokens > 0 && tally.ttft_ns.len() == tally.requests);
    // 2,000 ids of 4 bytes do not fit the server's largest frame: they came in several.
    let requests = seen.requests.load(Ordering::Relaxed);
    assert_eq!(seen.prompt_bytes.load(Ordering::Relaxed), requests * 8000);
    assert_eq!(seen.broken_rules.load(Ordering::Relaxed), 0);
    assert!(outcome.cpu_share.is_some_and(|share| share > 0.0));
}

#[test]
fn an_open_loop_sends_every_arrival_even_when_request_credit_is_scarce() {
    let (target, _) = server(Manner { request_credit: 1, ..Manner::default() });
    let tally = drive(&plan(target, Arrivals::Open(500.0)));
    // 100 arrivals are expected in 200 ms; under 50 or over 200 of a Poisson process never come.
    assert!((50..200).contains(&tally.requests), "{}", tally.requests);
    assert_eq!(tally.completed, tally.requests);
    assert_eq!(tally.late_ns.len(), tally.requests);
}

#[test]
fn refusals_are_counted_by_reason_and_their_places_go_on() {
    let (target, _) = server(Manner { reject_every: Some(3), ..Manner::default() });
    let tally = drive(&plan(target, Arrivals::Closed(4)));
    let refused = tally.rejected["queue_full"];
    assert!(refused > 0 && tally.completed > refused);
    assert_eq!(tally.completed + refused, tally.requests);
}

#[test]
fn requests_of_a_lost_connection_are_broken_and_the_run_ends() {
    let (target, _) = server(Manner { close_every: Some(10), ..Manner::default() });
    let tally = drive(&Plan { warm_up: Duration::ZERO, ..plan(target, Arrivals::Closed(4)) });
    // Both connections are lost after twenty requests, long before the time is over.
    assert!(tally.broken > 0);
    assert_eq!(tally.unfinished(), 0);
}

#[test]
fn what_a_server_never_answers_is_unfinished() {
    let (target, _) = server(Manner { mute: true, request_credit: 2, ..Manner::default() });
    let mut plan = plan(target, Arrivals::Open(1000.0));
    plan.grace = Duration::from_millis(50);
    let tally = drive(&plan);
    assert!(tally.requests > 4, "those that could not be sent count too");
    assert_eq!(tally.unfinished(), tally.requests);
    assert_eq!((tally.completed, tally.broken), (0, 0));
}

#[test]
fn whoever_is_no_forebay_is_found_out() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let result = run(&plan(nobody, Arrivals::Closed(1)), &mut |_, _| {});
    assert!(matches!(result, Err(DriveError::Connect { .. })));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        let _ = socket.read_to_end(&mut Vec::new());
    });
    let result = run(&plan(target, Arrivals::Closed(1)), &mut |_, _| {});
    assert!(matches!(result, Err(DriveError::Handshake { .. })));
}
