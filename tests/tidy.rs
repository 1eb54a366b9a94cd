//! The project's rules about its own text: what depends on what, what core code may not touch,
//! where unsafe code may stand, and style that a formatter does not see.
//!
//! Every failure names file, line and rule. An exception is a line in a table here, with a reason.

#[path = "tidy/source.rs"]
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use source::{Source, blank_strings_and_comments, end_of_block, files_under, has_word, walk};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Everything that cargo compiles, from its entry points on.
fn sources() -> BTreeMap<String, Source> {
    let is_entry = |path: &&String| {
        let depth = path.matches('/').count();
        match path.split('/').next() {
            Some("src") => {
                *path == "src/lib.rs"
                    || *path == "src/main.rs"
                    || depth == 2 && path.starts_with("src/bin/")
            }
            // The fuzz targets are a package of their own: cargo-fuzz wants it so.
            Some("tests") => {
                let of_folder = depth == 2 && path.ends_with("/main.rs");
                depth == 1 || of_folder || path.starts_with("tests/fuzz/")
            }
            _ => depth <= 1,
        }
    };
    walk(root(), &all_files().iter().filter(is_entry).cloned().collect::<Vec<_>>())
}

fn all_files() -> Vec<String> {
    let mut files = files_under(root(), &["src", "tests", "bench"]);
    files.extend(root().join("build.rs").is_file().then(|| "build.rs".to_string()));
    files
}

#[track_caller]
fn report(rule: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

#[test]
fn every_file_is_reached_from_some_target() {
    let reached = sources();
    let lost: Vec<String> =
        all_files().into_iter().filter(|file| !reached.contains_key(file)).collect();
    report("these files are compiled by nothing", &lost);
}

/// What each folder (or file) of `src/` may name of the others, besides `request`: that is the
/// vocabulary, and depends on nothing but `base`. The table of the design's layout, and what grew
/// since.
const DEPENDENCIES: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("request", &["base"]),
    ("limits", &["base", "message"]),
    ("config", &["base", "limits"]),
    ("message", &["base"]),
    ("ring", &[]),
    ("flow", &["base", "ring"]),
    ("ports", &["flow", "limits", "message", "ring"]),
    ("protocol", &["base", "message"]),
    ("front", &["base", "flow", "limits", "message", "model", "ports", "protocol", "ring"]),
    ("engine", &["base", "flow", "limits", "message", "ports", "ring"]),
    ("device", &["base", "message", "model", "ring"]),
    ("model", &["base"]),
    ("runtime", &["base", "ring"]),
    ("client", &["base", "protocol"]),
];

/// Shells run on an executor; their cores know nothing of it.
fn is_shell(path: &str) -> bool {
    path.ends_with("/task.rs")
        || path.starts_with("src/device/")
        || path.starts_with("src/front/net/")
}

#[test]
fn folders_depend_only_on_what_the_design_allows() {
    let mut findings = Vec::new();
    let reached = sources();
    for source in reached.values().filter(|source| source.path.starts_with("src/")) {
        let inside = &source.path["src/".len()..];
        let folder = inside.split(['/', '.']).next().expect("split yields something");
        let Some((_, allowed)) = DEPENDENCIES.iter().find(|(name, _)| *name == folder) else {
            continue; // lib.rs, main.rs, bin/ and cli/ may use everything.
        };
        for (number, code) in source.shipped() {
            for named in modules_named(code) {
                let fine = named == folder
                    || named == "request"
                    || allowed.contains(&named.as_str())
                    || (named == "runtime" && is_shell(&source.path));
                if !fine {
                    findings
                        .push(format!("{}:{number}: {folder} must not use {named}", source.path));
                }
            }
        }
    }
    report("dependencies", &findings);
}

/// Top-level modules of this crate that a line of code names.
fn modules_named(code: &str) -> Vec<String> {
    let uses = code.match_indices("crate::").filter(|(at, _)| !code[..*at].ends_with('$'));
    let mut named: Vec<String> = uses
        .map(|(at, start)| code[at + start.len()..].chars())
        .map(|rest| rest.take_while(|c| c.is_alphanumeric() || *c == '_').collect())
        .filter(|name: &String| name.starts_with(char::is_lowercase))
        .collect();
    if let Some(list) = code.trim_start().strip_prefix("use crate::{") {
        named.extend(
            list.split([',', '}'])
                .filter_map(|item| item.split("::").next())
                .map(|name| name.trim().to_string()),
        );
        named.retain(|name| !name.is_empty() && name.starts_with(char::is_lowercase));
    }
    named
}

/// Files of the core: pure state machines and what they are built of.
fn is_core(path: &str) -> bool {
    let folders = ["base/", "engine/", "flow/", "front/", "protocol/", "ring/"];
    let files = ["message.rs", "ports.rs", "request.rs", "limits.rs"];
    let inside = path.strip_prefix("src/").unwrap_or("");
    (folders.iter().any(|folder| inside.starts_with(folder)) || files.contains(&inside))
        && !is_shell(path)
}

