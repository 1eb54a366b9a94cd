//! The engine: the only owner of sequence state, permits, KV blocks and stream credits.
//!
//! Core: the engine core, one. [`EngineCore`] is a pure state machine: it reads rings, it writes
//! rings, and is handed the time; it has no clock, no I/O and no threads, and after construction
//! it allocates nothing. The shell calls [`EngineCore::tick`] until there is nothing left to do
//! and then waits for its doorbell or for [`EngineCore::next_timeout`].
//!
//! What a request goes through is drawn in `sequence.rs`; one file per mechanism:
//! [`ledger`] and `queue.rs` before admission, [`blocks`] and the scheduler after it, [`plan`] on
//! the way to the device, [`stop`] on the way back, the egress towards the front cores.
//!
//! The files beside this one add methods to [`EngineCore`]:
//!
//! | file | in → out |
//! |---|---|
//! | `control.rs` | credits, cancels, returned batches; drain; time-outs |
//! | `admission.rs` | asks and submissions → grants, refusals, the queue |
//! | `retry.rs` | a refusal → a place in the calendar |
//! | `tenants.rs` | an ask → who pays, and whether they may have it now |
//! | `fair.rs` | what tenants were served → whose turn it is |
//! | `foresight.rs` | an ask → whether its first token would come in time |
//! | `scheduler.rs` | sequences → a step |
//! | `room.rs` | a step's target time → how much prefill it takes |
//! | `reclaim.rs` | who may take blocks from whom |
//! | `results.rs` | a finished step → output, ends |
//! | `egress.rs` | what is to be told → event batches |
//! | `record.rs` | what happens → the flight recorder |
//! | `gate.rs` | what would be refused → the front cores' gates |
//! | `check.rs` | everything → is it consistent? |

mod admission;
pub mod blocks;
mod check;
mod control;
mod egress;
pub mod fair;
mod foresight;
mod gate;
pub mod ledger;
pub mod plan;
mod queue;
mod reclaim;
mod record;
mod results;
mod retry;
pub mod room;
mod scheduler;
mod sequence;
pub mod stats;
pub mod stop;
pub mod task;
pub mod tenants;

use std::collections::VecDeque;
use std::sync::Arc;

use thiserror::Error;

use crate::base::{Instant, Pen, Recorder, TokenTable};
use crate::flow::{Breaker, Calendar, LoadEstimator, StepCost, StepTimeModel};
use crate::limits::Limits;
use crate::message::{BLOCK_POSITIONS, SeqKey, Step, StreamKey};
use crate::ports::{DevicePort, FrontPort};
use crate::request::{FinishReason, RejectReason};

pub use check::Census;

use blocks::BlockPool;
use egress::FrontLink;
use foresight::{Hindsight, Typical};
use ledger::{DrainMeter, Ledger};
use queue::Queue;
use record::Flight;
use scheduler::Batch;
use sequence::{SequenceTable, State, Terminal, blocks_for};
use stats::{Counters, EngineStats, Histograms, Saturation, permille};
use stop::Borders;
use tenants::Tenants;

/// What an engine is built from.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The bounds it keeps.
    pub limits: Limits,
    /// Blocks in the device's KV pool.
    pub kv_blocks: u32,
    /// Tokens in the model's vocabulary: ids are below this.
    pub vocab: u32,
    /// Steps that the device may have in flight.
    pub depth: usize,
}

/// Why an engine cannot be built like that.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The value must not be zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// A token of everybody who runs must fit in a step.
    #[error("step_tokens_max ({step_tokens_max}) must be at least running_max ({running_max})")]
    StepTooSmall {
        /// `limits.step_tokens_max`.
        step_tokens_max: u32,
        /// `limits.running_max`.
        running_max: u32,
    },
    /// A batch slot's number has 16 bits.
    #[error("running_max ({0}) must be below 65536")]
    TooManySlots(u32),
    /// A prompt that fills the context must be able to wait.
    #[error("queued_tokens_max ({queued_tokens_max}) must be at least context_max ({context_max})")]
    QueueTooSmall {
        /// `limits.queued_tokens_max`.
        queued_tokens_max: u64,
        /// `limits.context_max`.
        context_max: u32,
    },
}

