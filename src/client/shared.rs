//! One connection's state, shared by those who use it and those who move its bytes.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Instant;

use super::core::ClientCore;
use super::error::ClientError;
use super::event::Event;

/// The state and who waits for what.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) core: ClientCore,
    /// Whoever sends: woken when there may be something to send, and at the end.
    pub(super) writer: Option<Waker>,
    /// Whoever waits for an event of a stream.
    streams: BTreeMap<u32, Waker>,
    /// Whoever waits for WELCOME, numbers or a pong.
    others: Vec<Waker>,
    /// Nobody uses the connection any more.
    pub(super) is_released: bool,
}

pub(super) type SharedRef = Arc<Mutex<Shared>>;

pub(super) fn new_shared(core: ClientCore) -> SharedRef {
    Arc::new(Mutex::new(Shared {
        core,
        writer: None,
        streams: BTreeMap::new(),
        others: Vec::new(),
        is_released: false,
    }))
}

/// A thread that panicked while it held the lock left a whole state behind: nothing in here
/// panics half-way.
pub(super) fn lock(shared: &SharedRef) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Wakes the sender if there is something to send, or nothing will be any more.
    pub(super) fn wake_writer(&mut self) {
        let is_over = self.is_released || self.core.error().is_some();
        if (is_over || self.core.wants_to_send())
            && let Some(waker) = self.writer.take()
        {
            waker.wake();
        }
    }

    /// Something came from the server: everybody looks. (A step's tokens go to most streams of a
    /// connection, so telling who is meant would hardly save a wake.)
    pub(super) fn wake_all(&mut self) {
        while let Some((_, waker)) = self.streams.pop_first() {
            waker.wake();
        }
        self.others.drain(..).for_each(Waker::wake);
        self.wake_writer();
    }

    pub(super) fn fail(&mut self, error: ClientError) {
        self.core.fail(error);
        self.wake_all();
    }

    /// A stream's next event; `None` after its last.
    pub(super) fn poll_event(
        &mut self,
        stream: u32,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Event, ClientError>>> {
        match self.core.poll_event(stream) {
            Ok(Some(event)) => {
                // The credit for it may be due.
                self.wake_writer();
                Poll::Ready(Some(Ok(event)))
            }
            Ok(None) if self.core.is_finished(stream) => Poll::Ready(None),
            Ok(None) => {
                self.streams.insert(stream, cx.waker().clone());
                Poll::Pending
            }
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }

    /// Waits until `look` finds something, or the connection is over.
    pub(super) fn poll_other<T>(
        &mut self,
        cx: &mut Context<'_>,
        look: impl FnOnce(&mut ClientCore) -> Option<T>,
    ) -> Poll<Result<T, ClientError>> {
        if let Some(found) = look(&mut self.core) {
            return Poll::Ready(Ok(found));
        }
        if let Some(error) = self.core.error() {
            return Poll::Ready(Err(error.clone()));
        }
        self.others.push(cx.waker().clone());
        Poll::Pending
    }
}

/// Stops one request, from anywhere.
#[derive(Clone, Debug)]
pub struct Canceller {
    pub(super) shared: SharedRef,
    pub(super) stream: u32,
}

impl Canceller {
    /// Asks the server to stop; the request's last event still comes. Calling it again, or after
    /// the end, does nothing.
    pub fn cancel(&self) {
        let mut shared = lock(&self.shared);
        shared.core.cancel(self.stream);
        shared.wake_all();
    }
}

/// Wakes a thread that is parked.
pub(super) struct ThreadWaker(pub(super) Thread);

impl Wake for ThreadWaker {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on this thread; `None` when `until` comes first.
pub(super) fn block_on<T>(future: impl Future<Output = T>, until: Option<Instant>) -> Option<T> {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(ThreadWaker(std::thread::current())));
    let mut cx = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
            return Some(value);
        }
        match until {
            None => std::thread::park(),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                std::thread::park_timeout(left);
            }
        }
    }
}
