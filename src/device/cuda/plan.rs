//! From a step's plan to the arrays that the kernels read. Plain data: nothing here knows the
//! device, and a plan that breaks its contract leaves no trace.

use crate::device::contract::{Bounds, Contract};
use crate::device::cuda::abi;
use crate::device::cuda::memory::{self, BIASES, PREFILL_TILES, padded};
use crate::message::{BLOCK_POSITIONS, PlanRow, SlotSetup, StepFailure, StepPlan};
use crate::request::SamplingParams;

const NONE: u32 = abi::FB_NONE;
/// Padding among query tiles.
const NO_TILE: abi::fb_query_tile = abi::fb_query_tile { row: NONE, token_start: 0 };

/// What decides how many of each kernel's blocks a step launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchSizes {
    /// Tokens, padding included.
    pub tokens: usize,
    /// Query tiles of rows with a single one, padding included.
    pub tiles: usize,
    /// Query tiles of longer rows, in whole groups.
    pub prefill_tiles: usize,
    /// Sampled rows, padding included.
    pub sampled: usize,
    /// Splits of the longest row.
    pub splits: usize,
    /// A decode step of a recorded size: every row is one token and samples.
    pub is_recorded: bool,
}

/// A step's arrays. All vectors keep their capacity.
#[derive(Debug)]
pub struct Arrays {
    contract: Contract,
    vocab: usize,
    blocks_max: usize,
    history_max: usize,
    tile_tokens: usize,
    pub step: abi::fb_step,
    pub rows: Vec<abi::fb_row>,
    pub sampled_rows: Vec<u32>,
    /// Of each sampled row, its last token.
    pub sampled_tokens: Vec<u32>,
    /// Of rows with a single one.
    pub tiles: Vec<abi::fb_query_tile>,
    /// Of longer rows; each row's are filled up to a whole group.
    pub prefill_tiles: Vec<abi::fb_query_tile>,
    pub token_ids: Vec<u32>,
    pub token_slots: Vec<u32>,
    pub positions: Vec<u32>,
    pub kv_places: Vec<u32>,
    /// Slots whose occurrences are to be counted anew.
    pub setups: Vec<abi::fb_slot_setup>,
    /// Sampling state of all slots, from step to step.
    pub slots: Vec<abi::fb_slot>,
    /// Biases of all slots, [`BIASES`] places each.
    pub biases: Vec<abi::fb_bias>,
    /// Whether some slot's biases changed.
    pub has_new_biases: bool,
}

impl Arrays {
    /// Room for any plan within `bounds`, for layers of `group` query heads a kv head.
    pub fn new(bounds: Bounds, group: usize) -> Arrays {
        let tokens = bounds.step_tokens_max.next_multiple_of(64);
        let sampled = bounds.sampled_rows_max.next_multiple_of(64);
        let tile_tokens = memory::tile_tokens(group);
        Arrays {
            contract: Contract::new(bounds),
            vocab: bounds.vocab,
            blocks_max: bounds.rows_max * bounds.context_max.div_ceil(BLOCK_POSITIONS),
            history_max: bounds.rows_max * bounds.context_max,
            tile_tokens,
            step: abi::fb_step::default(),
            rows: Vec::with_capacity(bounds.rows_max),
            sampled_rows: Vec::with_capacity(sampled),
            sampled_tokens: Vec::with_capacity(sampled),
            tiles: Vec::with_capacity(memory::tiles_max(bounds.rows_max)),
            prefill_tiles: Vec::with_capacity(memory::prefill_tiles_max(
                (bounds.rows_max, bounds.step_tokens_max),
                tile_tokens,
            )),
            token_ids: Vec::with_capacity(tokens),
            token_slots: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            kv_places: Vec::with_capacity(tokens),
            setups: Vec::with_capacity(bounds.rows_max),
            slots: vec![abi::fb_slot::default(); bounds.rows_max],
            biases: vec![abi::fb_bias::default(); bounds.rows_max * BIASES],
            has_new_biases: false,
        }
    }

    /// Checks a plan and makes its arrays.
    ///
    /// # Errors
    /// As [`Contract::check`]; also when there are more blocks or more history than all rows
    /// together can use.
    pub fn prepare(&mut self, plan: &StepPlan) -> Result<LaunchSizes, StepFailure> {
        if plan.blocks.len() > self.blocks_max || plan.history.len() > self.history_max {
            return Err(StepFailure::InvalidPlan);
        }
        self.contract.check(plan)?;
        self.clear();
        for setup in &plan.setups {
            self.set_up(setup);
        }
        for row in &plan.rows {
            self.add_row(plan, row);
        }
        self.step = abi::fb_step {
            tokens: self.token_ids.len() as u32,
            rows: self.rows.len() as u32,
            sampled: self.sampled_rows.len() as u32,
            reserved: 0,
        };
        let positions = plan.rows.iter().map(|row| row.position + row.token_count).max();
        let splits = memory::splits(positions.unwrap_or(0) as usize);
        let tokens = self.token_ids.len();
        let is_decode = plan.rows.iter().all(|row| row.token_count == 1 && row.sample);
        let recorded = padded(tokens).filter(|_| is_decode && tokens > 0);
        if let Some(size) = recorded {
            self.pad(size);
        }
        Ok(LaunchSizes {
            tokens: self.token_ids.len(),
            tiles: self.tiles.len(),
            prefill_tiles: self.prefill_tiles.len(),
            sampled: self.sampled_rows.len(),
            splits,
            is_recorded: recorded.is_some(),
        })
    }

