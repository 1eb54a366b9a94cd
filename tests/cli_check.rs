//! `forebay check`, and what every subcommand says about its own use.

use std::fs;
use std::process::{Command, Output, Stdio};

fn forebay(args: &[&str]) -> Output {
    forebay_with(args, &[])
}

fn forebay_with(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    let ours =
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FOREBAY"));
    for (name, _) in ours {
        command.env_remove(name);
    }
    command.args(args).envs(variables.iter().copied()).stdin(Stdio::null());
    command.output().expect("the program runs")
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("output is text")
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("errors are text")
}

#[test]
fn without_a_file_all_settings_are_printed_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("forebay.toml");
    let first = forebay(&["check"]);
    assert_eq!(first.status.code(), Some(0), "{}", err(&first));
    assert!(out(&first).contains("[server]\nlisten = \"127.0.0.1:7070\""), "{}", out(&first));
    fs::write(&path, &first.stdout).unwrap();
    let again = forebay(&["check", path.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(0), "{}", err(&again));
    let without_origins = |text: String| -> Vec<String> {
        text.lines().map(|line| line.split('#').next().unwrap().trim().to_owned()).collect()
    };
    assert_eq!(without_origins(out(&first)), without_origins(out(&again)));
}

#[test]
fn a_wrong_file_is_answered_with_all_that_is_wrong_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.toml");
    fs::write(&path, "[server]\nlisten = \"0.0.0.0:7070\"\n[limits]\nruning_max = 1\n").unwrap();
    let output = forebay_with(
        &["check", path.to_str().unwrap(), "--set", "limits.asks_max=none"],
        &[("FOREBAY_COMPUTE_ISA", "mmx")],
    );
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(out(&output), "");
    let said = err(&output);
    for part in [
        "4 problems",
        "server.listen = \"0.0.0.0:7070\"",
        "f.toml line 2",
        "no keys yet",
        "did you mean limits.running_max?",
        "compute.isa = \"mmx\" (environment variable FOREBAY_COMPUTE_ISA)",
        "limits.asks_max = \"none\" (flag --set)",
    ] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
}

#[test]
fn what_cannot_be_read_is_wrong_usage() {
    let cases: [(&[&str], &str); 4] = [
        (&["check", "/nonexistent/f.toml"], "cannot read the configuration file"),
        (&["check", "--set", "limits.asks_max"], "must be KEY=VALUE"),
        (&["check", "--log", "forebay=loud,["], "--log"),
        (&["sevre"], "unrecognized subcommand"),
    ];
    for (args, part) in cases {
        let output = forebay(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(err(&output).contains(part), "{args:?}: {}", err(&output));
    }
}

#[test]
fn a_flag_with_its_own_name_beats_set() {
    let output = forebay(&["check", "--threads", "2", "--set", "compute.threads=7"]);
    let line = "threads = 2                            # flag --threads";
    assert!(out(&output).contains(line), "{}", out(&output));
}

#[test]
fn help_teaches_with_examples_and_exit_codes() {
    let help = forebay(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for part in ["Examples:", "Exit codes:", "130", "serve", "bench", "chat"] {
        assert!(out(&help).contains(part), "{part:?} is not in: {}", out(&help));
    }
    assert!(out(&forebay(&["--version"])).starts_with("forebay 0.1.0"));
}
