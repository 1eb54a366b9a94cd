//! Where tests find the default model.

#![allow(dead_code)]

use std::path::PathBuf;

/// File name of the default model, `smollm2-135m`.
const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// SmolLM2-135M-Instruct, from the cache folder.
pub fn smollm2() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache"))
    });
    let cached = cache.map(|cache| cache.join("forebay/models").join(SMOLLM2));
    match cached {
        Some(path) if path.is_file() => path,
        _ => PathBuf::from("/work/models").join(SMOLLM2),
    }
}
