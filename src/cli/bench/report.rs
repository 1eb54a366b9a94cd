//! A run's result: a table for people, JSON for programs.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, Table, presets};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::tally::{Slo, Tally};

/// What was run: enough to run it again.
#[derive(Clone, Debug, Serialize)]
pub struct Setup {
    /// The server's name and version.
    pub server: String,
    /// The model's name.
    pub model: String,
    /// Its address, or `in this process`.
    pub target: String,
    /// Closed loop: requests in progress.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// Open loop: requests a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Prompt lengths, as given.
    pub prompt: String,
    /// Output lengths, as given.
    pub output: String,
    /// Connections.
    pub connections: u32,
    /// Where all randomness comes from.
    pub seed: u64,
    /// Warm-up in seconds.
    pub warm_up_s: f64,
    /// Measured part in seconds.
    pub duration_s: f64,
}

/// Percentiles of a duration, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Times {
    /// How many were measured.
    pub count: u64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Half are at most this.
    pub p50: f64,
    /// 90 % are at most this.
    pub p90: f64,
    /// 95 %.
    pub p95: f64,
    /// 99 %.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Times {
    fn of(histogram: &Histogram<u64>) -> Times {
        let ms = |ns: u64| ns as f64 / 1e6;
        let at = |quantile| ms(histogram.value_at_quantile(quantile));
        let (mean, max) = (histogram.mean() / 1e6, ms(histogram.max()));
        let (p50, p90, p95, p99) = (at(0.5), at(0.9), at(0.95), at(0.99));
        Times { count: histogram.len(), mean, p50, p90, p95, p99, max }
    }
}

/// A run's result.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was run.
    pub setup: Setup,
    /// Requests that were meant to begin in the measured part.
    pub requests: u64,
    /// Of these, by end.
    pub completed: u64,
    /// Refused or evicted, by reason.
    pub rejected: BTreeMap<&'static str, u64>,
    /// Accepted and ended early, by reason.
    pub ended_early: BTreeMap<&'static str, u64>,
    /// Lost with their connection.
    pub broken: u64,
    /// Not ended when the generator gave up waiting.
    pub unfinished: u64,
    /// Output tokens a second in the measured part.
    pub output_tokens_per_s: f64,
    /// Prompt tokens a second in the measured part, counted at a request's first token.
    pub prompt_tokens_per_s: f64,
    /// Completed requests a second in the measured part.
    pub requests_per_s: f64,
    /// Time to the first token, from the intended beginning.
    pub ttft_ms: Times,
    /// Time between tokens.
    pub itl_ms: Times,
    /// From the intended beginning until a request was refused or evicted.
    pub refusal_ms: Times,
    /// Targets of a good request.
    pub slo: SloReport,
    /// From the intended beginning until a request was sent: the generator's own lateness.
    pub send_late_ms: Times,
    /// CPU time of the generator's thread in the whole run, as a share of one core.
    pub generator_cpu: Option<f64>,
}

/// Goodput: what met both targets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SloReport {
    /// Target: time to the first token.
    pub ttft_ms: f64,
    /// Target: a request's mean time between tokens.
    pub itl_ms: f64,
    /// Share of the requests that completed and met both.
    pub good_share: f64,
    /// Such requests a second.
    pub goodput_requests_per_s: f64,
    /// Their output tokens a second.
    pub goodput_tokens_per_s: f64,
}

