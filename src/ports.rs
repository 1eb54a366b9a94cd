//! The rings that join the engine to a front core and to the device core: both ends of each.

use std::sync::Arc;

use crate::flow::{GateKeeper, GateReader, Receiver, Sender, gate, link};
use crate::limits::Limits;
use crate::message::{ControlMessage, EVENT_BATCHES, EventBatch, RequestMessage, Step};
use crate::ring::{Consumer, Doorbell, Producer, ring};

/// The engine's ends of the rings to one front core.
#[derive(Debug)]
pub struct FrontPort {
    /// Asks and submissions.
    pub requests: Receiver<RequestMessage>,
    /// Credits, cancels and emptied batches; never waits behind requests (I3).
    pub control: Consumer<ControlMessage>,
    /// Where the front core is told what would be refused, and tells what it refused.
    pub gate: GateKeeper,
    /// Filled batches. The ring has room for all that circulate.
    pub events: Producer<Box<EventBatch>>,
    /// Rung after a batch was pushed.
    pub bell: Arc<Doorbell>,
}

/// The front core's ends of the same rings.
#[derive(Debug)]
pub struct FrontEnds {
    /// Asks and submissions.
    pub requests: Sender<RequestMessage>,
    /// Credits, cancels and emptied batches, with room for [`FrontEnds::control_capacity`]. Who
    /// pushes rings `engine_bell`.
    pub control: Producer<ControlMessage>,
    /// Looked at before an ask.
    pub gate: GateReader,
    /// Filled batches, each to be sent back.
    pub events: Consumer<Box<EventBatch>>,
    /// The engine's bell.
    pub engine_bell: Arc<Doorbell>,
}

impl FrontEnds {
    /// How many messages the control ring needs room for: one credit and one cancel for each
    /// sequence there can be, and every batch on its way back.
    pub fn control_capacity(limits: &Limits) -> usize {
        2 * limits.sequences_max() as usize + EVENT_BATCHES
    }
}

/// Makes the rings between the engine and one front core.
pub fn connect_front(
    limits: &Limits,
    engine_bell: &Arc<Doorbell>,
    front_bell: &Arc<Doorbell>,
) -> (FrontPort, FrontEnds) {
    // An ask and the submission that follows its grant are never in the ring together, but the
    // submissions of earlier grants and as many new asks are.
    let requests_capacity = 2 * limits.asks_max as usize;
    let (sender, receiver) =
        link("requests", requests_capacity, Arc::clone(engine_bell), Arc::clone(front_bell));
    let (control_in, control_out) = ring(FrontEnds::control_capacity(limits));
    let (events_in, events_out) = ring(EVENT_BATCHES);
    let (keeper, reader) = gate();
    let port = FrontPort {
        requests: receiver,
        control: control_out,
        gate: keeper,
        events: events_in,
        bell: Arc::clone(front_bell),
    };
    let ends = FrontEnds {
        requests: sender,
        control: control_in,
        gate: reader,
        events: events_out,
        engine_bell: Arc::clone(engine_bell),
    };
    (port, ends)
}

/// The engine's ends of the rings to the device core.
#[derive(Debug)]
pub struct DevicePort {
    /// Steps to run, in order of their numbers.
    pub steps: Producer<Box<Step>>,
    /// Finished steps, in the same order.
    pub results: Consumer<Box<Step>>,
    /// Rung after a step was pushed.
    pub bell: Arc<Doorbell>,
}

/// The device core's ends of the same rings.
#[derive(Debug)]
pub struct DeviceEnds {
    /// Steps to run.
    pub steps: Consumer<Box<Step>>,
    /// Finished steps, in the order of submission. Who pushes rings `engine_bell`.
    pub results: Producer<Box<Step>>,
    /// The engine's bell.
    pub engine_bell: Arc<Doorbell>,
}

/// Makes the rings between the engine and a device core with up to `depth` steps in flight.
pub fn connect_device(
    depth: usize,
    engine_bell: &Arc<Doorbell>,
    device_bell: &Arc<Doorbell>,
) -> (DevicePort, DeviceEnds) {
    let (steps_in, steps_out) = ring(depth);
    let (results_in, results_out) = ring(depth);
    let port = DevicePort { steps: steps_in, results: results_out, bell: Arc::clone(device_bell) };
    let ends =
        DeviceEnds { steps: steps_out, results: results_in, engine_bell: Arc::clone(engine_bell) };
    (port, ends)
}
