//! A setting's value on its way from text to type, and what a setting allows.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::ModelName;

/// A value that has the right form; its setting takes it over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// `auto`: decided at start.
    Auto,
    /// A count, bytes or milliseconds.
    Number(u64),
    /// One of the choices, by its index.
    Choice(usize),
    /// `off`: not at all.
    Off,
    /// A socket address.
    Address(SocketAddr),
    /// A model's name.
    Model(ModelName),
    /// A file to write to; `None` is standard error.
    Output(Option<PathBuf>),
}

/// What a number counts: decides which suffixes it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// Things; no suffix.
    Count,
    /// Bytes: `512MiB`, `2GB`.
    Bytes,
    /// Milliseconds: `500ms`, `60s`, `5m`.
    Millis,
}

/// What a setting allows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Allowed {
    /// A number in an inclusive range.
    Number { unit: Unit, min: u64, max: u64 },
    /// The same, or `auto`.
    NumberOrAuto { unit: Unit, min: u64, max: u64 },
    /// One of a few words.
    Choice(&'static [&'static str]),
    /// `IP:PORT`, loopback only.
    LoopbackAddress,
    /// The same, or `off`.
    LoopbackAddressOrOff,
    /// A model's name.
    Model,
    /// `stderr`, or a file's path.
    Output,
}

/// The word for standard error.
const STDERR: &str = "stderr";

impl Unit {
    /// Suffixes and what they multiply by; the longest of those that fit counts.
    fn suffixes(self) -> &'static [(&'static str, u64)] {
        match self {
            Unit::Count => &[],
            Unit::Bytes => &[
                ("KiB", 1 << 10),
                ("MiB", 1 << 20),
                ("GiB", 1 << 30),
                ("TiB", 1 << 40),
                ("kB", 1_000),
                ("MB", 1_000_000),
                ("GB", 1_000_000_000),
                ("TB", 1_000_000_000_000),
                ("B", 1),
            ],
            Unit::Millis => &[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)],
        }
    }

    fn parse(self, text: &str) -> Option<u64> {
        let text = text.trim();
        let suffix = self.suffixes().iter().find(|(suffix, _)| text.ends_with(suffix));
        let (digits, factor) = match suffix {
            Some(&(suffix, factor)) => (text[..text.len() - suffix.len()].trim_end(), factor),
            None => (text, 1),
        };
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit() || b == b'_');
        if !plain || digits.starts_with('_') || digits.ends_with('_') {
            return None;
        }
        digits.replace('_', "").parse::<u64>().ok()?.checked_mul(factor)
    }

    /// The number with the largest suffix that leaves it whole.
    pub(super) fn show(self, number: u64) -> String {
        let whole = |&&(suffix, factor): &&(&str, u64)| {
            // Decimal suffixes are understood, but never written.
            let written = self != Unit::Bytes || suffix.ends_with("iB");
            written && factor > 1 && number > 0 && number.is_multiple_of(factor)
        };
        match self.suffixes().iter().filter(whole).max_by_key(|(_, factor)| factor) {
            Some((suffix, factor)) => format!("{}{suffix}", number / factor),
            None if self == Unit::Millis => format!("{number}ms"),
            None => number.to_string(),
        }
    }
}

impl Allowed {
    /// The value that `text` stands for; the error is a sentence that begins with "must be".
    pub(super) fn parse(self, text: &str) -> Result<Value, String> {
        let wrong = || self.to_string();
        match self {
            Allowed::NumberOrAuto { .. } if text == "auto" => Ok(Value::Auto),
            Allowed::Number { unit, min, max } | Allowed::NumberOrAuto { unit, min, max } => {
                let number = unit.parse(text).ok_or_else(wrong)?;
                if (min..=max).contains(&number) { Ok(Value::Number(number)) } else { Err(wrong()) }
            }
            Allowed::Choice(words) => {
                words.iter().position(|&word| word == text).map(Value::Choice).ok_or_else(wrong)
            }
            Allowed::LoopbackAddressOrOff if text == "off" => Ok(Value::Off),
            Allowed::LoopbackAddress | Allowed::LoopbackAddressOrOff => {
                let address: SocketAddr = text.parse().map_err(|_| wrong())?;
                if address.ip().is_loopback() { Ok(Value::Address(address)) } else { Err(wrong()) }
            }
            Allowed::Output if text.is_empty() => Err(wrong()),
            Allowed::Output => Ok(Value::Output((text != STDERR).then(|| text.into()))),
            Allowed::Model => {
                text.parse().map(Value::Model).map_err(|e| format!("is not a model: {e}"))
            }
        }
    }

    /// Whether the setting is a number, so that TOML may hold it as one.
    pub(super) fn is_number(self) -> bool {
        matches!(self, Allowed::Number { .. } | Allowed::NumberOrAuto { .. })
    }

    /// The value as TOML holds it. `auto` and choices come out as their words.
    pub(super) fn show(self, value: &Value) -> String {
        match (self, value) {
            (_, Value::Auto) => "\"auto\"".to_owned(),
            (_, Value::Off) => "\"off\"".to_owned(),
            (Allowed::Choice(words), Value::Choice(index)) => format!("{:?}", words[*index]),
            (
                Allowed::Number { unit, .. } | Allowed::NumberOrAuto { unit, .. },
                Value::Number(number),
            ) => {
                let text = unit.show(*number);
                if text.bytes().all(|b| b.is_ascii_digit()) { text } else { format!("{text:?}") }
            }
            (_, Value::Number(number)) => number.to_string(),
            (_, Value::Choice(index)) => index.to_string(),
            (_, Value::Address(address)) => format!("{:?}", address.to_string()),
            (_, Value::Model(model)) => format!("{:?}", model.to_string()),
            (_, Value::Output(None)) => format!("{STDERR:?}"),
            (_, Value::Output(Some(path))) => format!("{:?}", path.display().to_string()),
        }
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = |f: &mut fmt::Formatter<'_>, unit: Unit, min, max| {
            let what = match unit {
                Unit::Count => "a whole number",
                Unit::Bytes => "a size (bytes, or such as 512MiB)",
                Unit::Millis => "a time (milliseconds, or such as 500ms, 60s, 5m)",
            };
            write!(f, "must be {what} from {} to {}", unit.show(min), unit.show(max))
        };
        match *self {
            Allowed::Number { unit, min, max } => range(f, unit, min, max),
            Allowed::NumberOrAuto { unit, min, max } => {
                range(f, unit, min, max)?;
                f.write_str(", or auto")
            }
            Allowed::Choice(words) => write!(f, "must be one of {}", words.join(", ")),
            Allowed::LoopbackAddress => f.write_str(
                "must be IP:PORT with a loopback address (127.0.0.1:7070, [::1]:7070): there are \
                 no keys yet, so whoever reaches the port may use it. Other machines come in \
                 through a tunnel, such as ssh -L",
            ),
            Allowed::LoopbackAddressOrOff => f.write_str(
                "must be IP:PORT with a loopback address (127.0.0.1:9464, [::1]:9464), or off: \
                 whoever reaches the port may read it",
            ),
            Allowed::Model => f.write_str("must be a model's name"),
            Allowed::Output => write!(f, "must be {STDERR} or a file's path"),
        }
    }
}
