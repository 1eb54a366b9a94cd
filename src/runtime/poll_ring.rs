//! Waits for any descriptor under glommio, which has no public call for that.
//!
//! A small ring of our own holds one poll per waiting future. Its completions make an eventfd
//! readable; one glommio task reads that eventfd (glommio does offer reads) and wakes the futures.
#![allow(unsafe_code)] // submitting to a ring

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::EventfdFlags;

/// Waits that may be under way on one executor before a submission needs a second system call.
const ENTRIES: u32 = 64;
/// Completions of cancellations are marked with this and ignored.
const IGNORED: u64 = u64::MAX;

pub(super) struct PollRing {
    ring: IoUring,
    waits: Vec<Wait>,
    free: Vec<usize>,
    /// Blocking mode: glommio's read is to wait, not to fail with EAGAIN.
    event: OwnedFd,
    stopped: bool,
}

/// A poll in the kernel, or a free place.
enum Wait {
    Free,
    Waiting(Option<Waker>),
    /// Its result: `revents`, or a negative errno.
    Done(i32),
    /// The future is gone, the completion is still to come.
    Abandoned,
}

impl PollRing {
    pub(super) fn new() -> io::Result<PollRing> {
        let ring = IoUring::builder().setup_clamp().build(ENTRIES)?;
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(PollRing { ring, waits: Vec::new(), free: Vec::new(), event, stopped: false })
    }

    /// For the task that reads it: a descriptor of its own.
    pub(super) fn event(&self) -> io::Result<OwnedFd> {
        self.event.try_clone()
    }

    /// Works off completions and wakes their futures. False once `stop` was called.
    pub(super) fn reap(&mut self) -> bool {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else {
                // What found no room in the queue is handed over only when asked for.
                if self.ring.submission().cq_overflow() && self.submit().is_ok() {
                    continue;
                }
                break;
            };
            if entry.user_data() == IGNORED {
                continue;
            }
            let at = entry.user_data() as usize;
            match std::mem::replace(&mut self.waits[at], Wait::Done(entry.result())) {
                Wait::Waiting(waker) => waker.into_iter().for_each(Waker::wake),
                Wait::Abandoned => self.release(at),
                Wait::Free | Wait::Done(_) => unreachable!("one completion for each poll"),
            }
        }
        !self.stopped
    }

    /// Makes the reading task end.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
        let _ = rustix::io::write(self.event.as_fd(), &1u64.to_ne_bytes());
    }

    fn start(&mut self, fd: RawFd, waker: &Waker) -> io::Result<usize> {
        let at = self.free.pop().unwrap_or_else(|| {
            self.waits.push(Wait::Free);
            self.waits.len() - 1
        });
        self.waits[at] = Wait::Waiting(Some(waker.clone()));
        let interest = (libc::POLLIN | libc::POLLRDHUP) as u32;
        let poll = opcode::PollAdd::new(types::Fd(fd), interest).build().user_data(at as u64);
        if let Err(e) = self.push(&poll) {
            self.release(at);
            return Err(e);
        }
        if let Err(e) = self.submit() {
            // It is in the queue and may yet go out: the place stays taken until it completes.
            self.waits[at] = Wait::Abandoned;
            return Err(e);
        }
        Ok(at)
    }

    fn abandon(&mut self, at: usize) {
        match &self.waits[at] {
            Wait::Waiting(_) => {
                self.waits[at] = Wait::Abandoned;
                let cancel = opcode::AsyncCancel::new(at as u64).build().user_data(IGNORED);
                // When it cannot be cancelled it completes with the descriptor's next event.
                let _ = self.push(&cancel);
            }
            Wait::Done(_) => self.release(at),
            Wait::Free | Wait::Abandoned => unreachable!("a future abandons its wait once"),
        }
    }

    fn release(&mut self, at: usize) {
        self.waits[at] = Wait::Free;
        self.free.push(at);
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: polls and cancellations name no memory.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        self.submit()?;
        // SAFETY: as above.
        unsafe { self.ring.submission().push(entry) }
            .map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))
    }

    fn submit(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Resolves when the descriptor is readable, at its end, or in error.
pub(super) struct Readable {
    ring: Rc<RefCell<PollRing>>,
    fd: RawFd,
    at: Option<usize>,
}

impl Readable {
    pub(super) fn new(ring: Rc<RefCell<PollRing>>, fd: RawFd) -> Readable {
        Readable { ring, fd, at: None }
    }
}

impl Future for Readable {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shared = self.ring.clone();
        let mut ring = shared.borrow_mut();
        let Some(at) = self.at else {
            return match ring.start(self.fd, context.waker()) {
                Ok(at) => {
                    self.at = Some(at);
                    Poll::Pending
                }
                Err(e) => Poll::Ready(Err(e)),
            };
        };
        match &mut ring.waits[at] {
            Wait::Done(result) => {
                let result = *result;
                ring.release(at);
                self.at = None;
                Poll::Ready(if result >= 0 {
                    Ok(())
                } else {
                    Err(io::Error::from_raw_os_error(-result))
                })
            }
            Wait::Waiting(waker) => {
                *waker = Some(context.waker().clone());
                Poll::Pending
            }
            Wait::Free | Wait::Abandoned => unreachable!("the wait is this future's"),
        }
    }
}

impl Drop for Readable {
    fn drop(&mut self) {
        if let Some(at) = self.at {
            self.ring.borrow_mut().abandon(at);
        }
    }
}
