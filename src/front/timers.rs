//! When what must be looked at. One entry a connection and one a body that is coming in; an entry
//! may come early (the owner looks again and sets a new one), never late.

use std::collections::BTreeSet;

use super::ConnId;
use crate::base::{Instant, SlabKey};

/// Whose time has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// A connection's handshake, idle or closing time.
    Connection(ConnId),
    /// A request's body.
    Body(SlabKey),
}

#[derive(Debug, Default)]
pub(super) struct Timers {
    entries: BTreeSet<(Instant, Timer)>,
}

impl Timers {
    pub(super) fn set(&mut self, at: Instant, timer: Timer) {
        self.entries.insert((at, timer));
    }

    pub(super) fn clear(&mut self, at: Instant, timer: Timer) {
        self.entries.remove(&(at, timer));
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.entries.first().map(|&(at, _)| at)
    }

    /// An entry that is due; it is gone from here.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Timer> {
        self.entries.first().filter(|&&(at, _)| at <= now)?;
        self.entries.pop_first().map(|(_, timer)| timer)
    }
}
