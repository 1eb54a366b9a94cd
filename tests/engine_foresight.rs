//! Who would get the first token too late is refused at the door, and nobody else is.

#[path = "common/engine.rs"]
mod bench;

use bench::{A, Bench, Told, Want};
use forebay::limits::Limits;
use forebay::request::{Class, RejectReason};

/// One slot, steps of a millisecond, a target of 44 ms: 35 may be foreseen.
fn limits() -> Limits {
    let (running_max, queued_requests_max) = (1, 8);
    let ttft_target_ms = 44;
    Limits { running_max, parked_max: 0, queued_requests_max, ttft_target_ms, ..Limits::tiny() }
}

/// A bench that has served answers of five tokens one after the other, `waiting` left in line.
fn busy(limits: &Limits, waiting: u32) -> Bench {
    let mut bench = Bench::new(limits, 8);
    let want = Want { max_tokens: 5, class: Class::System, ..Want::default() };
    for _ in 0..12 {
        bench.accepted(&want);
        while bench.stats().queued[0] == 2 {
            bench.step(A);
        }
    }
    while bench.stats().queued[0] < waiting {
        bench.accepted(&want);
    }
    while bench.stats().queued[0] > waiting {
        bench.step(A);
    }
    bench
}

fn answer_to(bench: &mut Bench, want: &Want) -> Told {
    let stream = bench.ask(want);
    bench.settle();
    bench.told(stream).remove(0)
}

#[test]
fn a_request_is_refused_when_the_queue_before_it_takes_longer_than_the_target() {
    let want = Want::default();
    let short = answer_to(&mut busy(&limits(), 3), &want);
    assert!(matches!(short, Told::Grant(_)), "four answers of 6 ms are ahead: {short:?}");
    let mut bench = busy(&limits(), 5);
    let Told::Reject(RejectReason::TtftUnattainable, Some(wait_ms)) = answer_to(&mut bench, &want)
    else {
        panic!("six answers of 6 ms are ahead")
    };
    assert!((1..=6).contains(&wait_ms), "{wait_ms} ms: less than one answer too many");
    let next = answer_to(&mut bench, &want);
    assert!(matches!(next, Told::Reject(_, Some(later)) if later > wait_ms), "{next:?}: in line");
}

#[test]
fn bulk_waits_and_a_more_urgent_class_is_not_told_of_those_behind_it() {
    let bulk = Want { class: Class::Bulk, ..Want::default() };
    let told = answer_to(&mut busy(&limits(), 5), &bulk);
    assert!(matches!(told, Told::Grant(_)), "{told:?}");

    let mut bench = Bench::new(&limits(), 8);
    let want = Want { max_tokens: 5, class: Class::Bulk, ..Want::default() };
    for _ in 0..4 {
        bench.accepted(&want);
    }
    bench.steps(A, 9);
    while bench.stats().queued[3] < 7 {
        bench.accepted(&want);
    }
    let told = answer_to(&mut bench, &Want::default());
    assert!(matches!(told, Told::Grant(_)), "only what runs is before it: {told:?}");
}

#[test]
fn an_idle_engine_takes_a_prompt_that_alone_takes_longer_than_the_target() {
    let limits = Limits { ttft_target_ms: 1, chunk_tokens_max: 8, ..limits() };
    let mut bench = Bench::new(&limits, 8);
    for _ in 0..4 {
        bench.accepted(&Want::default());
        bench.steps(A, 9);
    }
    let long = Want { prompt: 300, ..Want::default() };
    let told = answer_to(&mut bench, &long);
    assert!(matches!(told, Told::Grant(_)), "38 steps of a millisecond, and nobody else: {told:?}");
}

#[test]
fn without_a_target_nobody_is_refused_for_the_time_it_takes() {
    let limits = Limits { ttft_target_ms: 0, ..limits() };
    let told = answer_to(&mut busy(&limits, 5), &Want::default());
    assert!(matches!(told, Told::Grant(_)), "{told:?}");
}

#[test]
fn before_any_answer_has_ended_the_answers_that_run_are_taken_to_be_as_long_as_they_may_be() {
    let limits = Limits { running_max: 2, ..limits() };
    let mut bench = Bench::new(&limits, 8);
    let want = Want { max_tokens: 400, window: 8, ..Want::default() };
    for _ in 0..2 {
        let (_, seq) = bench.accepted(&want);
        bench.credit(seq, 8);
    }
    for _ in 0..8 {
        bench.step(A);
    }
    let told = answer_to(&mut bench, &want);
    assert!(matches!(told, Told::Reject(RejectReason::TtftUnattainable, Some(_))), "{told:?}");
}

#[test]
fn a_short_prompt_behind_a_long_one_shares_its_steps_and_is_not_refused_for_it() {
    // 16 tokens of prefill a step of a millisecond; 400 tokens before a prompt of 20.
    let limits = Limits { running_max: 2, step_tokens_max: 16, chunk_tokens_max: 16, ..limits() };
    let mut bench = Bench::new(&limits, 16);
    for _ in 0..4 {
        bench.accepted(&Want::default());
        bench.steps(A, 9);
    }
    let (long, _) = bench.accepted(&Want { prompt: 400, class: Class::Bulk, ..Want::default() });
    bench.step(A);
    let (short, _) = bench.accepted(&Want { prompt: 20, ..Want::default() });
    let mut steps = 0;
    let first = |told: Vec<Told>| told.iter().any(|told| matches!(told, Told::Tokens(..)));
    while !first(bench.told(short)) {
        bench.step(A);
        steps += 1;
        assert!(steps <= 5, "half of each step is enough for three");
    }
    assert!(!first(bench.told(long)), "it is still in prefill");
}
