//! The front core over real rings, with an engine played by the test.

mod connections;
mod harness;
mod requests;
mod splits;
mod streams;
