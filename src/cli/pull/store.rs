//! The cache folder: a model file is there whole and checked, or not there at all.
//!
//! A file is made in a hidden folder beside its place and renamed into it after `fsync`. One
//! process at a time does that for one model, under a lock file that is never removed (removing
//! it would let two processes hold "the" lock). A killed process leaves only the hidden folder;
//! the next one to hold the lock sweeps it away.
//!
//! Beside each file lies a stamp: its digest, and the size, inode and time of change it had when
//! the digest was computed. While these are the same the file is taken as checked, so that a
//! start does not read the file twice.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::error::PullError;
use super::meter::{Meter, Progress};

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contents {
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, in lower-case hexadecimal.
    pub sha256: String,
}

/// How closely a cached file is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// Read it only if it changed since it was last read.
    Stamp,
    /// Read it.
    Digest,
}

/// What is in the cache for a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// No file.
    Nothing,
    /// The right one.
    Whole,
    /// A file, but not the right one.
    Damaged(String),
}

/// A model's place in the cache.
#[derive(Clone, Debug)]
pub(super) struct Place {
    folder: PathBuf,
    file: String,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    sha256: String,
    bytes: u64,
    inode: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl Stamp {
    fn of(meta: &fs::Metadata, sha256: &str) -> Stamp {
        Stamp {
            sha256: sha256.to_owned(),
            bytes: meta.len(),
            inode: meta.ino(),
            changed_s: meta.mtime(),
            changed_ns: meta.mtime_nsec(),
        }
    }
}

impl Place {
    /// The place `file` in `folder`, which is made when something is stored.
    pub(super) fn new(folder: PathBuf, file: impl Into<String>) -> Place {
        Place { folder, file: file.into() }
    }

    /// Where the file is, once it is there.
    pub(super) fn path(&self) -> PathBuf {
        self.folder.join(&self.file)
    }

    fn hidden(&self, suffix: &str) -> PathBuf {
        self.folder.join(format!(".{}.{suffix}", self.file))
    }

    /// How everything is named that is not finished, so that it can be swept away.
    fn unfinished_prefix(&self) -> String {
        format!(".{}.pull-", self.file)
    }

    /// Waits until no other process fills this place. Holding the file is holding the lock.
    pub(super) fn lock(&self, progress: Progress) -> Result<File, PullError> {
        fs::create_dir_all(&self.folder)
            .map_err(|e| PullError::io("create the folder", &self.folder, e))?;
        let path = self.hidden("lock");
        let failed = |e| PullError::io("lock", &path, e);
        let options = File::options().write(true).create(true).truncate(false).open(&path);
        let file = options.map_err(failed)?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) => {
                progress.say(&format!("another process is fetching {}: waiting for it", self.file));
            }
            Err(fs::TryLockError::Error(e)) => return Err(failed(e)),
        }
        file.lock().map_err(failed)?;
        Ok(file)
    }

    /// A fresh hidden folder for the work, and none of an earlier process's left. Only for the
    /// holder of the lock.
    pub(super) fn workspace(&self, _lock: &File) -> Result<TempDir, PullError> {
        let prefix = self.unfinished_prefix();
        let failed = |e| PullError::io("write in", &self.folder, e);
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                // What cannot be removed is in nobody's way: the new folder has another name.
                let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
            }
        }
        tempfile::Builder::new().prefix(&prefix).tempdir_in(&self.folder).map_err(failed)
    }

    /// What lies here. `expected` is `None` where only the stamp knows (a file from the hub):
    /// then a file without a stamp counts as damaged.
    pub(super) fn look(
        &self,
        expected: Option<&Contents>,
        check: Check,
    ) -> Result<Found, PullError> {
        let path = self.path();
        let failed = |e| PullError::io("read", &path, e);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(e) => return Err(failed(e)),
        };
        let meta = file.metadata().map_err(failed)?;
        let stamp = self.stamp();
        let expected = match (expected, &stamp) {
            (Some(expected), _) => expected.clone(),
            (None, Some(stamp)) => Contents { bytes: stamp.bytes, sha256: stamp.sha256.clone() },
            (None, None) => return Ok(Found::Damaged("its stamp is missing".into())),
        };
        if meta.len() != expected.bytes {
            let what = format!("{} bytes instead of {}", meta.len(), expected.bytes);
            return Ok(Found::Damaged(what));
        }
        let seen = Stamp::of(&meta, &expected.sha256);
        if check == Check::Stamp && stamp.as_ref() == Some(&seen) {
            return Ok(Found::Whole);
        }
        let found = copy(&mut file, &mut io::sink(), expected.bytes, None).map_err(failed)?;
        if found != expected {
            return Ok(Found::Damaged(difference(&found, &expected)));
        }
        // Without a stamp (say, in a cache that we may only read) the next look takes longer.
        let _ = self.write_stamp(&seen);
        Ok(Found::Whole)
    }

    fn stamp(&self) -> Option<Stamp> {
        let text = fs::read_to_string(self.hidden("stamp")).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn write_stamp(&self, stamp: &Stamp) -> Result<(), PullError> {
        let path = self.hidden("stamp");
        let failed = |e: io::Error| PullError::io("write", &path, e);
        let mut file = tempfile::Builder::new()
            .prefix(&self.unfinished_prefix())
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(&self.folder)
            .map_err(failed)?;
        let text = serde_json::to_string(stamp).map_err(|e| failed(e.into()))?;
        file.write_all(text.as_bytes()).map_err(failed)?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        Ok(())
    }

    /// Moves a finished file from the workspace to its place, for good.
    pub(super) fn store(
        &self,
        _lock: &File,
        from: &Path,
        contents: &Contents,
    ) -> Result<PathBuf, PullError> {
        let failed = |e| PullError::io("store", from, e);
        let file = File::open(from).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        // The stamp first: a stamp without its file means nothing, a hub file without its stamp
        // would be fetched again.
        self.write_stamp(&Stamp::of(&meta, &contents.sha256))?;
        let path = self.path();
        fs::rename(from, &path).map_err(|e| PullError::io("move the model to", &path, e))?;
        File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|e| PullError::io("sync", &self.folder, e))?;
        Ok(path)
    }
}

/// "found this instead of that", for messages.
pub(super) fn difference(found: &Contents, expected: &Contents) -> String {
    if found.bytes != expected.bytes {
        format!("{} bytes instead of {}", found.bytes, expected.bytes)
    } else {
        format!("SHA-256 {} instead of {}", found.sha256, expected.sha256)
    }
}

/// Copies at most `limit` + 1 bytes, so that whoever sends more than was promised is found out
/// but cannot fill the disk. Returns what was copied.
pub(super) fn copy(
    from: &mut dyn Read,
    to: &mut dyn Write,
    limit: u64,
    meter: Option<&Meter>,
) -> io::Result<Contents> {
    let mut from = from.take(limit.saturating_add(1));
    // 1 MiB: large enough that system calls do not count, small enough for the bar to move.
    let mut buffer = vec![0; 1 << 20];
    let mut digest = Sha256::new();
    let mut bytes = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        digest.update(&buffer[..count]);
        to.write_all(&buffer[..count])?;
        bytes += count as u64;
        if let Some(meter) = meter {
            meter.add(count as u64);
        }
    }
    to.flush()?;
    let sha256 = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Contents { bytes, sha256 })
}

/// The first four bytes; zeros when the file is shorter.
pub(super) fn read_magic(path: &Path) -> io::Result<[u8; 4]> {
    let mut magic = [0; 4];
    let mut file = File::open(path)?;
    match file.read_exact(&mut magic) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok([0; 4]),
        other => other.map(|()| magic),
    }
}
