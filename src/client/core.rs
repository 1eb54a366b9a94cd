//! The client's side of the protocol, without I/O.

use std::collections::{BTreeMap, VecDeque};

use super::ClientOptions;
use super::error::ClientError;
use super::event::{Event, Rejection, ServerInfo, Tokens};
use crate::protocol::{
    Capabilities, ClientFrame, Decoder, ErrorCode, Hello, Piece, Prelude, ProtocolError, Request,
    ServerFrame, Side, VERSION, encode_body, encode_body_frame, encode_request_frame,
};

/// Bytes of body in one frame. A credit or a cancel waits behind one of them at most.
const BODY_PART_BYTES: usize = 16 << 10;

/// Outgoing bytes above which no more body is put into the buffer.
const OUTGOING_BYTES_MAX: usize = 2 * BODY_PART_BYTES;

/// A request's body on its way.
#[derive(Debug)]
struct Upload {
    prelude: Prelude,
    body: Vec<u8>,
    /// Bytes of `body` that are in frames already; `None` before REQUEST.
    sent: Option<usize>,
}

#[derive(Debug)]
struct Stream {
    events: VecDeque<Event>,
    /// Largest credit that may be outstanding.
    window: u32,
    /// Tokens the server may still send.
    outstanding: u32,
    /// Tokens taken by the caller whose credit has not gone back.
    owed: u32,
    upload: Option<Upload>,
    is_over: bool,
    /// The caller is gone: events are dropped, and the stream with its last.
    is_abandoned: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Handshake,
    Open,
    Failed,
}

/// A client connection as a state machine: bytes in, events out; calls in, bytes out.
///
/// - [`ClientCore::handle_received`] takes what came from the server.
/// - [`ClientCore::start`], [`ClientCore::cancel`], … say what the caller wants.
/// - [`ClientCore::outgoing`] are the bytes to send next; tell how many went with
///   [`ClientCore::handle_sent`], and ask again.
/// - [`ClientCore::poll_event`] returns a stream's next event, and gives credit back for it.
///
/// Memory: per stream what its window allows the server to send, and its request's body until it
/// is sent; at most [`ClientOptions::waiting_max`] requests wait.
#[derive(Debug)]
pub struct ClientCore {
    state: State,
    decoder: Decoder,
    outgoing: Vec<u8>,
    /// Bytes of `outgoing` that are sent.
    outgoing_sent: usize,
    info: Option<ServerInfo>,
    request_credit: u32,
    streams: BTreeMap<u32, Stream>,
    stream_next: u32,
    /// Streams whose body is not all in frames, in order; the first has its REQUEST out already
    /// if `sent` says so.
    uploads: VecDeque<u32>,
    waiting_max: usize,
    /// Streams whose server's word is not the last yet.
    open: u32,
    stats: VecDeque<Vec<(String, u64)>>,
    pongs: VecDeque<u64>,
    going_away_ms: Option<u32>,
    error: Option<ClientError>,
}

impl ClientCore {
    /// A connection that was just made; HELLO is the first thing to send.
    pub fn new(options: &ClientOptions) -> ClientCore {
        let mut outgoing = Vec::new();
        let hello = Hello {
            version_min: VERSION,
            version_max: VERSION,
            capabilities: Capabilities::ALL,
            client: &options.name,
            token: &options.token,
        };
        ClientFrame::Hello(hello).encode(&mut outgoing);
        ClientCore {
            state: State::Handshake,
            decoder: Decoder::new(Side::FromServer, 0),
            outgoing,
            outgoing_sent: 0,
            info: None,
            request_credit: 0,
            streams: BTreeMap::new(),
            stream_next: 1,
            uploads: VecDeque::new(),
            waiting_max: options.waiting_max,
            open: 0,
            stats: VecDeque::new(),
            pongs: VecDeque::new(),
            going_away_ms: None,
            error: None,
        }
    }

    /// What the server said of itself; `None` before its WELCOME.
    pub fn info(&self) -> Option<&ServerInfo> {
        self.info.as_ref()
    }

    /// Why the connection is over, once it is.
    pub fn error(&self) -> Option<&ClientError> {
        self.error.as_ref()
    }

