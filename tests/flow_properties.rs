//! What holds of credits, links and buckets whatever is done to them, in whatever order.
#![cfg(all(feature = "core", not(loom)))]

use std::collections::VecDeque;
use std::task::{Context, Waker};

use forebay::base::Instant;
use forebay::flow::{Census, CreditReturn, CreditWindow, SendError, Shortage, TokenBucket, link};
use forebay::ring::Doorbell;
use proptest::collection::vec;
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
enum WindowAct {
    Take(usize),
    TakeUpTo(usize),
    Give(usize),
}

fn window_act() -> impl Strategy<Value = WindowAct> {
    // Mostly small, sometimes absurd: the caller's account may be wrong by any amount.
    let amount = || prop_oneof![9 => 0..12_usize, 1 => any::<usize>()];
    prop_oneof![
        amount().prop_map(WindowAct::Take),
        amount().prop_map(WindowAct::TakeUpTo),
        amount().prop_map(WindowAct::Give),
    ]
}

proptest! {
    #[test]
    fn a_credit_window_is_a_counter_between_zero_and_its_capacity(
        capacity in 0..10_usize,
        acts in vec(window_act(), 0..100),
    ) {
        let mut window = CreditWindow::full(capacity);
        let mut model = capacity;
        for act in acts {
            match act {
                WindowAct::Take(n) => {
                    prop_assert_eq!(window.take(n), n <= model);
                    model -= if n <= model { n } else { 0 };
                }
                WindowAct::TakeUpTo(n) => {
                    prop_assert_eq!(window.take_up_to(n), n.min(model));
                    model -= n.min(model);
                }
                WindowAct::Give(n) => {
                    let fits = n <= capacity - model;
                    prop_assert_eq!(window.give(n).is_ok(), fits);
                    model += if fits { n } else { 0 };
                }
            }
            prop_assert_eq!(window.available(), model);
            prop_assert_eq!(window.available() + window.outstanding(), capacity);
        }
    }

    #[test]
    fn gathered_credits_are_neither_lost_nor_made(
        capacity in 1..20_usize,
        amounts in vec(0..5_usize, 0..100),
    ) {
        let mut due = CreditReturn::new(capacity);
        let mut given = 0;
        for &n in &amounts {
            given += due.gather(n);
            prop_assert!(due.gathered() < capacity.div_ceil(2).max(1));
        }
        given += due.flush();
        prop_assert_eq!(given, amounts.iter().sum::<usize>());
    }
}

#[derive(Clone, Copy, Debug)]
enum LinkAct {
    Send,
    SendBatch(usize),
    AskCredits,
    Receive,
    GiveBack(usize),
    Flush,
}

fn link_act() -> impl Strategy<Value = LinkAct> {
    prop_oneof![
        4 => Just(LinkAct::Send),
        1 => (0..12_usize).prop_map(LinkAct::SendBatch),
        1 => Just(LinkAct::AskCredits),
        4 => Just(LinkAct::Receive),
        4 => (0..4_usize).prop_map(LinkAct::GiveBack),
        1 => Just(LinkAct::Flush),
    ]
}

fn was_rung(bell: &Doorbell) -> bool {
    bell.poll_rung(&mut Context::from_waker(Waker::noop())).is_ready()
}

proptest! {
    /// I1 and I2, and that both sides are woken when there is something to wake for.
    #[test]
    fn a_link_accounts_for_every_credit_after_every_act(
        capacity in 1..9_usize,
        acts in vec(link_act(), 0..200),
    ) {
        let (to_receiver, to_sender) = (Doorbell::new(), Doorbell::new());
        let (mut sender, mut receiver) =
            link("property", capacity, to_receiver.clone(), to_sender.clone());
        let mut in_flight = VecDeque::new();
        let mut next = 0_u32;
        let mut starved = false;
        for act in acts {
            match act {
                LinkAct::Send => match sender.send(next) {
                    Ok(()) => {
                        starved = false;
                        in_flight.push_back(next);
                        next += 1;
                        prop_assert!(was_rung(&to_receiver));
                    }
                    Err(error) => {
                        prop_assert_eq!(error, SendError::NoCredit(next));
                        starved = true;
                    }
                },
                LinkAct::SendBatch(n) => {
                    let sent = sender.send_batch(&mut (next..next + n as u32)) as u32;
                    starved = starved && sent == 0;
                    in_flight.extend(next..next + sent);
                    next += sent;
                    prop_assert_eq!(was_rung(&to_receiver), sent > 0);
                }
                LinkAct::AskCredits => starved = sender.credits() == 0,
                LinkAct::Receive => prop_assert_eq!(receiver.receive(), in_flight.pop_front()),
                LinkAct::GiveBack(n) => receiver.give_back(n.min(receiver.held())),
                LinkAct::Flush => receiver.flush(),
            }
            let census = Census::of(&mut sender, &mut receiver);
            prop_assert!(census.balances(), "{:?}", census);
            prop_assert_eq!(census.in_flight, in_flight.len());
            // A bell may also ring without need; a sender that sleeps must not miss a credit.
            let rung = was_rung(&to_sender);
            if starved && census.returning > receiver_due_at_most(capacity) {
                prop_assert!(rung);
            }
            starved &= !rung;
        }
        while receiver.receive().is_some() {}
        receiver.give_back(receiver.held());
        receiver.flush();
        prop_assert_eq!(sender.credits(), capacity, "nothing is lost in the end");
    }
}

