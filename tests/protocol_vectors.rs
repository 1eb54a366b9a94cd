//! The protocol's test vectors: each is what the encoder writes and what the decoder reads; and
//! the specification's examples are these vectors, byte by byte.
//!
//! The files in `tests/vectors/protocol/` were written by `tests/clients/native.py`'s functions,
//! not by this crate's encoder: two implementations that share nothing must agree.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use forebay::protocol::{
    Accepted, Capabilities, ClientFrame, Decoder, Done, ErrorCode, Hello, Piece, Rejected, Request,
    RequestOptions, RequestPrompt, Role, ServerFrame, Side, Stat, TokensWriter, Welcome,
    encode_request,
};
use forebay::request::{Class, FinishReason, Name, RejectReason, SamplingParams, Timings, Usage};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digits = hex.split_whitespace();
    digits.map(|pair| u8::from_str_radix(pair, 16).expect("pairs of hex digits")).collect()
}

/// All vectors by name.
fn vectors() -> BTreeMap<String, Vec<u8>> {
    let folder = root().join("tests/vectors/protocol");
    let mut vectors = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        vectors.insert(name, bytes_of(&lines.join(" ")));
    }
    vectors
}

fn client(frame: ClientFrame<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

fn server(frame: ServerFrame<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

fn request(stream: u32, request: &Request, part_bytes_max: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_request(&mut bytes, stream, request, part_bytes_max);
    bytes
}

fn handshake() -> Vec<(&'static str, Vec<u8>)> {
    let hello = |client, token, capabilities| {
        let (version_min, version_max) = (1, 1);
        ClientFrame::Hello(Hello { version_min, version_max, capabilities, client, token })
    };
    let welcome = Welcome {
        version: 1,
        capabilities: Capabilities::ALL,
        frame_bytes_max: 1 << 20,
        request_bytes_max: 1 << 20,
        streams_max: 128,
        window_tokens_max: 256,
        request_credit: 32,
        vocab_tokens: 49_152,
        context_tokens: 8192,
        idle_timeout_ms: 300_000,
        model: "smollm2-135m",
        server: "forebay/0.1.0",
    };
    vec![
        ("hello", client(hello("demo/1", "", Capabilities::ALL))),
        ("hello_token", client(hello("", "s3cret", Capabilities::default()))),
        ("welcome", server(ServerFrame::Welcome(welcome))),
    ]
}

fn of_the_connection() -> Vec<(&'static str, Vec<u8>)> {
    let mut stats = Vec::new();
    let numbers =
        [Stat { name: "front_requests", value: 3 }, Stat { name: "front_streams_open", value: 1 }];
    ServerFrame::encode_stats(&mut stats, numbers);
    let message = "a new stream's number must be above 7, the highest so far";
    vec![
        ("request_credit", server(ServerFrame::RequestCredit(2))),
        ("ping", client(ClientFrame::Ping(0x1122_3344_5566_7788))),
        ("pong", server(ServerFrame::Pong(0x1122_3344_5566_7788))),
        ("stats", client(ClientFrame::Stats)),
        ("stats_reply", stats),
        ("going_away", server(ServerFrame::GoingAway { deadline_ms: 60_000 })),
        ("error_server", server(ErrorCode::StreamNumber.frame(5, message))),
        ("error_client", client(ClientFrame::Error { code: 6, about_stream: 3, message: "bad" })),
    ]
}

fn requests() -> Vec<(&'static str, Vec<u8>)> {
    let user = vec![(Role::User, "Hi!".to_owned())];
    let mut chat = Request::new(RequestPrompt::Messages(user));
    (chat.max_tokens, chat.window_tokens) = (Some(16), 64);
    let mut options = Request::new(RequestPrompt::Text("Once".to_owned()));
    options.class = Class::Bulk;
    options.tenant = Name::new("acme").unwrap();
    options.user = Name::new("ann").unwrap();
    options.deadline_ms = Some(5000);
    options.window_tokens = 8;
    options.options = RequestOptions {
        sampling: SamplingParams {
            temperature: 0.5,
            seed: 7,
            logprobs: Some(2),
            ..SamplingParams::default()
        },
        stop: vec![b"\n"[..].into()],
        ignore_eos: false,
    };
    let mut bias = Request::new(RequestPrompt::Tokens(vec![1, 49_151]));
    (bias.max_tokens, bias.window_tokens) = (Some(2), 1);
    bias.options.ignore_eos = true;
    bias.options.sampling.logit_bias = vec![(5, -100.0)];
    let mut parts = Request::new(RequestPrompt::Text("hello world".to_owned()));
    parts.window_tokens = 64;
    vec![
        ("request_chat", request(1, &chat, 1000)),
        ("request_options", request(2, &options, 1000)),
        ("request_bias", request(3, &bias, 1000)),
        ("request_parts", request(4, &parts, 4)),
    ]
}

fn of_streams() -> Vec<(&'static str, Vec<u8>)> {
    let mut tokens = Vec::new();
    TokensWriter::begin(&mut tokens, 1, [19_556, 17].into_iter(), "Hello!").end();
    let mut logprobs = Vec::new();
    let mut writer = TokensWriter::begin(&mut logprobs, 2, [260].into_iter(), " é");
    writer.logprob(-0.5, [(260, -0.5), (281, -1.25)].into_iter());
    writer.end();
    let done = Done {
        finish: FinishReason::MaxTokens,
        usage: Usage { prompt_tokens: 31, cached_tokens: 0, output_tokens: 16 },
        timings: Timings {
            queue_ns: 1_000_000,
            ttft_ns: 25_000_000,
            total_ns: 90_000_000,
            parked_ns: 0,
        },
    };
    let rejected = |reason, retry_after_ms, message| Rejected { reason, retry_after_ms, message };
    let full = rejected(RejectReason::QueueFull, Some(750), "the queue is full");
    let invalid = rejected(RejectReason::Invalid, None, "temperature must be from 0 to 100");
    let accepted = Accepted { position: 2, prompt_tokens: 31, max_tokens: 16 };
    vec![
        ("credit", client(ClientFrame::Credit { stream: 1, tokens: 32 })),
        ("cancel", client(ClientFrame::Cancel { stream: 1 })),
        ("accepted", server(ServerFrame::Accepted { stream: 1, accepted })),
        ("tokens", tokens),
        ("tokens_logprobs", logprobs),
        ("paused", server(ServerFrame::Paused { stream: 1 })),
        ("resumed", server(ServerFrame::Resumed { stream: 1 })),
        ("done", server(ServerFrame::Done { stream: 1, done })),
        ("rejected", server(ServerFrame::Rejected { stream: 1, rejected: full })),
        ("rejected_for_good", server(ServerFrame::Rejected { stream: 2, rejected: invalid })),
    ]
}

#[test]
fn the_encoder_writes_every_vector() {
    let mut vectors = vectors();
    let all = [handshake(), of_the_connection(), requests(), of_streams()].concat();
    for (name, bytes) in all {
        let vector = vectors.remove(name).unwrap_or_else(|| panic!("no vector {name}"));
        assert_eq!(bytes, vector, "{name}");
    }
    assert!(vectors.is_empty(), "vectors that nothing encodes: {:?}", vectors.keys());
}

#[test]
fn the_decoder_reads_every_vector_and_gives_the_same_bytes_back() {
    for (name, vector) in vectors() {
        let from_server = ServerFrameNames::ALL.contains(&name.as_str());
        let side = if from_server { Side::FromServer } else { Side::FromClient };
        let mut decoder = Decoder::new(side, 1 << 20);
        let mut input = &vector[..];
        let mut again = Vec::new();
        while let Some(piece) = decoder.next(&mut input).unwrap_or_else(|e| panic!("{name}: {e}")) {
            if let Piece::Frame { header, payload } = piece {
                if from_server {
                    ServerFrame::decode(header, payload).unwrap().encode(&mut again);
                } else {
                    ClientFrame::decode(header, payload).unwrap().encode(&mut again);
                }
            }
        }
        assert!(decoder.is_between_frames(), "{name}");
        assert!(again == vector || name.starts_with("request_"), "{name}");
    }
}

struct ServerFrameNames;

impl ServerFrameNames {
    const ALL: [&str; 14] = [
        "welcome",
        "request_credit",
        "pong",
        "stats_reply",
        "going_away",
        "error_server",
        "accepted",
        "tokens",
        "tokens_logprobs",
        "paused",
        "resumed",
        "done",
        "rejected",
        "rejected_for_good",
    ];
}

/// The examples of the specification: fenced blocks that begin with "```hex NAME". What follows
/// two spaces and a word that is no pair of hex digits is a remark.
fn examples() -> BTreeMap<String, Vec<u8>> {
    let text = fs::read_to_string(root().join("src/protocol/README.md")).unwrap();
    let mut examples = BTreeMap::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(name) = line.strip_prefix("```hex ") else { continue };
        let block = lines.by_ref().take_while(|line| *line != "```");
        let bytes = block
            .flat_map(|line| bytes_of(line.split_once("   ").map_or(line, |(hex, _remark)| hex)));
        assert!(examples.insert(name.to_owned(), bytes.collect()).is_none(), "{name} twice");
    }
    examples
}

#[test]
fn the_specifications_examples_are_the_vectors() {
    let vectors = vectors();
    let examples = examples();
    assert!(examples.len() >= 12, "an example for most frames: {:?}", examples.keys());
    for (name, bytes) in examples {
        let vector = vectors.get(&name).unwrap_or_else(|| panic!("no vector {name}"));
        assert_eq!(&bytes, vector, "{name}");
    }
}

/// The numbers that the specification gives are those of the code.
#[test]
fn the_specification_names_every_frame_and_every_code() {
    let text = fs::read_to_string(root().join("src/protocol/README.md")).unwrap();
    for kind in forebay::protocol::FrameType::ALL {
        let row = format!("| `0x{:02x}` | {} |", kind as u8, kind.name());
        assert!(text.contains(&row), "no row {row}");
    }
    for code in ErrorCode::ALL {
        let row = format!("| {} | {} |", code as u16, code.name());
        assert!(text.contains(&row), "no row {row}");
    }
}
