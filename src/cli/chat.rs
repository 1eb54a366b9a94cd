//! `forebay chat`: a conversation over the native protocol.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etcetera::BaseStrategy;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use signal_hook::consts::SIGINT;
use signal_hook::flag;

use super::args;
use super::target::Target;
use super::{Failure, models};
use crate::client::{
    Client, ClientError, ClientOptions, Event, Generation, Rejection, Request, RequestPrompt,
    Retries, RetryPolicy, Role,
};
use crate::request::{FinishReason, RejectReason, SamplingParams};

const HELP: &str = "\
/new          forget the conversation
/system TEXT  forget it, and begin with these instructions
/help         this
/quit         the end (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on.";

/// Talks until the user has had enough.
pub(super) fn chat(args: &args::Chat) -> Result<(), Failure> {
    let sampling = args.sampling.params()?;
    let target = Target::find(args.connect.as_deref(), &args.settings)?;
    let client = connect(&target)?;
    let mut lines = Lines::open()?;
    if lines.is_interactive() {
        let info = client.info();
        println!("{} on {} ({}). /help helps.", info.model, info.server, target.name);
    }
    let mut chat = Chat {
        client,
        sampling,
        // Without --seed each answer has another one; with it, each has the same.
        vary_seed: args.sampling.seed.is_none(),
        max_tokens: args.max_tokens,
        messages: Vec::new(),
        interrupts: Interrupts::watch()?,
        show_stats: lines.is_interactive() || args.stats,
    };
    chat.begin(args.system.as_deref());
    let ended = chat.converse(&mut lines);
    lines.close();
    drop(chat);
    ended.and(target.end())
}

fn connect(target: &Target) -> Result<Client, Failure> {
    Client::connect(target.address, &ClientOptions::default())
        .map_err(|error| Failure::Runtime(format!("cannot talk to {}: {error}", target.name)))
}

struct Chat {
    client: Client,
    sampling: SamplingParams,
    vary_seed: bool,
    max_tokens: u32,
    messages: Vec<(Role, String)>,
    interrupts: Interrupts,
    show_stats: bool,
}

/// How an answer ended.
enum Ended {
    /// With a reason of the server's.
    Done(FinishReason),
    /// It never began.
    Refused(Rejection),
}

impl Chat {
    fn begin(&mut self, system: Option<&str>) {
        self.messages.clear();
        self.messages.extend(system.map(|text| (Role::System, text.to_owned())));
    }

    fn converse(&mut self, lines: &mut Lines) -> Result<(), Failure> {
        while let Some(line) = lines.next()? {
            match line.trim() {
                "" => {}
                "/quit" | "/exit" => break,
                "/help" => models::print(HELP)?,
                "/new" => self.begin(None),
                text => match text.strip_prefix("/system ") {
                    Some(system) => self.begin(Some(system.trim())),
                    None if text.starts_with('/') && !text[1..].contains('/') => {
                        models::print(&format!("{text} is no command.\n{HELP}"))?;
                    }
                    None => self.ask(text)?,
                },
            }
        }
        Ok(())
    }

    /// Asks, prints the answer, and keeps both.
    fn ask(&mut self, text: &str) -> Result<(), Failure> {
        self.messages.push((Role::User, text.to_owned()));
        loop {
            let (answer, ended) = self.answer()?;
            match ended {
                Ended::Done(finish) => {
                    self.messages.push((Role::Assistant, answer));
                    say_end(finish);
                    return Ok(());
                }
                Ended::Refused(why) if why.reason == RejectReason::ExceedsCapacity => {
                    if !self.forget_oldest() {
                        self.messages.pop();
                        eprintln!("[this is too long for the model's context]");
                        return Ok(());
                    }
                    eprintln!("[too long for the model's context: the oldest is forgotten]");
                }
                Ended::Refused(why) => {
                    self.messages.pop();
                    let (reason, message) = (why.reason.name(), why.message);
                    eprintln!("[refused: {reason} {message}]");
                    return Ok(());
                }
            }
        }
    }

    /// Forgets the oldest question and its answer; `false` when only the newest question is left.
    fn forget_oldest(&mut self) -> bool {
        let is_question = |message: &(Role, String)| message.0 == Role::User;
        let mut questions = (0..self.messages.len()).filter(|&i| is_question(&self.messages[i]));
        let (Some(first), Some(second)) = (questions.next(), questions.next()) else {
            return false;
        };
        self.messages.drain(first..second);
        true
    }

    fn request(&mut self) -> Request {
        let mut request = Request::new(RequestPrompt::Messages(self.messages.clone()));
        request.max_tokens = Some(self.max_tokens);
        request.options.sampling = self.sampling.clone();
        if self.vary_seed {
            self.sampling.seed = self.sampling.seed.wrapping_add(1);
        }
        request
    }

    /// Prints one answer as it comes, after as many attempts as the server allows.
    fn answer(&mut self) -> Result<(String, Ended), Failure> {
        // From here on Ctrl-C stops the answer; at the prompt it is the line editor's.
        let _guard = self.interrupts.catch();
        let mut retries = Retries::new(&RetryPolicy::default());
        loop {
            let (answer, ended) = self.attempt()?;
            let Ended::Refused(why) = &ended else { return Ok((answer, ended)) };
            let Some(wait) = retries.next_wait(why) else { return Ok((answer, ended)) };
            eprintln!("[{}: again in {:.1} s]", why.reason.name(), wait.as_secs_f64());
            let until = Instant::now() + wait;
            while Instant::now() < until {
                if self.interrupts.caught() {
                    return Ok((answer, Ended::Done(FinishReason::Cancelled)));
                }
                std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
            }
        }
    }

    fn attempt(&mut self) -> Result<(String, Ended), Failure> {
        let begun = Instant::now();
        let request = self.request();
        let mut generation = self.client.request(request).map_err(lost)?;
        let mut answer = String::new();
        let mut first = None;
        let mut tokens = 0;
        let mut stop_by = None;
        let ended = loop {
            match self.next_event(&mut generation, &mut stop_by)? {
                Event::Tokens(new) => {
                    first.get_or_insert_with(|| begun.elapsed());
                    tokens += new.ids.len();
                    answer.push_str(&new.text);
                    show(&new.text)?;
                }
                Event::Done(done) => break Ended::Done(done.finish),
                Event::Rejected(rejection) => break Ended::Refused(rejection),
                Event::Accepted(_) | Event::Paused | Event::Resumed => {}
            }
        };
        if let Ended::Done(_) = ended {
            models::print("")?;
        }
        if let Some(first) = first.filter(|_| self.show_stats) {
            eprintln!("{}", stats(tokens, first, begun.elapsed()));
        }
        Ok((answer, ended))
    }

    /// The next event. After Ctrl-C the server is asked to stop, once, and by when its last event
    /// must have come is noted in `stop_by`.
    fn next_event(
        &self,
        generation: &mut Generation,
        stop_by: &mut Option<Instant>,
    ) -> Result<Event, Failure> {
        // A server that does not stop when asked is not waited for.
        const STOP_WAIT: Duration = Duration::from_secs(10);
        loop {
            // Looked for before every event, as an answer that comes fast never lets a wait end.
            match stop_by {
                None if self.interrupts.caught() => {
                    generation.cancel();
                    *stop_by = Some(Instant::now() + STOP_WAIT);
                }
                Some(by) if Instant::now() > *by => {
                    return Err(Failure::Runtime("the server does not stop".into()));
                }
                _ => {}
            }
            if let Some(event) = generation.next_timeout(LOOK).map_err(lost)? {
                return Ok(event);
            }
        }
    }
}

fn say_end(finish: FinishReason) {
    match finish {
        FinishReason::EndOfText | FinishReason::StopString => {}
        FinishReason::MaxTokens => eprintln!("[cut at --max-tokens]"),
        FinishReason::ContextFull => eprintln!("[the context is full: /new begins again]"),
        FinishReason::Cancelled => eprintln!("[stopped]"),
        other => eprintln!("[ended by the server: {}]", other.name()),
    }
}

fn lost(error: ClientError) -> Failure {
    Failure::Runtime(format!("the conversation is over: {error}"))
}

fn show(text: &str) -> Result<(), Failure> {
    let mut output = io::stdout().lock();
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
        .map_err(|error| Failure::Runtime(format!("cannot write to standard output: {error}")))
}

fn stats(tokens: usize, first: Duration, total: Duration) -> String {
    let rate = tokens.saturating_sub(1) as f64 / (total - first).as_secs_f64().max(1e-9);
    let first_ms = first.as_secs_f64() * 1e3;
    format!("[first token after {first_ms:.0} ms, {tokens} tokens, {rate:.1} tokens/s]")
}

/// How often Ctrl-C is looked for: costs nothing, and a key seems to work at once.
const LOOK: Duration = Duration::from_millis(50);

/// Ctrl-C: ends the program, except while an answer comes; then it raises a flag.
struct Interrupts {
    /// The signal has its usual effect.
    usual: Arc<AtomicBool>,
    caught: Arc<AtomicBool>,
}

impl Interrupts {
    fn watch() -> Result<Interrupts, Failure> {
        let (usual, caught) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        flag::register_conditional_default(SIGINT, Arc::clone(&usual))
            .and_then(|_| flag::register(SIGINT, Arc::clone(&caught)))
            .map_err(|error| Failure::Runtime(format!("cannot watch for Ctrl-C: {error}")))?;
        Ok(Interrupts { usual, caught })
    }

    /// Until the guard is dropped, Ctrl-C does not end the program.
    fn catch(&self) -> Catch {
        // Sequentially consistent, as signal-hook reads and writes them.
        self.caught.store(false, Ordering::SeqCst);
        self.usual.store(false, Ordering::SeqCst);
        Catch(Arc::clone(&self.usual))
    }

    fn caught(&self) -> bool {
        self.caught.load(Ordering::SeqCst)
    }
}

struct Catch(Arc<AtomicBool>);

impl Drop for Catch {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What the user writes: with an editor and a history on a terminal, else plain lines.
enum Lines {
    Editor(Box<DefaultEditor>, Option<PathBuf>),
    Plain(io::StdinLock<'static>),
}

impl Lines {
    fn open() -> Result<Lines, Failure> {
        if !io::stdin().is_terminal() {
            return Ok(Lines::Plain(io::stdin().lock()));
        }
        let mut editor = DefaultEditor::new()
            .map_err(|error| Failure::Runtime(format!("cannot use the terminal: {error}")))?;
        let history = history_file();
        if let Some(path) = &history {
            // The first time there is none.
            let _ = editor.load_history(path);
        }
        Ok(Lines::Editor(Box::new(editor), history))
    }

    fn is_interactive(&self) -> bool {
        matches!(self, Lines::Editor(..))
    }

    /// The next message; `None` at the end of input.
    fn next(&mut self) -> Result<Option<String>, Failure> {
        let mut message = String::new();
        loop {
            let prompt = if message.is_empty() { "> " } else { ". " };
            let Some(line) = self.line(prompt)? else { return Ok(None) };
            match line.strip_suffix('\\') {
                Some(part) => {
                    message.push_str(part);
                    message.push('\n');
                }
                None => {
                    message.push_str(&line);
                    break;
                }
            }
        }
        if let Lines::Editor(editor, _) = self {
            // A history without this line is no reason to stop talking.
            let _ = editor.add_history_entry(message.as_str());
        }
        Ok(Some(message))
    }

    fn line(&mut self, prompt: &str) -> Result<Option<String>, Failure> {
        let failed = |what: &dyn std::fmt::Display| {
            Failure::Runtime(format!("cannot read what you write: {what}"))
        };
        match self {
            Lines::Editor(editor, _) => loop {
                match editor.readline(prompt) {
                    Ok(line) => return Ok(Some(line)),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(ReadlineError::Interrupted) => println!("[Ctrl-D or /quit ends the chat]"),
                    Err(error) => return Err(failed(&error)),
                }
            },
            Lines::Plain(input) => {
                let mut line = String::new();
                let count = input.read_line(&mut line).map_err(|error| failed(&error))?;
                let text = line.trim_end_matches(['\n', '\r']).to_owned();
                Ok((count > 0).then_some(text))
            }
        }
    }

    fn close(&mut self) {
        if let Lines::Editor(editor, Some(path)) = self {
            let folder = path.parent().map(std::fs::create_dir_all);
            if folder.is_none_or(|made| made.is_ok()) {
                // Not being able to remember does not undo what was said.
                let _ = editor.save_history(path.as_path());
            }
        }
    }
}

fn history_file() -> Option<PathBuf> {
    let strategy = etcetera::base_strategy::Xdg::new().ok()?;
    Some(strategy.state_dir()?.join("forebay/chat_history"))
}
