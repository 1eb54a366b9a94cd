//! The client's core against frames that a server might send.

use super::*;
use crate::protocol::{
    Capabilities, Decoder, ErrorCode, Piece, Rejected, ServerFrame, Side, TokensWriter, Welcome,
};
use crate::request::{FinishReason, RejectReason};

fn welcome(request_credit: u32) -> Welcome<'static> {
    Welcome {
        version: 1,
        capabilities: Capabilities::ALL,
        frame_bytes_max: 64,
        request_bytes_max: 1000,
        streams_max: 4,
        window_tokens_max: 8,
        request_credit,
        vocab_tokens: 300,
        context_tokens: 64,
        idle_timeout_ms: 1000,
        model: "m",
        server: "s",
    }
}

fn open(request_credit: u32) -> ClientCore {
    let mut core = ClientCore::new(&ClientOptions::default());
    take_frames(&mut core);
    give(&mut core, ServerFrame::Welcome(welcome(request_credit))).unwrap();
    core
}

fn give(core: &mut ClientCore, frame: ServerFrame<'_>) -> Result<(), ClientError> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    core.handle_received(&bytes)
}

fn give_tokens(core: &mut ClientCore, stream: u32, ids: &[u32]) -> Result<(), ClientError> {
    let mut bytes = Vec::new();
    TokensWriter::begin(&mut bytes, stream, ids.iter().copied(), "x").end();
    core.handle_received(&bytes)
}

fn done(stream: u32) -> ServerFrame<'static> {
    let done = Done {
        finish: FinishReason::EndOfText,
        usage: Default::default(),
        timings: Default::default(),
    };
    ServerFrame::Done { stream, done }
}

/// What the core sends now, one word a frame.
fn take_frames(core: &mut ClientCore) -> Vec<String> {
    let mut words = Vec::new();
    let mut decoder = Decoder::new(Side::FromClient, 64);
    loop {
        let bytes = core.outgoing().to_vec();
        if bytes.is_empty() {
            break;
        }
        core.handle_sent(bytes.len());
        let mut input = &bytes[..];
        while let Some(piece) = decoder.next(&mut input).expect("the client keeps the protocol") {
            words.push(match piece {
                Piece::Frame { header, payload } => {
                    let amount = payload.first().filter(|_| header.stream > 0);
                    let amount = amount.map_or(String::new(), |byte| format!(" {byte}"));
                    format!("{} {}{amount}", header.kind.name(), header.stream)
                }
                Piece::Request { stream, prelude, .. } => {
                    format!("REQUEST {stream} window {}", prelude.unwrap().window_tokens)
                }
                Piece::Body { stream, body_bytes } => format!("BODY {stream} {body_bytes}"),
                Piece::BodyPart { .. } => continue,
            });
        }
    }
    words
}

fn text(bytes: usize) -> Request {
    let mut request = Request::new(RequestPrompt::Text("x".repeat(bytes)));
    request.window_tokens = 4;
    request
}

#[test]
fn nothing_but_hello_goes_out_before_welcome() {
    let mut core = ClientCore::new(&ClientOptions::default());
    let stream = core.start(&text(3)).unwrap();
    assert_eq!(take_frames(&mut core), ["HELLO 0"]);
    give(&mut core, ServerFrame::Welcome(welcome(1))).unwrap();
    assert_eq!(take_frames(&mut core), [format!("REQUEST {stream} window 4")]);
    assert_eq!(core.info().unwrap().context_tokens, 64);
}

#[test]
fn requests_wait_for_request_credit_and_streams_for_their_limit() {
    let mut core = open(1);
    for _ in 0..6 {
        core.start(&text(1)).unwrap();
    }
    assert_eq!(take_frames(&mut core), ["REQUEST 1 window 4"]);
    assert!(!core.wants_to_send());
    give(&mut core, ServerFrame::RequestCredit(9)).unwrap();
    assert!(core.wants_to_send());
    assert_eq!(take_frames(&mut core).len(), 3, "four streams may be open");
    give(&mut core, done(1)).unwrap();
    assert_eq!(take_frames(&mut core), ["REQUEST 5 window 4"]);
}

#[test]
fn a_window_is_cut_to_what_the_server_allows() {
    let mut core = open(1);
    let mut request = text(1);
    request.window_tokens = 1000;
    core.start(&request).unwrap();
    assert_eq!(take_frames(&mut core), ["REQUEST 1 window 8"]);
}

#[test]
fn a_long_body_goes_in_parts_and_a_cancel_passes_it() {
    let mut core = open(2);
    let stream = core.start(&text(100)).unwrap();
    assert_eq!(take_frames(&mut core).len(), 1 + 3, "32 bytes with REQUEST, then 32, 32 and 4");
    assert_eq!(core.start(&text(1001)).unwrap_err(), {
        ClientError::Request("the request has 1001 bytes; the server takes 1000".into())
    });
    core.cancel(stream);
    assert_eq!(take_frames(&mut core), ["CANCEL 1"]);
}

