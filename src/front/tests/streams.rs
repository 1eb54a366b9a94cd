//! Output, credit, cancels in every state.

use super::harness::*;
use crate::front::ConnId;
use crate::message::{ControlMessage, EVENT_BATCHES, Event, Logprob, SeqKey};
use crate::protocol::{ClientFrame, encode_body_frame};
use crate::request::{FinishReason, RejectReason};

fn cancels(controls: &[ControlMessage]) -> Vec<SeqKey> {
    let cancel = |message: &ControlMessage| match message {
        ControlMessage::Cancel { seq, .. } => Some(*seq),
        _ => None,
    };
    controls.iter().filter_map(cancel).collect()
}

fn credits(controls: &[ControlMessage]) -> Vec<(SeqKey, u32)> {
    let credit = |message: &ControlMessage| match message {
        ControlMessage::Credit { seq, tokens } => Some((*seq, *tokens)),
        _ => None,
    };
    controls.iter().filter_map(credit).collect()
}

#[test]
fn text_is_framed_in_whole_characters() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (stream, _) = world.running(conn, 1);
    world.got(conn);
    world.tokens(stream, &[7], b"n\xc3");
    world.tokens(stream, &[8], b"\xa9");
    world.tokens(stream, &[], b"!\xf0\x9f");
    world.done(stream, FinishReason::MaxTokens);
    assert_eq!(
        world.got(conn),
        [
            Got::Tokens(1, vec![7], "n".into()),
            Got::Tokens(1, vec![8], "é".into()),
            Got::Tokens(1, vec![], "!".into()),
            Got::Tokens(1, vec![], "\u{fffd}".into()),
            Got::Done(1, FinishReason::MaxTokens),
        ]
    );
    assert_eq!(world.core.streams(), 0);
}

#[test]
fn a_step_of_many_streams_is_one_send() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let streams: Vec<_> = (1..=3).map(|number| world.running(conn, number).0).collect();
    world.got(conn);
    world.stalled.insert(conn);
    world.tell_batch(|batch| {
        for &stream in &streams {
            batch.events.push(Event::Tokens {
                stream,
                token_count: 1,
                text_bytes: 1,
                logprob_count: 1,
            });
            batch.tokens.push(stream.slot);
            batch.text.push(b'x');
            batch.logprobs.push(Logprob { logprob: -0.25, top_count: 1 });
            batch.top.push((stream.slot, -0.25));
        }
    });
    assert_eq!(world.under_way.len(), 1);
    world.stalled.clear();
    world.settle();
    let got = world.got(conn);
    assert_eq!(got.len(), 6);
    for (number, stream) in (1..=3).zip(streams) {
        let tokens = Got::Tokens(number, vec![stream.slot], "x".into());
        let logprobs = Got::Logprobs(number, vec![(-0.25, vec![(stream.slot, -0.25)])]);
        assert!(got.contains(&tokens) && got.contains(&logprobs), "{got:?}");
    }
}

#[test]
fn a_stalled_reader_gets_no_credit_however_generous_it_is() {
    let mut world = Harness::new(); // a window of 8
    let conn = world.welcomed();
    let (stream, seq) = world.running(conn, 1);
    world.got(conn);
    world.stalled.insert(conn);
    world.tokens(stream, &[1, 2, 3, 4, 5, 6, 7, 8], b"abcdefgh");
    world.send_frame(conn, ClientFrame::Credit { stream: 1, tokens: 8 });
    assert!(world.controls().is_empty());
    world.tell(Event::Paused { stream });
    world.stalled.clear();
    world.settle();
    assert_eq!(credits(&world.controls()), [(seq, 8)]);
    world.tell(Event::Resumed { stream });
    let got = world.got(conn);
    assert_eq!(got[1..], [Got::Paused(1), Got::Resumed(1)]);
}

