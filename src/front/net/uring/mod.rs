//! The io_uring flavour: every operation of every socket goes through one ring.
//!
//! Receives are single-shot into the connection's own buffer, not multishot over a shared buffer
//! ring: a multishot receive takes as many shared buffers as a fast sender can fill before a pause
//! reaches the kernel, and those of paused connections would be missing to all others. Armed
//! anew after each piece it costs one more queue entry, in the tick's one system call.
#![allow(unsafe_code)] // operations name memory by address; completions name descriptors

mod ring;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use io_uring::{opcode, types};

use super::buffers::ReceiveBuffers;
use super::slots::Slots;
use super::{
    Arrivals, Close, CloseReason, ConnId, LISTENERS_MAX, ListenerId, NetCounters, NetEvent,
    NetSettings, Phase, SWEEP_MS, Sending, linger_sweeps, socket,
};
use ring::{Completion, Kind, Ring, Tag};

/// From linux/io_uring.h: wait for readiness first, do not try at once. Saves the vain attempt
/// when the last receive emptied the socket. Linux 5.19.
const RECEIVE_POLL_FIRST: u16 = 1;

static SWEEP_AFTER: types::Timespec = types::Timespec::new().nsec(SWEEP_MS * 1_000_000);

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

// ---------------------------------------------------------------------------- what Net calls

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

// ---------------------------------------------------------------------------- asking the kernel

impl UringNet {
    fn take_in(&mut self, socket: OwnedFd) -> ConnId {
        let Ok(conn) = self.connections.insert(Connection::new(socket)) else {
            unreachable!("the caller made sure that there is room")
        };
        self.counters.accepted += 1;
        self.arm_receive(conn);
        conn
    }

    fn arm_receive(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if connection.receiving || connection.held_bytes > 0 {
            return;
        }
        connection.receiving = true;
        let descriptor = types::Fd(connection.socket.as_raw_fd());
        let poll_first = self.poll_first && !connection.more_to_read;
        let ioprio = if poll_first { RECEIVE_POLL_FIRST } else { 0 };
        let length = self.buffers.piece_bytes() as u32;
        let entry = opcode::Recv::new(descriptor, self.buffers.target(conn.slot), length)
            .ioprio(ioprio)
            .build();
        // SAFETY: the address names this place's own `piece_bytes`, which live as long as `self`,
        // and `Drop` reaps the receive before it frees them (or leaks them). Until `receiving` is
        // cleared by the completion nobody reads or reuses them: the place is freed only when
        // `has_operations` is false, and `filled` is called only after a completion.
        unsafe { self.ring.push(entry, Tag::new(Kind::Receive, conn)) };
    }

    fn push_send(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get(conn) else { return };
        let Some(sending) = &connection.sending else { return };
        let rest = &sending.buffer[sending.taken..];
        let descriptor = types::Fd(connection.socket.as_raw_fd());
        let entry = opcode::Send::new(descriptor, rest.as_ptr(), rest.len() as u32)
            .flags(libc::MSG_NOSIGNAL)
            .build();
        // SAFETY: `rest` lies in the heap memory of a vector that stays, unchanged, in
        // `connection.sending` until this operation's completion takes it out; moving the vector
        // itself does not move that memory. `Drop` reaps the send or leaks the vector.
        unsafe { self.ring.push(entry, Tag::new(Kind::Send, conn)) };
    }

    fn arm_guard(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if connection.guarded {
            return;
        }
        connection.guarded = true;
        // POLLHUP and POLLERR are always reported.
        let descriptor = types::Fd(connection.socket.as_raw_fd());
        let entry = opcode::PollAdd::new(descriptor, libc::POLLRDHUP as u32).build();
        // SAFETY: the operation names no memory.
        unsafe { self.ring.push(entry, Tag::new(Kind::Guard, conn)) };
    }

    fn arm_accepts(&mut self) {
        for id in 0..self.listeners.len() as ListenerId {
            self.arm_accept(id);
        }
    }

    fn arm_accept(&mut self, id: ListenerId) {
        let listener = &mut self.listeners[usize::from(id)];
        let Some(socket) = &listener.socket else { return };
        if listener.armed || !self.accepting || self.accept_later {
            return;
        }
        listener.armed = true;
        let descriptor = types::Fd(socket.as_raw_fd());
        let entry = if self.multishot_accept {
            opcode::AcceptMulti::new(descriptor).flags(libc::SOCK_CLOEXEC).build()
        } else {
            let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
            opcode::Accept::new(descriptor, address, length).flags(libc::SOCK_CLOEXEC).build()
        };
        // SAFETY: no memory is named: multishot has no address, the other gets null for it.
        unsafe { self.ring.push(entry, Tag::numbered(Kind::Accept, id)) };
    }

    fn cancel_accept(&mut self, id: ListenerId) {
        let listener = &mut self.listeners[usize::from(id)];
        if listener.armed && !listener.cancelled {
            listener.cancelled = true;
            self.ring.cancel(Tag::numbered(Kind::Accept, id));
        }
    }

