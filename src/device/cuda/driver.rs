//! The CUDA driver: devices, memory, kernels, streams, graphs. What `cust` has safely is used from
//! there; launches of one parameter struct, capture and graphs are its bindings' raw calls.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cust::context::{Context, CurrentContext};
use cust::device::{Device, DeviceAttribute};
use cust::error::CudaError;
use cust::event::{Event, EventFlags, EventStatus};
use cust::memory::LockedBuffer;
use cust::module::Module;
use cust::stream::{Stream, StreamFlags};
use cust::sys;

use crate::device::cpu::memory::Plain;
use crate::device::cuda::abi;

unsafe extern "C" {
    /// `kernels/driver/load.c`.
    fn forebay_driver_load() -> *const c_char;
}

/// What the driver says when it does not do what it is asked for.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{what}: {reason}")]
pub struct DriverError {
    what: String,
    reason: String,
}

impl DriverError {
    fn new(what: impl Into<String>) -> impl FnOnce(CudaError) -> DriverError {
        move |error| DriverError { what: what.into(), reason: error.to_string() }
    }

    pub(super) fn is_memory(what: &str, bytes: u64, free: u64) -> DriverError {
        let reason = format!("{bytes} bytes are needed and {free} are free on the device");
        DriverError { what: what.to_owned(), reason }
    }
}

fn check(what: &str, result: sys::CUresult) -> Result<(), DriverError> {
    if result == sys::cudaError_enum::CUDA_SUCCESS {
        return Ok(());
    }
    Err(DriverError { what: what.to_owned(), reason: format!("{result:?}") })
}

/// A device that answered.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// As the driver counts.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Compute capability: 9.0 is Hopper.
    pub capability: (u32, u32),
    /// Its memory.
    pub memory_bytes: u64,
}

/// All devices, or why there are none to be had.
///
/// # Errors
/// When there is no driver, it does not start, or it knows no device.
pub fn devices() -> Result<Vec<DeviceInfo>, DriverError> {
    static LOADED: OnceLock<Result<(), DriverError>> = OnceLock::new();
    let load = || {
        // SAFETY: the cell lets one thread in. The text stays, as that function says.
        let error = unsafe {
            let text = forebay_driver_load();
            if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy()) }
        };
        if let Some(error) = error {
            let what = "no CUDA driver".to_owned();
            return Err(DriverError { what, reason: error.into_owned() });
        }
        cust::init(cust::CudaFlags::empty()).map_err(DriverError::new("the CUDA driver"))
    };
    LOADED.get_or_init(load).clone()?;
    let found = Device::devices().map_err(DriverError::new("counting CUDA devices"))?;
    let devices: Result<Vec<DeviceInfo>, CudaError> =
        found.enumerate().map(|(ordinal, device)| describe(ordinal as u32, device?)).collect();
    let devices = devices.map_err(DriverError::new("asking a CUDA device"))?;
    if devices.is_empty() {
        return Err(DriverError {
            what: "CUDA".into(),
            reason: "the driver knows no device".into(),
        });
    }
    Ok(devices)
}

fn describe(ordinal: u32, device: Device) -> Result<DeviceInfo, CudaError> {
    let number = |attribute| device.get_attribute(attribute).map(|number| number as u32);
    Ok(DeviceInfo {
        ordinal,
        name: device.name()?,
        capability: (
            number(DeviceAttribute::ComputeCapabilityMajor)?,
            number(DeviceAttribute::ComputeCapabilityMinor)?,
        ),
        memory_bytes: device.total_memory()? as u64,
    })
}

/// A device in use: its context, the kernels, one stream.
pub struct Gpu {
    stream: Stream,
    done: Event,
    modules: Vec<Module>,
    context: Context,
}

/// Where something lies on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(u64);

impl Address {
    /// So many bytes further.
    pub fn plus(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }

    /// As kernels' parameters have it.
    pub fn of<T>(self) -> *const T {
        self.0 as *const T
    }

    /// As kernels' parameters have it.
    pub fn of_mut<T>(self) -> *mut T {
        self.0 as *mut T
    }
}

/// Memory of the device.
pub struct Arena {
    start: u64,
    bytes: usize,
}

impl Arena {
    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where byte `at` lies, of which `bytes` may be used.
    ///
    /// # Panics
    /// When the range is not inside the arena.
    pub fn at(&self, at: usize, bytes: usize) -> Address {
        let in_range = at.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(in_range, "{at} + {bytes} is outside an arena of {}", self.bytes);
        Address(self.start + at as u64)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated by `Gpu::arena`, freed once. Whoever used it waited for the stream. A
        // failure means that the device is gone, and the memory with it.
        unsafe { sys::cuMemFree_v2(self.start) };
    }
}

/// Memory of the host that the device copies from and to by itself.
pub struct Pinned(LockedBuffer<u8>);

