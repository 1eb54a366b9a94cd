//! The engine core allocates nothing after construction: counted, over everything that it does.

#[path = "common/engine.rs"]
mod bench;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use bench::{A, Bench, END, Want};
use forebay::limits::{Limits, Policy, Quota, Quotas};
use forebay::message::{ControlMessage, EventBatch, Logprob, Sampled, SeqKey, Step, StreamKey};
use forebay::request::FinishReason;

/// Counts the allocations of the thread that asks it to.
struct Counting;

thread_local! {
    static COUNT: Cell<Option<u64>> = const { Cell::new(None) };
}

fn count_one() {
    // During a thread's end the cell may be gone; nobody counts then.
    let _ = COUNT.try_with(|count| count.set(count.get().map(|count| count + 1)));
}

// SAFETY: every call goes on to the system's allocator as it came; counting touches a
// thread-local cell without a destructor, which allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_one();
        // SAFETY: the caller keeps the contract that this one has, too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the memory came from `System`, by one of the other two.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count_one();
        // SAFETY: as for `dealloc`.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations_in(work: impl FnOnce()) -> u64 {
    COUNT.set(Some(0));
    work();
    COUNT.take().expect("set above")
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations_in(|| drop(std::hint::black_box(Box::new(1)))), 1);
    assert_eq!(allocations_in(|| drop(Vec::<u8>::new())), 0);
}

/// A run through everything at once: arrivals and refusals, prefill and decode, penalties,
/// log-probabilities, stop strings, parking, preemption, cancels, time-outs, drain. Only the
/// engine's own ticks are counted; what the test does in between is not.
#[test]
fn after_construction_the_engine_allocates_nothing() {
    for (depth, policy) in [(1, Policy::Priority), (2, Policy::Priority), (2, Policy::Fair)] {
        // Limits that are kept track of, and never met.
        let quota = Quota {
            requests_per_second: 1_000,
            requests_per_minute: 60_000,
            input_tokens_per_second: 100_000,
            output_tokens_per_second: 100_000,
            ..Quota::UNLIMITED
        };
        let quotas = Quotas { tenant: quota, user: quota, ..Quotas::default() };
        let limits =
            Limits { queue_ttl_ms: 60, stall_timeout_ms: 30, policy, quotas, ..Limits::tiny() };
        let mut bench = Bench::with(&limits, 4, depth, 1);
        let mut run = Run {
            bench: &mut bench,
            allocations: 0,
            seqs: Vec::new(),
            wants: Vec::new(),
            round: 0,
        };
        for _ in 0..4_000 {
            run.round();
        }
        run.bench.engine.begin_drain(run.bench.now, run.bench.now.plus_ms(50));
        for _ in 0..200 {
            run.round();
        }
        assert_eq!(run.allocations, 0);
        let stats = run.bench.stats();
        assert!(run.bench.engine.is_drained(), "{stats:?}");
        let counters = stats.counters;
        for (what, count) in [
            ("preemptions", counters.preemptions),
            ("KV drops", counters.kv_drops),
            ("parks", counters.parks),
            ("resumes", counters.resumes),
            ("refusals", counters.rejected[0]),
            ("asks without an account of their own", stats.shared_asks),
            ("stops", counters.finished[FinishReason::StopString as usize]),
            ("ends", counters.finished[FinishReason::EndOfText as usize]),
            ("stalls", counters.finished[FinishReason::Stalled as usize]),
            ("cancels", counters.finished[FinishReason::Cancelled as usize]),
        ] {
            assert!(count > 0, "no {what}: the run does not show what it is to show: {stats:?}");
        }
    }
}

struct Run<'a> {
    bench: &'a mut Bench,
    allocations: u64,
    seqs: Vec<(SeqKey, u64)>,
    /// What each stream wants, by its slot.
    wants: Vec<Want>,
    round: u64,
}

impl Run<'_> {
    /// Wants of every kind, in turn.
    fn want(&self) -> Want {
        let n = self.round as usize;
        Want {
            prompt: 1 + n * 7 % 90,
            max_tokens: (n * 13 % 150) as u32,
            window: 8,
            stop: if n.is_multiple_of(3) { vec!["ab", "bba"] } else { vec![] },
            logprobs: (n.is_multiple_of(4)).then_some(20),
            penalties: n.is_multiple_of(5),
            tenant: ["a", "b", "c", "d", "e"][n / 8 % 5],
            user: ["", "ann", "bob"][n / 8 % 3],
            deadline: (n.is_multiple_of(11)).then(|| self.bench.now.plus_ms(25)),
            ..Want::default()
        }
    }

    fn tick(&mut self) {
        let (engine, now) = (&mut self.bench.engine, self.bench.now);
        self.allocations += allocations_in(|| while engine.tick(now) {});
    }

    fn round(&mut self) {
        self.round += 1;
        if self.round.is_multiple_of(8) && self.bench.fronts[0].requests.credits() > 1 {
            let want = self.want();
            let stream = self.bench.ask(&want);
            assert_eq!(stream.slot as usize, self.wants.len());
            self.wants.push(want);
        }
        self.tick();
        while let Some(batch) = self.bench.fronts[0].events.pop() {
            self.take_in(&batch);
            let back = self.bench.fronts[0].control.push(ControlMessage::Return(batch));
            assert!(back.is_ok());
        }
        // Every third sequence is never given credit again.
        let control = &mut self.bench.fronts[0].control;
        for &(seq, born) in self.seqs.iter().filter(|(_, born)| !born.is_multiple_of(3)) {
            let age = self.round - born;
            let message = match (born % 5 == 1, age) {
                (true, 20) => ControlMessage::Cancel { seq, reason: FinishReason::Cancelled },
                _ if age.is_multiple_of(9) => ControlMessage::Credit { seq, tokens: 8 },
                _ => continue,
            };
            // A ring that is full is no matter: most of these are over by now.
            let _ = control.push(message);
        }
        self.seqs.retain(|(_, born)| self.round - born < 100);
        self.tick();
        if let Some(mut step) = self.bench.take_step() {
            self.answer(&mut step);
            assert!(self.bench.device.results.push(step).is_ok());
        }
        self.bench.now = self.bench.now.plus_ms(1);
        self.tick();
    }

    fn take_in(&mut self, batch: &EventBatch) {
        for event in &batch.events {
            if let forebay::message::Event::Grant { stream, seq } = *event {
                self.submit(stream, seq);
            }
        }
        let top_count = |entry: &Logprob| usize::from(entry.top_count);
        assert_eq!(batch.logprobs.iter().map(top_count).sum::<usize>(), batch.top.len());
    }

    fn submit(&mut self, stream: StreamKey, seq: SeqKey) {
        let mut want = self.wants[stream.slot as usize].clone();
        if self.round.is_multiple_of(10) {
            // Breaks its promise, and is refused.
            want.prompt += 1;
        }
        self.bench.submit(stream, seq, &want);
        self.seqs.push((seq, self.round));
    }

    fn answer(&mut self, step: &mut Step) {
        step.result.elapsed_ns = 1_000_000;
        for row in step.plan.rows.iter().filter(|row| row.sample) {
            let token = match (self.round + u64::from(row.position)) % 97 {
                0 => END,
                n => A + n as u32 % 3,
            };
            // A real device knows who asked; here everybody gets some, in the room there is.
            let room = step.result.top.capacity() - step.result.top.len();
            let top_count = room.min(20) as u8;
            step.result.top.extend((0..u32::from(top_count)).map(|n| (n, 0.0)));
            step.result.sampled.push(Sampled { seq: row.seq, token, logprob: -1.0, top_count });
        }
    }
}
