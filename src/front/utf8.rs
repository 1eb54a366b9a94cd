//! Puts a stream's text together: a token may end in the middle of a character, a frame may not.

/// Bytes of a character that is not complete yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Utf8Assembler {
    /// A valid beginning of a character: 1 to 3 bytes when there is one.
    partial: [u8; 3],
    /// How many bytes of `partial` count. Range: 0 to 3.
    len: u8,
}

impl Utf8Assembler {
    /// Appends the characters that `bytes` completes to `out`; bytes that can never become one
    /// are replaced with U+FFFD. What may still become one is kept.
    pub(super) fn feed(&mut self, bytes: &[u8], out: &mut String) {
        let mut rest = bytes;
        while self.len > 0 {
            let Some((&byte, after)) = rest.split_first() else { return };
            let have = usize::from(self.len);
            let mut joined = [0; 4];
            joined[..have].copy_from_slice(&self.partial[..have]);
            joined[have] = byte;
            let joined = &joined[..=have];
            match std::str::from_utf8(joined) {
                Ok(text) => {
                    out.push_str(text);
                    self.len = 0;
                    rest = after;
                }
                // Four bytes are a character or an error: a partial one has at most three.
                Err(error) if error.error_len().is_none() => {
                    self.partial[have] = byte;
                    self.len += 1;
                    rest = after;
                }
                Err(_) => {
                    // What was kept was a beginning without an end; `byte` starts anew.
                    out.push(char::REPLACEMENT_CHARACTER);
                    self.len = 0;
                }
            }
        }
        for chunk in rest.utf8_chunks() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            // Only the very end can be a beginning; an error before it is complete by itself.
            let at_end = std::ptr::eq(invalid.as_ptr_range().end, rest.as_ptr_range().end);
            let may_grow =
                std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if at_end && may_grow {
                self.partial[..invalid.len()].copy_from_slice(invalid);
                self.len = invalid.len() as u8;
            } else {
                out.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }

    /// The text is over: half a character becomes U+FFFD.
    pub(super) fn finish(&mut self, out: &mut String) {
        if self.len > 0 {
            out.push(char::REPLACEMENT_CHARACTER);
            self.len = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn assemble<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
        let mut assembler = Utf8Assembler::default();
        let mut out = String::new();
        for part in parts {
            assembler.feed(part, &mut out);
        }
        assembler.finish(&mut out);
        out
    }

    #[test]
    fn a_character_comes_out_whole_when_its_last_byte_comes_in() {
        let mut assembler = Utf8Assembler::default();
        let mut out = String::new();
        for (byte, so_far) in "é🦀".bytes().zip(["", "é", "é", "é", "é", "é🦀"]) {
            assembler.feed(&[byte], &mut out);
            assert_eq!(out, so_far);
        }
    }

    #[test]
    fn a_beginning_without_an_end_is_replaced_once() {
        assert_eq!(assemble([&b"a\xf0\x9f"[..], b"b"]), "a\u{fffd}b");
        assert_eq!(assemble([&b"a\xf0\x9f\xa6"[..]]), "a\u{fffd}");
        assert_eq!(assemble([&b"\xe2"[..], b"\xe2\x82\xac"]), "\u{fffd}€");
    }

    proptest! {
        #[test]
        fn cut_anywhere_it_equals_the_lossy_decoding_of_the_whole(
            bytes in prop::collection::vec(
                prop_oneof![
                    any::<u8>(), Just(0xf0), Just(0x9f), Just(0xa6), Just(0x80), Just(0xe2),
                ],
                0..40,
            ),
            size in 1..6usize,
        ) {
            prop_assert_eq!(assemble(bytes.chunks(size)), String::from_utf8_lossy(&bytes));
        }
    }
}
