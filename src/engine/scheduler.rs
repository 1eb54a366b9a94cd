//! The scheduler: which sequences run in the next step, and on whose blocks.
//!
//! A step takes the decode rows first (one token each: somebody is waiting for every one of
//! them), then prefill chunks with what is left of the step's tokens and, when there are decode
//! rows, of its time (`room.rs`), oldest first. So a long prompt holds up no decode for longer
//! than the step's target; and while shorter prompts wait it takes no more than half of a step's
//! prefill, so that it does not hold up their first tokens either.
//!
//! **Precedence** among the admitted is by admission. Who may take blocks from whom is written in
//! `reclaim.rs`. A running sequence that finds none leaves the batch with what it has, and waits.
//!
//! **Why it cannot get stuck.** Take the oldest admitted sequence that has credit. Whoever runs
//! either gets on, and so ends sometime, or leaves its slot and can then lose its blocks to the
//! oldest. Sequences that cannot be preempted any more hold all blocks that they will ever need.
//! Nobody new is admitted while somebody waits for blocks. So the oldest gets slot and blocks, and
//! ends; then the next is the oldest. Sequences without credit are parked, and after a while their
//! blocks are there for anybody.

use crate::base::Instant;
use crate::flow::breaker::PROBES_MAX;
use crate::limits::Limits;
use crate::message::{BLOCK_POSITIONS, Step, StepPlan};

use super::EngineCore;
use super::plan;
use super::reclaim::{Claim, PREEMPTIONS_MAX};
use super::record::Flight;
use super::room::StepRoom;
use super::sequence::{Sequence, SequenceTable, State};

/// What is left of a prompt is long when it is more than this: about ten steps' prefill on a small
/// machine with a few streams, half a step's without.
pub(super) const LONG_PREFILL_TOKENS: usize = 256;

/// The admitted sequences by where they are. No list outgrows its reserved capacity.
#[derive(Debug)]
pub(super) struct Batch {
    slots_free: Vec<u16>,
    /// In a batch slot, oldest admission first.
    pub running: Vec<u32>,
    /// For want of a slot or of blocks, oldest admission first.
    pub waiting: Vec<u32>,
    /// For want of stream credit, longest parked first.
    pub parked: Vec<u32>,
    /// Admitted sequences whose terminal event is not on its way yet.
    pub admitted: u32,
    pub admitted_max: u32,
    /// Admissions so far.
    admissions: u64,
}

impl Batch {
    pub fn new(limits: &Limits) -> Batch {
        let admitted_max = limits.running_max + limits.parked_max;
        Batch {
            slots_free: (0..limits.running_max as u16).rev().collect(),
            running: Vec::with_capacity(limits.running_max as usize),
            waiting: Vec::with_capacity(admitted_max as usize),
            parked: Vec::with_capacity(admitted_max as usize),
            admitted: 0,
            admitted_max,
            admissions: 0,
        }
    }

    /// Batch slots without a sequence.
    pub fn slots_free(&self) -> &[u16] {
        &self.slots_free
    }

    /// Sequences that run or wait to.
    pub fn in_line(&self) -> u32 {
        (self.running.len() + self.waiting.len()) as u32
    }

    pub fn remove_waiting(&mut self, index: u32, sequences: &SequenceTable) {
        remove_ordered(&mut self.waiting, index, sequences);
    }

    pub fn remove_parked(&mut self, index: u32) {
        let at = self.parked.iter().position(|&other| other == index).expect("parked");
        self.parked.remove(at);
    }
}

fn insert_ordered(list: &mut Vec<u32>, index: u32, sequences: &SequenceTable) {
    let admission = sequences[index].admission;
    let at = list.partition_point(|&other| sequences[other].admission < admission);
    debug_assert!(list.len() < list.capacity());
    list.insert(at, index);
}

