//! Frames from client to server, but for REQUEST and BODY, which are streamed (`request.rs`).

use super::bytes::{Reader, put_text_u8, put_text_u16, put_u16, put_u32};
use super::frame::{Capabilities, ErrorCode, FrameType, Header, MAGIC, ProtocolError, limits};
use super::frame::{VERSION, put_frame};

/// A client's first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    /// Lowest version the client speaks.
    pub version_min: u16,
    /// Highest version the client speaks.
    pub version_max: u16,
    /// What it understands.
    pub capabilities: Capabilities,
    /// Its name and version, for logs; may be empty.
    pub client: &'a str,
    /// Bearer token; empty for none.
    pub token: &'a str,
}

/// A frame that a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientFrame<'a> {
    /// The handshake.
    Hello(Hello<'a>),
    /// Answer with the same number.
    Ping(u64),
    /// The answer to the server's ping.
    Pong(u64),
    /// Send numbers.
    Stats,
    /// The client gives up on the connection.
    Error {
        /// Why; unknown numbers are allowed.
        code: u16,
        /// The stream that broke a rule, or 0.
        about_stream: u32,
        /// For a person.
        message: &'a str,
    },
    /// A stream may send this many more tokens.
    Credit {
        /// Which.
        stream: u32,
        /// How many, at least 1.
        tokens: u32,
    },
    /// Stop a stream.
    Cancel {
        /// Which.
        stream: u32,
    },
}

impl<'a> ClientFrame<'a> {
    /// The longest payload of a type from a client; `None` for types only a server sends.
    pub(super) fn payload_bytes_max(kind: FrameType, frame_bytes_max: u32) -> Option<u32> {
        Some(match kind {
            FrameType::Hello => limits::HELLO_BYTES_MAX,
            FrameType::Ping | FrameType::Pong => 8,
            FrameType::Stats | FrameType::Cancel => 0,
            FrameType::Error => 10 + limits::MESSAGE_BYTES_MAX as u32,
            FrameType::Credit => 4,
            FrameType::Request | FrameType::Body => frame_bytes_max,
            _ => return None,
        })
    }

    /// Reads one whole frame.
    pub fn decode(header: Header, payload: &'a [u8]) -> Result<ClientFrame<'a>, ProtocolError> {
        if header.kind == FrameType::Hello {
            return decode_hello(payload).map(ClientFrame::Hello);
        }
        let mut reader = Reader::new(payload);
        let frame = match header.kind {
            FrameType::Ping => reader.u64().map(ClientFrame::Ping),
            FrameType::Pong => reader.u64().map(ClientFrame::Pong),
            FrameType::Stats => Some(ClientFrame::Stats),
            FrameType::Error => decode_error(&mut reader),
            FrameType::Credit => reader
                .u32()
                .filter(|&tokens| tokens > 0)
                .map(|tokens| ClientFrame::Credit { stream: header.stream, tokens }),
            FrameType::Cancel => Some(ClientFrame::Cancel { stream: header.stream }),
            kind => {
                let message = format!("{} is not a frame that a client sends", kind.name());
                return Err(ProtocolError::new(ErrorCode::UnexpectedFrame, header.stream, message));
            }
        };
        frame
            .and_then(|frame| reader.finish(frame))
            .ok_or_else(|| ProtocolError::malformed(header.kind, header.stream))
    }

    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            ClientFrame::Hello(hello) => put_frame(out, FrameType::Hello, 0, |out| {
                out.extend_from_slice(&MAGIC);
                put_u16(out, hello.version_min);
                put_u16(out, hello.version_max);
                put_u32(out, hello.capabilities.0);
                put_text_u8(out, hello.client);
                put_text_u16(out, hello.token, limits::TOKEN_BYTES_MAX);
            }),
            ClientFrame::Ping(number) => put_frame(out, FrameType::Ping, 0, |out| {
                out.extend_from_slice(&number.to_le_bytes());
            }),
            ClientFrame::Pong(number) => put_frame(out, FrameType::Pong, 0, |out| {
                out.extend_from_slice(&number.to_le_bytes());
            }),
            ClientFrame::Stats => put_frame(out, FrameType::Stats, 0, |_| {}),
            ClientFrame::Error { code, about_stream, message } => {
                put_frame(out, FrameType::Error, 0, |out| {
                    put_u16(out, code);
                    put_u16(out, 0);
                    put_u32(out, about_stream);
                    put_text_u16(out, message, limits::MESSAGE_BYTES_MAX);
                });
            }
            ClientFrame::Credit { stream, tokens } => {
                put_frame(out, FrameType::Credit, stream, |out| put_u32(out, tokens));
            }
            ClientFrame::Cancel { stream } => put_frame(out, FrameType::Cancel, stream, |_| {}),
        }
    }
}