impl EngineConfig {
    /// Finds values that contradict each other.
    pub fn check(&self) -> Result<(), ConfigError> {
        let limits = &self.limits;
        let positive = [
            (u64::from(self.kv_blocks), "kv_blocks"),
            (u64::from(self.vocab), "vocab"),
            (self.depth as u64, "depth"),
            (u64::from(limits.asks_max), "asks_max"),
            (u64::from(limits.running_max), "running_max"),
            (u64::from(limits.queued_requests_max), "queued_requests_max"),
            (u64::from(limits.chunk_tokens_max), "chunk_tokens_max"),
            (u64::from(limits.stream_window_tokens_max), "stream_window_tokens_max"),
        ];
        if let Some(&(_, name)) = positive.iter().find(|(value, _)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        if limits.running_max > u32::from(u16::MAX) {
            return Err(ConfigError::TooManySlots(limits.running_max));
        }
        let (step_tokens_max, running_max) = (limits.step_tokens_max, limits.running_max);
        // Equality is enough: whoever is in prefill takes a slot, and so leaves a token over.
        if step_tokens_max < running_max {
            return Err(ConfigError::StepTooSmall { step_tokens_max, running_max });
        }
        let (queued_tokens_max, context_max) = (limits.queued_tokens_max, self.context());
        if queued_tokens_max < u64::from(context_max) {
            return Err(ConfigError::QueueTooSmall { queued_tokens_max, context_max });
        }
        Ok(())
    }

    /// Longest sequence: the context, or all of the KV pool if that is less. So the oldest
    /// sequence can always finish, if need be with the whole pool for itself.
    pub fn context(&self) -> u32 {
        let pool = u64::from(self.kv_blocks) * BLOCK_POSITIONS as u64;
        self.limits.context_max.min(u32::try_from(pool).unwrap_or(u32::MAX))
    }
}

/// Bytes of one sequence in the engine's table, with its buffers and its places in lists; its
/// block table, its tokens and what the front core allocated for it not counted.
pub const SEQUENCE_BYTES: usize = sequence::BYTES + 4 * size_of::<u32>();

/// Bytes of a tenant's or user's account, with all that is kept for it.
pub const ACCOUNT_BYTES: usize = tenants::BYTES;

/// The engine. See the [module's documentation](self).
#[derive(Debug)]
pub struct EngineCore {
    limits: Limits,
    vocab: u32,
    /// See [`EngineConfig::context`].
    context: u32,
    table: Arc<TokenTable>,

    sequences: SequenceTable,
    ledger: Ledger,
    tenants: Tenants,
    meter: DrainMeter,
    calendar: Calendar,
    breaker: Breaker,
    queue: Queue,
    batch: Batch,
    blocks: BlockPool,
    fronts: Vec<FrontLink>,
    /// The front core whose requests are read first in the next tick.
    front_first: usize,
    device: DeviceLink,
    borders: Borders,
    counters: Counters,
    histograms: Histograms,

