//! `hf:` models come from the Hugging Face hub, or from the hub that `HF_ENDPOINT` names.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo};

use super::error::PullError;
use super::meter::{Meter, Progress};
use super::store::{Contents, copy, difference};
use crate::config::HubFile;

/// Which hub, and who we are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hub {
    /// Without a slash at its end.
    pub endpoint: String,
    /// Sent as a bearer token.
    pub token: Option<String>,
}

impl Hub {
    /// As the hub's own tools read it: `HF_ENDPOINT`, `HF_TOKEN`, else the token that
    /// `huggingface-cli login` stored.
    pub(super) fn from_env() -> Hub {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or("https://huggingface.co".into());
        // `Cache::from_env` panics where no home folder is known.
        let stored = || {
            let known = variable("HF_HOME").is_some() || etcetera::home_dir().is_ok();
            known.then(|| Cache::from_env().token()).flatten()
        };
        Hub {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: variable("HF_TOKEN").map(|token| token.trim().to_owned()).or_else(stored),
        }
    }
}

/// Fetches the file into `workspace`. Returns it with its contents, which were checked against
/// what the hub promised: the size always, the digest where the hub tells it.
pub(super) fn fetch(
    hub: &Hub,
    file: &HubFile,
    name: &str,
    workspace: &Path,
    progress: Progress,
) -> Result<(PathBuf, Contents), PullError> {
    let bad = |what: &str| PullError::Hub {
        name: name.to_owned(),
        endpoint: hub.endpoint.clone(),
        what: what.to_owned(),
    };
    // The hub client unwraps some things that a strange server can get wrong (a redirect without
    // a target, for one): that must not end the program.
    let fetched = catch_unwind(AssertUnwindSafe(|| download(hub, file, name, workspace, progress)));
    let (promise, path) =
        fetched.unwrap_or_else(|_| Err(bad("its answer breaks the hub's protocol")))?;
    let failed = |e| PullError::io("read", &path, e);
    let found = std::fs::File::open(&path)
        .and_then(|mut f| copy(&mut f, &mut std::io::sink(), promise.bytes, None))
        .map_err(failed)?;
    // The hub names files in large-file storage, as models are, by their SHA-256; small ones by a
    // digest of git's, of 40 digits, which says nothing about the bytes alone.
    let digest_promised = promise.sha256.len() == 64;
    if found.bytes != promise.bytes || (digest_promised && found.sha256 != promise.sha256) {
        let what = difference(&found, &promise);
        return Err(PullError::Damaged { name: name.to_owned(), what });
    }
    Ok((path, found))
}

/// What the hub promised, and the file it sent.
fn download(
    hub: &Hub,
    file: &HubFile,
    name: &str,
    workspace: &Path,
    progress: Progress,
) -> Result<(Contents, PathBuf), PullError> {
    let explain = |e| explain(hub, name, workspace, e);
    let api = ApiBuilder::from_cache(Cache::new(workspace.join("hub")))
        .with_endpoint(hub.endpoint.clone())
        .with_token(hub.token.clone())
        .build()
        .map_err(explain)?;
    let repo = api.repo(Repo::model(format!("{}/{}", file.owner, file.repo)));
    let metadata = api.metadata(&repo.url(&file.file)).map_err(explain)?;
    let etag = metadata.etag().to_ascii_lowercase();
    // The client uses the ETag and the commit as file names.
    let plain = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if !plain(&etag) || !plain(metadata.commit_hash()) {
        let (name, endpoint) = (name.to_owned(), hub.endpoint.clone());
        return Err(PullError::Hub { name, endpoint, what: "its ETag is no digest".into() });
    }
    let promise = Contents { bytes: metadata.size() as u64, sha256: etag };
    let bar = Bar(progress.stage(&format!("fetching {name}"), promise.bytes));
    let path = repo.download_with_progress(&file.file, bar).map_err(explain)?;
    // The client's cache holds a link to the file under another name.
    let path = path.canonicalize().map_err(|e| PullError::io("find", &path, e))?;
    Ok((promise, path))
}

fn explain(hub: &Hub, name: &str, workspace: &Path, error: ApiError) -> PullError {
    let (name, endpoint) = (name.to_owned(), hub.endpoint.clone());
    let unreachable =
        |what: String| PullError::HubUnreachable { endpoint: hub.endpoint.clone(), what };
    match error {
        ApiError::RequestError(error) => match *error {
            ureq::Error::StatusCode(401 | 403 | 404) => {
                PullError::NotOnHub { name, endpoint, token: hub.token.is_some() }
            }
            ureq::Error::StatusCode(code) => {
                PullError::Hub { name, endpoint, what: format!("HTTP status {code}") }
            }
            other => unreachable(other.to_string()),
        },
        // A body that ends early comes out of the copy as an I/O error that is not the disk's.
        ApiError::IoError(error) => match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                PullError::io("write in", workspace, error)
            }
            _ => unreachable(format!("the transfer broke off: {error}")),
        },
        ApiError::MissingHeader(header) => {
            PullError::Hub { name, endpoint, what: format!("no {header} header") }
        }
        other => PullError::Hub { name, endpoint, what: other.to_string() },
    }
}

struct Bar(Meter);

impl hf_hub::api::Progress for Bar {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.0.at(0);
    }

    fn update(&mut self, size: usize) {
        self.0.add(size as u64);
    }

    fn finish(&mut self) {}
}
