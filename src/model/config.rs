//! A model's shape: what the metadata says, checked against itself and against the tensors.
//!
//! Architecture `llama`: token embedding, layers of (RMS norm, grouped-query attention with
//! rotary positions, RMS norm, SwiGLU), final norm, output head (its own or the embedding's).
//!
//! Core: none; it runs once, before the cores start.

use crate::model::gguf::{DType, Gguf, GgufError, Tensor, required, shown};
use crate::model::rope::{Rope, RopeScaling};
use crate::model::tokenizer::adds_bos;
use crate::request::TokenId;

/// The shape of a model, everything in it within range and consistent.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The model's own name for itself, or its architecture.
    pub name: String,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward's inner layer.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, of queries, keys and values alike; even.
    pub head_dim: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Longest sequence the model was made for, in tokens.
    pub context: usize,
    /// Added to the mean square inside every RMS norm.
    pub norm_eps: f32,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Whether the output head is the embedding matrix.
    pub tied_output: bool,
    /// Beginning-of-text token.
    pub bos: Option<TokenId>,
    /// End-of-text token.
    pub eos: Option<TokenId>,
    /// End-of-turn token, where it is another one.
    pub eot: Option<TokenId>,
    /// Whether text is preceded by `bos`.
    pub add_bos: bool,
}

/// Rotary positions: adjacent pairs (2i, 2i+1) of a head's first `dims` values are rotated by
/// position × frequency i.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Values of a head that are rotated; even, at most `head_dim`.
    pub dims: usize,
    /// How frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// What a weight is for; it decides which storage types are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightKind {
    /// A matrix that multiplies activations, or the embedding: any supported type.
    Matrix,
    /// A norm's scale, or frequency factors: F32, F16 or BF16.
    Vector,
}

/// A weight that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSpec {
    /// Name of the tensor.
    pub name: String,
    /// Shape, contiguous dimension first: `[columns, rows]` of a matrix, `[length]` of a vector.
    pub shape: Vec<usize>,
    /// What it is for.
    pub kind: WeightKind,
}

/// Bounds on a shape. They are far above any model that fits a machine today, and low enough
/// that no product of two overflows and no buffer sized from one is absurd.
const LAYERS_MAX: u64 = 1_024;
const WIDTH_MAX: u64 = 1 << 18;
const HEADS_MAX: u64 = 4_096;
const HEAD_DIM_MAX: u64 = 1_024;
const VOCAB_MAX: usize = 1 << 22;
const CONTEXT_MAX: u64 = 1 << 24;

