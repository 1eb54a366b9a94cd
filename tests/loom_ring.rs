//! Ring, doorbell and link under loom: every order in which two or three threads can take turns,
//! and every value that a weakly ordered load may return, up to the bound on preemptions.
//!
//! Run with
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release \
//!     --no-default-features --features core --test loom_ring
//! ```
#![cfg(loom)]

use std::task::{Context, Waker};

use forebay::flow::{Census, SendError, link};
use forebay::ring::{Consumer, Doorbell, Producer, PushError, ring};
use loom::future::block_on;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use loom::thread::{self, JoinHandle};

/// Preemptions allowed in one run. Nearly every concurrency bug shows with two; three is what
/// finishes in minutes.
const PREEMPTIONS_MAX: usize = 3;

fn check(test: impl Fn() + Send + Sync + 'static) {
    check_bounded(PREEMPTIONS_MAX, test);
}

fn check_bounded(preemptions_max: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions_max);
    model.check(test);
}

/// An item that knows whether every one made was dropped, and dropped once.
struct Counted {
    number: usize,
    alive: Arc<AtomicUsize>,
}

impl Counted {
    fn new(number: usize, alive: &Arc<AtomicUsize>) -> Counted {
        alive.fetch_add(1, Relaxed);
        Counted { number, alive: Arc::clone(alive) }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let before = self.alive.fetch_sub(1, Relaxed);
        assert!(before > 0, "item {} was dropped twice", self.number);
    }
}

fn pop_spinning<T>(consumer: &mut Consumer<T>) -> T {
    loop {
        match consumer.pop() {
            Some(item) => return item,
            None => thread::yield_now(),
        }
    }
}

fn push_spinning<T>(producer: &mut Producer<T>, mut item: T) {
    while let Err(error) = producer.push(item) {
        assert!(matches!(error, PushError::Full(_)));
        item = error.into_item();
        thread::yield_now();
    }
}

fn items_arrive_in_order(capacity: usize, count: usize) {
    check(move || {
        let (mut producer, mut consumer) = ring(capacity);
        let pushing = thread::spawn(move || {
            for number in 0..count {
                push_spinning(&mut producer, Box::new(number));
            }
        });
        for number in 0..count {
            assert_eq!(*pop_spinning(&mut consumer), number);
        }
        pushing.join().unwrap();
        assert!(consumer.pop().is_none() && consumer.is_abandoned());
    });
}

#[test]
fn items_arrive_in_order_through_one_slot() {
    items_arrive_in_order(1, 3);
}

#[test]
fn items_arrive_in_order_through_two_slots() {
    items_arrive_in_order(2, 4);
}

#[test]
fn items_arrive_in_order_through_three_slots_of_four() {
    items_arrive_in_order(3, 4);
}

#[test]
fn batches_arrive_whole_and_in_order() {
    check(|| {
        let (mut producer, mut consumer) = ring(2);
        let pushing = thread::spawn(move || {
            let mut numbers = (0..4).map(Box::new).peekable();
            while numbers.peek().is_some() {
                if producer.push_batch(&mut numbers) == 0 {
                    thread::yield_now();
                }
            }
        });
        let mut expected = 0;
        while expected < 4 {
            let before = expected;
            for number in consumer.pop_batch(2) {
                assert_eq!(*number, expected);
                expected += 1;
            }
            if expected == before {
                thread::yield_now();
            }
        }
        pushing.join().unwrap();
    });
}

#[test]
fn a_consumer_that_goes_while_items_come_leaves_none_behind() {
    for capacity in 1..=3 {
        check(move || {
            let alive = Arc::new(AtomicUsize::new(0));
            let (mut producer, mut consumer) = ring(capacity);
            let pushing = {
                let alive = Arc::clone(&alive);
                thread::spawn(move || {
                    for number in 0..3 {
                        match producer.push(Counted::new(number, &alive)) {
                            Ok(()) => {}
                            Err(PushError::Full(item)) => drop(item),
                            Err(PushError::Abandoned(item)) => {
                                assert!(producer.is_abandoned());
                                drop(item);
                                break;
                            }
                        }
                    }
                })
            };
            drop(consumer.pop());
            drop(consumer);
            pushing.join().unwrap();
            assert_eq!(alive.load(Relaxed), 0);
        });
    }
}

