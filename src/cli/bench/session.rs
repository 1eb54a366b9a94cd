//! The load generator's side of one connection, without sockets and clocks: bytes come in, what
//! they mean comes out, and what is to be sent waits in a buffer.

use std::collections::BTreeMap;

use super::workload::Job;
use crate::protocol::{
    Capabilities, ClientFrame, Decoder, Done, Hello, Piece, Request, RequestPrompt, ServerFrame,
    Side, VERSION, encode_request,
};
use crate::request::RejectReason;

/// Credit that a request begins with, and that is kept topped up: the generator reads as fast as
/// the server sends.
const WINDOW_TOKENS: u32 = 256;

/// What WELCOME told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerInfo {
    /// The model's name.
    pub model: String,
    /// The server's name and version.
    pub server: String,
    /// Token ids are below this.
    pub vocab: u32,
    /// Prompt and output together.
    pub context: u32,
    /// Streams that may be open on this connection.
    pub streams_max: u32,
    window_tokens: u32,
    frame_bytes_max: u32,
}

/// Something that happened on a stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Seen {
    /// So many tokens came together.
    Tokens(u32),
    /// The end of an accepted request.
    Done(Done),
    /// Refused or evicted, and when to come back.
    Rejected(RejectReason, Option<u32>),
}

/// One connection.
#[derive(Debug)]
pub struct Session {
    decoder: Decoder,
    out: Vec<u8>,
    server: Option<ServerInfo>,
    request_credit: u32,
    last_stream: u32,
    /// Open streams, and the tokens read of each for which no credit was given back yet.
    streams: BTreeMap<u32, u32>,
    going_away: bool,
}

impl Session {
    /// A connection that has just been made.
    pub fn new() -> Session {
        let mut out = Vec::new();
        let hello = Hello {
            version_min: VERSION,
            version_max: VERSION,
            capabilities: Capabilities::ALL,
            client: concat!("forebay-bench/", env!("CARGO_PKG_VERSION")),
            token: "",
        };
        ClientFrame::Hello(hello).encode(&mut out);
        Session {
            decoder: Decoder::new(Side::FromServer, u32::MAX),
            out,
            server: None,
            request_credit: 0,
            last_stream: 0,
            streams: BTreeMap::new(),
            going_away: false,
        }
    }

    /// What the server is; `None` until it has answered.
    pub fn server(&self) -> Option<&ServerInfo> {
        self.server.as_ref()
    }

    /// Takes what is to be sent.
    pub fn take_out(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// Whether a request may be sent now.
    pub fn can_request(&self) -> bool {
        let room = |server: &ServerInfo| self.streams.len() < server.streams_max as usize;
        self.request_credit > 0 && !self.going_away && self.server.as_ref().is_some_and(room)
    }

    /// Whether the server said that it takes no new requests here.
    pub fn is_going_away(&self) -> bool {
        self.going_away
    }

    /// Sends a request and returns its stream's number.
    ///
    /// # Panics
    /// When [`Session::can_request`] says no.
    pub fn request(&mut self, job: Job) -> u32 {
        assert!(self.can_request(), "no credit for a request");
        let server = self.server.as_ref().expect("it has answered");
        let mut request = Request::new(RequestPrompt::Tokens(job.prompt));
        request.max_tokens = Some(job.output_tokens);
        request.window_tokens = server.window_tokens;
        request.options.ignore_eos = true;
        request.options.sampling.temperature = 0.0;
        self.request_credit -= 1;
        self.last_stream += 1;
        // The prelude and the options fit into what is left of the frame.
        let part = (server.frame_bytes_max as usize).saturating_sub(1024).max(256);
        encode_request(&mut self.out, self.last_stream, &request, part);
        self.streams.insert(self.last_stream, 0);
        self.last_stream
    }

    /// Bytes came. The error says why the connection is of no use any more.
    pub fn handle(
        &mut self,
        mut bytes: &[u8],
        seen: &mut impl FnMut(u32, Seen),
    ) -> Result<(), String> {
        loop {
            // Moved out and back, because a piece borrows from the decoder.
            let mut decoder =
                std::mem::replace(&mut self.decoder, Decoder::new(Side::FromServer, 0));
            let result = match decoder.next(&mut bytes) {
                Ok(Some(Piece::Frame { header, payload })) => ServerFrame::decode(header, payload)
                    .map_err(|e| e.to_string())
                    .and_then(|frame| {
                        self.handle_frame(frame, seen)?;
                        Ok(true)
                    }),
                Ok(Some(_)) => Err("the server sent a client's frame".to_owned()),
                Ok(None) => Ok(false),
                Err(error) => Err(error.to_string()),
            };
            self.decoder = decoder;
            if !result? {
                return Ok(());
            }
        }
    }

    fn handle_frame(
        &mut self,
        frame: ServerFrame<'_>,
        seen: &mut impl FnMut(u32, Seen),
    ) -> Result<(), String> {
        match frame {
            ServerFrame::Welcome(welcome) => {
                if !welcome.capabilities.contains(Capabilities::TOKEN_PROMPTS) {
                    return Err("the server takes no prompts of token ids".into());
                }
                self.request_credit = welcome.request_credit;
                self.server = Some(ServerInfo {
                    model: welcome.model.to_owned(),
                    server: welcome.server.to_owned(),
                    vocab: welcome.vocab_tokens,
                    context: welcome.context_tokens,
                    streams_max: welcome.streams_max,
                    window_tokens: WINDOW_TOKENS.min(welcome.window_tokens_max),
                    frame_bytes_max: welcome.frame_bytes_max,
                });
            }
            ServerFrame::RequestCredit(count) => {
                self.request_credit = self.request_credit.saturating_add(count);
            }
            ServerFrame::Ping(number) => ClientFrame::Pong(number).encode(&mut self.out),
            ServerFrame::GoingAway { .. } => self.going_away = true,
            ServerFrame::Error { message, .. } => return Err(format!("the server: {message}")),
            ServerFrame::Tokens { stream, tokens } => {
                let count = tokens.ids.len() as u32;
                self.give_credit(stream, count);
                if self.streams.contains_key(&stream) {
                    seen(stream, Seen::Tokens(count));
                }
            }
            ServerFrame::Done { stream, done } => {
                if self.streams.remove(&stream).is_some() {
                    seen(stream, Seen::Done(done));
                }
            }
            ServerFrame::Rejected { stream, rejected } => {
                if self.streams.remove(&stream).is_some() {
                    seen(stream, Seen::Rejected(rejected.reason, rejected.retry_after_ms));
                }
            }
            ServerFrame::Pong(_)
            | ServerFrame::StatsReply(_)
            | ServerFrame::Accepted { .. }
            | ServerFrame::Paused { .. }
            | ServerFrame::Resumed { .. } => {}
        }
        Ok(())
    }

    /// Gives credit back in bulk, at half a window: a frame for each token would cost the server
    /// more than the token's own frame.
    fn give_credit(&mut self, stream: u32, count: u32) {
        let window = self.server.as_ref().map_or(WINDOW_TOKENS, |server| server.window_tokens);
        let Some(owed) = self.streams.get_mut(&stream) else { return };
        *owed += count;
        if *owed >= window.div_ceil(2) {
            ClientFrame::Credit { stream, tokens: *owed }.encode(&mut self.out);
            *owed = 0;
        }
    }
}
