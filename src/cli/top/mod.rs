//! `forebay top`: a server's pipeline, live: how close every link is to making the one before wait.
//!
//! One thread asks the server for its numbers, over the native protocol like any client; this one
//! draws and reads keys, so that a server that does not answer never holds up `q`.

mod draw;
mod view;

use std::collections::VecDeque;
use std::io::{IsTerminal, stdout};
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::args::Top;
use super::{Failure, models, target};
use crate::client::{Client, ClientError, ClientOptions};
use draw::Screen;
use view::{Sample, View};

/// Rates and percentiles are of this time: long enough for a few answers to end, short enough to
/// see what just changed.
const WINDOW: Duration = Duration::from_secs(10);

/// How long a key waits at most until it is seen.
const KEY_WAIT: Duration = Duration::from_millis(50);

/// What the asking thread found.
type Answer = Result<Sample, String>;

/// Shows a server's numbers until `q`, or once.
pub(super) fn top(args: &Top) -> Result<(), Failure> {
    let address = target::resolve(&args.connect)?;
    let interval = Duration::from_secs_f64(args.interval);
    if args.once {
        let view = once(address, interval)
            .map_err(|error| Failure::Runtime(format!("{address}: {error}")))?;
        return models::print(Screen::new(&args.connect, &view).text().trim_end());
    }
    if !stdout().is_terminal() {
        let what = "top draws on a terminal, and this is none; --once prints one frame as text";
        return Err(Failure::Usage(what.into()));
    }
    let (answers, received) = sync_channel(1);
    thread::spawn(move || ask_forever(address, interval, &answers));
    // Restores the terminal on a panic, too.
    let mut terminal = ratatui::try_init()
        .map_err(|error| Failure::Runtime(format!("cannot draw on this terminal: {error}")))?;
    let ended = show(&mut terminal, &args.connect, &received);
    ratatui::restore();
    ended.map_err(|error| Failure::Runtime(format!("the terminal: {error}")))
}

/// Two looks, an interval apart: rates need both.
fn once(address: SocketAddr, interval: Duration) -> Result<View, ClientError> {
    let client = connect(address)?;
    let first = ask(&client)?;
    thread::sleep(interval);
    let last = ask(&client)?;
    Ok(View::new(&first, &last))
}

fn connect(address: SocketAddr) -> Result<Client, ClientError> {
    Client::connect(address, &ClientOptions::default())
}

fn ask(client: &Client) -> Result<Sample, ClientError> {
    let numbers = client.stats()?;
    Ok(Sample::new(Instant::now(), numbers, &client.info().model, &client.info().server))
}

/// Asks until nobody listens, on a new connection when the old one is over.
fn ask_forever(address: SocketAddr, interval: Duration, answers: &SyncSender<Answer>) {
    let mut client = None;
    loop {
        let connected = match client.take() {
            Some(client) => Ok(client),
            None => connect(address),
        };
        let answer = connected.and_then(|connected| {
            let sample = ask(&connected)?;
            client = Some(connected);
            Ok(sample)
        });
        if answers.send(answer.map_err(|error| error.to_string())).is_err() {
            return;
        }
        thread::sleep(interval);
    }
}

/// The samples of the last [`WINDOW`].
#[derive(Default)]
struct History {
    samples: VecDeque<Sample>,
    /// Why the newest is not of now.
    gone: Option<String>,
}

impl History {
    fn take(&mut self, answer: Answer) {
        match answer {
            Ok(sample) => {
                let newest = self.samples.back();
                // Counters that fell are another server's: nothing before them counts.
                if newest.is_some_and(|newest| sample.is_of_another_server(newest)) {
                    self.samples.clear();
                }
                self.samples.push_back(sample);
                self.gone = None;
            }
            Err(error) => self.gone = Some(error),
        }
        while let (Some(second), Some(last)) = (self.samples.get(1), self.samples.back())
            && last.at.duration_since(second.at) >= WINDOW
        {
            self.samples.pop_front();
        }
    }

    fn view(&self) -> Option<View> {
        Some(View::new(self.samples.front()?, self.samples.back()?))
    }
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    name: &str,
    answers: &Receiver<Answer>,
) -> std::io::Result<()> {
    let mut history = History::default();
    loop {
        let view = history.view().unwrap_or_default();
        let screen = Screen { gone: history.gone.as_deref(), ..Screen::new(name, &view) };
        terminal.draw(|frame| screen.draw(frame))?;
        loop {
            if event::poll(KEY_WAIT)? {
                match event::read()? {
                    Event::Key(key) if is_quit(key) => return Ok(()),
                    Event::Resize(..) => break,
                    _ => {}
                }
            }
            if let Ok(answer) = answers.try_recv() {
                history.take(answer);
                break;
            }
        }
    }
}

/// In raw mode Ctrl-C is a key like any other.
fn is_quit(key: KeyEvent) -> bool {
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    let quits = control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc);
    quits && key.kind == KeyEventKind::Press
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: Instant, asks: u64) -> Sample {
        Sample::new(at, vec![("engine_asks".into(), asks)], "m", "s")
    }

    #[test]
    fn the_window_slides_and_begins_anew_with_another_server() {
        let start = Instant::now();
        let mut history = History::default();
        for second in 0..30 {
            history.take(Ok(sample(start + Duration::from_secs(second), second * 5)));
        }
        assert_eq!(history.view().unwrap().arrivals_seen_per_second, 5.0);
        assert!(history.samples.len() <= 12, "{} samples", history.samples.len());
        history.take(Err("connection refused".into()));
        assert!(history.gone.is_some() && history.view().is_some(), "the last view stays");
        history.take(Ok(sample(start + Duration::from_secs(40), 1)));
        assert_eq!((history.samples.len(), history.gone), (1, None));
    }

    #[test]
    fn q_escape_and_control_c_end_it_and_nothing_else_does() {
        let key = |code, modifiers| is_quit(KeyEvent::new(code, modifiers));
        assert!(key(KeyCode::Char('q'), KeyModifiers::NONE));
        assert!(key(KeyCode::Esc, KeyModifiers::NONE));
        assert!(key(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!key(KeyCode::Char('c'), KeyModifiers::NONE));
        assert!(!key(KeyCode::Enter, KeyModifiers::NONE));
    }
}
