//! Where demos are played: a server in this process for each side, and load over loopback.

use std::thread;
use std::time::Duration;

use super::super::bench::{Arrivals, DriveError, Lengths, Outcome, Plan, Slo, drive};
use super::super::target::Target;
use super::super::{Failure, args::Settings};
use crate::request::{Class, Name};

/// Targets of a good request: the first token within a second, then five tokens a second at least.
const SLO: Slo = Slo { ttft_ns: 1_000_000_000, itl_ns: 200_000_000 };

/// What a group of clients asks for.
#[derive(Clone, Copy)]
pub(super) struct Load {
    pub arrivals: Arrivals,
    pub prompt: Lengths,
    pub output: Lengths,
    pub tenant: &'static str,
    pub class: Class,
    /// Not measured.
    pub warm_up_s: f64,
    /// Measured.
    pub seconds: f64,
}

impl Default for Load {
    fn default() -> Load {
        Load {
            arrivals: Arrivals::Closed(2),
            prompt: Lengths::Uniform(60, 140),
            output: Lengths::Uniform(32, 96),
            tenant: "",
            class: Class::Default,
            warm_up_s: 3.0,
            seconds: 8.0,
        }
    }
}

/// What a group of clients saw.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// Requests that met both targets, a second.
    pub goodput: f64,
    pub tokens_per_s: f64,
    /// Complete answers a second.
    pub answers_per_s: f64,
    /// Of those that had a first token; as long as the measured part when there was none.
    pub ttft_p50_ms: f64,
    pub ttft_p99_ms: f64,
    pub itl_p99_ms: f64,
    pub refused_percent: f64,
}

impl Seen {
    fn new(load: &Load, outcome: &Outcome) -> Seen {
        let tally = &outcome.tally;
        let per_s = |count: u64| count as f64 / tally.measured_s();
        let ttft_ms = |quantile: f64| match tally.ttft_ns.len() {
            0 => load.seconds * 1e3,
            _ => tally.ttft_ns.value_at_quantile(quantile) as f64 / 1e6,
        };
        let refused: u64 = tally.rejected.values().sum();
        Seen {
            goodput: per_s(tally.good),
            tokens_per_s: per_s(tally.output_tokens),
            answers_per_s: per_s(tally.ends),
            ttft_p50_ms: ttft_ms(0.5),
            ttft_p99_ms: ttft_ms(0.99),
            itl_p99_ms: tally.itl_ns.value_at_quantile(0.99) as f64 / 1e6,
            refused_percent: 100.0 * refused as f64 / tally.requests.max(1) as f64,
        }
    }
}

/// Settings that every server of a demo has.
pub(super) struct Stage {
    settings: Settings,
}

/// Groups come and go together; what is unfinished then has this long.
const GRACE: Duration = Duration::from_millis(500);

impl Stage {
    pub fn new(settings: &Settings) -> Stage {
        Stage { settings: settings.clone() }
    }

    /// Serves these groups at once, under these settings.
    pub fn play<const N: usize>(
        &self,
        sets: &[&str],
        loads: [Load; N],
    ) -> Result<[Seen; N], Failure> {
        let mut settings = self.settings.clone();
        let sets = ["limits.streams_per_connection_max=1024"].iter().chain(sets);
        settings.set.extend(sets.map(|set| (*set).to_owned()));
        let target = Target::find(None, &settings)?;
        let address = target.address;
        let outcomes = thread::scope(|scope| {
            let drives =
                loads.map(|load| scope.spawn(move || drive(&load.plan(address), &mut |_, _| {})));
            drives.map(|drive| drive.join().expect("the generator does not panic"))
        });
        target.end()?;
        let mut seen = [Seen::default(); N];
        for ((seen, outcome), load) in seen.iter_mut().zip(outcomes).zip(&loads) {
            let failed = |error: DriveError| Failure::Runtime(error.to_string());
            *seen = Seen::new(load, &outcome.map_err(failed)?);
        }
        Ok(seen)
    }

    /// Answers a second that this machine gives: what loads are multiples of.
    pub fn capacity(&self) -> Result<f64, Failure> {
        let load = Load { arrivals: Arrivals::Closed(16), seconds: 4.0, ..Load::default() };
        let [seen] = self.play(&[], [load])?;
        Ok(seen.answers_per_s.max(0.5))
    }
}

impl Load {
    fn plan(&self, target: std::net::SocketAddr) -> Plan {
        Plan {
            target,
            connections: 4,
            arrivals: self.arrivals,
            prompt: self.prompt,
            output: self.output,
            tenant: Name::new(self.tenant).expect("a constant name"),
            class: self.class,
            seed: 1,
            warm_up: Duration::from_secs_f64(self.warm_up_s),
            duration: Duration::from_secs_f64(self.seconds),
            grace: GRACE,
            slo: SLO,
        }
    }
}
