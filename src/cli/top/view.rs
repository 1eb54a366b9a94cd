//! From two looks at a server's numbers to what is worth showing.

use std::collections::BTreeMap;
use std::time::Instant;

/// The numbers at one moment.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub at: Instant,
    pub model: String,
    pub server: String,
    numbers: BTreeMap<String, u64>,
}

impl Sample {
    pub fn new(at: Instant, numbers: Vec<(String, u64)>, model: &str, server: &str) -> Sample {
        let numbers = numbers.into_iter().collect();
        Sample { at, model: model.to_owned(), server: server.to_owned(), numbers }
    }

    /// 0 for one that this server does not have.
    fn get(&self, name: &str) -> u64 {
        self.numbers.get(name).copied().unwrap_or(0)
    }

    /// The numbers whose name begins so, with the name's rest.
    fn family<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, u64)> {
        let names = self.numbers.range(prefix.to_owned()..);
        names.map_while(move |(name, &value)| Some((name.strip_prefix(prefix)?, value)))
    }

    /// Whether it was restarted since `before`.
    pub fn is_of_another_server(&self, before: &Sample) -> bool {
        ["engine_asks", "engine_steps", "front_connections_accepted"]
            .iter()
            .any(|name| self.get(name) < before.get(name))
    }
}

/// Percentiles of what happened in the window, in milliseconds; `None` when nothing did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Times {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

/// What is shown. Rates are per second, over the time between the two samples.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct View {
    pub model: String,
    pub server: String,
    pub window_s: f64,
    pub links: Vec<Link>,
    pub arrivals_per_second: f64,
    /// By counting, not by the server's own estimate.
    pub arrivals_seen_per_second: f64,
    pub effective_per_second: f64,
    pub service_per_second: f64,
    pub utilisation: f64,
    pub jobs: f64,
    pub jobs_now: u64,
    pub tokens_in_per_second: f64,
    pub tokens_out_per_second: f64,
    pub recomputed_per_second: f64,
    pub preemptions_per_second: f64,
    pub refusals_per_second: f64,
    /// The reasons of the window, most frequent first.
    pub refusals: Vec<(String, f64)>,
    pub ttft: Option<Times>,
    pub itl: Option<Times>,
    pub queue: Option<Times>,
    /// Mean error of what was foreseen, over what came, in hundredths.
    pub ttft_error_percent: Option<f64>,
    pub step_error_percent: Option<f64>,
}

/// One stage of the pipeline: how full it is, and what is in it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Link {
    pub name: &'static str,
    /// 1,000 is the set point.
    pub pressure_permille: u64,
    pub detail: String,
}

impl View {
    /// What happened from `first` to `last`; the same sample twice shows no rates.
    pub fn new(first: &Sample, last: &Sample) -> View {
        let window_s = last.at.duration_since(first.at).as_secs_f64();
        let change = |name: &str| last.get(name).saturating_sub(first.get(name));
        let rate = |name: &str| per_second(change(name), window_s);
        let milli = |name: &str| last.get(name) as f64 / 1e3;
        let now = ["granted", "running", "waiting", "parked"];
        let queued = last.family("engine_queued_").filter(|(class, _)| is_class(class));
        let jobs_now = now.iter().map(|name| last.get(&format!("engine_{name}"))).sum::<u64>()
            + queued.map(|(_, count)| count).sum::<u64>();
        let error = |what: &str| {
            let actual = change(&format!("engine_{what}_foreseen_actual_ns"));
            let error = change(&format!("engine_{what}_foreseen_error_ns"));
            (actual > 0).then(|| error as f64 / actual as f64 * 100.0)
        };
        View {
            model: last.model.clone(),
            server: last.server.clone(),
            window_s,
            links: links(first, last, window_s),
            arrivals_per_second: milli("engine_arrivals_per_1000_seconds"),
            arrivals_seen_per_second: rate("engine_asks"),
            effective_per_second: milli("engine_effective_per_1000_seconds"),
            service_per_second: milli("engine_service_per_1000_seconds"),
            utilisation: milli("engine_utilisation_permille"),
            jobs: milli("engine_jobs_milli"),
            jobs_now,
            tokens_in_per_second: rate("engine_tokens_in"),
            tokens_out_per_second: rate("engine_tokens_out"),
            recomputed_per_second: rate("engine_recomputed_tokens"),
            preemptions_per_second: rate("engine_preemptions"),
            refusals_per_second: rate("engine_rejected"),
            refusals: refusals(first, last, window_s),
            ttft: times(first, last, "engine_ttft"),
            itl: times(first, last, "engine_itl"),
            queue: times(first, last, "engine_queue"),
            ttft_error_percent: error("ttft"),
            step_error_percent: error("step"),
        }
    }
}

