//! Chat templates: a conversation to a prompt, as the model was taught to read it.
//!
//! A template is a Jinja program in the model's file. Its own markup becomes control tokens; what
//! a message contains never does, whatever it spells. Telling the two apart in the output of a
//! program that may trim, cut and compare is done by rendering twice:
//!
//! - once with each content *disguised* by one private-use character that stands in for it
//!   (white space around a content stays, so that trimming works). In this output a control token
//!   can only have come from the template. It is exact unless the template looks at what a
//!   content says, as some do to drop a model's earlier reasoning;
//! - once with the contents as they are, except that the names of control tokens in them are
//!   broken by a private-use character.
//!
//! The second is taken when it has the same control tokens in the same order as the first: then
//! all of them are the template's. Otherwise an edit of the template's has made one out of a
//! content, and the first is taken, which is safe in any case.
//!
//! Core: front cores.

mod disguise;

#[cfg(test)]
mod tests;

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, context};

use crate::model::gguf::Gguf;
use crate::model::tokenizer::{Prompt, Tokenizer};
use disguise::Disguise;

/// A message of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Who speaks: one of [`ROLES`].
    pub role: &'a str,
    /// What is said: any text.
    pub content: &'a str,
}

/// The roles a message may have. Templates put the role into their markup (`<|role|>`), so it
/// must not be free text.
pub const ROLES: [&str; 5] = ["system", "user", "assistant", "tool", "developer"];

/// Largest template: the longest in use, with tool calling, have some 20 KB.
const SOURCE_BYTES_MAX: usize = 256 << 10;
/// A render's budget of work and memory, about one unit an instruction or 64 bytes of strings
/// made, and some 30 ms when it is used up. In the usual templates a conversation of 1 MiB takes
/// 80,000 and each message 60.
const FUEL: u64 = 400_000;
/// Longest output: eight times the largest frame.
const OUTPUT_BYTES_MAX: usize = 8 << 20;
/// Deepest recursion of macros and loops.
const RECURSION_MAX: usize = 100;

/// Why a template cannot be used, or a conversation cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model's file has no template, or an unusable one.
    #[error("the model's chat template is unusable: {0}")]
    Unusable(String),
    /// A role that is none of [`ROLES`].
    #[error("message role {0:?} is not one of system, user, assistant, tool and developer")]
    Role(String),
    /// A conversation without messages.
    #[error("a conversation needs at least one message")]
    Empty,
    /// The template itself refuses the conversation, e.g. because roles must alternate.
    #[error("the model's chat template refuses the conversation: {0}")]
    Refused(String),
    /// The conversation makes the template do too much.
    #[error("the conversation is too large for the model's chat template")]
    TooLarge,
    /// The template fails on the conversation.
    #[error("the model's chat template fails on the conversation: {0}")]
    Failed(String),
}

/// What `raise_exception` in a template carries out of it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// A compiled chat template. Shared by all front cores.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    overhead: Overhead,
}

/// An upper bound on a template's own tokens, linear in the number of messages.
#[derive(Clone, Copy, Debug, Default)]
struct Overhead {
    base: usize,
    per_message: usize,
}

impl ChatTemplate {
    /// Compiles the template in the model's metadata; `None` when it has none, as models that
    /// were never taught to converse.
    ///
    /// # Errors
    /// When it does not compile, or cannot render the simplest conversation.
    pub fn from_gguf(
        gguf: &Gguf,
        tokenizer: &Tokenizer,
    ) -> Result<Option<ChatTemplate>, TemplateError> {
        let unusable = |error: &dyn std::fmt::Display| TemplateError::Unusable(error.to_string());
        let source = gguf.text("tokenizer.chat_template").map_err(|error| unusable(&error))?;
        let Some(source) = source else {
            return Ok(None);
        };
        let token = |key: &str| {
            let vocab = tokenizer.table().len();
            let id = crate::model::config::token_id(gguf, key, vocab).map_err(|e| unusable(&e))?;
            let literal = id.map(|id| tokenizer.table().literal(id)).unwrap_or_default();
            Ok(String::from_utf8_lossy(literal).into_owned())
        };
        let bos = token("tokenizer.ggml.bos_token_id")?;
        let eos = token("tokenizer.ggml.eos_token_id")?;
        ChatTemplate::new(source, bos, eos, tokenizer).map(Some)
    }

    /// Compiles `source`, in which `bos_token` and `eos_token` are the given texts.
    ///
    /// # Errors
    /// As [`ChatTemplate::from_gguf`].
    pub fn new(
        source: &str,
        bos: String,
        eos: String,
        tokenizer: &Tokenizer,
    ) -> Result<ChatTemplate, TemplateError> {
        let unusable = |problem: String| TemplateError::Unusable(problem);
        if source.len() > SOURCE_BYTES_MAX {
            let len = source.len();
            let problem = format!("it has {len} bytes, and at most {SOURCE_BYTES_MAX} are allowed");
            return Err(unusable(problem));
        }
        if [source, &bos, &eos].iter().any(|text| text.chars().any(disguise::is_reserved)) {
            let problem = "it has private-use characters of planes 15 or 16 in it";
            return Err(unusable(problem.into()));
        }
        let environment = environment(source).map_err(|error| unusable(explained(&error)))?;
        let overhead = Overhead::default();
        let mut template = ChatTemplate { environment, bos, eos, overhead };
        template.overhead = template.measured(tokenizer).map_err(|e| unusable(e.to_string()))?;
        Ok(template)
    }

