//! Runs a workload against a server: one thread sends, one thread a connection reads.
//!
//! The readers block on their sockets and the sender on the next arrival, so the generator needs
//! hardly any CPU time beside a server on the same machine; what it does need is reported.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::tally::{End, Progress, Slo, Tally};
use super::workload::{Arrivals, Job, Lengths, Workload};
use crate::client::{
    ClientCore, ClientError, ClientOptions, Event, Request, RequestPrompt, ServerInfo,
};
use crate::protocol::Capabilities;
use crate::request::{Class, FinishReason, Name};

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server.
    pub target: SocketAddr,
    /// Connections to spread the streams over.
    pub connections: u32,
    /// When requests begin.
    pub arrivals: Arrivals,
    /// Prompt lengths.
    pub prompt: Lengths,
    /// Output lengths.
    pub output: Lengths,
    /// Who pays.
    pub tenant: Name,
    /// Priority class of all requests.
    pub class: Class,
    /// Where all randomness comes from.
    pub seed: u64,
    /// Not measured.
    pub warm_up: Duration,
    /// Measured, after the warm-up.
    pub duration: Duration,
    /// How long after that the generator waits for what is in progress.
    pub grace: Duration,
    /// What a good request must meet.
    pub slo: Slo,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// What the server said of itself.
    pub server: ServerInfo,
    /// The sums.
    pub tally: Tally,
    /// CPU time of all the generator's threads, as a share of one core.
    pub cpu_share: Option<f64>,
}

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// The server cannot be reached.
    #[error("cannot connect to {target}: {source}")]
    Connect {
        /// Where.
        target: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Whoever listens there is no Forebay, or refuses us.
    #[error("{target} did not answer as a Forebay server does: {what}")]
    Handshake {
        /// Where.
        target: SocketAddr,
        /// What it did instead.
        what: String,
    },
}

/// A closed loop's place whose request was refused waits this long when the server did not say
/// how long: a refusal must not become a tight loop.
const REFUSED_PAUSE_MS: u32 = 100;

/// Requests that a generator which cannot send them (no request credit) holds back at most. Each
/// is only its intended time; those beyond count as unsent.
const BACKLOG_MAX: usize = 1 << 20;

/// Credit that a request begins with, and that is kept topped up: the generator reads as fast as
/// the server sends.
const WINDOW_TOKENS: u32 = 256;

struct Connection {
    core: ClientCore,
    tenant: Name,
    class: Class,
    /// The requests of its streams.
    requests: BTreeMap<u32, Progress>,
    /// Requests that may be sent and are not answered yet: what is left of the server's credit.
    request_credit: u32,
    broken: bool,
}

impl Connection {
    fn new(core: ClientCore, plan: &Plan) -> Connection {
        let (tenant, class) = (plan.tenant, plan.class);
        let request_credit = core.info().expect("the handshake is done").request_credit;
        Connection { core, tenant, class, requests: BTreeMap::new(), request_credit, broken: false }
    }

    fn streams_max(&self) -> usize {
        self.core.info().map_or(0, |info| info.streams_max as usize)
    }

    /// Whether a request would be sent at once. (The client would hold it back otherwise, and its
    /// lateness would not be seen.)
    fn is_free(&self) -> bool {
        !self.is_leaving() && self.request_credit > 0 && self.requests.len() < self.streams_max()
    }

    /// Whether it takes no more requests.
    fn is_leaving(&self) -> bool {
        self.broken || self.core.going_away_ms().is_some()
    }

    /// Returns the request when it can never be sent.
    fn begin(&mut self, job: Job, progress: Progress) -> Result<(), Progress> {
        let mut request = Request::new(RequestPrompt::Tokens(job.prompt));
        request.max_tokens = Some(job.output_tokens);
        request.window_tokens = WINDOW_TOKENS;
        (request.tenant, request.class) = (self.tenant, self.class);
        request.options.ignore_eos = true;
        request.options.sampling.temperature = 0.0;
        // The connection has just ended, or the server takes no requests so long.
        let Ok(stream) = self.core.start(&request) else { return Err(progress) };
        self.requests.insert(stream, progress);
        self.request_credit -= 1;
        Ok(())
    }

    /// All that is to be sent now.
    fn take_out(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.core.wants_to_send() {
            let bytes = self.core.outgoing();
            if bytes.is_empty() {
                break;
            }
            out.extend_from_slice(bytes);
            let count = bytes.len();
            self.core.handle_sent(count);
        }
        out
    }
}

