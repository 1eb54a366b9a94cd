//! What each token stands for: the table that turns output back into bytes.

use crate::request::TokenId;

/// What a vocabulary entry is for, by the numbers of `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Text.
    Normal,
    /// Stands for text that has no token.
    Unknown,
    /// Structure: the beginning of a turn, the end of a text. Never made from a user's text.
    Control,
    /// Text that is always one token, e.g. a run of spaces or a tag.
    UserDefined,
    /// Not in use.
    Unused,
    /// One byte.
    Byte,
}

impl TokenKind {
    pub(super) fn from_number(number: u64) -> Option<TokenKind> {
        Some(match number {
            1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => return None,
        })
    }

    /// Whether the token is structure and never text.
    pub fn is_control(self) -> bool {
        matches!(self, TokenKind::Control | TokenKind::Unknown)
    }
}

/// Bytes, kind and meaning of every token. Built once, shared by front cores and engine.
#[derive(Clone, Debug, Default)]
pub struct TokenTable {
    /// All tokens' bytes, back to back.
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<u32>,
    kinds: Vec<TokenKind>,
    /// In order.
    ends_of_text: Vec<TokenId>,
    longest: usize,
}

impl TokenTable {
    pub(super) fn push(&mut self, bytes: &[u8], kind: TokenKind) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len() as u32);
        self.kinds.push(kind);
        if !kind.is_control() {
            self.longest = self.longest.max(bytes.len());
        }
    }

    pub(super) fn set_ends_of_text(&mut self, mut ids: Vec<TokenId>) {
        ids.sort_unstable();
        ids.dedup();
        self.ends_of_text = ids;
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// What the token adds to the output: its text, or nothing for a control token and for an id
    /// outside the vocabulary. A token may hold half a character.
    pub fn bytes(&self, id: TokenId) -> &[u8] {
        if self.is_control(id) { &[] } else { self.literal(id) }
    }

    /// The token's text even when it is a control token; for display. Empty outside the
    /// vocabulary.
    pub fn literal(&self, id: TokenId) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else {
            return &[];
        };
        let start = (id as usize).checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// What the token is for; `Unused` outside the vocabulary.
    pub fn kind(&self, id: TokenId) -> TokenKind {
        self.kinds.get(id as usize).copied().unwrap_or(TokenKind::Unused)
    }

    /// Whether the token is structure and never text.
    pub fn is_control(&self, id: TokenId) -> bool {
        self.kind(id).is_control()
    }

    /// Whether the model's answer is over after this token.
    pub fn is_end_of_text(&self, id: TokenId) -> bool {
        self.ends_of_text.binary_search(&id).is_ok()
    }

    /// All tokens after which the model's answer is over, in order.
    pub fn ends_of_text(&self) -> &[TokenId] {
        &self.ends_of_text
    }

    /// Most bytes that one token adds to the output.
    pub fn longest_bytes(&self) -> usize {
        self.longest
    }
}
