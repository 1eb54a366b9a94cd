//! What the boards show, for Prometheus: the page and the door where it is fetched.
//!
//! Nothing here is on a token's way: one thread of its own reads the boards when somebody asks.

mod door;
mod page;

pub use door::Door;
pub use page::Page;