#[test]
fn credits_are_gathered_until_the_engine_has_half_a_window() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (stream, seq) = world.running(conn, 1);
    world.tokens(stream, &[1, 2], b"ab");
    world.send_frame(conn, ClientFrame::Credit { stream: 1, tokens: 1 });
    world.send_frame(conn, ClientFrame::Credit { stream: 1, tokens: 1 });
    assert!(world.controls().is_empty());
    world.tokens(stream, &[3, 4], b"cd");
    assert_eq!(credits(&world.controls()), [(seq, 2)]);
}

#[test]
fn more_credit_than_the_window_ends_the_connection() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (_, seq) = world.running(conn, 1);
    world.got(conn);
    world.send_frame(conn, ClientFrame::Credit { stream: 1, tokens: 1 });
    assert_eq!(world.got(conn), [Got::Error(10)]);
    assert!(world.closed.contains_key(&conn));
    assert_eq!(cancels(&world.controls()), [seq]);
}

#[test]
fn credit_before_submission_goes_along_with_it() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let mut request = text_request("abc");
    request.window_tokens = 1;
    let (head, body) = in_two(1, &request);
    world.send(conn, &head);
    let ask = world.ask();
    assert_eq!(ask.window_tokens, 1);
    world.send_frame(conn, ClientFrame::Credit { stream: 1, tokens: 3 });
    let seq = world.grant(&ask);
    assert!(world.controls().is_empty());
    world.send(conn, &body);
    world.submission();
    assert_eq!(credits(&world.controls()), [(seq, 3)]);
}

/// Where a request is when it is cancelled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    WaitingToAsk,
    Asked,
    Body,
    Tokenising,
    WaitingToSubmit,
    Submitted,
    Accepted,
    Paused,
    Ending,
}

/// A request brought to a state, with the engine's names for it as far as it has them.
fn bring_to(world: &mut Harness, state: State) -> (ConnId, Option<crate::message::Ask>) {
    let conn = world.welcomed();
    if state == State::WaitingToAsk {
        // Others have all asks.
        for _ in 0..2 {
            let other = world.welcomed();
            world.request(other, 1, &text_request("other"));
        }
        world.send(conn, &in_two(1, &text_request("abc")).0);
        return (conn, None);
    }
    let (head, body) = in_two(1, &text_request("abc"));
    world.send(conn, &head);
    let ask = world.ask();
    if state == State::Asked {
        return (conn, Some(ask));
    }
    world.grant(&ask);
    if state == State::Body {
        let mut part = Vec::new();
        encode_body_frame(&mut part, 1, b"a");
        world.send(conn, &part);
        return (conn, Some(ask));
    }
    if matches!(state, State::Tokenising | State::WaitingToSubmit) {
        // Without a turn of the core the prompt is in the queue; one turn brings it out of it,
        // and no credit on the link keeps it from being sent.
        if state == State::WaitingToSubmit {
            let other = world.welcomed();
            world.fill_request_link(other);
        }
        world.core.handle_received(conn, &body, world.now);
        if state == State::WaitingToSubmit {
            world.settle();
        }
        return (conn, Some(ask));
    }
    world.send(conn, &body);
    world.submission();
    if state != State::Submitted {
        world.tell(Event::Accepted { stream: ask.stream, position: 0, prompt_tokens: 3 });
    }
    if state == State::Paused {
        world.tell(Event::Paused { stream: ask.stream });
    }
    if state == State::Ending {
        world.send_frame(conn, ClientFrame::Cancel { stream: 1 });
        assert_eq!(world.controls().len(), 1);
    }
    (conn, Some(ask))
}

const STATES: [State; 9] = [
    State::WaitingToAsk,
    State::Asked,
    State::Body,
    State::Tokenising,
    State::WaitingToSubmit,
    State::Submitted,
    State::Accepted,
    State::Paused,
    State::Ending,
];

/// The engine's part after a cancel: it grants what was asked, is told to cancel, and ends it.
fn finish_at_engine(world: &mut Harness, state: State, ask: Option<crate::message::Ask>) {
    let Some(ask) = ask else { return };
    if state == State::Asked {
        world.grant(&ask);
    }
    let expected = usize::from(state != State::Ending);
    assert_eq!(cancels(&world.controls()).len(), expected, "{state:?}");
    world.done(ask.stream, FinishReason::Cancelled);
}

