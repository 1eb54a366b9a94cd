//! The model's weights on the device: what is packed from which tensors, where it lies, and the
//! way there.

use crate::device::cuda::memory::{Place, Places};
use crate::device::cuda::pack::{Matrix, Order};
use crate::model::{Gguf, GgufError, ModelConfig, Tensor, quant};

/// A matrix and its place.
#[derive(Clone, Copy, Debug)]
pub struct PlacedMatrix {
    /// Shape and storage.
    pub matrix: Matrix,
    /// Its tiles.
    pub tiles: Place,
    /// Its scales; empty for plain storage.
    pub scales: Place,
}

/// One layer's weights.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// Scale of the norm before attention.
    pub attn_norm: Place,
    /// Queries, keys and values.
    pub qkv: PlacedMatrix,
    /// Attention's output.
    pub o: PlacedMatrix,
    /// Scale of the norm before the feed-forward.
    pub ffn_norm: Place,
    /// The feed-forward's gate and what is gated.
    pub gate_up: PlacedMatrix,
    /// Back to the residual stream's width.
    pub down: PlacedMatrix,
}

/// Where all weights lie, and what they are made from.
pub struct Weights<'a> {
    /// Token embeddings.
    pub embedding: PlacedMatrix,
    /// The output head: the embedding's matrix where they are tied.
    pub head: PlacedMatrix,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// Scale of the last norm.
    pub output_norm: Place,
    places: Places,
    matrices: Vec<(PlacedMatrix, Vec<Tensor<'a>>)>,
    vectors: Vec<(Place, Tensor<'a>)>,
}

impl<'a> Weights<'a> {
    /// Lays out the weights of a model whose configuration was checked.
    ///
    /// # Errors
    /// When a tensor is missing.
    pub fn of(gguf: &'a Gguf, config: &ModelConfig) -> Result<Weights<'a>, GgufError> {
        let mut layout =
            Layout { gguf, places: Places::default(), matrices: vec![], vectors: vec![] };
        let layers = (0..config.layers).map(|layer| layout.layer(layer));
        let layers = layers.collect::<Result<Vec<Layer>, GgufError>>()?;
        let output_norm = layout.vector("output_norm.weight")?;
        let embedding = layout.matrix(&["token_embd.weight"], Order::Plain)?;
        let head = match config.tied_output {
            true => embedding,
            false => layout.matrix(&["output.weight"], Order::Plain)?,
        };
        let Layout { places, matrices, vectors, .. } = layout;
        Ok(Weights { embedding, head, layers, output_norm, places, matrices, vectors })
    }

    /// Bytes they take.
    pub fn bytes(&self) -> usize {
        self.places.bytes()
    }

    /// Packs everything with `threads` threads and hands each piece on with its place.
    ///
    /// # Errors
    /// The first that `put` gives.
    pub fn pack<E>(
        &self,
        threads: usize,
        mut put: impl FnMut(usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for (place, tensor) in &self.vectors {
            let mut values = vec![0.0; tensor.columns()];
            quant::dequantize_row(tensor.dtype, tensor.row(0), &mut values);
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            put(place.at, &bytes)?;
        }
        for (placed, parts) in &self.matrices {
            pack_matrix(placed, parts, threads, &mut put)?;
        }
        Ok(())
    }
}

struct Layout<'a> {
    gguf: &'a Gguf,
    places: Places,
    matrices: Vec<(PlacedMatrix, Vec<Tensor<'a>>)>,
    vectors: Vec<(Place, Tensor<'a>)>,
}

impl<'a> Layout<'a> {
    fn tensor(&self, name: &str) -> Result<Tensor<'a>, GgufError> {
        let missing = || GgufError::MissingTensor { name: name.into(), shape: Vec::new() };
        self.gguf.tensor(name).ok_or_else(missing)
    }

    fn matrix(&mut self, names: &[&str], order: Order) -> Result<PlacedMatrix, GgufError> {
        let parts = names.iter().map(|name| self.tensor(name));
        let parts = parts.collect::<Result<Vec<Tensor<'a>>, GgufError>>()?;
        let matrix = Matrix::of(&parts, order);
        let tiles = self.places.take_bytes(matrix.tile_bytes());
        let scales = self.places.take_bytes(matrix.scale_bytes());
        let placed = PlacedMatrix { matrix, tiles, scales };
        self.matrices.push((placed, parts));
        Ok(placed)
    }

    fn vector(&mut self, name: &str) -> Result<Place, GgufError> {
        let tensor = self.tensor(name)?;
        let place = self.places.take::<f32>(tensor.columns());
        self.vectors.push((place, tensor));
        Ok(place)
    }

    fn layer(&mut self, index: usize) -> Result<Layer, GgufError> {
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        let qkv = [name("attn_q"), name("attn_k"), name("attn_v")];
        let gate_up = [name("ffn_gate"), name("ffn_up")];
        Ok(Layer {
            attn_norm: self.vector(&name("attn_norm"))?,
            qkv: self.matrix(&qkv.each_ref().map(String::as_str), Order::PairedRows)?,
            o: self.matrix(&[&name("attn_output")], Order::Plain)?,
            ffn_norm: self.vector(&name("ffn_norm"))?,
            gate_up: self.matrix(&gate_up.each_ref().map(String::as_str), Order::PairedParts)?,
            down: self.matrix(&[&name("ffn_down")], Order::Plain)?,
        })
    }
}

/// Bytes packed at a time: enough for every thread, and little beside the weights.
const PIECE_BYTES: usize = 32 << 20;

fn pack_matrix<E>(
    placed: &PlacedMatrix,
    parts: &[Tensor<'_>],
    threads: usize,
    put: &mut impl FnMut(usize, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let matrix = &placed.matrix;
    let (band_bytes, scale_bytes) = (matrix.band_bytes(), matrix.band_scale_bytes());
    let bands_at_once = (PIECE_BYTES / band_bytes).clamp(1, matrix.bands());
    for first in (0..matrix.bands()).step_by(bands_at_once) {
        let count = bands_at_once.min(matrix.bands() - first);
        let mut tiles = vec![0; count * band_bytes];
        let mut scales = vec![0; count * scale_bytes];
        let share = count.div_ceil(threads.max(1));
        std::thread::scope(|scope| {
            // Plain storage has no scales: every share of them is empty.
            let mut scales = scales.chunks_mut((share * scale_bytes).max(1));
            for (index, tiles) in tiles.chunks_mut(share * band_bytes).enumerate() {
                let scales = scales.next().unwrap_or_default();
                let first = first + index * share;
                scope.spawn(move || {
                    let mut scales = scales.chunks_mut(scale_bytes.max(1));
                    for (band, tiles) in (first..).zip(tiles.chunks_mut(band_bytes)) {
                        let scales = scales.next().unwrap_or_default();
                        matrix.pack_band(parts, band, tiles, scales);
                    }
                });
            }
        });
        put(placed.tiles.at + first * band_bytes, &tiles)?;
        if scale_bytes > 0 {
            put(placed.scales.at + first * scale_bytes, &scales)?;
        }
    }
    Ok(())
}