    /// Milliseconds that the server still gives what is in progress, once it said that it is
    /// going away. New requests belong on another connection then.
    pub fn going_away_ms(&self) -> Option<u32> {
        self.going_away_ms
    }

    /// Takes bytes from the server.
    ///
    /// # Errors
    /// When the server ended the connection or broke the protocol; it is over then.
    pub fn handle_received(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let mut decoder = std::mem::replace(&mut self.decoder, Decoder::new(Side::FromServer, 0));
        let mut input = bytes;
        let result = loop {
            let frame = match decoder.next(&mut input) {
                Ok(None) => break Ok(()),
                Ok(Some(Piece::Frame { header, payload })) => ServerFrame::decode(header, payload),
                Ok(Some(_)) => unreachable!("a server's frames come whole"),
                Err(error) => Err(error),
            };
            let handled =
                frame.map_err(ClientError::Protocol).and_then(|frame| self.handle_frame(frame));
            if let Err(error) = handled {
                break Err(error);
            }
        };
        self.decoder = decoder;
        result.inspect_err(|error| self.fail(error.clone()))
    }

    /// The connection is over; every stream's next event is this error.
    pub fn fail(&mut self, error: ClientError) {
        if self.error.is_none() {
            self.error = Some(error);
        }
        self.state = State::Failed;
        self.streams.retain(|_, stream| !stream.is_abandoned);
    }

