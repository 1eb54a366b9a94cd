//! What the load generator saw, added up.
//!
//! Times are nanoseconds since the start of the run. A request belongs to the measured part when
//! it was meant to begin in it; tokens and ends count when they come in it.

use std::collections::BTreeMap;
use std::ops::Range;

use hdrhistogram::Histogram;

/// What a request must meet to count as good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slo {
    /// Time to the first token at most.
    pub ttft_ns: u64,
    /// Mean time between tokens at most.
    pub itl_ns: u64,
}

/// One request from its intended beginning on.
#[derive(Clone, Debug)]
pub struct Progress {
    intended_ns: u64,
    prompt_tokens: u32,
    first_ns: Option<u64>,
    last_ns: u64,
    tokens: u32,
    /// The server has said whether it takes it.
    pub is_answered: bool,
}

impl Progress {
    /// A request that was meant to begin now. In an open loop that is when it arrives, however
    /// late it is sent: a generator or server that falls behind must not look faster for it.
    pub fn begin(intended_ns: u64, prompt_tokens: u32) -> Progress {
        Progress {
            intended_ns,
            prompt_tokens,
            first_ns: None,
            last_ns: intended_ns,
            tokens: 0,
            is_answered: false,
        }
    }

    fn ttft_ns(&self) -> Option<u64> {
        Some(self.first_ns?.saturating_sub(self.intended_ns))
    }

    /// Mean time between its tokens; `None` with fewer than two.
    fn mean_itl_ns(&self) -> Option<u64> {
        let gaps = u64::from(self.tokens.checked_sub(1).filter(|&gaps| gaps > 0)?);
        Some(self.last_ns.saturating_sub(self.first_ns?) / gaps)
    }

