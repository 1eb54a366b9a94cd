//! One thread, one executor, one `Local` to use it by: the same for glommio and for epoll.
//!
//! An idle executor sleeps in the kernel: it has no timer of its own.
#![allow(unsafe_code)] // giving glommio a descriptor

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use async_executor::LocalExecutor;
use glommio::io::BufferedFile;
use glommio::{LocalExecutorBuilder, Placement};

use super::epoll_loop::{self, EpollLoop};
use super::gate::Gate;
use super::poll_ring::{self, PollRing};
use super::stall::{Pulse, TaskName};
use super::{Flavour, clock, sched};
use crate::base::Instant;
use crate::ring::Doorbell;

/// Registered buffers of a glommio executor, its minimum. They count against `RLIMIT_MEMLOCK`
/// three times over; an ordinary user has 8 MiB, so that glommio's default of 10 MiB never fits.
const IO_MEMORY_BYTES: usize = 64 << 10;
/// Entries of each of glommio's three rings. It reads one eventfd, timers and files.
const RING_DEPTH: usize = 64;
/// glommio's own preemption is switched off, by a timer that does not fire: see [`Gate`].
const PREEMPT_NEVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// An executor that runs.
pub struct ExecutorHandle<T> {
    thread: thread::JoinHandle<io::Result<T>>,
    pulse: Arc<Pulse>,
}

impl<T> ExecutorHandle<T> {
    /// Waits for the main future's output.
    ///
    /// # Errors
    /// `Other` when it panicked (the panic's message went to standard error); the kernel's when
    /// the executor could not go on.
    pub fn join(self) -> io::Result<T> {
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the executor panicked")))
    }

    /// Whether its main future is done (or panicked).
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// What a stall detector watches.
    pub fn pulse(&self) -> Arc<Pulse> {
        self.pulse.clone()
    }
}

/// Starts an executor on a thread of its own and runs what `make` makes until it is done. Tasks
/// that run still are dropped then.
///
/// The thread bears the name (its first 15 bytes), is pinned to `cpu` if one is given, and asks
/// for short scheduler slices ([`sched::request_slice`]; a refusal is harmless).
///
/// # Errors
/// Everything that keeps the executor from starting is reported here: a thread that cannot be
/// made or pinned, io_uring denied, too little memory that may be locked.
pub fn start_executor<F, Fut>(
    name: &'static str,
    cpu: Option<usize>,
    flavour: Flavour,
    make: F,
) -> io::Result<ExecutorHandle<Fut::Output>>
where
    F: FnOnce(Local) -> Fut + Send + 'static,
    Fut: Future + 'static,
    Fut::Output: Send + 'static,
{
    let pulse = Arc::new(Pulse::new(name));
    let (ready, started) = mpsc::sync_channel(1);
    let its_pulse = pulse.clone();
    let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
        let prepared = prepare(cpu).and_then(|()| match flavour {
            Flavour::IoUring => Engine::new_glommio(),
            Flavour::Epoll => Engine::new_epoll(),
        });
        match prepared {
            Ok(engine) => {
                // The starter waits for this; if it has gone it does not mind.
                let _ = ready.send(Ok(()));
                engine.run(its_pulse, make)
            }
            Err(e) => {
                let _ = ready.send(Err(e));
                Err(io::Error::other("the executor did not start"))
            }
        }
    })?;
    match started.recv() {
        Ok(Ok(())) => Ok(ExecutorHandle { thread, pulse }),
        Ok(Err(e)) => Err(e),
        Err(_) => Err(io::Error::other("the executor panicked as it started")),
    }
}

fn prepare(cpu: Option<usize>) -> io::Result<()> {
    if let Some(cpu) = cpu {
        sched::pin_to(cpu)?;
    }
    if let Err(e) = sched::request_slice(sched::EXECUTOR_SLICE_NS) {
        tracing::debug!(error = %e, "no short scheduler slice");
    }
    Ok(())
}

enum Engine {
    Glommio(Box<(glommio::LocalExecutor, PollRing)>),
    Epoll(EpollLoop),
}

impl Engine {
    fn new_glommio() -> io::Result<Engine> {
        // First, as glommio panics where rings are denied, and this says so.
        let polls = PollRing::new()?;
        let executor = LocalExecutorBuilder::new(Placement::Unbound)
            .io_memory(IO_MEMORY_BYTES)
            .ring_depth(RING_DEPTH)
            .preempt_timer(PREEMPT_NEVER)
            .make()
            .map_err(|e| io::Error::other(format!("glommio: {e}")))?;
        Ok(Engine::Glommio(Box::new((executor, polls))))
    }

    fn new_epoll() -> io::Result<Engine> {
        Ok(Engine::Epoll(EpollLoop::new()?))
    }

