//! The engine core scenario by scenario; the test plays the front core and the device.

#[path = "common/engine.rs"]
mod bench;

use bench::{A, Bench, END, Told, Want};
use forebay::base::Instant;
use forebay::engine::plan;
use forebay::engine::room::PREFILL_TOKENS_MIN;
use forebay::flow::{StepCost, StepLoad, StepTimeModel};
use forebay::limits::Limits;
use forebay::message::{ControlMessage, EVENT_BATCHES, PlanRow, StepFailure};
use forebay::request::{Class, FinishReason, RejectReason, TokenId};

fn tiny() -> Limits {
    Limits::tiny()
}

fn text_of(told: &[Told]) -> String {
    let text = |told: &Told| match told {
        Told::Tokens(_, text) => text.clone(),
        _ => String::new(),
    };
    told.iter().map(text).collect()
}

fn finish_of(told: &[Told]) -> Option<FinishReason> {
    match told.last() {
        Some(Told::Done(finish, _)) => Some(*finish),
        _ => None,
    }
}

#[test]
fn a_request_goes_from_ask_to_done() {
    let mut bench = Bench::new(&tiny(), 8);
    let (stream, _) = bench.accepted(&Want::default());
    let rows = bench.step(A);
    assert_eq!((rows[0].position, rows[0].token_count, rows[0].sample), (0, 4, true));
    assert_eq!(bench.told(stream), [Told::Tokens(vec![A], "a".into())]);
    assert_eq!(bench.step(A)[0].position, 4);
    bench.steps(A, 10);
    let told = bench.told(stream);
    assert_eq!(text_of(&told), "aaa");
    let Some(Told::Done(FinishReason::MaxTokens, usage)) = told.last() else { panic!("{told:?}") };
    assert_eq!((usage.prompt_tokens, usage.output_tokens), (4, 4));
    assert_eq!(bench.stats().blocks_free, 8);
    assert_eq!(bench.engine.pending().count(), 0);
}

#[test]
fn the_end_of_text_token_is_neither_sent_nor_counted_unless_it_is_ignored() {
    let mut bench = Bench::new(&tiny(), 8);
    let (stream, _) = bench.accepted(&Want::default());
    bench.step(A);
    bench.step(END);
    let told = bench.told(stream);
    let Some(Told::Done(FinishReason::EndOfText, usage)) = told.last() else { panic!("{told:?}") };
    assert_eq!((usage.output_tokens, text_of(&told)), (1, "a".into()));

    let (stream, _) = bench.accepted(&Want { ignore_eos: true, ..Want::default() });
    bench.steps(END, 10);
    let told = bench.told(stream);
    let Some(Told::Done(FinishReason::MaxTokens, usage)) = told.last() else { panic!("{told:?}") };
    assert_eq!((usage.output_tokens, text_of(&told)), (4, String::new()));
}

#[test]
fn text_that_might_be_a_stop_string_is_held_back_and_the_stop_string_never_sent() {
    let mut bench = Bench::new(&tiny(), 8);
    let want = Want { stop: vec!["ab!"], max_tokens: 20, window: 8, ..Want::default() };
    let (stream, _) = bench.accepted(&want);
    bench.step(A);
    assert_eq!(bench.told(stream), [Told::Tokens(vec![A], String::new())]);
    bench.step(A);
    assert_eq!(bench.told(stream), [Told::Tokens(vec![A], "a".into())]);
    bench.step(TokenId::from(b'b'));
    assert_eq!(bench.told(stream), [Told::Tokens(vec![98], String::new())]);
    bench.step(TokenId::from(b'!'));
    let told = bench.told(stream);
    assert_eq!(told[0], Told::Tokens(vec![33], String::new()));
    assert_eq!(finish_of(&told), Some(FinishReason::StopString));
}

#[test]
fn text_held_back_for_a_stop_string_comes_out_when_the_answer_ends_otherwise() {
    let mut bench = Bench::new(&tiny(), 8);
    let want = Want { stop: vec!["aaaa"], max_tokens: 3, ..Want::default() };
    let (stream, _) = bench.accepted(&want);
    bench.steps(A, 10);
    let told = bench.told(stream);
    assert_eq!(text_of(&told), "aaa");
    assert_eq!(finish_of(&told), Some(FinishReason::MaxTokens));
}

#[test]
fn the_end_of_the_context_is_told_apart_from_the_limit_that_was_asked_for() {
    let limits = Limits { context_max: 40, ..tiny() };
    for (max_tokens, finish) in [(0, FinishReason::ContextFull), (8, FinishReason::MaxTokens)] {
        let mut bench = Bench::new(&limits, 8);
        let (stream, seq) = bench.accepted(&Want { prompt: 32, max_tokens, ..Want::default() });
        bench.steps(A, 8);
        bench.credit(seq, 1);
        let told = bench.told(stream);
        assert_eq!(finish_of(&told), Some(finish));
        assert_eq!(text_of(&told).len(), 8);
    }
}

