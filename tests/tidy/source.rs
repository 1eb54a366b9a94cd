//! Source files as the rules see them: code and comments apart, test code marked, modules walked.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// One file, line by line.
pub struct Source {
    /// Relative to the project's root, with forward slashes.
    pub path: String,
    pub lines: Vec<Line>,
}

pub struct Line {
    /// As written.
    pub text: String,
    /// Without comments, and with the content of strings blanked out.
    pub code: String,
    /// Inside a `#[cfg(test)]` module, or in a file that only tests include.
    pub test: bool,
}

impl Source {
    pub fn read(root: &Path, path: &str) -> Source {
        let text = fs::read_to_string(root.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        let code = blank_strings_and_comments(&text);
        let mut lines: Vec<Line> = text
            .lines()
            .zip(code.lines())
            .map(|(text, code)| Line { text: text.into(), code: code.into(), test: false })
            .collect();
        mark_test_modules(&mut lines);
        Source { path: path.to_string(), lines }
    }

    /// Lines of code that is not for tests, with their numbers.
    pub fn shipped(&self) -> impl Iterator<Item = (usize, &str)> {
        let numbered = self.lines.iter().enumerate();
        numbered.filter(|(_, line)| !line.test).map(|(index, line)| (index + 1, &*line.code))
    }
}

/// Whether `word` stands in `code` with nothing before or behind it that would make it part of
/// another word.
pub fn has_word(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let (before, behind) = (&code[..at], &code[at + word.len()..]);
        let begins_earlier = word.starts_with(part) && before.ends_with(part);
        let ends_later = word.ends_with(part) && behind.starts_with(part);
        !begins_earlier && !ends_later
    })
}

/// Replaces comments and the content of strings and characters by spaces; keeps all line ends.
pub fn blank_strings_and_comments(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match chars[at] {
            '/' if chars.get(at + 1) == Some(&'/') => end_of_line(&chars, at),
            '/' if chars.get(at + 1) == Some(&'*') => end_of_block_comment(&chars, at),
            '"' => end_of_string(&chars, at),
            'r' if !follows_a_word(&chars, at) => end_of_raw_string(&chars, at).unwrap_or(at),
            '\'' => end_of_character(&chars, at).unwrap_or(at),
            _ => at,
        };
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|&c| if c == '\n' { c } else { ' ' }));
            at = end;
        }
    }
    out
}

fn follows_a_word(chars: &[char], at: usize) -> bool {
    // `br"..."` is a raw string, too.
    let before = at.checked_sub(1).map(|before| chars[before]);
    before.is_some_and(|c| (c.is_alphanumeric() && c != 'b') || c == '_')
}

fn end_of_line(chars: &[char], at: usize) -> usize {
    chars[at..].iter().position(|&c| c == '\n').map_or(chars.len(), |length| at + length)
}

fn end_of_block_comment(chars: &[char], at: usize) -> usize {
    let (mut depth, mut next) = (0, at);
    while next + 1 < chars.len() {
        match (chars[next], chars[next + 1]) {
            ('/', '*') => (depth, next) = (depth + 1, next + 2),
            ('*', '/') => (depth, next) = (depth - 1, next + 2),
            _ => next += 1,
        }
        if depth == 0 {
            return next;
        }
    }
    chars.len()
}

fn end_of_string(chars: &[char], at: usize) -> usize {
    let mut next = at + 1;
    while next < chars.len() && chars[next] != '"' {
        next += if chars[next] == '\\' { 2 } else { 1 };
    }
    (next + 1).min(chars.len())
}

fn end_of_raw_string(chars: &[char], at: usize) -> Option<usize> {
    let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
    let open = at + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let closes = |next: usize| {
        chars[next] == '"' && chars[next + 1..].iter().take_while(|&&c| c == '#').count() >= hashes
    };
    let close = (open + 1..chars.len()).find(|&next| closes(next));
    Some(close.map_or(chars.len(), |close| close + 1 + hashes))
}

