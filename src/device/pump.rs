//! The device core's state machine: carries steps from the engine to the backend and back.

use std::sync::Arc;

use crate::base::recorder::recorded_events;
use crate::base::{Instant, Pen, Recorder};
use crate::device::Backend;
use crate::message::Step;
use crate::ring::{Consumer, Doorbell, Producer};

recorded_events!(
    /// What happens on the device core.
    Flight {
        StepBegun = "step begun", ["step" Number, "rows" Number, "tokens" Number];
        StepDone = "step done", ["step" Number, "took" Ns, "failed" Number];
    }
);

/// Moves steps between the engine's rings and a backend, at most as many at once as the backend
/// has depth. The boxes that circulate are the credits: there are exactly `depth` of them, so
/// neither ring can overflow.
pub struct DeviceCore {
    backend: Box<dyn Backend>,
    plans: Consumer<Box<Step>>,
    results: Producer<Box<Step>>,
    to_engine: Arc<Doorbell>,
    in_flight: usize,
    pen: Pen,
}

impl DeviceCore {
    /// `to_engine` is rung for every step that comes back.
    pub fn new(
        backend: Box<dyn Backend>,
        plans: Consumer<Box<Step>>,
        results: Producer<Box<Step>>,
        to_engine: Arc<Doorbell>,
    ) -> DeviceCore {
        let pen = Recorder::start("device", Flight::KINDS);
        DeviceCore { backend, plans, results, to_engine, in_flight: 0, pen }
    }

    /// Its flight recorder, to be read from anywhere.
    pub fn recorder(&self) -> Arc<Recorder> {
        self.pen.recorder()
    }

    /// Brings finished steps back and starts new ones. True when it did something.
    pub fn tick(&mut self, now: Instant) -> bool {
        let mut moved = false;
        while let Some(step) = self.backend.poll() {
            self.in_flight -= 1;
            let result = &step.result;
            let failed = u64::from(result.failure.is_some());
            let values = [step.plan.number, result.elapsed_ns, failed];
            self.pen.record(now, Flight::StepDone as u16, values);
            // The engine may be gone (shutdown): the step's memory is then freed here.
            let _ = self.results.push(step);
            self.to_engine.ring();
            moved = true;
        }
        while self.in_flight < self.backend.description().depth {
            let Some(step) = self.plans.pop() else { break };
            let (rows, tokens) = (step.plan.rows.len() as u64, step.plan.tokens.len() as u64);
            self.pen.record(now, Flight::StepBegun as u16, [step.plan.number, rows, tokens]);
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
