//! What comes in, and what is refused at the door.

use super::super::bench::Arrivals;
use super::stage::{Load, Seen, Stage};
use super::{Demo, Failure, Row, Verdict};

pub(super) const COLLAPSE: Demo = Demo {
    name: "collapse",
    about: "three times the capacity is offered: goodput with and without a target at the door",
    sides: ["everybody queues (limits.ttft_target_ms = 0)", "who would wait too long is refused"],
    run: collapse,
};

fn collapse(stage: &Stage) -> Result<Verdict, Failure> {
    let arrivals = Arrivals::Open(3.0 * stage.capacity()?);
    let load = Load { arrivals, warm_up_s: 6.0, seconds: 12.0, ..Load::default() };
    let [off] = stage.play(&["limits.ttft_target_ms=0"], [load])?;
    let [on] = stage.play(&["limits.ttft_target_ms=1000"], [load])?;
    Ok(judge_collapse(off, on))
}

fn judge_collapse(off: Seen, on: Seen) -> Verdict {
    let rows = vec![
        Row { what: "answers within both targets", off: off.goodput, on: on.goodput, unit: "/s" },
        Row { what: "first token, p50", off: off.ttft_p50_ms, on: on.ttft_p50_ms, unit: "ms" },
        Row { what: "first token, p99", off: off.ttft_p99_ms, on: on.ttft_p99_ms, unit: "ms" },
        Row { what: "refused", off: off.refused_percent, on: on.refused_percent, unit: "%" },
    ];
    let holds = on.goodput > 0.0
        && on.goodput >= 2.0 * off.goodput
        && on.ttft_p50_ms <= off.ttft_p50_ms / 2.0;
    Verdict { rows, holds, claim: "goodput at least twice, first tokens in half the time" }
}

pub(super) const BUCKET: Demo = Demo {
    name: "bucket",
    about: "one tenant floods: a bucket of output tokens bounds what it takes",
    sides: ["no bucket", "tenants.output_tokens_per_second = 40"],
    run: bucket,
};

const BUCKET_TOKENS_PER_S: f64 = 40.0;

fn bucket(stage: &Stage) -> Result<Verdict, Failure> {
    let arrivals = Arrivals::Closed(16);
    let flood = Load { arrivals, tenant: "flood", warm_up_s: 6.0, ..Load::default() };
    let [off] = stage.play(&[], [flood])?;
    let sets = ["tenants.output_tokens_per_second=40", "tenants.output_tokens_burst=100"];
    let [on] = stage.play(&sets, [flood])?;
    Ok(judge_bucket(off, on))
}

fn judge_bucket(off: Seen, on: Seen) -> Verdict {
    let rows = vec![
        Row { what: "its output", off: off.tokens_per_s, on: on.tokens_per_s, unit: "tok/s" },
        Row { what: "refused", off: off.refused_percent, on: on.refused_percent, unit: "%" },
    ];
    // A burst of 100 tokens and a forecast that is settled later, over eight seconds.
    let most = 1.5 * BUCKET_TOKENS_PER_S;
    let holds = on.tokens_per_s > 0.0 && on.tokens_per_s <= most && off.tokens_per_s > 1.5 * most;
    Verdict {
        rows,
        holds,
        claim: "it has no more than its bucket gives, which is less than it took",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collapse_on_both_sides_is_no_success() {
        let bad = Seen { goodput: 0.0, ttft_p50_ms: 9_000.0, ..Seen::default() };
        let good = Seen { goodput: 5.0, ttft_p50_ms: 600.0, ..Seen::default() };
        assert!(judge_collapse(bad, good).holds);
        assert!(!judge_collapse(bad, bad).holds);
        assert!(!judge_collapse(good, good).holds);
    }

    #[test]
    fn a_bucket_that_leaks_or_lets_nothing_through_is_no_success() {
        let at = |tokens_per_s| Seen { tokens_per_s, ..Seen::default() };
        assert!(judge_bucket(at(400.0), at(45.0)).holds);
        assert!(!judge_bucket(at(400.0), at(400.0)).holds);
        assert!(!judge_bucket(at(400.0), at(0.0)).holds);
        assert!(!judge_bucket(at(50.0), at(45.0)).holds);
    }
}
