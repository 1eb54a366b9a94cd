//! The wire as somebody sees it who has only the specification: garbage, silence, and a client in
//! another language.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use crate::rig::{FLAVOURS, Rig, ask, exactly};

#[test]
fn garbage_is_answered_with_an_error_and_a_close_and_hurts_nobody() {
    for flavour in FLAVOURS {
        let rig = Rig::start(flavour);
        let client = rig.connect();
        let garbage: [&[u8]; 4] = [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            &[0xff; 4096],
            &[0; 64],
            b"\x16\x03\x01\x02\x00",
        ];
        for bytes in garbage {
            let mut socket = TcpStream::connect(rig.server().address()).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            socket.write_all(bytes).unwrap();
            let mut answer = Vec::new();
            // A reset after the answer is as good as an end.
            let _ = socket.read_to_end(&mut answer);
            assert!(answer.len() > 12, "an ERROR frame, not {answer:?} to {bytes:?}");
        }
        assert_eq!(ask(&client, exactly("Still here", 3)).ids.len(), 3);
    }
}

#[test]
fn who_says_nothing_is_closed() {
    let rig = Rig::start_with(FLAVOURS[0], |config| config.limits.handshake_timeout_ms = 100);
    let mut socket = TcpStream::connect(rig.server().address()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    assert!(!answer.is_empty(), "told why");
}

#[test]
fn a_client_written_in_python_from_the_specification_works() {
    let rig = Rig::start(FLAVOURS[0]);
    let address = rig.server().address();
    let output = Command::new("python3")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/native.py"))
        .args(["--max-tokens", "24", "--temperature", "0", &address.to_string()])
        .arg("What is the capital of France? Answer briefly.")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("Paris"), "{output:?}");
    rig.wait_until_idle();
}
