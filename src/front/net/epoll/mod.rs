//! The epoll flavour, for where io_uring is denied: the same contract with non-blocking sockets.
//!
//! Level-triggered: the kernel repeats what was not dealt with, so no readiness can be lost. Input
//! is read once per readiness into one buffer that all connections share, as it is handed over at
//! once; a paused connection is not read at all. Sends are tried at [`EpollNet::submit`], and only
//! one that the kernel did not take whole is watched.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::event::{Timespec, epoll::CreateFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;

mod connection;

use super::slots::Slots;
use super::timer::Timer;
use super::{
    Arrivals, Close, CloseReason, ConnId, LISTENERS_MAX, ListenerId, NetCounters, NetEvent,
    NetSettings, Phase, SWEEP_MS, Sending, linger_sweeps, socket,
};

/// What a ready descriptor is, in the upper 32 bits of its epoll datum; the lower ones number it.
const CONNECTION: u64 = 0;
const LISTENER: u64 = 1 << 32;
const WAKE: u64 = 2 << 32;
const SWEEP: u64 = 3 << 32;

/// Connections that one readiness of a listener takes in; the rest at the next poll.
const ACCEPTS_PER_EVENT_MAX: u32 = 32;

pub(super) struct EpollNet {
    epoll: OwnedFd,
    events: Vec<Event>,
    settings: NetSettings,
    connections: Slots<Connection>,
    /// What any receive is read into before it is handed over.
    piece: Vec<u8>,
    /// Connections with something to report or to try that no readiness will announce. Each is in
    /// it once at most.
    ready: VecDeque<ConnId>,
    listeners: Vec<Option<OwnedFd>>,
    accepting: bool,
    accept_later: bool,
    /// Runs only while a connection lingers or accepting waits.
    sweep: Timer,
    sweep_armed: bool,
    lingering: u32,
    /// Makes the epoll descriptor readable when `ready` is not empty.
    wake: OwnedFd,
    counters: NetCounters,
}

struct Connection {
    socket: OwnedFd,
    phase: Phase,
    reading: bool,
    peer_ended: bool,
    sending: Option<Sending>,
    /// The kernel had no room for the rest of the send: wait for it.
    blocked: bool,
    /// What epoll watches for now.
    interest: EventFlags,
    queued: bool,
}

impl Connection {
    fn wanted(&self) -> EventFlags {
        let reads = match self.phase {
            Phase::Open => self.reading,
            Phase::Lingering { .. } => !self.peer_ended,
            Phase::Closing(_) => return EventFlags::empty(),
        };
        // A paused connection's end must be noticed all the same (errors and hang-ups always are).
        let input = match (reads, self.phase) {
            (true, _) => EventFlags::IN,
            (false, Phase::Open) => EventFlags::RDHUP,
            (false, _) => EventFlags::empty(),
        };
        if self.blocked { input | EventFlags::OUT } else { input }
    }
}

