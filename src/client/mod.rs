//! The client library of the native protocol. Builds alone:
//! `--no-default-features --features client`.
//!
//! Three layers, each usable by itself:
//!
//! - [`ClientCore`]: the protocol's client as a pure state machine over byte slices; for those who
//!   bring their own I/O.
//! - [`Client`]: blocking, over a `TcpStream`; two threads a connection do its reading and writing.
//! - [`AsyncClient`]: over anything that is `futures_io::AsyncRead + AsyncWrite`, with a [`Driver`]
//!   future that the caller spawns wherever it likes. No runtime of its own.
//!
//! All obey credits: a request goes out when there is request credit, and token credit goes back
//! as the caller *takes* events, not as they arrive. So a caller that stops reading its stream
//! pauses that stream at the server, and memory here stays bounded by the window.
//!
//! ```no_run
//! use forebay::client::{Client, ClientOptions, Event, Request, RequestPrompt, Role};
//!
//! # fn main() -> Result<(), forebay::client::ClientError> {
//! let client = Client::connect("127.0.0.1:7070", &ClientOptions::default())?;
//! let prompt = RequestPrompt::Messages(vec![(Role::User, "Name three rivers.".into())]);
//! for event in client.request(Request::new(prompt))? {
//!     if let Event::Tokens(tokens) = event? {
//!         print!("{}", tokens.text);
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod asynchronous;
mod blocking;
mod core;
mod error;
mod event;
mod retry;
mod shared;

pub use self::asynchronous::{AsyncClient, AsyncGeneration, Driver};
pub use self::blocking::{Client, Generation};
pub use self::core::ClientCore;
pub use self::error::ClientError;
pub use self::event::{Event, Rejection, ServerInfo, TokenLogprob, Tokens};
pub use self::retry::{Retries, RetryPolicy};
pub use self::shared::Canceller;
pub use crate::protocol::{Accepted, Done, Request, RequestOptions, RequestPrompt, Role};

use std::time::Duration;

/// How a client introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// Name and version, for the server's logs.
    pub name: String,
    /// Bearer token; empty for none.
    pub token: String,
    /// Connecting and the handshake together must be over by then (blocking client only).
    pub connect_timeout: Duration,
    /// Requests that may wait here for request credit.
    pub waiting_max: usize,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            name: concat!("forebay-client/", env!("CARGO_PKG_VERSION")).to_owned(),
            token: String::new(),
            connect_timeout: Duration::from_secs(10),
            waiting_max: 1024,
        }
    }
}

#[cfg(test)]
mod tests;
