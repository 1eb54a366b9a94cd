//! What the near future is likely to cost, learnt from the recent past: arrival rate λ, service
//! rate μ, jobs in the system L, and how long a step will take.
//!
//! This is the one place where floating point may meet a decision, so it keeps to rules: only
//! addition, subtraction, multiplication, division and square root (which IEEE 754 defines to the
//! last bit, so that a run can be repeated anywhere),
//! values that are not finite are thrown away, and what is handed out are integers.

use crate::base::Instant;

/// How often things happen, averaged over a horizon: recent ones weigh most.
///
/// Events are gathered and folded in every sixteenth of the horizon. While less than a horizon has
/// passed since the first event, the estimate is the plain average: it has no start-up bias.
#[derive(Clone, Debug)]
pub struct RateEstimator {
    horizon_ns: u64,
    /// When counting began; `None` before the first event.
    start: Option<Instant>,
    /// Up to when `per_ns` holds.
    folded: Instant,
    /// Events since `folded`.
    pending: u64,
    /// Events per nanosecond, finite and not negative.
    per_ns: f64,
}

impl RateEstimator {
    /// An estimator that forgets over this time.
    pub fn new(horizon_ns: u64) -> RateEstimator {
        RateEstimator {
            horizon_ns: horizon_ns.max(16),
            start: None,
            folded: Instant::ZERO,
            pending: 0,
            per_ns: 0.0,
        }
    }

    /// `n` events happened now.
    pub fn record(&mut self, n: u64, now: Instant) {
        if self.start.is_none() {
            self.start = Some(now);
            self.folded = now;
        }
        if now.ns_since(self.folded) >= self.horizon_ns / 16 {
            self.per_ns = self.per_ns_at(now);
            self.folded = now;
            self.pending = 0;
        }
        self.pending = self.pending.saturating_add(n);
    }

    /// Events per thousand seconds, as of now: a rate of 1.5 a second is 1,500. Falls while
    /// nothing happens.
    pub fn per_1000_seconds(&self, now: Instant) -> u64 {
        to_integer(self.per_ns_at(now) * 1e12)
    }

    fn per_ns_at(&self, now: Instant) -> f64 {
        let Some(start) = self.start else { return 0.0 };
        let elapsed = now.ns_since(self.folded) as f64;
        if elapsed < 1.0 {
            return self.per_ns;
        }
        let age = now.ns_since(start) as f64;
        // elapsed / (elapsed + horizon) is the exponential's first-order form: no exp() needed,
        // and stable for any elapsed time. At first elapsed / age, which makes a plain average.
        let weight = elapsed / age.min(elapsed + self.horizon_ns as f64);
        self.per_ns + weight * (self.pending as f64 / elapsed - self.per_ns)
    }
}

/// The state of the control model: λ, μ, L.
#[derive(Clone, Debug)]
pub struct LoadEstimator {
    /// λ: by the clock.
    arrivals: RateEstimator,
    /// λ effective: likewise.
    admitted: RateEstimator,
    /// μ: by a clock that runs only while there is work. An idle server is not a slow one.
    service: RateEstimator,
    busy: Instant,
    /// Mean time in the system of jobs that left it, in nanoseconds.
    sojourn_ns: Mean,
}

/// λ, μ and L at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// λ: jobs that come, per thousand seconds.
    pub arrivals_per_1000_seconds: u64,
    /// λ effective: jobs let in, per thousand seconds.
    pub effective_per_1000_seconds: u64,
    /// μ: jobs served per thousand seconds of work; what comes in beyond this queues.
    pub service_per_1000_seconds: u64,
    /// L = λ·W (Little): jobs in the system, in thousandths.
    pub jobs_milli: u64,
    /// λ/μ in thousandths: above 1,000 the queue grows without bound. 0 while μ is unknown.
    pub utilisation_permille: u64,
}

impl LoadEstimator {
    /// An estimator that forgets over this time.
    pub fn new(horizon_ns: u64) -> LoadEstimator {
        LoadEstimator {
            arrivals: RateEstimator::new(horizon_ns),
            admitted: RateEstimator::new(horizon_ns),
            service: RateEstimator::new(horizon_ns),
            busy: Instant::ZERO,
            sojourn_ns: Mean::default(),
        }
    }