    fn run<F, Fut>(self, pulse: Arc<Pulse>, make: F) -> io::Result<Fut::Output>
    where
        F: FnOnce(Local) -> Fut + 'static,
        Fut: Future + 'static,
        Fut::Output: 'static,
    {
        match self {
            Engine::Glommio(engine) => {
                let (executor, polls) = *engine;
                run_glommio(&executor, polls, pulse, make)
            }
            Engine::Epoll(on) => {
                let (executor, on) = (Rc::new(LocalExecutor::new()), Rc::new(on));
                let place = Place::Epoll { executor: Rc::downgrade(&executor), on: on.clone() };
                on.run(&executor, run_main(place, pulse, make))
            }
        }
    }
}

fn run_glommio<F, Fut>(
    executor: &glommio::LocalExecutor,
    polls: PollRing,
    pulse: Arc<Pulse>,
    make: F,
) -> io::Result<Fut::Output>
where
    F: FnOnce(Local) -> Fut + 'static,
    Fut: Future + 'static,
    Fut::Output: 'static,
{
    let event = polls.event()?;
    let gate = Rc::new(Gate::new(polls.event()?));
    let polls = Rc::new(RefCell::new(polls));
    let output = executor.run(async move {
        let reaper = glommio::spawn_local(reap(event, polls.clone(), gate.clone()));
        let place = Place::Glommio { polls: polls.clone(), gate };
        let output = run_main(place, pulse, make).await;
        polls.borrow_mut().stop();
        reaper.await;
        output
    });
    Ok(output)
}

/// Wakes those who wait for descriptors or at the gate, until the poll ring is stopped.
async fn reap(event: OwnedFd, polls: Rc<RefCell<PollRing>>, gate: Rc<Gate>) {
    // SAFETY: glommio makes files from open paths or raw numbers only. The number is that of a
    // descriptor which is given away here and has no other owner; the file closes it.
    let event = unsafe { BufferedFile::from_raw_fd(event.into_raw_fd()) };
    // The eight bytes are a count of signals that nobody needs.
    while event.read_at(0, 8).await.is_ok() {
        gate.open();
        if !polls.borrow_mut().reap() {
            break;
        }
    }
    // An error would be about a descriptor that is gone all the same.
    let _ = event.close().await;
}

/// Runs the main future, then drops the tasks that it leaves behind.
async fn run_main<F, Fut>(place: Place, pulse: Arc<Pulse>, make: F) -> Fut::Output
where
    F: FnOnce(Local) -> Fut,
    Fut: Future,
{
    let tasks = Rc::new(Tasks::default());
    let local = Local { place, tasks: Rc::downgrade(&tasks), pulse };
    let mut turn = Turn::new(&local, "main");
    let mut main = pin!(make(local));
    let output = std::future::poll_fn(|context| {
        tasks.rethrow(context.waker());
        turn.take(context, |context| main.as_mut().poll(context))
    })
    .await;
    drop(tasks);
    output
}

/// What surrounds every poll of a task.
struct Turn {
    pulse: Arc<Pulse>,
    name: TaskName,
    gate: Option<Rc<Gate>>,
}

impl Turn {
    fn new(local: &Local, name: &'static str) -> Turn {
        let gate = match &local.place {
            Place::Glommio { gate, .. } => Some(gate.clone()),
            Place::Epoll { .. } => None,
        };
        Turn { pulse: local.pulse.clone(), name: TaskName::new(name), gate }
    }

    fn take<T>(
        &mut self,
        context: &mut Context<'_>,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        if self.gate.as_ref().is_some_and(|gate| gate.holds(context.waker())) {
            return Poll::Pending;
        }
        let (polled, ns) = self.pulse.watch(self.name, || poll(context));
        if let Some(gate) = &self.gate {
            gate.spend(ns);
        }
        polled
    }
}

/// The executor that a task runs on. Stays on its thread.
#[derive(Clone)]
pub struct Local {
    place: Place,
    tasks: Weak<Tasks>,
    pulse: Arc<Pulse>,
}

#[derive(Clone)]
enum Place {
    Glommio { polls: Rc<RefCell<PollRing>>, gate: Rc<Gate> },
    Epoll { executor: Weak<LocalExecutor<'static>>, on: Rc<EpollLoop> },
}

impl Local {
    /// The process's clock.
    pub fn now(&self) -> Instant {
        clock::now()
    }

    /// Which kind of executor this is.
    pub fn flavour(&self) -> Flavour {
        match self.place {
            Place::Glommio { .. } => Flavour::IoUring,
            Place::Epoll { .. } => Flavour::Epoll,
        }
    }

    /// Runs a future beside the caller; `name` is what a stall report says. It is dropped when the
    /// executor's main future is done. A panic in it ends the executor.
    pub fn spawn(&self, name: &'static str, future: impl Future<Output = ()> + 'static) {
        // After the main future's end nothing is started any more.
        let Some(tasks) = self.tasks.upgrade() else { return };
        let task = tasks.add(future, Turn::new(self, name));
        match &self.place {
            Place::Glommio { .. } => drop(glommio::spawn_local(task).detach()),
            Place::Epoll { executor, .. } => {
                if let Some(executor) = executor.upgrade() {
                    executor.spawn(task).detach();
                }
            }
        }
    }