impl Pinned {
    /// Puts values at byte `at`.
    pub fn put<T: Plain>(&mut self, at: usize, values: &[T]) {
        // SAFETY: plain values have no padding, so all their bytes are initialised.
        let bytes = unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values))
        };
        self.0.as_mut_slice()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The first `count` values.
    pub fn values<T: Plain>(&self, count: usize) -> &[T] {
        let bytes = &self.0.as_slice()[..count * size_of::<T>()];
        assert!(bytes.as_ptr().cast::<T>().is_aligned());
        // SAFETY: in range and aligned (checked), and any bytes are a plain value.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<T>(), count) }
    }
}

/// A kernel, loaded.
pub struct Kernel {
    function: sys::CUfunction,
    name: String,
}

// SAFETY: a handle of the driver, valid in the context on any thread; never changed once made.
unsafe impl Send for Kernel {}
// SAFETY: as for Send.
unsafe impl Sync for Kernel {}

/// Launches that were recorded, to be started in one go.
pub struct Graph(sys::CUgraphExec);

// SAFETY: as for `Kernel`.
unsafe impl Send for Graph {}
// SAFETY: launched from one thread at a time: see `Gpu::start`.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `Gpu::record`, destroyed once.
        unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}

/// How long the waiting thread asks again and again before it sleeps: steps of a small model end
/// within that time, and waking a thread takes some tens of microseconds.
const SPIN: Duration = Duration::from_micros(300);

impl Gpu {
    /// Takes a device and loads all kernels onto it.
    ///
    /// # Errors
    /// When the device or the driver refuses, for one because it is too old for the kernels.
    pub fn open(info: &DeviceInfo) -> Result<Gpu, DriverError> {
        let failed = || DriverError::new(format!("opening {}", info.name));
        let device = Device::get_device(info.ordinal).map_err(failed())?;
        let context = Context::new(device).map_err(failed())?;
        let modules = abi::MODULES.iter().map(|(name, binary)| {
            Module::from_fatbin(&binary.bytes, &[])
                .map_err(DriverError::new(format!("loading the kernels {name} onto {}", info.name)))
        });
        let modules = modules.collect::<Result<Vec<Module>, DriverError>>()?;
        let stream = Stream::new(StreamFlags::NON_BLOCKING, None).map_err(failed())?;
        let flags = EventFlags::DISABLE_TIMING | EventFlags::BLOCKING_SYNC;
        let done = Event::new(flags).map_err(failed())?;
        Ok(Gpu { stream, done, modules, context })
    }

