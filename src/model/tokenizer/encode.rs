//! Encoding in slices: a long prompt is tokenised a little at a time, so that a front core never
//! stops reading and writing for it.

use std::ops::Range;

use super::Tokenizer;
use super::split::WORD_BYTES_MAX;
use crate::request::TokenId;

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// A token as it is.
    Token(TokenId),
    /// Text; whatever it spells, it never becomes a control token.
    Text(String),
}

/// A prompt that is not tokenised yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    segments: Vec<Segment>,
}

impl Prompt {
    /// A prompt without anything.
    pub fn new() -> Prompt {
        Prompt::default()
    }

    /// Cuts a template's output at its control tokens; `lift` appends a part between two of them
    /// to a text, in its final form.
    pub(crate) fn of(
        output: &str,
        tokenizer: &Tokenizer,
        lift: impl Fn(&str, &mut String),
    ) -> Prompt {
        let mut prompt = Prompt::new();
        let mut done = 0;
        let end = (output.len()..output.len(), None);
        let controls = tokenizer.controls(output).map(|(range, token)| (range, Some(token)));
        for (range, token) in controls.chain([end]) {
            let mut text = String::with_capacity(range.start - done);
            lift(&output[done..range.start], &mut text);
            if !text.is_empty() {
                prompt.segments.push(Segment::Text(text));
            }
            prompt.segments.extend(token.map(Segment::Token));
            done = range.end;
        }
        prompt
    }

    /// Appends text. Neighbouring texts are tokenised as one.
    pub fn push_text(&mut self, text: &str) {
        match self.segments.last_mut() {
            _ if text.is_empty() => {}
            Some(Segment::Text(last)) => last.push_str(text),
            _ => self.segments.push(Segment::Text(text.to_owned())),
        }
    }

    /// Appends a token.
    pub fn push_token(&mut self, token: TokenId) {
        self.segments.push(Segment::Token(token));
    }

    /// Puts `token` before everything else, unless it is there already.
    pub(crate) fn begin_with(&mut self, token: TokenId) {
        if self.segments.first() != Some(&Segment::Token(token)) {
            self.segments.insert(0, Segment::Token(token));
        }
    }

    /// Its pieces, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The tokens in it that are given as such, in order.
    pub fn tokens(&self) -> impl Iterator<Item = TokenId> + '_ {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Token(token) => Some(*token),
            Segment::Text(_) => None,
        })
    }

    /// More tokens than this it cannot become: one a byte of text, one a token.
    pub fn tokens_bound(&self) -> usize {
        let bound = |segment: &Segment| match segment {
            Segment::Token(_) => 1,
            // SentencePiece may put a space before a text.
            Segment::Text(text) => text.len() + 1,
        };
        self.segments.iter().map(bound).sum()
    }
}

/// Where an encoding stands after a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do.
    More,
    /// All tokens are there.
    Done,
    /// The prompt has more tokens than allowed; the rest was not looked at.
    TooLong,
}

/// A prompt on its way to tokens.
///
/// The state is a position between two words, and a word depends on nothing before it: however
/// the work is sliced, the tokens are the same.
#[derive(Debug)]
pub struct Encoder {
    prompt: Prompt,
    tokens: Vec<TokenId>,
    tokens_max: usize,
    segment: usize,
    /// Bytes of the current text that are done.
    position: usize,
    /// The next text in the current segment that is one token whatever surrounds it; `None` when
    /// it has not been looked for.
    marker: Option<Marker>,
    /// A word in the form that the merges are written in; kept for its memory.
    scratch: String,
}

#[derive(Clone, Debug)]
enum Marker {
    At(Range<usize>, TokenId),
    NoMore,
}

impl Encoder {
    /// Starts on `prompt`, which may become at most `tokens_max` tokens.
    pub fn new(prompt: Prompt, tokens_max: usize) -> Encoder {
        Encoder {
            prompt,
            tokens: Vec::new(),
            tokens_max,
            segment: 0,
            position: 0,
            marker: None,
            scratch: String::new(),
        }
    }

    /// Works on about `bytes` more bytes of text: it stops after the first word that reaches
    /// them, so at most [`WORD_BYTES_MAX`] more are done.
    pub fn advance(&mut self, tokenizer: &Tokenizer, bytes: usize) -> Progress {
        let mut left = bytes.max(1);
        while let Some(segment) = self.prompt.segments.get(self.segment) {
            if self.tokens.len() > self.tokens_max {
                return Progress::TooLong;
            }
            let text = match segment {
                Segment::Token(token) => {
                    self.tokens.push(*token);
                    self.segment += 1;
                    continue;
                }
                Segment::Text(text) if self.position < text.len() => text,
                Segment::Text(_) => {
                    (self.segment, self.position, self.marker) = (self.segment + 1, 0, None);
                    continue;
                }
            };
            if left == 0 {
                return Progress::More;
            }
            let marker = self.marker.get_or_insert_with(|| {
                match tokenizer.find_user_defined(text, self.position) {
                    Some((range, token)) => Marker::At(range, token),
                    None => Marker::NoMore,
                }
            });
            let before = self.position;
            let end = match marker {
                Marker::At(range, token) if range.start == self.position => {
                    self.tokens.push(*token);
                    self.position = range.end;
                    self.marker = None;
                    left = left.saturating_sub(self.position - before);
                    continue;
                }
                Marker::At(range, _) => range.start,
                Marker::NoMore => text.len(),
            };
            let starts_text = self.position == 0;
            let rest = &text[self.position..end];
            let word = tokenizer.word(rest, starts_text, &mut self.scratch, &mut self.tokens);
            debug_assert!(word > 0 && word <= WORD_BYTES_MAX);
            self.position += word;
            left = left.saturating_sub(word);
        }
        if self.tokens.len() > self.tokens_max { Progress::TooLong } else { Progress::Done }
    }

    /// The tokens so far.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// The tokens; all of them after [`Progress::Done`].
    pub fn into_tokens(self) -> Vec<TokenId> {
        self.tokens
    }
}