fn remove_ordered(list: &mut Vec<u32>, index: u32, sequences: &SequenceTable) {
    let admission = sequences[index].admission;
    let at = list.partition_point(|&other| sequences[other].admission < admission);
    assert_eq!(list[at], index, "a list of admitted sequences is out of order");
    list.remove(at);
}

impl EngineCore {
    /// Sends steps to the device while it may have more in flight and there is work for them.
    pub(super) fn plan_steps(&mut self, now: Instant) -> bool {
        let mut busy = false;
        while !self.device.lost
            && let Some(mut step) = self.device.idle.pop()
        {
            step.plan.clear();
            step.result.clear();
            step.plan.number = self.device.submitted + 1;
            self.compose(&mut step.plan, now);
            if step.plan.rows.is_empty() {
                self.device.idle.push(step);
                return busy;
            }
            self.submit(step, now);
            busy = true;
        }
        busy
    }

    fn compose(&mut self, plan: &mut StepPlan, now: Instant) {
        self.blocked_until = Instant::NEVER;
        self.park_starved(now);
        self.plan_decodes(plan, now);
        let mut room = self.room(plan);
        let held_up = self.plan_prefills(plan, &mut room) | self.seat_waiting(plan, &mut room, now);
        if !held_up {
            self.seat_queued(plan, &mut room, now);
        }
    }

    /// Takes sequences without credit out of the batch. One with a token on the way stays: that
    /// token may be its last, or credit may come before it.
    fn park_starved(&mut self, now: Instant) {
        let mut at = 0;
        while let Some(&index) = self.batch.running.get(at) {
            let sequence = &self.sequences[index];
            if sequence.credit > 0 || sequence.samples_in_flight > 0 {
                at += 1;
                continue;
            }
            self.unseat(index);
            self.park(index, now);
        }
    }

    pub(super) fn park(&mut self, index: u32, now: Instant) {
        self.counters.parks += 1;
        let sequence = &mut self.sequences[index];
        sequence.state = State::Parked;
        sequence.times.left_batch = now;
        sequence.times.stalled_since = None;
        let output_tokens = u64::from(sequence.output_tokens());
        let seq = self.sequences.key(index).recorded();
        self.note(now, Flight::Park, [seq, output_tokens, 0]);
        self.batch.parked.push(index);
        self.tell(index);
    }

    /// A parked sequence has credit again.
    pub(super) fn resume(&mut self, index: u32, now: Instant) {
        self.counters.resumes += 1;
        self.batch.remove_parked(index);
        let sequence = &mut self.sequences[index];
        let parked_ns = now.ns_since(sequence.times.left_batch);
        sequence.times.parked_ns += parked_ns;
        sequence.times.last_token = sequence.times.last_token.plus_ns(parked_ns);
        let seq = self.sequences.key(index).recorded();
        self.note(now, Flight::Resume, [seq, parked_ns, 0]);
        self.wait(index, now);
        self.tell(index);
    }

    /// Out of the batch, with credit: in line for a slot.
    pub(super) fn wait(&mut self, index: u32, now: Instant) {
        let sequence = &mut self.sequences[index];
        sequence.state = State::Waiting;
        sequence.times.left_batch = now;
        insert_ordered(&mut self.batch.waiting, index, &self.sequences);
    }

    /// Rows for all who run and whose text is computed up to its last token. Goes from the oldest
    /// to the youngest, so that whoever is preempted on the way has not been planned.
    fn plan_decodes(&mut self, plan: &mut StepPlan, now: Instant) {
        let mut at = 0;
        while let Some(&index) = self.batch.running.get(at) {
            let sequence = &self.sequences[index];
            if sequence.tokens_unplanned() != 1 || !sequence.has_logprob_room() {
                at += 1;
            } else if self.hold_blocks(index, sequence.blocks_for_text(), Claim::Running, now) {
                self.plan_row(plan, index, 1);
                at += 1;
            } else {
                self.unseat(index);
                self.wait(index, now);
            }
        }
    }

