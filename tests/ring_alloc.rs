//! What the cores are built of takes its memory when it is made, and none afterwards.
#![cfg(all(feature = "core", not(loom)))]

#[path = "common/alloc.rs"]
mod alloc;

use std::panic::catch_unwind;
use std::task::{Context, Waker};
use std::time::Duration;

use alloc::assert_allocates_nothing;
use forebay::base::{FixedDeque, FixedVec, Instant, Prng, Slab};
use forebay::flow::{LoadEstimator, OutputForecast, StepCost, StepLoad, StepTimeModel, link};
use forebay::ring::{Doorbell, ring};

#[global_allocator]
static ALLOCATOR: alloc::CountingAllocator = alloc::CountingAllocator;

#[test]
fn the_counter_sees_this_threads_allocations_and_no_others() {
    let seen = catch_unwind(|| assert_allocates_nothing("a box", || Box::new(1)));
    assert!(seen.is_err(), "one allocation is enough");
    let before = alloc::counts();
    let mut list = Vec::<u8>::with_capacity(10);
    list.reserve_exact(1_000);
    let after = alloc::counts();
    assert_eq!(after.allocations - before.allocations, 2);
    assert_eq!(after.bytes - before.bytes, 1_010);

    let (mut producer, mut consumer) = ring::<u8>(1);
    let busy = std::thread::spawn(move || {
        let mut made = 0_usize;
        while !producer.is_abandoned() {
            made += std::hint::black_box(vec![0_u8; 100]).len();
            let _ = producer.push(1);
        }
        made
    });
    assert_allocates_nothing("waiting for another thread's allocations", || {
        while consumer.pop().is_none() {
            std::hint::spin_loop();
        }
    });
    drop(consumer);
    assert!(busy.join().unwrap() > 0);
}

#[test]
fn rings_links_and_bells_allocate_nothing_after_construction() {
    let (to_receiver, to_sender) = (Doorbell::new(), Doorbell::new());
    let (mut sender, mut receiver) = link("test", 5, to_receiver.clone(), to_sender.clone());
    let mut cx = Context::from_waker(Waker::noop());
    assert_allocates_nothing("a link", || {
        for round in 0..100_u64 {
            while sender.send([round; 8]).is_ok() {}
            assert!(to_receiver.poll_rung(&mut cx).is_ready());
            assert!(to_receiver.poll_rung(&mut cx).is_pending());
            while receiver.receive().is_some() {}
            receiver.give_back(receiver.held());
            assert!(to_sender.poll_rung(&mut cx).is_ready());
            sender.send_batch(&mut [[round; 8]; 3].into_iter());
            while receiver.receive().is_some() {
                receiver.give_back(1);
            }
        }
    });
    // A thread's handle is made when it is first asked for.
    to_sender.wait_thread(Some(Duration::ZERO));
    assert_allocates_nothing("a parked thread", || to_sender.wait_thread(Some(Duration::ZERO)));
}

#[test]
fn containers_allocate_nothing_after_construction() {
    let mut slab = Slab::new(20);
    let mut list = FixedVec::new(20);
    let mut queue = FixedDeque::new(20);
    let mut prng = Prng::new(1);
    assert_allocates_nothing("containers", || {
        for _ in 0..1_000 {
            if let Ok(key) = slab.insert(prng.next_u64()) {
                queue.push_back(key).unwrap();
            } else {
                slab.remove(queue.pop_front().unwrap());
            }
            if list.push(prng.next_u64()).is_err() {
                list.retain(|number| number % 2 == 0);
                prng.shuffle(&mut list);
            }
        }
    });
}

#[test]
fn estimators_allocate_nothing_after_construction() {
    let mut load = LoadEstimator::new(1_000_000_000);
    let mut forecast = OutputForecast::new(8);
    let cost = StepCost { step_ps: 1, prefill_token_ps: 1, decode_row_ps: 1, kv_position_ps: 1 };
    let mut model = StepTimeModel::new(cost);
    assert_allocates_nothing("estimators", || {
        for n in 0..1_000 {
            load.arrived(1, Instant::from_ns(n * 1_000_000));
            load.served(1, 900_000);
            load.left(5_000_000);
            forecast.observe(n % 20, n as u32);
            model.observe(StepLoad::default().plus_decode(n as u32), 1_000 * n);
        }
    });
    assert!(load.load(Instant::from_ns(1_000_000_000)).jobs_milli > 0);
}
