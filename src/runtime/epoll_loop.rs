//! The executor for where io_uring is denied: tasks by `async-executor`, waiting by `polling`.
//!
//! Sleeps until the next timer, descriptor or wake-up from another thread; nothing ticks.
#![allow(unsafe_code)] // registering descriptors with epoll

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use async_executor::LocalExecutor;
use polling::{Event, Events, Poller};

use super::clock;
use crate::base::Instant;

/// Tasks are polled for at most this long between two looks at timers and descriptors: a task that
/// only yields must not starve them.
const RUN_NS_MAX: u64 = 500_000;

/// Timers and descriptors of one thread.
pub(super) struct EpollLoop {
    poller: Arc<Poller>,
    /// By deadline, then by number: equal deadlines fire in the order they were set.
    timers: RefCell<BTreeMap<(Instant, u64), Waker>>,
    timer_next: Cell<u64>,
    waits: RefCell<Waits>,
}

#[derive(Default)]
struct Waits {
    places: Vec<Option<Wait>>,
    free: Vec<usize>,
}

struct Wait {
    waker: Waker,
    done: bool,
}

impl EpollLoop {
    pub(super) fn new() -> io::Result<EpollLoop> {
        Ok(EpollLoop {
            poller: Arc::new(Poller::new()?),
            timers: RefCell::default(),
            timer_next: Cell::new(0),
            waits: RefCell::default(),
        })
    }

    /// Runs the executor's tasks until `main` is done.
    ///
    /// # Errors
    /// The kernel's, when waiting fails other than by a signal.
    pub(super) fn run<T: 'static>(
        &self,
        executor: &LocalExecutor<'static>,
        main: impl Future<Output = T> + 'static,
    ) -> io::Result<T> {
        let doorman = Arc::new(Doorman::new(self.poller.clone()));
        let waker = Waker::from(doorman.clone());
        let mut context = Context::from_waker(&waker);
        let mut main = executor.spawn(main);
        let mut events = Events::new();
        while !main.is_finished() {
            if run_some(executor) {
                self.wait(&mut events, Some(Duration::ZERO))?;
                continue;
            }
            // Nothing to run: have the executor ring when there is, then sleep.
            let mut tick = pin!(executor.tick());
            let idle = tick.as_mut().poll(&mut context).is_pending() && !main.is_finished();
            if idle && doorman.go_to_sleep() {
                let timeout = self.next_timer().map(|at| at.duration_from(clock::now()));
                let waited = self.wait(&mut events, timeout);
                doorman.wake_up();
                waited?;
            }
        }
        match Pin::new(&mut main).poll(&mut context) {
            Poll::Ready(output) => Ok(output),
            Poll::Pending => unreachable!("a finished task has its output"),
        }
    }

    fn next_timer_number(&self) -> u64 {
        self.timer_next.replace(self.timer_next.get() + 1)
    }

    fn next_timer(&self) -> Option<Instant> {
        self.timers.borrow().first_key_value().map(|(&(at, _), _)| at)
    }

    fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
        events.clear();
        match self.poller.wait(events, timeout) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        for event in events.iter() {
            if let Some(Some(wait)) = self.waits.borrow_mut().places.get_mut(event.key) {
                wait.done = true;
                wait.waker.wake_by_ref();
            }
        }
        self.fire_timers();
        Ok(())
    }

    fn fire_timers(&self) {
        if self.timers.borrow().is_empty() {
            return;
        }
        let now = clock::now();
        loop {
            let mut timers = self.timers.borrow_mut();
            match timers.first_entry() {
                Some(entry) if entry.key().0 <= now => {
                    let waker = entry.remove();
                    drop(timers);
                    waker.wake();
                }
                _ => return,
            }
        }
    }
}

/// True when it stopped because its time was up, false when nothing was left to run.
fn run_some(executor: &LocalExecutor<'_>) -> bool {
    let until = clock::now().plus_ns(RUN_NS_MAX);
    while executor.try_tick() {
        if clock::now() >= until {
            return true;
        }
    }
    false
}

const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const NOTIFIED: u8 = 2;

