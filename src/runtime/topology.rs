//! Roles and CPUs: not part of this commit yet.
