//! What the engine core costs, in nanoseconds of one CPU.
//!
//! | bench | figure |
//! |---|---|
//! | `step/64 running` | the engine's whole work between two steps with 64 sequences decoding: results in, plan out, events out, credits in. The device waits for the first half of it; at 10 ms a step 10 µs are one thousandth |
//! | `step/64 running, stop strings` | the same when every sequence has 4 stop strings |
//! | `step/64 parking and resuming` | the same when every sequence runs out of credit in each step and gets one more: what slow readers cost |
//! | `ask/refused` | an ask that finds the queue full: what a flood costs |
//! | `refusal/by the engine`, `refusal/at the gate` | a REQUEST frame in, its REJECTED out, while the queue is full; while the server ends: front core and engine in turns on one thread |
//! | `recorder/an event` | what the flight recorder costs |
//! | `ask/granted, submitted, cancelled` | a whole request but its steps, with a prompt of 1,000 tokens |
//! | `plan/check 64 rows` | the check of a plan of 64 decode rows at position 2,000 |
//! | `stop/16 strings, hostile` | a 4-byte token against 16 stop strings of 256 bytes that all but match |
//!
//! Only the engine's own calls are timed; what the bench does to play front core and device is not.

#[path = "../tests/common/engine.rs"]
mod bench;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use forebay::base::Recorder;
use forebay::base::recorder::{Kind, Show};
use forebay::engine::blocks::BlockPool;
use forebay::engine::plan;
use forebay::engine::stop::{Borders, StopMatcher};
use forebay::front::{Action, ByteTokeniser, ConnId, FrontCore, FrontSettings};
use forebay::limits::Limits;
use forebay::message::{ControlMessage, PlanRow, SeqKey, StepPlan};
use forebay::protocol::{Capabilities, ClientFrame, Hello, Request, RequestPrompt, encode_request};
use forebay::request::FinishReason;

use bench::{A, Bench, Want};

const RUNNING: usize = 64;

fn limits() -> Limits {
    Limits { stream_window_tokens_max: 1 << 20, ..Limits::default() }
}

/// Ticks until there is nothing to do; returns how long the engine took.
fn timed(bench: &mut Bench) -> Duration {
    let begin = Instant::now();
    while bench.engine.tick(bench.now) {}
    let took = begin.elapsed();
    bench.receive();
    took
}

/// An engine with 64 sequences that decode.
fn running(want: &Want) -> (Bench, Vec<SeqKey>) {
    let mut bench = Bench::new(&limits(), 8_000);
    let seqs: Vec<SeqKey> = (0..RUNNING).map(|_| bench.accepted(want).1).collect();
    while bench.engine.stats().running < RUNNING as u32 || bench.engine.stats().granted > 0 {
        bench.step(A);
    }
    (bench, seqs)
}

/// One step of everybody; returns how long the engine took. Starts over when the answers end.
fn decode(bench: &mut Bench, seqs: &[SeqKey], credit: u32) -> Duration {
    let mut step = bench.take_step().expect("a step is at the device");
    bench::sample(&mut step, |_| A);
    assert!(bench.device.results.push(step).is_ok());
    let mut took = timed(bench);
    if credit > 0 {
        for &seq in seqs {
            let sent = bench.fronts[0].control.push(ControlMessage::Credit { seq, tokens: credit });
            assert!(sent.is_ok());
        }
    }
    bench.now = bench.now.plus_ms(10);
    took += timed(bench);
    took
}

fn step(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    let long = Want { prompt: 100, max_tokens: 7_000, window: 1 << 20, ..Want::default() };
    let stops = vec!["\n\nUser:", "</answer>", "###", "aab"];
    let cases = [
        ("64 running", long.clone(), 0),
        ("64 running, stop strings", Want { stop: stops, ..long.clone() }, 0),
        ("64 parking and resuming", Want { window: 1, ..long }, 1),
    ];
    for (name, want, credit) in cases {
        let mut state = None;
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter_custom(|rounds| {
                let mut took = Duration::ZERO;
                for _ in 0..rounds {
                    let fresh = state.as_ref().is_none_or(|(_, _, steps)| *steps > 6_000);
                    if fresh {
                        let (bench, seqs) = running(&want);
                        state = Some((bench, seqs, 0));
                    }
                    let (bench, seqs, steps) = state.as_mut().expect("made above");
                    took += decode(bench, seqs, credit);
                    *steps += 1;
                }
                took
            });
        });
    }
    group.finish();
}

fn ask(c: &mut Criterion) {
    let mut group = c.benchmark_group("ask");
    let small = Want::default();
    let mut bench = Bench::new(&Limits { queued_requests_max: 4, ..limits() }, 8_000);
    for _ in 0..4 {
        bench.granted(&small);
    }
    group.bench_function("refused", |b| {
        b.iter_custom(|rounds| {
            let mut took = Duration::ZERO;
            for _ in 0..rounds {
                let stream = bench.ask(&small);
                took += timed(&mut bench);
                bench.told(stream);
            }
            took
        });
    });
    let mut bench = Bench::new(&limits(), 8_000);
    // The device is busy with somebody else, so that no step is planned.
    bench.accepted(&small);
    let want = Want { prompt: 1_000, ..Want::default() };
    group.bench_function("granted, submitted, cancelled", |b| {
        b.iter_custom(|rounds| {
            let mut took = Duration::ZERO;
            for _ in 0..rounds {
                let stream = bench.ask(&want);
                took += timed(&mut bench);
                let [bench::Told::Grant(seq)] = bench.told(stream)[..] else { panic!("no grant") };
                bench.submit(stream, seq, &want);
                took += timed(&mut bench);
                let reason = FinishReason::Cancelled;
                let sent = bench.fronts[0].control.push(ControlMessage::Cancel { seq, reason });
                assert!(sent.is_ok());
                took += timed(&mut bench);
                bench.told(stream);
            }
            took
        });
    });
    group.finish();
}

