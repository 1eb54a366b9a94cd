//! Sockets: one [`Net`] per front core owns every socket of that core, over io_uring or epoll.
//!
//! Core: front. This folder is shell: it talks to the kernel; what bytes mean is decided above it.
//!
//! # How it is driven
//!
//! ```text
//! loop {
//!     while net.poll(&mut |event| ...) > 0 or the core did something {
//!         // the core reacts: net.send, net.pause_reading, net.close ...
//!         net.submit()?;              // one system call for everything the tick asked for
//!     }
//!     wait until net.wake_fd() is readable, or a doorbell rings, or a timer fires
//! }
//! ```
//!
//! # What holds
//!
//! - **Bounded.** A connection has at most one receive and one send under way. A receive takes at
//!   most `receive_piece_bytes` into a buffer that belongs to the connection's place, so a fast
//!   sender can hold up nobody else, and a paused connection holds at most one piece. The rest of
//!   what a client sends stays in the kernel's buffers and closes its TCP window.
//! - **Exact.** Every [`Net::send`] is answered by exactly one [`NetEvent::Sent`] that gives the
//!   buffer back and says how many bytes the kernel took: all of them, unless the connection ended.
//!   Short sends are continued here. [`Net::taken`] tells the progress meanwhile.
//! - **One end.** Every connection that was announced or adopted has exactly one
//!   [`NetEvent::Closed`], whoever ended it, and it is the last event with that id.
//! - **End of input is the end.** A peer that closes or shuts down its sending direction is gone:
//!   the connection is closed. (A client that wants answers keeps its side open.) While reading is
//!   paused this is noticed at once too, not only after the pause: its sequences must stop.
//! - **Full is said, not kept waiting.** With `connections_max` connections open a new one is
//!   accepted and closed at once, so that the client learns it in one round trip; in the listen
//!   queue it would hang.

mod buffers;
mod epoll;
mod slots;
mod socket;
mod timer;
mod uring;

use std::io;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};

use crate::runtime::Flavour;

pub use slots::ConnId;

/// Names a listening socket of one [`Net`]: 0 for the first [`Net::listen`], then 1, …
pub type ListenerId = u8;

/// Listening sockets of one [`Net`]: native, HTTP and metrics, each on IPv4 and IPv6, and room.
pub const LISTENERS_MAX: usize = 8;

/// Bounds of a [`Net`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSettings {
    /// Connections open at once, from 1 to 65,536.
    pub connections_max: u32,
    /// Largest piece in which input is handed over, and the most that a paused connection holds
    /// in the program. Each of the `connections_max` places has a buffer of this size.
    pub receive_piece_bytes: u32,
    /// Completions (io_uring) or ready sockets (epoll) that one [`Net::poll`] works off.
    pub events_per_poll_max: u32,
    /// How long a [`Close::Linger`] may take, to within a quarter of a second.
    pub linger_ms: u32,
    /// What becomes of a connection that was accepted.
    pub arrivals: Arrivals,
}

impl Default for NetSettings {
    fn default() -> NetSettings {
        NetSettings {
            connections_max: 1024,
            // Most frames of a client are under 100 bytes; a request of 40 KB takes ten pieces.
            receive_piece_bytes: 4096,
            events_per_poll_max: 256,
            linger_ms: 2_000,
            arrivals: Arrivals::Own,
        }
    }
}

/// What becomes of a connection that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrivals {
    /// It is this [`Net`]'s: [`NetEvent::Accepted`].
    Own,
    /// Its descriptor is handed out, for some core's [`Net::adopt`]: [`NetEvent::Arrived`].
    HandOut,
}

/// Options of one listening socket and, by inheritance, of every connection accepted from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenSettings {
    /// Connections that the kernel completes ahead of us.
    pub backlog: i32,
    /// `SO_SNDBUF` (the kernel doubles it). A stalled reader is noticed only when this is full:
    /// default loopback buffers swallow 176,000 frames of 24 bytes, 4,096 about 230. On connections
    /// with many streams a small one caps throughput over distance: leave it to the kernel there.
    pub send_buffer_bytes: Option<u32>,
    /// `SO_RCVBUF` (the kernel doubles it). Left alone the kernel lets it grow to megabytes
    /// (`net.ipv4.tcp_rmem`) for a fast sender that we do not read.
    pub receive_buffer_bytes: Option<u32>,
    /// `TCP_NOTSENT_LOWAT`: what the kernel may hold beyond what is on its way.
    pub not_sent_lowat_bytes: Option<u32>,
}