    /// Makes this the calling thread's device. Every thread that calls the rest does so first.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn enter(&self) -> Result<(), DriverError> {
        CurrentContext::set_current(&self.context).map_err(DriverError::new("the CUDA context"))
    }

    /// Bytes that are free now.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn free_bytes(&self) -> Result<u64, DriverError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are written to and live; the context is current.
        let result = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        check("free memory of the device", result)?;
        Ok(free as u64)
    }

    /// Takes memory of the device, all zero.
    ///
    /// # Errors
    /// When there is not so much.
    pub fn arena(&self, bytes: usize) -> Result<Arena, DriverError> {
        let mut start = 0;
        // SAFETY: `start` is written to and lives; the context is current.
        let result = unsafe { sys::cuMemAlloc_v2(&mut start, bytes) };
        check(&format!("{bytes} bytes of device memory"), result)?;
        let arena = Arena { start, bytes };
        // SAFETY: the range is the allocation.
        let result = unsafe { sys::cuMemsetD8_v2(start, 0, bytes) };
        check("clearing device memory", result)?;
        Ok(arena)
    }

    /// Takes memory of the host, all zero.
    ///
    /// # Errors
    /// When the system does not let so much be pinned.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned, DriverError> {
        let buffer = LockedBuffer::new(&0u8, bytes);
        buffer.map(Pinned).map_err(DriverError::new(format!("{bytes} bytes of pinned memory")))
    }

    /// Copies to the device and waits.
    ///
    /// # Errors
    /// When the device is gone.
    ///
    /// # Safety
    /// `to` has room for `bytes`, and no kernel uses it meanwhile.
    pub unsafe fn copy_in(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        // SAFETY: the caller's word for the device's side; the host's is a slice.
        let result = unsafe { sys::cuMemcpyHtoD_v2(to.0, bytes.as_ptr().cast(), bytes.len()) };
        check("copying to the device", result)
    }

    /// Copies from the device and waits.
    ///
    /// # Errors
    /// When the device is gone.
    ///
    /// # Safety
    /// `from` has that many values, and no kernel writes to them meanwhile.
    pub unsafe fn copy_out<T: Plain>(
        &self,
        from: Address,
        to: &mut [T],
    ) -> Result<(), DriverError> {
        // SAFETY: the caller's word for the device's side; the host's is a slice of plain values.
        let result =
            unsafe { sys::cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), from.0, size_of_val(to)) };
        check("copying from the device", result)
    }

    /// Queues a copy of the first `bytes` of `from`.
    ///
    /// # Errors
    /// When the device is gone.
    ///
    /// # Safety
    /// `to` has room for them, and `from` is not written to before [`Gpu::wait`] returns.
    pub unsafe fn queue_in(
        &self,
        to: Address,
        from: &Pinned,
        (at, bytes): (usize, usize),
    ) -> Result<(), DriverError> {
        let from = &from.0.as_slice()[at..at + bytes];
        // SAFETY: the caller's word.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), bytes, self.stream.as_inner())
        };
        check("copying to the device", result)
    }

    /// Queues a copy of `bytes` to the start of `to`.
    ///
    /// # Errors
    /// When the device is gone.
    ///
    /// # Safety
    /// `from` has them, and `to` is not looked at before [`Gpu::wait`] returns.
    pub unsafe fn queue_out(
        &self,
        from: Address,
        to: &mut Pinned,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let to = &mut to.0.as_mut_slice()[..bytes];
        // SAFETY: the caller's word.
        let result = unsafe {
            let stream = self.stream.as_inner();
            sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, bytes, stream)
        };
        check("copying from the device", result)
    }

    /// The kernel of this name, with `shared_bytes` of dynamic shared memory at most.
    ///
    /// # Errors
    /// When no module has it, or the device has less shared memory.
    pub fn kernel(&self, name: &str, shared_bytes: u32) -> Result<Kernel, DriverError> {
        use sys::CUfunction_attribute_enum as Attribute;
        let found = self.modules.iter().find_map(|module| module.get_function(name).ok());
        let absent =
            || DriverError { what: format!("the kernel {name}"), reason: "not built".into() };
        let function = found.ok_or_else(absent)?.to_raw();
        // Asking makes the driver load the code now: it may do so at the first launch otherwise,
        // which would fall into the recording of a graph.
        let mut registers = 0;
        // SAFETY: `registers` is written to and lives; the function is one of a loaded module.
        let result = unsafe {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
            sys::cuFuncGetAttribute(&mut registers, attribute, function)
        };
        check(&format!("loading the kernel {name}"), result)?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: as above.
        let result = unsafe { sys::cuFuncSetAttribute(function, attribute, shared_bytes as i32) };
        check(&format!("{shared_bytes} bytes of shared memory for {name}"), result)?;
        Ok(Kernel { function, name: name.to_owned() })
    }

    /// Queues a launch.
    ///
    /// # Errors
    /// When the driver refuses it.
    ///
    /// # Safety
    /// The kernel takes one argument of type `P`, and whatever it does with that within this grid
    /// and `threads` stays inside memory of the device that nobody else uses meanwhile.
    pub unsafe fn launch<P: Copy>(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        (threads, shared): (u32, u32),
        parameters: &P,
    ) -> Result<(), DriverError> {
        let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the argument before it returns; the rest is the caller's word.
        let result = unsafe {
            let [x, y, z] = grid;
            let stream = self.stream.as_inner();
            let arguments = arguments.as_mut_ptr();
            sys::cuLaunchKernel(
                kernel.function,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared,
                stream,
                arguments,
                null_mut(),
            )
        };
        check(&kernel.name, result)
    }

    /// Records what `queue` launches, without running it.
    ///
    /// # Errors
    /// When a launch or the recording fails.
    pub fn record(
        &self,
        queue: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<Graph, DriverError> {
        let stream = self.stream.as_inner();
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours, and nothing is being recorded.
        check("recording a graph", unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })?;
        let queued = queue();
        let mut graph = null_mut();
        // SAFETY: the stream is being recorded; `graph` is written to and lives.
        let ended = unsafe { sys::cuStreamEndCapture(stream, &mut graph) };
        queued?;
        check("recording a graph", ended)?;
        let mut runnable = null_mut();
        // SAFETY: the graph was just recorded, `runnable` is written to. The graph itself is not
        // needed afterwards.
        let result = unsafe {
            let result = sys::cuGraphInstantiateWithFlags(&mut runnable, graph, 0);
            sys::cuGraphDestroy(graph);
            result
        };
        check("preparing a graph", result)?;
        Ok(Graph(runnable))
    }

    /// Queues a recorded graph.
    ///
    /// # Errors
    /// When the driver refuses it.
    ///
    /// # Safety
    /// As for every launch that was recorded.
    pub unsafe fn start(&self, graph: &Graph) -> Result<(), DriverError> {
        // SAFETY: the graph lives; the rest is the caller's word.
        check("starting a graph", unsafe { sys::cuGraphLaunch(graph.0, self.stream.as_inner()) })
    }

    /// Waits for everything queued.
    ///
    /// # Errors
    /// When some of it failed.
    pub fn wait(&self) -> Result<(), DriverError> {
        let failed = || DriverError::new("running a step");
        self.done.record(&self.stream).map_err(failed())?;
        let begun = Instant::now();
        while begun.elapsed() < SPIN {
            if self.done.query().map_err(failed())? == EventStatus::Ready {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.done.synchronize().map_err(failed())
    }
}
