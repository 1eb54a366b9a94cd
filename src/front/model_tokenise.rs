//! Prompts of a real model: its chat template, then its tokenizer, a slice at a time.
//!
//! Core: front.

use std::sync::Arc;

use super::tokenise::{Tokenise, TokeniseJob};
use crate::model::{self, ChatTemplate, Encoder, Progress, Tokenizer};
use crate::protocol::{BodyError, Prompt};
use crate::request::TokenId;

/// Messages for which the template's own tokens are set aside beyond those that a message's head
/// on the wire pays for. Only templates with unusually much markup need it.
const MESSAGES_WITH_MARKUP: usize = 64;
/// Bytes of a message's head on the wire, each of which admission counts as a token.
const MESSAGE_HEAD_BYTES: usize = 5;

/// A model's tokenizer and chat template, shared by all front cores.
#[derive(Clone)]
pub struct ModelTokenise {
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
    vocab_tokens: u32,
    context_max: u32,
}

impl ModelTokenise {
    /// A model without a template takes text and token ids, no messages. Prompts beyond
    /// `context_max` tokens are not worked through.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        template: Option<Arc<ChatTemplate>>,
        vocab_tokens: u32,
        context_max: u32,
    ) -> ModelTokenise {
        ModelTokenise { tokenizer, template, vocab_tokens, context_max }
    }
}

impl Tokenise for ModelTokenise {
    fn vocab_tokens(&self) -> u32 {
        self.vocab_tokens
    }

    fn template_tokens_max(&self) -> u32 {
        let overhead = |messages| {
            self.template.as_ref().map_or(1, |template| template.overhead_tokens(messages))
        };
        let per_message = overhead(2) - overhead(1);
        let unpaid = per_message.saturating_sub(MESSAGE_HEAD_BYTES) * MESSAGES_WITH_MARKUP;
        u32::try_from(overhead(1) + unpaid).unwrap_or(u32::MAX)
    }

    fn begin(&mut self, prompt: &Prompt<'_>) -> Result<Box<dyn TokeniseJob>, BodyError> {
        let prompt = match prompt {
            Prompt::Text(text) => self.tokenizer.prompt(text),
            Prompt::Messages(messages) => {
                let Some(template) = &self.template else {
                    let problem = "this model has no chat template; send text or token ids";
                    return Err(BodyError(problem.into()));
                };
                let messages: Vec<model::Message<'_>> = messages
                    .iter()
                    .map(|message| model::Message {
                        role: message.role.name(),
                        content: message.content,
                    })
                    .collect();
                template
                    .render(&self.tokenizer, &messages, true)
                    .map_err(|error| BodyError(error.to_string().into()))?
            }
            Prompt::Tokens(_) => return Err(BodyError("token ids are not tokenised".into())),
        };
        let encoder = Encoder::new(prompt, self.context_max as usize);
        Ok(Box::new(Job { tokenizer: Arc::clone(&self.tokenizer), encoder, handed_over: 0 }))
    }
}

struct Job {
    tokenizer: Arc<Tokenizer>,
    encoder: Encoder,
    /// Of the encoder's tokens, how many were appended already.
    handed_over: usize,
}

impl TokeniseJob for Job {
    fn advance(&mut self, bytes_max: usize, tokens: &mut Vec<TokenId>) -> Result<bool, BodyError> {
        let progress = self.encoder.advance(&self.tokenizer, bytes_max);
        tokens.extend_from_slice(&self.encoder.tokens()[self.handed_over..]);
        self.handed_over = self.encoder.tokens().len();
        // Too long is done, too: who counts the tokens sees that they are too many.
        Ok(progress != Progress::More)
    }
}
