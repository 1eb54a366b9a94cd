//! A run: the real engine core, the real device core and the real rings on one thread and virtual
//! time. A seeded generator picks which core goes next: interleaving is a fault like any other.

use std::cell::RefCell;
use std::rc::Rc;

use forebay::base::{Instant, Prng, Ratio};
use forebay::device::DeviceCore;
use forebay::engine::{EngineConfig, EngineCore};
use forebay::limits::Quota;
use forebay::message::EVENT_BATCHES;
use forebay::ports::{connect_device, connect_front};
use forebay::request::{Class, FinishReason, Name, RejectReason};
use forebay::ring::Doorbell;

use crate::device::{Device, SimBackend};
use crate::front::Front;
use crate::model;
use crate::options::Options;
use crate::request::{End, Plan};
use crate::side::Side;
use crate::wire::Wire;

/// Moves of a run, beyond any that is sane: a run that needs more is going in circles.
const MOVES_MAX: u64 = 4_000_000;

/// How many of the engine's last events a failure shows.
const LAST_EVENTS: usize = 40;

/// What a run that went well has seen, so that a test can tell that the runs reach the corners.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub runs: u64,
    pub steps: u64,
    /// Steps with decode rows and more prefill than the least, cut to the target.
    pub steps_cut: u64,
    pub tokens: u64,
    pub finished: [u64; FinishReason::ALL.len()],
    pub rejected: [u64; RejectReason::ALL.len()],
    pub preemptions: u64,
    pub reservations: u64,
    pub kv_drops: u64,
    pub parks: u64,
    pub resumes: u64,
    pub stale: u64,
    pub gate_refusals: u64,
    pub breaker_trips: u64,
    /// Asks of tenants for whom there was no account of their own.
    pub shared_asks: u64,
    /// Moves with two tenants and more in line for their turn.
    pub turns: u64,
}

impl Seen {
    pub fn count(&mut self, end: End) {
        match end {
            End::Done(finish) => self.finished[finish as usize] += 1,
            End::Rejected(reason) => self.rejected[reason as usize] += 1,
        }
    }

    pub fn add(&mut self, other: &Seen) {
        self.runs += other.runs;
        self.steps += other.steps;
        self.steps_cut += other.steps_cut;
        self.tokens += other.tokens;
        self.preemptions += other.preemptions;
        self.reservations += other.reservations;
        self.kv_drops += other.kv_drops;
        self.parks += other.parks;
        self.resumes += other.resumes;
        self.stale += other.stale;
        self.gate_refusals += other.gate_refusals;
        self.breaker_trips += other.breaker_trips;
        self.shared_asks += other.shared_asks;
        self.turns += other.turns;
        self.finished.iter_mut().zip(other.finished).for_each(|(sum, n)| *sum += n);
        self.rejected.iter_mut().zip(other.rejected).for_each(|(sum, n)| *sum += n);
    }
}

pub struct World {
    options: Options,
    prng: Prng,
    now: Instant,
    engine: EngineCore,
    device_core: DeviceCore,
    device: Rc<RefCell<Device>>,
    fronts: Vec<Box<dyn Side>>,
    /// Cores that had nothing to do since anybody last did something, a bit each.
    idle: u32,
    /// From here on nothing bad happens any more.
    calm_at: Instant,
    calm: bool,
    drain_at: Option<Instant>,
    front_dies_at: Option<Instant>,
    turns: u64,
}

/// Who stands on the engine's front side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fronts {
    /// The simulator's own, which speaks messages.
    Messages,
    /// The real front core, with clients that speak bytes.
    Bytes,
}

/// Runs a seed to its end; the error says what went wrong, under which options, and what was
/// pending.
pub fn run(seed: u64, fronts: Fronts) -> Result<Seen, String> {
    let options = match fronts {
        Fronts::Messages => Options::draw(seed),
        Fronts::Bytes => Options::draw(seed).for_bytes(),
    };
    let mut world = World::new(options, fronts);
    let outcome = world.run();
    outcome.map_err(|what| world.report(&what))
}

