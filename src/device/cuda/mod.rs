//! The CUDA backend.

pub mod abi;
pub mod pack;
