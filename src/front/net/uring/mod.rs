//! The io_uring flavour: every operation of every socket goes through one ring.
//!
//! Receives are single-shot into the connection's own buffer, not multishot over a shared buffer
//! ring: a multishot receive takes as many shared buffers as a fast sender can fill before a pause
//! reaches the kernel, and those of paused connections would be missing to all others. Nor is it
//! dearer: 64-byte messages from 100 connections cost 3.6 µs each this way and 4.1 µs with
//! multishot
//! (Linux 6.18, two shared Zen 5 CPUs), as arming anew is one more entry in the tick's one system
//! call and saves the bookkeeping of buffers.

mod answer;
mod ask;
mod ring;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::buffers::ReceiveBuffers;
use super::slots::Slots;
use super::{
    Close, CloseReason, ConnId, LISTENERS_MAX, ListenerId, NetCounters, NetEvent, NetSettings,
    Phase, Sending, linger_sweeps, socket,
};
use ring::{Kind, Ring, Tag};

pub(super) struct UringNet {
    ring: Ring,
    settings: NetSettings,
    connections: Slots<Connection>,
    /// In flight exactly when the connection's `receiving` is set.
    buffers: ReceiveBuffers,
    /// Connections with something to do that no completion will bring: held input of one that
    /// reads again, or the end of a closing one. Each is in it once at most.
    ready: VecDeque<ConnId>,
    listeners: Vec<Listener>,
    accepting: bool,
    /// Accepting failed for want of descriptors or memory: tried again at the next sweep.
    accept_later: bool,
    multishot_accept: bool,
    poll_first: bool,
    sweep_armed: bool,
    lingering: u32,
    wake: OwnedFd,
    counters: NetCounters,
}

struct Listener {
    /// `None` once listening has stopped.
    socket: Option<OwnedFd>,
    armed: bool,
    cancelled: bool,
}

struct Connection {
    socket: OwnedFd,
    phase: Phase,
    reading: bool,
    /// A receive into this place's buffer is in flight.
    receiving: bool,
    /// Bytes that arrived after a pause, in the buffer; 0 for none.
    held_bytes: u32,
    /// The last receive left something in the socket.
    more_to_read: bool,
    /// A lingering connection's peer has closed; ours may still have something to send.
    peer_ended: bool,
    sending: Option<Sending>,
    guarded: bool,
    queued: bool,
}

impl Connection {
    fn new(socket: OwnedFd) -> Connection {
        Connection {
            socket,
            phase: Phase::Open,
            reading: true,
            receiving: false,
            held_bytes: 0,
            more_to_read: true,
            peer_ended: false,
            sending: None,
            guarded: false,
            queued: false,
        }
    }

    fn has_operations(&self) -> bool {
        self.receiving || self.guarded || self.sending.is_some()
    }
}

impl UringNet {
    pub(super) fn new(settings: NetSettings) -> io::Result<UringNet> {
        let count = settings.connections_max;
        let wake = socket::new_event()?;
        Ok(UringNet {
            ring: Ring::new(count, wake.as_fd())?,
            connections: Slots::new(count),
            buffers: ReceiveBuffers::new(count as usize, settings.receive_piece_bytes as usize),
            ready: VecDeque::with_capacity(count as usize),
            listeners: Vec::with_capacity(LISTENERS_MAX),
            accepting: true,
            accept_later: false,
            multishot_accept: true,
            poll_first: true,
            sweep_armed: false,
            lingering: 0,
            wake,
            counters: NetCounters::default(),
            settings,
        })
    }

