//! What may be written on the command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, value_parser};

use super::Failure;
use crate::config::DEFAULT_MODEL;
use crate::request::SamplingParams;

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
  forebay run 'Why is the sky blue?'       one answer
  forebay chat                             a conversation
  forebay bench --concurrency 32           throughput and latency under load
  forebay top                              what a server is doing, live

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
    /// Answer one prompt in this process, printed as it comes.
    #[command(after_help = RUN_HELP)]
    Run(Run),
    /// Talk with a model over the native protocol.
    #[command(after_help = CHAT_HELP)]
    Chat(Chat),
    /// Measure a server under load: times, throughput, goodput, refusals.
    #[command(after_help = BENCH_HELP)]
    Bench(Bench),
    /// Show a policy at work: the same load with it off, then on.
    #[command(after_help = DEMO_HELP)]
    Demo(Demo),
    /// Watch a server: the pressure on every link of its pipeline, rates, times, refusals.
    #[command(after_help = TOP_HELP)]
    Top(Top),
    /// Read a dump of the flight recorders (SIGUSR1, a panic or a stall writes one), filtered.
    #[command(after_help = DUMP_HELP)]
    Dump(Dump),
    /// Show which CPU would do what, and how much memory it would take at most.
    Plan(Plan),
    /// Say what is wrong in a configuration, all at once, or print the settings in force.
    #[command(after_help = CHECK_HELP, after_long_help = check_long_help())]
    Check(Check),
}

const TOP_HELP: &str = "\
A bar is full at a link's set point; beyond 100 % whoever comes before it waits. Rates and
percentiles are of the last 10 seconds. q quits.

Examples:
  forebay top
  forebay top --connect 127.0.0.1:7171 --interval 0.5
  forebay top --once               one frame as text, over one interval
";

/// Arguments of `forebay top`.
#[derive(Args, Debug)]
pub struct Top {
    /// The server's address.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7070")]
    pub connect: String,
    /// Seconds between two looks.
    #[arg(long, value_name = "S", default_value = "1", value_parser = positive)]
    pub interval: f64,
    /// Print one frame as text and end.
    #[arg(long)]
    pub once: bool,
}

const DUMP_HELP: &str = "\
Examples:
  forebay dump recorded --seq 3.7               one request's life, on every core
  forebay dump recorded --core engine --kind preempt --kind 'first token'
  forebay dump server.log --last 100            out of a log, with other lines between
";

/// Arguments of `forebay dump`.
#[derive(Args, Debug)]
pub struct Dump {
    /// What runtime.recorder_file names, or a log of standard error; - reads standard input.
    pub file: PathBuf,
    /// Only this core's events (front, engine, device); may be repeated.
    #[arg(long, value_name = "NAME")]
    pub core: Vec<String>,
    /// Only what befell this sequence, as SLOT.GENERATION, on the front core too.
    #[arg(long, value_name = "SEQ")]
    pub seq: Option<String>,
    /// Only events of this kind, as the dump names it; may be repeated.
    #[arg(long, value_name = "KIND")]
    pub kind: Vec<String>,
    /// Only the last N of these.
    #[arg(long, value_name = "N")]
    pub last: Option<usize>,
}

