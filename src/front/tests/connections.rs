//! Handshake, limits, time-outs, garbage, drain.

use super::harness::*;
use crate::base::Instant;
use crate::front::{CloseHow, FrontSettings};
use crate::message::ControlMessage;
use crate::protocol::{ClientFrame, ErrorCode, FrameType, Header, encode_body_frame};
use crate::request::{FinishReason, RejectReason};

fn error(code: ErrorCode) -> Got {
    Got::Error(code as u16)
}

#[test]
fn garbage_gets_an_error_and_a_close() {
    for (bytes, code) in [
        (&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], ErrorCode::UnknownFrame),
        (&[0xff; 64], ErrorCode::UnknownFrame),
        (&[8, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8], ErrorCode::NotForebay),
        (&[8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8], ErrorCode::NotForebay),
        (&[0xff, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], ErrorCode::FrameTooLarge),
    ] {
        let mut world = Harness::new();
        let conn = world.connect();
        world.send(conn, bytes);
        assert_eq!(world.got(conn), [error(code)]);
        assert_eq!(world.closed.get(&conn), Some(&CloseHow::Linger));
        assert_eq!(world.core.connections(), 0);
    }
}

#[test]
fn every_violation_after_the_handshake_has_its_code() {
    let frame = |kind, stream, payload: &[u8]| {
        let mut bytes = Vec::new();
        Header { payload_bytes: payload.len() as u32, kind, stream }.encode(&mut bytes);
        bytes.extend_from_slice(payload);
        bytes
    };
    for (bytes, code) in [
        (hello(""), ErrorCode::UnexpectedFrame),
        (frame(FrameType::Pong, 0, &[0; 7]), ErrorCode::Malformed),
        (frame(FrameType::Welcome, 0, &[]), ErrorCode::UnexpectedFrame),
        (frame(FrameType::Credit, 1, &[1, 0, 0, 0]), ErrorCode::StreamNumber),
        (frame(FrameType::Cancel, 1, &[]), ErrorCode::StreamNumber),
        (frame(FrameType::Body, 1, &[0]), ErrorCode::StreamNumber),
        (frame(FrameType::Body, 1, &[0; 4097]), ErrorCode::FrameTooLarge),
        (frame(FrameType::Credit, 1, &[0; 4]), ErrorCode::Malformed),
    ] {
        let mut world = Harness::new();
        let conn = world.welcomed();
        world.send(conn, &bytes);
        assert_eq!(world.got(conn), [error(code)], "{bytes:?}");
        assert!(world.closed.contains_key(&conn));
    }
}

#[test]
fn stream_numbers_only_grow_and_a_body_is_as_long_as_announced() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    world.running(conn, 5);
    world.request(conn, 5, &text_request("x"));
    assert_eq!(world.got(conn).last(), Some(&error(ErrorCode::StreamNumber)));
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (stream, _) = world.running(conn, 1);
    let mut bytes = Vec::new();
    encode_body_frame(&mut bytes, 1, b"x");
    world.send(conn, &bytes);
    assert_eq!(world.got(conn).last(), Some(&error(ErrorCode::Malformed)));
    world.done(stream, FinishReason::Cancelled);
}

#[test]
fn a_token_is_asked_for_and_checked() {
    let settings = || {
        let mut settings = FrontSettings::new(small_limits(), "bytes", 300);
        settings.token = Some("open sesame".to_owned());
        settings
    };
    for wrong in ["", "open sesam", "open sesame!", "OPEN SESAME"] {
        let mut world = Harness::with(settings());
        let conn = world.connect();
        world.send(conn, &hello(wrong));
        assert_eq!(world.got(conn), [error(ErrorCode::Unauthenticated)]);
        assert!(world.closed.contains_key(&conn));
    }
    let mut world = Harness::with(settings());
    let conn = world.connect();
    world.send(conn, &hello("open sesame"));
    assert!(matches!(world.got(conn)[..], [Got::Welcome { .. }]));
}

#[test]
fn a_handshake_has_its_time_and_so_has_an_idle_connection() {
    let mut world = Harness::new(); // 1 s and 10 s
    let (slow, idle, busy) = (world.connect(), world.welcomed(), world.welcomed());
    world.running(busy, 1);
    world.got(busy);
    world.send(slow, &hello("")[..20]);
    world.wait_ms(999);
    assert_eq!(world.got(slow), []);
    assert_eq!(world.core.next_timeout(), Some(world.now.plus_ms(1)));
    world.wait_ms(1);
    assert_eq!(world.got(slow), [error(ErrorCode::HandshakeTimeout)]);
    world.wait_ms(8_000);
    world.send_frame(idle, ClientFrame::Ping(5));
    world.wait_ms(9_999);
    assert_eq!(world.got(idle), [Got::Pong(5)]);
    world.wait_ms(1);
    assert_eq!(world.got(idle), [error(ErrorCode::IdleTimeout)]);
    assert_eq!(world.got(busy), [], "a connection with a stream is not idle");
    assert_eq!(world.core.connections(), 1);
}

#[test]
fn a_connection_is_idle_from_the_end_of_its_last_stream() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (stream, _) = world.running(conn, 1);
    world.wait_ms(25_000);
    world.done(stream, FinishReason::EndOfText);
    world.got(conn);
    world.wait_ms(9_999);
    assert_eq!(world.got(conn), []);
    world.wait_ms(10_000);
    assert_eq!(world.got(conn), [error(ErrorCode::IdleTimeout)]);
}

#[test]
fn a_client_that_does_not_read_its_error_is_cut_off() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    world.stalled.insert(conn);
    world.send(conn, &[0xff; 12]);
    assert!(!world.closed.contains_key(&conn));
    world.wait_ms(1_000);
    assert_eq!(world.closed.get(&conn), Some(&CloseHow::Now));
}

