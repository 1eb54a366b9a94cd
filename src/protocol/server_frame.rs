//! Frames from server to client.

use super::bytes::{Reader, put_text_u8, put_text_u16, put_u16, put_u32, put_u64};
use super::frame::{Capabilities, ErrorCode, FrameType, Header, ProtocolError, limits, put_frame};
use super::tokens::{TokensFrame, TokensWriter, decode_tokens};
use crate::request::{FinishReason, RejectReason, Timings, Usage};

/// The handshake's answer: what the server is, and what it allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome<'a> {
    /// The version that both now speak.
    pub version: u16,
    /// What both understand.
    pub capabilities: Capabilities,
    /// Longest payload of a frame from the client.
    pub frame_bytes_max: u32,
    /// Longest body of a request.
    pub request_bytes_max: u32,
    /// Streams that may be open at once on this connection.
    pub streams_max: u32,
    /// Most token credit that a stream may have outstanding.
    pub window_tokens_max: u32,
    /// Requests that may be sent before the first REQUEST_CREDIT.
    pub request_credit: u32,
    /// Token ids are below this.
    pub vocab_tokens: u32,
    /// Prompt and output together.
    pub context_tokens: u32,
    /// A connection without streams and without a frame for this long is closed.
    pub idle_timeout_ms: u32,
    /// The model's name.
    pub model: &'a str,
    /// The server's name and version.
    pub server: &'a str,
}

/// The request is in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Requests ahead of it.
    pub position: u32,
    /// Tokens of its prompt, template included.
    pub prompt_tokens: u32,
    /// Its output limit: what was asked for, cut to what the context leaves.
    pub max_tokens: u32,
}

/// The end of an accepted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Why.
    pub finish: FinishReason,
    /// What it used.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

/// The end of a request that was refused, or evicted before it was admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejected<'a> {
    /// Why.
    pub reason: RejectReason,
    /// When coming back has a chance; `None` when waiting cannot help.
    pub retry_after_ms: Option<u32>,
    /// For a person.
    pub message: &'a str,
}

/// One number of a STATS_REPLY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat<'a> {
    /// What it counts.
    pub name: &'a str,
    /// How much.
    pub value: u64,
}

/// The numbers of a STATS_REPLY in their wire form, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatList<'a> {
    count: usize,
    bytes: &'a [u8],
}

impl<'a> StatList<'a> {
    fn read(reader: &mut Reader<'a>) -> Option<StatList<'a>> {
        let count = usize::from(reader.u16()?);
        let start = *reader;
        for _ in 0..count {
            read_stat(reader)?;
        }
        let bytes = { start }.take(start.rest_bytes() - reader.rest_bytes())?;
        Some(StatList { count, bytes })
    }

    /// The numbers, in the server's order.
    pub fn iter(self) -> impl Iterator<Item = Stat<'a>> {
        let mut reader = Reader::new(self.bytes);
        (0..self.count).map_while(move |_| read_stat(&mut reader))
    }
}

fn read_stat<'a>(reader: &mut Reader<'a>) -> Option<Stat<'a>> {
    let value = reader.u64()?;
    Some(Stat { name: reader.text_u8()?, value })
}