/// A front core with one client, beside an engine whose queue is full.
struct Refusing {
    bench: Bench,
    front: FrontCore,
    conn: ConnId,
    streams: u32,
}

impl Refusing {
    fn new(at_gate: bool) -> Refusing {
        let limits = Limits { queued_requests_max: 4, ..limits() };
        let mut bench = Bench::with(&limits, 8_000, 1, 2);
        for _ in 0..4 {
            bench.granted(&Want::default());
        }
        let ends = bench.fronts.pop().expect("there are two");
        if at_gate {
            bench.engine.begin_drain(bench.now, bench.now.plus_ms(u64::MAX));
            bench.settle();
        }
        let settings = FrontSettings { front: 1, ..FrontSettings::new(limits, "bytes", 300) };
        let front = FrontCore::new(settings, Box::new(ByteTokeniser::new(300)), ends);
        let conn = ConnId { slot: 0, generation: 0 };
        let mut refusing = Refusing { bench, front, conn, streams: 0 };
        refusing.front.handle_accepted(conn, refusing.bench.now);
        let hello = ClientFrame::Hello(Hello {
            version_min: 1,
            version_max: 1,
            capabilities: Capabilities::ALL,
            client: "bench",
            token: "",
        });
        let mut bytes = Vec::new();
        hello.encode(&mut bytes);
        refusing.answer(&bytes);
        refusing
    }

    /// Hands bytes in; returns how long it took until bytes came out.
    fn answer(&mut self, bytes: &[u8]) -> Duration {
        let now = self.bench.now;
        let begin = Instant::now();
        self.front.handle_received(self.conn, bytes, now);
        loop {
            if let Some(action) = self.front.poll_action() {
                let Action::Send { conn, bytes } = action else { panic!("{action:?}") };
                let took = begin.elapsed();
                let taken = bytes.len();
                self.front.handle_sent(conn, bytes, taken, now);
                while self.front.tick(now) | self.bench.engine.tick(now) {}
                return took;
            }
            self.front.tick(now);
            self.bench.engine.tick(now);
        }
    }

    fn refuse(&mut self) -> Duration {
        self.streams += 1;
        let mut request =
            Request::new(RequestPrompt::Text("How long is a piece of string?".into()));
        request.window_tokens = 8;
        let mut bytes = Vec::new();
        encode_request(&mut bytes, self.streams, &request, 1 << 20);
        self.answer(&bytes)
    }
}

fn refusal(c: &mut Criterion) {
    let mut group = c.benchmark_group("refusal");
    for (name, at_gate) in [("at the gate", true), ("by the engine", false)] {
        let mut refusing = Refusing::new(at_gate);
        group.bench_function(name, |b| {
            b.iter_custom(|rounds| (0..rounds).map(|_| refusing.refuse()).sum());
        });
        let counters = refusing.front.counters();
        assert_eq!(counters.requests, counters.requests_rejected, "all of them were refused");
        let at = refusing.bench.stats().counters.gate_refusals;
        assert_eq!(at, if at_gate { counters.requests } else { 0 });
    }
    group.finish();
}

static KINDS: [Kind; 1] = [Kind { name: "event", values: &[("a", Show::Number)] }];

fn recorder(c: &mut Criterion) {
    let mut pen = Recorder::start("bench", &KINDS);
    let mut at = forebay::base::Instant::ZERO;
    c.bench_function("recorder/an event", |b| {
        b.iter(|| {
            at = at.plus_ns(1);
            pen.record(at, 0, black_box([1, 2, 3]));
        });
    });
    assert_eq!(pen.recorder().events().last().map(|event| event.at), Some(at));
}

fn plan_check(c: &mut Criterion) {
    let limits = limits();
    let mut pool = BlockPool::new(4_000, 1);
    let mut plan = StepPlan { number: 1, ..StepPlan::default() };
    for slot in 0..RUNNING as u32 {
        let blocks = 2_000_usize.div_ceil(64);
        plan.rows.push(PlanRow {
            seq: SeqKey { slot, generation: 0 },
            slot: slot as u16,
            sample: true,
            token_start: slot,
            token_count: 1,
            position: 1_999,
            block_start: plan.blocks.len() as u32,
            block_count: blocks as u32,
        });
        plan.tokens.push(A);
        plan.blocks.extend((0..blocks).map(|_| pool.take().expect("enough")));
    }
    c.bench_function("plan/check 64 rows", |b| {
        b.iter(|| plan::check(black_box(&plan), &limits, 256, &pool).unwrap());
    });
}

fn stop(c: &mut Criterion) {
    // Every byte of the text all but completes every string, and falls back as far as can be.
    let stops: Vec<Box<[u8]>> = (0..16)
        .map(|n| [&[b'a'; 240][..], &[b'b'; 16][..n + 1]].concat())
        .map(Vec::into_boxed_slice)
        .collect();
    let mut matcher = StopMatcher::default();
    let mut borders = Borders::default();
    assert_eq!(matcher.feed(&stops, &[b'a'; 300], &mut borders), None);
    c.bench_function("stop/16 strings, hostile", |b| {
        b.iter(|| matcher.feed(&stops, black_box(b"aaaa"), &mut borders));
    });
}

criterion_group! {
    name = engine;
    config = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4));
    targets = step, ask, refusal, recorder, plan_check, stop
}
criterion_main!(engine);
