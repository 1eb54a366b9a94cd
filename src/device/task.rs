//! The device core's shell: runs [`DeviceCore`] on an executor.

use std::sync::Arc;

use crate::device::DeviceCore;
use crate::ring::Doorbell;
use crate::runtime::Local;

/// Runs until the engine is gone.
pub async fn run(mut core: DeviceCore, bell: Arc<Doorbell>, local: Local) {
    while !core.is_finished() {
        if core.tick(local.now()) {
            local.yield_now().await;
        } else {
            bell.rung().await;
        }
    }
}
