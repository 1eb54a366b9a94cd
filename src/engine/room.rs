//! What a step may still take: tokens, and time.
//!
//! Whoever decodes waits for the whole step. So a step with decode rows gets no more prefill than
//! the model of step times lets end within the target; one without them gets chunks as long as
//! they may be. Whatever the model says, a step takes *some* prefill if there is any: a target
//! that decode rows alone exceed must not stop prompts for good.

use crate::flow::{StepLoad, StepTimeModel};
use crate::message::StepPlan;

use super::EngineCore;
use super::plan;

/// Prefill that a step takes however long it lasts, and the least that a chunk is cut down to:
/// shorter ones cost a step's overhead over and over.
pub const PREFILL_TOKENS_MIN: u32 = 16;

/// What steps have shown fades by one part in so many with each step that has prefill.
const SEEN_OVER: u32 = 16;

/// A step's time as it fills up.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepRoom {
    /// What is planned, and decode rows that may join.
    load: StepLoad,
    /// Somebody in it decodes.
    is_decoding: bool,
    /// Prefill that is planned.
    prefill_tokens: u32,
}

impl EngineCore {
    /// The room in a step whose decode rows are planned. Admitted sequences that wait for a slot
    /// with one token to compute count as if they were in it: they enter after the chunks are cut.
    pub(super) fn room(&self, plan: &StepPlan) -> StepRoom {
        let waiting = self.batch.waiting.iter().map(|&index| &self.sequences[index]);
        let load = waiting
            .filter(|sequence| sequence.tokens_unplanned() == 1)
            .take(self.batch.slots_free().len())
            .fold(plan::load(plan), |load, sequence| load.plus_decode(sequence.kv_planned));
        StepRoom { load, is_decoding: load.decode_rows > 0, prefill_tokens: 0 }
    }

    /// How many of the sequence's next tokens the step takes; 0 for none.
    pub(super) fn chunk(&self, plan: &StepPlan, room: &StepRoom, index: u32) -> u32 {
        let sequence = &self.sequences[index];
        let tokens = self.limits.step_tokens_max as usize - plan.tokens.len();
        let most = sequence.tokens_unplanned().min(self.limits.chunk_tokens_max as usize);
        let most = most.min(tokens) as u32;
        let is_decode = sequence.tokens_unplanned() == 1 && sequence.kv_planned > 0;
        if is_decode || !room.is_decoding {
            return most;
        }
        let least = most.min(PREFILL_TOKENS_MIN);
        let believed = self.prefill_seen.saturating_add(self.prefill_seen / 4);
        let most = most.min(believed.saturating_sub(room.prefill_tokens)).max(least);
        let fits = room.fits(&self.pace, sequence.kv_planned, most, self.step_target_ns());
        match fits >= least {
            true => fits,
            false if room.prefill_tokens > 0 => 0,
            false => least,
        }
    }

    /// Learns from a step that took so long; and up to how much prefill steps have shown lately.
    /// Steps that are all cut to one time are much alike, and tell the model little of what sets
    /// them apart: it is asked for no more than a quarter beyond what was seen, lest a wrong guess
    /// costs everybody a whole chunk.
    pub(super) fn learn(&mut self, load: StepLoad, took_ns: u64) {
        self.pace.observe(load, took_ns);
        if load.prefill_tokens > 0 {
            let forgotten = self.prefill_seen - self.prefill_seen.div_ceil(SEEN_OVER);
            self.prefill_seen = forgotten.max(load.prefill_tokens);
        }
    }

    /// How much prefill the steps to come will take, with so much else in each: at least 1.
    pub(super) fn prefill_a_step(&self, beside: StepLoad) -> u32 {
        let most = self.limits.step_tokens_max.saturating_sub(beside.decode_rows).max(1);
        if beside.decode_rows == 0 {
            return most;
        }
        let fits = self.pace.prefill_within(beside, 0, most, self.step_target_ns());
        fits.max(PREFILL_TOKENS_MIN).min(most)
    }

    fn step_target_ns(&self) -> u64 {
        self.limits.step_target_ms.saturating_mul(1_000_000)
    }
}

impl StepRoom {
    fn fits(&self, pace: &StepTimeModel, position: u32, most: u32, target_ns: u64) -> u32 {
        match most {
            // The model counts a row of one token as a decode, and so must we.
            1 => u32::from(pace.predict_ns(self.load.plus_decode(position)) <= target_ns),
            _ => pace.prefill_within(self.load, position, most, target_ns),
        }
    }

    /// A chunk was planned.
    pub fn take_prefill(&mut self, position: u32, tokens: u32) {
        self.prefill_tokens += tokens;
        self.load = match tokens {
            1 => self.load.plus_decode(position),
            _ => self.load.plus_prefill(position, tokens),
        };
    }
}
