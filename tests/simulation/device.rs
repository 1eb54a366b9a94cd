//! The simulated device: runs plans on the model of [`super::model`], on virtual time, and checks
//! for itself that each plan keeps its contract.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;

use forebay::base::{Instant, Prng};
use forebay::device::{Backend, BackendDescription};
use forebay::engine::room::PREFILL_TOKENS_MIN;
use forebay::flow::{StepLoad, StepTimeModel};
use forebay::message::{
    BLOCK_POSITIONS, BlockId, PlanRow, Sampled, SeqKey, Step, StepFailure, StepPlan,
};
use forebay::request::{SamplingParams, TokenId};

use crate::model;
use crate::options::Options;

/// What is in one position of a block.
#[derive(Clone, Copy, Debug)]
struct Kv {
    seq: SeqKey,
    position: u32,
    link: u64,
}

struct InFlight {
    done: Instant,
    busy_ns: u64,
    step: Box<Step>,
}

struct Slot {
    seq: SeqKey,
    sampling: SamplingParams,
    /// What the slot was told, and what it sampled since.
    history: Vec<TokenId>,
}

pub struct Device {
    pub now: Instant,
    pub faults: bool,
    options: Options,
    prng: Prng,
    blocks: Vec<[Option<Kv>; BLOCK_POSITIONS]>,
    slots: Vec<Option<Slot>>,
    /// When each will be done, and how long it takes.
    in_flight: VecDeque<InFlight>,
    last_number: u64,
    lost: bool,
    /// Sequences of a step that failed: what later steps in flight do with them is nonsense, and
    /// nobody may care.
    spoilt: BTreeSet<SeqKey>,
    /// The first breach of contract.
    pub breach: Option<String>,
    pub steps_run: u64,
    /// So many more steps fail.
    ill_steps: u64,
    /// What the engine believed of step times when it planned, up to which step.
    paces: VecDeque<(u64, StepTimeModel)>,
    pub steps_cut: u64,
}

/// The device core's handle on it.
pub struct SimBackend {
    pub device: Rc<RefCell<Device>>,
    description: BackendDescription,
}

impl SimBackend {
    pub fn new(device: Rc<RefCell<Device>>) -> SimBackend {
        let (kv_blocks, depth) = {
            let options = &device.borrow().options;
            (options.kv_blocks, options.depth)
        };
        let description = BackendDescription {
            name: "simulated",
            path: String::new(),
            kv_blocks,
            kv_block_bytes: 0,
            weight_bytes: 0,
            workspace_bytes: 0,
            history_bytes: 0,
            depth,
            on_device: false,
            host_bytes: 0,
        };
        SimBackend { device, description }
    }
}

impl Backend for SimBackend {
    fn description(&self) -> &BackendDescription {
        &self.description
    }

    fn submit(&mut self, step: Box<Step>) {
        self.device.borrow_mut().submit(step);
    }

    fn poll(&mut self) -> Option<Box<Step>> {
        self.device.borrow_mut().poll()
    }
}

impl Device {
    pub fn new(options: &Options, prng: Prng) -> Device {
        Device {
            now: Instant::ZERO,
            faults: true,
            options: options.clone(),
            prng,
            blocks: vec![[None; BLOCK_POSITIONS]; options.kv_blocks as usize],
            slots: (0..options.limits.running_max).map(|_| None).collect(),
            in_flight: VecDeque::new(),
            last_number: 0,
            lost: false,
            spoilt: BTreeSet::new(),
            breach: None,
            steps_run: 0,
            ill_steps: 0,
            paces: VecDeque::new(),
            steps_cut: 0,
        }
    }

    /// The engine has planned steps up to this number; the newest of them by this model.
    pub fn expect_steps(&mut self, up_to: u64, pace: &StepTimeModel) {
        if up_to > self.paces.back().map_or(self.last_number, |last| last.0) {
            self.paces.push_back((up_to, pace.clone()));
        }
    }

