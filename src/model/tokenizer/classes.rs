//! Letters and numbers as the regular expressions of tokenizers mean them.
//!
//! The standard library's `is_alphabetic` is wider than `\p{L}`, so the classes come from the
//! tables of the regex engine itself.

use std::sync::LazyLock;

/// What a pre-tokenizer sees in a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s`
    Space,
    /// `\p{P}`
    Punctuation,
    /// Anything else: symbols, marks, controls, unassigned.
    Other,
}

/// Characters of the basic plane are looked up directly: 64 KB, of which text touches little.
const DIRECT: usize = 1 << 16;

struct Tables {
    direct: Vec<Class>,
    /// First, last and class of every range above the basic plane, in order.
    ranges: Vec<(u32, u32, Class)>,
}

static TABLES: LazyLock<Tables> = LazyLock::new(|| {
    let mut direct = vec![Class::Other; DIRECT];
    let mut ranges = Vec::new();
    for (pattern, class) in [
        (r"\p{L}", Class::Letter),
        (r"\p{N}", Class::Number),
        (r"\s", Class::Space),
        (r"\p{P}", Class::Punctuation),
    ] {
        for (first, last) in ranges_of(pattern) {
            for code in first..=last.min(DIRECT as u32 - 1) {
                direct[code as usize] = class;
            }
            if last >= DIRECT as u32 {
                ranges.push((first.max(DIRECT as u32), last, class));
            }
        }
    }
    ranges.sort_unstable_by_key(|&(first, ..)| first);
    Tables { direct, ranges }
});

/// The characters that `pattern`, a single class, matches.
fn ranges_of(pattern: &str) -> Vec<(u32, u32)> {
    use regex_syntax::hir::{Class, HirKind};
    match regex_syntax::parse(pattern).as_ref().map(|hir| hir.kind()) {
        Ok(HirKind::Class(Class::Unicode(class))) => {
            class.ranges().iter().map(|range| (range.start().into(), range.end().into())).collect()
        }
        other => unreachable!("{pattern} is a class of characters, not {other:?}"),
    }
}

/// The class of a character.
pub(super) fn class_of(c: char) -> Class {
    let code = c as u32;
    let tables = &*TABLES;
    if let Some(&class) = tables.direct.get(code as usize) {
        return class;
    }
    let after = tables.ranges.partition_point(|&(first, ..)| first <= code);
    match after.checked_sub(1).map(|at| tables.ranges[at]) {
        Some((_, last, class)) if code <= last => class,
        _ => Class::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_those_of_unicode() {
        for (c, class) in [
            ('a', Class::Letter),
            ('漢', Class::Letter),
            ('𝒳', Class::Letter),
            ('ʰ', Class::Letter),
            ('7', Class::Number),
            ('½', Class::Number),
            ('Ⅷ', Class::Number),
            ('𝟘', Class::Number),
            (' ', Class::Space),
            ('\u{3000}', Class::Space),
            ('\u{85}', Class::Space),
            ('!', Class::Punctuation),
            ('。', Class::Punctuation),
            ('+', Class::Other),
            ('\u{301}', Class::Other),
            ('😀', Class::Other),
            ('\0', Class::Other),
        ] {
            assert_eq!(class_of(c), class, "{c:?}");
        }
    }
}
