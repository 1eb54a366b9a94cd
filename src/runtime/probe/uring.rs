//! Can we have rings? Asked of the kernel itself, step by step, with everything we shall need.
#![allow(unsafe_code)] // a fork, and a system call in the child

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, squeue};

use super::super::Flavour;
use super::super::executor::start_executor;
use super::{Denial, Limit};

/// glommio does not start below 512 KiB. With its registered buffers (192 KiB), its rings and ours
/// (110 KiB for 1,024 connections) an executor takes some 300 KiB: room for three.
const LOCKED_BYTES_MIN: u64 = 1 << 20;

/// How the kernel can run our rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingModes {
    /// Completions wait until we ask (Linux 6.1).
    pub deferred: bool,
    /// Completions wait for our next system call (Linux 5.19).
    pub cooperative: bool,
}

impl RingModes {
    /// What to say of it beside "io_uring".
    pub fn describe(&self) -> &'static str {
        match (self.deferred, self.cooperative) {
            (true, _) => "",
            (false, true) => " (Linux before 6.1: completions interrupt, if seldom)",
            (false, false) => " (Linux before 5.19: completions interrupt)",
        }
    }
}

/// Rings, the operations on them, and a glommio executor: all of it is tried.
pub(super) fn probe(
    seccomp: bool,
    container: Option<&'static str>,
    locked_bytes: &Limit,
) -> Result<RingModes, Denial> {
    let denied = |what: String, remedy: String| Denial {
        what,
        costs: "sockets go through epoll: a system call for every receive and send instead of one \
                a tick for all; files are read through the page cache",
        remedy,
    };
    // Some filters (systemd's SystemCallFilter=) kill instead of failing the call: send a child.
    if seccomp && let Some(signal) = killed_by_setup() {
        let what = format!("io_uring: the seccomp filter kills whoever uses it (signal {signal})");
        return Err(denied(what, remedy_for_filter(container)));
    }
    let modes = on_own_thread(try_rings).map_err(|error| {
        let (why, remedy) = explain(&error, seccomp, container);
        denied(format!("io_uring: {why}"), remedy)
    })?;
    if !locked_bytes.allows(LOCKED_BYTES_MIN) {
        let what = format!(
            "io_uring: only {} KiB of memory may be locked, its queues and buffers want {}",
            locked_bytes.now.unwrap_or(0) >> 10,
            LOCKED_BYTES_MIN >> 10
        );
        let remedy = "ulimit -l 8192, LimitMEMLOCK=8M in systemd, --ulimit memlock=8388608 in \
                      Docker";
        return Err(denied(what, remedy.to_owned()));
    }
    let executor = start_executor("probe", None, Flavour::IoUring, |_| async {});
    match executor.and_then(|executor| executor.join()) {
        Ok(()) => Ok(modes),
        Err(error) => {
            let what = format!("io_uring: rings work, but glommio does not start: {error}");
            Err(denied(what, "see its message".to_owned()))
        }
    }
}

fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    std::thread::spawn(work).join().unwrap_or_else(|_| Err(io::Error::other("the probe panicked")))
}

/// A ring with an eventfd, and every operation that we use.
fn try_rings() -> io::Result<RingModes> {
    let ring = IoUring::new(8)?;
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
    ring.submitter().register_eventfd(event.as_raw_fd())?;
    let mut known = io_uring::Probe::new();
    ring.submitter().register_probe(&mut known)?;
    let needed = [
        ("accept", opcode::Accept::CODE),
        ("receive", opcode::Recv::CODE),
        ("send", opcode::Send::CODE),
        ("poll", opcode::PollAdd::CODE),
        ("cancel", opcode::AsyncCancel::CODE),
        ("timeout", opcode::Timeout::CODE),
        ("read", opcode::Read::CODE),
    ];
    if let Some((name, _)) = needed.iter().find(|(_, code)| !known.is_supported(*code)) {
        return Err(io::Error::other(format!("the kernel has no {name} on rings")));
    }
    let mut deferred = IoUring::<squeue::Entry>::builder();
    let mut cooperative = deferred.clone();
    let deferred = deferred.setup_single_issuer().setup_defer_taskrun().build(8).is_ok();
    let cooperative = cooperative.setup_coop_taskrun().build(8).is_ok();
    Ok(RingModes { deferred, cooperative })
}

/// What an error of `io_uring_setup` means here, and what would help.
fn explain(error: &io::Error, seccomp: bool, container: Option<&str>) -> (String, String) {
    let switched_off = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
        .is_ok_and(|value| value.trim() != "0");
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if switched_off => (
            "it is switched off by the sysctl kernel.io_uring_disabled".to_owned(),
            "sysctl kernel.io_uring_disabled=0 (on the host)".to_owned(),
        ),
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS) if seccomp => {
            (format!("the seccomp filter denies it ({error})"), remedy_for_filter(container))
        }
        Some(libc::ENOSYS) => (
            "this kernel has none (or a sandbox like gVisor hides it)".to_owned(),
            "Linux 5.11 or newer with CONFIG_IO_URING".to_owned(),
        ),
        Some(libc::ENOMEM) => (
            "no memory for rings (before Linux 5.12 they count as locked memory)".to_owned(),
            "ulimit -l unlimited, or a newer kernel".to_owned(),
        ),
        _ => (format!("{error}"), "Linux 5.11 or newer; 6.1 is better".to_owned()),
    }
}

fn remedy_for_filter(container: Option<&str>) -> String {
    let calls = "io_uring_setup, io_uring_enter and io_uring_register (425 to 427)";
    match container {
        Some("Kubernetes") => format!(
            "a securityContext.seccompProfile of type Localhost whose profile allows {calls}"
        ),
        Some(_) => format!(
            "a profile that allows {calls}: --security-opt seccomp=PROFILE.json (or, at your own \
             risk, seccomp=unconfined)"
        ),
        None => format!("allow {calls} (systemd: SystemCallFilter=@io-event and these by name)"),
    }
}

/// Makes a ring in a child process; the signal, if the attempt killed it.
fn killed_by_setup() -> Option<i32> {
    // Room for `struct io_uring_params` (120 bytes), all zero: no flags.
    let mut parameters = [0u64; 16];
    // SAFETY: rustix and std offer no fork. In the child of a process with threads only
    // async-signal-safe calls are allowed: it makes one system call, which writes at most 120
    // bytes to the 128 of `parameters`, and `_exit`s. It returns to no Rust code.
    let child = unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr());
            libc::_exit(0);
        }
        child
    };
    if child < 0 {
        return None;
    }
    let mut status = 0;
    loop {
        // SAFETY: `child` is ours and not yet waited for; the kernel writes one int to `status`.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        if waited == child {
            return libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status));
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_by_a_filter_names_the_calls_and_the_place_to_allow_them() {
        let error = io::Error::from_raw_os_error(libc::ENOSYS);
        let (why, remedy) = explain(&error, true, Some("Docker"));
        assert!(why.contains("seccomp") && remedy.contains("--security-opt"), "{why}: {remedy}");
        let (_, remedy) = explain(&error, true, Some("Kubernetes"));
        assert!(remedy.contains("seccompProfile") && remedy.contains("425"));
        let (why, remedy) = explain(&error, false, None);
        assert!(why.contains("kernel") && remedy.contains("CONFIG_IO_URING"), "{why}: {remedy}");
    }

    #[test]
    fn without_a_filter_nobody_is_killed_for_making_a_ring() {
        if !super::super::machine::seccomp() {
            assert_eq!(killed_by_setup(), None);
        }
    }
}