    /// Asks seen so far: the order within a class.
    arrivals: u64,
    /// No sequence expires before this. May be early (the one it was for is gone), never late.
    expiry: Instant,
    /// Somebody lacks blocks that can be taken from a parked sequence from then on.
    blocked_until: Instant,
    /// How long steps take, and so what it costs to compute a text again.
    pace: StepTimeModel,
    /// How long answers are.
    typical: Typical,
    /// How much longer first tokens took than was foreseen.
    hindsight: Hindsight,
    /// See [`EngineCore::learn`].
    prefill_seen: u32,
    /// What comes in and what is served.
    load: LoadEstimator,
    /// The time of the last tick.
    ticked: Instant,
    drain: Drain,
    /// Why the gates are closed, as last recorded.
    gate_reason: Option<RejectReason>,
    pen: Pen,
}

/// Believed until a few steps have been seen: a small model on a CPU.
const PACE_PRIOR: StepCost = StepCost {
    step_ps: 2_000_000_000,
    prefill_token_ps: 500_000_000,
    decode_row_ps: 500_000_000,
    kv_position_ps: 1_000,
};

/// λ and μ are those of about the last half minute: long enough that answers of a few seconds
/// make an average, short enough that an operator sees a flood come.
const LOAD_HORIZON_NS: u64 = 30_000_000_000;

/// The way to the device and back.
#[derive(Debug)]
struct DeviceLink {
    port: DevicePort,
    /// Steps not at the device: holding one is the credit to submit it.
    #[expect(clippy::vec_box, reason = "the box is what travels")]
    idle: Vec<Box<Step>>,
    /// Number of the newest step submitted. The newest completed is the block pool's.
    submitted: u64,
    /// Since when the oldest step in flight is at work; since when there is none, if there is none.
    since: Instant,
    lost: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drain {
    /// Not draining.
    Off,
    /// What is admitted may finish until then.
    Until(Instant),
    /// That time is over.
    Over,
}

impl EngineCore {
    /// Builds an engine with everything it will ever need.
    ///
    /// # Panics
    /// When a port's rings are too small for what circulates on them.
    pub fn new(
        config: EngineConfig,
        table: Arc<TokenTable>,
        fronts: Vec<FrontPort>,
        device: DevicePort,
    ) -> Result<EngineCore, ConfigError> {
        config.check()?;
        let context = config.context();
        let EngineConfig { limits, kv_blocks, vocab, depth } = config;
        let capacity = limits.sequences_max();
        let blocks_max = blocks_for(context as usize);
        let tenants = Tenants::new(&limits);
        let queue = Queue::new(&limits, tenants.accounts_max());
        let idle = (0..depth).map(|_| plan::new_step(&limits, context)).collect();
        Ok(EngineCore {
            sequences: SequenceTable::new(capacity, blocks_max),
            ledger: Ledger::new(&limits),
            tenants,
            meter: DrainMeter::default(),
            calendar: Calendar::new(),
            breaker: Breaker::new(limits.breaker_failures_max, limits.breaker_open_ms),
            queue,
            batch: Batch::new(&limits),
            blocks: BlockPool::new(kv_blocks, depth),
            fronts: fronts.into_iter().map(|port| FrontLink::new(port, &limits)).collect(),
            front_first: 0,
            device: DeviceLink {
                port: device,
                idle,
                submitted: 0,
                since: Instant::ZERO,
                lost: false,
            },
            borders: Borders::default(),
            counters: Counters::default(),
            histograms: Histograms::default(),
            arrivals: 0,
            expiry: Instant::NEVER,
            blocked_until: Instant::NEVER,
            pace: StepTimeModel::new(PACE_PRIOR),
            typical: Typical::default(),
            hindsight: Hindsight::default(),
            prefill_seen: limits.step_tokens_max,
            load: LoadEstimator::new(LOAD_HORIZON_NS),
            ticked: Instant::ZERO,
            drain: Drain::Off,
            gate_reason: None,
            pen: Recorder::start("engine", Flight::KINDS),
            limits,
            vocab,
            context,
            table,
        })
    }

    /// Does a bounded amount of what there is to do; returns whether there was anything. `now`
    /// never goes back.
    ///
    /// The order matters: control first (it frees), then results (they free more), then requests
    /// (they take), then time-outs, so that nothing that has expired is planned; the plan leaves
    /// before the events are written, so that the device does not wait for them.
    pub fn tick(&mut self, now: Instant) -> bool {
        self.ticked = now;
        let mut busy = self.handle_control(now);
        busy |= self.handle_results(now);
        busy |= self.handle_requests(now);
        busy |= self.handle_timeouts(now);
        busy |= self.plan_steps(now);
        busy |= self.flush_events(now);
        self.show_gates(now);
        busy
    }

    /// When to tick again even if nothing arrives.
    pub fn next_timeout(&self) -> Option<Instant> {
        let drain = match self.drain {
            Drain::Until(deadline) => deadline,
            Drain::Off | Drain::Over => Instant::NEVER,
        };
        // What it was set for may be gone; when everybody is, that is known for nothing.
        let expiry = if self.sequences.len() == 0 { Instant::NEVER } else { self.expiry };
        let next = expiry.min(drain).min(self.blocked_until().unwrap_or(Instant::NEVER));
        let next = next.min(self.breaker_timeout());
        (next != Instant::NEVER).then_some(next)
    }