    /// Resolves at `at`, or at once when that has passed. [`Instant::NEVER`] never comes.
    pub async fn sleep_until(&self, at: Instant) {
        match &self.place {
            Place::Epoll { on, .. } => epoll_loop::Sleep::new(on.clone(), at).await,
            Place::Glommio { .. } if at == Instant::NEVER => std::future::pending().await,
            Place::Glommio { .. } => loop {
                let left = at.duration_from(clock::now());
                if left.is_zero() {
                    return;
                }
                glommio::timer::sleep(left).await;
            },
        }
    }

    /// Resolves when the descriptor is readable, at its end, or in error; sometimes without cause.
    /// The descriptor must stay open meanwhile, else the wait may last for ever.
    ///
    /// # Errors
    /// The kernel's, e.g. EBADF.
    pub async fn readable(&self, fd: RawFd) -> io::Result<()> {
        match &self.place {
            Place::Glommio { polls, .. } => poll_ring::Readable::new(polls.clone(), fd).await,
            Place::Epoll { on, .. } => epoll_loop::Readable::new(on.clone(), fd).await,
        }
    }

    /// Resolves when the bell was rung, or at `timeout`.
    pub async fn wait(&self, bell: &Doorbell, timeout: Option<Instant>) {
        match timeout {
            Some(at) => futures_lite::future::or(bell.rung(), self.sleep_until(at)).await,
            None => bell.rung().await,
        }
    }

    /// As [`Local::wait`], or when the descriptor is readable.
    ///
    /// # Errors
    /// The kernel's, about the descriptor.
    pub async fn wait_or_readable(
        &self,
        bell: &Doorbell,
        timeout: Option<Instant>,
        fd: RawFd,
    ) -> io::Result<()> {
        let waited = async {
            self.wait(bell, timeout).await;
            Ok(())
        };
        futures_lite::future::or(waited, self.readable(fd)).await
    }

    /// Lets the other tasks run.
    pub async fn yield_now(&self) {
        futures_lite::future::yield_now().await;
    }
}

type Body = Rc<RefCell<Option<Pin<Box<dyn Future<Output = ()>>>>>>;

/// The bodies of all tasks that run, so that they can be dropped with the main future: neither
/// executor does that in time (their resources are to be gone when `join` returns).
#[derive(Default)]
struct Tasks {
    bodies: RefCell<Vec<Option<Body>>>,
    free: RefCell<Vec<usize>>,
    /// What the first task that panicked said: for the main future to go on with. (glommio and
    /// async-executor alike would keep it to themselves.)
    panic: RefCell<Option<Box<dyn Any + Send>>>,
    main: RefCell<Option<Waker>>,
}

impl Tasks {
    fn add(self: &Rc<Tasks>, future: impl Future<Output = ()> + 'static, turn: Turn) -> Task {
        let body: Body = Rc::new(RefCell::new(Some(Box::pin(future))));
        let mut bodies = self.bodies.borrow_mut();
        let at = self.free.borrow_mut().pop().unwrap_or(bodies.len());
        if at == bodies.len() {
            bodies.push(None);
        }
        bodies[at] = Some(body.clone());
        Task { body, turn, of: Rc::downgrade(self), at }
    }

    /// Panics if a task did; else notes whom to wake when one does.
    fn rethrow(&self, main: &Waker) {
        let panic = self.panic.borrow_mut().take();
        if let Some(panic) = panic {
            self.drop_all();
            resume_unwind(panic);
        }
        let mut known = self.main.borrow_mut();
        if !known.as_ref().is_some_and(|waker| waker.will_wake(main)) {
            *known = Some(main.clone());
        }
    }

    fn panicked(&self, panic: Box<dyn Any + Send>) {
        self.panic.borrow_mut().get_or_insert(panic);
        if let Some(main) = &*self.main.borrow() {
            main.wake_by_ref();
        }
    }

    fn finished(&self, at: usize) {
        if let Some(place) = self.bodies.borrow_mut().get_mut(at) {
            *place = None;
            self.free.borrow_mut().push(at);
        }
    }

    fn drop_all(&self) {
        // Taken out first: a body's destructor may come back here, to spawn or to wake.
        let bodies = std::mem::take(&mut *self.bodies.borrow_mut());
        for body in bodies.into_iter().flatten() {
            let future = body.borrow_mut().take();
            drop(future);
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.drop_all();
    }
}

/// What the executor polls of a task: its body, as long as there is one.
struct Task {
    body: Body,
    turn: Turn,
    of: Weak<Tasks>,
    at: usize,
}

impl Future for Task {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let task = self.get_mut();
        let mut body = task.body.borrow_mut();
        let Some(future) = body.as_mut() else { return Poll::Ready(()) };
        // What a panic leaves half done is dropped, not looked at again.
        let polled = catch_unwind(AssertUnwindSafe(|| {
            task.turn.take(context, |context| future.as_mut().poll(context))
        }));
        if matches!(polled, Ok(Poll::Pending)) {
            return Poll::Pending;
        }
        *body = None;
        if let Some(tasks) = task.of.upgrade() {
            tasks.finished(task.at);
            if let Err(panic) = polled {
                tasks.panicked(panic);
            }
        }
        Poll::Ready(())
    }
}
