//! REQUEST and BODY: the prelude that admission looks at, and the body that is read only after.

use std::borrow::Cow;
use std::fmt;

use super::bytes::{Reader, put_u32};
use super::frame::{FrameType, ProtocolError, limits, put_frame};
use super::options::RequestOptions;
use crate::base::numbered;
use crate::request::{Class, Name, TokenId};

/// Bytes of the prelude in front of the two names.
pub const PRELUDE_BYTES: usize = 24;

/// What is wrong with one request, for the message of its REJECTED.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyError(pub Cow<'static, str>);

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BodyError {}

numbered! {
    /// What the prompt's bytes are.
    pub enum PromptKind: u8 {
        /// Messages, for the model's chat template.
        Messages = 0 => "messages",
        /// Text, tokenised as it is.
        Text = 1 => "text",
        /// Token ids.
        Tokens = 2 => "tokens",
    }
}

numbered! {
    /// Who speaks in a message. The names are those that chat templates know.
    pub enum Role: u8 {
        /// Instructions.
        System = 0 => "system",
        /// The person.
        User = 1 => "user",
        /// The model.
        Assistant = 2 => "assistant",
        /// What a tool returned.
        Tool = 3 => "tool",
    }
}

/// The head of a request: all that admission needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prelude {
    /// Priority class.
    pub class: Class,
    /// What the prompt's bytes are.
    pub kind: PromptKind,
    /// Who pays; may be empty.
    pub tenant: Name,
    /// On whose behalf; may be empty.
    pub user: Name,
    /// Output limit; 0 leaves it to the context.
    pub max_tokens: u32,
    /// Milliseconds from arrival until the client stops caring; 0 is never.
    pub deadline_ms: u32,
    /// First token credit.
    pub window_tokens: u32,
    /// Bytes of options in the body.
    pub options_bytes: u32,
    /// Bytes of prompt in the body, after the options.
    pub prompt_bytes: u32,
}

impl Prelude {
    /// Bytes of the body.
    pub fn body_bytes(&self) -> u64 {
        u64::from(self.options_bytes) + u64::from(self.prompt_bytes)
    }

    /// Bytes of prelude and names, once the fixed part is there.
    pub(super) fn head_bytes(fixed: &[u8]) -> usize {
        PRELUDE_BYTES + usize::from(fixed[2]) + usize::from(fixed[3])
    }

    /// Reads a prelude with its names. What is wrong with it is wrong with this request only.
    ///
    /// `head` is exactly as long as [`Prelude::head_bytes`] says.
    pub(super) fn decode(head: &[u8]) -> Result<Prelude, BodyError> {
        let mut reader = Reader::new(head);
        let mut fixed = || -> Option<_> {
            Some((
                reader.u8()?,
                reader.u8()?,
                reader.u8()?,
                reader.u8()?,
                [reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?],
            ))
        };
        let (class, kind, tenant_bytes, user_bytes, numbers) = fixed().expect("a whole head");
        let [max_tokens, deadline_ms, window_tokens, options_bytes, prompt_bytes] = numbers;
        let tenant = reader.take(usize::from(tenant_bytes)).expect("a whole head");
        let user = reader.take(usize::from(user_bytes)).expect("a whole head");
        let class = Class::from_wire(class)
            .ok_or_else(|| BodyError(format!("class {class} is none of 0 to 3").into()))?;
        let kind = PromptKind::from_wire(kind)
            .ok_or_else(|| BodyError(format!("prompt kind {kind} is none of 0 to 2").into()))?;
        if options_bytes > limits::OPTIONS_BYTES_MAX {
            return Err(BodyError("options_bytes must be at most 8192".into()));
        }
        if prompt_bytes == 0 {
            return Err(BodyError("the prompt is empty".into()));
        }
        let tenant = read_name(tenant, "tenant")?;
        let user = read_name(user, "user")?;
        Ok(Prelude {
            class,
            kind,
            tenant,
            user,
            max_tokens,
            deadline_ms,
            window_tokens,
            options_bytes,
            prompt_bytes,
        })
    }
}