#[test]
fn both_ends_may_go_at_once() {
    for capacity in 1..=3 {
        check(move || {
            let alive = Arc::new(AtomicUsize::new(0));
            let (mut producer, consumer) = ring(capacity);
            for number in 0..2 {
                drop(producer.push(Counted::new(number, &alive)));
            }
            let going = thread::spawn(move || drop(producer));
            drop(consumer);
            going.join().unwrap();
            assert_eq!(alive.load(Relaxed), 0);
        });
    }
}

#[test]
fn whoever_sees_the_producer_gone_sees_its_last_item() {
    for capacity in 1..=3 {
        check(move || {
            let (mut producer, mut consumer) = ring(capacity);
            let pushing = thread::spawn(move || producer.push(Box::new(7)).unwrap());
            let mut seen = None;
            while !consumer.is_abandoned() {
                seen = seen.or(consumer.pop());
                thread::yield_now();
            }
            assert_eq!(seen.or(consumer.pop()), Some(Box::new(7)));
            pushing.join().unwrap();
        });
    }
}

/// What the rule for waiters says to do before a wait. A lost wake-up shows as a deadlock.
fn drain(consumers: &mut [Consumer<usize>], received: &mut Vec<usize>) -> bool {
    let before = received.len();
    for consumer in consumers {
        while let Some(item) = consumer.pop() {
            received.push(item);
        }
    }
    received.len() > before
}

fn ringing(bell: &Arc<Doorbell>, items: &'static [usize]) -> (Consumer<usize>, JoinHandle<()>) {
    let (mut producer, consumer) = ring(items.len());
    let bell = Arc::clone(bell);
    let thread = thread::spawn(move || {
        for &item in items {
            producer.push(item).unwrap();
            bell.ring();
        }
    });
    (consumer, thread)
}

#[test]
fn no_wake_up_of_a_task_is_lost() {
    check(|| {
        let bell = Doorbell::new();
        let (consumer, ringing) = ringing(&bell, &[1, 2]);
        let (mut consumers, mut received) = ([consumer], Vec::new());
        block_on(async {
            while received.len() < 2 {
                if !drain(&mut consumers, &mut received) {
                    bell.rung().await;
                }
            }
        });
        assert_eq!(received, [1, 2]);
        ringing.join().unwrap();
    });
}

#[test]
fn no_wake_up_of_a_thread_is_lost() {
    check(|| {
        let bell = Doorbell::new();
        let (consumer, ringing) = ringing(&bell, &[1, 2, 3]);
        let (mut consumers, mut received) = ([consumer], Vec::new());
        while received.len() < 3 {
            if !drain(&mut consumers, &mut received) {
                assert!(bell.wait_thread(None));
            }
        }
        assert_eq!(received, [1, 2, 3]);
        ringing.join().unwrap();
    });
}

#[test]
fn a_ringer_that_finds_the_bell_rung_may_leave_it_at_that() {
    check(|| {
        let bell = Doorbell::new();
        bell.ring();
        let (consumer, ringing) = ringing(&bell, &[1, 2]);
        let (mut consumers, mut received) = ([consumer], Vec::new());
        while received.len() < 2 {
            if !drain(&mut consumers, &mut received) {
                assert!(bell.wait_thread(None));
            }
        }
        ringing.join().unwrap();
    });
}

/// Three threads have so many orders that only one preemption can be afforded.
#[test]
fn no_wake_up_is_lost_when_two_ring() {
    check_bounded(1, || {
        let bell = Doorbell::new();
        let (consumer, one) = ringing(&bell, &[1]);
        let (other_consumer, other) = ringing(&bell, &[2]);
        let (mut consumers, mut received) = ([consumer, other_consumer], Vec::new());
        while received.len() < 2 {
            if !drain(&mut consumers, &mut received) {
                assert!(bell.wait_thread(None));
            }
        }
        one.join().unwrap();
        other.join().unwrap();
    });
}

#[test]
fn a_waiter_that_gives_up_and_comes_back_is_still_woken() {
    check(|| {
        let bell = Doorbell::new();
        let (mut producer, mut consumer) = ring(1);
        let ringing = {
            let bell = Arc::clone(&bell);
            thread::spawn(move || {
                producer.push(5).unwrap();
                bell.ring();
            })
        };
        // As after a time-out: the bell is left with a waiter that does not wait any more.
        let gave_up = bell.poll_rung(&mut Context::from_waker(Waker::noop()));
        if gave_up.is_ready() {
            bell.ring();
        }
        let item = block_on(async {
            loop {
                match consumer.pop() {
                    Some(item) => break item,
                    None => bell.rung().await,
                }
            }
        });
        assert_eq!(item, 5);
        ringing.join().unwrap();
    });
}

