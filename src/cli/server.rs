//! A server in this process: loads the model, connects the cores, starts the executors.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use thiserror::Error;

use super::backend::{BackendSizes, Choice};
use super::plan;
use crate::base::{Board, Instant, TokenTable};
use crate::config::{Config, METRICS_DEFAULT};
use crate::device::{self, Backend, BackendDescription, DeviceCore};
use crate::engine::stats::EngineStats;
use crate::engine::{self, EngineConfig, EngineCore};
use crate::front::net::{ListenSettings, Net, NetSettings};
use crate::front::{self, FrontCore, FrontSettings, FrontStats, ModelTokenise};
use crate::limits::{Envelope, Limits, Lowered};
use crate::message::BLOCK_POSITIONS;
use crate::model::{ChatTemplate, Gguf, GgufError, ModelConfig, Tokenizer};
use crate::ports::{DeviceEnds, FrontEnds, connect_device, connect_front};
use crate::ring::Doorbell;
use crate::runtime::metrics::{Door as MetricsDoor, Page};
use crate::runtime::recorder;
use crate::runtime::stall::{Stall, StallWatch};
use crate::runtime::topology::{CoreMap, Role};
use crate::runtime::{ExecutorHandle, Flavour, Lifecycle, Local, Probe, probe, start_executor};

/// An executor that does not come round for this long is reported. Work on it is sliced to about
/// a millisecond; a loaded machine may take it off its CPU for some more.
const STALL: Duration = Duration::from_millis(500);

/// A machine that is overloaded stalls again and again: the flight recorders are dumped for one
/// stall in this time, and only so many of their last events.
const STALL_DUMPS_APART: Duration = Duration::from_secs(60);
const STALL_EVENTS: usize = 500;

/// Why a server cannot start, or ended on its own.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The model's file cannot be served.
    #[error("{0}")]
    Model(String),
    /// Settings that do not fit the model or each other.
    #[error("{0}")]
    Settings(String),
    /// The device that computes cannot be had, or refuses something.
    #[error("{0}")]
    Device(String),
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

/// The bounds, the pool and the cores that a configuration comes to with this model on this
/// machine.
pub struct Sizing {
    /// With the context clamped to what the model and the pool hold.
    pub limits: Limits,
    /// Why the context was clamped, if it was.
    pub lowered: Option<Lowered>,
    /// Blocks of the KV pool.
    pub kv_blocks: u32,
    /// Which role runs where.
    pub map: CoreMap,
}

impl Sizing {
    /// Fits `config` to the model and the machine.
    ///
    /// # Errors
    /// When the KV pool is too small for a single block of the model.
    pub(super) fn new(
        config: &Config,
        gguf: &Gguf,
        model: &ModelConfig,
        choice: &Choice,
        probe: &Probe,
    ) -> Result<Sizing, ServerError> {
        let kv_blocks = choice.kv_blocks(config, gguf, model, probe)?;
        let fitted = config
            .limits
            .fitted(model.context as u64, kv_blocks.into())
            .map_err(|error| ServerError::Settings(error.to_string()))?;
        let map = plan::core_map(config, probe);
        Ok(Sizing { limits: fitted.limits, lowered: fitted.lowered, kv_blocks, map })
    }

    /// What a backend is built with, with a pool of `kv_blocks` blocks.
    fn backend(&self, kv_blocks: u32) -> BackendSizes {
        BackendSizes {
            kv_blocks,
            rows_max: self.limits.running_max as usize,
            step_tokens_max: self.limits.step_tokens_max as usize,
            context_max: self.limits.context_max as usize,
            workers: self.map.workers.clone(),
        }
    }
}

/// What a server would be, without its KV pool in memory.
pub(super) struct Planned {
    pub limits: Limits,
    pub lowered: Option<Lowered>,
    pub map: CoreMap,
    pub envelope: Envelope,
}

/// Loads the model as [`Server::start`] would, but for a pool of one block, to see what it takes.
pub(super) fn plan(config: &Config, path: &Path, probe: &Probe) -> Result<Planned, ServerError> {
    let gguf = Gguf::open(path)?;
    let model = LoadedModel::new("", &gguf)?;
    let choice = Choice::new(config)?;
    let sizing = Sizing::new(config, &gguf, &model.config, &choice, probe)?;
    let description = choice.describe(config, &gguf, &sizing.backend(1))?;
    let envelope = plan::envelope(&sizing, &model, &description, path);
    let Sizing { limits, lowered, map, .. } = sizing;
    Ok(Planned { limits, lowered, map, envelope })
}

