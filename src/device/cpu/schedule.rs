//! From a plan to a schedule: the plan is checked (`contract`), then cut into tasks. Nothing that
//! fails the check reaches memory.

use crate::device::contract::{Bounds, Contract};
use crate::message::{BLOCK_POSITIONS, BlockId, PlanRow, SeqKey, StepFailure, StepPlan};
use crate::request::TokenId;

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
    contract: Contract,
    /// Kv heads of a layer.
    kv_heads: usize,
    /// Query heads a kv head.
    group: usize,
    /// Tokens of the batch: rows in order, back to back.
    pub tokens: Vec<BatchToken>,
    /// To do before any attention.
    pub writes: Vec<WriteTask>,
    /// Attention.
    pub attends: Vec<AttendTask>,
    /// Sampling.
    pub samples: Vec<SampleTask>,
}

impl Schedule {
    /// A schedule with room for any plan within `bounds`, for layers of `kv_heads` heads with
    /// `group` query heads each.
    pub fn new(bounds: Bounds, kv_heads: usize, group: usize) -> Schedule {
        let Bounds { rows_max, step_tokens_max, .. } = bounds;
        // A task is cut per row and again after so many tokens.
        let cuts = |tokens: usize| rows_max + step_tokens_max.div_ceil(tokens);
        let attend_tokens = Schedule::attend_tokens(group);
        Schedule {
            contract: Contract::new(bounds),
            kv_heads,
            group,
            tokens: Vec::with_capacity(step_tokens_max),
            // Writes start at aligned positions: one more a row.
            writes: Vec::with_capacity((cuts(WRITE_TOKENS) + rows_max) * kv_heads),
            attends: Vec::with_capacity(cuts(attend_tokens) * kv_heads),
            samples: Vec::with_capacity(bounds.sampled_rows_max),
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
            + self.samples.capacity() * size_of::<SampleTask>()) as u64
            + self.contract.bytes()
    }

    /// Checks a plan and makes its tasks. On failure nothing has changed for later plans.
    ///
    /// # Errors
    /// As [`Contract::check`].
    pub fn prepare(&mut self, plan: &StepPlan) -> Result<(), StepFailure> {
        self.tokens.clear();
        self.writes.clear();
        self.attends.clear();
        self.samples.clear();
        self.contract.check(plan)?;
        for row in &plan.rows {
            self.add_row(plan, row);
        }
        Ok(())
    }

    /// Adds a row of a plan that was checked.
    fn add_row(&mut self, plan: &StepPlan, row: &PlanRow) {
        let tokens = &plan.tokens[row.token_start as usize..][..row.token_count as usize];
        let blocks = &plan.blocks[row.block_start as usize..][..row.block_count as usize];
        let first = self.tokens.len();
        self.tokens.extend(tokens.iter().zip(row.position..).map(|(&token, position)| {
            let block = blocks[position as usize / BLOCK_POSITIONS];
            BatchToken { token, position, block }
        }));
        self.add_tasks(row, first);
        if row.sample {
            self.samples.push(SampleTask {
                last: self.tokens.len() - 1,
                position: row.position + row.token_count,
                slot: usize::from(row.slot),
                seq: row.seq,
            });
        }
    }

    fn add_tasks(&mut self, row: &PlanRow, first: usize) {
        let count = row.token_count as usize;
        let is_decode = count == 1;
        let attend_tokens = Schedule::attend_tokens(self.group);
        for kv_head in 0..self.kv_heads {
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
