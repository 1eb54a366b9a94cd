//! Cuts a byte stream into frames, however it arrives. What lies whole in the input is returned
//! as a slice of it; only what straddles two inputs is copied, and never more than one frame.

use super::client_frame::ClientFrame;
use super::frame::{ErrorCode, FrameType, HEADER_BYTES, Header, ProtocolError};
use super::request::{BodyError, PRELUDE_BYTES, Prelude, check_request_payload};
use super::server_frame::ServerFrame;

/// Whose frames are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Frames from a client, on the server.
    FromClient,
    /// Frames from a server, in a client.
    FromServer,
}

/// What comes out of the stream, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece<'a> {
    /// A whole frame; any but REQUEST and BODY.
    Frame {
        /// Its header, checked.
        header: Header,
        /// Its payload, as long as the header says.
        payload: &'a [u8],
    },
    /// The head of a REQUEST. The body that follows in the same frame comes as
    /// [`Piece::BodyPart`]s.
    Request {
        /// The new stream's number.
        stream: u32,
        /// What is asked, or what is wrong with it (with it alone: the connection goes on).
        prelude: Result<Prelude, BodyError>,
        /// How many bytes of the body follow in this frame.
        body_bytes: u32,
    },
    /// The head of a BODY frame; its bytes come as [`Piece::BodyPart`]s.
    Body {
        /// Whose.
        stream: u32,
        /// How many bytes will come.
        body_bytes: u32,
    },
    /// A part of a request's body, never empty.
    BodyPart {
        /// Whose.
        stream: u32,
        /// The bytes.
        bytes: &'a [u8],
    },
}

/// An incremental decoder. Memory: one frame that is not streamed, at most
/// `4096 + HEADER_BYTES` bytes from a client and 1 MiB from a server.
#[derive(Debug)]
pub struct Decoder {
    side: Side,
    frame_bytes_max: u32,
    /// The beginning of a frame whose end has not arrived.
    partial: Vec<u8>,
    /// `partial` was handed out as a piece: forget it before going on.
    partial_done: bool,
    /// Body bytes of the current REQUEST or BODY frame still to come.
    body_rest: u32,
    body_stream: u32,
    failed: bool,
}

/// How many bytes are needed to go on, or what the bytes so far are.
enum Head {
    /// So many bytes, counted from the frame's start, are needed to say more.
    Needs(usize),
    /// A frame that is returned whole; it is there.
    Whole(Header),
    /// The head of a REQUEST is there, this long.
    Request(Header, usize),
    /// The header of a BODY is there.
    Body(Header),
}

impl Decoder {
    /// A decoder that takes frames with payloads up to `frame_bytes_max` where the type has no
    /// smaller bound of its own.
    pub fn new(side: Side, frame_bytes_max: u32) -> Decoder {
        Decoder {
            side,
            frame_bytes_max,
            partial: Vec::new(),
            partial_done: false,
            body_rest: 0,
            body_stream: 0,
            failed: false,
        }
    }

    /// Whether the input so far ended between two frames.
    pub fn is_between_frames(&self) -> bool {
        (self.partial.is_empty() || self.partial_done) && self.body_rest == 0
    }

    /// The stream whose body the next bytes of input belong to, when they belong to one. A server
    /// that may not take them yet stops here, and leaves them in its input.
    pub fn body_stream(&self) -> Option<u32> {
        (self.body_rest > 0).then_some(self.body_stream)
    }

    /// Takes from the front of `input` and returns the next piece; `None` when all of `input` is
    /// taken and more is needed. After an error the decoder returns that no more comes.
    pub fn next<'a, 'i: 'a>(
        &'a mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<Piece<'a>>, ProtocolError> {
        if self.partial_done {
            self.partial.clear();
            self.partial_done = false;
        }
        if self.failed {
            *input = &[];
            return Ok(None);
        }
        if self.body_rest > 0 {
            return Ok(self.take_body(input));
        }
        self.next_head(input)
    }