/// Arguments of `forebay plan`.
#[derive(Args, Debug)]
pub struct Plan {
    /// As JSON, for programs.
    #[arg(long)]
    pub json: bool,
    /// The configuration to plan for.
    #[command(flatten)]
    pub settings: Settings,
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
#[derive(Clone, Args, Debug, Default)]
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
    /// On what the model runs: auto, cpu, cuda [default: auto].
    #[arg(long, value_name = "KIND")]
    pub backend: Option<String>,
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

const RUN_HELP: &str = "\
Examples:
  forebay run 'Why is the sky blue?'
  forebay run --raw --max-tokens 40 --temperature 0 'Once upon a time'
  cat notes.txt | forebay run --system 'Summarise what you are given.' -
";

/// Arguments of `forebay run`.
#[derive(Args, Debug)]
pub struct Run {
    /// What to answer; - reads it from standard input.
    pub prompt: String,
    /// Instructions that come before the prompt.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Continue the prompt's text as it is, without the model's chat template.
    #[arg(long)]
    pub raw: bool,
    /// Output tokens at most.
    #[arg(long, short = 'n', value_name = "N", default_value = "512",
          value_parser = value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: Sampling,
    /// Print times and rate to standard error at the end.
    #[arg(long)]
    pub stats: bool,
    /// Which model, and how it is run.
    #[command(flatten)]
    pub settings: Settings,
}

const CHAT_HELP: &str = "\
Without --connect, chat talks to the server at the configured address (127.0.0.1:7070) if one
answers there and no setting is given here; else it starts one in this process, on a free port.

Examples:
  forebay chat
  forebay chat --connect 127.0.0.1:7070 --system 'Answer in one sentence.'
";

/// Arguments of `forebay chat`.
#[derive(Args, Debug)]
pub struct Chat {
    /// The server's address.
    #[arg(long, value_name = "HOST:PORT")]
    pub connect: Option<String>,
    /// Instructions that come before the conversation.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Tokens of one answer at most.
    #[arg(long, short = 'n', value_name = "N", default_value = "1024",
          value_parser = value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: Sampling,
    /// Show times and rate also when the input is no terminal.
    #[arg(long)]
    pub stats: bool,
    /// For a server in this process.
    #[command(flatten)]
    pub settings: Settings,
}

/// How tokens are chosen, for `run` and `chat`.
#[derive(Args, Debug)]
pub struct Sampling {
    /// 0 always takes the likeliest token; higher is more varied.
    #[arg(long, value_name = "X", default_value = "0.7")]
    pub temperature: f32,
    /// Only the likeliest tokens that together have this probability.
    #[arg(long, value_name = "P", default_value = "0.95")]
    pub top_p: f32,
    /// Only the K likeliest tokens; 0 is all.
    #[arg(long, value_name = "K", default_value = "0")]
    pub top_k: u32,
    /// Only tokens with at least this share of the likeliest one's probability.
    #[arg(long, value_name = "P", default_value = "0")]
    pub min_p: f32,
    /// Above 1, tokens that occurred are less likely.
    #[arg(long, value_name = "X", default_value = "1")]
    pub repetition_penalty: f32,
    /// The same seed gives the same answer [default: another one each time].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

impl Sampling {
    /// Checked.
    pub(super) fn params(&self) -> Result<SamplingParams, Failure> {
        let params = SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed.unwrap_or_else(some_seed),
            ..SamplingParams::default()
        };
        params.check().map_err(|what| Failure::Usage(what.to_owned()))?;
        Ok(params)
    }
}

/// Another one each time: the hash map's random key.
fn some_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

const BENCH_HELP: &str = "\
Prompts are random token ids, and end-of-text is ignored, so that lengths are as asked for. A length
is N, N..M (evenly between) or exp:N (exponential around the mean N, at most 8 N).

In a closed loop the next request begins when one ends; in an open loop requests arrive at random
moments, whatever the server does, and times count from the arrival, not from the sending. Requests
count when they are meant to begin in the measured part; the run waits for them to end.

A request is good when it completed, its first token came within --slo-ttft-ms and its later tokens
took at most --slo-itl-ms on average; goodput counts only those.

Examples:
  forebay bench --concurrency 32 --prompt 128..512 --output exp:128
  forebay bench --connect 127.0.0.1:7070 --rate 5 --duration 60 --json result.json
";

/// Arguments of `forebay bench`.
#[derive(Args, Debug)]
pub struct Bench {
    /// The server's address. Without it: the configured one if a server answers there and no
    /// setting is given here, else a server in this process.
    #[arg(long, value_name = "HOST:PORT")]
    pub connect: Option<String>,
    /// Closed loop: so many requests in progress [default: 8, when there is no --rate].
    #[arg(long, short, value_name = "N", conflicts_with = "rate",
          value_parser = value_parser!(u32).range(1..=65536))]
    pub concurrency: Option<u32>,
    /// Open loop: so many requests a second on average (Poisson).
    #[arg(long, value_name = "R", value_parser = positive)]
    pub rate: Option<f64>,
    /// Prompt lengths in tokens.
    #[arg(long, value_name = "LENGTHS", default_value = "128")]
    pub prompt: String,
    /// Output lengths in tokens.
    #[arg(long, value_name = "LENGTHS", default_value = "64")]
    pub output: String,
    /// Who pays.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub tenant: String,
    /// Priority class: system, interactive, default, bulk.
    #[arg(long, value_name = "CLASS", default_value = "default")]
    pub class: String,
    /// Seconds before anything is measured.
    #[arg(long, value_name = "S", default_value = "2", value_parser = not_negative)]
    pub warm_up: f64,
    /// Seconds that are measured.
    #[arg(long, value_name = "S", default_value = "10", value_parser = positive)]
    pub duration: f64,
    /// Seconds after that to wait for what is in progress.
    #[arg(long, value_name = "S", default_value = "60", value_parser = not_negative)]
    pub grace: f64,
    /// Connections to spread the streams over [default: one for every 64 of --concurrency].
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1024))]
    pub connections: Option<u32>,
    /// The same seed gives the same prompts, lengths and arrivals.
    #[arg(long, value_name = "N", default_value = "1")]
    pub seed: u64,
    /// Target: time to the first token.
    #[arg(long, value_name = "MS", default_value = "1000", value_parser = positive)]
    pub slo_ttft_ms: f64,
    /// Target: a request's mean time between tokens.
    #[arg(long, value_name = "MS", default_value = "100", value_parser = positive)]
    pub slo_itl_ms: f64,
    /// Writes the result as JSON to this file, too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Shows no progress bar.
    #[arg(long, short)]
    pub quiet: bool,
    /// For the server in this process.
    #[command(flatten)]
    pub settings: Settings,
}

const DEMO_HELP: &str = "\
Examples:
  forebay demo --list
  forebay demo collapse
  forebay demo --all               exit code 1 when an effect is absent
";

/// Arguments of `forebay demo`.
#[derive(Args, Debug)]
pub struct Demo {
    /// Which; --list names them.
    #[arg(required_unless_present_any = ["all", "list"], conflicts_with_all = ["all", "list"])]
    pub name: Option<String>,
    /// One after the other: some minutes.
    #[arg(long)]
    pub all: bool,
    /// Names them, and says what each shows.
    #[arg(long)]
    pub list: bool,
    /// For the servers in this process, on both sides.
    #[command(flatten)]
    pub settings: Settings,
}

/// A number of at most a day's seconds, or a hundred thousand a second.
fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..=100_000.0).contains(&number) => Ok(number),
        _ => Err("must be a number from 0 to 100000".into()),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match not_negative(text) {
        Ok(number) if number >= 0.001 => Ok(number),
        _ => Err("must be a number from 0.001 to 100000".into()),
    }
}

impl Settings {
    /// Whether no setting was given on the command line (a configuration file may be).
    pub fn is_empty(&self) -> bool {
        let Settings { config: _, set, model, listen, kv_pool, backend, threads, isa, io } = self;
        let named = [model, listen, kv_pool, backend, threads, isa, io];
        set.is_empty() && named.iter().all(|value| value.is_none())
    }
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
