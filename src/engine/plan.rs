//! The step plan: writing a row, and checking the whole before it leaves.

use std::sync::Arc;

use thiserror::Error;

use crate::flow::StepLoad;
use crate::limits::Limits;
use crate::message::{
    BLOCK_POSITIONS, BlockId, PlanRow, SeqKey, SlotSetup, Step, StepPlan, StepResult,
};
use crate::request::SamplingParams;

use super::blocks::BlockPool;
use super::sequence::{Sequence, State, blocks_for};

/// A step with room for the largest plan and result there can be: from here on nothing in it is
/// ever allocated again.
pub fn new_step(limits: &Limits, context: u32) -> Box<Step> {
    let rows = limits.running_max as usize;
    Box::new(Step {
        plan: StepPlan {
            number: 0,
            setups: Vec::with_capacity(rows),
            rows: Vec::with_capacity(rows),
            tokens: Vec::with_capacity(limits.step_tokens_max as usize),
            blocks: Vec::with_capacity(rows * blocks_for(context as usize)),
            // One whole context. Two long sequences with penalties that enter the batch in the
            // same step are rare, and the second can wait for the next.
            history: Vec::with_capacity(context as usize),
        },
        result: StepResult {
            sampled: Vec::with_capacity(rows),
            top: Vec::with_capacity(rows * usize::from(SamplingParams::TOP_LOGPROBS_MAX)),
            ..StepResult::default()
        },
    })
}

/// Whether the plan has room for what the sequence's new slot must be told.
pub(super) fn has_history_room(plan: &StepPlan, sequence: &Sequence, context: u32) -> bool {
    plan.history.len() + history_tokens(sequence) <= context as usize
}

fn history_tokens(sequence: &Sequence) -> usize {
    let needed = sequence.sampling.as_ref().is_some_and(|sampling| sampling.has_penalties());
    if needed { sequence.tokens.len() } else { 0 }
}

/// Adds up to `chunk` of the sequence's next tokens to the plan, and its slot's setup if that is
/// due. Samples if they are its last.
pub(super) fn write_row(
    plan: &mut StepPlan,
    key: SeqKey,
    sequence: &mut Sequence,
    chunk: usize,
) -> PlanRow {
    let State::Running { slot } = sequence.state else {
        unreachable!("a row without a slot: {key:?}")
    };
    if sequence.setup_due {
        sequence.setup_due = false;
        plan.setups.push(SlotSetup {
            slot,
            seq: key,
            sampling: Arc::clone(sequence.sampling.as_ref().expect("it was submitted")),
            history_start: plan.history.len() as u32,
            history_count: history_tokens(sequence) as u32,
            history_prompt_count: (history_tokens(sequence) as u32).min(sequence.prompt_tokens),
        });
        plan.history.extend_from_slice(&sequence.tokens[..history_tokens(sequence)]);
    }
    let start = sequence.kv_planned as usize;
    let count = sequence.tokens_unplanned().min(chunk);
    let end = start + count;
    let row = PlanRow {
        seq: key,
        slot,
        sample: end == sequence.tokens.len(),
        token_start: plan.tokens.len() as u32,
        token_count: count as u32,
        position: start as u32,
        block_start: plan.blocks.len() as u32,
        block_count: blocks_for(end) as u32,
    };
    plan.tokens.extend_from_slice(&sequence.tokens[start..end]);
    plan.blocks.extend_from_slice(&sequence.blocks[..blocks_for(end)]);
    plan.rows.push(row);
    row
}

/// What the plan gives the device to do. A row of one token counts as a decode.
pub fn load(plan: &StepPlan) -> StepLoad {
    plan.rows.iter().fold(StepLoad::default(), |load, row| match row.token_count {
        1 => load.plus_decode(row.position),
        count => load.plus_prefill(row.position, count),
    })
}

