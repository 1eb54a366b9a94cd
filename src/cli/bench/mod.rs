//! `forebay bench`: a load generator over the native protocol.

mod drive;
mod report;
mod tally;
mod workload;

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::args;
use super::{Failure, models};
use crate::request::{Class, Name};
pub(super) use drive::{DriveError, Outcome, Plan, run as drive};
use report::{Report, Setup};
pub(super) use tally::Slo;
use tally::Tally;
pub(super) use workload::{Arrivals, Lengths};

/// Streams for which another connection is opened: under the default
/// `limits.streams_per_connection_max` of 128.
const STREAMS_PER_CONNECTION: u32 = 64;

/// Measures the server at `target`.
pub(super) fn run(args: &args::Bench, target: SocketAddr, name: &str) -> Result<(), Failure> {
    let plan = plan(args, target)?;
    // Whether the file can be written is better known before the run than after it.
    if let Some(path) = &args.json {
        fs::File::create(path).map_err(|e| unwritable(path, &e))?;
    }
    let bar = bar(&plan, args.quiet);
    let mut show = |elapsed: Duration, tally: &Tally| {
        bar.set_position(elapsed.as_millis() as u64);
        bar.set_message(format!("{} begun, {} completed", tally.requests, tally.completed));
    };
    let outcome = drive(&plan, &mut show);
    bar.finish_and_clear();
    let outcome = outcome.map_err(|error| Failure::Runtime(error.to_string()))?;
    let report = report(args, &plan, &outcome, name);
    models::print(&report.to_text())?;
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&report).expect("plain values");
        fs::write(path, json + "\n").map_err(|e| unwritable(path, &e))?;
    }
    Ok(())
}

fn unwritable(path: &std::path::Path, error: &std::io::Error) -> Failure {
    Failure::Usage(format!("--json: cannot write {}: {error}", path.display()))
}

fn plan(args: &args::Bench, target: SocketAddr) -> Result<Plan, Failure> {
    let lengths = |flag: &str, text: &str| -> Result<Lengths, Failure> {
        text.parse().map_err(|what| Failure::Usage(format!("{flag}: {what}")))
    };
    let arrivals = match args.rate {
        Some(rate) => Arrivals::Open(rate),
        None => Arrivals::Closed(args.concurrency.unwrap_or(8)),
    };
    let connections = args.connections.unwrap_or(match arrivals {
        Arrivals::Closed(concurrency) => concurrency.div_ceil(STREAMS_PER_CONNECTION),
        Arrivals::Open(_) => 4,
    });
    Ok(Plan {
        target,
        connections,
        arrivals,
        prompt: lengths("--prompt", &args.prompt)?,
        output: lengths("--output", &args.output)?,
        tenant: Name::new(&args.tenant).ok_or_else(|| {
            Failure::Usage(format!("--tenant: at most {} bytes of text", Name::BYTES_MAX))
        })?,
        class: class(&args.class)?,
        seed: args.seed,
        warm_up: Duration::from_secs_f64(args.warm_up),
        duration: Duration::from_secs_f64(args.duration),
        grace: Duration::from_secs_f64(args.grace),
        slo: Slo {
            ttft_ns: (args.slo_ttft_ms * 1e6) as u64,
            itl_ns: (args.slo_itl_ms * 1e6) as u64,
        },
    })
}

fn class(name: &str) -> Result<Class, Failure> {
    Class::ALL.into_iter().find(|class| class.name() == name).ok_or_else(|| {
        let names = Class::ALL.map(Class::name).join(", ");
        Failure::Usage(format!("--class {name:?}: must be one of {names}"))
    })
}

/// Hidden by itself where standard error is no terminal.
fn bar(plan: &Plan, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let template = "{bar:40} {elapsed} of {len_s} {msg}";
    let total = plan.warm_up + plan.duration;
    let seconds = format!("{} s", total.as_secs_f64());
    let style = ProgressStyle::with_template(template).expect("a constant template").with_key(
        "len_s",
        move |_: &indicatif::ProgressState, w: &mut dyn std::fmt::Write| {
            let _ = w.write_str(&seconds);
        },
    );
    ProgressBar::new(total.as_millis() as u64).with_style(style)
}

fn report(args: &args::Bench, plan: &Plan, outcome: &Outcome, name: &str) -> Report {
    let (concurrency, rate) = match plan.arrivals {
        Arrivals::Closed(concurrency) => (Some(concurrency), None),
        Arrivals::Open(rate) => (None, Some(rate)),
    };
    let setup = Setup {
        server: outcome.server.server.clone(),
        model: outcome.server.model.clone(),
        target: name.to_owned(),
        concurrency,
        rate,
        prompt: args.prompt.clone(),
        output: args.output.clone(),
        connections: plan.connections,
        seed: plan.seed,
        warm_up_s: args.warm_up,
        duration_s: args.duration,
    };
    Report::new(setup, &outcome.tally, plan.slo, outcome.cpu_share)
}

#[cfg(test)]
mod tests;
