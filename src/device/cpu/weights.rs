//! The model's weights in memory: every matrix packed into panels, in the order a step reads them.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::device::cpu::memory::Region;
use crate::device::cpu::pack::Matrix;
use crate::model::{Gguf, GgufError, ModelConfig, Tensor, quant};

/// One layer's weights.
#[derive(Debug)]
pub struct Layer {
    /// Scale of the norm before attention.
    pub attn_norm: Vec<f32>,
    /// Queries.
    pub q: Matrix,
    /// Keys.
    pub k: Matrix,
    /// Values.
    pub v: Matrix,
    /// Attention's output.
    pub o: Matrix,
    /// Scale of the norm before the feed-forward.
    pub ffn_norm: Vec<f32>,
    /// The feed-forward's gate.
    pub gate: Matrix,
    /// What is gated.
    pub up: Matrix,
    /// Back to the residual stream's width.
    pub down: Matrix,
}

/// All weights.
pub struct Weights {
    memory: Region<u8>,
    /// Token embeddings.
    pub embedding: Matrix,
    /// The output head: the embedding's matrix where they are tied.
    pub head: Matrix,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// Scale of the last norm.
    pub output_norm: Vec<f32>,
}

/// Lays matrices out one behind the other and remembers what to pack.
struct Packer<'a> {
    gguf: &'a Gguf,
    end: usize,
    matrices: Vec<(Matrix, Tensor<'a>)>,
}

impl<'a> Packer<'a> {
    fn tensor(&self, name: &str) -> Result<Tensor<'a>, GgufError> {
        let missing = || GgufError::MissingTensor { name: name.into(), shape: Vec::new() };
        self.gguf.tensor(name).ok_or_else(missing)
    }

    fn matrix(&mut self, name: &str) -> Result<Matrix, GgufError> {
        let tensor = self.tensor(name)?;
        let matrix = Matrix::of(&tensor, self.end);
        self.end += matrix.bytes();
        self.matrices.push((matrix, tensor));
        Ok(matrix)
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, GgufError> {
        let tensor = self.tensor(name)?;
        let mut values = vec![0.0; tensor.columns()];
        quant::dequantize_row(tensor.dtype, tensor.row(0), &mut values);
        Ok(values)
    }

    fn layer(&mut self, index: usize) -> Result<Layer, GgufError> {
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        Ok(Layer {
            attn_norm: self.vector(&name("attn_norm"))?,
            q: self.matrix(&name("attn_q"))?,
            k: self.matrix(&name("attn_k"))?,
            v: self.matrix(&name("attn_v"))?,
            o: self.matrix(&name("attn_output"))?,
            ffn_norm: self.vector(&name("ffn_norm"))?,
            gate: self.matrix(&name("ffn_gate"))?,
            up: self.matrix(&name("ffn_up"))?,
            down: self.matrix(&name("ffn_down"))?,
        })
    }
}

/// Why weights could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file lacks what the model needs.
    #[error(transparent)]
    Model(#[from] GgufError),
    /// The system refuses the memory.
    #[error("memory for the weights: {0}")]
    Memory(#[from] io::Error),
}

impl Weights {
    /// Packs all matrices of a model whose configuration was checked, with `threads` threads.
    ///
    /// # Errors
    /// When a tensor is missing, or the system refuses the memory.
    pub fn load(
        gguf: &Gguf,
        config: &ModelConfig,
        threads: usize,
    ) -> Result<Weights, WeightsError> {
        let mut packer = Packer { gguf, end: 0, matrices: Vec::new() };
        let layers = (0..config.layers).map(|layer| packer.layer(layer));
        let layers = layers.collect::<Result<Vec<Layer>, GgufError>>()?;
        let output_norm = packer.vector("output_norm.weight")?;
        let embedding = packer.matrix("token_embd.weight")?;
        let head = if config.tied_output { embedding } else { packer.matrix("output.weight")? };
        let memory = Region::new(packer.end)?;
        pack(&memory, &packer.matrices, threads);
        Ok(Weights { memory, embedding, head, layers, output_norm })
    }

    /// Bytes taken from the system.
    pub fn bytes(&self) -> u64 {
        let vectors = self.layers.iter().map(|l| l.attn_norm.len() + l.ffn_norm.len());
        let vectors = vectors.sum::<usize>() + self.output_norm.len();
        self.memory.mapped_bytes() + vectors as u64 * 4
    }

    /// One packed panel.
    pub fn panel(&self, matrix: &Matrix, panel: usize) -> &[u8] {
        // SAFETY: nothing writes to the weights once `load` has returned.
        unsafe { self.memory.slice(matrix.panel_at(panel), matrix.panel_bytes()) }
    }

    /// A token's embedding.
    pub fn embed(&self, token: usize, out: &mut [f32]) {
        let panel = token / crate::device::cpu::kernels::PANEL_ROWS;
        self.embedding.unpack_row(self.panel(&self.embedding, panel), token, out);
    }
}

/// Panels that a thread packs at a time.
const PANELS_AT_ONCE: usize = 16;

/// Packs every matrix into its place; threads claim runs of panels.
fn pack(memory: &Region<u8>, matrices: &[(Matrix, Tensor<'_>)], threads: usize) {
    let pieces: Vec<(usize, usize)> = matrices
        .iter()
        .enumerate()
        .flat_map(|(index, (matrix, _))| {
            (0..matrix.panels()).step_by(PANELS_AT_ONCE).map(move |first| (index, first))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        // Relaxed: the scope's end orders the results.
        while let Some(&(index, first)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (matrix, tensor) = &matrices[index];
            for panel in first..matrix.panels().min(first + PANELS_AT_ONCE) {
                let at = matrix.panel_at(panel);
                // SAFETY: matrices do not overlap, panels of one neither, and each piece is
                // claimed once: this thread alone has the panel. A slice of slices would need
                // every panel's size to be the same.
                let out = unsafe { memory.slice_mut(at, matrix.panel_bytes()) };
                matrix.pack_panel(tensor, panel, out);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
}
