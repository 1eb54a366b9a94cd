//! The blocking client, the async client and the Python client over real sockets, against a small
//! server that echoes prompts a token a byte and keeps to its credit.

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::pin::Pin;
use std::process::Command;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use forebay::client::{
    AsyncClient, Client, ClientError, ClientOptions, Event, Generation, Request, RequestPrompt,
    RetryPolicy,
};
use forebay::protocol::{
    Accepted, Capabilities, ClientFrame, Decoder, Done, ErrorCode, Piece, Prelude, Prompt,
    Rejected, ServerFrame, Side, TokensWriter, Welcome, decode_body,
};
use forebay::request::{FinishReason, RejectReason};

/// One stream of the echo server.
struct Echo {
    prelude: Prelude,
    body: Vec<u8>,
    /// What is still to be sent, once the body is there.
    rest: Option<Vec<u8>>,
    credit: u32,
}

/// One connection of the echo server.
struct EchoServer {
    socket: TcpStream,
    streams: BTreeMap<u32, Echo>,
    out: Vec<u8>,
    /// Requests that begin with "later" are refused so many times more.
    refusals: u32,
}

/// A server that serves connections until the test ends.
fn start_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let socket = socket.unwrap();
            thread::spawn(move || {
                let (streams, out) = (BTreeMap::new(), Vec::new());
                let _ = EchoServer { socket, streams, out, refusals: 2 }.serve();
            });
        }
    });
    address
}

impl EchoServer {
    fn serve(&mut self) -> io::Result<()> {
        let mut decoder = Decoder::new(Side::FromClient, 4096);
        let mut buffer = [0; 4096];
        loop {
            let count = self.socket.read(&mut buffer)?;
            let mut input = &buffer[..count];
            if count == 0 {
                return Ok(());
            }
            while let Some(piece) = decoder.next(&mut input).expect("a client keeps the protocol") {
                self.handle(piece);
            }
            self.produce();
            self.socket.write_all(&self.out)?;
            self.out.clear();
        }
    }

    fn put(&mut self, frame: ServerFrame<'_>) {
        frame.encode(&mut self.out);
    }

    fn handle(&mut self, piece: Piece<'_>) {
        match piece {
            Piece::Frame { header, payload } => {
                match ClientFrame::decode(header, payload).unwrap() {
                    ClientFrame::Hello(hello) if hello.token == "wrong" => {
                        let error = ErrorCode::Unauthenticated.frame(0, "no");
                        self.put(error);
                    }
                    ClientFrame::Hello(_) => self.put(ServerFrame::Welcome(welcome())),
                    ClientFrame::Ping(number) => self.put(ServerFrame::Pong(number)),
                    ClientFrame::Stats => {
                        let stat = forebay::protocol::Stat { name: "answer", value: 42 };
                        ServerFrame::encode_stats(&mut self.out, [stat]);
                    }
                    ClientFrame::Credit { stream, tokens } => {
                        if let Some(echo) = self.streams.get_mut(&stream) {
                            echo.credit += tokens;
                        }
                    }
                    ClientFrame::Cancel { stream } => self.end(stream, FinishReason::Cancelled),
                    other => panic!("{other:?}"),
                }
            }
            Piece::Request { stream, prelude, .. } => {
                let prelude = prelude.unwrap();
                let credit = prelude.window_tokens;
                let echo = Echo { prelude, body: Vec::new(), rest: None, credit };
                self.streams.insert(stream, echo);
            }
            Piece::Body { .. } => {}
            Piece::BodyPart { stream, bytes } => self.handle_body(stream, bytes),
        }
    }

    fn handle_body(&mut self, stream: u32, bytes: &[u8]) {
        let Some(echo) = self.streams.get_mut(&stream) else { return };
        echo.body.extend_from_slice(bytes);
        if (echo.body.len() as u64) < echo.prelude.body_bytes() {
            return;
        }
        let body = decode_body(&echo.prelude, &echo.body).unwrap();
        let text = match body.prompt {
            Prompt::Text(text) => text.to_owned(),
            Prompt::Messages(messages) => messages[0].content.to_owned(),
            Prompt::Tokens(_) => String::new(),
        };
        if text.starts_with("later") && self.refusals > 0 {
            self.refusals -= 1;
            self.streams.remove(&stream);
            let reason = RejectReason::QueueFull;
            let rejected = Rejected { reason, retry_after_ms: Some(1), message: "full" };
            self.put(ServerFrame::Rejected { stream, rejected });
        } else {
            let prompt_tokens = text.len() as u32;
            echo.rest = Some(text.into_bytes());
            let accepted = Accepted { position: 0, prompt_tokens, max_tokens: prompt_tokens };
            self.put(ServerFrame::Accepted { stream, accepted });
        }
        self.put(ServerFrame::RequestCredit(1));
    }

