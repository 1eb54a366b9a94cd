//! From a plan to a schedule: the plan is checked against everything the workers will index with,
//! then cut into tasks. Nothing that fails the check reaches memory.

use crate::message::{BLOCK_POSITIONS, BlockId, PlanRow, SeqKey, SlotSetup, StepFailure, StepPlan};
use crate::request::TokenId;

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
    /// Kv heads of a layer.
    pub kv_heads: usize,
    /// Query heads a kv head.
    pub group: usize,
}

/// A token of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchToken {
    /// Which.
    pub token: TokenId,
    /// Absolute position in its sequence.
    pub position: u32,
    /// Its KV block.
    pub block: BlockId,
}

/// Keys and values of some consecutive tokens of a row, one kv head, are put into the cache. Never
/// splits a pair of positions (2i, 2i + 1): they share words of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteTask {
    /// First token, as an index into the batch.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// Which head.
    pub kv_head: usize,
}

/// Some queries of a row attend, one kv head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttendTask {
    /// First token, as an index into the batch.
    pub first: usize,
    /// How many tokens.
    pub count: usize,
    /// Which head.
    pub kv_head: usize,
    /// The row's blocks, as a range of the plan's.
    pub block_start: usize,
    /// How many blocks.
    pub block_count: usize,
    /// A decode row: the task also writes the token's key and value first.
    pub writes: bool,
}

/// A row samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleTask {
    /// The row's last token, as an index into the batch.
    pub last: usize,
    /// Absolute position of the token to choose.
    pub position: u32,
    /// Its batch slot.
    pub slot: usize,
    /// Whose.
    pub seq: SeqKey,
}

/// Tokens of a write task.
const WRITE_TOKENS: usize = 16;
/// Queries of an attention task: enough to amortise claiming it, few enough to spread a prompt.
const ATTEND_QUERIES: usize = 48;

/// A checked plan, cut into tasks. All vectors keep their capacity.
#[derive(Debug)]
pub struct Schedule {
    bounds: Bounds,
    /// Tokens of the batch: rows in order, back to back.
    pub tokens: Vec<BatchToken>,
    /// To do before any attention.
    pub writes: Vec<WriteTask>,
    /// Attention.
    pub attends: Vec<AttendTask>,
    /// Sampling.
    pub samples: Vec<SampleTask>,
    /// Owner of each slot.
    owners: Vec<Option<SeqKey>>,
    /// For each block, the last plan that wrote to it (counted by `plans`).
    written: Vec<u64>,
    /// For each slot, the last plan that had a row for it.
    used: Vec<u64>,
    plans: u64,
}

impl Schedule {
    /// A schedule with room for any plan within `bounds`.
    pub fn new(bounds: Bounds) -> Schedule {
        let Bounds { rows_max, step_tokens_max, kv_heads, group, .. } = bounds;
        // A task is cut per row and again after so many tokens.
        let cuts = |tokens: usize| rows_max + step_tokens_max.div_ceil(tokens);
        let attend_tokens = Schedule::attend_tokens(group);
        Schedule {
            bounds,
            tokens: Vec::with_capacity(step_tokens_max),
            // Writes start at aligned positions: one more a row.
            writes: Vec::with_capacity((cuts(WRITE_TOKENS) + rows_max) * kv_heads),
            attends: Vec::with_capacity(cuts(attend_tokens) * kv_heads),
            samples: Vec::with_capacity(bounds.sampled_rows_max),
            owners: vec![None; rows_max],
            written: vec![0; bounds.kv_blocks as usize],
            used: vec![0; rows_max],
            plans: 0,
        }
    }

    /// Tokens of an attention task, at most.
    pub fn attend_tokens(group: usize) -> usize {
        (ATTEND_QUERIES / group).max(1)
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        (self.tokens.capacity() * size_of::<BatchToken>()
            + self.writes.capacity() * size_of::<WriteTask>()
            + self.attends.capacity() * size_of::<AttendTask>()
            + self.samples.capacity() * size_of::<SampleTask>()
            + self.owners.capacity() * size_of::<Option<SeqKey>>()
            + (self.written.len() + self.used.len()) * 8) as u64
    }