/// What is wrong with a plan. Each names the row, or the setup, by its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// More rows than slots, or more tokens than a step may have.
    #[error("the plan is too large")]
    TooLarge,
    /// Rows do not follow each other without gap or overlap in the tokens or the blocks.
    #[error("row {0} does not begin where the last one ended")]
    Ragged(usize),
    /// No token, or more than a chunk.
    #[error("row {0} has a token count out of range")]
    TokenCount(usize),
    /// Not the blocks for positions 0 up to the row's end.
    #[error("row {0} has the wrong number of blocks")]
    BlockCount(usize),
    /// A slot outside the batch, or one that another row or setup has too.
    #[error("row or setup {0} has a slot that is not its own")]
    Slot(usize),
    /// A token outside the vocabulary.
    #[error("a token is outside the vocabulary")]
    Token,
    /// A block that is written by the row and held by others too, or by nobody.
    #[error("row {0} writes a block that is not its own")]
    SharedWrite(usize),
    /// A history that is not there.
    #[error("setup {0} has a history out of range")]
    History(usize),
}

/// Checks a plan against its contract. Linear in rows, tokens and the blocks *written*.
pub fn check(
    plan: &StepPlan,
    limits: &Limits,
    vocab: u32,
    pool: &BlockPool,
) -> Result<(), PlanError> {
    let slots = limits.running_max as usize;
    if plan.rows.len() > slots || plan.tokens.len() > limits.step_tokens_max as usize {
        return Err(PlanError::TooLarge);
    }
    let (mut token_end, mut block_end) = (0, 0);
    for (at, row) in plan.rows.iter().enumerate() {
        if row.token_start as usize != token_end || row.block_start as usize != block_end {
            return Err(PlanError::Ragged(at));
        }
        token_end += row.token_count as usize;
        block_end += row.block_count as usize;
        check_row(plan, row, at, limits, pool)?;
    }
    if token_end != plan.tokens.len() || block_end != plan.blocks.len() {
        return Err(PlanError::Ragged(plan.rows.len()));
    }
    if !plan.tokens.iter().chain(&plan.history).all(|&token| token < vocab) {
        return Err(PlanError::Token);
    }
    let mut history_end = 0;
    for (at, setup) in plan.setups.iter().enumerate() {
        if setup.history_start != history_end || setup.history_prompt_count > setup.history_count {
            return Err(PlanError::History(at));
        }
        history_end += setup.history_count;
        // A setup never comes without a row of the same sequence in the same slot.
        let same = |row: &PlanRow| row.slot == setup.slot && row.seq == setup.seq;
        if !plan.rows.iter().any(same) {
            return Err(PlanError::Slot(at));
        }
    }
    if history_end as usize != plan.history.len() {
        return Err(PlanError::History(plan.setups.len()));
    }
    Ok(())
}

fn check_row(
    plan: &StepPlan,
    row: &PlanRow,
    at: usize,
    limits: &Limits,
    pool: &BlockPool,
) -> Result<(), PlanError> {
    if !(1..=limits.chunk_tokens_max).contains(&row.token_count) {
        return Err(PlanError::TokenCount(at));
    }
    let end = (row.position + row.token_count) as usize;
    if row.block_count as usize != blocks_for(end) {
        return Err(PlanError::BlockCount(at));
    }
    let slot_taken = plan.rows[..at].iter().any(|other| other.slot == row.slot);
    if u32::from(row.slot) >= limits.running_max || slot_taken {
        return Err(PlanError::Slot(at));
    }
    let blocks = row_blocks(plan, row).ok_or(PlanError::Ragged(at))?;
    let written = &blocks[row.position as usize / BLOCK_POSITIONS..];
    let own = |block: BlockId| (block as usize) < pool.total() && pool.references(block) == 1;
    if !written.iter().all(|&block| own(block)) {
        return Err(PlanError::SharedWrite(at));
    }
    Ok(())
}

fn row_blocks<'a>(plan: &'a StepPlan, row: &PlanRow) -> Option<&'a [BlockId]> {
    let start = row.block_start as usize;
    plan.blocks.get(start..start + row.block_count as usize)
}