/// What core code must not name, and why.
const IMPURE: &[(&str, &str)] = &[
    ("Instant::now", "time is an argument"),
    ("SystemTime", "time is an argument"),
    ("std::time::Instant", "time is an argument"),
    (".elapsed()", "time is an argument"),
    ("std::fs", "core code does no I/O"),
    ("std::net", "core code does no I/O"),
    ("std::io", "core code does no I/O"),
    ("std::env", "core code does no I/O"),
    ("std::process", "core code does no I/O"),
    ("println!", "core code does no I/O"),
    ("eprintln!", "core code does no I/O"),
    ("libc", "core code makes no system calls"),
    ("std::thread", "core code has no threads"),
    ("thread_local!", "core code has no threads"),
    ("Mutex", "core code takes no locks"),
    ("RwLock", "core code takes no locks"),
    ("Condvar", "core code takes no locks"),
    ("mpsc", "rings join cores, nothing else does"),
    ("HashMap", "its order is random: use a BTreeMap or a slab"),
    ("HashSet", "its order is random: use a BTreeSet or a slab"),
    ("RandomState", "core code is deterministic"),
];

/// (file, what it may name all the same, why)
const IMPURE_ALLOWED: &[(&str, &str, &str)] = &[(
    "src/ring/sync.rs",
    "thread",
    "the doorbell parks threads; this is where it gets std's or loom's way to",
)];

#[test]
fn core_code_reads_no_clock_does_no_io_and_is_deterministic() {
    let mut findings = Vec::new();
    for source in sources().values().filter(|source| is_core(&source.path)) {
        for (number, code) in source.shipped() {
            for (name, reason) in IMPURE {
                let allowed = IMPURE_ALLOWED
                    .iter()
                    .any(|(path, allowed, _)| *path == source.path && name.contains(allowed));
                if has_word(code, name) && !allowed {
                    findings.push(format!("{}:{number}: {name}: {reason}", source.path));
                }
            }
        }
    }
    report("core code stays pure (I8)", &findings);
}

/// Files where floating point may decide, and files that pass it through undecided.
const FLOATS_ALLOWED: &[(&str, &str)] = &[
    ("src/flow/estimate.rs", "estimates; hands out integers"),
    ("src/request.rs", "sampling parameters"),
    ("src/message.rs", "log-probabilities and step results"),
    ("src/protocol/", "sampling parameters and log-probabilities on the wire"),
    ("src/engine/results.rs", "passes log-probabilities on"),
    ("src/engine/sequence.rs", "keeps log-probabilities until they are sent"),
    ("src/front/events.rs", "passes log-probabilities on"),
    ("src/front/pipeline.rs", "passes logit biases on"),
];

#[test]
fn integers_decide() {
    let mut findings = Vec::new();
    for source in sources().values().filter(|source| is_core(&source.path)) {
        if FLOATS_ALLOWED.iter().any(|(path, _)| source.path.starts_with(path)) {
            continue;
        }
        for (number, code) in source.shipped() {
            if ["f32", "f64"].iter().any(|float| has_word(code, float)) {
                findings.push(format!("{}:{number}: floating point", source.path));
            }
        }
    }
    report("decisions are made in integers", &findings);
}

/// Where unsafe code may stand in what is shipped.
const UNSAFE_ISLANDS: &[&str] = &[
    "src/ring/",
    "src/device/cpu/",
    "src/device/cuda/",
    "src/front/net/",
    "src/runtime/",
    "src/model/gguf/mod.rs",
];

#[test]
fn unsafe_code_stays_on_its_islands_and_says_why_it_is_sound() {
    let mut findings = Vec::new();
    for source in sources().values() {
        let island = UNSAFE_ISLANDS.iter().any(|island| source.path.starts_with(island));
        for (index, line) in source.lines.iter().enumerate() {
            if !has_word(&line.code, "unsafe") {
                continue;
            }
            if !line.test && !island {
                findings.push(format!("{}:{}: not an island", source.path, index + 1));
            } else if !says_why(source, index) {
                findings.push(format!("{}:{}: no reason given", source.path, index + 1));
            }
        }
    }
    report("unsafe code", &findings);
}

/// Whether a `SAFETY:` with some words behind it stands close above an unsafe block or impl. Clippy
/// checks that it is the right one, in the library; this holds for tests and benches too. (What an
/// `unsafe fn` asks of its caller is clippy's business alone.)
fn says_why(source: &Source, index: usize) -> bool {
    let code = &source.lines[index].code;
    if !["unsafe {", "unsafe impl"].iter().any(|site| code.contains(site)) {
        return true;
    }
    let above = &source.lines[index.saturating_sub(SAFETY_DISTANCE_MAX)..=index];
    above.iter().any(|line| {
        let reason = line.text.split("SAFETY:").nth(1);
        reason.is_some_and(|reason| reason.split_whitespace().count() >= 2)
    })
}

/// One comment may speak for the arms of a match or the few calls of a block.
const SAFETY_DISTANCE_MAX: usize = 16;

const COLUMNS_MAX: usize = 100;