impl EpollNet {
    pub(super) fn new(settings: NetSettings) -> io::Result<EpollNet> {
        let count = settings.connections_max;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = socket::new_event()?;
        let sweep = Timer::new()?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        epoll::add(&epoll, &sweep, EventData::new_u64(SWEEP), EventFlags::IN)?;
        Ok(EpollNet {
            epoll,
            events: Vec::with_capacity(settings.events_per_poll_max as usize),
            connections: Slots::new(count),
            piece: vec![0; settings.receive_piece_bytes as usize],
            ready: VecDeque::with_capacity(count as usize),
            listeners: Vec::with_capacity(LISTENERS_MAX),
            accepting: true,
            accept_later: false,
            sweep,
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
        rustix::io::ioctl_fionbio(&listener, true)?;
        let id = self.listeners.len() as ListenerId;
        epoll::add(&self.epoll, &listener, listener_data(id), EventFlags::empty())?;
        self.listeners.push(Some(listener));
        self.watch_listeners();
        Ok(id)
    }

    pub(super) fn adopt(&mut self, socket: OwnedFd) -> Result<ConnId, OwnedFd> {
        if self.connections.is_full() || rustix::io::ioctl_fionbio(&socket, true).is_err() {
            return Err(socket);
        }
        self.take_in(socket)
    }

    pub(super) fn poll(&mut self, sink: &mut impl FnMut(NetEvent<'_>)) -> usize {
        let mut handled = 0;
        // What became ready while these are worked off waits for the next poll.
        for _ in 0..self.ready.len() {
            let Some(conn) = self.ready.pop_front() else { break };
            self.work_ready(conn, sink);
            handled += 1;
        }
        self.counters.system_calls += 1;
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let buffer = rustix::buffer::spare_capacity(&mut events);
        // The only error that a valid epoll descriptor gives is EINTR: nothing was ready then.
        let _ = epoll::wait(&self.epoll, buffer, Some(&at_once));
        for event in &events {
            let datum = event.data.u64();
            let number = datum as u32;
            match datum & !u64::from(u32::MAX) {
                LISTENER => self.on_listener(number as ListenerId, sink),
                WAKE => socket::clear(self.wake.as_fd()),
                SWEEP => self.on_sweep(),
                _ => self.on_connection(number, event.flags, sink),
            }
        }
        handled += events.len();
        self.events = events;
        handled
    }

    pub(super) fn submit(&mut self) -> io::Result<()> {
        // New sends are in `ready`; those that complete stay in it, to be reported by `poll`.
        for at in 0..self.ready.len() {
            let conn = self.ready[at];
            self.try_send(conn);
        }
        if !self.ready.is_empty() {
            self.counters.system_calls += 1;
            socket::signal(self.wake.as_fd());
        }
        Ok(())
    }

    pub(super) fn wake_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    pub(super) fn pause_reading(&mut self, conn: ConnId) {
        self.set_reading(conn, false);
    }

    pub(super) fn resume_reading(&mut self, conn: ConnId) {
        self.set_reading(conn, true);
    }

    fn set_reading(&mut self, conn: ConnId, reading: bool) {
        if let Some(connection) = self.connections.get_mut(conn)
            && connection.phase == Phase::Open
        {
            connection.reading = reading;
            self.watch(conn);
        }
    }

    pub(super) fn send(&mut self, conn: ConnId, buffer: Vec<u8>) -> Result<(), Vec<u8>> {
        match self.connections.get_mut(conn) {
            Some(connection) if connection.phase == Phase::Open && connection.sending.is_none() => {
                connection.sending = Some(Sending { buffer, taken: 0 });
                self.make_ready(conn);
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
                self.lingering += 1;
                self.arm_sweep();
                self.shut_if_sent(conn);
                self.watch(conn);
            }
        }
    }

    pub(super) fn pause_accepting(&mut self) {
        self.accepting = false;
        self.watch_listeners();
    }

    pub(super) fn resume_accepting(&mut self) {
        self.accepting = true;
        self.watch_listeners();
    }

    pub(super) fn stop_listening(&mut self) {
        // Closing a descriptor takes it out of the epoll set.
        self.listeners.iter_mut().for_each(|listener| *listener = None);
    }

    pub(super) fn connections(&self) -> u32 {
        self.connections.used()
    }

    pub(super) fn counters(&self) -> NetCounters {
        self.counters
    }

    pub(super) fn memory_bytes(&self) -> usize {
        size_of::<EpollNet>()
            + self.connections.bytes()
            + self.connections.capacity() as usize * size_of::<ConnId>()
            + self.piece.len()
            + self.settings.events_per_poll_max as usize * size_of::<Event>()
    }
}

impl EpollNet {
    fn watch_listeners(&mut self) {
        let accepts = self.accepting && !self.accept_later;
        let interest = if accepts { EventFlags::IN } else { EventFlags::empty() };
        for (id, listener) in self.listeners.iter().enumerate() {
            let Some(listener) = listener else { continue };
            // Cannot fail: see `watch`.
            let _ = epoll::modify(&self.epoll, listener, listener_data(id as u8), interest);
        }
    }

    fn on_listener(&mut self, id: ListenerId, sink: &mut impl FnMut(NetEvent<'_>)) {
        for _ in 0..ACCEPTS_PER_EVENT_MAX {
            let Some(Some(listener)) = self.listeners.get(usize::from(id)) else { return };
            self.counters.system_calls += 1;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(listener, flags) {
                Ok(socket) => self.on_arrival(socket, id, sink),
                Err(Errno::AGAIN) => return,
                // Interrupted, or the next in the queue has gone again.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(e) => {
                    self.counters.accept_failures += 1;
                    if socket::is_exhaustion(e.raw_os_error()) {
                        self.accept_later = true;
                        self.watch_listeners();
                        self.arm_sweep();
                    }
                    return;
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
            Arrivals::Own => match self.take_in(socket) {
                Ok(conn) => sink(NetEvent::Accepted { conn, listener, peer }),
                Err(_refused) => self.counters.refused += 1,
            },
        }
    }

    fn arm_sweep(&mut self) {
        if !self.sweep_armed {
            self.sweep_armed = true;
            self.sweep.fire_in_ms(SWEEP_MS);
        }
    }

    fn on_sweep(&mut self) {
        self.sweep.clear();
        self.sweep_armed = false;
        if std::mem::take(&mut self.accept_later) {
            self.watch_listeners();
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

fn listener_data(id: ListenerId) -> EventData {
    EventData::new_u64(LISTENER | u64::from(id))
}