#[test]
fn at_zero_credit_a_sequence_leaves_the_batch_at_the_next_step_and_keeps_its_kv() {
    let limits = Limits { running_max: 1, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    let (slow, seq) = bench.accepted(&Want { window: 2, max_tokens: 9, ..Want::default() });
    let (quick, _) = bench.accepted(&Want { max_tokens: 3, ..Want::default() });
    bench.step(A);
    bench.step(A);
    let told = bench.told(slow);
    assert_eq!(text_of(&told), "aa");
    assert_eq!(told.last(), Some(&Told::Paused));
    assert_eq!(bench.stats().parked, 1);
    assert_eq!(bench.steps(A, 9), 3, "its slot went to the next");
    assert_eq!(finish_of(&bench.told(quick)), Some(FinishReason::MaxTokens));

    bench.credit(seq, 1);
    assert_eq!(bench.told(slow), [Told::Resumed]);
    let rows = bench.step(A);
    assert_eq!((rows[0].position, rows[0].token_count), (5, 1), "nothing is computed again");
    assert_eq!(text_of(&bench.told(slow)), "a");
}

#[test]
fn credit_that_comes_before_the_next_step_parks_nobody() {
    let mut bench = Bench::new(&tiny(), 8);
    let (stream, seq) = bench.accepted(&Want { window: 1, max_tokens: 3, ..Want::default() });
    bench.credit(seq, 1);
    bench.step(A);
    bench.step(A);
    assert_eq!(bench.told(stream).iter().filter(|told| **told == Told::Paused).count(), 1);
    assert_eq!(bench.stats().counters.parks, 1);
}

#[test]
fn a_cancel_frees_the_kv_within_a_step_in_every_state() {
    let limits = Limits { running_max: 1, ..tiny() };
    let want = Want { window: 1, max_tokens: 9, ..Want::default() };

    let mut bench = Bench::new(&limits, 8);
    let (stream, seq) = bench.granted(&want);
    bench.cancel(seq);
    assert_eq!(finish_of(&bench.told(stream)), Some(FinishReason::Cancelled), "granted");

    let (running, running_seq) = bench.accepted(&want);
    let (queued, queued_seq) = bench.accepted(&want);
    bench.cancel(queued_seq);
    assert_eq!(finish_of(&bench.told(queued)), Some(FinishReason::Cancelled), "queued");

    bench.cancel(running_seq);
    assert_eq!(finish_of(&bench.told(running)), Some(FinishReason::Cancelled), "in a step");
    assert_eq!(bench.stats().blocks_retiring, 1);
    bench.step(A);
    assert_eq!(bench.stats().blocks_free, 8, "free when the step is back");
    assert_eq!(bench.told(running), [], "and no token after its end");

    let (parked, parked_seq) = bench.accepted(&want);
    bench.step(A);
    assert_eq!(bench.stats().parked, 1);
    let (other, other_seq) = bench.accepted(&want);
    bench.credit(parked_seq, 1);
    assert_eq!(bench.stats().waiting, 1);
    bench.cancel(parked_seq);
    assert_eq!(finish_of(&bench.told(parked)), Some(FinishReason::Cancelled), "waiting");
    bench.step(A);
    assert_eq!(bench.stats().parked, 1);
    bench.cancel(other_seq);
    assert_eq!(finish_of(&bench.told(other)), Some(FinishReason::Cancelled), "parked");
    assert_eq!(bench.stats().blocks_free, 8);
    assert_eq!(bench.stats().queued_tokens, 0);
}

#[test]
fn decode_rows_come_first_and_prefill_takes_what_is_left_of_the_step() {
    let limits = Limits { step_tokens_max: 20, chunk_tokens_max: 16, running_max: 3, ..tiny() };
    let mut bench = Bench::new(&limits, 16);
    let want = Want { max_tokens: 20, ..Want::default() };
    bench.accepted(&want);
    bench.accepted(&want);
    bench.step(A);
    bench.step(A);
    bench.accepted(&Want { prompt: 50, ..Want::default() });
    bench.step(A);
    let mut chunks = Vec::new();
    for _ in 0..4 {
        let rows = bench.step(A);
        assert_eq!(rows.len(), 3);
        assert!(rows[..2].iter().all(|row| row.token_count == 1 && row.sample));
        chunks.push((rows[2].position, rows[2].token_count, rows[2].sample));
    }
    assert_eq!(chunks, [(0, 16, false), (16, 16, false), (32, 16, false), (48, 2, true)]);
}

/// Runs one step that takes as long as the engine expects.
fn step_as_expected(bench: &mut Bench) -> Vec<PlanRow> {
    bench.settle();
    let mut step = bench.take_step().expect("a step is at the device");
    bench::sample(&mut step, |_| A);
    step.result.elapsed_ns = bench.engine.pace().predict_ns(plan::load(&step.plan));
    let rows = step.plan.rows.clone();
    bench.give_step(step);
    rows
}

#[test]
fn a_step_in_which_somebody_decodes_takes_the_prefill_that_ends_within_its_target() {
    let limits =
        Limits { step_tokens_max: 400, chunk_tokens_max: 400, step_target_ms: 50, ..tiny() };
    let mut bench = Bench::new(&limits, 16);
    let prompt = Want { prompt: 300, max_tokens: 40, window: 8, ..Want::default() };
    bench.accepted(&prompt);
    assert_eq!(
        step_as_expected(&mut bench)[0].token_count,
        300,
        "nobody decodes: the chunk is whole"
    );
    bench.accepted(&prompt);
    step_as_expected(&mut bench);
    let rows = step_as_expected(&mut bench);
    assert_eq!((rows.len(), rows[0].token_count), (2, 1));
    let pace = bench.engine.pace();
    let load = |tokens| StepLoad::default().plus_decode(rows[0].position).plus_prefill(0, tokens);
    let target_ns = 50_000_000;
    let chunk = rows[1].token_count;
    assert!(chunk > PREFILL_TOKENS_MIN, "{chunk}");
    assert!(pace.predict_ns(load(chunk)) <= target_ns, "{chunk}");
    assert!(pace.predict_ns(load(chunk + 8)) > target_ns, "{chunk}");
}

/// What a small model costs on a few CPUs: a chunk of 512 tokens takes 0.2 seconds.
const SMALL_CPU: StepCost = StepCost {
    step_ps: 8_000_000_000,
    prefill_token_ps: 370_000_000,
    decode_row_ps: 1_000_000_000,
    kv_position_ps: 20_000,
};

/// Eight streams that ask for 64 tokens after a prompt of 512, again and again, for so many
/// requests in all. Returns the times between two tokens of a stream in nanoseconds, shortest
/// first, without those of each stream's first request, and the time that all of it took.
fn closed_loop(step_target_ms: u64, requests: usize) -> (Vec<u64>, u64) {
    let limits = Limits { running_max: 8, step_target_ms, ..Limits::default() };
    let (mut bench, device) = (Bench::new(&limits, 100), StepTimeModel::new(SMALL_CPU));
    let want = Want { prompt: 512, max_tokens: 64, window: 64, ..Want::default() };
    let mut streams: Vec<_> = (0..8).map(|_| (bench.accepted(&want).0, None)).collect();
    let (mut gaps, mut asked) = (Vec::new(), streams.len());
    let begin = bench.now;
    while let Some(mut step) = bench.take_step() {
        bench::sample(&mut step, |_| A);
        step.result.elapsed_ns = device.predict_ns(plan::load(&step.plan));
        // A millisecond passes with every step that is given back.
        bench.now = bench.now.plus_ns(step.result.elapsed_ns - 1_000_000);
        bench.give_step(step);
        for (stream, last) in &mut streams {
            for told in bench.told(*stream) {
                match told {
                    Told::Tokens(..) => {
                        let since = last.replace(bench.now);
                        let since = since.filter(|_| stream.slot >= 8);
                        gaps.extend(since.map(|since| bench.now.ns_since(since)));
                    }
                    Told::Done(..) if asked < requests => {
                        asked += 1;
                        (*stream, *last) = (bench.accepted(&want).0, None);
                    }
                    Told::Done(..) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
        bench.settle();
    }
    gaps.sort_unstable();
    (gaps, bench.now.ns_since(begin))
}

#[test]
fn with_a_target_long_prompts_hold_up_no_stream_beyond_it_and_cost_little_throughput() {
    let (requests, unbounded_ms) = (64, 1_000_000);
    let (whole, whole_ns) = closed_loop(unbounded_ms, requests);
    let (cut, cut_ns) = closed_loop(50, requests);
    let [p50, p99] = [50, 99].map(|percent| move |gaps: &[u64]| gaps[gaps.len() * percent / 100]);
    for (name, gaps, ns) in [("whole chunks", &whole, whole_ns), ("50 ms", &cut, cut_ns)] {
        let per_second = requests as u64 * 64 * 1_000_000_000 / ns;
        println!("{name}: p50 {} p99 {} ns, {per_second} tokens/s", p50(gaps), p99(gaps));
    }
    assert_eq!(whole.len(), cut.len());
    assert!(*whole.last().unwrap() > 200_000_000, "somebody waits for a whole chunk");
    // The model is learnt from these very steps: it may be off by a little.
    assert!(*cut.last().unwrap() < 52_000_000, "{:?}", cut.last());
    assert!(cut_ns < whole_ns * 5 / 4, "{cut_ns} ns instead of {whole_ns}");
}

#[test]
fn a_target_that_cannot_be_met_slows_prompts_and_stops_none() {
    let limits = Limits { step_target_ms: 1, ..tiny() };
    let mut bench = Bench::new(&limits, 16);
    bench.accepted(&Want { max_tokens: 40, window: 8, ..Want::default() });
    step_as_expected(&mut bench);
    bench.accepted(&Want { prompt: 40, ..Want::default() });
    bench.accepted(&Want { prompt: 40, ..Want::default() });
    step_as_expected(&mut bench);
    let mut chunks = Vec::new();
    for _ in 0..4 {
        let rows = step_as_expected(&mut bench);
        assert_eq!(rows[0].token_count, 1);
        let chunk = rows.iter().find(|row| row.token_count > 1);
        chunks.extend(chunk.map(|row| (row.position, row.token_count, row.sample)));
    }
    let (first, last) = ((0, 16, false), (32, 8, true));
    assert_eq!(chunks, [first, (16, 16, false), last, first], "one prompt after the other");
}

#[test]
fn the_more_urgent_class_is_admitted_first_and_within_it_who_asked_first() {
    let limits = Limits { running_max: 1, parked_max: 0, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    let want = |class| Want { class, max_tokens: 1, ..Want::default() };
    bench.accepted(&Want { max_tokens: 2, ..Want::default() });
    let (bulk, _) = bench.accepted(&want(Class::Bulk));
    let (late, late_seq) = bench.granted(&want(Class::Default));
    let (later, _) = bench.accepted(&want(Class::Default));
    bench.submit(late, late_seq, &want(Class::Default));
    bench.settle();
    assert_eq!(bench.told(late), [Told::Accepted(0)], "its ask came first");
    let (urgent, _) = bench.accepted(&want(Class::Interactive));
    bench.step(A);
    bench.step(A);
    for stream in [urgent, late, later, bulk] {
        assert_eq!(bench.told(stream), []);
        bench.step(A);
        assert_eq!(finish_of(&bench.told(stream)), Some(FinishReason::MaxTokens));
    }
}

#[test]
fn a_full_queue_refuses_with_a_time_and_an_impossible_request_without() {
    let limits = Limits { running_max: 1, parked_max: 0, queued_requests_max: 2, ..tiny() };
    let mut bench = Bench::new(&limits, 4);
    bench.accepted(&Want { max_tokens: 9, ..Want::default() });
    bench.accepted(&Want::default());
    bench.accepted(&Want::default());
    let refused = bench.ask(&Want::default());
    bench.settle();
    let told = bench.told(refused);
    assert!(matches!(told[..], [Told::Reject(RejectReason::QueueFull, Some(1..))]), "{told:?}");

    let mut bench = Bench::new(&limits, 4);
    assert_eq!(bench.context, 256, "four blocks are all there is");
    let (stream, seq) = bench.granted(&Want { prompt: 256, ..Want::default() });
    bench.submit(stream, seq, &Want { prompt: 256, max_tokens: 1, ..Want::default() });
    bench.settle();
    assert_eq!(bench.told(stream), [Told::Reject(RejectReason::ExceedsCapacity, None)]);
    let (stream, _) = bench.accepted(&Want { prompt: 255, max_tokens: 0, ..Want::default() });
    bench.steps(A, 20);
    assert_eq!(finish_of(&bench.told(stream)), Some(FinishReason::ContextFull));
}

#[test]
fn the_time_to_come_back_grows_with_each_refusal_and_follows_the_drain() {
    let limits = Limits { running_max: 1, parked_max: 0, queued_requests_max: 2, ..tiny() };
    let mut bench = Bench::new(&limits, 4);
    let want = Want { max_tokens: 5, ..Want::default() };
    // Each answer takes five steps of a millisecond, and there is always somebody waiting.
    for _ in 0..12 {
        bench.accepted(&want);
        while bench.stats().queued == [0, 0, 2, 0] {
            bench.step(A);
        }
    }
    bench.accepted(&want);
    let mut retries = Vec::new();
    for _ in 0..3 {
        let stream = bench.ask(&want);
        bench.settle();
        match bench.told(stream)[..] {
            [Told::Reject(RejectReason::QueueFull, Some(ms))] => retries.push(ms),
            ref told => panic!("{told:?}"),
        }
    }
    // A quarter of a share is left for others.
    assert_eq!(retries, [5, 12, 18], "each is promised a place of its own");
}

#[test]
fn a_server_that_drains_or_has_lost_its_device_says_so_at_the_gate() {
    let mut bench = Bench::new(&tiny(), 8);
    bench.accepted(&Want::default());
    let step = bench.take_step().unwrap();
    bench.fail(step, StepFailure::DeviceLost);
    let told = bench.fronts[0].gate.refuse(Class::System);
    assert_eq!(told, Some((RejectReason::NoCapacity, None)));
    bench.engine.begin_drain(bench.now, bench.now.plus_ms(10));
    bench.settle();
    let told = bench.fronts[0].gate.refuse(Class::Bulk);
    assert_eq!(told, Some((RejectReason::ShuttingDown, None)));
}

#[test]
fn who_waits_too_long_is_evicted_and_who_is_admitted_is_not() {
    let limits = Limits { running_max: 1, parked_max: 0, ..tiny() };
    let mut bench = Bench::new(&limits, 4);
    let (running, _) = bench.accepted(&Want { max_tokens: 3, ..Want::default() });
    let (queued, _) = bench.accepted(&Want::default());
    let (granted, _) = bench.granted(&Want::default());
    bench.pass_ms(limits.queue_ttl_ms + 1);
    for stream in [queued, granted] {
        let told = bench.told(stream);
        assert!(matches!(told[..], [Told::Reject(RejectReason::QueueTtlExpired, _)]), "{told:?}");
    }
    assert_eq!(bench.told(running), []);
    bench.steps(A, 9);
    assert_eq!(finish_of(&bench.told(running)), Some(FinishReason::MaxTokens));
}

#[test]
fn a_deadline_ends_a_request_wherever_it_is() {
    let limits = Limits { running_max: 1, parked_max: 1, ..tiny() };
    let mut bench = Bench::new(&limits, 4);
    let deadline = Some(bench.now.plus_ms(100));
    let want = Want { deadline, max_tokens: 50, window: 8, ..Want::default() };
    let (running, _) = bench.accepted(&want);
    let (queued, _) = bench.accepted(&want);
    assert_eq!(bench.engine.next_timeout(), deadline);
    bench.step(A);
    bench.pass_ms(100);
    assert_eq!(bench.told(queued), [Told::Reject(RejectReason::DeadlineExpired, None)]);
    assert_eq!(finish_of(&bench.told(running)), Some(FinishReason::Deadline));
    let late = bench.ask(&want);
    bench.settle();
    assert_eq!(bench.told(late), [Told::Reject(RejectReason::DeadlineExpired, None)]);
}

#[test]
fn a_deadline_that_the_queue_cannot_meet_is_refused_at_the_door() {
    let limits = Limits { running_max: 1, parked_max: 0, queued_requests_max: 4, ..tiny() };
    let mut bench = Bench::new(&limits, 4);
    let want = Want { max_tokens: 5, ..Want::default() };
    for _ in 0..12 {
        bench.accepted(&want);
        while bench.stats().queued == [0, 0, 2, 0] {
            bench.step(A);
        }
    }
    bench.accepted(&want);
    let soon = Want { deadline: Some(bench.now.plus_ms(4)), ..want.clone() };
    let later = Want { deadline: Some(bench.now.plus_ms(60)), ..want };
    let (soon, later) = (bench.ask(&soon), bench.ask(&later));
    bench.settle();
    let told = bench.told(soon);
    assert!(matches!(told[..], [Told::Reject(RejectReason::DeadlineUnattainable, Some(_))]));
    assert!(matches!(bench.told(later)[..], [Told::Grant(_)]));
}

#[test]
fn a_stalled_client_is_cancelled_and_its_blocks_return_while_others_go_on() {
    let limits = Limits { stall_timeout_ms: 50, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    let (stalled, _) = bench.accepted(&Want { window: 1, max_tokens: 9, ..Want::default() });
    let (other, seq) = bench.accepted(&Want { window: 8, max_tokens: 200, ..Want::default() });
    for _ in 0..60 {
        bench.credit(seq, 1);
        bench.step(A);
    }
    let told = bench.told(stalled);
    assert_eq!(finish_of(&told), Some(FinishReason::Stalled));
    assert_eq!(text_of(&told), "a");
    assert_eq!(text_of(&bench.told(other)).len(), 59, "it had a step in each round but the first");
    assert_eq!(bench.stats().blocks_total - bench.stats().blocks_free, 1);
}

#[test]
fn a_front_core_that_is_slow_to_take_its_batches_stalls_nobody() {
    let limits = Limits { stall_timeout_ms: 50, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    let (stream, seq) = bench.accepted(&Want { window: 2, max_tokens: 3, ..Want::default() });
    // The front core takes nothing, so batches run out: the pause cannot be told.
    for _ in 0..EVENT_BATCHES {
        let ask = expired_ask(&bench);
        bench.fronts[0].requests.send(ask).unwrap();
        while bench.engine.tick(bench.now) {}
    }
    assert_eq!(bench.engine.census().batches_idle, [0]);
    for _ in 0..2 {
        let mut step = bench.take_step().expect("a step");
        step.result.sampled.push(forebay::message::Sampled {
            seq,
            token: A,
            logprob: 0.0,
            top_count: 0,
        });
        assert!(bench.device.results.push(step).is_ok());
        while bench.engine.tick(bench.now) {}
    }
    assert_eq!(bench.stats().parked, 1);
    bench.now = bench.now.plus_ms(1_000);
    while bench.engine.tick(bench.now) {}
    assert_eq!(bench.stats().parked, 1, "nobody told the client, so it is not to blame");
    bench.receive();
    bench.settle();
    assert_eq!(bench.told(stream).last(), Some(&Told::Paused));
    bench.pass_ms(49);
    assert_eq!(bench.stats().parked, 1);
    bench.pass_ms(1);
    assert_eq!(finish_of(&bench.told(stream)), Some(FinishReason::Stalled));
}

/// Refused at once, and so good for a batch.
fn expired_ask(bench: &Bench) -> forebay::message::RequestMessage {
    forebay::message::RequestMessage::Ask(forebay::message::Ask {
        stream: forebay::message::StreamKey { front: 0, slot: 99, generation: 0 },
        class: Class::Bulk,
        tenant: forebay::request::Name::EMPTY,
        user: forebay::request::Name::EMPTY,
        input_bytes: 1,
        input_tokens: 1,
        max_tokens: 1,
        deadline: Some(bench.now),
        window_tokens: 1,
    })
}

#[test]
fn the_youngest_is_preempted_when_blocks_run_out_and_gives_the_same_text_afterwards() {
    let limits = Limits { stream_window_tokens_max: 400, running_max: 2, ..tiny() };
    let mut bench = Bench::new(&limits, 2);
    let want = Want { prompt: 60, max_tokens: 60, window: 200, ..Want::default() };
    let (old, old_seq) = bench.accepted(&want);
    let (young, _) = bench.accepted(&Want { prompt: 4, ..want });
    let mut preempted_at = None;
    for at in 0..2_000 {
        bench.settle();
        let Some(step) = bench.take_step() else { break };
        // What the model says depends on the position alone.
        bench.finish(step, |row| 1 + (row.position + row.token_count) % 100);
        if bench.stats().counters.preemptions == 1 && preempted_at.is_none() {
            preempted_at = Some(at);
            let running = bench.engine.pending().find(|one| one.state == "running").unwrap();
            assert_eq!(running.seq, old_seq, "the oldest goes on");
        }
    }
    assert!(preempted_at.is_some());
    for (stream, prompt) in [(old, 60), (young, 4)] {
        let told = bench.told(stream);
        assert_eq!(finish_of(&told), Some(FinishReason::MaxTokens));
        let said = (0..60).map(|n| char::from((1 + (prompt + n) % 100) as u8));
        assert_eq!(text_of(&told), said.collect::<String>());
    }
    assert_eq!(bench.stats().blocks_free, 2);
}

#[test]
fn who_was_preempted_twice_comes_back_with_its_remainder_reserved_and_stays() {
    let limits = Limits {
        stream_window_tokens_max: 512,
        step_tokens_max: 300,
        chunk_tokens_max: 200,
        ..tiny()
    };
    let mut bench = Bench::new(&limits, 4);
    let want = |prompt, max_tokens| Want { prompt, max_tokens, window: 512, ..Want::default() };
    // One, two and one block: all there are. The first wants its second at 65 tokens and ends with
    // 70. The second wants its third at 129 tokens. The third has to make room both times.
    let wants = [want(60, 10), want(109, 40), want(60, 100)];
    let granted: Vec<_> = wants.iter().map(|want| bench.granted(want)).collect();
    for ((stream, seq), want) in granted.iter().zip(&wants) {
        bench.submit(*stream, *seq, want);
    }
    let (young, young_seq) = granted[2];
    let mut history = Vec::new();
    for _ in 0..300 {
        bench.settle();
        let young = bench.engine.pending().find(|one| one.seq == young_seq);
        if let Some(now) = young.map(|one| (one.state, one.preemptions, one.blocks))
            && history.last() != Some(&now)
        {
            history.push(now);
        }
        let Some(step) = bench.take_step() else { break };
        bench.finish(step, |_| A);
    }
    assert_eq!(
        history,
        [
            ("running", 0, 1),
            ("waiting", 1, 0),
            ("running", 1, 2),
            ("waiting", 2, 0),
            ("running", 2, 3),
        ]
    );
    assert_eq!(finish_of(&bench.told(young)), Some(FinishReason::MaxTokens));
    assert_eq!(bench.stats().counters.reservations, 1);
}

#[test]
fn an_omitted_output_limit_reserves_nothing() {
    let limits = Limits { context_max: 512, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    for _ in 0..3 {
        bench.accepted(&Want { max_tokens: 0, ..Want::default() });
    }
    bench.step(A);
    assert_eq!(bench.stats().running, 3, "the pool could hold one of them to its end");
}

#[test]
fn a_reader_of_one_token_at_a_time_beside_a_full_pool_does_not_make_the_device_run_in_circles() {
    let limits = Limits { running_max: 2, stall_timeout_ms: 1_000_000, ..tiny() };
    let mut bench = Bench::new(&limits, 3);
    // Two of 70 positions: two blocks each, and three there are.
    let want = Want { prompt: 70, max_tokens: 40, window: 1, ..Want::default() };
    let both = [bench.accepted(&want), bench.accepted(&want)];
    for _ in 0..2_000 {
        for (_, seq) in both {
            if bench.engine.pending().any(|one| one.seq == seq && one.credit == 0) {
                bench.credit(seq, 1);
            }
        }
        bench.settle();
        if let Some(step) = bench.take_step() {
            bench.finish(step, |_| A);
        } else {
            bench.pass_ms(1);
        }
    }
    for (stream, _) in both {
        assert_eq!(finish_of(&bench.told(stream)), Some(FinishReason::MaxTokens));
    }
    let recomputed = bench.stats().counters.recomputed_tokens;
    assert!(recomputed < 3 * 110, "{recomputed} tokens were computed again");
}

#[test]
fn without_a_batch_to_send_output_waits_in_the_sequence_and_comes_complete_and_in_order() {
    let limits = Limits { stream_window_tokens_max: 100, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    let want = Want { max_tokens: 60, window: 100, stop: vec!["!!"], ..Want::default() };
    let (stream, seq) = bench.accepted(&want);
    let mut held = Vec::new();
    for n in 0..60 {
        while bench.engine.tick(bench.now) {}
        bench.engine.check_invariants().unwrap();
        held.extend(std::iter::from_fn(|| bench.fronts[0].events.pop()));
        let mut step = bench.take_step().expect("nobody is held up by its front core");
        let sampled = forebay::message::Sampled { seq, token: 1 + n, logprob: 0.0, top_count: 0 };
        step.result.sampled.push(sampled);
        assert!(bench.device.results.push(step).is_ok());
    }
    assert!(held.len() <= EVENT_BATCHES);
    held.iter().for_each(|batch| bench.take_in(batch));
    for batch in held {
        bench.control(ControlMessage::Return(batch));
    }
    bench.settle();
    let told = bench.told(stream);
    let ids: Vec<TokenId> = told
        .iter()
        .flat_map(|told| match told {
            Told::Tokens(ids, text) => {
                assert!(text.len() <= ids.len(), "text never runs ahead of its tokens");
                ids.clone()
            }
            _ => vec![],
        })
        .collect();
    assert_eq!(ids, (1..=60).collect::<Vec<_>>());
    assert_eq!(text_of(&told), (1..=60).map(char::from).collect::<String>());
    assert_eq!(finish_of(&told), Some(FinishReason::MaxTokens));
}

#[test]
fn a_drain_refuses_at_once_lets_the_admitted_finish_and_ends_the_rest_in_time() {
    let limits = Limits { running_max: 2, parked_max: 0, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    let (short, _) = bench.accepted(&Want { max_tokens: 2, ..Want::default() });
    let (long, _) = bench.accepted(&Want { max_tokens: 400, window: 8, ..Want::default() });
    bench.step(A);
    let (queued, _) = bench.accepted(&Want::default());
    let (granted, _) = bench.granted(&Want::default());
    bench.engine.begin_drain(bench.now, bench.now.plus_ms(100));
    bench.settle();
    let new = bench.ask(&Want::default());
    bench.settle();
    for stream in [queued, granted, new] {
        assert_eq!(bench.told(stream), [Told::Reject(RejectReason::ShuttingDown, None)]);
    }
    bench.steps(A, 4);
    assert_eq!(finish_of(&bench.told(short)), Some(FinishReason::MaxTokens));
    assert!(!bench.engine.is_drained());
    bench.pass_ms(100);
    assert_eq!(finish_of(&bench.told(long)), Some(FinishReason::ShuttingDown));
    bench.steps(A, 2);
    assert!(bench.engine.is_drained());
    assert_eq!(bench.engine.next_timeout(), None);
    assert_eq!(bench.stats().blocks_free, 8);
}

#[test]
fn a_lost_device_ends_everything_honestly_and_leaves_nothing_to_wake_up_for() {
    let limits = Limits { running_max: 1, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    let (running, _) = bench.accepted(&Want::default());
    let (queued, _) = bench.accepted(&Want::default());
    let step = bench.take_step().unwrap();
    bench.fail(step, StepFailure::DeviceLost);
    assert_eq!(finish_of(&bench.told(running)), Some(FinishReason::DeviceFailed));
    assert_eq!(bench.told(queued), [Told::Reject(RejectReason::NoCapacity, None)]);
    let new = bench.ask(&Want::default());
    bench.settle();
    assert_eq!(bench.told(new), [Told::Reject(RejectReason::NoCapacity, None)]);
    assert_eq!(bench.engine.next_timeout(), None);
    assert!(bench.engine.device_lost());
}

#[test]
fn a_device_core_that_goes_away_is_a_lost_device() {
    let mut bench = Bench::new(&tiny(), 8);
    let (stream, _) = bench.accepted(&Want::default());
    let (port, device) = forebay::ports::connect_device(
        1,
        &forebay::ring::Doorbell::new(),
        &forebay::ring::Doorbell::new(),
    );
    drop(port);
    drop(std::mem::replace(&mut bench.device, device));
    bench.settle();
    assert_eq!(finish_of(&bench.told(stream)), Some(FinishReason::DeviceFailed));
}

#[test]
fn a_step_that_fails_ends_its_own_sequences_and_no_others() {
    let limits = Limits { running_max: 1, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    let (failed, _) = bench.accepted(&Want::default());
    let (queued, _) = bench.accepted(&Want::default());
    let step = bench.take_step().unwrap();
    bench.fail(step, StepFailure::InvalidPlan);
    assert_eq!(finish_of(&bench.told(failed)), Some(FinishReason::DeviceFailed));
    bench.steps(A, 9);
    assert_eq!(finish_of(&bench.told(queued)), Some(FinishReason::MaxTokens));
    assert_eq!(bench.stats().counters.step_failures, 1);
}

#[test]
fn a_result_that_does_not_answer_its_plan_fails_like_a_step() {
    let spoil: [fn(&mut forebay::message::Step); 3] = [
        |step| step.result.sampled.clear(),
        |step| step.result.sampled[0].token = 256,
        |step| step.result.sampled[0].top_count = 1,
    ];
    for spoil in spoil {
        let mut bench = Bench::new(&tiny(), 8);
        let (stream, seq) = bench.accepted(&Want::default());
        let mut step = bench.take_step().unwrap();
        let sampled = forebay::message::Sampled { seq, token: A, logprob: 0.0, top_count: 0 };
        step.result.sampled.push(sampled);
        spoil(&mut step);
        bench.give_step(step);
        assert_eq!(finish_of(&bench.told(stream)), Some(FinishReason::DeviceFailed));
    }
}

#[test]
fn a_front_core_that_goes_away_takes_its_own_sequences_and_no_others() {
    let mut bench = Bench::with(&tiny(), 8, 1, 2);
    let (stays, _) = bench.accepted(&Want { max_tokens: 6, ..Want::default() });
    let want = Want::default();
    let goes = bench.ask_from(1, &want);
    bench.settle();
    let Told::Grant(seq) = bench.told(goes)[0] else { panic!("no grant") };
    bench.submit(goes, seq, &want);
    bench.settle();
    bench.fronts.pop();
    bench.steps(A, 9);
    assert_eq!(finish_of(&bench.told(stays)), Some(FinishReason::MaxTokens));
    assert_eq!(bench.engine.pending().count(), 0);
    assert_eq!(bench.stats().blocks_free, 8);
}

#[test]
fn messages_that_come_too_late_change_nothing() {
    let mut bench = Bench::new(&tiny(), 8);
    let want = Want::default();
    let (stream, seq) = bench.granted(&want);
    bench.cancel(seq);
    bench.submit(stream, seq, &want);
    bench.credit(seq, 3);
    bench.cancel(seq);
    assert_eq!(bench.told(stream).len(), 1);
    assert_eq!(bench.stats().counters.stale_messages, 3);
    assert_eq!(bench.engine.pending().count(), 0);
    // The slot is another's now; the old key does not reach it.
    let (_, new_seq) = bench.granted(&want);
    assert_eq!(new_seq.slot, seq.slot);
    bench.cancel(seq);
    assert_eq!(bench.engine.pending().count(), 1);
}

#[test]
fn a_submission_that_breaks_its_promise_is_refused() {
    let breaches: [fn(&mut forebay::message::Submission); 6] = [
        |submission| submission.tokens.clear(),
        |submission| submission.tokens[0] = 256,
        |submission| submission.tokens.push(1),
        |submission| submission.tokens.shrink_to_fit(),
        |submission| submission.max_tokens = 0,
        |submission| submission.stop = vec![[].into()],
    ];
    for breach in breaches {
        let mut bench = Bench::new(&tiny(), 8);
        let (stream, seq) = bench.granted(&Want::default());
        let mut submission = bench.submission(stream, seq, &Want::default());
        breach(&mut submission);
        let message = forebay::message::RequestMessage::Submit(submission);
        bench.fronts[0].requests.send(message).unwrap();
        bench.settle();
        assert_eq!(bench.told(stream), [Told::Reject(RejectReason::Invalid, None)]);
    }
}

#[test]
fn a_slot_that_changes_hands_is_told_the_history_that_penalties_need() {
    let limits = Limits { running_max: 1, ..tiny() };
    let mut bench = Bench::new(&limits, 8);
    let want = Want { window: 2, max_tokens: 9, penalties: true, ..Want::default() };
    let (_, seq) = bench.accepted(&want);
    bench.step(A);
    bench.step(A);
    bench.credit(seq, 2);
    let step = bench.take_step().unwrap();
    let setup = &step.plan.setups[0];
    assert_eq!((setup.history_count, setup.history_prompt_count), (6, 4));
    assert_eq!(step.plan.history, [1, 2, 3, 4, A, A]);
    bench.finish(step, |_| A);
    let step = bench.take_step().unwrap();
    assert!(step.plan.setups.is_empty(), "it knows by now");
    bench.finish(step, |_| A);
}

#[test]
fn an_engine_that_contradicts_itself_is_not_built() {
    use forebay::engine::{ConfigError, EngineConfig};
    let config = |limits: Limits| EngineConfig { limits, kv_blocks: 8, vocab: 256, depth: 1 };
    assert_eq!(config(tiny()).check(), Ok(()));
    assert_eq!(config(Limits::default()).check(), Ok(()));
    assert_eq!(
        config(Limits { running_max: 97, ..tiny() }).check(),
        Err(ConfigError::StepTooSmall { step_tokens_max: 96, running_max: 97 })
    );
    assert_eq!(
        config(Limits { queued_tokens_max: 511, ..tiny() }).check(),
        Err(ConfigError::QueueTooSmall { queued_tokens_max: 511, context_max: 512 })
    );
    assert_eq!(
        EngineConfig { kv_blocks: 0, ..config(tiny()) }.check(),
        Err(ConfigError::Zero("kv_blocks"))
    );
}

#[test]
fn nothing_to_do_means_no_wake_up() {
    let mut bench = Bench::new(&tiny(), 8);
    assert!(!bench.engine.tick(bench.now));
    assert_eq!(bench.engine.next_timeout(), None);
    assert_eq!(bench.now, Instant::ZERO.plus_ms(1));
}
