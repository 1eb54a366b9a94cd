//! Ring, doorbell and link between real threads. Loom proves the orders; this is for what loom
//! does not have: the machine's own reordering, parking, and the sanitizers.
#![cfg(all(feature = "core", not(loom)))]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use forebay::base::Prng;
use forebay::flow::{Census, SendError, link};
use forebay::ring::{Doorbell, PushError, ring};
use futures_lite::future::block_on;

/// Enough to fill and empty every ring here thousands of times, and yet a fraction of a second.
const ITEMS: usize = 50_000;

#[test]
fn items_arrive_whole_and_in_order_whatever_the_capacity() {
    for capacity in [1, 2, 3, 7, 64, 1000] {
        // A small ring changes threads for every few items, which on one CPU takes a switch each.
        let items = ITEMS.min(5_000 * capacity);
        let (mut producer, mut consumer) = ring(capacity);
        let pushing = thread::spawn(move || {
            let mut item = Box::new([0_usize; 4]);
            while item[0] < items {
                let next = Box::new([item[0] + 1; 4]);
                match producer.push(item) {
                    Ok(()) => item = next,
                    Err(PushError::Full(back)) => {
                        item = back;
                        thread::yield_now();
                    }
                    Err(PushError::Abandoned(_)) => panic!("the consumer is there"),
                }
            }
        });
        let mut expected = 0;
        while expected < items {
            match consumer.pop() {
                Some(item) => {
                    assert_eq!(*item, [expected; 4]);
                    expected += 1;
                }
                None => thread::yield_now(),
            }
        }
        pushing.join().unwrap();
        assert!(consumer.is_abandoned() && consumer.is_empty());
    }
}

#[test]
fn batches_of_random_sizes_arrive_whole_and_in_order() {
    let (mut producer, mut consumer) = ring(100);
    let pushing = thread::spawn(move || {
        let mut prng = Prng::new(1);
        let mut numbers = (0..ITEMS).map(|number| number.to_string()).peekable();
        while numbers.peek().is_some() {
            let size = prng.index(150);
            if producer.push_batch(&mut numbers.by_ref().take(size)) == 0 {
                thread::yield_now();
            }
        }
    });
    let mut prng = Prng::new(2);
    let mut expected = 0;
    while expected < ITEMS {
        let before = expected;
        for item in consumer.pop_batch(prng.index(150)) {
            assert_eq!(item, expected.to_string());
            expected += 1;
        }
        if expected == before {
            thread::yield_now();
        }
    }
    pushing.join().unwrap();
}

/// Counts how many of its kind are alive.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(alive: &Arc<AtomicUsize>) -> Counted {
        alive.fetch_add(1, Relaxed);
        Counted(alive.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[test]
fn ends_that_go_at_any_moment_leave_nothing_behind() {
    let mut prng = Prng::new(3);
    for _ in 0..500 {
        let alive = Arc::new(AtomicUsize::new(0));
        let (mut producer, mut consumer) = ring(prng.between(1, 8) as usize);
        let (to_push, to_pop) = (prng.index(40), prng.index(40));
        let pushing = {
            let alive = alive.clone();
            thread::spawn(move || {
                for _ in 0..to_push {
                    if let Err(PushError::Abandoned(_)) = producer.push(Counted::new(&alive)) {
                        break;
                    }
                }
            })
        };
        for _ in 0..to_pop {
            drop(consumer.pop());
        }
        drop(consumer);
        pushing.join().unwrap();
        assert_eq!(alive.load(Relaxed), 0);
    }
}

#[test]
fn many_ringers_never_leave_the_one_waiter_asleep() {
    const RINGERS: usize = 3;
    let bell = Doorbell::new();
    let mut consumers = Vec::new();
    let mut threads = Vec::new();
    for _ in 0..RINGERS {
        let (mut producer, consumer) = ring(4);
        consumers.push(consumer);
        let bell = bell.clone();
        threads.push(thread::spawn(move || {
            let mut item = 0;
            while item < ITEMS / 10 {
                if producer.push(item).is_ok() {
                    bell.ring();
                    item += 1;
                } else {
                    thread::yield_now();
                }
            }
        }));
    }
    let mut received = 0;
    let mut drain = || {
        let before = received;
        for consumer in &mut consumers {
            received += consumer.pop_batch(usize::MAX).count();
        }
        (received > before, received)
    };
    // The first half as a thread that parks, the second as a task: both kinds of waiter.
    while drain().1 < RINGERS * ITEMS / 20 {
        bell.wait_thread(None);
    }
    block_on(async {
        loop {
            match drain() {
                (_, received) if received == RINGERS * (ITEMS / 10) => break,
                (true, _) => {}
                (false, _) => bell.rung().await,
            }
        }
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_link_between_threads_loses_no_message_and_no_credit() {
    for capacity in [1, 2, 5, 64] {
        let (to_receiver, to_sender) = (Doorbell::new(), Doorbell::new());
        let (mut sender, mut receiver) =
            link("threads", capacity, to_receiver.clone(), to_sender.clone());
        let sending = thread::spawn(move || {
            let mut next = Box::new(0);
            while *next < ITEMS / 2 {
                let after = Box::new(*next + 1);
                match sender.send(next) {
                    Ok(()) => next = after,
                    Err(SendError::NoCredit(back)) => {
                        next = back;
                        to_sender.wait_thread(None);
                    }
                    Err(SendError::Gone(_)) => panic!("the receiver is there"),
                }
            }
            sender
        });
        let mut expected = 0;
        while expected < ITEMS / 2 {
            match receiver.receive() {
                Some(message) => {
                    assert_eq!(*message, expected);
                    expected += 1;
                    // Some are held for a while, as a queue would.
                    if expected % 3 == 0 || receiver.held() == capacity {
                        receiver.give_back(receiver.held());
                    }
                }
                None => {
                    receiver.give_back(receiver.held());
                    receiver.flush();
                    to_receiver.wait_thread(None);
                }
            }
        }
        let mut sender = sending.join().unwrap();
        let census = Census::of(&mut sender, &mut receiver);
        assert!(census.balances(), "{census:?}");
        receiver.give_back(receiver.held());
        receiver.flush();
        assert_eq!(sender.credits(), capacity);
    }
}
