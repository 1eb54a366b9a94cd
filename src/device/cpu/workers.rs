//! The compute workers: pinned threads that run every step together.
//!
//! All of them go through the same stages. In a stage each worker claims the tiles of its own
//! share one after the other, which keeps its reads sequential (tiles dealt out in turns halved
//! the memory bandwidth), then helps its next neighbours: a worker that the system takes off its
//! CPU costs one tile. Between stages they meet at a barrier. Waiting spins for [`SPIN`], then
//! parks: nothing burns a core while idle.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

/// A barrier is usually passed within a microsecond; a worker that waits longer waits for one that
/// lost its CPU, perhaps to the very thread it is waiting in front of.
const SPIN: Duration = Duration::from_micros(20);

/// Shares that a worker looks into: its own and those of its next neighbours. Enough for any
/// worker to be helped, few enough that ending a stage is cheap on machines with many.
const SHARES: usize = 4;

/// What workers run. Called by every worker, once a job.
pub trait Job: Send + Sync + 'static {
    /// One worker's share of a job. A panic in one ends the job in all.
    fn run(&self, lane: &Lane<'_>);

    /// Called once, by the last worker out. `broken`: a worker panicked, now or earlier.
    fn finish(&self, broken: bool);
}

/// One worker's view of the team within a job.
#[derive(Clone, Copy, Debug)]
pub struct Lane<'a> {
    team: &'a Team,
    index: usize,
}

/// What the workers share.
#[derive(Debug)]
struct Team {
    lanes: usize,
    /// Counts jobs; workers wait for it to change.
    jobs: CachePadded<AtomicUsize>,
    /// Workers at the barrier.
    arrived: CachePadded<AtomicUsize>,
    /// Counts barriers passed; those at the barrier wait for it to change.
    passed: CachePadded<AtomicUsize>,
    /// The next tile of each worker's share of the stage, counted from the share's first.
    next_tiles: Vec<CachePadded<AtomicUsize>>,
    /// Workers that are through with the job.
    left: AtomicUsize,
    /// A worker panicked: nobody waits at a barrier any more.
    broken: AtomicBool,
    stopping: AtomicBool,
    /// Which workers are parked or about to be.
    parked: Vec<CachePadded<AtomicBool>>,
    threads: OnceLock<Vec<Thread>>,
}

/// What a worker unwinds with when another one panicked.
struct Broken;

impl Lane<'_> {
    /// Which worker, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many workers.
    pub fn lanes(&self) -> usize {
        self.team.lanes
    }

    /// The first tile of a worker's share of `count`; that of the worker after the last is `count`.
    fn share_start(&self, worker: usize, count: usize) -> usize {
        count * worker / self.team.lanes
    }

    /// Runs tiles 0 to `count`, each on one worker, and returns when all have been run.
    pub fn stage(&self, count: usize, mut tile: impl FnMut(usize)) {
        for offset in 0..self.team.lanes.min(SHARES) {
            let worker = (self.index + offset) % self.team.lanes;
            let (start, end) =
                (self.share_start(worker, count), self.share_start(worker + 1, count));
            let next = &self.team.next_tiles[worker];
            // Relaxed: the counter orders nothing but itself; the barrier orders the data. The
            // load spares a neighbour's cache line when there is nothing left to take.
            while start + next.load(Ordering::Relaxed) < end {
                let index = start + next.fetch_add(1, Ordering::Relaxed);
                if index < end {
                    tile(index);
                }
            }
        }
        self.barrier();
    }

    /// Waits until every worker is here. What each wrote before is then visible to all.
    pub fn barrier(&self) {
        let team = self.team;
        let passed = team.passed.load(Ordering::Relaxed);
        // AcqRel: the last to arrive sees what the others wrote, and passes it on by `passed`.
        if team.arrived.fetch_add(1, Ordering::AcqRel) + 1 == team.lanes {
            team.arrived.store(0, Ordering::Relaxed);
            team.reset_tiles();
            team.passed.store(passed.wrapping_add(1), Ordering::SeqCst);
            team.wake();
        } else {
            team.wait(self.index, || {
                team.passed.load(Ordering::SeqCst) != passed || team.broken.load(Ordering::SeqCst)
            });
        }
        if team.broken.load(Ordering::Relaxed) {
            resume_unwind(Box::new(Broken));
        }
    }
}