fn per_second(count: u64, window_s: f64) -> f64 {
    if window_s > 0.0 { count as f64 / window_s } else { 0.0 }
}

fn is_class(name: &str) -> bool {
    crate::request::Class::ALL.iter().any(|class| class.name() == name)
}

/// The pipeline's stages, in the order in which a request meets them.
fn links(first: &Sample, last: &Sample, window_s: f64) -> Vec<Link> {
    let get = |name: &str| last.get(name);
    let change = |name: &str| last.get(name).saturating_sub(first.get(name));
    let rate = |name: &str| per_second(change(name), window_s);
    let saturation = |resource: &str| get(&format!("engine_saturation_{resource}_permille"));
    let window_ns = window_s * 1e9;
    let share = |ns: u64| if window_ns > 0.0 { ns as f64 / window_ns } else { 0.0 };
    let busy = share(change("engine_device_ns"));
    let classes = crate::request::Class::ALL.map(|class| {
        let count = get(&format!("engine_queued_{}", class.name()));
        format!("{} {count}", class.name())
    });
    let (free, total) = (get("engine_kv_blocks_free"), get("engine_kv_blocks_total"));
    let steps = change("engine_steps_completed");
    let rows = change("engine_rows") as f64 / steps.max(1) as f64;
    let link = |name, pressure_permille, detail| Link { name, pressure_permille, detail };
    vec![
        link(
            "front",
            get("front_saturation_permille"),
            format!(
                "{} connections, {} streams, {} bytes of bodies",
                get("front_connections_open"),
                get("front_streams_open"),
                get("front_ingest_bytes"),
            ),
        ),
        link(
            "queue",
            saturation("queue"),
            format!("{}; {} tokens", classes.join(", "), get("engine_queued_tokens")),
        ),
        link(
            "prefill",
            saturation("prefill"),
            format!("a newcomer waits {:.0} ms", get("engine_wait_foreseen_ns") as f64 / 1e6),
        ),
        link(
            "batch",
            saturation("slots"),
            format!("running {}, waiting {}", get("engine_running"), get("engine_waiting")),
        ),
        link("KV", saturation("kv"), format!("{} of {total} blocks", total.saturating_sub(free))),
        link(
            "device",
            (busy * 1e3) as u64,
            format!(
                "{:.1} steps/s of {rows:.1} rows, gaps {:.1} %",
                per_second(steps, window_s),
                share(change("engine_device_gap_ns")) * 100.0,
            ),
        ),
        link(
            "egress",
            saturation("egress"),
            format!(
                "parked {}, {:.1} parks/s, {:.1} resumes/s",
                get("engine_parked"),
                rate("engine_parks"),
                rate("engine_resumes"),
            ),
        ),
    ]
}

fn refusals(first: &Sample, last: &Sample, window_s: f64) -> Vec<(String, f64)> {
    let prefix = "engine_rejected_";
    let rates = last.family(prefix).map(|(reason, count)| {
        let before = first.get(&format!("{prefix}{reason}"));
        (reason.to_owned(), per_second(count.saturating_sub(before), window_s))
    });
    let mut rates: Vec<_> = rates.filter(|(_, rate)| *rate > 0.0).collect();
    rates.sort_by(|a, b| b.1.total_cmp(&a.1));
    rates
}