    pub(super) fn add_listener(&mut self, listener: OwnedFd) -> io::Result<ListenerId> {
        if self.listeners.len() == LISTENERS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many listeners"));
        }
        // io_uring answers EAGAIN on a non-blocking descriptor instead of waiting.
        rustix::io::ioctl_fionbio(&listener, false)?;
        let id = self.listeners.len() as ListenerId;
        self.listeners.push(Listener { socket: Some(listener), armed: false, cancelled: false });
        self.arm_accept(id);
        Ok(id)
    }

    pub(super) fn adopt(&mut self, socket: OwnedFd) -> Result<ConnId, OwnedFd> {
        if self.connections.is_full() || rustix::io::ioctl_fionbio(&socket, false).is_err() {
            return Err(socket);
        }
        Ok(self.take_in(socket))
    }

    pub(super) fn poll(&mut self, sink: &mut impl FnMut(NetEvent<'_>)) -> usize {
        let limit = self.settings.events_per_poll_max as usize;
        let handled = self.work_off(limit, sink);
        if handled > 0 {
            return handled;
        }
        // Nothing there, so the caller may go to wait. Only now clear the wake-up: what completes
        // from here on signals again, and what completed before is found by the second look.
        self.counters.system_calls += 1;
        socket::clear(self.wake.as_fd());
        self.work_off(limit, sink)
    }

    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.ring.submit()?;
        if !self.ready.is_empty() || self.ring.has_backlog() {
            self.counters.system_calls += 1;
            socket::signal(self.wake.as_fd());
        }
        Ok(())
    }

    pub(super) fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    pub(super) fn pause_reading(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if connection.phase == Phase::Open && connection.reading {
            connection.reading = false;
            // A receive in flight notices the peer's end as well as the guard does.
            if !connection.receiving {
                self.arm_guard(conn);
            }
        }
    }

    pub(super) fn resume_reading(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if connection.phase != Phase::Open || connection.reading {
            return;
        }
        connection.reading = true;
        if connection.held_bytes > 0 {
            self.make_ready(conn);
        } else {
            self.arm_receive(conn);
        }
    }

    pub(super) fn send(&mut self, conn: ConnId, buffer: Vec<u8>) -> Result<(), Vec<u8>> {
        match self.connections.get_mut(conn) {
            Some(connection) if connection.phase == Phase::Open && connection.sending.is_none() => {
                connection.sending = Some(Sending { buffer, taken: 0 });
                self.push_send(conn);
                Ok(())
            }
            _ => Err(buffer),
        }
    }

    pub(super) fn can_send(&self, conn: ConnId) -> bool {
        self.connections.get(conn).is_some_and(|c| c.phase == Phase::Open && c.sending.is_none())
    }

    pub(super) fn taken(&self, conn: ConnId) -> usize {
        let sending = self.connections.get(conn).and_then(|c| c.sending.as_ref());
        sending.map_or(0, |s| s.taken)
    }

    pub(super) fn socket(&self, conn: ConnId) -> Option<BorrowedFd<'_>> {
        self.connections.get(conn).map(|c| c.socket.as_fd())
    }

    pub(super) fn close(&mut self, conn: ConnId, how: Close) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        match (connection.phase, how) {
            (Phase::Closing(_), _) | (Phase::Lingering { .. }, Close::Linger) => {}
            (_, Close::Now) => {
                socket::reset_on_close(connection.socket.as_fd());
                self.begin_closing(conn, CloseReason::Ours);
            }
            (Phase::Open, Close::Linger) => {
                let sweeps_left = linger_sweeps(&self.settings);
                connection.phase = Phase::Lingering { shut: false, sweeps_left };
                connection.held_bytes = 0;
                self.lingering += 1;
                self.arm_sweep();
                self.arm_receive(conn);
                self.shut_if_sent(conn);
            }
        }
    }

    pub(super) fn pause_accepting(&mut self) {
        self.accepting = false;
        for id in 0..self.listeners.len() as ListenerId {
            self.cancel_accept(id);
        }
    }

    pub(super) fn resume_accepting(&mut self) {
        self.accepting = true;
        self.arm_accepts();
    }

    pub(super) fn stop_listening(&mut self) {
        for id in 0..self.listeners.len() as ListenerId {
            self.cancel_accept(id);
            // The operation holds the socket until its cancellation, with the next submit.
            self.listeners[usize::from(id)].socket = None;
        }
    }

    pub(super) fn connections(&self) -> u32 {
        self.connections.used()
    }

    pub(super) fn counters(&self) -> NetCounters {
        let system_calls = self.counters.system_calls + self.ring.system_calls;
        NetCounters { system_calls, ..self.counters }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        size_of::<UringNet>()
            + self.connections.bytes()
            + self.connections.capacity() as usize * size_of::<ConnId>()
            + self.buffers.bytes()
            + self.ring.memory_bytes()
    }
}

impl Drop for UringNet {
    /// Calls everything in flight back and waits until the kernel has let go of our memory.
    fn drop(&mut self) {
        self.stop_listening();
        if self.sweep_armed {
            self.ring.cancel(Tag::numbered(Kind::Sweep, 0));
        }
        for slot in 0..self.connections.places() {
            if let Some(conn) = self.connections.id_at(slot) {
                self.begin_closing(conn, CloseReason::Ours);
            }
        }
        // Each round ends with a completion or after a second; cancelled operations complete in
        // microseconds, so the patience is never used up unless the ring is broken.
        let mut patience = 10;
        while self.ring.in_flight() > 0 && patience > 0 {
            let before = self.ring.in_flight();
            let submitted = self.ring.submit().and_then(|()| self.ring.wait_for_one());
            while let Some(completion) = self.ring.next() {
                self.complete(completion, &mut |_| {});
            }
            if submitted.is_err() || self.ring.in_flight() >= before {
                patience -= 1;
            }
        }
        if self.ring.in_flight() > 0 {
            // The kernel may still write to and read from what we lent it: never free that.
            self.buffers.leak();
            for slot in 0..self.connections.places() {
                let Some(conn) = self.connections.id_at(slot) else { continue };
                let sending = self.connections.get_mut(conn).and_then(|c| c.sending.take());
                std::mem::forget(sending);
            }
        }
    }
}