    /// Until when nobody may take the blocks that somebody lacks, if that is what the next step
    /// waits for. While the device has all the steps it may have, that is not the question.
    pub fn blocked_until(&self) -> Option<Instant> {
        let waits = self.blocked_until != Instant::NEVER && !self.device.idle.is_empty();
        waits.then_some(self.blocked_until)
    }

    /// Its flight recorder, to be read from anywhere.
    pub fn recorder(&self) -> Arc<Recorder> {
        self.pen.recorder()
    }

    /// Where things stand.
    pub fn stats(&self) -> EngineStats {
        let (requests, queued_tokens, queued_bytes) = self.ledger.held();
        let outlook = self.outlook();
        EngineStats {
            counters: self.counters,
            load: self.load.load(self.ticked),
            breaker: self.breaker.number(self.ticked),
            breaker_trips: self.breaker.trips(),
            promises: self.calendar.counts(),
            wait_correction_permille: self.hindsight.permille(),
            granted: requests - self.queue.len() as u32,
            queued: self.queue.lens(),
            running: self.batch.running.len() as u32,
            waiting: self.batch.waiting.len() as u32,
            parked: self.batch.parked.len() as u32,
            queued_tokens,
            queued_bytes,
            blocks_free: self.blocks.free() as u32,
            blocks_retiring: self.blocks.retiring() as u32,
            blocks_total: self.blocks.total() as u32,
            steps_in_flight: self.steps_in_flight() as u32,
            saturation: self.saturation(outlook.prefill_permille),
            wait_foreseen_ns: outlook.wait_ns,
            histograms: self.histograms,
            shared_asks: self.tenants.shared_asks,
        }
    }

    fn saturation(&self, prefill: u64) -> Saturation {
        let (limits, batch) = (&self.limits, &self.batch);
        let (requests, tokens, bytes) = self.ledger.held();
        let slots = batch.running.len() + batch.waiting.len() + self.queue.len();
        let (free, total) = (self.blocks.free() as u64, self.blocks.total() as u64);
        let queue = [
            permille(requests.into(), limits.queued_requests_max.into()),
            permille(tokens, limits.queued_tokens_max),
            permille(bytes, limits.queued_bytes_max),
        ];
        Saturation {
            slots: permille(slots as u64, limits.running_max.into()),
            kv: permille(total - free, total),
            queue: queue.into_iter().max().unwrap_or(0),
            prefill,
            egress: permille(batch.parked.len() as u64, limits.parked_max.into()),
        }
    }

    /// Whether every front core is gone: nobody is left to serve.
    pub fn is_deserted(&self) -> bool {
        self.fronts.iter().all(|front| front.departed)
    }

    /// Whether the device was lost: the engine refuses everything from then on.
    pub fn device_lost(&self) -> bool {
        self.device.lost
    }

    /// What is not over yet, for whoever wants to know what a stuck engine waits for.
    pub fn pending(&self) -> impl Iterator<Item = Pending> + '_ {
        self.sequences.iter().filter(|(_, sequence)| sequence.state != State::Free).map(
            |(index, sequence)| Pending {
                seq: self.sequences.key(index),
                stream: sequence.stream,
                state: sequence.state.name(),
                prompt_tokens: sequence.prompt_tokens,
                output_tokens: sequence.output_tokens(),
                output_max: sequence.output_max,
                credit: sequence.credit,
                blocks: sequence.blocks.len() as u32,
                kv_planned: sequence.kv_planned,
                preemptions: sequence.preemptions,
            },
        )
    }

    /// What is believed of step times: the steps of this tick were cut to it.
    pub fn pace(&self) -> &StepTimeModel {
        &self.pace
    }

    fn steps_in_flight(&self) -> usize {
        (self.device.submitted - self.blocks.completed()) as usize
    }

