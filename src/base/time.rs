//! Time as a value. Core code is handed `now`; only the shell asks a clock for it.

use std::time::Duration;

/// A point in time: nanoseconds since an origin that the clock's owner chose (the process's start
/// in production, zero in the simulator). 2^64 ns are 584 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant {
    ns: u64,
}

impl Instant {
    /// The clock's origin.
    pub const ZERO: Instant = Instant { ns: 0 };
    /// Later than any time a clock returns: a deadline that never comes.
    pub const NEVER: Instant = Instant { ns: u64::MAX };

    /// The instant `ns` nanoseconds after the origin.
    pub const fn from_ns(ns: u64) -> Instant {
        Instant { ns }
    }

    /// Nanoseconds since the origin.
    pub const fn as_ns(self) -> u64 {
        self.ns
    }

    /// This instant and `ms` milliseconds; stays at [`Instant::NEVER`] when that would overflow.
    pub const fn plus_ms(self, ms: u64) -> Instant {
        self.plus_ns(ms.saturating_mul(1_000_000))
    }

    /// This instant and `ns` nanoseconds; saturates.
    pub const fn plus_ns(self, ns: u64) -> Instant {
        Instant { ns: self.ns.saturating_add(ns) }
    }

    /// Nanoseconds from `earlier` to `self`; zero when `earlier` is in fact later.
    pub const fn ns_since(self, earlier: Instant) -> u64 {
        self.ns.saturating_sub(earlier.ns)
    }

    /// Whole milliseconds from `earlier` to `self`; zero when `earlier` is in fact later.
    pub const fn ms_since(self, earlier: Instant) -> u64 {
        self.ns_since(earlier) / 1_000_000
    }

    /// How long to wait from `now` until this instant.
    pub const fn duration_from(self, now: Instant) -> Duration {
        Duration::from_nanos(self.ns_since(now))
    }
}
