//! `forebay serve`: from settings to a server that runs until it is told to stop.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::args::{Settings, VERSION};
use super::models::print;
use super::pull::{self, Progress};
use super::server::{Server, ServerError};
use super::{Failure, plan};
use crate::config::{Config, Io};
use crate::runtime::shutdown::{Signals, Wish};
use crate::runtime::{Flavour, Lifecycle, Probe, probe, recorder};

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Failure {
        match error {
            ServerError::Model(text) => Failure::Model(text),
            ServerError::Settings(text) => Failure::Usage(text),
            ServerError::Device(text) => Failure::Runtime(text),
            ServerError::Machine { .. } => Failure::Runtime(error.to_string()),
        }
    }
}

/// Descriptors besides those of connections: standard streams, rings, timers, listeners.
const DESCRIPTORS_BESIDES: u64 = 64;

/// Serves until a signal ends it.
pub(super) fn serve(settings: &Settings) -> Result<(), Failure> {
    let config = super::settings::load(settings)?.config;
    let started = Instant::now();
    recorder::enable(config.runtime.recorder_file.clone());
    let signals = Signals::install()
        .map_err(|error| Failure::Runtime(format!("cannot watch for signals: {error}")))?;
    let probe = probe();
    let descriptors = u64::from(config.limits.connections_max) + DESCRIPTORS_BESIDES;
    if let Err(denial) = probe.check_descriptors(descriptors) {
        return Err(Failure::Usage(format!("limits.connections_max is too high:\n{denial}")));
    }
    let flavour = choose_flavour(&config, &probe)?;
    let path = pull::ensure(&config.model, Progress::Show)?;
    let name = config.model.to_string();
    let server = Server::start_on(&config, &name, &path, flavour, &probe)?;
    watch(signals, Arc::clone(server.life()), &config)?;
    print(&report(&config, &path, &probe, flavour, &server))?;
    print(&format!("ready after {} ms", started.elapsed().as_millis()))?;
    server.join()?;
    tracing::info!("drained");
    Ok(())
}

/// What a server says of itself when it is ready.
fn report(
    config: &Config,
    path: &Path,
    probe: &Probe,
    flavour: Flavour,
    server: &Server,
) -> String {
    let backend = server.backend();
    let sizing = server.sizing();
    let mut text = format!("forebay {VERSION}\n{probe}\n");
    if flavour != probe.flavour() {
        text.push_str(&format!("runtime.io   {}, as configured\n", flavour.name()));
    }
    text.push_str(&format!("\n{}\n\n{}\n\n", sizing.map, server.envelope()));
    text.push_str(&format!("model        {} ({})\n", config.model, path.display()));
    text.push_str(&format!("backend      {} ({})\n", backend.name, backend.path));
    for note in server.backend_notes() {
        text.push_str(&format!("             {note}\n"));
    }
    text.push_str(&format!("context      {} tokens\n", sizing.limits.context_max));
    text.push_str(&format!("native       {}", server.address()));
    if let Some(address) = server.metrics_address() {
        text.push_str(&format!("\nmetrics      http://{address}/metrics"));
    }
    if let Some(notice) = plan::context_notice(&config.limits, &sizing.limits, sizing.lowered) {
        tracing::warn!("{notice}");
    }
    let free = probe.memory.available_bytes;
    if server.envelope().process_bytes() > free {
        tracing::warn!("{}", plan::too_large(server.envelope(), free));
    }
    text
}

/// What drives sockets: what was asked for, or what the machine allows.
pub(super) fn choose_flavour(config: &Config, probe: &Probe) -> Result<Flavour, Failure> {
    match (config.runtime.io, &probe.io_uring) {
        (Io::Epoll, _) => Ok(Flavour::Epoll),
        (Io::Auto, _) => Ok(probe.flavour()),
        (Io::IoUring, Ok(_)) => Ok(Flavour::IoUring),
        (Io::IoUring, Err(denial)) => Err(Failure::Usage(format!(
            "runtime.io = \"io_uring\" cannot be had here; epoll can:\n{denial}"
        ))),
    }
}

/// Follows the signals on a thread of its own. The first that asks for an end begins the drain;
/// the second ends the process at once, in the signal handler itself.
fn watch(mut signals: Signals, life: Arc<Lifecycle>, config: &Config) -> Result<(), Failure> {
    let (delay_ms, timeout_ms) = (config.drain.delay_ms, config.drain.timeout_ms);
    let follow = move || {
        loop {
            let mut waited = [PollFd::new(&signals, PollFlags::IN)];
            // Interrupted or not: what was asked for is looked at below.
            let _ = rustix::event::poll(&mut waited, None);
            while let Some(wish) = signals.take() {
                match wish {
                    Wish::Dump => recorder::dump("SIGUSR1", usize::MAX),
                    Wish::Drain => {
                        tracing::info!(delay_ms, timeout_ms, "draining; a second signal ends now");
                        drain_after(&life, delay_ms, timeout_ms);
                    }
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(follow)
        .map(drop)
        .map_err(|error| Failure::Runtime(format!("cannot watch for signals: {error}")))
}

fn drain_after(life: &Arc<Lifecycle>, delay_ms: u64, timeout_ms: u64) {
    let begin = move |life: &Lifecycle| life.drain(crate::runtime::now().plus_ms(timeout_ms));
    if delay_ms == 0 {
        return begin(life);
    }
    let life = Arc::clone(life);
    // Not on the thread that follows signals: dumps go on being served.
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(delay_ms));
        begin(&life);
    });
}
