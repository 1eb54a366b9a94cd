//! TOKENS: a stream's output, read without copies and written straight into the send buffer.

use super::HEADER_BYTES;
use super::bytes::{Reader, put_f32, put_u16, put_u32};
use super::frame::{FrameType, Header, end_frame};
use super::request::TokenIds;
use crate::request::TokenId;

/// Output of one stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokensFrame<'a> {
    /// The tokens.
    pub ids: TokenIds<'a>,
    /// Their text: whole characters. May lag behind the ids, by half a character or by what might
    /// be the start of a stop string.
    pub text: &'a str,
    /// One entry for each id, or none.
    pub logprobs: LogprobList<'a>,
}

/// A token's log-probability, and those of its likeliest alternatives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogprobEntry<'a> {
    /// Natural logarithm of the chosen token's probability.
    pub logprob: f32,
    top: &'a [[u8; 8]],
}

impl<'a> LogprobEntry<'a> {
    /// Alternatives, likeliest first.
    pub fn top(self) -> impl ExactSizeIterator<Item = (TokenId, f32)> + 'a {
        self.top.iter().map(|pair| {
            let [a, b, c, d, e, f, g, h] = *pair;
            (u32::from_le_bytes([a, b, c, d]), f32::from_le_bytes([e, f, g, h]))
        })
    }
}

/// Log-probabilities in their wire form, checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogprobList<'a> {
    count: usize,
    bytes: &'a [u8],
}

impl<'a> LogprobList<'a> {
    fn read(reader: &mut Reader<'a>, count: usize) -> Option<LogprobList<'a>> {
        let start = *reader;
        for _ in 0..count {
            read_logprob(reader)?;
        }
        let bytes = { start }.take(start.rest_bytes() - reader.rest_bytes())?;
        Some(LogprobList { count, bytes })
    }

    /// How many.
    pub fn len(self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The entries, in the order of the ids.
    pub fn iter(self) -> impl Iterator<Item = LogprobEntry<'a>> {
        let mut reader = Reader::new(self.bytes);
        (0..self.count).map_while(move |_| read_logprob(&mut reader))
    }
}

fn read_logprob<'a>(reader: &mut Reader<'a>) -> Option<LogprobEntry<'a>> {
    let logprob = reader.f32()?;
    let count = usize::from(reader.u16()?);
    reader.u16()?;
    let top = reader.take(count * 8)?.as_chunks::<8>().0;
    Some(LogprobEntry { logprob, top })
}

/// Writes a TOKENS frame piece by piece, straight into the send buffer.
pub struct TokensWriter<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
    logprob_count: u16,
}

impl<'a> TokensWriter<'a> {
    /// Begins a frame with its ids (at most 65,535) and text.
    pub fn begin(
        out: &'a mut Vec<u8>,
        stream: u32,
        ids: impl ExactSizeIterator<Item = TokenId>,
        text: &str,
    ) -> TokensWriter<'a> {
        let start = out.len();
        Header { payload_bytes: 0, kind: FrameType::Tokens, stream }.encode(out);
        put_u16(out, u16::try_from(ids.len()).expect("a frame's tokens fit its count"));
        put_u16(out, 0);
        put_u32(out, text.len() as u32);
        for id in ids {
            put_u32(out, id);
        }
        out.extend_from_slice(text.as_bytes());
        TokensWriter { out, start, logprob_count: 0 }
    }

    /// Adds the log-probability of the next id.
    pub fn logprob(&mut self, logprob: f32, top: impl ExactSizeIterator<Item = (TokenId, f32)>) {
        put_f32(self.out, logprob);
        put_u16(self.out, u16::try_from(top.len()).expect("at most 20 alternatives"));
        put_u16(self.out, 0);
        for (id, logprob) in top {
            put_u32(self.out, id);
            put_f32(self.out, logprob);
        }
        self.logprob_count += 1;
    }

    /// Completes the frame.
    pub fn end(self) {
        let at = self.start + HEADER_BYTES + 2;
        self.out[at..at + 2].copy_from_slice(&self.logprob_count.to_le_bytes());
        end_frame(self.out, self.start);
    }
}

pub(super) fn decode_tokens<'a>(reader: &mut Reader<'a>) -> Option<TokensFrame<'a>> {
    let count = usize::from(reader.u16()?);
    let logprob_count = usize::from(reader.u16()?);
    let text_bytes = reader.u32()? as usize;
    if logprob_count != 0 && logprob_count != count {
        return None;
    }
    let ids = TokenIds::new(reader.take(count * 4)?)?;
    let text = std::str::from_utf8(reader.take(text_bytes)?).ok()?;
    let logprobs = LogprobList::read(reader, logprob_count)?;
    Some(TokensFrame { ids, text, logprobs })
}
