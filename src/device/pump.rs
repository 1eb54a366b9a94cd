//! The device core's state machine: carries steps from the engine to the backend and back.

use std::sync::Arc;

use crate::device::Backend;
use crate::message::Step;
use crate::ring::{Consumer, Doorbell, Producer};

/// Moves steps between the engine's rings and a backend, at most as many at once as the backend
/// has depth. The boxes that circulate are the credits: there are exactly `depth` of them, so
/// neither ring can overflow.
pub struct DeviceCore {
    backend: Box<dyn Backend>,
    plans: Consumer<Box<Step>>,
    results: Producer<Box<Step>>,
    to_engine: Arc<Doorbell>,
    in_flight: usize,
}

impl DeviceCore {
    /// `to_engine` is rung for every step that comes back.
    pub fn new(
        backend: Box<dyn Backend>,
        plans: Consumer<Box<Step>>,
        results: Producer<Box<Step>>,
        to_engine: Arc<Doorbell>,
    ) -> DeviceCore {
        DeviceCore { backend, plans, results, to_engine, in_flight: 0 }
    }

    /// Brings finished steps back and starts new ones. True when it did something.
    pub fn tick(&mut self) -> bool {
        let mut moved = false;
        while let Some(step) = self.backend.poll() {
            self.in_flight -= 1;
            // The engine may be gone (shutdown): the step's memory is then freed here.
            let _ = self.results.push(step);
            self.to_engine.ring();
            moved = true;
        }
        while self.in_flight < self.backend.description().depth {
            let Some(step) = self.plans.pop() else { break };
            self.backend.submit(step);
            self.in_flight += 1;
            moved = true;
        }
        moved
    }

    /// Whether the engine is gone and nothing is left to run.
    pub fn is_finished(&mut self) -> bool {
        self.in_flight == 0 && self.plans.is_abandoned() && self.plans.is_empty()
    }
}
