//! What every other folder may lean on: time as a value, a seeded generator, containers whose
//! capacity is fixed at construction, the record of what a core did last, and its numbers on show.
//!
//! Core: all. Nothing here reads a clock, allocates after construction or touches the outside.

#[cfg(feature = "core")]
pub mod board;
pub mod fixed;
#[cfg(feature = "core")]
pub mod histogram;
pub(crate) mod numbered;
pub mod prng;
#[cfg(feature = "core")]
pub mod recorder;
pub mod slab;
pub mod time;
pub mod token_table;

#[cfg(feature = "core")]
pub use board::Board;
pub use fixed::{FixedDeque, FixedVec};
pub(crate) use numbered::numbered;
pub use prng::{Prng, Ratio};
#[cfg(feature = "core")]
pub use recorder::{Pen, Recorder};
pub use slab::{Slab, SlabKey};
pub use time::{Clock, Instant, ManualClock};
pub use token_table::TokenTable;
