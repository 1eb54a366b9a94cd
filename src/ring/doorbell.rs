//! Wakes the one who sleeps at the far end of a ring.
//!
//! Many may ring, one waits: a task (through its [`Waker`]) or a thread (which parks). A ring is
//! remembered until it is consumed, so the rule for the one who waits is short:
//!
//! ```text
//! loop { drain everything; if there was nothing { bell.rung().await } }
//! ```
//!
//! A ring between the drain and the wait is never lost: the wait then returns at once. Rings are
//! not counted, and a wait may return without cause; neither matters to that loop.
//!
//! # Why no wake-up is lost
//!
//! The state is one word. Whoever rings first publishes its item (to a ring, say), then runs a
//! read-modify-write on the word that sets `RUNG`. Whoever waits consumes `RUNG` with a
//! read-modify-write, then looks for items. Such operations on one word have one order. If the
//! ringer's comes first, the waiter's reads from it (or from a later one of its release sequence)
//! and sees the item. If it comes second, `RUNG` stands when the waiter has finished looking.
//!
//! The one exception saves the cost of the read-modify-write while the waiter is awake and rings
//! come fast: a ringer that finds `RUNG` set may leave it at that. But "I see it set" could be
//! old news: the store of the item may still wait in this CPU's store buffer while the load is
//! answered, the waiter consumes `RUNG` and looks in vain, and sleeps. So both sides run a
//! sequentially consistent fence: the ringer between the item and its look at the word, the waiter
//! between consuming `RUNG` and looking for items. Of two such fences one comes first. If the
//! ringer's does, the waiter sees the item. If the waiter's does, the ringer sees `RUNG` consumed,
//! or set again by a third party; and that one is still to be consumed, behind a later fence of
//! the waiter's, which the ringer's then precedes. `tests/loom_ring.rs` checks all of it.

#![allow(unsafe_code)]

use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, Release, SeqCst};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use super::sync::{Arc, AtomicU32, UnsafeCell, fence, thread};

/// There was a ring that nobody has consumed yet.
const RUNG: u32 = 1;
/// The cell holds a waiter that sleeps, or is about to.
const PARKED: u32 = 2;
/// Somebody is using the cell: the waiter on its way to sleep, or a ringer taking it out. Held
/// for a few instructions; no call out of this file is made under it.
const LOCKED: u32 = 4;

/// See the [module's documentation](self). Share it as `Arc<Doorbell>`.
pub struct Doorbell {
    /// `RUNG`, `PARKED` and `LOCKED`; the last two are never set together, nor are `RUNG` and
    /// `PARKED`. Padded: ringers of other cores write it.
    state: CachePadded<AtomicU32>,
    /// Who sleeps. Touched only by whoever set `LOCKED`.
    waiter: UnsafeCell<Option<Waiter>>,
}

enum Waiter {
    Task(Waker),
    Thread(thread::Thread),
}

impl Waiter {
    fn wake(self) {
        match self {
            Waiter::Task(waker) => waker.wake(),
            Waiter::Thread(thread) => thread.unpark(),
        }
    }
}

// SAFETY: the cell is what keeps this from being Sync by itself. It is touched only between
// setting `LOCKED` (by a compare-exchange from a state without it, Acquire) and clearing it
// (Release): one thread at a time, each seeing what the last one did. A waiter may be woken and
// dropped on another thread than the one that left it: `Waker` and `Thread` are Send.
unsafe impl Sync for Doorbell {}

impl Doorbell {
    /// A bell that nobody has rung.
    pub fn new() -> Arc<Doorbell> {
        Arc::new(Doorbell {
            state: CachePadded::new(AtomicU32::new(0)),
            waiter: UnsafeCell::new(None),
        })
    }

    /// Wakes the waiter, or makes its next wait return at once. Everything done before is visible
    /// to the waiter when it looks.
    #[inline]
    pub fn ring(&self) {
        if self.state.load(Relaxed) & RUNG != 0 {
            // Pairs with the fence in `consume`; see the module's documentation.
            fence(SeqCst);
            if self.state.load(Relaxed) & RUNG != 0 {
                return;
            }
        }
        self.ring_state();
    }

