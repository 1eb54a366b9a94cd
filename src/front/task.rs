//! A front core's shell: carries what happens on the sockets to [`FrontCore`], and what that
//! decides back to them.

use std::io;
use std::sync::Arc;

use crate::base::{Board, Instant};
use crate::front::net::{Close, Net, NetEvent};
use crate::front::{Action, CloseHow, FrontCore};
use crate::ring::Doorbell;
use crate::runtime::{Lifecycle, Local};

/// Runs until the server has drained, or its time for that is over. Shows where it stands on
/// `board`.
///
/// # Errors
/// The kernel's, when the sockets cannot be driven any more.
pub async fn run(
    mut core: FrontCore,
    mut net: Net,
    bell: Arc<Doorbell>,
    life: Arc<Lifecycle>,
    board: Arc<Board>,
    local: Local,
) -> io::Result<()> {
    net.submit()?;
    loop {
        let now = local.now();
        if is_over(&mut core, &mut net, &life, now) {
            return net.submit();
        }
        let mut busy = net.poll(&mut |event| handle(&mut core, event, now)) > 0;
        busy |= core.tick(now);
        while let Some(action) = core.poll_action() {
            carry_out(&mut core, &mut net, action, now);
            busy = true;
        }
        net.submit()?;
        if busy {
            board.show(&core.stats());
            local.yield_now().await;
            continue;
        }
        let timeout = earlier(core.next_timeout(), life.closing_at());
        let wake = net.wake_fd();
        local.wait_or_readable(&bell, timeout, wake).await?;
    }
}

/// Sees to the drain; true when there is nothing left to wait for.
fn is_over(core: &mut FrontCore, net: &mut Net, life: &Lifecycle, now: Instant) -> bool {
    let Some(until) = life.draining_until() else { return false };
    if !core.is_draining() {
        net.stop_listening();
        core.begin_drain(now, until);
    }
    core.is_drained() || life.closing_at().is_some_and(|at| now >= at)
}

fn handle(core: &mut FrontCore, event: NetEvent<'_>, now: Instant) {
    match event {
        NetEvent::Accepted { conn, .. } => core.handle_accepted(conn, now),
        NetEvent::Received { conn, bytes } => core.handle_received(conn, bytes, now),
        NetEvent::Sent { conn, buffer, taken } => core.handle_sent(conn, buffer, taken, now),
        NetEvent::Closed { conn, .. } => core.handle_closed(conn, now),
        // Closed by being dropped: this front core hands nothing out.
        NetEvent::Arrived { .. } => {}
    }
}

fn carry_out(core: &mut FrontCore, net: &mut Net, action: Action, now: Instant) {
    match action {
        Action::Send { conn, bytes } => {
            if net.send(conn, bytes).is_err() {
                // The connection is ending; its `Closed` is on the way.
                core.handle_send_refused(conn, now);
            }
        }
        Action::PauseReading { conn } => net.pause_reading(conn),
        Action::ResumeReading { conn } => net.resume_reading(conn),
        Action::Close { conn, how: CloseHow::Now } => net.close(conn, Close::Now),
        Action::Close { conn, how: CloseHow::Linger } => net.close(conn, Close::Linger),
    }
}

fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
