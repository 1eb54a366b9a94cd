//! What a run is like, drawn from its seed: faults are data.
//!
//! Every run draws its own mixture ("swarm"): one without any cancel, one with nothing but
//! stalled readers, one with a pool of three blocks. A single mixture of everything would hide
//! what only happens in the absence of something.

use forebay::base::{Prng, Ratio};
use forebay::limits::{Limits, Policy, Quota};
use forebay::message::BLOCK_POSITIONS;
use forebay::request::Class;

#[derive(Clone, Debug)]
pub struct Options {
    pub seed: u64,
    pub limits: Limits,
    pub fronts: usize,
    pub depth: usize,
    pub kv_blocks: u32,
    pub requests: usize,
    /// Mean time between arrivals; 0 is one burst.
    pub arrival_us: u64,
    /// Longest prompt, unless it is one at the limit.
    pub prompt_max: u64,
    pub prompt_at_limit: Ratio,
    pub output_max: u64,
    /// The client does not say how much it wants.
    pub output_omitted: Ratio,
    /// One token in so many ends the text; 0 never.
    pub end_rarity: u32,
    pub stop_strings: Ratio,
    pub penalties: Ratio,
    pub logprobs: Ratio,
    pub ignore_eos: Ratio,
    pub deadline: Ratio,
    pub cancel: Ratio,
    /// Granted, and never submitted.
    pub forget_submit: Ratio,
    pub slow_reader: Ratio,
    pub stalled_reader: Ratio,
    pub step_us: u64,
    /// A step that takes a hundred times as long.
    pub step_spike: Ratio,
    pub step_invalid: Ratio,
    pub device_lost: Ratio,
    /// Longest time that a front core sits on a batch.
    pub batch_held_us: u64,
    /// A connection breaks off.
    pub reset: Ratio,
    /// A client sends bytes that mean nothing.
    pub garbage: Ratio,
    /// A client reads nothing more from its socket.
    pub deaf: Ratio,
    /// Who asks; the first asks for more than half of it all.
    pub tenants: usize,
    /// They ask in this class alone.
    pub one_class: Option<Class>,
    /// A front core dies.
    pub front_lost: bool,
    /// The server drains in the middle of it all.
    pub drain_early: bool,
}

impl Options {
    pub fn draw(seed: u64) -> Options {
        let mut prng = Prng::new(seed ^ 0x5eed_0f0f_ba55_0000);
        let p = &mut prng;
        let limits = draw_limits(p);
        let pool = if p.chance(Ratio::percent(30)) { p.between(1, 4) } else { p.between(4, 30) };
        let mut options = Options {
            seed,
            fronts: [1, 1, 2, 3][p.index(4)],
            depth: [1, 1, 2, 3][p.index(4)],
            kv_blocks: pool as u32,
            requests: p.between(8, 40) as usize,
            arrival_us: [0, 50, 500, 3_000, 20_000][p.index(5)],
            prompt_max: [3, 40, 150, u64::from(limits.context_max)][p.index(4)],
            prompt_at_limit: sometimes(p, 10),
            output_max: [1, 10, 60, 400][p.index(4)],
            output_omitted: sometimes(p, 50),
            end_rarity: [0, 8, 40, 200][p.index(4)],
            stop_strings: sometimes(p, 60),
            penalties: sometimes(p, 60),
            logprobs: sometimes(p, 60),
            ignore_eos: sometimes(p, 40),
            deadline: sometimes(p, 50),
            cancel: sometimes(p, 60),
            forget_submit: sometimes(p, 20),
            slow_reader: sometimes(p, 80),
            stalled_reader: sometimes(p, 50),
            step_us: [1, 200, 2_000, 20_000][p.index(4)],
            step_spike: sometimes(p, 5),
            step_invalid: if p.chance(Ratio::percent(10)) {
                Ratio::percent(2)
            } else {
                Ratio::NEVER
            },
            device_lost: match p.below(20) {
                0 => Ratio { numerator: 1, denominator: 200 },
                _ => Ratio::NEVER,
            },
            batch_held_us: [0, 0, 100, 30_000][p.index(4)],
            reset: sometimes(p, 40),
            garbage: sometimes(p, 30),
            deaf: sometimes(p, 40),
            tenants: 1,
            one_class: None,
            front_lost: p.chance(Ratio::percent(5)),
            drain_early: p.chance(Ratio::percent(10)),
            limits,
        };
        // Blocks run out in the middle of a decode only when many read fast and want much.
        if p.chance(Ratio::percent(20)) {
            options.limits.stream_window_tokens_max = 300;
            options.slow_reader = Ratio::NEVER;
            options.stalled_reader = Ratio::NEVER;
            options.end_rarity = 0;
            options.output_max = 400;
            options.output_omitted = Ratio::percent(50);
            options.kv_blocks = p.between(4, 10) as u32;
            options.prompt_max = 60;
            options.step_us = options.step_us.min(200);
            options.arrival_us = options.arrival_us.min(500);
        }
        options.draw_tenants();
        options
    }

