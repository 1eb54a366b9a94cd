//! However input is cut and whatever it is, the same comes out, or an error: never a panic.

use proptest::prelude::*;

use super::harness::*;
use crate::message::{Event, RequestMessage, StreamKey};
use crate::protocol::{ClientFrame, encode_request};
use crate::request::FinishReason;

/// A conversation with two requests in parts, credits, a cancel and a ping.
fn conversation() -> Vec<u8> {
    let mut bytes = hello("");
    let mut request = text_request("one request");
    request.options.ignore_eos = true;
    request.window_tokens = 2;
    request.max_tokens = Some(3);
    encode_request(&mut bytes, 3, &request, 5);
    ClientFrame::Credit { stream: 3, tokens: 1 }.encode(&mut bytes);
    ClientFrame::Ping(42).encode(&mut bytes);
    encode_request(&mut bytes, 4, &text_request("another"), 1000);
    ClientFrame::Stats.encode(&mut bytes);
    ClientFrame::Cancel { stream: 4 }.encode(&mut bytes);
    encode_request(&mut bytes, 9, &text_request(&"long".repeat(20)), 7);
    bytes
}

/// Plays an engine that grants everything, then ends each submission after one token each.
fn play_engine(world: &mut Harness, streams: &mut Vec<StreamKey>) {
    loop {
        world.settle();
        for message in world.controls() {
            if let crate::message::ControlMessage::Cancel { seq, .. } = message {
                let stream = streams[seq.slot as usize];
                world.done(stream, FinishReason::Cancelled);
            }
        }
        let Some(message) = world.next_message() else { return };
        match message {
            RequestMessage::Ask(ask) => {
                assert_eq!(world.grant(&ask).slot as usize, streams.len());
                streams.push(ask.stream);
            }
            RequestMessage::Submit(submission) => {
                let stream = submission.stream;
                let prompt_tokens = submission.tokens.len() as u32;
                world.tell(Event::Accepted { stream, position: 0, prompt_tokens });
                world.tokens(stream, &[prompt_tokens], b"t");
            }
        }
    }
}

/// All frames, stream by stream: how those of different streams mix depends on when input came.
fn run(parts: &[&[u8]]) -> Vec<Vec<Got>> {
    let mut world = Harness::new();
    let conn = world.connect();
    let mut streams = Vec::new();
    for part in parts {
        world.core.handle_received(conn, part, world.now);
        play_engine(&mut world, &mut streams);
    }
    let mut sorted = vec![Vec::new(); 4];
    for got in world.got(conn) {
        let index = match got {
            Got::Accepted(3, _) | Got::Tokens(3, ..) | Got::Done(3, _) => 0,
            Got::Accepted(4, _) | Got::Tokens(4, ..) => continue,
            Got::Done(4, _) => 1,
            Got::Rejected(9, ..) | Got::Done(9, _) => 2,
            Got::RequestCredit(_) => continue,
            Got::Stats(_) => continue,
            _ => 3,
        };
        sorted[index].push(got);
    }
    sorted
}

#[test]
fn a_conversation_cut_at_any_byte_gives_the_same_frames() {
    let bytes = conversation();
    let whole = run(&[&bytes]);
    assert!(whole.iter().all(|frames| !frames.is_empty()), "{whole:?}");
    for at in 1..bytes.len() {
        let (head, tail) = bytes.split_at(at);
        assert_eq!(run(&[head, tail]), whole, "cut at {at}");
    }
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    assert_eq!(run(&single), whole);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn garbage_after_any_beginning_never_panics(
        at in 0..400usize,
        garbage in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut bytes = conversation();
        bytes.truncate(at);
        bytes.extend_from_slice(&garbage);
        let mut world = Harness::new();
        let conn = world.connect();
        let mut streams = Vec::new();
        for part in bytes.chunks(37) {
            world.core.handle_received(conn, part, world.now);
            play_engine(&mut world, &mut streams);
        }
        world.close(conn);
        play_engine(&mut world, &mut streams);
    }

    #[test]
    fn a_changed_byte_never_panics_and_leaves_nothing_behind(
        at in 0..1000usize,
        value in any::<u8>(),
    ) {
        let mut bytes = conversation();
        let at = at % bytes.len();
        bytes[at] = value;
        let mut world = Harness::new();
        let conn = world.connect();
        let mut streams = Vec::new();
        for part in bytes.chunks(50) {
            world.core.handle_received(conn, part, world.now);
            play_engine(&mut world, &mut streams);
        }
        world.close(conn);
        play_engine(&mut world, &mut streams);
        for stream in streams {
            world.end_if_open(stream);
        }
        prop_assert_eq!(world.core.streams(), 0);
        prop_assert_eq!(world.core.pipeline.ingest_bytes, 0);
    }
}
