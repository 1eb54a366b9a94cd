//! A server in this process: loads the model, connects the cores, starts the executors.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, mpsc};

use thiserror::Error;

use crate::base::{Instant, TokenTable};
use crate::config::{self, Config, Kv};
use crate::device::cpu::{self, CpuBackend, CpuOptions};
use crate::device::{self, Backend, BackendDescription, DeviceCore};
use crate::engine::ports::{FrontEnds, connect_device, connect_front};
use crate::engine::stats::StatsBoard;
use crate::engine::{self, EngineConfig, EngineCore};
use crate::front::net::{ListenSettings, Net, NetSettings};
use crate::front::{self, FrontCore, FrontLinks, FrontSettings, ModelTokenise};
use crate::limits::Limits;
use crate::message::BLOCK_POSITIONS;
use crate::model::{ChatTemplate, Gguf, GgufError, ModelConfig, Tokenizer};
use crate::ring::Doorbell;
use crate::runtime::{ExecutorHandle, Flavour, Lifecycle, Local, start_executor};

/// Why a server cannot start, or ended on its own.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The model's file cannot be served.
    #[error("{0}")]
    Model(String),
    /// Settings that do not fit the model or each other.
    #[error("{0}")]
    Settings(String),
    /// The machine refuses something.
    #[error("{what}: {error}")]
    Machine {
        /// What was tried.
        what: String,
        /// How the system puts it.
        error: io::Error,
    },
}

impl ServerError {
    fn machine(what: impl Into<String>) -> impl FnOnce(io::Error) -> ServerError {
        move |error| ServerError::Machine { what: what.into(), error }
    }
}

impl From<GgufError> for ServerError {
    fn from(error: GgufError) -> ServerError {
        ServerError::Model(error.to_string())
    }
}

/// A model, ready to be served.
pub struct LoadedModel {
    /// As clients see it.
    pub name: String,
    /// Its shape.
    pub config: ModelConfig,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Conversations to prompts; `None` for a model that never learned to converse.
    pub template: Option<Arc<ChatTemplate>>,
    /// The engine's view of the vocabulary.
    pub tokens: Arc<TokenTable>,
}

impl LoadedModel {
    /// Reads everything but the weights.
    ///
    /// # Errors
    /// When the file's shape, tokenizer or template is unusable.
    pub fn new(name: &str, gguf: &Gguf) -> Result<LoadedModel, ServerError> {
        let unusable = |error: &dyn std::fmt::Display| ServerError::Model(error.to_string());
        let config = gguf.config()?;
        let tokenizer = Tokenizer::from_gguf(gguf).map_err(|e| unusable(&e))?;
        let template = ChatTemplate::from_gguf(gguf, &tokenizer).map_err(|e| unusable(&e))?;
        let table = tokenizer.table();
        let ids = 0..table.len() as u32;
        let tokens = TokenTable::new(ids.map(|id| table.bytes(id)), table.ends_of_text());
        Ok(LoadedModel {
            name: name.to_owned(),
            config,
            tokenizer: Arc::new(tokenizer),
            template: template.map(Arc::new),
            tokens: Arc::new(tokens),
        })
    }
}

/// The bounds and the pool that a configuration comes to with this model on this machine.
pub struct Sizing {
    /// With the context clamped to what the model and the pool hold.
    pub limits: Limits,
    /// Blocks of the KV pool.
    pub kv_blocks: u32,
    /// Compute workers, and the CPU each is pinned to.
    pub worker_cpus: Vec<Option<usize>>,
}

