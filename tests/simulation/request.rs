//! One request of a run: what is asked, how its client behaves, and what has come of it so far.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay::base::{Instant, Prng, TokenTable};
use forebay::message::{Event, EventBatch, Logprob, SeqKey, StreamKey};
use forebay::request::{Class, FinishReason, Name, RejectReason, SamplingParams, TokenId, Usage};

use crate::model::{self, Answer, Question};
use crate::options::Options;

/// Time from an end's cause to its event: far more than a front core ever sits on its batches.
const END_MS_MAX: u64 = 200;

/// When its client gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelWhen {
    Never,
    /// So long after the ask, in whatever state that is; a grant is awaited, since there is
    /// nothing to name before.
    After(u64),
    /// With so many tokens received.
    Tokens(u32),
    /// When the stream pauses.
    Paused,
}

/// What is asked, and how the client will behave.
#[derive(Clone, Debug)]
pub struct Plan {
    pub at: Instant,
    pub class: Class,
    pub tenant: Name,
    pub user: Name,
    pub question: Question,
    pub deadline: Option<Instant>,
    pub window: u32,
    /// Time from grant to submission.
    pub tokenise_ns: u64,
    pub submits: bool,
    pub cancel: CancelWhen,
    /// Time that the client takes to read one token.
    pub read_ns: u64,
    /// It reads nothing more after so many tokens, until faults are off (or never, see
    /// `stays_stalled`).
    pub stalls_after: Option<u32>,
    pub stays_stalled: bool,
    pub answer: Answer,
}

impl Plan {
    pub fn draw(
        options: &Options,
        prng: &mut Prng,
        at: Instant,
        context: u32,
        table: &TokenTable,
    ) -> Plan {
        let p = prng;
        let limits = &options.limits;
        let longest = options.prompt_max.min(u64::from(context) + 2);
        let length = match p.chance(options.prompt_at_limit) {
            true => p.between(u64::from(context).saturating_sub(2).max(1), u64::from(context) + 1),
            false => p.between(1, longest),
        };
        let draw_token = |p: &mut Prng| p.between(2, 255) as TokenId;
        let sampling = SamplingParams {
            top_k: options.end_rarity,
            seed: p.next_u64(),
            frequency_penalty: if p.chance(options.penalties) { 0.5 } else { 0.0 },
            logprobs: p.chance(options.logprobs).then(|| p.between(0, 20) as u8),
            ..SamplingParams::default()
        };
        let stops = if p.chance(options.stop_strings) { p.between(1, 3) } else { 0 };
        let stop = |p: &mut Prng| -> Box<[u8]> {
            let count = p.between(1, 4) as usize;
            (0..count).map(|_| b"ab\n"[p.index(3)]).collect()
        };
        let omitted = p.chance(options.output_omitted);
        let question = Question {
            prompt: (0..length).map(|_| draw_token(p)).collect(),
            sampling,
            stop: (0..stops).map(|_| stop(p)).collect(),
            ignore_eos: p.chance(options.ignore_eos),
            max_tokens: if omitted { 0 } else { p.between(1, options.output_max) as u32 },
        };
        let answer = match question.prompt.len() < context as usize {
            true => model::answer(&question, context, table),
            false => Answer { tokens: vec![], text: vec![], finish: FinishReason::ContextFull },
        };
        let (tenant, user) = who(options, question.sampling.seed);
        let deadline = p.chance(options.deadline).then(|| at.plus_ms(p.between(1, 3_000)));
        let class = Class::ALL[p.index(4)];
        Plan {
            at,
            class: options.one_class.unwrap_or(class),
            tenant,
            user,
            deadline,
            window: p.between(1, u64::from(limits.stream_window_tokens_max)) as u32,
            tokenise_ns: p.between(0, 300_000),
            submits: !p.chance(options.forget_submit),
            cancel: match p.chance(options.cancel) {
                true => match p.below(3) {
                    0 => CancelWhen::After(p.between(0, 50_000_000)),
                    1 => CancelWhen::Tokens(p.between(1, 20) as u32),
                    _ => CancelWhen::Paused,
                },
                false => CancelWhen::Never,
            },
            read_ns: match p.chance(options.slow_reader) {
                true => p.between(0, 5_000_000),
                false => 0,
            },
            stalls_after: p.chance(options.stalled_reader).then(|| p.between(0, 12) as u32),
            stays_stalled: p.below(2) == 0,
            question,
            answer,
        }
    }
}