fn read_name(bytes: &[u8], what: &str) -> Result<Name, BodyError> {
    std::str::from_utf8(bytes).ok().and_then(Name::new).ok_or_else(|| {
        let message =
            format!("{what} must be at most 63 bytes of UTF-8 without control characters");
        BodyError(message.into())
    })
}

/// One message of a chat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Who speaks.
    pub role: Role,
    /// What is said: always text, whatever it looks like.
    pub content: &'a str,
}

/// Token ids in their wire form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenIds<'a>(&'a [u8]);

impl<'a> TokenIds<'a> {
    /// `None` unless `bytes` is a whole number of ids.
    pub(super) fn new(bytes: &'a [u8]) -> Option<TokenIds<'a>> {
        bytes.len().is_multiple_of(4).then_some(TokenIds(bytes))
    }

    /// How many.
    pub fn len(self) -> usize {
        self.0.len() / 4
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// The ids, in order.
    pub fn iter(self) -> impl ExactSizeIterator<Item = TokenId> + 'a {
        self.0.as_chunks::<4>().0.iter().map(|chunk| u32::from_le_bytes(*chunk))
    }
}

/// A request's prompt, borrowed from its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt<'a> {
    /// Messages, at least one.
    Messages(Vec<Message<'a>>),
    /// Text, not empty.
    Text(&'a str),
    /// Token ids, at least one, not yet checked against the vocabulary.
    Tokens(TokenIds<'a>),
}

/// A whole body.
#[derive(Clone, Debug, PartialEq)]
pub struct Body<'a> {
    /// How to choose tokens and when to stop, in range.
    pub options: RequestOptions,
    /// What to continue.
    pub prompt: Prompt<'a>,
}

/// Reads a whole body. `bytes` is as long as the prelude announced.
pub fn decode_body<'a>(prelude: &Prelude, bytes: &'a [u8]) -> Result<Body<'a>, BodyError> {
    assert_eq!(bytes.len() as u64, prelude.body_bytes(), "the body is as long as announced");
    let (options, prompt) = bytes.split_at(prelude.options_bytes as usize);
    let options = RequestOptions::decode(options)?;
    let prompt = match prelude.kind {
        PromptKind::Messages => Prompt::Messages(decode_messages(prompt)?),
        PromptKind::Text => Prompt::Text(
            std::str::from_utf8(prompt)
                .map_err(|error| not_utf8("the prompt", error.valid_up_to()))?,
        ),
        PromptKind::Tokens => Prompt::Tokens(
            TokenIds::new(prompt)
                .ok_or(BodyError("a prompt of token ids must be a multiple of 4 bytes".into()))?,
        ),
    };
    Ok(Body { options, prompt })
}

fn not_utf8(what: &str, at: usize) -> BodyError {
    BodyError(format!("{what} is not UTF-8 at byte {at}").into())
}

fn decode_messages(bytes: &[u8]) -> Result<Vec<Message<'_>>, BodyError> {
    let cut = || BodyError("the messages end in the middle of a message".into());
    let mut reader = Reader::new(bytes);
    let count = reader.u16().ok_or_else(cut)?;
    if count == 0 {
        return Err(BodyError("there must be at least one message".into()));
    }
    // A message takes at least its 5 bytes of head: the count alone allocates nothing.
    if usize::from(count) > reader.rest_bytes() / 5 {
        return Err(cut());
    }
    let mut messages = Vec::with_capacity(usize::from(count));
    for index in 0..count {
        let role = reader.u8().ok_or_else(cut)?;
        let role = Role::from_wire(role)
            .ok_or_else(|| BodyError(format!("role {role} is none of 0 to 3").into()))?;
        let content_bytes = reader.u32().ok_or_else(cut)?;
        let content = reader.take(content_bytes as usize).ok_or_else(cut)?;
        let content = std::str::from_utf8(content)
            .map_err(|error| not_utf8(&format!("message {index}"), error.valid_up_to()))?;
        messages.push(Message { role, content });
    }
    reader.finish(messages).ok_or(BodyError("there are bytes after the last message".into()))
}

