//! What may be written on the command line.

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};

/// Serves language models with backpressure from the client's socket to the decode step.
#[derive(Debug, Parser)]
#[command(
    name = "forebay",
    version,
    propagate_version = true,
    after_help = AFTER_HELP,
    max_term_width = 100
)]
pub struct Cli {
    /// What to do; `serve` when nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How much is logged to standard error: error, warn, info, debug, trace, or a filter such as
    /// forebay::front=debug.
    #[arg(long, global = true, env = "FOREBAY_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
}

const AFTER_HELP: &str = "\
Examples:
  forebay                                  serve the default model on 127.0.0.1:7070
  forebay pull                             fetch the default model now
  forebay models                           what is known, what is cached

Exit codes:
  0    done
  1    something failed while running
  2    wrong usage or configuration; nothing was started
  3    the model cannot be fetched or read
";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fetch a model into the cache folder, whole and checked.
    Pull(Pull),
    /// List the models that are known and those that are cached.
    Models(Models),
}

impl Cli {
    /// Reads the command line. Flags without a subcommand belong to `serve`.
    pub fn read(args: Vec<OsString>) -> Result<Cli, clap::Error> {
        let error = match Cli::try_parse_from(&args) {
            Ok(cli) => return Ok(cli),
            Err(error) => error,
        };
        let is_flag = args.get(1).is_some_and(|arg| arg.as_encoded_bytes().starts_with(b"-"));
        if error.kind() == ErrorKind::UnknownArgument && is_flag {
            let mut args = args;
            args.insert(1, "serve".into());
            return Cli::try_parse_from(args);
        }
        Err(error)
    }
}

/// Arguments of `forebay pull`.
#[derive(Debug, Args)]
pub struct Pull {
    /// A known name, hf:OWNER/REPO/FILE.gguf, or the path of a GGUF file.
    #[arg(default_value = crate::config::DEFAULT_MODEL)]
    pub name: String,
    /// Show no progress; print only the path.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Arguments of `forebay models`.
#[derive(Debug, Args)]
pub struct Models {
    /// As JSON, for programs.
    #[arg(long)]
    pub json: bool,
}