/// What sender and readers share.
struct State {
    connections: Vec<Connection>,
    tally: Tally,
    /// Closed loop: when each free place may begin its next request.
    places: BinaryHeap<Reverse<u64>>,
    /// Open loop: arrivals that could not be sent yet.
    backlog: VecDeque<u64>,
    /// A reader changed something that the sender waits for.
    news: bool,
    /// The sender waits no longer: what is in progress stays unfinished.
    given_up: bool,
    /// CPU time of threads that have ended.
    cpu_ns: Option<u64>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    start: Instant,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked has broken the run; its panic is passed on by the scope.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

/// Runs the plan. `show` is called about ten times a second with the time since the start and
/// the sums so far.
pub fn run(plan: &Plan, show: &mut dyn FnMut(Duration, &Tally)) -> Result<Outcome, DriveError> {
    let mut sockets = Vec::new();
    let mut connections = Vec::new();
    for _ in 0..plan.connections {
        let (socket, core) = connect(plan.target)?;
        sockets.push(socket);
        connections.push(Connection::new(core, plan));
    }
    let server = connections[0].core.info().expect("the handshake is done").clone();
    let measured = plan.warm_up.as_nanos() as u64;
    let end = measured + plan.duration.as_nanos() as u64;
    let mut state = State {
        connections,
        tally: Tally::new(measured..end, plan.slo),
        places: BinaryHeap::new(),
        backlog: VecDeque::new(),
        news: false,
        given_up: false,
        cpu_ns: Some(0),
    };
    if let Arrivals::Closed(concurrency) = plan.arrivals {
        state.places.extend((0..concurrency).map(|_| Reverse(0)));
    }
    let closed = matches!(plan.arrivals, Arrivals::Closed(_));
    let start = Instant::now();
    let shared = Shared { state: Mutex::new(state), changed: Condvar::new(), start, closed };
    let cpu_before = thread_cpu_ns();
    thread::scope(|scope| {
        for (index, socket) in sockets.iter().enumerate() {
            let shared = &shared;
            scope.spawn(move || read(shared, index, socket));
        }
        Sender::new(plan, &server, &shared, end).run(&sockets, show);
        for socket in &sockets {
            // The readers end when their sockets do; one that is closed already has ended.
            let _ = socket.shutdown(Shutdown::Both);
        }
    });
    let wall_ns = shared.now_ns();
    let state = shared.state.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let own = thread_cpu_ns().zip(cpu_before).map(|(after, before)| after - before);
    let cpu = own.zip(state.cpu_ns).map(|(own, others)| own + others);
    let cpu_share = cpu.map(|ns| ns as f64 / wall_ns.max(1) as f64);
    Ok(Outcome { server, tally: state.tally, cpu_share })
}

fn connect(target: SocketAddr) -> Result<(TcpStream, ClientCore), DriveError> {
    let failed = |source| DriveError::Connect { target, source };
    let mut socket = TcpStream::connect_timeout(&target, Duration::from_secs(5)).map_err(failed)?;
    socket.set_nodelay(true).map_err(failed)?;
    socket.set_read_timeout(Some(Duration::from_secs(10))).map_err(failed)?;
    let strange = |what: String| DriveError::Handshake { target, what };
    let options = ClientOptions {
        name: concat!("forebay-bench/", env!("CARGO_PKG_VERSION")).to_owned(),
        ..ClientOptions::default()
    };
    let mut core = ClientCore::new(&options);
    let hello = core.outgoing().to_vec();
    socket.write_all(&hello).map_err(|e| strange(e.to_string()))?;
    core.handle_sent(hello.len());
    let mut buffer = [0; 4096];
    let info = loop {
        if let Some(info) = core.info() {
            break info;
        }
        let count = socket.read(&mut buffer).map_err(|e| strange(e.to_string()))?;
        if count == 0 {
            return Err(strange("it closed the connection".into()));
        }
        core.handle_received(&buffer[..count]).map_err(|e| strange(e.to_string()))?;
    };
    if !info.capabilities.contains(Capabilities::TOKEN_PROMPTS) {
        return Err(strange("it takes no prompts of token ids".into()));
    }
    socket.set_read_timeout(None).map_err(failed)?;
    // A server that stops reading breaks its own rules; it must not hang the generator.
    socket.set_write_timeout(Some(Duration::from_secs(10))).map_err(failed)?;
    Ok((socket, core))
}

/// One connection's reader.
fn read(shared: &Shared, index: usize, mut socket: &TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let result = match socket.read(&mut buffer) {
            Ok(0) => Err(ClientError::Closed),
            Ok(count) => Ok(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Err(error.into()),
        };
        // Taken before the lock: waiting for it is the generator's time, not the server's.
        let now_ns = shared.now_ns();
        let mut state = shared.lock();
        let ended = result.and_then(|count| state.handle(shared, index, &buffer[..count], now_ns));
        if let Err(why) = ended {
            state.lose(shared, index, &why, now_ns);
            state.cpu_ns = state.cpu_ns.zip(thread_cpu_ns()).map(|(sum, own)| sum + own);
            shared.changed.notify_one();
            return;
        }
        if state.news {
            shared.changed.notify_one();
        }
    }
}

impl State {
    fn handle(
        &mut self,
        shared: &Shared,
        index: usize,
        bytes: &[u8],
        now_ns: u64,
    ) -> Result<(), ClientError> {
        self.connections[index].core.handle_received(bytes)?;
        let streams: Vec<u32> = self.connections[index].requests.keys().copied().collect();
        for stream in streams {
            while let Some(event) = self.connections[index].core.poll_event(stream)? {
                self.handle_event(shared, index, stream, &event, now_ns);
            }
        }
        // Also when only credit came or is owed: the sender writes everything.
        self.news = true;
        Ok(())
    }

