//! What came of it: every completion ends here.
#![allow(unsafe_code)] // completions name descriptors, and buffers that were filled

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use super::UringNet;
use super::ring::{Completion, Kind, Tag};
use crate::front::net::{
    Arrivals, CloseReason, ConnId, ListenerId, NetEvent, Phase, Sending, socket,
};

impl UringNet {
    pub(super) fn work_off(&mut self, limit: usize, sink: &mut impl FnMut(NetEvent<'_>)) -> usize {
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

    pub(super) fn complete(&mut self, completion: Completion, sink: &mut impl FnMut(NetEvent<'_>)) {
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
