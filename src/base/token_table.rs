//! What the engine must know of a vocabulary: each token's bytes, and which tokens end a text.
//!
//! Built once by the model, then shared read-only. One flat run of bytes and one of offsets: a
//! vocabulary of 50,000 tokens takes about 600 KB, and looking a token up touches two lines.

use crate::request::TokenId;

/// Token → bytes, and the set of end-of-text tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenTable {
    /// All tokens' bytes, back to back.
    bytes: Vec<u8>,
    /// Token `i` is `bytes[offsets[i]..offsets[i + 1]]`: one entry more than there are tokens.
    offsets: Vec<u32>,
    /// End-of-text tokens, sorted. A model has one to a few.
    ends: Vec<TokenId>,
    /// Length of the longest token.
    longest_bytes: usize,
}

impl TokenTable {
    /// A table of `tokens` in the order of their ids. A token that stands for no text (control
    /// tokens, usually) has no bytes. `ends` may name ids that the vocabulary lacks: no harm.
    ///
    /// # Panics
    /// When all tokens together have 4 GiB or more.
    pub fn new<'a>(tokens: impl IntoIterator<Item = &'a [u8]>, ends: &[TokenId]) -> TokenTable {
        let mut bytes = Vec::new();
        let mut offsets = vec![0];
        let mut longest_bytes = 0;
        for token in tokens {
            bytes.extend_from_slice(token);
            offsets.push(u32::try_from(bytes.len()).expect("a vocabulary of less than 4 GiB"));
            longest_bytes = longest_bytes.max(token.len());
        }
        let mut ends = ends.to_vec();
        ends.sort_unstable();
        ends.dedup();
        TokenTable { bytes, offsets, ends, longest_bytes }
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The token's bytes; none for an id outside the vocabulary.
    #[inline]
    pub fn bytes(&self, token: TokenId) -> &[u8] {
        let token = token as usize;
        match (self.offsets.get(token), self.offsets.get(token + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// Whether the token ends a text.
    #[inline]
    pub fn is_end(&self, token: TokenId) -> bool {
        self.ends.contains(&token)
    }

    /// The end-of-text tokens, ascending.
    pub fn ends(&self) -> &[TokenId] {
        &self.ends
    }

    /// Length of the longest token, in bytes.
    pub fn longest_bytes(&self) -> usize {
        self.longest_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_gives_its_bytes_and_an_unknown_one_none() {
        let table = TokenTable::new([&b"a"[..], b"", b"\xc3\xa9t"], &[1, 1]);
        assert_eq!(table.len(), 3);
        assert_eq!(table.bytes(0), b"a");
        assert_eq!(table.bytes(1), b"");
        assert_eq!(table.bytes(2), b"\xc3\xa9t");
        assert_eq!(table.bytes(3), b"");
        assert_eq!(table.bytes(TokenId::MAX), b"");
        assert_eq!(table.longest_bytes(), 3);
        assert_eq!(table.ends(), [1]);
        assert!(table.is_end(1) && !table.is_end(0) && !table.is_end(9));
    }
}
