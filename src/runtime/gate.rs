//! Makes tasks under glommio stop now and then, so that it looks at timers and descriptors.
//!
//! glommio 0.9 has a preemption timer for that, and a race in it: when the timer fires before the
//! first task runs (the thread was off its CPU for that moment), the loop takes "must stop" for
//! "nothing to run" and sleeps with tasks that are ready. Seen within seconds on a busy machine
//! with 1 ms, and possible with any period. So its timer is set never to fire, and once tasks have
//! run for [`RUN_NS_MAX`] all of them are held here until the loop has been round.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::task::Waker;

/// Tasks run for this long between two looks at timers and descriptors. Going round costs some
/// 5 µs: half a percent.
const RUN_NS_MAX: u64 = 1_000_000;

pub(super) struct Gate {
    /// How long tasks have run since the loop was certainly round.
    spent_ns: Cell<u64>,
    held: RefCell<Vec<Waker>>,
    asked: Cell<bool>,
    /// Read by a task of the loop's, which then opens the gate.
    event: OwnedFd,
}

impl Gate {
    pub(super) fn new(event: OwnedFd) -> Gate {
        Gate { spent_ns: Cell::new(0), held: RefCell::default(), asked: Cell::new(false), event }
    }

    /// Whether a task that is to run now has to wait; it is woken when the gate opens.
    pub(super) fn holds(&self, task: &Waker) -> bool {
        if self.spent_ns.get() < RUN_NS_MAX {
            return false;
        }
        self.held.borrow_mut().push(task.clone());
        if !self.asked.replace(true) {
            // Fails only when the counter is near 2^64: then it is readable already.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
        true
    }

    /// A task has run this long.
    pub(super) fn spend(&self, ns: u64) {
        self.spent_ns.set(self.spent_ns.get().saturating_add(ns));
    }

    /// The loop has been round.
    pub(super) fn open(&self) {
        self.spent_ns.set(0);
        self.asked.set(false);
        let held = std::mem::take(&mut *self.held.borrow_mut());
        held.into_iter().for_each(Waker::wake);
    }
}
