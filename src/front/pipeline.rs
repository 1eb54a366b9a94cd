//! A request's way to the engine: ask, body, tokens, submission; and what else the engine is told.

use std::collections::VecDeque;
use std::sync::Arc;

use super::core::FrontCore;
use super::record::Flight;
use super::settings::FrontSettings;
use super::stream::{Phase, Stream, stream_key};
use super::timers::Timer;
use super::tokenise::{Tokenise, TokeniseFailure, TokeniseQueue, Tokenised};
use crate::base::{Instant, Pen, Slab, SlabKey};
use crate::message::{Ask, ControlMessage, EVENT_BATCHES, EventBatch, RequestMessage, Submission};
use crate::ports::FrontEnds;
use crate::protocol::{
    BodyError, Capabilities, Prelude, Prompt, PromptKind, RequestOptions, decode_body,
};
use crate::request::{Class, FinishReason, RejectReason, TokenId};

/// The streams of a front core, and its ends of the links to the engine.
pub(super) struct Pipeline {
    front: u8,
    pub(super) streams: Slab<Stream>,
    tokenise: Box<dyn Tokenise>,
    tokenising: TokeniseQueue,
    ends: FrontEnds,
    /// Streams in [`Phase::WaitingToAsk`], oldest first; those that ended meanwhile are skipped.
    waiting_to_ask: VecDeque<SlabKey>,
    /// Streams in [`Phase::WaitingToSubmit`], oldest first; likewise.
    waiting_to_submit: VecDeque<SlabKey>,
    /// Streams with a credit or a cancel for the control ring, each once.
    control_list: VecDeque<SlabKey>,
    /// Streams in [`Phase::Asked`].
    asks: u32,
    asks_max: u32,
    /// The request link had no credit for what waits; recorded when it begins.
    is_held_up: bool,
    /// The gate was found closed since the engine's bell was rung last.
    has_refused: bool,
    context_max: u32,
    /// Sum of the streams' `ingest_bytes`.
    pub(super) ingest_bytes: u64,
}

impl Pipeline {
    pub(super) fn new(
        settings: &FrontSettings,
        tokenise: Box<dyn Tokenise>,
        ends: FrontEnds,
    ) -> Pipeline {
        Pipeline {
            front: settings.front,
            streams: Slab::new(settings.streams_max()),
            tokenise,
            tokenising: TokeniseQueue::default(),
            ends,
            waiting_to_ask: VecDeque::new(),
            waiting_to_submit: VecDeque::new(),
            control_list: VecDeque::new(),
            asks: 0,
            is_held_up: false,
            has_refused: false,
            asks_max: settings.limits.asks_max,
            context_max: settings.limits.context_max,
            ingest_bytes: 0,
        }
    }

    /// Upper estimate of a prompt's tokens: a token has at least a byte, or four as an id.
    pub(super) fn estimate_tokens(&self, prelude: &Prelude) -> u32 {
        let tokens = match prelude.kind {
            PromptKind::Tokens => prelude.prompt_bytes.div_ceil(4),
            PromptKind::Text | PromptKind::Messages => {
                prelude.prompt_bytes.saturating_add(self.tokenise.template_tokens_max())
            }
        };
        tokens.min(self.context_max)
    }

    /// A new stream, which waits to ask. `None` when the table is full.
    pub(super) fn insert(&mut self, stream: Stream) -> Option<SlabKey> {
        let bytes = stream.ingest_bytes;
        let key = self.streams.insert(stream).ok()?;
        self.ingest_bytes += bytes;
        self.waiting_to_ask.push_back(key);
        Some(key)
    }

    /// Whether the engine would refuse a request of this class whatever it is, and with what.
    pub(super) fn refuse_at_gate(&mut self, class: Class) -> Option<(RejectReason, Option<u32>)> {
        let refusal = self.ends.gate.refuse(class);
        self.has_refused |= refusal.is_some();
        refusal
    }

    /// Once a turn, not once a refusal: the engine has counts to take in.
    pub(super) fn announce_refusals(&mut self) {
        if std::mem::take(&mut self.has_refused) {
            self.ends.engine_bell.ring();
        }
    }

    /// The next batch of events.
    pub(super) fn receive(&mut self) -> Option<Box<EventBatch>> {
        self.ends.events.pop()
    }

    /// Sends a batch back.
    pub(super) fn give_back(&mut self, mut batch: Box<EventBatch>) {
        batch.clear();
        // Room for all batches is kept free (see `send_control`); a ring without its far end
        // refuses, and then the box just ends here.
        if let Err(error) = self.ends.control.push(ControlMessage::Return(batch)) {
            assert!(self.ends.control.is_abandoned(), "no room for a batch: {error:?}");
        }
        self.ends.engine_bell.ring();
    }

