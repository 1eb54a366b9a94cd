//! The metrics page: Prometheus text (version 0.0.4) of what the boards show.
//!
//! Our own names follow from the boards' by rule: `forebay_` before, base units behind (`_ns`
//! becomes `_seconds`, `_permille` and `_milli` plain numbers, `_per_1000_seconds`
//! `_per_second`), `_total` behind counters, reasons and classes as labels. Beside them stand the
//! names of vLLM's metrics, so that dashboards, autoscalers and gateways made for it find what
//! they know.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::base::Board;
use crate::base::board::{Kind, Number, Part};

pub(super) const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

/// What the page is made from.
#[derive(Clone, Debug)]
pub struct Page {
    /// The model's name: a label of everything, as vLLM has it.
    pub model: String,
    /// Positions in a KV block.
    pub block_positions: usize,
    /// What the cores show.
    pub boards: Vec<Arc<Board>>,
}

impl Page {
    /// The page as of now.
    pub fn text(&self) -> String {
        let labels = [("model_name".into(), self.model.clone().into())];
        let mut registry = Registry::with_labels(labels.into_iter());
        registry.register_collector(Box::new(self.clone()));
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = prometheus_text::encode(&mut text, &registry);
        text
    }
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let boards = self.boards.iter().flat_map(|board| board.read());
        let shown = Shown(boards.collect());
        for family in shown.0.chunk_by(|(a, _), (b, _)| belong(a, b)) {
            if !shown.has_parts(family[0].0) {
                put_family(&mut encoder, family)?;
            }
        }
        put_vllm(&mut encoder, &shown, self.block_positions)
    }
}

fn family(number: &Number) -> &'static str {
    match number.kind {
        Kind::Gauge | Kind::Counter => number.name,
        Kind::GaugeOf(label) | Kind::CounterOf(label) => label.family,
        Kind::Histogram { family, .. } => family,
    }
}

fn is_plain(number: &Number) -> bool {
    matches!(number.kind, Kind::Gauge | Kind::Counter)
}

fn belong(a: &Number, b: &Number) -> bool {
    family(a) == family(b) && is_plain(a) == is_plain(b)
}

/// All numbers, as the boards had them.
struct Shown(Vec<(Number, u64)>);

impl Shown {
    /// Whether it is the sum of others that are shown one by one.
    fn has_parts(&self, sum: Number) -> bool {
        is_plain(&sum)
            && self.0.iter().any(|(number, _)| number != &sum && family(number) == sum.name)
    }

    /// 0 for one that is not there: the page of a server without an engine is all zeros.
    fn value(&self, name: &str) -> u64 {
        self.0.iter().find(|(number, _)| number.name == name).map_or(0, |&(_, value)| value)
    }

    fn sum(&self, names: &[&str]) -> u64 {
        names.iter().map(|name| self.value(name)).sum()
    }

    fn family(&self, name: &str) -> Vec<(Number, u64)> {
        let shown = self.0.iter().copied();
        shown.filter(|(number, _)| number.name != name && family(number) == name).collect()
    }
}

/// A number's name outside, and what its value is divided by for that.
fn outside(name: &str) -> (String, f64) {
    let rules = [
        ("_ns", "_seconds", 1e9),
        ("_permille", "", 1e3),
        ("_milli", "", 1e3),
        ("_per_1000_seconds", "_per_second", 1e3),
    ];
    for (inside, outside, divisor) in rules {
        if let Some(stem) = name.strip_suffix(inside) {
            return (format!("forebay_{stem}{outside}"), divisor);
        }
    }
    (format!("forebay_{name}"), 1.0)
}

fn put_family(encoder: &mut DescriptorEncoder, members: &[(Number, u64)]) -> fmt::Result {
    let (first, _) = members[0];
    if matches!(first.kind, Kind::Histogram { .. }) {
        let (unit, _) = unit(members);
        let name = format!("forebay_{}_{unit}", family(&first));
        return put_histogram(encoder, &name, members);
    }
    let (name, divisor) = outside(family(&first));
    let is_counter = matches!(first.kind, Kind::Counter | Kind::CounterOf(_));
    let metric = if is_counter { MetricType::Counter } else { MetricType::Gauge };
    let mut metric = encoder.encode_descriptor(&name, first.help, None, metric)?;
    for (number, value) in members {
        let value = *value as f64 / divisor;
        match number.kind {
            Kind::GaugeOf(label) | Kind::CounterOf(label) => {
                let labels = [(label.label, label.value)];
                put_value(&mut metric.encode_family(&labels)?, is_counter, value)?;
            }
            _ => put_value(&mut metric, is_counter, value)?,
        }
    }
    Ok(())
}

