//! The CUDA backend: the model on one GPU, hand-written kernels (`kernels/`).
//!
//! A thread of its own has the device: it checks a plan (`contract`), turns it into the arrays
//! that kernels read (`plan`), uploads them in one copy, starts the step's kernels (`forward`; a
//! recorded graph for decode steps), waits, and hands the results back. The device core only
//! passes steps on and never waits for the driver. All memory is taken at start (`memory`,
//! `weights`).
//!
//! Results of a sequence depend on nothing but its own tokens and parameters (I7): see the rules at
//! the head of `kernels/abi.h`.

mod abi;
pub mod driver;
mod forward;
mod memory;
mod pack;
mod plan;
mod weights;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::device::contract::Bounds;
use crate::device::cuda::driver::{DriverError, Gpu};
use crate::device::cuda::forward::{Forward, Staging};
pub use crate::device::cuda::memory::kv_block_bytes;
use crate::device::cuda::memory::{StepSizes, Workspace};
use crate::device::cuda::pack::TILE_COLUMNS;
use crate::device::cuda::plan::Arrays;
use crate::device::cuda::weights::Weights;
use crate::device::{Backend, BackendDescription};
use crate::message::{Sampled, Step, StepFailure};
use crate::model::{Gguf, GgufError, ModelConfig};
use crate::ring::{Consumer, Doorbell, Producer, ring};

/// How a CUDA backend is built. Everything is allocated by these numbers at start.
#[derive(Clone, Debug)]
pub struct CudaOptions {
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
    /// Whether decode steps are recorded once and started as one.
    pub graphs: bool,
}

impl CudaOptions {
    fn sizes(&self) -> StepSizes {
        StepSizes {
            rows: self.rows_max,
            tokens: self.step_tokens_max,
            sampled: self.sampled_rows_max,
            context: self.context_max,
        }
    }
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
    /// The device or its driver refuses something.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The system refuses a thread.
    #[error("starting the thread of the CUDA device: {0}")]
    Thread(std::io::Error),
}

/// Devices on which every kernel was checked and answers were compared with the CPU backend's, by
/// the driver's names. When and with what result: bench/NOTES.md.
pub const PROVEN: &[&str] = &["NVIDIA H200"];

/// Steps in flight.
const DEPTH: usize = 1;

/// What the driver takes of the process's memory for a context. An allowance, not a measurement.
const DRIVER_BYTES: u64 = 512 << 20;

/// How long the device's thread looks for the next step before it sleeps: about what waking it
/// would take.
const SPIN: Duration = Duration::from_micros(20);

/// What a backend with these options takes of the device, without one.
///
/// # Errors
/// When the model's shape cannot be run, or an option is out of range.
pub fn describe(
    gguf: &Gguf,
    options: &CudaOptions,
    path: String,
) -> Result<BackendDescription, LoadError> {
    let config = gguf.config()?;
    check(&config, options)?;
    let workspace = Workspace::new(&config, &options.sizes());
    Ok(BackendDescription {
        name: "cuda",
        path,
        kv_blocks: options.kv_blocks,
        kv_block_bytes: kv_block_bytes(&config),
        weight_bytes: Weights::of(gguf, &config)?.bytes() as u64,
        workspace_bytes: workspace.bytes as u64,
        history_bytes: 0,
        depth: DEPTH,
        on_device: true,
        host_bytes: workspace.staging_bytes() + DRIVER_BYTES,
    })
}

/// Widths of heads that attention has kernels for.
const HEAD_DIMS: [usize; 3] = [64, 96, 128];
/// Widest row that a norm takes.
const NORM_COLUMNS_MAX: usize = 16_384;

