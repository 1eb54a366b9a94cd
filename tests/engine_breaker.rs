//! When steps fail or hang, requests are refused at once, and the device is looked at again.

#[path = "common/engine.rs"]
mod bench;

use bench::{A, Bench, Told, Want};
use forebay::limits::Limits;
use forebay::message::StepFailure;
use forebay::request::{FinishReason, RejectReason};

/// Opens after two failures, for 100 ms at first; a step hangs after 1,000 ms.
fn limits() -> Limits {
    Limits { breaker_failures_max: 2, running_max: 8, queued_requests_max: 16, ..Limits::tiny() }
}

fn failed(bench: &mut Bench, times: usize) {
    for _ in 0..times {
        let (stream, _) = bench.accepted(&Want::default());
        let step = bench.take_step().expect("it is planned");
        bench.fail(step, StepFailure::InvalidPlan);
        let told = bench.told(stream);
        assert!(matches!(told[..], [Told::Done(FinishReason::DeviceFailed, _)]), "{told:?}");
    }
}

fn refusal(bench: &mut Bench) -> Option<u32> {
    let stream = bench.ask(&Want::default());
    bench.settle();
    match bench.told(stream)[..] {
        [Told::Grant(seq)] => {
            bench.cancel(seq);
            None
        }
        [Told::Reject(RejectReason::NoCapacity, retry_ms)] => Some(retry_ms.expect("a time")),
        ref told => panic!("{told:?}"),
    }
}

#[test]
fn after_failures_in_a_row_everybody_is_refused_with_the_time_it_is_open() {
    let mut bench = Bench::new(&limits(), 32);
    failed(&mut bench, 1);
    assert_eq!(refusal(&mut bench), None, "one may be an accident");
    failed(&mut bench, 1);
    assert_eq!(refusal(&mut bench), Some(100));
    assert!(bench.fronts[0].gate.refuse(Want::default().class).is_some(), "at the gate, too");
    let wake = bench.engine.next_timeout().expect("it is looked at again");
    assert_eq!(wake.ms_since(bench.now), 100);
    bench.pass_ms(100);
    assert_eq!(refusal(&mut bench), None);
    failed(&mut bench, 1);
    assert_eq!(refusal(&mut bench), Some(200), "still broken: twice as long");
    bench.pass_ms(200);
    let (_, _) = bench.accepted(&Want::default());
    bench.step(A);
    assert_eq!((bench.stats().breaker, bench.stats().breaker_trips), (0, 2));
}

#[test]
fn while_half_open_a_few_are_let_in_and_the_rest_waits_for_what_they_find() {
    let mut bench = Bench::new(&limits(), 32);
    failed(&mut bench, 2);
    bench.pass_ms(100);
    for _ in 0..4 {
        bench.accepted(&Want::default());
    }
    assert!(refusal(&mut bench).is_some());
    bench.step(A);
    assert_eq!(refusal(&mut bench), None);
}

#[test]
fn who_waits_in_the_queue_is_not_fed_to_a_device_that_fails() {
    let mut bench = Bench::new(&Limits { running_max: 1, ..limits() }, 32);
    bench.accepted(&Want::default());
    let queued: Vec<_> = (0..6).map(|_| bench.accepted(&Want::default()).0).collect();
    for _ in 0..2 {
        let step = bench.take_step().expect("somebody runs");
        bench.fail(step, StepFailure::InvalidPlan);
    }
    assert!(bench.take_step().is_none(), "nobody is admitted while it is open");
    bench.pass_ms(100);
    while bench.steps(A, 100) > 0 {}
    let ends: Vec<_> = queued.iter().map(|&stream| bench.told(stream).pop()).collect();
    let failed =
        |end: &&Option<Told>| matches!(end, Some(Told::Done(FinishReason::DeviceFailed, _)));
    assert_eq!(ends.iter().filter(failed).count(), 1, "{ends:?}: one ran when it opened");
}

#[test]
fn a_step_that_hangs_closes_the_door_until_it_ends() {
    let mut bench = Bench::new(&limits(), 32);
    let (stream, seq) = bench.accepted(&Want::default());
    let step = bench.take_step().expect("it runs");
    bench.pass_ms(999);
    assert_eq!(refusal(&mut bench), None);
    bench.pass_ms(1);
    assert_eq!(refusal(&mut bench), Some(100));
    bench.pass_ms(100);
    assert_eq!(refusal(&mut bench), Some(200), "it still hangs");
    bench.finish(step, |_| A);
    assert_eq!(refusal(&mut bench), None);
    bench.credit(seq, 1);
    bench.steps(A, 10);
    assert!(matches!(bench.told(stream).last(), Some(Told::Done(FinishReason::MaxTokens, _))));
}
