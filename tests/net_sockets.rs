//! The contract of `front::net` over real loopback sockets, the same for io_uring and epoll.

#[path = "support/net.rs"]
mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use forebay::front::net::{Arrivals, Close, CloseReason, ConnId, ListenSettings, NetSettings};
use forebay::runtime::Flavour;
use support::{Driver, PATIENCE, Seen, echo_until, pattern, reset, try_net};

/// Kernel buffers so small that they fill in no time.
fn small_buffers() -> ListenSettings {
    ListenSettings {
        send_buffer_bytes: Some(4096),
        receive_buffer_bytes: Some(4096),
        not_sent_lowat_bytes: Some(1024),
        ..ListenSettings::default()
    }
}

fn plain(flavour: Flavour) -> Option<Driver> {
    Driver::start(flavour, NetSettings::default(), ListenSettings::default())
}

fn small(flavour: Flavour) -> Option<Driver> {
    Driver::start(flavour, NetSettings::default(), small_buffers())
}

/// Writes without ever blocking until the kernel takes no more; returns how much it took.
fn fill(client: &mut TcpStream) -> usize {
    client.set_nonblocking(true).unwrap();
    let piece = pattern(4096, 0);
    let mut written = 0;
    loop {
        match client.write(&piece[..251 * 16]) {
            Ok(n) => written += n,
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                client.set_nonblocking(false).unwrap();
                return written;
            }
        }
    }
}

fn an_echo_comes_back_whole_however_it_is_cut(flavour: Flavour) {
    let settings = NetSettings { receive_piece_bytes: 300, ..NetSettings::default() };
    let Some(mut driver) = Driver::start(flavour, settings, small_buffers()) else { return };
    let (mut client, conn) = driver.client();
    let message = pattern(300_000, 7);
    let expected = message.clone();
    let mut writer = client.try_clone().unwrap();
    let write = thread::spawn(move || {
        let mut at = 0;
        while at < message.len() {
            let end = message.len().min(at + 1 + at % 1499);
            writer.write_all(&message[at..end]).unwrap();
            at = end;
        }
    });
    let read = thread::spawn(move || {
        let mut echoed = vec![0; expected.len()];
        client.read_exact(&mut echoed).unwrap();
        assert!(echoed == expected);
        client
    });
    echo_until(&mut driver, |d| d.net.counters().sent_bytes == 300_000);
    write.join().unwrap();
    drop(read.join().unwrap());
    driver.until("the connection is closed", |d| d.closed(conn).is_some());
    assert_eq!(driver.closed(conn), Some(CloseReason::PeerClosed));
    assert_eq!(driver.net.connections(), 0);
    assert_eq!(driver.net.counters().received_bytes, 300_000);
}

fn two_hundred_connections_are_served_at_once(flavour: Flavour) {
    let Some(mut driver) = plain(flavour) else { return };
    let address = driver.address;
    let clients = thread::spawn(move || {
        let mut clients: Vec<TcpStream> =
            (0..200).map(|_| TcpStream::connect(address).unwrap()).collect();
        for round in 0..3 {
            for (i, client) in clients.iter_mut().enumerate() {
                client.write_all(&pattern(1000 + i, i + round)).unwrap();
            }
            for (i, client) in clients.iter_mut().enumerate() {
                let mut echoed = vec![0; 1000 + i];
                client.set_read_timeout(Some(PATIENCE)).unwrap();
                client.read_exact(&mut echoed).unwrap();
                assert_eq!(echoed, pattern(1000 + i, i + round));
            }
        }
    });
    let all_closed =
        |d: &Driver| d.seen.iter().filter(|s| matches!(s, Seen::Closed { .. })).count() == 200;
    echo_until(&mut driver, all_closed);
    clients.join().unwrap();
    assert_eq!((driver.net.connections(), driver.net.counters().accepted), (0, 200));
}

fn a_reset_in_the_middle_of_a_send_gives_the_buffer_back(flavour: Flavour) {
    let Some(mut driver) = small(flavour) else { return };
    let (client, conn) = driver.client();
    driver.net.send(conn, pattern(1 << 20, 0)).unwrap();
    driver.settle();
    assert_eq!(driver.sent(conn), None);
    reset(client);
    driver.until("the connection is closed", |d| d.closed(conn).is_some());
    assert_eq!(driver.closed(conn), Some(CloseReason::PeerReset));
    let [.., Seen::Sent { buffer, taken, .. }, Seen::Closed { .. }] = &driver.seen[..] else {
        panic!("the send is answered before the end: {:?}", driver.seen.len())
    };
    assert!(*taken < buffer.len() && buffer.len() == 1 << 20);
    assert!(driver.net.send(conn, vec![1]).is_err());
}

