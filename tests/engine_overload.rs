//! What the engine does past its capacity, exactly: virtual time, steps that take what they take
//! on two CPUs with a small model, Poisson arrivals. The same table as `bench/overload` measures
//! over sockets, free of the machine's noise.
//!
//! `cargo test --test engine_overload -- --nocapture` prints it.

#[path = "common/engine.rs"]
mod bench;

use std::collections::HashMap;

use bench::{A, Bench, Told, Want};
use forebay::base::{Instant, Prng};
use forebay::limits::Limits;
use forebay::message::{BLOCK_POSITIONS, PlanRow, Step, StepPlan, StreamKey};
use forebay::request::RejectReason;

const MS: u64 = 1_000_000;
const TTFT_MS: u64 = 1_000;
const ITL_MS: u64 = 100;

/// How long a step takes.
type StepTime = fn(&StepPlan) -> u64;

/// As `cargo bench --bench kernels -- step/` has it for SmolLM2-135M on two CPUs of an Intel Xeon:
/// 4.5 ms for one row, 72 ms for 64, 300 ms for a prompt of 512 tokens.
fn small_model_on_two_cpus(plan: &StepPlan) -> u64 {
    let row_ns = |row: &PlanRow| match row.token_count {
        1 => 1_070_000,
        count => 580_000 * u64::from(count),
    };
    3_500_000 + plan.rows.iter().map(row_ns).sum::<u64>()
}

/// By arithmetic, not measured: 8 billion weights in bf16 are 16 GB, read in 6 ms at 80 % of 3.35
/// TB/s; a token is 16 GFLOP, 40 us at 400 TFLOP/s; a position of KV (32 layers, 8 heads of 128,
/// keys and values) is 131 kB, 50 ns.
fn eight_billion_weights_on_an_h100(plan: &StepPlan) -> u64 {
    let tokens_ns = 40_000 * plan.tokens.len() as u64;
    let positions = plan.blocks.len() as u64 * BLOCK_POSITIONS as u64;
    tokens_ns.max(6_000_000) + 50 * positions
}

/// What clients do who are refused.
#[derive(Clone, Copy, PartialEq)]
enum Refused {
    GoAway,
    /// Try again at once, up to three times.
    TryAtOnce,
    /// Come back when they were told to, once.
    ComeBack,
}

/// When a request comes, how long its prompt is, how long its answer.
struct Arrival {
    at: Instant,
    prompt: usize,
    output: u32,
}

/// Poisson arrivals of prompts of about 100 tokens with answers of about 64, for so long after the
/// warm-up.
fn poisson(per_s: f64, seconds: u64) -> Vec<Arrival> {
    let mut chance = Prng::new(7);
    let (mut arrivals, mut at_s) = (Vec::new(), 0.0);
    loop {
        let uniform = (chance.below(1 << 53) + 1) as f64 / (1_u64 << 53) as f64;
        at_s -= uniform.ln() / per_s;
        if at_s >= (WARM_UP_S + seconds) as f64 {
            return arrivals;
        }
        arrivals.push(Arrival {
            at: Instant::from_ns((at_s * 1e9) as u64 + MS),
            prompt: 60 + chance.below(81) as usize,
            output: 32 + chance.below(65) as u32,
        });
    }
}

/// A request on its way.
struct Open {
    want: Want,
    meant_at: Instant,
    tries: u32,
    first_at: Option<Instant>,
    tokens: u32,
}

#[derive(Debug, Default)]
struct Outcome {
    offered: u32,
    good: u32,
    refused: u32,
    refused_on_return: u32,
    let_in_on_return: u32,
    ttft_ms: Vec<u64>,
    tokens_computed: u64,
}

impl Outcome {
    fn good_share(&self) -> f64 {
        f64::from(self.good) / f64::from(self.offered.max(1))
    }

    fn ttft(&mut self, permille: usize) -> u64 {
        self.ttft_ms.sort_unstable();
        let at = (self.ttft_ms.len() * permille / 1_000).min(self.ttft_ms.len().saturating_sub(1));
        self.ttft_ms.get(at).copied().unwrap_or(0)
    }
}

struct World {
    bench: Bench,
    chance: Prng,
    /// The step at the device, and when it ends.
    step: Option<(Box<Step>, Instant)>,
    began: Instant,
    open: HashMap<StreamKey, Open>,
    /// Who comes when: new requests and those that come back.
    coming: Vec<(Instant, Open)>,
    outcome: Outcome,
    refused: Refused,
    step_time: StepTime,
    /// Arrivals from then on count.
    counted_from: Instant,
}

impl World {
    fn new(scene: &Scene, arrivals: Vec<Arrival>, refused: Refused) -> World {
        let open = |Arrival { at, prompt, output }: Arrival| {
            let (max_tokens, window) = (output, scene.limits.stream_window_tokens_max);
            let want = Want { prompt, max_tokens, window, ignore_eos: true, ..Want::default() };
            (at, Open { want, meant_at: at, tries: 0, first_at: None, tokens: 0 })
        };
        World {
            bench: Bench::new(&scene.limits, scene.kv_blocks),
            chance: Prng::new(1),
            step: None,
            began: Instant::ZERO,
            open: HashMap::new(),
            coming: arrivals.into_iter().rev().map(open).collect(),
            outcome: Outcome::default(),
            refused,
            step_time: scene.step_time,
            counted_from: Instant::ZERO.plus_ms(WARM_UP_S * 1_000),
        }
    }