    fn handle_event(
        &mut self,
        shared: &Shared,
        index: usize,
        stream: u32,
        event: &Event,
        now_ns: u64,
    ) {
        let connection = &mut self.connections[index];
        let request = connection.requests.get_mut(&stream).expect("only open streams are asked");
        // ACCEPTED and REJECTED answer a request, and so does an end that comes instead.
        if !request.is_answered {
            request.is_answered = true;
            connection.request_credit += 1;
        }
        let (end, pause_ms) = match event {
            Event::Tokens(tokens) => {
                return self.tally.tokens(request, tokens.ids.len() as u32, now_ns);
            }
            Event::Accepted(_) | Event::Paused | Event::Resumed => return,
            Event::Rejected(rejection) => {
                let pause_ms = rejection.retry_after_ms.unwrap_or(REFUSED_PAUSE_MS);
                (End::Rejected(rejection.reason.name()), pause_ms)
            }
            Event::Done(done) => match done.finish {
                FinishReason::MaxTokens | FinishReason::ContextFull => (End::Complete, 0),
                why => (End::Early(why.name()), 0),
            },
        };
        self.tally.end(request, end, now_ns);
        connection.requests.remove(&stream);
        if shared.closed {
            self.places.push(Reverse(now_ns + u64::from(pause_ms) * 1_000_000));
        }
    }

    /// The connection is gone, and its requests with it.
    fn lose(&mut self, shared: &Shared, index: usize, why: &ClientError, now_ns: u64) {
        let connection = &mut self.connections[index];
        if !connection.broken && !connection.requests.is_empty() {
            tracing::debug!("connection {index} ended: {why}");
        }
        connection.broken = true;
        let requests = std::mem::take(&mut connection.requests);
        for request in requests.into_values().filter(|_| !self.given_up) {
            self.tally.end(&request, End::Broken, now_ns);
            if shared.closed {
                self.places.push(Reverse(now_ns + u64::from(REFUSED_PAUSE_MS) * 1_000_000));
            }
        }
        self.news = true;
    }

    fn in_progress(&self) -> bool {
        self.connections.iter().any(|connection| !connection.requests.is_empty())
    }

    /// A connection that may carry another request: the one with the fewest.
    fn free_connection(&self) -> Option<usize> {
        let connections = self.connections.iter().enumerate().filter(|(_, c)| c.is_free());
        connections.min_by_key(|(_, c)| c.requests.len()).map(|(index, _)| index)
    }
}

struct Sender<'a> {
    shared: &'a Shared,
    workload: Workload,
    /// Open loop: the next arrival.
    arrival_ns: Option<u64>,
    end_ns: u64,
    give_up_ns: u64,
}