impl Default for ListenSettings {
    fn default() -> ListenSettings {
        ListenSettings {
            backlog: 1024,
            send_buffer_bytes: None,
            receive_buffer_bytes: None,
            not_sent_lowat_bytes: None,
        }
    }
}

impl ListenSettings {
    /// The most that the kernel may hold for one connection, both directions together, in bytes:
    /// for the memory envelope. What is left to the kernel counts with the system's limits
    /// (`net.ipv4.tcp_wmem` and `tcp_rmem`: mostly 4 and 6 MiB).
    pub fn kernel_bytes_per_connection(&self) -> u64 {
        let side = |set: Option<u32>, name: &str| match set {
            Some(bytes) => u64::from(bytes) * 2,
            None => socket::system_buffer_bytes(name),
        };
        side(self.send_buffer_bytes, "tcp_wmem") + side(self.receive_buffer_bytes, "tcp_rmem")
    }
}

/// Something that happened on the sockets.
#[derive(Debug)]
pub enum NetEvent<'a> {
    /// A new connection; reading has begun.
    Accepted {
        /// Its name until it is closed.
        conn: ConnId,
        /// Where it came in.
        listener: ListenerId,
        /// Who it is.
        peer: SocketAddr,
    },
    /// A new connection that is nobody's yet ([`Arrivals::HandOut`]).
    Arrived {
        /// Dropping it closes the connection.
        socket: OwnedFd,
        /// Where it came in.
        listener: ListenerId,
        /// Who it is.
        peer: SocketAddr,
    },
    /// Input, in the order it was sent. Not empty.
    Received {
        /// From whom.
        conn: ConnId,
        /// Valid during the call only.
        bytes: &'a [u8],
    },
    /// The answer to a [`Net::send`].
    Sent {
        /// To whom.
        conn: ConnId,
        /// The buffer, as it was handed in.
        buffer: Vec<u8>,
        /// Bytes that the kernel took: `buffer.len()`, or fewer when the connection ended.
        taken: usize,
    },
    /// The end of a connection. Its id means nothing from here on.
    Closed {
        /// Which.
        conn: ConnId,
        /// Why.
        why: CloseReason,
    },
}

/// How to end a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// At once: what the kernel has not sent is thrown away and the peer sees a reset.
    Now,
    /// In order: what was handed to [`Net::send`] goes out, then the end of our direction; input is
    /// discarded until the peer closes too or `linger_ms` has passed. Without the wait, closing
    /// over unread input would reset the connection and the peer might never see our last words.
    Linger,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The peer closed, or ended its sending direction.
    PeerClosed,
    /// The peer reset the connection.
    PeerReset,
    /// [`Net::close`], carried out.
    Ours,
    /// [`Net::close`] lingered for `linger_ms` and the peer neither read nor closed.
    LingerExpired,
    /// Another error: an errno, e.g. `ETIMEDOUT` or `EHOSTUNREACH`.
    Failed(i32),
}

/// What a [`Net`] has seen, for metrics. All only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounters {
    /// Connections taken in: accepted, handed out or adopted.
    pub accepted: u64,
    /// Connections closed at once because the table was full.
    pub refused: u64,
    /// Times that accepting failed, for want of descriptors for example.
    pub accept_failures: u64,
    /// Bytes received and handed over.
    pub received_bytes: u64,
    /// Bytes that the kernel took.
    pub sent_bytes: u64,
    /// System calls that [`Net::poll`] and [`Net::submit`] made for I/O.
    pub system_calls: u64,
}

/// The sockets of one front core. Not `Send`: it lives and dies on the thread that made it, which
/// with io_uring is the only one that may submit.
pub struct Net {
    flavour: Driver,
    _same_thread: PhantomData<*const ()>,
}

enum Driver {
    Uring(Box<uring::UringNet>),
    Epoll(Box<epoll::EpollNet>),
}

