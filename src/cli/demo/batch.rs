//! What a step takes.

use super::super::bench::{Arrivals, Lengths};
use super::stage::{Load, Seen, Stage};
use super::{Demo, Failure, Row, Verdict};

pub(super) const BATCH: Demo = Demo {
    name: "batch",
    about: "one client, then sixteen: the batch follows the load",
    sides: ["one stream", "sixteen streams"],
    run: batch,
};

fn batch(stage: &Stage) -> Result<Verdict, Failure> {
    let load = |streams| Load {
        arrivals: Arrivals::Closed(streams),
        prompt: Lengths::Fixed(16),
        output: Lengths::Fixed(64),
        warm_up_s: 1.0,
        seconds: 4.0,
        ..Load::default()
    };
    let [off] = stage.play(&[], [load(1)])?;
    let [on] = stage.play(&[], [load(16)])?;
    Ok(judge_batch(off, on))
}

fn judge_batch(off: Seen, on: Seen) -> Verdict {
    let rows = vec![
        Row {
            what: "output, all together",
            off: off.tokens_per_s,
            on: on.tokens_per_s,
            unit: "tok/s",
        },
        Row { what: "between two tokens, p99", off: off.itl_p99_ms, on: on.itl_p99_ms, unit: "ms" },
    ];
    let holds = off.tokens_per_s > 0.0 && on.tokens_per_s >= 1.5 * off.tokens_per_s;
    Verdict { rows, holds, claim: "sixteen streams get at least half as much again as one" }
}

pub(super) const LONG_PROMPT: Demo = Demo {
    name: "long-prompt",
    about: "prompts of 3,000 tokens beside four short conversations",
    sides: ["a step takes all it can (scheduler.step_target_ms = 60000)", "steps end in 50 ms"],
    run: long_prompt,
};

fn long_prompt(stage: &Stage) -> Result<Verdict, Failure> {
    let short = Load {
        arrivals: Arrivals::Closed(4),
        prompt: Lengths::Uniform(16, 32),
        // Short enough to end on both sides: only then is it known how far its tokens were apart.
        output: Lengths::Fixed(16),
        ..Load::default()
    };
    let long = Load {
        arrivals: Arrivals::Closed(1),
        prompt: Lengths::Fixed(3_000),
        output: Lengths::Fixed(4),
        ..Load::default()
    };
    let [off, _] = stage.play(&["scheduler.step_target_ms=60000"], [short, long])?;
    let [on, beside] = stage.play(&[], [short, long])?;
    Ok(judge_long_prompt(off, on, beside))
}

fn judge_long_prompt(off: Seen, on: Seen, beside: Seen) -> Verdict {
    let rows = vec![
        Row { what: "between two tokens, p99", off: off.itl_p99_ms, on: on.itl_p99_ms, unit: "ms" },
        Row { what: "short answers", off: off.answers_per_s, on: on.answers_per_s, unit: "/s" },
        Row { what: "output", off: off.tokens_per_s, on: on.tokens_per_s, unit: "tok/s" },
    ];
    let served = beside.answers_per_s > 0.0;
    let holds = served && on.answers_per_s > 0.0 && on.itl_p99_ms < 0.7 * off.itl_p99_ms;
    Verdict { rows, holds, claim: "long prompts are served, and tokens keep coming beside them" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_wins_nothing_is_no_success() {
        let at = |tokens_per_s| Seen { tokens_per_s, ..Seen::default() };
        assert!(judge_batch(at(100.0), at(300.0)).holds);
        assert!(!judge_batch(at(100.0), at(120.0)).holds);
        assert!(!judge_batch(at(0.0), at(0.0)).holds);
    }

    #[test]
    fn long_prompts_must_be_served_for_it_to_count() {
        let itl = |itl_p99_ms, answers_per_s| Seen { itl_p99_ms, answers_per_s, ..Seen::default() };
        assert!(judge_long_prompt(itl(300.0, 1.0), itl(90.0, 1.0), itl(0.0, 0.2)).holds);
        assert!(!judge_long_prompt(itl(300.0, 1.0), itl(90.0, 1.0), itl(0.0, 0.0)).holds);
        assert!(!judge_long_prompt(itl(300.0, 1.0), itl(280.0, 1.0), itl(0.0, 0.2)).holds);
    }
}