impl<'a> Sender<'a> {
    fn new(plan: &Plan, server: &ServerInfo, shared: &'a Shared, end_ns: u64) -> Sender<'a> {
        let Plan { prompt, output, arrivals, seed, .. } = *plan;
        let mut workload = Workload::new(
            prompt,
            output,
            arrivals,
            seed,
            server.vocab_tokens,
            server.context_tokens,
        );
        let arrival_ns = matches!(arrivals, Arrivals::Open(_)).then(|| workload.arrival_ns());
        let give_up_ns = end_ns + plan.grace.as_nanos() as u64;
        Sender { shared, workload, arrival_ns, end_ns, give_up_ns }
    }

    fn run(mut self, sockets: &[TcpStream], show: &mut dyn FnMut(Duration, &Tally)) {
        const SHOW_NS: u64 = 100_000_000;
        let mut shown_ns = 0;
        let mut state = self.shared.lock();
        loop {
            let now_ns = self.shared.now_ns();
            state.news = false;
            self.arrive(&mut state, now_ns);
            self.begin(&mut state, now_ns);
            let out: Vec<Vec<u8>> =
                state.connections.iter_mut().map(Connection::take_out).collect();
            if now_ns >= shown_ns + SHOW_NS {
                shown_ns = now_ns;
                show(Duration::from_nanos(now_ns), &state.tally);
            }
            let begun_all = now_ns >= self.end_ns && state.backlog.is_empty();
            let gone = state.connections.iter().all(Connection::is_leaving);
            if (begun_all || gone) && !state.in_progress() || now_ns >= self.give_up_ns {
                for arrival in std::mem::take(&mut state.backlog) {
                    state.tally.unsent(arrival);
                }
                state.given_up = true;
                return;
            }
            if out.iter().any(|bytes| !bytes.is_empty()) {
                // Not under the lock: a socket that takes nothing must not stop the readers.
                drop(state);
                for (mut socket, bytes) in sockets.iter().zip(&out) {
                    // After half a frame nothing else can be sent. The reader notices the end.
                    if socket.write_all(bytes).is_err() {
                        let _ = socket.shutdown(Shutdown::Both);
                    }
                }
                state = self.shared.lock();
            }
            if !state.news {
                let until = self.wake_ns(&state).min(shown_ns + SHOW_NS);
                let wait = Duration::from_nanos(until.saturating_sub(self.shared.now_ns()));
                let waited = self.shared.changed.wait_timeout(state, wait);
                state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
            }
        }
    }

    /// Open loop: puts what has arrived by now into the backlog.
    fn arrive(&mut self, state: &mut State, now_ns: u64) {
        while let Some(arrival) = self.arrival_ns.filter(|&at| at <= now_ns && at < self.end_ns) {
            if state.backlog.len() < BACKLOG_MAX {
                state.backlog.push_back(arrival);
            } else {
                state.tally.unsent(arrival);
            }
            self.arrival_ns = Some(self.workload.arrival_ns());
        }
    }

    /// Begins every request that is due and that a connection can carry.
    fn begin(&mut self, state: &mut State, now_ns: u64) {
        loop {
            let intended_ns = if self.shared.closed {
                let due = state.places.peek().is_some_and(|place| place.0 <= now_ns);
                if !due || now_ns >= self.end_ns {
                    return;
                }
                now_ns
            } else {
                let Some(&arrival) = state.backlog.front() else { return };
                arrival
            };
            let Some(index) = state.free_connection() else { return };
            if self.shared.closed {
                state.places.pop();
            } else {
                state.backlog.pop_front();
            }
            let job = self.workload.job();
            let request = Progress::begin(intended_ns, job.prompt.len() as u32);
            state.tally.sent(&request, now_ns);
            if let Err(request) = state.connections[index].begin(job, request) {
                state.tally.end(&request, End::Rejected("not_sendable"), now_ns);
                if self.shared.closed {
                    state.places.push(Reverse(now_ns + u64::from(REFUSED_PAUSE_MS) * 1_000_000));
                }
            }
        }
    }

    /// When there is something to do even if nothing comes.
    fn wake_ns(&self, state: &State) -> u64 {
        let arrival = self.arrival_ns.filter(|&at| at < self.end_ns);
        let place = state.places.peek().map(|place| place.0);
        // A place that is due waits for a connection, and that comes with news.
        let now_ns = self.shared.now_ns();
        let place = place.filter(|&at| at > now_ns && at < self.end_ns);
        let next = arrival.into_iter().chain(place).min().unwrap_or(u64::MAX);
        let end = if now_ns < self.end_ns { self.end_ns } else { self.give_up_ns };
        next.min(end)
    }
}

/// CPU time that this thread has used, as the scheduler counts it.
fn thread_cpu_ns() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok()
}
