//! One step on the device: which kernels run, on what, in which order.
#![allow(unsafe_code)]

use crate::device::cpu::memory::Plain;
use crate::device::cuda::abi;
use crate::device::cuda::driver::{Address, Arena, DriverError, Gpu, Graph, Kernel, Pinned};
use crate::device::cuda::memory::{self, GRAPH_TOKENS, Place, StepSizes, Workspace};
use crate::device::cuda::pack::Storage;
use crate::device::cuda::plan::{Arrays, LaunchSizes};
use crate::device::cuda::weights::{Layer, PlacedMatrix, Weights};
use crate::message::StepPlan;
use crate::model::{ModelConfig, Rope};
use crate::request::TokenId;

// SAFETY: words of four and eight bytes in orders that leave no padding; all bytes are values.
unsafe impl Plain for abi::fb_step {}
// SAFETY: as for `fb_step`.
unsafe impl Plain for abi::fb_row {}
// SAFETY: as for `fb_step`.
unsafe impl Plain for abi::fb_slot {}
// SAFETY: as for `fb_step`.
unsafe impl Plain for abi::fb_bias {}
// SAFETY: as for `fb_step`.
unsafe impl Plain for abi::fb_slot_setup {}
// SAFETY: as for `fb_step`.
unsafe impl Plain for abi::fb_query_tile {}
// SAFETY: as for `fb_step`.
unsafe impl Plain for abi::fb_sampled {}

/// Threads of a block, as `abi.h` states them.
const EMBED_THREADS: u32 = 128;
const NORM_THREADS: u32 = 256;
const GEMM_THREADS: u32 = 32 * abi::FB_GEMM_WARPS;
const ATTENTION_THREADS: u32 = 128;
const SAMPLE_THREADS: u32 = 1024;
const COUNT_THREADS: u32 = 256;

/// Dynamic shared memory of a product's block, for tiles of so many tokens.
fn gemm_shared_bytes(storage: Storage, tokens: usize, ksplit: u32) -> u32 {
    // SAFETY: arithmetic on its arguments alone; C only because kernels share it.
    unsafe { abi::fb_gemm_shared_bytes(storage.number(), tokens as u32, ksplit) }
}

/// Dynamic shared memory of a block of attention.
fn attention_shared_bytes(head_dim: usize) -> u32 {
    // SAFETY: as in `gemm_shared_bytes`.
    unsafe { abi::fb_attention_shared_bytes(head_dim as u32) }
}

/// What a product does with its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Epilogue {
    Store,
    Residual,
    Qkv,
    Swiglu,
}

impl Epilogue {
    fn name(self) -> &'static str {
        match self {
            Epilogue::Store => "store",
            Epilogue::Residual => "residual",
            Epilogue::Qkv => "qkv",
            Epilogue::Swiglu => "swiglu",
        }
    }
}

/// Token counts of a product's tiles.
const GEMM_TOKENS: [usize; 4] = [8, 16, 32, 64];

/// One product's kernel in all its widths.
struct Gemm {
    storage: Storage,
    epilogue: Epilogue,
    widths: [Kernel; GEMM_TOKENS.len()],
}

struct Kernels {
    embed: Kernel,
    norm: Kernel,
    gemms: Vec<Gemm>,
    attention: Kernel,
    attention_prefill: Kernel,
    merge: Kernel,
    sample: Kernel,
    count: Kernel,
}

