//! The real front core, with simulated sockets and clients that speak bytes.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay::base::{Instant, Prng, Ratio, TokenTable};
use forebay::front::{Action, ByteTokeniser, CloseHow, ConnId, FrontCore, FrontSettings};
use forebay::ports::FrontEnds;

use crate::client::{Asked, Client, Manners};
use crate::model;
use crate::options::Options;
use crate::request::Plan;
use crate::side::Side;
use crate::world::Seen;

/// The server's end of a socket, and what the kernel has of it.
struct Socket {
    conn: ConnId,
    reading_paused: bool,
    /// Handed over to be sent; reported when the kernel has taken some of it.
    sending: Option<Vec<u8>>,
    /// In the kernel, towards the client.
    kernel: VecDeque<u8>,
    /// The server has closed: what is in the kernel can still be read, then nothing comes.
    closed: bool,
}

enum State {
    NotOpen,
    Open(Socket),
    Closed,
}

struct Link {
    client: Client,
    state: State,
    /// The client is still reading what it has.
    reads_until: Instant,
}

pub struct Wire {
    number: u8,
    core: FrontCore,
    links: Vec<Link>,
    /// Generation of each place among the connections, and whether it is taken.
    places: Vec<(u32, bool)>,
    kernel_bytes: usize,
    draining: bool,
    faults: bool,
    prng: Prng,
}

impl Wire {
    pub fn new(
        number: u8,
        ends: FrontEnds,
        options: &Options,
        table: &Arc<TokenTable>,
        mut prng: Prng,
        plans: Vec<Plan>,
    ) -> Wire {
        let mut settings = FrontSettings::new(options.limits.clone(), "simulated", model::VOCAB);
        settings.front = number;
        settings.body_timeout_ms = 1_000;
        let tokenise = Box::new(ByteTokeniser::new(model::VOCAB));
        let core = FrontCore::new(settings, tokenise, ends);
        let count = prng.between(1, 6) as usize;
        let mut shares: Vec<Vec<Asked>> = (0..count).map(|_| Vec::new()).collect();
        let bytes_of = |token| table.bytes(token).to_vec();
        let last = plans.last().map_or(Instant::ZERO, |plan| plan.at);
        for plan in plans {
            shares[prng.index(count)].push(Asked::new(plan, bytes_of));
        }
        let context = options.limits.context_max;
        let links = shares.into_iter().map(|asked| {
            let manners = draw_manners(options, &mut prng, last);
            let client = Client::new(manners, asked, context, prng.fork());
            Link { client, state: State::NotOpen, reads_until: Instant::ZERO }
        });
        Wire {
            number,
            core,
            links: links.collect(),
            places: vec![(0, false); options.limits.connections_max as usize],
            kernel_bytes: prng.between(16, 3_000) as usize,
            draining: false,
            faults: true,
            prng,
        }
    }

    fn open(&mut self, at: usize, now: Instant) -> bool {
        let link = &mut self.links[at];
        if self.draining {
            link.client.give_up_unsent();
            link.state = State::Closed;
            return true;
        }
        let Some(place) = self.places.iter().position(|(_, taken)| !taken) else { return false };
        if link.client.manners.opens_at > now {
            return false;
        }
        self.places[place].1 = true;
        let conn = ConnId { slot: place as u32, generation: self.places[place].0 };
        link.state = State::Open(Socket {
            conn,
            reading_paused: false,
            sending: None,
            kernel: VecDeque::new(),
            closed: false,
        });
        self.core.handle_accepted(conn, now);
        true
    }

