//! The device: runs steps.
//!
//! Core: the device core, and the compute workers a backend owns. The seam is one *step*
//! ([`crate::message::Step`]), never one operation: a backend is free to fuse and order as it
//! likes.

mod contract;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod pump;
pub mod task;

pub use pump::DeviceCore;

use crate::message::Step;

/// What a backend is, for the start-up report and for sizing.
#[derive(Clone, Debug)]
pub struct BackendDescription {
    /// Short name: `cpu`, `cuda`.
    pub name: &'static str,
    /// The instruction-set path or GPU, e.g. `avx512-vnni`.
    pub path: String,
    /// KV blocks in its pool.
    pub kv_blocks: u32,
    /// Bytes of one KV block, all layers.
    pub kv_block_bytes: u64,
    /// Bytes of weights as held in memory.
    pub weight_bytes: u64,
    /// Bytes of step workspace.
    pub workspace_bytes: u64,
    /// Bytes of the slots' penalty histories, where these are taken only as slots use penalties.
    pub history_bytes: u64,
    /// Steps that may be in flight.
    pub depth: usize,
    /// Whether weights, pool and workspace are in memory of a device of its own.
    pub on_device: bool,
    /// What a backend with a device takes of the process's memory.
    pub host_bytes: u64,
}

/// Something that runs steps. Calls come from the device core's task alone; none blocks.
pub trait Backend {
    /// What this is.
    fn description(&self) -> &BackendDescription;

    /// Starts a step. The caller has at most [`BackendDescription::depth`] in flight.
    /// Completion rings the doorbell the backend was built with.
    fn submit(&mut self, step: Box<Step>);

    /// The next finished step, in submission order.
    fn poll(&mut self) -> Option<Box<Step>>;

    /// Runs a step and waits for it: for tests, benchmarks and single generations. Whoever wants
    /// no delay has the backend unpark the calling thread on completion.
    fn run(&mut self, step: Box<Step>) -> Box<Step> {
        self.submit(step);
        loop {
            if let Some(step) = self.poll() {
                return step;
            }
            // The backend's threads are busy with the step; this one has nothing else to do.
            std::thread::park_timeout(std::time::Duration::from_micros(50));
        }
    }
}
