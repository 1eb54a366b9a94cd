//! The GGUF file format, versions 2 and 3, little-endian: metadata and tensors, read in place.
//!
//! The file is mapped, not read: weights are repacked into memory of their own while loading and
//! the mapping is dropped afterwards. Whatever the file claims (a length, a count, an offset) is
//! checked against the bytes that are there before it is used, so a truncated or hostile file
//! ends in one [`GgufError`] that says what is wrong. Nothing is allocated from a claimed size.
//!
//! Core: none; it runs once, before the cores start.

// Mapping a file is `unsafe` in `memmap2`; it is the one unsafe call of this module.
#![allow(unsafe_code)]

mod cursor;
mod dtype;
mod error;
mod layout;
mod value;

#[cfg(test)]
#[path = "../../../tests/common/gguf_file.rs"]
#[allow(missing_docs)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::Path;

pub use dtype::DType;
pub use error::GgufError;
pub(crate) use error::shown;
use layout::{Layout, TensorEntry};
pub use value::{Array, Value, ValueType};

/// Where the bytes are.
enum Storage {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl Storage {
    fn bytes(&self) -> &[u8] {
        match self {
            Storage::Mapped(map) => map,
            Storage::Owned(bytes) => bytes,
        }
    }
}

/// A parsed GGUF file.
pub struct Gguf {
    storage: Storage,
    layout: Layout,
}

/// A tensor of the file, in place.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Its name, e.g. `blk.0.attn_q.weight`.
    pub name: &'a str,
    /// How its values are stored.
    pub dtype: DType,
    /// Its dimensions, the contiguous one first: a matrix of n rows of k values is `[k, n]`.
    pub shape: &'a [usize],
    /// Its values: rows back to back, [`DType::row_bytes`] of `shape[0]` each. No alignment is
    /// promised.
    pub data: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// Values in a row.
    pub fn columns(&self) -> usize {
        self.shape[0]
    }

    /// Rows, all further dimensions taken together.
    pub fn rows(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.data.len() / self.rows()
    }

    /// The bytes of row `row`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let bytes = self.row_bytes();
        &self.data[row * bytes..][..bytes]
    }
}

impl Gguf {
    /// Maps and parses a file.
    ///
    /// # Errors
    /// When it cannot be opened, is not GGUF of a supported version, or breaks the format.
    pub fn open(path: &Path) -> Result<Gguf, GgufError> {
        let failed = |source| GgufError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(std::io::Error::other("it is not a regular file")));
        }
        // SAFETY: safe code could only read the file into memory, which doubles the resident
        // memory of loading (weights are repacked into their own buffers anyway). The slice must
        // not change while it is borrowed: the file is opened read-only and the map is private;
        // model files are written beside their final name and renamed into place, never modified
        // in place, and the map lives only until the weights are repacked.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(failed)?;
        let layout = Layout::parse(&map)?;
        Ok(Gguf { storage: Storage::Mapped(map), layout })
    }

    /// Parses a file that is in memory already.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<Gguf, GgufError> {
        let bytes = bytes.into();
        let layout = Layout::parse(&bytes)?;
        Ok(Gguf { storage: Storage::Owned(bytes), layout })
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.layout.version
    }

    /// Length of the whole file.
    pub fn file_bytes(&self) -> usize {
        self.storage.bytes().len()
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, entry) = self.layout.tensors.get_key_value(name)?;
        Some(self.tensor_at(name, entry))
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.layout.tensors.iter().map(|(name, entry)| self.tensor_at(name, entry))
    }

    fn tensor_at<'a>(&'a self, name: &'a str, entry: &'a TensorEntry) -> Tensor<'a> {
        Tensor {
            name,
            dtype: entry.dtype,
            shape: &entry.dims[..entry.dim_count],
            data: &self.storage.bytes()[entry.bytes.clone()],
        }
    }

    /// All metadata keys, in alphabetical order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.layout.metadata.keys().map(String::as_str)
    }

    /// A metadata value.
    pub fn value(&self, key: &str) -> Option<Value<'_>> {
        let entry = self.layout.metadata.get(key)?;
        value::decode(entry.value_type, &self.storage.bytes()[entry.bytes.clone()])
    }

    /// A metadata value through `as_wanted`; `None` when the key is absent.
    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        as_wanted: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        as_wanted(value).map(Some).ok_or_else(|| GgufError::WrongType {
            key: key.to_owned(),
            found: value.describe(),
            wanted: wanted.to_owned(),
        })
    }

    /// An integer that is not negative.
    ///
    /// # Errors
    /// When the key is there with another type.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "an integer that is not negative", |value| value.as_unsigned())
    }

    /// A number.
    ///
    /// # Errors
    /// When the key is there with another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", |value| value.as_float())
    }

    /// A boolean.
    ///
    /// # Errors
    /// When the key is there with another type.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    /// When the key is there with another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text),
            _ => None,
        })
    }

    /// An array.
    ///
    /// # Errors
    /// When the key is there with another type.
    pub fn array(&self, key: &str) -> Result<Option<Array<'_>>, GgufError> {
        self.typed(key, "an array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf")
            .field("version", &self.layout.version)
            .field("metadata", &self.layout.metadata.len())
            .field("tensors", &self.layout.tensors.len())
            .finish_non_exhaustive()
    }
}

/// Unwraps a lookup of a key that has to be there.
pub(crate) fn required<T>(key: &str, found: Option<T>) -> Result<T, GgufError> {
    found.ok_or_else(|| GgufError::MissingKey { key: key.to_owned() })
}