impl Team {
    fn new(lanes: usize) -> Team {
        let zero = || CachePadded::new(AtomicUsize::new(0));
        Team {
            lanes,
            jobs: zero(),
            arrived: zero(),
            passed: zero(),
            next_tiles: (0..lanes).map(|_| zero()).collect(),
            left: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            parked: (0..lanes).map(|_| CachePadded::new(AtomicBool::new(false))).collect(),
            threads: OnceLock::new(),
        }
    }

    /// Returns when `ready` says so: spins first, then parks.
    ///
    /// SeqCst throughout, here, in `ready` and before `wake`: the waiter sets its flag, then looks
    /// again; the waker changes what is looked at, then looks at the flag. One of them sees the
    /// other, so no wake-up is lost.
    fn wait(&self, index: usize, ready: impl Fn() -> bool) {
        let mut start = None;
        loop {
            for _ in 0..64 {
                if ready() {
                    return;
                }
                std::hint::spin_loop();
            }
            // The clock is first read when the wait turns out not to be a short one.
            if start.get_or_insert_with(Instant::now).elapsed() >= SPIN {
                break;
            }
        }
        let flag = &self.parked[index];
        flag.store(true, Ordering::SeqCst);
        while !ready() {
            std::thread::park();
            flag.store(true, Ordering::SeqCst);
        }
        flag.store(false, Ordering::SeqCst);
    }

    fn reset_tiles(&self) {
        for next in &self.next_tiles {
            next.store(0, Ordering::Relaxed);
        }
    }

    /// Wakes whoever is parked; call after changing what they wait for.
    fn wake(&self) {
        let Some(threads) = self.threads.get() else { return };
        for (flag, thread) in self.parked.iter().zip(threads) {
            if flag.load(Ordering::SeqCst) && flag.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
    }

    fn work(&self, index: usize, job: &dyn Job) {
        let mut done = 0;
        loop {
            self.wait(index, || {
                self.jobs.load(Ordering::SeqCst) != done || self.stopping.load(Ordering::SeqCst)
            });
            let jobs = self.jobs.load(Ordering::SeqCst);
            // A job that was begun before the end is run by all, or some would wait for the rest.
            if jobs == done {
                return;
            }
            done = jobs;
            let lane = Lane { team: self, index };
            let result = catch_unwind(AssertUnwindSafe(|| {
                if !self.broken.load(Ordering::SeqCst) {
                    job.run(&lane);
                }
            }));
            if let Err(cause) = result {
                self.break_up(&cause);
            }
            // AcqRel: the last one out sees all that the others did.
            if self.left.fetch_add(1, Ordering::AcqRel) + 1 == self.lanes {
                self.left.store(0, Ordering::Relaxed);
                self.reset_tiles();
                job.finish(self.broken.load(Ordering::SeqCst));
            }
        }
    }

    fn break_up(&self, cause: &Box<dyn Any + Send>) {
        if !cause.is::<Broken>() {
            tracing::error!("a compute worker panicked: the device is lost");
        }
        self.broken.store(true, Ordering::SeqCst);
        self.wake();
    }
}

/// The workers' owner. Dropping it lets them finish their job and ends them.
pub struct Workers {
    team: Arc<Team>,
    handles: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts one worker for each entry of `cpus`, pinned there if it names a CPU.
    ///
    /// # Errors
    /// When the system starts no more threads.
    ///
    /// # Panics
    /// When `cpus` is empty.
    pub fn start(cpus: &[Option<usize>], job: Arc<dyn Job>) -> std::io::Result<Workers> {
        assert!(!cpus.is_empty(), "at least one worker");
        let team = Arc::new(Team::new(cpus.len()));
        let mut workers = Workers { team: team.clone(), handles: Vec::new() };
        for (index, &cpu) in cpus.iter().enumerate() {
            let (team, job) = (team.clone(), job.clone());
            let builder = std::thread::Builder::new().name(format!("forebay-cpu-{index}"));
            workers.handles.push(builder.spawn(move || {
                if let Some(id) = cpu
                    && !core_affinity::set_for_current(core_affinity::CoreId { id })
                {
                    tracing::warn!(cpu = id, "a compute worker could not be pinned");
                }
                team.work(index, &*job);
            })?);
        }
        let threads = workers.handles.iter().map(|handle| handle.thread().clone()).collect();
        team.threads.set(threads).expect("set once, here");
        // A worker may have parked before the handles were there to wake it.
        team.wake();
        Ok(workers)
    }