/// Keys of `llama` files whose presence with another value than this one changes the arithmetic
/// in ways that are not implemented: silently wrong answers are worse than a refusal.
const MUST_BE: &[(&str, f64)] = &[
    ("expert_count", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.sliding_window", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
];

impl Gguf {
    /// The model's shape, with every weight it needs found in the file and in order.
    ///
    /// # Errors
    /// When the architecture is another one, a value is missing or out of range, or a tensor is
    /// missing, misshapen, of an unsupported type or unknown.
    pub fn config(&self) -> Result<ModelConfig, GgufError> {
        let config = ModelConfig::from_metadata(self)?;
        config.check_weights(self)?;
        Ok(config)
    }
}

/// Reads the keys of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// A size from `min` to `max`; `None` when the key is absent.
    fn size(&self, key: &str, min: u64, max: u64) -> Result<Option<usize>, GgufError> {
        let key = self.name(key);
        let Some(size) = self.gguf.unsigned(&key)? else {
            return Ok(None);
        };
        if size < min || size > max {
            return Err(GgufError::out_of_range(key, size, format!("from {min} to {max}")));
        }
        Ok(Some(size as usize))
    }

    fn required_size(&self, key: &str, min: u64, max: u64) -> Result<usize, GgufError> {
        required(&self.name(key), self.size(key, min, max)?)
    }

    /// A size that is either one number or one number a layer, all the same.
    fn uniform_size(&self, key: &str, max: u64) -> Result<Option<usize>, GgufError> {
        let full = self.name(key);
        let Some(crate::model::gguf::Value::Array(array)) = self.gguf.value(&full) else {
            return self.size(key, 1, max);
        };
        let mut sizes = array.scalars().map(|value| value.as_unsigned());
        let first = sizes.next().flatten().filter(|&size| size >= 1 && size <= max);
        match first {
            Some(size) if sizes.all(|other| other == Some(size)) => Ok(Some(size as usize)),
            _ => Err(GgufError::unsupported(
                format!("{full} that differs between layers"),
                format!("one value from 1 to {max} for all layers is"),
            )),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.gguf.float(&self.name(key))
    }
}

impl ModelConfig {
    /// The shape as the metadata and the embedding's shape give it; weights are not looked at.
    ///
    /// # Errors
    /// When the architecture is not `llama`, or a value is missing or out of range.
    pub fn from_metadata(gguf: &Gguf) -> Result<ModelConfig, GgufError> {
        let key = "general.architecture";
        let architecture = required(key, gguf.text(key)?)?;
        if architecture != "llama" {
            return Err(GgufError::unsupported(
                format!("architecture {}", shown(architecture)),
                "architecture \"llama\" is",
            ));
        }
        let keys = Keys { gguf, architecture };
        for &(key, only) in MUST_BE {
            if let Some(found) = keys.number(key)?.filter(|&found| found != only) {
                let what = format!("{} = {found}", keys.name(key));
                return Err(GgufError::unsupported(what, format!("{only} is, or no such key")));
            }
        }
        let hidden = keys.required_size("embedding_length", 1, WIDTH_MAX)?;
        let heads = required(
            &keys.name("attention.head_count"),
            keys.uniform_size("attention.head_count", HEADS_MAX)?,
        )?;
        let kv_heads = keys.uniform_size("attention.head_count_kv", HEADS_MAX)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            let allowed = format!("a divisor of the {heads} query heads");
            return Err(GgufError::out_of_range(
                keys.name("attention.head_count_kv"),
                kv_heads,
                allowed,
            ));
        }
        let head_dim = head_dim(&keys, hidden, heads)?;
        let vocab = vocab(gguf, &keys)?;
        let token = |name: &str| token_id(gguf, &format!("tokenizer.ggml.{name}"), vocab);
        Ok(ModelConfig {
            name: gguf.text("general.name")?.unwrap_or(architecture).to_owned(),
            layers: keys.required_size("block_count", 1, LAYERS_MAX)?,
            hidden,
            ffn: required(
                &keys.name("feed_forward_length"),
                keys.uniform_size("feed_forward_length", WIDTH_MAX)?,
            )?,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context: keys.required_size("context_length", 1, CONTEXT_MAX)?,
            norm_eps: norm_eps(&keys)?,
            rope: rope_config(&keys, gguf, head_dim)?,
            tied_output: gguf.tensor("output.weight").is_none(),
            bos: token("bos_token_id")?,
            eos: token("eos_token_id")?,
            eot: token("eot_token_id")?,
            add_bos: adds_bos(gguf)?,
        })
    }

    /// Query heads that share one key-value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together; values have the same.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Every weight the model needs, in the order a forward pass uses them.
    pub fn weights(&self) -> Vec<WeightSpec> {
        let mut weights = Vec::with_capacity(self.layers * 9 + 4);
        let matrix = |name: String, columns: usize, rows: usize| WeightSpec {
            name,
            shape: vec![columns, rows],
            kind: WeightKind::Matrix,
        };
        let vector = |name: String, len: usize| WeightSpec {
            name,
            shape: vec![len],
            kind: WeightKind::Vector,
        };
        let (query, kv) = (self.query_width(), self.kv_width());
        weights.push(matrix("token_embd.weight".into(), self.hidden, self.vocab));
        if self.rope.scaling == RopeScaling::Llama3 {
            weights.push(vector("rope_freqs.weight".into(), self.rope.dims / 2));
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            weights.push(vector(name("attn_norm"), self.hidden));
            weights.push(matrix(name("attn_q"), self.hidden, query));
            weights.push(matrix(name("attn_k"), self.hidden, kv));
            weights.push(matrix(name("attn_v"), self.hidden, kv));
            weights.push(matrix(name("attn_output"), query, self.hidden));
            weights.push(vector(name("ffn_norm"), self.hidden));
            weights.push(matrix(name("ffn_gate"), self.hidden, self.ffn));
            weights.push(matrix(name("ffn_up"), self.hidden, self.ffn));
            weights.push(matrix(name("ffn_down"), self.ffn, self.hidden));
        }
        weights.push(vector("output_norm.weight".into(), self.hidden));
        if !self.tied_output {
            weights.push(matrix("output.weight".into(), self.hidden, self.vocab));
        }
        weights
    }

    /// Checks that `gguf` has every weight of [`ModelConfig::weights`], in its shape and in a
    /// type that can be run, and no tensor besides.
    ///
    /// # Errors
    /// Names the first weight that is missing, misshapen or unsupported, or the first tensor that
    /// nothing would use: ignoring, say, a bias would give wrong answers silently.
    pub fn check_weights(&self, gguf: &Gguf) -> Result<(), GgufError> {
        let weights = self.weights();
        for weight in &weights {
            let tensor = gguf.tensor(&weight.name).ok_or_else(|| GgufError::MissingTensor {
                name: weight.name.clone(),
                shape: weight.shape.clone(),
            })?;
            weight.check(&tensor)?;
        }
        let is_used = |name: &str| weights.iter().any(|weight| weight.name == name);
        // The counts are equal unless something is unused, so the search is rarely made.
        if gguf.tensors().count() != weights.len()
            && let Some(extra) = gguf.tensors().find(|tensor| !is_used(tensor.name))
        {
            return Err(GgufError::unsupported(
                format!("tensor {}", shown(extra.name)),
                "the model has it and this program would not use it, so answers would be wrong",
            ));
        }
        Ok(())
    }

    /// The rotation of every pair, worked out from the scaling and, for Llama 3's, the factors
    /// in the file.
    ///
    /// # Errors
    /// When the factors are missing, misshapen, or not all finite and positive.
    pub fn rope(&self, gguf: &Gguf) -> Result<Rope, GgufError> {
        Rope::new(self, gguf)
    }
}

