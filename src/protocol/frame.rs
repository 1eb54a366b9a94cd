//! The frame header, the frame types, and what can be wrong with a connection.

use std::borrow::Cow;
use std::fmt;

use super::bytes::{Reader, put_u16, put_u32};
use crate::base::numbered;

/// The only version there is.
pub const VERSION: u16 = 1;
/// The first bytes of HELLO's payload: what tells a client of this protocol from a stray one.
pub const MAGIC: [u8; 4] = *b"FBAY";
/// Bytes of every frame's header.
pub const HEADER_BYTES: usize = 12;
/// Flags that version 1 defines: none.
pub const HEADER_FLAGS: u8 = 0;

/// Sizes that are part of the protocol itself; what a server chooses is told in WELCOME.
pub mod limits {
    /// Payload of HELLO: names, and a token of up to [`TOKEN_BYTES_MAX`].
    pub const HELLO_BYTES_MAX: u32 = 4096;
    /// A bearer token: a signed JWT is seldom over 1,500 bytes.
    pub const TOKEN_BYTES_MAX: usize = 2048;
    /// Payload of any frame from server to client. A TOKENS frame of a 65,535-token window with
    /// log-probabilities would be larger: a server splits it.
    pub const SERVER_FRAME_BYTES_MAX: u32 = 1 << 20;
    /// A request's options: 300 biases (11 bytes each) and 16 stop strings of 256 bytes are
    /// 7,444 bytes; the rest is room for what comes.
    pub const OPTIONS_BYTES_MAX: u32 = 8192;
    /// The message of ERROR and REJECTED.
    pub const MESSAGE_BYTES_MAX: usize = 512;
    /// Tokens in one TOKENS frame: 512 with 20 alternatives each are 87 KB.
    pub const TOKENS_PER_FRAME_MAX: usize = 512;
    /// Entries of one STATS_REPLY.
    pub const STATS_MAX: usize = 256;
}

numbered! {
    /// What a frame is. The numbers are part of the protocol.
    pub enum FrameType: u8 {
        /// Client → server, first: who is there, what it understands.
        Hello = 0x01 => "HELLO",
        /// Server → client: the handshake's answer, with limits.
        Welcome = 0x02 => "WELCOME",
        /// Server → client: more requests may be sent.
        RequestCredit = 0x03 => "REQUEST_CREDIT",
        /// Either way: answer with [`FrameType::Pong`].
        Ping = 0x04 => "PING",
        /// Either way: the answer.
        Pong = 0x05 => "PONG",
        /// Client → server: send numbers.
        Stats = 0x06 => "STATS",
        /// Server → client: the numbers.
        StatsReply = 0x07 => "STATS_REPLY",
        /// Server → client: no new requests here; those in progress go on.
        GoingAway = 0x08 => "GOING_AWAY",
        /// Either way: the connection is over, and why.
        Error = 0x09 => "ERROR",
        /// Client → server: opens a stream.
        Request = 0x10 => "REQUEST",
        /// Client → server: more of a request's body.
        Body = 0x11 => "BODY",
        /// Client → server: the stream may send more tokens.
        Credit = 0x12 => "CREDIT",
        /// Client → server: stop the stream.
        Cancel = 0x13 => "CANCEL",
        /// Server → client: the request is in the queue.
        Accepted = 0x20 => "ACCEPTED",
        /// Server → client: output.
        Tokens = 0x21 => "TOKENS",
        /// Server → client: out of credit, the sequence left the batch.
        Paused = 0x22 => "PAUSED",
        /// Server → client: it is back.
        Resumed = 0x23 => "RESUMED",
        /// Server → client: the end of an accepted stream.
        Done = 0x24 => "DONE",
        /// Server → client: the end of a stream that was refused or evicted.
        Rejected = 0x25 => "REJECTED",
    }
}

impl FrameType {
    /// Whether it belongs to one stream (its header names a stream) or to the connection.
    pub const fn is_stream_frame(self) -> bool {
        self as u8 >= 0x10
    }
}

/// What both sides understand beyond the frames that every version-1 peer must.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(pub u32);

impl Capabilities {
    /// STATS is answered.
    pub const STATS: Capabilities = Capabilities(1 << 0);
    /// Log-probabilities can be asked for.
    pub const LOGPROBS: Capabilities = Capabilities(1 << 1);
    /// Prompts may be token ids.
    pub const TOKEN_PROMPTS: Capabilities = Capabilities(1 << 2);
    /// All that version 1 names.
    pub const ALL: Capabilities = Capabilities(0b111);

    /// Whether all of `other` is in it.
    pub const fn contains(self, other: Capabilities) -> bool {
        self.0 & other.0 == other.0
    }

    /// What both have.
    pub const fn common(self, other: Capabilities) -> Capabilities {
        Capabilities(self.0 & other.0)
    }
}

/// The twelve bytes in front of every payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload that follow.
    pub payload_bytes: u32,
    /// What it is.
    pub kind: FrameType,
    /// The stream, or 0 for the connection.
    pub stream: u32,
}

impl Header {
    /// Appends it.
    pub fn encode(self, out: &mut Vec<u8>) {
        put_u32(out, self.payload_bytes);
        out.push(self.kind as u8);
        out.push(HEADER_FLAGS);
        put_u16(out, 0);
        put_u32(out, self.stream);
    }

