//! Where io_uring is denied, as container runtimes do it, the probe says so and everything goes
//! on over epoll. Each filter is tried in a child process, as it cannot be taken off again.

#[path = "support/net.rs"]
mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::Command;

use forebay::front::net::{ListenSettings, Net, NetSettings};
use forebay::runtime::{Flavour, probe, start_executor};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use support::{Driver, echo_until};

const ROLE: &str = "FOREBAY_TEST_DENY";

/// Answers io_uring_setup, io_uring_enter and io_uring_register with `action` in this process.
fn deny_io_uring(action: SeccompAction) {
    let rules: BTreeMap<_, _> =
        [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register]
            .map(|call| (call, Vec::new()))
            .into();
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, architecture).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter_all_threads(&program).unwrap();
}

/// Runs the test below as a child that denies itself io_uring in the named way.
fn in_a_child(role: &str) {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_child_serves_over_epoll", "--nocapture"])
        .env(ROLE, role)
        .status()
        .unwrap();
    assert!(status.success(), "{role}: {status}");
}

#[test]
fn denied_with_eperm_as_by_docker() {
    in_a_child("eperm");
}

#[test]
fn denied_with_enosys_as_by_a_sandbox() {
    in_a_child("enosys");
}

#[test]
fn denied_by_killing_as_by_systemd() {
    in_a_child("kill");
}

#[test]
fn the_child_serves_over_epoll() {
    let (action, says) = match std::env::var(ROLE).as_deref() {
        Ok("eperm") => (SeccompAction::Errno(libc::EPERM as u32), "denies it"),
        Ok("enosys") => (SeccompAction::Errno(libc::ENOSYS as u32), "denies it"),
        Ok("kill") => (SeccompAction::KillProcess, "kills"),
        // Run as a test of its own: nothing to deny.
        _ => return,
    };
    let kills = action == SeccompAction::KillProcess;
    deny_io_uring(action);
    let probe = probe();
    assert_eq!(probe.flavour(), Flavour::Epoll);
    assert!(probe.seccomp);
    let denial = probe.denials().next().unwrap();
    assert!(denial.what.contains(says), "{denial}");
    assert!(denial.remedy.contains("io_uring_setup"), "{denial}");
    assert!(probe.to_string().contains("sockets      epoll"), "{probe}");
    if !kills {
        assert!(Net::new(Flavour::IoUring, NetSettings::default()).is_err());
        let started = start_executor("ring", None, Flavour::IoUring, |_| async {});
        assert!(started.is_err(), "an executor without rings does not start");
    }
    let woken = start_executor("loop", None, probe.flavour(), |local| async move {
        local.sleep_until(local.now().plus_ms(1)).await;
        local.flavour()
    });
    assert_eq!(woken.unwrap().join().unwrap(), Flavour::Epoll);
    let listen = ListenSettings::default();
    let mut driver = Driver::start(probe.flavour(), NetSettings::default(), listen).unwrap();
    let (mut client, _) = driver.client();
    client.write_all(b"through the other door").unwrap();
    echo_until(&mut driver, |d| d.net.counters().sent_bytes == 22);
    let mut echoed = [0; 22];
    client.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"through the other door");
}
