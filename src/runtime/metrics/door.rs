//! The door of the metrics page: as much HTTP as a scraper needs, on one thread.
//!
//! Bounded: one connection at a time, one request a connection, [`REQUEST_BYTES_MAX`],
//! [`PATIENCE`] for the whole of it; who comes meanwhile waits in the kernel's backlog.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::page::{CONTENT_TYPE, Page};

/// A request, with the headers that scrapers and browsers send.
const REQUEST_BYTES_MAX: usize = 8 << 10;
const HEADERS_MAX: usize = 64;

/// A client has this long to say what it wants, and as long to take its answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// After a failed accept (no descriptor left, say) nobody is let in for so long: it would fail
/// again at once.
const BREATHER: Duration = Duration::from_millis(100);

/// Where the page is fetched. Closes when dropped.
#[derive(Debug)]
pub struct Door {
    address: SocketAddr,
    /// Its end tells the thread to end.
    end: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Door {
    /// Listens on `listen` and answers with the page.
    ///
    /// # Errors
    /// When the address cannot be had or the thread cannot be started.
    pub fn open(listen: SocketAddr, page: Page) -> io::Result<Door> {
        let listener = TcpListener::bind(listen)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (end, ended) = UnixStream::pair()?;
        let thread = thread::Builder::new()
            .name("metrics".into())
            .spawn(move || answer_all(&listener, &ended, &page))?;
        Ok(Door { address, end: Some(end), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // It can only have ended by a panic, and that was reported.
            let _ = thread.join();
        }
    }
}

fn answer_all(listener: &TcpListener, ended: &UnixStream, page: &Page) {
    loop {
        let mut waited = [PollFd::new(listener, PollFlags::IN), PollFd::new(ended, PollFlags::IN)];
        // Interrupted or not: what has happened is looked at below.
        let _ = poll(&mut waited, None);
        if !waited[1].revents().is_empty() {
            return;
        }
        match listener.accept() {
            // What goes wrong with a client is the client's to notice.
            Ok((socket, _)) => drop(answer(socket, page)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => thread::sleep(BREATHER),
        }
    }
}

fn answer(mut socket: TcpStream, page: &Page) -> io::Result<()> {
    // Accepted sockets are blocking whatever the listener is, on Linux.
    let until = Instant::now() + PATIENCE;
    let mut request = Vec::with_capacity(1024);
    let wanted = loop {
        let mut part = [0; 1024];
        socket.set_read_timeout(Some(left(until)?))?;
        let count = socket.read(&mut part)?;
        request.extend_from_slice(&part[..count]);
        match wanted(&request) {
            Some(wanted) => break wanted,
            None if count == 0 => return Ok(()),
            None if request.len() >= REQUEST_BYTES_MAX => break Wanted::Nonsense,
            None => {}
        }
    };
    let response = response(wanted, page);
    let until = Instant::now() + PATIENCE;
    let mut unsent = response.as_bytes();
    while !unsent.is_empty() {
        socket.set_write_timeout(Some(left(until)?))?;
        let count = socket.write(unsent)?;
        unsent = &unsent[count..];
    }
    Ok(())
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Page,
    /// The page's headers.
    Head,
    OtherPath,
    OtherMethod,
    Nonsense,
}

/// `None`: it has not all come yet.
fn wanted(bytes: &[u8]) -> Option<Wanted> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Err(_) => Some(Wanted::Nonsense),
        Ok(httparse::Status::Partial) => None,
        Ok(httparse::Status::Complete(_)) => {
            let path = request.path.unwrap_or("").split('?').next();
            Some(match (path, request.method) {
                (Some("/metrics"), Some("GET")) => Wanted::Page,
                (Some("/metrics"), Some("HEAD")) => Wanted::Head,
                (Some("/metrics"), _) => Wanted::OtherMethod,
                _ => Wanted::OtherPath,
            })
        }
    }
}

fn response(wanted: Wanted, page: &Page) -> String {
    let (status, kind, body) = match wanted {
        Wanted::Page | Wanted::Head => ("200 OK", CONTENT_TYPE, page.text()),
        Wanted::OtherPath => ("404 Not Found", TEXT, "the metrics are at /metrics\n".into()),
        Wanted::OtherMethod => {
            ("405 Method Not Allowed\r\nAllow: GET, HEAD", TEXT, "GET it\n".into())
        }
        Wanted::Nonsense => ("400 Bad Request", TEXT, "that is no HTTP request\n".into()),
    };
    let shown = if wanted == Wanted::Head { "" } else { body.as_str() };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{shown}",
        body.len()
    )
}

const TEXT: &str = "text/plain; charset=utf-8";

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Page {
        Page { model: "m".into(), block_positions: 64, boards: Vec::new() }
    }

    fn ask(door: &Door, request: &[u8]) -> String {
        let mut socket = TcpStream::connect(door.address()).unwrap();
        socket.write_all(request).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn only_the_page_is_there_and_every_answer_says_how_long_it_is() {
        let door = Door::open("127.0.0.1:0".parse().unwrap(), empty()).unwrap();
        let cases = [
            (&b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"[..], "200 OK"),
            (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", "200 OK"),
            (b"GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
            (b"\x16\x03\x01\r\n\r\n", "400 Bad Request"),
        ];
        for (request, status) in cases {
            let answer = ask(&door, request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
            assert_eq!(length.unwrap().parse::<usize>().unwrap(), body.len(), "{answer}");
        }
        let head = ask(&door, b"HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
    }

    #[test]
    fn a_request_without_end_is_cut_off_and_a_client_that_leaves_is_forgotten() {
        let door = Door::open("127.0.0.1:0".parse().unwrap(), empty()).unwrap();
        drop(TcpStream::connect(door.address()).unwrap());
        let long = [&b"GET /metrics HTTP/1.1\r\nx: "[..], &[b'x'; REQUEST_BYTES_MAX]].concat();
        let cut_off = ask(&door, &long[..REQUEST_BYTES_MAX]);
        assert!(cut_off.starts_with("HTTP/1.1 400"), "{cut_off}");
        let next = ask(&door, b"GET /metrics HTTP/1.1\r\n\r\n");
        assert!(next.starts_with("HTTP/1.1 200"), "{next}");
    }

    #[test]
    fn a_dropped_door_is_closed() {
        let door = Door::open("127.0.0.1:0".parse().unwrap(), empty()).unwrap();
        let address = door.address();
        drop(door);
        assert!(TcpStream::connect(address).is_err());
    }
}
