//! A timer as a descriptor, for the epoll flavour.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

pub(super) struct Timer(OwnedFd);

impl Timer {
    pub(super) fn new() -> io::Result<Timer> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Timer(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Makes the descriptor readable once, after so many milliseconds (fewer than 1,000).
    pub(super) fn fire_in_ms(&self, ms: u32) {
        debug_assert!(ms < 1000);
        let it_value = Timespec { tv_sec: 0, tv_nsec: i64::from(ms) * 1_000_000 };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Fails on a bad descriptor or a time out of range only.
        let set = timerfd_settime(
            &self.0,
            TimerfdTimerFlags::empty(),
            &Itimerspec { it_interval, it_value },
        );
        debug_assert!(set.is_ok());
    }

    /// Makes it unreadable again.
    pub(super) fn clear(&self) {
        let mut expirations = [0u8; 8];
        let _ = rustix::io::read(&self.0, &mut expirations);
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
