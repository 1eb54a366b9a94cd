//! One client connection that speaks bytes: asks, reads at its own pace, gives credit or does not,
//! cancels, breaks off, or talks nonsense; and checks every frame that it is sent.

use std::collections::VecDeque;

use forebay::base::{Instant, Prng};
use forebay::protocol::{
    Capabilities, ClientFrame, Decoder, ErrorCode, Hello, LogprobList, Piece, Request,
    RequestPrompt, ServerFrame, Side, TokensFrame, encode_request,
};
use forebay::request::{FinishReason, RejectReason, TokenId, Usage};

use crate::model;
use crate::request::{CancelWhen, End, Plan};

/// A request as its client sees it.
pub struct Asked {
    pub plan: Plan,
    /// The stream's number, once it was sent.
    pub number: Option<u32>,
    sent_at: Instant,
    accepted: bool,
    paused: bool,
    cancelled: bool,
    tokens: Vec<TokenId>,
    text: String,
    /// All that the answer's text can be, with half characters replaced.
    whole_text: String,
    credit_given: u32,
    credit_due: u32,
    pub end: Option<End>,
}

impl Asked {
    pub fn new(plan: Plan, bytes_of: impl Fn(TokenId) -> Vec<u8>) -> Asked {
        let whole: Vec<u8> = plan.answer.tokens.iter().flat_map(|&token| bytes_of(token)).collect();
        Asked {
            credit_given: plan.window,
            plan,
            number: None,
            sent_at: Instant::ZERO,
            accepted: false,
            paused: false,
            cancelled: false,
            tokens: Vec::new(),
            text: String::new(),
            whole_text: String::from_utf8_lossy(&whole).into_owned(),
            credit_due: 0,
            end: None,
        }
    }

    fn to_request(&self, prng: &mut Prng) -> Request {
        let question = &self.plan.question;
        let as_text = question.prompt.iter().all(|&t| (32..127).contains(&t)) && prng.below(2) == 0;
        let prompt = match as_text {
            true => RequestPrompt::Text(
                question.prompt.iter().map(|&token| char::from(token as u8)).collect(),
            ),
            false => RequestPrompt::Tokens(question.prompt.clone()),
        };
        let mut request = Request::new(prompt);
        request.class = self.plan.class;
        (request.tenant, request.user) = (self.plan.tenant, self.plan.user);
        request.max_tokens = (question.max_tokens > 0).then_some(question.max_tokens);
        request.deadline_ms = self.plan.deadline.map(|at| at.ms_since(self.plan.at).max(1) as u32);
        request.window_tokens = self.plan.window;
        request.options.sampling = question.sampling.clone();
        request.options.stop = question.stop.clone();
        request.options.ignore_eos = question.ignore_eos;
        request
    }

    /// When it will cancel, if that depends on nothing but time.
    fn cancel_at(&self) -> Option<Instant> {
        let due = match self.plan.cancel {
            CancelWhen::Never => None,
            CancelWhen::After(ns) => Some(self.sent_at.plus_ns(ns)),
            CancelWhen::Tokens(count) => {
                (self.tokens.len() as u32 >= count).then_some(self.sent_at)
            }
            CancelWhen::Paused => self.paused.then_some(self.sent_at),
        };
        due.filter(|_| self.number.is_some() && self.end.is_none() && !self.cancelled)
    }

    fn gives_credit(&self, faults: bool) -> bool {
        match self.plan.stalls_after {
            Some(tokens) if faults || self.plan.stays_stalled => {
                self.credit_given < self.plan.window + tokens
            }
            _ => true,
        }
    }