    fn take_body<'i>(&mut self, input: &mut &'i [u8]) -> Option<Piece<'i>> {
        let count = input.len().min(self.body_rest as usize);
        let (bytes, rest) = input.split_at(count);
        *input = rest;
        self.body_rest -= count as u32;
        (count > 0).then_some(Piece::BodyPart { stream: self.body_stream, bytes })
    }

    /// Where the next frame's bytes are: all in `input`, or `partial` completed from it.
    fn next_head<'a, 'i: 'a>(
        &'a mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<Piece<'a>>, ProtocolError> {
        loop {
            let straight = self.partial.is_empty();
            let bytes: &[u8] = if straight { input } else { &self.partial };
            let head = match self.judge(bytes) {
                Ok(head) => head,
                Err(error) => {
                    self.failed = true;
                    return Err(error);
                }
            };
            if let Head::Needs(count) = head {
                // What is missing is copied; nothing beyond it, so a frame never drags the
                // beginning of the next into the buffer.
                let missing = count - self.partial.len();
                let (taken, rest) = input.split_at(input.len().min(missing));
                self.partial.extend_from_slice(taken);
                *input = rest;
                if taken.len() < missing {
                    return Ok(None);
                }
                continue;
            }
            let (count, body_rest, stream) = match head {
                Head::Needs(_) => unreachable!("handled above"),
                Head::Whole(header) => (header.payload_bytes as usize, 0, header.stream),
                Head::Request(header, head_bytes) => {
                    (head_bytes, header.payload_bytes - head_bytes as u32, header.stream)
                }
                Head::Body(header) => (0, header.payload_bytes, header.stream),
            };
            self.body_rest = body_rest;
            self.body_stream = stream;
            let bytes: &'a [u8] = if straight {
                let (bytes, rest) = input.split_at(HEADER_BYTES + count);
                *input = rest;
                bytes
            } else {
                self.partial_done = true;
                &self.partial
            };
            let payload = &bytes[HEADER_BYTES..];
            return Ok(Some(match head {
                Head::Needs(_) => unreachable!("handled above"),
                Head::Whole(header) => Piece::Frame { header, payload },
                Head::Request(..) => {
                    let prelude = Prelude::decode(payload);
                    Piece::Request { stream, prelude, body_bytes: body_rest }
                }
                Head::Body(_) => Piece::Body { stream, body_bytes: body_rest },
            }));
        }
    }

    /// Looks at the beginning of a frame. A count in [`Head::Needs`] is above `bytes.len()`, or
    /// above what `partial` holds when all of it is still in the input.
    fn judge(&self, bytes: &[u8]) -> Result<Head, ProtocolError> {
        let Some((head, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(Head::Needs(HEADER_BYTES));
        };
        let header = Header::decode(head)?;
        let bytes_max = match self.side {
            Side::FromClient => ClientFrame::payload_bytes_max(header.kind, self.frame_bytes_max),
            Side::FromServer => ServerFrame::payload_bytes_max(header.kind),
        };
        let Some(bytes_max) = bytes_max else {
            let message = format!("{} may not come from this side", header.kind.name());
            return Err(ProtocolError::new(ErrorCode::UnexpectedFrame, header.stream, message));
        };
        if header.payload_bytes > bytes_max {
            let message = format!(
                "a payload of {} has at most {bytes_max} bytes, not {}",
                header.kind.name(),
                header.payload_bytes
            );
            return Err(ProtocolError::new(ErrorCode::FrameTooLarge, header.stream, message));
        }
        match header.kind {
            FrameType::Body => Ok(Head::Body(header)),
            FrameType::Request => {
                check_request_payload(header.payload_bytes, header.stream, None)?;
                let Some(fixed) = payload.get(..PRELUDE_BYTES) else {
                    return Ok(Head::Needs(HEADER_BYTES + PRELUDE_BYTES));
                };
                check_request_payload(header.payload_bytes, header.stream, Some(fixed))?;
                let head_bytes = Prelude::head_bytes(fixed);
                if payload.len() < head_bytes {
                    return Ok(Head::Needs(HEADER_BYTES + head_bytes));
                }
                Ok(Head::Request(header, head_bytes))
            }
            _ if payload.len() < header.payload_bytes as usize => {
                Ok(Head::Needs(HEADER_BYTES + header.payload_bytes as usize))
            }
            _ => Ok(Head::Whole(header)),
        }
    }
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
mod tests;
