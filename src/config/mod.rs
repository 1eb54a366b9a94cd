//! Settings: where they come from, what they may be, and the one checked [`Config`] they become.
//!
//! Core: none; used before any core starts. Reads no file and no environment itself: it is handed
//! their contents, so that every case is a plain test.

mod model_name;
mod suggest;

pub use model_name::{DEFAULT_MODEL, HubFile, KNOWN_MODELS, KnownModel, ModelName, ModelNameError};