    /// Ends a sequence: it gives back all that it holds; its slot in the table stays until the
    /// terminal event is on its way. All of its output may be told, unless a stop string said
    /// where the text ends.
    fn end(&mut self, index: u32, terminal: Terminal, now: Instant) {
        match self.sequences[index].state {
            State::Free | State::Ended => unreachable!("sequence {index} ends twice"),
            State::Granted => {}
            State::Queued => self.queue.remove(&mut self.sequences, index),
            State::Running { .. } => self.unseat(index),
            State::Waiting => self.batch.remove_waiting(index, &self.sequences),
            State::Parked => self.batch.remove_parked(index),
        }
        self.leave_queue(index, now);
        self.release_blocks(index);
        let sequence = &mut self.sequences[index];
        let used = (sequence.prompt_tokens, sequence.output_tokens());
        let used = sequence.is_admitted().then_some(used);
        self.tenants.settle(&mut sequence.bill, used, now);
        sequence.state = State::Ended;
        sequence.egress.text_ready = sequence.egress.text_total;
        sequence.egress.grant_due &= matches!(terminal, Terminal::Done { .. });
        sequence.egress.terminal = Some(terminal);
        self.tell(index);
    }

    /// Ends a sequence with an account of what it used.
    fn finish(&mut self, index: u32, finish: FinishReason, now: Instant) {
        let (usage, timings) = self.sequences[index].account(now);
        self.counters.finished[finish as usize] += 1;
        if self.sequences[index].is_admitted() {
            self.typical.observe(usage.prompt_tokens, usage.output_tokens);
            self.histograms.ended(&usage, &timings);
            if finish.is_natural() {
                self.tenants.observe(&self.sequences[index].bill, usage.output_tokens);
            }
        }
        self.load.left(timings.total_ns);
        let seq = self.sequences.key(index).recorded();
        self.note(now, Flight::Done, [seq, finish as u64, usage.output_tokens.into()]);
        self.end(index, Terminal::Done { finish, usage, timings }, now);
    }

    /// Ends a sequence that was not admitted.
    fn reject(
        &mut self,
        index: u32,
        reason: RejectReason,
        retry_after_ms: Option<u32>,
        now: Instant,
    ) {
        debug_assert!(!self.sequences[index].is_admitted(), "admitted is never evicted (I5)");
        self.tenants.refuse(&self.sequences[index].bill);
        self.counters.rejected[reason as usize] += 1;
        self.load.left(now.ns_since(self.sequences[index].times.arrived));
        let seq = self.sequences.key(index).recorded();
        let retry_ms = u64::from(retry_after_ms.unwrap_or(0));
        self.note(now, Flight::Evict, [seq, reason as u64, retry_ms]);
        self.end(index, Terminal::Reject { reason, retry_after_ms }, now);
    }

    /// Gives the queue's permit back, if the sequence still has one.
    fn leave_queue(&mut self, index: u32, now: Instant) {
        let mut permit = self.sequences[index].permit;
        if permit == ledger::Permit::default() {
            return;
        }
        let departed = permit;
        self.ledger.give(&mut permit);
        self.sequences[index].permit = permit;
        self.meter.handle_departure(now, &departed, self.ledger.held().0);
    }

    /// Makes sure that the sequence will be looked at when it expires.
    fn watch(&mut self, index: u32) {
        let expires = self.sequences[index].expires(self.limits.stall_timeout_ms);
        self.expiry = self.expiry.min(expires);
    }

    /// Puts a sequence on its front core's list of those with something to tell.
    fn tell(&mut self, index: u32) {
        let sequence = &mut self.sequences[index];
        if !sequence.egress.listed {
            sequence.egress.listed = true;
            self.fronts[usize::from(sequence.front)].listed.push_back(index);
        }
    }
}

/// A sequence that is not over, or whose end is not told yet; see [`EngineCore::pending`].
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// Which.
    pub seq: SeqKey,
    /// Whose.
    pub stream: StreamKey,
    /// The state's name.
    pub state: &'static str,
    /// Tokens of its prompt; 0 before it is submitted.
    pub prompt_tokens: u32,
    /// Tokens produced.
    pub output_tokens: u32,
    /// Tokens it may produce.
    pub output_max: u32,
    /// Tokens it may produce before its client gives more credit.
    pub credit: u32,
    /// KV blocks held.
    pub blocks: u32,
    /// Positions computed, or on their way.
    pub kv_planned: u32,
    /// Times it was preempted.
    pub preemptions: u8,
}

/// A list whose capacity was reserved at construction and is never exceeded.
fn bounded<T>(capacity: usize) -> VecDeque<T> {
    VecDeque::with_capacity(capacity)
}
