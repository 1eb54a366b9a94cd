use super::*;
use crate::protocol::HEADER_BYTES;

fn decode(bytes: &[u8]) -> Result<ServerFrame<'_>, ProtocolError> {
    let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
    let header = Header::decode(head)?;
    assert_eq!(header.payload_bytes as usize, payload.len());
    ServerFrame::decode(header, payload)
}

fn welcome() -> Welcome<'static> {
    Welcome {
        version: 1,
        capabilities: Capabilities::ALL,
        frame_bytes_max: 1 << 20,
        request_bytes_max: 1 << 20,
        streams_max: 128,
        window_tokens_max: 256,
        request_credit: 8,
        vocab_tokens: 49152,
        context_tokens: 8192,
        idle_timeout_ms: 300_000,
        model: "smollm2-135m",
        server: "forebay/0.1.0",
    }
}

fn done() -> Done {
    Done {
        finish: FinishReason::StopString,
        usage: Usage { prompt_tokens: 1, cached_tokens: 2, output_tokens: 3 },
        timings: Timings { queue_ns: 4, ttft_ns: 5, total_ns: 6, parked_ns: 7 },
    }
}

#[test]
fn every_frame_survives_the_way() {
    let accepted = Accepted { position: 3, prompt_tokens: 40, max_tokens: 100 };
    let rejected = |retry_after_ms| Rejected {
        reason: RejectReason::QueueFull,
        retry_after_ms,
        message: "the queue is full",
    };
    for frame in [
        ServerFrame::Welcome(welcome()),
        ServerFrame::RequestCredit(2),
        ServerFrame::Ping(1),
        ServerFrame::Pong(2),
        ServerFrame::GoingAway { deadline_ms: 60_000 },
        ErrorCode::Malformed.frame(7, "no"),
        ServerFrame::Accepted { stream: 1, accepted },
        ServerFrame::Paused { stream: 1 },
        ServerFrame::Resumed { stream: 1 },
        ServerFrame::Done { stream: 1, done: done() },
        ServerFrame::Rejected { stream: 1, rejected: rejected(Some(250)) },
        ServerFrame::Rejected { stream: 1, rejected: rejected(None) },
    ] {
        let mut out = Vec::new();
        frame.encode(&mut out);
        assert_eq!(decode(&out), Ok(frame));
    }
}

#[test]
fn every_strict_prefix_of_a_payload_is_malformed() {
    let mut out = Vec::new();
    TokensWriter::begin(&mut out, 1, [5, 6].into_iter(), "né").end();
    let mut frames = vec![out];
    for frame in [
        ServerFrame::Welcome(welcome()),
        ServerFrame::Done { stream: 1, done: done() },
        ErrorCode::Malformed.frame(7, "no"),
    ] {
        let mut out = Vec::new();
        frame.encode(&mut out);
        frames.push(out);
    }
    for frame in frames {
        let (head, payload) = frame.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(head).unwrap();
        assert!(ServerFrame::decode(header, payload).is_ok());
        for length in 0..payload.len() {
            let result = ServerFrame::decode(header, &payload[..length]);
            assert_eq!(result.unwrap_err().code, ErrorCode::Malformed, "{length}");
        }
    }
}

#[test]
fn tokens_carry_ids_text_and_log_probabilities() {
    let mut out = Vec::new();
    let mut writer = TokensWriter::begin(&mut out, 9, [5, 6].into_iter(), "né");
    writer.logprob(-0.5, [(5, -0.5), (8, -1.25)].into_iter());
    writer.logprob(-2.0, [].into_iter());
    writer.end();
    let ServerFrame::Tokens { stream: 9, tokens } = decode(&out).unwrap() else { panic!() };
    assert_eq!(tokens.ids.iter().collect::<Vec<_>>(), [5, 6]);
    assert_eq!(tokens.text, "né");
    let entries: Vec<_> = tokens.logprobs.iter().collect();
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0].top().collect::<Vec<_>>(), [(5, -0.5), (8, -1.25)]);
    assert_eq!(entries[1].logprob, -2.0);
    assert_eq!(entries[1].top().len(), 0);
    let mut again = Vec::new();
    ServerFrame::Tokens { stream: 9, tokens }.encode(&mut again);
    assert_eq!(out, again);
}

#[test]
fn stats_are_bounded() {
    let mut out = Vec::new();
    let stat = Stat { name: "streams_open", value: 3 };
    ServerFrame::encode_stats(&mut out, std::iter::repeat_n(stat, 1000));
    let ServerFrame::StatsReply(list) = decode(&out).unwrap() else { panic!() };
    assert_eq!(list.iter().count(), limits::STATS_MAX);
    assert_eq!(list.iter().next(), Some(stat));
}

#[test]
fn reasons_map_to_numbers_and_back() {
    for n in 0..=255u8 {
        if let Some(reason) = FinishReason::from_wire(n) {
            assert_eq!(reason as u8, n);
        }
        if let Some(reason) = RejectReason::from_wire(n) {
            assert_eq!(reason as u8, n);
        }
    }
    assert_eq!(FinishReason::from_wire(FinishReason::Operator as u8 + 1), None);
    assert_eq!(RejectReason::from_wire(RejectReason::DeadlineExpired as u8 + 1), None);
}

#[test]
fn a_client_frame_from_a_server_is_unexpected() {
    let header = Header { payload_bytes: 0, kind: FrameType::Cancel, stream: 1 };
    assert_eq!(ServerFrame::decode(header, &[]).unwrap_err().code, ErrorCode::UnexpectedFrame);
}