fn put_value(metric: &mut MetricEncoder, is_counter: bool, value: f64) -> fmt::Result {
    match is_counter {
        true => metric.encode_counter::<NoLabelSet, _, f64>(&value, None),
        false => metric.encode_gauge(&value),
    }
}

/// A histogram's unit outside, and what its values are divided by for that.
fn unit(members: &[(Number, u64)]) -> (&'static str, f64) {
    let sum = members.last().map_or("", |(sum, _)| sum.name);
    match sum.rsplit('_').next() {
        Some("ns") => ("seconds", 1e9),
        _ => ("tokens", 1.0),
    }
}

fn put_histogram(
    encoder: &mut DescriptorEncoder,
    name: &str,
    members: &[(Number, u64)],
) -> fmt::Result {
    let Some((first, _)) = members.first() else { return Ok(()) };
    let (_, divisor) = unit(members);
    let (mut buckets, mut below, mut count, mut sum) = (Vec::new(), 0, 0, 0);
    for &(number, value) in members {
        let Kind::Histogram { part, .. } = number.kind else { continue };
        match part {
            Part::Le(bound) => {
                // Of another turn than the one before it, perhaps: never less than that.
                let up_to = value.max(below);
                buckets.push((bound as f64 / divisor, up_to - below));
                below = up_to;
            }
            Part::Count => count = value.max(below),
            Part::Sum => sum = value,
        }
    }
    buckets.push((f64::INFINITY, count - below));
    let mut metric = encoder.encode_descriptor(name, first.help, None, MetricType::Histogram)?;
    metric.encode_histogram::<NoLabelSet>(sum as f64 / divisor, count, &buckets, None)
}

/// vLLM's name, and what of ours is summed for it. Who waits only for a client is neither running
/// nor waiting: a gateway that counted it would take the server for fuller than it is.
const VLLM_GAUGES: &[(&str, &str, &[&str])] = &[
    ("vllm:num_requests_running", "requests in the batch", &["engine_running"]),
    (
        "vllm:num_requests_waiting",
        "requests that wait for capacity",
        &[
            "engine_queued_system",
            "engine_queued_interactive",
            "engine_queued_default",
            "engine_queued_bulk",
            "engine_waiting",
        ],
    ),
];

const VLLM_COUNTERS: &[(&str, &str, &str)] = &[
    ("vllm:num_preemptions", "times a running request lost its KV", "engine_preemptions"),
    ("vllm:prompt_tokens", "prompt tokens of admitted requests", "engine_prompt_tokens"),
    ("vllm:generation_tokens", "output tokens", "engine_tokens_out"),
];

/// vLLM's `finished_reason`, and ours that come under it.
const VLLM_FINISHED: &[(&str, &[&str])] = &[
    ("stop", &["engine_finished_end_of_text", "engine_finished_stop_string"]),
    ("length", &["engine_finished_max_tokens", "engine_finished_context_full"]),
    (
        "abort",
        &[
            "engine_finished_cancelled",
            "engine_finished_deadline",
            "engine_finished_stalled",
            "engine_finished_shutting_down",
            "engine_finished_operator",
        ],
    ),
    ("error", &["engine_finished_device_failed"]),
];

const VLLM_HISTOGRAMS: &[(&str, &str)] = &[
    ("vllm:time_to_first_token_seconds", "engine_ttft"),
    ("vllm:inter_token_latency_seconds", "engine_itl"),
    ("vllm:request_time_per_output_token_seconds", "engine_token_time"),
    ("vllm:e2e_request_latency_seconds", "engine_total"),
    ("vllm:request_queue_time_seconds", "engine_queue"),
    ("vllm:request_prompt_tokens", "engine_prompt_length"),
    ("vllm:request_generation_tokens", "engine_output_length"),
];