/// A server that runs. Dropping it leaves it running; see [`Server::drain`] and [`Server::join`].
pub struct Server {
    address: SocketAddr,
    description: BackendDescription,
    notes: Vec<String>,
    sizing: Sizing,
    envelope: Envelope,
    life: Arc<Lifecycle>,
    executors: Vec<ExecutorHandle<io::Result<()>>>,
    /// Ends with the server.
    metrics: Option<MetricsDoor>,
    /// Ends with the server.
    _watch: Option<StallWatch>,
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
        Server::start_on(config, name, path, flavour, &probe())
    }

    /// As [`Server::start`], on a machine that was probed already.
    ///
    /// # Errors
    /// See [`ServerError`]; nothing is left running.
    pub fn start_on(
        config: &Config,
        name: &str,
        path: &Path,
        flavour: Flavour,
        probe: &Probe,
    ) -> Result<Server, ServerError> {
        let gguf = Gguf::open(path)?;
        let model = LoadedModel::new(name, &gguf)?;
        let choice = Choice::new(config)?;
        let notes = choice.notes();
        let sizing = Sizing::new(config, &gguf, &model.config, &choice, probe)?;
        let page =
            Page { model: name.to_owned(), block_positions: BLOCK_POSITIONS, boards: new_boards() };
        let metrics = open_metrics(config.metrics.listen, METRICS_DEFAULT, &page)?;
        let device_bell = Doorbell::new();
        let bell = Arc::clone(&device_bell);
        let sizes = sizing.backend(sizing.kv_blocks);
        let backend = choice.load(config, &gguf, &sizes, Box::new(move || bell.ring()))?;
        // The weights are in memory of their own now: the file's pages may go.
        drop(gguf);
        let description = backend.description().clone();
        let envelope = plan::envelope(&sizing, &model, &description, path);
        let (parts, life) = Parts::new(&sizing, model, backend, device_bell, &page.boards)?;
        let (listening, listened) = mpsc::sync_channel(1);
        let door = Door { flavour, listen: config.server.listen, listening };
        let executors = start_executors(&sizing.map, parts, door, &life)?;
        let Ok(address) = listened.recv() else {
            return Err(failed_to_listen(config.server.listen, executors, &life));
        };
        let pulses = executors.iter().map(ExecutorHandle::pulse).collect();
        let watch = StallWatch::start(pulses, STALL, report_stalls());
        Ok(Server {
            address,
            description,
            notes,
            sizing,
            envelope,
            life,
            executors,
            metrics,
            // Without it nothing is watched, which is no reason not to serve.
            _watch: watch.ok(),
        })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where its metrics are read, if anywhere.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(MetricsDoor::address)
    }

    /// What runs the steps.
    pub fn backend(&self) -> &BackendDescription {
        &self.description
    }

    /// Why it is that backend, and what is to be known about it.
    pub fn backend_notes(&self) -> &[String] {
        &self.notes
    }

    /// The bounds and the cores in force.
    pub fn sizing(&self) -> &Sizing {
        &self.sizing
    }

    /// How much memory it takes at most.
    pub fn envelope(&self) -> &Envelope {
        &self.envelope
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
        self.executors.iter().all(ExecutorHandle::is_finished)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it was not a drain that ended it.
    pub fn join(self) -> Result<(), ServerError> {
        join_all(self.executors).map_err(ServerError::machine("serving"))
    }
}

/// What the front core and the engine show, in this order.
fn new_boards() -> Vec<Arc<Board>> {
    vec![Arc::new(Board::new::<FrontStats>()), Arc::new(Board::new::<EngineStats>())]
}