#[test]
fn a_cancel_in_every_state_ends_with_one_done() {
    for state in STATES {
        let mut world = Harness::new();
        let (conn, ask) = bring_to(&mut world, state);
        world.send_frame(conn, ClientFrame::Cancel { stream: 1 });
        finish_at_engine(&mut world, state, ask);
        let got = world.got(conn);
        let ends = got.iter().filter(|got| matches!(got, Got::Done(..) | Got::Rejected(..)));
        assert_eq!(ends.count(), 1, "{state:?}: {got:?}");
        assert!(got.contains(&Got::Done(1, FinishReason::Cancelled)), "{state:?}: {got:?}");
        let credit: u32 =
            got.iter().map(|g| if let Got::RequestCredit(n) = g { *n } else { 0 }).sum();
        assert_eq!(credit, 1, "{state:?}: {got:?}");
        // Late frames for it are no error.
        world.send_frame(conn, ClientFrame::Cancel { stream: 1 });
        world.send_frame(conn, ClientFrame::Credit { stream: 1, tokens: 1 });
        world.send_frame(conn, ClientFrame::Ping(1));
        assert!(world.controls().is_empty());
        if !matches!(state, State::WaitingToAsk | State::Asked | State::Body) {
            assert_eq!(world.got(conn), [Got::Pong(1)], "{state:?}");
        }
        world.expect_streams_without(conn);
    }
}

#[test]
fn a_disconnect_in_every_state_cancels_and_leaves_nothing() {
    for state in STATES {
        let mut world = Harness::new();
        let (conn, ask) = bring_to(&mut world, state);
        world.close(conn);
        finish_at_engine(&mut world, state, ask);
        world.expect_streams_without(conn);
        assert!(world.core.next_timeout().is_none_or(|at| at > world.now));
    }
}

#[test]
fn a_request_refused_after_its_cancel_is_done_as_cancelled() {
    let mut world = Harness::new();
    let (conn, ask) = bring_to(&mut world, State::Asked);
    world.send_frame(conn, ClientFrame::Cancel { stream: 1 });
    world.tell(Event::Reject {
        stream: ask.unwrap().stream,
        reason: RejectReason::QueueFull,
        retry_after_ms: Some(1),
    });
    assert_eq!(world.got(conn), [Got::Done(1, FinishReason::Cancelled), Got::RequestCredit(1)]);
    assert!(world.controls().is_empty());
}

#[test]
fn an_eviction_after_acceptance_is_rejected_once_and_gives_no_second_credit() {
    let mut world = Harness::new();
    let conn = world.welcomed();
    let (stream, _) = world.running(conn, 1);
    world.got(conn);
    world.tell(Event::Reject {
        stream,
        reason: RejectReason::QueueTtlExpired,
        retry_after_ms: Some(5),
    });
    let got = world.got(conn);
    assert!(
        matches!(&got[..], [Got::Rejected(1, RejectReason::QueueTtlExpired, Some(5), _)]),
        "{got:?}"
    );
}

#[test]
fn the_ring_back_keeps_room_for_every_batch() {
    let mut world = Harness::new();
    let conns = [world.welcomed(), world.welcomed()];
    for conn in conns {
        for number in 1..=4 {
            // The whole window is used up, so that each credit is worth a message.
            let (stream, _) = world.running(conn, number);
            world.tokens(stream, &[7; 8], b"");
        }
    }
    world.controls();
    for _ in 0..4 {
        for conn in conns {
            for number in 1..=4 {
                let credit = ClientFrame::Credit { stream: number, tokens: 1 };
                world.send_unheard(conn, credit);
            }
        }
    }
    assert_eq!(world.batches_back_from_a_deaf_engine(), EVENT_BATCHES);
    let given: u32 = credits(&world.controls()).iter().map(|(_, tokens)| tokens).sum();
    assert_eq!(given, 32, "what found no room comes later");
}
