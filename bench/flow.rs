//! What flow control costs per message, request or step, on one thread.
//!
//! `cargo bench --bench flow`. All figures are nanoseconds per call; a decode step takes
//! milliseconds, so anything here under a microsecond is free.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use forebay::base::{Instant, Prng, Slab};
use forebay::flow::{
    CreditWindow, LoadEstimator, OutputForecast, StepCost, StepLoad, StepTimeModel, TokenBucket,
    link,
};
use forebay::ring::Doorbell;

fn credits_and_links(c: &mut Criterion) {
    let mut group = c.benchmark_group("link");
    let mut window = CreditWindow::full(64);
    group.bench_function("credit_take_give", |b| {
        b.iter(|| black_box(&mut window).take(1) && window.give(1).is_ok());
    });
    for capacity in [4, 64] {
        let (mut sender, mut receiver) =
            link::<[u64; 4]>("bench", capacity, Doorbell::new(), Doorbell::new());
        group.throughput(Throughput::Elements(capacity as u64));
        group.bench_function(format!("window_of_{capacity}_one_by_one"), |b| {
            b.iter(|| {
                for n in 0..capacity as u64 {
                    sender.send(black_box([n; 4])).expect("there is credit");
                }
                while receiver.receive().map(black_box).is_some() {
                    receiver.give_back(1);
                }
            });
        });
        group.bench_function(format!("window_of_{capacity}_in_a_batch"), |b| {
            b.iter(|| {
                let sent = sender.send_batch(&mut (0..capacity as u64).map(|n| black_box([n; 4])));
                while receiver.receive().map(black_box).is_some() {}
                receiver.give_back(sent);
            });
        });
    }
    group.finish();
}

fn buckets(c: &mut Criterion) {
    let mut group = c.benchmark_group("token_bucket");
    let mut bucket = TokenBucket::new(1_000_000, 1_000_000, 0, Instant::ZERO);
    let mut now = Instant::ZERO;
    group.bench_function("take", |b| {
        b.iter(|| {
            now = now.plus_ns(1_000);
            bucket.take(black_box(1), now).is_ok()
        });
    });
    let mut empty = TokenBucket::new(1, 1_000, 1_000_000, Instant::ZERO);
    empty.charge(1_000_000, Instant::ZERO);
    group.bench_function("refuse_and_say_when", |b| {
        b.iter(|| empty.take(black_box(1), Instant::ZERO).is_err());
    });
    group.finish();
}

fn estimators(c: &mut Criterion) {
    let mut group = c.benchmark_group("estimate");
    let mut load = LoadEstimator::new(10_000_000_000);
    let mut now = Instant::ZERO;
    group.bench_function("job_arrives_is_served_and_leaves", |b| {
        b.iter(|| {
            now = now.plus_ns(1_000_000);
            load.arrived(1, now);
            load.served(1, 900_000);
            load.left(5_000_000);
        });
    });
    group.bench_function("load", |b| b.iter(|| black_box(&load).load(now)));

    let prior = StepCost {
        step_ps: 5_000_000_000,
        prefill_token_ps: 300_000_000,
        decode_row_ps: 500_000_000,
        kv_position_ps: 500_000,
    };
    let mut model = StepTimeModel::new(prior);
    let step = StepLoad { prefill_tokens: 64, decode_rows: 32, kv_positions: 20_000 };
    group.bench_function("step_observe", |b| {
        b.iter(|| model.observe(black_box(step), black_box(40_000_000)));
    });
    group.bench_function("step_predict", |b| b.iter(|| model.predict_ns(black_box(step))));
    group.bench_function("prefill_within", |b| {
        b.iter(|| model.prefill_within(black_box(step), 1_000, 512, 60_000_000));
    });

    let mut prng = Prng::new(1);
    let mut forecast = OutputForecast::new(256);
    for _ in 0..10_000 {
        forecast.observe(prng.below(256), prng.below(2_000) as u32);
    }
    group.bench_function("forecast_observe", |b| {
        b.iter(|| forecast.observe(prng.below(256), 300));
    });
    group.bench_function("forecast_tokens", |b| {
        b.iter(|| forecast.tokens(black_box(77), 900, 4_096));
    });
    group.finish();
}

fn containers(c: &mut Criterion) {
    let mut slab = Slab::new(1_024);
    c.bench_function("slab/insert_get_remove", |b| {
        b.iter(|| {
            let key = slab.insert(black_box(1_u64)).expect("there is room");
            black_box(slab.get(key));
            slab.remove(key)
        });
    });
}

criterion_group! {
    name = flow;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = credits_and_links, buckets, estimators, containers
}
criterion_main!(flow);