impl World {
    fn new(options: Options, kind: Fronts) -> World {
        let mut prng = Prng::new(options.seed);
        // One generator each, so that a change to one of them leaves the others' draws alone.
        let (mut plans_prng, mut fate_prng) = (prng.fork(), prng.fork());
        let (mut fronts_prng, device_prng) = (prng.fork(), prng.fork());
        let table = model::token_table();
        let config = EngineConfig {
            limits: options.limits.clone(),
            kv_blocks: options.kv_blocks,
            vocab: model::VOCAB,
            depth: options.depth,
        };
        let context = config.context();
        let engine_bell = Doorbell::new();
        let mut ports = Vec::new();
        let mut plans = vec![Vec::new(); options.fronts];
        let mut last_arrival = Instant::ZERO;
        for _ in 0..options.requests {
            let gap_us = plans_prng.between(0, 2 * options.arrival_us);
            last_arrival = last_arrival.plus_ns(1_000 * gap_us);
            let plan = Plan::draw(&options, &mut plans_prng, last_arrival, context, &table);
            plans[plans_prng.index(options.fronts)].push(plan);
        }
        let mut fronts: Vec<Box<dyn Side>> = Vec::new();
        for (number, plans) in (0..).zip(plans) {
            let (port, ends) = connect_front(&options.limits, &engine_bell, &Doorbell::new());
            ports.push(port);
            let prng = fronts_prng.fork();
            fronts.push(match kind {
                Fronts::Messages => {
                    Box::new(Front::new(number, ends, &options, context, &table, prng, plans))
                }
                Fronts::Bytes => Box::new(Wire::new(number, ends, &options, &table, prng, plans)),
            });
        }
        let (device_port, device_ends) =
            connect_device(options.depth, &engine_bell, &Doorbell::new());
        let device = Rc::new(RefCell::new(Device::new(&options, device_prng)));
        let backend = Box::new(SimBackend::new(Rc::clone(&device)));
        let device_core = DeviceCore::new(
            backend,
            device_ends.steps,
            device_ends.results,
            device_ends.engine_bell,
        );
        let engine = EngineCore::new(config, table, ports, device_port)
            .expect("the options are drawn to be valid");
        let mut sometime =
            || Instant::ZERO.plus_ns(fate_prng.between(0, 2 * last_arrival.as_ns() + 1));
        let calm_at = sometime().max(last_arrival);
        let drain_at = options.drain_early.then(&mut sometime);
        let front_dies_at = options.front_lost.then(sometime);
        World {
            now: Instant::ZERO,
            engine,
            device_core,
            device,
            fronts,
            idle: 0,
            calm_at,
            calm: false,
            drain_at,
            front_dies_at,
            turns: 0,
            prng,
            options,
        }
    }

    fn run(&mut self) -> Result<Seen, String> {
        let limits = &self.options.limits;
        // All the work there can be, each token computed three times over, one at a time.
        let work = self.fronts.iter().map(|front| front.work());
        let (tokens, read_ms) = work.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        let work_ms = tokens * 3 * (10 + 2 * self.options.step_us) / 1_000;
        let waits_ms = read_ms + limits.queue_ttl_ms + limits.stall_timeout_ms + 120_000;
        let bound = self.calm_at.plus_ms(work_ms + waits_ms);
        for _ in 0..MOVES_MAX {
            self.handle_fate();
            self.step()?;
            if self.now > bound {
                return Err(format!("not over {} ms after faults ended", work_ms + waits_ms));
            }
            let all_idle = self.idle == (1 << (self.fronts.len() + 2)) - 1;
            if !all_idle {
                continue;
            }
            self.check_quiet()?;
            let over = self.fronts.iter().all(|front| front.is_over() && front.batches_held() == 0);
            if over && self.engine.is_drained() && self.fronts.iter().all(|f| f.is_empty()) {
                return self.check_end();
            }
            if over && !self.engine.is_draining() {
                self.begin_drain(1);
                continue;
            }
            self.advance_time()?;
        }
        Err("too many moves".into())
    }

    /// What happens to the whole world at its time.
    fn handle_fate(&mut self) {
        if !self.calm && self.now >= self.calm_at {
            self.calm = true;
            self.device.borrow_mut().faults = false;
            self.fronts.iter_mut().for_each(|front| front.become_calm());
            self.idle = 0;
        }
        if self.drain_at.is_some_and(|at| at <= self.now) {
            self.drain_at = None;
            let patience_ms = self.prng.between(0, 3_000);
            self.begin_drain(patience_ms);
        }
        if self.front_dies_at.is_some_and(|at| at <= self.now) {
            self.front_dies_at = None;
            let dead = self.prng.index(self.fronts.len());
            self.fronts.remove(dead);
            self.idle = 0;
        }
    }