fn put_vllm(encoder: &mut DescriptorEncoder, shown: &Shown, block_positions: usize) -> fmt::Result {
    for (name, help, ours) in VLLM_GAUGES {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        metric.encode_gauge(&(shown.sum(ours) as f64))?;
    }
    let (free, total) =
        (shown.value("engine_kv_blocks_free"), shown.value("engine_kv_blocks_total"));
    let used = total.saturating_sub(free) as f64 / total.max(1) as f64;
    let help = "KV blocks in use: 1 is all of them";
    encoder
        .encode_descriptor("vllm:kv_cache_usage_perc", help, None, MetricType::Gauge)?
        .encode_gauge(&used)?;
    let labels =
        [("block_size", block_positions.to_string()), ("num_gpu_blocks", total.to_string())];
    encoder
        .encode_descriptor("vllm:cache_config_info", "the KV pool", None, MetricType::Gauge)?
        .encode_family(&labels)?
        .encode_gauge(&1.0)?;
    for (name, help, ours) in VLLM_COUNTERS {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        put_value(&mut metric, true, shown.value(ours) as f64)?;
    }
    let name = "vllm:request_success";
    let mut metric =
        encoder.encode_descriptor(name, "requests that ended", None, MetricType::Counter)?;
    for &(reason, ours) in VLLM_FINISHED {
        let labels = [("finished_reason", reason)];
        put_value(&mut metric.encode_family(&labels)?, true, shown.sum(ours) as f64)?;
    }
    let name = "vllm:admission_rejections";
    let mut metric = encoder.encode_descriptor(
        name,
        "requests refused or evicted",
        None,
        MetricType::Counter,
    )?;
    for (number, value) in shown.family("engine_rejected") {
        let Kind::CounterOf(label) = number.kind else { continue };
        let labels = [("reason", label.value)];
        put_value(&mut metric.encode_family(&labels)?, true, value as f64)?;
    }
    for (name, ours) in VLLM_HISTOGRAMS {
        put_histogram(encoder, name, &shown.family(ours))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::board::{Label, Tell};
    use crate::base::histogram::histograms;

    histograms! {
        Times {
            /// Times.
            ttft: 2 = "engine_ttft", "ms" of 1_000_000 "ns", [1 20], "to the first token";
        }
    }

    #[derive(Default)]
    struct Shows {
        times: Times,
    }

    impl Tell for Shows {
        fn tell(&self, mut put: impl FnMut(Number, u64)) {
            let mut plain = |name, kind, value| put(Number { name, kind, help: "h" }, value);
            plain("engine_running", Kind::Gauge, 3);
            plain("engine_device_ns", Kind::Counter, 1_500_000_000);
            plain("engine_utilisation_permille", Kind::Gauge, 1250);
            plain("engine_arrivals_per_1000_seconds", Kind::Gauge, 2500);
            plain("engine_rejected", Kind::Counter, 7);
            let of = |value| {
                Kind::CounterOf(Label { family: "engine_rejected", label: "reason", value })
            };
            plain("engine_rejected_invalid", of("invalid"), 5);
            plain("engine_rejected_no_capacity", of("no_capacity"), 2);
            self.times.tell(put);
        }
    }

    fn page() -> String {
        let board = Board::new::<Shows>();
        let mut shows = Shows::default();
        for ns in [500_000, 2_000_000, 30_000_000] {
            shows.times.ttft.observe(ns);
        }
        board.show(&shows);
        let page =
            Page { model: "a \"b\"".into(), block_positions: 64, boards: vec![board.into()] };
        page.text().replace("model_name=\"a \\\"b\\\"\"", "M")
    }

    #[test]
    fn numbers_have_base_units_and_labels_outside() {
        let page = page();
        for line in [
            "forebay_engine_running{M} 3.0",
            "# TYPE forebay_engine_device_seconds_total counter",
            "forebay_engine_device_seconds_total{M} 1.5",
            "forebay_engine_utilisation{M} 1.25",
            "forebay_engine_arrivals_per_second{M} 2.5",
            "forebay_engine_rejected_total{M,reason=\"invalid\"} 5.0",
            "forebay_engine_rejected_total{M,reason=\"no_capacity\"} 2.0",
            "vllm:num_requests_running{M} 3.0",
            "vllm:admission_rejections_total{M,reason=\"invalid\"} 5.0",
        ] {
            assert!(page.lines().any(|other| other == line), "{line} is not in\n{page}");
        }
        assert!(!page.contains("forebay_engine_rejected_total{M} "), "a sum beside its parts");
    }

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_all() {
        let page = page();
        for name in ["forebay_engine_ttft_seconds", "vllm:time_to_first_token_seconds"] {
            for line in [
                format!("{name}_bucket{{M,le=\"0.001\"}} 1"),
                format!("{name}_bucket{{M,le=\"0.02\"}} 2"),
                format!("{name}_bucket{{M,le=\"+Inf\"}} 3"),
                format!("{name}_count{{M}} 3"),
                format!("{name}_sum{{M}} 0.0325"),
            ] {
                assert!(page.lines().any(|other| other == line), "{line} is not in\n{page}");
            }
        }
    }

    #[test]
    fn no_metric_is_described_twice() {
        let page = page();
        let described: Vec<_> = page.lines().filter(|line| line.starts_with("# TYPE ")).collect();
        let unique: std::collections::BTreeSet<_> = described.iter().collect();
        assert_eq!(unique.len(), described.len(), "{page}");
    }
}