    fn ring_state(&self) {
        // Release on success publishes what the ringer did before; Acquire, when the waiter is
        // parked, pairs with the Release that parked it: the cell is written. Failure reads the
        // state anew and decides again, so it needs no order.
        let old = self.update(|state| {
            if state & PARKED != 0 { (state & !PARKED) | RUNG | LOCKED } else { state | RUNG }
        });
        if old & PARKED != 0 {
            let waiter = self.take_waiter();
            self.unlock();
            // Woken outside the lock: a wake is a system call, and the kernel likes to run the
            // woken thread in this one's place. It must not find the cell locked.
            if let Some(waiter) = waiter {
                waiter.wake();
            }
        }
    }

    /// Consumes a ring; without one, sees to it that the next ring wakes the context's task.
    ///
    /// There is one waiter: of two tasks that poll the same bell only the last is woken.
    pub fn poll_rung(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.consume() {
            return Poll::Ready(());
        }
        match self.park(Waiter::Task(cx.waker().clone())) {
            Parked::Yes => Poll::Pending,
            Parked::Rung => Poll::Ready(()),
            Parked::Busy => {
                // A ringer was put aside between two instructions, with an earlier waker half out
                // of the cell: let it go on, and come again.
                thread::yield_now();
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }

    /// Waits for a ring, and consumes it. When the future is dropped before, a later ring may
    /// wake the task without cause.
    pub async fn rung(&self) {
        poll_fn(|cx| self.poll_rung(cx)).await;
    }

    /// Parks the calling thread until there is a ring, and consumes it. With a time-out, returns
    /// after that time or a little earlier, since this reads no clock: a thread may be woken
    /// without cause. Returns whether there was a ring.
    pub fn wait_thread(&self, timeout: Option<Duration>) -> bool {
        loop {
            if self.consume() {
                return true;
            }
            match self.park(Waiter::Thread(thread::current())) {
                Parked::Rung => return true,
                Parked::Busy => {
                    thread::yield_now();
                    continue;
                }
                Parked::Yes => {}
            }
            match timeout {
                None => thread::park(),
                Some(timeout) => {
                    park_timeout(timeout);
                    return self.consume();
                }
            }
        }
    }

    /// Whether there is a ring to consume. For a waiter that spins a little before it parks.
    #[inline]
    pub fn is_rung(&self) -> bool {
        self.state.load(Relaxed) & RUNG != 0
    }

    fn consume(&self) -> bool {
        if !self.is_rung() {
            return false;
        }
        // Acquire pairs with the Release of the ring: its item is visible. Release hands on the
        // same to a later ringer that locks the cell.
        let old = self.state.fetch_and(!RUNG, AcqRel);
        // Pairs with the fence in `ring`.
        fence(SeqCst);
        old & RUNG != 0
    }

    fn park(&self, waiter: Waiter) -> Parked {
        // Acquire pairs with the Release of the last `unlock`: the cell is ours.
        let old = self.update(|state| {
            if state & (RUNG | LOCKED) != 0 { state } else { (state & !PARKED) | LOCKED }
        });
        if old & LOCKED != 0 {
            return Parked::Busy;
        }
        if old & RUNG != 0 {
            return if self.consume() { Parked::Rung } else { Parked::Busy };
        }
        let stale = self.replace_waiter(Some(waiter));
        // Release shows the waiter to the ringer that will take it.
        let parked = self.state.compare_exchange(LOCKED, PARKED, Release, Relaxed).is_ok();
        if parked {
            drop(stale);
            return Parked::Yes;
        }
        // Somebody rang meanwhile. They could not reach the waiter, so it must not sleep.
        let waiter = self.take_waiter();
        self.unlock();
        drop((stale, waiter));
        if self.consume() { Parked::Rung } else { Parked::Busy }
    }

    fn take_waiter(&self) -> Option<Waiter> {
        self.replace_waiter(None)
    }

    fn replace_waiter(&self, waiter: Option<Waiter>) -> Option<Waiter> {
        debug_assert!(self.state.load(Relaxed) & LOCKED != 0);
        // SAFETY: the caller has set `LOCKED` and not yet cleared it, so nobody else is in the
        // cell. A safe lock around it would be held by a ringer that the kernel has put aside.
        self.waiter.with_mut(|cell| unsafe { std::mem::replace(&mut *cell, waiter) })
    }

    fn unlock(&self) {
        let old = self.state.fetch_and(!LOCKED, Release);
        debug_assert!(old & LOCKED != 0 && old & PARKED == 0);
    }

    /// Replaces the state by `next(state)` and returns the old one. Acquire and Release.
    fn update(&self, next: impl Fn(u32) -> u32) -> u32 {
        let mut state = self.state.load(Relaxed);
        loop {
            match self.state.compare_exchange_weak(state, next(state), AcqRel, Relaxed) {
                Ok(_) => return state,
                Err(newer) => state = newer,
            }
        }
    }
}

enum Parked {
    /// The waiter is in the cell; the next ring takes it.
    Yes,
    /// There was a ring, now consumed.
    Rung,
    /// Someone else was in the cell: try again.
    Busy,
}

#[cfg(not(loom))]
fn park_timeout(timeout: Duration) {
    thread::park_timeout(timeout);
}

/// Loom has no time: under it every time-out is over at once.
#[cfg(loom)]
fn park_timeout(_: Duration) {
    thread::yield_now();
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.load(Relaxed);
        f.debug_struct("Doorbell")
            .field("rung", &(state & RUNG != 0))
            .field("parked", &(state & PARKED != 0))
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct CountWakes(AtomicUsize);

    impl Wake for CountWakes {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    fn counting_waker() -> (std::sync::Arc<CountWakes>, Waker) {
        let wakes = std::sync::Arc::new(CountWakes::default());
        let waker = Waker::from(wakes.clone());
        (wakes, waker)
    }

    #[test]
    fn a_ring_before_the_wait_is_remembered_once() {
        let bell = Doorbell::new();
        let (wakes, waker) = counting_waker();
        let mut cx = Context::from_waker(&waker);
        bell.ring();
        bell.ring();
        assert!(bell.poll_rung(&mut cx).is_ready());
        assert!(bell.poll_rung(&mut cx).is_pending());
        assert_eq!(wakes.0.load(Relaxed), 0);
    }

    #[test]
    fn a_ring_wakes_the_waiter_once_and_is_then_consumed() {
        let bell = Doorbell::new();
        let (wakes, waker) = counting_waker();
        let mut cx = Context::from_waker(&waker);
        assert!(bell.poll_rung(&mut cx).is_pending());
        bell.ring();
        bell.ring();
        assert_eq!(wakes.0.load(Relaxed), 1);
        assert!(bell.poll_rung(&mut cx).is_ready());
        assert!(bell.poll_rung(&mut cx).is_pending());
    }

    #[test]
    fn the_last_of_several_polls_is_the_one_woken() {
        let bell = Doorbell::new();
        let (first_wakes, first) = counting_waker();
        let (last_wakes, last) = counting_waker();
        assert!(bell.poll_rung(&mut Context::from_waker(&first)).is_pending());
        assert!(bell.poll_rung(&mut Context::from_waker(&last)).is_pending());
        bell.ring();
        assert_eq!(first_wakes.0.load(Relaxed), 0);
        assert_eq!(last_wakes.0.load(Relaxed), 1);
    }

    #[test]
    fn a_bell_keeps_no_waker_after_waking_it() {
        let bell = Doorbell::new();
        let (wakes, waker) = counting_waker();
        assert!(bell.poll_rung(&mut Context::from_waker(&waker)).is_pending());
        drop(waker);
        assert_eq!(std::sync::Arc::strong_count(&wakes), 2);
        bell.ring();
        assert_eq!(std::sync::Arc::strong_count(&wakes), 1);
    }

    #[test]
    fn a_thread_wakes_for_a_ring_and_not_for_a_time_out() {
        let bell = Doorbell::new();
        assert!(!bell.wait_thread(Some(Duration::ZERO)));
        let ringer = {
            let bell = bell.clone();
            std::thread::spawn(move || bell.ring())
        };
        assert!(bell.wait_thread(None));
        ringer.join().unwrap();
        assert!(!bell.wait_thread(Some(Duration::ZERO)));
    }
}