    /// The prompt for a conversation. `add_generation_prompt` ends it with the markup that opens
    /// the assistant's answer.
    ///
    /// # Errors
    /// When a role is unknown, the template refuses or fails, or the result is too large. All are
    /// the request's fault, never the program's.
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message<'_>],
        add_generation_prompt: bool,
    ) -> Result<Prompt, TemplateError> {
        if messages.is_empty() {
            return Err(TemplateError::Empty);
        }
        if let Some(message) = messages.iter().find(|message| !ROLES.contains(&message.role)) {
            return Err(TemplateError::Role(message.role.chars().take(40).collect()));
        }
        let contents = messages.iter().map(|message| message.content).collect();
        let disguise = Disguise::new(contents).ok_or(TemplateError::TooLarge)?;
        let safe = self.output(messages, disguise.stand_ins(), add_generation_prompt)?;
        let real =
            self.output(messages, disguise.broken_names(tokenizer), add_generation_prompt)?;
        let safe = Prompt::of(&safe, tokenizer, |part, text| disguise.lift_stand_ins(part, text));
        let real = Prompt::of(&real, tokenizer, |part, text| disguise.lift_names(part, text));
        let mut prompt = if safe.tokens().eq(real.tokens()) { real } else { safe };
        if let Some(bos) = tokenizer.leading_bos() {
            prompt.begin_with(bos);
        }
        Ok(prompt)
    }

    /// More tokens than this a template's own markup never becomes, for a conversation of
    /// `messages` messages: for admission, before the conversation itself is known.
    pub fn overhead_tokens(&self, messages: usize) -> usize {
        self.overhead.per_message.saturating_mul(messages).saturating_add(self.overhead.base)
    }

    /// Runs the template.
    fn output(
        &self,
        messages: &[Message<'_>],
        contents: impl Iterator<Item = String>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages
            .iter()
            .zip(contents)
            .map(|(message, content)| context! { role => message.role, content => content })
            .collect();
        let context = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let template = self.environment.get_template(NAME).map_err(|error| failure(&error))?;
        let mut output = BoundedOutput::default();
        match template.render_captured_to(context, &mut output) {
            _ if output.is_full => Err(TemplateError::TooLarge),
            Err(error) => Err(failure(&error)),
            // The template writes whole strings, so the bytes are valid.
            Ok(_) => String::from_utf8(output.bytes)
                .map_err(|error| TemplateError::Failed(error.to_string())),
        }
    }

    /// Bounds the markup's tokens by rendering conversations of one-letter messages, with and
    /// without a system message, whoever speaks first. That letter's own token is the slack for
    /// where markup and content meet and merge differently.
    fn measured(&self, tokenizer: &Tokenizer) -> Result<Overhead, TemplateError> {
        const TURNS_MAX: usize = 5;
        let message = |role| Message { role, content: "x" };
        let mut counts: Vec<(usize, usize)> = Vec::new();
        let mut refusal = None;
        for opening in [&[][..], &["system"], &["assistant"], &["system", "assistant"]] {
            for length in 0..=TURNS_MAX {
                let turns = ["user", "assistant"].into_iter().cycle().take(length);
                let roles = opening.iter().copied().chain(turns);
                let conversation: Vec<Message<'_>> = roles.map(message).collect();
                // A template may refuse a system message, or to speak after the assistant.
                match self.render(tokenizer, &conversation, true) {
                    Ok(prompt) => {
                        counts.push((conversation.len(), tokenizer.encode_prompt(prompt).len()));
                    }
                    Err(TemplateError::Empty) => {}
                    Err(TemplateError::TooLarge) => return Err(TemplateError::TooLarge),
                    Err(error) => refusal = refusal.or(Some(error)),
                }
            }
        }
        if let (true, Some(error)) = (counts.is_empty(), refusal) {
            return Err(error);
        }
        let growth = counts.windows(2).map(|pair| {
            let (messages, tokens) =
                (pair[1].0.saturating_sub(pair[0].0), pair[1].1.saturating_sub(pair[0].1));
            if messages == 0 { 0 } else { tokens.div_ceil(messages) }
        });
        let per_message = growth.max().unwrap_or(0) + 1;
        let base = counts.iter().map(|&(m, tokens)| tokens.saturating_sub(m * per_message)).max();
        Ok(Overhead { base: base.unwrap_or(0), per_message })
    }
}

/// What the environment calls the template. The name has no file extension by which it would
/// choose an escaping.
const NAME: &str = "chat";

fn environment(source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    // As the templates' authors have it: the settings of Hugging Face's renderer.
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_MAX);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        let error = Error::new(ErrorKind::InvalidOperation, "raised by the template");
        Err(error.with_source(Raised(message)))
    });
    environment.add_template_owned(NAME, source.to_owned())?;
    Ok(environment)
}

/// An error of the engine, with where it happened.
fn explained(error: &Error) -> String {
    match error.line() {
        Some(line) => format!("line {line}: {error}"),
        None => error.to_string(),
    }
}

fn failure(error: &Error) -> TemplateError {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return TemplateError::Refused(message.clone());
        }
        cause = current.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => TemplateError::TooLarge,
        _ => TemplateError::Failed(explained(error)),
    }
}

/// Takes a template's output up to its bound.
#[derive(Default)]
struct BoundedOutput {
    bytes: Vec<u8>,
    is_full: bool,
}

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > OUTPUT_BYTES_MAX {
            self.is_full = true;
            return Err(io::Error::other("the output is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("overhead", &self.overhead).finish_non_exhaustive()
    }
}