#[test]
fn no_line_is_wider_than_100_columns() {
    let mut findings = Vec::new();
    for source in sources().values() {
        for (index, line) in source.lines.iter().enumerate() {
            let columns = line.text.chars().count();
            // A row of a Markdown table cannot be broken.
            let is_table_row =
                line.text.trim_start().trim_start_matches(['/', '!']).starts_with(" |");
            if columns > COLUMNS_MAX && !is_table_row {
                findings.push(format!("{}:{}: {columns} columns", source.path, index + 1));
            }
        }
    }
    report("lines", &findings);
}

const FUNCTION_LINES_MAX: usize = 70;

/// (file, function, lines at most, why it is not shorter). An entry that is no longer needed fails.
const LONG_FUNCTIONS: &[(&str, &str, usize, &str)] = &[(
    "src/device/cpu/attention.rs",
    "attend",
    90,
    "one recurrence with its unsafe kernel calls; its parts share a dozen locals",
)];

#[test]
fn functions_fit_on_a_screen() {
    let mut findings = Vec::new();
    let mut needed = BTreeSet::new();
    for source in sources().values() {
        for (index, line) in source.lines.iter().enumerate() {
            let Some(name) = function_named(&line.code) else { continue };
            let Some(end) = end_of_block(&source.lines, index) else { continue };
            let length = end - index + 1;
            if length <= FUNCTION_LINES_MAX {
                continue;
            }
            let entry = LONG_FUNCTIONS.iter().position(|(path, function, max, _)| {
                *path == source.path && *function == name && length <= *max
            });
            needed.extend(entry);
            if entry.is_none() {
                findings.push(format!("{}:{}: {name} has {length} lines", source.path, index + 1));
            }
        }
    }
    let unneeded = (0..LONG_FUNCTIONS.len()).filter(|entry| !needed.contains(entry));
    findings.extend(unneeded.map(|entry| format!("not needed: {:?}", LONG_FUNCTIONS[entry])));
    report("functions", &findings);
}

/// The name of the function that this line of code begins to define.
fn function_named(code: &str) -> Option<String> {
    let mut words = code.split_whitespace().skip_while(|word| *word != "fn");
    words.next()?;
    let name = words.next()?;
    Some(name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
        .filter(|name: &String| !name.is_empty())
}

/// Words that say that something is not finished, or that only its author understands. Split, so
/// that this file may hold them.
const BANNED: &[(&str, &str)] = &[
    (concat!("TO", "DO"), "finish it, or open an issue"),
    (concat!("FIX", "ME"), "fix it, or open an issue"),
    (concat!("XX", "X"), "say what is wrong"),
    (concat!("HA", "CK"), "say why it has to be"),
    (concat!("to", "do!"), "write it"),
    (concat!("unimplem", "ented!"), "write it"),
    (concat!("db", "g!"), "left over from a search"),
    (concat!("(being ", "written)"), "an empty file is not a part"),
    (concat!("white", "list"), "say allowed"),
    (concat!("black", "list"), "say banned"),
];

#[test]
fn nothing_is_left_unfinished() {
    let mut findings = Vec::new();
    for source in sources().values() {
        for (index, line) in source.lines.iter().enumerate() {
            for (word, advice) in BANNED {
                if has_word(&line.text, word) {
                    findings.push(format!("{}:{}: {word}: {advice}", source.path, index + 1));
                }
            }
        }
    }
    report("banned words", &findings);
}

#[test]
fn no_test_sleeps() {
    let mut findings = Vec::new();
    for source in sources().values() {
        for (index, line) in source.lines.iter().enumerate() {
            if line.test && ["thread::sleep", "sleep_ms"].iter().any(|s| has_word(&line.code, s)) {
                findings.push(format!("{}:{}", source.path, index + 1));
            }
        }
    }
    report("a test that sleeps is slow when it passes and wrong when it fails", &findings);
}

#[test]
fn the_rules_see_code_and_not_what_looks_like_it() {
    let blanked = blank_strings_and_comments(
        "let a = \"f32 \\\" {\"; // unsafe
        let b: &'static str = r#\"HashMap\"#; /* { /* } */ f64 */ let c = '{';",
    );
    for hidden in ["f32", "unsafe", "HashMap", "f64", "{", "}"] {
        assert!(!blanked.contains(hidden), "{hidden} in {blanked}");
    }
    for code in ["let a =", "let b: &'static str =", "let c ="] {
        assert!(blanked.contains(code), "{code} in {blanked}");
    }
    assert!(has_word("x: f32,", "f32") && !has_word("half::f32x", "f32"));
    assert!(has_word("(libc::read)", "libc") && !has_word("my_libc", "libc"));
    assert_eq!(modules_named("use crate::{engine::Engine, flow};"), ["engine", "flow"]);
    assert_eq!(modules_named("let x = crate::ring::ring(crate::Limit);"), ["ring"]);
    assert_eq!(function_named("    pub async fn serve<T>(x: T) {").as_deref(), Some("serve"));
    assert_eq!(function_named("let f: fn(u8) = g;"), None);
}
