//! The gates: what would be refused anyway is refused by the front cores themselves, in
//! microseconds, without a message.
//!
//! A gate's word is made anew from the engine's own state at the end of every tick, so it cannot
//! stay closed once the reason is gone: whatever frees capacity is a tick.

use crate::base::Instant;
use crate::flow::Closed;
use crate::flow::breaker::OPEN_MS_MAX;
use crate::request::{Class, RejectReason};

use super::EngineCore;
use super::record::Flight;

impl EngineCore {
    /// Counts what the front cores have refused at their gates as if it had come this far.
    pub(super) fn count_refusals(&mut self, now: Instant) -> bool {
        let mut busy = false;
        for front in &mut self.fronts {
            let Some(refusals) = front.port.gate.take_refusals() else { continue };
            let sum: u64 = refusals.iter().sum();
            busy = true;
            self.counters.asks += sum;
            self.counters.gate_refusals += sum;
            self.load.arrived(sum, now);
            self.load.turned_away(sum);
            for (counted, fresh) in self.counters.rejected.iter_mut().zip(refusals) {
                *counted += fresh;
            }
        }
        busy
    }

    /// Shows every front core what there is to know before asking: the same for all classes.
    pub(super) fn show_gates(&mut self, now: Instant) {
        let closed = self.closed_gate(now);
        for front in &mut self.fronts {
            for class in Class::ALL {
                front.port.gate.show(class, closed);
            }
        }
        let reason = closed.map(|closed| closed.reason);
        if reason != self.gate_reason {
            self.gate_reason = reason;
            match reason {
                Some(reason) => self.note(now, Flight::GateClosed, [reason as u64, 0, 0]),
                None => self.note(now, Flight::GateOpened, [0; 3]),
            }
        }
    }

    /// What refuses everybody now.
    pub(super) fn closed_gate(&self, now: Instant) -> Option<Closed> {
        let for_good = |reason| Closed { reason, retry_after_ms: None };
        if self.is_draining() {
            return Some(for_good(RejectReason::ShuttingDown));
        }
        if self.device.lost {
            return Some(for_good(RejectReason::NoCapacity));
        }
        let retry_ns = self.breaker.retry_ns(now)?;
        let retry_after_ms = Some(retry_ns.div_ceil(1_000_000).clamp(1, OPEN_MS_MAX) as u32);
        Some(Closed { reason: RejectReason::NoCapacity, retry_after_ms })
    }

    /// Whether the gates are closed, and with what; the same for every front core and class.
    pub fn gate(&self) -> Option<Closed> {
        self.fronts.first().and_then(|front| front.port.gate.shown(Class::Default))
    }
}