    fn handle(&mut self, frame: &ServerFrame<'_>, context: u32) -> Result<(), String> {
        if let Some(end) = self.end {
            return Err(format!("{frame:?} after {end:?}"));
        }
        match *frame {
            ServerFrame::Accepted { accepted, .. } => {
                let prompt = self.plan.question.prompt.len() as u32;
                let room = context - prompt.min(context);
                let asked = self.plan.question.max_tokens;
                let most = if asked == 0 { room } else { asked.min(room) };
                let right = accepted.prompt_tokens == prompt && accepted.max_tokens == most;
                if !right || std::mem::replace(&mut self.accepted, true) {
                    return Err(format!("{accepted:?} is wrong or comes twice"));
                }
            }
            ServerFrame::Tokens { ref tokens, .. } => self.handle_tokens(tokens)?,
            ServerFrame::Paused { .. } => {
                if std::mem::replace(&mut self.paused, true) {
                    return Err("paused twice".into());
                }
            }
            ServerFrame::Resumed { .. } => {
                if !std::mem::replace(&mut self.paused, false) {
                    return Err("resumed and not paused".into());
                }
            }
            ServerFrame::Done { done, .. } => {
                self.check_done(done.finish, done.usage)?;
                self.end = Some(End::Done(done.finish));
            }
            ServerFrame::Rejected { rejected, .. } => {
                if !self.tokens.is_empty() || rejected.reason == RejectReason::Invalid {
                    return Err(format!("{rejected:?}, with {} tokens", self.tokens.len()));
                }
                let never = rejected.reason == RejectReason::ExceedsCapacity;
                if never && !self.plan.answer.tokens.is_empty() {
                    return Err(format!("{rejected:?}, and it fits"));
                }
                self.end = Some(End::Rejected(rejected.reason));
            }
            ref other => return Err(format!("{other:?} is not about a stream")),
        }
        Ok(())
    }

    fn handle_tokens(&mut self, frame: &TokensFrame<'_>) -> Result<(), String> {
        let fresh: Vec<TokenId> = frame.ids.iter().collect();
        if !self.accepted {
            return Err("tokens before ACCEPTED".into());
        }
        self.check_logprobs(frame.logprobs, &fresh)?;
        self.tokens.extend_from_slice(&fresh);
        self.text.push_str(frame.text);
        self.credit_due += fresh.len() as u32;
        if !self.plan.answer.tokens.starts_with(&self.tokens) {
            return Err(format!("token {} is not the model's", self.tokens.len() - 1));
        }
        // The last character may be half of one, at a text's early end.
        let sure = self.text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        if !self.whole_text.starts_with(sure) {
            return Err(format!("the text is not the model's: {:?}", self.text));
        }
        if self.tokens.len() as u32 > self.credit_given {
            return Err(format!("more tokens than the {} credits given", self.credit_given));
        }
        Ok(())
    }

    fn check_logprobs(&self, list: LogprobList<'_>, tokens: &[TokenId]) -> Result<(), String> {
        let wanted = self.plan.question.sampling.logprobs;
        if list.len() != wanted.map_or(0, |_| tokens.len()) {
            return Err(format!("{} log-probabilities for {} tokens", list.len(), tokens.len()));
        }
        for (entry, &token) in list.iter().zip(tokens) {
            let top = model::alternatives(token, wanted.unwrap_or(0));
            if entry.logprob != model::logprob(token) || !entry.top().eq(top) {
                return Err(format!("{entry:?} is not the log-probability of {token}"));
            }
        }
        Ok(())
    }

    fn check_done(&self, finish: FinishReason, usage: Usage) -> Result<(), String> {
        let answer = &self.plan.answer;
        let natural = match finish {
            FinishReason::EndOfText
            | FinishReason::StopString
            | FinishReason::MaxTokens
            | FinishReason::ContextFull => true,
            FinishReason::Cancelled if self.cancelled => false,
            FinishReason::Deadline if self.plan.deadline.is_some() => false,
            FinishReason::Stalled | FinishReason::ShuttingDown | FinishReason::DeviceFailed => {
                false
            }
            _ => return Err(format!("ended without cause: {finish:?}")),
        };
        if usage.output_tokens as usize != self.tokens.len() {
            return Err(format!("{usage:?} with {} tokens", self.tokens.len()));
        }
        let text = String::from_utf8_lossy(&answer.text);
        if natural && (finish != answer.finish || self.tokens != answer.tokens || self.text != text)
        {
            let (got, all) = (self.tokens.len(), answer.tokens.len());
            return Err(format!(
                "{finish:?} with {got} tokens, text {:?}; {:?} with {all}, {text:?} was due",
                self.text, answer.finish
            ));
        }
        Ok(())
    }
}

