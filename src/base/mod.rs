//! What every other folder may lean on: time as a value, a seeded generator, containers whose
//! capacity is fixed at construction.
//!
//! Core: all. Nothing here reads a clock, allocates after construction or touches the outside.

pub mod time;
pub mod token_table;

pub use time::Instant;
pub use token_table::TokenTable;