impl Sizing {
    /// Fits `config` to the model.
    ///
    /// # Errors
    /// When the KV pool is too small for a single block of the model.
    pub fn new(config: &Config, model: &ModelConfig) -> Result<Sizing, ServerError> {
        let free = super::machine::free_memory().unwrap_or(Kv::AUTOMATIC_BYTES_MAX);
        let pool_bytes = config.kv.pool_bytes.unwrap_or_else(|| Kv::automatic_bytes(free));
        let block_bytes = cpu::kv_block_bytes(model);
        let kv_blocks = u32::try_from(pool_bytes / block_bytes).unwrap_or(u32::MAX);
        if kv_blocks == 0 {
            let problem = format!(
                "kv.pool_bytes = {pool_bytes}: one block of this model takes {block_bytes} bytes"
            );
            return Err(ServerError::Settings(problem));
        }
        let mut limits = config.limits.clone();
        let pool_positions = u64::from(kv_blocks) * BLOCK_POSITIONS as u64;
        let context = u64::from(limits.context_max).min(model.context as u64).min(pool_positions);
        limits.context_max = context as u32;
        let cpus = core_affinity::get_core_ids().unwrap_or_default();
        let threads = config.compute.threads.unwrap_or(cpus.len()).max(1);
        // More workers than CPUs: pinning would stack them up.
        let is_pinned = threads <= cpus.len();
        let worker_cpus = (0..threads).map(|worker| is_pinned.then(|| cpus[worker].id)).collect();
        Ok(Sizing { limits, kv_blocks, worker_cpus })
    }
}

/// A server that runs. Dropping it leaves it running; see [`Server::drain`] and [`Server::join`].
pub struct Server {
    address: SocketAddr,
    description: BackendDescription,
    life: Arc<Lifecycle>,
    executor: ExecutorHandle<io::Result<()>>,
}

impl Server {
    /// Loads the model at `path` and serves it. Returns when connections are accepted.
    ///
    /// # Errors
    /// See [`ServerError`]; nothing is left running.
    pub fn start(
        config: &Config,
        name: &str,
        path: &Path,
        flavour: Flavour,
    ) -> Result<Server, ServerError> {
        let gguf = Gguf::open(path)?;
        let model = LoadedModel::new(name, &gguf)?;
        let sizing = Sizing::new(config, &model.config)?;
        let device_bell = Doorbell::new();
        let backend = load_backend(config, &gguf, &sizing, &device_bell)?;
        // The weights are in memory of their own now: the file's pages may go.
        drop(gguf);
        Server::start_cores(config, model, sizing, Box::new(backend), device_bell, flavour)
    }

