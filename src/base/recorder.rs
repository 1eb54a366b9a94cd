//! The flight recorder: what a core did last, in fixed memory, for when it is too late to ask.
//!
//! One writer records; whoever dumps reads beside it and leaves out what is being overwritten at
//! that moment. Numbers are recorded; what they mean is said by the event's [`Kind`], and turned
//! into text only when somebody reads.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::Instant;

/// Events that a core's recorder keeps. At a hundred steps a second the engine's last quarter of a
/// minute; at full load on a fast device, its last second.
pub const EVENTS_KEPT: usize = 4096;

/// Numbers that an event has.
pub const VALUES: usize = 3;

/// A kind of event: its name and what its numbers are; fewer than [`VALUES`] is fine.
#[derive(Debug)]
pub struct Kind {
    /// What happened.
    pub name: &'static str,
    /// What its numbers are, and how they are read.
    pub values: &'static [(&'static str, Show)],
}

/// How a number is read.
#[derive(Clone, Copy, Debug)]
pub enum Show {
    /// As it is.
    Number,
    /// A slot and its generation, from [`key`].
    Key,
    /// The same with a front core's number before it.
    Stream,
    /// Nanoseconds, as microseconds.
    Ns,
    /// A number that stands for a word.
    Word(fn(u64) -> &'static str),
}

/// A slot and its generation in one number.
pub const fn key(slot: u32, generation: u32) -> u64 {
    (slot as u64) << 32 | generation as u64
}

/// A slot and its generation, and which front core's they are. The slot has 24 bits: more streams
/// than any configuration allows.
pub const fn stream(front: u8, slot: u32, generation: u32) -> u64 {
    (front as u64) << 56 | key(slot & 0xff_ffff, generation)
}

/// Makes the enum of a core's events, in the order of their table, so that neither can be wrong
/// about the other: `Name = "words in the dump", ["value" Show, ..];`
#[cfg(feature = "server")] // whoever builds without the cores has none
macro_rules! recorded_events {
    ($(#[$meta:meta])* $events:ident {
        $($event:ident = $name:literal, [$($value:literal $show:expr),*];)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $events { $($event),+ }

        impl $events {
            /// The table of all kinds, by the enum's order.
            pub(crate) const KINDS: &'static [$crate::base::recorder::Kind] = {
                use $crate::base::recorder::{Kind, Show::*};
                &[$(Kind { name: $name, values: &[$(($value, $show)),*] }),+]
            };
        }
    };
}
#[cfg(feature = "server")]
pub(crate) use recorded_events;

/// One core's last events.
#[derive(Debug)]
pub struct Recorder {
    core: &'static str,
    kinds: &'static [Kind],
    entries: Box<[Entry]>,
    /// Events recorded since the start; event n lies in place n modulo the length. Stored (release)
    /// after the event's words, loaded (acquire) by a dump before it reads them.
    recorded: AtomicU64,
}

/// The words of an event. A dump checks `turn` before and after: odd while the words are written,
/// else twice the event's number plus two.
#[derive(Debug, Default)]
struct Entry {
    turn: AtomicU64,
    at_ns: AtomicU64,
    kind: AtomicU64,
    values: [AtomicU64; VALUES],
}

/// An event as it was recorded.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    /// Which event since the start.
    pub number: u64,
    /// When.
    pub at: Instant,
    /// What.
    pub kind: &'static Kind,
    /// Its numbers.
    pub values: [u64; VALUES],
}

/// The only hand that writes to a recorder.
#[derive(Debug)]
pub struct Pen {
    recorder: Arc<Recorder>,
    next: u64,
}

impl Recorder {
    /// Bytes that a core's recorder takes.
    pub const BYTES: usize = size_of::<Recorder>() + EVENTS_KEPT * size_of::<Entry>();

    /// The pen of a recorder of the last [`EVENTS_KEPT`] events. They name their kind by its place
    /// in `kinds`.
    pub fn start(core: &'static str, kinds: &'static [Kind]) -> Pen {
        Recorder::with_capacity(core, kinds, EVENTS_KEPT)
    }

    fn with_capacity(core: &'static str, kinds: &'static [Kind], capacity: usize) -> Pen {
        let entries = (0..capacity).map(|_| Entry::default()).collect();
        let recorder = Arc::new(Recorder { core, kinds, entries, recorded: AtomicU64::new(0) });
        Pen { recorder, next: 0 }
    }

