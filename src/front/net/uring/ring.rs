//! One raw ring: made with the best flags the kernel has, filled, submitted, reaped, counted.
#![allow(unsafe_code)] // operations name memory by address

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::super::slots::ConnId;

/// The kinds of operation. With a [`ConnId`] (or a listener's number) one names an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Accept = 1,
    Receive = 2,
    Send = 3,
    /// Waits for the end of a peer that we are not reading.
    Guard = 4,
    Cancel = 5,
    Sweep = 6,
}

/// What comes back with a completion: which operation it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) kind: Kind,
    pub(super) conn: ConnId,
}

impl Tag {
    pub(super) fn new(kind: Kind, conn: ConnId) -> Tag {
        Tag { kind, conn }
    }

    /// For what belongs to no connection: `number` is a listener's, or 0.
    pub(super) fn numbered(kind: Kind, number: u8) -> Tag {
        Tag { kind, conn: ConnId { slot: u32::from(number), generation: 0 } }
    }

    fn encode(self) -> u64 {
        let generation = u64::from(self.conn.generation) << 32;
        (self.kind as u64) << 56 | generation | u64::from(self.conn.slot)
    }

    fn decode(word: u64) -> Tag {
        let kind = match (word >> 56) as u8 {
            1 => Kind::Accept,
            2 => Kind::Receive,
            3 => Kind::Send,
            4 => Kind::Guard,
            5 => Kind::Cancel,
            6 => Kind::Sweep,
            other => unreachable!("no operation of ours is tagged {other}"),
        };
        let generation = (word >> 32) as u32 & 0x00ff_ffff;
        Tag { kind, conn: ConnId { slot: word as u32, generation } }
    }
}

/// A completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) tag: Tag,
    /// What the system call would have returned: negative errno on failure.
    pub(super) result: i32,
    /// More completions of the same operation will come.
    pub(super) more: bool,
    /// The socket had more to read than the receive took.
    pub(super) nonempty: bool,
}

pub(super) struct Ring {
    ring: IoUring,
    /// Operations that found the submission queue full while the kernel would not take more. Each
    /// connection has at most six under way (receive, send, guard and a cancel for each), so this
    /// is bounded like the table is.
    backlog: VecDeque<squeue::Entry>,
    /// Operations pushed whose last completion has not been seen.
    in_flight: usize,
    pub(super) system_calls: u64,
}

impl Ring {
    /// A ring whose completions make `event` readable.
    pub(super) fn new(connections_max: u32, event: BorrowedFd<'_>) -> io::Result<Ring> {
        // Submission is in batches of a tick; a full queue costs one more system call, no more.
        let submissions = connections_max.next_power_of_two().clamp(64, 256);
        // A receive and a send for everybody, and some arrivals. Should there be more, the kernel
        // keeps them in a list of its own until there is room. The memory of both queues counts as
        // locked (again, since Linux 6.13): 80 KiB for 1,024 connections.
        let completions = (connections_max * 2 + 256).next_power_of_two().min(65_536);
        Ring::with_sizes(submissions, completions, event)
    }