    /// Does what the core has asked for.
    fn act(&mut self) -> Result<bool, String> {
        let mut busy = false;
        while let Some(action) = self.core.poll_action() {
            busy = true;
            let conn = match &action {
                Action::Send { conn, .. }
                | Action::PauseReading { conn }
                | Action::ResumeReading { conn }
                | Action::Close { conn, .. } => *conn,
            };
            let socket = self.links.iter_mut().find_map(|link| match &mut link.state {
                State::Open(socket) if socket.conn == conn => Some(socket),
                _ => None,
            });
            let Some(socket) = socket else {
                return Err(format!("{action:?} for a connection that is gone"));
            };
            match action {
                Action::Send { bytes, .. } => {
                    if bytes.is_empty() || socket.sending.is_some() || socket.closed {
                        return Err("a send too many".into());
                    }
                    socket.sending = Some(bytes);
                }
                Action::PauseReading { .. } => socket.reading_paused = true,
                Action::ResumeReading { .. } => socket.reading_paused = false,
                Action::Close { how, .. } => {
                    if how == CloseHow::Now {
                        socket.kernel.clear();
                    } else if let Some(bytes) = socket.sending.take() {
                        socket.kernel.extend(bytes);
                    }
                    socket.closed = true;
                }
            }
        }
        Ok(busy)
    }

    /// Moves bytes of one connection, and lets its client speak and hear.
    fn advance(&mut self, at: usize, now: Instant) -> Result<bool, String> {
        if matches!(self.links[at].state, State::NotOpen) {
            return Ok(self.open(at, now));
        }
        let link = &mut self.links[at];
        let State::Open(socket) = &mut link.state else { return Ok(false) };
        let mut busy = false;
        let reset = link.client.manners.resets_at.is_some_and(|at| at <= now) && self.faults;
        let heard_all = socket.closed && socket.kernel.is_empty();
        let never = socket.closed && link.client.is_deaf(now, self.faults);
        let leaves = !self.faults && link.client.is_over() && self.prng.below(4) == 0;
        if reset || heard_all || never || leaves {
            if heard_all && !reset && !link.client.may_be_closed() && !never {
                return Err(format!("the server closed connection {at} for no reason"));
            }
            self.close(at, now);
            return Ok(true);
        }
        busy |= link.client.speak(now, self.faults);
        if !socket.closed && !socket.reading_paused && !link.client.outbox.is_empty() {
            let most = link.client.manners.piece_max.min(link.client.outbox.len() as u64);
            let count = self.prng.between(1, most) as usize;
            let bytes: Vec<u8> = link.client.outbox.drain(..count).collect();
            self.core.handle_received(socket.conn, &bytes, now);
            busy = true;
        }
        let room = self.kernel_bytes.saturating_sub(socket.kernel.len());
        if room > 0
            && let Some(bytes) = socket.sending.take()
        {
            let taken = bytes.len().min(room);
            socket.kernel.extend(&bytes[..taken]);
            self.core.handle_sent(socket.conn, bytes, taken, now);
            busy = true;
        }
        if !socket.kernel.is_empty()
            && link.reads_until <= now
            && !link.client.is_deaf(now, self.faults)
        {
            let count = self.prng.between(1, socket.kernel.len() as u64) as usize;
            let bytes: Vec<u8> = socket.kernel.drain(..count).collect();
            link.reads_until = now.plus_ns(link.client.manners.byte_ns * count as u64);
            link.client.hear(&bytes).map_err(|what| format!("connection {at}: {what}"))?;
            busy = true;
        }
        if link.client.is_told_to_go() {
            link.client.give_up_unsent();
        }
        Ok(busy)
    }

    fn close(&mut self, at: usize, now: Instant) {
        let link = &mut self.links[at];
        if let State::Open(socket) = std::mem::replace(&mut link.state, State::Closed) {
            self.core.handle_closed(socket.conn, now);
            let place = &mut self.places[socket.conn.slot as usize];
            *place = (place.0 + 1, false);
        }
        link.client.handle_closed();
    }
}

fn draw_manners(options: &Options, prng: &mut Prng, last: Instant) -> Manners {
    let p = prng;
    let sometime = |p: &mut Prng| Instant::ZERO.plus_ns(p.between(0, 2 * last.as_ns() + 1_000_000));
    let maybe = |p: &mut Prng, ratio: Ratio| p.chance(ratio).then(|| sometime(p));
    Manners {
        opens_at: Instant::ZERO.plus_ns(p.between(0, last.as_ns() / 2)),
        resets_at: maybe(p, options.reset),
        garbage_at: maybe(p, options.garbage),
        deaf_at: maybe(p, options.deaf),
        stays_deaf: p.below(2) == 0,
        byte_ns: if p.chance(options.slow_reader) { p.between(0, 20_000) } else { 0 },
        piece_max: [1, 7, 100, 100_000][p.index(4)],
        mute: p.chance(Ratio::percent(2)),
    }
}

