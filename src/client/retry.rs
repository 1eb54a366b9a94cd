//! Coming back when told to, and not all at once.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use super::event::Rejection;
use crate::base::Prng;

/// Whether and how a refused request is sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Times that a request is sent at most; 1 never retries.
    pub attempts_max: u32,
    /// A server that asks for a longer wait is not waited for.
    pub wait_max: Duration,
    /// Seed of the jitter; `None` takes one from the system.
    pub seed: Option<u64>,
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy { attempts_max: 5, wait_max: Duration::from_secs(60), seed: None }
    }
}

/// The retries of one request.
#[derive(Clone, Debug)]
pub struct Retries {
    attempts_left: u32,
    wait_max: Duration,
    prng: Prng,
}

impl Retries {
    /// All of a policy's attempts but the first, which is being made.
    pub fn new(policy: &RetryPolicy) -> Retries {
        let seed = policy.seed.unwrap_or_else(|| RandomState::new().hash_one(0u8));
        Retries {
            attempts_left: policy.attempts_max.saturating_sub(1),
            wait_max: policy.wait_max,
            prng: Prng::new(seed),
        }
    }

    /// How long to wait before the next attempt; `None` when there should be none.
    ///
    /// Never earlier than told, and up to half as late again: clients that were refused together
    /// do not come back together.
    pub fn next_wait(&mut self, rejection: &Rejection) -> Option<Duration> {
        let told_ms = u64::from(rejection.retry_after_ms?);
        if self.attempts_left == 0 || Duration::from_millis(told_ms) > self.wait_max {
            return None;
        }
        self.attempts_left -= 1;
        // At least 10 ms of spread, also where "at once" was told.
        let spread_ms = (told_ms / 2).max(10);
        Some(Duration::from_millis(told_ms + self.prng.below(spread_ms + 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::RejectReason;

    fn rejection(retry_after_ms: Option<u32>) -> Rejection {
        Rejection { reason: RejectReason::QueueFull, retry_after_ms, message: String::new() }
    }

    #[test]
    fn a_retry_is_never_early_and_at_most_half_as_late_again() {
        let policy = RetryPolicy { attempts_max: 100, seed: Some(1), ..RetryPolicy::default() };
        let mut retries = Retries::new(&policy);
        let waits: Vec<u128> = (0..99)
            .map(|_| retries.next_wait(&rejection(Some(1000))).unwrap().as_millis())
            .collect();
        assert!(waits.iter().all(|wait| (1000..=1500).contains(wait)), "{waits:?}");
        assert!(waits.iter().max() > waits.iter().min(), "there is jitter");
        assert_eq!(retries.next_wait(&rejection(Some(1000))), None, "attempts are used up");
    }

    #[test]
    fn where_waiting_cannot_help_or_is_too_long_there_is_no_retry() {
        let mut retries = Retries::new(&RetryPolicy::default());
        assert_eq!(retries.next_wait(&rejection(None)), None);
        assert_eq!(retries.next_wait(&rejection(Some(61_000))), None);
        assert!(retries.next_wait(&rejection(Some(0))).is_some());
    }
}