    fn with_sizes(submissions: u32, completions: u32, event: BorrowedFd<'_>) -> io::Result<Ring> {
        let ring = build(submissions, completions).map_err(explain_memory)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Ring { ring, backlog: VecDeque::new(), in_flight: 0, system_calls: 0 })
    }

    /// Queues an operation; it reaches the kernel with the next [`Ring::submit`].
    ///
    /// # Safety
    /// Memory that the operation names stays valid, and is not touched (or, where the kernel only
    /// reads, not changed), until its last completion was seen or for ever.
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry, tag: Tag) {
        let entry = entry.user_data(tag.encode());
        self.in_flight += 1;
        if self.backlog.is_empty() {
            // SAFETY: the caller's promise is exactly what `push` asks for.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full. What the kernel refuses now goes to the backlog and out with a later submit.
            let _ = self.enter();
            // SAFETY: as above.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    /// Asks for an operation's early end. It completes with ECANCELED, or as if nothing had been
    /// asked when it was over already.
    pub(super) fn cancel(&mut self, target: Tag) {
        let entry = opcode::AsyncCancel::new(target.encode()).build();
        // SAFETY: the operation names no memory.
        unsafe { self.push(entry, Tag::new(Kind::Cancel, target.conn)) };
    }

    /// Whether operations wait that the kernel has not taken.
    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Gives everything queued to the kernel, as far as it takes it.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        loop {
            while let Some(entry) = self.backlog.front() {
                // SAFETY: `Ring::push` was promised what this asks for, until completion.
                if unsafe { self.ring.submission().push(entry) }.is_err() {
                    break;
                }
                self.backlog.pop_front();
            }
            if self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.enter() {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(e) if passes(&e) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    fn enter(&mut self) -> io::Result<usize> {
        self.system_calls += 1;
        self.ring.submit()
    }

    /// Lets the kernel finish what it put off until we ask (DEFER_TASKRUN), or what its queue had
    /// no room for. No system call when there is nothing of the kind.
    pub(super) fn run_deferred(&mut self) {
        let (deferred, overflow) = {
            let queue = self.ring.submission();
            (queue.taskrun(), queue.cq_overflow())
        };
        if deferred || overflow {
            // An error that stays shows at the next submit, which reports it.
            let _ = self.enter();
        }
    }

    pub(super) fn next(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        let more = cqueue::more(entry.flags());
        if !more {
            self.in_flight -= 1;
        }
        Some(Completion {
            tag: Tag::decode(entry.user_data()),
            result: entry.result(),
            more,
            nonempty: cqueue::sock_nonempty(entry.flags()),
        })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Submits and waits, at most a second, for a completion.
    pub(super) fn wait_for_one(&mut self) -> io::Result<()> {
        let patience = types::Timespec::new().sec(1);
        let arguments = types::SubmitArgs::new().timespec(&patience);
        match self.ring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => Ok(()),
            Err(e) if passes(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let parameters = self.ring.params();
        parameters.sq_entries() as usize * (size_of::<squeue::Entry>() + size_of::<u32>())
            + parameters.cq_entries() as usize * size_of::<cqueue::Entry>()
    }
}

/// Errors of an enter that are over by themselves: a signal came, memory was short for a moment,
/// or completions must be read first.
fn passes(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

/// Says what else "cannot allocate memory" may mean here.
fn explain_memory(error: io::Error) -> io::Error {
    if error.raw_os_error() != Some(libc::ENOMEM) {
        return error;
    }
    let text = "no memory for an io_uring ring: the limit on locked memory may be too low \
                (ulimit -l, LimitMEMLOCK= in systemd, --ulimit memlock= in Docker)";
    io::Error::new(io::ErrorKind::OutOfMemory, text)
}

/// Linux 6.1 has DEFER_TASKRUN (completions are worked off when we ask and never interrupt us),
/// 5.19 COOP_TASKRUN (they wait for our next system call); older kernels interrupt.
fn build(submissions: u32, completions: u32) -> io::Result<IoUring> {
    let deferred = IoUring::builder()
        .setup_clamp()
        .setup_cqsize(completions)
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(submissions);
    match deferred {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
        other => return other,
    }
    let cooperative = IoUring::builder()
        .setup_clamp()
        .setup_cqsize(completions)
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(submissions);
    match cooperative {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
        other => return other,
    }
    IoUring::builder().setup_clamp().setup_cqsize(completions).build(submissions)
}

#[cfg(test)]
mod tests {
    use super::super::super::socket;
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_tag_survives_the_way_through_the_kernel() {
        let kinds =
            [Kind::Accept, Kind::Receive, Kind::Send, Kind::Guard, Kind::Cancel, Kind::Sweep];
        for kind in kinds {
            for (slot, generation) in [(0, 0), (65_535, 1), (u32::MAX, 0x00ff_ffff)] {
                let tag = Tag::new(kind, ConnId { slot, generation });
                assert_eq!(Tag::decode(tag.encode()), tag);
            }
        }
    }

    #[test]
    fn nothing_is_lost_when_there_is_more_than_the_queues_hold() {
        let event = socket::new_event().unwrap();
        let Ok(mut ring) = Ring::with_sizes(4, 8, event.as_fd()) else {
            eprintln!("skipped: io_uring is denied here");
            return;
        };
        // Cancellations of nothing: each completes with ENOENT.
        for slot in 0..500 {
            ring.cancel(Tag::new(Kind::Send, ConnId { slot, generation: 1 }));
        }
        ring.submit().unwrap();
        let mut seen = Vec::new();
        while ring.in_flight() > 0 {
            let before = seen.len();
            ring.run_deferred();
            while let Some(completion) = ring.next() {
                assert_eq!((completion.tag.kind, completion.result), (Kind::Cancel, -libc::ENOENT));
                seen.push(completion.tag.conn.slot);
            }
            ring.submit().unwrap();
            assert!(seen.len() > before || ring.in_flight() == 0, "after {before}");
        }
        assert_eq!(seen, (0..500).collect::<Vec<_>>());
        assert!(!ring.has_backlog());
    }
}
