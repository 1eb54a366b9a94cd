//! A real server on the real model in this process, and what tests want to know of it.

use std::time::{Duration, Instant};

use forebay::cli::server::Server;
use forebay::client::{
    Client, ClientOptions, Done, Event, Generation, Rejection, Request, RequestPrompt, Role,
};
use forebay::config::Config;
use forebay::request::TokenId;
use forebay::runtime::Flavour;

use crate::common;

/// Both ways to drive sockets.
pub const FLAVOURS: [Flavour; 2] = [Flavour::IoUring, Flavour::Epoll];
/// Far beyond what anything here takes, also on a loaded machine: what has not come by then never
/// will.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that is drained when the test ends.
pub struct Rig {
    server: Option<Server>,
}

impl Rig {
    /// A server with a small KV pool, otherwise as configured by default.
    pub fn start(flavour: Flavour) -> Rig {
        Rig::start_with(flavour, |_| {})
    }

    pub fn start_with(flavour: Flavour, tweak: impl FnOnce(&mut Config)) -> Rig {
        let mut config = Config::default();
        config.server.listen = "127.0.0.1:0".parse().unwrap();
        config.metrics.listen = None;
        config.kv.pool_bytes = Some(384 << 20);
        // A slow or busy machine must neither refuse nor evict what these tests ask for.
        config.limits.ttft_target_ms = 0;
        config.limits.queue_ttl_ms = 600_000;
        tweak(&mut config);
        let server = Server::start(&config, "smollm2-135m", &common::smollm2(), flavour);
        Rig { server: Some(server.unwrap_or_else(|error| panic!("{error}"))) }
    }

    pub fn server(&self) -> &Server {
        self.server.as_ref().expect("it runs until the rig is dropped")
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.server().address(), &ClientOptions::default()).unwrap()
    }

    /// Waits until the server holds nothing of any request any more.
    pub fn wait_until_idle(&self) {
        let client = self.connect();
        let total = stat(&client, "engine_kv_blocks_total");
        wait_until(&client, "all KV blocks are free and no sequence is left", |stats| {
            let zero = [
                "engine_granted",
                "engine_queued_default",
                "engine_running",
                "engine_waiting",
                "engine_parked",
                "engine_queued_tokens",
                "engine_queued_bytes",
            ];
            find(stats, "engine_kv_blocks_free") == total
                && zero.iter().all(|name| find(stats, name) == 0)
        });
    }

    /// Drains the server and waits for its end.
    pub fn end(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        let Some(server) = self.server.take() else { return };
        server.drain(forebay::runtime::now());
        server.join().unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        self.finish();
    }
}

fn find(stats: &[(String, u64)], name: &str) -> u64 {
    let found = stats.iter().find(|(known, _)| known == name);
    found.unwrap_or_else(|| panic!("the server has no number called {name}")).1
}

pub fn stat(client: &Client, name: &str) -> u64 {
    find(&client.stats().unwrap(), name)
}

/// Asks for the server's numbers again and again until they are as wanted.
pub fn wait_until(client: &Client, what: &str, mut is_so: impl FnMut(&[(String, u64)]) -> bool) {
    let until = Instant::now() + PATIENCE;
    loop {
        let stats = client.stats().unwrap();
        if is_so(&stats) {
            return;
        }
        assert!(Instant::now() < until, "waited in vain until {what}: {stats:#?}");
    }
}

pub fn wait_for_stat(client: &Client, name: &str, wanted: u64) {
    wait_until(client, &format!("{name} = {wanted}"), |stats| find(stats, name) == wanted);
}

/// A conversation of one message, answered greedily.
pub fn chat(text: &str) -> Request {
    let mut request = Request::new(RequestPrompt::Messages(vec![(Role::User, text.to_owned())]));
    request.options.sampling.temperature = 0.0;
    request.max_tokens = Some(200);
    request
}

/// Exactly so many tokens of output, from text as it is.
pub fn exactly(text: &str, tokens: u32) -> Request {
    let mut request = Request::new(RequestPrompt::Text(text.to_owned()));
    request.options.sampling.temperature = 0.0;
    request.options.ignore_eos = true;
    request.max_tokens = Some(tokens);
    request
}

/// What came of a request.
#[derive(Debug, Default)]
pub struct Answer {
    pub ids: Vec<TokenId>,
    pub text: String,
    pub pauses: u32,
    pub resumes: u32,
    pub done: Option<Done>,
    pub rejection: Option<Rejection>,
}

impl Answer {
    pub fn done(&self) -> &Done {
        self.done.as_ref().unwrap_or_else(|| panic!("it did not end well: {self:?}"))
    }

    pub fn rejection(&self) -> &Rejection {
        self.rejection.as_ref().unwrap_or_else(|| panic!("it was not refused: {self:?}"))
    }
}

/// Takes all of a request's events, and checks their order on the way.
pub fn collect(generation: Generation) -> Answer {
    collect_into(generation, Answer::default())
}

pub fn collect_into(mut generation: Generation, mut answer: Answer) -> Answer {
    while answer.done.is_none() && answer.rejection.is_none() {
        let event = generation.next_timeout(PATIENCE).unwrap();
        match event.unwrap_or_else(|| panic!("no event in {PATIENCE:?} after {answer:?}")) {
            Event::Accepted(_) => {}
            Event::Tokens(tokens) => {
                answer.ids.extend(tokens.ids);
                answer.text.push_str(&tokens.text);
            }
            Event::Paused => answer.pauses += 1,
            Event::Resumed => answer.resumes += 1,
            Event::Done(done) => answer.done = Some(done),
            Event::Rejected(rejection) => answer.rejection = Some(rejection),
        }
    }
    answer
}

/// Sends a request and takes all of its answer.
pub fn ask(client: &Client, request: Request) -> Answer {
    collect(client.request(request).unwrap())
}

/// Takes events until the first output.
pub fn take_first_tokens(generation: &mut Generation) -> Answer {
    let mut answer = Answer::default();
    while answer.ids.is_empty() {
        let event = generation.next_timeout(PATIENCE).unwrap().expect("an event in time");
        match event {
            Event::Tokens(tokens) => {
                answer.ids.extend(tokens.ids);
                answer.text.push_str(&tokens.text);
            }
            Event::Done(_) | Event::Rejected(_) => panic!("it ended early: {event:?}"),
            Event::Accepted(_) | Event::Paused | Event::Resumed => {}
        }
    }
    answer
}
