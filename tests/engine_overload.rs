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
use forebay::message::{Step, StreamKey};
use forebay::request::RejectReason;

const MS: u64 = 1_000_000;
const TTFT_MS: u64 = 1_000;
const ITL_MS: u64 = 100;

/// A step's time, as `cargo bench --bench kernels -- step/` has it for SmolLM2-135M on two CPUs of
/// an Intel Xeon: 4.5 ms for one row, 72 ms for 64, 300 ms for a prompt of 512 tokens; and a
/// twentieth more or less by chance.
fn step_ns(step: &Step, chance: &mut Prng) -> u64 {
    let (mut ns, mut sampled) = (3_500_000, 0);
    for row in &step.plan.rows {
        sampled += u64::from(row.sample);
        ns += match row.token_count {
            1 => 1_070_000,
            count => 580_000 * u64::from(count),
        };
    }
    (ns + sampled * 10_000) * (950 + chance.below(101)) / 1_000
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

struct Load {
    per_s: f64,
    seconds: u64,
    seed: u64,
    refused: Refused,
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
    seconds: f64,
}

impl Outcome {
    fn goodput(&self) -> f64 {
        f64::from(self.good) / self.seconds
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
    /// Arrivals from then on count.
    counted_from: Instant,
}

impl World {
    fn new(limits: &Limits, load: &Load) -> World {
        let mut chance = Prng::new(load.seed);
        let mut coming = Vec::new();
        let mut at_s = 0.0;
        let end_s = (WARM_UP_S + load.seconds) as f64;
        loop {
            let uniform = (chance.below(1 << 53) + 1) as f64 / (1_u64 << 53) as f64;
            at_s -= uniform.ln() / load.per_s;
            if at_s >= end_s {
                break;
            }
            let meant_at = Instant::from_ns((at_s * 1e9) as u64 + MS);
            let want = Want {
                prompt: 60 + chance.below(81) as usize,
                max_tokens: 32 + chance.below(65) as u32,
                window: 256,
                ignore_eos: true,
                ..Want::default()
            };
            coming.push((meant_at, Open { want, meant_at, tries: 0, first_at: None, tokens: 0 }));
        }
        coming.reverse();
        World {
            bench: Bench::new(limits, 1_500),
            chance,
            step: None,
            began: Instant::ZERO,
            open: HashMap::new(),
            coming,
            outcome: Outcome { seconds: load.seconds as f64, ..Outcome::default() },
            refused: load.refused,
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
            let took_ns = step_ns(&step, &mut self.chance);
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

fn limits() -> Limits {
    Limits { ttft_target_ms: TTFT_MS, context_max: 1_024, ..Limits::default() }
}

fn run(per_s: f64, refused: Refused) -> Outcome {
    World::new(&limits(), &Load { per_s, seconds: 60, seed: 7, refused }).run()
}

/// The highest rate, by tenths, at which nearly all requests are good.
fn capacity() -> f64 {
    let mut rate = 4.0;
    while run(rate * 1.1, Refused::GoAway).good_share() >= 0.99 {
        rate *= 1.1;
    }
    rate
}

impl Outcome {
    fn good_share(&self) -> f64 {
        f64::from(self.good) / f64::from(self.offered.max(1))
    }
}

#[test]
fn goodput_stays_flat_past_capacity_and_first_tokens_come_in_time() {
    let capacity = capacity();
    println!("C = {capacity:.2} requests/s");
    println!("| offered | goodput/s | refused | TTFT p50 / p99 ms |");
    let mut outcomes = Vec::new();
    for times in [0.5, 1.0, 2.0, 5.0, 10.0] {
        let mut outcome = run(capacity * times, Refused::GoAway);
        let refused = f64::from(outcome.refused) / f64::from(outcome.offered);
        let (p50, p99) = (outcome.ttft(500), outcome.ttft(990));
        println!(
            "| {times}x | {:.2} | {:.0} % | {p50} / {p99} |",
            outcome.goodput(),
            refused * 100.0
        );
        outcomes.push((times, outcome.goodput(), p99));
    }
    let peak = outcomes.iter().map(|outcome| outcome.1).fold(0.0, f64::max);
    for (times, goodput, p99) in outcomes {
        // Up to the capacity goodput is what is offered.
        assert!(times <= 1.0 || goodput >= 0.9 * peak, "{times}x: {goodput:.2} of {peak:.2}");
        assert!(p99 <= TTFT_MS, "{times}x: {p99} ms");
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
