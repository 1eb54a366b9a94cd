//! Corners of the engine core that other tests pass by: each of these was written because a
//! planted bug (tests/simulation/planted) went unnoticed.

#[path = "common/engine.rs"]
mod bench;

use bench::{A, Bench, END, Told, Want};
use forebay::limits::Limits;
use forebay::message::ControlMessage;
use forebay::request::FinishReason;

fn is_over(told: &[Told], with: FinishReason) -> bool {
    matches!(told.last(), Some(Told::Done(finish, _)) if *finish == with)
}

#[test]
fn the_end_of_a_drain_is_the_end_of_the_parked_too() {
    let mut bench = Bench::new(&Limits::tiny(), 8);
    let (parked, _) = bench.accepted(&Want { window: 1, max_tokens: 9, ..Want::default() });
    bench.step(A);
    assert_eq!(bench.stats().parked, 1);
    bench.engine.begin_drain(bench.now, bench.now.plus_ms(100));
    bench.pass_ms(100);
    assert!(is_over(&bench.told(parked), FinishReason::ShuttingDown));
    assert!(bench.engine.is_drained());
}

#[test]
fn front_cores_that_ask_at_the_same_time_are_heard_first_in_turn() {
    let limits = Limits { queued_requests_max: 1, ..Limits::tiny() };
    let mut bench = Bench::with(&limits, 8, 1, 2);
    let mut granted = [0, 0];
    for _ in 0..10 {
        let asks = [0, 1].map(|front| bench.ask_from(front, &Want::default()));
        // There is one place. An odd number of ticks a round, so that a front core's turn is not
        // always the idle tick.
        bench.engine.tick(bench.now);
        bench.receive();
        for (front, stream) in asks.into_iter().enumerate() {
            if let [Told::Grant(seq)] = bench.told(stream)[..] {
                granted[front] += 1;
                let cancel = ControlMessage::Cancel { seq, reason: FinishReason::Cancelled };
                assert!(bench.fronts[front].control.push(cancel).is_ok());
            }
        }
        for _ in 0..2 {
            bench.engine.tick(bench.now);
            bench.receive();
        }
    }
    assert_eq!(granted, [5, 5]);
}

#[test]
fn a_submission_shorter_than_was_asked_for_gives_the_rest_of_its_permit_back() {
    let limits = Limits { running_max: 1, ..Limits::tiny() };
    let mut bench = Bench::new(&limits, 8);
    bench.accepted(&Want::default());
    let (stream, seq) = bench.granted(&Want { prompt: 40, ..Want::default() });
    assert_eq!(bench.stats().queued_tokens, 40);
    bench.submit(stream, seq, &Want { prompt: 4, ..Want::default() });
    bench.settle();
    assert_eq!(bench.stats().queued_tokens, 4);
}

#[test]
fn credit_beyond_the_largest_window_is_not_taken_and_counted() {
    let mut bench = Bench::new(&Limits::tiny(), 8);
    let (_, seq) = bench.accepted(&Want { max_tokens: 100, ..Want::default() });
    // Of a window of 8 one is spent on the first step.
    bench.credit(seq, 5);
    assert_eq!(bench.stats().counters.excess_credit, 4);
    assert_eq!(bench.engine.pending().next().unwrap().credit, 8);
}

#[test]
fn nobody_is_parked_while_a_token_is_on_the_way_that_may_be_the_last() {
    let mut bench = Bench::with(&Limits::tiny(), 8, 2, 1);
    let (stream, _) = bench.accepted(&Want { window: 1, ..Want::default() });
    assert_eq!((bench.stats().running, bench.stats().parked), (1, 0));
    bench.step(END);
    let told = bench.told(stream);
    assert_eq!(told.len(), 1, "no pause before the end: {told:?}");
    assert!(is_over(&told, FinishReason::EndOfText));
}

#[test]
fn nobody_comes_in_for_a_block_while_an_admitted_sequence_waits_for_two() {
    let limits = Limits { stream_window_tokens_max: 400, ..Limits::tiny() };
    let mut bench = Bench::new(&limits, 3);
    // The old one needs its second block at 65 tokens; the young one's two make room for it.
    let want = |prompt| Want { prompt, max_tokens: 30, window: 100, ..Want::default() };
    bench.accepted(&want(60));
    bench.accepted(&want(100));
    while bench.stats().counters.preemptions == 0 {
        bench.step(A);
    }
    bench.accepted(&want(4));
    bench.step(A);
    let stats = bench.stats();
    assert_eq!((stats.running, stats.waiting, stats.blocks_free), (1, 1, 1));
    assert_eq!(stats.queued.iter().sum::<u32>(), 1, "the free block is not for a newcomer");
}

#[test]
fn a_newcomer_leaves_some_blocks_free_for_those_who_run() {
    let limits =
        Limits { context_max: 4_200, queued_tokens_max: 5_000, running_max: 2, ..Limits::tiny() };
    let mut bench = Bench::new(&limits, 64);
    bench.accepted(&Want { max_tokens: 8, ..Want::default() });
    // It fits: 62 of 63 blocks. But one in 32 stays free, which is two.
    bench.accepted(&Want { prompt: 62 * 64, ..Want::default() });
    bench.step(A);
    assert_eq!(bench.stats().running, 1);
    bench.steps(A, 8);
    assert_eq!(bench.stats().counters.admitted, 2, "alone it may have them all");
}
