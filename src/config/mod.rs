//! Settings: where they come from, what they may be, and the one checked [`Config`] they become.
//!
//! A setting is taken from its default, then from the TOML file, then from the environment
//! (`kv.pool_bytes` is `FOREBAY_KV_POOL_BYTES` there), then from the command line; the last one
//! counts. Everything is checked once, and every problem is reported, not only the first.
//!
//! Core: none; used before any core starts. Reads no file and no environment itself: it is handed
//! their contents, so that every case is a plain test.

mod load;
mod model_name;
mod problem;
mod setting;
mod suggest;
mod value;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

pub use load::{Flag, Loaded, TomlFile, describe_settings, load};
pub use model_name::{DEFAULT_MODEL, HubFile, KNOWN_MODELS, KnownModel, ModelName, ModelNameError};
pub use problem::{Origin, Problem, Problems};

use crate::limits::Limits;

/// All settings, checked. Built by [`load`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where clients come in.
    pub server: Server,
    /// What is served.
    pub model: ModelName,
    /// Every bound of the cores.
    pub limits: Limits,
    /// The KV pool.
    pub kv: Kv,
    /// What computes.
    pub compute: Compute,
    /// The CUDA backend.
    pub cuda: Cuda,
    /// How the server ends.
    pub drain: Drain,
    /// Where it is watched from.
    pub metrics: Metrics,
    /// The executors.
    pub runtime: Runtime,
}

/// Where clients come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The native protocol's address; a loopback address, port 0 for any free port.
    pub listen: SocketAddr,
}

/// The KV pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kv {
    /// Its size; `None` asks for [`Kv::automatic_bytes`].
    pub pool_bytes: Option<u64>,
}

impl Kv {
    /// The most that is taken unasked.
    pub const AUTOMATIC_BYTES_MAX: u64 = 2 << 30;

    /// The pool on a machine with `free_bytes` of memory to be had: a quarter of it, so that a
    /// server started without a thought leaves the machine usable, and at most 2 GiB.
    pub fn automatic_bytes(free_bytes: u64) -> u64 {
        (free_bytes / 4).min(Kv::AUTOMATIC_BYTES_MAX)
    }
}

/// What computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compute {
    /// On what the model runs.
    pub backend: Backend,
    /// How many; `None`: one a CPU that this process may use.
    pub threads: Option<usize>,
    /// Which instructions.
    pub isa: Isa,
}

/// On what the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The GPU where there is one that this program can use, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, or a refusal to start.
    Cuda,
}

/// The CUDA backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cuda {
    /// Which device, as the driver counts them.
    pub device: u32,
    /// How much of the device's free memory is taken when [`Kv::pool_bytes`] does not say.
    pub memory_percent: u32,
    /// Whether decode steps are recorded once and started as one.
    pub graphs: Graphs,
}

/// Whether decode steps are recorded once and started as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Graphs {
    /// They are.
    On,
    /// Every kernel is launched by itself: slower; for finding a fault.
    Off,
}

/// Instruction-set path of the CPU backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// The best that the CPU has.
    Auto,
    /// AVX-512 with VNNI.
    Avx512,
    /// AVX2.
    Avx2,
    /// Plain Rust.
    Portable,
}

/// How the server ends once it was told to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Still accepts requests this long, for balancers to notice that it is unready.
    pub delay_ms: u64,
    /// Cancels what is not finished after this long (counted from the end of the delay).
    pub timeout_ms: u64,
}

/// Where the server is watched from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Address of the metrics page; a loopback address, port 0 for any free port. `None`: nowhere.
    pub listen: Option<SocketAddr>,
}

/// Where metrics are read unless told otherwise: OpenTelemetry's port for Prometheus exporters.
pub const METRICS_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9464);

/// The executors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    /// How sockets are driven.
    pub io: Io,
    /// Where the flight recorders are dumped; `None`: to standard error.
    pub recorder_file: Option<PathBuf>,
}

/// How sockets are driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// io_uring where the kernel and its filters allow it, else epoll.
    Auto,
    /// io_uring, or a refusal to start.
    IoUring,
    /// epoll.
    Epoll,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            server: Server { listen: SocketAddr::from(([127, 0, 0, 1], 7070)) },
            model: ModelName::default_model(),
            limits: Limits::default(),
            kv: Kv { pool_bytes: None },
            compute: Compute { backend: Backend::Auto, threads: None, isa: Isa::Auto },
            cuda: Cuda { device: 0, memory_percent: 90, graphs: Graphs::On },
            drain: Drain { delay_ms: 0, timeout_ms: 60_000 },
            metrics: Metrics { listen: Some(METRICS_DEFAULT) },
            runtime: Runtime { io: Io::Auto, recorder_file: None },
        }
    }
}

#[cfg(test)]
mod tests;