    fn arm_sweep(&mut self) {
        if self.sweep_armed {
            return;
        }
        self.sweep_armed = true;
        let entry = opcode::Timeout::new(&raw const SWEEP_AFTER).build();
        // SAFETY: the kernel reads the time from a static that nobody changes.
        unsafe { self.ring.push(entry, Tag::numbered(Kind::Sweep, 0)) };
    }

    fn make_ready(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get_mut(conn)
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(conn);
        }
    }

    /// Ends a connection: everything in flight is called back, and when the kernel has let go the
    /// connection is reported closed.
    fn begin_closing(&mut self, conn: ConnId, why: CloseReason) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        match connection.phase {
            Phase::Closing(_) => return,
            Phase::Lingering { .. } => self.lingering -= 1,
            Phase::Open => {}
        }
        connection.phase = Phase::Closing(why);
        let (receiving, guarded) = (connection.receiving, connection.guarded);
        let sending = connection.sending.is_some();
        for (kind, in_flight) in
            [(Kind::Receive, receiving), (Kind::Guard, guarded), (Kind::Send, sending)]
        {
            if in_flight {
                self.ring.cancel(Tag::new(kind, conn));
            }
        }
        self.finish_if_let_go(conn);
    }

    fn finish_if_let_go(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get(conn)
            && matches!(connection.phase, Phase::Closing(_))
            && !connection.has_operations()
        {
            self.make_ready(conn);
        }
    }

    /// Of a lingering connection: ends our direction once everything of ours is out.
    fn shut_if_sent(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if let Phase::Lingering { shut, .. } = &mut connection.phase
            && !*shut
            && connection.sending.is_none()
        {
            *shut = true;
            if socket::shutdown_write(connection.socket.as_fd()).is_err() {
                self.begin_closing(conn, CloseReason::PeerReset);
            }
        }
        self.close_if_both_ended(conn);
    }

    fn close_if_both_ended(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get(conn) else { return };
        if matches!(connection.phase, Phase::Lingering { shut: true, .. }) && connection.peer_ended
        {
            self.begin_closing(conn, CloseReason::Ours);
        }
    }
}

// ---------------------------------------------------------------------------- what came of it