    /// Sends what credit allows.
    fn produce(&mut self) {
        let mut over = Vec::new();
        for (&stream, echo) in &mut self.streams {
            let Some(rest) = &mut echo.rest else { continue };
            let count = rest.len().min(echo.credit as usize);
            echo.credit -= count as u32;
            let now: Vec<u8> = rest.drain(..count).collect();
            let text = String::from_utf8(now.clone()).unwrap();
            if count > 0 {
                let ids = now.iter().map(|&byte| u32::from(byte));
                TokensWriter::begin(&mut self.out, stream, ids, &text).end();
            }
            if rest.is_empty() {
                over.push(stream);
            }
        }
        for stream in over {
            self.end(stream, FinishReason::EndOfText);
        }
    }

    fn end(&mut self, stream: u32, finish: FinishReason) {
        if self.streams.remove(&stream).is_some() {
            let done = Done { finish, usage: Default::default(), timings: Default::default() };
            self.put(ServerFrame::Done { stream, done });
        }
    }
}

fn welcome() -> Welcome<'static> {
    Welcome {
        version: 1,
        capabilities: Capabilities::ALL,
        frame_bytes_max: 4096,
        request_bytes_max: 1 << 20,
        streams_max: 16,
        window_tokens_max: 64,
        request_credit: 3,
        vocab_tokens: 256,
        context_tokens: 1 << 20,
        idle_timeout_ms: 60_000,
        model: "echo",
        server: "test",
    }
}

fn text(prompt: &str, window_tokens: u32) -> Request {
    let mut request = Request::new(RequestPrompt::Text(prompt.to_owned()));
    request.window_tokens = window_tokens;
    request
}

/// All text of a generation, and how it ended.
fn collect(generation: Generation) -> (String, FinishReason) {
    let mut all = String::new();
    for event in generation {
        match event.unwrap() {
            Event::Tokens(tokens) => all.push_str(&tokens.text),
            Event::Done(done) => return (all, done.finish),
            Event::Rejected(rejection) => panic!("{rejection:?}"),
            _ => {}
        }
    }
    panic!("a generation ends with Done");
}

fn connect() -> Client {
    Client::connect(start_server(), &ClientOptions::default()).unwrap()
}

#[test]
fn many_threads_share_one_connection_and_each_gets_its_own_text() {
    let client = connect();
    assert_eq!(client.info().model, "echo");
    let threads = (0..12).map(|number| {
        let client = client.clone();
        thread::spawn(move || {
            // More than a window, so credit must go back; and more than a frame for some.
            let prompt = format!("<{number}>").repeat(20 + number * 200);
            let request = text(&prompt, 1 + number as u32 * 7);
            assert_eq!(
                collect(client.request(request).unwrap()),
                (prompt, FinishReason::EndOfText)
            );
        })
    });
    let threads: Vec<_> = threads.collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(client.stats().unwrap(), [("answer".to_owned(), 42)]);
    assert!(client.ping().unwrap() < Duration::from_secs(60));
}

#[test]
fn a_reader_that_stops_gets_no_more_than_its_window_until_it_reads() {
    let client = connect();
    let mut stalled = client.request(text(&"x".repeat(1000), 8)).unwrap();
    // Another stream goes on meanwhile.
    assert_eq!(collect(client.request(text("free", 8)).unwrap()).0, "free");
    let canceller = stalled.canceller();
    assert!(matches!(stalled.next(), Some(Ok(Event::Accepted(_)))));
    let Some(Ok(Event::Tokens(first))) = stalled.next() else { panic!("tokens") };
    assert_eq!(first.ids.len(), 8);
    canceller.cancel();
    let rest: usize = collect(stalled).0.len();
    assert!(rest <= 16, "{rest} tokens after the cancel");
}

