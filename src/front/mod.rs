//! The front: owns its clients' connections from accept to close. Bytes become frames, frames
//! become requests, requests become tokens; what the engine produces becomes text and frames again.
//!
//! Core: front. Only `net/` and `task.rs` touch sockets, threads and clocks; everything else is
//! pure: [`FrontCore`] is told what happened (`handle_*`), is given time (`tick`), and says what
//! the shell is to do (`poll_action`, `next_timeout`).
//!
//! ```text
//!                    ┌────────────────────────── FrontCore ──────────────────────────┐
//!  handle_received ─►│ connection: frames, limits ─► Ask ══ requests ═══════════════►│ engine
//!                    │   body, after the grant ─► tokenise (slices) ─► Submit ══════►│
//!                    │   credit, cancel ═════════════════════ control ══════════════►│
//!  poll_action ◄─────│ egress: one send under way ◄── UTF-8 ◄══ event batches ═══════│
//!  handle_sent ─────►│   what the kernel took ─► credit                              │
//!                    └───────────────────────────────────────────────────────────────┘
//! ```

mod connection;
mod core;
mod credit;
mod egress;
mod events;
mod input;
mod model_tokenise;
pub mod net;
mod pipeline;
mod record;
mod settings;
mod stream;
pub mod task;
mod timers;
mod tokenise;

pub use self::connection::{Action, CloseHow};
pub use self::core::FrontCore;
pub use self::model_tokenise::ModelTokenise;
pub use self::settings::{FrontCounters, FrontSettings, FrontStats};
pub use self::tokenise::{ByteTokeniser, SLICE_BYTES, Tokenise, TokeniseJob};

/// A connection as its front core and its net shell know it. After its `Closed` event the id is
/// dead: every call with it is refused, also when its place has a new owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId {
    /// Place in the table, below `connections_max`.
    pub slot: u32,
    /// Counts reuses of the place.
    pub generation: u32,
}

#[cfg(test)]
mod tests;

/// Bytes of a connection's fixed part, for the memory envelope.
pub const CONNECTION_BYTES: usize = size_of::<connection::Connection>();
/// Bytes of a stream's fixed part, for the memory envelope.
pub const STREAM_BYTES: usize = size_of::<stream::Stream>();
/// Replies that a connection may hold for a client that does not read.
pub const REPLY_BYTES_MAX: usize = egress::REPLY_BYTES_MAX;
