//! Ask, grant, body, tokens, submission; refusals and their reasons.

use super::harness::*;
use crate::flow::Closed;
use crate::front::SLICE_BYTES;
use crate::message::{ControlMessage, Event};
use crate::protocol::{
    Capabilities, ClientFrame, ErrorCode, Prelude, PromptKind, Request, RequestPrompt, Role,
    encode_body_frame, encode_request, encode_request_frame,
};
use crate::request::{Class, FinishReason, Name, RejectReason};

#[test]
fn a_request_asks_with_its_prelude_and_submits_after_the_grant() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let mut request = text_request("abc");
    request.tenant = Name::new("acme").unwrap();
    request.class = Class::Bulk;
    request.max_tokens = Some(10);
    request.deadline_ms = Some(500);
    request.window_tokens = 5;
    world.request(conn, 1, &request);
    let ask = world.ask();
    assert_eq!((ask.class, ask.tenant.as_str()), (Class::Bulk, "acme"));
    assert_eq!((ask.input_bytes, ask.input_tokens), (3, 3));
    assert_eq!((ask.max_tokens, ask.window_tokens), (10, 5));
    assert_eq!(ask.deadline, Some(world.now.plus_ms(500)));
    world.no_request();
    let seq = world.grant(&ask);
    let submission = world.submission();
    assert_eq!((submission.stream, submission.seq), (ask.stream, seq));
    assert_eq!(submission.tokens, [97, 98, 99]);
    assert_eq!(submission.max_tokens, 10);
    assert_eq!(submission.tokens.capacity(), 13);
    world.tell(Event::Accepted { stream: ask.stream, position: 2, prompt_tokens: 3 });
    let got = world.got(conn);
    let [Got::Accepted(1, accepted), Got::RequestCredit(1)] = &got[..] else { panic!("{got:?}") };
    assert_eq!((accepted.position, accepted.prompt_tokens, accepted.max_tokens), (2, 3, 10));
}

#[test]
fn without_max_tokens_the_context_is_the_limit_and_the_client_is_told() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    for (number, asked, expected) in [(1, None, 60), (2, Some(1000), 60), (3, Some(1), 1)] {
        let mut request = text_request("four");
        request.max_tokens = asked;
        world.request(conn, number, &request);
        let ask = world.ask();
        world.grant(&ask);
        assert_eq!(world.submission().max_tokens, expected);
        world.tell(Event::Accepted { stream: ask.stream, position: 0, prompt_tokens: 4 });
        let told = world.got(conn).into_iter().any(
            |got| matches!(got, Got::Accepted(_, accepted) if accepted.max_tokens == expected),
        );
        assert!(told);
    }
}

#[test]
fn the_body_is_taken_only_after_the_grant() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let mut bytes = Vec::new();
    encode_request(&mut bytes, 1, &text_request("abc"), 1);
    encode_request(&mut bytes, 2, &text_request("def"), 1);
    world.send(conn, &bytes);
    let ask = world.ask();
    world.no_request();
    assert_eq!(world.core.pipeline.ingest_bytes, 3);
    world.grant(&ask);
    assert_eq!(world.submission().tokens, [97, 98, 99]);
    // Only now the rest of the input was looked at.
    let second = world.ask();
    world.grant(&second);
    assert_eq!(world.submission().tokens, [100, 101, 102]);
    assert_eq!(world.core.pipeline.ingest_bytes, 0);
}

#[test]
fn at_a_closed_gate_a_request_is_refused_as_by_the_engine_and_goes_no_further() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (reason, retry_after_ms) = (RejectReason::QueueFull, Some(7));
    world.gate.show(Class::Default, Some(Closed { reason, retry_after_ms }));
    world.request(conn, 1, &text_request("abc"));
    world.no_request();
    let at_gate = world.got(conn);
    assert_eq!((world.core.streams(), world.core.pipeline.ingest_bytes), (0, 0));

    world.gate.show(Class::Default, None);
    world.request(conn, 2, &text_request("abc"));
    let ask = world.ask();
    world.tell(Event::Reject { stream: ask.stream, reason, retry_after_ms });
    let by_engine = world.got(conn);
    let rejected = |number| Got::Rejected(number, reason, retry_after_ms, FULL.into());
    assert_eq!(at_gate, [rejected(1), Got::RequestCredit(1)]);
    assert_eq!(by_engine, [rejected(2), Got::RequestCredit(1)]);
    let counters = world.core.counters();
    assert_eq!((counters.requests_rejected, counters.requests_refused), (2, 0));
    let counted = world.gate.take_refusals().expect("the first was refused at the gate");
    assert_eq!(counted[reason as usize], 1);
}

const FULL: &str = "the queue is full";