/// Checks a model and options against what kernels can do.
fn check(config: &ModelConfig, options: &CudaOptions) -> Result<(), LoadError> {
    let bad = |text: String| Err(LoadError::Options(text));
    if !HEAD_DIMS.contains(&config.head_dim) || config.group() > pack::TILE_ROWS {
        let (dim, group) = (config.head_dim, config.group());
        return bad(format!(
            "the CUDA backend runs heads of {HEAD_DIMS:?} values, up to 16 query heads a kv head; \
             this model has {dim} and {group}"
        ));
    }
    let widths = [config.hidden, config.query_width(), config.ffn];
    if widths.iter().any(|width| !width.is_multiple_of(TILE_COLUMNS)) {
        return bad(format!("the CUDA backend needs widths in multiples of 32, not {widths:?}"));
    }
    if config.hidden > NORM_COLUMNS_MAX {
        return bad(format!("the CUDA backend runs widths up to {NORM_COLUMNS_MAX}"));
    }
    if options.context_max == 0 || options.context_max > config.context {
        let most = config.context;
        return bad(format!("a context from 1 to the model's {most}, not {}", options.context_max));
    }
    let sizes = [options.rows_max, options.step_tokens_max, options.sampled_rows_max];
    if sizes.iter().any(|&size| size == 0 || size > 1 << 16) || options.kv_blocks == 0 {
        return bad(format!("rows, tokens and samples of a step from 1 to 65536, not {sizes:?}"));
    }
    // Places in the cache are 32-bit numbers.
    if options.kv_blocks > u32::MAX / crate::message::BLOCK_POSITIONS as u32 {
        return bad(format!("{} KV blocks are more than can be counted", options.kv_blocks));
    }
    Ok(())
}

/// Runs steps on a GPU, one at a time.
pub struct CudaBackend {
    forward: Arc<Forward>,
    description: BackendDescription,
    /// To the device's thread, and back. `None` once the backend is being dropped.
    steps: Option<Producer<Box<Step>>>,
    done: Consumer<Box<Step>>,
    bell: Arc<Doorbell>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl CudaBackend {
    /// Loads a model onto a device: the file may be closed afterwards. `on_complete` is called by
    /// the device's thread whenever a step is finished.
    ///
    /// # Errors
    /// When the model cannot be run, an option is out of range, or the device refuses something.
    pub fn load(
        gguf: &Gguf,
        gpu: Gpu,
        path: String,
        options: &CudaOptions,
        on_complete: Box<dyn Fn() + Send + Sync>,
    ) -> Result<CudaBackend, LoadError> {
        let description = describe(gguf, options, path)?;
        let config = gguf.config()?;
        let rope = config.rope(gguf)?;
        let bounds = Bounds {
            vocab: config.vocab,
            kv_blocks: options.kv_blocks,
            rows_max: options.rows_max,
            step_tokens_max: options.step_tokens_max,
            context_max: options.context_max,
            sampled_rows_max: options.sampled_rows_max,
        };
        let arrays = Arrays::new(bounds, config.group());
        let weights = Weights::of(gguf, &config)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        gpu.enter()?;
        let sizes = (options.sizes(), options.kv_blocks);
        let mut forward = Forward::new(gpu, (config, &rope), &weights, sizes, threads)?;
        if options.graphs {
            forward.record_decode_steps()?;
        }
        let staging = forward.staging()?;
        let forward = Arc::new(forward);
        let (steps, to_run) = ring(DEPTH);
        let (finished, done) = ring(DEPTH);
        let bell = Doorbell::new();
        let runner = Runner { forward: forward.clone(), arrays, staging, is_lost: false };
        let work = Work { runner, steps: to_run, finished, bell: bell.clone(), on_complete };
        let thread = std::thread::Builder::new().name("cuda".into()).spawn(move || work.go_on());
        let thread = Some(thread.map_err(LoadError::Thread)?);
        let steps = Some(steps);
        Ok(CudaBackend { forward, description, steps, done, bell, in_flight: 0, thread })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.forward.config()
    }

    /// Logits of a sampled row of the last step, after penalties and bias; `None` while a step
    /// runs.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn logits(&mut self, sampled: usize) -> Option<Result<Vec<f32>, DriverError>> {
        if self.in_flight > 0 {
            return None;
        }
        let mut row = vec![0.0; self.forward.config().vocab];
        let entered = self.forward.gpu().enter();
        let copied = entered.and_then(|()| self.forward.logits(sampled, &mut row));
        Some(copied.map(|()| row))
    }
}

