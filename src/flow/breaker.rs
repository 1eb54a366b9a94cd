//! The circuit breaker around the device: when steps fail or hang, requests are refused at once
//! with a time to come back, instead of being let in to fail as well.
//!
//! ```text
//! closed ── failures_max in a row, or a step hangs ──► open ── its time is over ──► half-open
//!    ▲                                                  ▲                              │
//!    │                                                  └────────── a step fails ──────┤
//!    └───────────────────────── a step succeeds ───────────────────────────────────────┘
//! ```
//!
//! Half-open, no more than [`PROBES_MAX`] requests are let in to see. Each time that it opens again
//! without having been closed it stays open twice as long, up to [`OPEN_MS_MAX`]. A step that hangs
//! keeps it open for as long as it hangs. A step that succeeds closes it whenever it began: the
//! device works.

use crate::base::Instant;

/// Requests that may be queued or running while it is half-open.
pub const PROBES_MAX: u32 = 4;
/// It is never open for longer without another look.
pub const OPEN_MS_MAX: u64 = 30_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    /// Half-open once that time is over.
    Open {
        until: Instant,
    },
}

/// See the [module's documentation](self).
#[derive(Debug)]
pub struct Breaker {
    failures_max: u32,
    open_ms: u64,
    state: State,
    /// In a row, while closed.
    failures: u32,
    /// Times that it opened since it was closed last. Its range is that of the shift it makes.
    opened: u32,
    /// Times that it opened at all.
    trips: u64,
}

impl Breaker {
    /// A closed breaker that opens after so many failures in a row (0: never), for this long at
    /// first.
    pub fn new(failures_max: u32, open_ms: u64) -> Breaker {
        let state = State::Closed;
        Breaker { failures_max, open_ms, state, failures: 0, opened: 0, trips: 0 }
    }

    /// A step has done what it should.
    pub fn handle_success(&mut self) {
        if self.failures_max > 0 {
            (self.state, self.failures, self.opened) = (State::Closed, 0, 0);
        }
    }

    /// A step has failed.
    pub fn handle_failure(&mut self, now: Instant) {
        if self.failures_max == 0 {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        match self.state {
            State::Closed if self.failures < self.failures_max => {}
            // One that began before it opened says nothing new.
            State::Open { until } if until > now => {}
            State::Closed | State::Open { .. } => self.open(now),
        }
    }

    /// A step has been at the device for too long.
    pub fn handle_hang(&mut self, now: Instant) {
        if self.failures_max > 0 && self.retry_ns(now).is_none() {
            self.open(now);
        }
    }

    fn open(&mut self, now: Instant) {
        let open_ms = self.open_ms.saturating_mul(1 << self.opened.min(16)).min(OPEN_MS_MAX);
        self.state = State::Open { until: now.plus_ms(open_ms) };
        self.opened += u32::from(self.opened < u32::MAX);
        self.trips += 1;
    }

    /// How long until requests are let in again; `None` when they are now.
    pub fn retry_ns(&self, now: Instant) -> Option<u64> {
        self.opens_at(now).map(|until| until.ns_since(now))
    }

    /// When it lets requests in again, if it is open now.
    pub fn opens_at(&self, now: Instant) -> Option<Instant> {
        match self.state {
            State::Open { until } if until > now => Some(until),
            State::Open { .. } | State::Closed => None,
        }
    }

    /// Whether only a few may come in.
    pub fn is_half_open(&self, now: Instant) -> bool {
        self.state != State::Closed && self.opens_at(now).is_none()
    }

    /// 0: closed; 1: half-open; 2: open.
    pub fn number(&self, now: Instant) -> u64 {
        match self.opens_at(now) {
            Some(_) => 2,
            None => u64::from(self.is_half_open(now)),
        }
    }

    /// How often it has opened.
    pub fn trips(&self) -> u64 {
        self.trips
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn at_ms(ms: u64) -> Instant {
        Instant::ZERO.plus_ms(ms)
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_not_before() {
        let mut breaker = Breaker::new(3, 100);
        for _ in 0..2 {
            breaker.handle_failure(at_ms(0));
        }
        breaker.handle_success();
        for _ in 0..2 {
            breaker.handle_failure(at_ms(0));
        }
        assert_eq!(breaker.retry_ns(at_ms(0)), None);
        breaker.handle_failure(at_ms(0));
        assert_eq!(breaker.retry_ns(at_ms(40)), Some(60 * MS));
        assert_eq!((breaker.number(at_ms(40)), breaker.number(at_ms(100))), (2, 1));
    }

    #[test]
    fn what_the_first_step_finds_when_half_open_decides() {
        let mut breaker = Breaker::new(1, 100);
        breaker.handle_failure(at_ms(0));
        breaker.handle_failure(at_ms(50));
        assert!(!breaker.is_half_open(at_ms(99)) && breaker.is_half_open(at_ms(100)));
        breaker.handle_failure(at_ms(110));
        assert_eq!(breaker.retry_ns(at_ms(110)), Some(200 * MS), "twice as long");
        breaker.handle_success();
        assert_eq!((breaker.retry_ns(at_ms(110)), breaker.number(at_ms(110))), (None, 0));
        breaker.handle_failure(at_ms(500));
        assert_eq!(breaker.retry_ns(at_ms(500)), Some(100 * MS), "as if for the first time");
        assert_eq!(breaker.trips(), 3);
    }

    #[test]
    fn it_is_never_open_for_longer_than_the_most() {
        let mut breaker = Breaker::new(1, 1_000);
        let mut now = at_ms(0);
        for _ in 0..100 {
            breaker.handle_failure(now);
            let wait_ns = breaker.retry_ns(now).unwrap();
            assert!(wait_ns <= OPEN_MS_MAX * MS);
            now = now.plus_ns(wait_ns);
        }
    }

    #[test]
    fn a_step_that_hangs_opens_it_and_keeps_it_open() {
        let mut breaker = Breaker::new(3, 100);
        breaker.handle_hang(at_ms(0));
        breaker.handle_hang(at_ms(10));
        assert_eq!(breaker.trips(), 1);
        breaker.handle_hang(at_ms(100));
        assert_eq!(breaker.retry_ns(at_ms(100)), Some(200 * MS));
        breaker.handle_success();
        assert_eq!(breaker.retry_ns(at_ms(100)), None);
    }

    #[test]
    fn switched_off_it_never_opens() {
        let mut breaker = Breaker::new(0, 100);
        for _ in 0..100 {
            breaker.handle_failure(at_ms(0));
            breaker.handle_hang(at_ms(0));
        }
        assert_eq!(breaker.retry_ns(at_ms(0)), None);
    }
}