/// Whose a request is, by lots that it has drawn already. Half of the lots are the first tenant's.
fn who(options: &Options, lots: u64) -> (Name, Name) {
    let name = |text: &str| Name::new(text).expect("it is short");
    let lot = (lots % (2 * options.tenants as u64)) as usize;
    let tenant = ["flood", "a", "b", "c", "d", "e"][if lot < options.tenants { lot } else { 0 }];
    (name(tenant), name(["", "ann", "bob"][(lots >> 32) as usize % 3]))
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    Done(FinishReason),
    Rejected(RejectReason),
}

/// Where a request stands, as its front core knows it.
#[derive(Debug)]
pub struct Request {
    pub plan: Plan,
    pub key: StreamKey,
    pub asked_at: Option<Instant>,
    pub granted: Option<(SeqKey, Instant)>,
    pub submitted: bool,
    pub cancelled: bool,
    /// It must be over by then: it was cancelled, or the drain is.
    pub over_by: Option<Instant>,
    /// It was submitted into a drain: too late to be accepted.
    pub submitted_late: bool,
    accepted: bool,
    paused: bool,
    tokens: Vec<TokenId>,
    text: Vec<u8>,
    /// It was given text that the whole answer has not: what was held back for a stop string is
    /// let out when an answer ends before its time.
    text_overrun: bool,
    /// Credit given in all, the first window included.
    pub credit_given: u32,
    /// When the last of it was given.
    pub credit_given_at: Instant,
    stall_timeout_ms: u64,
    /// Credit to give with the next message.
    pub credit_due: u32,
    /// When the client will have read each token that it has not read yet.
    unread: VecDeque<Instant>,
    unread_free_at: Instant,
    pub paused_at: Option<Instant>,
    pub end: Option<End>,
}

impl Request {
    pub fn new(plan: Plan, key: StreamKey, stall_timeout_ms: u64) -> Request {
        Request {
            credit_given_at: Instant::ZERO,
            stall_timeout_ms,
            credit_given: plan.window,
            plan,
            key,
            asked_at: None,
            granted: None,
            submitted: false,
            cancelled: false,
            over_by: None,
            submitted_late: false,
            accepted: false,
            paused: false,
            tokens: Vec::new(),
            text: Vec::new(),
            text_overrun: false,
            credit_due: 0,
            unread: VecDeque::new(),
            unread_free_at: Instant::ZERO,
            paused_at: None,
            end: None,
        }
    }

    pub fn is_over(&self) -> bool {
        self.end.is_some()
    }

    /// From `at` on nothing keeps it from its end but the way there.
    pub fn must_end(&mut self, at: Instant) {
        let by = at.plus_ms(END_MS_MAX);
        self.over_by = Some(self.over_by.map_or(by, |before| before.min(by)));
    }

    /// Whether its end is overdue.
    pub fn is_overdue(&self, now: Instant) -> bool {
        self.end.is_none() && self.granted.is_some() && self.over_by.is_some_and(|by| by < now)
    }

    pub fn output_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// When its cancel is due, if it can be named already.
    pub fn cancel_at(&self) -> Option<Instant> {
        let (_, granted) = self.granted?;
        match self.plan.cancel {
            CancelWhen::Never => None,
            CancelWhen::After(ns) => Some(self.asked_at?.plus_ns(ns).max(granted)),
            CancelWhen::Tokens(count) => (self.tokens.len() as u32 >= count).then_some(granted),
            CancelWhen::Paused => self.paused.then_some(granted),
        }
    }

    /// When the client will have read another token.
    pub fn next_read(&self, faults: bool) -> Option<Instant> {
        if let Some(stalls_after) = self.plan.stalls_after
            && (faults || self.plan.stays_stalled)
            && self.credit_given + self.credit_due >= self.plan.window + stalls_after
        {
            return None;
        }
        self.unread.front().copied()
    }

    /// The client reads what it has had the time for.
    pub fn read(&mut self, now: Instant, faults: bool) -> bool {
        let mut busy = false;
        while let Some(at) = self.next_read(faults)
            && at <= now
        {
            self.unread.pop_front();
            self.credit_due += 1;
            busy = true;
        }
        busy
    }

