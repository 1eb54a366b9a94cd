//! Handing 32-byte messages from one thread to another: our ring beside rtrb, crossbeam and std.
//!
//! `cargo bench --bench ring`. Each side of a queue has a CPU to itself (the first two that the
//! process may use) and spins. Read the *ratios*: on a shared or virtual machine the absolute times
//! vary two- to threefold between runs.
//!
//! - `throughput`: a message's share of a long run, pushed as fast as the queue takes and popped
//!   as fast as it gives.
//! - `batch`: the same, up to 32 messages a call, where the contestant has such calls.
//! - `round_trip`: one message there and one back.
//! - `bell`: a ring of the doorbell when nobody sleeps, and a push through a whole link.
//!
//! In front of criterion's groups stands a comparison of its own: all contestants in turn, again
//! and again, one short run each. The ratios are medians over the turns, so that whatever slows
//! the machine for a while slows all of them.

use std::hint::{black_box, spin_loop};
use std::sync::{Barrier, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use core_affinity::CoreId;
use criterion::{Criterion, Throughput};
use forebay::flow::link;
use forebay::ring::{Doorbell, ring};

type Message = [u64; 4];

/// Slots of every queue: about what a link between two cores has.
const CAPACITY: usize = 256;
const BATCH: usize = 32;

/// The CPUs of the near and the far side, as positions among those the process may use.
const NEAR: usize = 0;
const FAR: usize = 1;

fn pin(position: usize) {
    // Asked once: a thread that is pinned, and those it starts, see no CPU but their own.
    static CPUS: OnceLock<Vec<CoreId>> = OnceLock::new();
    let cpus = CPUS.get_or_init(|| core_affinity::get_core_ids().unwrap_or_default());
    assert!(cpus.len() > FAR, "two threads that spin need two CPUs");
    core_affinity::set_for_current(cpus[position]);
}

fn spin<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    loop {
        match attempt() {
            Some(value) => return value,
            None => spin_loop(),
        }
    }
}

/// Time from the start until the far side has the last of `messages` messages. `push` and `pop`
/// move any number of messages of those asked for (one, or a batch), and return it.
fn throughput(
    messages: u64,
    mut push: impl FnMut(u64) -> u64,
    mut pop: impl FnMut(u64) -> u64 + Send,
) -> Duration {
    pin(NEAR);
    let start = &Barrier::new(2);
    thread::scope(|scope| {
        // The far end moves to the far thread: borrowed, it would lie on this thread's stack, and
        // which ends share a line of cache would be luck.
        let far = scope.spawn(move || {
            pin(FAR);
            start.wait();
            let started = Instant::now();
            let mut left = messages;
            while left > 0 {
                match pop(left) {
                    0 => spin_loop(),
                    popped => left -= popped,
                }
            }
            started.elapsed()
        });
        start.wait();
        let mut left = messages;
        while left > 0 {
            match push(left) {
                0 => spin_loop(),
                pushed => left -= pushed,
            }
        }
        far.join().expect("the far side does not panic")
    })
}

/// Time of `trips` messages that go to the far side and come back, one after the other.
fn round_trips(
    trips: u64,
    mut push: impl FnMut(Message) -> bool,
    mut pop: impl FnMut() -> Option<Message>,
    mut push_back: impl FnMut(Message) -> bool + Send,
    mut pop_far: impl FnMut() -> Option<Message> + Send,
) -> Duration {
    pin(NEAR);
    let start = &Barrier::new(2);
    thread::scope(|scope| {
        // Moved for the same reason as in `throughput`.
        scope.spawn(move || {
            pin(FAR);
            start.wait();
            for _ in 0..trips {
                let message = spin(&mut pop_far);
                assert!(push_back(message), "one message always fits");
            }
        });
        start.wait();
        let started = Instant::now();
        for trip in 0..trips {
            assert!(push([trip; 4]), "one message always fits");
            black_box(spin(&mut pop));
        }
        started.elapsed()
    })
}

/// One kind of queue: how long so many messages, messages in batches, and round trips take. Plain
/// functions, so that every loop is compiled for its queue.
struct Contestant {
    name: &'static str,
    throughput: fn(u64) -> Duration,
    batch: Option<fn(u64) -> Duration>,
    round_trip: fn(u64) -> Duration,
}

/// Builds the three functions from a constructor and the expressions for one push and one pop.
macro_rules! contestant {
    (
        $name:literal, $ends:expr, batch: $batch:expr,
        |$near:ident, $message:ident| $push:expr,
        |$far:ident| $pop:expr $(,)?
    ) => {
        Contestant {
            name: $name,
            throughput: |messages| {
                #[allow(unused_mut, reason = "some queues push through a shared reference")]
                let (mut $near, mut $far) = $ends;
                let push = move |left: u64| {
                    let $message: Message = [left; 4];
                    u64::from($push)
                };
                throughput(messages, push, move |_| u64::from($pop.map(black_box).is_some()))
            },
            batch: $batch,
            round_trip: |trips| {
                #[allow(unused_mut, reason = "some queues push through a shared reference")]
                let (there, back) = ($ends, $ends);
                let ((mut near_there, mut far_there), (mut near_back, mut far_back)) =
                    (there, back);
                round_trips(
                    trips,
                    move |$message| {
                        let $near = &mut near_there;
                        $push
                    },
                    move || {
                        let $far = &mut far_back;
                        $pop
                    },
                    move |$message| {
                        let $near = &mut near_back;
                        $push
                    },
                    move || {
                        let $far = &mut far_there;
                        $pop
                    },
                )
            },
        }
    };
}

