//! `run`, `chat`, `bench`, `plan`, `serve`, `top` and `dump`, as a user runs them, on the default
//! model.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Output, Stdio};

use forebay::client::{Client, ClientOptions, Event, Request, RequestPrompt};
use rustix::process::{Pid, Signal, kill_process};

/// A KV pool that lets several of these tests run at once on a small machine: 44 blocks, 2,816
/// positions.
const SMALL: [&str; 2] = ["--kv-pool", "64MiB"];
/// Greedily continued, the answer to this goes round in a circle and never ends by itself.
const ENDLESS: &str = "What is the capital of France?";

fn forebay(args: &[&str]) -> Command {
    common::smollm2(); // fetched by whichever test comes first, not by several programs at once
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    let ours =
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FOREBAY"));
    for (name, _) in ours {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run(args: &[&str]) -> Output {
    forebay(args).output().expect("the program runs")
}

/// Runs with `input` on standard input.
fn run_with(args: &[&str], input: &str) -> Output {
    let mut child = forebay(args).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id() as i32).unwrap();
    kill_process(pid, signal).unwrap();
}

fn number(json: &str, key: &str) -> u64 {
    let json: serde_json::Value = serde_json::from_str(json).unwrap();
    json[key].as_u64().unwrap_or_else(|| panic!("{key} is a number in {json}"))
}

#[test]
fn run_prints_one_answer_and_nothing_else_on_standard_output() {
    let greedy = ["run", "--raw", "--temperature", "0", "-n", "1", "The capital of France is"];
    let output = run(&greedy);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), " Paris\n".into()));
    assert_eq!(text(&output.stderr), "");

    let args = ["run", "--seed", "5", "-n", "12", "--stats", "--system", "Be brief.", "-"];
    let (first, second) = (run_with(&args, "Name a river.\n"), run_with(&args, "Name a river.\n"));
    assert!(first.status.success(), "{}", text(&first.stderr));
    assert_eq!(text(&first.stdout), text(&second.stdout));
    assert!(text(&first.stderr).contains("tokens/s"), "{}", text(&first.stderr));
}