impl WeightSpec {
    /// Values of the weight.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    fn check(&self, tensor: &Tensor<'_>) -> Result<(), GgufError> {
        let what = || format!("tensor {:?}", self.name);
        // Some writers keep a trailing dimension of one.
        let trimmed = |shape: &[usize]| {
            let ones = shape.iter().rev().take_while(|&&size| size == 1).count();
            shape[..shape.len() - ones].to_vec()
        };
        if trimmed(tensor.shape) != trimmed(&self.shape) {
            let found = format!("of shape {:?}", tensor.shape);
            let allowed = format!("of shape {:?} by the metadata", self.shape);
            return Err(GgufError::out_of_range(what(), found, allowed));
        }
        if !tensor.dtype.is_supported() {
            let what = format!("type {} of {}", tensor.dtype, what());
            return Err(GgufError::unsupported(what, DType::SUPPORTED));
        }
        if self.kind == WeightKind::Vector && !tensor.dtype.is_plain() {
            let what = format!("type {} of {}", tensor.dtype, what());
            return Err(GgufError::unsupported(what, "F32, F16 and BF16 are for this tensor"));
        }
        Ok(())
    }
}

fn head_dim(keys: &Keys<'_>, hidden: usize, heads: usize) -> Result<usize, GgufError> {
    let key = "attention.key_length";
    let head_dim = match keys.size(key, 2, HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let what = keys.name("embedding_length");
            let allowed = format!("a multiple of the {heads} heads, or {} given", keys.name(key));
            return Err(GgufError::out_of_range(what, hidden, allowed));
        }
    };
    if head_dim < 2 || head_dim % 2 != 0 || head_dim as u64 > HEAD_DIM_MAX {
        let allowed = format!("even, from 2 to {HEAD_DIM_MAX}");
        return Err(GgufError::out_of_range("the width of a head", head_dim, allowed));
    }
    let value = keys.size("attention.value_length", 1, HEAD_DIM_MAX)?.unwrap_or(head_dim);
    if value != head_dim {
        let what = format!("{} = {value}", keys.name("attention.value_length"));
        let allowed = format!("the width of keys, {head_dim}, is");
        return Err(GgufError::unsupported(what, allowed));
    }
    Ok(head_dim)
}

fn vocab(gguf: &Gguf, keys: &Keys<'_>) -> Result<usize, GgufError> {
    let name = "token_embd.weight";
    let embedding = gguf
        .tensor(name)
        .ok_or_else(|| GgufError::MissingTensor { name: name.to_owned(), shape: Vec::new() })?;
    let vocab = embedding.rows();
    if vocab > VOCAB_MAX {
        let max = VOCAB_MAX as u64;
        return Err(GgufError::TooLarge {
            what: format!("rows of {name:?}"),
            found: vocab as u64,
            max,
        });
    }
    let said = [
        (keys.name("vocab_size"), keys.size("vocab_size", 1, VOCAB_MAX as u64)?),
        (
            "the length of tokenizer.ggml.tokens".to_owned(),
            gguf.array("tokenizer.ggml.tokens")?.map(|tokens| tokens.len()),
        ),
    ];
    for (what, found) in said {
        if let Some(found) = found.filter(|&found| found != vocab) {
            let allowed = format!("{vocab}, the rows of {name:?}");
            return Err(GgufError::out_of_range(what, found, allowed));
        }
    }
    Ok(vocab)
}

