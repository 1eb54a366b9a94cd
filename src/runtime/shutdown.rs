//! Signals: not part of this commit yet.
