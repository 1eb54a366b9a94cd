//! The flight recorder: not part of this commit yet.
