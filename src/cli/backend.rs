//! Which backend runs the model, what it takes, and building it.

use super::server::ServerError;
use crate::config::{self, Config, Kv};
use crate::device::cpu::{self, CpuBackend, CpuOptions};
#[cfg(feature = "cuda")]
use crate::device::cuda::{self, CudaBackend, CudaOptions, driver};
use crate::device::{Backend, BackendDescription};
use crate::message::BLOCK_POSITIONS;
use crate::model::{Gguf, ModelConfig};
use crate::runtime::Probe;

/// How large a backend is made.
pub(super) struct BackendSizes {
    pub kv_blocks: u32,
    pub rows_max: usize,
    pub step_tokens_max: usize,
    pub context_max: usize,
    /// For the CPU: one worker each.
    pub workers: Vec<Option<usize>>,
}

/// Called whenever a step is finished.
pub(super) type OnComplete = Box<dyn Fn() + Send + Sync>;

/// The backend that was chosen, with its device opened.
pub(super) struct Choice {
    kind: Kind,
    /// Why it is no GPU, where one was wanted if possible.
    without_cuda: Option<String>,
}

enum Kind {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(driver::DeviceInfo, driver::Gpu),
}

impl Choice {
    /// Decides, and opens the device.
    ///
    /// # Errors
    /// When a GPU is asked for and cannot be had; says why.
    pub(super) fn new(config: &Config) -> Result<Choice, ServerError> {
        let cpu = |without_cuda| Choice { kind: Kind::Cpu, without_cuda };
        match config.compute.backend {
            config::Backend::Cpu => Ok(cpu(None)),
            config::Backend::Auto => {
                Ok(Choice::cuda(config).unwrap_or_else(|reason| cpu(Some(reason))))
            }
            config::Backend::Cuda => Choice::cuda(config).map_err(|reason| {
                let what = "compute.backend = \"cuda\" cannot be had here";
                ServerError::Device(format!("{what}: {reason}"))
            }),
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(_: &Config) -> Result<Choice, String> {
        Err("this program was built without it (cargo build --features cuda)".into())
    }

    #[cfg(feature = "cuda")]
    fn cuda(config: &Config) -> Result<Choice, String> {
        let devices = driver::devices().map_err(|error| error.to_string())?;
        let (index, count) = (config.cuda.device, devices.len());
        let info = devices.into_iter().nth(index as usize);
        let info = info.ok_or_else(|| format!("cuda.device = {index} of {count} devices"))?;
        let (major, minor) = info.capability;
        if major < 8 {
            let name = &info.name;
            return Err(format!("{name} has compute capability {major}.{minor}; 8.0 is needed"));
        }
        let gpu = driver::Gpu::open(&info).map_err(|error| error.to_string())?;
        Ok(Choice { kind: Kind::Cuda(info, gpu), without_cuda: None })
    }

    /// What is to be known about the choice.
    pub(super) fn notes(&self) -> Vec<String> {
        let why = self.without_cuda.as_ref().map(|reason| format!("no cuda: {reason}"));
        why.into_iter().chain(self.doubt()).collect()
    }

    /// What speaks against relying on the backend.
    pub(super) fn doubt(&self) -> Option<String> {
        match &self.kind {
            Kind::Cpu => None,
            #[cfg(feature = "cuda")]
            Kind::Cuda(info, _) if !cuda::PROVEN.contains(&info.name.as_str()) => Some(format!(
                "the CUDA backend has not been proven on {}: compare answers with --backend cpu",
                info.name
            )),
            #[cfg(feature = "cuda")]
            Kind::Cuda(..) => None,
        }
    }

    /// Blocks of the KV pool: as many as were asked for, else as many as the free memory of
    /// wherever it lies suggests.
    pub(super) fn kv_blocks(
        &self,
        config: &Config,
        #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "sizes a GPU's pool"))]
        gguf: &Gguf,
        model: &ModelConfig,
        probe: &Probe,
    ) -> Result<u32, ServerError> {
        let (pool_bytes, block_bytes) = match &self.kind {
            Kind::Cpu => {
                let automatic = Kv::automatic_bytes(probe.memory.available_bytes);
                (config.kv.pool_bytes.unwrap_or(automatic), cpu::kv_block_bytes(model))
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(_, gpu) => {
                let bytes = match config.kv.pool_bytes {
                    Some(bytes) => bytes,
                    None => automatic_bytes(config, gguf, model, gpu)?,
                };
                (bytes, cuda::kv_block_bytes(model))
            }
        };
        // Places in the pool are counted in 32 bits, by position.
        let most = u64::from(u32::MAX) / BLOCK_POSITIONS as u64;
        Ok((pool_bytes / block_bytes).min(most) as u32)
    }

    /// What the backend would be.
    ///
    /// # Errors
    /// As [`Choice::load`].
    pub(super) fn describe(
        self,
        config: &Config,
        gguf: &Gguf,
        sizes: &BackendSizes,
    ) -> Result<BackendDescription, ServerError> {
        match self.kind {
            // What it takes is known once it is there.
            Kind::Cpu => {
                let backend = load_cpu(config, gguf, sizes, Box::new(|| ()))?;
                Ok(backend.description().clone())
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(info, _) => {
                Ok(cuda::describe(gguf, &cuda_options(config, sizes), path(&info))?)
            }
        }
    }

    /// Builds the backend.
    ///
    /// # Errors
    /// When the model cannot be run there, sizes are out of range, or machine or device refuse
    /// something.
    pub(super) fn load(
        self,
        config: &Config,
        gguf: &Gguf,
        sizes: &BackendSizes,
        on_complete: OnComplete,
    ) -> Result<Box<dyn Backend + Send>, ServerError> {
        match self.kind {
            Kind::Cpu => Ok(Box::new(load_cpu(config, gguf, sizes, on_complete)?)),
            #[cfg(feature = "cuda")]
            Kind::Cuda(info, gpu) => {
                let options = cuda_options(config, sizes);
                Ok(Box::new(CudaBackend::load(gguf, gpu, path(&info), &options, on_complete)?))
            }
        }
    }
}

fn load_cpu(
    config: &Config,
    gguf: &Gguf,
    sizes: &BackendSizes,
    on_complete: OnComplete,
) -> Result<CpuBackend, ServerError> {
    let options = CpuOptions {
        cpus: sizes.workers.clone(),
        kv_blocks: sizes.kv_blocks,
        rows_max: sizes.rows_max,
        step_tokens_max: sizes.step_tokens_max,
        context_max: sizes.context_max,
        sampled_rows_max: sizes.rows_max,
        isa: chosen_isa(config.compute.isa),
    };
    Ok(CpuBackend::load(gguf, &options, on_complete)?)
}

/// The backend's name for a configured path; `None` takes the best.
fn chosen_isa(isa: config::Isa) -> Option<cpu::Isa> {
    match isa {
        config::Isa::Auto => None,
        config::Isa::Avx512 => Some(cpu::Isa::Avx512),
        config::Isa::Avx2 => Some(cpu::Isa::Avx2),
        config::Isa::Portable => Some(cpu::Isa::Portable),
    }
}

impl From<cpu::LoadError> for ServerError {
    fn from(error: cpu::LoadError) -> ServerError {
        match error {
            cpu::LoadError::Model(error) => error.into(),
            cpu::LoadError::Options(problem) => ServerError::Settings(problem),
            cpu::LoadError::System { what, error } => {
                ServerError::Machine { what: what.to_owned(), error }
            }
        }
    }
}

#[cfg(feature = "cuda")]
impl From<cuda::LoadError> for ServerError {
    fn from(error: cuda::LoadError) -> ServerError {
        match error {
            cuda::LoadError::Model(error) => error.into(),
            cuda::LoadError::Options(problem) => ServerError::Settings(problem),
            cuda::LoadError::Driver(error) => ServerError::Device(error.to_string()),
            cuda::LoadError::Thread(error) => {
                ServerError::Machine { what: "starting the device's thread".into(), error }
            }
        }
    }
}

#[cfg(feature = "cuda")]
fn cuda_options(config: &Config, sizes: &BackendSizes) -> CudaOptions {
    CudaOptions {
        kv_blocks: sizes.kv_blocks,
        rows_max: sizes.rows_max,
        step_tokens_max: sizes.step_tokens_max,
        context_max: sizes.context_max,
        sampled_rows_max: sizes.rows_max,
        graphs: config.cuda.graphs == config::Graphs::On,
    }
}

#[cfg(feature = "cuda")]
fn path(info: &driver::DeviceInfo) -> String {
    let (major, minor) = info.capability;
    format!("{}, sm_{major}{minor}", info.name)
}

/// The pool that fits the device beside everything else, within `cuda.memory_percent`.
#[cfg(feature = "cuda")]
fn automatic_bytes(
    config: &Config,
    gguf: &Gguf,
    model: &ModelConfig,
    gpu: &driver::Gpu,
) -> Result<u64, ServerError> {
    let device = |error: driver::DriverError| ServerError::Device(error.to_string());
    gpu.enter().map_err(device)?;
    let free = gpu.free_bytes().map_err(device)?;
    let taken = free / 100 * u64::from(config.cuda.memory_percent);
    // The context may yet turn out shorter: then the workspace is smaller, too.
    let limits = &config.limits;
    let options = CudaOptions {
        kv_blocks: 1,
        rows_max: limits.running_max as usize,
        step_tokens_max: limits.step_tokens_max as usize,
        context_max: (limits.context_max as usize).min(model.context),
        sampled_rows_max: limits.running_max as usize,
        graphs: true,
    };
    let description = cuda::describe(gguf, &options, String::new())?;
    let besides =
        description.weight_bytes + description.workspace_bytes + description.history_bytes;
    taken.checked_sub(besides).ok_or_else(|| {
        let show = crate::limits::show_bytes;
        ServerError::Device(format!(
            "the model takes {} of the GPU's memory, and cuda.memory_percent = {} of what is free \
             are {}",
            show(besides),
            config.cuda.memory_percent,
            show(taken)
        ))
    })
}
