//! Shadowing: marking characters by moving them into private-use planes, reversibly.

use crate::model::tokenizer::Tokenizer;

/// Characters of the basic plane are shadowed by plane 15, by adding this.
const BASIC: u32 = 0xF_0000;
/// Others, of which a text has few kinds, are numbered from here on, in plane 16.
const OTHERS: u32 = 0x10_0000;
const OTHERS_MAX: usize = 0x1_0000;

/// Whether a character may be a shadow.
pub(super) fn is_shadow(c: char) -> bool {
    c as u32 >= BASIC
}

/// A reversible shadowing; one for each conversation.
#[derive(Default)]
pub(super) struct Shadow {
    /// What the characters of plane 16 stand for, by number.
    others: Vec<char>,
    /// The same, in order, with their numbers.
    numbers: std::collections::BTreeMap<char, u32>,
}

impl Shadow {
    /// The shadow of a character; `None` when plane 16 is full.
    fn of(&mut self, c: char) -> Option<char> {
        if (c as u32) < 0x1_0000 {
            return char::from_u32(BASIC + c as u32);
        }
        let number = match self.numbers.get(&c) {
            Some(&number) => number,
            None if self.others.len() == OTHERS_MAX => return None,
            None => {
                let number = self.others.len() as u32;
                self.others.push(c);
                self.numbers.insert(c, number);
                number
            }
        };
        char::from_u32(OTHERS + number)
    }

    /// `content` with all but its white space shadowed; `None` when it has too many kinds of
    /// characters.
    pub(super) fn all(&mut self, content: &str) -> Option<String> {
        let mut shadowed = String::with_capacity(content.len() * 4);
        for c in content.chars() {
            shadowed.push(if c.is_whitespace() { c } else { self.of(c)? });
        }
        Some(shadowed)
    }

    /// `content` with the first character of each control token's name shadowed, and those
    /// characters that would be taken for shadows; `None` as in [`Shadow::all`].
    pub(super) fn names(&mut self, content: &str, tokenizer: &Tokenizer) -> Option<String> {
        let mut shadowed = String::with_capacity(content.len());
        let mut name = tokenizer.first_control(content, 0);
        for (at, c) in content.char_indices() {
            let begins_name = name == Some(at);
            if begins_name {
                // Names may overlap: the next search begins inside this one.
                name = tokenizer.first_control(content, at + c.len_utf8());
            }
            let is_shadowed = begins_name || is_shadow(c);
            shadowed.push(if is_shadowed { self.of(c)? } else { c });
        }
        Some(shadowed)
    }

    /// The characters of `output` without shadows.
    pub(super) fn lifted<'a>(&'a self, output: &'a str) -> impl Iterator<Item = char> + 'a {
        output.chars().map(|c| match c as u32 {
            code @ OTHERS.. => self.others.get((code - OTHERS) as usize).copied().unwrap_or(c),
            code @ BASIC..OTHERS => char::from_u32(code - BASIC).unwrap_or(c),
            _ => c,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_character_comes_back_from_its_shadow(
            text in prop_oneof!["\\PC*", prop::collection::vec(any::<char>(), 0..60)
                .prop_map(|chars| chars.into_iter().collect::<String>())],
        ) {
            let mut shadow = Shadow::default();
            let shadowed = shadow.all(&text).expect("few kinds");
            prop_assert!(shadowed.chars().all(|c| c.is_whitespace() || is_shadow(c)));
            prop_assert_eq!(shadow.lifted(&shadowed).collect::<String>(), text);
        }
    }

    #[test]
    fn a_text_of_more_kinds_than_there_are_shadows_is_refused() {
        let kinds = (0x1_0000..0x1_0000 + OTHERS_MAX as u32 + 1).filter_map(char::from_u32);
        let text: String = kinds.collect();
        assert_eq!(Shadow::default().all(&text), None);
        let fewer: String = text.chars().skip(1).collect();
        assert!(Shadow::default().all(&fewer).is_some());
    }
}