/// Percentiles by the histogram's buckets: evenly spread within each.
fn times(first: &Sample, last: &Sample, family: &str) -> Option<Times> {
    let change = |name: &str| last.get(name).saturating_sub(first.get(name));
    let count = change(&format!("{family}_count"));
    let prefix = format!("{family}_le_");
    let bounds = last.family(&prefix).filter_map(|(rest, _)| {
        let ms: u64 = rest.strip_suffix("_ms")?.parse().ok()?;
        Some((ms, change(&format!("{prefix}{rest}"))))
    });
    let mut bounds: Vec<(u64, u64)> = bounds.collect();
    bounds.sort_unstable();
    let at = |share: f64| {
        let wanted = count as f64 * share;
        let (mut from_ms, mut below) = (0, 0);
        for &(ms, up_to) in &bounds {
            if up_to as f64 >= wanted {
                let inside = up_to.saturating_sub(below).max(1) as f64;
                let part = (wanted - below as f64) / inside;
                return from_ms as f64 + (ms - from_ms) as f64 * part;
            }
            (from_ms, below) = (ms, up_to);
        }
        // Beyond the last bound: at least that.
        from_ms as f64
    };
    (count > 0).then(|| Times { p50: at(0.5), p90: at(0.9), p99: at(0.99) })
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;

    /// Two looks at a busy server, two seconds apart.
    pub fn busy() -> View {
        let start = Instant::now();
        let sample = |at, numbers: &[(&str, u64)]| {
            let numbers = numbers.iter().map(|&(name, value)| (name.to_owned(), value));
            Sample::new(at, numbers.collect(), "a-model", "forebay/1")
        };
        let first = sample(start, &[("engine_asks", 10), ("engine_rejected_queue_full", 3)]);
        let last = sample(
            start + Duration::from_secs(2),
            &[
                ("engine_asks", 30),
                ("engine_rejected", 4),
                ("engine_rejected_queue_full", 7),
                ("engine_rejected_invalid", 0),
                ("engine_queued_default", 3),
                ("engine_queued_tokens", 400),
                ("engine_running", 2),
                ("engine_saturation_slots_permille", 2500),
                ("engine_saturation_kv_permille", 250),
                ("engine_kv_blocks_free", 6),
                ("engine_kv_blocks_total", 8),
                ("engine_device_ns", 1_000_000_000),
                ("engine_steps_completed", 10),
                ("engine_rows", 15),
                ("engine_tokens_out", 84),
                ("engine_ttft_le_10_ms", 0),
                ("engine_ttft_le_50_ms", 5),
                ("engine_ttft_le_100_ms", 10),
                ("engine_ttft_count", 10),
                ("engine_arrivals_per_1000_seconds", 2500),
                ("engine_utilisation_permille", 1250),
                ("engine_ttft_foreseen_actual_ns", 200),
                ("engine_ttft_foreseen_error_ns", 50),
            ],
        );
        View::new(&first, &last)
    }

    #[test]
    fn rates_are_of_the_window_and_percentiles_of_its_buckets() {
        let view = busy();
        assert_eq!((view.arrivals_seen_per_second, view.tokens_out_per_second), (10.0, 42.0));
        assert_eq!((view.arrivals_per_second, view.utilisation), (2.5, 1.25));
        assert_eq!(view.refusals, [("queue_full".to_owned(), 2.0)]);
        assert_eq!(view.ttft, Some(Times { p50: 50.0, p90: 90.0, p99: 99.0 }));
        assert_eq!((view.itl, view.ttft_error_percent), (None, Some(25.0)));
        assert_eq!(view.jobs_now, 5, "three queued, two running; tokens are no requests");
        let pressure =
            |name| view.links.iter().find(|link| link.name == name).unwrap().pressure_permille;
        assert_eq!((pressure("batch"), pressure("device"), pressure("KV")), (2500, 500, 250));
    }

    #[test]
    fn one_look_alone_has_no_rates() {
        let sample = Sample::new(Instant::now(), vec![("engine_asks".into(), 5)], "m", "s");
        let view = View::new(&sample, &sample);
        assert_eq!((view.arrivals_seen_per_second, view.ttft), (0.0, None));
    }
}