    fn begin_drain(&mut self, patience_ms: u64) {
        let until = self.now.plus_ms(patience_ms);
        self.engine.begin_drain(self.now, until);
        self.fronts.iter_mut().for_each(|front| front.begin_drain(self.now, until));
        self.idle = 0;
    }

    /// Lets one core, drawn at random, have its turn.
    fn step(&mut self) -> Result<(), String> {
        let actors = self.fronts.len() + 2;
        let actor = self.prng.index(actors);
        let busy = match actor {
            0 => {
                let busy = self.engine.tick(self.now);
                let planned = self.engine.stats().counters.steps;
                self.device.borrow_mut().expect_steps(planned, self.engine.pace());
                self.engine.check_invariants()?;
                self.check_links()?;
                self.check_gate()?;
                self.check_shares()?;
                busy
            }
            1 => {
                self.device.borrow_mut().now = self.now;
                let busy = self.device_core.tick(self.now);
                if let Some(breach) = &self.device.borrow().breach {
                    return Err(format!("the plan's contract: {breach}"));
                }
                busy
            }
            front => self.fronts[front - 2].tick(self.now)?,
        };
        if busy {
            self.idle = 0;
            if self.prng.chance(Ratio::percent(50)) {
                self.now = self.now.plus_ns(self.prng.between(0, 20_000));
            }
        } else {
            self.idle |= 1 << actor;
        }
        Ok(())
    }

    /// I1, as far as links have credits; and that every batch and every step is somewhere.
    fn check_links(&mut self) -> Result<(), String> {
        if self.options.fronts != self.fronts.len() {
            return Ok(());
        }
        let counts = self.engine.census();
        for (front, batches_idle) in self.fronts.iter_mut().zip(counts.batches_idle) {
            front.check_links(batches_idle)?;
        }
        Ok(())
    }

    /// Tenants that ask in one class and wait for their turn are not further apart than the bound
    /// that `fair.rs` derives.
    fn check_shares(&mut self) -> Result<(), String> {
        if self.options.one_class.is_none() {
            return Ok(());
        }
        for class in Class::ALL {
            let (gap, most) = self.engine.fair_gap(class);
            self.turns += u64::from(gap > 0);
            if gap > most {
                return Err(format!("tenants are {gap} apart in {class:?}, not {most} at most"));
            }
        }
        Ok(())
    }

    /// The accounts of tenants: nobody has a stream any more, and if none had to make room for
    /// another they sum to what was counted for all.
    fn check_tenants_at_end(&self) -> Result<(), String> {
        let stats = self.engine.stats();
        let mut output = 0;
        for one in self.engine.tenants() {
            if one.tally.live > 0 || one.tally.admitted > 0 {
                return Err(format!("{one:?} has streams, and nobody else has"));
            }
            output += if one.user == Name::EMPTY { one.tally.tokens_out } else { 0 };
        }
        let has_users = self.options.limits.quotas.user != Quota::UNLIMITED;
        let all_kept = self.options.tenants <= self.options.limits.tenants_max as usize;
        let counted = stats.counters.tokens_out;
        match output == counted || has_users || !all_kept {
            true => Ok(()),
            false => Err(format!("tenants had {output} tokens of {counted}")),
        }
    }

    /// As of the end of every tick: the gate is closed while there is a reason, and no longer.
    fn check_gate(&self) -> Result<(), String> {
        let (drains, lost) = (self.engine.is_draining(), self.engine.device_lost());
        let is_open = self.engine.stats().breaker == 2;
        let gate = self.engine.gate();
        let is_right = match gate.map(|closed| closed.reason) {
            Some(RejectReason::ShuttingDown) => drains,
            Some(RejectReason::NoCapacity) => lost || is_open,
            Some(_) => false,
            None => !(drains || lost || is_open),
        };
        match is_right {
            true => Ok(()),
            false => Err(format!("the gate is {gate:?}; {drains}, {lost}")),
        }
    }

