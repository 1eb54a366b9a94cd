//! Whole characters out of a stream of bytes.
//!
//! A token may hold half a character. What leaves the program is text, so the half waits for
//! its other half; what can never become a character leaves as U+FFFD.
//!
//! Core: front cores, one assembler a stream.

/// Bytes of the longest character but one: more never wait.
const WAITING_MAX: usize = 3;

/// Takes bytes in any cuts and gives out whole characters: together exactly what
/// [`String::from_utf8_lossy`] makes of all bytes.
#[derive(Clone, Debug, Default)]
pub struct Utf8Assembler {
    waiting: [u8; WAITING_MAX],
    waiting_len: u8,
}

impl Utf8Assembler {
    /// With nothing waiting.
    pub fn new() -> Utf8Assembler {
        Utf8Assembler::default()
    }

    /// Whether part of a character is waiting for the rest.
    pub fn is_waiting(&self) -> bool {
        self.waiting_len > 0
    }

    /// Appends to `text` every character that `bytes` completes.
    pub fn push(&mut self, mut bytes: &[u8], text: &mut String) {
        while self.is_waiting() {
            let Some((&next, rest)) = bytes.split_first() else {
                return;
            };
            // One byte more than waits fits a buffer of four, the longest character.
            let waiting = usize::from(self.waiting_len);
            let mut joined = [0; WAITING_MAX + 1];
            joined[..waiting].copy_from_slice(&self.waiting[..waiting]);
            joined[waiting] = next;
            match std::str::from_utf8(&joined[..=waiting]) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.waiting_len = 0;
                    bytes = rest;
                }
                Err(error) if error.error_len().is_none() => {
                    self.waiting[waiting] = next;
                    self.waiting_len += 1;
                    bytes = rest;
                }
                // `next` does not continue what waits, which is therefore lost; `next` itself
                // may begin something.
                Err(_) => {
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.waiting_len = 0;
                }
            }
        }
        for chunk in bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let ends_here = invalid.as_ptr_range().end == bytes.as_ptr_range().end;
            let may_continue = std::str::from_utf8(invalid)
                .is_err_and(|error| ends_here && error.error_len().is_none());
            if may_continue {
                self.waiting[..invalid.len()].copy_from_slice(invalid);
                self.waiting_len = invalid.len() as u8;
            } else if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }

    /// Ends the stream: what waits will never be whole.
    pub fn finish(&mut self, text: &mut String) {
        if self.is_waiting() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.waiting_len = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn assembled(cuts: &[&[u8]]) -> (Vec<String>, String) {
        let mut assembler = Utf8Assembler::new();
        let mut parts = Vec::new();
        for cut in cuts {
            let mut part = String::new();
            assembler.push(cut, &mut part);
            parts.push(part);
        }
        let mut end = String::new();
        assembler.finish(&mut end);
        (parts, end)
    }

    #[test]
    fn a_character_cut_into_bytes_comes_out_whole_with_its_last_byte() {
        let bytes = "😀".as_bytes();
        let cuts: Vec<&[u8]> = bytes.chunks(1).collect();
        let (parts, end) = assembled(&cuts);
        assert_eq!(parts, ["", "", "", "😀"]);
        assert_eq!(end, "");
    }

    #[test]
    fn a_half_character_at_the_end_becomes_one_replacement() {
        let (parts, end) = assembled(&[b"ok \xf0\x9f", b"\x98"]);
        assert_eq!((parts[0].as_str(), parts[1].as_str(), end.as_str()), ("ok ", "", "\u{fffd}"));
    }

    #[test]
    fn a_broken_character_does_not_swallow_what_follows() {
        let (parts, _) = assembled(&[b"\xe2\x82", b"abc"]);
        assert_eq!(parts, ["", "\u{fffd}abc"]);
    }

    proptest! {
        #[test]
        fn however_the_bytes_are_cut_the_text_is_that_of_the_whole(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..6),
                    any::<char>().prop_map(|c| c.to_string().into_bytes()),
                    Just(vec![0xf0]), Just(vec![0x9f, 0x98]), Just(vec![0xe2, 0x82]),
                ],
                0..20,
            ),
            cut in 1usize..7,
        ) {
            let bytes: Vec<u8> = pieces.concat();
            let cuts: Vec<&[u8]> = bytes.chunks(cut).collect();
            let (parts, end) = assembled(&cuts);
            prop_assert_eq!(parts.concat() + &end, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
