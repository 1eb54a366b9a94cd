//! A token bucket in integers: refills at a steady rate up to a burst, is emptied by use, and may
//! be overdrawn by what could not be known beforehand.
//!
//! The level is kept in nano-tokens, for a reason of arithmetic: a rate of r tokens per second is
//! exactly r nano-tokens per nanosecond. So a refill is one multiplication, there is no remainder
//! to lose, and no number of small refills differs from one large one.

use crate::base::Instant;

/// Nano-tokens in a token.
const NANO: i128 = 1_000_000_000;

/// A bucket of tokens (requests, model tokens, whatever its owner counts).
///
/// Invariants:
/// - `-debt_max <= level <= burst`, all in nano-tokens;
/// - without `set_rate`, tokens taken in any interval <= burst + rate * interval + `debt_max`;
/// - time that goes backwards changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    /// Nano-tokens now, as of `refilled`. i128: a burst of up to 2^64 tokens is 2^94 of them.
    level: i128,
    /// The level never exceeds this many nano-tokens.
    burst: i128,
    /// How far below zero [`TokenBucket::charge`] can go, in nano-tokens.
    debt_max: i128,
    /// Tokens per second; also nano-tokens per nanosecond.
    rate: u64,
    /// When the level was last brought up to date.
    refilled: Instant,
}

impl TokenBucket {
    /// A full bucket: `rate` tokens per second, up to `burst` tokens at once. Debt stops growing
    /// at `debt_max` tokens.
    pub fn new(rate: u64, burst: u64, debt_max: u64, now: Instant) -> TokenBucket {
        let burst = i128::from(burst) * NANO;
        let debt_max = i128::from(debt_max) * NANO;
        TokenBucket { level: burst, burst, debt_max, rate, refilled: now }
    }

    /// Takes `n` tokens, all or none. Otherwise says how long to wait until they will be there if
    /// nobody else takes any: [`Shortage`]. While there is debt even 0 tokens are refused.
    pub fn take(&mut self, n: u64, now: Instant) -> Result<(), Shortage> {
        self.refill(now);
        let wanted = i128::from(n) * NANO;
        if wanted <= self.level {
            self.level -= wanted;
            return Ok(());
        }
        Err(self.shortage(wanted))
    }

    /// How long until `n` tokens can be taken; zero when they can be now.
    pub fn wait_ns(&mut self, n: u64, now: Instant) -> Result<u64, Shortage> {
        self.refill(now);
        let wanted = i128::from(n) * NANO;
        if wanted <= self.level {
            return Ok(0);
        }
        match self.shortage(wanted) {
            Shortage::Wait { ns } => Ok(ns),
            Shortage::Never => Err(Shortage::Never),
        }
    }

    /// Takes `n` tokens whether there are enough or not: for use that is known only afterwards.
    /// What is missing becomes debt, which the next refills pay first.
    pub fn charge(&mut self, n: u64, now: Instant) {
        self.refill(now);
        self.level = (self.level - i128::from(n) * NANO).max(-self.debt_max);
    }

    /// Puts back tokens that were taken and not used.
    pub fn refund(&mut self, n: u64, now: Instant) {
        self.refill(now);
        self.level = (self.level + i128::from(n) * NANO).min(self.burst);
    }

    /// Whole tokens that can be taken now.
    pub fn available(&mut self, now: Instant) -> u64 {
        self.refill(now);
        u64::try_from(self.level.max(0) / NANO).unwrap_or(u64::MAX)
    }

    /// Tokens owed, rounded up; zero when the level is not below zero.
    pub fn debt(&mut self, now: Instant) -> u64 {
        self.refill(now);
        let owed = (-self.level).max(0);
        u64::try_from((owed + NANO - 1) / NANO).unwrap_or(u64::MAX)
    }

    /// Changes rate and burst from now on. What was earned at the old rate stays, up to the new
    /// burst.
    pub fn set_rate(&mut self, rate: u64, burst: u64, now: Instant) {
        self.refill(now);
        self.rate = rate;
        self.burst = i128::from(burst) * NANO;
        self.level = self.level.min(self.burst);
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = i128::from(now.ns_since(self.refilled));
        let earned = elapsed.saturating_mul(i128::from(self.rate));
        self.level = (self.level.saturating_add(earned)).min(self.burst);
        self.refilled = self.refilled.max(now);
        debug_assert!(-self.debt_max <= self.level && self.level <= self.burst);
    }

