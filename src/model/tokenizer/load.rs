//! A tokenizer from a model's metadata.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::models::bpe::{BPE, Vocab};

use super::bytes;
use super::split::Scheme;
use super::table::{TokenKind, TokenTable};
use super::{Alphabet, Markers, Tokenizer, TokenizerError};
use crate::model::gguf::{Array, Gguf, GgufError, required, shown};
use crate::request::TokenId;

/// How SentencePiece writes a space.
pub(super) const SPACE: char = '▁';

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";

/// Longest vocabulary entry: the longest in use are runs of some hundred spaces.
const TOKEN_BYTES_MAX: usize = 1024;
/// Ways to put an entry of a SentencePiece vocabulary together, on average: about 2 in those of
/// Llama and Gemma. Without a bound, a small file could ask for gigabytes of them.
const WAYS_PER_PIECE_MAX: usize = 8;
/// Control and user-defined tokens are searched for with an automaton whose memory is some 50
/// times their text; a few hundred of them, some KB, is usual.
const MARKER_BYTES_MAX: usize = 1 << 20;
/// Words whose tokens the crate remembers, per thread; it never forgets one. A language's 4,000
/// most frequent words are most of its running text and take 1 MB. A client that sends odd words
/// of 255 bytes can make it 33 MB, and no more.
const WORDS_REMEMBERED: usize = 4_096;

/// Control tokens that end an answer wherever they are in a vocabulary: files often name one of
/// them where the model uses several.
const ENDS_OF_TEXT: &[&str] = &[
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
    "<|eot|>",
    "<EOT>",
];

/// Whether texts begin with the beginning-of-text token: as the file says, else as the
/// tokenizer's family does.
pub(crate) fn adds_bos(gguf: &Gguf) -> Result<bool, GgufError> {
    if let Some(adds) = gguf.boolean("tokenizer.ggml.add_bos_token")? {
        return Ok(adds);
    }
    let is_llama_3 = |pre: &str| Scheme::from_name(pre) == Some(Scheme::Llama3);
    Ok(gguf.text(MODEL)? == Some("llama")
        || gguf.text("tokenizer.ggml.pre")?.is_some_and(is_llama_3))
}

/// The vocabulary as the file has it.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<TokenKind>,
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf) -> Result<Vocabulary<'a>, GgufError> {
        let array = required(TOKENS, gguf.array(TOKENS)?)?;
        let mut tokens = Vec::new();
        for (id, token) in array.strings().enumerate() {
            let text = std::str::from_utf8(token).ok().filter(|text| text.len() <= TOKEN_BYTES_MAX);
            tokens.push(text.ok_or_else(|| {
                let problem = format!("must be UTF-8 of at most {TOKEN_BYTES_MAX} bytes");
                GgufError::malformed(format!("token {id} of {TOKENS}"), problem)
            })?);
        }
        if tokens.is_empty() || tokens.len() >= u32::MAX as usize {
            let allowed = "at least one string";
            return Err(GgufError::out_of_range(TOKENS, tokens.len(), allowed));
        }
        let kinds = match gguf.array(TYPES)? {
            None => vec![TokenKind::Normal; tokens.len()],
            Some(types) => Vocabulary::kinds(types, tokens.len())?,
        };
        Ok(Vocabulary { tokens, kinds })
    }

    fn kinds(types: Array<'_>, len: usize) -> Result<Vec<TokenKind>, GgufError> {
        let kinds: Option<Vec<TokenKind>> = types
            .scalars()
            .map(|value| value.as_unsigned().and_then(TokenKind::from_number))
            .collect();
        kinds.filter(|kinds| kinds.len() == len).ok_or_else(|| {
            let problem = format!("must be {len} integers from 1 to 6, one a token");
            GgufError::malformed(TYPES, problem)
        })
    }

    fn iter(&self) -> impl Iterator<Item = (TokenId, &'a str, TokenKind)> + '_ {
        let entries = self.tokens.iter().zip(&self.kinds);
        entries.enumerate().map(|(id, (&token, &kind))| (id as TokenId, token, kind))
    }

    /// The entries that merging may use: not control tokens, so that no text can become one.
    fn mergeable(&self) -> Vocab {
        self.iter()
            .filter(|(_, token, kind)| {
                let is_text = matches!(kind, TokenKind::Normal | TokenKind::Byte);
                is_text && !token.is_empty()
            })
            .map(|(id, token, _)| (token.to_owned(), id))
            .collect()
    }

    fn markers(&self, wanted: impl Fn(TokenKind) -> bool) -> Result<Option<Markers>, GgufError> {
        let (mut texts, mut tokens) = (Vec::new(), Vec::new());
        for (id, token, kind) in self.iter() {
            if wanted(kind) && !token.is_empty() {
                texts.push(token);
                tokens.push(id);
            }
        }
        if texts.is_empty() {
            return Ok(None);
        }
        let bytes = texts.iter().map(|text| text.len() as u64).sum();
        if bytes > MARKER_BYTES_MAX as u64 {
            let what = "the length of all control and user-defined tokens together".into();
            return Err(GgufError::TooLarge { what, found: bytes, max: MARKER_BYTES_MAX as u64 });
        }
        let search = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts);
        let search = search.map_err(|error| {
            GgufError::malformed("the control tokens", format!("cannot be searched for: {error}"))
        })?;
        Ok(Some(Markers { search, tokens }))
    }

    fn table(&self, alphabet: Alphabet, ends_of_text: Vec<TokenId>) -> TokenTable {
        let mut table = TokenTable::default();
        for (_, token, kind) in self.iter() {
            let is_literal = !matches!(kind, TokenKind::Normal | TokenKind::Byte);
            let text = match alphabet {
                _ if is_literal => None,
                Alphabet::Bytes => bytes::from_token(token),
                Alphabet::Characters { .. } => Some(match byte_of(token) {
                    Some(byte) if kind == TokenKind::Byte => vec![byte],
                    _ => token.replace(SPACE, " ").into_bytes(),
                }),
            };
            table.push(&text.unwrap_or_else(|| token.as_bytes().to_vec()), kind);
        }
        table.set_ends_of_text(ends_of_text);
        table
    }
}

