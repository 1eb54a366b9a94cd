//! Who does not read is stopped, alone; what does not fit is refused, at once.

use forebay::request::{Class, FinishReason, Name, RejectReason};
use forebay::runtime::Flavour;

use crate::rig::{
    Answer, FLAVOURS, Rig, ask, collect, collect_into, exactly, stat, take_first_tokens,
    wait_for_stat,
};

#[test]
fn a_stalled_reader_parks_its_own_stream_and_loses_nothing_of_it() {
    for flavour in FLAVOURS {
        stalled_reader(flavour);
    }
}

fn stalled_reader(flavour: Flavour) {
    const WINDOW: u32 = 32;
    let rig = Rig::start(flavour);
    let client = rig.connect();
    let unhindered = ask(&client, exactly("Slowly the barge went down", 4 * WINDOW));
    let mut request = exactly("Slowly the barge went down", 4 * WINDOW);
    request.window_tokens = WINDOW;
    // Its events are not taken: the client library gives no credit back.
    let stalled = client.request(request).unwrap();
    wait_for_stat(&client, "engine_parked", 1);
    let before = stat(&client, "engine_tokens_out");
    for _ in 0..3 {
        ask(&client, exactly("Meanwhile", 20)).done();
    }
    // All that was produced meanwhile is the others': the stalled stream stands still.
    assert_eq!(stat(&client, "engine_tokens_out"), before + 3 * 20);
    assert_eq!(stat(&client, "engine_parked"), 1);
    assert_eq!(stat(&client, "engine_running"), 0);
    let answer = collect(stalled);
    assert!(answer.pauses >= 1, "{answer:?}");
    assert_eq!(answer.ids, unhindered.ids);
    assert_eq!(answer.text, unhindered.text);
    assert!(answer.done().timings.parked_ns > 0);
    rig.wait_until_idle();
}

#[test]
fn a_stream_that_stalls_too_long_is_cancelled_and_its_blocks_return() {
    let rig = Rig::start_with(FLAVOURS[0], |config| config.limits.stall_timeout_ms = 200);
    let client = rig.connect();
    let mut request = exactly("He stood and stared at", 200);
    request.window_tokens = 16;
    let stalled = client.request(request).unwrap();
    wait_for_stat(&client, "engine_parks", 1);
    rig.wait_until_idle();
    assert_eq!(collect(stalled).done().finish, FinishReason::Stalled);
}

#[test]
fn half_of_the_streams_stalled_leave_the_batch_to_the_other_half() {
    let rig = Rig::start_with(FLAVOURS[0], |config| config.limits.running_max = 8);
    let (slow, quick) = (rig.connect(), rig.connect());
    let stalled: Vec<_> = (0..8)
        .map(|_| {
            let mut request = exactly("The clerk wrote", 60);
            request.window_tokens = 8;
            slow.request(request).unwrap()
        })
        .collect();
    wait_for_stat(&quick, "engine_parked", 8);
    // All eight slots are free for these: none waits for a stalled one.
    let quick_ones: Vec<_> =
        (0..8).map(|_| quick.request(exactly("The clerk wrote", 60)).unwrap()).collect();
    let answers: Vec<Answer> = quick_ones.into_iter().map(collect).collect();
    assert_eq!(stat(&quick, "engine_parked"), 8);
    for generation in stalled {
        let answer = collect(generation);
        assert_eq!(answer.ids, answers[0].ids);
    }
    rig.wait_until_idle();
}

#[test]
fn a_burst_beyond_the_queue_is_refused_with_a_reason_and_the_rest_is_served() {
    for flavour in FLAVOURS {
        let rig = Rig::start_with(flavour, |config| {
            config.limits.queued_requests_max = 3;
            config.limits.running_max = 1;
        });
        let client = rig.connect();
        // Measured service time is what a time to come back is computed from.
        ask(&client, exactly("First", 4)).done();
        let mut first = client.request(exactly("A long one", 400)).unwrap();
        let head = take_first_tokens(&mut first);
        let burst: Vec<_> =
            (0..10).map(|_| client.request(exactly("A short one", 5)).unwrap()).collect();
        let answers: Vec<Answer> = {
            let mut answers: Vec<Option<Answer>> = burst.iter().map(|_| None).collect();
            let mut waiting: Vec<_> = burst.into_iter().enumerate().collect();
            // Refusals come while the queue is still blocked by the long one.
            let refused = waiting.split_off(3);
            for (at, generation) in refused {
                answers[at] = Some(collect(generation));
            }
            assert_eq!(collect_into(first, head).done().usage.output_tokens, 400);
            for (at, generation) in waiting {
                answers[at] = Some(collect(generation));
            }
            answers.into_iter().flatten().collect()
        };
        for served in &answers[..3] {
            assert_eq!(served.done().usage.output_tokens, 5);
        }
        for refused in &answers[3..] {
            assert_eq!(refused.rejection().reason, RejectReason::QueueFull);
            assert!(refused.rejection().retry_after_ms.is_some_and(|ms| ms > 0));
        }
        rig.wait_until_idle();
    }
}