/// What a receiver may keep to itself before a batch of credits is worth its trip.
fn receiver_due_at_most(capacity: usize) -> usize {
    (capacity / 2).max(1) - 1
}

#[derive(Clone, Copy, Debug)]
enum BucketAct {
    Take(u64),
    Charge(u64),
    Refund(u64),
    Wait(u64),
    Pass { ns: u64 },
    GoBack { ns: u64 },
}

fn bucket_act() -> impl Strategy<Value = BucketAct> {
    let amount = || prop_oneof![9 => 0..40_u64, 1 => any::<u64>()];
    let time = || prop_oneof![9 => 0..3_000_000_000_u64, 1 => any::<u64>()];
    prop_oneof![
        amount().prop_map(BucketAct::Take),
        amount().prop_map(BucketAct::Charge),
        amount().prop_map(BucketAct::Refund),
        amount().prop_map(BucketAct::Wait),
        time().prop_map(|ns| BucketAct::Pass { ns }),
        time().prop_map(|ns| BucketAct::GoBack { ns }),
    ]
}

fn quantity() -> impl Strategy<Value = u64> {
    prop_oneof![9 => 0..50_u64, 1 => any::<u64>()]
}

proptest! {
    #[test]
    fn a_bucket_stays_within_its_bounds_and_never_gives_what_it_has_not(
        (rate, burst, debt_max) in (quantity(), quantity(), quantity()),
        acts in vec(bucket_act(), 0..100),
    ) {
        let mut now = Instant::from_ns(1_000);
        let mut bucket = TokenBucket::new(rate, burst, debt_max, now);
        for act in acts {
            let (available, debt) = (bucket.available(now), bucket.debt(now));
            match act {
                BucketAct::Take(n) => {
                    prop_assert_eq!(bucket.take(n, now).is_ok(), n <= available && debt == 0);
                }
                BucketAct::Charge(n) => {
                    bucket.charge(n, now);
                    prop_assert!(bucket.available(now) <= available);
                }
                BucketAct::Refund(n) => {
                    bucket.refund(n, now);
                    prop_assert!(bucket.debt(now) <= debt);
                }
                BucketAct::Wait(n) => match bucket.wait_ns(n, now) {
                    Ok(0) => prop_assert!(n <= available && debt == 0),
                    // The wait is enough, and one nanosecond less is not.
                    Ok(ns) if ns < u64::MAX - now.as_ns() => {
                        let mut later = bucket.clone();
                        prop_assert!(later.wait_ns(n, now.plus_ns(ns - 1)) != Ok(0));
                        prop_assert_eq!(later.take(n, now.plus_ns(ns)), Ok(()));
                    }
                    Ok(_) => {}
                    Err(shortage) => {
                        prop_assert_eq!(shortage, Shortage::Never);
                        prop_assert!(n > burst || rate == 0);
                    }
                },
                BucketAct::Pass { ns } => now = now.plus_ns(ns),
                BucketAct::GoBack { ns } => {
                    let before = bucket.clone();
                    bucket.available(Instant::from_ns(now.as_ns().saturating_sub(ns)));
                    prop_assert_eq!(&bucket, &before);
                }
            }
            prop_assert!(bucket.available(now) <= burst);
            prop_assert!(bucket.debt(now) <= debt_max);
            prop_assert!(bucket.available(now) == 0 || bucket.debt(now) == 0);
        }
    }

    /// The reason for having a bucket: over any run, no more goes out than burst and rate allow.
    #[test]
    fn what_is_taken_never_exceeds_burst_and_rate(
        (rate, burst) in (0..50_u64, 0..50_u64),
        takes in vec((0..20_u64, 0..500_000_000_u64), 0..100),
    ) {
        let mut bucket = TokenBucket::new(rate, burst, 0, Instant::ZERO);
        let (mut now, mut taken) = (Instant::ZERO, 0);
        for (n, pause_ns) in takes {
            now = now.plus_ns(pause_ns);
            taken += if bucket.take(n, now).is_ok() { n } else { 0 };
            let earned = u128::from(rate) * u128::from(now.as_ns());
            let allowed = u128::from(burst) * 1_000_000_000 + earned;
            prop_assert!(u128::from(taken) * 1_000_000_000 <= allowed);
        }
    }
}
