//! One connection's life: taken in, watched, read, sent to, closed.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::{CONNECTION, Connection, EpollNet};
use crate::front::net::{CloseReason, ConnId, NetEvent, Phase, Sending, socket};

impl EpollNet {
    /// Gives the socket back when there is no room, here or (ENOSPC, ENOMEM) in the kernel.
    pub(super) fn take_in(&mut self, socket: OwnedFd) -> Result<ConnId, OwnedFd> {
        let interest = EventFlags::IN;
        let connection = Connection {
            socket,
            phase: Phase::Open,
            reading: true,
            peer_ended: false,
            sending: None,
            blocked: false,
            interest,
            queued: false,
        };
        let conn = self.connections.insert(connection).map_err(|refused| refused.socket)?;
        let Some(connection) = self.connections.get(conn) else { unreachable!("just inserted") };
        let data = EventData::new_u64(CONNECTION | u64::from(conn.slot));
        if epoll::add(&self.epoll, &connection.socket, data, interest).is_err() {
            let Some(connection) = self.connections.remove(conn) else {
                unreachable!("just inserted")
            };
            return Err(connection.socket);
        }
        self.counters.accepted += 1;
        Ok(conn)
    }

    /// Tells epoll what the connection waits for now, if that has changed.
    pub(super) fn watch(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        let wanted = connection.wanted();
        if wanted == connection.interest {
            return;
        }
        connection.interest = wanted;
        let data = EventData::new_u64(CONNECTION | u64::from(conn.slot));
        // Cannot fail: the descriptor is open and in the set, and modifying allocates nothing.
        let _ = epoll::modify(&self.epoll, &connection.socket, data, wanted);
    }

    pub(super) fn make_ready(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get_mut(conn)
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(conn);
        }
    }

    pub(super) fn work_ready(&mut self, conn: ConnId, sink: &mut impl FnMut(NetEvent<'_>)) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        connection.queued = false;
        if let Phase::Closing(why) = connection.phase {
            if let Some(Sending { buffer, taken }) = connection.sending.take() {
                sink(NetEvent::Sent { conn, buffer, taken });
            }
            self.connections.remove(conn);
            sink(NetEvent::Closed { conn, why });
            return;
        }
        self.try_send(conn);
        self.report_sent(conn, sink);
    }

    /// Reports a send that is complete, and what a lingering connection does after its last.
    pub(super) fn report_sent(&mut self, conn: ConnId, sink: &mut impl FnMut(NetEvent<'_>)) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        let is_complete = |sending: &mut Sending| sending.taken == sending.buffer.len();
        if let Some(Sending { buffer, taken }) = connection.sending.take_if(is_complete) {
            sink(NetEvent::Sent { conn, buffer, taken });
            self.shut_if_sent(conn);
        }
    }

    /// Offers the kernel what is left of the send under way, once: it takes what it has room for.
    pub(super) fn try_send(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if connection.blocked || matches!(connection.phase, Phase::Closing(_)) {
            return;
        }
        let Some(sending) = &mut connection.sending else { return };
        while sending.taken < sending.buffer.len() {
            self.counters.system_calls += 1;
            let rest = &sending.buffer[sending.taken..];
            match rustix::net::send(&connection.socket, rest, SendFlags::NOSIGNAL) {
                Ok(taken) => {
                    sending.taken += taken;
                    self.counters.sent_bytes += taken as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    connection.blocked = true;
                    self.watch(conn);
                    return;
                }
                Err(e) => {
                    self.begin_closing(conn, socket::close_reason(e.raw_os_error()));
                    return;
                }
            }
        }
    }

    pub(super) fn on_connection(
        &mut self,
        slot: u32,
        flags: EventFlags,
        sink: &mut impl FnMut(NetEvent<'_>),
    ) {
        let Some(conn) = self.connections.id_at(slot) else { return };
        let Some(connection) = self.connections.get_mut(conn) else { return };
        if flags.contains(EventFlags::OUT) && connection.blocked {
            connection.blocked = false;
            self.try_send(conn);
            self.report_sent(conn, sink);
            self.watch(conn);
        }
        let Some(connection) = self.connections.get(conn) else { return };
        let reads = match connection.phase {
            Phase::Open => connection.reading,
            Phase::Lingering { .. } => true,
            Phase::Closing(_) => return,
        };
        let end = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        if reads && flags.intersects(EventFlags::IN | end) {
            self.receive(conn, sink);
        } else if flags.intersects(end) {
            let reset = flags.contains(EventFlags::ERR);
            let why = if reset { CloseReason::PeerReset } else { CloseReason::PeerClosed };
            self.begin_closing(conn, why);
        }
    }

    /// Reads one piece. What is left makes the socket ready again.
    pub(super) fn receive(&mut self, conn: ConnId, sink: &mut impl FnMut(NetEvent<'_>)) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        self.counters.system_calls += 1;
        let received =
            rustix::net::recv(&connection.socket, &mut self.piece[..], RecvFlags::empty());
        match (connection.phase, received) {
            (_, Err(Errno::AGAIN | Errno::INTR)) => {}
            (_, Err(e)) => self.begin_closing(conn, socket::close_reason(e.raw_os_error())),
            (Phase::Open, Ok((0, _))) => self.begin_closing(conn, CloseReason::PeerClosed),
            (_, Ok((0, _))) => {
                connection.peer_ended = true;
                self.watch(conn);
                self.close_if_both_ended(conn);
            }
            (Phase::Open, Ok((length, _))) => {
                self.counters.received_bytes += length as u64;
                sink(NetEvent::Received { conn, bytes: &self.piece[..length] });
            }
            (_, Ok(_)) => {}
        }
    }

    pub(super) fn begin_closing(&mut self, conn: ConnId, why: CloseReason) {
        let Some(connection) = self.connections.get_mut(conn) else { return };
        match connection.phase {
            Phase::Closing(_) => return,
            Phase::Lingering { .. } => self.lingering -= 1,
            Phase::Open => {}
        }
        connection.phase = Phase::Closing(why);
        // Hang-ups are reported whatever is watched: out of the set, lest they wake us for ever.
        let _ = epoll::delete(&self.epoll, &connection.socket);
        self.make_ready(conn);
    }

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
