//! `forebay serve`: from settings to a server that runs until it is told to stop.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Failure;
use super::args::Settings;
use super::pull::{self, Progress};
use super::server::{Server, ServerError};
use crate::config::{self, Config};
use crate::runtime::{Flavour, Lifecycle};

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Failure {
        match error {
            ServerError::Model(text) => Failure::Model(text),
            ServerError::Settings(text) => Failure::Usage(text),
            ServerError::Machine { .. } => Failure::Runtime(error.to_string()),
        }
    }
}

/// Serves until a signal ends it.
pub(super) fn serve(settings: &Settings) -> Result<(), Failure> {
    let config = super::settings::load(settings)?.config;
    let started = Instant::now();
    let path = fetch_model(&config)?;
    let flavour = choose_flavour(&config)?;
    let server = Server::start(&config, &config.model.to_string(), &path, flavour)?;
    let backend = server.backend();
    println!("model    {} ({})", config.model, path.display());
    println!("backend  {} ({})", backend.name, backend.path);
    println!("sockets  {}", flavour.name());
    println!("native   {}", server.address());
    println!("ready after {} ms", started.elapsed().as_millis());
    watch_signals(Arc::clone(server.life()), &config)?;
    server.join()?;
    tracing::info!("drained");
    Ok(())
}

/// The model's file, fetched first if need be.
pub(super) fn fetch_model(config: &Config) -> Result<PathBuf, Failure> {
    Ok(pull::ensure(&config.model, Progress::Show)?)
}

pub(super) fn choose_flavour(config: &Config) -> Result<Flavour, Failure> {
    match config.runtime.io {
        config::Io::Epoll => Ok(Flavour::Epoll),
        config::Io::Auto | config::Io::IoUring => Ok(Flavour::IoUring),
    }
}

/// The first signal begins the drain, the second ends the process at once.
fn watch_signals(life: Arc<Lifecycle>, config: &Config) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGINT, SIGTERM])
        .map_err(|error| Failure::Runtime(format!("cannot watch for signals: {error}")))?;
    let (delay_ms, timeout_ms) = (config.drain.delay_ms, config.drain.timeout_ms);
    let watch = move || {
        let mut signals = signals.forever();
        if signals.next().is_none() {
            return;
        }
        tracing::info!(delay_ms, timeout_ms, "draining; a second signal ends at once");
        let drain = move || {
            std::thread::sleep(Duration::from_millis(delay_ms));
            life.drain(crate::runtime::now().plus_ms(timeout_ms));
        };
        std::thread::spawn(drain);
        if signals.next().is_some() {
            std::process::exit(130);
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(watch)
        .map(drop)
        .map_err(|error| Failure::Runtime(format!("cannot watch for signals: {error}")))
}
