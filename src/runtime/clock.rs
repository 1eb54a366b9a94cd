//! The process's clock. Only shells read it; core code is handed `now`.

use std::sync::OnceLock;
use std::time::Instant as StdInstant;

use crate::base::Instant;

/// The monotonic time since the clock was first read in this process. Some 25 ns a call.
pub fn now() -> Instant {
    static ORIGIN: OnceLock<StdInstant> = OnceLock::new();
    let since = ORIGIN.get_or_init(StdInstant::now).elapsed();
    // 2^64 ns are 584 years.
    Instant::from_ns(since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::now;

    #[test]
    fn time_does_not_run_backwards() {
        let readings: Vec<_> = (0..1000).map(|_| now()).collect();
        assert!(readings.is_sorted());
    }
}