    fn meets(&self, slo: Slo) -> bool {
        self.ttft_ns().is_some_and(|ttft| ttft <= slo.ttft_ns)
            && self.mean_itl_ns().is_none_or(|itl| itl <= slo.itl_ns)
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With everything it asked for.
    Complete,
    /// Accepted, and ended early; why.
    Early(&'static str),
    /// Refused or evicted; why.
    Rejected(&'static str),
    /// The connection broke.
    Broken,
}

/// The sums of a run.
#[derive(Clone, Debug)]
pub struct Tally {
    measured_ns: Range<u64>,
    slo: Slo,
    /// Requests that were meant to begin in the measured part.
    pub requests: u64,
    /// Of these: ended with everything they asked for.
    pub completed: u64,
    /// Of the completed: met both targets.
    pub good: u64,
    /// Output tokens of the good ones.
    pub good_tokens: u64,
    /// Of the requests: accepted and ended early, by reason.
    pub early: BTreeMap<&'static str, u64>,
    /// Of the requests: refused or evicted, by reason.
    pub rejected: BTreeMap<&'static str, u64>,
    /// Of the requests: lost with their connection.
    pub broken: u64,
    /// Output tokens that came in the measured part, whichever request they belong to.
    pub output_tokens: u64,
    /// Prompt tokens of requests whose first token came in the measured part.
    pub prompt_tokens: u64,
    /// Requests that ended completely in the measured part, whenever they began.
    pub ends: u64,
    /// Time to the first token.
    pub ttft_ns: Histogram<u64>,
    /// Time between tokens.
    pub itl_ns: Histogram<u64>,
    /// From a request's intended beginning until it was refused or evicted.
    pub refusal_ns: Histogram<u64>,
    /// How long after its intended beginning a request was sent.
    pub late_ns: Histogram<u64>,
}

/// Three digits from a microsecond to an hour: at most 0.1 % off.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1_000, 3_600_000_000_000, 3).expect("bounds that make sense")
}

fn record(histogram: &mut Histogram<u64>, value_ns: u64, count: u64) {
    // What is longer than an hour counts as an hour.
    let value = value_ns.clamp(1_000, 3_600_000_000_000);
    histogram.record_n(value, count).expect("within its bounds");
}

impl Tally {
    /// Nothing yet; what is measured lies in the given time.
    pub fn new(measured_ns: Range<u64>, slo: Slo) -> Tally {
        Tally {
            measured_ns,
            slo,
            requests: 0,
            completed: 0,
            good: 0,
            good_tokens: 0,
            early: BTreeMap::new(),
            rejected: BTreeMap::new(),
            broken: 0,
            output_tokens: 0,
            prompt_tokens: 0,
            ends: 0,
            ttft_ns: histogram(),
            itl_ns: histogram(),
            refusal_ns: histogram(),
            late_ns: histogram(),
        }
    }

    /// Length of the measured part in seconds.
    pub fn measured_s(&self) -> f64 {
        (self.measured_ns.end - self.measured_ns.start) as f64 / 1e9
    }

    fn counts(&self, progress: &Progress) -> bool {
        self.measured_ns.contains(&progress.intended_ns)
    }

    /// A request was sent.
    pub fn sent(&mut self, progress: &Progress, now_ns: u64) {
        if self.counts(progress) {
            self.requests += 1;
            record(&mut self.late_ns, now_ns.saturating_sub(progress.intended_ns), 1);
        }
    }

    /// A request could not even be sent: it counts, and never ends.
    pub fn unsent(&mut self, intended_ns: u64) {
        self.requests += u64::from(self.measured_ns.contains(&intended_ns));
    }

    /// `tokens` tokens of a request came together. They share the time since the one before
    /// them: each counts as a gap of an equal part of it.
    pub fn tokens(&mut self, progress: &mut Progress, tokens: u32, now_ns: u64) {
        if tokens == 0 {
            return;
        }
        let counts = self.counts(progress);
        let measured = self.measured_ns.contains(&now_ns);
        let mut gaps = tokens;
        if progress.first_ns.is_none() {
            progress.first_ns = Some(now_ns);
            gaps -= 1;
            if counts {
                let ttft = now_ns.saturating_sub(progress.intended_ns);
                record(&mut self.ttft_ns, ttft, 1);
            }
            if measured {
                self.prompt_tokens += u64::from(progress.prompt_tokens);
            }
        }
        if counts && gaps > 0 {
            let since = if gaps < tokens { now_ns } else { progress.last_ns };
            let gap = now_ns.saturating_sub(since) / u64::from(gaps);
            record(&mut self.itl_ns, gap, gaps.into());
        }
        progress.last_ns = now_ns;
        progress.tokens += tokens;
        if measured {
            self.output_tokens += u64::from(tokens);
        }
    }

    /// A request ended.
    pub fn end(&mut self, progress: &Progress, end: End, now_ns: u64) {
        if end == End::Complete && self.measured_ns.contains(&now_ns) {
            self.ends += 1;
        }
        if !self.counts(progress) {
            return;
        }
        match end {
            End::Complete => {
                self.completed += 1;
                if progress.meets(self.slo) {
                    self.good += 1;
                    self.good_tokens += u64::from(progress.tokens);
                }
            }
            End::Early(why) => *self.early.entry(why).or_default() += 1,
            End::Rejected(why) => {
                *self.rejected.entry(why).or_default() += 1;
                record(&mut self.refusal_ns, now_ns.saturating_sub(progress.intended_ns), 1);
            }
            End::Broken => self.broken += 1,
        }
    }

    /// Requests of the measured part that have not ended.
    pub fn unfinished(&self) -> u64 {
        let early: u64 = self.early.values().sum();
        let rejected: u64 = self.rejected.values().sum();
        self.requests - self.completed - early - rejected - self.broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn tally() -> Tally {
        Tally::new(1000 * MS..2000 * MS, Slo { ttft_ns: 100 * MS, itl_ns: 10 * MS })
    }

    fn near(value: u64, expected: u64) -> bool {
        value.abs_diff(expected) <= expected / 500
    }

    #[test]
    fn a_request_is_timed_from_when_it_was_meant_to_begin() {
        let mut tally = tally();
        let mut request = Progress::begin(1000 * MS, 7);
        tally.sent(&request, 1030 * MS);
        tally.tokens(&mut request, 1, 1080 * MS);
        tally.tokens(&mut request, 1, 1090 * MS);
        tally.tokens(&mut request, 2, 1100 * MS);
        tally.end(&request, End::Complete, 1100 * MS);
        assert!(near(tally.late_ns.max(), 30 * MS));
        assert!(near(tally.ttft_ns.max(), 80 * MS));
        // Gaps of 10, 5 and 5 ms.
        assert_eq!(tally.itl_ns.len(), 3);
        assert!(near(tally.itl_ns.max(), 10 * MS) && near(tally.itl_ns.min(), 5 * MS));
        assert_eq!((tally.output_tokens, tally.prompt_tokens), (4, 7));
        assert_eq!((tally.completed, tally.good, tally.good_tokens), (1, 1, 4));
        assert_eq!(tally.unfinished(), 0);
    }

    #[test]
    fn tokens_that_come_with_the_first_have_no_gap() {
        let mut tally = tally();
        let mut request = Progress::begin(1000 * MS, 1);
        tally.tokens(&mut request, 3, 1050 * MS);
        assert_eq!(tally.itl_ns.len(), 2);
        assert!(tally.itl_ns.max() < 2_000); // the least that is told apart
        tally.tokens(&mut request, 0, 1060 * MS);
        assert_eq!(request.last_ns, 1050 * MS);
    }

    #[test]
    fn what_misses_a_target_is_complete_but_not_good() {
        let run = |first: u64, second: u64| {
            let mut tally = tally();
            let mut request = Progress::begin(1000 * MS, 1);
            tally.sent(&request, 1000 * MS);
            tally.tokens(&mut request, 1, (1000 + first) * MS);
            tally.tokens(&mut request, 1, (1000 + second) * MS);
            tally.end(&request, End::Complete, (1000 + second) * MS);
            (tally.completed, tally.good)
        };
        assert_eq!(run(100, 110), (1, 1));
        assert_eq!(run(101, 110), (1, 0));
        assert_eq!(run(100, 111), (1, 0));
    }

    #[test]
    fn warm_up_requests_do_not_count_but_their_tokens_in_the_measured_part_do() {
        let mut tally = tally();
        let mut early = Progress::begin(900 * MS, 5);
        tally.sent(&early, 900 * MS);
        tally.tokens(&mut early, 1, 999 * MS);
        tally.tokens(&mut early, 1, 1000 * MS);
        tally.end(&early, End::Complete, 1001 * MS);
        assert_eq!((tally.requests, tally.completed, tally.output_tokens), (0, 0, 1));
        assert_eq!((tally.ends, tally.prompt_tokens, tally.itl_ns.len()), (1, 0, 0));
    }

    #[test]
    fn a_request_that_began_in_time_counts_even_if_it_ends_late() {
        let mut tally = tally();
        let mut request = Progress::begin(1999 * MS, 5);
        tally.sent(&request, 1999 * MS);
        assert_eq!(tally.unfinished(), 1);
        tally.tokens(&mut request, 1, 2500 * MS);
        tally.end(&request, End::Complete, 2500 * MS);
        assert!(near(tally.ttft_ns.max(), 501 * MS));
        assert_eq!((tally.completed, tally.good, tally.output_tokens, tally.ends), (1, 0, 0, 0));
    }

    #[test]
    fn ends_are_counted_by_reason() {
        let mut tally = tally();
        let request = Progress::begin(1500 * MS, 5);
        for end in [
            End::Rejected("queue_full"),
            End::Rejected("queue_full"),
            End::Early("stalled"),
            End::Broken,
        ] {
            tally.sent(&request, 1500 * MS);
            tally.end(&request, end, 1600 * MS);
        }
        assert_eq!(tally.rejected, BTreeMap::from([("queue_full", 2)]));
        assert_eq!(tally.early, BTreeMap::from([("stalled", 1)]));
        assert_eq!((tally.requests, tally.broken, tally.unfinished()), (4, 1, 0));
    }

    #[test]
    fn times_beyond_all_bounds_are_recorded_at_the_bound() {
        let mut tally = tally();
        let mut request = Progress::begin(1000 * MS, 5);
        tally.tokens(&mut request, 1, u64::MAX);
        assert_eq!(tally.ttft_ns.len(), 1);
    }
}