/// A frame that a server sends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ServerFrame<'a> {
    /// The handshake's answer.
    Welcome(Welcome<'a>),
    /// This many more requests may be sent.
    RequestCredit(u32),
    /// Answer with the same number.
    Ping(u64),
    /// The answer to the client's ping.
    Pong(u64),
    /// The answer to STATS.
    StatsReply(StatList<'a>),
    /// No new requests; those in progress have this many milliseconds (0: not known).
    GoingAway {
        /// Milliseconds until the server cancels what is left.
        deadline_ms: u32,
    },
    /// The connection is over.
    Error {
        /// One of [`ErrorCode`], or a number from a later version.
        code: u16,
        /// The stream that broke a rule, or 0.
        about_stream: u32,
        /// For a person.
        message: &'a str,
    },
    /// In the queue.
    Accepted {
        /// Which stream.
        stream: u32,
        /// Where in the queue, and how much it may produce.
        accepted: Accepted,
    },
    /// Output.
    Tokens {
        /// Which stream.
        stream: u32,
        /// What came.
        tokens: TokensFrame<'a>,
    },
    /// Out of credit.
    Paused {
        /// Which stream.
        stream: u32,
    },
    /// Going on.
    Resumed {
        /// Which stream.
        stream: u32,
    },
    /// The end.
    Done {
        /// Which stream.
        stream: u32,
        /// How it ended.
        done: Done,
    },
    /// Refused or evicted.
    Rejected {
        /// Which stream.
        stream: u32,
        /// Why.
        rejected: Rejected<'a>,
    },
}

impl<'a> ServerFrame<'a> {
    /// The longest payload of a type from a server; `None` for types only a client sends.
    pub(super) fn payload_bytes_max(kind: FrameType) -> Option<u32> {
        Some(match kind {
            FrameType::Welcome
            | FrameType::StatsReply
            | FrameType::Tokens
            | FrameType::GoingAway
            | FrameType::Error
            | FrameType::Rejected => limits::SERVER_FRAME_BYTES_MAX,
            FrameType::RequestCredit => 4,
            FrameType::Ping | FrameType::Pong => 8,
            FrameType::Accepted => 12,
            FrameType::Paused | FrameType::Resumed => 0,
            FrameType::Done => 48,
            _ => return None,
        })
    }

    /// Reads one whole frame.
    pub fn decode(header: Header, payload: &'a [u8]) -> Result<ServerFrame<'a>, ProtocolError> {
        let mut reader = Reader::new(payload);
        let stream = header.stream;
        let frame = match header.kind {
            FrameType::Welcome => {
                let welcome = decode_welcome(&mut reader).map(ServerFrame::Welcome);
                // A later minor version may say more.
                return welcome.ok_or_else(|| ProtocolError::malformed(header.kind, stream));
            }
            FrameType::RequestCredit => reader.u32().map(ServerFrame::RequestCredit),
            FrameType::Ping => reader.u64().map(ServerFrame::Ping),
            FrameType::Pong => reader.u64().map(ServerFrame::Pong),
            FrameType::StatsReply => StatList::read(&mut reader).map(ServerFrame::StatsReply),
            FrameType::GoingAway => {
                reader.u32().map(|deadline_ms| ServerFrame::GoingAway { deadline_ms })
            }
            FrameType::Error => decode_error(&mut reader),
            FrameType::Accepted => decode_accepted(&mut reader)
                .map(|accepted| ServerFrame::Accepted { stream, accepted }),
            FrameType::Tokens => {
                decode_tokens(&mut reader).map(|tokens| ServerFrame::Tokens { stream, tokens })
            }
            FrameType::Paused => Some(ServerFrame::Paused { stream }),
            FrameType::Resumed => Some(ServerFrame::Resumed { stream }),
            FrameType::Done => {
                decode_done(&mut reader).map(|done| ServerFrame::Done { stream, done })
            }
            FrameType::Rejected => decode_rejected(&mut reader)
                .map(|rejected| ServerFrame::Rejected { stream, rejected }),
            kind => {
                let message = format!("{} is not a frame that a server sends", kind.name());
                return Err(ProtocolError::new(ErrorCode::UnexpectedFrame, stream, message));
            }
        };
        frame
            .and_then(|frame| reader.finish(frame))
            .ok_or_else(|| ProtocolError::malformed(header.kind, stream))
    }

    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            ServerFrame::Welcome(welcome) => encode_welcome(out, welcome),
            ServerFrame::RequestCredit(count) => {
                put_frame(out, FrameType::RequestCredit, 0, |out| put_u32(out, *count));
            }
            ServerFrame::Ping(n) => put_frame(out, FrameType::Ping, 0, |out| put_u64(out, *n)),
            ServerFrame::Pong(n) => put_frame(out, FrameType::Pong, 0, |out| put_u64(out, *n)),
            ServerFrame::StatsReply(list) => put_frame(out, FrameType::StatsReply, 0, |out| {
                put_u16(out, list.count as u16);
                out.extend_from_slice(list.bytes);
            }),
            ServerFrame::GoingAway { deadline_ms } => {
                put_frame(out, FrameType::GoingAway, 0, |out| put_u32(out, *deadline_ms));
            }
            ServerFrame::Error { code, about_stream, message } => {
                put_frame(out, FrameType::Error, 0, |out| {
                    put_u16(out, *code);
                    put_u16(out, 0);
                    put_u32(out, *about_stream);
                    put_text_u16(out, message, limits::MESSAGE_BYTES_MAX);
                });
            }
            ServerFrame::Accepted { stream, accepted } => {
                put_frame(out, FrameType::Accepted, *stream, |out| {
                    put_u32(out, accepted.position);
                    put_u32(out, accepted.prompt_tokens);
                    put_u32(out, accepted.max_tokens);
                });
            }
            ServerFrame::Tokens { stream, tokens } => {
                let mut writer = TokensWriter::begin(out, *stream, tokens.ids.iter(), tokens.text);
                for entry in tokens.logprobs.iter() {
                    writer.logprob(entry.logprob, entry.top());
                }
                writer.end();
            }
            ServerFrame::Paused { stream } => put_frame(out, FrameType::Paused, *stream, |_| {}),
            ServerFrame::Resumed { stream } => put_frame(out, FrameType::Resumed, *stream, |_| {}),
            ServerFrame::Done { stream, done } => {
                put_frame(out, FrameType::Done, *stream, |out| encode_done(out, done));
            }
            ServerFrame::Rejected { stream, rejected } => {
                put_frame(out, FrameType::Rejected, *stream, |out| {
                    out.push(rejected.reason as u8);
                    out.push(u8::from(rejected.retry_after_ms.is_none()));
                    put_u16(out, 0);
                    put_u32(out, rejected.retry_after_ms.unwrap_or(0));
                    put_text_u16(out, rejected.message, limits::MESSAGE_BYTES_MAX);
                });
            }
        }
    }

    /// Appends a STATS_REPLY of at most [`limits::STATS_MAX`] numbers.
    pub fn encode_stats<'s>(out: &mut Vec<u8>, stats: impl IntoIterator<Item = Stat<'s>>) {
        put_frame(out, FrameType::StatsReply, 0, |out| {
            let start = out.len();
            put_u16(out, 0);
            let mut count = 0u16;
            for stat in stats.into_iter().take(limits::STATS_MAX) {
                put_u64(out, stat.value);
                put_text_u8(out, stat.name);
                count += 1;
            }
            out[start..start + 2].copy_from_slice(&count.to_le_bytes());
        });
    }
}