    /// A step in which somebody decodes takes no more prefill than the model lets end in time.
    fn check_time(&mut self, plan: &StepPlan) -> Result<(), String> {
        while self.paces.front().is_some_and(|(up_to, _)| *up_to < plan.number) {
            self.paces.pop_front();
        }
        let (_, pace) = self.paces.front().ok_or("was not expected")?;
        let is_decode = |row: &&PlanRow| row.token_count == 1 && row.sample && row.position > 0;
        let (mut load, mut prefill_tokens) = (StepLoad::default(), 0);
        for row in &plan.rows {
            load = match row.token_count {
                1 => load.plus_decode(row.position),
                count => load.plus_prefill(row.position, count),
            };
            prefill_tokens += if is_decode(&row) { 0 } else { row.token_count };
        }
        if !plan.rows.iter().any(|row| is_decode(&row)) || prefill_tokens <= PREFILL_TOKENS_MIN {
            return Ok(());
        }
        self.steps_cut += 1;
        let (ns, target_ms) = (pace.predict_ns(load), self.options.limits.step_target_ms);
        match ns <= target_ms * 1_000_000 {
            true => Ok(()),
            false => Err(format!("takes {ns} ns with {prefill_tokens} tokens of prefill")),
        }
    }

    /// When the oldest step in flight is done.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.in_flight.front().map(|first| first.done)
    }

    fn submit(&mut self, step: Box<Step>) {
        let time = self.check_time(&step.plan);
        if let Err(breach) = self.check_plan(&step.plan).and(time) {
            let number = step.plan.number;
            self.breach.get_or_insert(format!("step {number}: {breach}"));
        }
        self.last_number = step.plan.number;
        let mut busy_us = self.prng.between(0, 2 * self.options.step_us);
        if self.faults && self.prng.chance(self.options.step_spike) {
            busy_us *= 100;
        }
        let begin = self.in_flight.back().map_or(self.now, |last| last.done.max(self.now));
        let busy_ns = 1 + 1_000 * busy_us;
        self.in_flight.push_back(InFlight { done: begin.plus_ns(busy_ns), busy_ns, step });
    }

    fn poll(&mut self) -> Option<Box<Step>> {
        if self.in_flight.front()?.done > self.now {
            return None;
        }
        let InFlight { busy_ns, mut step, .. } = self.in_flight.pop_front()?;
        self.steps_run += 1;
        self.lost |= self.faults && self.prng.chance(self.options.device_lost);
        step.result.elapsed_ns = busy_ns;
        if self.lost {
            step.result.failure = Some(StepFailure::DeviceLost);
        } else if self.fails() {
            step.result.failure = Some(StepFailure::InvalidPlan);
            self.spoilt.extend(step.plan.rows.iter().map(|row| row.seq));
        } else if let Err(breach) = self.run(&mut step) {
            let number = step.plan.number;
            self.breach.get_or_insert(format!("step {number}: {breach}"));
            step.result.failure = Some(StepFailure::InvalidPlan);
        }
        Some(step)
    }

    /// One failure may be an accident, or the first of a few: a device that is ill for a while.
    fn fails(&mut self) -> bool {
        if self.faults && self.ill_steps == 0 && self.prng.chance(self.options.step_invalid) {
            self.ill_steps = 1 + self.prng.below(6);
        }
        let fails = self.faults && self.ill_steps > 0;
        self.ill_steps = self.ill_steps.saturating_sub(1);
        fails
    }

    /// What can be said of a plan before it runs; written without a look at the engine's own check.
    fn check_plan(&self, plan: &StepPlan) -> Result<(), String> {
        let limits = &self.options.limits;
        if plan.number != self.last_number + 1 {
            return Err(format!("follows step {}", self.last_number));
        }
        if self.in_flight.len() >= self.options.depth {
            return Err("is one too many".into());
        }
        if plan.rows.is_empty() || plan.rows.len() > limits.running_max as usize {
            return Err(format!("has {} rows", plan.rows.len()));
        }
        if plan.tokens.len() > limits.step_tokens_max as usize {
            return Err(format!("has {} tokens", plan.tokens.len()));
        }
        let mut written: Vec<(BlockId, SeqKey)> = Vec::new();
        let mut slots: Vec<u16> = Vec::new();
        for row in &plan.rows {
            if row.token_count == 0 || row.token_count > limits.chunk_tokens_max {
                return Err(format!("{row:?} is empty or too long"));
            }
            let end = (row.position + row.token_count) as usize;
            if row.block_count as usize != end.div_ceil(BLOCK_POSITIONS) {
                return Err(format!("{row:?} has the wrong number of blocks"));
            }
            if slots.contains(&row.slot) || u32::from(row.slot) >= limits.running_max {
                return Err(format!("{row:?} has no slot of its own"));
            }
            slots.push(row.slot);
            for &block in &row_blocks(plan, row)[row.position as usize / BLOCK_POSITIONS..] {
                written.push((block, row.seq));
            }
        }
        for (at, &(block, seq)) in written.iter().enumerate() {
            if written[..at].iter().any(|&(other, _)| other == block) {
                return Err(format!("block {block} is written by two rows"));
            }
            let before = self.in_flight.iter().flat_map(|first| named(&first.step.plan));
            if before.into_iter().any(|(other, its)| other == block && its != seq) {
                return Err(format!("block {block} of {seq:?} is still another's in flight"));
            }
        }
        Ok(())
    }

    fn run(&mut self, step: &mut Step) -> Result<(), String> {
        let Step { plan, result } = step;
        for setup in &plan.setups {
            let start = setup.history_start as usize;
            let history = plan.history[start..start + setup.history_count as usize].to_vec();
            let sampling = SamplingParams::clone(&setup.sampling);
            self.slots[usize::from(setup.slot)] = Some(Slot { seq: setup.seq, sampling, history });
        }
        for row in &plan.rows {
            if self.spoilt.contains(&row.seq) {
                let nonsense = Sampled { seq: row.seq, token: 2, logprob: 0.0, top_count: 0 };
                result.sampled.extend(row.sample.then_some(nonsense));
                continue;
            }
            let link = self.run_row(plan, row)?;
            let slot = self.slots[usize::from(row.slot)].as_mut();
            let Some(slot) = slot.filter(|slot| slot.seq == row.seq) else {
                return Err(format!("{row:?}: its slot is another's"));
            };
            if !row.sample {
                continue;
            }
            let seen = model::seen(&slot.sampling, &slot.history);
            let token = model::next_token(link, seen, &slot.sampling);
            slot.history.push(token);
            let top_count = slot.sampling.logprobs.unwrap_or(0);
            let logprob =
                if slot.sampling.logprobs.is_some() { model::logprob(token) } else { 0.0 };
            result.top.extend(model::alternatives(token, top_count));
            result.sampled.push(Sampled { seq: row.seq, token, logprob, top_count });
        }
        Ok(())
    }

    /// Reads the row's KV from its blocks, as attention would, then writes what it adds. Returns
    /// the last link.
    fn run_row(&mut self, plan: &StepPlan, row: &PlanRow) -> Result<u64, String> {
        let blocks = row_blocks(plan, row);
        let place = |position: u32| {
            let position = position as usize;
            (blocks[position / BLOCK_POSITIONS] as usize, position % BLOCK_POSITIONS)
        };
        let mut link = 0;
        for position in 0..row.position {
            let (block, within) = place(position);
            match self.blocks[block][within] {
                Some(kv) if kv.seq == row.seq && kv.position == position => link = kv.link,
                other => {
                    return Err(format!(
                        "{row:?}: position {position} in block {block}: {other:?}"
                    ));
                }
            }
        }
        for (n, position) in (row.position..row.position + row.token_count).enumerate() {
            let token = plan.tokens[row.token_start as usize + n];
            link = model::chain(link, position, token);
            let (block, within) = place(position);
            self.blocks[block][within] = Some(Kv { seq: row.seq, position, link });
        }
        Ok(link)
    }
}

fn row_blocks<'a>(plan: &'a StepPlan, row: &PlanRow) -> &'a [BlockId] {
    let start = row.block_start as usize;
    &plan.blocks[start..start + row.block_count as usize]
}

/// Every block that a plan names, and for whom.
fn named(plan: &StepPlan) -> Vec<(BlockId, SeqKey)> {
    let of = |row: &PlanRow| {
        let seq = row.seq;
        row_blocks(plan, row).iter().map(move |&block| (block, seq)).collect::<Vec<_>>()
    };
    plan.rows.iter().flat_map(of).collect()
}
