//! The server that `chat` and `bench` talk to: one that runs, or one of their own.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use super::args::Settings;
use super::pull::{self, Progress};
use super::server::Server;
use super::{Failure, serve};
use crate::client::{Client, ClientOptions};
use crate::config::METRICS_DEFAULT;
use crate::runtime::probe;

/// How long a server at the default address has to answer before one is started here: one that
/// runs on this machine and is not overloaded answers within a millisecond.
const ANSWER_WAIT: Duration = Duration::from_millis(500);

/// A server to talk to.
pub(super) struct Target {
    /// Where it listens.
    pub address: SocketAddr,
    /// How it is named to the user.
    pub name: String,
    /// In this process, when there was none.
    own: Option<Server>,
}

impl Target {
    /// The server at `connect`; without it the one at the configured address, if one answers
    /// there and no setting on the command line asks for something else; else one in this
    /// process, on a free port.
    pub(super) fn find(connect: Option<&str>, settings: &Settings) -> Result<Target, Failure> {
        if let Some(name) = connect {
            let address = resolve(name)?;
            return Ok(Target { address, name: name.to_owned(), own: None });
        }
        let config = super::settings::load(settings)?.config;
        let listen = config.server.listen;
        if settings.is_empty() && listen.port() != 0 && answers(listen) {
            return Ok(Target { address: listen, name: listen.to_string(), own: None });
        }
        let path = pull::ensure(&config.model, Progress::Show)?;
        let probe = probe();
        let flavour = serve::choose_flavour(&config, &probe)?;
        let mut config = config;
        config.server.listen.set_port(0);
        if config.metrics.listen == Some(METRICS_DEFAULT) {
            // That is for servers; this one is gone in a moment.
            config.metrics.listen = None;
        }
        let name = config.model.to_string();
        let server = Server::start_on(&config, &name, &path, flavour, &probe)?;
        let address = server.address();
        Ok(Target { address, name: "in this process".into(), own: Some(server) })
    }

    /// Ends the server, if it is one in this process; what is in progress is cancelled.
    pub(super) fn end(self) -> Result<(), Failure> {
        if let Some(server) = self.own {
            server.drain(crate::runtime::now());
            server.join()?;
        }
        Ok(())
    }
}

/// The address that `--connect` means.
pub(super) fn resolve(name: &str) -> Result<SocketAddr, Failure> {
    let unusable = |what: String| Failure::Usage(format!("--connect {name:?}: {what}; HOST:PORT"));
    let mut addresses = name.to_socket_addrs().map_err(|e| unusable(e.to_string()))?;
    addresses.next().ok_or_else(|| unusable("no address".into()))
}

fn answers(address: SocketAddr) -> bool {
    let options = ClientOptions { connect_timeout: ANSWER_WAIT, ..ClientOptions::default() };
    Client::connect(address, &options).is_ok()
}
