//! The CPU backend: the model on pinned worker threads, hand-written kernels per instruction set.
//!
//! A step goes through stages that all workers share (`forward`): products of packed weights with
//! quantised activations (`kernels`, `pack`, `acts`), attention over the paged cache (`attention`,
//! `kv`), sampling (`sample`). A plan is checked whole before anything is touched (`schedule`).
//! All memory is mapped and backed at start.
//!
//! Results of a sequence depend on nothing but its own tokens and parameters: not on neighbours,
//! chunking, slots or the number of workers (I7). No kernel lets tokens meet, attention runs over
//! absolute blocks, and no sum is split by worker.
#![allow(unsafe_code)]

mod acts;
pub mod attention;
mod forward;
pub mod isa;
pub mod kernels;
pub mod kv;
pub mod logits;
pub mod memory;
pub mod pack;
pub mod rows;
pub mod sample;
mod schedule;
mod weights;
mod workers;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use crate::device::contract::Bounds;
use crate::device::cpu::forward::Forward;
use crate::device::cpu::kernels::Kernels;
use crate::device::cpu::kv::{KvLayout, KvPool};
use crate::device::cpu::memory::Staged;
use crate::device::cpu::weights::{Weights, WeightsError};
use crate::device::cpu::workers::{Job, Lane, Workers};
use crate::device::{Backend, BackendDescription};
use crate::message::{Step, StepFailure};
use crate::model::{Gguf, GgufError, ModelConfig};

pub use crate::device::cpu::isa::Isa;

/// How a CPU backend is built. Everything is allocated by these numbers at start.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// One worker each, pinned to the CPU where one is named.
    pub cpus: Vec<Option<usize>>,
    /// KV blocks in the pool; [`kv_block_bytes`] each.
    pub kv_blocks: u32,
    /// Batch slots, and rows of a step.
    pub rows_max: usize,
    /// Tokens of a step, decode rows and prefill chunks together.
    pub step_tokens_max: usize,
    /// Positions of a sequence; at most the model's context.
    pub context_max: usize,
    /// Rows of a step that sample; each takes a row of logits.
    pub sampled_rows_max: usize,
    /// The instruction-set path; the best this machine has by default.
    pub isa: Option<Isa>,
}

/// Why a backend could not be built.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The model cannot be run.
    #[error(transparent)]
    Model(#[from] GgufError),
    /// An option is out of range.
    #[error("{0}")]
    Options(String),
    /// The system refuses memory or threads.
    #[error("{what}: {error}")]
    System {
        /// For what.
        what: &'static str,
        /// How the system puts it.
        error: io::Error,
    },
}

impl LoadError {
    fn system(what: &'static str) -> impl FnOnce(io::Error) -> LoadError {
        move |error| LoadError::System { what, error }
    }
}

impl From<WeightsError> for LoadError {
    fn from(error: WeightsError) -> LoadError {
        match error {
            WeightsError::Model(error) => LoadError::Model(error),
            WeightsError::Memory(error) => LoadError::system("memory for the weights")(error),
        }
    }
}

/// Bytes of one KV block of a model, all layers.
pub fn kv_block_bytes(config: &ModelConfig) -> u64 {
    KvLayout::new(config.layers, config.kv_heads, config.head_dim).block_bytes()
}

/// No step is there: `submit` may put one in.
const IDLE: u8 = 0;
/// The workers have the step.
const RUNNING: u8 = 1;
/// The step is finished: `poll` may take it.
const DONE: u8 = 2;

/// What the backend and its workers share.
struct Shared {
    forward: Forward,
    /// Belongs to whom `state` says.
    step: Staged<Option<Box<Step>>>,
    state: AtomicU8,
    started: Staged<Instant>,
    on_complete: Box<dyn Fn() + Send + Sync>,
}

impl Job for Shared {
    fn run(&self, lane: &Lane<'_>) {
        // SAFETY: while a job runs, `state` is RUNNING and the workers alone have everything.
        unsafe { self.forward.run(lane, &self.step) };
    }

    fn finish(&self, broken: bool) {
        // SAFETY: the last worker out is alone, and `state` is still RUNNING.
        unsafe {
            let step = self.step.get_mut().as_mut().expect("a step was begun");
            if broken {
                step.result.clear();
                step.result.failure = Some(StepFailure::DeviceLost);
            }
            step.result.elapsed_ns = self.started.get().elapsed().as_nanos() as u64;
        }
        // Release: pairs with `poll`'s Acquire; the step is whole before it is seen.
        self.state.store(DONE, Ordering::Release);
        (self.on_complete)();
    }
}

/// Runs steps on the CPU, one at a time.
pub struct CpuBackend {
    shared: Arc<Shared>,
    workers: Workers,
    description: BackendDescription,
}

