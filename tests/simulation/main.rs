//! Deterministic simulation: the real cores and the real rings, on one thread and virtual time,
//! with everything bad that can happen drawn from a seed. The same seed gives the same run.
//!
//! `cargo test --test simulation` runs a few hundred seeds in some seconds, and the seeds that once
//! failed. Longer:
//!
//! ```text
//! FOREBAY_TEST_SIM_SEEDS=100000 cargo test --test simulation      # so many seeds
//! FOREBAY_TEST_SIM_FIRST=7 FOREBAY_TEST_SIM_SEEDS=1 ...           # that one seed
//! ```
//!
//! A run has two phases: until some point drawn from the seed, faults happen; from then on none
//! do, and everything must end within a bound. Checked after every turn of the engine: its own
//! invariants (blocks, permits, lists, windows), the links' credits, the device's contract; with
//! every event: that each answer is what the model says (I7), one end per request and nothing
//! after it (I5); when nobody has anything to do: that no sequence with credit is left standing
//! (I4); at the end: that nothing is left anywhere. A failure prints the seed, the options and
//! what is pending.

mod client;
mod device;
mod front;
mod model;
mod options;
mod request;
mod side;
mod wire;
mod world;

use std::time::Instant;

use forebay::request::RejectReason;
use world::{Fronts, Seen};

/// Seeds that once found something; each with what it was.
const REGRESSIONS: &[(u64, Fronts, &str)] = &[];

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} must be a number: {text}")),
        Err(_) => default,
    }
}

/// Runs the seeds; stops at the first that fails.
fn run_seeds(fronts: Fronts) -> Seen {
    let first = number("FOREBAY_TEST_SIM_FIRST", 0);
    let count = number("FOREBAY_TEST_SIM_SEEDS", 300);
    let begin = Instant::now();
    let mut seen = Seen::default();
    for seed in first..first + count {
        match std::panic::catch_unwind(|| world::run(seed, fronts)) {
            Ok(Ok(one)) => seen.add(&one),
            Ok(Err(report)) => panic!("{fronts:?}: {report}"),
            Err(_) => panic!("{fronts:?}: seed {seed}: a core panicked, see above"),
        }
    }
    println!("{fronts:?}: {seen:#?} in {:?}", begin.elapsed());
    seen
}

#[test]
fn seeds_that_once_failed_pass() {
    for &(seed, fronts, what) in REGRESSIONS {
        if let Err(report) = world::run(seed, fronts) {
            panic!("again ({what}): {report}");
        }
    }
}

#[test]
fn every_request_gets_its_answer_or_an_honest_end_whatever_happens() {
    let seen = run_seeds(Fronts::Messages);
    let refused = |reason| seen.rejected[reason as usize];
    for (what, count) in [
        ("was refused for its tenant's rate", refused(RejectReason::TenantRate)),
        ("was refused for its tenant's streams", refused(RejectReason::TooManyStreams)),
        ("shared an account", seen.shared_asks),
        ("was a different share ahead", seen.turns),
    ] {
        // Of a single seed it cannot be asked.
        assert!(seen.runs < 100 || count > 0, "nobody {what}");
    }
}

#[test]
fn clients_that_speak_bytes_get_theirs_whatever_happens() {
    let seen = run_seeds(Fronts::Bytes);
    // Of a single seed it cannot be asked.
    assert!(seen.runs < 100 || seen.gate_refusals > 0, "nobody met a closed gate");
    assert!(seen.runs < 100 || seen.breaker_trips > 0, "the breaker never opened");
}
