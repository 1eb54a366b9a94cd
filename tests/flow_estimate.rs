//! The estimators learn what they should, forget what they should, and stay finite.
#![cfg(all(feature = "core", not(loom)))]

use forebay::base::{Instant, Prng};
use forebay::flow::{LoadEstimator, RateEstimator, StepCost, StepLoad, StepTimeModel};

const SECOND: u64 = 1_000_000_000;

#[test]
fn a_steady_rate_is_found_and_forgotten_when_it_stops() {
    let mut rate = RateEstimator::new(SECOND);
    for n in 0..5_000 {
        rate.record(1, Instant::from_ns(n * SECOND / 100));
    }
    let steady = rate.per_1000_seconds(Instant::from_ns(50 * SECOND));
    assert!((98_000..=102_000).contains(&steady), "{steady}");
    let later = rate.per_1000_seconds(Instant::from_ns(60 * SECOND));
    assert!(later < 11_000, "a tenth or less after ten horizons: {later}");
    assert_eq!(RateEstimator::new(SECOND).per_1000_seconds(Instant::NEVER), 0);
}

#[test]
fn the_first_seconds_are_a_plain_average() {
    let mut rate = RateEstimator::new(100 * SECOND);
    for n in 0..=20 {
        rate.record(1, Instant::from_ns(n * SECOND));
    }
    let early = rate.per_1000_seconds(Instant::from_ns(20 * SECOND));
    assert!((950..=1_100).contains(&early), "{early}");
}

#[test]
fn bursts_at_one_instant_and_time_that_stands_still_are_harmless() {
    let mut rate = RateEstimator::new(SECOND);
    for _ in 0..1_000 {
        rate.record(u64::MAX, Instant::from_ns(5));
    }
    assert_eq!(rate.per_1000_seconds(Instant::from_ns(5)), 0, "no time, no rate");
    assert_eq!(rate.per_1000_seconds(Instant::from_ns(3)), 0);
    assert!(rate.per_1000_seconds(Instant::from_ns(6)) > 0);
}

#[test]
fn the_load_follows_littles_law() {
    // 20 jobs a second, each there for half a second, served in 25 ms of work each.
    let mut load = LoadEstimator::new(2 * SECOND);
    for n in 0..400 {
        let now = Instant::from_ns(n * SECOND / 20);
        load.arrived(1, now);
        load.served(1, SECOND / 40);
        load.left(SECOND / 2);
    }
    let load_now = load.load(Instant::from_ns(20 * SECOND));
    assert!((19_500..=20_500).contains(&load_now.arrivals_per_1000_seconds), "{load_now:?}");
    assert!((39_500..=40_500).contains(&load_now.service_per_1000_seconds), "{load_now:?}");
    assert!((9_700..=10_300).contains(&load_now.jobs_milli), "{load_now:?}");
    assert!((480..=520).contains(&load_now.utilisation_permille), "{load_now:?}");
    let drain = load.drain_ns(80).unwrap();
    assert!((19 * SECOND / 10..=21 * SECOND / 10).contains(&drain), "{drain}");
}

#[test]
fn an_idle_server_is_not_taken_for_a_slow_one() {
    let mut load = LoadEstimator::new(SECOND);
    (0..100).for_each(|_| load.served(1, SECOND / 10));
    let busy = load.load(Instant::from_ns(10 * SECOND));
    let idle = load.load(Instant::from_ns(10_000 * SECOND));
    assert_eq!(busy.service_per_1000_seconds, idle.service_per_1000_seconds);
    assert_eq!(LoadEstimator::new(SECOND).drain_ns(1), None);
}

const TRUTH: StepCost = StepCost {
    step_ps: 3_000_000_000,
    prefill_token_ps: 250_000_000,
    decode_row_ps: 400_000_000,
    kv_position_ps: 500_000,
};
const PRIOR: StepCost = StepCost {
    step_ps: 30_000_000_000,
    prefill_token_ps: 20_000_000,
    decode_row_ps: 20_000_000,
    kv_position_ps: 50_000,
};

fn true_ns(load: StepLoad, cost: StepCost) -> u64 {
    (cost.step_ps
        + cost.prefill_token_ps * u64::from(load.prefill_tokens)
        + cost.decode_row_ps * u64::from(load.decode_rows)
        + cost.kv_position_ps * load.kv_positions)
        / 1000
}

fn some_load(prng: &mut Prng) -> StepLoad {
    let mut load = StepLoad::default();
    for _ in 0..prng.below(33) {
        load = load.plus_decode(prng.below(2_048) as u32);
    }
    if prng.below(3) == 0 {
        load = load.plus_prefill(prng.below(1_024) as u32, prng.between(1, 256) as u32);
    }
    load
}

fn train(model: &mut StepTimeModel, prng: &mut Prng, steps: u32, cost: StepCost) {
    for _ in 0..steps {
        let load = some_load(prng);
        // Noise of up to 5 % either way.
        let elapsed = true_ns(load, cost) * prng.between(950, 1_050) / 1_000;
        model.observe(load, elapsed);
    }
}

