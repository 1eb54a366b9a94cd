//! The async client: the caller's executor moves the bytes.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use futures_io::{AsyncRead, AsyncWrite};

use super::ClientOptions;
use super::core::ClientCore;
use super::error::ClientError;
use super::event::{Event, ServerInfo};
use super::shared::{Canceller, SharedRef, lock, new_shared};
use crate::protocol::Request;

/// Bytes read in one go.
const READ_BYTES: usize = 16 << 10;

/// Reads in a row before other tasks of the executor get their turn.
const READS_PER_POLL_MAX: usize = 16;

/// A connection to a server. Copies share it; its [`Driver`] ends when the last copy and the last
/// [`AsyncGeneration`] are dropped.
#[derive(Clone, Debug)]
pub struct AsyncClient {
    user: Arc<User>,
}

/// Ends the driver when nobody is left who uses the connection.
#[derive(Debug)]
struct User {
    shared: SharedRef,
}

impl Drop for User {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        shared.is_released = true;
        shared.wake_writer();
    }
}

impl AsyncClient {
    /// A client over a connection, and the future that moves its bytes: spawn it, or poll it
    /// beside the client's own futures. Nothing happens unless it runs.
    pub fn new<IO>(io: IO, options: &ClientOptions) -> (AsyncClient, Driver<IO>)
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let shared = new_shared(ClientCore::new(options));
        let driver = Driver {
            shared: Arc::clone(&shared),
            io,
            buffer: vec![0; READ_BYTES].into_boxed_slice(),
            needs_flush: false,
        };
        (AsyncClient { user: Arc::new(User { shared }) }, driver)
    }

    /// Waits for the handshake and returns what the server said of itself.
    ///
    /// # Errors
    /// When the server refuses or the connection breaks.
    pub async fn ready(&self) -> Result<ServerInfo, ClientError> {
        let shared = &self.user.shared;
        poll_fn(|cx| lock(shared).poll_other(cx, |core| core.info().cloned())).await
    }

    /// Whether the server said that it is going away: new requests belong elsewhere.
    pub fn is_going_away(&self) -> bool {
        lock(&self.user.shared).core.going_away_ms().is_some()
    }

    /// Starts a request. It is sent as soon as the server's request credit allows; its events
    /// are the stream's items. For retries see [`super::Retries`]: waiting is the caller's, who
    /// has the timers.
    ///
    /// # Errors
    /// When the connection is over or the request can never be sent.
    pub fn request(&self, request: &Request) -> Result<AsyncGeneration, ClientError> {
        let mut shared = lock(&self.user.shared);
        let stream = shared.core.start(request)?;
        shared.wake_writer();
        Ok(AsyncGeneration { user: Arc::clone(&self.user), stream })
    }

    /// The server's numbers.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn stats(&self) -> Result<Vec<(String, u64)>, ClientError> {
        let shared = &self.user.shared;
        {
            let mut shared = lock(shared);
            shared.core.ask_stats();
            shared.wake_writer();
        }
        poll_fn(|cx| lock(shared).poll_other(cx, ClientCore::poll_stats)).await
    }
}

/// One request's events. Dropping it before the last cancels the request.
#[derive(Debug)]
pub struct AsyncGeneration {
    user: Arc<User>,
    stream: u32,
}

impl AsyncGeneration {
    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<Event, ClientError>> {
        poll_fn(|cx| lock(&self.user.shared).poll_event(self.stream, cx)).await
    }

    /// Something that can stop it from elsewhere.
    pub fn canceller(&self) -> Canceller {
        Canceller { shared: Arc::clone(&self.user.shared), stream: self.stream }
    }
}

impl Stream for AsyncGeneration {
    type Item = Result<Event, ClientError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        lock(&self.user.shared).poll_event(self.stream, cx)
    }
}

impl Drop for AsyncGeneration {
    fn drop(&mut self) {
        let mut shared = lock(&self.user.shared);
        shared.core.abandon(self.stream);
        shared.wake_writer();
    }
}

/// Moves the bytes of an [`AsyncClient`]. Ends with `Ok` when nobody uses the client any more, and
/// with the error that every stream gets when the connection does.
pub struct Driver<IO> {
    shared: SharedRef,
    io: IO,
    buffer: Box<[u8]>,
    /// Something was written since the last flush.
    needs_flush: bool,
}

impl<IO> fmt::Debug for Driver<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("needs_flush", &self.needs_flush).finish_non_exhaustive()
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Driver<IO> {
    /// Reads what is there, at most so much that others get their turn.
    fn poll_reads(&mut self, cx: &mut Context<'_>) -> Result<(), ClientError> {
        for _ in 0..READS_PER_POLL_MAX {
            match Pin::new(&mut self.io).poll_read(cx, &mut self.buffer) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(0)) => return Err(ClientError::Closed),
                Poll::Ready(Ok(count)) => {
                    let mut shared = lock(&self.shared);
                    let result = shared.core.handle_received(&self.buffer[..count]);
                    shared.wake_all();
                    result?;
                }
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Poll::Ready(Err(error)) => return Err(error.into()),
            }
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    /// Writes until the connection takes no more, or nothing is left; then flushes.
    fn poll_writes(&mut self, cx: &mut Context<'_>) -> Result<(), ClientError> {
        loop {
            let mut shared = lock(&self.shared);
            // Set again in every turn: whoever adds something to send takes it out and wakes it.
            shared.writer = Some(cx.waker().clone());
            let outgoing = shared.core.outgoing();
            if outgoing.is_empty() {
                break;
            }
            match Pin::new(&mut self.io).poll_write(cx, outgoing) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(0)) => return Err(ClientError::Closed),
                Poll::Ready(Ok(count)) => {
                    shared.core.handle_sent(count);
                    self.needs_flush = true;
                }
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Poll::Ready(Err(error)) => return Err(error.into()),
            }
        }
        if self.needs_flush && Pin::new(&mut self.io).poll_flush(cx)?.is_ready() {
            self.needs_flush = false;
        }
        Ok(())
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Future for Driver<IO> {
    type Output = Result<(), ClientError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), ClientError>> {
        let this = &mut *self;
        // Reading first: what came may be answered in the same turn.
        let result = this.poll_reads(cx).and_then(|()| this.poll_writes(cx));
        if let Err(error) = result {
            lock(&this.shared).fail(error.clone());
            return Poll::Ready(Err(error));
        }
        if lock(&this.shared).is_released {
            return Pin::new(&mut this.io).poll_close(cx).map(|_| Ok(()));
        }
        Poll::Pending
    }
}
