//! Signals: SIGINT and SIGTERM ask for an orderly end, a second one ends at once, SIGUSR1 asks
//! for the flight recorders. A task hears of them by a descriptor.

use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::{flag, low_level};

/// The exit status of a process that a second signal ended: 128 and SIGINT, as shells have it.
pub const EXIT_AT_ONCE: i32 = 130;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// SIGINT or SIGTERM: stop accepting, finish, exit.
    Drain,
    /// SIGUSR1: dump the flight recorders.
    Dump,
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// The process's signals. Made once; it is never undone, so that an end asked for late in a drain
/// is still an end.
pub struct Signals {
    /// A byte in it for each signal.
    pipe: UnixStream,
    /// Set in the handler before the byte is written, which (being a system call) keeps the order.
    drain: Arc<AtomicBool>,
    dump: Arc<AtomicBool>,
    reported: bool,
}

impl Signals {
    /// Takes the signals over.
    ///
    /// # Errors
    /// The kernel's, for want of descriptors.
    pub fn install() -> io::Result<Signals> {
        let (pipe, written) = UnixStream::pair()?;
        pipe.set_nonblocking(true)?;
        let (drain, dump) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag down, goes by, and raises it.
            flag::register_conditional_shutdown(signal, EXIT_AT_ONCE, drain.clone())?;
            flag::register(signal, drain.clone())?;
            low_level::pipe::register(signal, written.try_clone()?)?;
        }
        flag::register(SIGUSR1, dump.clone())?;
        low_level::pipe::register(SIGUSR1, written)?;
        Ok(Signals { pipe, drain, dump, reported: false })
    }

    /// Readable when [`Signals::take`] has something.
    pub fn wake_fd(&self) -> RawFd {
        self.pipe.as_raw_fd()
    }

    /// What was asked for since the last time. Call until `None`; [`Wish::Drain`] comes once.
    pub fn take(&mut self) -> Option<Wish> {
        // Emptied first: a signal from here on leaves a byte for the next wake-up.
        let mut bytes = [0; 64];
        while match (&self.pipe).read(&mut bytes) {
            Ok(count) => count == bytes.len(),
            Err(e) => e.kind() == ErrorKind::Interrupted,
        } {}
        // Sequential consistency is signal-hook's own choice for these flags.
        if !self.reported && self.drain.load(Ordering::SeqCst) {
            self.reported = true;
            return Some(Wish::Drain);
        }
        self.dump.swap(false, Ordering::SeqCst).then_some(Wish::Dump)
    }
}