    /// Takes in one event of a batch; `cursor` says how far the batch's parts are used up.
    pub fn handle(
        &mut self,
        event: &Event,
        batch: &EventBatch,
        cursor: &mut Cursor,
        now: Instant,
        table: &Arc<TokenTable>,
    ) -> Result<(), String> {
        if let Some(end) = self.end {
            return Err(format!("{event:?} after {end:?}"));
        }
        if self.asked_at.is_none() {
            return Err(format!("{event:?} before the ask"));
        }
        match *event {
            Event::Grant { seq, .. } => {
                if self.granted.replace((seq, now)).is_some() {
                    return Err("granted twice".into());
                }
            }
            Event::Reject { reason, retry_after_ms, .. } => {
                if !self.tokens.is_empty() {
                    return Err(format!("{reason:?} after output: evicted after admission"));
                }
                check_retry(reason, retry_after_ms)?;
                self.check_reject(reason, now)?;
                self.end = Some(End::Rejected(reason));
            }
            Event::Accepted { prompt_tokens, .. } => {
                let wrong = prompt_tokens as usize != self.plan.question.prompt.len();
                if wrong
                    || !self.submitted
                    || self.submitted_late
                    || std::mem::replace(&mut self.accepted, true)
                {
                    return Err(format!("{event:?} is wrong or out of place"));
                }
            }
            Event::Tokens { token_count, text_bytes, logprob_count, .. } => {
                let counts = (token_count as usize, text_bytes as usize, logprob_count as usize);
                self.handle_tokens(batch, cursor, counts, now, table)?;
            }
            Event::Paused { .. } => {
                if std::mem::replace(&mut self.paused, true) {
                    return Err("paused twice".into());
                }
                self.paused_at = Some(now);
            }
            Event::Resumed { .. } => {
                if !std::mem::replace(&mut self.paused, false) {
                    return Err("resumed and not paused".into());
                }
            }
            Event::Done { finish, usage, timings, .. } => {
                self.check_done(finish, usage, now)?;
                if timings.queue_ns > timings.total_ns || timings.ttft_ns > timings.total_ns {
                    return Err(format!("{timings:?} do not add up"));
                }
                self.end = Some(End::Done(finish));
            }
        }
        Ok(())
    }

    fn handle_tokens(
        &mut self,
        batch: &EventBatch,
        cursor: &mut Cursor,
        (token_count, text_bytes, logprob_count): (usize, usize, usize),
        now: Instant,
        table: &Arc<TokenTable>,
    ) -> Result<(), String> {
        if !self.accepted || token_count + text_bytes == 0 {
            return Err("tokens out of place".into());
        }
        let tokens = cursor.tokens(batch, token_count);
        let wanted = self.plan.question.sampling.logprobs;
        if logprob_count != wanted.map_or(0, |_| token_count) {
            return Err(format!("{logprob_count} log-probabilities for {token_count} tokens"));
        }
        for &token in tokens.iter().take(logprob_count) {
            let (entry, top) = cursor.logprob(batch);
            let expected = model::alternatives(token, wanted.unwrap_or(0));
            if entry.logprob != model::logprob(token) || !top.iter().copied().eq(expected) {
                return Err(format!("{entry:?} {top:?} is not the log-probability of {token}"));
            }
        }
        self.tokens.extend_from_slice(tokens);
        self.text.extend_from_slice(cursor.text(batch, text_bytes));
        if !self.plan.answer.tokens.starts_with(&self.tokens) {
            return Err(format!("token {} is not the model's", self.tokens.len() - 1));
        }
        if self.text_overrun {
            return Err("output after what was held back for a stop string".into());
        }
        if self.tokens.len() as u32 > self.credit_given {
            return Err(format!("more tokens than the {} credits given", self.credit_given));
        }
        let bytes = |&token: &TokenId| table.bytes(token).iter().copied();
        let whole: Vec<u8> = self.tokens.iter().flat_map(bytes).collect();
        if !whole.starts_with(&self.text) {
            return Err("the text is not the tokens'".into());
        }
        self.text_overrun = !self.plan.answer.text.starts_with(&self.text);
        for _ in 0..token_count {
            self.unread_free_at = self.unread_free_at.max(now).plus_ns(self.plan.read_ns);
            self.unread.push_back(self.unread_free_at);
        }
        Ok(())
    }