#[test]
fn a_prompt_that_can_never_fit_is_refused_and_says_what_fits() {
    let rig = Rig::start_with(FLAVOURS[0], |config| config.limits.context_max = 256);
    let client = rig.connect();
    let answer = ask(&client, exactly(&"word ".repeat(300), 5));
    assert_eq!(answer.rejection().reason, RejectReason::ExceedsCapacity);
    assert_eq!(answer.rejection().retry_after_ms, None);
    assert!(answer.rejection().message.contains("256"), "{:?}", answer.rejection());
    // What fits is clamped to the context, not refused.
    let answer = ask(&client, exactly(&"word ".repeat(100), 5_000));
    let usage = answer.done().usage;
    assert_eq!(usage.prompt_tokens + usage.output_tokens, 256);
    rig.wait_until_idle();
}

#[test]
fn sequences_that_outgrow_the_kv_pool_are_computed_again_and_read_the_same() {
    // A block of this model takes 1.4 MiB: 24 MiB are 16 blocks, 1,024 positions for eight
    // sequences that want 300 each.
    let roomy = Rig::start(FLAVOURS[0]);
    let alone = ask(&roomy.connect(), exactly("The lighthouse keeper", 300));
    roomy.end();
    let rig = Rig::start_with(FLAVOURS[0], |config| config.kv.pool_bytes = Some(24 << 20));
    let client = rig.connect();
    let generations: Vec<_> =
        (0..8).map(|_| client.request(exactly("The lighthouse keeper", 300)).unwrap()).collect();
    for generation in generations {
        assert_eq!(collect(generation).ids, alone.ids);
    }
    assert!(stat(&client, "engine_preemptions") > 0, "the pool was large enough after all");
    rig.wait_until_idle();
}

#[test]
fn who_would_wait_too_long_for_the_first_token_is_told_at_once_and_bulk_waits() {
    let rig = Rig::start_with(FLAVOURS[0], |config| {
        config.limits.ttft_target_ms = 1;
        config.limits.running_max = 1;
    });
    let client = rig.connect();
    // An answer to learn from: what comes next would wait a hundred steps, many times what its
    // own prompt takes.
    ask(&client, exactly("First", 100)).done();
    let mut first = client.request(exactly("A long one", 200)).unwrap();
    let head = take_first_tokens(&mut first);
    let refused = ask(&client, exactly("Now", 5));
    let rejection = refused.rejection();
    assert_eq!(rejection.reason, RejectReason::TtftUnattainable);
    assert!(rejection.retry_after_ms.is_some_and(|ms| ms > 0));
    let mut bulk = exactly("Whenever", 5);
    bulk.class = Class::Bulk;
    assert_eq!(ask(&client, bulk).done().usage.output_tokens, 5);
    assert_eq!(collect_into(first, head).done().usage.output_tokens, 200);
}

#[test]
fn a_tenant_beyond_its_quota_is_refused_with_a_time_to_come_back_and_others_are_served() {
    for flavour in FLAVOURS {
        let rig = Rig::start_with(flavour, |config| {
            config.limits.quotas.tenant.requests_per_minute = 2;
        });
        let client = rig.connect();
        let by = |tenant| {
            let mut request = exactly("A short one", 3);
            request.tenant = Name::new(tenant).unwrap();
            ask(&client, request)
        };
        by("acme").done();
        by("acme").done();
        let refused = by("acme");
        assert_eq!(refused.rejection().reason, RejectReason::TenantRate);
        let retry_ms = refused.rejection().retry_after_ms.unwrap();
        assert!((1..=30_000).contains(&retry_ms), "{retry_ms}: two a minute");
        by("other").done();
        assert_eq!(stat(&client, "engine_rejected_tenant_rate"), 1);
        rig.wait_until_idle();
    }
}
