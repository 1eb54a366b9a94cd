//! The contract of a step's plan: it is checked against everything that a backend will index
//! with, before anything is touched. Every backend starts a step with it.

use crate::message::{BLOCK_POSITIONS, PlanRow, SeqKey, SlotSetup, StepFailure, StepPlan};

/// What plans are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// KV blocks in the pool.
    pub kv_blocks: u32,
    /// Batch slots, and rows of a step.
    pub rows_max: usize,
    /// Tokens of a step.
    pub step_tokens_max: usize,
    /// Positions of a sequence.
    pub context_max: usize,
    /// Rows of a step that sample.
    pub sampled_rows_max: usize,
}

/// Checks plans; remembers who owns each slot.
#[derive(Debug)]
pub struct Contract {
    bounds: Bounds,
    owners: Vec<Option<SeqKey>>,
    /// For each block, the last plan that wrote to it (counted by `plans`).
    written: Vec<u64>,
    /// For each slot, the last plan that had a row for it.
    used: Vec<u64>,
    plans: u64,
}

impl Contract {
    /// Nobody owns a slot yet.
    pub fn new(bounds: Bounds) -> Contract {
        Contract {
            bounds,
            owners: vec![None; bounds.rows_max],
            written: vec![0; bounds.kv_blocks as usize],
            used: vec![0; bounds.rows_max],
            plans: 0,
        }
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        (self.owners.capacity() * size_of::<Option<SeqKey>>()
            + (self.written.len() + self.used.len()) * size_of::<u64>()) as u64
    }

    /// Checks a plan whole. On failure nothing has changed for later plans.
    ///
    /// # Errors
    /// [`StepFailure::InvalidPlan`] when the plan breaks its contract: a range outside its vector,
    /// a block, token or slot that does not exist, more rows, tokens or samples than agreed, a
    /// position outside the context, a block count that does not fit the positions, a slot used
    /// twice or owned by another sequence, a block written by one row and used by another.
    pub fn check(&mut self, plan: &StepPlan) -> Result<(), StepFailure> {
        self.plans += 1;
        self.holds_for(plan).ok_or(StepFailure::InvalidPlan)?;
        for setup in &plan.setups {
            self.owners[usize::from(setup.slot)] = Some(setup.seq);
        }
        Ok(())
    }

    /// `None` when the plan breaks its contract.
    fn holds_for(&mut self, plan: &StepPlan) -> Option<()> {
        ensure(plan.setups.iter().all(|setup| self.is_setup_valid(plan, setup)))?;
        ensure(plan.rows.len() <= self.bounds.rows_max)?;
        let mut tokens = 0;
        for row in &plan.rows {
            self.check_row(plan, row)?;
            tokens += row.token_count as usize;
            ensure(tokens <= self.bounds.step_tokens_max)?;
        }
        let sampled = plan.rows.iter().filter(|row| row.sample).count();
        ensure(sampled <= self.bounds.sampled_rows_max)?;
        // Written blocks are known now: no row may read one that another row writes.
        for row in &plan.rows {
            let whole = row.position as usize / BLOCK_POSITIONS;
            let read = &plan.blocks[row.block_start as usize..][..whole];
            ensure(read.iter().all(|&block| self.written[block as usize] != self.plans))?;
        }
        Some(())
    }

    fn is_setup_valid(&self, plan: &StepPlan, setup: &SlotSetup) -> bool {
        let history = range(&plan.history, setup.history_start, setup.history_count);
        usize::from(setup.slot) < self.bounds.rows_max
            && setup.history_prompt_count <= setup.history_count
            && setup.history_count as usize <= self.bounds.context_max
            && history.is_some_and(|tokens| {
                tokens.iter().all(|&token| (token as usize) < self.bounds.vocab)
            })
    }

    fn check_row(&mut self, plan: &StepPlan, row: &PlanRow) -> Option<()> {
        let Bounds { vocab, kv_blocks, context_max, .. } = self.bounds;
        let slot = usize::from(row.slot);
        let owner = plan.setups.iter().rev().find(|setup| setup.slot == row.slot);
        let owner = owner.map(|setup| setup.seq).or(self.owners.get(slot).copied().flatten());
        ensure(owner == Some(row.seq) && self.used[slot] != self.plans)?;
        self.used[slot] = self.plans;

        let tokens = range(&plan.tokens, row.token_start, row.token_count)?;
        let blocks = range(&plan.blocks, row.block_start, row.block_count)?;
        let position = row.position as usize;
        let end = position.checked_add(tokens.len())?;
        ensure(!tokens.is_empty() && end <= context_max)?;
        ensure(blocks.len() == end.div_ceil(BLOCK_POSITIONS))?;
        ensure(tokens.iter().all(|&token| (token as usize) < vocab))?;
        ensure(blocks.iter().all(|&block| block < kv_blocks))?;
        for &block in &blocks[position / BLOCK_POSITIONS..] {
            ensure(self.written[block as usize] != self.plans)?;
            self.written[block as usize] = self.plans;
        }
        Some(())
    }
}

fn ensure(condition: bool) -> Option<()> {
    condition.then_some(())
}

fn range<T>(values: &[T], start: u32, count: u32) -> Option<&[T]> {
    let start = start as usize;
    values.get(start..start.checked_add(count as usize)?)
}