/// Calls the method of the same name of whichever flavour this is.
macro_rules! driver {
    ($net:expr, $driver:ident => $call:expr) => {
        match &$net.flavour {
            Driver::Uring($driver) => $call,
            Driver::Epoll($driver) => $call,
        }
    };
    (mut $net:expr, $driver:ident => $call:expr) => {
        match &mut $net.flavour {
            Driver::Uring($driver) => $call,
            Driver::Epoll($driver) => $call,
        }
    };
}

impl Net {
    /// A net without sockets. Everything it will ever need is allocated here, but the vectors that
    /// [`Net::send`] is given.
    ///
    /// # Errors
    /// The kernel's, when io_uring or epoll is denied or descriptors have run out;
    /// `InvalidInput` when a bound in `settings` is out of range.
    pub fn new(flavour: Flavour, settings: NetSettings) -> io::Result<Net> {
        check(&settings)?;
        let flavour = match flavour {
            Flavour::IoUring => Driver::Uring(Box::new(uring::UringNet::new(settings)?)),
            Flavour::Epoll => Driver::Epoll(Box::new(epoll::EpollNet::new(settings)?)),
        };
        Ok(Net { flavour, _same_thread: PhantomData })
    }

    /// Which it is.
    pub fn flavour(&self) -> Flavour {
        match self.flavour {
            Driver::Uring(_) => Flavour::IoUring,
            Driver::Epoll(_) => Flavour::Epoll,
        }
    }

    /// Starts to listen (accepting begins with the next [`Net::submit`]). Returns the name of the
    /// listener and the address, whose port is settled when `address` asked for port 0.
    ///
    /// # Errors
    /// The kernel's (address in use, no permission …); `InvalidInput` beyond [`LISTENERS_MAX`].
    pub fn listen(
        &mut self,
        address: SocketAddr,
        settings: &ListenSettings,
    ) -> io::Result<(ListenerId, SocketAddr)> {
        use std::os::fd::AsFd;
        let listener = socket::listen(address, settings)?;
        let bound = socket::local(listener.as_fd())?;
        let id = driver!(mut self, net => net.add_listener(listener))?;
        Ok((id, bound))
    }

    /// Takes over a connection that another core accepted. [`NetEvent::Accepted`] does not come.
    ///
    /// # Errors
    /// Gives the socket back when `connections_max` are open.
    pub fn adopt(&mut self, socket: OwnedFd) -> Result<ConnId, OwnedFd> {
        driver!(mut self, net => net.adopt(socket))
    }