impl Kernels {
    fn load(
        gpu: &Gpu,
        config: &ModelConfig,
        weights: &Weights<'_>,
    ) -> Result<Kernels, DriverError> {
        let mut gemms: Vec<Gemm> = Vec::new();
        let mut need = |matrix: &PlacedMatrix, epilogue: Epilogue| -> Result<(), DriverError> {
            let storage = matrix.matrix.storage;
            if gemms.iter().any(|gemm| gemm.storage == storage && gemm.epilogue == epilogue) {
                return Ok(());
            }
            let load = |tokens: usize| {
                let (kind, epilogue) = (storage.name(), epilogue.name());
                let name = format!("forebay_gemm_{kind}_{epilogue}_{tokens}");
                gpu.kernel(&name, gemm_shared_bytes(storage, tokens, abi::FB_GEMM_WARPS))
            };
            let [a, b, c, d] = GEMM_TOKENS.map(load);
            gemms.push(Gemm { storage, epilogue, widths: [a?, b?, c?, d?] });
            Ok(())
        };
        for layer in &weights.layers {
            need(&layer.qkv, Epilogue::Qkv)?;
            need(&layer.o, Epilogue::Residual)?;
            need(&layer.gate_up, Epilogue::Swiglu)?;
            need(&layer.down, Epilogue::Residual)?;
        }
        need(&weights.head, Epilogue::Store)?;
        let head_dim = config.head_dim;
        let attention = attention_shared_bytes(head_dim);
        Ok(Kernels {
            embed: gpu.kernel("forebay_embed", 0)?,
            norm: gpu.kernel("forebay_rmsnorm", 0)?,
            gemms,
            attention: gpu.kernel(&format!("forebay_attention_{head_dim}"), attention)?,
            attention_prefill: gpu
                .kernel(&format!("forebay_attention_prefill_{head_dim}"), attention)?,
            merge: gpu.kernel(&format!("forebay_attention_merge_{head_dim}"), 0)?,
            sample: gpu.kernel("forebay_sample", 0)?,
            count: gpu.kernel("forebay_count", 0)?,
        })
    }

    fn gemm(&self, matrix: &PlacedMatrix, epilogue: Epilogue, width: usize) -> &Kernel {
        let storage = matrix.matrix.storage;
        let is_it = |gemm: &&Gemm| gemm.storage == storage && gemm.epilogue == epilogue;
        &self.gemms.iter().find(is_it).expect("loaded for every matrix").widths[width]
    }
}

/// Splits that attention's grid is made for, of at most `splits`: enough that some blocks wait for
/// every multiprocessor of a large GPU, and no more, as most sequences have fewer splits and a
/// recorded grid is the same for all. A block goes through the rest by itself.
fn splits_at_once(blocks: usize, splits: usize) -> usize {
    const BLOCKS_WANTED: usize = 4 * 132;
    BLOCKS_WANTED.div_ceil(blocks).clamp(1, splits.max(1))
}

/// The model on a device, with everything a step works on.
pub struct Forward {
    config: ModelConfig,
    sizes: StepSizes,
    embedding: PlacedMatrix,
    head: PlacedMatrix,
    layers: Vec<Layer>,
    output_norm: Place,
    kernels: Kernels,
    graphs: Vec<(usize, Graph)>,
    workspace: Workspace,
    weights: Arena,
    work: Arena,
    kv: Arena,
    /// Last: everything above lives on it.
    gpu: Gpu,
}

/// What a step's host side writes and reads.
pub struct Staging {
    upload: Pinned,
    results: Pinned,
}

impl Forward {
    /// Takes all memory and packs the weights into it.
    ///
    /// # Errors
    /// When the device has too little memory, or refuses something.
    pub fn new(
        gpu: Gpu,
        (config, rope): (ModelConfig, &Rope),
        packed: &Weights<'_>,
        (sizes, kv_blocks): (StepSizes, u32),
        threads: usize,
    ) -> Result<Forward, DriverError> {
        let workspace = Workspace::new(&config, &sizes);
        let kv_bytes = u64::from(kv_blocks) * memory::kv_block_bytes(&config);
        let needed = packed.bytes() as u64 + workspace.bytes as u64 + kv_bytes;
        let free = gpu.free_bytes()?;
        if needed > free {
            return Err(DriverError::is_memory("weights, workspace and KV pool", needed, free));
        }
        let weights = gpu.arena(packed.bytes())?;
        // SAFETY: the arena is as large as the weights' layout, and no kernel runs yet.
        packed.pack(threads, |at, bytes| unsafe {
            gpu.copy_in(weights.at(at, bytes.len()), bytes)
        })?;
        let work = gpu.arena(workspace.bytes)?;
        let mut turns = vec![0.0f32; sizes.context * config.rope.dims];
        rope.turns(&mut turns);
        let bytes: Vec<u8> = turns.iter().flat_map(|turn| turn.to_le_bytes()).collect();
        // SAFETY: the place was laid out for these values, and no kernel runs yet.
        unsafe { gpu.copy_in(work.at(workspace.rope.at, workspace.rope.bytes), &bytes)? };
        Ok(Forward {
            kernels: Kernels::load(&gpu, &config, packed)?,
            config,
            sizes,
            embedding: packed.embedding,
            head: packed.head,
            layers: packed.layers.clone(),
            output_norm: packed.output_norm,
            graphs: Vec::new(),
            workspace,
            weights,
            work,
            kv: gpu.arena(kv_bytes as usize)?,
            gpu,
        })
    }

