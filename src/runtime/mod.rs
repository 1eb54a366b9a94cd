//! What the cores stand on: threads, executors, the clock, the machine's limits.
//!
//! Core: every core's shell uses it; core code (pure state machines) never does.
//!
//! - [`mod@probe`]: at start, what this machine and its container allow, and what a denial costs;
//! - [`topology`]: which role runs on which CPU;
//! - [`executor`]: one thread, one executor: glommio, or an epoll loop where io_uring is denied;
//! - [`metrics`]: the page for Prometheus and its door;
//! - [`clock`], [`sched`], [`shutdown`], [`stall`], [`recorder`]: see there.

pub mod clock;
mod epoll_loop;
pub mod executor;
mod gate;
pub mod lifecycle;
pub mod metrics;
mod poll_ring;
pub mod probe;
pub mod recorder;
pub mod sched;
pub mod shutdown;
pub mod stall;
pub mod topology;

pub use clock::now;
pub use executor::{ExecutorHandle, Local, start_executor};
pub use lifecycle::Lifecycle;
pub use probe::{Probe, probe};

/// What carries executors and sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// glommio, and a ring of our own for the sockets.
    IoUring,
    /// For where io_uring is denied: an epoll loop, non-blocking sockets.
    Epoll,
}

impl Flavour {
    /// As it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Flavour::IoUring => "io_uring",
            Flavour::Epoll => "epoll",
        }
    }
}