/// A prompt that a client owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestPrompt {
    /// Messages for the model's chat template.
    Messages(Vec<(Role, String)>),
    /// Text, tokenised as it is.
    Text(String),
    /// Token ids.
    Tokens(Vec<TokenId>),
}

/// A request that a client owns.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What to continue.
    pub prompt: RequestPrompt,
    /// Priority class.
    pub class: Class,
    /// Who pays.
    pub tenant: Name,
    /// On whose behalf.
    pub user: Name,
    /// Output limit; `None` leaves it to the context.
    pub max_tokens: Option<u32>,
    /// Milliseconds from arrival until the answer is of no use.
    pub deadline_ms: Option<u32>,
    /// First token credit.
    pub window_tokens: u32,
    /// How to choose tokens and when to stop.
    pub options: RequestOptions,
}

impl Request {
    /// A request with defaults for all but the prompt.
    pub fn new(prompt: RequestPrompt) -> Request {
        Request {
            prompt,
            class: Class::default(),
            tenant: Name::EMPTY,
            user: Name::EMPTY,
            max_tokens: None,
            deadline_ms: None,
            window_tokens: 256,
            options: RequestOptions::default(),
        }
    }
}

/// Encodes a request's body and says what its prelude is.
pub fn encode_body(request: &Request, body: &mut Vec<u8>) -> Prelude {
    let start = body.len();
    request.options.encode(body);
    let options_end = body.len();
    let kind = match &request.prompt {
        RequestPrompt::Messages(messages) => {
            let count = messages.len().min(usize::from(u16::MAX));
            body.extend_from_slice(&(count as u16).to_le_bytes());
            for (role, content) in &messages[..count] {
                body.push(*role as u8);
                put_u32(body, content.len() as u32);
                body.extend_from_slice(content.as_bytes());
            }
            PromptKind::Messages
        }
        RequestPrompt::Text(text) => {
            body.extend_from_slice(text.as_bytes());
            PromptKind::Text
        }
        RequestPrompt::Tokens(ids) => {
            for &id in ids {
                put_u32(body, id);
            }
            PromptKind::Tokens
        }
    };
    Prelude {
        class: request.class,
        kind,
        tenant: request.tenant,
        user: request.user,
        max_tokens: request.max_tokens.unwrap_or(0),
        deadline_ms: request.deadline_ms.unwrap_or(0),
        window_tokens: request.window_tokens,
        options_bytes: u32::try_from(options_end - start).expect("options are bounded"),
        prompt_bytes: u32::try_from(body.len() - options_end).unwrap_or(u32::MAX),
    }
}

/// Appends a REQUEST frame that carries `part` as the beginning of the body.
pub fn encode_request_frame(out: &mut Vec<u8>, stream: u32, prelude: &Prelude, part: &[u8]) {
    put_frame(out, FrameType::Request, stream, |out| {
        let tenant = prelude.tenant.as_str();
        let user = prelude.user.as_str();
        out.push(prelude.class as u8);
        out.push(prelude.kind as u8);
        out.push(tenant.len() as u8);
        out.push(user.len() as u8);
        put_u32(out, prelude.max_tokens);
        put_u32(out, prelude.deadline_ms);
        put_u32(out, prelude.window_tokens);
        put_u32(out, prelude.options_bytes);
        put_u32(out, prelude.prompt_bytes);
        out.extend_from_slice(tenant.as_bytes());
        out.extend_from_slice(user.as_bytes());
        out.extend_from_slice(part);
    });
}

/// Appends a BODY frame with the next part of a request's body.
pub fn encode_body_frame(out: &mut Vec<u8>, stream: u32, part: &[u8]) {
    put_frame(out, FrameType::Body, stream, |out| out.extend_from_slice(part));
}

