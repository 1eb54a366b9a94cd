//! What is wrong with a configuration, and where it was written.

use std::fmt;

/// Where a setting's value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere: it is built in.
    Default,
    /// In the configuration file.
    File {
        /// Its path, as it was given.
        path: String,
        /// Counted from 1.
        line: usize,
    },
    /// In this environment variable.
    Variable(String),
    /// With this flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{path} line {line}"),
            Origin::Variable(name) => write!(f, "environment variable {name}"),
            Origin::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The setting, or what was taken for one; empty when the file cannot be read as TOML.
    pub key: String,
    /// The value as it was written, if there is one.
    pub value: Option<String>,
    /// Where.
    pub origin: Origin,
    /// What is wrong and what is allowed, to be read after the key and the value.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.key.as_str(), &self.value) {
            ("", _) => write!(f, "{}: {}", self.origin, self.what),
            (key, None) => write!(f, "{key} ({}): {}", self.origin, self.what),
            (key, Some(value)) => write!(f, "{key} = {value} ({}): {}", self.origin, self.what),
        }
    }
}

/// Everything that is wrong; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [one] => write!(f, "the configuration has a problem:\n  {one}"),
            many => {
                write!(f, "the configuration has {} problems:", many.len())?;
                many.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
            }
        }
    }
}

impl std::error::Error for Problems {}