    /// Nobody has anything to do. Then, unless a step is at the device, nobody who could run may
    /// be standing about: a stalled client stops only itself (I4), and work is never left lying.
    fn check_quiet(&self) -> Result<(), String> {
        let stats = self.engine.stats();
        if self.fronts.iter().any(|front| front.batches_held() > 0) || self.engine.device_lost() {
            return Ok(());
        }
        if stats.steps_in_flight > 0 {
            return Ok(());
        }
        if stats.running > 0 {
            return Err("the device is idle, and there is a batch".into());
        }
        if self.engine.blocked_until().is_some() {
            // A parked sequence keeps its blocks for a while; somebody waits for them.
            return match stats.parked {
                0 => Err("blocks are kept for nobody".into()),
                _ => Ok(()),
            };
        }
        if stats.waiting > 0 {
            return Err("the device is idle, and sequences with credit do not run".into());
        }
        let limits = &self.options.limits;
        let queued: u32 = stats.queued.iter().sum();
        // Its breaker wakes the engine when it is no longer open.
        if queued > 0 && stats.breaker < 2 && stats.parked < limits.running_max + limits.parked_max
        {
            return Err("the device is idle, and the queue is not served".into());
        }
        Ok(())
    }

    fn advance_time(&mut self) -> Result<(), String> {
        let device = self.device.borrow().next_timeout();
        let fronts = self.fronts.iter().filter_map(|front| front.next_timeout(self.now));
        let fate = (!self.calm).then_some(self.calm_at);
        let next = fronts
            .chain(self.engine.next_timeout())
            .chain(device)
            .chain(fate)
            .chain(self.drain_at)
            .chain(self.front_dies_at)
            .min();
        match next {
            None => Err("nothing will ever happen again".into()),
            Some(next) if next <= self.now => {
                Err(format!("something was due at {} ns, and nobody did it", next.as_ns()))
            }
            Some(next) => {
                self.now = next;
                self.idle = 0;
                Ok(())
            }
        }
    }

    /// Everything is over: nothing may be left anywhere.
    fn check_end(&mut self) -> Result<Seen, String> {
        let stats = self.engine.stats();
        if !self.engine.device_lost() && stats.blocks_free != stats.blocks_total {
            return Err(format!("{stats:?}: not all blocks came back"));
        }
        if let Some(left) = self.engine.pending().next() {
            return Err(format!("{left:?} is left"));
        }
        if stats.queued_tokens + stats.queued_bytes > 0 || stats.granted > 0 {
            return Err(format!("{stats:?}: permits are left"));
        }
        if stats.counters.excess_credit > 0 {
            return Err("the engine was given more credit than it could use".into());
        }
        let rejected: Option<u64> = self.fronts.iter().map(|front| front.rejected()).sum();
        let counted: u64 = stats.counters.rejected.iter().sum();
        let all_there = self.fronts.len() == self.options.fronts;
        if all_there && rejected.is_some_and(|rejected| rejected != counted) {
            return Err(format!("{rejected:?} were rejected, the engine knows of {counted}"));
        }
        self.check_tenants_at_end()?;
        let counts = self.engine.census();
        if self.fronts.len() == self.options.fronts
            && counts.batches_idle.iter().any(|&batches| batches != EVENT_BATCHES)
        {
            return Err(format!("{:?}: batches are not all back (I1)", counts.batches_idle));
        }
        for front in &mut self.fronts {
            front.check_links_at_end()?;
        }
        let mut seen = Seen {
            runs: 1,
            steps: stats.counters.steps,
            steps_cut: self.device.borrow().steps_cut,
            tokens: stats.counters.tokens_out,
            preemptions: stats.counters.preemptions,
            reservations: stats.counters.reservations,
            kv_drops: stats.counters.kv_drops,
            parks: stats.counters.parks,
            resumes: stats.counters.resumes,
            stale: stats.counters.stale_messages,
            gate_refusals: stats.counters.gate_refusals,
            breaker_trips: stats.breaker_trips,
            shared_asks: stats.shared_asks,
            turns: self.turns,
            ..Seen::default()
        };
        self.fronts.iter().for_each(|front| front.count(&mut seen));
        Ok(seen)
    }

    /// Everything that a person needs to look into a failure.
    fn report(&self, what: &str) -> String {
        let mut lines = vec![
            format!("seed {}: {what}", self.options.seed),
            format!("at {} ns, calm: {}", self.now.as_ns(), self.calm),
            format!("{:?}", self.options),
            format!("{:?}", self.engine.stats()),
        ];
        lines.extend(self.engine.pending().map(|pending| format!("engine: {pending:?}")));
        lines.extend(self.fronts.iter().flat_map(|front| front.pending()));
        let events = self.engine.recorder().events();
        let last = &events[events.len().saturating_sub(LAST_EVENTS)..];
        lines.extend(last.iter().map(|event| format!("{:>12} ns  {event}", event.at.as_ns())));
        lines.join("\n")
    }
}
