//! The kernels' parameters, as bindgen reads them from `kernels/abi.h`, and their machine code.
#![allow(unsafe_code, missing_docs, non_camel_case_types, clippy::undocumented_unsafe_blocks)]
// What only kernels use.
#![allow(dead_code)]

include!(concat!(env!("OUT_DIR"), "/abi.rs"));

/// Bytes that begin where a word may: the driver reads a module's header in place.
#[repr(C)]
pub struct Aligned<T: ?Sized> {
    pub align: [u64; 0],
    pub bytes: T,
}

// MODULES: every kernel family, by the name of its file.
include!(concat!(env!("OUT_DIR"), "/modules.rs"));