#[test]
fn a_refused_request_comes_back_as_told() {
    let client = connect();
    let policy = RetryPolicy { seed: Some(1), ..RetryPolicy::default() };
    let generation = client.request_with_retries(text("later, please", 64), &policy).unwrap();
    assert_eq!(collect(generation).0, "later, please");
    // Without attempts left the refusal is the only event.
    let client = connect();
    let policy = RetryPolicy { attempts_max: 2, ..policy };
    let mut generation = client.request_with_retries(text("later", 64), &policy).unwrap();
    assert!(matches!(generation.next(), Some(Ok(Event::Rejected(_)))));
    assert!(generation.next().is_none());
}

#[test]
fn what_the_server_says_against_a_connection_reaches_the_caller() {
    let options = ClientOptions { token: "wrong".into(), ..ClientOptions::default() };
    let error = Client::connect(start_server(), &options).unwrap_err();
    assert!(matches!(error, ClientError::Server { code: 3, .. }), "{error}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = Client::connect(address, &ClientOptions::default()).unwrap_err();
    assert!(matches!(error, ClientError::Io(io::ErrorKind::ConnectionRefused, _)), "{error}");
}

#[test]
fn a_connection_that_breaks_ends_its_generations_with_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        ServerFrame::Welcome(welcome()).encode(&mut bytes);
        socket.write_all(&bytes).unwrap();
        // HELLO and then a request; then it is gone.
        let mut buffer = [0; 4096];
        let mut count = 0;
        while count < 60 {
            count += socket.read(&mut buffer).unwrap();
        }
    });
    let client = Client::connect(address, &ClientOptions::default()).unwrap();
    let mut generation = client.request(text(&"x".repeat(100), 8)).unwrap();
    assert!(matches!(generation.next(), Some(Err(_))));
    assert!(generation.next().is_none());
    assert!(client.request(text("x", 1)).is_err());
    server.join().unwrap();
}

/// A socket as an async one whose every call blocks: enough where the driver only has to be asked
/// in turn with a reader that wants what it brings.
struct Blocking {
    socket: TcpStream,
    /// Reads only after something was written: a blocking read of silence would never return.
    may_read: bool,
}

impl futures_lite::AsyncRead for Blocking {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if !std::mem::take(&mut self.may_read) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(self.socket.read(buffer))
    }
}

impl futures_lite::AsyncWrite for Blocking {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.may_read = true;
        Poll::Ready(self.socket.write(bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn the_async_client_needs_nothing_but_its_driver_polled() {
    let socket = TcpStream::connect(start_server()).unwrap();
    let io = Blocking { socket, may_read: false };
    let (client, driver) = AsyncClient::new(io, &ClientOptions::default());
    let talk = async move {
        assert_eq!(client.ready().await.unwrap().model, "echo");
        let mut generation = client.request(&text(&"abc".repeat(100), 16)).unwrap();
        let mut all = String::new();
        while let Some(event) = generation.next().await {
            if let Event::Tokens(tokens) = event.unwrap() {
                all.push_str(&tokens.text);
            }
        }
        assert_eq!(all, "abc".repeat(100));
    };
    // The driver ends by itself once client and generation are dropped.
    type Both = Pin<Box<dyn Future<Output = ((), Result<(), ClientError>)>>>;
    let both: Both = Box::pin(futures_lite::future::zip(talk, driver));
    let ((), result) = futures_lite::future::block_on(both);
    assert_eq!(result, Ok(()));
}

#[test]
fn a_client_written_from_the_specification_alone_understands_the_server() {
    let address = start_server().to_string();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/native.py");
    let run = |arguments: &[&str]| {
        let output = Command::new("python3").arg(script).arg(&address).args(arguments).output();
        let output = output.expect("python3 is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let lines = String::from_utf8(output.stdout).unwrap();
        let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect::<Vec<serde_json::Value>>()
    };
    let prompt = "Grüße an alle Flüsse. ".repeat(5).replace(['ü', 'ß'], "u");
    let events = run(&[&prompt, "--window", "10"]);
    assert_eq!(events[0]["event"], "accepted");
    let text: String = events.iter().filter_map(|event| event["text"].as_str()).collect();
    assert_eq!(text, prompt);
    assert_eq!(events.last().unwrap()["finish"], "end_of_text");
    assert_eq!(run(&["--stats"])[0]["answer"], 42);
}
