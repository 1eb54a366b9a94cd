//! `forebay pull` and `forebay models`.

use std::io::{self, Write};

use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;

use super::Failure;
use super::args;
use super::pull::{Listed, ModelName, Progress, PullError, Puller};

/// Fetches a model and prints its path.
pub(super) fn pull(args: &args::Pull) -> Result<(), Failure> {
    let name: ModelName = args.name.parse().map_err(PullError::from)?;
    let progress = if args.quiet { Progress::Quiet } else { Progress::Show };
    let path = Puller::from_env(progress)?.pull(&name)?;
    print(&path.display().to_string())
}

/// Prints what is known and what is cached.
pub(super) fn list(args: &args::Models) -> Result<(), Failure> {
    let puller = Puller::from_env(Progress::Quiet)?;
    let listed = puller.list();
    if args.json {
        let models: Vec<_> = listed.iter().map(as_json).collect();
        return print(&serde_json::to_string_pretty(&models).expect("plain values"));
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["MODEL", "CACHED", "WHAT"]);
    for model in &listed {
        let cached = model.cached_bytes.map_or("no".to_owned(), megabytes);
        table.add_row([model.name.to_string(), cached, about(&model.name)]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let folder = puller.folder().display();
    print(&format!("{table}\n\nCached in {folder}. Any GGUF file may be named by its path."))
}

fn about(name: &ModelName) -> String {
    match name {
        ModelName::Known(model) => {
            format!("{}; {} to fetch", model.about, megabytes(model.wheel_bytes))
        }
        ModelName::Hub(_) => "from the hub".to_owned(),
        ModelName::Path(_) => "a file".to_owned(),
    }
}

fn as_json(model: &Listed) -> serde_json::Value {
    json!({
        "name": model.name.to_string(),
        "cached": model.cached_bytes.is_some(),
        "cached_bytes": model.cached_bytes,
        "path": model.path,
    })
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A line on standard output. A reader that has gone (`| head`) is no failure.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    match writeln!(io::stdout(), "{text}") {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::Runtime(format!("cannot write to standard output: {e}")))
        }
        _ => Ok(()),
    }
}