impl UringNet {
    fn work_off(&mut self, limit: usize, sink: &mut impl FnMut(NetEvent<'_>)) -> usize {
        self.ring.run_deferred();
        let mut handled = 0;
        while handled < limit
            && let Some(completion) = self.ring.next()
        {
            self.complete(completion, sink);
            handled += 1;
        }
        while handled < limit
            && let Some(conn) = self.ready.pop_front()
        {
            self.work_ready(conn, sink);
            handled += 1;
        }
        handled
    }

    fn complete(&mut self, completion: Completion, sink: &mut impl FnMut(NetEvent<'_>)) {
        let conn = completion.tag.conn;
        match completion.tag.kind {
            Kind::Accept => self.on_accept(completion, sink),
            Kind::Receive => self.on_receive(completion, sink),
            Kind::Send => self.on_send(conn, completion.result, sink),
            Kind::Guard => self.on_guard(conn, completion.result),
            Kind::Cancel => {}
            Kind::Sweep => self.on_sweep(),
        }
    }

    fn work_ready(&mut self, conn: ConnId, sink: &mut impl FnMut(NetEvent<'_>)) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        connection.queued = false;
        match connection.phase {
            Phase::Closing(why) if !connection.has_operations() => {
                self.connections.remove(conn);
                sink(NetEvent::Closed { conn, why });
            }
            Phase::Open if connection.reading && connection.held_bytes > 0 => {
                let length = std::mem::take(&mut connection.held_bytes) as usize;
                self.deliver(conn, length, sink);
            }
            _ => {}
        }
    }

    /// Hands over what a receive brought and asks for more.
    fn deliver(&mut self, conn: ConnId, length: usize, sink: &mut impl FnMut(NetEvent<'_>)) {
        self.counters.received_bytes += length as u64;
        // SAFETY: this connection's receive has completed (`receiving` is false) and `arm_receive`
        // below is the first to start another, after the slice is gone.
        let bytes = unsafe { self.buffers.filled(conn.slot, length) };
        sink(NetEvent::Received { conn, bytes });
        self.arm_receive(conn);
    }

    fn on_receive(&mut self, completion: Completion, sink: &mut impl FnMut(NetEvent<'_>)) {
        let Completion { tag: Tag { conn, .. }, result, nonempty, .. } = completion;
        let Some(connection) = self.connections.get_mut(conn) else { return };
        connection.receiving = false;
        // Without the hint (old kernels) every receive would have to try first.
        connection.more_to_read = nonempty || !self.poll_first;
        match (connection.phase, result) {
            (Phase::Closing(_), _) => self.finish_if_let_go(conn),
            (Phase::Open, 1..) if connection.reading => self.deliver(conn, result as usize, sink),
            (Phase::Open, 1..) => {
                connection.held_bytes = result as u32;
                self.arm_guard(conn);
            }
            (Phase::Lingering { .. }, 1..) => self.arm_receive(conn),
            (Phase::Open, 0) => self.begin_closing(conn, CloseReason::PeerClosed),
            (Phase::Lingering { .. }, 0) => {
                connection.peer_ended = true;
                self.close_if_both_ended(conn);
            }
            (_, failed) => self.on_receive_failure(conn, -failed),
        }
    }

    fn on_receive_failure(&mut self, conn: ConnId, errno: i32) {
        match errno {
            libc::EINTR | libc::EAGAIN | libc::ECANCELED => self.arm_receive(conn),
            // Linux before 5.19 does not know the hint.
            libc::EINVAL if self.poll_first => {
                self.poll_first = false;
                self.arm_receive(conn);
            }
            _ => self.begin_closing(conn, socket::close_reason(errno)),
        }
    }

    fn on_send(&mut self, conn: ConnId, result: i32, sink: &mut impl FnMut(NetEvent<'_>)) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        let closing = matches!(connection.phase, Phase::Closing(_));
        let Some(sending) = &mut connection.sending else { return };
        if result > 0 {
            sending.taken += result as usize;
            self.counters.sent_bytes += result as u64;
        }
        let complete = sending.taken == sending.buffer.len();
        let interrupted = matches!(-result, libc::EINTR | libc::EAGAIN);
        if !complete && !closing && (result > 0 || interrupted) {
            self.push_send(conn);
            return;
        }
        if let Some(Sending { buffer, taken }) = connection.sending.take() {
            sink(NetEvent::Sent { conn, buffer, taken });
        }
        if !complete && !closing {
            // Zero for bytes that were asked for does not happen; were it to, it must end here.
            let errno = if result == 0 { libc::EPIPE } else { -result };
            self.begin_closing(conn, socket::close_reason(errno));
        }
        self.shut_if_sent(conn);
        self.finish_if_let_go(conn);
    }

    fn on_guard(&mut self, conn: ConnId, result: i32) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        connection.guarded = false;
        match connection.phase {
            Phase::Closing(_) => self.finish_if_let_go(conn),
            // While reading or lingering the receive sees the end, after the input before it.
            Phase::Open if !connection.reading && result > 0 => {
                let reset = result & i32::from(libc::POLLERR) != 0;
                let why = if reset { CloseReason::PeerReset } else { CloseReason::PeerClosed };
                self.begin_closing(conn, why);
            }
            _ => {}
        }
    }

    fn on_accept(&mut self, completion: Completion, sink: &mut impl FnMut(NetEvent<'_>)) {
        let id = completion.tag.conn.slot as ListenerId;
        let listener = &mut self.listeners[usize::from(id)];
        if !completion.more {
            listener.armed = false;
            listener.cancelled = false;
        }
        let stopped = listener.socket.is_none();
        match completion.result {
            descriptor @ 0.. => {
                // SAFETY: a completed accept made this descriptor for us; nobody else owns it.
                let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
                if !stopped {
                    self.on_arrival(socket, id, sink);
                }
            }
            failed => self.on_accept_failure(-failed),
        }
        self.arm_accept(id);
    }

    fn on_accept_failure(&mut self, errno: i32) {
        match errno {
            libc::ECANCELED => {}
            // Linux before 5.19 does not know multishot.
            libc::EINVAL if self.multishot_accept => self.multishot_accept = false,
            _ => {
                self.counters.accept_failures += 1;
                if socket::is_exhaustion(errno) {
                    self.accept_later = true;
                    self.arm_sweep();
                }
            }
        }
    }

    fn on_arrival(
        &mut self,
        socket: OwnedFd,
        listener: ListenerId,
        sink: &mut impl FnMut(NetEvent<'_>),
    ) {
        // Whoever has no name any more has reset the connection in the queue.
        let Ok(peer): io::Result<SocketAddr> = socket::peer(socket.as_fd()) else { return };
        match self.settings.arrivals {
            Arrivals::HandOut => {
                self.counters.accepted += 1;
                sink(NetEvent::Arrived { socket, listener, peer });
            }
            Arrivals::Own if self.connections.is_full() => self.counters.refused += 1,
            Arrivals::Own => {
                let conn = self.take_in(socket);
                sink(NetEvent::Accepted { conn, listener, peer });
            }
        }
    }

    fn on_sweep(&mut self) {
        self.sweep_armed = false;
        if std::mem::take(&mut self.accept_later) {
            self.arm_accepts();
        }
        if self.lingering == 0 {
            return;
        }
        for slot in 0..self.connections.places() {
            let Some(conn) = self.connections.id_at(slot) else { continue };
            let Some(connection) = self.connections.get_mut(conn) else { continue };
            if let Phase::Lingering { sweeps_left, .. } = &mut connection.phase {
                *sweeps_left -= 1;
                if *sweeps_left == 0 {
                    socket::reset_on_close(connection.socket.as_fd());
                    self.begin_closing(conn, CloseReason::LingerExpired);
                }
            }
        }
        if self.lingering > 0 {
            self.arm_sweep();
        }
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