fn decode_welcome<'a>(reader: &mut Reader<'a>) -> Option<Welcome<'a>> {
    let version = reader.u16()?;
    reader.u16()?;
    Some(Welcome {
        version,
        capabilities: Capabilities(reader.u32()?),
        frame_bytes_max: reader.u32()?,
        request_bytes_max: reader.u32()?,
        streams_max: reader.u32()?,
        window_tokens_max: reader.u32()?,
        request_credit: reader.u32()?,
        vocab_tokens: reader.u32()?,
        context_tokens: reader.u32()?,
        idle_timeout_ms: reader.u32()?,
        model: reader.text_u8()?,
        server: reader.text_u8()?,
    })
}

fn encode_welcome(out: &mut Vec<u8>, welcome: &Welcome<'_>) {
    put_frame(out, FrameType::Welcome, 0, |out| {
        put_u16(out, welcome.version);
        put_u16(out, 0);
        put_u32(out, welcome.capabilities.0);
        put_u32(out, welcome.frame_bytes_max);
        put_u32(out, welcome.request_bytes_max);
        put_u32(out, welcome.streams_max);
        put_u32(out, welcome.window_tokens_max);
        put_u32(out, welcome.request_credit);
        put_u32(out, welcome.vocab_tokens);
        put_u32(out, welcome.context_tokens);
        put_u32(out, welcome.idle_timeout_ms);
        put_text_u8(out, welcome.model);
        put_text_u8(out, welcome.server);
    });
}

fn decode_error<'a>(reader: &mut Reader<'a>) -> Option<ServerFrame<'a>> {
    let code = reader.u16()?;
    reader.u16()?;
    let about_stream = reader.u32()?;
    Some(ServerFrame::Error { code, about_stream, message: reader.text_u16()? })
}

fn decode_accepted(reader: &mut Reader<'_>) -> Option<Accepted> {
    Some(Accepted {
        position: reader.u32()?,
        prompt_tokens: reader.u32()?,
        max_tokens: reader.u32()?,
    })
}

fn encode_done(out: &mut Vec<u8>, done: &Done) {
    out.extend_from_slice(&[done.finish as u8, 0, 0, 0]);
    put_u32(out, done.usage.prompt_tokens);
    put_u32(out, done.usage.cached_tokens);
    put_u32(out, done.usage.output_tokens);
    put_u64(out, done.timings.queue_ns);
    put_u64(out, done.timings.ttft_ns);
    put_u64(out, done.timings.total_ns);
    put_u64(out, done.timings.parked_ns);
}

fn decode_done(reader: &mut Reader<'_>) -> Option<Done> {
    let finish = FinishReason::from_wire(reader.u8()?)?;
    reader.take(3)?;
    Some(Done {
        finish,
        usage: Usage {
            prompt_tokens: reader.u32()?,
            cached_tokens: reader.u32()?,
            output_tokens: reader.u32()?,
        },
        timings: Timings {
            queue_ns: reader.u64()?,
            ttft_ns: reader.u64()?,
            total_ns: reader.u64()?,
            parked_ns: reader.u64()?,
        },
    })
}

fn decode_rejected<'a>(reader: &mut Reader<'a>) -> Option<Rejected<'a>> {
    let reason = RejectReason::from_wire(reader.u8()?)?;
    let do_not_retry = match reader.u8()? {
        0 => false,
        1 => true,
        _ => return None,
    };
    reader.u16()?;
    let retry_after_ms = reader.u32()?;
    Some(Rejected {
        reason,
        retry_after_ms: (!do_not_retry).then_some(retry_after_ms),
        message: reader.text_u16()?,
    })
}

impl ErrorCode {
    /// The ERROR frame that tells it.
    pub fn frame<'a>(self, about_stream: u32, message: &'a str) -> ServerFrame<'a> {
        ServerFrame::Error { code: self as u16, about_stream, message }
    }
}

#[cfg(test)]
#[path = "server_frame_tests.rs"]
mod tests;