    /// So many jobs came.
    pub fn arrived(&mut self, jobs: u64, now: Instant) {
        self.arrivals.record(jobs, now);
    }

    /// So many of them were let in.
    pub fn admitted(&mut self, jobs: u64, now: Instant) {
        self.admitted.record(jobs, now);
    }

    /// The server worked for `busy_ns` and finished `completed` jobs at the end of it (0 is fine).
    pub fn served(&mut self, completed: u64, busy_ns: u64) {
        if self.service.start.is_none() {
            // Work that ends with the first completion counts towards it.
            self.service.record(0, self.busy);
        }
        self.busy = self.busy.plus_ns(busy_ns);
        self.service.record(completed, self.busy);
    }

    /// A job left this long after it came.
    pub fn left(&mut self, sojourn_ns: u64) {
        self.sojourn_ns.observe(sojourn_ns);
    }

    /// So many jobs were turned away as they came.
    pub fn turned_away(&mut self, jobs: u64) {
        // More of them than the mean remembers change nothing any more.
        for _ in 0..jobs.min(4 * u64::from(Mean::SPAN)) {
            self.left(0);
        }
    }

    /// λ, μ and L as of now.
    pub fn load(&self, now: Instant) -> Load {
        let arrivals = self.arrivals.per_ns_at(now);
        let service = self.service.per_ns_at(self.busy);
        let utilisation = if service > 0.0 { arrivals / service } else { 0.0 };
        Load {
            arrivals_per_1000_seconds: to_integer(arrivals * 1e12),
            effective_per_1000_seconds: self.admitted.per_1000_seconds(now),
            service_per_1000_seconds: to_integer(service * 1e12),
            jobs_milli: to_integer(arrivals * self.sojourn_ns.value * 1e3),
            utilisation_permille: to_integer(utilisation * 1e3),
        }
    }

    /// How long the server will take over `jobs` jobs; `None` while μ is unknown.
    pub fn drain_ns(&self, jobs: u64) -> Option<u64> {
        let service = self.service.per_ns_at(self.busy);
        (service > 0.0).then(|| to_integer(jobs as f64 / service))
    }
}

/// The mean of the last few dozen values, more or less.
#[derive(Clone, Debug, Default)]
struct Mean {
    value: f64,
    /// Range: 0 ..= [`Mean::SPAN`].
    seen: u32,
}

impl Mean {
    const SPAN: u32 = 64;

    fn observe(&mut self, value: u64) {
        self.seen = (self.seen + 1).min(Mean::SPAN);
        self.value += (value as f64 - self.value) / f64::from(self.seen);
    }
}

/// What a step has to do, as far as it decides how long it takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepLoad {
    /// Tokens of all prefill chunks.
    pub prefill_tokens: u32,
    /// Rows that decode one token.
    pub decode_rows: u32,
    /// KV positions read: each token of each row reads all positions up to its own.
    pub kv_positions: u64,
}

impl StepLoad {
    /// This load and a prefill chunk of `tokens` tokens from `position` on.
    pub const fn plus_prefill(self, position: u32, tokens: u32) -> StepLoad {
        let (first, count) = (position as u64 + 1, tokens as u64);
        StepLoad {
            prefill_tokens: self.prefill_tokens + tokens,
            kv_positions: self.kv_positions + count * first + count * count.saturating_sub(1) / 2,
            ..self
        }
    }

    /// This load and a decode row at `position`.
    pub const fn plus_decode(self, position: u32) -> StepLoad {
        StepLoad {
            decode_rows: self.decode_rows + 1,
            kv_positions: self.kv_positions + position as u64 + 1,
            ..self
        }
    }

    fn features(self) -> [f64; FEATURES] {
        [
            1.0,
            f64::from(self.prefill_tokens) / SCALES[1],
            f64::from(self.decode_rows) / SCALES[2],
            self.kv_positions as f64 / SCALES[3],
        ]
    }
}

/// What things cost, in picoseconds (a KV position on a GPU costs less than a nanosecond).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepCost {
    /// A step by itself: reading the weights, launching.
    pub step_ps: u64,
    /// Each token of prefill.
    pub prefill_token_ps: u64,
    /// Each decode row.
    pub decode_row_ps: u64,
    /// Each KV position read.
    pub kv_position_ps: u64,
}