/// How a connection will be treated by its client.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manners {
    pub opens_at: Instant,
    /// Breaks off without a word.
    pub resets_at: Option<Instant>,
    /// Sends bytes that mean nothing.
    pub garbage_at: Option<Instant>,
    /// Reads nothing more from the socket, until faults are off or for ever.
    pub deaf_at: Option<Instant>,
    pub stays_deaf: bool,
    /// Time to read one byte.
    pub byte_ns: u64,
    /// Sends at most so many bytes at a time.
    pub piece_max: u64,
    /// Says nothing at all.
    pub mute: bool,
}

pub struct Client {
    pub manners: Manners,
    pub asked: Vec<Asked>,
    /// Bytes that it wants to send.
    pub outbox: VecDeque<u8>,
    decoder: Decoder,
    welcome: Option<(u32, u32)>,
    request_credit: u32,
    next_number: u32,
    /// What it hears may be nonsense, since what it said was.
    pub is_faulty: bool,
    going_away: bool,
    pub error: Option<u16>,
    context: u32,
    prng: Prng,
}

impl Client {
    pub fn new(manners: Manners, asked: Vec<Asked>, context: u32, prng: Prng) -> Client {
        let mut outbox = Vec::new();
        let hello = Hello {
            version_min: 1,
            version_max: 1,
            capabilities: Capabilities::ALL,
            client: "simulated",
            token: "",
        };
        if !manners.mute {
            ClientFrame::Hello(hello).encode(&mut outbox);
        }
        Client {
            is_faulty: manners.mute,
            manners,
            asked,
            outbox: outbox.into(),
            decoder: Decoder::new(Side::FromServer, 1 << 20),
            welcome: None,
            request_credit: 0,
            next_number: 1,
            going_away: false,
            error: None,
            context,
            prng,
        }
    }

    pub fn is_deaf(&self, now: Instant, faults: bool) -> bool {
        self.manners.deaf_at.is_some_and(|at| at <= now) && (faults || self.manners.stays_deaf)
    }

    /// Nothing of what it asked is open.
    pub fn is_over(&self) -> bool {
        self.asked.iter().all(|asked| asked.end.is_some())
    }

    /// The connection is gone, and every answer with it.
    pub fn handle_closed(&mut self) {
        for asked in &mut self.asked {
            asked.end.get_or_insert(End::Done(FinishReason::Cancelled));
        }
    }

    /// Whether the server may end the connection by itself.
    pub fn may_be_closed(&self) -> bool {
        self.is_faulty || self.going_away
    }

    /// Puts what is due into the outbox.
    pub fn speak(&mut self, now: Instant, faults: bool) -> bool {
        let before = self.outbox.len();
        if self.manners.garbage_at.is_some_and(|at| at <= now) && faults {
            self.manners.garbage_at = None;
            self.is_faulty = true;
            let count = self.prng.between(1, 100);
            for _ in 0..count {
                self.outbox.push_back(self.prng.next_u64() as u8);
            }
        }
        let Some((streams_max, window_max)) = self.welcome else {
            return before != self.outbox.len();
        };
        let mut open = self.asked.iter().filter(|a| a.number.is_some() && a.end.is_none()).count();
        let mut out = Vec::new();
        for asked in &mut self.asked {
            let Some(number) = asked.number else {
                let may =
                    self.request_credit > 0 && open < streams_max as usize && !self.going_away;
                if may && asked.plan.at <= now {
                    asked.plan.window = asked.plan.window.min(window_max);
                    asked.number = Some(self.next_number);
                    asked.sent_at = now;
                    asked.plan.deadline =
                        asked.plan.deadline.map(|at| now.plus_ns(at.ns_since(asked.plan.at)));
                    asked.plan.at = now;
                    let request = asked.to_request(&mut self.prng);
                    let part = self.prng.between(1, 600) as usize;
                    encode_request(&mut out, self.next_number, &request, part);
                    self.next_number += self.prng.between(1, 3) as u32;
                    self.request_credit -= 1;
                    open += 1;
                }
                continue;
            };
            if asked.end.is_some() {
                continue;
            }
            if asked.cancel_at().is_some_and(|at| at <= now) {
                asked.cancelled = true;
                ClientFrame::Cancel { stream: number }.encode(&mut out);
            }
            if asked.credit_due > 0 && asked.gives_credit(faults) {
                let tokens = std::mem::take(&mut asked.credit_due);
                asked.credit_given += tokens;
                ClientFrame::Credit { stream: number, tokens }.encode(&mut out);
            }
        }
        if !out.is_empty() && self.prng.below(16) == 0 {
            ClientFrame::Ping(7).encode(&mut out);
        }
        self.outbox.extend(out);
        before != self.outbox.len()
    }