/// Wakes the thread, from wherever, with a system call only when it sleeps.
struct Doorman {
    poller: Arc<Poller>,
    /// AWAKE, ASLEEP or NOTIFIED. Every change is a read-modify-write with acquire and release, so
    /// a waker's writes before its swap are seen by the thread that finds NOTIFIED.
    state: AtomicU8,
}

impl Doorman {
    fn new(poller: Arc<Poller>) -> Doorman {
        Doorman { poller, state: AtomicU8::new(AWAKE) }
    }

    /// False when there was a wake-up since the last time: do not sleep.
    fn go_to_sleep(&self) -> bool {
        let slept = self.state.compare_exchange(AWAKE, ASLEEP, Ordering::AcqRel, Ordering::Acquire);
        if slept.is_err() {
            self.wake_up();
        }
        slept.is_ok()
    }

    fn wake_up(&self) {
        self.state.swap(AWAKE, Ordering::AcqRel);
    }

    fn ring(&self) {
        if self.state.swap(NOTIFIED, Ordering::AcqRel) == ASLEEP {
            // Fails only when the poller is broken, which its own wait reports.
            let _ = self.poller.notify();
        }
    }
}

impl Wake for Doorman {
    fn wake(self: Arc<Self>) {
        self.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

/// Resolves at its time.
pub(super) struct Sleep {
    on: Rc<EpollLoop>,
    at: Instant,
    number: Option<u64>,
}

impl Sleep {
    pub(super) fn new(on: Rc<EpollLoop>, at: Instant) -> Sleep {
        Sleep { on, at, number: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if clock::now() >= self.at {
            return Poll::Ready(());
        }
        if self.at != Instant::NEVER {
            let number = self.number.unwrap_or_else(|| self.on.next_timer_number());
            self.number = Some(number);
            self.on.timers.borrow_mut().insert((self.at, number), context.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.on.timers.borrow_mut().remove(&(self.at, number));
        }
    }
}

/// Resolves when the descriptor is readable, at its end, or in error.
pub(super) struct Readable {
    on: Rc<EpollLoop>,
    fd: RawFd,
    registered: Option<(OwnedFd, usize)>,
}

impl Readable {
    pub(super) fn new(on: Rc<EpollLoop>, fd: RawFd) -> Readable {
        Readable { on, fd, registered: None }
    }

    fn register(&mut self, waker: &Waker) -> io::Result<()> {
        if self.fd < 0 {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        // SAFETY: not -1, just checked. The number is used in this call only, to make a descriptor
        // of our own; if the
        // caller closed it meanwhile this is EBADF, or a wait for something else that is open.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) }.try_clone_to_owned()?;
        let mut waits = self.on.waits.borrow_mut();
        let wait = Some(Wait { waker: waker.clone(), done: false });
        let key = match waits.free.pop() {
            Some(key) => {
                waits.places[key] = wait;
                key
            }
            None => {
                waits.places.push(wait);
                waits.places.len() - 1
            }
        };
        // SAFETY: the duplicate is ours and is taken out of the set, in `Drop`, before it closes.
        // Being a duplicate it also cannot be in the set already.
        let added = unsafe { self.on.poller.add(&fd, Event::readable(key)) };
        if let Err(e) = added {
            waits.places[key] = None;
            waits.free.push(key);
            return Err(e);
        }
        drop(waits);
        self.registered = Some((fd, key));
        Ok(())
    }
}

impl Future for Readable {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some((_, key)) = self.registered else {
            return match self.register(context.waker()) {
                Ok(()) => Poll::Pending,
                Err(e) => Poll::Ready(Err(e)),
            };
        };
        let mut waits = self.on.waits.borrow_mut();
        let Some(wait) = &mut waits.places[key] else { unreachable!("ours until dropped") };
        if wait.done {
            return Poll::Ready(Ok(()));
        }
        wait.waker = context.waker().clone();
        Poll::Pending
    }
}

impl Drop for Readable {
    fn drop(&mut self) {
        if let Some((fd, key)) = self.registered.take() {
            let _ = self.on.poller.delete(&fd);
            let mut waits = self.on.waits.borrow_mut();
            waits.places[key] = None;
            waits.free.push(key);
        }
    }
}
