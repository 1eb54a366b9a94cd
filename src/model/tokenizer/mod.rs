//! Text to tokens and back, as the model's file says.
//!
//! What a user types is text: encoding never makes a control token out of it, whatever it
//! spells. Control tokens come from the chat template's own markup alone, see
//! [`crate::model::template`].
//!
//! Text is cut into words (`split.rs`) and the byte pairs of each word are merged by the
//! `tokenizers` crate. No Unicode normalisation is applied.
//!
//! Core: front cores encode; the engine reads the [`TokenTable`].

mod bytes;
mod classes;
mod encode;
mod load;
mod split;
mod table;

#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use aho_corasick::AhoCorasick;
use tokenizers::Model;
use tokenizers::models::bpe::BPE;

pub use encode::{Encoder, Progress, Prompt, Segment};
pub(crate) use load::adds_bos;
use split::Scheme;
pub use split::WORD_BYTES_MAX;
pub use table::{TokenKind, TokenTable};

use crate::model::gguf::GgufError;
use crate::request::TokenId;

/// Why a model's tokenizer cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The metadata lacks something, or has it wrong.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// The merges and the vocabulary do not fit each other.
    #[error("the tokenizer's merges are unusable: {0}")]
    Merges(String),
}

/// A family of vocabularies: how text becomes the symbols that merges are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alphabet {
    /// Each byte is a printable character (GPT-2's table).
    Bytes,
    /// Characters as they are, `▁` for a space, `<0xNN>` for bytes of unknown characters.
    Characters {
        /// Whether a text begins with a `▁` of its own.
        add_space: bool,
    },
}

/// A model's tokenizer. Shared by all front cores.
pub struct Tokenizer {
    bpe: BPE,
    alphabet: Alphabet,
    scheme: Scheme,
    /// Texts that are one token wherever they stand, and their tokens.
    user_defined: Option<Markers>,
    /// The same, and control tokens: for markup.
    markup: Option<Markers>,
    /// Control tokens alone.
    controls_only: Option<Markers>,
    table: Arc<TokenTable>,
    bos: Option<TokenId>,
    adds_bos: bool,
}

/// Texts that are found before anything else, each with its token.
struct Markers {
    search: AhoCorasick,
    tokens: Vec<TokenId>,
}

impl Markers {
    /// The first marker in `text` from byte `from` on, the longest where several begin.
    fn find(&self, text: &str, from: usize) -> Option<(Range<usize>, TokenId)> {
        let input = aho_corasick::Input::new(text).range(from..);
        let found = self.search.find(input)?;
        Some((found.range(), self.tokens[found.pattern().as_usize()]))
    }
}

impl Tokenizer {
    /// What tokens stand for.
    pub fn table(&self) -> &Arc<TokenTable> {
        &self.table
    }

    /// What a token adds to the output; see [`TokenTable::bytes`].
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.table.bytes(id)
    }

    /// The token that every text begins with, when the model wants one.
    pub fn leading_bos(&self) -> Option<TokenId> {
        self.bos.filter(|_| self.adds_bos)
    }

    /// The beginning-of-text token, whether texts begin with it or not.
    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    /// A prompt of plain text, with the token that the model wants before it.
    pub fn prompt(&self, text: &str) -> Prompt {
        let mut prompt = Prompt::new();
        if let Some(bos) = self.leading_bos() {
            prompt.push_token(bos);
        }
        prompt.push_text(text);
        prompt
    }

    /// The tokens of `text` alone. Use an [`Encoder`] for text of unknown length.
    pub fn encode(&self, text: &str) -> Vec<TokenId> {
        let mut prompt = Prompt::new();
        prompt.push_text(text);
        let mut encoder = Encoder::new(prompt, usize::MAX);
        while encoder.advance(self, usize::MAX) == Progress::More {}
        encoder.into_tokens()
    }

    /// The tokens of a prompt, all at once.
    pub fn encode_prompt(&self, prompt: Prompt) -> Vec<TokenId> {
        let mut encoder = Encoder::new(prompt, usize::MAX);
        while encoder.advance(self, usize::MAX) == Progress::More {}
        encoder.into_tokens()
    }

    /// The text of `tokens`, without control tokens; broken characters as U+FFFD.
    pub fn decode(&self, tokens: &[TokenId]) -> String {
        let bytes: Vec<u8> =
            tokens.iter().flat_map(|&token| self.token_bytes(token)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Control tokens in `markup`, in order, where they stand.
    pub(crate) fn controls<'a>(
        &'a self,
        markup: &'a str,
    ) -> impl Iterator<Item = (Range<usize>, TokenId)> + 'a {
        let mut from = 0;
        std::iter::from_fn(move || {
            loop {
                let (range, token) = self.markup.as_ref()?.find(markup, from)?;
                from = range.end;
                if self.table.is_control(token) {
                    return Some((range, token));
                }
            }
        })
    }

    /// Where the first control token's name in `text` from byte `from` on begins.
    pub(crate) fn first_control(&self, text: &str, from: usize) -> Option<usize> {
        self.controls_only.as_ref()?.find(text, from).map(|(range, _)| range.start)
    }

    /// The next text from byte `from` on that is one token wherever it stands.
    fn find_user_defined(&self, text: &str, from: usize) -> Option<(Range<usize>, TokenId)> {
        self.user_defined.as_ref()?.find(text, from)
    }

    /// Tokenises the word that `text` begins with and returns its length in bytes. `starts_text`
    /// tells whether nothing precedes it.
    fn word(
        &self,
        text: &str,
        starts_text: bool,
        scratch: &mut String,
        tokens: &mut Vec<TokenId>,
    ) -> usize {
        let len = self.scheme.word(text);
        let word = &text[..len];
        scratch.clear();
        match self.alphabet {
            Alphabet::Bytes => scratch.extend(word.bytes().map(bytes::to_char)),
            Alphabet::Characters { add_space } => {
                if starts_text && add_space {
                    scratch.push(load::SPACE);
                }
                scratch.extend(word.chars().map(|c| if c == ' ' { load::SPACE } else { c }));
            }
        }
        // The crate can only fail here on an unknown token that is missing from the vocabulary,
        // and none is set that is.
        let merged = self.bpe.tokenize(scratch).unwrap_or_default();
        tokens.extend(merged.iter().map(|token| token.id));
        len
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("alphabet", &self.alphabet)
            .field("scheme", &self.scheme)
            .field("tokens", &self.table.len())
            .finish_non_exhaustive()
    }
}
