//! What several integration tests need.

use std::path::PathBuf;
use std::sync::OnceLock;

use forebay::cli::pull::{ModelName, Progress, ensure};

/// The default model's file, from the user's own cache: fetched by the first test that asks, when
/// nobody has fetched it before.
#[allow(dead_code)] // every test file compiles this module for itself; not all need the model
pub fn smollm2() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let fetch = || {
        ensure(&ModelName::default_model(), Progress::Quiet)
            .unwrap_or_else(|error| panic!("these tests need the default model: {error}"))
    };
    PATH.get_or_init(fetch).clone()
}