    /// Asks what it will not be able to ask any more to be over.
    pub fn give_up_unsent(&mut self) {
        for asked in self.asked.iter_mut().filter(|asked| asked.number.is_none()) {
            asked.end = Some(End::Rejected(RejectReason::ShuttingDown));
        }
    }

    pub fn is_told_to_go(&self) -> bool {
        self.going_away
    }

    /// When it has something to say by itself.
    pub fn next_timeout(&self) -> Option<Instant> {
        let of = |asked: &Asked| match asked.number {
            None => Some(asked.plan.at),
            Some(_) => asked.cancel_at(),
        };
        self.asked.iter().filter_map(of).chain(self.manners.garbage_at).min()
    }

    /// Takes in bytes from the server.
    pub fn hear(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut input = bytes;
        let mut decoder = std::mem::replace(&mut self.decoder, Decoder::new(Side::FromServer, 0));
        loop {
            match decoder.next(&mut input) {
                Ok(Some(Piece::Frame { header, payload })) => {
                    let frame = ServerFrame::decode(header, payload);
                    let frame = frame.map_err(|error| format!("{header:?}: {error:?}"))?;
                    self.handle(&frame)?;
                }
                Ok(None) => break,
                other => return Err(format!("the server sends {other:?}")),
            }
        }
        self.decoder = decoder;
        Ok(())
    }

    fn handle(&mut self, frame: &ServerFrame<'_>) -> Result<(), String> {
        let stream = match *frame {
            ServerFrame::Welcome(welcome) => {
                self.welcome = Some((welcome.streams_max, welcome.window_tokens_max));
                self.request_credit = welcome.request_credit;
                return Ok(());
            }
            ServerFrame::RequestCredit(count) => {
                self.request_credit += count;
                return Ok(());
            }
            ServerFrame::GoingAway { .. } => {
                self.going_away = true;
                return Ok(());
            }
            ServerFrame::Error { code, message, .. } => {
                self.error = Some(code);
                // Who has nothing open and says nothing for long has to go.
                let idle = self.asked.iter().all(|a| a.number.is_none() || a.end.is_some());
                self.going_away |= idle && code == ErrorCode::IdleTimeout as u16;
                return match self.may_be_closed() {
                    true => Ok(()),
                    false => Err(format!("ERROR {code} to a well-behaved client: {message}")),
                };
            }
            ServerFrame::Ping(_) | ServerFrame::Pong(_) | ServerFrame::StatsReply(_) => {
                return Ok(());
            }
            ServerFrame::Accepted { stream, .. }
            | ServerFrame::Tokens { stream, .. }
            | ServerFrame::Paused { stream }
            | ServerFrame::Resumed { stream }
            | ServerFrame::Done { stream, .. }
            | ServerFrame::Rejected { stream, .. } => stream,
        };
        let asked = self.asked.iter_mut().find(|asked| asked.number == Some(stream));
        match asked {
            Some(asked) => match asked.handle(frame, self.context) {
                Err(_) if self.is_faulty => Ok(()),
                Err(what) => Err(format!("stream {stream}: {what}")),
                Ok(()) => Ok(()),
            },
            None if self.is_faulty => Ok(()),
            None => Err(format!("{frame:?} for no stream")),
        }
    }
}