/// `None` for a lifetime.
fn end_of_character(chars: &[char], at: usize) -> Option<usize> {
    if chars.get(at + 1) == Some(&'\\') {
        let close = chars[at + 3..].iter().position(|&c| c == '\'')?;
        return Some(at + 3 + close + 1);
    }
    (chars.get(at + 2) == Some(&'\'')).then_some(at + 3)
}

/// The line on which the block that begins at or behind `start` ends; `None` if `;` comes first.
pub fn end_of_block(lines: &[Line], start: usize) -> Option<usize> {
    // A `;` inside parentheses or brackets, as in `[u8; 4]`, ends nothing.
    let (mut braces, mut others) = (0, 0);
    for (index, line) in lines.iter().enumerate().skip(start) {
        for c in line.code.chars() {
            match c {
                '{' => braces += 1,
                '}' if braces == 1 => return Some(index),
                '}' => braces -= 1,
                '(' | '[' => others += 1,
                ')' | ']' => others -= 1,
                ';' if braces == 0 && others == 0 => return None,
                _ => {}
            }
        }
    }
    None
}

fn is_for_tests(attribute: &str) -> bool {
    let condition = attribute.trim().strip_prefix("#[cfg(");
    condition.is_some_and(|c| has_word(c, "test") && !c.contains("not(test"))
}

fn mark_test_modules(lines: &mut [Line]) {
    for start in 0..lines.len() {
        if is_for_tests(&lines[start].code) {
            let end = end_of_block(lines, start + 1).unwrap_or(start + 1).min(lines.len() - 1);
            lines[start..=end].iter_mut().for_each(|line| line.test = true);
        }
    }
}

/// All `.rs` files under these folders, relative to `root`.
pub fn files_under(root: &Path, folders: &[&str]) -> Vec<String> {
    let mut waiting: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut found = Vec::new();
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && entry.file_name() != "target" {
                waiting.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(relative(root, &path));
            }
        }
    }
    found.sort();
    found
}

fn relative(root: &Path, path: &Path) -> String {
    let inside = path.strip_prefix(root).expect("files are listed under the root");
    inside.to_string_lossy().replace('\\', "/")
}

/// Follows `mod` declarations (and `include!`) from these files. Returns every file reached, read,
/// with those that only tests reach marked as tests all through.
pub fn walk(root: &Path, roots: &[String]) -> BTreeMap<String, Source> {
    let mut reached = BTreeMap::new();
    let mut waiting: Vec<(String, bool)> =
        roots.iter().map(|path| (path.clone(), !path.starts_with("src/"))).collect();
    while let Some((path, test)) = waiting.pop() {
        if reached.contains_key(&path) || !root.join(&path).is_file() {
            continue;
        }
        let mut source = Source::read(root, &path);
        if test {
            source.lines.iter_mut().for_each(|line| line.test = true);
        }
        let is_root = roots.contains(&path);
        for (index, line) in source.lines.iter().enumerate() {
            let test = line.test;
            for file in declared_files(&source, index, is_root) {
                waiting.push((file, test));
            }
        }
        reached.insert(path, source);
    }
    reached
}

/// The files that line `index` may name: a module has two places, of which one exists.
fn declared_files(source: &Source, index: usize, is_root: bool) -> Vec<String> {
    let folder = source.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let line = &source.lines[index];
    if line.code.contains("include!(") || line.code.trim_start().starts_with("#[path") {
        let quoted = line.text.split('"').nth(1);
        return quoted.map(|file| normal(&format!("{folder}/{file}"))).into_iter().collect();
    }
    let words: Vec<&str> = line.code.split_whitespace().collect();
    let declared = words.iter().position(|&word| word == "mod").and_then(|at| words.get(at + 1));
    let Some(name) = declared.and_then(|name| name.strip_suffix(';')) else { return Vec::new() };
    let own = source.path.rsplit('/').next().and_then(|file| file.strip_suffix(".rs"));
    let inside = match own {
        Some("mod" | "lib" | "main") => folder.to_string(),
        _ if is_root => folder.to_string(),
        Some(own) => format!("{folder}/{own}"),
        None => return Vec::new(),
    };
    vec![format!("{inside}/{name}.rs"), format!("{inside}/{name}/mod.rs")]
}

/// Resolves `..`.
fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}
