//! The flight recorder: what a core did last, in fixed memory, for when it is too late to ask.
//!
//! One writer records; whoever dumps (a panic, a stall's watcher, a signal's task) reads beside
//! it and leaves out what is being overwritten at that moment.

use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use super::clock;
use crate::base::Instant;

/// A kind of event: its name and what its two numbers are.
///
/// ```
/// use forebay::runtime::recorder::Kind;
/// static STEP_DONE: Kind = Kind { name: "step done", a: "number", b: "rows" };
/// ```
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// What happened.
    pub name: &'static str,
    /// What the first number is.
    pub a: &'static str,
    /// What the second number is.
    pub b: &'static str,
}

/// One core's last events.
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
#[derive(Default)]
struct Entry {
    turn: AtomicU64,
    at_ns: AtomicU64,
    kind: AtomicU64,
    a: AtomicU64,
    b: AtomicU64,
}

/// An event as it was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Which event since the start.
    pub number: u64,
    /// When.
    pub at: Instant,
    /// What.
    pub kind: &'static Kind,
    /// First number.
    pub a: u64,
    /// Second number.
    pub b: u64,
}

/// The only hand that writes to a recorder.
pub struct Pen {
    recorder: Arc<Recorder>,
    next: u64,
}

impl Recorder {
    /// A recorder of the last `capacity` events (at least 1), and its writer. Events name their
    /// kind by its place in `kinds`. It takes part in [`dump_all`] as long as it lives.
    pub fn new(
        core: &'static str,
        kinds: &'static [Kind],
        capacity: usize,
    ) -> (Pen, Arc<Recorder>) {
        let entries = (0..capacity.max(1)).map(|_| Entry::default()).collect();
        let recorder = Arc::new(Recorder { core, kinds, entries, recorded: AtomicU64::new(0) });
        let mut all = all().lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|known| known.strong_count() > 0);
        all.push(Arc::downgrade(&recorder));
        (Pen { recorder: recorder.clone(), next: 0 }, recorder)
    }

    /// Bytes it takes.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Recorder>() + self.entries.len() * size_of::<Entry>()
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
        let (at_ns, kind) =
            (entry.at_ns.load(Ordering::Relaxed), entry.kind.load(Ordering::Relaxed));
        let (a, b) = (entry.a.load(Ordering::Relaxed), entry.b.load(Ordering::Relaxed));
        // Pairs with the fence in `record`: if any word above was a later event's, so is this.
        fence(Ordering::Acquire);
        let after = entry.turn.load(Ordering::Relaxed);
        if before != after || before != number * 2 + 2 {
            return None;
        }
        let kind = self.kinds.get(kind as usize)?;
        Some(Recorded { number, at: Instant::from_ns(at_ns), kind, a, b })
    }
}

impl Pen {
    /// Records an event: some ten nanoseconds, no allocation.
    pub fn record(&mut self, now: Instant, kind: u16, a: u64, b: u64) {
        let recorder = &*self.recorder;
        let entry = &recorder.entries[(self.next % recorder.entries.len() as u64) as usize];
        entry.turn.store(self.next * 2 + 1, Ordering::Relaxed);
        // Pairs with the fence in `read`: no word below becomes visible before the odd turn.
        fence(Ordering::Release);
        entry.at_ns.store(now.as_ns(), Ordering::Relaxed);
        entry.kind.store(u64::from(kind), Ordering::Relaxed);
        entry.a.store(a, Ordering::Relaxed);
        entry.b.store(b, Ordering::Relaxed);
        entry.turn.store(self.next * 2 + 2, Ordering::Release);
        self.next += 1;
        recorder.recorded.store(self.next, Ordering::Release);
    }
}

impl fmt::Display for Recorder {
    /// One line an event, times in microseconds before now.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (now, events) = (clock::now(), self.events());
        writeln!(f, "last {} events of {}:", events.len(), self.core)?;
        for event in events {
            let Recorded { number, at, kind, a, b } = event;
            let ago_us = now.ns_since(at) / 1000;
            write!(f, "  {number:>8} -{ago_us} us  {}", kind.name)?;
            for (name, value) in [(kind.a, a), (kind.b, b)] {
                if !name.is_empty() {
                    write!(f, "  {name}={value}")?;
                }
            }
            f.write_char('\n')?;
        }
        Ok(())
    }
}

fn all() -> &'static Mutex<Vec<Weak<Recorder>>> {
    static ALL: Mutex<Vec<Weak<Recorder>>> = Mutex::new(Vec::new());
    &ALL
}

/// What all recorders of the process hold, in print.
pub fn dump_all() -> String {
    let all = all().lock().unwrap_or_else(PoisonError::into_inner);
    let mut text = String::new();
    for recorder in all.iter().filter_map(Weak::upgrade) {
        // Writing to a string does not fail.
        let _ = write!(text, "{recorder}");
    }
    text
}

/// From now on a panic, on whatever thread, prints the recorders to standard error after its own
/// message. Done once however often it is called.
pub fn dump_on_panic() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            before(panic);
            // Not while somebody registers a recorder: a panic in there must not lock up.
            if all().try_lock().is_ok() {
                eprint!("{}", dump_all());
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    static KINDS: [Kind; 2] =
        [Kind { name: "step", a: "number", b: "rows" }, Kind { name: "wake", a: "", b: "" }];

    #[test]
    fn the_last_events_are_kept_in_order() {
        let (mut pen, recorder) = Recorder::new("engine", &KINDS, 4);
        assert_eq!(recorder.events(), []);
        for i in 0..10 {
            pen.record(Instant::from_ns(i * 100), 0, i, i * i);
        }
        let kept: Vec<_> = recorder.events().iter().map(|e| (e.number, e.a, e.b)).collect();
        assert_eq!(kept, [(6, 6, 36), (7, 7, 49), (8, 8, 64), (9, 9, 81)]);
        assert_eq!(recorder.events()[0].at, Instant::from_ns(600));
        pen.record(clock::now(), 1, 0, 0);
        let text = dump_all();
        assert!(text.contains("last 4 events of engine:"), "{text}");
        assert!(text.contains("step  number=9  rows=81") && text.contains("us  wake\n"), "{text}");
    }

    #[test]
    fn a_dump_beside_the_writer_never_shows_half_an_event() {
        let (mut pen, recorder) = Recorder::new("front", &KINDS, 3);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let writer = thread::spawn(move || {
            let mut i = 0;
            while !stopped.load(Ordering::Relaxed) {
                pen.record(Instant::from_ns(i), (i % 2) as u16, i, !i);
                i += 1;
            }
            i
        });
        let mut seen = 0u64;
        while seen < 10_000 {
            for event in recorder.events() {
                assert_eq!((event.a, event.b), (event.number, !event.number));
                assert_eq!(event.at, Instant::from_ns(event.number));
                assert_eq!(event.kind, &KINDS[(event.number % 2) as usize]);
                seen += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        let written = writer.join().unwrap();
        assert_eq!(recorder.events().last().unwrap().number + 1, written);
    }
}
