//! From serving to stopped: what the tasks of all cores are told of the server's end.
//!
//! Core: all. One writer (whoever decides that the server ends), every task reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::Instant;
use crate::ring::Doorbell;

/// Longest that front cores go on once the drain's time is over: the engine's last words have to
/// reach clients that read.
const LAST_WORDS_MS: u64 = 1_000;

/// Whether the server ends, and when. Shared by all tasks.
pub struct Lifecycle {
    /// When the drain's time is over, in the clock's nanoseconds; `u64::MAX` while serving.
    drain_until_ns: AtomicU64,
    /// Every core's bell: a change wakes them all.
    bells: Vec<Arc<Doorbell>>,
}

impl Lifecycle {
    /// A server that serves; `bells` are rung when that changes.
    pub fn new(bells: Vec<Arc<Doorbell>>) -> Arc<Lifecycle> {
        Arc::new(Lifecycle { drain_until_ns: AtomicU64::new(u64::MAX), bells })
    }

    /// Nothing new is let in from now on; what is admitted may finish until then. A second call
    /// can only bring the end nearer.
    pub fn drain(&self, until: Instant) {
        // Relaxed: the value stands for itself; the bells order nothing but the wake-up.
        self.drain_until_ns.fetch_min(until.as_ns(), Ordering::Relaxed);
        for bell in &self.bells {
            bell.ring();
        }
    }

    /// When the drain's time is over, if it has begun.
    pub fn draining_until(&self) -> Option<Instant> {
        let until = Instant::from_ns(self.drain_until_ns.load(Ordering::Relaxed));
        (until != Instant::NEVER).then_some(until)
    }

    /// When front cores stop even if clients have not taken all.
    pub fn closing_at(&self) -> Option<Instant> {
        self.draining_until().map(|until| until.plus_ms(LAST_WORDS_MS))
    }
}
