//! What may be written on the command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};

use crate::config::DEFAULT_MODEL;

/// Serves language models with backpressure from the client's socket to the decode step.
#[derive(Debug, Parser)]
#[command(
    name = "forebay",
    version = VERSION,
    propagate_version = true,
    after_help = AFTER_HELP,
    max_term_width = 100
)]
pub struct Cli {
    /// What to do; `serve` when nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What is logged to standard error: error, warn, info, debug, trace, or a filter such as
    /// forebay::front=debug.
    #[arg(long, global = true, env = "FOREBAY_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
}

/// Version, target and profile: what a report about a figure or a fault needs.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (",
    env!("FOREBAY_TARGET"),
    ", ",
    env!("FOREBAY_PROFILE"),
    ")"
);

const AFTER_HELP: &str = "\
Examples:
  forebay                                  serve the default model on 127.0.0.1:7070
  forebay serve --model ./my.gguf --listen 127.0.0.1:0
  forebay pull                             fetch the default model now
  forebay models                           what is known, what is cached
  forebay check forebay.toml               what is wrong in a configuration file
  forebay plan --kv-pool 4GiB              core map and memory envelope, without serving

Settings come from the file of --config, then from the environment (kv.pool_bytes is
FOREBAY_KV_POOL_BYTES there), then from flags; the last one counts. `forebay check` without a
file prints all of them as a file to start from.

Exit codes:
  0    done
  1    something failed while running
  2    wrong usage or configuration; nothing was started
  3    the model cannot be fetched or read
  130  ended at once by a second signal
";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over the native protocol until told to stop.
    Serve(Serve),
    /// Fetch a model into the cache folder, whole and checked.
    Pull(Pull),
    /// List the models that are known and those that are cached.
    Models(Models),
    /// Say what is wrong in a configuration, all at once, or print the settings in force.
    #[command(after_help = CHECK_HELP, after_long_help = check_long_help())]
    Check(Check),
}

const CHECK_HELP: &str = "\
Examples:
  forebay check forebay.toml       exit code 0: print the settings in force; 2: say what is wrong
  forebay check > forebay.toml     all settings with their defaults, to start from
  forebay check --help             all settings with their meaning
";

fn check_long_help() -> String {
    let settings = crate::config::describe_settings();
    format!("{CHECK_HELP}\nSettings, as SECTION.NAME = DEFAULT:\n{settings}")
}

/// Where settings come from; any subcommand that needs a configuration takes these.
#[derive(Args, Debug, Default)]
pub struct Settings {
    /// Configuration file (TOML).
    #[arg(long, env = "FOREBAY_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Any setting, as kv.pool_bytes=1GiB; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// A known name, the path of a GGUF file, or hf:OWNER/REPO/FILE.gguf [default: smollm2-135m].
    #[arg(long, short, value_name = "NAME")]
    pub model: Option<String>,
    /// Address of the native protocol; loopback only, port 0 takes a free one [default:
    /// 127.0.0.1:7070].
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<String>,
    /// Memory of the KV pool, as 1GiB [default: a quarter of the free memory, at most 2GiB].
    #[arg(long, value_name = "BYTES")]
    pub kv_pool: Option<String>,
    /// Compute workers [default: one a CPU].
    #[arg(long, short, value_name = "N")]
    pub threads: Option<String>,
    /// Instruction-set path: auto, avx512, avx2, portable [default: auto].
    #[arg(long, value_name = "PATH")]
    pub isa: Option<String>,
    /// How sockets are driven: auto, io_uring, epoll [default: auto].
    #[arg(long, value_name = "KIND")]
    pub io: Option<String>,
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

/// Arguments of `forebay serve`.
#[derive(Args, Debug)]
pub struct Serve {
    /// What is served, and how.
    #[command(flatten)]
    pub settings: Settings,
}

/// Arguments of `forebay pull`.
#[derive(Args, Debug)]
pub struct Pull {
    /// A known name, hf:OWNER/REPO/FILE.gguf, or the path of a GGUF file.
    #[arg(default_value = DEFAULT_MODEL)]
    pub name: String,
    /// Show no progress; print only the path.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Arguments of `forebay models`.
#[derive(Args, Debug)]
pub struct Models {
    /// As JSON, for programs.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `forebay check`.
#[derive(Args, Debug)]
pub struct Check {
    /// The file to check, in place of --config.
    pub file: Option<PathBuf>,
    /// Environment and flags count too, as they would for `serve`.
    #[command(flatten)]
    pub settings: Settings,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
