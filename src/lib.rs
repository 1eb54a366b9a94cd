//! Forebay serves language models with backpressure end to end: *downstream capacity governs
//! upstream production*, from the client's socket to the decode step.
//!
//! `src/README.md` is the map of the architecture: which folder runs on which kind of core, what
//! flows between them, and the invariants that hold.
//!
//! Every joint between two cores is a [link](crate::flow::link()): a bounded ring and as many
//! credits as it has room. Whoever sends spends a credit; it comes back when the receiver is
//! *done* with the message, not when it took it.
//!
//! ```
//! # #[cfg(not(feature = "core"))] fn main() {}
//! # #[cfg(feature = "core")] fn main() {
//! use forebay::flow::{SendError, link};
//! use forebay::ring::Doorbell;
//!
//! // Room for 4 messages, hence 4 credits. Each end sleeps on a bell that the other rings.
//! let (to_receiver, to_sender) = (Doorbell::new(), Doorbell::new());
//! let (mut sender, mut receiver) = link("numbers", 4, to_receiver.clone(), to_sender.clone());
//!
//! // Without credit a message is neither queued nor lost: it comes back.
//! assert_eq!(sender.send_batch(&mut (0..1000)), 4);
//! assert_eq!(sender.send(4), Err(SendError::NoCredit(4)));
//!
//! let consumer = std::thread::spawn(move || {
//!     let mut sum = 0;
//!     loop {
//!         let is_last_look = receiver.is_abandoned();
//!         while let Some(n) = receiver.receive() {
//!             sum += n;
//!             receiver.give_back(1); // the credit that the producer below waits for
//!         }
//!         if is_last_look {
//!             return sum;
//!         }
//!         to_receiver.wait_thread(None);
//!     }
//! });
//! for n in 4..1000 {
//!     while sender.send(n) == Err(SendError::NoCredit(n)) {
//!         to_sender.wait_thread(None);
//!     }
//! }
//! drop(sender); // rings, too: the consumer takes what is left and ends
//! assert_eq!(consumer.join().unwrap(), 499_500);
//! # }
//! ```

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
#[cfg(feature = "server")]
pub mod ports;
#[cfg(feature = "core")]
pub mod ring;
#[cfg(feature = "server")]
pub mod runtime;
