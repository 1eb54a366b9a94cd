//! `forebay demo`, as typed.

use std::process::{Command, Output, Stdio};

fn demo(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FOREBAY") {
            command.env_remove(name);
        }
    }
    command.arg("demo").args(arguments).stdin(Stdio::null()).output().expect("the program runs")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

#[test]
fn all_demos_are_listed_with_what_they_show() {
    let output = demo(&["--list"]);
    assert_eq!(output.status.code(), Some(0));
    for name in ["collapse", "bucket", "vip", "fair", "batch", "long-prompt"] {
        assert!(text(&output.stdout).lines().any(|line| line.starts_with(name)), "{name}");
    }
}

#[test]
fn a_demo_that_is_not_there_is_answered_with_those_that_are() {
    let output = demo(&["colapse"]);
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    assert!(said.contains("\"colapse\"") && said.contains("collapse, bucket"), "{said}");
    assert_eq!(demo(&[]).status.code(), Some(2), "a name, --all or --list");
}

#[test]
fn a_demo_plays_both_sides_on_the_real_model_and_shows_them() {
    let output = demo(&["batch"]);
    let (shown, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{shown}{said}");
    assert!(shown.contains("one stream") && shown.contains("as it should be"), "{shown}");
}