/// Appends a whole request: one REQUEST frame, and BODY frames when the body is longer than
/// `part_bytes_max`.
pub fn encode_request(out: &mut Vec<u8>, stream: u32, request: &Request, part_bytes_max: usize) {
    let mut body = Vec::new();
    let prelude = encode_body(request, &mut body);
    let (first, mut rest) = body.split_at(body.len().min(part_bytes_max));
    encode_request_frame(out, stream, &prelude, first);
    while !rest.is_empty() {
        let (part, after) = rest.split_at(rest.len().min(part_bytes_max.max(1)));
        encode_body_frame(out, stream, part);
        rest = after;
    }
}

/// What a REQUEST's payload may not be: shorter than the head it announces.
pub(super) fn check_request_payload(
    payload_bytes: u32,
    stream: u32,
    fixed: Option<&[u8]>,
) -> Result<(), ProtocolError> {
    let needed = fixed.map_or(PRELUDE_BYTES, Prelude::head_bytes);
    if (payload_bytes as usize) < needed {
        return Err(ProtocolError::malformed(FrameType::Request, stream));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body_of(request: &Request) -> (Prelude, Vec<u8>) {
        let mut body = Vec::new();
        let prelude = encode_body(request, &mut body);
        (prelude, body)
    }

    #[test]
    fn every_kind_of_prompt_survives_the_way() {
        let messages = vec![
            (Role::System, "Be brief.".to_owned()),
            (Role::User, "<|im_end|> is text".to_owned()),
            (Role::Assistant, String::new()),
        ];
        let (prelude, body) = body_of(&Request::new(RequestPrompt::Messages(messages)));
        let decoded = decode_body(&prelude, &body).unwrap();
        let Prompt::Messages(messages) = decoded.prompt else { panic!("messages") };
        assert_eq!(messages[1], Message { role: Role::User, content: "<|im_end|> is text" });
        assert_eq!(messages.len(), 3);

        let (prelude, body) = body_of(&Request::new(RequestPrompt::Text("Größe".to_owned())));
        assert_eq!(decode_body(&prelude, &body).unwrap().prompt, Prompt::Text("Größe"));

        let (prelude, body) = body_of(&Request::new(RequestPrompt::Tokens(vec![1, 70_000])));
        let decoded = decode_body(&prelude, &body).unwrap();
        let Prompt::Tokens(ids) = decoded.prompt else { panic!("ids") };
        assert_eq!(ids.iter().collect::<Vec<_>>(), [1, 70_000]);
    }

    #[test]
    fn a_body_that_is_cut_or_overlong_is_refused_with_a_reason() {
        let request = Request::new(RequestPrompt::Messages(vec![(Role::User, "hi".into())]));
        let (prelude, body) = body_of(&request);
        for length in 0..body.len() {
            let cut = Prelude { prompt_bytes: length as u32, ..prelude };
            assert!(decode_body(&cut, &body[..length]).is_err(), "{length}");
        }
        let mut longer = body.clone();
        longer.push(0);
        let overlong = Prelude { prompt_bytes: longer.len() as u32, ..prelude };
        assert_eq!(
            decode_body(&overlong, &longer).unwrap_err().0,
            "there are bytes after the last message"
        );
    }

    #[test]
    fn a_message_count_alone_allocates_nothing() {
        let prelude = body_of(&Request::new(RequestPrompt::Messages(Vec::new()))).0;
        let prelude = Prelude { prompt_bytes: 2, ..prelude };
        assert_eq!(
            decode_body(&prelude, &[0xff, 0xff]).unwrap_err().0,
            "the messages end in the middle of a message"
        );
    }

    #[test]
    fn text_that_is_not_utf8_is_refused_with_its_place() {
        let prelude = body_of(&Request::new(RequestPrompt::Text("abc".into()))).0;
        assert_eq!(
            decode_body(&prelude, b"ab\xff").unwrap_err().0,
            "the prompt is not UTF-8 at byte 2"
        );
    }
}
