//! `forebay dump`: finds what matters in a dump of the flight recorders.
//!
//! A dump is text already, all cores merged in the order of time (`runtime/recorder.rs` writes it);
//! it is kept as it is, and only what was not asked for is left out. Lines of a log between
//! dumps are skipped, so that a server's whole standard error can be given.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};

use super::args::Dump;
use super::{Failure, models};

/// Prints the dumps in a file, filtered.
pub(super) fn dump(args: &Dump) -> Result<(), Failure> {
    let name = args.file.display();
    let unreadable = |error: io::Error| Failure::Usage(format!("cannot read {name}: {error}"));
    let text = if args.file.as_os_str() == "-" {
        read(io::stdin().lock()).map_err(unreadable)?
    } else {
        read(BufReader::new(File::open(&args.file).map_err(unreadable)?)).map_err(unreadable)?
    };
    let dumps = Dumps::new(&text);
    if dumps.events.is_empty() {
        return Err(Failure::Usage(format!("there is no flight recorder's event in {name}")));
    }
    models::print(dumps.filtered(args).trim_end())
}

/// A log need not be text throughout.
fn read(mut from: impl BufRead) -> io::Result<String> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// One line of a dump.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Event<'a> {
    line: &'a str,
    /// Which dump of the file it is in.
    dump: usize,
    core: &'a str,
    kind: &'a str,
}

impl<'a> Event<'a> {
    /// `-AGO us CORE NUMBER  KIND  name=value  name=value`; `None` for any other line.
    fn parse(line: &'a str, dump: usize) -> Option<Event<'a>> {
        let (ago, rest) = line.split_once(" us ")?;
        ago.trim().strip_prefix('-')?.parse::<u64>().ok()?;
        let (core, rest) = rest.trim_start().split_once(' ')?;
        let (number, rest) = rest.trim_start().split_once("  ")?;
        number.parse::<u64>().ok()?;
        let kind = rest.split("  ").next()?.trim();
        (!kind.is_empty()).then_some(Event { line, dump, core, kind })
    }

    fn value(&self, name: &str) -> Option<&'a str> {
        self.line.split("  ").find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='))
    }
}

/// All dumps in a text.
#[derive(Debug)]
struct Dumps<'a> {
    /// What each was for.
    reasons: Vec<&'a str>,
    events: Vec<Event<'a>>,
}

const HEADING: &str = "flight recorders, for ";