/// Opens the door for metrics. That somebody else has the default address is no reason not to
/// serve: it is that of the first server on a machine. One that was asked for must be had.
fn open_metrics(
    listen: Option<SocketAddr>,
    unasked: SocketAddr,
    page: &Page,
) -> Result<Option<MetricsDoor>, ServerError> {
    let Some(listen) = listen else { return Ok(None) };
    match MetricsDoor::open(listen, page.clone()) {
        Ok(door) => Ok(Some(door)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && listen == unasked => {
            tracing::warn!(
                "no metrics: {listen} is in use, by another server perhaps; metrics.listen says \
                 where else, or off"
            );
            Ok(None)
        }
        Err(error) => {
            let what = format!("listening on {listen} for metrics (metrics.listen)");
            Err(ServerError::Machine { what, error })
        }
    }
}

/// Says who holds an executor, and now and then what happened before.
fn report_stalls() -> impl FnMut(&Stall) + Send {
    let mut quiet_until = Instant::ZERO;
    move |stall| {
        let (executor, task, ms) = (stall.executor, stall.task, stall.lasted_ns / 1_000_000);
        tracing::warn!("executor {executor} is held by task {task} for {ms} ms");
        let now = crate::runtime::now();
        if now >= quiet_until {
            quiet_until = now.plus_ns(STALL_DUMPS_APART.as_nanos() as u64);
            recorder::dump("a stall", STALL_EVENTS);
        }
    }
}

/// Waits for all; the first failure counts.
fn join_all(executors: Vec<ExecutorHandle<io::Result<()>>>) -> io::Result<()> {
    let ends: Vec<_> =
        executors.into_iter().map(|executor| executor.join().and_then(|ended| ended)).collect();
    ends.into_iter().collect()
}

/// The front core ended before it listened; the others are told to end, and its reason is found.
fn failed_to_listen(
    listen: SocketAddr,
    executors: Vec<ExecutorHandle<io::Result<()>>>,
    life: &Lifecycle,
) -> ServerError {
    life.drain(crate::runtime::now());
    let error = join_all(executors).err().unwrap_or_else(|| io::Error::other("ended at once"));
    ServerError::Machine { what: format!("listening on {listen}"), error }
}

/// The cores before they are on their executors. Whichever executor has a role takes its part.
struct Parts {
    front: Option<FrontPart>,
    engine: Option<EnginePart>,
    device: Option<DevicePart>,
}

struct FrontPart {
    settings: FrontSettings,
    tokenise: ModelTokenise,
    ends: FrontEnds,
    bell: Arc<Doorbell>,
    board: Arc<Board>,
}

struct EnginePart {
    core: EngineCore,
    bell: Arc<Doorbell>,
    board: Arc<Board>,
}

struct DevicePart {
    backend: Box<dyn Backend + Send>,
    ends: DeviceEnds,
    bell: Arc<Doorbell>,
}

/// Where the front core listens, and whom it tells.
struct Door {
    flavour: Flavour,
    listen: SocketAddr,
    listening: mpsc::SyncSender<SocketAddr>,
}

impl Parts {
    fn new(
        sizing: &Sizing,
        model: LoadedModel,
        backend: Box<dyn Backend + Send>,
        device_bell: Arc<Doorbell>,
        boards: &[Arc<Board>],
    ) -> Result<(Parts, Arc<Lifecycle>), ServerError> {
        let limits = &sizing.limits;
        let depth = backend.description().depth;
        let (engine_bell, front_bell) = (Doorbell::new(), Doorbell::new());
        let (front_port, front_ends) = connect_front(limits, &engine_bell, &front_bell);
        let (device_port, device_ends) = connect_device(depth, &engine_bell, &device_bell);
        let vocab = model.config.vocab as u32;
        let engine_config =
            EngineConfig { limits: limits.clone(), kv_blocks: sizing.kv_blocks, vocab, depth };
        let tokens = Arc::clone(&model.tokens);
        let core = EngineCore::new(engine_config, tokens, vec![front_port], device_port)
            .map_err(|error| ServerError::Settings(error.to_string()))?;
        recorder::register(&core.recorder());
        let [front_board, engine_board] = boards else { panic!("a board for each core") };
        let (front_board, engine_board) = (Arc::clone(front_board), Arc::clone(engine_board));
        let mut settings = FrontSettings::new(limits.clone(), &model.name, vocab);
        settings.stats = Some(Arc::clone(&engine_board));
        let tokenise =
            ModelTokenise::new(model.tokenizer, model.template, vocab, limits.context_max);
        let bells = vec![engine_bell.clone(), front_bell.clone(), device_bell.clone()];
        let parts = Parts {
            front: Some(FrontPart {
                settings,
                tokenise,
                ends: front_ends,
                bell: front_bell,
                board: front_board,
            }),
            engine: Some(EnginePart { core, bell: engine_bell, board: engine_board }),
            device: Some(DevicePart { backend, ends: device_ends, bell: device_bell }),
        };
        Ok((parts, Lifecycle::new(bells)))
    }
}

/// Starts every executor of the map with the parts that belong on it.
fn start_executors(
    map: &CoreMap,
    mut parts: Parts,
    door: Door,
    life: &Arc<Lifecycle>,
) -> Result<Vec<ExecutorHandle<io::Result<()>>>, ServerError> {
    let flavour = door.flavour;
    let mut door = Some(door);
    let mut executors = Vec::new();
    for place in &map.executors {
        let has = |role: Role| place.roles.contains(&role);
        let mut taken = Parts { front: None, engine: None, device: None };
        if has(Role::Front(0)) {
            taken.front = parts.front.take();
        }
        if has(Role::Engine) {
            taken.engine = parts.engine.take();
        }
        if has(Role::Device) {
            taken.device = parts.device.take();
        }
        let door = if taken.front.is_some() { door.take() } else { None };
        let its_life = Arc::clone(life);
        let make = move |local: Local| run_parts(taken, door, its_life, local);
        match start_executor(place.name, place.cpu, flavour, make) {
            Ok(executor) => executors.push(executor),
            Err(error) => {
                // What is started already has lost its partners, and ends when it is told.
                life.drain(crate::runtime::now());
                drop(parts);
                let _ = join_all(executors);
                let what = format!("starting the executor {}", place.name);
                return Err(ServerError::Machine { what, error });
            }
        }
    }
    Ok(executors)
}

/// What one executor does until the server ends.
async fn run_parts(
    parts: Parts,
    door: Option<Door>,
    life: Arc<Lifecycle>,
    local: Local,
) -> io::Result<()> {
    let is_device_alone = parts.engine.is_none() && parts.front.is_none();
    if let Some(DevicePart { backend, ends, bell }) = parts.device {
        let core = DeviceCore::new(backend, ends.steps, ends.results, ends.engine_bell);
        recorder::register(&core.recorder());
        let device = device::task::run(core, bell, local.clone());
        if is_device_alone {
            device.await;
            return Ok(());
        }
        // It ends with its executor, at the latest.
        local.spawn("device", device);
    }
    let engine = async {
        let Some(EnginePart { core, bell, board }) = parts.engine else { return };
        engine::task::run(core, bell, Arc::clone(&life), board, local.clone()).await;
    };
    let front = async {
        let (Some(part), Some(door)) = (parts.front, door) else { return Ok(()) };
        let ended = run_front(part, door, &life, local.clone()).await;
        // Also when it failed: without a front core the others have nothing to wait for.
        life.drain(local.now());
        ended
    };
    let (ended, ()) = futures_lite::future::zip(front, engine).await;
    ended
}

async fn run_front(
    part: FrontPart,
    door: Door,
    life: &Arc<Lifecycle>,
    local: Local,
) -> io::Result<()> {
    let limits = &part.settings.limits;
    let net_settings =
        NetSettings { connections_max: limits.connections_max, ..NetSettings::default() };
    let mut net = Net::new(door.flavour, net_settings)?;
    let listen_settings = ListenSettings {
        receive_buffer_bytes: Some(plan::RECEIVE_BUFFER_BYTES),
        ..ListenSettings::default()
    };
    let (_, address) = net.listen(door.listen, &listen_settings)?;
    // The starter waits for this; if it has gone it does not mind.
    let _ = door.listening.send(address);
    let core = FrontCore::new(part.settings, Box::new(part.tokenise), part.ends);
    recorder::register(&core.recorder());
    front::task::run(core, net, part.bell, Arc::clone(life), part.board, local).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_goes_without_metrics_only_where_nobody_asked_for_that_address() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let other = SocketAddr::from(([127, 0, 0, 1], 1));
        let page = Page { model: String::new(), block_positions: 64, boards: new_boards() };
        assert!(open_metrics(None, address, &page).unwrap().is_none());
        assert!(open_metrics(Some(address), address, &page).unwrap().is_none());
        let error = open_metrics(Some(address), other, &page).expect_err("it is in use");
        let said = error.to_string();
        assert!(said.contains("metrics.listen") && said.contains(&address.to_string()), "{said}");
        drop(taken);
        let door = open_metrics(Some(address), other, &page).unwrap().expect("it is free again");
        assert_eq!(door.address(), address);
    }
}