const FEATURES: usize = 4;
/// Typical sizes of the features, which bring them near 1: a badly scaled fit loses digits.
const SCALES: [f64; FEATURES] = [1.0, 64.0, 8.0, 8192.0];
/// Variance of a coefficient of which nothing is known, relative to that of a step's noise: large,
/// so that a few steps outweigh the prior. No coefficient's variance exceeds it.
const VARIANCE_MAX: f64 = 100.0;
/// By how much a coefficient's variance grows from step to step, since machines and models do not
/// stand still: the square of the weight that a new step gets in the long run, 1 in 22.
const DRIFT: f64 = 0.002;
/// A step that is off by more than this many times the usual error counts only as if it were off
/// by that much: the kernel ran something else on our CPU, and that is not the model's fault.
const OUTLIER: f64 = 4.0;

/// How long a step takes: `step + prefill·b + decode·c + kv·d`, fitted to the steps seen by
/// recursive least squares (a Kalman filter whose coefficients drift). No coefficient is ever
/// negative: more work never makes a step shorter, so a step budget can be searched for.
#[derive(Clone, Debug)]
pub struct StepTimeModel {
    /// Coefficients of the scaled features, in nanoseconds. Finite, not negative.
    weights: [f64; FEATURES],
    /// Covariance of the weights, relative to the noise's variance. Symmetric, finite, diagonal
    /// within 0 ..= [`VARIANCE_MAX`].
    covariance: [[f64; FEATURES]; FEATURES],
    /// Usual size of the error, in nanoseconds. At least 1.
    error: f64,
    observed: u64,
    prior: StepCost,
}

impl StepTimeModel {
    /// A model that believes the prior until it has seen steps.
    pub fn new(prior: StepCost) -> StepTimeModel {
        let weights = [
            prior.step_ps as f64 / 1e3 * SCALES[0],
            prior.prefill_token_ps as f64 / 1e3 * SCALES[1],
            prior.decode_row_ps as f64 / 1e3 * SCALES[2],
            prior.kv_position_ps as f64 / 1e3 * SCALES[3],
        ];
        let mut covariance = [[0.0; FEATURES]; FEATURES];
        for (i, row) in covariance.iter_mut().enumerate() {
            row[i] = VARIANCE_MAX;
        }
        let error = weights.iter().sum::<f64>().max(1.0);
        StepTimeModel { weights, covariance, error, observed: 0, prior }
    }

    /// A step of this load took this long.
    pub fn observe(&mut self, load: StepLoad, elapsed_ns: u64) {
        let x = load.features();
        let error = elapsed_ns as f64 - dot(&self.weights, &x);
        if !error.is_finite() {
            return self.start_over();
        }
        // An outlier is taken for a step with more noise, by as much as it is further off.
        let noise = (error.abs() / (OUTLIER * self.error)).max(1.0);
        // The usual error follows what counted of the error, and some: so a change that lasts is
        // believed after a few steps, while a single outlier moves next to nothing.
        self.error = (self.error + (error.abs() / noise * 1.25 - self.error) / 16.0).max(1.0);

        let px = self.covariance.map(|row| dot(&row, &x));
        let total = noise + dot(&px, &x);
        for (weight, p) in self.weights.iter_mut().zip(px) {
            *weight += p / total * error;
        }
        for i in 0..FEATURES {
            for j in 0..FEATURES {
                self.covariance[i][j] -= px[i] * px[j] / total;
            }
            self.covariance[i][i] += DRIFT;
        }
        self.bound_weights();
        self.bound_variances();
        self.observed += 1;
        if !self.is_finite() {
            self.start_over();
        }
    }

    /// No cost is negative. One that came out so is taken to be *known* to be 0 (the others move
    /// as they are correlated with it): cutting it off alone would leave them fitted to a number
    /// that is gone, and the next steps would drive them away. How little is really known about it
    /// stays, so that it can grow again.
    fn bound_weights(&mut self) {
        // Each pass settles one weight; a settled one has no correlation left to be moved by.
        for _ in 0..FEATURES {
            // Not max(): that would turn a NaN into a 0 that looks like knowledge.
            let Some(i) = (0..FEATURES).find(|&i| self.weights[i] < 0.0) else { return };
            let (variance, weight) = (self.covariance[i][i], self.weights[i]);
            let row = self.covariance[i];
            for j in 0..FEATURES {
                self.weights[j] -= row[j] / variance * weight;
                for k in 0..FEATURES {
                    self.covariance[j][k] -= row[j] * row[k] / variance;
                }
            }
            self.weights[i] = 0.0;
            for j in 0..FEATURES {
                (self.covariance[i][j], self.covariance[j][i]) = (0.0, 0.0);
            }
            self.covariance[i][i] = variance;
        }
    }

