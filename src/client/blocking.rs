//! The blocking client: threads move the bytes, callers wait for events.

use std::future::poll_fn;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::task::Waker;
use std::thread;
use std::time::{Duration, Instant};

use super::ClientOptions;
use super::core::ClientCore;
use super::error::ClientError;
use super::event::{Event, ServerInfo};
use super::retry::{Retries, RetryPolicy};
use super::shared::{Canceller, SharedRef, ThreadWaker, block_on, lock, new_shared};
use crate::protocol::Request;

/// Bytes read in one go.
const READ_BYTES: usize = 64 << 10;

/// A connection to a server. Copies share it; it closes when the last copy and the last
/// [`Generation`] are dropped. May be used from several threads.
#[derive(Clone, Debug)]
pub struct Client {
    connection: Arc<Connection>,
}

/// Closes the connection when nobody is left who uses it.
#[derive(Debug)]
struct Connection {
    shared: SharedRef,
    socket: TcpStream,
    info: ServerInfo,
}

impl Drop for Connection {
    fn drop(&mut self) {
        release(&self.shared, &self.socket);
    }
}

fn release(shared: &SharedRef, socket: &TcpStream) {
    let mut shared = lock(shared);
    shared.is_released = true;
    shared.wake_writer();
    // The reader finds the end of input and ends, the writer is woken above.
    let _ = socket.shutdown(Shutdown::Both);
}

impl Client {
    /// Connects and shakes hands.
    ///
    /// # Errors
    /// When no address can be reached or the server refuses, within
    /// [`ClientOptions::connect_timeout`].
    pub fn connect(
        address: impl ToSocketAddrs,
        options: &ClientOptions,
    ) -> Result<Client, ClientError> {
        let until = Instant::now() + options.connect_timeout;
        let socket = connect_any(address, until)?;
        socket.set_nodelay(true)?;
        Client::handshake(socket, options, until)
    }

    /// Shakes hands on a connection that was made elsewhere.
    ///
    /// # Errors
    /// As for [`Client::connect`].
    pub fn from_socket(socket: TcpStream, options: &ClientOptions) -> Result<Client, ClientError> {
        Client::handshake(socket, options, Instant::now() + options.connect_timeout)
    }

    fn handshake(
        socket: TcpStream,
        options: &ClientOptions,
        until: Instant,
    ) -> Result<Client, ClientError> {
        let shared = new_shared(ClientCore::new(options));
        let (reader, writer) = (socket.try_clone()?, socket.try_clone()?);
        let for_reader = Arc::clone(&shared);
        let for_writer = Arc::clone(&shared);
        thread::Builder::new()
            .name("forebay-read".into())
            .spawn(move || read_all(&for_reader, reader))?;
        let spawned = thread::Builder::new()
            .name("forebay-write".into())
            .spawn(move || write_all(&for_writer, writer));
        if let Err(error) = spawned {
            release(&shared, &socket);
            return Err(error.into());
        }
        let welcome = poll_fn(|cx| lock(&shared).poll_other(cx, |core| core.info().cloned()));
        let info = block_on(welcome, Some(until)).unwrap_or_else(|| {
            let message = "the server did not answer the handshake in time";
            Err(ClientError::Io(io::ErrorKind::TimedOut, message.into()))
        });
        match info {
            Ok(info) => Ok(Client { connection: Arc::new(Connection { shared, socket, info }) }),
            Err(error) => {
                release(&shared, &socket);
                Err(error)
            }
        }
    }

    /// What the server said of itself.
    pub fn info(&self) -> &ServerInfo {
        &self.connection.info
    }

    /// Whether the server said that it is going away: new requests belong elsewhere.
    pub fn is_going_away(&self) -> bool {
        lock(&self.connection.shared).core.going_away_ms().is_some()
    }

    /// Starts a request. It is sent as soon as the server's request credit allows; its events
    /// are the iterator's items.
    ///
    /// # Errors
    /// When the connection is over or the request can never be sent.
    pub fn request(&self, request: Request) -> Result<Generation, ClientError> {
        let mut shared = lock(&self.connection.shared);
        let stream = shared.core.start(&request)?;
        shared.wake_writer();
        Ok(Generation { connection: Arc::clone(&self.connection), stream, first: None })
    }

    /// Starts a request, and starts it again as the server tells while it is refused and the
    /// policy allows. Waits until it is accepted, or refused for good (its only event then).
    ///
    /// # Errors
    /// As for [`Client::request`].
    pub fn request_with_retries(
        &self,
        request: Request,
        policy: &RetryPolicy,
    ) -> Result<Generation, ClientError> {
        let mut retries = Retries::new(policy);
        loop {
            let mut generation = self.request(request.clone())?;
            let event = generation.next().unwrap_or(Err(ClientError::Closed))?;
            if let Event::Rejected(rejection) = &event
                && let Some(wait) = retries.next_wait(rejection)
            {
                thread::sleep(wait);
                continue;
            }
            generation.first = Some(event);
            return Ok(generation);
        }
    }

