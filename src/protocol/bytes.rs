//! Reading little-endian fields from a slice, and appending them to a buffer.

/// A cursor over a slice. Every read either fits or returns `None`; nothing is allocated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    pub(super) fn rest_bytes(&self) -> usize {
        self.rest.len()
    }

    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*head)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn f32(&mut self) -> Option<f32> {
        self.array().map(f32::from_le_bytes)
    }

    /// Text behind a length of one byte.
    pub(super) fn text_u8(&mut self) -> Option<&'a str> {
        let count = self.u8()?;
        std::str::from_utf8(self.take(usize::from(count))?).ok()
    }

    /// Text behind a length of two bytes.
    pub(super) fn text_u16(&mut self) -> Option<&'a str> {
        let count = self.u16()?;
        std::str::from_utf8(self.take(usize::from(count))?).ok()
    }

    /// `value`, if all bytes were read.
    pub(super) fn finish<T>(self, value: T) -> Option<T> {
        self.rest.is_empty().then_some(value)
    }
}

pub(super) fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_f32(out: &mut Vec<u8>, value: f32) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Text behind a length of one byte; what does not fit is cut at a character's end.
pub(super) fn put_text_u8(out: &mut Vec<u8>, text: &str) {
    let text = cut(text, usize::from(u8::MAX));
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

/// Text behind a length of two bytes; what exceeds `bytes_max` is cut at a character's end.
pub(super) fn put_text_u16(out: &mut Vec<u8>, text: &str, bytes_max: usize) {
    let text = cut(text, bytes_max.min(usize::from(u16::MAX)));
    put_u16(out, text.len() as u16);
    out.extend_from_slice(text.as_bytes());
}

fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_past_the_end_returns_none_and_keeps_the_rest() {
        let mut reader = Reader::new(&[1, 2, 3]);
        assert_eq!(reader.u32(), None);
        assert_eq!(reader.u16(), Some(0x0201));
        assert_eq!(reader.finish(()), None);
        assert_eq!(reader.u8(), Some(3));
        assert_eq!(reader.finish(7), Some(7));
    }

    #[test]
    fn text_that_is_too_long_is_cut_at_a_character() {
        let mut out = Vec::new();
        put_text_u8(&mut out, &"é".repeat(200));
        assert_eq!(out.len(), 1 + 254);
        assert_eq!(Reader::new(&out).text_u8().map(str::len), Some(254));
        out.clear();
        put_text_u16(&mut out, "aé", 2);
        assert_eq!(out, [1, 0, b'a']);
    }
}
