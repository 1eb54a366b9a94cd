//! Blocks: who gets them, and from whom when there are none.
//!
//! A sequence that needs blocks takes free ones. If they do not suffice, in this order:
//!
//! 1. those of a parked sequence, longest parked first, *if it has been out of the batch for as
//!    long as it takes to compute its KV again*. That is the old rule for skis (rent until the
//!    rent has cost as much as a pair, then buy): nobody's KV is dropped twice without having lain
//!    idle for as long as it costs, so a reader who takes a token now and then cannot make the
//!    device compute the same prompt over and over. A sequence that has itself waited for that
//!    long, and is older, need not wait any longer: a slow reader cannot keep it out;
//! 2. those of a *younger* sequence that waits;
//! 3. if it is running, those of any parked sequence, and then of a younger one that runs: that is
//!    a preemption. A parked one has nothing to lose now, the running one has.
//!
//! A newcomer is content with the first kind, and leaves some blocks free for those who run.

use crate::base::Instant;
use crate::flow::StepLoad;

use super::EngineCore;
use super::record::Flight;
use super::sequence::State;

/// So often a running sequence may lose its KV. Then it enters the batch only with blocks for its
/// whole remainder, and keeps them as long as it runs (I5).
pub(super) const PREEMPTIONS_MAX: u8 = 2;

/// A newcomer leaves one block in so many free, for those who run to grow into: without that, the
/// newcomer is often the one preempted a moment later, and its prefill was for nothing.
const WATERMARK_DIVISOR: usize = 32;

/// Who asks for blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// A running sequence that grows.
    Running,
    /// An admitted sequence that wants to enter the batch.
    Waiting,
    /// One that is not admitted yet.
    Newcomer,
}

/// A sequence that wants blocks.
#[derive(Clone, Copy, Debug)]
struct Claimant {
    index: u32,
    claim: Claim,
    now: Instant,
}

impl EngineCore {
    /// Sees to it that the sequence holds `target` blocks; takes them from others if it must and
    /// may. When that is not enough, nothing is taken.
    pub(super) fn hold_blocks(
        &mut self,
        index: u32,
        target: usize,
        claim: Claim,
        now: Instant,
    ) -> bool {
        let missing = target.saturating_sub(self.sequences[index].blocks.len());
        if missing == 0 {
            return true;
        }
        let spare = match claim {
            Claim::Newcomer if !self.batch.running.is_empty() => {
                self.blocks.total() / WATERMARK_DIVISOR
            }
            _ => 0,
        };
        if !self.free_up(missing + spare, Claimant { index, claim, now }) {
            return false;
        }
        for _ in 0..missing {
            let block = self.blocks.take().expect("freed up");
            let sequence = &mut self.sequences[index];
            debug_assert!(sequence.blocks.len() < sequence.blocks.capacity());
            sequence.blocks.push(block);
        }
        true
    }

    /// Sees to it that `wanted` blocks are free. Takes none from anybody unless it is enough in
    /// the end; what a step in flight still names is enough only when that step is back.
    fn free_up(&mut self, wanted: usize, claimant: Claimant) -> bool {
        if self.blocks.free() >= wanted {
            return true;
        }
        let coming = self.blocks.free() + self.blocks.retiring();
        if coming + self.blocks_of_victims(claimant) < wanted {
            self.note_blocked(claimant);
            return false;
        }
        while self.blocks.free() < wanted {
            if self.blocks.free() + self.blocks.retiring() >= wanted {
                return false;
            }
            let Some(victim) = self.victim(claimant) else { return false };
            if matches!(self.sequences[victim].state, State::Running { .. }) {
                self.preempt(victim, claimant.now);
            } else {
                self.counters.kv_drops += 1;
                self.drop_kv(victim);
            }
        }
        true
    }

    fn blocks_of_victims(&self, claimant: Claimant) -> usize {
        let holds = |victim: u32| self.sequences[victim].blocks.len();
        let parked = self.batch.parked.iter().copied().filter(|&v| {
            claimant.claim == Claim::Running || self.kept_until(v, claimant) <= claimant.now
        });
        let waiting = self.batch.waiting.iter().copied().filter(|&v| self.may_drop(v, claimant));
        let running = self.batch.running.iter().copied().filter(|&v| self.may_preempt(v, claimant));
        parked.chain(waiting).chain(running).map(holds).sum()
    }