impl CpuBackend {
    /// Loads a model: weights are repacked into memory of their own, so the file may be closed
    /// afterwards. `on_complete` is called by a worker whenever a step is finished.
    ///
    /// # Errors
    /// When the model cannot be run, an option is out of range, or the system refuses memory or
    /// threads.
    pub fn load(
        gguf: &Gguf,
        options: &CpuOptions,
        on_complete: Box<dyn Fn() + Send + Sync>,
    ) -> Result<CpuBackend, LoadError> {
        let config = gguf.config()?;
        let rope = config.rope(gguf)?;
        let kernels = check(&config, options)?;
        let lanes = options.cpus.len();
        let weights = Weights::load(gguf, &config, lanes)?;
        let layout = KvLayout::new(config.layers, config.kv_heads, config.head_dim);
        let kv = KvPool::new(layout, options.kv_blocks);
        let kv = kv.map_err(LoadError::system("memory for the KV cache"))?;
        let bounds = Bounds {
            vocab: config.vocab,
            kv_blocks: options.kv_blocks,
            rows_max: options.rows_max,
            step_tokens_max: options.step_tokens_max,
            context_max: options.context_max,
            sampled_rows_max: options.sampled_rows_max,
        };
        let forward = Forward::new(kernels, (config, &rope), weights, kv, bounds, lanes);
        let forward = forward.map_err(LoadError::system("memory for steps"))?;
        let description = BackendDescription {
            name: "cpu",
            path: kernels.isa().name().to_owned(),
            kv_blocks: options.kv_blocks,
            kv_block_bytes: layout.block_bytes(),
            weight_bytes: forward.weight_bytes(),
            workspace_bytes: forward.workspace_bytes(),
            history_bytes: forward.history_bytes(),
            depth: 1,
            on_device: false,
            host_bytes: 0,
        };
        let shared = Arc::new(Shared {
            forward,
            step: Staged::new(None),
            state: AtomicU8::new(IDLE),
            started: Staged::new(Instant::now()),
            on_complete,
        });
        back_kv_pool(&shared).map_err(LoadError::system("starting a thread"))?;
        let workers = Workers::start(&options.cpus, shared.clone());
        let workers = workers.map_err(LoadError::system("starting the compute workers"))?;
        Ok(CpuBackend { shared, workers, description })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.shared.forward.config()
    }

    /// Logits of a sampled row of the last step, after penalties and bias; `None` while a step
    /// runs.
    pub fn logits(&mut self, sampled: usize) -> Option<&[f32]> {
        if self.shared.state.load(Ordering::Acquire) != IDLE {
            return None;
        }
        // SAFETY: no step runs, and none can begin while `self` is borrowed.
        Some(unsafe { self.shared.forward.logits(sampled) })
    }
}

/// Has the KV pool backed with memory on a thread of its own, so that a server need not wait for
/// it: the kernel clears some gigabyte a second. The thread ends with the backend.
fn back_kv_pool(shared: &Arc<Shared>) -> io::Result<()> {
    let shared = Arc::downgrade(shared);
    let back = move || {
        let mut next = Some(0);
        while let (Some(from_byte), Some(shared)) = (next, shared.upgrade()) {
            next = shared.forward.kv().back(from_byte);
        }
    };
    std::thread::Builder::new().name("kv-pool".into()).spawn(back).map(drop)
}

/// Checks options against the model and the machine.
fn check(config: &ModelConfig, options: &CpuOptions) -> Result<&'static Kernels, LoadError> {
    let isa = options.isa.unwrap_or_else(Isa::best);
    let bad = |text: String| Err(LoadError::Options(text));
    if options.cpus.is_empty() || options.cpus.len() > 1024 {
        return bad(format!("from 1 to 1024 workers, not {}", options.cpus.len()));
    }
    if options.context_max == 0 || options.context_max > config.context {
        let most = config.context;
        return bad(format!("a context from 1 to the model's {most}, not {}", options.context_max));
    }
    let sizes = [options.rows_max, options.step_tokens_max, options.sampled_rows_max];
    if sizes.iter().any(|&size| size == 0 || size > 1 << 16) {
        return bad(format!("rows, tokens and samples of a step from 1 to 65536, not {sizes:?}"));
    }
    let Some(kernels) = Kernels::of(isa) else {
        return bad(format!("this machine does not have {isa}"));
    };
    Ok(kernels)
}

impl Backend for CpuBackend {
    fn description(&self) -> &BackendDescription {
        &self.description
    }

    fn submit(&mut self, step: Box<Step>) {
        // Acquire: pairs with `finish`'s Release, though `poll` has seen it before.
        let state = self.shared.state.load(Ordering::Acquire);
        assert_eq!(state, IDLE, "one step at a time (the description's depth)");
        // SAFETY: in state IDLE the backend alone has these, and `&mut self` is alone.
        unsafe {
            *self.shared.step.get_mut() = Some(step);
            *self.shared.started.get_mut() = Instant::now();
        }
        // Relaxed: the workers learn of the job through `begin`, which publishes all of this.
        self.shared.state.store(RUNNING, Ordering::Relaxed);
        self.workers.begin();
    }

    fn poll(&mut self) -> Option<Box<Step>> {
        // Acquire: pairs with `finish`'s Release.
        if self.shared.state.load(Ordering::Acquire) != DONE {
            return None;
        }
        self.shared.state.store(IDLE, Ordering::Relaxed);
        // SAFETY: in state DONE, and now IDLE, the backend alone has the step.
        unsafe { self.shared.step.get_mut() }.take()
    }
}
