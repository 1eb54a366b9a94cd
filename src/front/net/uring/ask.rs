//! What is asked of the kernel, and when: every operation starts here.
#![allow(unsafe_code)] // operations name memory by address

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use io_uring::{opcode, types};

use super::ring::{Kind, Tag};
use super::{Connection, UringNet};
use crate::front::net::{CloseReason, ConnId, ListenerId, Phase, SWEEP_MS, socket};

/// From linux/io_uring.h: wait for readiness first, do not try at once. Saves the vain attempt
/// when the last receive emptied the socket. Linux 5.19.
const RECEIVE_POLL_FIRST: u16 = 1;

static SWEEP_AFTER: types::Timespec = types::Timespec::new().nsec(SWEEP_MS * 1_000_000);

impl UringNet {
    pub(super) fn take_in(&mut self, socket: OwnedFd) -> ConnId {
        let Ok(conn) = self.connections.insert(Connection::new(socket)) else {
            unreachable!("the caller made sure that there is room")
        };
        self.counters.accepted += 1;
        self.arm_receive(conn);
        conn
    }

    pub(super) fn arm_receive(&mut self, conn: ConnId) {
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

    pub(super) fn push_send(&mut self, conn: ConnId) {
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

    pub(super) fn arm_guard(&mut self, conn: ConnId) {
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

    pub(super) fn arm_accepts(&mut self) {
        for id in 0..self.listeners.len() as ListenerId {
            self.arm_accept(id);
        }
    }

    pub(super) fn arm_accept(&mut self, id: ListenerId) {
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

    pub(super) fn cancel_accept(&mut self, id: ListenerId) {
        let listener = &mut self.listeners[usize::from(id)];
        if listener.armed && !listener.cancelled {
            listener.cancelled = true;
            self.ring.cancel(Tag::numbered(Kind::Accept, id));
        }
    }

    pub(super) fn arm_sweep(&mut self) {
        if self.sweep_armed {
            return;
        }
        self.sweep_armed = true;
        let entry = opcode::Timeout::new(&raw const SWEEP_AFTER).build();
        // SAFETY: the kernel reads the time from a static that nobody changes.
        unsafe { self.ring.push(entry, Tag::numbered(Kind::Sweep, 0)) };
    }

    pub(super) fn make_ready(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get_mut(conn)
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(conn);
        }
    }

    /// Ends a connection: everything in flight is called back, and when the kernel has let go the
    /// connection is reported closed.
    pub(super) fn begin_closing(&mut self, conn: ConnId, why: CloseReason) {
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

    pub(super) fn finish_if_let_go(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get(conn)
            && matches!(connection.phase, Phase::Closing(_))
            && !connection.has_operations()
        {
            self.make_ready(conn);
        }
    }

    /// Of a lingering connection: ends our direction once everything of ours is out.
    pub(super) fn shut_if_sent(&mut self, conn: ConnId) {
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

    pub(super) fn close_if_both_ended(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get(conn) else { return };
        if matches!(connection.phase, Phase::Lingering { shut: true, .. }) && connection.peer_ended
        {
            self.begin_closing(conn, CloseReason::Ours);
        }
    }
}