/// A token id in the metadata, inside the vocabulary.
pub(crate) fn token_id(gguf: &Gguf, key: &str, vocab: usize) -> Result<Option<TokenId>, GgufError> {
    let Some(id) = gguf.unsigned(key)? else {
        return Ok(None);
    };
    // Writers put 2^32 - 1 where there is no such token.
    if id == u64::from(u32::MAX) {
        return Ok(None);
    }
    if id >= vocab as u64 {
        return Err(GgufError::out_of_range(key, id, format!("below the vocabulary's {vocab}")));
    }
    Ok(Some(id as TokenId))
}

fn norm_eps(keys: &Keys<'_>) -> Result<f32, GgufError> {
    let key = "attention.layer_norm_rms_epsilon";
    let eps = required(&keys.name(key), keys.number(key)?)?;
    if !(eps > 0.0 && eps < 1.0) {
        return Err(GgufError::out_of_range(keys.name(key), eps, "above 0 and below 1"));
    }
    Ok(eps as f32)
}

fn rope_config(keys: &Keys<'_>, gguf: &Gguf, head_dim: usize) -> Result<RopeConfig, GgufError> {
    let theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    if !(theta > 1.0 && theta <= 1e12) {
        let what = keys.name("rope.freq_base");
        return Err(GgufError::out_of_range(what, theta, "above 1 and at most 1e12"));
    }
    let dims = keys.size("rope.dimension_count", 2, HEAD_DIM_MAX)?.unwrap_or(head_dim);
    if dims > head_dim || dims % 2 != 0 {
        let what = keys.name("rope.dimension_count");
        let allowed = format!("even and at most the width of a head, {head_dim}");
        return Err(GgufError::out_of_range(what, dims, allowed));
    }
    let scaling = rope_scaling(keys, gguf)?;
    Ok(RopeConfig { theta, dims, scaling })
}

fn rope_scaling(keys: &Keys<'_>, gguf: &Gguf) -> Result<RopeScaling, GgufError> {
    let positive = |key: &str, default: f64| -> Result<f64, GgufError> {
        let value = keys.number(key)?.unwrap_or(default);
        if value > 0.0 && value <= 1e6 {
            return Ok(value);
        }
        Err(GgufError::out_of_range(keys.name(key), value, "above 0 and at most 1e6"))
    };
    // The key's older spelling means linear scaling without naming it.
    let older = positive("rope.scale_linear", 1.0)?;
    let key = keys.name("rope.scaling.type");
    let default = if older == 1.0 { "none" } else { "linear" };
    let kind = gguf.text(&key)?.unwrap_or(default);
    let has_factors = gguf.tensor("rope_freqs.weight").is_some();
    match (kind, has_factors) {
        ("none", true) => Ok(RopeScaling::Llama3),
        ("none", false) => Ok(RopeScaling::None),
        ("linear", false) => {
            Ok(RopeScaling::Linear { factor: positive("rope.scaling.factor", older)? })
        }
        ("yarn", false) => {
            let original = "rope.scaling.original_context_length";
            Ok(RopeScaling::Yarn {
                factor: positive("rope.scaling.factor", older)?,
                original_context: keys.required_size(original, 1, CONTEXT_MAX)?,
                attention_factor: positive("rope.scaling.attn_factor", 1.0)?,
                beta_fast: positive("rope.scaling.yarn_beta_fast", 32.0)?,
                beta_slow: positive("rope.scaling.yarn_beta_slow", 1.0)?,
            })
        }
        ("linear" | "yarn", true) => Err(GgufError::unsupported(
            format!("{key} = {kind:?} together with rope_freqs.weight"),
            "one of the two is",
        )),
        (other, _) => Err(GgufError::unsupported(
            format!("{key} = {}", shown(other)),
            "\"none\", \"linear\", \"yarn\" and rope_freqs.weight (Llama 3) are",
        )),
    }
}
