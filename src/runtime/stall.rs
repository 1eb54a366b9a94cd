//! Who holds up an executor: every poll of a task leaves its name and start where a watcher on
//! another thread can see them.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::clock;
use crate::base::Instant;

/// What an executor shows of itself: which task it polls, and since when.
pub struct Pulse {
    executor: &'static str,
    /// Start of the poll under way in clock nanoseconds; 0 between polls.
    since_ns: AtomicU64,
    /// Number of the polled task's name in [`NAMES`]. Stored before `since_ns` (release), read
    /// after it (acquire): whoever sees a start sees its name or a later one.
    task: AtomicU32,
    /// Polls so far, by which the watcher tells one long poll from many short ones.
    polls: AtomicU64,
}

/// All names that tasks were ever given; they are few and static. Locked when a task is spawned
/// and when a stall is reported.
static NAMES: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

fn number_of(name: &'static str) -> u32 {
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    let at = names.iter().position(|known| *known == name).unwrap_or_else(|| {
        names.push(name);
        names.len() - 1
    });
    at as u32
}

fn name_of(number: u32) -> &'static str {
    let names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    names.get(number as usize).copied().unwrap_or("unknown")
}

impl Pulse {
    pub(super) fn new(executor: &'static str) -> Pulse {
        Pulse {
            executor,
            since_ns: AtomicU64::new(0),
            task: AtomicU32::new(u32::MAX),
            polls: AtomicU64::new(0),
        }
    }

    /// Whose it is.
    pub fn executor(&self) -> &'static str {
        self.executor
    }

    /// The stall at time `now`: a poll that has lasted longer than `longest_ns`.
    pub fn stall(&self, now: Instant, longest_ns: u64) -> Option<Stall> {
        let polls = self.polls.load(Ordering::Acquire);
        let since_ns = self.since_ns.load(Ordering::Acquire);
        let lasted_ns = now.as_ns().saturating_sub(since_ns);
        if since_ns == 0 || lasted_ns <= longest_ns {
            return None;
        }
        let task = name_of(self.task.load(Ordering::Acquire));
        Some(Stall { executor: self.executor, task, lasted_ns, poll: polls })
    }

    /// Runs one poll of a task, visibly; returns its outcome and how long it took in nanoseconds.
    pub(super) fn watch<T>(&self, task: TaskName, poll: impl FnOnce() -> T) -> (T, u64) {
        let start = self.enter(task.0);
        let leave = Leave(self);
        let outcome = poll();
        drop(leave);
        (outcome, clock::now().ns_since(start))
    }

    fn enter(&self, task: u32) -> Instant {
        self.task.store(task, Ordering::Release);
        self.polls.fetch_add(1, Ordering::AcqRel);
        let now = clock::now();
        self.since_ns.store(now.as_ns().max(1), Ordering::Release);
        now
    }

    fn leave(&self) {
        self.since_ns.store(0, Ordering::Release);
    }
}

/// An executor that does not come round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// Which executor.
    pub executor: &'static str,
    /// The task that it polls.
    pub task: &'static str,
    /// For how long already, in nanoseconds.
    pub lasted_ns: u64,
    /// Which poll of the executor this is: the same number is the same stall.
    pub poll: u64,
}

/// A task's name, by its number in [`NAMES`].
#[derive(Clone, Copy, Debug)]
pub(super) struct TaskName(u32);

impl TaskName {
    pub(super) fn new(name: &'static str) -> TaskName {
        TaskName(number_of(name))
    }
}

/// Ends a poll, also one that panics.
struct Leave<'a>(&'a Pulse);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Watches executors from a thread of its own, and ends with its handle.
pub struct StallWatch {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl StallWatch {
    /// Looks at every pulse four times per `longest` (but at most every 50 ms: the watcher is to
    /// cost nothing) and reports each stall once.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start(
        pulses: Vec<Arc<Pulse>>,
        longest: Duration,
        mut report: impl FnMut(&Stall) + Send + 'static,
    ) -> std::io::Result<StallWatch> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let period = (longest / 4).max(Duration::from_millis(50));
        let watch = move || {
            let mut reported = vec![u64::MAX; pulses.len()];
            // Acquire pairs with the release in `drop`.
            while !stopped.load(Ordering::Acquire) {
                for (pulse, last) in pulses.iter().zip(&mut reported) {
                    if let Some(stall) = pulse.stall(clock::now(), longest.as_nanos() as u64)
                        && stall.poll != *last
                    {
                        *last = stall.poll;
                        report(&stall);
                    }
                }
                thread::park_timeout(period);
            }
        };
        let thread = thread::Builder::new().name("stall-watch".to_owned()).spawn(watch)?;
        Ok(StallWatch { stop, thread: Some(thread) })
    }
}

impl Drop for StallWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A report that panicked has said so already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_poll_is_a_stall_once_it_lasts_too_long_and_no_longer_when_it_ends() {
        let pulse = Pulse::new("front");
        assert_eq!(pulse.stall(clock::now().plus_ms(1000), 1), None);
        pulse.enter(number_of("tokenise"));
        let began = pulse.since_ns.load(Ordering::Relaxed);
        let late = Instant::from_ns(began + 1001);
        let stall = pulse.stall(late, 1000).unwrap();
        assert_eq!((stall.executor, stall.task, stall.lasted_ns), ("front", "tokenise", 1001));
        assert_eq!(pulse.stall(late, 1001), None);
        pulse.leave();
        assert_eq!(pulse.stall(late, 1000), None);
    }

    #[test]
    fn the_watch_reports_a_stall_once_with_the_task_that_holds_the_executor() {
        let pulse = Arc::new(Pulse::new("engine"));
        pulse.enter(number_of("step"));
        let (sender, reports) = mpsc::channel();
        let send = move |stall: &Stall| sender.send(stall.clone()).unwrap();
        let watch = StallWatch::start(vec![pulse.clone()], Duration::from_micros(1), send).unwrap();
        let first = reports.recv().unwrap();
        assert_eq!((first.executor, first.task, first.poll), ("engine", "step", 1));
        pulse.leave();
        pulse.enter(number_of("prefill"));
        let second = reports.recv().unwrap();
        assert_eq!((second.task, second.poll), ("prefill", 2));
        drop(watch);
        assert!(reports.recv().is_err(), "each stall is reported once");
    }
}
