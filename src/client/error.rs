//! What can go wrong with a connection.

use std::fmt;
use std::io;

use crate::protocol::{ErrorCode, ProtocolError};

/// Why a connection, or a call on it, failed. Cheap to copy: every stream of a lost connection
/// gets one. What happens to a single request comes as an event instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientError {
    /// The connection could not be made, or broke.
    Io(io::ErrorKind, String),
    /// The server ended the connection and said why.
    Server {
        /// A number of [`ErrorCode`], or of a later version.
        code: u16,
        /// The stream it was about, or 0.
        stream: u32,
        /// The server's words.
        message: String,
    },
    /// The server broke the protocol.
    Protocol(ProtocolError),
    /// The connection ended.
    Closed,
    /// The request is larger than the server takes, or its window outside what it allows.
    Request(String),
    /// [`super::ClientOptions::waiting_max`] requests wait already.
    TooManyWaiting,
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> ClientError {
        ClientError::Io(error.kind(), error.to_string())
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Io(_, message) => write!(f, "connection: {message}"),
            ClientError::Server { code, message, .. } => {
                let name = ErrorCode::from_wire(*code).map_or("unknown code", ErrorCode::name);
                write!(f, "the server ended the connection: {name}: {message}")
            }
            ClientError::Protocol(error) => write!(f, "the server broke the protocol: {error}"),
            ClientError::Closed => f.write_str("the connection is closed"),
            ClientError::Request(message) => f.write_str(message),
            ClientError::TooManyWaiting => f.write_str("too many requests wait to be sent"),
        }
    }
}

impl std::error::Error for ClientError {}
