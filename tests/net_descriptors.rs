//! Descriptors come back. A process of its own, as it counts all that are open.

#[path = "support/net.rs"]
mod support;

use std::io::Write;
use std::net::TcpStream;

use forebay::front::net::{Close, ListenSettings, NetSettings};
use forebay::runtime::{Flavour, start_executor};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Driver, Seen, pattern, reset};

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Three hundred connections that end in every way there is.
fn come_and_go(flavour: Flavour) {
    let settings = NetSettings { connections_max: 8, ..NetSettings::default() };
    let listen = ListenSettings { send_buffer_bytes: Some(4096), ..ListenSettings::default() };
    let Some(mut driver) = Driver::start(flavour, settings, listen) else { return };
    driver.client();
    driver.until("the first has gone", |d| d.net.connections() == 0);
    let before = open_descriptors();
    for i in 0..300 {
        let (mut client, conn) = driver.client();
        match i % 5 {
            0 => drop(client),
            1 => reset(client),
            2 => {
                driver.net.close(conn, Close::Linger);
                drop(client);
            }
            3 => {
                driver.net.send(conn, pattern(1 << 20, 0)).unwrap();
                driver.settle();
                driver.net.close(conn, Close::Now);
            }
            _ => {
                driver.net.pause_reading(conn);
                client.write_all(&[0; 10_000]).unwrap();
                driver.settle();
                driver.net.close(conn, Close::Now);
            }
        }
        driver.until("it is closed", |d| d.closed(conn).is_some());
        driver.seen.clear();
    }
    assert_eq!((driver.net.connections(), open_descriptors()), (0, before));
    // Those for whom there is no room.
    let served: Vec<TcpStream> = (0..8).map(|_| driver.client().0).collect();
    let full = open_descriptors();
    let refused: Vec<TcpStream> =
        (0..20).map(|_| TcpStream::connect(driver.address).unwrap()).collect();
    driver.until("they are refused", |d| d.net.counters().refused == 20);
    assert_eq!(open_descriptors(), full + refused.len());
    drop((served, refused));
    driver.until("all have gone", |d| d.net.connections() == 0);
    assert!(driver.seen.iter().any(|seen| matches!(seen, Seen::Closed { .. })));
}

/// Connections that come when descriptors have run out wait, cost nothing, and are taken in when
/// there are descriptors again.
fn run_dry(flavour: Flavour) {
    let settings = NetSettings::default();
    let Some(mut driver) = Driver::start(flavour, settings, ListenSettings::default()) else {
        return;
    };
    driver.net.pause_accepting();
    driver.settle();
    let waiting: Vec<TcpStream> =
        (0..3).map(|_| TcpStream::connect(driver.address).unwrap()).collect();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..limit }).unwrap();
    driver.net.resume_accepting();
    driver.until("accepting fails", |d| d.net.counters().accept_failures == 1);
    let rounds = (0..100).filter(|_| driver.round() > 0).count();
    let failures = driver.net.counters().accept_failures;
    // The retry timer may have fired meanwhile, but nothing spins.
    assert!(rounds < 10 && failures < 5, "{rounds} rounds, {failures} failures");
    setrlimit(Resource::Nofile, limit).unwrap();
    driver.until("all are taken in", |d| d.net.connections() == 3);
    drop(waiting);
    driver.until("all have gone", |d| d.net.connections() == 0);
}

#[test]
fn nets_and_executors_leave_no_descriptor_open() {
    for flavour in [Flavour::IoUring, Flavour::Epoll] {
        // The first time may open what stays open for the process.
        come_and_go(flavour);
        let before = open_descriptors();
        come_and_go(flavour);
        run_dry(flavour);
        assert_eq!(open_descriptors(), before, "{flavour:?}");
        for _ in 0..4 {
            let executor = start_executor("test", None, flavour, |local| async move {
                let own = local.clone();
                local.spawn("waits", async move { drop(own.readable(0).await) });
                local.sleep_until(local.now().plus_ms(1)).await;
            });
            if let Ok(executor) = executor {
                executor.join().unwrap();
            }
        }
        // glommio 0.9 never closes the eventfd of an executor that has run.
        let allowed = if flavour == Flavour::IoUring { 4 } else { 0 };
        assert!(open_descriptors() <= before + allowed, "{flavour:?}");
    }
}