fn worst_error_permille(model: &StepTimeModel, prng: &mut Prng, cost: StepCost) -> u64 {
    let errors = (0..200).map(|_| {
        let load = some_load(prng);
        let truth = true_ns(load, cost);
        model.predict_ns(load).abs_diff(truth) * 1_000 / truth
    });
    errors.max().unwrap()
}

#[test]
fn step_times_are_learnt_from_a_bad_prior_and_learnt_anew_when_they_change() {
    let mut prng = Prng::new(7);
    let mut model = StepTimeModel::new(PRIOR);
    train(&mut model, &mut prng, 200, TRUTH);
    let error = worst_error_permille(&model, &mut prng, TRUTH);
    assert!(error < 150, "{error} {:?}", model.cost());
    let slower = StepCost { step_ps: 9_000_000_000, decode_row_ps: 900_000_000, ..TRUTH };
    train(&mut model, &mut prng, 200, slower);
    let error = worst_error_permille(&model, &mut prng, slower);
    assert!(error < 150, "{error} {:?}", model.cost());
}

/// The prior says far more than the truth: the first corrections would make costs negative.
#[test]
fn a_prior_that_is_far_too_high_is_forgotten_after_a_few_steps() {
    let mut model = StepTimeModel::new(StepCost {
        step_ps: 2_000_000_000,
        prefill_token_ps: 500_000_000,
        decode_row_ps: 500_000_000,
        kv_position_ps: 1_000,
    });
    let prefill = StepLoad::default().plus_prefill(0, 4);
    for step in 0..100 {
        let decode = StepLoad::default().plus_decode(4 + step % 5);
        model.observe(if step % 5 == 0 { prefill } else { decode }, 1_000_000);
    }
    for load in [prefill, StepLoad::default().plus_decode(6)] {
        let error = model.predict_ns(load).abs_diff(1_000_000);
        assert!(error < 150_000, "{error}: {:?}", model.cost());
    }
}

#[test]
fn steps_that_are_all_alike_do_not_spoil_the_model() {
    let mut prng = Prng::new(8);
    let mut model = StepTimeModel::new(PRIOR);
    train(&mut model, &mut prng, 200, TRUTH);
    let alike = StepLoad::default().plus_decode(100).plus_decode(200);
    for _ in 0..100_000 {
        model.observe(alike, true_ns(alike, TRUTH) * prng.between(950, 1_050) / 1_000);
    }
    let error = model.predict_ns(alike).abs_diff(true_ns(alike, TRUTH));
    assert!(error < true_ns(alike, TRUTH) / 20, "{error}");
    train(&mut model, &mut prng, 100, TRUTH);
    let error = worst_error_permille(&model, &mut prng, TRUTH);
    assert!(error < 200, "{error} {:?}", model.cost());
}

#[test]
fn one_step_that_took_far_too_long_moves_little() {
    let mut prng = Prng::new(9);
    let mut model = StepTimeModel::new(PRIOR);
    train(&mut model, &mut prng, 300, TRUTH);
    let load = StepLoad::default().plus_decode(500);
    let before = model.predict_ns(load);
    model.observe(load, 1_000 * before);
    let after = model.predict_ns(load);
    assert!(after < before * 13 / 10, "{before} {after}");
}

#[test]
fn no_observation_makes_a_model_that_is_not_finite() {
    let mut prng = Prng::new(10);
    let mut model = StepTimeModel::new(PRIOR);
    for _ in 0..10_000 {
        let load = StepLoad {
            prefill_tokens: prng.next_u64() as u32 >> prng.below(32),
            decode_rows: prng.next_u64() as u32 >> prng.below(32),
            kv_positions: prng.next_u64() >> prng.below(64),
        };
        model.observe(load, prng.next_u64() >> prng.below(64));
        // More work never takes less time, and nothing takes for ever.
        assert!(model.predict_ns(load) >= model.predict_ns(StepLoad::default()));
        assert!(model.predict_ns(StepLoad::default()) < u64::MAX);
    }
}

#[test]
fn a_chunk_is_as_long_as_the_budget_allows_and_no_longer() {
    let model = StepTimeModel::new(TRUTH);
    let base = StepLoad::default().plus_decode(900).plus_decode(50);
    for budget_ms in [0, 3, 4, 5, 10, 50, 100_000] {
        let budget = budget_ms * 1_000_000;
        let tokens = model.prefill_within(base, 300, 512, budget);
        let fits = |tokens| model.predict_ns(base.plus_prefill(300, tokens)) <= budget;
        assert!(tokens == 0 || fits(tokens));
        assert!(tokens == 512 || !fits(tokens + 1));
    }
    assert_eq!(model.prefill_within(base, 300, 512, 0), 0);
    assert_eq!(model.prefill_within(base, 300, 512, u64::MAX), 512);
    assert_eq!(model.prefill_within(base, 0, 0, u64::MAX), 0);
}

#[test]
fn a_chunk_reads_every_position_up_to_each_of_its_tokens() {
    let load = StepLoad::default().plus_prefill(10, 3);
    assert_eq!((load.prefill_tokens, load.kv_positions), (3, 11 + 12 + 13));
    assert_eq!(load.plus_prefill(5, 0), load);
    assert_eq!(load.plus_decode(9).kv_positions, 36 + 10);
}