fn batch_ours(messages: u64) -> Duration {
    let (mut near, mut far) = ring::<Message>(CAPACITY);
    throughput(
        messages,
        move |left| {
            let count = left.min(BATCH as u64);
            near.push_batch(&mut (0..count).map(|n| [n; 4])) as u64
        },
        move |_| far.pop_batch(BATCH).map(black_box).count() as u64,
    )
}

fn batch_rtrb(messages: u64) -> Duration {
    let (mut near, mut far) = rtrb::RingBuffer::<Message>::new(CAPACITY);
    throughput(
        messages,
        move |left| {
            let count = near.slots().min(left.min(BATCH as u64) as usize);
            let chunk = near.write_chunk_uninit(count).expect("that many slots are free");
            chunk.fill_from_iter((0..count as u64).map(|n| [n; 4])) as u64
        },
        move |_| {
            let count = far.slots().min(BATCH);
            let chunk = far.read_chunk(count).expect("that many slots are filled");
            chunk.into_iter().map(black_box).count() as u64
        },
    )
}

fn contestants() -> [Contestant; 5] {
    [
        contestant!(
            "forebay", ring::<Message>(CAPACITY), batch: Some(batch_ours),
            |near, message| near.push(message).is_ok(),
            |far| far.pop(),
        ),
        contestant!(
            "rtrb", rtrb::RingBuffer::<Message>::new(CAPACITY), batch: Some(batch_rtrb),
            |near, message| near.push(message).is_ok(),
            |far| far.pop().ok(),
        ),
        contestant!(
            "crossbeam_array_queue",
            {
                let queue = std::sync::Arc::new(crossbeam::queue::ArrayQueue::new(CAPACITY));
                (queue.clone(), queue)
            },
            batch: None,
            |near, message| near.push(message).is_ok(),
            |far| far.pop(),
        ),
        contestant!(
            "crossbeam_channel", crossbeam::channel::bounded(CAPACITY), batch: None,
            |near, message| near.try_send(message).is_ok(),
            |far| far.try_recv().ok(),
        ),
        contestant!(
            "std_sync_channel", mpsc::sync_channel(CAPACITY), batch: None,
            |near, message| near.try_send(message).is_ok(),
            |far| far.try_recv().ok(),
        ),
    ]
}

/// Median of the values; sorts them.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Passes so many messages (or makes so many round trips) and says how long that took.
type Run = fn(u64) -> Duration;

/// All of `runs` in turn, `turns` times. Prints for each the median time of a message and the
/// median ratio to the first within the turn.
fn interleaved(title: &str, messages: u64, turns: usize, runs: &[(&str, Run)]) {
    let mut times = vec![Vec::new(); runs.len()];
    for turn in 0..turns {
        // Each turn begins with another one, so that nobody always follows the same neighbour.
        for place in 0..runs.len() {
            let at = (turn + place) % runs.len();
            times[at].push(runs[at].1(messages).as_secs_f64() * 1e9 / messages as f64);
        }
    }
    println!("{title}: {turns} turns of {messages}");
    for (run, own) in runs.iter().zip(&times) {
        let mut ratios: Vec<f64> =
            own.iter().zip(&times[0]).map(|(own, first)| own / first).collect();
        let (ratio, time) = (median(&mut ratios), median(&mut own.clone()));
        println!("  {:<24} {time:>8.2} ns   {ratio:>6.2} x {}", run.0, runs[0].0);
    }
}

fn compare(contestants: &[Contestant]) {
    let runs = |pick: fn(&Contestant) -> Option<Run>| -> Vec<_> {
        contestants.iter().filter_map(|c| Some((c.name, pick(c)?))).collect()
    };
    interleaved("throughput", 200_000, 200, &runs(|c| Some(c.throughput)));
    interleaved("batch", 500_000, 200, &runs(|c| c.batch));
    interleaved("round trip", 5_000, 200, &runs(|c| Some(c.round_trip)));
}

fn criterion_groups(c: &mut Criterion, contestants: &[Contestant]) {
    let mut group = c.benchmark_group("throughput");
    group.throughput(Throughput::Elements(1));
    for contestant in contestants {
        group.bench_function(contestant.name, |b| b.iter_custom(contestant.throughput));
    }
    group.finish();
    let mut group = c.benchmark_group("batch");
    group.throughput(Throughput::Elements(1));
    for contestant in contestants {
        if let Some(batch) = contestant.batch {
            group.bench_function(contestant.name, |b| b.iter_custom(batch));
        }
    }
    group.finish();
    let mut group = c.benchmark_group("round_trip");
    for contestant in contestants {
        group.bench_function(contestant.name, |b| b.iter_custom(contestant.round_trip));
    }
    group.finish();

    let mut group = c.benchmark_group("bell");
    let bell = Doorbell::new();
    group.bench_function("ring_nobody_waits", |b| b.iter(|| black_box(&bell).ring()));
    let (mut near, mut far) = ring::<Message>(CAPACITY);
    group.bench_function("push_pop_one_thread", |b| {
        b.iter(|| near.push(black_box([1; 4])).is_ok() && far.pop().is_some())
    });
    let (mut sender, mut receiver) =
        link::<Message>("bench", CAPACITY, Doorbell::new(), Doorbell::new());
    group.bench_function("link_one_thread", |b| {
        b.iter(|| {
            let sent = sender.send(black_box([1; 4])).is_ok();
            let received = receiver.receive().is_some();
            receiver.give_back(1);
            sent && received
        });
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let contestants = contestants();
    // Under `cargo test --benches` and with a filter, criterion's part is all that was asked for.
    if std::env::args().skip(1).all(|argument| argument == "--bench") {
        compare(&contestants);
    }
    criterion_groups(&mut criterion, &contestants);
    criterion.final_summary();
}
