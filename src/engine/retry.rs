//! When a refused client should come back: its place in the calendar.
//!
//! Whoever is refused for want of room hears when there will be some, going by how fast what is
//! short becomes free, and has a place booked for then; whoever comes back for it is let in before
//! newcomers ([`crate::flow::calendar`]).

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::base::Instant;
use crate::message::Ask;
use crate::request::Name;

use super::EngineCore;

/// Between two places while it is not known how fast the queue drains.
const APART_UNKNOWN_NS: u64 = 10_000_000;

/// For whom a place is booked: whoever pays, and on whose behalf. Two whose hashes are equal
/// share their bookings, and nothing else.
pub(super) fn client(ask: &Ask) -> u64 {
    let mut hasher = DefaultHasher::new();
    (ask.tenant, ask.user).hash(&mut hasher);
    hasher.finish()
}

/// Whether the client says who it is.
pub(super) fn is_named(ask: &Ask) -> bool {
    ask.tenant != Name::EMPTY || ask.user != Name::EMPTY
}

impl EngineCore {
    /// Books a place for who would have to wait this long for one; says when, in ms from now.
    /// `None`: not at all, there are too many before it.
    pub(super) fn promise(&mut self, client: u64, wait_ns: u64, now: Instant) -> Option<u32> {
        let apart_ns = self.meter.apart_ns(now).unwrap_or(APART_UNKNOWN_NS);
        let due = self.calendar.book(client, wait_ns, apart_ns, now)?;
        Some(due.ns_since(now).div_ceil(1_000_000).clamp(1, u64::from(u32::MAX)) as u32)
    }
}
