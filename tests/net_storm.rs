//! Seeded storms: clients and server do whatever comes into their heads, and the contract of
//! `front::net` holds all the same. The same seed makes the same decisions (what the kernel makes
//! of them may differ); a failure prints it.

#[path = "support/net.rs"]
mod support;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

use forebay::front::net::{Close, CloseReason, ConnId, ListenSettings, NetSettings};
use forebay::runtime::Flavour;
use support::{Driver, Seen, reset};

/// xorshift64*: enough to shake things up.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides as u64) as usize
    }
}

/// The byte at a position of any stream: a repeated or lost piece cannot go unseen.
fn byte_at(position: usize) -> u8 {
    (position % 251) as u8
}

fn bytes_from(position: usize, count: usize) -> Vec<u8> {
    (position..position + count).map(byte_at).collect()
}

fn assert_continues(position: usize, bytes: &[u8], who: &str) {
    let same = bytes.iter().enumerate().all(|(i, b)| *b == byte_at(position + i));
    assert!(same, "{who}: a piece at {position} was lost, repeated or changed");
}

/// What both ends of a connection know.
struct Pair {
    client: Option<TcpStream>,
    /// Bytes: client to server written and seen there, server to client taken and seen there.
    written: usize,
    received: usize,
    taken: usize,
    read: usize,
    sending: bool,
    paused: bool,
    was_paused: bool,
    /// The server said close, or a send was cut short.
    closing: bool,
    /// A send was refused: its `Closed` must come.
    ended: bool,
}

struct Storm {
    driver: Driver,
    dice: Dice,
    pairs: BTreeMap<ConnId, Pair>,
    closed: usize,
}

impl Storm {
    fn connect(&mut self) {
        if self.pairs.len() == 12 {
            return;
        }
        let (client, conn) = self.driver.client();
        client.set_nonblocking(true).unwrap();
        let pair = Pair {
            client: Some(client),
            written: 0,
            received: 0,
            taken: 0,
            read: 0,
            sending: false,
            paused: false,
            was_paused: false,
            closing: false,
            ended: false,
        };
        assert!(self.pairs.insert(conn, pair).is_none(), "an id is given once");
        // What the others did meanwhile was before anything that is done next.
        self.check();
    }

    fn pick(&mut self) -> Option<ConnId> {
        let at = self.dice.roll(self.pairs.len().max(1));
        self.pairs.keys().nth(at).copied()
    }

    fn act(&mut self) {
        let Some(conn) = self.pick() else { return self.connect() };
        let size = 1 + self.dice.roll(20_000);
        let pair = self.pairs.get_mut(&conn).unwrap();
        match self.dice.roll(24) {
            0..2 => self.connect(),
            2..7 => pair.write(size),
            7..12 => pair.read(size),
            12..17 => {
                let message = bytes_from(pair.taken, size);
                match self.driver.net.send(conn, message) {
                    Ok(()) => {
                        assert!(!pair.sending && !pair.closing);
                        pair.sending = true;
                    }
                    Err(message) => {
                        // Busy, or its end was noticed and is still to be reported.
                        assert_eq!(message.len(), size);
                        pair.ended |= !pair.sending;
                    }
                }
            }
            17..19 => {
                self.driver.net.pause_reading(conn);
                (pair.paused, pair.was_paused) = (true, true);
            }
            19..21 => {
                self.driver.net.resume_reading(conn);
                pair.paused = false;
            }
            21 => match self.dice.roll(4) {
                0 => drop(pair.client.take()),
                1 => pair.client.take().into_iter().for_each(reset),
                2 => drop(pair.client.as_ref().map(|c| c.shutdown(Shutdown::Write))),
                _ => {}
            },
            22 => {
                let how = if self.dice.roll(2) == 0 { Close::Now } else { Close::Linger };
                self.driver.net.close(conn, how);
                pair.closing = true;
            }
            _ => {
                self.driver.net.pause_accepting();
                self.driver.net.resume_accepting();
            }
        }
    }

    /// A round, and what it brought is checked against what is known.
    fn round(&mut self) {
        self.driver.round();
        self.check();
    }

