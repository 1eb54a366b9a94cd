//! The executors' contract, the same for glommio and epoll.

#[path = "support/net.rs"]
mod support;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Poll, Waker};
use std::thread;
use std::time::Duration;

use forebay::base::Instant;
use forebay::front::net::{ListenSettings, Net, NetEvent, NetSettings};
use forebay::runtime::{ExecutorHandle, Flavour, Local, start_executor};

/// Starts an executor, or says that the machine denies io_uring.
fn start<F, Fut>(flavour: Flavour, make: F) -> Option<ExecutorHandle<Fut::Output>>
where
    F: FnOnce(Local) -> Fut + Send + 'static,
    Fut: Future + 'static,
    Fut::Output: Send + 'static,
{
    support::has(flavour).then(|| start_executor("test", None, flavour, make).unwrap())
}

/// A flag that threads set and a task awaits.
#[derive(Default)]
struct Flag {
    set: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Flag {
    fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
        if let Some(waker) = self.waker.lock().unwrap().take() {
            waker.wake();
        }
    }

    async fn wait(&self) {
        poll_fn(|context| {
            *self.waker.lock().unwrap() = Some(context.waker().clone());
            if self.set.swap(false, Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

fn timers_fire_in_the_order_of_their_deadlines_and_never_early(flavour: Flavour) {
    let executor = start(flavour, |local| async move {
        let fired = Rc::new(RefCell::new(Vec::new()));
        let start = local.now();
        for ms in [30, 10, 20, 40, 15] {
            let (fired, own) = (fired.clone(), local.clone());
            local.spawn("timer", async move {
                own.sleep_until(start.plus_ms(ms)).await;
                assert!(own.now() >= start.plus_ms(ms));
                fired.borrow_mut().push(ms);
            });
        }
        local.sleep_until(start.plus_ms(60)).await;
        local.sleep_until(start).await;
        fired.take()
    });
    let Some(executor) = executor else { return };
    assert_eq!(executor.join().unwrap(), [10, 15, 20, 30, 40]);
}

fn a_timer_that_was_dropped_or_never_comes_holds_nobody_up(flavour: Flavour) {
    let executor = start(flavour, |local| async move {
        let soon = local.now().plus_ms(5);
        let far = local.sleep_until(soon.plus_ms(3_600_000));
        let never = local.sleep_until(Instant::NEVER);
        let first = futures_lite::future::or(
            async {
                futures_lite::future::or(far, never).await;
                "late"
            },
            async {
                local.sleep_until(soon).await;
                "soon"
            },
        );
        first.await
    });
    let Some(executor) = executor else { return };
    assert_eq!(executor.join().unwrap(), "soon");
}

fn a_sleeping_executor_is_woken_from_another_thread(flavour: Flavour) {
    let (ping, pong) = (Arc::new(Flag::default()), Arc::new(AtomicU32::new(0)));
    let (its_ping, its_pong) = (ping.clone(), pong.clone());
    let executor = start(flavour, |_| async move {
        for _ in 0..2000 {
            its_ping.wait().await;
            its_pong.fetch_add(1, Ordering::SeqCst);
        }
    });
    let Some(executor) = executor else { return };
    for round in 0..2000 {
        ping.set();
        while pong.load(Ordering::SeqCst) == round {
            thread::yield_now();
        }
    }
    executor.join().unwrap();
}

fn a_task_waits_for_a_descriptor_and_for_its_end(flavour: Flavour) {
    let (reader, mut writer) = UnixStream::pair().unwrap();
    let (ready, started) = mpsc::channel();
    let executor = start(flavour, |local| async move {
        reader.set_nonblocking(true).unwrap();
        let mut all = Vec::new();
        ready.send(()).unwrap();
        loop {
            local.readable(reader.as_raw_fd()).await.unwrap();
            let mut piece = [0; 4];
            match (&reader).read(&mut piece) {
                Ok(0) => return all,
                Ok(n) => all.extend_from_slice(&piece[..n]),
                Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    });
    let Some(executor) = executor else { return };
    started.recv().unwrap();
    for word in ["to ", "be ", "or not to be"] {
        writer.write_all(word.as_bytes()).unwrap();
    }
    drop(writer);
    assert_eq!(executor.join().unwrap(), b"to be or not to be");
}

fn waits_for_descriptors_can_be_given_up_and_shared(flavour: Flavour) {
    let executor = start(flavour, |local| async move {
        let (reader, mut writer) = UnixStream::pair().unwrap();
        let fd = reader.as_raw_fd();
        for _ in 0..200 {
            let given_up = futures_lite::future::or(
                async {
                    local.readable(fd).await.unwrap();
                    false
                },
                async {
                    local.yield_now().await;
                    true
                },
            );
            assert!(given_up.await);
        }
        let woken = Rc::new(Cell::new(0));
        for _ in 0..3 {
            let (woken, own) = (woken.clone(), local.clone());
            local.spawn("reader", async move {
                own.readable(fd).await.unwrap();
                woken.set(woken.get() + 1);
            });
        }
        local.yield_now().await;
        writer.write_all(b"!").unwrap();
        while woken.get() < 3 {
            local.sleep_until(local.now().plus_ns(100_000)).await;
        }
        local.readable(-1).await.is_err()
    });
    let Some(executor) = executor else { return };
    assert!(executor.join().unwrap(), "a descriptor that is not one is an error");
}

fn tasks_that_are_always_ready_starve_neither_timers_nor_descriptors(flavour: Flavour) {
    let executor = start(flavour, |local| async move {
        let own = local.clone();
        local.spawn("yields", async move {
            loop {
                own.yield_now().await;
            }
        });
        // Two that wake each other, as an engine and an instant device would.
        let bells = [Rc::new(Flag::default()), Rc::new(Flag::default())];
        for (mine, other) in [(0, 1), (1, 0)] {
            let (mine, other) = (bells[mine].clone(), bells[other].clone());
            local.spawn("rings", async move {
                loop {
                    other.set();
                    mine.wait().await;
                }
            });
        }
        let (reader, mut writer) = UnixStream::pair().unwrap();
        for _ in 0..5 {
            local.sleep_until(local.now().plus_ms(1)).await;
            writer.write_all(b"!").unwrap();
            local.readable(reader.as_raw_fd()).await.unwrap();
        }
    });
    let Some(executor) = executor else { return };
    executor.join().unwrap();
}

fn what_tasks_hold_is_dropped_before_the_executor_is_joined(flavour: Flavour) {
    struct Held(Arc<AtomicU32>);
    impl Drop for Held {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let dropped = Arc::new(AtomicU32::new(0));
    let its_dropped = dropped.clone();
    let executor = start(flavour, |local| async move {
        for i in 0..4 {
            let (held, own) = (Held(its_dropped.clone()), local.clone());
            local.spawn("holder", async move {
                let _held = held;
                match i {
                    0 => std::future::pending().await,
                    1 => own.sleep_until(Instant::NEVER).await,
                    2 => own.sleep_until(own.now().plus_ms(3_600_000)).await,
                    _ => {}
                }
            });
        }
        local.yield_now().await;
    });
    let Some(executor) = executor else { return };
    executor.join().unwrap();
    assert_eq!(dropped.load(Ordering::SeqCst), 4);
}

fn a_panic_in_a_task_ends_its_executor(flavour: Flavour) {
    let executor = start(flavour, |local| async move {
        local.spawn("faulty", async { panic!("on purpose") });
        std::future::pending::<()>().await;
    });
    let Some(executor) = executor else { return };
    assert_eq!(executor.join().unwrap_err().to_string(), "the executor panicked");
}

fn an_executor_stays_on_its_cpu_under_its_name(flavour: Flavour) {
    if !support::has(flavour) {
        return;
    }
    let cpu = forebay::runtime::probe().cpus.allowed[0];
    let executor = start_executor("front-0", Some(cpu), flavour, |_| async {
        let set = rustix::thread::sched_getaffinity(None).unwrap();
        (set.count(), set.is_set(0), thread::current().name().unwrap().to_owned())
    });
    let (count, on_first, name) = executor.unwrap().join().unwrap();
    assert_eq!((count, on_first, name.as_str()), (1, cpu == 0, "front-0"));
}

fn what_keeps_an_executor_from_starting_is_reported_at_once(flavour: Flavour) {
    let started = start_executor("nowhere", Some(1023), flavour, |_| async {});
    assert_eq!(started.err().unwrap().kind(), std::io::ErrorKind::InvalidInput);
}

fn a_server_of_tasks_sleeps_between_requests_and_answers_them(flavour: Flavour) {
    let (address, bound) = mpsc::channel();
    let stop = Arc::new(Flag::default());
    let its_stop = stop.clone();
    let executor = start(flavour, move |local| async move {
        let mut net = Net::new(flavour, NetSettings::default()).unwrap();
        let any_port = ([127, 0, 0, 1], 0).into();
        let (_, at) = net.listen(any_port, &ListenSettings::default()).unwrap();
        address.send(at).unwrap();
        loop {
            let mut echoes = Vec::new();
            let handled = net.poll(&mut |event| {
                if let NetEvent::Received { conn, bytes } = event {
                    echoes.push((conn, bytes.to_vec()));
                }
            });
            for (conn, bytes) in echoes {
                net.send(conn, bytes).unwrap();
            }
            net.submit().unwrap();
            let woken = async {
                local.readable(net.wake_fd()).await.unwrap();
                true
            };
            let stopped = async {
                its_stop.wait().await;
                false
            };
            if handled == 0 && !futures_lite::future::or(woken, stopped).await {
                return net.counters().received_bytes;
            }
        }
    });
    let Some(executor) = executor else { return };
    let address = bound.recv().unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(support::PATIENCE)).unwrap();
    client.set_nodelay(true).unwrap();
    for i in 0..1000u32 {
        client.write_all(&i.to_le_bytes()).unwrap();
        let mut answer = [0; 4];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(u32::from_le_bytes(answer), i);
    }
    stop.set();
    assert_eq!(executor.join().unwrap(), 4000);
}

#[test]
fn a_stalled_task_is_reported_by_name() {
    use forebay::runtime::stall::StallWatch;
    let (release, held) = mpsc::channel::<()>();
    let executor = start(Flavour::Epoll, |local| async move {
        local.spawn("hog", async move { held.recv().unwrap() });
        local.yield_now().await;
        local.yield_now().await;
    })
    .unwrap();
    let (sender, reports) = mpsc::channel();
    let watch = StallWatch::start(vec![executor.pulse()], Duration::from_millis(1), move |stall| {
        sender.send(stall.clone()).unwrap()
    });
    let stall = reports.recv().unwrap();
    assert_eq!((stall.executor, stall.task), ("test", "hog"));
    release.send(()).unwrap();
    executor.join().unwrap();
    drop(watch.unwrap());
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
    timers_fire_in_the_order_of_their_deadlines_and_never_early,
    a_timer_that_was_dropped_or_never_comes_holds_nobody_up,
    a_sleeping_executor_is_woken_from_another_thread,
    a_task_waits_for_a_descriptor_and_for_its_end,
    waits_for_descriptors_can_be_given_up_and_shared,
    tasks_that_are_always_ready_starve_neither_timers_nor_descriptors,
    what_tasks_hold_is_dropped_before_the_executor_is_joined,
    a_panic_in_a_task_ends_its_executor,
    an_executor_stays_on_its_cpu_under_its_name,
    what_keeps_an_executor_from_starting_is_reported_at_once,
    a_server_of_tasks_sleeps_between_requests_and_answers_them,
);
