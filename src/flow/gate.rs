//! A gate: what a consumer lets its producers know beforehand, so that what it would refuse anyway
//! is refused at the door, without a message.
//!
//! One word a class says whether the gate is closed, why, and when to come back. The keeper (the
//! engine) writes it, the front core reads it. Refusals go the other way as counters, so that they
//! are part of the same statistics as refusals by the engine itself.
//!
//! A gate is for what is the same for everybody: the server ends, the device is lost. A full queue
//! is not: among those who ask then are some whose place in the calendar has come.
//!
//! **Orderings.** A word is whole in itself (an atomic of 64 bits) and nothing else is concluded
//! from it: relaxed. Read late, an open one costs a message and a closed one a refusal that was
//! right a moment ago. The counters: see [`GateReader::refuse`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

use crate::request::{Class, RejectReason};

const CLASSES: usize = Class::ALL.len();
const REASONS: usize = RejectReason::ALL.len();

/// Refusals by reason.
pub type Refusals = [u64; REASONS];

/// Why a gate is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed {
    /// The reason that a refused client is told.
    pub reason: RejectReason,
    /// When whoever is refused should come back; `None` says never.
    pub retry_after_ms: Option<u32>,
}

/// What both ends share: a line of memory for each writer.
#[derive(Debug)]
struct Shared {
    /// One a class, written by the keeper. From the top: closed (1 bit), has a time to come back
    /// (1), unused (10), reason (4), unused (16), that time in ms (32).
    words: CachePadded<[AtomicU64; CLASSES]>,
    /// Written by the reader, by reason.
    refused: CachePadded<[AtomicU64; REASONS]>,
    /// Written by the reader: all of them.
    refused_total: AtomicU64,
}

const CLOSED: u64 = 1 << 63;
const HAS_RETRY: u64 = 1 << 62;
const REASON_SHIFT: u32 = 48;

fn encode(closed: Option<Closed>) -> u64 {
    let Some(Closed { reason, retry_after_ms }) = closed else { return 0 };
    let retry = retry_after_ms.map_or(0, |ms| HAS_RETRY | u64::from(ms));
    CLOSED | (reason as u64) << REASON_SHIFT | retry
}

fn decode(word: u64) -> Option<Closed> {
    if word & CLOSED == 0 {
        return None;
    }
    let reason = RejectReason::from_wire((word >> REASON_SHIFT) as u8 & 0xf)?;
    let retry_after_ms = (word & HAS_RETRY != 0).then_some(word as u32);
    Some(Closed { reason, retry_after_ms })
}

/// Makes a gate; open.
pub fn gate() -> (GateKeeper, GateReader) {
    let shared = Arc::new(Shared {
        words: CachePadded::new(std::array::from_fn(|_| AtomicU64::new(0))),
        refused: CachePadded::new(std::array::from_fn(|_| AtomicU64::new(0))),
        refused_total: AtomicU64::new(0),
    });
    let keeper = GateKeeper {
        shared: Arc::clone(&shared),
        shown: [0; CLASSES],
        counted: [0; REASONS],
        counted_total: 0,
    };
    (keeper, GateReader { shared, refused: [0; REASONS] })
}

/// The end that closes and opens.
#[derive(Debug)]
pub struct GateKeeper {
    shared: Arc<Shared>,
    /// The words as last written.
    shown: [u64; CLASSES],
    counted: Refusals,
    counted_total: u64,
}

impl GateKeeper {
    /// Closes or opens the gate for a class.
    pub fn show(&mut self, class: Class, closed: Option<Closed>) {
        let (at, word) = (class as usize, encode(closed));
        if self.shown[at] != word {
            self.shown[at] = word;
            self.shared.words[at].store(word, Ordering::Relaxed);
        }
    }

    /// Whether the gate is closed for a class, as last shown.
    pub fn shown(&self, class: Class) -> Option<Closed> {
        decode(self.shown[class as usize])
    }

