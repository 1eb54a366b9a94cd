//! Time as a value. Core code is handed `now`; only the shell asks a clock for it.

use std::cell::Cell;
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

/// What the shell asks for the time. `runtime/` has the real one.
pub trait Clock {
    /// Now; never earlier than the answer before.
    fn now(&self) -> Instant;
}

/// A clock that stands still until it is told otherwise: for the simulator and for tests.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: Cell<Instant>,
}

impl ManualClock {
    /// A clock that shows this time.
    pub const fn at(now: Instant) -> ManualClock {
        ManualClock { now: Cell::new(now) }
    }

    /// Moves the clock on.
    pub fn advance(&self, by: Duration) {
        let ns = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        self.now.set(self.now.get().plus_ns(ns));
    }

    /// Moves the clock on to `instant`; does nothing if it is there already or past it.
    pub fn advance_to(&self, instant: Instant) {
        self.now.set(self.now.get().max(instant));
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Instant {
        self.now.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_saturate_instead_of_wrapping() {
        assert_eq!(Instant::NEVER.plus_ms(1), Instant::NEVER);
        assert_eq!(Instant::from_ns(1).plus_ms(u64::MAX), Instant::NEVER);
        assert_eq!(Instant::ZERO.ns_since(Instant::NEVER), 0);
    }

    #[test]
    fn a_manual_clock_never_goes_back() {
        let clock = ManualClock::at(Instant::from_ns(5));
        clock.advance_to(Instant::from_ns(3));
        assert_eq!(clock.now(), Instant::from_ns(5));
        clock.advance(Duration::from_nanos(2));
        assert_eq!(clock.now(), Instant::from_ns(7));
        clock.advance(Duration::MAX);
        assert_eq!(clock.now(), Instant::NEVER);
    }
}
