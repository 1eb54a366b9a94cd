//! The native protocol, version 1: pure encoding and decoding. `README.md` beside this file is
//! the specification; a client in another language can be written from it alone.
//!
//! Core: any. Nothing here does I/O, reads a clock or allocates from a size it has not checked.
//!
//! A byte stream goes through a [`Decoder`], which cuts it into [`Piece`]s however it was split;
//! whole frames are then read with [`ClientFrame::decode`] (server's side) or
//! [`ServerFrame::decode`] (client's side). Encoders append to a `Vec<u8>`.

mod bytes;
mod client_frame;
mod decoder;
mod frame;
mod options;
mod request;
mod server_frame;
mod tokens;

pub use client_frame::{ClientFrame, Hello};
pub use decoder::{Decoder, Piece, Side};
pub use frame::{
    Capabilities, ErrorCode, FrameType, HEADER_BYTES, HEADER_FLAGS, Header, MAGIC, ProtocolError,
    VERSION, limits,
};
pub use options::RequestOptions;
pub use request::{
    Body, BodyError, Message, PRELUDE_BYTES, Prelude, Prompt, PromptKind, Request, RequestPrompt,
    Role, TokenIds, decode_body, encode_body, encode_body_frame, encode_request,
    encode_request_frame,
};
pub use server_frame::{Accepted, Done, Rejected, ServerFrame, Stat, StatList, Welcome};
pub use tokens::{LogprobEntry, LogprobList, TokensFrame, TokensWriter};