    fn run(mut self) -> Outcome {
        loop {
            let arrival = self.coming.last().map_or(Instant::NEVER, |(at, _)| *at);
            let done = self.step.as_ref().map_or(Instant::NEVER, |(_, at)| *at);
            let next = arrival.min(done);
            if next == Instant::NEVER {
                break;
            }
            self.bench.now = self.bench.now.max(next);
            if done <= arrival {
                let (step, _) = self.step.take().expect("it is done");
                self.finish(step);
            } else {
                let (_, open) = self.coming.pop().expect("it comes");
                let stream = self.bench.ask(&open.want);
                self.open.insert(stream, open);
            }
            self.settle();
        }
        self.outcome
    }

    fn settle(&mut self) {
        self.bench.engine.tick(self.bench.now);
        loop {
            self.bench.receive();
            let mut submitted = false;
            for (stream, told) in self.bench.take_told() {
                submitted |= self.handle(stream, told);
            }
            if !self.bench.engine.tick(self.bench.now) && !submitted {
                break;
            }
        }
        if self.step.is_none()
            && let Some(step) = self.bench.take_step()
        {
            // A twentieth more or less by chance.
            let took_ns = (self.step_time)(&step.plan) * (950 + self.chance.below(101)) / 1_000;
            self.outcome.tokens_computed += step.plan.tokens.len() as u64;
            self.began = self.bench.now;
            self.step = Some((step, self.bench.now.plus_ns(took_ns)));
        }
    }

    fn finish(&mut self, mut step: Box<Step>) {
        bench::sample(&mut step, |_| A);
        step.result.elapsed_ns = self.bench.now.ns_since(self.began);
        assert!(self.bench.device.results.push(step).is_ok());
    }

    fn handle(&mut self, stream: StreamKey, told: Told) -> bool {
        let now = self.bench.now;
        let open = self.open.get_mut(&stream).expect("it is open");
        match told {
            Told::Grant(seq) => {
                let want = open.want.clone();
                self.bench.submit(stream, seq, &want);
                return true;
            }
            Told::Tokens(tokens, _) => {
                open.first_at.get_or_insert(now);
                open.tokens += tokens.len() as u32;
            }
            Told::Done(..) => self.done(stream),
            Told::Reject(reason, retry_ms) => self.rejected(stream, reason, retry_ms),
            _ => {}
        }
        false
    }

    fn done(&mut self, stream: StreamKey) {
        let open = self.open.remove(&stream).expect("it is open");
        if open.meant_at < self.counted_from {
            return;
        }
        let first_at = open.first_at.expect("it has tokens");
        let ttft_ms = first_at.ms_since(open.meant_at);
        let itl_ms = self.bench.now.ms_since(first_at) / u64::from(open.tokens.max(2) - 1);
        let came_back = open.tries > 0 && self.refused == Refused::ComeBack;
        self.outcome.offered += 1;
        self.outcome.let_in_on_return += u32::from(came_back);
        if !came_back {
            self.outcome.ttft_ms.push(ttft_ms);
        }
        self.outcome.good += u32::from(ttft_ms <= TTFT_MS && itl_ms <= ITL_MS);
    }

    fn rejected(&mut self, stream: StreamKey, reason: RejectReason, retry_ms: Option<u32>) {
        let mut open = self.open.remove(&stream).expect("it is open");
        assert!(open.first_at.is_none(), "{reason:?} after output");
        let counts = open.meant_at >= self.counted_from;
        let back_at = match (self.refused, retry_ms) {
            (Refused::TryAtOnce, _) if open.tries < 3 => Some(self.bench.now.plus_ns(1)),
            (Refused::ComeBack, Some(ms)) if open.tries == 0 => {
                Some(self.bench.now.plus_ms(ms.into()))
            }
            _ => None,
        };
        let came_back = open.tries > 0 && self.refused == Refused::ComeBack;
        self.outcome.refused_on_return += u32::from(came_back && counts);
        match back_at {
            Some(at) => {
                open.tries += 1;
                let place = self.coming.partition_point(|(other, _)| *other > at);
                self.coming.insert(place, (at, open));
            }
            None => {
                self.outcome.offered += u32::from(counts);
                self.outcome.refused += u32::from(counts);
            }
        }
    }
}

const WARM_UP_S: u64 = 10;
/// How long arrivals count.
const SECONDS: u64 = 60;

/// An engine and a device.
struct Scene {
    limits: Limits,
    kv_blocks: u32,
    step_time: StepTime,
}

fn small() -> Scene {
    let limits = Limits { ttft_target_ms: TTFT_MS, context_max: 1_024, ..Limits::default() };
    Scene { limits, kv_blocks: 1_500, step_time: small_model_on_two_cpus }
}