    /// Chunks for all who run and have more than one token to compute. Their blocks are theirs
    /// since they entered the batch. Returns whether one of them finds no room in the step: then
    /// nobody younger may take any.
    fn plan_prefills(&mut self, plan: &mut StepPlan, room: &mut StepRoom) -> bool {
        let others = self.has_short_prefill();
        for at in 0..self.batch.running.len() {
            let index = self.batch.running[at];
            let sequence = &self.sequences[index];
            if sequence.tokens_unplanned() > 1 && sequence.has_logprob_room() {
                let chunk = self.chunk(plan, room, index);
                if chunk == 0 {
                    return true;
                }
                let is_long = sequence.tokens_unplanned() > LONG_PREFILL_TOKENS;
                let chunk = if is_long && others { chunk.div_ceil(2) } else { chunk };
                self.plan_prefill(plan, room, index, chunk);
            }
        }
        false
    }

    /// Whether prompts that are not long wait for prefill: in the batch, or for a free slot.
    fn has_short_prefill(&self) -> bool {
        let is_short = |&index: &u32| {
            (2..=LONG_PREFILL_TOKENS).contains(&self.sequences[index].tokens_unplanned())
        };
        let may_come = self.queue.len() > 0 && !self.batch.slots_free.is_empty();
        may_come || self.batch.running.iter().any(is_short)
    }

    /// Gives free slots to admitted sequences that wait, oldest first. Returns whether one of them
    /// lacks blocks or room in the step: then nobody may come in who would take more.
    fn seat_waiting(&mut self, plan: &mut StepPlan, room: &mut StepRoom, now: Instant) -> bool {
        let (mut blocked, mut crowded) = (false, false);
        let mut at = 0;
        while let Some(&index) = self.batch.waiting.get(at)
            && !self.batch.slots_free.is_empty()
        {
            let chunk = self.chunk(plan, room, index);
            let sequence = &self.sequences[index];
            // Preempted with a token on the way: what its text is, is known when that arrives.
            let ready = sequence.samples_in_flight == 0 && sequence.has_logprob_room();
            let target = match sequence.preemptions {
                PREEMPTIONS_MAX.. => sequence.blocks_for_remainder(),
                _ => sequence.blocks_for_text(),
            };
            let may_try = ready
                && plan::has_history_room(plan, sequence, self.context)
                && (target <= sequence.blocks.len() || !blocked);
            if !may_try || chunk == 0 {
                crowded |= may_try;
                at += 1;
            } else if self.hold_blocks(index, target, Claim::Waiting, now) {
                let reserved = self.sequences[index].preemptions >= PREEMPTIONS_MAX;
                self.counters.reservations += u64::from(reserved);
                self.batch.remove_waiting(index, &self.sequences);
                self.seat(index);
                match self.sequences[index].tokens_unplanned() {
                    // The room knows of it already.
                    1 if self.sequences[index].kv_planned > 0 => self.plan_row(plan, index, 1),
                    _ => self.plan_prefill(plan, room, index, chunk),
                }
            } else {
                blocked = true;
                at += 1;
            }
        }
        blocked || crowded
    }

    /// Admits from the queue's head while there are slots, blocks and room.
    fn seat_queued(&mut self, plan: &mut StepPlan, room: &mut StepRoom, now: Instant) {
        while self.batch.admitted < self.batch.admitted_max
            && self.breaker_lets_in(self.batch.in_line(), now)
            && let Some(index) = self.queue.head(&self.sequences, &self.tenants.shares)
            && !self.batch.slots_free.is_empty()
            && plan::has_history_room(plan, &self.sequences[index], self.context)
        {
            let target = self.sequences[index].blocks_for_text();
            let chunk = self.chunk(plan, room, index);
            if chunk == 0 || !self.hold_blocks(index, target, Claim::Newcomer, now) {
                return;
            }
            self.queue.remove(&mut self.sequences, index);
            self.leave_queue(index, now);
            self.batch.admitted += 1;
            self.batch.admissions += 1;
            self.counters.admitted += 1;
            let sequence = &mut self.sequences[index];
            self.counters.prompt_tokens += u64::from(sequence.prompt_tokens);
            let Sequence { bill, class, prompt_tokens, .. } = &*sequence;
            self.tenants.admit(bill, *class, *prompt_tokens, self.queue.is_fair());
            sequence.admission = self.batch.admissions;
            sequence.times.admitted = Some(now);
            let waited_ns = now.ns_since(sequence.times.arrived);
            self.histograms.queue.observe(waited_ns);
            self.load.admitted(1, now);
            let seq = self.sequences.key(index).recorded();
            self.note(now, Flight::Admit, [seq, waited_ns, 0]);
            self.seat(index);
            self.watch(index);
            self.plan_prefill(plan, room, index, chunk);
        }
    }

