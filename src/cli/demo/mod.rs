//! `forebay demo`: each policy off, then on, over loopback on the real model.
//!
//! A demo serves the same load twice and compares the two sides of that one run, with wide margins:
//! how fast the machine is does not matter, and neither do its neighbours much. When the effect is
//! absent twice it says so and fails.

mod admission;
mod batch;
mod stage;
mod tenants;

use super::{Failure, args, models};
use stage::Stage;

/// One number on both sides.
struct Row {
    what: &'static str,
    off: f64,
    on: f64,
    unit: &'static str,
}

/// What came of a demo.
struct Verdict {
    rows: Vec<Row>,
    /// Whether the policy did what it is for.
    holds: bool,
    /// What that is, as a comparison of the two sides.
    claim: &'static str,
}

/// A policy shown.
struct Demo {
    name: &'static str,
    /// What the policy does.
    about: &'static str,
    /// How each side is set up.
    sides: [&'static str; 2],
    run: fn(&Stage) -> Result<Verdict, Failure>,
}

const DEMOS: [Demo; 6] = [
    admission::COLLAPSE,
    admission::BUCKET,
    tenants::VIP,
    tenants::FAIR,
    batch::BATCH,
    batch::LONG_PROMPT,
];

/// Runs what is asked for; fails when an effect is absent.
pub(super) fn run(args: &args::Demo) -> Result<(), Failure> {
    if args.list {
        let line = |demo: &Demo| format!("{:<12} {}", demo.name, demo.about);
        return models::print(&DEMOS.iter().map(line).collect::<Vec<_>>().join("\n"));
    }
    let chosen: Vec<&Demo> = match &args.name {
        Some(name) => vec![find(name)?],
        None => DEMOS.iter().collect(),
    };
    let stage = Stage::new(&args.settings);
    let mut absent = Vec::new();
    for demo in chosen {
        models::print(&format!("{}: {}", demo.name, demo.about))?;
        if !play(demo, &stage)? && !play(demo, &stage)? {
            absent.push(demo.name);
        }
    }
    match absent[..] {
        [] => Ok(()),
        _ => Err(Failure::Runtime(format!("the effect is absent: {}", absent.join(", ")))),
    }
}

/// Plays it and shows what came of it. An effect that is absent is looked for once more: for ten
/// seconds a neighbour can have most of the machine.
fn play(demo: &Demo, stage: &Stage) -> Result<bool, Failure> {
    let verdict = (demo.run)(stage)?;
    models::print(&table(demo, &verdict))?;
    Ok(verdict.holds)
}

fn find(name: &str) -> Result<&'static Demo, Failure> {
    DEMOS.iter().find(|demo| demo.name == name).ok_or_else(|| {
        let names = DEMOS.map(|demo| demo.name).join(", ");
        Failure::Usage(format!("there is no demo {name:?}; there are {names}"))
    })
}

fn table(demo: &Demo, verdict: &Verdict) -> String {
    let mut lines = vec![format!("  {:<34} {:>14} {:>14}", "", "off", "on")];
    for Row { what, off, on, unit } in &verdict.rows {
        let [off, on] = [off, on].map(|value| format!("{value:.1} {unit}"));
        lines.push(format!("  {what:<34} {off:>14} {on:>14}"));
    }
    lines.push(format!("  off: {}", demo.sides[0]));
    lines.push(format!("  on:  {}", demo.sides[1]));
    let word = if verdict.holds { "as it should be" } else { "NOT SO" };
    lines.push(format!("  {}: {word}\n", verdict.claim));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_a_wrong_one_is_answered_with_all_of_them() {
        let Err(Failure::Usage(text)) = find("nonsense") else { panic!("there is no such demo") };
        for demo in &DEMOS {
            assert!(text.contains(demo.name));
            assert_eq!(DEMOS.iter().filter(|other| other.name == demo.name).count(), 1);
        }
    }

    #[test]
    fn an_absent_effect_is_said_in_the_table() {
        let rows = vec![Row { what: "goodput", off: 3.0, on: 2.0, unit: "/s" }];
        let verdict = Verdict { rows, holds: false, claim: "more is good" };
        let text = table(&DEMOS[0], &verdict);
        assert!(text.contains("more is good: NOT SO") && text.contains("3.0 /s"), "{text}");
    }
}