    /// Tenants, their quotas and who is next; with a generator of its own, so that the other
    /// options are what they would be without.
    fn draw_tenants(&mut self) {
        let mut prng = Prng::new(self.seed ^ 0x7e4a_4750_0000_0000);
        let p = &mut prng;
        self.tenants = [1, 2, 3, 6][p.index(4)];
        let limits = &mut self.limits;
        limits.tenants_max = p.between(1, 8) as u32;
        limits.policy = [Policy::Priority, Policy::Fcfs, Policy::Fair, Policy::Fair][p.index(4)];
        limits.ageing_ms = [0, 1, 100, 1_000][p.index(4)];
        if limits.policy == Policy::Fair && p.chance(Ratio::percent(50)) {
            self.one_class = Some(Class::ALL[p.index(4)]);
        }
        limits.quotas.tenant = draw_quota(p);
        if p.chance(Ratio::percent(30)) {
            limits.quotas.user = Quota { class_ceiling: Class::System, ..draw_quota(p) };
        }
    }
}

/// One limit or another; so tight that it is met, and in two runs of three not there.
fn draw_quota(p: &mut Prng) -> Quota {
    let mut limit = |most: u64| if p.below(3) == 0 { p.between(1, most) as u32 } else { 0 };
    Quota {
        requests_per_second: limit(200),
        requests_burst: limit(5),
        requests_per_minute: limit(20),
        input_tokens_per_second: limit(2_000),
        input_tokens_burst: limit(200),
        output_tokens_per_second: limit(2_000),
        output_tokens_burst: limit(200),
        streams_max: limit(6),
        weight: 1 + limit(3),
        class_ceiling: Class::ALL[limit(3) as usize],
    }
}

impl Options {
    /// The same for a run with the real front core: it lives, and it is told the context that
    /// the KV pool allows, as the real one is at start.
    pub fn for_bytes(mut self) -> Options {
        self.front_lost = false;
        let pool = self.kv_blocks * BLOCK_POSITIONS as u32;
        self.limits.context_max = self.limits.context_max.min(pool);
        self.prompt_max = self.prompt_max.min(u64::from(self.limits.context_max));
        self
    }
}

/// In one run of three it never happens; otherwise with a probability up to `most` percent.
fn sometimes(prng: &mut Prng, most: u64) -> Ratio {
    match prng.below(3) {
        0 => Ratio::NEVER,
        _ => Ratio::percent(prng.between(1, most)),
    }
}

fn draw_limits(prng: &mut Prng) -> Limits {
    let running_max = prng.between(1, 5) as u32;
    let tiny = Limits::tiny();
    Limits {
        asks_max: prng.between(1, 3) as u32,
        stream_window_tokens_max: [1, 2, 8, 30][prng.index(4)],
        queued_requests_max: prng.between(1, 8) as u32,
        running_max,
        parked_max: prng.between(0, 6) as u32,
        step_tokens_max: running_max + [0, 7, 64, 200][prng.index(4)],
        chunk_tokens_max: [1, 5, 64, 200][prng.index(4)],
        step_target_ms: [1, 5, 50, 60_000][prng.index(4)],
        queue_ttl_ms: [20, 500, 5_000][prng.index(3)],
        stall_timeout_ms: [10, 300, 2_000][prng.index(3)],
        ..tiny
    }
}
