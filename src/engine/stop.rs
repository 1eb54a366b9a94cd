//! Stop strings over a stream of bytes.
//!
//! A token may hold half a character, the end of one stop string and the start of another, so
//! matching is on bytes and one byte at a time. Text that might be the start of a stop string is
//! held back; it is released as soon as it cannot be one.
//!
//! Each stop string has a Knuth–Morris–Pratt automaton whose state is one byte: how much of it the
//! text's end matches. The automaton's fallback table is not kept: a sequence would need
//! 16 × 256 bytes, and most have no stop string at all. It is computed when a byte of a token
//! first falls back, which costs at most 256 steps per stop string and token.

use crate::request::{STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX};

/// How far the text's end matches each stop string of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StopMatcher {
    /// Length of the longest proper prefix of stop string `i` that the text ends with. A full
    /// match ends the matching, so this is below 256.
    matched: [u8; STOP_STRINGS_MAX],
}

/// Working memory for [`StopMatcher::feed`]: entry `k` is the length of the longest proper border
/// (both prefix and suffix) of the stop string's first `k + 1` bytes.
#[derive(Debug)]
pub struct Borders([u8; STOP_STRING_BYTES_MAX]);

impl Default for Borders {
    fn default() -> Borders {
        Borders([0; STOP_STRING_BYTES_MAX])
    }
}

impl Borders {
    fn compute(&mut self, pattern: &[u8]) {
        self.0[0] = 0;
        let mut border = 0;
        for end in 1..pattern.len() {
            while border > 0 && pattern[end] != pattern[border] {
                border = usize::from(self.0[border - 1]);
            }
            border += usize::from(pattern[end] == pattern[border]);
            self.0[end] = border as u8;
        }
    }
}

/// Where a stop string was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopHit {
    /// Bytes of the fed piece up to and with the stop string's last byte.
    pub consumed: usize,
    /// Length of the stop string: the text ends that many bytes before `consumed`.
    pub length: usize,
}

impl StopMatcher {
    /// Takes in the next bytes of the text. The first stop string to be complete wins; of several
    /// that are complete with the same byte, the longest. After a hit, matching is over.
    pub fn feed(
        &mut self,
        stops: &[Box<[u8]>],
        bytes: &[u8],
        borders: &mut Borders,
    ) -> Option<StopHit> {
        debug_assert!(stops.len() <= STOP_STRINGS_MAX);
        let mut first: Option<StopHit> = None;
        for (pattern, matched) in stops.iter().zip(&mut self.matched) {
            let within = first.map_or(bytes.len(), |hit| hit.consumed);
            if let Some(consumed) = advance(pattern, matched, &bytes[..within], borders) {
                let hit = StopHit { consumed, length: pattern.len() };
                if first.is_none_or(|old| consumed < old.consumed || hit.length > old.length) {
                    first = Some(hit);
                }
            }
        }
        first
    }

    /// How many bytes at the end of the text might be the start of a stop string.
    pub fn held_bytes(&self) -> usize {
        self.matched.iter().copied().max().map_or(0, usize::from)
    }
}