impl Backend for CudaBackend {
    fn description(&self) -> &BackendDescription {
        &self.description
    }

    fn submit(&mut self, step: Box<Step>) {
        assert!(self.in_flight < DEPTH, "one step at a time (the description's depth)");
        self.in_flight += 1;
        let steps = self.steps.as_mut().expect("there until the drop");
        assert!(steps.push(step).is_ok(), "the ring has as many places as steps may be in flight");
        self.bell.ring();
    }

    fn poll(&mut self) -> Option<Box<Step>> {
        let step = self.done.pop()?;
        self.in_flight -= 1;
        Some(step)
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // The thread ends when nobody can give it steps any more.
        self.steps = None;
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has nothing to say here; its steps never came back.
            let _ = thread.join();
        }
    }
}

/// What the device's thread does: one step after the other.
struct Work {
    runner: Runner,
    steps: Consumer<Box<Step>>,
    finished: Producer<Box<Step>>,
    bell: Arc<Doorbell>,
    on_complete: Box<dyn Fn() + Send + Sync>,
}

impl Work {
    fn go_on(mut self) {
        // Without a context every step fails, and says so.
        if let Err(error) = self.runner.forward.gpu().enter() {
            self.runner.lose(&error);
        }
        loop {
            if let Some(mut step) = self.steps.pop() {
                self.runner.run(&mut step);
                // The backend may be gone: the step's memory is then freed here.
                let _ = self.finished.push(step);
                (self.on_complete)();
            } else if self.steps.is_abandoned() {
                return;
            } else {
                let begun = Instant::now();
                while !self.bell.is_rung() && begun.elapsed() < SPIN {
                    std::hint::spin_loop();
                }
                self.bell.wait_thread(None);
            }
        }
    }
}

/// Runs steps; once the device has failed, no more.
struct Runner {
    forward: Arc<Forward>,
    arrays: Arrays,
    staging: Staging,
    is_lost: bool,
}

impl Runner {
    fn run(&mut self, step: &mut Step) {
        let started = Instant::now();
        step.result.clear();
        step.result.failure = self.try_run(step).err();
        if step.result.failure.is_some() {
            step.result.sampled.clear();
            step.result.top.clear();
        }
        step.result.elapsed_ns = started.elapsed().as_nanos() as u64;
    }

    fn try_run(&mut self, step: &mut Step) -> Result<(), StepFailure> {
        if self.is_lost {
            return Err(StepFailure::DeviceLost);
        }
        let sizes = self.arrays.prepare(&step.plan)?;
        let outcome = self.forward.run(&step.plan, &self.arrays, &sizes, &mut self.staging);
        let results = match outcome {
            Ok(results) => results,
            Err(error) => {
                self.lose(&error);
                return Err(StepFailure::DeviceLost);
            }
        };
        let vocab = self.forward.config().vocab;
        let rows = step.plan.rows.iter().filter(|row| row.sample);
        for (row, result) in rows.zip(results) {
            // What a sequence did not ask for is not written, and may be of another.
            let wanted = self.arrays.slots[usize::from(row.slot)].logprobs.saturating_sub(1);
            let top_count = (result.top_count.min(wanted)) as usize;
            let top = result.top_tokens.iter().zip(result.top_logprobs).take(top_count);
            // An id outside the vocabulary would be used as an index by others.
            if result.token as usize >= vocab || top.clone().any(|(&t, _)| t as usize >= vocab) {
                tracing::error!(
                    "the CUDA device gave token {}: it is not used any more",
                    result.token
                );
                self.is_lost = true;
                return Err(StepFailure::DeviceLost);
            }
            step.result.top.extend(top.map(|(&token, logprob)| (token, logprob)));
            let asked = self.arrays.slots[usize::from(row.slot)].logprobs > 0;
            step.result.sampled.push(Sampled {
                seq: row.seq,
                token: result.token,
                logprob: if asked { result.logprob } else { 0.0 },
                top_count: top_count as u8,
            });
        }
        Ok(())
    }

    fn lose(&mut self, error: &DriverError) {
        tracing::error!("the CUDA device is lost: {error}");
        self.is_lost = true;
    }
}