    fn shortage(&self, wanted: i128) -> Shortage {
        if wanted > self.burst || self.rate == 0 {
            return Shortage::Never;
        }
        let missing = wanted - self.level;
        let rate = i128::from(self.rate);
        // Rounded up: a wait that is a nanosecond short would end in a second refusal.
        let ns = (missing + rate - 1) / rate;
        Shortage::Wait { ns: u64::try_from(ns).unwrap_or(u64::MAX) }
    }
}

/// Why a bucket did not give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// There will be enough in this time, if nobody else takes any.
    Wait {
        /// Nanoseconds, rounded up.
        ns: u64,
    },
    /// There will never be enough at once: more than the burst, or nothing flows in.
    Never,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn at_ms(ms: u64) -> Instant {
        Instant::from_ns(ms * MS)
    }

    #[test]
    fn a_bucket_gives_its_burst_at_once_and_then_its_rate() {
        let mut bucket = TokenBucket::new(10, 5, 0, at_ms(0));
        assert_eq!(bucket.take(5, at_ms(0)), Ok(()));
        assert_eq!(bucket.take(1, at_ms(0)), Err(Shortage::Wait { ns: 100 * MS }));
        assert_eq!(bucket.take(1, at_ms(99)), Err(Shortage::Wait { ns: MS }));
        assert_eq!(bucket.take(1, at_ms(100)), Ok(()));
        assert_eq!(bucket.available(at_ms(100_000)), 5);
    }

    #[test]
    fn many_small_refills_earn_exactly_what_one_large_one_does() {
        let mut often = TokenBucket::new(7, 1_000, 1_000, at_ms(0));
        let mut seldom = often.clone();
        often.charge(2_000, at_ms(0));
        seldom.charge(2_000, at_ms(0));
        for ns in 0..10_000 {
            often.available(Instant::from_ns(ns));
        }
        seldom.available(Instant::from_ns(9_999));
        assert_eq!(often, seldom);
    }

    #[test]
    fn an_overrun_becomes_debt_that_is_paid_first_and_is_bounded() {
        let mut bucket = TokenBucket::new(10, 10, 100, at_ms(0));
        bucket.charge(30, at_ms(0));
        assert_eq!((bucket.debt(at_ms(0)), bucket.available(at_ms(0))), (20, 0));
        assert_eq!(bucket.wait_ns(1, at_ms(0)), Ok(2_100 * MS));
        bucket.charge(u64::MAX, at_ms(0));
        assert_eq!(bucket.debt(at_ms(0)), 100);
        assert_eq!(bucket.take(1, at_ms(10_100)), Ok(()));
    }

    #[test]
    fn what_can_never_be_had_is_said_to_be_so() {
        let mut bucket = TokenBucket::new(10, 5, 0, at_ms(0));
        assert_eq!(bucket.take(6, at_ms(0)), Err(Shortage::Never));
        let mut dry = TokenBucket::new(0, 5, 0, at_ms(0));
        assert_eq!(dry.take(5, at_ms(0)), Ok(()));
        assert_eq!(dry.wait_ns(1, at_ms(1_000_000)), Err(Shortage::Never));
    }

    #[test]
    fn time_that_goes_backwards_changes_nothing() {
        let mut bucket = TokenBucket::new(1_000, 10, 0, at_ms(50));
        bucket.take(10, at_ms(50)).unwrap();
        assert_eq!(bucket.available(at_ms(20)), 0);
        assert_eq!(bucket.available(at_ms(51)), 1);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut bucket = TokenBucket::new(u64::MAX, u64::MAX, u64::MAX, Instant::ZERO);
        bucket.charge(u64::MAX, Instant::ZERO);
        bucket.charge(u64::MAX, Instant::ZERO);
        assert_eq!(bucket.debt(Instant::ZERO), u64::MAX);
        assert_eq!(bucket.available(Instant::NEVER), u64::MAX);
        bucket.refund(u64::MAX, Instant::NEVER);
        assert_eq!(bucket.available(Instant::NEVER), u64::MAX);
    }

    #[test]
    fn a_new_rate_counts_from_now_and_a_smaller_burst_at_once() {
        let mut bucket = TokenBucket::new(10, 10, 0, at_ms(0));
        bucket.take(10, at_ms(0)).unwrap();
        bucket.set_rate(100, 10, at_ms(500));
        assert_eq!(bucket.available(at_ms(500)), 5, "earned at the old rate");
        assert_eq!(bucket.available(at_ms(510)), 6);
        bucket.set_rate(100, 2, at_ms(510));
        assert_eq!(bucket.available(at_ms(510)), 2);
        bucket.refund(5, at_ms(510));
        assert_eq!(bucket.available(at_ms(510)), 2);
    }
}