fn decode_error<'a>(reader: &mut Reader<'a>) -> Option<ClientFrame<'a>> {
    let code = reader.u16()?;
    reader.u16()?;
    let about_stream = reader.u32()?;
    Some(ClientFrame::Error { code, about_stream, message: reader.text_u16()? })
}

fn decode_hello(payload: &[u8]) -> Result<Hello<'_>, ProtocolError> {
    let mut reader = Reader::new(payload);
    if reader.take(MAGIC.len()) != Some(&MAGIC) {
        return Err(ProtocolError::new(
            ErrorCode::NotForebay,
            0,
            "a connection starts with HELLO and the bytes FBAY",
        ));
    }
    let versions = reader.u16().zip(reader.u16());
    let (version_min, version_max) =
        versions.ok_or_else(|| ProtocolError::malformed(FrameType::Hello, 0))?;
    // The rest may look different in another version: judge the version first.
    if version_min > VERSION || version_max < VERSION {
        let message =
            format!("this server speaks version 1, the client {version_min} to {version_max}");
        return Err(ProtocolError::new(ErrorCode::Version, 0, message));
    }
    let mut rest = || -> Option<Hello<'_>> {
        let capabilities = Capabilities(reader.u32()?);
        let client = reader.text_u8()?;
        let token = reader.text_u16()?;
        (token.len() <= limits::TOKEN_BYTES_MAX).then_some(Hello {
            version_min,
            version_max,
            capabilities,
            client,
            token,
        })
    };
    rest().ok_or_else(|| ProtocolError::malformed(FrameType::Hello, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::HEADER_BYTES;

    fn hello() -> Hello<'static> {
        Hello {
            version_min: 1,
            version_max: 1,
            capabilities: Capabilities::ALL,
            client: "test/1",
            token: "secret",
        }
    }

    fn decode(bytes: &[u8]) -> Result<ClientFrame<'_>, ProtocolError> {
        let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(head)?;
        assert_eq!(header.payload_bytes as usize, payload.len());
        ClientFrame::decode(header, payload)
    }

    #[test]
    fn every_frame_survives_the_way() {
        for frame in [
            ClientFrame::Hello(hello()),
            ClientFrame::Ping(u64::MAX),
            ClientFrame::Pong(7),
            ClientFrame::Stats,
            ClientFrame::Error { code: 99, about_stream: 7, message: "enough" },
            ClientFrame::Credit { stream: 5, tokens: 64 },
            ClientFrame::Cancel { stream: u32::MAX },
        ] {
            let mut out = Vec::new();
            frame.encode(&mut out);
            assert_eq!(decode(&out), Ok(frame));
        }
    }

    #[test]
    fn a_cut_frame_is_malformed_and_a_longer_hello_is_not() {
        let mut out = Vec::new();
        ClientFrame::Hello(hello()).encode(&mut out);
        let header = Header { payload_bytes: 0, kind: FrameType::Hello, stream: 0 };
        let payload = &out[HEADER_BYTES..];
        for length in 0..payload.len() {
            assert!(ClientFrame::decode(header, &payload[..length]).is_err());
        }
        let mut longer = payload.to_vec();
        longer.extend_from_slice(b"from a later minor version");
        assert_eq!(ClientFrame::decode(header, &longer), Ok(ClientFrame::Hello(hello())));
        let credit = Header { payload_bytes: 0, kind: FrameType::Credit, stream: 1 };
        assert!(ClientFrame::decode(credit, &[1, 0, 0, 0, 0]).is_err());
        assert!(ClientFrame::decode(credit, &[0, 0, 0, 0]).is_err(), "a credit of nothing");
    }

    #[test]
    fn the_version_is_judged_before_the_rest_of_hello() {
        let header = Header { payload_bytes: 8, kind: FrameType::Hello, stream: 0 };
        let error = ClientFrame::decode(header, b"FBAY\x02\0\x03\0").unwrap_err();
        assert_eq!(error.code, ErrorCode::Version);
        let error = ClientFrame::decode(header, b"GET / HT").unwrap_err();
        assert_eq!(error.code, ErrorCode::NotForebay);
    }
}