    pub(super) fn engine_is_gone(&mut self) -> bool {
        self.ends.events.is_abandoned() && self.ends.events.is_empty()
    }

    /// The kernel took tokens of a stream, which may have ended.
    pub(super) fn handle_taken(&mut self, key: SlabKey, tokens: u32) {
        if let Some(stream) = self.streams.get_mut(key) {
            stream.credit.taken(tokens);
            self.update_credit(key);
        }
    }

    /// Passes on what credit may go to the engine now.
    pub(super) fn update_credit(&mut self, key: SlabKey) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        // Before the submission nothing uses credit up; then it goes along in one message.
        if stream.phase != Phase::Submitted {
            return;
        }
        stream.credit_to_send += stream.credit.take_due();
        if stream.credit_to_send > 0 {
            self.put_in_control_list(key);
        }
    }

    fn put_in_control_list(&mut self, key: SlabKey) {
        let stream = self.streams.get_mut(key).expect("it has something to send");
        if !stream.is_in_control_list {
            stream.is_in_control_list = true;
            self.control_list.push_back(key);
        }
    }

    /// Puts credits and cancels on the control ring, one of each a stream at most, and leaves
    /// room for all batches that may have to go back.
    pub(super) fn send_control(&mut self) -> bool {
        let mut sent = false;
        while let Some(&key) = self.control_list.front() {
            let Some(stream) = self.streams.get_mut(key) else {
                self.control_list.pop_front();
                continue;
            };
            if self.ends.control.free() < EVENT_BATCHES + 2 {
                break;
            }
            stream.is_in_control_list = false;
            self.control_list.pop_front();
            let seq = stream.seq.expect("control messages are about granted sequences");
            let tokens = std::mem::take(&mut stream.credit_to_send);
            let cancel = std::mem::take(&mut stream.has_cancel_to_send);
            if cancel {
                let reason = stream.cancel.expect("a cancel has a reason");
                let _ = self.ends.control.push(ControlMessage::Cancel { seq, reason });
            } else if tokens > 0 {
                let _ = self.ends.control.push(ControlMessage::Credit { seq, tokens });
            }
            sent = true;
        }
        if sent {
            self.ends.engine_bell.ring();
        }
        sent
    }

    /// Sends submissions, then asks, as far as link and bounds allow.
    fn send_requests(&mut self, pen: &mut Pen, now: Instant) -> bool {
        let sent = self.send_submissions(pen, now) | self.send_asks(pen, now);
        let waits = !self.waiting_to_submit.is_empty() || !self.waiting_to_ask.is_empty();
        let is_held_up = waits && self.ends.requests.credits() == 0;
        if is_held_up && !self.is_held_up {
            let (to_submit, to_ask) = (self.waiting_to_submit.len(), self.waiting_to_ask.len());
            pen.record(now, Flight::LinkFull as u16, [to_submit as u64, to_ask as u64, 0]);
        }
        self.is_held_up = is_held_up;
        sent
    }

    fn send_submissions(&mut self, pen: &mut Pen, now: Instant) -> bool {
        let mut sent = false;
        while let Some(&key) = self.waiting_to_submit.front() {
            let stream = self.streams.get_mut(key);
            let Some(stream) = stream.filter(|s| s.phase == Phase::WaitingToSubmit) else {
                self.waiting_to_submit.pop_front();
                continue;
            };
            if self.ends.requests.credits() == 0 {
                break;
            }
            self.waiting_to_submit.pop_front();
            let submission = stream.submission.take().expect("it waits with its submission");
            stream.phase = Phase::Submitted;
            let (its, seq) = (submission.stream.recorded(), submission.seq.recorded());
            pen.record(now, Flight::Submit as u16, [its, seq, submission.tokens.len() as u64]);
            let _ = self.ends.requests.send(RequestMessage::Submit(submission));
            self.update_credit(key);
            sent = true;
        }
        sent
    }

    fn send_asks(&mut self, pen: &mut Pen, now: Instant) -> bool {
        let mut sent = false;
        while self.asks < self.asks_max {
            let Some(&key) = self.waiting_to_ask.front() else { break };
            let stream = self.streams.get_mut(key);
            let Some(stream) = stream.filter(|s| s.phase == Phase::WaitingToAsk) else {
                self.waiting_to_ask.pop_front();
                continue;
            };
            if self.ends.requests.credits() == 0 {
                break;
            }
            self.waiting_to_ask.pop_front();
            stream.phase = Phase::Asked;
            self.asks += 1;
            let ask = Ask {
                stream: stream_key(self.front, key),
                class: stream.prelude.class,
                tenant: stream.prelude.tenant,
                user: stream.prelude.user,
                input_bytes: u32::try_from(stream.prelude.body_bytes()).expect("judged"),
                input_tokens: stream.input_tokens,
                max_tokens: stream.prelude.max_tokens,
                deadline: stream.deadline,
                window_tokens: stream.prelude.window_tokens,
            };
            pen.record(now, Flight::Ask as u16, [ask.stream.recorded(), 0, 0]);
            let _ = self.ends.requests.send(RequestMessage::Ask(ask));
            sent = true;
        }
        sent
    }

    /// An ask was answered.
    pub(super) fn end_ask(&mut self) {
        self.asks = self.asks.checked_sub(1).expect("an answer has an ask");
    }

    /// Frees what a stream holds of the ingest budget, and its body.
    fn release_body(&mut self, key: SlabKey) {
        if let Some(stream) = self.streams.get_mut(key) {
            stream.body = Vec::new();
            self.ingest_bytes -= std::mem::take(&mut stream.ingest_bytes);
        }
    }

    /// Forgets every stream: no event will come.
    pub(super) fn forget_all(&mut self) {
        let keys: Vec<SlabKey> = self.streams.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.tokenising.cancel(key);
            self.streams.remove(key);
        }
        self.ingest_bytes = 0;
        self.asks = 0;
    }
}