    /// Starts a request and returns its stream. It goes out as soon as there is request credit.
    ///
    /// # Errors
    /// When the connection is over, too many wait, or the request can never be sent as it is.
    pub fn start(&mut self, request: &Request) -> Result<u32, ClientError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        if self.uploads.len() >= self.waiting_max {
            return Err(ClientError::TooManyWaiting);
        }
        if request.window_tokens == 0 {
            return Err(ClientError::Request("window_tokens must be at least 1".into()));
        }
        let mut body = Vec::new();
        let mut prelude = encode_body(request, &mut body);
        if let Some(info) = &self.info {
            check_body(info, &body)?;
            prelude.window_tokens = prelude.window_tokens.min(info.window_tokens_max);
        }
        let number = self.stream_next;
        self.stream_next = number.checked_add(1).ok_or(ClientError::Closed)?;
        let stream = Stream {
            events: VecDeque::new(),
            window: prelude.window_tokens,
            outstanding: prelude.window_tokens,
            owed: 0,
            upload: Some(Upload { prelude, body, sent: None }),
            is_over: false,
            is_abandoned: false,
        };
        self.streams.insert(number, stream);
        self.uploads.push_back(number);
        Ok(number)
    }

    /// Asks the server to stop a stream. Its last event still comes.
    pub fn cancel(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number).filter(|stream| !stream.is_over) else {
            return;
        };
        match stream.upload.take_if(|upload| upload.sent.is_none()) {
            // The server does not know of it: it never will.
            Some(_) => {
                self.uploads.retain(|&other| other != number);
                stream.is_over = true;
                let done = crate::protocol::Done {
                    finish: crate::request::FinishReason::Cancelled,
                    usage: Default::default(),
                    timings: Default::default(),
                };
                stream.events.push_back(Event::Done(done));
            }
            None => {
                stream.upload = None;
                self.uploads.retain(|&other| other != number);
                ClientFrame::Cancel { stream: number }.encode(&mut self.outgoing);
            }
        }
    }

    /// The caller does not want a stream any more, nor its events.
    pub fn abandon(&mut self, number: u32) {
        self.cancel(number);
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if stream.is_over || self.state == State::Failed {
            self.streams.remove(&number);
        } else {
            stream.is_abandoned = true;
            stream.events.clear();
        }
    }

    /// Asks for the server's numbers; they come from [`ClientCore::poll_stats`].
    pub fn ask_stats(&mut self) {
        ClientFrame::Stats.encode(&mut self.outgoing);
    }

    /// The numbers of an answered [`ClientCore::ask_stats`].
    pub fn poll_stats(&mut self) -> Option<Vec<(String, u64)>> {
        self.stats.pop_front()
    }

    /// Sends a ping; its number comes back from [`ClientCore::poll_pong`].
    pub fn ping(&mut self, number: u64) {
        ClientFrame::Ping(number).encode(&mut self.outgoing);
    }

    /// The number of an answered ping.
    pub fn poll_pong(&mut self) -> Option<u64> {
        self.pongs.pop_front()
    }

    /// The next event of a stream. `None`: none yet. After the last event, or when the connection
    /// is over and what came before is taken, an error or `Ok(None)` forever; see
    /// [`ClientCore::is_finished`].
    pub fn poll_event(&mut self, number: u32) -> Result<Option<Event>, ClientError> {
        let Some(stream) = self.streams.get_mut(&number) else { return Ok(None) };
        let Some(event) = stream.events.pop_front() else {
            if let (false, Some(error)) = (stream.is_over, &self.error) {
                let error = error.clone();
                self.streams.remove(&number);
                return Err(error);
            }
            return Ok(None);
        };
        if let Event::Tokens(tokens) = &event {
            stream.owed += tokens.ids.len() as u32;
            // Half a window at a time: few frames, and the stream never runs dry meanwhile.
            if stream.owed >= stream.window.div_ceil(2) && !stream.is_over {
                let tokens = std::mem::take(&mut stream.owed);
                stream.outstanding += tokens;
                ClientFrame::Credit { stream: number, tokens }.encode(&mut self.outgoing);
            }
        }
        if event.is_last() {
            self.streams.remove(&number);
        }
        Ok(Some(event))
    }

    /// Whether a stream has had its last event (or never was).
    pub fn is_finished(&self, number: u32) -> bool {
        !self.streams.contains_key(&number)
    }

    /// Whether [`ClientCore::outgoing`] has something.
    pub fn wants_to_send(&self) -> bool {
        let upload_can_go = || {
            let first = self.uploads.front().and_then(|number| self.streams.get(number));
            let upload = first.and_then(|stream| stream.upload.as_ref());
            upload.is_some_and(|upload| upload.sent.is_some() || self.request_credit > 0)
        };
        self.outgoing_sent < self.outgoing.len() || (self.state == State::Open && upload_can_go())
    }

    /// The bytes to send next.
    pub fn outgoing(&mut self) -> &[u8] {
        if self.outgoing_sent == self.outgoing.len() {
            self.outgoing.clear();
            self.outgoing_sent = 0;
        }
        while self.state == State::Open
            && self.outgoing.len() - self.outgoing_sent < OUTGOING_BYTES_MAX
            && self.put_body_part()
        {}
        &self.outgoing[self.outgoing_sent..]
    }

    /// The first `count` of [`ClientCore::outgoing`] are sent.
    pub fn handle_sent(&mut self, count: usize) {
        assert!(self.outgoing_sent + count <= self.outgoing.len(), "more sent than there was");
        self.outgoing_sent += count;
    }

    /// Puts the next part of the first upload into the buffer; `false` when there is none or it
    /// must wait for request credit.
    fn put_body_part(&mut self) -> bool {
        let Some(&number) = self.uploads.front() else { return false };
        let info = self.info.as_ref().expect("open after WELCOME");
        let stream = self.streams.get_mut(&number).expect("an upload has its stream");
        let upload = stream.upload.as_mut().expect("it is in the list of uploads");
        let part_max = BODY_PART_BYTES.min(info.frame_bytes_max as usize / 2);
        let from = upload.sent.unwrap_or(0);
        let part = &upload.body[from..upload.body.len().min(from + part_max)];
        if upload.sent.is_none() {
            if self.request_credit == 0 || self.open >= info.streams_max {
                return false;
            }
            // It was made before the server told its limits, perhaps.
            if let Err(ClientError::Request(message)) = check_body(info, &upload.body) {
                let reason = crate::request::RejectReason::ExceedsCapacity;
                let rejection = Rejection { reason, retry_after_ms: None, message };
                stream.upload = None;
                stream.is_over = true;
                stream.events.push_back(Event::Rejected(rejection));
                self.uploads.pop_front();
                return true;
            }
            self.request_credit -= 1;
            self.open += 1;
            let window = upload.prelude.window_tokens.min(info.window_tokens_max);
            upload.prelude.window_tokens = window;
            (stream.window, stream.outstanding) = (window, window);
            encode_request_frame(&mut self.outgoing, number, &upload.prelude, part);
        } else {
            encode_body_frame(&mut self.outgoing, number, part);
        }
        let sent = from + part.len();
        upload.sent = Some(sent);
        if sent == upload.body.len() {
            stream.upload = None;
            self.uploads.pop_front();
        }
        true
    }

    fn handle_frame(&mut self, frame: ServerFrame<'_>) -> Result<(), ClientError> {
        if let ServerFrame::Error { code, about_stream, message } = frame {
            let message = message.to_owned();
            return Err(ClientError::Server { code, stream: about_stream, message });
        }
        let is_welcome = matches!(frame, ServerFrame::Welcome(_));
        if is_welcome != (self.state == State::Handshake) {
            let message = "WELCOME comes once, and first";
            let error = ProtocolError::new(ErrorCode::UnexpectedFrame, 0, message);
            return Err(ClientError::Protocol(error));
        }
        match frame {
            ServerFrame::Welcome(welcome) => {
                self.request_credit = welcome.request_credit;
                self.info = Some(ServerInfo::from(welcome));
                self.state = State::Open;
            }
            ServerFrame::RequestCredit(count) => {
                self.request_credit = self.request_credit.saturating_add(count);
            }
            ServerFrame::Ping(number) => ClientFrame::Pong(number).encode(&mut self.outgoing),
            ServerFrame::Pong(number) => self.pongs.push_back(number),
            ServerFrame::StatsReply(list) => {
                let stats = list.iter().map(|stat| (stat.name.to_owned(), stat.value));
                self.stats.push_back(stats.collect());
            }
            ServerFrame::GoingAway { deadline_ms } => self.going_away_ms = Some(deadline_ms),
            ServerFrame::Error { .. } => unreachable!("handled above"),
            ServerFrame::Accepted { stream, accepted } => {
                self.put_event(stream, Event::Accepted(accepted))?;
            }
            ServerFrame::Tokens { stream, tokens } => {
                self.put_event(stream, Event::Tokens(Tokens::from(tokens)))?;
            }
            ServerFrame::Paused { stream } => self.put_event(stream, Event::Paused)?,
            ServerFrame::Resumed { stream } => self.put_event(stream, Event::Resumed)?,
            ServerFrame::Done { stream, done } => self.put_event(stream, Event::Done(done))?,
            ServerFrame::Rejected { stream, rejected } => {
                let rejection = Rejection {
                    reason: rejected.reason,
                    retry_after_ms: rejected.retry_after_ms,
                    message: rejected.message.to_owned(),
                };
                self.put_event(stream, Event::Rejected(rejection))?;
            }
        }
        Ok(())
    }

    fn put_event(&mut self, number: u32, event: Event) -> Result<(), ClientError> {
        let broken = |message: &'static str| {
            ClientError::Protocol(ProtocolError::new(ErrorCode::StreamNumber, number, message))
        };
        let stream = self
            .streams
            .get_mut(&number)
            .filter(|stream| !stream.is_over)
            .ok_or_else(|| broken("a frame for a stream that is not open"))?;
        if let Event::Tokens(tokens) = &event {
            let count = tokens.ids.len() as u32;
            stream.outstanding = stream
                .outstanding
                .checked_sub(count)
                .ok_or_else(|| broken("more tokens than there was credit for"))?;
        }
        if event.is_last() {
            stream.is_over = true;
            // What was refused need not be sent to its end.
            stream.upload = None;
            self.uploads.retain(|&other| other != number);
            self.open -= 1;
            if stream.is_abandoned {
                self.streams.remove(&number);
                return Ok(());
            }
        }
        if !stream.is_abandoned {
            stream.events.push_back(event);
        }
        Ok(())
    }
}

fn check_body(info: &ServerInfo, body: &[u8]) -> Result<(), ClientError> {
    if body.len() > info.request_bytes_max as usize {
        let message = format!(
            "the request has {} bytes; the server takes {}",
            body.len(),
            info.request_bytes_max
        );
        return Err(ClientError::Request(message));
    }
    Ok(())
}
