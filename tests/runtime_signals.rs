//! Signals, each in a child process: they belong to the process.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use forebay::runtime::shutdown::{EXIT_AT_ONCE, Signals, Wish};
use forebay::runtime::{Flavour, start_executor};

const ROLE: &str = "FOREBAY_TEST_SIGNALS";

/// The child: prints each wish. "patient" ends at the first wish to drain, "stubborn" goes on.
#[test]
fn the_child_says_what_it_is_asked_for() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut signals = Signals::install().unwrap();
    assert_eq!(signals.take(), None);
    let executor = start_executor("signals", None, Flavour::Epoll, move |local| async move {
        println!("ready");
        loop {
            local.readable(signals.wake_fd()).await.unwrap();
            while let Some(wish) = signals.take() {
                println!("{wish:?}");
                if wish == Wish::Drain && role == "patient" {
                    return;
                }
            }
        }
    });
    executor.unwrap().join().unwrap();
}

fn child(role: &str) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_child_says_what_it_is_asked_for", "--nocapture"])
        .env(ROLE, role)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    wait_for(&mut output, "ready");
    (child, output)
}

fn wait_for(output: &mut BufReader<ChildStdout>, word: &str) {
    let mut line = String::new();
    // The harness prints the test's name in front of its first line.
    while !line.trim_end().ends_with(word) {
        line.clear();
        assert!(output.read_line(&mut line).unwrap() > 0, "ended before it said {word}");
    }
}

fn kill(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn one_signal_drains() {
    use rustix::process::Signal;
    for signal in [Signal::INT, Signal::TERM] {
        let (mut child, mut output) = child("patient");
        kill(&child, signal);
        wait_for(&mut output, "Drain");
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    use rustix::process::Signal;
    let (mut child, mut output) = child("stubborn");
    kill(&child, Signal::TERM);
    wait_for(&mut output, "Drain");
    kill(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(EXIT_AT_ONCE));
}

#[test]
fn the_recorders_can_be_asked_for_again_and_again() {
    use rustix::process::Signal;
    let (mut child, mut output) = child("patient");
    for _ in 0..3 {
        kill(&child, Signal::USR1);
        wait_for(&mut output, "Dump");
    }
    kill(&child, Signal::INT);
    wait_for(&mut output, "Drain");
    assert!(child.wait().unwrap().success());
}