impl Report {
    /// Adds up.
    pub fn new(setup: Setup, tally: &Tally, slo: Slo, generator_cpu: Option<f64>) -> Report {
        let seconds = tally.measured_s();
        let per_s = |count: u64| count as f64 / seconds;
        Report {
            setup,
            requests: tally.requests,
            completed: tally.completed,
            rejected: tally.rejected.clone(),
            ended_early: tally.early.clone(),
            broken: tally.broken,
            unfinished: tally.unfinished(),
            output_tokens_per_s: per_s(tally.output_tokens),
            prompt_tokens_per_s: per_s(tally.prompt_tokens),
            requests_per_s: per_s(tally.ends),
            ttft_ms: Times::of(&tally.ttft_ns),
            itl_ms: Times::of(&tally.itl_ns),
            refusal_ms: Times::of(&tally.refusal_ns),
            slo: SloReport {
                ttft_ms: slo.ttft_ns as f64 / 1e6,
                itl_ms: slo.itl_ns as f64 / 1e6,
                good_share: match tally.requests {
                    0 => 0.0,
                    requests => tally.good as f64 / requests as f64,
                },
                goodput_requests_per_s: per_s(tally.good),
                goodput_tokens_per_s: per_s(tally.good_tokens),
            },
            send_late_ms: Times::of(&tally.late_ns),
            generator_cpu,
        }
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}\n\n{}\n", self.heading(), self.times());
        let mut line = |name: &str, value: String| {
            text.push_str(&format!("\n{name:<16} {value}"));
        };
        line(
            "throughput",
            format!(
                "{:.1} output tokens/s, {:.1} prompt tokens/s, {:.2} requests/s",
                self.output_tokens_per_s, self.prompt_tokens_per_s, self.requests_per_s
            ),
        );
        let slo = &self.slo;
        line(
            "goodput",
            format!(
                "{:.2} requests/s, {:.1} tokens/s: {:.1} % of requests had their first token \
                 within {} ms and {} ms a token",
                slo.goodput_requests_per_s,
                slo.goodput_tokens_per_s,
                slo.good_share * 100.0,
                slo.ttft_ms,
                slo.itl_ms
            ),
        );
        line("requests", format!("{} begun, {} completed", self.requests, self.completed));
        let reasons = |counts: &BTreeMap<&'static str, u64>| {
            let parts: Vec<_> = counts.iter().map(|(why, n)| format!("{n} {why}")).collect();
            parts.join(", ")
        };
        if !self.rejected.is_empty() {
            line("refused", reasons(&self.rejected));
        }
        if !self.ended_early.is_empty() {
            line("ended early", reasons(&self.ended_early));
        }
        if self.broken > 0 {
            line("broken", format!("{} lost with their connection", self.broken));
        }
        if self.unfinished > 0 {
            line("unfinished", format!("{} when the generator gave up waiting", self.unfinished));
        }
        let cpu = self.generator_cpu.map(|share| format!("{:.1} % of a core", share * 100.0));
        line("generator", cpu.unwrap_or("CPU time not known".into()));
        text
    }

    fn heading(&self) -> String {
        let setup = &self.setup;
        let load = match (setup.concurrency, setup.rate) {
            (Some(concurrency), _) => format!("{concurrency} at a time"),
            (_, Some(rate)) => format!("{rate} requests/s"),
            _ => String::new(),
        };
        format!(
            "{} on {} ({}): {load}, prompt {}, output {}, {} connections, seed {}, {} s after {} s",
            setup.model,
            setup.server,
            setup.target,
            setup.prompt,
            setup.output,
            setup.connections,
            setup.seed,
            setup.duration_s,
            setup.warm_up_s,
        )
    }

    fn times(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["ms", "mean", "p50", "p90", "p95", "p99", "max"]);
        let all = [
            ("TTFT", &self.ttft_ms),
            ("ITL", &self.itl_ms),
            ("refusal", &self.refusal_ms),
            ("send lateness", &self.send_late_ms),
        ];
        for (name, times) in all.into_iter().filter(|(_, times)| times.count > 0) {
            let values = [times.mean, times.p50, times.p90, times.p95, times.p99, times.max];
            let cells = values.iter().map(|value| format!("{value:.2}"));
            table.add_row(std::iter::once(name.to_owned()).chain(cells));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::super::tally::{End, Progress};
    use super::*;

    fn report() -> Report {
        let slo = Slo { ttft_ns: 500_000_000, itl_ns: 50_000_000 };
        let mut tally = Tally::new(0..2_000_000_000, slo);
        let mut request = Progress::begin(0, 10);
        tally.sent(&request, 0);
        tally.tokens(&mut request, 1, 200_000_000);
        tally.tokens(&mut request, 1, 240_000_000);
        tally.end(&request, End::Complete, 240_000_000);
        let refused = Progress::begin(1, 10);
        tally.sent(&refused, 1);
        tally.end(&refused, End::Rejected("queue_full"), 2);
        let setup = Setup {
            server: "forebay 0".into(),
            model: "m".into(),
            target: "127.0.0.1:7070".into(),
            concurrency: Some(2),
            rate: None,
            prompt: "10".into(),
            output: "2".into(),
            connections: 1,
            seed: 0,
            warm_up_s: 0.0,
            duration_s: 2.0,
        };
        Report::new(setup, &tally, slo, Some(0.125))
    }

    #[test]
    fn figures_are_per_second_of_the_measured_part() {
        let report = report();
        assert_eq!((report.output_tokens_per_s, report.prompt_tokens_per_s), (1.0, 5.0));
        assert_eq!((report.requests_per_s, report.slo.good_share), (0.5, 0.5));
        assert!((report.ttft_ms.p50 - 200.0).abs() < 0.5);
        assert!((report.itl_ms.max - 40.0).abs() < 0.1);
    }

    #[test]
    fn people_see_percentiles_goodput_and_refusals() {
        let text = report().to_text();
        for part in ["TTFT", "ITL", "goodput", "1 queue_full", "12.5 % of a core", "p99"] {
            assert!(text.contains(part), "{part:?} is not in: {text}");
        }
    }

    #[test]
    fn programs_read_the_same_figures_as_json() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["setup"]["concurrency"], 2);
        assert_eq!(json["rejected"]["queue_full"], 1);
        assert_eq!(json["output_tokens_per_s"], 1.0);
        assert!(json["setup"].get("rate").is_none());
    }

    #[test]
    fn an_empty_run_has_figures_too() {
        let slo = Slo { ttft_ns: 1, itl_ns: 1 };
        let setup = report().setup;
        let report = Report::new(setup, &Tally::new(0..1_000, slo), slo, None);
        assert_eq!((report.slo.good_share, report.ttft_ms.p99), (0.0, 0.0));
        assert!(report.to_text().contains("0 begun"));
        serde_json::to_string(&report).unwrap();
    }
}
