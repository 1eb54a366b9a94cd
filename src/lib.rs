//! Forebay serves language models with backpressure end to end: *downstream capacity governs
//! upstream production*, from the client's socket to the decode step.
//!
//! `src/README.md` is the map of the architecture: which folder runs on which kind of core, what
//! flows between them, and the invariants that hold.

#![deny(unsafe_code)]
#![warn(missing_docs)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod base;
pub mod protocol;
pub mod request;

#[cfg(feature = "client")]
pub mod client;

#[cfg(feature = "server")]
pub mod cli;
#[cfg(feature = "server")]
pub mod config;
#[cfg(feature = "server")]
pub mod device;
#[cfg(feature = "server")]
pub mod engine;
#[cfg(feature = "core")]
pub mod flow;
#[cfg(feature = "server")]
pub mod front;
#[cfg(feature = "core")]
pub mod limits;
#[cfg(feature = "core")]
pub mod message;
#[cfg(feature = "server")]
pub mod model;
#[cfg(feature = "core")]
pub mod ring;
#[cfg(feature = "server")]
pub mod runtime;