#[test]
fn a_rejected_requests_body_is_skipped_as_it_arrives() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let mut bytes = Vec::new();
    encode_request(&mut bytes, 1, &text_request("abcdef"), 2);
    let (head, tail) = bytes.split_at(bytes.len() - 7);
    world.send(conn, head);
    let ask = world.ask();
    world.tell(Event::Reject {
        stream: ask.stream,
        reason: RejectReason::QueueFull,
        retry_after_ms: Some(77),
    });
    let message = "the queue is full".to_owned();
    assert_eq!(
        world.got(conn),
        [Got::Rejected(1, RejectReason::QueueFull, Some(77), message), Got::RequestCredit(1)]
    );
    world.send(conn, tail);
    world.running(conn, 2);
    assert_eq!(world.core.streams(), 1);
}

#[test]
fn asks_are_bounded_and_go_on_when_answered() {
    let mut world = Harness::new(); // asks_max is 2
    let conns: Vec<_> = (0..4).map(|_| world.welcomed()).collect();
    for &conn in &conns {
        world.request(conn, 1, &text_request("x"));
    }
    let (first, _second) = (world.ask(), world.ask());
    world.no_request();
    world.grant(&first);
    world.submission();
    world.ask();
    world.no_request();
}

#[test]
fn messages_become_template_and_ids_go_as_they_are() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let messages = vec![(Role::System, "s".to_owned()), (Role::User, "hi".to_owned())];
    let mut request = Request::new(RequestPrompt::Messages(messages));
    request.window_tokens = 1;
    world.request(conn, 1, &request);
    let ask = world.ask();
    world.grant(&ask);
    let text: Vec<u8> = world.submission().tokens.iter().map(|&token| token as u8).collect();
    assert_eq!(text, b"s:s\nu:hi\n");
    let mut request = Request::new(RequestPrompt::Tokens(vec![299, 0, 5]));
    request.window_tokens = 1;
    world.request(conn, 2, &request);
    let ask = world.ask();
    assert_eq!((ask.input_bytes, ask.input_tokens), (12, 3));
    world.grant(&ask);
    assert_eq!(world.submission().tokens, [299, 0, 5]);
}

/// Grants the next ask and expects a refusal with this in its message, and a cancel.
fn refused_after_grant(world: &mut Harness, request: &Request, reason: RejectReason, with: &str) {
    let conn = world.welcomed();
    world.request(conn, 1, request);
    let ask = world.ask();
    let seq = world.grant(&ask);
    world.no_request();
    let got = world.got(conn);
    let [Got::Rejected(1, got_reason, None, message), Got::RequestCredit(1)] = &got[..] else {
        panic!("{got:?}")
    };
    assert_eq!(*got_reason, reason);
    assert!(message.contains(with), "{message}");
    let controls = world.controls();
    let [ControlMessage::Cancel { seq: cancelled, .. }] = controls[..] else {
        panic!("{controls:?}")
    };
    assert_eq!(cancelled, seq);
    world.done(ask.stream, FinishReason::Cancelled);
    assert_eq!(world.got(conn), []);
    assert_eq!(world.core.streams(), 0);
    // The connection goes on.
    let (stream, _) = world.running(conn, 2);
    world.done(stream, FinishReason::EndOfText);
}

#[test]
fn what_can_never_fit_is_refused_after_tokenising_and_cancelled() {
    let mut world = Harness::new();
    for length in [64, 65, SLICE_BYTES * 3] {
        let request = text_request(&"x".repeat(length));
        refused_after_grant(&mut world, &request, RejectReason::ExceedsCapacity, "at most 64 fit");
    }
    let mut request = Request::new(RequestPrompt::Tokens(vec![1; 64]));
    request.window_tokens = 1;
    refused_after_grant(&mut world, &request, RejectReason::ExceedsCapacity, "64 tokens");
}

#[test]
fn a_prompt_that_leaves_room_for_one_token_is_taken() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    world.request(conn, 1, &text_request(&"x".repeat(63)));
    let ask = world.ask();
    world.grant(&ask);
    assert_eq!(world.submission().max_tokens, 1);
}

#[test]
fn an_invalid_body_is_refused_with_what_is_wrong() {
    let mut world = Harness::new();
    let invalid = RejectReason::Invalid;
    let mut request = text_request("x");
    request.options.sampling.temperature = -1.0;
    refused_after_grant(&mut world, &request, invalid, "temperature must be from 0 to 100");
    let mut request = text_request("x");
    request.options.sampling.logit_bias = vec![(300, 1.0)];
    refused_after_grant(&mut world, &request, invalid, "ids are below 300");
    let mut request = Request::new(RequestPrompt::Tokens(vec![1, 300]));
    request.window_tokens = 1;
    refused_after_grant(&mut world, &request, invalid, "token 300 is unknown");
    let mut request = text_request("x");
    request.options.stop = vec![Box::from(&b""[..])];
    refused_after_grant(&mut world, &request, invalid, "stop string");
    let mut request = Request::new(RequestPrompt::Messages(Vec::new()));
    request.window_tokens = 1;
    refused_after_grant(&mut world, &request, invalid, "at least one message");
}

