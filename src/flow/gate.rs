//! A gate: what a consumer lets its producers know beforehand, so that what it would refuse anyway
//! is refused at the door, without a message.
//!
//! One word a class says whether the gate is closed, why, and when to come back. The keeper (the
//! engine) writes it, the front core reads it. Refusals go the other way as counters, so that they
//! are part of the same statistics, and lengthen the same line, as refusals by the engine itself.
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

/// The longest time to come back that a word holds; nobody is told a longer one.
pub const RETRY_MAX_MS: u32 = 60_000;

/// Why a gate is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed {
    /// The reason that a refused client is told.
    pub reason: RejectReason,
    /// When the first who is refused should come back; `None` says never.
    pub retry_after_ms: Option<u32>,
    /// How much later each further one should.
    pub apart_us: u32,
}

/// What both ends share: a line of memory for each writer.
#[derive(Debug)]
struct Shared {
    /// One a class, written by the keeper. From the top: closed (1 bit), turn (7), reason (4), has
    /// a time to come back (1), unused (3), that time in ms (16), apart in us (32).
    words: CachePadded<[AtomicU64; CLASSES]>,
    /// Written by the reader, by reason.
    refused: CachePadded<[AtomicU64; REASONS]>,
    /// Written by the reader: all of them.
    refused_total: AtomicU64,
}

const CLOSED: u64 = 1 << 63;
const TURN_SHIFT: u32 = 56;
const TURN_MASK: u8 = 0x7f;
const REASON_SHIFT: u32 = 52;
const HAS_RETRY: u64 = 1 << 51;
const RETRY_SHIFT: u32 = 32;

fn encode(closed: Option<Closed>, turn: u8) -> u64 {
    let Some(Closed { reason, retry_after_ms, apart_us }) = closed else { return 0 };
    let retry =
        retry_after_ms.map_or(0, |ms| HAS_RETRY | u64::from(ms.min(RETRY_MAX_MS)) << RETRY_SHIFT);
    let (turn, reason) = (u64::from(turn) << TURN_SHIFT, (reason as u64) << REASON_SHIFT);
    CLOSED | turn | reason | retry | u64::from(apart_us)
}

fn decode(word: u64) -> Option<(Closed, u8)> {
    if word & CLOSED == 0 {
        return None;
    }
    let reason = RejectReason::from_wire((word >> REASON_SHIFT) as u8 & 0xf)?;
    let has_retry = word & HAS_RETRY != 0;
    let retry_after_ms = has_retry.then_some((word >> RETRY_SHIFT) as u32 & 0xffff);
    let turn = (word >> TURN_SHIFT) as u8 & TURN_MASK;
    Some((Closed { reason, retry_after_ms, apart_us: word as u32 }, turn))
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
        turn: 0,
        counted: [0; REASONS],
        counted_total: 0,
    };
    (keeper, GateReader { shared, refused: [0; REASONS], turn: 0, in_turn: 0 })
}

/// The end that closes and opens.
#[derive(Debug)]
pub struct GateKeeper {
    shared: Arc<Shared>,
    /// The words as last written.
    shown: [u64; CLASSES],
    /// Counts how often refusals were counted: the line that the words tell is up to date with
    /// them, so the reader's own count begins again.
    turn: u8,
    counted: Refusals,
    counted_total: u64,
}

impl GateKeeper {
    /// Closes or opens the gate for a class.
    pub fn show(&mut self, class: Class, closed: Option<Closed>) {
        let (at, word) = (class as usize, encode(closed, self.turn));
        if self.shown[at] != word {
            self.shown[at] = word;
            self.shared.words[at].store(word, Ordering::Relaxed);
        }
    }

    /// Whether the gate is closed for a class, as last shown.
    pub fn shown(&self, class: Class) -> Option<Closed> {
        decode(self.shown[class as usize]).map(|(closed, _)| closed)
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
        self.turn = (self.turn + 1) & TURN_MASK;
        Some(fresh)
    }
}

