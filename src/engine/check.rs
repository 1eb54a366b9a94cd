//! Is everything consistent? Asked by the simulator after every move, and by tests; it allocates,
//! and looks at everything, so the engine never asks itself.

use crate::base::Instant;
use crate::message::EVENT_BATCHES;
use crate::request::Class;

use super::EngineCore;
use super::reclaim::PREEMPTIONS_MAX;
use super::sequence::{Sequence, State};

/// What the engine holds of what circulates between the cores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    /// Event batches of each front core.
    pub batches_idle: Vec<usize>,
    /// Steps.
    pub steps_idle: usize,
}

impl EngineCore {
    /// Counts what the engine holds of what circulates.
    pub fn census(&self) -> Census {
        Census {
            batches_idle: self.fronts.iter().map(|front| front.batches_idle()).collect(),
            steps_idle: self.device.idle.len(),
        }
    }

    /// Checks the invariants that can be seen from inside the engine; the error says which one is
    /// broken, and by whom.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.check_blocks()?;
        self.ledger.check(self.sequences.iter().map(|(_, sequence)| &sequence.permit))?;
        let live = self.sequences.iter().filter(|(_, sequence)| sequence.is_live());
        self.tenants.check(live.map(|(_, sequence)| (&sequence.bill, sequence.is_admitted())))?;
        self.check_lists()?;
        self.check_shares()?;
        self.check_fronts()?;
        for (index, sequence) in self.sequences.iter() {
            self.check_sequence(index, sequence)
                .map_err(|what| format!("sequence {index} ({}): {what}", sequence.state.name()))?;
        }
        Ok(())
    }

    /// I6: references sum to holders, free + held = total.
    fn check_blocks(&self) -> Result<(), String> {
        let mut held = vec![0; self.blocks.total()];
        for (_, sequence) in self.sequences.iter() {
            sequence.blocks.iter().for_each(|&block| held[block as usize] += 1);
        }
        self.blocks.check(&held)
    }

    fn check_lists(&self) -> Result<(), String> {
        let of = |wanted: fn(&State) -> bool| {
            let indices = self.sequences.iter().filter(move |(_, s)| wanted(&s.state));
            let mut indices: Vec<u32> = indices.map(|(index, _)| index).collect();
            indices.sort_unstable();
            indices
        };
        let sorted = |list: &[u32]| {
            let mut list = list.to_vec();
            list.sort_unstable();
            list
        };
        let batch = &self.batch;
        let queued: Vec<u32> =
            Class::ALL.iter().flat_map(|&class| self.queue.iter(&self.sequences, class)).collect();
        let lists = [
            ("queued", queued, of(|state| *state == State::Queued)),
            ("running", batch.running.clone(), of(|s| matches!(s, State::Running { .. }))),
            ("waiting", batch.waiting.clone(), of(|state| *state == State::Waiting)),
            ("parked", batch.parked.clone(), of(|state| *state == State::Parked)),
        ];
        for (name, list, states) in lists {
            if sorted(&list) != states {
                return Err(format!("{name}: the list has {list:?}, the states {states:?}"));
            }
        }
        let by_admission = |list: &[u32]| list.is_sorted_by_key(|&i| self.sequences[i].admission);
        if !by_admission(&batch.running) || !by_admission(&batch.waiting) {
            return Err("running or waiting sequences are out of order".into());
        }
        let admitted = self.sequences.iter().filter(|(_, s)| s.admission > 0).count();
        if admitted as u32 != batch.admitted || batch.admitted > batch.admitted_max {
            let (counted, max) = (batch.admitted, batch.admitted_max);
            return Err(format!("{admitted} are admitted, {counted} counted, {max} allowed"));
        }
        self.check_slots()
    }

    /// Nobody who waits for a turn is below the floor of its class (`fair.rs`).
    fn check_shares(&self) -> Result<(), String> {
        let shares = &self.tenants.shares;
        for class in Class::ALL.into_iter().filter(|_| self.queue.is_fair()) {
            let floor = shares.floor(class);
            let below = |&&tenant: &&u32| shares.served(tenant) < floor;
            if let Some(tenant) = self.queue.backlogged(class).iter().find(below) {
                return Err(format!("account {tenant} is below the floor of {class:?}"));
            }
        }
        Ok(())
    }

    /// How far the counters of those who wait for their turn in a class are apart, and how far
    /// they may be if each of them asks in that class alone (`fair.rs`). Under `fair` only.
    pub fn fair_gap(&self, class: Class) -> (u64, u64) {
        let shares = &self.tenants.shares;
        let (context, admitted_max) = (self.context, self.batch.admitted_max);
        let waiting = self.queue.backlogged(class);
        let served = || waiting.iter().map(|&tenant| shares.served(tenant));
        let most = waiting.iter().map(|&one| shares.served_max(one, context, admitted_max)).max();
        let gap = served().max().unwrap_or(0) - served().min().unwrap_or(0);
        (gap, most.unwrap_or(0))
    }

    fn check_slots(&self) -> Result<(), String> {
        let mut owners = vec![0_u32; self.limits.running_max as usize];
        for &slot in self.batch.slots_free() {
            owners[usize::from(slot)] += 1;
        }
        for (_, sequence) in self.sequences.iter() {
            if let State::Running { slot } = sequence.state {
                owners[usize::from(slot)] += 1;
            }
        }
        match owners.iter().position(|&owners| owners != 1) {
            Some(slot) => Err(format!("batch slot {slot} has {} owners", owners[slot])),
            None => Ok(()),
        }
    }

    fn check_fronts(&self) -> Result<(), String> {
        for (number, front) in self.fronts.iter().enumerate() {
            if front.batches_idle() > EVENT_BATCHES {
                return Err(format!("front {number} has {} batches", front.batches_idle()));
            }
            for (index, sequence) in self.sequences.iter() {
                let times = front.listed.iter().filter(|&&other| other == index).count();
                let its_own = usize::from(sequence.front) == number;
                if times != usize::from(its_own && sequence.egress.listed) {
                    return Err(format!("sequence {index} is listed {times} times at {number}"));
                }
            }
        }
        Ok(())
    }

    fn check_sequence(&self, index: u32, sequence: &Sequence) -> Result<(), String> {
        let fail = |what: &str| Err(what.to_string());
        let expires = sequence.expires(self.limits.stall_timeout_ms);
        if expires != Instant::NEVER && self.expiry > expires {
            return fail("its expiry is not watched");
        }
        if sequence.credit > self.limits.stream_window_tokens_max {
            return fail("more credit than a window");
        }
        // I9: unsent output is bounded by the window.
        let outstanding = sequence.tokens_unsent() + u32::from(sequence.samples_in_flight);
        if outstanding + sequence.credit > 2 * self.limits.stream_window_tokens_max {
            return Err(format!("{outstanding} tokens unsent"));
        }
        let egress = &sequence.egress;
        if egress.text_sent > egress.text_ready || egress.text_ready > egress.text_total {
            return fail("its text's counts are out of order");
        }
        let held = sequence.blocks.len();
        match sequence.state {
            State::Free | State::Granted | State::Queued if held > 0 => {
                return fail("holds blocks and is not admitted");
            }
            State::Ended if held > 0 => return fail("is over and holds blocks"),
            State::Ended if egress.terminal.is_none() || !egress.listed => {
                return fail("is over and will not say so (I5)");
            }
            State::Running { .. } if held < super::blocks_for(sequence.kv_planned as usize) => {
                return fail("has planned more than its blocks hold");
            }
            State::Running { .. } if sequence.preemptions > PREEMPTIONS_MAX => {
                return fail("was preempted too often (I5)");
            }
            State::Running { .. }
                if sequence.preemptions == PREEMPTIONS_MAX
                    && held < sequence.blocks_for_remainder() =>
            {
                return fail("runs after its second preemption without its remainder (I5)");
            }
            State::Parked if sequence.credit > 0 => return fail("is parked and has credit"),
            _ => {}
        }
        if sequence.is_admitted() && sequence.kv_planned as usize > sequence.tokens.len() {
            return fail("has planned more than its text");
        }
        if sequence.is_live() && self.sequences.live(self.sequences.key(index)) != Some(index) {
            return fail("its own key does not find it");
        }
        Ok(())
    }
}
