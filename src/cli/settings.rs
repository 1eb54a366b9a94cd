//! Gathers what [`config::load`] needs: the file, the environment, the flags.

use std::fs;
use std::path::Path;

use super::Failure;
use super::args::Settings;
use crate::config::{self, Flag, Loaded, TomlFile};

/// The configuration that file, environment and flags make together.
pub(super) fn load(settings: &Settings) -> Result<Loaded, Failure> {
    load_from(settings.config.as_deref(), settings)
}

/// As [`load`], with this file.
pub(super) fn load_from(file: Option<&Path>, settings: &Settings) -> Result<Loaded, Failure> {
    let path = file.map(|path| path.display().to_string()).unwrap_or_default();
    let text = file.map(fs::read_to_string).transpose().map_err(|error| {
        Failure::Usage(format!("cannot read the configuration file {path}: {error}"))
    })?;
    let file = text.as_deref().map(|text| TomlFile { path: &path, text });
    // What is not UTF-8 cannot be allowed for any setting; its check will say so.
    let variables = std::env::vars_os().map(|(name, value)| {
        (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned())
    });
    let flags = flags(settings)?;
    config::load(file, variables, &flags).map_err(|problems| Failure::Usage(problems.to_string()))
}

fn flags(settings: &Settings) -> Result<Vec<Flag>, Failure> {
    let mut flags = Vec::new();
    // --set first: the flag with a name of its own is the more deliberate one.
    for setting in &settings.set {
        let (key, value) = setting.split_once('=').ok_or_else(|| {
            Failure::Usage(format!("--set {setting:?}: must be KEY=VALUE, as kv.pool_bytes=1GiB"))
        })?;
        let (key, value) = (key.trim().to_owned(), value.trim().to_owned());
        flags.push(Flag { flag: "--set".to_owned(), key, value });
    }
    let named = [
        ("--listen", "server.listen", &settings.listen),
        ("--model", "model.name", &settings.model),
        ("--kv-pool", "kv.pool_bytes", &settings.kv_pool),
        ("--backend", "compute.backend", &settings.backend),
        ("--threads", "compute.threads", &settings.threads),
        ("--isa", "compute.isa", &settings.isa),
        ("--io", "runtime.io", &settings.io),
    ];
    for (flag, key, value) in named {
        if let Some(value) = value {
            flags.push(Flag { flag: flag.into(), key: key.into(), value: value.clone() });
        }
    }
    Ok(flags)
}