    fn check(&mut self) {
        for seen in std::mem::take(&mut self.driver.seen) {
            match seen {
                Seen::Received { conn, bytes } => {
                    let pair = self.pairs.get_mut(&conn).expect("open");
                    assert!(!pair.closing && !pair.ended && !pair.paused);
                    assert_continues(pair.received, &bytes, "server");
                    pair.received += bytes.len();
                    assert!(pair.received <= pair.written);
                }
                Seen::Sent { conn, buffer, taken } => {
                    let pair = self.pairs.get_mut(&conn).expect("open");
                    assert!(std::mem::replace(&mut pair.sending, false), "one answer a send");
                    assert_continues(pair.taken, &buffer, "buffer");
                    pair.taken += taken;
                    pair.closing |= taken < buffer.len();
                }
                Seen::Closed { conn, why } => {
                    let pair = self.pairs.remove(&conn).expect("closed once");
                    assert!(!pair.sending, "sends are answered first");
                    // A paused connection's end is reported over unread input.
                    if why == CloseReason::PeerClosed && !pair.was_paused && !pair.closing {
                        assert_eq!(pair.received, pair.written, "input comes before its end");
                    }
                    self.closed += 1;
                }
                Seen::Accepted { .. } | Seen::Arrived { .. } => {}
            }
        }
    }
}

impl Pair {
    fn write(&mut self, size: usize) {
        let Some(client) = &mut self.client else { return };
        match client.write(&bytes_from(self.written, size)) {
            Ok(n) => self.written += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.client = None,
        }
    }

    fn read(&mut self, size: usize) {
        let Some(client) = &mut self.client else { return };
        let mut piece = vec![0; size];
        match client.read(&mut piece) {
            Ok(0) => self.client = None,
            Ok(n) => {
                assert_continues(self.read, &piece[..n], "client");
                self.read += n;
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.client = None,
        }
    }
}

fn storm(flavour: Flavour, seed: u64) {
    eprintln!("seed {seed}");
    let settings = NetSettings {
        connections_max: 16,
        receive_piece_bytes: 700,
        events_per_poll_max: 5,
        linger_ms: 1,
        ..NetSettings::default()
    };
    let listen = ListenSettings {
        send_buffer_bytes: Some(4096),
        receive_buffer_bytes: Some(4096),
        ..ListenSettings::default()
    };
    let Some(driver) = Driver::start(flavour, settings, listen) else { return };
    let dice = Dice(seed * 2 + 1);
    let mut storm = Storm { driver, dice, pairs: BTreeMap::new(), closed: 0 };
    for _ in 0..3000 {
        for _ in 0..1 + storm.dice.roll(4) {
            storm.act();
        }
        storm.round();
    }
    // Calm: everybody reads; what was said arrives.
    let open: Vec<ConnId> = storm.pairs.keys().copied().collect();
    for conn in &open {
        storm.driver.net.resume_reading(*conn);
        storm.pairs.get_mut(conn).unwrap().paused = false;
    }
    for rounds in 0.. {
        storm.round();
        storm.pairs.values_mut().for_each(|pair| pair.read(1 << 16));
        let settled = |p: &Pair| {
            p.client.is_some()
                && !p.closing
                && !p.sending
                && p.received == p.written
                && p.read == p.taken
        };
        if storm.pairs.values().all(settled) {
            break;
        }
        // Lingering ends by itself, half a second later; nothing else takes long on loopback.
        storm.driver.wait(std::time::Duration::from_millis(1));
        assert!(rounds < 20_000, "seed {seed}: something never comes to rest");
    }
    // The rest goes when its clients go.
    storm.pairs.values_mut().for_each(|pair| pair.client = None);
    while !storm.pairs.is_empty() {
        storm.round();
        assert!(storm.pairs.is_empty() || storm.driver.wait(support::PATIENCE), "seed {seed}");
    }
    assert_eq!(storm.driver.net.connections(), 0);
    assert_eq!(storm.driver.net.counters().accepted as usize, storm.closed);
    assert!(storm.closed > 50);
}

#[test]
fn the_contract_holds_in_a_storm_over_io_uring() {
    (1..=6).for_each(|seed| storm(Flavour::IoUring, seed));
}

#[test]
fn the_contract_holds_in_a_storm_over_epoll() {
    (1..=6).for_each(|seed| storm(Flavour::Epoll, seed));
}