/// Two who wait on one bell break its rule. Nothing promises that both wake; but memory stays
/// sound, and a ring is consumed by one of them.
#[test]
fn two_who_poll_one_bell_do_not_corrupt_it() {
    check_bounded(2, || {
        let bell = Doorbell::new();
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let bell = Arc::clone(&bell);
                thread::spawn(move || bell.wait_thread(Some(std::time::Duration::ZERO)))
            })
            .collect();
        bell.ring();
        let rung = threads.into_iter().map(|waiting| waiting.join().unwrap());
        let seen = rung.filter(|&rung| rung).count();
        let left = usize::from(bell.wait_thread(Some(std::time::Duration::ZERO)));
        assert_eq!(seen + left, 1);
    });
}

fn messages_and_credits_go_round(capacity: usize, count: usize, preemptions_max: usize) {
    check_bounded(preemptions_max, move || {
        let (to_receiver, to_sender) = (Doorbell::new(), Doorbell::new());
        let (mut sender, mut receiver) =
            link("loom", capacity, Arc::clone(&to_receiver), Arc::clone(&to_sender));
        let sending = thread::spawn(move || {
            block_on(async {
                let mut next = 0;
                while next < count {
                    match sender.send(Box::new(next)) {
                        Ok(()) => next += 1,
                        Err(SendError::NoCredit(_)) => to_sender.rung().await,
                        Err(SendError::Gone(_)) => panic!("the receiver is there"),
                    }
                }
            });
            sender
        });
        block_on(async {
            let mut expected = 0;
            while expected < count {
                match receiver.receive() {
                    Some(message) => {
                        assert_eq!(*message, expected);
                        expected += 1;
                        receiver.give_back(1);
                    }
                    None => to_receiver.rung().await,
                }
            }
        });
        let mut sender = sending.join().unwrap();
        let census = Census::of(&mut sender, &mut receiver);
        assert!(census.balances(), "{census:?}");
        receiver.flush();
        assert_eq!(sender.credits(), capacity);
    });
}

#[test]
fn messages_and_credits_go_round_a_link_of_one() {
    messages_and_credits_go_round(1, 2, 2);
}

#[test]
fn messages_and_credits_go_round_a_link_of_two() {
    messages_and_credits_go_round(2, 3, 2);
}

#[test]
fn messages_and_credits_go_round_a_link_of_three() {
    messages_and_credits_go_round(3, 4, 1);
}

#[test]
fn a_sender_without_credit_wakes_when_the_receiver_goes() {
    check(|| {
        let (to_receiver, to_sender) = (Doorbell::new(), Doorbell::new());
        let (mut sender, receiver) = link("loom", 1, to_receiver, Arc::clone(&to_sender));
        sender.send(Box::new(1)).unwrap();
        let going = thread::spawn(move || drop(receiver));
        block_on(async {
            loop {
                match sender.send(Box::new(2)) {
                    Err(SendError::Gone(message)) => break assert_eq!(*message, 2),
                    Err(SendError::NoCredit(_)) => to_sender.rung().await,
                    Ok(()) => panic!("no credit was given back"),
                }
            }
        });
        going.join().unwrap();
    });
}

#[test]
fn a_receiver_that_waits_wakes_when_the_sender_goes_and_gets_its_last_message() {
    check(|| {
        let (to_receiver, to_sender) = (Doorbell::new(), Doorbell::new());
        let (mut sender, mut receiver) = link("loom", 2, Arc::clone(&to_receiver), to_sender);
        let sending = thread::spawn(move || sender.send(Box::new(9)).unwrap());
        let received = block_on(async {
            let mut received = None;
            loop {
                let gone = receiver.is_abandoned();
                while let Some(message) = receiver.receive() {
                    received = Some(message);
                }
                if gone {
                    break received;
                }
                to_receiver.rung().await;
            }
        });
        assert_eq!(received, Some(Box::new(9)));
        sending.join().unwrap();
    });
}