    fn start_cores(
        config: &Config,
        model: LoadedModel,
        sizing: Sizing,
        backend: Box<dyn Backend + Send>,
        device_bell: Arc<Doorbell>,
        flavour: Flavour,
    ) -> Result<Server, ServerError> {
        let Sizing { limits, kv_blocks, .. } = sizing;
        let description = backend.description().clone();
        let (engine_bell, front_bell) = (Doorbell::new(), Doorbell::new());
        let (front_port, front_ends) = connect_front(&limits, &engine_bell, &front_bell);
        let (device_port, device_ends) =
            connect_device(description.depth, &engine_bell, &device_bell);
        let engine_config = EngineConfig {
            limits: limits.clone(),
            kv_blocks,
            vocab: model.config.vocab as u32,
            depth: description.depth,
        };
        let tokens = Arc::clone(&model.tokens);
        let engine = EngineCore::new(engine_config, tokens, vec![front_port], device_port)
            .map_err(|error| ServerError::Settings(error.to_string()))?;
        let board = Arc::new(StatsBoard::default());
        let settings = front_settings(&limits, &model, &board);
        let tokenise = ModelTokenise::new(
            Arc::clone(&model.tokenizer),
            model.template.clone(),
            model.config.vocab as u32,
            limits.context_max,
        );
        let bells = vec![engine_bell.clone(), front_bell.clone(), device_bell.clone()];
        let life = Lifecycle::new(bells);

        let (listening, listened) = mpsc::sync_channel(1);
        let listen = config.server.listen;
        let its_life = Arc::clone(&life);
        let make = move |local: Local| async move {
            let device = DeviceCore::new(
                backend,
                device_ends.steps,
                device_ends.results,
                device_ends.engine_bell,
            );
            local.spawn("device", device::task::run(device, device_bell, local.clone()));
            let (net, address) = open_sockets(flavour, &limits, listen)?;
            // The starter waits for this; if it has gone it does not mind.
            let _ = listening.send(address);
            let links = front_links(front_ends);
            let front = FrontCore::new(settings, Box::new(tokenise), links);
            let front = front::task::run(front, net, front_bell, its_life.clone(), local.clone());
            let engine = engine::task::run(engine, engine_bell, its_life, board, local.clone());
            let (ended, ()) = futures_lite::future::zip(front, engine).await;
            ended
        };
        let executor = start_executor("forebay", None, flavour, make)
            .map_err(ServerError::machine("starting the executor"))?;
        match listened.recv() {
            Ok(address) => Ok(Server { address, description, life, executor }),
            Err(_) => {
                let ended = executor.join().and_then(|ended| ended);
                let error = ended.err().unwrap_or_else(|| io::Error::other("ended at once"));
                Err(ServerError::Machine { what: format!("listening on {listen}"), error })
            }
        }
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What runs the steps.
    pub fn backend(&self) -> &BackendDescription {
        &self.description
    }

    /// How the server is told to end.
    pub fn life(&self) -> &Arc<Lifecycle> {
        &self.life
    }

    /// Lets nothing new in; what is admitted may finish until `until`.
    pub fn drain(&self, until: Instant) {
        self.life.drain(until);
    }

    /// Whether it has ended, by drain or by failure.
    pub fn is_finished(&self) -> bool {
        self.executor.is_finished()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it was not a drain that ended it.
    pub fn join(self) -> Result<(), ServerError> {
        let ended = self.executor.join().and_then(|ended| ended);
        ended.map_err(ServerError::machine("serving"))
    }
}

fn load_backend(
    config: &Config,
    gguf: &Gguf,
    sizing: &Sizing,
    device_bell: &Arc<Doorbell>,
) -> Result<CpuBackend, ServerError> {
    let limits = &sizing.limits;
    let options = CpuOptions {
        cpus: sizing.worker_cpus.clone(),
        kv_blocks: sizing.kv_blocks,
        rows_max: limits.running_max as usize,
        step_tokens_max: limits.step_tokens_max as usize,
        context_max: limits.context_max as usize,
        sampled_rows_max: limits.running_max as usize,
        isa: match config.compute.isa {
            config::Isa::Auto => None,
            config::Isa::Avx512 => Some(cpu::Isa::Avx512),
            config::Isa::Avx2 => Some(cpu::Isa::Avx2),
            config::Isa::Portable => Some(cpu::Isa::Portable),
        },
    };
    let bell = Arc::clone(device_bell);
    CpuBackend::load(gguf, &options, Box::new(move || bell.ring())).map_err(|error| match error {
        cpu::LoadError::Model(error) => error.into(),
        cpu::LoadError::Options(problem) => ServerError::Settings(problem),
        cpu::LoadError::System { what, error } => {
            ServerError::Machine { what: what.to_owned(), error }
        }
    })
}

fn front_settings(limits: &Limits, model: &LoadedModel, board: &Arc<StatsBoard>) -> FrontSettings {
    let mut settings = FrontSettings::new(limits.clone(), &model.name, model.config.vocab as u32);
    let board = Arc::clone(board);
    settings.stats = Some(Arc::new(move |named| named.extend(board.read())));
    settings
}

fn front_links(ends: FrontEnds) -> FrontLinks {
    let FrontEnds { requests, control, events, engine_bell } = ends;
    FrontLinks { requests, control, events, engine_bell }
}

fn open_sockets(
    flavour: Flavour,
    limits: &Limits,
    listen: SocketAddr,
) -> io::Result<(Net, SocketAddr)> {
    let settings =
        NetSettings { connections_max: limits.connections_max, ..NetSettings::default() };
    let mut net = Net::new(flavour, settings)?;
    let (_, address) = net.listen(listen, &ListenSettings::default())?;
    Ok((net, address))
}