    /// Whether the breaker lets in one more: nobody while it is open, a few to see while half-open.
    pub(super) fn breaker_lets_in(&self, are_in: u32, now: Instant) -> bool {
        match self.breaker.opens_at(now) {
            Some(_) => false,
            None => are_in < PROBES_MAX || !self.breaker.is_half_open(now),
        }
    }

    fn seat(&mut self, index: u32) {
        let slot = self.batch.slots_free.pop().expect("a slot is free");
        let sequence = &mut self.sequences[index];
        sequence.state = State::Running { slot };
        sequence.setup_due = true;
        insert_ordered(&mut self.batch.running, index, &self.sequences);
    }

    /// Takes a sequence out of its slot. What becomes of it is the caller's business.
    pub(super) fn unseat(&mut self, index: u32) {
        let State::Running { slot } = self.sequences[index].state else {
            unreachable!("sequence {index} has no slot")
        };
        self.batch.slots_free.push(slot);
        remove_ordered(&mut self.batch.running, index, &self.sequences);
    }

    fn plan_prefill(&mut self, plan: &mut StepPlan, room: &mut StepRoom, index: u32, chunk: u32) {
        room.take_prefill(self.sequences[index].kv_planned, chunk);
        self.plan_row(plan, index, chunk);
    }

    /// Puts the sequence's next tokens into the step, `chunk` of them. With the last it samples,
    /// which costs one credit.
    fn plan_row(&mut self, plan: &mut StepPlan, index: u32, chunk: u32) {
        let key = self.sequences.key(index);
        let sequence = &mut self.sequences[index];
        let row = plan::write_row(plan, key, sequence, chunk as usize);
        sequence.kv_planned += row.token_count;
        sequence.last_step = plan.number;
        if row.sample {
            sequence.samples_in_flight += 1;
            sequence.credit = sequence.credit.checked_sub(1).expect("it has credit or is parked");
        }
    }

    fn submit(&mut self, step: Box<Step>, now: Instant) {
        let checked = plan::check(&step.plan, &self.limits, self.vocab, &self.blocks);
        assert_eq!(checked, Ok(()), "the engine's own plan is invalid");
        debug_assert!(step.plan.blocks.iter().all(|&b| self.blocks.references(b) > 0));
        debug_assert!(step.plan.blocks.len() * BLOCK_POSITIONS >= step.plan.tokens.len());
        if self.steps_in_flight() == 0 {
            self.counters.device_idle_ns += now.ns_since(self.device.since);
            self.device.since = now;
        }
        self.device.submitted = step.plan.number;
        self.counters.steps += 1;
        self.counters.rows += step.plan.rows.len() as u64;
        self.counters.tokens_in += step.plan.tokens.len() as u64;
        let (rows, tokens) = (step.plan.rows.len() as u64, step.plan.tokens.len() as u64);
        self.note(now, Flight::StepPlanned, [step.plan.number, rows, tokens]);
        match self.device.port.steps.push(step) {
            Ok(()) => self.device.port.bell.ring(),
            // The ring has room for every step that circulates; so the device core is gone, and
            // this step with it. Its blocks retire for good, like those of steps in flight.
            Err(_) => self.lose_device(now),
        }
    }
}
