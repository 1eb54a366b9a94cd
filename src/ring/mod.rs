//! What joins two cores: a bounded lock-free queue between exactly two threads, and the doorbell
//! that wakes whoever sleeps at its far end.
//!
//! Core: any. Neither half ever waits for the other: a full ring refuses, an empty one has nothing.
//! Waiting is the doorbell's business, and happens only when there is nothing else to do.

pub mod doorbell;
pub mod spsc;
pub(crate) mod sync;

pub use doorbell::Doorbell;
pub use spsc::{Consumer, Producer, PushError, ring};
