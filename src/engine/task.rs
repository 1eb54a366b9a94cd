//! The engine core's shell: runs [`EngineCore`] on an executor, with the process's clock.

use std::sync::Arc;

use crate::base::{Board, Instant};
use crate::engine::EngineCore;
use crate::ring::Doorbell;
use crate::runtime::{Lifecycle, Local};

/// What is shown is no older than this, also while nothing happens: rates fall meanwhile.
const SHOWN_EVERY_MS: u64 = 1_000;

/// Runs until the server drains and every front core is gone. Shows where it stands on `board`.
pub async fn run(
    mut core: EngineCore,
    bell: Arc<Doorbell>,
    life: Arc<Lifecycle>,
    board: Arc<Board>,
    local: Local,
) {
    let mut show_at = Instant::ZERO;
    loop {
        let now = local.now();
        if let Some(until) = life.draining_until() {
            core.begin_drain(now, until);
            if core.is_deserted() {
                return;
            }
        }
        let busy = core.tick(now);
        if busy || now >= show_at {
            board.show(&core.stats());
            show_at = now.plus_ms(SHOWN_EVERY_MS);
        }
        if busy {
            local.yield_now().await;
        } else {
            let timeout = core.next_timeout().map_or(show_at, |at| at.min(show_at));
            local.wait(&bell, Some(timeout)).await;
        }
    }
}
