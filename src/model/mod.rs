//! The model as a file: shape, weights, tokenizer, chat template. No arithmetic happens here but
//! what turns stored weights into numbers.
//!
//! Core: loading runs before the cores start; the tokenizer and the template are used by front
//! cores, the token table by the engine.

pub mod config;
pub mod gguf;
pub mod quant;
pub mod rope;
pub mod template;
pub mod tokenizer;
pub mod utf8;

pub use config::{ModelConfig, RopeConfig, WeightKind, WeightSpec};
pub use gguf::{DType, Gguf, GgufError, Tensor};
pub use rope::{Rope, RopeScaling};
pub use template::{ChatTemplate, Message, TemplateError};
pub use tokenizer::{Encoder, Progress, Prompt, Segment, TokenTable, Tokenizer, TokenizerError};
pub use utf8::Utf8Assembler;
