//! Who is refused hears when to come back, and then finds a place.

#[path = "common/engine.rs"]
mod bench;

use bench::{A, Bench, Told, Want};
use forebay::base::Instant;
use forebay::limits::Limits;
use forebay::request::RejectReason;

/// Four slots and a queue, with a target that the queue can exceed.
fn limits() -> Limits {
    Limits {
        running_max: 4,
        parked_max: 0,
        queued_requests_max: 60,
        ttft_target_ms: 200,
        ..Limits::tiny()
    }
}

fn want(tenant: &'static str) -> Want {
    Want { max_tokens: 8, tenant, ..Want::default() }
}

/// What came of one ask.
enum Answer {
    In,
    Later(Instant),
    Never,
}

/// Asks, and submits if there is a grant. Steps take a millisecond each, and time passes by steps.
fn try_once(bench: &mut Bench, want: &Want) -> Answer {
    let stream = bench.ask(want);
    bench.settle();
    match bench.told(stream)[..] {
        [Told::Grant(seq)] => {
            bench.submit(stream, seq, want);
            bench.settle();
            Answer::In
        }
        [Told::Reject(RejectReason::TtftUnattainable | RejectReason::QueueFull, retry_ms)] => {
            retry_ms.map_or(Answer::Never, |ms| Answer::Later(bench.now.plus_ms(ms.into())))
        }
        ref told => panic!("{told:?}"),
    }
}

/// A millisecond goes by, with a step if there is one.
fn pass(bench: &mut Bench) {
    match bench.take_step() {
        Some(step) => bench.finish(step, |_| A),
        None => bench.pass_ms(1),
    }
}

/// What became of those who came back as told.
#[derive(Debug, Default)]
struct Returned {
    let_in: u32,
    again: u32,
}

/// Offers several times what the bench serves for so many steps, and goes on until everybody who
/// was told a time has come back for it, once.
fn spike(bench: &mut Bench, tenants: &[&'static str], steps: usize) -> Returned {
    let mut places: Vec<(Instant, &'static str)> = Vec::new();
    let mut returned = Returned::default();
    for step in 0.. {
        if step >= steps && places.is_empty() {
            break;
        }
        let now = bench.now;
        for (_, tenant) in places.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>() {
            match try_once(bench, &want(tenant)) {
                Answer::In => returned.let_in += 1,
                Answer::Later(_) | Answer::Never => returned.again += 1,
            }
        }
        for tenant in tenants.iter().filter(|_| step < steps) {
            if let Answer::Later(at) = try_once(bench, &want(tenant)) {
                places.push((at, tenant));
            }
        }
        pass(bench);
    }
    returned
}

#[test]
fn whoever_comes_back_as_told_in_and_after_a_spike_is_let_in() {
    let mut bench = Bench::new(&limits(), 64);
    let Returned { let_in, again } = spike(&mut bench, &["a", "b", "c"], 1_000);
    assert!(let_in > 400, "{let_in}");
    assert!(let_in >= 9 * again, "{let_in} let in, {again} refused again");
    let promises = bench.stats().promises;
    assert!(promises.kept >= 9 * promises.broken, "{promises:?}");
}

#[test]
fn whoever_comes_back_as_told_is_let_in_while_newcomers_go_on_flooding() {
    let mut bench = Bench::new(&limits(), 64);
    let (mut kept, mut broken) = (0, 0);
    let mut places: Vec<Instant> = Vec::new();
    for step in 0..4_000 {
        // The flood never returns as told.
        for _ in 0..2 {
            try_once(&mut bench, &want("flood"));
        }
        places.sort();
        while places.first().is_some_and(|&at| at <= bench.now) {
            places.remove(0);
            match try_once(&mut bench, &want("patient")) {
                Answer::In => kept += 1,
                Answer::Later(_) | Answer::Never => broken += 1,
            }
        }
        if step % 20 == 0
            && let Answer::Later(at) = try_once(&mut bench, &want("patient"))
        {
            places.push(at);
        }
        pass(&mut bench);
    }
    assert!(kept > 20 && kept >= 9 * broken, "{kept} let in, {broken} refused again");
}

#[test]
fn hammering_gains_nothing_over_coming_back_as_told() {
    let mut bench = Bench::new(&limits(), 64);
    // Two clients with the same wishes amid a flood; one tries each of them again at every step.
    let (mut hammered, mut fulfilled) = (0, [0, 0]);
    let mut places: Vec<Instant> = Vec::new();
    for step in 0..6_000 {
        for _ in 0..2 {
            try_once(&mut bench, &want("flood"));
        }
        let now = bench.now;
        let wish = step % 20 == 0;
        hammered += u32::from(wish);
        let tries = (0..hammered).map(|_| try_once(&mut bench, &want("hammers")));
        let let_in = tries.filter(|answer| matches!(answer, Answer::In)).count() as u32;
        hammered -= let_in;
        fulfilled[0] += let_in;
        let due = places.extract_if(.., |at| *at <= now).count();
        for _ in 0..due + usize::from(wish) {
            match try_once(&mut bench, &want("patient")) {
                Answer::In => fulfilled[1] += 1,
                Answer::Later(at) => places.push(at),
                Answer::Never => {}
            }
        }
        pass(&mut bench);
    }
    let [hammers, patient] = fulfilled;
    assert!(patient > 200 && patient * 10 >= hammers * 9, "{hammers} hammering, {patient} patient");
}

#[test]
fn places_that_nobody_comes_for_do_not_stand_empty() {
    let mut bench = Bench::new(&limits(), 64);
    let mut rows = [0, 0];
    for step in 0..8_000 {
        for _ in 0..2 {
            try_once(&mut bench, &want("gone"));
        }
        if let Some(step_taken) = bench.take_step() {
            if step >= 6_000 {
                rows = [rows[0] + step_taken.plan.rows.len(), rows[1] + 1];
            }
            bench.finish(step_taken, |_| A);
        }
    }
    assert!(rows[0] > 3 * rows[1], "{rows:?}: rows and steps, with four slots");
}