#[test]
fn credit_goes_back_as_events_are_taken_half_a_window_at_a_time() {
    let mut core = open(1);
    let stream = core.start(&text(1)).unwrap();
    take_frames(&mut core);
    give_tokens(&mut core, stream, &[1]).unwrap();
    give_tokens(&mut core, stream, &[2, 3, 4]).unwrap();
    assert_eq!(take_frames(&mut core), [""; 0], "nothing was taken yet");
    assert!(matches!(core.poll_event(stream), Ok(Some(Event::Tokens(_)))));
    assert_eq!(take_frames(&mut core), [""; 0]);
    assert!(matches!(core.poll_event(stream), Ok(Some(Event::Tokens(_)))));
    assert_eq!(take_frames(&mut core), ["CREDIT 1 4"]);
    assert_eq!(core.poll_event(stream), Ok(None));
}

#[test]
fn a_server_that_sends_more_than_it_may_is_told_apart() {
    let mut core = open(1);
    let stream = core.start(&text(1)).unwrap();
    take_frames(&mut core);
    let error = give_tokens(&mut core, stream, &[1, 2, 3, 4, 5]).unwrap_err();
    assert!(matches!(error, ClientError::Protocol(_)), "{error}");
    let mut core = open(1);
    assert!(matches!(give(&mut core, done(7)), Err(ClientError::Protocol(_))));
    let mut core = open(1);
    assert!(give(&mut core, ServerFrame::Welcome(welcome(1))).is_err());
}

#[test]
fn a_stream_has_one_last_event_and_then_none() {
    let mut core = open(2);
    let (first, second) = (core.start(&text(1)).unwrap(), core.start(&text(1)).unwrap());
    take_frames(&mut core);
    give(&mut core, done(first)).unwrap();
    let rejected =
        Rejected { reason: RejectReason::QueueFull, retry_after_ms: Some(5), message: "full" };
    give(&mut core, ServerFrame::Rejected { stream: second, rejected }).unwrap();
    assert!(core.poll_event(first).unwrap().unwrap().is_last());
    assert!(core.is_finished(first));
    assert_eq!(core.poll_event(first), Ok(None));
    let Some(Event::Rejected(rejection)) = core.poll_event(second).unwrap() else { panic!() };
    assert_eq!((rejection.retry_after_ms, &rejection.message[..]), (Some(5), "full"));
    assert!(give(&mut core, done(first)).is_err(), "a second last frame");
}

#[test]
fn a_request_cancelled_before_it_was_sent_never_goes_out() {
    let mut core = open(0);
    let stream = core.start(&text(1)).unwrap();
    core.cancel(stream);
    core.cancel(stream);
    give(&mut core, ServerFrame::RequestCredit(1)).unwrap();
    assert_eq!(take_frames(&mut core), [""; 0]);
    let Some(Event::Done(done)) = core.poll_event(stream).unwrap() else { panic!() };
    assert_eq!(done.finish, FinishReason::Cancelled);
}

#[test]
fn an_abandoned_stream_is_cancelled_and_forgotten_at_its_end() {
    let mut core = open(1);
    let stream = core.start(&text(1)).unwrap();
    take_frames(&mut core);
    core.abandon(stream);
    assert_eq!(take_frames(&mut core), ["CANCEL 1"]);
    give_tokens(&mut core, stream, &[1]).unwrap();
    assert_eq!(core.poll_event(stream), Ok(None));
    give(&mut core, done(stream)).unwrap();
    assert!(core.is_finished(stream));
}

#[test]
fn a_lost_connection_ends_every_stream_after_what_came_before() {
    let mut core = open(2);
    let stream = core.start(&text(1)).unwrap();
    take_frames(&mut core);
    give_tokens(&mut core, stream, &[1]).unwrap();
    let error = give(&mut core, ErrorCode::IdleTimeout.frame(0, "bye")).unwrap_err();
    assert!(matches!(&error, ClientError::Server { code: 12, .. }), "{error:?}");
    assert!(matches!(core.poll_event(stream), Ok(Some(Event::Tokens(_)))));
    assert_eq!(core.poll_event(stream), Err(error.clone()));
    assert!(core.is_finished(stream));
    assert_eq!(core.start(&text(1)), Err(error));
}

#[test]
fn a_ping_of_the_server_is_answered() {
    let mut core = open(1);
    give(&mut core, ServerFrame::Ping(3)).unwrap();
    assert_eq!(take_frames(&mut core), ["PONG 0"]);
}