    /// Steps that are all alike tell nothing about the directions in which they do not vary:
    /// there the drift adds up, and is cut off here. Scaling a row and its column by the same
    /// factor leaves the matrix a covariance.
    fn bound_variances(&mut self) {
        for i in 0..FEATURES {
            let variance = self.covariance[i][i];
            if variance > VARIANCE_MAX {
                let factor = (VARIANCE_MAX / variance).sqrt();
                for j in 0..FEATURES {
                    self.covariance[i][j] *= factor;
                    self.covariance[j][i] *= factor;
                }
            }
        }
    }

    /// Rounding cannot be excluded from making nonsense after billions of steps. Then the model
    /// keeps no part of it.
    fn start_over(&mut self) {
        *self = StepTimeModel::new(self.prior);
    }

    fn is_finite(&self) -> bool {
        let matrix = self.covariance.iter().flatten();
        self.weights.iter().chain(matrix).all(|value| value.is_finite())
            && (0..FEATURES).all(|i| self.covariance[i][i] >= 0.0)
            && self.error.is_finite()
    }

    /// How long a step of this load will take.
    pub fn predict_ns(&self, load: StepLoad) -> u64 {
        to_integer(dot(&self.weights, &load.features()))
    }

    /// The longest prefill chunk from `position` on, up to `tokens_max`, that can join `load`
    /// without the step taking longer than `budget_ns`. 0 when not even one token can.
    pub fn prefill_within(
        &self,
        load: StepLoad,
        position: u32,
        tokens_max: u32,
        budget_ns: u64,
    ) -> u32 {
        // Predictions never fall with the length, so the longest that fits can be bisected for:
        // `fits` does (0 stands for "no chunk"), `fits + span` and beyond does not.
        let (mut fits, mut span) = (0, tokens_max);
        while span > 0 {
            let tried = fits + span.div_ceil(2);
            if self.predict_ns(load.plus_prefill(position, tried)) <= budget_ns {
                span -= tried - fits;
                fits = tried;
            } else {
                span = tried - fits - 1;
            }
        }
        fits
    }

    /// What things cost, as believed now.
    pub fn cost(&self) -> StepCost {
        let ps = |i: usize| to_integer(self.weights[i] / SCALES[i] * 1e3);
        StepCost {
            step_ps: ps(0),
            prefill_token_ps: ps(1),
            decode_row_ps: ps(2),
            kv_position_ps: ps(3),
        }
    }

    /// How many steps were observed since the model last believed only its prior.
    pub fn observed(&self) -> u64 {
        self.observed
    }
}

fn dot(a: &[f64; FEATURES], b: &[f64; FEATURES]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// To the nearest integer. Negative values and NaN become 0; what is too large, the largest.
fn to_integer(value: f64) -> u64 {
    // `as` saturates and maps NaN to 0.
    (value + 0.5) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIOR: StepCost = StepCost {
        step_ps: 30_000_000_000,
        prefill_token_ps: 20_000_000,
        decode_row_ps: 20_000_000,
        kv_position_ps: 50_000,
    };

    #[test]
    fn a_model_that_is_not_finite_starts_over_from_its_prior() {
        let load = StepLoad::default().plus_decode(100);
        let mut model = StepTimeModel::new(PRIOR);
        for spoil in [f64::NAN, f64::INFINITY] {
            model.weights[2] = spoil;
            model.observe(load, 1);
            assert_eq!((model.observed(), model.cost()), (0, PRIOR));
            model.observe(load, 1);
            model.covariance[1][2] = spoil;
            model.observe(load, 1);
            assert_eq!((model.observed(), model.cost()), (0, PRIOR));
        }
    }

    #[test]
    fn what_is_not_a_number_becomes_zero_and_what_is_too_large_the_largest() {
        assert_eq!((to_integer(f64::NAN), to_integer(-5.0), to_integer(2.5)), (0, 0, 3));
        assert_eq!(to_integer(f64::INFINITY), u64::MAX);
    }
}