    /// Checks a plan and makes its tasks. On failure nothing has changed for later plans.
    ///
    /// # Errors
    /// [`StepFailure::InvalidPlan`] when the plan breaks its contract: a range outside its vector,
    /// a block, token or slot that does not exist, more rows, tokens or samples than agreed, a
    /// position outside the context, a block count that does not fit the positions, a slot used
    /// twice or owned by another sequence, a block written by one row and used by another.
    pub fn prepare(&mut self, plan: &StepPlan) -> Result<(), StepFailure> {
        self.tokens.clear();
        self.writes.clear();
        self.attends.clear();
        self.samples.clear();
        self.plans += 1;
        self.check(plan).ok_or(StepFailure::InvalidPlan)?;
        for setup in &plan.setups {
            self.owners[usize::from(setup.slot)] = Some(setup.seq);
        }
        Ok(())
    }

    /// `None` when the plan breaks its contract.
    fn check(&mut self, plan: &StepPlan) -> Option<()> {
        ensure(plan.setups.iter().all(|setup| self.is_setup_valid(plan, setup)))?;
        ensure(plan.rows.len() <= self.bounds.rows_max)?;
        for row in &plan.rows {
            self.add_row(plan, row)?;
        }
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

    fn add_row(&mut self, plan: &StepPlan, row: &PlanRow) -> Option<()> {
        let Bounds { vocab, kv_blocks, step_tokens_max, context_max, .. } = self.bounds;
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
        ensure(self.tokens.len() + tokens.len() <= step_tokens_max)?;
        ensure(blocks.len() == end.div_ceil(BLOCK_POSITIONS))?;
        ensure(tokens.iter().all(|&token| (token as usize) < vocab))?;
        ensure(blocks.iter().all(|&block| block < kv_blocks))?;
        for &block in &blocks[position / BLOCK_POSITIONS..] {
            ensure(self.written[block as usize] != self.plans)?;
            self.written[block as usize] = self.plans;
        }

        let first = self.tokens.len();
        self.tokens.extend(tokens.iter().zip(position..).map(|(&token, position)| BatchToken {
            token,
            position: position as u32,
            block: blocks[position / BLOCK_POSITIONS],
        }));
        self.add_tasks(row, first);
        if row.sample {
            ensure(self.samples.len() < self.bounds.sampled_rows_max)?;
            let last = self.tokens.len() - 1;
            self.samples.push(SampleTask { last, position: end as u32, slot, seq: row.seq });
        }
        Some(())
    }

    fn add_tasks(&mut self, row: &PlanRow, first: usize) {
        let count = row.token_count as usize;
        let is_decode = count == 1;
        let attend_tokens = Schedule::attend_tokens(self.bounds.group);
        for kv_head in 0..self.bounds.kv_heads {
            for offset in (0..count).step_by(attend_tokens) {
                self.attends.push(AttendTask {
                    first: first + offset,
                    count: attend_tokens.min(count - offset),
                    kv_head,
                    block_start: row.block_start as usize,
                    block_count: row.block_count as usize,
                    writes: is_decode,
                });
            }
            if is_decode {
                continue;
            }
            let mut offset = 0;
            while offset < count {
                let past_aligned = (row.position as usize + offset) % WRITE_TOKENS;
                let count = (WRITE_TOKENS - past_aligned).min(count - offset);
                self.writes.push(WriteTask { first: first + offset, count, kv_head });
                offset += count;
            }
        }
    }
}

fn ensure(condition: bool) -> Option<()> {
    condition.then_some(())
}

fn range<T>(values: &[T], start: u32, count: u32) -> Option<&[T]> {
    let start = start as usize;
    values.get(start..start.checked_add(count as usize)?)
}
