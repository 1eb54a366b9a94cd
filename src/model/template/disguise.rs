//! Contents in disguise: what a template is given in place of a conversation's contents, and the
//! way back from what it made of them.

use std::collections::BTreeSet;

use crate::model::tokenizer::Tokenizer;

/// The first private-use character of plane 15, of which one breaks names.
const BREAK_FIRST: u32 = 0xF_0000;
/// The first of plane 16, which stand in for contents by number.
const STAND_IN_FIRST: u32 = 0x10_0000;
/// Private-use characters in either plane.
const PLANE_CHARS: u32 = 0xFFFE;

/// Whether a character is kept for disguises, and must therefore not be in a template.
pub(super) fn is_reserved(c: char) -> bool {
    c as u32 >= BREAK_FIRST
}

/// The contents of a conversation and their disguises.
pub(super) struct Disguise<'a> {
    contents: Vec<&'a str>,
    /// Breaks names of control tokens; in no content.
    name_break: char,
}

impl<'a> Disguise<'a> {
    /// `None` when there are more contents than stand-ins, or every character that could break
    /// names is in a content.
    pub(super) fn new(contents: Vec<&'a str>) -> Option<Disguise<'a>> {
        if contents.len() > PLANE_CHARS as usize {
            return None;
        }
        // Plane 15 begins with byte 0xf3, which nearly no text has.
        let suspects = contents.iter().filter(|content| content.as_bytes().contains(&0xf3));
        let present: BTreeSet<char> =
            suspects.flat_map(|content| content.chars()).filter(|&c| is_reserved(c)).collect();
        let candidates = (BREAK_FIRST..BREAK_FIRST + PLANE_CHARS).filter_map(char::from_u32);
        let name_break = candidates.into_iter().find(|candidate| !present.contains(candidate))?;
        Some(Disguise { contents, name_break })
    }

    /// All contents, each as one character that stands in for it. Its outer white space stays, so
    /// that a template that trims finds what it looks for.
    pub(super) fn stand_ins(&self) -> impl Iterator<Item = String> + '_ {
        self.contents.iter().zip(STAND_IN_FIRST..).map(|(content, code)| {
            let core = content.trim();
            let start = content.len() - content.trim_start().len();
            let mut disguised = content[..start].to_owned();
            if !core.is_empty() {
                disguised.extend(char::from_u32(code));
                disguised.push_str(&content[start + core.len()..]);
            }
            disguised
        })
    }

    /// All contents as they are, but with the names of control tokens broken.
    pub(super) fn broken_names<'s>(
        &'s self,
        tokenizer: &'s Tokenizer,
    ) -> impl Iterator<Item = String> + 's {
        self.contents.iter().map(move |content| {
            let mut broken = String::with_capacity(content.len());
            let mut done = 0;
            while let Some(start) = tokenizer.first_control(content, done) {
                // Names may overlap: the search goes on after this one's first character.
                let first = content[start..].chars().next().map_or(1, char::len_utf8);
                broken.push_str(&content[done..start + first]);
                broken.push(self.name_break);
                done = start + first;
            }
            broken.push_str(&content[done..]);
            broken
        })
    }

    /// Appends to `text` what a template made of stand-ins, with the contents in their place.
    pub(super) fn lift_stand_ins(&self, output: &str, text: &mut String) {
        let mut rest = output;
        while let Some(at) = rest.find(is_reserved) {
            text.push_str(&rest[..at]);
            let c = rest[at..].chars().next().unwrap_or_default();
            rest = &rest[at + c.len_utf8()..];
            let number = (c as u32).checked_sub(STAND_IN_FIRST);
            let content = number.and_then(|number| self.contents.get(number as usize));
            text.push_str(content.map_or("", |content| content.trim()));
        }
        text.push_str(rest);
    }

    /// Appends to `text` what a template made of broken names, with the names whole.
    pub(super) fn lift_names(&self, output: &str, text: &mut String) {
        output.split(self.name_break).for_each(|part| text.push_str(part));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stand_in_keeps_the_white_space_around_it() {
        let disguise = Disguise::new(vec![" \n a b\t", "", "  ", "x"]).expect("few");
        let stand_ins: Vec<String> = disguise.stand_ins().collect();
        assert_eq!(stand_ins, [" \n \u{100000}\t", "", "  ", "\u{100003}"]);
        let mut text = String::new();
        disguise.lift_stand_ins(&stand_ins.concat(), &mut text);
        assert_eq!(text, " \n a b\t  x");
    }

    #[test]
    fn names_are_broken_by_a_character_that_no_content_has() {
        let disguise = Disguise::new(vec!["\u{f0000}\u{f0002}", "\u{f0001}"]).expect("few");
        assert_eq!(disguise.name_break, '\u{f0003}');
        let all: String =
            (BREAK_FIRST..BREAK_FIRST + PLANE_CHARS).filter_map(char::from_u32).collect();
        assert!(Disguise::new(vec![&all]).is_none());
    }

    #[test]
    fn more_contents_than_stand_ins_are_refused() {
        assert!(Disguise::new(vec![""; PLANE_CHARS as usize]).is_some());
        assert!(Disguise::new(vec![""; PLANE_CHARS as usize + 1]).is_none());
    }
}