/// Runs one automaton over `bytes`; returns how many it took to complete the pattern.
fn advance(pattern: &[u8], matched: &mut u8, bytes: &[u8], borders: &mut Borders) -> Option<usize> {
    let mut state = usize::from(*matched);
    let mut computed = false;
    for (index, &byte) in bytes.iter().enumerate() {
        while state > 0 && pattern[state] != byte {
            if !computed {
                borders.compute(pattern);
                computed = true;
            }
            state = usize::from(borders.0[state - 1]);
        }
        state += usize::from(pattern[state] == byte);
        if state == pattern.len() {
            return Some(index + 1);
        }
    }
    *matched = state as u8;
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn boxed(stops: &[&str]) -> Vec<Box<[u8]>> {
        stops.iter().map(|stop| stop.as_bytes().into()).collect()
    }

    /// Feeds piece by piece; returns the text let out after each piece, and whether it stopped.
    fn stream(stops: &[Box<[u8]>], pieces: &[&[u8]]) -> (Vec<Vec<u8>>, bool) {
        let mut matcher = StopMatcher::default();
        let mut borders = Borders::default();
        let (mut text, mut released, mut out) = (Vec::new(), 0, Vec::new());
        for piece in pieces {
            let before = text.len();
            text.extend_from_slice(piece);
            let hit = matcher.feed(stops, piece, &mut borders);
            let end = match hit {
                Some(hit) => before + hit.consumed - hit.length,
                None => text.len() - matcher.held_bytes(),
            };
            out.push(text[released..end].to_vec());
            released = end;
            if hit.is_some() {
                return (out, true);
            }
        }
        out.push(text[released..].to_vec());
        (out, false)
    }

    fn concat(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let pieces: Vec<&[u8]> = pieces.iter().map(|piece| piece.as_bytes()).collect();
        let (out, stopped) = stream(&boxed(stops), &pieces);
        (String::from_utf8(out.concat()).unwrap(), stopped)
    }

    #[test]
    fn a_stop_string_ends_the_text_before_it_even_across_tokens() {
        assert_eq!(concat(&["END"], &["abc EN", "D more"]), ("abc ".into(), true));
        assert_eq!(concat(&["END"], &["abc E", "NX", "E"]), ("abc ENXE".into(), false));
        assert_eq!(concat(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
    }

    #[test]
    fn of_stop_strings_that_end_together_the_longest_counts() {
        assert_eq!(concat(&["b", "aab"], &["xaab"]), ("x".into(), true));
        assert_eq!(concat(&["aab", "b"], &["xaab"]), ("x".into(), true));
        assert_eq!(concat(&["abcd", "bc"], &["xabcd"]), ("xa".into(), true));
    }

    #[test]
    fn what_cannot_be_a_stop_string_any_more_is_let_out_at_once() {
        let (out, stopped) = stream(&boxed(&["\n\nUser:"]), &[b"Hi\n", b"\nU", b"ps", b"."]);
        let out: Vec<&[u8]> = out.iter().map(Vec::as_slice).collect();
        assert_eq!(out, [&b"Hi"[..], b"", b"\n\nUps", b".", b""]);
        assert!(!stopped);
    }

    #[test]
    fn the_longest_allowed_stop_string_fits_the_state() {
        let pattern = "a".repeat(STOP_STRING_BYTES_MAX - 1) + "b";
        let text = "a".repeat(1000) + "b";
        assert_eq!(concat(&[&pattern], &[&text]), ("a".repeat(1000 - 255), true));
    }

    /// The text's end and whether it was a stop string, by looking at every position anew.
    fn naive(stops: &[Box<[u8]>], text: &[u8]) -> (usize, bool) {
        for end in 1..=text.len() {
            let longest = stops.iter().filter(|stop| text[..end].ends_with(stop)).map(|s| s.len());
            if let Some(longest) = longest.max() {
                return (end - longest, true);
            }
        }
        (text.len(), false)
    }

    proptest! {
        #[test]
        fn the_matcher_agrees_with_a_naive_one(
            stops in prop::collection::vec(prop::collection::vec(0_u8..3, 1..6), 0..5),
            pieces in prop::collection::vec(prop::collection::vec(0_u8..3, 0..5), 0..20),
        ) {
            let stops: Vec<Box<[u8]>> = stops.into_iter().map(Vec::into_boxed_slice).collect();
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let text = pieces.concat();
            let (end, stops_at) = naive(&stops, &text);
            let (out, stopped) = stream(&stops, &pieces);
            prop_assert_eq!(stopped, stops_at);
            prop_assert_eq!(out.concat(), &text[..end]);
        }

        #[test]
        fn no_more_is_held_back_than_might_be_a_stop_string(
            stops in prop::collection::vec(prop::collection::vec(0_u8..2, 1..6), 1..4),
            text in prop::collection::vec(0_u8..2, 0..40),
        ) {
            let stops: Vec<Box<[u8]>> = stops.into_iter().map(Vec::into_boxed_slice).collect();
            let mut matcher = StopMatcher::default();
            let mut borders = Borders::default();
            for end in 1..=text.len() {
                if matcher.feed(&stops, &text[end - 1..end], &mut borders).is_some() {
                    break;
                }
                let begins = |s: &[u8], start: usize| s.starts_with(&text[start..end]);
                let might_begin = |start: usize| stops.iter().any(|s| begins(s, start));
                let held = (0..end).find(|&start| might_begin(start));
                let held = held.map_or(0, |start| end - start);
                prop_assert_eq!(matcher.held_bytes(), held);
            }
        }
    }
}
