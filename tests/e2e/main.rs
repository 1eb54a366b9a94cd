//! The whole program over real sockets on the real model: everything a client can see.

mod answers;
mod backpressure;
#[path = "../common/mod.rs"]
mod common;
mod ends;
mod rig;
mod seen;
mod wire;