fn a_peer_that_does_not_read_holds_one_send_and_nothing_else(flavour: Flavour) {
    let Some(mut driver) = small(flavour) else { return };
    let (mut stalled, conn) = driver.client();
    let message = pattern(4 << 20, 3);
    let memory = driver.net.memory_bytes();
    driver.net.send(conn, message.clone()).unwrap();
    driver.settle();
    assert!(!driver.net.can_send(conn));
    assert_eq!(driver.net.send(conn, vec![1, 2, 3]), Err(vec![1, 2, 3]));
    let taken = driver.net.taken(conn);
    assert!(taken > 0 && taken < message.len(), "{taken} bytes fit the kernel's buffers");
    assert!(driver.net.unacknowledged_bytes(conn).unwrap() as usize <= taken);
    // Others go on.
    let (mut other, _) = driver.client();
    other.write_all(b"hello").unwrap();
    let echoed = |d: &Driver| d.net.counters().sent_bytes > taken as u64 + 4;
    echo_until(&mut driver, |d| echoed(d));
    let mut answer = [0; 5];
    other.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    assert_eq!(driver.net.memory_bytes(), memory);
    // When it reads again it gets every byte.
    let reader = thread::spawn(move || {
        let mut all = vec![0; 4 << 20];
        stalled.read_exact(&mut all).unwrap();
        all
    });
    driver.until("all is sent", |d| d.sent(conn).is_some());
    assert_eq!(driver.sent(conn), Some(message.len()));
    assert!(reader.join().unwrap() == message);
}

fn a_paused_connection_holds_at_most_a_piece_and_loses_nothing(flavour: Flavour) {
    let settings = NetSettings { receive_piece_bytes: 512, ..NetSettings::default() };
    let Some(mut driver) = Driver::start(flavour, settings, small_buffers()) else { return };
    let (mut fast, conn) = driver.client();
    driver.net.pause_reading(conn);
    driver.settle();
    let mut written = fill(&mut fast);
    driver.settle();
    assert_eq!(driver.received(conn), [0u8; 0]);
    // A piece may have been in flight when reading was paused; no more than that was taken.
    written += fill(&mut fast);
    driver.settle();
    assert_eq!(driver.received(conn), [0u8; 0]);
    // Nobody else is held up.
    for _ in 0..10 {
        let (mut other, its_conn) = driver.client();
        other.write_all(&[5; 3000]).unwrap();
        driver.until("the other is read", |d| d.received(its_conn).len() == 3000);
    }
    driver.net.resume_reading(conn);
    driver.until("all is read", |d| d.received(conn).len() >= written);
    assert!(driver.received(conn).len() == written);
    let whole = pattern(251 * 16, 0).repeat(written / (251 * 16) + 2);
    let pieces_are_small = driver.seen.iter().all(|seen| match seen {
        Seen::Received { bytes, .. } => bytes.len() <= 512,
        _ => true,
    });
    assert!(pieces_are_small);
    // Each fill starts the pattern anew, and each of its writes may have been cut.
    assert_eq!(driver.received(conn)[..251], whole[..251]);
}

fn reading_can_be_paused_and_resumed_between_any_two_rounds(flavour: Flavour) {
    let settings = NetSettings { receive_piece_bytes: 64, ..NetSettings::default() };
    let Some(mut driver) = Driver::start(flavour, settings, ListenSettings::default()) else {
        return;
    };
    let (mut client, conn) = driver.client();
    let message = pattern(20_000, 1);
    client.write_all(&message).unwrap();
    for round in 0.. {
        match round % 5 {
            0 => driver.net.pause_reading(conn),
            2 => {
                driver.net.resume_reading(conn);
                driver.net.pause_reading(conn);
            }
            3 => driver.net.resume_reading(conn),
            _ => {}
        }
        let before = driver.received(conn).len();
        driver.round();
        if round % 5 < 3 {
            assert_eq!(driver.received(conn).len(), before, "paused");
        }
        if driver.received(conn).len() == message.len() {
            break;
        }
        assert!(round < 100_000);
    }
    assert!(driver.received(conn) == message);
}

