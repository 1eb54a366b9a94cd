//! The engine core's shell: runs [`EngineCore`] on an executor, with the process's clock.

use std::sync::Arc;

use crate::engine::EngineCore;
use crate::engine::stats::StatsBoard;
use crate::ring::Doorbell;
use crate::runtime::{Lifecycle, Local};

/// Runs until the server drains and every front core is gone. Shows where it stands on `board`.
pub async fn run(
    mut core: EngineCore,
    bell: Arc<Doorbell>,
    life: Arc<Lifecycle>,
    board: Arc<StatsBoard>,
    local: Local,
) {
    loop {
        let now = local.now();
        if let Some(until) = life.draining_until() {
            core.begin_drain(now, until);
            if core.is_deserted() {
                return;
            }
        }
        if core.tick(now) {
            board.show(&core.stats());
            local.yield_now().await;
        } else {
            local.wait(&bell, core.next_timeout()).await;
        }
    }
}
