//! Where the cores' flight recorders are read: on a panic, on a stall, on a signal.
//!
//! The recorders themselves ([`crate::base::recorder`]) belong to their cores. Here they are known
//! by weak references, so that a server that has ended leaves nothing behind.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use super::clock;
use crate::base::Instant;
use crate::base::recorder::{Recorded, Recorder};

/// Every recorder that is read. Locked when a core starts and when somebody reads, never by a core
/// that records.
static ALL: Mutex<Vec<Weak<Recorder>>> = Mutex::new(Vec::new());

/// Where dumps go; not set until [`enable`].
static DESTINATION: OnceLock<Option<PathBuf>> = OnceLock::new();

/// From now on this recorder is part of every dump.
pub fn register(recorder: &Arc<Recorder>) {
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|known| known.strong_count() > 0);
    all.push(Arc::downgrade(recorder));
}

/// The last events of all cores, at most `events_max` of them, in the order of time: one a line,
/// with how long ago in microseconds, the core, its event's number, and the event.
///
/// A core stamps what it does in one turn with the turn's beginning, so two cores' events may be
/// told in the wrong order by as much as a turn takes: some microseconds.
pub fn last_events(events_max: usize) -> String {
    let all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    print_events(&all.iter().filter_map(Weak::upgrade).collect::<Vec<_>>(), events_max)
}

fn print_events(recorders: &[Arc<Recorder>], events_max: usize) -> String {
    let now = clock::now();
    let mut events: Vec<(Instant, &'static str, Recorded)> = Vec::new();
    for recorder in recorders {
        let its = recorder.events().into_iter();
        events.extend(its.map(|event| (event.at, recorder.core(), event)));
    }
    // Stable: events of one core at one time stay in their order.
    events.sort_by_key(|&(at, ..)| at);
    let mut text = String::new();
    for (at, core, event) in &events[events.len().saturating_sub(events_max)..] {
        let (ago_us, number) = (now.ns_since(*at) / 1000, event.number);
        // Writing to a string does not fail.
        let _ = writeln!(text, "{:>12} us {core:<6} {number:>8}  {event}", format!("-{ago_us}"));
    }
    text
}

/// From now on dumps are written: to the end of `file`, or to standard error; and a panic, on
/// whatever thread, dumps after its own message. What was said first holds.
pub fn enable(file: Option<PathBuf>) {
    if DESTINATION.set(file).is_err() {
        return;
    }
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        before(panic);
        // Not while somebody registers a recorder: a panic in there must not lock up.
        if ALL.try_lock().is_ok() {
            dump("a panic", usize::MAX);
        }
    }));
}

/// Writes the last `events_max` events, if dumps are enabled.
pub fn dump(why: &str, events_max: usize) {
    let Some(file) = DESTINATION.get() else { return };
    let events = last_events(events_max);
    let text = format!("flight recorders, for {why}:\n{events}end of flight recorders\n");
    let Some(path) = file else {
        // In one piece: other threads write there too.
        let _ = io::stderr().write_all(text.as_bytes());
        return;
    };
    let written = File::options().create(true).append(true).open(path);
    let written = written.and_then(|mut file| file.write_all(text.as_bytes()));
    let _ = match written {
        Ok(()) => writeln!(io::stderr(), "flight recorders, for {why}: in {}", path.display()),
        Err(error) => {
            writeln!(io::stderr(), "cannot write to {}: {error}\n{text}", path.display())
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::recorder::recorded_events;

    recorded_events!(Test {
        Step = "step", ["number" Number];
        Wake = "wake", [];
    });

    #[test]
    fn events_of_all_cores_are_told_in_the_order_of_time() {
        let mut front = Recorder::start("front", Test::KINDS);
        let mut engine = Recorder::start("engine", Test::KINDS);
        for n in 0..3 {
            engine.record(Instant::from_ns(10 * n), Test::Step as u16, [n, 0, 0]);
            front.record(Instant::from_ns(10 * n + 5), Test::Wake as u16, [0; 3]);
        }
        let text = print_events(&[front.recorder(), engine.recorder()], usize::MAX);
        let cores: Vec<_> =
            text.lines().map(|line| line.split_whitespace().nth(2).unwrap()).collect();
        assert_eq!(cores, ["engine", "front"].repeat(3));
        assert!(text.lines().nth(4).unwrap().contains("engine        2  step"), "{text}");
        let last = print_events(&[front.recorder(), engine.recorder()], 1);
        assert_eq!(last.lines().count(), 1);
        assert!(last.contains("wake"), "{last}");
    }

    #[test]
    fn a_recorder_is_in_the_dump_as_long_as_its_core_lives() {
        let mut pen = Recorder::start("a core that ends", Test::KINDS);
        register(&pen.recorder());
        pen.record(clock::now(), Test::Wake as u16, [0; 3]);
        assert!(last_events(usize::MAX).contains("a core that ends"));
        drop(pen);
        assert!(!last_events(usize::MAX).contains("a core that ends"));
    }
}
