//! What can be wrong with a model file. Every message names the thing, what was found and what is
//! allowed, because whoever reads it has a file and no debugger.

use std::path::PathBuf;

/// Why a GGUF file, or the model in it, was refused.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be opened or mapped.
    #[error("cannot read {path:?}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The first four bytes are not `GGUF`.
    #[error("not a GGUF file: it begins with {found:02x?}, and a GGUF file with \"GGUF\"")]
    NotGguf {
        /// The bytes that are there, at most four.
        found: Vec<u8>,
    },
    /// A version, or a byte order, that is not read.
    #[error("{found} is not supported: GGUF version 2 or 3, little-endian, is")]
    UnsupportedVersion {
        /// In words.
        found: String,
    },
    /// The file ends inside something.
    #[error(
        "the file is truncated: {what} at byte {offset} needs {needed} bytes, {available} are left"
    )]
    Truncated {
        /// What was being read.
        what: String,
        /// Where it begins.
        offset: usize,
        /// Its length, as the file claims.
        needed: u64,
        /// What the file has from there on.
        available: usize,
    },
    /// A count or length above its bound.
    #[error("{what} is {found}, and at most {max} is allowed")]
    TooLarge {
        /// Which count or length.
        what: String,
        /// Its value.
        found: u64,
        /// Its bound.
        max: u64,
    },
    /// Something that breaks the format.
    #[error("{what} {problem}")]
    Malformed {
        /// Which part of the file.
        what: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A metadata key that has to be there.
    #[error("the metadata lacks {key:?}, which this model needs")]
    MissingKey {
        /// Its name.
        key: String,
    },
    /// A metadata value of another type than its key has.
    #[error("metadata {key:?} is {found}, and must be {wanted}")]
    WrongType {
        /// Whose value.
        key: String,
        /// The type in the file.
        found: String,
        /// The type, and range, that would do.
        wanted: String,
    },
    /// A value outside its range.
    #[error("{what} is {found}, and must be {allowed}")]
    OutOfRange {
        /// Which value.
        what: String,
        /// What the file says.
        found: String,
        /// What would do.
        allowed: String,
    },
    /// A weight that has to be there.
    #[error("tensor {name:?} is missing: this model needs it with shape {shape:?}")]
    MissingTensor {
        /// Its name.
        name: String,
        /// The shape it must have, contiguous dimension first.
        shape: Vec<usize>,
    },
    /// Something that is well formed and not supported.
    #[error("{what} is not supported: {allowed}")]
    Unsupported {
        /// What the file asks for.
        what: String,
        /// What is supported.
        allowed: String,
    },
}

impl GgufError {
    /// A part of the file and what is wrong with it.
    pub(crate) fn malformed(what: impl Into<String>, problem: impl Into<String>) -> GgufError {
        GgufError::Malformed { what: what.into(), problem: problem.into() }
    }

    /// A value, and what would do in its place.
    pub(crate) fn out_of_range(
        what: impl Into<String>,
        found: impl ToString,
        allowed: impl Into<String>,
    ) -> GgufError {
        GgufError::OutOfRange {
            what: what.into(),
            found: found.to_string(),
            allowed: allowed.into(),
        }
    }

    /// Something not supported, and what is.
    pub(crate) fn unsupported(what: impl Into<String>, allowed: impl Into<String>) -> GgufError {
        GgufError::Unsupported { what: what.into(), allowed: allowed.into() }
    }
}

/// A name from a file, fit for a message: quoted, escaped, and cut when it is absurdly long.
pub(crate) fn shown(name: &str) -> String {
    const CHARS_MAX: usize = 80;
    if name.chars().nth(CHARS_MAX).is_none() {
        return format!("{name:?}");
    }
    let head: String = name.chars().take(CHARS_MAX).collect();
    format!("{head:?}…")
}
