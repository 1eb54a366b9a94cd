//! Cancels, disconnects and drains, in every state a request can be in.

use forebay::request::{FinishReason, RejectReason};

use crate::rig::{
    FLAVOURS, Rig, collect, collect_into, exactly, stat, take_first_tokens, wait_for_stat,
    wait_until,
};

#[test]
fn a_cancel_in_any_state_ends_the_stream_and_frees_its_blocks() {
    for flavour in FLAVOURS {
        let rig = Rig::start_with(flavour, |config| config.limits.running_max = 1);
        let client = rig.connect();
        // Before anything: cancelled in the same breath as it is asked.
        let hasty = client.request(exactly("Hasty", 50)).unwrap();
        hasty.cancel();
        // Running, and behind it one that is queued.
        let mut running = client.request(exactly("Running", 2_000)).unwrap();
        let head = take_first_tokens(&mut running);
        let queued = client.request(exactly("Queued", 50)).unwrap();
        wait_for_stat(&client, "engine_queued_default", 1);
        queued.cancel();
        assert_eq!(collect(queued).done().finish, FinishReason::Cancelled);
        running.cancel();
        assert_eq!(collect_into(running, head).done().finish, FinishReason::Cancelled);
        // In its prefill, most likely: the prompt takes many steps.
        let before = stat(&client, "engine_admitted");
        let prefilling = client.request(exactly(&"so on and ".repeat(1_500), 5)).unwrap();
        wait_until(&client, "the prefill has begun", |stats| {
            stats.iter().any(|(name, value)| name == "engine_admitted" && *value > before)
        });
        prefilling.cancel();
        assert_eq!(collect(prefilling).done().finish, FinishReason::Cancelled);
        // Parked.
        let mut request = exactly("Parked", 100);
        request.window_tokens = 4;
        let parked = client.request(request).unwrap();
        wait_for_stat(&client, "engine_parked", 1);
        parked.cancel();
        assert_eq!(collect(parked).done().finish, FinishReason::Cancelled);
        drop(hasty);
        rig.wait_until_idle();
    }
}

#[test]
fn a_disconnect_in_any_state_frees_everything_and_disturbs_nobody() {
    for flavour in FLAVOURS {
        let rig = Rig::start_with(flavour, |config| config.limits.running_max = 2);
        let watcher = rig.connect();
        let mut other = watcher.request(exactly("Undisturbed", 600)).unwrap();
        let head = take_first_tokens(&mut other);

        let asked = rig.connect();
        let hasty = asked.request(exactly("Gone at once", 50)).unwrap();
        drop((hasty, asked));

        let streaming = rig.connect();
        let mut running = streaming.request(exactly("Gone while running", 2_000)).unwrap();
        take_first_tokens(&mut running);
        let waiting = rig.connect();
        let queued = waiting.request(exactly("Gone while queued", 50)).unwrap();
        wait_for_stat(&watcher, "engine_queued_default", 1);
        drop((queued, waiting));
        wait_for_stat(&watcher, "engine_queued_default", 0);
        drop((running, streaming));
        wait_for_stat(&watcher, "engine_running", 1);

        let reading = rig.connect();
        let before = stat(&watcher, "engine_admitted");
        let prefilling = reading.request(exactly(&"so on and ".repeat(1_500), 5)).unwrap();
        wait_until(&watcher, "the prefill has begun", |stats| {
            stats.iter().any(|(name, value)| name == "engine_admitted" && *value > before)
        });
        drop((prefilling, reading));

        let stalling = rig.connect();
        let mut request = exactly("Gone while parked", 100);
        request.window_tokens = 4;
        let parked = stalling.request(request).unwrap();
        wait_for_stat(&watcher, "engine_parked", 1);
        drop((parked, stalling));
        wait_for_stat(&watcher, "engine_parked", 0);

        assert_eq!(collect_into(other, head).ids.len(), 600);
        rig.wait_until_idle();
    }
}

#[test]
fn a_drain_lets_the_admitted_finish_and_refuses_the_rest() {
    for flavour in FLAVOURS {
        let rig = Rig::start_with(flavour, |config| config.limits.running_max = 1);
        let client = rig.connect();
        let mut running = client.request(exactly("To be finished", 300)).unwrap();
        let head = take_first_tokens(&mut running);
        let queued = client.request(exactly("Never admitted", 50)).unwrap();
        wait_for_stat(&client, "engine_queued_default", 1);
        rig.server().drain(forebay::runtime::now().plus_ms(60_000));
        assert_eq!(collect(queued).rejection().reason, RejectReason::ShuttingDown);
        assert_eq!(collect_into(running, head).done().usage.output_tokens, 300);
        rig.end();
    }
}

#[test]
fn the_end_of_the_drain_cancels_what_is_left_and_says_so() {
    let rig = Rig::start(FLAVOURS[0]);
    let client = rig.connect();
    let mut running = client.request(exactly("Too long for the drain", 6_000)).unwrap();
    let head = take_first_tokens(&mut running);
    rig.server().drain(forebay::runtime::now());
    assert_eq!(collect_into(running, head).done().finish, FinishReason::ShuttingDown);
    rig.end();
}

#[test]
fn a_deadline_ends_a_running_request() {
    let rig = Rig::start(FLAVOURS[0]);
    let client = rig.connect();
    let mut request = exactly("Until the bell rings", 7_000);
    request.deadline_ms = Some(300);
    let answer = collect(client.request(request).unwrap());
    assert_eq!(answer.done().finish, FinishReason::Deadline);
    rig.wait_until_idle();
}
