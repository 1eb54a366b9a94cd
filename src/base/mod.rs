//! What every other folder may lean on: time as a value, a seeded generator, containers whose
//! capacity is fixed at construction.
//!
//! Core: all. Nothing here reads a clock, allocates after construction or touches the outside.

pub mod fixed;
pub(crate) mod numbered;
pub mod prng;
pub mod slab;
pub mod time;
pub mod token_table;

pub use fixed::{FixedDeque, FixedVec};
pub(crate) use numbered::numbered;
pub use prng::{Prng, Ratio};
pub use slab::{Slab, SlabKey};
pub use time::{Clock, Instant, ManualClock};
pub use token_table::TokenTable;