    /// Refusals since the last call, if there were any.
    pub fn take_refusals(&mut self) -> Option<Refusals> {
        // Pairs with the release in `refuse`: the counts by reason are at least this total's.
        let total = self.shared.refused_total.load(Ordering::Acquire);
        if total == self.counted_total {
            return None;
        }
        let mut fresh = [0; REASONS];
        for ((fresh, counted), shared) in
            fresh.iter_mut().zip(&mut self.counted).zip(&*self.shared.refused)
        {
            let now = shared.load(Ordering::Relaxed);
            *fresh = now - *counted;
            *counted = now;
        }
        // As far as it was counted: one that came in between is already in, and no more is due.
        self.counted_total = self.counted.iter().sum();
        Some(fresh)
    }
}

/// The end that asks before it enters.
#[derive(Debug)]
pub struct GateReader {
    shared: Arc<Shared>,
    /// As shared; this end is the only writer.
    refused: Refusals,
}

impl GateReader {
    /// Whether a request of this class is to be refused, with what, and by when it may come back.
    /// Counts it then.
    pub fn refuse(&mut self, class: Class) -> Option<(RejectReason, Option<u32>)> {
        let word = self.shared.words[class as usize].load(Ordering::Relaxed);
        let closed = decode(word)?;
        let at = closed.reason as usize;
        self.refused[at] += 1;
        self.shared.refused[at].store(self.refused[at], Ordering::Relaxed);
        // Release, after the count by reason: the keeper that sees this total sees that, too.
        self.shared.refused_total.store(self.refused.iter().sum(), Ordering::Release);
        Some((closed.reason, closed.retry_after_ms))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LOST: Closed = Closed { reason: RejectReason::NoCapacity, retry_after_ms: Some(20) };

    #[test]
    fn a_word_comes_out_as_it_went_in() {
        assert_eq!(decode(encode(None)), None);
        for reason in RejectReason::ALL {
            for retry_after_ms in [None, Some(0), Some(1), Some(u32::MAX)] {
                let closed = Closed { reason, retry_after_ms };
                assert_eq!(decode(encode(Some(closed))), Some(closed));
            }
        }
    }

    #[test]
    fn a_closed_gate_refuses_its_class_and_an_open_one_nobody() {
        let (mut keeper, mut reader) = gate();
        assert_eq!(reader.refuse(Class::Default), None);
        keeper.show(Class::Default, Some(LOST));
        assert_eq!(reader.refuse(Class::Default), Some((RejectReason::NoCapacity, Some(20))));
        assert_eq!(reader.refuse(Class::System), None);
        keeper.show(Class::Default, None);
        assert_eq!((keeper.shown(Class::Default), reader.refuse(Class::Default)), (None, None));
    }

    #[test]
    fn refusals_are_counted_once_by_reason() {
        let (mut keeper, mut reader) = gate();
        keeper.show(Class::Bulk, Some(LOST));
        for _ in 0..3 {
            assert_eq!(reader.refuse(Class::Bulk), Some((LOST.reason, LOST.retry_after_ms)));
        }
        let refused = keeper.take_refusals().unwrap();
        assert_eq!(refused[LOST.reason as usize], 3);
        assert_eq!(keeper.take_refusals(), None);
    }

    #[test]
    fn no_refusal_is_lost_or_counted_twice_while_the_keeper_counts_beside_it() {
        let (mut keeper, mut reader) = gate();
        let reasons = [RejectReason::NoCapacity, RejectReason::ShuttingDown];
        keeper.show(Class::System, Some(LOST));
        keeper.show(Class::Bulk, Some(Closed { reason: reasons[1], ..LOST }));
        let visits = thread::spawn(move || {
            for n in 0..30_000 {
                let class = if n % 3 == 0 { Class::Bulk } else { Class::System };
                assert!(reader.refuse(class).is_some());
            }
        });
        let mut sum = [0; REASONS];
        loop {
            let done = visits.is_finished();
            for (sum, fresh) in sum.iter_mut().zip(keeper.take_refusals().unwrap_or_default()) {
                *sum += fresh;
            }
            if done {
                break;
            }
        }
        visits.join().unwrap();
        assert_eq!(reasons.map(|reason| sum[reason as usize]), [20_000, 10_000]);
        assert_eq!(sum.iter().sum::<u64>(), 30_000);
    }
}
