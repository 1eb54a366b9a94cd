//! What the engine shows of itself is what happened.

#[path = "common/engine.rs"]
mod bench;

use bench::{A, Bench, Want};
use forebay::base::board::{Kind, Part, Tell};
use forebay::limits::Limits;

/// Steps take a millisecond here, by the device's account and by the clock.
const MS: u64 = 1_000_000;

fn limits() -> Limits {
    Limits { running_max: 1, ttft_target_ms: 0, ..Limits::tiny() }
}

#[test]
fn the_first_token_is_compared_with_what_was_foreseen_at_the_ask() {
    let mut bench = Bench::new(&limits(), 8);
    for _ in 0..4 {
        bench.accepted(&Want::default());
        bench.steps(A, 9);
    }
    assert_eq!(bench.stats().counters.ttft_foreseen.count, 2, "after eight steps there is a model");
    let before = bench.stats().counters;
    bench.accepted(&Want::default());
    bench.steps(A, 9);
    let after = bench.stats().counters;
    let (before, after) = (before.ttft_foreseen, after.ttft_foreseen);
    assert_eq!(after.count - before.count, 1);
    assert_eq!(after.actual_ns - before.actual_ns, MS, "one step");
    let error_ns = after.error_ns - before.error_ns;
    assert_eq!(error_ns, (after.predicted_ns - before.predicted_ns).abs_diff(MS));
    assert!(error_ns < MS / 2, "an idle engine knows what a step takes: {error_ns} ns off");
    let steps = bench.stats().counters.step_foreseen;
    assert_eq!((steps.count, steps.actual_ns), (20, 20 * MS));
}

#[test]
fn the_time_between_tokens_is_without_the_time_that_the_client_kept_the_sequence_parked() {
    let mut bench = Bench::new(&limits(), 8);
    let want = Want { max_tokens: 3, window: 2, ..Want::default() };
    let (_, seq) = bench.accepted(&want);
    bench.steps(A, 9);
    assert_eq!(bench.stats().parked, 1);
    assert_eq!(bench.stats().saturation.egress, 1_000 / u64::from(limits().parked_max));
    bench.pass_ms(700);
    bench.credit(seq, 1);
    bench.steps(A, 9);
    let histograms = bench.stats().histograms;
    assert_eq!((histograms.ttft.count(), histograms.ttft.sum()), (1, MS));
    assert_eq!((histograms.itl.count(), histograms.itl.sum()), (2, 2 * MS));
    assert_eq!((histograms.token_time.count(), histograms.token_time.sum()), (1, MS));
    assert_eq!(histograms.total.sum(), 703 * MS, "the client's whole wait");
    assert_eq!((histograms.prompt.sum(), histograms.output.sum()), (4, 3));
}

#[test]
fn demand_beyond_the_slots_is_seen_as_saturation_and_as_time_in_the_queue() {
    let mut bench = Bench::new(&limits(), 8);
    assert_eq!(bench.stats().saturation, Default::default());
    for _ in 0..3 {
        bench.accepted(&Want { max_tokens: 5, ..Want::default() });
    }
    let full = bench.stats().saturation;
    assert_eq!((full.slots, full.queue), (3_000, 500), "one runs, two of four places are taken");
    assert_eq!(full.kv, 125, "one block of eight");
    bench.steps(A, 99);
    let queue = bench.stats().histograms.queue;
    assert_eq!((queue.count(), queue.sum()), (3, (5 + 10) * MS));
    assert_eq!(bench.stats().saturation, Default::default());
}

#[test]
fn the_wait_foreseen_grows_with_the_prompts_that_wait_and_ends_with_them() {
    let mut bench = Bench::new(&limits(), 8);
    for _ in 0..4 {
        bench.accepted(&Want::default());
        bench.steps(A, 9);
    }
    let idle = bench.stats();
    assert_eq!((idle.wait_foreseen_ns, idle.saturation.prefill), (0, 0));
    for _ in 0..3 {
        bench.accepted(&Want { prompt: 60, ..Want::default() });
    }
    let busy = bench.stats();
    assert!(busy.wait_foreseen_ns > MS && busy.saturation.prefill > 0, "{busy:?}");
    bench.steps(A, 99);
    assert_eq!(bench.stats().wait_foreseen_ns, 0);
}

#[test]
fn a_device_without_a_step_is_idle_and_one_that_has_a_step_and_does_not_work_has_a_gap() {
    let mut bench = Bench::new(&limits(), 8);
    bench.pass_ms(10);
    bench.accepted(&Want { max_tokens: 2, ..Want::default() });
    // The clock began at 1 ms.
    assert_eq!(bench.stats().counters.device_idle_ns, 11 * MS);
    bench.steps(A, 9);
    bench.pass_ms(5);
    bench.accepted(&Want::default());
    let counters = bench.stats().counters;
    assert_eq!((counters.device_idle_ns, counters.device_gap_ns), (16 * MS, 0));
    bench.pass_ms(3);
    bench.step(A);
    let counters = bench.stats().counters;
    assert_eq!((counters.device_idle_ns, counters.device_gap_ns), (16 * MS, 3 * MS));
    assert_eq!(counters.device_ns, 3 * MS);
}

#[test]
fn every_histogram_is_told_cumulative_and_by_rising_bounds() {
    let mut bench = Bench::new(&limits(), 8);
    bench.accepted(&Want::default());
    bench.steps(A, 9);
    let (mut bound, mut below, mut families) = (0, 0, 0);
    bench.stats().tell(|number, value| {
        let Kind::Histogram { part, .. } = number.kind else { return };
        match part {
            Part::Le(le) => {
                assert!(le > bound && value >= below, "{number:?}");
                (bound, below) = (le, value);
            }
            Part::Count => assert!(value >= below, "{number:?}"),
            Part::Sum => (bound, below, families) = (0, 0, families + 1),
        }
    });
    assert_eq!(families, 7);
}
