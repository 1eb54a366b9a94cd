//! What a client of a real server sees: the default model, sockets on loopback, the client library.
//!
//! `cargo bench --bench serve`. Under 90 seconds once the model is fetched. Server and client share
//! this machine's CPUs, as they would not in service, and figures drift with whatever else it does:
//! compare those of one run.
//!
//! | bench | figure |
//! |---|---|
//! | `ping` | a ping and its answer: socket, front core, client library, no engine |
//! | `refused` | a request that finds the queue full, until its refusal is here: the engine's word, but no tokenising |
//! | `first token/N of prompt` | on an idle server, from the request to its first token: all of the above, tokenising and one step with N prompt tokens |
//! | `tokens/N at once` | N requests on one connection, a token of prompt and 32 of output each, until the last has ended; `elem/s` are output tokens a second |

#[path = "../tests/common/mod.rs"]
mod common;
#[allow(dead_code, reason = "the end-to-end tests need more of it than a bench does")]
#[path = "../tests/e2e/rig.rs"]
mod rig;

use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use forebay::client::{Client, Generation, Request};
use forebay::request::RejectReason;
use forebay::runtime::{Flavour, probe};

use rig::{Rig, ask, collect, exactly, take_first_tokens, wait_until};

/// How `serve` would drive its sockets on this machine.
fn flavour() -> Flavour {
    probe().flavour()
}

/// So many tokens of prompt, and of output.
fn sized(prompt_tokens: usize, tokens: u32) -> Request {
    exactly(&" the".repeat(prompt_tokens), tokens)
}

/// A server that computes nothing and has no room: of two streams that nobody reads one holds the
/// only slot and one the only place beside it; the third waits behind them, and fills the queue.
fn full() -> (Rig, Client, [Generation; 3]) {
    let rig = Rig::start_with(flavour(), |config| {
        config.limits.queued_requests_max = 1;
        config.limits.running_max = 1;
        config.limits.parked_max = 1;
        // Never while the bench runs.
        config.limits.stall_timeout_ms = 3_600_000;
        config.limits.queue_ttl_ms = 3_600_000;
    });
    let client = rig.connect();
    let stalled = |tokens_out: u64| {
        let mut request = sized(1, 4);
        request.window_tokens = 1;
        let generation = client.request(request).expect("it is sent");
        wait_until(&client, "the stream has had its one token", |stats| {
            stats.iter().any(|(name, value)| name == "engine_tokens_out" && *value == tokens_out)
        });
        generation
    };
    let (first, second) = (stalled(1), stalled(2));
    let waiting = client.request(sized(1, 4)).expect("it is sent");
    rig::wait_for_stat(&client, "engine_queued_default", 1);
    (rig, client, [first, second, waiting])
}

fn round_trips(c: &mut Criterion) {
    println!("sockets are driven by {}", flavour().name());
    let rig = Rig::start(flavour());
    let client = rig.connect();
    c.bench_function("ping", |b| b.iter(|| client.ping().expect("an answer")));
    drop(client);
    rig.end();

    let (rig, client, stalled) = full();
    c.bench_function("refused", |b| {
        b.iter(|| {
            let answer = ask(&client, sized(1, 1));
            assert_eq!(answer.rejection().reason, RejectReason::QueueFull);
        });
    });
    drop(stalled);
    drop(client);
    rig.end();
}

fn first_token(c: &mut Criterion) {
    let rig = Rig::start(flavour());
    let client = rig.connect();
    let mut group = c.benchmark_group("first token");
    group.sampling_mode(SamplingMode::Flat);
    for prompt_tokens in [1, 128] {
        let usage = ask(&client, sized(prompt_tokens, 1)).done().usage;
        assert_eq!(usage.prompt_tokens as usize, prompt_tokens);
        group.bench_function(format!("{prompt_tokens} of prompt"), |b| {
            b.iter_custom(|rounds| {
                let mut took = Duration::ZERO;
                for _ in 0..rounds {
                    let begin = Instant::now();
                    let mut generation =
                        client.request(sized(prompt_tokens, 1)).expect("it is sent");
                    take_first_tokens(&mut generation);
                    took += begin.elapsed();
                    // The server is idle again before the next one.
                    collect(generation);
                }
                took
            });
        });
    }
    group.finish();
    drop(client);
    rig.end();
}

fn tokens(c: &mut Criterion) {
    const TOKENS: u32 = 32;
    let rig = Rig::start(flavour());
    let client = rig.connect();
    let mut group = c.benchmark_group("tokens");
    group.sampling_mode(SamplingMode::Flat);
    for streams in [1, 8] {
        group.throughput(Throughput::Elements(u64::from(streams * TOKENS)));
        group.bench_function(format!("{streams} at once"), |b| {
            b.iter(|| {
                let generations: Vec<_> = (0..streams)
                    .map(|_| client.request(sized(1, TOKENS)).expect("it is sent"))
                    .collect();
                for generation in generations {
                    assert_eq!(collect(generation).done().usage.output_tokens, TOKENS);
                }
            });
        });
    }
    group.finish();
    drop(client);
    rig.end();
}

criterion_group! {
    name = serve;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4));
    targets = round_trips, first_token, tokens
}
criterion_main!(serve);