    /// The device, for its other uses.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Memory of the host for one step.
    ///
    /// # Errors
    /// When the system does not let so much be pinned.
    pub fn staging(&self) -> Result<Staging, DriverError> {
        let upload = self.gpu.pinned(self.workspace.upload.bytes)?;
        Ok(Staging { upload, results: self.gpu.pinned(self.workspace.results.bytes)? })
    }

    /// Records decode steps of every size, so that each starts as one.
    ///
    /// # Errors
    /// When the device refuses something.
    pub fn record_decode_steps(&mut self) -> Result<(), DriverError> {
        let most = memory::padded(self.sizes.rows.min(self.sizes.sampled)).unwrap_or(64);
        for tokens in GRAPH_TOKENS.into_iter().filter(|&tokens| tokens <= most) {
            let splits = memory::splits(self.sizes.context);
            let (tiles, sampled) = (tokens, tokens);
            let is_recorded = true;
            let sizes =
                LaunchSizes { tokens, tiles, prefill_tiles: 0, sampled, splits, is_recorded };
            let graph = self.gpu.record(|| self.queue(&sizes))?;
            self.graphs.push((tokens, graph));
        }
        Ok(())
    }

    /// Runs a step whose arrays were prepared, and waits for it. The results of the sampled rows,
    /// in order.
    ///
    /// # Errors
    /// When the device fails; it is of no use afterwards.
    pub fn run<'a>(
        &self,
        plan: &StepPlan,
        arrays: &Arrays,
        sizes: &LaunchSizes,
        staging: &'a mut Staging,
    ) -> Result<&'a [abi::fb_sampled], DriverError> {
        self.upload(plan, arrays, &mut staging.upload)?;
        if !arrays.setups.is_empty() {
            self.count(arrays.setups.len())?;
        }
        let graph = self.graphs.iter().find(|(tokens, _)| *tokens == sizes.tokens);
        match graph {
            // SAFETY: what was recorded stays inside the arenas for every array that `plan` makes,
            // and one step runs at a time.
            Some((_, graph)) if sizes.is_recorded => unsafe { self.gpu.start(graph)? },
            _ if sizes.tokens > 0 => self.queue(sizes)?,
            _ => {}
        }
        let sampled = arrays.step.sampled as usize;
        let bytes = sampled * size_of::<abi::fb_sampled>();
        let results = self.work(self.workspace.results);
        // SAFETY: there is a result for each sampled row; they are read after the wait.
        unsafe { self.gpu.queue_out(results, &mut staging.results, bytes)? };
        self.gpu.wait()?;
        Ok(staging.results.values(sampled))
    }

    /// Logits of a sampled row of the last step, after penalties and bias.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn logits(&self, sampled: usize, out: &mut [f32]) -> Result<(), DriverError> {
        assert!(sampled < self.sizes.sampled && out.len() == self.config.vocab);
        let at = self.work(self.workspace.logits).plus(sampled * self.config.vocab * 4);
        // SAFETY: the row is inside the place of the logits, and the caller lets no step run.
        unsafe { self.gpu.copy_out(at, out) }
    }

    fn upload(
        &self,
        plan: &StepPlan,
        arrays: &Arrays,
        pinned: &mut Pinned,
    ) -> Result<(), DriverError> {
        let to = &self.workspace.upload;
        pinned.put(to.step.at, &[arrays.step]);
        pinned.put(to.rows.at, &arrays.rows);
        pinned.put(to.slots.at, &arrays.slots);
        pinned.put(to.sampled_rows.at, &arrays.sampled_rows);
        pinned.put(to.sampled_tokens.at, &arrays.sampled_tokens);
        pinned.put(to.setups.at, &arrays.setups);
        pinned.put(to.tiles.at, &arrays.tiles);
        pinned.put(to.prefill_tiles.at, &arrays.prefill_tiles);
        pinned.put(to.token_ids.at, &arrays.token_ids);
        pinned.put(to.token_slots.at, &arrays.token_slots);
        pinned.put(to.positions.at, &arrays.positions);
        pinned.put(to.kv_places.at, &arrays.kv_places);
        pinned.put(to.blocks.at, &plan.blocks);
        self.copy(pinned, 0, to.blocks.at + size_of_val(&plan.blocks[..]))?;
        if !arrays.setups.is_empty() {
            pinned.put(to.history.at, &plan.history);
            self.copy(pinned, to.history.at, size_of_val(&plan.history[..]))?;
        }
        if arrays.has_new_biases {
            pinned.put(to.biases.at, &arrays.biases);
            self.copy(pinned, to.biases.at, to.biases.bytes)?;
        }
        Ok(())
    }

    /// Queues the copy of a part of the upload to its place.
    fn copy(&self, pinned: &Pinned, at: usize, bytes: usize) -> Result<(), DriverError> {
        let to = self.work(self.workspace.uploaded).plus(at);
        assert!(at + bytes <= self.workspace.uploaded.bytes);
        // SAFETY: the part is inside the place (checked). The host's side is written to by the next
        // step alone, after this one was waited for.
        unsafe { self.gpu.queue_in(to, pinned, (at, bytes)) }
    }

    fn work(&self, place: Place) -> Address {
        self.work.at(place.at, place.bytes)
    }

    fn uploaded(&self, place: Place) -> Address {
        self.work(self.workspace.uploaded).plus(place.at)
    }

    fn weight(&self, placed: &PlacedMatrix) -> abi::fb_weight {
        let at = |place: Place| self.weights.at(place.at, place.bytes);
        let has_scales = placed.scales.bytes > 0;
        abi::fb_weight {
            tiles: at(placed.tiles).of(),
            scales: if has_scales { at(placed.scales).of() } else { std::ptr::null() },
            rows: placed.matrix.rows as u32,
            columns: placed.matrix.columns as u32,
            type_: placed.matrix.storage.number(),
            reserved: 0,
        }
    }

    /// Where a count of the step lies: its tokens, or its sampled rows.
    fn counts(&self) -> (Address, Address) {
        let step = self.uploaded(self.workspace.upload.step);
        let field = |at: usize| step.plus(at);
        let tokens = std::mem::offset_of!(abi::fb_step, tokens);
        (field(tokens), field(std::mem::offset_of!(abi::fb_step, sampled)))
    }

    /// Queues all kernels of a step.
    fn queue(&self, sizes: &LaunchSizes) -> Result<(), DriverError> {
        self.embed(sizes)?;
        for (index, layer) in self.layers.iter().enumerate() {
            self.norm(layer.attn_norm, None, sizes.tokens)?;
            self.qkv(index, layer, sizes)?;
            self.attend(index, sizes)?;
            self.residual(&layer.o, self.workspace.attended, sizes)?;
            self.norm(layer.ffn_norm, None, sizes.tokens)?;
            self.swiglu(layer, sizes)?;
            self.residual(&layer.down, self.workspace.inner, sizes)?;
        }
        if sizes.sampled == 0 {
            return Ok(());
        }
        let gather = self.uploaded(self.workspace.upload.sampled_tokens);
        self.norm(self.output_norm, Some(gather), sizes.sampled)?;
        self.logits_of(sizes)?;
        self.sample(sizes)
    }

    fn launch<P: Copy>(
        &self,
        kernel: &Kernel,
        grid: [usize; 3],
        threads: u32,
        parameters: &P,
    ) -> Result<(), DriverError> {
        self.launch_with(kernel, grid, (threads, 0), parameters)
    }

    /// Launches with dynamic shared memory.
    fn launch_with<P: Copy>(
        &self,
        kernel: &Kernel,
        grid: [usize; 3],
        block: (u32, u32),
        parameters: &P,
    ) -> Result<(), DriverError> {
        // SAFETY: this file's callers pass each kernel the struct that `abi.h` gives it, with
        // places laid out for the largest step and a grid made from the step's own sizes, which
        // `Contract` has checked against the same bounds. One step runs at a time.
        unsafe { self.gpu.launch(kernel, grid.map(|size| size as u32), block, parameters) }
    }

    fn embed(&self, sizes: &LaunchSizes) -> Result<(), DriverError> {
        let upload = &self.workspace.upload;
        let parameters = abi::fb_embed {
            table: self.weight(&self.embedding),
            step: self.uploaded(upload.step).of(),
            token_ids: self.uploaded(upload.token_ids).of(),
            token_slots: self.uploaded(upload.token_slots).of(),
            last_tokens: self.work(self.workspace.last_tokens).of(),
            x: self.work(self.workspace.x).of_mut(),
        };
        self.launch(&self.kernels.embed, [sizes.tokens, 1, 1], EMBED_THREADS, &parameters)
    }

    /// Norms all tokens, or the rows that `gather` lists.
    fn norm(&self, weight: Place, gather: Option<Address>, rows: usize) -> Result<(), DriverError> {
        let (tokens, sampled) = self.counts();
        let parameters = abi::fb_rmsnorm {
            x: self.work(self.workspace.x).of(),
            weight: self.weights.at(weight.at, weight.bytes).of(),
            gather: gather.map_or(std::ptr::null(), Address::of),
            y: self.work(self.workspace.normed).of_mut(),
            count: gather.map_or(tokens, |_| sampled).of(),
            columns: self.config.hidden as u32,
            eps: self.config.norm_eps,
        };
        self.launch(&self.kernels.norm, [rows, 1, 1], NORM_THREADS, &parameters)
    }

    /// A product's parameters without those of its epilogue.
    fn product(&self, matrix: &PlacedMatrix, x: Place, count: Address) -> abi::fb_gemm {
        let (rows, columns) = (matrix.matrix.rows as u32, matrix.matrix.columns as u32);
        abi::fb_gemm {
            weight: self.weight(matrix),
            x: self.work(x).of(),
            count: count.of(),
            // SAFETY: arithmetic on its arguments alone; C only because kernels share it.
            ksplit: unsafe { abi::fb_ksplit(rows, columns) },
            ..abi::fb_gemm::default()
        }
    }

    fn multiply(
        &self,
        matrix: &PlacedMatrix,
        epilogue: Epilogue,
        tokens: usize,
        parameters: &abi::fb_gemm,
    ) -> Result<(), DriverError> {
        let width = GEMM_TOKENS.iter().position(|&width| tokens <= width);
        let width = width.unwrap_or(GEMM_TOKENS.len() - 1);
        let (rows, each) = (parameters.weight.rows, GEMM_TOKENS[width]);
        // SAFETY: as in `gemm_shared_bytes`.
        let in_turn = unsafe { abi::fb_gemm_in_turn(rows, tokens as u32, each as u32) };
        let parameters = abi::fb_gemm { in_turn, ..*parameters };
        let sharing = if in_turn != 0 { 1 } else { parameters.ksplit };
        // SAFETY: as in `gemm_shared_bytes`.
        let x = unsafe { abi::fb_gemm_grid_x(rows, sharing) };
        let kernel = self.kernels.gemm(matrix, epilogue, width);
        let shared = gemm_shared_bytes(matrix.matrix.storage, each, sharing);
        let grid = [x as usize, tokens.div_ceil(each), 1];
        self.launch_with(kernel, grid, (GEMM_THREADS, shared), &parameters)
    }

    fn kv_layer(&self, layer: usize) -> Address {
        let bytes = self.kv_layer_bytes();
        self.kv.at(layer * bytes, bytes)
    }

    fn kv_layer_bytes(&self) -> usize {
        self.kv.bytes() / self.config.layers
    }

    fn qkv(&self, index: usize, layer: &Layer, sizes: &LaunchSizes) -> Result<(), DriverError> {
        let upload = &self.workspace.upload;
        let parameters = abi::fb_gemm {
            y16: self.work(self.workspace.queries).of_mut(),
            rope: self.work(self.workspace.rope).of(),
            positions: self.uploaded(upload.positions).of(),
            kv_places: self.uploaded(upload.kv_places).of(),
            kv: self.kv_layer(index).of_mut(),
            heads: self.config.heads as u32,
            kv_heads: self.config.kv_heads as u32,
            head_dim: self.config.head_dim as u32,
            rope_dims: self.config.rope.dims as u32,
            ..self.product(&layer.qkv, self.workspace.normed, self.counts().0)
        };
        self.multiply(&layer.qkv, Epilogue::Qkv, sizes.tokens, &parameters)
    }

    fn attend(&self, index: usize, sizes: &LaunchSizes) -> Result<(), DriverError> {
        let upload = &self.workspace.upload;
        let head_dim = self.config.head_dim as f32;
        let parameters = abi::fb_attention {
            q: self.work(self.workspace.queries).of(),
            kv: self.kv_layer(index).of(),
            rows: self.uploaded(upload.rows).of(),
            blocks: self.uploaded(upload.blocks).of(),
            tiles: std::ptr::null(),
            positions: self.uploaded(upload.positions).of(),
            step: self.uploaded(upload.step).of(),
            partial_o: self.work(self.workspace.partial_o).of_mut(),
            partial_ml: self.work(self.workspace.partial_ml).of_mut(),
            y: self.work(self.workspace.attended).of_mut(),
            heads: self.config.heads as u32,
            kv_heads: self.config.kv_heads as u32,
            splits_max: memory::splits(self.sizes.context) as u32,
            scale_log2: std::f32::consts::LOG2_E / head_dim.sqrt(),
        };
        let block = (ATTENTION_THREADS, attention_shared_bytes(self.config.head_dim));
        let kv_heads = self.config.kv_heads;
        let parts = [
            (&self.kernels.attention, upload.tiles, sizes.tiles),
            (
                &self.kernels.attention_prefill,
                upload.prefill_tiles,
                sizes.prefill_tiles / memory::PREFILL_TILES,
            ),
        ];
        for (kernel, tiles, blocks) in parts.into_iter().filter(|(_, _, blocks)| *blocks > 0) {
            let tiles = self.uploaded(tiles).of();
            let grid = [blocks, kv_heads, splits_at_once(blocks * kv_heads, sizes.splits)];
            let parameters = abi::fb_attention { tiles, ..parameters };
            self.launch_with(kernel, grid, block, &parameters)?;
        }
        let threads = (32 * self.config.heads as u32).min(1024);
        self.launch(&self.kernels.merge, [sizes.tokens, 1, 1], threads, &parameters)
    }

    /// Adds a product to the residual stream.
    fn residual(
        &self,
        matrix: &PlacedMatrix,
        x: Place,
        sizes: &LaunchSizes,
    ) -> Result<(), DriverError> {
        let parameters = abi::fb_gemm {
            y32: self.work(self.workspace.x).of_mut(),
            ..self.product(matrix, x, self.counts().0)
        };
        self.multiply(matrix, Epilogue::Residual, sizes.tokens, &parameters)
    }

    fn swiglu(&self, layer: &Layer, sizes: &LaunchSizes) -> Result<(), DriverError> {
        let parameters = abi::fb_gemm {
            y16: self.work(self.workspace.inner).of_mut(),
            ..self.product(&layer.gate_up, self.workspace.normed, self.counts().0)
        };
        self.multiply(&layer.gate_up, Epilogue::Swiglu, sizes.tokens, &parameters)
    }

    fn logits_of(&self, sizes: &LaunchSizes) -> Result<(), DriverError> {
        let parameters = abi::fb_gemm {
            y32: self.work(self.workspace.logits).of_mut(),
            ..self.product(&self.head, self.workspace.normed, self.counts().1)
        };
        self.multiply(&self.head, Epilogue::Store, sizes.sampled, &parameters)
    }

    fn sample(&self, sizes: &LaunchSizes) -> Result<(), DriverError> {
        let upload = &self.workspace.upload;
        let parameters = abi::fb_sample {
            logits: self.work(self.workspace.logits).of_mut(),
            sampled_rows: self.uploaded(upload.sampled_rows).of(),
            rows: self.uploaded(upload.rows).of(),
            step: self.uploaded(upload.step).of(),
            slots: self.uploaded(upload.slots).of(),
            biases: self.uploaded(upload.biases).of(),
            counts: self.work(self.workspace.counts).of_mut(),
            last_tokens: self.work(self.workspace.last_tokens).of_mut(),
            results: self.work(self.workspace.results).of_mut(),
            vocab: self.config.vocab as TokenId,
            reserved: 0,
        };
        self.launch(&self.kernels.sample, [sizes.sampled, 1, 1], SAMPLE_THREADS, &parameters)
    }

    /// Counts the earlier tokens of slots that change hands.
    fn count(&self, setups: usize) -> Result<(), DriverError> {
        let upload = &self.workspace.upload;
        let parameters = abi::fb_count {
            setups: self.uploaded(upload.setups).of(),
            history: self.uploaded(upload.history).of(),
            counts: self.work(self.workspace.counts).of_mut(),
            vocab: self.config.vocab as u32,
            setups_count: setups as u32,
        };
        self.launch(&self.kernels.count, [setups, 1, 1], COUNT_THREADS, &parameters)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // Memory and graphs are given back on this thread; where that fails the device is gone,
        // and they with it.
        let _ = self.gpu.enter();
    }
}