    fn clear(&mut self) {
        self.rows.clear();
        self.sampled_rows.clear();
        self.sampled_tokens.clear();
        self.tiles.clear();
        self.prefill_tiles.clear();
        self.token_ids.clear();
        self.token_slots.clear();
        self.positions.clear();
        self.kv_places.clear();
        self.setups.clear();
        self.has_new_biases = false;
    }

    fn set_up(&mut self, setup: &SlotSetup) {
        let slot = usize::from(setup.slot);
        let (start, vocab) = (slot * BIASES, self.vocab);
        let places = &mut self.biases[start..start + BIASES];
        let biases = setup.sampling.logit_bias.iter().take(BIASES);
        // A token outside the vocabulary is never sampled anyway.
        let biases = biases.filter(|(token, _)| (*token as usize) < vocab);
        let mut count = 0;
        for (place, &(token, bias)) in places.iter_mut().zip(biases) {
            *place = abi::fb_bias { token, bias };
            count += 1;
        }
        self.has_new_biases |= count > 0;
        self.slots[slot] = slot_state(&setup.sampling, start, count);
        // A slot that is set up twice in a plan belongs to the last, whose counts must be the only
        // ones.
        self.setups.retain(|earlier| earlier.slot != u32::from(setup.slot));
        // Without penalties nobody reads the counts.
        if setup.sampling.has_penalties() {
            self.setups.push(abi::fb_slot_setup {
                slot: setup.slot.into(),
                history_start: setup.history_start,
                history_count: setup.history_count,
                history_prompt_count: setup.history_prompt_count,
            });
        }
    }

    fn add_row(&mut self, plan: &StepPlan, row: &PlanRow) {
        let index = self.rows.len() as u32;
        let token_start = self.token_ids.len() as u32;
        let tokens = &plan.tokens[row.token_start as usize..][..row.token_count as usize];
        let blocks = &plan.blocks[row.block_start as usize..][..row.block_count as usize];
        for (&token, position) in tokens.iter().zip(row.position..) {
            let place = position as usize % BLOCK_POSITIONS;
            let block = blocks[position as usize / BLOCK_POSITIONS];
            self.token_ids.push(token);
            self.token_slots.push(row.slot.into());
            self.positions.push(position);
            self.kv_places.push(block * BLOCK_POSITIONS as u32 + place as u32);
        }
        let is_short = row.token_count as usize <= self.tile_tokens;
        let tiles = if is_short { &mut self.tiles } else { &mut self.prefill_tiles };
        let starts = (0..row.token_count).step_by(self.tile_tokens);
        tiles.extend(starts.map(|token_start| abi::fb_query_tile { row: index, token_start }));
        while !is_short && tiles.len() % PREFILL_TILES != 0 {
            tiles.push(NO_TILE);
        }
        let mut sampled = NONE;
        if row.sample {
            sampled = self.sampled_rows.len() as u32;
            self.sampled_rows.push(index);
            self.sampled_tokens.push(token_start + row.token_count - 1);
        }
        self.rows.push(abi::fb_row {
            token_start,
            token_count: row.token_count,
            position: row.position,
            block_start: row.block_start,
            slot: row.slot.into(),
            sampled,
        });
    }

    /// Fills a decode step up to a recorded size with tokens that are none.
    fn pad(&mut self, size: usize) {
        self.tiles.resize(size, NO_TILE);
        self.token_ids.resize(size, 0);
        self.token_slots.resize(size, 0);
        self.positions.resize(size, 0);
        self.kv_places.resize(size, NONE);
        self.sampled_rows.resize(size, NONE);
        self.sampled_tokens.resize(size, NONE);
    }
}

fn slot_state(sampling: &SamplingParams, bias_start: usize, bias_count: u32) -> abi::fb_slot {
    abi::fb_slot {
        seed: sampling.seed,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        frequency_penalty: sampling.frequency_penalty,
        presence_penalty: sampling.presence_penalty,
        top_k: sampling.top_k,
        bias_start: bias_start as u32,
        bias_count,
        logprobs: sampling.logprobs.map_or(0, |count| u32::from(count) + 1),
    }
}

#[cfg(test)]
mod tests;