#[test]
fn an_invalid_prelude_is_refused_without_an_ask() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let good = Prelude {
        class: Class::Default,
        kind: PromptKind::Text,
        tenant: Name::EMPTY,
        user: Name::EMPTY,
        max_tokens: 1,
        deadline_ms: 0,
        window_tokens: 1,
        options_bytes: 0,
        prompt_bytes: 1,
    };
    let too_wide = Prelude { window_tokens: 9, ..good };
    let no_window = Prelude { window_tokens: 0, ..good };
    let too_long = Prelude { prompt_bytes: 4097, ..good };
    let empty = Prelude { prompt_bytes: 0, ..good };
    let options = Prelude { options_bytes: 9000, ..good };
    for (number, prelude, reason, with) in [
        (1, too_wide, RejectReason::Invalid, "window_tokens must be from 1 to 8"),
        (2, no_window, RejectReason::Invalid, "window_tokens must be from 1 to 8"),
        (3, too_long, RejectReason::ExceedsCapacity, "at most 4096 bytes"),
        (4, empty, RejectReason::Invalid, "the prompt is empty"),
        (5, options, RejectReason::Invalid, "options_bytes must be at most 8192"),
    ] {
        let mut bytes = Vec::new();
        encode_request_frame(&mut bytes, number, &prelude, b"some of its body");
        encode_body_frame(&mut bytes, number, b"and more of it");
        world.send(conn, &bytes);
        let got = world.got(conn);
        let [Got::Rejected(n, got_reason, None, message), Got::RequestCredit(1)] = &got[..] else {
            panic!("{got:?}")
        };
        assert_eq!((*n, *got_reason), (number, reason));
        assert!(message.contains(with), "{message}");
    }
    world.no_request();
    world.running(conn, 9);
}

#[test]
fn bytes_of_bodies_are_bounded_over_all_connections() {
    let mut world = Harness::new(); // 8192 bytes
    let text = "x".repeat(4000);
    let conns: Vec<_> = (0..3).map(|_| world.welcomed()).collect();
    for &conn in &conns {
        world.request(conn, 1, &text_request(&text));
    }
    let got = world.got(conns[2]);
    let refused = matches!(
        &got[..],
        [Got::Rejected(1, RejectReason::QueueFull, Some(1000), _), Got::RequestCredit(1)]
    );
    assert!(refused, "{got:?}");
    assert_eq!(world.core.pipeline.ingest_bytes, 8000);
    // A disconnect gives the bytes back.
    world.close(conns[0]);
    let ask = world.ask();
    world.grant(&ask);
    assert_eq!(world.core.pipeline.ingest_bytes, 4000);
    world.request(conns[2], 2, &text_request(&text));
    assert_eq!(world.got(conns[2]), []);
}

#[test]
fn a_body_that_does_not_come_ends_its_stream_alone() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (other, _) = world.running(conn, 1);
    let mut bytes = Vec::new();
    encode_request(&mut bytes, 2, &text_request("abc"), 1);
    world.send(conn, &bytes[..bytes.len() - 1]);
    let ask = world.ask();
    let seq = world.grant(&ask);
    world.got(conn);
    world.wait_ms(29_999);
    assert_eq!(world.got(conn), []);
    world.wait_ms(1);
    let got = world.got(conn);
    assert!(matches!(&got[..], [Got::Rejected(2, RejectReason::Invalid, None, _), ..]), "{got:?}");
    let controls = world.controls();
    assert!(matches!(controls[..], [ControlMessage::Cancel { seq: s, .. }] if s == seq));
    world.done(ask.stream, FinishReason::Cancelled);
    world.send(conn, &bytes[bytes.len() - 1..]);
    world.tokens(other, &[1], b"a");
    assert_eq!(world.got(conn), [Got::Tokens(1, vec![1], "a".into())]);
}

#[test]
fn what_the_client_did_not_say_it_understands_is_refused() {
    let mut world = Harness::new();
    let conn = world.connect();
    world.send(conn, &hello_with(Capabilities::default()));
    world.got(conn);
    let mut ids = Request::new(RequestPrompt::Tokens(vec![1]));
    ids.window_tokens = 1;
    world.request(conn, 1, &ids);
    let mut logprobs = text_request("x");
    logprobs.options.sampling.logprobs = Some(0);
    world.request(conn, 2, &logprobs);
    let ask = world.ask();
    world.grant(&ask);
    let got = world.got(conn);
    let messages: Vec<&str> = got
        .iter()
        .filter_map(|got| match got {
            Got::Rejected(_, RejectReason::Invalid, None, message) => Some(&message[..]),
            _ => None,
        })
        .collect();
    assert_eq!(
        messages,
        [
            "a prompt of token ids needs capability bit 2 in HELLO",
            "logprobs needs capability bit 1 in HELLO"
        ]
    );
    world.send_frame(conn, ClientFrame::Stats);
    assert_eq!(world.got(conn).last(), Some(&Got::Error(ErrorCode::UnexpectedFrame as u16)));
}