    /// The server's numbers.
    ///
    /// # Errors
    /// When the connection is over.
    pub fn stats(&self) -> Result<Vec<(String, u64)>, ClientError> {
        let shared = &self.connection.shared;
        {
            let mut shared = lock(shared);
            shared.core.ask_stats();
            shared.wake_writer();
        }
        let answer = poll_fn(|cx| lock(shared).poll_other(cx, ClientCore::poll_stats));
        block_on(answer, None).expect("it waits without end")
    }

    /// Sends a ping and returns how long its answer took.
    ///
    /// # Errors
    /// When the connection is over.
    pub fn ping(&self) -> Result<Duration, ClientError> {
        let shared = &self.connection.shared;
        let start = Instant::now();
        {
            let mut shared = lock(shared);
            shared.core.ping(0);
            shared.wake_writer();
        }
        let answer = poll_fn(|cx| lock(shared).poll_other(cx, ClientCore::poll_pong));
        block_on(answer, None).expect("it waits without end")?;
        Ok(start.elapsed())
    }
}

/// One request's events. Dropping it before the last cancels the request.
#[derive(Debug)]
pub struct Generation {
    connection: Arc<Connection>,
    stream: u32,
    /// An event that was looked at already.
    first: Option<Event>,
}

impl Generation {
    /// Something that can stop it from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller { shared: Arc::clone(&self.connection.shared), stream: self.stream }
    }

    /// Asks the server to stop; the last event still comes.
    pub fn cancel(&self) {
        self.canceller().cancel();
    }

    /// The next event, or `None` when none came in time. (The iterator waits without end.)
    ///
    /// # Errors
    /// When the connection is over; [`ClientError::Closed`] also after the last event.
    pub fn next_timeout(&mut self, timeout: Duration) -> Result<Option<Event>, ClientError> {
        match self.wait(Some(Instant::now() + timeout)) {
            None => Ok(None),
            Some(Some(event)) => event.map(Some),
            Some(None) => Err(ClientError::Closed),
        }
    }

    fn wait(&mut self, until: Option<Instant>) -> Option<Option<Result<Event, ClientError>>> {
        if let Some(event) = self.first.take() {
            return Some(Some(Ok(event)));
        }
        let shared = &self.connection.shared;
        block_on(poll_fn(|cx| lock(shared).poll_event(self.stream, cx)), until)
    }
}

impl Iterator for Generation {
    type Item = Result<Event, ClientError>;

    fn next(&mut self) -> Option<Result<Event, ClientError>> {
        self.wait(None).expect("it waits without end")
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let mut shared = lock(&self.connection.shared);
        shared.core.abandon(self.stream);
        shared.wake_writer();
    }
}

fn connect_any(address: impl ToSocketAddrs, until: Instant) -> Result<TcpStream, ClientError> {
    let mut last = ClientError::Io(io::ErrorKind::NotFound, "the name has no address".into());
    for address in address.to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(socket) => return Ok(socket),
            Err(error) => {
                last = ClientError::Io(error.kind(), format!("{address}: {error}"));
            }
        }
    }
    Err(last)
}

/// The reading thread. It never writes, so whatever the server sends is always taken.
fn read_all(shared: &SharedRef, mut socket: TcpStream) {
    let mut buffer = vec![0; READ_BYTES];
    let error = loop {
        match socket.read(&mut buffer) {
            Ok(0) => break ClientError::Closed,
            Ok(count) => {
                let mut shared = lock(shared);
                let result = shared.core.handle_received(&buffer[..count]);
                shared.wake_all();
                if let Err(error) = result {
                    break error;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break error.into(),
        }
    };
    lock(shared).fail(error);
    let _ = socket.shutdown(Shutdown::Both);
}

/// The writing thread.
fn write_all(shared: &SharedRef, mut socket: TcpStream) {
    let waker = Waker::from(Arc::new(ThreadWaker(thread::current())));
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        {
            let mut shared = lock(shared);
            if shared.is_released || shared.core.error().is_some() {
                return;
            }
            buffer.extend_from_slice(shared.core.outgoing());
            shared.core.handle_sent(buffer.len());
            shared.writer = Some(waker.clone());
        }
        if buffer.is_empty() {
            thread::park();
        } else if let Err(error) = socket.write_all(&buffer) {
            lock(shared).fail(error.into());
            return;
        }
    }
}
