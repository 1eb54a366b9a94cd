//! Pre-tokenizers: where text is cut into words before byte pairs are merged.
//!
//! Each is defined by a regular expression in the model's original tokenizer. Here they are
//! written out as scanners: a scanner looks at the text from its position on and nothing else, so
//! encoding can stop after any word and go on later, and its work is linear whatever the text (a
//! backtracking engine can be made to give up on a long run of spaces). The tests hold each
//! scanner against its expression.

use super::classes::{Class, class_of};

/// A word longer than this is cut here, at a character's edge. Merging a word's bytes cannot be
/// interrupted, and takes about 1 ms at this length: without a bound, one request of letters
/// without a space would stop its core. No natural text comes near: the longest words are
/// unbroken lines of Chinese or Thai, some hundred bytes.
pub const WORD_BYTES_MAX: usize = 4096;

/// How text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    /// GPT-2:
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// Every character of `\p{N}` stands alone, and what lies between is cut as GPT-2 does.
    Gpt2Digits,
    /// Llama 3: `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|`
    /// ` ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    Llama3,
    /// Qwen 2: as Llama 3, but with `\p{N}` alone.
    Qwen2,
    /// What llama.cpp calls `default`: first `[\p{P}\$\+<=>\^~\|]+` is cut out, then GPT-2, then
    /// runs of `\p{N}`, then `[0-9][0-9][0-9]` within those.
    Default,
    /// SentencePiece: a word begins at a space that follows something else.
    Spaces,
}

impl Scheme {
    /// The scheme that `tokenizer.ggml.pre` names.
    pub(super) fn from_name(name: &str) -> Option<Scheme> {
        Some(match name {
            "gpt-2" | "gpt2" | "phi-2" | "olmo" | "mpt" | "jais" | "gigachat" | "mellum" => {
                Scheme::Gpt2
            }
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
            | "minerva-7b" => Scheme::Gpt2Digits,
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" | "smaug-bpe" | "dbrx" => {
                Scheme::Llama3
            }
            "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "megrez" => Scheme::Qwen2,
            "default" => Scheme::Default,
            _ => return None,
        })
    }

    /// The names that [`Scheme::from_name`] knows, for messages.
    pub(super) const NAMES: &'static str =
        "smollm, starcoder, command-r, gpt-2, olmo, mpt, llama-bpe, llama3, qwen2 and default are";

    /// Length in bytes of the word that `text` begins with: at least one character, at most
    /// [`WORD_BYTES_MAX`] bytes. `text` must not be empty.
    pub(super) fn word(self, text: &str) -> usize {
        let text = truncated(text, WORD_BYTES_MAX);
        match self {
            Scheme::Gpt2 => gpt2(text, |_| false),
            // A digit ends whatever comes before it, as the end of the text does.
            Scheme::Gpt2Digits => match text.chars().next() {
                Some(digit) if class_of(digit) == Class::Number => digit.len_utf8(),
                _ => gpt2(text, |c| class_of(c) == Class::Number),
            },
            Scheme::Llama3 => llama3(text, 3),
            Scheme::Qwen2 => llama3(text, 1),
            Scheme::Default => default(text),
            Scheme::Spaces => spaces(text),
        }
    }
}

/// The first `bytes_max` bytes of `text`, or a little less so as not to cut a character.
fn truncated(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

/// Bytes of the characters at the start of `text` that satisfy `belongs`.
fn run(text: &str, belongs: impl Fn(char) -> bool) -> usize {
    text.find(|c| !belongs(c)).unwrap_or(text.len())
}

fn is_symbol(c: char) -> bool {
    matches!(class_of(c), Class::Punctuation | Class::Other)
}

/// `\s+(?!\S)|\s+` at a run of `run` bytes of white space: all of it at the end of the text,
/// otherwise all but the last character, which belongs to the word that follows; a single
/// character alone is taken anyway.
fn white_space(text: &str, run: usize, at_end: bool) -> usize {
    if at_end {
        return run;
    }
    let last = text[..run].chars().next_back().map_or(0, char::len_utf8);
    if run > last { run - last } else { run }
}

/// GPT-2's word at the start of `text`, where the text ends before the first character for which
/// `ends` holds.
fn gpt2(text: &str, ends: impl Fn(char) -> bool + Copy) -> usize {
    for suffix in ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"] {
        if text.starts_with(suffix) {
            return suffix.len();
        }
    }
    let lead = usize::from(text.starts_with(' '));
    let rest = &text[lead..];
    let belongs: fn(char) -> bool = match rest.chars().next().filter(|&c| !ends(c)).map(class_of) {
        Some(Class::Letter) => |c| class_of(c) == Class::Letter,
        Some(Class::Number) => |c| class_of(c) == Class::Number,
        Some(Class::Punctuation | Class::Other) => is_symbol,
        Some(Class::Space) | None => {
            let run = run(text, |c| class_of(c) == Class::Space);
            let at_end = text[run..].chars().next().is_none_or(ends);
            return white_space(text, run, at_end);
        }
    };
    lead + run(rest, |c| belongs(c) && !ends(c))
}