fn closing_at_once_throws_the_rest_away(flavour: Flavour) {
    let Some(mut driver) = small(flavour) else { return };
    let (mut client, conn) = driver.client();
    driver.net.send(conn, pattern(1 << 20, 0)).unwrap();
    driver.settle();
    driver.net.close(conn, Close::Now);
    assert!(driver.net.send(conn, vec![1]).is_err());
    driver.net.close(conn, Close::Now);
    driver.until("the connection is closed", |d| d.closed(conn).is_some());
    assert_eq!(driver.closed(conn), Some(CloseReason::Ours));
    assert!(driver.sent(conn).unwrap() < 1 << 20);
    let mut all = Vec::new();
    let end = client.read_to_end(&mut all);
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

fn lingering_delivers_the_last_words_over_unread_input(flavour: Flavour) {
    let Some(mut driver) = small(flavour) else { return };
    let (mut client, conn) = driver.client();
    driver.net.pause_reading(conn);
    driver.settle();
    fill(&mut client);
    let words = pattern(100_000, 9);
    driver.net.send(conn, words.clone()).unwrap();
    driver.net.close(conn, Close::Linger);
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all
    });
    driver.until("the connection is closed", |d| d.closed(conn).is_some());
    assert!(reader.join().unwrap() == words);
    assert_eq!(driver.closed(conn), Some(CloseReason::Ours));
    assert_eq!(driver.sent(conn), Some(words.len()));
    assert_eq!(driver.received(conn), [0u8; 0], "input after close is discarded");
}

fn lingering_ends_by_itself_when_the_peer_does_nothing(flavour: Flavour) {
    let settings = NetSettings { linger_ms: 1, ..NetSettings::default() };
    let Some(mut driver) = Driver::start(flavour, settings, small_buffers()) else { return };
    let (_silent, first) = driver.client();
    let (_deaf, second) = driver.client();
    driver.net.close(first, Close::Linger);
    driver.net.send(second, pattern(1 << 20, 0)).unwrap();
    driver.net.close(second, Close::Linger);
    driver.until("both are closed", |d| d.closed(first).is_some() && d.closed(second).is_some());
    assert_eq!(driver.closed(first), Some(CloseReason::LingerExpired));
    assert_eq!(driver.closed(second), Some(CloseReason::LingerExpired));
    assert!(driver.sent(second).unwrap() < 1 << 20);
}

fn lingering_ends_with_the_last_send_when_the_peer_has_ended_first(flavour: Flavour) {
    let Some(mut driver) = small(flavour) else { return };
    let (mut client, conn) = driver.client();
    let words = pattern(1 << 20, 2);
    driver.net.send(conn, words.clone()).unwrap();
    driver.net.close(conn, Close::Linger);
    driver.settle();
    client.shutdown(Shutdown::Write).unwrap();
    driver.settle();
    assert_eq!(driver.closed(conn), None);
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all
    });
    driver.until("the connection is closed", |d| d.closed(conn).is_some());
    assert!(reader.join().unwrap() == words);
    assert_eq!(driver.closed(conn), Some(CloseReason::Ours));
}