fn run(per_s: f64, refused: Refused) -> Outcome {
    World::new(&small(), poisson(per_s, SECONDS), refused).run()
}

/// The highest rate, by tenths, at which nearly all requests are good.
fn capacity() -> f64 {
    let mut rate = 4.0;
    while run(rate * 1.1, Refused::GoAway).good_share() >= 0.99 {
        rate *= 1.1;
    }
    rate
}

const HEADER: &str = "| offered | good/s | refused | TTFT p50 / p99 |\n|---|---|---|---|";

/// A line of the table; good requests a second, and the TTFT that 99 % stay within.
fn show(times: f64, outcome: &mut Outcome, seconds: f64) -> (f64, u64) {
    let goodput = f64::from(outcome.good) / seconds;
    let refused = 100.0 * f64::from(outcome.refused) / f64::from(outcome.offered);
    let (p50, p99) = (outcome.ttft(500), outcome.ttft(990));
    println!("| {times}x | {goodput:.2} | {refused:.0} % | {p50} / {p99} ms |");
    (goodput, p99)
}

#[test]
fn goodput_stays_flat_past_capacity_and_first_tokens_come_in_time() {
    let capacity = capacity();
    println!("C = {capacity:.2} requests/s\n{HEADER}");
    let outcomes = [0.5, 1.0, 2.0, 5.0, 10.0].map(|times| {
        let mut outcome = run(capacity * times, Refused::GoAway);
        (times, show(times, &mut outcome, SECONDS as f64))
    });
    let peak = outcomes.iter().map(|(_, (goodput, _))| *goodput).fold(0.0, f64::max);
    for (times, (goodput, p99)) in outcomes {
        // Up to the capacity goodput is what is offered.
        assert!(times <= 1.0 || goodput >= 0.9 * peak, "{times}x: {goodput:.2} of {peak:.2}");
        assert!(p99 <= TTFT_MS, "{times}x: {p99} ms");
    }
}

/// `FOREBAY_TRACE=FILE cargo test --release --test engine_overload -- --ignored --nocapture`: a
/// request a line, as JSON with `timestamp` (ms), `input_length` and `output_length` (tokens), as
/// the traces of the Mooncake paper have them. Lengths are divided by eight: as they are, and
/// without a cache for prefixes, one device has no chance.
#[test]
#[ignore = "needs a trace: FOREBAY_TRACE=FILE"]
fn a_trace_of_real_requests_is_served_flat_past_capacity() {
    const SHORTER: u64 = 8;
    let path = std::env::var("FOREBAY_TRACE").expect("FOREBAY_TRACE names a file");
    let text = std::fs::read_to_string(path).expect("it can be read");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let number = |line: &serde_json::Value, key: &str| line[key].as_u64().expect("a number");
    let limits = Limits {
        ttft_target_ms: TTFT_MS,
        context_max: 16_384,
        running_max: 256,
        step_tokens_max: 2_048,
        chunk_tokens_max: 2_048,
        stream_window_tokens_max: 512,
        ..Limits::default()
    };
    // 80 GB less weights and workspace.
    let step_time = eight_billion_weights_on_an_h100;
    let scene = Scene { limits, kv_blocks: 7_000, step_time };
    println!("{HEADER}");
    let mut peak: f64 = 0.0;
    for times in [1.0, 2.0, 5.0, 10.0, 20.0] {
        let arrivals = lines.iter().map(|line| Arrival {
            at: Instant::from_ns((number(line, "timestamp") as f64 * 1e6 / times) as u64 + MS),
            prompt: number(line, "input_length").div_ceil(SHORTER) as usize,
            output: number(line, "output_length").div_ceil(SHORTER) as u32,
        });
        let end_ms = lines.last().map_or(0, |line| number(line, "timestamp"));
        let seconds = end_ms as f64 / 1e3 / times - WARM_UP_S as f64;
        let mut outcome = World::new(&scene, arrivals.collect(), Refused::GoAway).run();
        let (goodput, _) = show(times, &mut outcome, seconds);
        peak = peak.max(goodput);
        assert!(goodput >= 0.8 * peak.min(outcome.offered as f64 / seconds), "{times}x");
    }
}

#[test]
fn clients_that_try_again_at_once_cost_no_computing() {
    let rate = 2.0 * capacity();
    let without = run(rate, Refused::GoAway).tokens_computed as f64;
    let with = run(rate, Refused::TryAtOnce).tokens_computed as f64;
    println!("tokens computed with retries at once, to without: {:.3}", with / without);
    assert!(with / without <= 1.1);
}

#[test]
fn clients_that_come_back_as_told_get_in() {
    let mut outcome = run(2.0 * capacity(), Refused::ComeBack);
    let (let_in, again) = (outcome.let_in_on_return, outcome.refused_on_return);
    println!("let in on return {let_in}, refused again {again}, TTFT p99 {}", outcome.ttft(990));
    assert!(let_in >= 9 * again, "{let_in} let in, {again} refused again");
}