/// The byte that `<0xNN>` writes.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

impl Tokenizer {
    /// Builds the tokenizer that the metadata describes.
    ///
    /// # Errors
    /// When the metadata has none, has an unsupported one, or contradicts itself.
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer, TokenizerError> {
        let vocabulary = Vocabulary::read(gguf)?;
        let model = required(MODEL, gguf.text(MODEL)?)?;
        let (alphabet, scheme, bpe) = match model {
            "gpt2" => byte_level(gguf, &vocabulary)?,
            "llama" => sentence_pieces(gguf, &vocabulary)?,
            other => {
                return Err(GgufError::unsupported(
                    format!("tokenizer {}", shown(other)),
                    "\"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece BPE) are",
                )
                .into());
            }
        };
        let token = |name: &str| token_id(gguf, name, vocabulary.tokens.len());
        let named = [token("eos")?, token("eot")?, token("eom")?];
        let known = vocabulary
            .iter()
            .filter(|(_, token, kind)| kind.is_control() && ENDS_OF_TEXT.contains(token))
            .map(|(id, ..)| id);
        let ends_of_text = named.into_iter().flatten().chain(known).collect();
        Ok(Tokenizer {
            bpe,
            alphabet,
            scheme,
            user_defined: vocabulary.markers(|kind| kind == TokenKind::UserDefined)?,
            markup: vocabulary
                .markers(|kind| kind.is_control() || kind == TokenKind::UserDefined)?,
            controls_only: vocabulary.markers(TokenKind::is_control)?,
            table: Arc::new(vocabulary.table(alphabet, ends_of_text)),
            bos: token("bos")?,
            adds_bos: adds_bos(gguf)?,
        })
    }
}

fn token_id(gguf: &Gguf, name: &str, vocab: usize) -> Result<Option<TokenId>, GgufError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    crate::model::config::token_id(gguf, &key, vocab)
}