fn the_end_of_input_closes_after_all_of_it_was_handed_over(flavour: Flavour) {
    let settings = NetSettings { receive_piece_bytes: 100, ..NetSettings::default() };
    let Some(mut driver) = Driver::start(flavour, settings, ListenSettings::default()) else {
        return;
    };
    let (mut client, conn) = driver.client();
    client.write_all(&pattern(5000, 0)).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    driver.until("the connection is closed", |d| d.closed(conn).is_some());
    assert_eq!(driver.closed(conn), Some(CloseReason::PeerClosed));
    assert_eq!(driver.received(conn), pattern(5000, 0));
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

fn a_paused_connection_is_closed_when_its_peer_goes(flavour: Flavour) {
    let Some(mut driver) = plain(flavour) else { return };
    let (mut closes, first) = driver.client();
    let (mut resets, second) = driver.client();
    for (client, conn) in [(&mut closes, first), (&mut resets, second)] {
        driver.net.pause_reading(conn);
        client.write_all(&[1; 10_000]).unwrap();
    }
    driver.settle();
    drop(closes);
    reset(resets);
    driver.until("both are closed", |d| d.closed(first).is_some() && d.closed(second).is_some());
    assert_eq!(driver.closed(first), Some(CloseReason::PeerClosed));
    assert_eq!(driver.closed(second), Some(CloseReason::PeerReset));
    assert_eq!((driver.received(first).len(), driver.received(second).len()), (0, 0));
}

fn beyond_the_limit_a_connection_is_closed_at_once(flavour: Flavour) {
    let settings = NetSettings { connections_max: 2, ..NetSettings::default() };
    let Some(mut driver) = Driver::start(flavour, settings, ListenSettings::default()) else {
        return;
    };
    let (first, conn) = driver.client();
    let (_second, _) = driver.client();
    let mut third = TcpStream::connect(driver.address).unwrap();
    third.set_read_timeout(Some(PATIENCE)).unwrap();
    driver.until("the third is refused", |d| d.net.counters().refused == 1);
    assert_eq!(third.read(&mut [0]).unwrap(), 0);
    assert_eq!(driver.net.connections(), 2);
    drop(first);
    driver.until("the first is closed", |d| d.closed(conn).is_some());
    let (_fourth, its_conn) = driver.client();
    assert_eq!(its_conn.slot, conn.slot, "the place is used again");
    assert_ne!(its_conn, conn);
    assert!(!driver.net.can_send(conn) && driver.net.can_send(its_conn));
}

fn a_pause_in_accepting_leaves_connections_in_the_queue(flavour: Flavour) {
    let Some(mut driver) = plain(flavour) else { return };
    let (_first, _) = driver.client();
    driver.net.pause_accepting();
    driver.settle();
    let waiting = TcpStream::connect(driver.address).unwrap();
    driver.settle();
    assert_eq!(driver.net.connections(), 1);
    driver.net.resume_accepting();
    let own = waiting.local_addr().unwrap();
    driver.until("it is accepted", |d| d.accepted(own).is_some());
    // Changing one's mind within a tick changes nothing.
    driver.net.pause_accepting();
    driver.net.resume_accepting();
    driver.client();
}

fn after_listening_stops_connections_are_refused_and_the_open_ones_go_on(flavour: Flavour) {
    let Some(mut driver) = plain(flavour) else { return };
    let (mut client, conn) = driver.client();
    driver.net.stop_listening();
    driver.settle();
    let late = TcpStream::connect(driver.address);
    assert_eq!(late.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    client.write_all(b"still here").unwrap();
    driver.until("it is read", |d| d.received(conn) == b"still here");
    driver.net.send(conn, b"and so am I".to_vec()).unwrap();
    driver.until("it is sent", |d| d.sent(conn) == Some(11));
    let mut answer = [0; 11];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"and so am I");
}

fn a_connection_can_be_handed_to_another_net(flavour: Flavour) {
    let settings = NetSettings { arrivals: Arrivals::HandOut, ..NetSettings::default() };
    let Some(mut door) = Driver::start(flavour, settings, ListenSettings::default()) else {
        return;
    };
    let one = NetSettings { connections_max: 1, ..NetSettings::default() };
    for other in [flavour, Flavour::Epoll] {
        let Some(net) = try_net(other, one.clone()) else { return };
        let mut home = Driver { net, address: door.address, seen: Vec::new() };
        let mut client = TcpStream::connect(door.address).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"early bird").unwrap();
        door.until("somebody arrives", |d| !d.seen.is_empty());
        let Some(Seen::Arrived { socket }) = door.seen.pop() else { panic!("nobody's yet") };
        let conn = home.net.adopt(socket).unwrap();
        home.net.submit().unwrap();
        echo_until(&mut home, |d| d.net.counters().sent_bytes == 10);
        let mut echoed = [0; 10];
        client.read_exact(&mut echoed).unwrap();
        assert_eq!(&echoed, b"early bird");
        // No room for another: it comes back.
        let _second = TcpStream::connect(door.address).unwrap();
        door.until("a second arrives", |d| !d.seen.is_empty());
        let Some(Seen::Arrived { socket }) = door.seen.pop() else { panic!("nobody's yet") };
        assert!(home.net.adopt(socket).is_err());
        drop(client);
        home.until("it is closed", |d| d.closed(conn).is_some());
    }
}

fn a_net_dropped_in_full_flight_lets_go_of_everything(flavour: Flavour) {
    let Some(mut driver) = small(flavour) else { return };
    let mut clients = Vec::new();
    for i in 0..20 {
        let (mut client, conn) = driver.client();
        match i % 4 {
            0 => driver.net.send(conn, pattern(1 << 20, i)).unwrap(),
            1 => driver.net.pause_reading(conn),
            2 => driver.net.close(conn, Close::Linger),
            _ => client.write_all(&[1; 5000]).unwrap(),
        }
        clients.push(client);
    }
    driver.round();
    driver.net.send(ConnId { slot: 3, generation: 0 }, vec![7; 100]).unwrap();
    let address = driver.address;
    drop(driver);
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    for mut client in clients {
        let mut all = Vec::new();
        // End of file or reset, but an end.
        if let Err(e) = client.read_to_end(&mut all) {
            assert_eq!(e.kind(), ErrorKind::ConnectionReset);
        }
    }
}