    /// Works off what the kernel has ready, at most `events_per_poll_max` pieces of it, and
    /// returns how many there were (some make no event). Never blocks. Call it until it returns 0
    /// before waiting for [`Net::wake_fd`].
    pub fn poll(&mut self, sink: &mut impl FnMut(NetEvent<'_>)) -> usize {
        driver!(mut self, net => net.poll(sink))
    }

    /// Hands everything that was asked for since the last time to the kernel, in one system call
    /// with io_uring.
    ///
    /// # Errors
    /// Only such as leave no way on; for what passes (a full completion queue, say) the rest is
    /// kept and goes out the next time, and [`Net::wake_fd`] sees to it that there is one.
    pub fn submit(&mut self) -> io::Result<()> {
        driver!(mut self, net => net.submit())
    }

    /// Readable when [`Net::poll`] has something to do. Sometimes when it has not.
    pub fn wake_fd(&self) -> RawFd {
        driver!(self, net => net.wake_fd())
    }

    /// Stops [`NetEvent::Received`] for a connection, at once. A peer that closes or resets
    /// meanwhile is still reported.
    pub fn pause_reading(&mut self, conn: ConnId) {
        driver!(mut self, net => net.pause_reading(conn));
    }

    /// Undoes [`Net::pause_reading`].
    pub fn resume_reading(&mut self, conn: ConnId) {
        driver!(mut self, net => net.resume_reading(conn));
    }

    /// Sends the buffer, which must not be empty. Each connection takes one at a time: the next
    /// may be handed in when [`NetEvent::Sent`] has answered this one.
    ///
    /// # Errors
    /// Gives the buffer back when it is empty, one is under way, or the connection is closing or
    /// gone.
    pub fn send(&mut self, conn: ConnId, buffer: Vec<u8>) -> Result<(), Vec<u8>> {
        if buffer.is_empty() || buffer.len() > SEND_BYTES_MAX {
            return Err(buffer);
        }
        driver!(mut self, net => net.send(conn, buffer))
    }

    /// Whether [`Net::send`] would take a buffer.
    pub fn can_send(&self, conn: ConnId) -> bool {
        driver!(self, net => net.can_send(conn))
    }

    /// Bytes of the send under way that the kernel took so far, by the last [`Net::poll`]; 0 when
    /// none is under way.
    pub fn taken(&self, conn: ConnId) -> usize {
        driver!(self, net => net.taken(conn))
    }

    /// Bytes that the kernel took on this connection and the peer has not acknowledged yet: a
    /// system call. `None` when the connection is gone.
    pub fn unacknowledged_bytes(&self, conn: ConnId) -> Option<u32> {
        let socket = driver!(self, net => net.socket(conn))?;
        socket::unacknowledged_bytes(socket).ok()
    }

    /// Ends a connection. No input of it is reported from here on; [`NetEvent::Sent`] for a send
    /// under way and [`NetEvent::Closed`] still come. `Now` overrides an earlier `Linger`;
    /// otherwise a second call does nothing, nor does one for a connection that is gone.
    pub fn close(&mut self, conn: ConnId, how: Close) {
        driver!(mut self, net => net.close(conn, how));
    }

    /// Stops accepting: new connections wait in the listen queue. One that the kernel has accepted
    /// for us already is still reported.
    pub fn pause_accepting(&mut self) {
        driver!(mut self, net => net.pause_accepting());
    }

    /// Undoes [`Net::pause_accepting`].
    pub fn resume_accepting(&mut self) {
        driver!(mut self, net => net.resume_accepting());
    }

    /// Closes the listening sockets: from the next [`Net::submit`] and [`Net::poll`] on the kernel
    /// refuses new connections. Those that are open stay.
    pub fn stop_listening(&mut self) {
        driver!(mut self, net => net.stop_listening());
    }

    /// Connections open, closing ones included.
    pub fn connections(&self) -> u32 {
        driver!(self, net => net.connections())
    }

    /// What happened so far.
    pub fn counters(&self) -> NetCounters {
        driver!(self, net => net.counters())
    }

    /// Bytes that this net has allocated and will not exceed: tables, receive buffers, rings. Not
    /// in it: the buffers in flight (the caller's), and the kernel's own socket buffers.
    pub fn memory_bytes(&self) -> usize {
        driver!(self, net => net.memory_bytes())
    }
}

/// io_uring counts a send's bytes in 31 bits.
const SEND_BYTES_MAX: usize = 1 << 30;

/// Lingering connections and failed accepts are looked at this often, and only while there are any.
const SWEEP_MS: u32 = 250;

/// Sweeps after which a lingering connection is given up.
fn linger_sweeps(settings: &NetSettings) -> u32 {
    // One more, as the first may come at once: the timer may be running already.
    settings.linger_ms.div_ceil(SWEEP_MS) + 1
}

fn check(settings: &NetSettings) -> io::Result<()> {
    let invalid = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    if !(1..=65_536).contains(&settings.connections_max) {
        return invalid("connections_max must be from 1 to 65536");
    }
    if !(64..=1 << 20).contains(&settings.receive_piece_bytes) {
        return invalid("receive_piece_bytes must be from 64 to 1048576");
    }
    if !(1..=65_536).contains(&settings.events_per_poll_max) {
        return invalid("events_per_poll_max must be from 1 to 65536");
    }
    Ok(())
}

/// A send under way.
struct Sending {
    buffer: Vec<u8>,
    taken: usize,
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// Ours is ending in order: first the send under way, then our direction (`shut`), then the
    /// peer's; given up after so many sweeps.
    Lingering {
        shut: bool,
        sweeps_left: u32,
    },
    /// Over; `Closed` is still to be reported, when the kernel has let go of its buffers.
    Closing(CloseReason),
}