/// The end that asks before it enters.
#[derive(Debug)]
pub struct GateReader {
    shared: Arc<Shared>,
    /// As shared; this end is the only writer.
    refused: Refusals,
    /// The turn of the words seen last, and refusals since it began.
    turn: u8,
    in_turn: u64,
}

impl GateReader {
    /// Whether a request of this class is to be refused, with what, and by when it may come back.
    /// Counts it then.
    pub fn refuse(&mut self, class: Class) -> Option<(RejectReason, Option<u32>)> {
        let word = self.shared.words[class as usize].load(Ordering::Relaxed);
        let (closed, turn) = decode(word)?;
        if turn != self.turn {
            (self.turn, self.in_turn) = (turn, 0);
        }
        let later_ms = self.in_turn.saturating_mul(closed.apart_us.into()) / 1_000;
        let retry = closed.retry_after_ms.map(|ms| {
            let ms = u64::from(ms).saturating_add(later_ms);
            ms.clamp(1, RETRY_MAX_MS.into()) as u32
        });
        self.in_turn += 1;
        let at = closed.reason as usize;
        self.refused[at] += 1;
        self.shared.refused[at].store(self.refused[at], Ordering::Relaxed);
        // Release, after the count by reason: the keeper that sees this total sees that, too.
        self.shared.refused_total.store(self.refused.iter().sum(), Ordering::Release);
        Some((closed.reason, retry))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const FULL: Closed =
        Closed { reason: RejectReason::QueueFull, retry_after_ms: Some(20), apart_us: 1_500 };

    #[test]
    fn a_word_comes_out_as_it_went_in() {
        assert_eq!(decode(encode(None, 5)), None);
        for reason in RejectReason::ALL {
            for retry_after_ms in [None, Some(0), Some(1), Some(RETRY_MAX_MS)] {
                let closed = Closed { reason, retry_after_ms, apart_us: u32::MAX };
                assert_eq!(decode(encode(Some(closed), TURN_MASK)), Some((closed, TURN_MASK)));
            }
        }
        let far = Closed { retry_after_ms: Some(u32::MAX), ..FULL };
        let told = decode(encode(Some(far), 0)).unwrap().0.retry_after_ms;
        assert_eq!(told, Some(RETRY_MAX_MS));
    }

    #[test]
    fn a_closed_gate_refuses_its_class_and_an_open_one_nobody() {
        let (mut keeper, mut reader) = gate();
        assert_eq!(reader.refuse(Class::Default), None);
        keeper.show(Class::Default, Some(FULL));
        assert_eq!(reader.refuse(Class::Default), Some((RejectReason::QueueFull, Some(20))));
        assert_eq!(reader.refuse(Class::System), None);
        keeper.show(Class::Default, None);
        assert_eq!((keeper.shown(Class::Default), reader.refuse(Class::Default)), (None, None));
    }

    #[test]
    fn each_who_is_refused_is_told_a_later_time_until_the_keeper_knows_of_them() {
        let (mut keeper, mut reader) = gate();
        keeper.show(Class::Bulk, Some(FULL));
        let mut told = || reader.refuse(Class::Bulk).unwrap().1.unwrap();
        assert_eq!([told(), told(), told()], [20, 21, 23]);
        let refused = keeper.take_refusals().unwrap();
        assert_eq!(refused[RejectReason::QueueFull as usize], 3);
        assert_eq!(keeper.take_refusals(), None);
        keeper.show(Class::Bulk, Some(Closed { retry_after_ms: Some(25), ..FULL }));
        assert_eq!([told(), told()], [25, 26], "the keeper's line has the three in it");
        keeper.show(Class::Bulk, Some(Closed { retry_after_ms: None, ..FULL }));
        assert_eq!(reader.refuse(Class::Bulk), Some((RejectReason::QueueFull, None)));
    }

    #[test]
    fn no_refusal_is_lost_or_counted_twice_while_the_keeper_counts_beside_it() {
        let (mut keeper, mut reader) = gate();
        let reasons = [RejectReason::QueueFull, RejectReason::NoCapacity];
        keeper.show(Class::System, Some(FULL));
        keeper.show(Class::Bulk, Some(Closed { reason: reasons[1], ..FULL }));
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