fn the_wake_descriptor_is_quiet_when_there_is_nothing_to_do(flavour: Flavour) {
    let Some(mut driver) = plain(flavour) else { return };
    let (mut client, conn) = driver.client();
    for _ in 0..50 {
        driver.settle();
        assert!(!driver.wait(Duration::ZERO), "idle, and woken all the same");
        client.write_all(b"x").unwrap();
        assert!(driver.wait(PATIENCE));
        driver.settle();
        driver.net.send(conn, b"y".to_vec()).unwrap();
        driver.net.submit().unwrap();
        assert!(driver.wait(PATIENCE), "the send's answer wakes");
        driver.settle();
        driver.net.pause_reading(conn);
        driver.net.submit().unwrap();
        client.write_all(b"z").unwrap();
        driver.settle();
        driver.net.resume_reading(conn);
        driver.net.submit().unwrap();
        assert!(driver.wait(PATIENCE), "held input wakes");
    }
    driver.settle();
    assert_eq!(driver.received(conn), b"xz".repeat(50));
}

fn what_cannot_be_sent_is_given_back(flavour: Flavour) {
    let Some(mut driver) = plain(flavour) else { return };
    let (_client, conn) = driver.client();
    assert_eq!(driver.net.send(conn, Vec::new()), Err(Vec::new()));
    let nobody = ConnId { slot: 77, generation: 0 };
    assert_eq!(driver.net.send(nobody, vec![1]), Err(vec![1]));
    driver.net.close(nobody, Close::Now);
    driver.net.pause_reading(nobody);
    driver.net.resume_reading(nobody);
    assert_eq!(driver.net.unacknowledged_bytes(nobody), None);
    driver.settle();
    assert_eq!(driver.net.connections(), 1);
}

fn addresses_in_use_and_bounds_out_of_range_are_errors(flavour: Flavour) {
    let Some(mut driver) = plain(flavour) else { return };
    let again = driver.net.listen(driver.address, &ListenSettings::default());
    assert_eq!(again.unwrap_err().kind(), ErrorKind::AddrInUse);
    for settings in [
        NetSettings { connections_max: 0, ..NetSettings::default() },
        NetSettings { connections_max: 65_537, ..NetSettings::default() },
        NetSettings { receive_piece_bytes: 63, ..NetSettings::default() },
        NetSettings { events_per_poll_max: 0, ..NetSettings::default() },
    ] {
        let made = forebay::front::net::Net::new(flavour, settings);
        assert_eq!(made.err().unwrap().kind(), ErrorKind::InvalidInput);
    }
    let v6 = SocketAddr::from(([0u16, 0, 0, 0, 0, 0, 0, 1], 0));
    match driver.net.listen(v6, &ListenSettings::default()) {
        Ok((id, address)) => {
            assert_eq!(id, 1);
            driver.net.submit().unwrap();
            driver.address = address;
            driver.client();
        }
        // A machine without IPv6.
        Err(e) => assert!(
            matches!(e.kind(), ErrorKind::AddrNotAvailable | ErrorKind::Unsupported)
                || e.raw_os_error() == Some(libc::EAFNOSUPPORT)
        ),
    }
}

macro_rules! for_both_flavours {
    ($($name:ident),* $(,)?) => {
        mod uring {
            $(#[test] fn $name() { super::$name(forebay::runtime::Flavour::IoUring) })*
        }
        mod epoll {
            $(#[test] fn $name() { super::$name(forebay::runtime::Flavour::Epoll) })*
        }
    };
}

for_both_flavours!(
    an_echo_comes_back_whole_however_it_is_cut,
    two_hundred_connections_are_served_at_once,
    a_reset_in_the_middle_of_a_send_gives_the_buffer_back,
    a_peer_that_does_not_read_holds_one_send_and_nothing_else,
    a_paused_connection_holds_at_most_a_piece_and_loses_nothing,
    reading_can_be_paused_and_resumed_between_any_two_rounds,
    closing_at_once_throws_the_rest_away,
    lingering_delivers_the_last_words_over_unread_input,
    lingering_ends_by_itself_when_the_peer_does_nothing,
    lingering_ends_with_the_last_send_when_the_peer_has_ended_first,
    the_end_of_input_closes_after_all_of_it_was_handed_over,
    a_paused_connection_is_closed_when_its_peer_goes,
    beyond_the_limit_a_connection_is_closed_at_once,
    a_pause_in_accepting_leaves_connections_in_the_queue,
    after_listening_stops_connections_are_refused_and_the_open_ones_go_on,
    a_connection_can_be_handed_to_another_net,
    a_net_dropped_in_full_flight_lets_go_of_everything,
    the_wake_descriptor_is_quiet_when_there_is_nothing_to_do,
    what_cannot_be_sent_is_given_back,
    addresses_in_use_and_bounds_out_of_range_are_errors,
);
