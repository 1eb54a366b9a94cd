//! The subcommands of `forebay`.
//!
//! Core: none; each subcommand starts the cores it needs.

mod args;
mod backend;
mod bench;
mod chat;
mod demo;
mod dump;
mod models;
mod plan;
pub mod pull;
mod run;
mod serve;
pub mod server;
mod settings;
mod target;
mod top;

use std::process::ExitCode;

use args::{Cli, Command};
use pull::PullError;

/// Why a subcommand did not end well. Each kind has an exit code of its own.
#[derive(Debug)]
enum Failure {
    /// Something failed while running: 1.
    Runtime(String),
    /// Wrong usage or configuration, nothing was started: 2.
    Usage(String),
    /// The model cannot be fetched or read: 3.
    Model(String),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Failure::Runtime(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Model(_) => 3,
        }
    }

    fn text(&self) -> &str {
        match self {
            Failure::Runtime(text) | Failure::Usage(text) | Failure::Model(text) => text,
        }
    }
}

impl From<PullError> for Failure {
    fn from(error: PullError) -> Failure {
        match error {
            PullError::Name(error) => Failure::Usage(error.to_string()),
            error => Failure::Model(error.to_string()),
        }
    }
}

/// Runs the program with the process's own arguments and environment.
pub fn main() -> ExitCode {
    let cli = match Cli::read(std::env::args_os().collect()) {
        Ok(cli) => cli,
        // Help and version are "errors" of clap's too; it knows which stream and code they have.
        Err(error) => error.exit(),
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("forebay: {}", failure.text());
            ExitCode::from(failure.code())
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    start_log(&cli.log)?;
    match cli.command {
        Some(Command::Pull(args)) => models::pull(&args),
        Some(Command::Models(args)) => models::list(&args),
        Some(Command::Check(args)) => check(&args),
        Some(Command::Plan(args)) => plan::plan(&args),
        Some(Command::Serve(args)) => serve::serve(&args.settings),
        Some(Command::Run(args)) => run::run(&args),
        Some(Command::Chat(args)) => chat::chat(&args),
        Some(Command::Bench(args)) => bench(&args),
        Some(Command::Demo(args)) => demo::run(&args),
        Some(Command::Top(args)) => top::top(&args),
        Some(Command::Dump(args)) => dump::dump(&args),
        None => serve::serve(&args::Settings::default()),
    }
}

fn bench(args: &args::Bench) -> Result<(), Failure> {
    let target = target::Target::find(args.connect.as_deref(), &args.settings)?;
    let ended = bench::run(args, target.address, &target.name);
    ended.and(target.end())
}

fn check(args: &args::Check) -> Result<(), Failure> {
    let file = args.file.as_deref().or(args.settings.config.as_deref());
    let loaded = settings::load_from(file, &args.settings)?;
    models::print(loaded.to_toml().trim_end())
}

/// Logs go to standard error as text, so that standard output is the program's answer alone.
fn start_log(filter: &str) -> Result<(), Failure> {
    use std::io::IsTerminal;
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|e| Failure::Usage(format!("--log {filter:?} is not a filter: {e}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    Ok(())
}