    /// Starts the next job. The one before must have finished.
    pub fn begin(&self) {
        // SeqCst: see `Team::wait`; it also publishes what the job is about.
        self.team.jobs.fetch_add(1, Ordering::SeqCst);
        self.team.wake();
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.team.stopping.store(true, Ordering::SeqCst);
        // Not by flag: construction may have ended before the flags could be used.
        self.handles.iter().for_each(|handle| handle.thread().unpark());
        for handle in self.handles.drain(..) {
            // A worker's panics are caught, so there is nothing to report.
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Sums {
        cells: Vec<AtomicUsize>,
        stages: usize,
        panic_at: Option<usize>,
        done: mpsc::SyncSender<bool>,
    }

    impl Job for Sums {
        fn run(&self, lane: &Lane<'_>) {
            for stage in 0..self.stages {
                lane.stage(self.cells.len(), |tile| {
                    if self.panic_at == Some(stage) && tile == 3 {
                        resume_unwind(Box::new("planted"));
                    }
                    // A tile of a later stage reads what another worker wrote in an earlier one.
                    let other = (tile + 7) % self.cells.len();
                    let seen = self.cells[other].load(Ordering::Relaxed);
                    assert!(seen == stage || seen == stage + 1, "{seen} in stage {stage}");
                    self.cells[tile].fetch_add(1, Ordering::Relaxed);
                });
            }
        }

        fn finish(&self, broken: bool) {
            self.done.send(broken).expect("the test listens");
        }
    }

    fn run(lanes: usize, jobs: usize, panic_at: Option<usize>) -> (Vec<usize>, Vec<bool>) {
        let (done, finished) = mpsc::sync_channel(1);
        let cells = (0..16).map(|_| AtomicUsize::new(0)).collect();
        let job = Arc::new(Sums { cells, stages: 50, panic_at, done });
        let workers = Workers::start(&vec![None; lanes], job.clone()).expect("threads");
        let mut results = Vec::new();
        for _ in 0..jobs {
            for cell in &job.cells {
                cell.store(0, Ordering::Relaxed);
            }
            workers.begin();
            results.push(finished.recv().expect("the job ends"));
        }
        (job.cells.iter().map(|cell| cell.load(Ordering::Relaxed)).collect(), results)
    }

    #[test]
    fn every_tile_of_every_stage_runs_once_whatever_the_number_of_workers() {
        for lanes in [1, 2, 3, 5] {
            let (cells, results) = run(lanes, 20, None);
            assert_eq!(cells, vec![50; 16]);
            assert_eq!(results, vec![false; 20]);
        }
    }

    #[test]
    fn a_panic_in_one_worker_ends_the_job_in_all_and_every_later_job_at_once() {
        for lanes in [1, 2, 3] {
            let (_, results) = run(lanes, 3, Some(20));
            assert_eq!(results, vec![true; 3]);
        }
    }
}