    /// Whose blocks go next.
    fn victim(&self, claimant: Claimant) -> Option<u32> {
        let Claimant { claim, now, .. } = claimant;
        let holds = |victim: &u32| !self.sequences[*victim].blocks.is_empty();
        let parked = || self.batch.parked.iter().copied().filter(holds);
        let mut waiting = self.batch.waiting.iter().rev().copied().filter(holds);
        let mut running = self.batch.running.iter().rev().copied().filter(holds);
        parked()
            .find(|&v| self.kept_until(v, claimant) <= now)
            .or_else(|| waiting.find(|&v| self.may_drop(v, claimant)))
            .or_else(|| parked().next().filter(|_| claim == Claim::Running))
            .or_else(|| running.find(|&v| self.may_preempt(v, claimant)))
    }

    /// Until when a parked sequence keeps its blocks in the face of this claimant.
    fn kept_until(&self, parked: u32, claimant: Claimant) -> Instant {
        let idle_since = self.sequences[parked].times.left_batch;
        let waits = claimant.claim == Claim::Waiting && self.is_younger(parked, claimant.index);
        let since = match waits {
            true => idle_since.min(self.sequences[claimant.index].times.left_batch),
            false => idle_since,
        };
        since.plus_ns(self.recompute_ns(parked))
    }

    /// How long it would take to compute the sequence's KV again.
    fn recompute_ns(&self, index: u32) -> u64 {
        let tokens = self.sequences[index].kv_planned;
        if tokens == 0 {
            return 0;
        }
        let chunks = u64::from(tokens.div_ceil(self.limits.chunk_tokens_max));
        let one_step_ns = self.pace.predict_ns(StepLoad::default().plus_prefill(0, tokens));
        one_step_ns.saturating_add((chunks - 1).saturating_mul(self.pace.cost().step_ps / 1_000))
    }

    /// The claimant must try again when the first parked sequence may be dropped.
    fn note_blocked(&mut self, claimant: Claimant) {
        let holds = |victim: &&u32| !self.sequences[**victim].blocks.is_empty();
        let parked = self.batch.parked.iter().filter(holds);
        let until = parked.map(|&v| self.kept_until(v, claimant)).filter(|&at| at > claimant.now);
        self.blocked_until = until.min().unwrap_or(Instant::NEVER).min(self.blocked_until);
    }

    fn may_drop(&self, waiting: u32, claimant: Claimant) -> bool {
        claimant.claim != Claim::Newcomer && self.is_younger(waiting, claimant.index)
    }

    fn may_preempt(&self, running: u32, claimant: Claimant) -> bool {
        claimant.claim == Claim::Running
            && self.is_younger(running, claimant.index)
            && self.sequences[running].preemptions < PREEMPTIONS_MAX
    }

    fn is_younger(&self, one: u32, other: u32) -> bool {
        self.sequences[one].admission > self.sequences[other].admission
    }

    /// Takes slot and KV from a running sequence.
    fn preempt(&mut self, index: u32, now: Instant) {
        self.counters.preemptions += 1;
        self.unseat(index);
        self.drop_kv(index);
        self.sequences[index].preemptions += 1;
        let times = u64::from(self.sequences[index].preemptions);
        let seq = self.sequences.key(index).recorded();
        self.note(now, Flight::Preempt, [seq, times, 0]);
        if self.sequences[index].credit > 0 {
            self.wait(index, now);
        } else {
            // Its last credit paid for a token that is on the way.
            self.park(index, now);
        }
    }

    fn drop_kv(&mut self, index: u32) {
        self.counters.recomputed_tokens += u64::from(self.sequences[index].kv_planned);
        self.release_blocks(index);
        self.sequences[index].kv_planned = 0;
    }

    /// Gives all of a sequence's blocks back.
    pub(super) fn release_blocks(&mut self, index: u32) {
        let sequence = &mut self.sequences[index];
        for block in sequence.blocks.drain(..) {
            self.blocks.give(block, sequence.last_step);
        }
    }
}