/// GPT-2's family: merges in order of rank, over bytes.
fn byte_level(
    gguf: &Gguf,
    vocabulary: &Vocabulary<'_>,
) -> Result<(Alphabet, Scheme, BPE), TokenizerError> {
    let key = "tokenizer.ggml.pre";
    let pre = required(key, gguf.text(key)?)?;
    let scheme = Scheme::from_name(pre).ok_or_else(|| {
        GgufError::unsupported(format!("pre-tokenizer {}", shown(pre)), Scheme::NAMES)
    })?;
    let vocab = vocabulary.mergeable();
    let array = required(MERGES, gguf.array(MERGES)?)?;
    let mut merges = Vec::new();
    for (rank, merge) in array.strings().enumerate() {
        let pair = std::str::from_utf8(merge).ok().and_then(|merge| {
            // The first symbol may be a space's own character but never a space.
            merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty())
        });
        let Some((left, right)) = pair else {
            let problem = "must be two symbols with a space between";
            return Err(GgufError::malformed(format!("merge {rank} of {MERGES}"), problem).into());
        };
        // A merge that needs, or makes, a control token is dropped: see `mergeable`.
        let known = |symbol: &str| vocab.contains_key(symbol);
        if known(left) && known(right) && known(&format!("{left}{right}")) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    if merges.is_empty() && !array.is_empty() {
        return Err(TokenizerError::Merges("none of them is in the vocabulary".into()));
    }
    // Llama 3's words that are in the vocabulary are not merged from their bytes.
    let takes_whole_words = scheme == Scheme::Llama3;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(takes_whole_words)
        .cache_capacity(WORDS_REMEMBERED)
        .build()
        .map_err(|error| TokenizerError::Merges(error.to_string()))?;
    Ok((Alphabet::Bytes, scheme, bpe))
}

/// SentencePiece's family: every way to put a vocabulary entry together is a merge, and the
/// entry's score is its rank.
fn sentence_pieces(
    gguf: &Gguf,
    vocabulary: &Vocabulary<'_>,
) -> Result<(Alphabet, Scheme, BPE), TokenizerError> {
    let array = required(SCORES, gguf.array(SCORES)?)?;
    let scores: Vec<f64> =
        array.scalars().filter_map(|value| value.as_float()).filter(|s| s.is_finite()).collect();
    if scores.len() != vocabulary.tokens.len() {
        let problem = format!("must be {} numbers, one a token", vocabulary.tokens.len());
        return Err(GgufError::malformed(SCORES, problem).into());
    }
    let vocab = vocabulary.mergeable();
    // Text is cut at spaces, which is exact only when no piece reaches over one.
    let reaches_over = |piece: &str| piece.trim_start_matches(SPACE).contains(SPACE);
    let normal = || vocabulary.iter().filter(|&(_, _, kind)| kind == TokenKind::Normal);
    if let Some((_, piece, _)) = normal().find(|(_, piece, _)| reaches_over(piece)) {
        return Err(GgufError::unsupported(
            format!(
                "a SentencePiece vocabulary with {}, which reaches over a space,",
                shown(piece)
            ),
            "pieces with spaces at their beginning only are",
        )
        .into());
    }
    let mut pieces: Vec<(TokenId, &str)> = normal().map(|(id, piece, _)| (id, piece)).collect();
    pieces.sort_by(|a, b| scores[b.0 as usize].total_cmp(&scores[a.0 as usize]));
    let mut merges = Vec::new();
    for (_, piece) in pieces {
        let splits = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        let mut splits: Vec<(TokenId, TokenId, &str, &str)> = splits
            .filter_map(|(left, right)| Some((*vocab.get(left)?, *vocab.get(right)?, left, right)))
            .collect();
        // Of several ways to make a piece, the one of lower ids goes first, as in Hugging Face's
        // conversion of such vocabularies.
        splits.sort_unstable();
        let splits = splits.into_iter();
        merges.extend(splits.map(|(_, _, left, right)| (left.to_owned(), right.to_owned())));
        let merges_max = vocabulary.tokens.len() * WAYS_PER_PIECE_MAX;
        if merges.len() > merges_max {
            let what = "the number of ways to put the vocabulary's pieces together".into();
            let (found, max) = (merges.len() as u64, merges_max as u64);
            return Err(GgufError::TooLarge { what, found, max }.into());
        }
    }
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .byte_fallback(true)
        .cache_capacity(WORDS_REMEMBERED)
        .build()
        .map_err(|error| TokenizerError::Merges(error.to_string()))?;
    let add_space = gguf.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    Ok((Alphabet::Characters { add_space }, Scheme::Spaces, bpe))
}
