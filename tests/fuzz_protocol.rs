//! The fuzz target for the native protocol, run on some thousand inputs: conversations with a few
//! bytes changed, cut, doubled or mixed, and noise.

#[path = "fuzz/bodies/protocol.rs"]
mod body;

use body::{Stage, run};
use forebay::base::Prng;
use forebay::protocol::{
    Capabilities, ClientFrame, Hello, Request, RequestPrompt, Role, encode_request,
};

const INPUTS: usize = 6_000;

/// A conversation: handshake, requests of all kinds, credit, cancel, ping.
fn conversation(prng: &mut Prng) -> Vec<u8> {
    let mut bytes = vec![prng.below(256) as u8];
    let capabilities = Capabilities::ALL;
    let hello = Hello { version_min: 1, version_max: 1, capabilities, client: "fuzz", token: "" };
    ClientFrame::Hello(hello).encode(&mut bytes);
    for number in 1..=prng.between(1, 6) as u32 {
        let prompt = match prng.below(3) {
            0 => RequestPrompt::Text("x".repeat(prng.between(1, 300) as usize)),
            1 => RequestPrompt::Tokens((0..prng.between(1, 40) as u32).collect()),
            _ => RequestPrompt::Messages(vec![(Role::User, "Grüße!".to_owned())]),
        };
        let mut request = Request::new(prompt);
        request.window_tokens = prng.between(1, 8) as u32;
        request.options.sampling.temperature = prng.below(3) as f32;
        encode_request(&mut bytes, number, &request, prng.between(1, 400) as usize);
        match prng.below(5) {
            0 => ClientFrame::Cancel { stream: number }.encode(&mut bytes),
            1 => ClientFrame::Credit { stream: number, tokens: 1 }.encode(&mut bytes),
            2 => ClientFrame::Ping(7).encode(&mut bytes),
            3 => ClientFrame::Stats.encode(&mut bytes),
            _ => {}
        }
    }
    bytes
}

fn damage(prng: &mut Prng, bytes: &mut Vec<u8>) {
    for _ in 0..prng.below(4) {
        let at = prng.index(bytes.len());
        match prng.below(5) {
            0 => bytes[at] = prng.below(256) as u8,
            1 => bytes[at] ^= 1 << prng.below(8),
            2 => bytes.truncate(at.max(1)),
            3 => {
                let end = (at + 30).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => drop(bytes.drain(at..(at + 5).min(bytes.len()))),
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
}

#[test]
fn thousands_of_damaged_conversations_break_nothing() {
    let mut prng = Prng::new(0x00F0_4EBA);
    let mut reached = [0usize; 4];
    for input in 0..INPUTS {
        let mut bytes = conversation(&mut prng);
        damage(&mut prng, &mut bytes);
        if input % 10 == 0 {
            bytes = (0..prng.below(200)).map(|_| prng.below(256) as u8).collect();
        }
        reached[run(&bytes) as usize] += 1;
    }
    // A run that never gets past the door tests nothing.
    assert!(reached.iter().all(|&count| count > INPUTS / 50), "{reached:?}");
    assert_eq!(run(&[]), Stage::Refused);
}

#[test]
#[ignore = "writes files: what the coverage-guided fuzzer begins with (tests/fuzz/run)"]
fn whole_conversations_are_seeds_of_the_fuzzer() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus/protocol");
    std::fs::create_dir_all(corpus).unwrap();
    let mut prng = Prng::new(1);
    for number in 0..64 {
        std::fs::write(format!("{corpus}/{number}"), conversation(&mut prng)).unwrap();
    }
}