    /// Reads and checks one.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, ProtocolError> {
        let mut reader = Reader::new(bytes);
        let payload_bytes = reader.u32().expect("twelve bytes");
        let number = reader.u8().expect("twelve bytes");
        let flags = reader.u8().expect("twelve bytes");
        let reserved = reader.u16().expect("twelve bytes");
        let stream = reader.u32().expect("twelve bytes");
        let Some(kind) = FrameType::from_wire(number) else {
            return Err(ProtocolError::new(
                ErrorCode::UnknownFrame,
                stream,
                format!("frame type 0x{number:02x} is not part of version 1"),
            ));
        };
        if flags != HEADER_FLAGS || reserved != 0 {
            return Err(ProtocolError::new(
                ErrorCode::Malformed,
                stream,
                "flags and reserved bytes of a header must be zero",
            ));
        }
        if kind.is_stream_frame() == (stream == 0) {
            let message = if stream == 0 {
                format!("{} needs a stream number above zero", kind.name())
            } else {
                format!("{} belongs to the connection: its stream must be zero", kind.name())
            };
            return Err(ProtocolError::new(ErrorCode::Malformed, stream, message));
        }
        Ok(Header { payload_bytes, kind, stream })
    }
}

numbered! {
    /// Why a connection ends. The numbers are part of the protocol.
    pub enum ErrorCode: u16 {
        /// The first bytes were not a HELLO with the right magic.
        NotForebay = 1 => "NOT_FOREBAY",
        /// No common version.
        Version = 2 => "VERSION",
        /// The bearer token is missing or wrong.
        Unauthenticated = 3 => "UNAUTHENTICATED",
        /// A frame is longer than its type or the limits allow.
        FrameTooLarge = 4 => "FRAME_TOO_LARGE",
        /// A frame type that version 1 does not know.
        UnknownFrame = 5 => "UNKNOWN_FRAME",
        /// A frame whose bytes do not follow its layout.
        Malformed = 6 => "MALFORMED",
        /// A frame that may not come now, or not in this direction.
        UnexpectedFrame = 7 => "UNEXPECTED_FRAME",
        /// A stream number that is not above all used before, or was never opened.
        StreamNumber = 8 => "STREAM_NUMBER",
        /// A REQUEST without request credit.
        RequestCreditExceeded = 9 => "REQUEST_CREDIT_EXCEEDED",
        /// More token credit outstanding than the largest window.
        WindowExceeded = 10 => "WINDOW_EXCEEDED",
        /// The handshake did not come in time.
        HandshakeTimeout = 11 => "HANDSHAKE_TIMEOUT",
        /// No stream and no frame for too long.
        IdleTimeout = 12 => "IDLE_TIMEOUT",
        /// The server holds as many connections as it may.
        TooManyConnections = 13 => "TOO_MANY_CONNECTIONS",
        /// The server's fault.
        Internal = 14 => "INTERNAL",
    }
}

/// The peer broke the protocol: the connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolError {
    /// Which rule.
    pub code: ErrorCode,
    /// The stream it happened on, or 0.
    pub stream: u32,
    /// What was wrong and what is allowed, for a person.
    pub message: Cow<'static, str>,
}

impl ProtocolError {
    /// An error with a message for a person.
    pub fn new(
        code: ErrorCode,
        stream: u32,
        message: impl Into<Cow<'static, str>>,
    ) -> ProtocolError {
        ProtocolError { code, stream, message: message.into() }
    }

    pub(super) fn malformed(kind: FrameType, stream: u32) -> ProtocolError {
        let message = format!("the payload of {} does not follow its layout", kind.name());
        ProtocolError::new(ErrorCode::Malformed, stream, message)
    }
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.message)?;
        if self.stream != 0 {
            write!(f, " (stream {})", self.stream)?;
        }
        Ok(())
    }
}

impl std::error::Error for ProtocolError {}

/// Appends a frame: `write` appends the payload, whose length is filled in afterwards.
pub(super) fn put_frame(
    out: &mut Vec<u8>,
    kind: FrameType,
    stream: u32,
    write: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    Header { payload_bytes: 0, kind, stream }.encode(out);
    write(out);
    end_frame(out, start);
}

/// Fills in the length of the frame that begins at `start` and ends at the buffer's end.
pub(super) fn end_frame(out: &mut [u8], start: usize) {
    let payload_bytes = u32::try_from(out.len() - start - HEADER_BYTES).expect("bounded frame");
    out[start..start + 4].copy_from_slice(&payload_bytes.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_breaks_a_rule_names_it() {
        let good = Header { payload_bytes: 4, kind: FrameType::Credit, stream: 9 };
        let mut bytes = Vec::new();
        good.encode(&mut bytes);
        let bytes: [u8; HEADER_BYTES] = bytes.try_into().unwrap();
        assert_eq!(Header::decode(&bytes), Ok(good));
        let broken = |at: usize, value: u8| {
            let mut copy = bytes;
            copy[at] = value;
            Header::decode(&copy).unwrap_err().code
        };
        assert_eq!(broken(4, 0x7f), ErrorCode::UnknownFrame);
        assert_eq!(broken(5, 1), ErrorCode::Malformed);
        assert_eq!(broken(6, 1), ErrorCode::Malformed);
        assert_eq!(broken(8, 0), ErrorCode::Malformed);
        assert_eq!(broken(4, FrameType::Ping as u8), ErrorCode::Malformed);
    }
}