impl Side for Wire {
    fn tick(&mut self, now: Instant) -> Result<bool, String> {
        let mut busy = self.core.tick(now);
        busy |= self.act()?;
        for at in 0..self.links.len() {
            busy |= self.advance(at, now)?;
            busy |= self.act()?;
        }
        Ok(busy)
    }

    fn next_timeout(&self, now: Instant) -> Option<Instant> {
        let of_link = |link: &Link| {
            let manners = &link.client.manners;
            match &link.state {
                State::NotOpen => Some(manners.opens_at),
                State::Closed => None,
                State::Open(_) => {
                    let reads = Some(link.reads_until);
                    let resets = manners.resets_at.filter(|_| self.faults);
                    let times = [reads, resets, link.client.next_timeout()];
                    times.into_iter().flatten().filter(|at| *at > now).min()
                }
            }
        };
        let links = self.links.iter().filter_map(of_link).filter(|at| *at > now);
        links.chain(self.core.next_timeout()).min()
    }

    fn become_calm(&mut self) {
        self.faults = false;
    }

    fn begin_drain(&mut self, now: Instant, until: Instant) {
        self.draining = true;
        self.core.begin_drain(now, until);
    }

    fn is_over(&self) -> bool {
        self.links.iter().all(|link| link.client.is_over())
    }

    fn is_empty(&self) -> bool {
        self.core.is_drained() && self.core.streams() == 0
    }

    /// It gives each back in the turn in which it takes it.
    fn batches_held(&self) -> usize {
        0
    }

    fn check_links(&mut self, _batches_idle: usize) -> Result<(), String> {
        Ok(())
    }

    /// The real front core keeps its links to itself.
    fn check_links_at_end(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn work(&self) -> (u64, u64) {
        let all = self.links.iter().flat_map(|link| {
            link.client.asked.iter().map(|asked| (&asked.plan, link.client.manners.byte_ns))
        });
        all.fold((0, 0), |(tokens, read_ms), (plan, byte_ns)| {
            let output = plan.answer.tokens.len() as u64;
            // A token with twenty alternatives has some 200 bytes.
            let ms = output * 200 * byte_ns / 1_000_000;
            (tokens + plan.question.prompt.len() as u64 + output, read_ms + ms)
        })
    }

    fn count(&self, seen: &mut Seen) {
        let asked = self.links.iter().flat_map(|link| &link.client.asked);
        asked.filter_map(|asked| asked.end).for_each(|end| seen.count(end));
    }

    fn rejected(&self) -> Option<u64> {
        Some(self.core.counters().requests_rejected)
    }

    fn pending(&self) -> Vec<String> {
        let of_link = |(at, link): (usize, &Link)| {
            let state = match &link.state {
                State::NotOpen => "not open".to_owned(),
                State::Closed => "closed".to_owned(),
                State::Open(socket) => format!(
                    "{:?}, paused {}, sending {:?}, kernel {}, closed {}",
                    socket.conn,
                    socket.reading_paused,
                    socket.sending.as_ref().map(Vec::len),
                    socket.kernel.len(),
                    socket.closed
                ),
            };
            let open = link.client.asked.iter().filter(|asked| asked.end.is_none());
            let open: Vec<_> = open.map(|asked| asked.number).collect();
            format!(
                "front {} connection {at}: {state}; outbox {}, error {:?}, {:?}; open {open:?}",
                self.number,
                link.client.outbox.len(),
                link.client.error,
                link.client.manners,
            )
        };
        let core = format!(
            "front {}: {} connections, {} streams, {:?}",
            self.number,
            self.core.connections(),
            self.core.streams(),
            self.core.counters()
        );
        self.links.iter().enumerate().map(of_link).chain([core]).collect()
    }
}
