//! Writes GGUF files for tests: a whole small model of any storage type, or a file that is wrong
//! in one chosen way. Stands on std alone, so unit tests, integration tests and fuzz targets can
//! all include it.

#![allow(dead_code)]

/// A metadata value to write.
#[derive(Clone, Debug)]
pub enum Meta {
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(&'static str),
    String(String),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    /// Type number and bytes, as they are.
    Raw(u32, Vec<u8>),
}

/// Type numbers of the format.
pub const F32: u32 = 0;
pub const F16: u32 = 1;
pub const Q4_0: u32 = 2;
pub const Q4_1: u32 = 3;
pub const Q8_0: u32 = 8;
pub const BF16: u32 = 30;

/// A tensor to write.
#[derive(Clone, Debug)]
pub struct TensorToWrite {
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: u32,
    pub data: Vec<u8>,
    /// Written in place of the right offset.
    pub offset: Option<u64>,
}

/// A GGUF file to write.
#[derive(Clone, Debug)]
pub struct GgufFile {
    pub version: u32,
    pub alignment: u64,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<TensorToWrite>,
}

impl Default for GgufFile {
    fn default() -> GgufFile {
        GgufFile { version: 3, alignment: 32, metadata: Vec::new(), tensors: Vec::new() }
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_meta(out: &mut Vec<u8>, meta: &Meta) {
    let mut tagged = |number: u32, bytes: &[u8]| {
        out.extend(number.to_le_bytes());
        out.extend(bytes);
    };
    match meta {
        Meta::U32(value) => tagged(4, &value.to_le_bytes()),
        Meta::I32(value) => tagged(5, &value.to_le_bytes()),
        Meta::F32(value) => tagged(6, &value.to_le_bytes()),
        Meta::Bool(value) => tagged(7, &[u8::from(*value)]),
        Meta::U64(value) => tagged(10, &value.to_le_bytes()),
        Meta::Raw(number, bytes) => tagged(*number, bytes),
        Meta::Text(text) => {
            tagged(8, &[]);
            put_string(out, text);
        }
        Meta::String(text) => {
            tagged(8, &[]);
            put_string(out, text);
        }
        Meta::Strings(texts) => {
            tagged(9, &8u32.to_le_bytes());
            out.extend((texts.len() as u64).to_le_bytes());
            texts.iter().for_each(|text| put_string(out, text));
        }
        Meta::I32s(values) => {
            tagged(9, &5u32.to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
    }
}

impl GgufFile {
    /// Sets a metadata value, or replaces it.
    pub fn set(&mut self, key: &str, value: Meta) -> &mut GgufFile {
        self.unset(key);
        self.metadata.push((key.to_owned(), value));
        self
    }

    /// Removes a metadata value.
    pub fn unset(&mut self, key: &str) -> &mut GgufFile {
        self.metadata.retain(|(name, _)| name != key);
        self
    }

    /// Adds a tensor, or replaces the one of that name.
    pub fn tensor(&mut self, name: &str, shape: &[u64], dtype: u32, data: Vec<u8>) -> &mut Self {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        let tensor = TensorToWrite { name, shape, dtype, data, offset: None };
        match self.tensors.iter_mut().find(|other| other.name == tensor.name) {
            Some(other) => *other = tensor,
            None => self.tensors.push(tensor),
        }
        self
    }

    /// Adds a tensor of single-precision values, or replaces the one of that name.
    pub fn tensor_f32(&mut self, name: &str, shape: &[u64], values: &[f32]) -> &mut Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, shape, F32, data)
    }

    /// The tensor of that name, to spoil it.
    pub fn tensor_mut(&mut self, name: &str) -> &mut TensorToWrite {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("there is one")
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            put_meta(&mut out, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_string(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.dtype.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset = (offset + tensor.data.len() as u64).next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

/// Numbers from a seed: splitmix64, which needs eight lines and no crate.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `below` - 1.
    pub fn below(&mut self, below: u64) -> u64 {
        self.next_u64() % below
    }

    /// Roughly normal with the given spread: the sum of four uniforms.
    pub fn spread(&mut self, spread: f32) -> f32 {
        let mut uniform = || (self.next_u64() >> 40) as f32 / (1u32 << 24) as f32 - 0.5;
        (uniform() + uniform() + uniform() + uniform()) * 1.732 * spread
    }
}

/// Shape of a model to write.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub layers: u32,
    pub hidden: u32,
    pub ffn: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub vocab: u32,
    pub context: u32,
    pub tied: bool,
}

/// Small, with a group of two query heads a key head.
pub const SMALL: Shape = Shape {
    layers: 2,
    hidden: 32,
    ffn: 64,
    heads: 2,
    kv_heads: 1,
    head_dim: 16,
    vocab: 64,
    context: 512,
    tied: true,
};

/// Single precision to half, for scales of moderate size: the fraction is cut off.
fn half(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let exponent = ((bits >> 23) & 0xff) as i32 - 127 + 15;
    assert!((1..31).contains(&exponent), "{value} is no normal half");
    ((bits >> 16 & 0x8000) as u16 | (exponent as u16) << 10 | (bits >> 13 & 0x3ff) as u16)
        .to_le_bytes()
}

/// `count` random weights of spread `spread`, stored as `dtype`.
pub fn random_weights(numbers: &mut Numbers, dtype: u32, count: usize, spread: f32) -> Vec<u8> {
    let mut out = Vec::new();
    match dtype {
        F32 => (0..count).for_each(|_| out.extend(numbers.spread(spread).to_le_bytes())),
        BF16 => (0..count).for_each(|_| out.extend(&numbers.spread(spread).to_le_bytes()[2..])),
        F16 => (0..count).for_each(|_| {
            let value = numbers.spread(spread);
            out.extend(half(if value.abs() < 1e-4 { 1e-4 } else { value }));
        }),
        Q8_0 | Q4_0 | Q4_1 => (0..count / 32).for_each(|_| {
            // Uniform quants have a spread of range / sqrt(12).
            let range = if dtype == Q8_0 { 256.0 } else { 16.0 };
            let scale = spread * 3.46 / range * (0.75 + numbers.below(128) as f32 / 256.0);
            out.extend(half(scale));
            if dtype == Q4_1 {
                out.extend(half(-7.5 * scale));
            }
            let bytes = if dtype == Q8_0 { 32 } else { 16 };
            (0..bytes).for_each(|_| out.push(numbers.next_u64() as u8));
        }),
        other => panic!("no random weights of type {other}"),
    }
    out
}

/// A whole `llama` model with random weights: matrices of type `matrices`, the embedding (and the
/// untied head) of type `embedding`, norms in single precision. No tokenizer.
pub fn random_model(shape: &Shape, matrices: u32, embedding: u32, seed: u64) -> GgufFile {
    let mut file = GgufFile::default();
    file.set("general.architecture", Meta::Text("llama"));
    file.set("llama.block_count", Meta::U32(shape.layers));
    file.set("llama.context_length", Meta::U32(shape.context));
    file.set("llama.embedding_length", Meta::U32(shape.hidden));
    file.set("llama.feed_forward_length", Meta::U32(shape.ffn));
    file.set("llama.attention.head_count", Meta::U32(shape.heads));
    file.set("llama.attention.head_count_kv", Meta::U32(shape.kv_heads));
    file.set("llama.attention.key_length", Meta::U32(shape.head_dim));
    file.set("llama.attention.value_length", Meta::U32(shape.head_dim));
    file.set("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5));
    file.set("llama.rope.freq_base", Meta::F32(10_000.0));
    file.set("llama.rope.dimension_count", Meta::U32(shape.head_dim));
    file.set("llama.vocab_size", Meta::U32(shape.vocab));
    let mut numbers = Numbers(seed);
    let mut matrix = |file: &mut GgufFile, name: &str, columns: u32, rows: u32, dtype: u32| {
        let spread = 1.0 / (columns as f32).sqrt();
        let data = random_weights(&mut numbers, dtype, (columns * rows) as usize, spread);
        file.tensor(name, &[columns.into(), rows.into()], dtype, data);
    };
    let norm = |file: &mut GgufFile, name: &str| {
        let values: Vec<f32> = (0..shape.hidden).map(|i| 0.75 + (i % 5) as f32 / 8.0).collect();
        file.tensor_f32(name, &[shape.hidden.into()], &values);
    };
    let (query, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    matrix(&mut file, "token_embd.weight", shape.hidden, shape.vocab, embedding);
    for layer in 0..shape.layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        norm(&mut file, &name("attn_norm"));
        matrix(&mut file, &name("attn_q"), shape.hidden, query, matrices);
        matrix(&mut file, &name("attn_k"), shape.hidden, kv, matrices);
        matrix(&mut file, &name("attn_v"), shape.hidden, kv, matrices);
        matrix(&mut file, &name("attn_output"), query, shape.hidden, matrices);
        norm(&mut file, &name("ffn_norm"));
        matrix(&mut file, &name("ffn_gate"), shape.hidden, shape.ffn, matrices);
        matrix(&mut file, &name("ffn_up"), shape.hidden, shape.ffn, matrices);
        matrix(&mut file, &name("ffn_down"), shape.ffn, shape.hidden, matrices);
    }
    norm(&mut file, "output_norm.weight");
    if !shape.tied {
        matrix(&mut file, "output.weight", shape.hidden, shape.vocab, embedding);
    }
    file
}

/// The model that most tests take: [`SMALL`], all in single precision.
pub fn small_model() -> GgufFile {
    random_model(&SMALL, F32, F32, 1)
}

/// [`small_model`] with some metadata set.
pub fn small_model_with(extra: &[(&str, Meta)]) -> GgufFile {
    let mut file = small_model();
    for (key, value) in extra {
        file.set(key, value.clone());
    }
    file
}
