//! Drives a `Net` over real loopback sockets, one event at a time.
#![allow(dead_code)] // each test file uses its part

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use forebay::front::net::{CloseReason, ConnId, ListenSettings, Net, NetEvent, NetSettings};
use forebay::runtime::{Flavour, Probe};
use rustix::event::{PollFd, PollFlags, Timespec};

/// Nothing on loopback takes this long: a test that waits longer has found a hang.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// An event without its borrowed parts.
#[derive(Debug)]
pub enum Seen {
    Accepted { conn: ConnId, peer: SocketAddr },
    Arrived { socket: OwnedFd },
    Received { conn: ConnId, bytes: Vec<u8> },
    Sent { conn: ConnId, buffer: Vec<u8>, taken: usize },
    Closed { conn: ConnId, why: CloseReason },
}

pub struct Driver {
    pub net: Net,
    pub address: SocketAddr,
    pub seen: Vec<Seen>,
}

/// Whether this machine has the flavour; says so where it denies io_uring.
pub fn has(flavour: Flavour) -> bool {
    static PROBE: OnceLock<Probe> = OnceLock::new();
    let probe = PROBE.get_or_init(forebay::runtime::probe);
    let has = flavour == Flavour::Epoll || probe.flavour() == flavour;
    if !has {
        eprintln!("skipped: {}", probe.denials().next().unwrap());
    }
    has
}

/// A net of this flavour, or `None` (and a note) where the machine denies io_uring.
pub fn try_net(flavour: Flavour, settings: NetSettings) -> Option<Net> {
    has(flavour).then(|| Net::new(flavour, settings).unwrap())
}

impl Driver {
    pub fn start(
        flavour: Flavour,
        settings: NetSettings,
        listen: ListenSettings,
    ) -> Option<Driver> {
        let mut net = try_net(flavour, settings)?;
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let (_, address) = net.listen(any_port, &listen).unwrap();
        net.submit().unwrap();
        Some(Driver { net, address, seen: Vec::new() })
    }

    /// One round: what happened goes to `seen`, what was asked for to the kernel.
    pub fn round(&mut self) -> usize {
        let seen = &mut self.seen;
        let handled = self.net.poll(&mut |event| seen.push(keep(event)));
        self.net.submit().unwrap();
        handled
    }

    /// Rounds until nothing is left to do for the moment.
    pub fn settle(&mut self) {
        self.net.submit().unwrap();
        while self.round() > 0 {}
    }

    /// Rounds, sleeping on the wake-up descriptor in between, until `done` says so.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Driver) -> bool) {
        while !done(self) {
            if self.round() == 0 && !done(self) {
                assert!(self.wait(PATIENCE), "waited in vain until {what}; saw {:?}", self.brief());
            }
        }
    }

    /// Sleeps until the net has something to do; false when the time is up.
    pub fn wait(&self, patience: Duration) -> bool {
        let timeout = Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        // SAFETY: the descriptor belongs to the net, which outlives this call.
        let wake = unsafe { BorrowedFd::borrow_raw(self.net.wake_fd()) };
        let mut descriptors = [PollFd::new(&wake, PollFlags::IN)];
        loop {
            match rustix::event::poll(&mut descriptors, Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                other => return other.unwrap() > 0,
            }
        }
    }

    /// A client of this server, its connection accepted.
    pub fn client(&mut self) -> (TcpStream, ConnId) {
        let client = TcpStream::connect(self.address).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.set_write_timeout(Some(PATIENCE)).unwrap();
        client.set_nodelay(true).unwrap();
        let own = client.local_addr().unwrap();
        self.until("the client is accepted", |d| d.accepted(own).is_some());
        let conn = self.accepted(own).unwrap();
        (client, conn)
    }

    /// The connection whose peer has this address, if it was accepted.
    pub fn accepted(&self, address: SocketAddr) -> Option<ConnId> {
        self.seen.iter().find_map(|seen| match seen {
            Seen::Accepted { conn, peer } if *peer == address => Some(*conn),
            _ => None,
        })
    }

    /// Everything received on a connection so far.
    pub fn received(&self, of: ConnId) -> Vec<u8> {
        let mut all = Vec::new();
        for seen in &self.seen {
            if let Seen::Received { conn, bytes } = seen
                && *conn == of
            {
                all.extend_from_slice(bytes);
            }
        }
        all
    }

    /// How many bytes the answered send of a connection took, if it was answered.
    pub fn sent(&self, of: ConnId) -> Option<usize> {
        self.seen.iter().rev().find_map(|seen| match seen {
            Seen::Sent { conn, taken, .. } if *conn == of => Some(*taken),
            _ => None,
        })
    }

    /// Why a connection closed, if it did.
    pub fn closed(&self, of: ConnId) -> Option<CloseReason> {
        self.seen.iter().find_map(|seen| match seen {
            Seen::Closed { conn, why } if *conn == of => Some(*why),
            _ => None,
        })
    }

    fn brief(&self) -> Vec<String> {
        let short = |seen: &Seen| format!("{seen:?}").chars().take(60).collect();
        self.seen.iter().rev().take(12).map(short).collect()
    }
}

pub fn keep(event: NetEvent<'_>) -> Seen {
    match event {
        NetEvent::Accepted { conn, peer, .. } => Seen::Accepted { conn, peer },
        NetEvent::Arrived { socket, .. } => Seen::Arrived { socket },
        NetEvent::Received { conn, bytes } => {
            assert!(!bytes.is_empty());
            Seen::Received { conn, bytes: bytes.to_vec() }
        }
        NetEvent::Sent { conn, buffer, taken } => Seen::Sent { conn, buffer, taken },
        NetEvent::Closed { conn, why } => Seen::Closed { conn, why },
    }
}

/// Echoes, per connection one send at a time, until `done`. What is echoed is forgotten.
pub fn echo_until(driver: &mut Driver, mut done: impl FnMut(&Driver) -> bool) {
    let mut pending: Vec<(ConnId, Vec<u8>)> = Vec::new();
    driver.until("the echo is done", |driver| {
        for seen in std::mem::take(&mut driver.seen) {
            match seen {
                Seen::Received { conn, bytes } => match pending.iter_mut().find(|p| p.0 == conn) {
                    Some((_, waiting)) => waiting.extend_from_slice(&bytes),
                    None => pending.push((conn, bytes)),
                },
                other => driver.seen.push(other),
            }
        }
        pending.retain_mut(|(conn, waiting)| {
            if !driver.net.can_send(*conn) {
                return true;
            }
            driver.net.send(*conn, std::mem::take(waiting)).unwrap();
            false
        });
        driver.net.submit().unwrap();
        done(driver)
    });
}

/// Bytes that do not repeat with any power of two.
pub fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| ((i + seed) % 251) as u8).collect()
}

/// Resets instead of closing in order.
pub fn reset(client: TcpStream) {
    rustix::net::sockopt::set_socket_linger(client.as_fd(), Some(Duration::ZERO)).unwrap();
}