    fn check_reject(&self, reason: RejectReason, now: Instant) -> Result<(), String> {
        let past = self.plan.deadline.is_some_and(|deadline| deadline <= now);
        let fitting = match reason {
            RejectReason::DeadlineExpired => past,
            RejectReason::DeadlineUnattainable => self.plan.deadline.is_some() && !self.submitted,
            RejectReason::QueueFull => self.granted.is_none(),
            RejectReason::TtftUnattainable => {
                self.granted.is_none() && self.plan.class != Class::Bulk
            }
            RejectReason::TenantRate | RejectReason::TooManyStreams => self.granted.is_none(),
            RejectReason::Invalid => false,
            RejectReason::ExceedsCapacity => self.plan.answer.tokens.is_empty(),
            _ => true,
        };
        if fitting { Ok(()) } else { Err(format!("rejected without cause: {reason:?}")) }
    }

    fn check_done(&self, finish: FinishReason, usage: Usage, now: Instant) -> Result<(), String> {
        let mut usage_expected = Usage::default();
        if self.submitted && self.accepted {
            usage_expected.prompt_tokens = self.plan.question.prompt.len() as u32;
        }
        usage_expected.output_tokens = self.tokens.len() as u32;
        if usage != usage_expected {
            return Err(format!("{finish:?} with {usage:?}, not {usage_expected:?}"));
        }
        let answer = &self.plan.answer;
        let natural = match finish {
            FinishReason::EndOfText
            | FinishReason::StopString
            | FinishReason::MaxTokens
            | FinishReason::ContextFull => true,
            FinishReason::Cancelled if self.cancelled => false,
            FinishReason::Deadline if self.plan.deadline.is_some_and(|at| at <= now) => false,
            FinishReason::Stalled
                if self.paused && now.ms_since(self.credit_given_at) >= self.stall_timeout_ms =>
            {
                false
            }
            FinishReason::ShuttingDown | FinishReason::DeviceFailed => false,
            _ => return Err(format!("ended without cause: {finish:?}")),
        };
        if natural && finish != answer.finish {
            return Err(format!("ended with {finish:?}, not {:?}", answer.finish));
        }
        if natural && (self.tokens != answer.tokens || self.text != answer.text) {
            let (got, all) = (self.tokens.len(), answer.tokens.len());
            return Err(format!("{finish:?} with {got} of {all} tokens, or not all text"));
        }
        Ok(())
    }
}

/// How far the parts of a batch are used up.
#[derive(Default)]
pub struct Cursor {
    tokens: usize,
    text: usize,
    logprobs: usize,
    top: usize,
}

impl Cursor {
    fn tokens<'a>(&mut self, batch: &'a EventBatch, count: usize) -> &'a [TokenId] {
        self.tokens += count;
        &batch.tokens[self.tokens - count..self.tokens]
    }

    fn text<'a>(&mut self, batch: &'a EventBatch, count: usize) -> &'a [u8] {
        self.text += count;
        &batch.text[self.text - count..self.text]
    }

    fn logprob<'a>(&mut self, batch: &'a EventBatch) -> (Logprob, &'a [(TokenId, f32)]) {
        let entry = batch.logprobs[self.logprobs];
        self.logprobs += 1;
        self.top += usize::from(entry.top_count);
        (entry, &batch.top[self.top - usize::from(entry.top_count)..self.top])
    }

    /// Whether every part of the batch was spoken for.
    pub fn is_at_end(&self, batch: &EventBatch) -> bool {
        self.tokens == batch.tokens.len()
            && self.text == batch.text.len()
            && self.logprobs == batch.logprobs.len()
            && self.top == batch.top.len()
    }
}

/// The time that a refused client was told: none, or one that is not too far off.
fn check_retry(reason: RejectReason, retry_after_ms: Option<u32>) -> Result<(), String> {
    use RejectReason::{TenantRate, TooManyStreams};
    let passes = matches!(reason, TenantRate | TooManyStreams);
    if passes && retry_after_ms.is_none() {
        return Err(format!("{reason:?}, and no word when to come back"));
    }
    let most_ms = if passes { 60_000 } else { 30_000 };
    match retry_after_ms.is_some_and(|ms| ms == 0 || ms > most_ms) {
        true => Err(format!("told to come back in {retry_after_ms:?} ms")),
        false => Ok(()),
    }
}