#[test]
fn requests_beyond_request_credit_end_the_connection() {
    let mut world = Harness::new(); // credit for 4
    let conn = world.welcomed();
    for number in 1..=4 {
        world.send(conn, &in_two(number, &text_request("x")).0);
    }
    assert_eq!(world.got(conn), []);
    world.request(conn, 5, &text_request("x"));
    assert_eq!(world.got(conn), [error(ErrorCode::RequestCreditExceeded)]);
}

#[test]
fn streams_beyond_the_limit_are_refused_and_the_others_go_on() {
    let mut world = Harness::new(); // 4 streams
    let conn = world.welcomed();
    let streams: Vec<_> = (1..=4).map(|number| world.running(conn, number).0).collect();
    world.got(conn);
    world.request(conn, 5, &text_request("x"));
    let got = world.got(conn);
    assert!(
        matches!(
            &got[..],
            [Got::Rejected(5, RejectReason::TooManyStreams, Some(_), _), Got::RequestCredit(1)]
        ),
        "{got:?}"
    );
    world.done(streams[0], FinishReason::EndOfText);
    world.running(conn, 6);
}

#[test]
fn connections_beyond_the_limit_are_told_so() {
    let mut world = Harness::new(); // 8
    for _ in 0..8 {
        world.connect();
    }
    let conn = world.connect();
    assert_eq!(world.got(conn), [error(ErrorCode::TooManyConnections)]);
    assert!(world.closed.contains_key(&conn));
}

#[test]
fn a_client_that_does_not_read_its_replies_is_not_read_either() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    world.stalled.insert(conn);
    let mut pings = Vec::new();
    for number in 0..10_000 {
        ClientFrame::Ping(number).encode(&mut pings);
    }
    let mut sent = 0;
    for piece in pings.chunks(4096) {
        if world.paused.contains(&conn) {
            break;
        }
        world.send(conn, piece);
        sent += piece.len();
    }
    assert!(sent < 40_000, "reading paused after {sent} bytes");
    world.stalled.clear();
    world.settle();
    assert!(world.paused.is_empty());
    world.send(conn, &pings[sent..]);
    let numbers = world.got(conn).into_iter().map(|got| match got {
        Got::Pong(number) => number,
        other => panic!("{other:?}"),
    });
    assert!(numbers.eq(0..10_000), "every ping is answered, in order");
}

#[test]
fn stats_are_numbers_with_names() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    world.running(conn, 1);
    world.got(conn);
    world.send_frame(conn, ClientFrame::Stats);
    let got = world.got(conn);
    let [Got::Stats(stats)] = &got[..] else { panic!("{got:?}") };
    assert!(stats.contains(&("front_streams_open".to_owned(), 1)));
    assert!(stats.contains(&("front_requests".to_owned(), 1)));
}

#[test]
fn drain_tells_everybody_refuses_the_new_and_ends_with_the_last_stream() {
    let mut world = Harness::new();
    let (idle, busy, young) = (world.welcomed(), world.welcomed(), world.connect());
    let (stream, _) = world.running(busy, 1);
    world.got(busy);
    world.core.begin_drain(world.now, world.now.plus_ms(60_000));
    world.settle();
    assert_eq!(world.got(idle), [Got::GoingAway(60_000)]);
    assert!(world.closed.contains_key(&idle));
    assert_eq!(world.got(busy), [Got::GoingAway(60_000)]);
    world.request(busy, 2, &text_request("x"));
    let got = world.got(busy);
    assert!(matches!(&got[0], Got::Rejected(2, RejectReason::ShuttingDown, None, _)), "{got:?}");
    world.send(young, &hello(""));
    let got = world.got(young);
    assert!(matches!(got[..], [Got::Welcome { .. }, Got::GoingAway(60_000)]), "{got:?}");
    assert!(!world.core.is_drained());
    world.tokens(stream, &[1], b"x");
    world.done(stream, FinishReason::EndOfText);
    assert_eq!(
        world.got(busy),
        [Got::Tokens(1, vec![1], "x".into()), Got::Done(1, FinishReason::EndOfText)]
    );
    assert!(world.core.is_drained(), "{:?}", world.core);
    assert_eq!(world.core.next_timeout(), None);
}

#[test]
fn a_client_that_reports_an_error_is_closed_and_its_streams_cancelled() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (stream, seq) = world.running(conn, 1);
    world.send_frame(conn, ClientFrame::Error { code: 6, about_stream: 1, message: "bad frame" });
    assert!(world.closed.contains_key(&conn));
    let controls = world.controls();
    assert!(matches!(controls[..], [ControlMessage::Cancel { seq: s, .. }] if s == seq));
    world.done(stream, FinishReason::Cancelled);
    assert_eq!(world.core.streams(), 0);
}

#[test]
fn an_engine_that_is_gone_ends_every_connection_with_a_word() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    world.running(conn, 1);
    world.got(conn);
    world.drop_engine();
    assert_eq!(world.got(conn), [error(ErrorCode::Internal)]);
    assert_eq!((world.core.connections(), world.core.streams()), (0, 0));
    assert!(world.now > Instant::ZERO || world.core.next_timeout().is_none());
}

#[test]
fn a_connection_that_cannot_be_sent_on_is_given_up_at_once() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (_, seq) = world.running(conn, 1);
    world.stalled.insert(conn);
    world.send_frame(conn, ClientFrame::Ping(1));
    world.under_way.remove(&conn);
    world.core.handle_send_refused(conn, world.now);
    world.settle();
    assert_eq!(world.closed.get(&conn), Some(&CloseHow::Now));
    let controls = world.controls();
    assert!(matches!(controls[..], [ControlMessage::Cancel { seq: s, .. }] if s == seq));
}