impl<'a> Dumps<'a> {
    fn new(text: &'a str) -> Dumps<'a> {
        let mut dumps = Dumps { reasons: Vec::new(), events: Vec::new() };
        for line in text.lines() {
            if let Some(reason) = line.strip_prefix(HEADING).and_then(|r| r.strip_suffix(':')) {
                dumps.reasons.push(reason);
            }
            dumps.events.extend(Event::parse(line, dumps.reasons.len()));
        }
        dumps
    }

    /// The streams that the sequence served: what the front core knows it by. Of each dump its
    /// own, since another process counts anew.
    fn streams_of(&self, seq: &str) -> BTreeSet<(usize, &'a str)> {
        let its = self.events.iter().filter(|event| event.value("seq") == Some(seq));
        its.filter_map(|event| Some((event.dump, event.value("stream")?))).collect()
    }

    fn filtered(&self, args: &Dump) -> String {
        let streams = args.seq.as_deref().map(|seq| (seq, self.streams_of(seq)));
        let is_its = |event: &Event<'_>| {
            streams.as_ref().is_none_or(|(seq, streams)| {
                event.value("seq") == Some(seq)
                    || event
                        .value("stream")
                        .is_some_and(|stream| streams.contains(&(event.dump, stream)))
            })
        };
        let one_of = |wanted: &[String], is: &str| {
            wanted.is_empty() || wanted.iter().any(|wanted| wanted == is)
        };
        let wanted = |event: &&Event<'_>| {
            one_of(&args.core, event.core) && one_of(&args.kind, event.kind) && is_its(event)
        };
        let events: Vec<_> = self.events.iter().filter(wanted).collect();
        let skipped = args.last.map_or(0, |last| events.len().saturating_sub(last));
        let (mut text, mut dump) = (String::new(), 0);
        for event in &events[skipped..] {
            if event.dump != dump {
                dump = event.dump;
                text.push_str(&format!("{HEADING}{}:\n", self.reasons[dump - 1]));
            }
            text.push_str(event.line);
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Instant;
    use crate::base::recorder::{Recorder, key, recorded_events, stream};
    use crate::runtime::recorder;

    recorded_events!(Test {
        Grant = "grant", ["stream" Stream, "seq" Key];
        FirstToken = "first token", ["seq" Key, "ttft" Ns];
        Framed = "framed", ["stream" Stream];
        Nothing = "nothing", [];
    });

    /// What the writer really writes, twice, in a log. Every test has cores of its own: they are
    /// known to all that run beside it.
    fn log(names: [&'static str; 2]) -> String {
        let mut front = Recorder::start(names[0], Test::KINDS);
        let mut engine = Recorder::start(names[1], Test::KINDS);
        recorder::register(&front.recorder());
        recorder::register(&engine.recorder());
        let at = Instant::from_ns;
        for n in 0..3 {
            let (stream, seq) = (stream(0, 5 + n, 1), key(n, 2));
            let start = u64::from(n) * 1000;
            engine.record(at(start), Test::Grant as u16, [stream, seq, 0]);
            engine.record(at(start + 1), Test::FirstToken as u16, [seq, 9000, 0]);
            front.record(at(start + 2), Test::Framed as u16, [stream, 0, 0]);
        }
        engine.record(at(9000), Test::Nothing as u16, [0; 3]);
        let all = recorder::last_events(usize::MAX);
        let ours = all.lines().filter(|line| names.iter().any(|name| line.contains(name)));
        let plain = |line: &str| line.replace(names[0], "front").replace(names[1], "engine");
        let ours = ours.map(|line| plain(line) + "\n").collect::<String>();
        format!(
            "2026-01-01 INFO nothing of interest\n{HEADING}a stall:\n{ours}end of flight \
             recorders\nWARN took 30 us longer\n{HEADING}SIGUSR1:\n{ours}end of flight recorders\n"
        )
    }

    fn filter(log: &str, set: impl FnOnce(&mut Dump)) -> Vec<String> {
        let mut args = Dump { file: "-".into(), core: vec![], seq: None, kind: vec![], last: None };
        set(&mut args);
        Dumps::new(log).filtered(&args).lines().map(str::to_owned).collect()
    }

    #[test]
    fn all_events_of_all_dumps_are_kept_under_their_headings_and_the_rest_is_not() {
        let log = log(["dumped front", "dumped engine"]);
        let lines = filter(&log, |_| {});
        assert_eq!(lines.len(), 2 + 2 * 10, "{lines:#?}");
        assert_eq!(lines[0], "flight recorders, for a stall:");
        assert_eq!(lines[11], "flight recorders, for SIGUSR1:");
        assert!(log.contains(&lines[5]), "a line is as it was written");
    }

    #[test]
    fn a_sequence_is_followed_on_every_core() {
        let log = log(["followed front", "followed engine"]);
        let lines = filter(&log, |args| args.seq = Some("1.2".into()));
        let kinds = lines[1..4].iter().map(|line| Event::parse(line, 1).unwrap());
        let seen: Vec<_> = kinds.map(|event| (event.core, event.kind)).collect();
        let wanted = [("engine", "grant"), ("engine", "first token"), ("front", "framed")];
        assert_eq!(seen, wanted, "{lines:#?}");
        assert_eq!(lines.len(), 2 * 4);
    }

    #[test]
    fn filters_go_together_and_the_last_are_those_of_what_is_left() {
        let log = log(["filtered front", "filtered engine"]);
        let lines = filter(&log, |args| {
            args.core = vec!["engine".into()];
            args.kind = vec!["first token".into(), "nothing".into()];
            args.last = Some(2);
        });
        assert_eq!(lines.len(), 3, "{lines:#?}");
        assert!(lines[1].contains("first token") && lines[2].contains("nothing"), "{lines:#?}");
        assert!(filter(&log, |args| args.kind = vec!["token".into()]).is_empty());
    }
}