impl FrontCore {
    /// Ends a stream early, whatever it is doing. Its connection is told by the engine's last
    /// event, if it is still to be told anything.
    pub(super) fn cancel(&mut self, key: SlabKey, reason: FinishReason) {
        let stream = self.pipeline.streams.get_mut(key).expect("it is in the table");
        match stream.phase {
            Phase::WaitingToAsk => {
                assert!(stream.conn.is_none(), "its connection would never be told");
                self.forget(key);
            }
            // The key to cancel it by comes with the grant.
            Phase::Asked => stream.cancel = stream.cancel.or(Some(reason)),
            Phase::Body | Phase::Tokenising | Phase::WaitingToSubmit | Phase::Submitted => {
                stream.phase = Phase::Ending;
                stream.cancel = Some(reason);
                stream.has_cancel_to_send = true;
                stream.submission = None;
                if let Some(at) = stream.body_deadline.take() {
                    self.timers.clear(at, Timer::Body(key));
                }
                self.pipeline.tokenising.cancel(key);
                self.pipeline.release_body(key);
                self.pipeline.put_in_control_list(key);
            }
            Phase::Ending => {}
        }
    }

    /// Takes a stream out of the table: the engine does not know of it, or had its last word.
    pub(super) fn forget(&mut self, key: SlabKey) {
        self.pipeline.tokenising.cancel(key);
        self.pipeline.release_body(key);
        let stream = self.pipeline.streams.remove(key).expect("it is in the table");
        assert!(stream.conn.is_none(), "a stream ends with a last frame, or without a client");
        if let Some(at) = stream.body_deadline {
            self.timers.clear(at, Timer::Body(key));
        }
    }

    /// The engine granted an ask: the body may come.
    pub(super) fn begin_body(&mut self, key: SlabKey, now: Instant) {
        let at = now.plus_ms(self.settings.body_timeout_ms);
        let stream = self.pipeline.streams.get_mut(key).expect("it was granted");
        stream.phase = Phase::Body;
        let bytes = usize::try_from(stream.prelude.body_bytes()).expect("judged");
        stream.body = Vec::with_capacity(bytes);
        stream.body_deadline = Some(at);
        self.timers.set(at, Timer::Body(key));
    }

    pub(super) fn handle_body_timeout(&mut self, key: SlabKey, now: Instant) {
        let Some(stream) = self.pipeline.streams.get_mut(key) else { return };
        if stream.body_deadline.take().is_some() {
            let message =
                format!("the body did not come within {} ms", self.settings.body_timeout_ms);
            self.refuse_granted(key, RejectReason::Invalid, &message, now);
        }
    }

    /// All of the body is here.
    pub(super) fn begin_tokenising(&mut self, key: SlabKey, now: Instant) {
        let stream = self.pipeline.streams.get_mut(key).expect("it has a body");
        stream.phase = Phase::Tokenising;
        let bytes = std::mem::take(&mut stream.body);
        let prelude = stream.prelude;
        if let Err(error) = self.begin_prompt(key, &prelude, &bytes, now) {
            self.refuse_granted(key, RejectReason::Invalid, &error.0, now);
        }
    }