    /// Whose it is.
    pub fn core(&self) -> &'static str {
        self.core
    }

    /// The events that are there, oldest first.
    pub fn events(&self) -> Vec<Recorded> {
        let end = self.recorded.load(Ordering::Acquire);
        let start = end.saturating_sub(self.entries.len() as u64);
        (start..end).filter_map(|number| self.read(number)).collect()
    }

    /// `None` when the writer has come round to this place meanwhile.
    fn read(&self, number: u64) -> Option<Recorded> {
        let entry = &self.entries[(number % self.entries.len() as u64) as usize];
        // Pairs with the release at the end of `record`: the words are at least this event's.
        let before = entry.turn.load(Ordering::Acquire);
        let at = Instant::from_ns(entry.at_ns.load(Ordering::Relaxed));
        let kind = entry.kind.load(Ordering::Relaxed);
        let values = std::array::from_fn(|n| entry.values[n].load(Ordering::Relaxed));
        // Pairs with the fence in `record`: if any word above was a later event's, so is this.
        fence(Ordering::Acquire);
        let after = entry.turn.load(Ordering::Relaxed);
        if before != after || before != number * 2 + 2 {
            return None;
        }
        Some(Recorded { number, at, kind: self.kinds.get(kind as usize)?, values })
    }
}

impl Pen {
    /// What it writes to, for whoever reads.
    pub fn recorder(&self) -> Arc<Recorder> {
        Arc::clone(&self.recorder)
    }

    /// Records an event: some ten nanoseconds, no allocation.
    pub fn record(&mut self, now: Instant, kind: u16, values: [u64; VALUES]) {
        let recorder = &*self.recorder;
        let entry = &recorder.entries[(self.next % recorder.entries.len() as u64) as usize];
        entry.turn.store(self.next * 2 + 1, Ordering::Relaxed);
        // Pairs with the fence in `read`: no word below becomes visible before the odd turn.
        fence(Ordering::Release);
        entry.at_ns.store(now.as_ns(), Ordering::Relaxed);
        entry.kind.store(u64::from(kind), Ordering::Relaxed);
        for (word, value) in entry.values.iter().zip(values) {
            word.store(value, Ordering::Relaxed);
        }
        entry.turn.store(self.next * 2 + 2, Ordering::Release);
        self.next += 1;
        recorder.recorded.store(self.next, Ordering::Release);
    }
}

impl fmt::Display for Recorded {
    /// `name  value=1  value=2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<16}", self.kind.name)?;
        for (&(name, show), &value) in self.kind.values.iter().zip(&self.values) {
            match show {
                Show::Number => write!(f, "  {name}={value}")?,
                Show::Key => write!(f, "  {name}={}.{}", value >> 32, value as u32)?,
                Show::Stream => {
                    let (front, slot) = (value >> 56, value >> 32 & 0xff_ffff);
                    write!(f, "  {name}={front}:{slot}.{}", value as u32)?;
                }
                Show::Ns => write!(f, "  {name}={}us", value / 1000)?,
                Show::Word(word) => write!(f, "  {name}={}", word(value))?,
            }
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "server"))]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    recorded_events!(Test {
        Step = "step", ["number" Number, "took" Ns, "seq" Key];
        Wake = "wake", ["why" Word(|n| if n == 0 { "bell" } else { "timer" }), "who" Stream];
    });

    #[test]
    fn the_last_events_are_kept_in_order_and_read_as_their_kind_says() {
        let mut pen = Recorder::with_capacity("engine", Test::KINDS, 4);
        let recorder = pen.recorder();
        assert!(recorder.events().is_empty());
        for i in 0..10 {
            let values = [i, i * 1000, key(i as u32, 7)];
            pen.record(Instant::from_ns(i * 100), Test::Step as u16, values);
        }
        pen.record(Instant::from_ns(1000), Test::Wake as u16, [1, stream(2, 5, 3), 0]);
        let kept = recorder.events();
        let numbers: Vec<_> = kept.iter().map(|event| event.number).collect();
        assert_eq!(numbers, [7, 8, 9, 10]);
        assert_eq!(kept[0].at, Instant::from_ns(700));
        let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(kept[2].to_string()), "step number=9 took=9us seq=9.7");
        assert_eq!(words(kept[3].to_string()), "wake why=timer who=2:5.3");
    }

    #[test]
    fn a_dump_beside_the_writer_never_shows_half_an_event() {
        let mut pen = Recorder::with_capacity("front", Test::KINDS, 3);
        let recorder = pen.recorder();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let writer = thread::spawn(move || {
            let mut i = 0;
            while !stopped.load(Ordering::Relaxed) {
                pen.record(Instant::from_ns(i), (i % 2) as u16, [i, !i, i]);
                i += 1;
            }
            i
        });
        let mut seen = 0u64;
        while seen < 10_000 {
            for event in recorder.events() {
                assert_eq!(event.values, [event.number, !event.number, event.number]);
                assert_eq!(event.at, Instant::from_ns(event.number));
                assert!(std::ptr::eq(event.kind, &Test::KINDS[(event.number % 2) as usize]));
                seen += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        let written = writer.join().unwrap();
        assert_eq!(recorder.events().last().unwrap().number + 1, written);
    }
}
