//! Who comes first when not all can.

use super::super::bench::Arrivals;
use super::stage::{Load, Seen, Stage};
use super::{Demo, Failure, Row, Verdict};
use crate::request::Class;

/// Nobody is refused for the time it takes, so that there is a queue to stand in.
const QUEUE: &str = "limits.ttft_target_ms=0";

pub(super) const VIP: Demo = Demo {
    name: "vip",
    about: "a flood of bulk work, and two people who watch their text appear",
    sides: ["all in one class", "the flood is bulk, the people are interactive"],
    run: vip,
};

fn vip(stage: &Stage) -> Result<Verdict, Failure> {
    let [flood, people] = flood_and_people(stage)?;
    let [_, off] = stage.play(&[QUEUE], [flood, people])?;
    let flood = Load { class: Class::Bulk, ..flood };
    let people = Load { class: Class::Interactive, ..people };
    let [_, on] = stage.play(&[QUEUE], [flood, people])?;
    Ok(judge(off, on, "their first tokens come in less than half the time"))
}

pub(super) const FAIR: Demo = Demo {
    name: "fair",
    about: "one tenant floods, another has two requests at a time; both have the same class",
    sides: ["first come, first served", "scheduler.policy = fair"],
    run: fair,
};

fn fair(stage: &Stage) -> Result<Verdict, Failure> {
    let [flood, people] = flood_and_people(stage)?;
    let loads = [Load { tenant: "flood", ..flood }, Load { tenant: "people", ..people }];
    let [_, off] = stage.play(&[QUEUE, "scheduler.policy=fcfs"], loads)?;
    let [_, on] = stage.play(&[QUEUE, "scheduler.policy=fair"], loads)?;
    Ok(judge(off, on, "the small tenant's first tokens come in less than half the time"))
}

fn flood_and_people(stage: &Stage) -> Result<[Load; 2], Failure> {
    let arrivals = Arrivals::Open(3.0 * stage.capacity()?);
    let flood = Load { arrivals, warm_up_s: 0.0, seconds: 12.0, ..Load::default() };
    // They come when the queue stands.
    let people = Load { warm_up_s: 4.0, seconds: 8.0, ..Load::default() };
    Ok([flood, people])
}

fn judge(off: Seen, on: Seen, claim: &'static str) -> Verdict {
    let rows = vec![
        Row { what: "first token, p50", off: off.ttft_p50_ms, on: on.ttft_p50_ms, unit: "ms" },
        Row { what: "answers", off: off.answers_per_s, on: on.answers_per_s, unit: "/s" },
    ];
    let holds = on.answers_per_s > 0.0 && on.ttft_p50_ms < off.ttft_p50_ms / 2.0;
    Verdict { rows, holds, claim }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_tokens_must_come_much_sooner_and_answers_must_come_at_all() {
        let at =
            |ttft_p50_ms, answers_per_s| Seen { ttft_p50_ms, answers_per_s, ..Seen::default() };
        assert!(judge(at(4_000.0, 0.1), at(300.0, 0.5), "").holds);
        assert!(!judge(at(4_000.0, 0.1), at(3_000.0, 0.5), "").holds);
        assert!(!judge(at(4_000.0, 0.1), at(300.0, 0.0), "").holds);
    }
}