#[test]
fn run_says_what_is_wrong_with_what_it_was_given() {
    let long = "word ".repeat(9000);
    let cases: [(&[&str], i32, &str); 4] = [
        (&["run", "--temperature=-1", "x"], 2, "temperature must be from 0 to 100"),
        (&["run", "--model", "/nonexistent/x.gguf", "x"], 3, "there is no model file"),
        (&["run", "--raw", ""], 2, "the prompt has 0 tokens"),
        (&["run", &long], 2, "fewer than the context of 8192"),
    ];
    for (args, code, part) in cases {
        let output = run(args);
        assert_eq!(output.status.code(), Some(code), "{part}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(part), "{part}: {}", text(&output.stderr));
    }
}

#[test]
fn chat_answers_each_line_and_keeps_the_conversation() {
    let args = [&["chat", "--temperature", "0", "-n", "8", "--stats"], &SMALL[..]].concat();
    let output = run_with(&args, "Hello!\n/new\nHello!\n/nonsense\nAnd now?\n");
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(err.matches("tokens/s]").count(), 3, "{err}");
    assert!(out.contains("/nonsense is no command"), "{out}");
    // The same question at the beginning of a conversation has the same answer.
    assert!(!lines[0].is_empty() && lines[0] == lines[1], "{out}");
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_chat() {
    let args = [&["chat", "--temperature", "0", "-n", "2000"], &SMALL[..]].concat();
    let mut chat = forebay(&args).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = chat.stdin.take().unwrap();
    let mut output = chat.stdout.take().unwrap();
    writeln!(input, "{ENDLESS}").unwrap();
    let mut some = [0; 8];
    output.read_exact(&mut some).unwrap(); // the answer has begun
    signal(&chat, Signal::INT);
    writeln!(input, "/new\n/help").unwrap();
    drop(input);
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    let ended = chat.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", text(&ended.stderr));
    assert!(text(&ended.stderr).contains("[stopped]"), "{}", text(&ended.stderr));
    assert!(rest.contains("Ctrl-C stops an answer"), "{rest}");
}

#[test]
fn bench_measures_a_server_of_its_own_and_writes_json() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("result.json");
    let load = ["bench", "--concurrency", "4", "--prompt", "8..24", "--output", "4"];
    let time = ["--warm-up", "0", "--duration", "1", "--quiet", "--json", json.to_str().unwrap()];
    let output = run(&[&load[..], &time[..], &SMALL[..]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let out = text(&output.stdout);
    assert!(out.contains("TTFT") && out.contains("in this process"), "{out}");
    let result = std::fs::read_to_string(json).unwrap();
    let requests = number(&result, "requests");
    assert!(requests >= 4, "{result}");
    assert_eq!(number(&result, "completed"), requests, "{result}");
    assert_eq!(number(&result, "unfinished"), 0, "{result}");
}

#[test]
fn bench_says_what_is_wrong_before_it_begins() {
    let cases: [(&[&str], &str); 4] = [
        (&["bench", "--prompt", "0"], "--prompt"),
        (&["bench", "--rate", "1", "--concurrency", "1"], "cannot be used with"),
        (&["bench", "--duration", "0"], "from 0.001"),
        (&["bench", "--json", "/nonexistent/x.json"], "--json: cannot write"),
    ];
    for (args, part) in cases {
        let output = run(&[args, &["--connect", "127.0.0.1:9"]].concat());
        assert_eq!(output.status.code(), Some(2), "{part}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(part), "{part}: {}", text(&output.stderr));
    }
    let nobody = run(&["bench", "--connect", "127.0.0.1:9", "--quiet"]);
    assert_eq!(nobody.status.code(), Some(1));
}

#[test]
fn plan_shows_the_core_map_and_the_envelope_without_a_pool() {
    let output = run(&["plan", "--kv-pool", "1GiB", "--threads", "2"]);
    let out = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for part in ["workers", "front 0", "KV pool", "weights", "process, at most", "kernel"] {
        assert!(out.contains(part), "{part:?} is not in: {out}");
    }
    let small = run(&["plan", "--kv-pool", "1MiB"]);
    assert_eq!(small.status.code(), Some(2));
    assert!(text(&small.stderr).contains("raise kv.pool_bytes"), "{}", text(&small.stderr));
    let clamped = run(&["plan", "--kv-pool", "2MiB"]);
    assert!(text(&clamped.stdout).contains("the KV pool holds 64 tokens"), "{clamped:?}");
}

/// A server as a program, with its address.
struct Serving {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    address: SocketAddr,
}

fn serve(args: &[&str]) -> Serving {
    let args = [&["serve", "--listen", "127.0.0.1:0"], args, &SMALL[..]].concat();
    let mut child = forebay(&args).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut address = None;
    let mut line = String::new();
    while output.read_line(&mut line).unwrap() > 0 {
        if let Some(found) = line.strip_prefix("native ") {
            address = Some(found.trim().parse().unwrap());
        }
        if line.starts_with("ready ") {
            let address = address.expect("the address is printed before ready");
            return Serving { child, output, address };
        }
        line.clear();
    }
    panic!("{:?}", child.wait_with_output());
}

/// An answer that has begun and goes on.
fn endless(client: &Client) -> forebay::client::Generation {
    let mut request = Request::new(RequestPrompt::Text(ENDLESS.into()));
    request.options.ignore_eos = true;
    let mut generation = client.request(request).unwrap();
    while !matches!(generation.next().unwrap().unwrap(), Event::Tokens(_)) {}
    generation
}

#[test]
fn serve_drains_on_the_first_signal_and_its_memory_stays_in_the_envelope() {
    let mut serving = serve(&["--set", "drain.timeout_ms=0"]);
    let client = Client::connect(serving.address, &ClientOptions::default()).unwrap();
    let generation = endless(&client);
    let status = std::fs::read_to_string(format!("/proc/{}/status", serving.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    signal(&serving.child, Signal::TERM);
    // What is in progress when the drain's time is over is told so.
    let last = generation.last().unwrap();
    assert!(matches!(last, Ok(Event::Done(_))), "{last:?}");
    let mut rest = String::new();
    serving.output.read_to_string(&mut rest).unwrap();
    assert_eq!(serving.child.wait().unwrap().code(), Some(0));

    let plan = run(&[&["plan", "--json"], &SMALL[..]].concat());
    let envelope = number(&text(&plan.stdout), "process_bytes");
    assert!(peak_kib * 1024 <= envelope, "{peak_kib} KiB at most, {envelope} bytes planned");
}

/// What happened to a stream and its sequence on a core, by a dump of the flight recorders.
fn life<'a>(dump: &'a str, core: &str, ids: [&str; 2]) -> Vec<&'a str> {
    let its = dump.lines().filter(|line| {
        let mut words = line.split_whitespace();
        words.nth(2) == Some(core) && words.any(|word| ids.contains(&word))
    });
    its.map(|line| line[33..49].trim_end()).collect()
}

#[test]
fn a_signal_prints_what_became_of_the_last_request() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("recorded");
    let to_file = format!("runtime.recorder_file={}", file.display());
    for (args, end) in [
        (&[][..], "end of flight recorders\n"),
        (&["--set", to_file.as_str()], "flight recorders, for SIGUSR1: in "),
    ] {
        let mut serving = serve(args);
        let client = Client::connect(serving.address, &ClientOptions::default()).unwrap();
        let mut request = Request::new(RequestPrompt::Text(ENDLESS.into()));
        request.max_tokens = Some(3);
        let last = client.request(request).unwrap().last().unwrap();
        assert!(matches!(last, Ok(Event::Done(_))), "{last:?}");
        signal(&serving.child, Signal::USR1);
        let mut errors = BufReader::new(serving.child.stderr.take().unwrap());
        let mut dump = String::new();
        let mut line = 0;
        while !dump[line..].starts_with(end) {
            line = dump.len();
            assert!(errors.read_line(&mut dump).unwrap() > 0, "no {end:?}: {dump}");
        }
        if !args.is_empty() {
            dump = std::fs::read_to_string(&file).unwrap();
        }
        let grant = dump.lines().find(|line| line.contains("grant ")).unwrap();
        let mut ids = grant.split_whitespace().rev();
        let (seq, stream) = (ids.next().unwrap(), ids.next().unwrap());
        let of = |core| life(&dump, core, [stream, seq]);
        assert_eq!(of("front"), ["request", "ask", "granted", "submit", "done"], "{dump}");
        let engine = ["ask", "grant", "accept", "admit", "first token", "done"];
        assert_eq!(of("engine"), engine, "{dump}");
        if !args.is_empty() {
            let path = file.to_str().unwrap();
            let its = run(&["dump", path, "--seq", seq.split_once('=').unwrap().1]);
            let its = text(&its.stdout);
            let both = (life(&its, "engine", [stream, seq]), life(&its, "front", [stream, seq]));
            assert_eq!(both, (of("engine"), of("front")), "{its}");
            assert_eq!(its.lines().count(), 1 + both.0.len() + both.1.len(), "{its}");
        }
        // A step for the prompt, one for each token but the last.
        assert_eq!(dump.matches("step begun ").count(), 3, "{dump}");
        assert_eq!(dump.matches("step done ").count(), 3, "{dump}");
        let ago = dump.lines().filter_map(|line| line.split_once(" us "));
        let ago: Vec<i64> = ago.map(|(ago, _)| ago.trim().parse().unwrap()).collect();
        assert!(ago.len() > 16 && ago.is_sorted(), "{dump}");
        serving.child.kill().unwrap();
        serving.child.wait().unwrap();
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut serving = serve(&[]);
    let client = Client::connect(serving.address, &ClientOptions::default()).unwrap();
    let generation = endless(&client);
    signal(&serving.child, Signal::INT);
    // The server has begun to drain when it says that it goes away.
    while !client.is_going_away() {
        std::thread::yield_now();
    }
    signal(&serving.child, Signal::INT);
    assert_eq!(serving.child.wait().unwrap().code(), Some(130));
    drop(generation);
}

#[test]
fn an_address_in_use_is_said_to_be() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(&[&["serve", "--listen", &address], &SMALL[..]].concat());
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains(&format!("listening on {address}")), "{said}");
}

#[test]
fn top_prints_one_frame_of_a_server_and_says_when_there_is_none() {
    let mut serving = serve(&["--set", "metrics.listen=off"]);
    let address = serving.address.to_string();
    let client = Client::connect(serving.address, &ClientOptions::default()).unwrap();
    let generation = endless(&client);
    let frame = run(&["top", "--connect", &address, "--once", "--interval", "0.2"]);
    assert!(frame.status.success(), "{}", text(&frame.stderr));
    let shown = text(&frame.stdout);
    for part in ["front", "queue", "batch", "running 1", "KV", "device", "egress", "TTFT", "λ"] {
        assert!(shown.contains(part), "{part:?} is not in: {shown}");
    }
    drop(generation);
    // What is no terminal is not drawn on.
    let no_terminal = run(&["top", "--connect", &address]);
    assert_eq!(no_terminal.status.code(), Some(2));
    assert!(text(&no_terminal.stderr).contains("--once"), "{}", text(&no_terminal.stderr));
    serving.child.kill().unwrap();
    serving.child.wait().unwrap();
    let gone = run(&["top", "--connect", &address, "--once"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains(&address), "{}", text(&gone.stderr));
}

#[test]
fn a_metrics_address_that_was_asked_for_and_is_in_use_is_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let metrics = format!("metrics.listen={address}");
    let output =
        run(&[&["serve", "--listen", "127.0.0.1:0", "--set", &metrics], &SMALL[..]].concat());
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains(&format!("listening on {address} for metrics")), "{said}");
}

#[test]
fn dump_says_when_a_file_holds_no_dump() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "a log\nof something else\n").unwrap();
    let output = run(&["dump", file.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("no flight recorder's event"));
}