/// Bytes of an apostrophe and a contraction's ending in either case, at the start of `text`.
fn contraction(text: &str) -> Option<usize> {
    let mut chars = text.strip_prefix('\'')?.chars();
    // Case folding takes the long s for an s.
    let first = match chars.next()? {
        'ſ' => return Some("'ſ".len()),
        c => c.to_ascii_lowercase(),
    };
    match (first, chars.next().map(|c| c.to_ascii_lowercase())) {
        ('s' | 't' | 'm' | 'd', _) => Some(2),
        ('r' | 'v', Some('e')) | ('l', Some('l')) => Some(3),
        _ => None,
    }
}

/// Llama 3's word at the start of `text`; numbers are cut after `digits` characters.
fn llama3(text: &str, digits: usize) -> usize {
    if let Some(bytes) = contraction(text) {
        return bytes;
    }
    let mut chars = text.chars();
    let Some(first) = chars.next() else {
        return 0;
    };
    let second = chars.next();
    let class = class_of(first);
    let letters = |text: &str| run(text, |c| class_of(c) == Class::Letter);
    match class {
        Class::Letter => return letters(text),
        Class::Number => {
            let number = text.chars().take(digits).take_while(|&c| class_of(c) == Class::Number);
            return number.map(char::len_utf8).sum();
        }
        _ => {}
    }
    // One character of any other kind, but no line break, may lead a run of letters.
    if !matches!(first, '\r' | '\n') && second.is_some_and(|c| class_of(c) == Class::Letter) {
        return first.len_utf8() + letters(&text[first.len_utf8()..]);
    }
    let lead = usize::from(first == ' ');
    let symbols = run(&text[lead..], is_symbol);
    if symbols > 0 {
        let end = lead + symbols;
        return end + run(&text[end..], |c| matches!(c, '\r' | '\n'));
    }
    let run = run(text, |c| class_of(c) == Class::Space);
    match text[..run].rfind(['\r', '\n']) {
        Some(last_break) => last_break + 1,
        None => white_space(text, run, run == text.len()),
    }
}

/// llama.cpp's `default` word at the start of `text`.
fn default(text: &str) -> usize {
    let is_cut_out = |c: char| {
        class_of(c) == Class::Punctuation
            || matches!(c, '$' | '+' | '<' | '=' | '>' | '^' | '~' | '|')
    };
    let cut_out = run(text, is_cut_out);
    if cut_out > 0 {
        return cut_out;
    }
    // Groups of three count from the start of each run of ASCII digits. Seen at once, they spare
    // a long number from being looked through to its end for each group.
    if text.as_bytes().iter().take(3).filter(|byte| byte.is_ascii_digit()).count() == 3 {
        return 3;
    }
    let word = &text[..gpt2(text, is_cut_out)];
    let before_number = run(word, |c| class_of(c) != Class::Number);
    if before_number > 0 {
        return before_number;
    }
    let group = |three: &[u8]| three.iter().all(u8::is_ascii_digit);
    word.as_bytes().windows(3).position(group).unwrap_or(word.len())
}

/// SentencePiece's word at the start of `text`: leading spaces and what follows them up to the
/// next space.
fn spaces(text: &str) -> usize {
    let lead = run(text, |c| c == ' ');
    lead + run(&text[lead..], |c| c != ' ')
}