    fn begin_prompt(
        &mut self,
        key: SlabKey,
        prelude: &Prelude,
        bytes: &[u8],
        now: Instant,
    ) -> Result<(), BodyError> {
        let body = decode_body(prelude, bytes)?;
        if body.options.sampling.logprobs.is_some() && !self.knows_logprobs(key) {
            return Err(BodyError("logprobs needs capability bit 1 in HELLO".into()));
        }
        let vocab = self.pipeline.tokenise.vocab_tokens();
        let foreign = |&(token, _): &(TokenId, f32)| token >= vocab;
        if let Some((token, _)) = body.options.sampling.logit_bias.iter().copied().find(foreign) {
            let message = format!("logit_bias names token {token}; ids are below {vocab}");
            return Err(BodyError(message.into()));
        }
        let ready = match body.prompt {
            Prompt::Tokens(ids) => Some(check_ids(ids.iter(), vocab)?),
            prompt => {
                let job = self.pipeline.tokenise.begin(&prompt)?;
                self.pipeline.tokenising.push(key, job);
                None
            }
        };
        let stream = self.pipeline.streams.get_mut(key).expect("it has a body");
        stream.submission = Some(Box::new(unfinished_submission(
            stream_key(self.pipeline.front, key),
            stream,
            body.options,
        )));
        if let Some(tokens) = ready {
            self.finish_tokenising(key, Ok(tokens), now);
        }
        Ok(())
    }

    fn knows_logprobs(&mut self, key: SlabKey) -> bool {
        let conn = self.pipeline.streams.get(key).and_then(|stream| stream.conn);
        let connection = conn.and_then(|conn| self.connections.get_mut(conn));
        connection.is_some_and(|connection| connection.has(Capabilities::LOGPROBS))
    }

    /// One slice of tokenising.
    pub(super) fn advance_tokenising(&mut self, now: Instant) -> bool {
        if self.pipeline.tokenising.is_empty() {
            return false;
        }
        if let Some((key, tokens)) = self.pipeline.tokenising.advance(self.pipeline.context_max) {
            self.finish_tokenising(key, tokens, now);
        }
        true
    }

    /// The prompt's tokens are there: can it ever fit?
    fn finish_tokenising(&mut self, key: SlabKey, tokens: Tokenised, now: Instant) {
        let context = self.pipeline.context_max;
        let too_long = |count: usize| {
            let message = format!(
                "the prompt has {count} tokens or more; with at least one of output at most \
                 {context} fit"
            );
            (RejectReason::ExceedsCapacity, message)
        };
        let refusal = match &tokens {
            Err(TokeniseFailure::Invalid(error)) => {
                Some((RejectReason::Invalid, error.to_string()))
            }
            Err(TokeniseFailure::TooLong(count)) => Some(too_long(*count)),
            Ok(tokens) if tokens.is_empty() => {
                Some((RejectReason::Invalid, "the prompt has no tokens".to_owned()))
            }
            Ok(tokens) if tokens.len() >= context as usize => Some(too_long(tokens.len())),
            Ok(_) => None,
        };
        let stream = self.pipeline.streams.get_mut(key).expect("its job was not cancelled");
        let refusal = refusal.or_else(|| {
            let count = tokens.as_ref().map_or(0, Vec::len);
            // The permit only ever shrinks: the engine reserved no more than was asked.
            (count > stream.input_tokens as usize).then(|| {
                let message = format!(
                    "the prompt has {count} tokens, more than the {} its bytes let expect",
                    stream.input_tokens
                );
                (RejectReason::ExceedsCapacity, message)
            })
        });
        if let Some((reason, message)) = refusal {
            self.refuse_granted(key, reason, &message, now);
            return;
        }
        let Ok(mut tokens) = tokens else { unreachable!("refused above") };
        let room = context - tokens.len() as u32;
        let asked = stream.prelude.max_tokens;
        stream.max_tokens = if asked == 0 { room } else { asked.min(room) };
        tokens.reserve_exact(stream.max_tokens as usize);
        self.counters.prompt_tokens += tokens.len() as u64;
        let submission = stream.submission.as_mut().expect("begun with its options");
        submission.max_tokens = stream.max_tokens;
        submission.tokens = tokens;
        stream.phase = Phase::WaitingToSubmit;
        self.pipeline.waiting_to_submit.push_back(key);
        self.pipeline.release_body(key);
    }

    pub(super) fn advance_requests(&mut self, now: Instant) -> bool {
        self.pipeline.send_requests(&mut self.pen, now)
    }
}

fn check_ids(
    ids: impl ExactSizeIterator<Item = TokenId>,
    vocab: u32,
) -> Result<Vec<TokenId>, BodyError> {
    let mut tokens = Vec::with_capacity(ids.len());
    for id in ids {
        if id >= vocab {
            let message = format!("token {id} is unknown; ids are below {vocab}");
            return Err(BodyError(message.into()));
        }
        tokens.push(id);
    }
    Ok(tokens)
}

/// A submission that lacks its tokens.
fn unfinished_submission(
    stream_key: crate::message::StreamKey,
    stream: &Stream,
    options: RequestOptions,
) -> Submission {
    Submission {
        stream: stream_key,
        seq: stream.seq.expect("granted"),
        tokens: Vec::new(),
        max_tokens: 0,
        sampling: Arc::new(options.sampling),
        stop: options.stop,
        ignore_eos: options.ignore_eos,
    }
}
