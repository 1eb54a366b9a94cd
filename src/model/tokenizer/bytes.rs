//! GPT-2's printable bytes: vocabularies are text files, so each byte is written as a character
//! that prints.
//!
//! Bytes that print in Latin-1 stand for themselves; the others, in order, are U+0100 and on.

/// Whether a byte stands for itself.
const fn prints(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

const CHARS: [char; 256] = {
    let mut chars = ['\0'; 256];
    let mut next = 0x100u32;
    let mut byte = 0usize;
    while byte < 256 {
        if prints(byte as u8) {
            chars[byte] = byte as u8 as char;
        } else {
            chars[byte] = match char::from_u32(next) {
                Some(c) => c,
                None => unreachable!(),
            };
            next += 1;
        }
        byte += 1;
    }
    chars
};

/// The character that a byte is written as.
pub(super) fn to_char(byte: u8) -> char {
    CHARS[usize::from(byte)]
}

/// The byte that a character stands for.
fn to_byte(c: char) -> Option<u8> {
    let code = c as u32;
    match u8::try_from(code) {
        Ok(byte) => prints(byte).then_some(byte),
        // 68 bytes do not print; they are few enough to look through.
        Err(_) => CHARS.iter().position(|&other| other == c).map(|at| at as u8),
    }
}

/// The bytes of a token of such a vocabulary; `None` when it is not written in the table's
/// characters.
pub(super) fn from_token(token: &str) -> Option<Vec<u8>> {
    token.chars().map(to_byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        for byte in 0..=255 {
            assert_eq!(to_byte(to_char(byte)), Some(byte));
        }
        assert_eq!(to_char(b' '), 'Ġ');
        assert_eq!(to_char(b'\n'), 'Ċ');
        assert_eq!(to_char(0xad), 'Ń');
        assert_eq!(from_token("Ġcaf\u{c3}\u{a9}"), Some(" café".as_bytes().to_vec()));
        assert_eq!(from_token("漢"), None);
        assert_eq!(from_token(" "), None);
    }
}
