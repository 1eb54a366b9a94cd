//! (being written)

pub mod net;
