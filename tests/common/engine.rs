//! An engine core on a test bench: the test plays the front core and the device.

#![allow(dead_code)] // every test file compiles this module for itself; not all need all of it

use std::sync::Arc;

use forebay::base::{Instant, TokenTable};
use forebay::engine::stats::EngineStats;
use forebay::engine::{EngineConfig, EngineCore};
use forebay::limits::Limits;
use forebay::message::{
    Ask, ControlMessage, Event, PlanRow, RequestMessage, Sampled, SeqKey, Step, StepFailure,
    StreamKey, Submission,
};
use forebay::ports::{DeviceEnds, FrontEnds, connect_device, connect_front};
use forebay::request::{Class, FinishReason, Name, RejectReason, SamplingParams, TokenId, Usage};
use forebay::ring::Doorbell;

/// Ends a text; the other tokens stand for the byte with their number.
pub const END: TokenId = 0;
/// Stands for "a".
pub const A: TokenId = b'a' as TokenId;

/// What a stream was told, with its parts of the batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    Grant(SeqKey),
    Reject(RejectReason, Option<u32>),
    Accepted(u32),
    Tokens(Vec<TokenId>, String),
    Paused,
    Resumed,
    Done(FinishReason, Usage),
}

/// A request to make; the rest is defaults.
#[derive(Clone)]
pub struct Want {
    pub prompt: usize,
    pub max_tokens: u32,
    pub window: u32,
    pub class: Class,
    pub tenant: &'static str,
    pub user: &'static str,
    pub deadline: Option<Instant>,
    pub stop: Vec<&'static str>,
    pub ignore_eos: bool,
    pub logprobs: Option<u8>,
    pub penalties: bool,
}

impl Default for Want {
    fn default() -> Want {
        Want {
            prompt: 4,
            max_tokens: 4,
            window: 8,
            class: Class::Default,
            tenant: "",
            user: "",
            deadline: None,
            stop: vec![],
            ignore_eos: false,
            logprobs: None,
            penalties: false,
        }
    }
}

pub struct Bench {
    pub engine: EngineCore,
    pub fronts: Vec<FrontEnds>,
    pub device: DeviceEnds,
    pub now: Instant,
    pub context: u32,
    next_slot: u32,
    /// Told and not asked for yet.
    told: Vec<(StreamKey, Told)>,
}

impl Bench {
    pub fn new(limits: &Limits, kv_blocks: u32) -> Bench {
        Bench::with(limits, kv_blocks, 1, 1)
    }

    pub fn with(limits: &Limits, kv_blocks: u32, depth: usize, fronts: usize) -> Bench {
        let config = EngineConfig { limits: limits.clone(), kv_blocks, vocab: 256, depth };
        let context = config.context();
        let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
        let text = |at: usize| if at == END as usize { &[][..] } else { &bytes[at][..] };
        let table = Arc::new(TokenTable::new((0..256).map(text), &[END]));
        let engine_bell = Doorbell::new();
        let (ports, ends) =
            (0..fronts).map(|_| connect_front(limits, &engine_bell, &Doorbell::new())).unzip();
        let (port, device) = connect_device(depth, &engine_bell, &Doorbell::new());
        let engine = EngineCore::new(config, table, ports, port).unwrap();
        let now = Instant::ZERO.plus_ms(1);
        Bench { engine, fronts: ends, device, now, context, next_slot: 0, told: Vec::new() }
    }

    /// Ticks until there is nothing to do, and checks the engine after each.
    pub fn settle(&mut self) {
        for _ in 0..1_000 {
            let busy = self.engine.tick(self.now);
            self.engine.check_invariants().unwrap();
            self.receive();
            if !busy {
                return;
            }
        }
        panic!("the engine does not come to rest");
    }

    pub fn pass_ms(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
        self.settle();
    }

    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }

    pub fn ask(&mut self, want: &Want) -> StreamKey {
        self.ask_from(0, want)
    }

    pub fn ask_from(&mut self, front: u8, want: &Want) -> StreamKey {
        let stream = StreamKey { front, slot: self.next_slot, generation: 0 };
        self.next_slot += 1;
        let ask = Ask {
            stream,
            class: want.class,
            tenant: Name::new(want.tenant).unwrap(),
            user: Name::new(want.user).unwrap(),
            input_bytes: want.prompt as u32,
            input_tokens: want.prompt as u32,
            max_tokens: want.max_tokens,
            deadline: want.deadline,
            window_tokens: want.window,
        };
        let requests = &mut self.fronts[usize::from(front)].requests;
        requests.send(RequestMessage::Ask(ask)).unwrap();
        stream
    }

    pub fn submission(&self, stream: StreamKey, seq: SeqKey, want: &Want) -> Box<Submission> {
        let room = self.context.saturating_sub(want.prompt as u32).max(1);
        let max_tokens = if want.max_tokens == 0 { room } else { want.max_tokens };
        let mut tokens = Vec::with_capacity(want.prompt + max_tokens as usize);
        tokens.extend((0..want.prompt).map(|at| 1 + at as TokenId % 250));
        Box::new(Submission {
            stream,
            seq,
            tokens,
            max_tokens,
            sampling: Arc::new(SamplingParams {
                logprobs: want.logprobs,
                presence_penalty: if want.penalties { 1.0 } else { 0.0 },
                ..SamplingParams::default()
            }),
            stop: want.stop.iter().map(|stop| stop.as_bytes().into()).collect(),
            ignore_eos: want.ignore_eos,
        })
    }

    pub fn submit(&mut self, stream: StreamKey, seq: SeqKey, want: &Want) {
        let submission = self.submission(stream, seq, want);
        let requests = &mut self.fronts[usize::from(stream.front)].requests;
        requests.send(RequestMessage::Submit(submission)).unwrap();
    }

    /// Asks and waits for the grant.
    pub fn granted(&mut self, want: &Want) -> (StreamKey, SeqKey) {
        let stream = self.ask(want);
        self.settle();
        match self.told(stream)[..] {
            [Told::Grant(seq)] => (stream, seq),
            ref told => panic!("no grant: {told:?}"),
        }
    }

    /// Asks and submits; the first step may be on its way.
    pub fn accepted(&mut self, want: &Want) -> (StreamKey, SeqKey) {
        let (stream, seq) = self.granted(want);
        self.submit(stream, seq, want);
        self.settle();
        let told = self.told(stream);
        assert!(matches!(told[..], [Told::Accepted(_)]), "not accepted: {told:?}");
        (stream, seq)
    }

    pub fn credit(&mut self, seq: SeqKey, tokens: u32) {
        self.control(ControlMessage::Credit { seq, tokens });
    }

    pub fn cancel(&mut self, seq: SeqKey) {
        self.control(ControlMessage::Cancel { seq, reason: FinishReason::Cancelled });
    }

    pub fn control(&mut self, message: ControlMessage) {
        assert!(self.fronts[0].control.push(message).is_ok());
        self.settle();
    }

    /// What the stream was told since the last time.
    pub fn told(&mut self, stream: StreamKey) -> Vec<Told> {
        let (its, others) = self.told.drain(..).partition(|(other, _)| *other == stream);
        self.told = others;
        let its: Vec<(StreamKey, Told)> = its;
        its.into_iter().map(|(_, told)| told).collect()
    }

    /// What everybody was told since the last time, in order.
    pub fn take_told(&mut self) -> Vec<(StreamKey, Told)> {
        std::mem::take(&mut self.told)
    }

    /// Takes in batches and gives them back.
    pub fn receive(&mut self) {
        for front in 0..self.fronts.len() {
            while let Some(batch) = self.fronts[front].events.pop() {
                self.take_in(&batch);
                assert!(self.fronts[front].control.push(ControlMessage::Return(batch)).is_ok());
            }
        }
    }

    /// Takes in one batch without giving it back.
    pub fn take_in(&mut self, batch: &forebay::message::EventBatch) {
        let (mut tokens, mut text) = (batch.tokens.iter().copied(), batch.text.iter().copied());
        for event in &batch.events {
            let told = match *event {
                Event::Grant { stream, seq } => (stream, Told::Grant(seq)),
                Event::Reject { stream, reason, retry_after_ms } => {
                    (stream, Told::Reject(reason, retry_after_ms))
                }
                Event::Accepted { stream, position, .. } => (stream, Told::Accepted(position)),
                Event::Tokens { stream, token_count, text_bytes, .. } => {
                    let ids = tokens.by_ref().take(token_count as usize).collect();
                    let text = text.by_ref().take(text_bytes as usize).collect();
                    (stream, Told::Tokens(ids, String::from_utf8(text).unwrap()))
                }
                Event::Paused { stream } => (stream, Told::Paused),
                Event::Resumed { stream } => (stream, Told::Resumed),
                Event::Done { stream, finish, usage, .. } => (stream, Told::Done(finish, usage)),
            };
            self.told.push(told);
        }
    }

    /// The step at the device.
    pub fn take_step(&mut self) -> Option<Box<Step>> {
        self.device.steps.pop()
    }

    /// Finishes a step: `token` says what each sampling row gives.
    pub fn finish(&mut self, mut step: Box<Step>, token: impl Fn(&PlanRow) -> TokenId) {
        sample(&mut step, token);
        self.give_step(step);
    }

    pub fn fail(&mut self, mut step: Box<Step>, failure: StepFailure) {
        step.result.failure = Some(failure);
        self.give_step(step);
    }

    pub fn give_step(&mut self, step: Box<Step>) {
        assert!(self.device.results.push(step).is_ok());
        self.now = self.now.plus_ms(1);
        self.settle();
    }

    /// Runs one step that gives every sequence the same token. Returns the rows.
    pub fn step(&mut self, token: TokenId) -> Vec<PlanRow> {
        self.settle();
        let step = self.take_step().expect("a step is at the device");
        let rows = step.plan.rows.clone();
        self.finish(step, |_| token);
        rows
    }

    /// Runs steps until there are none, at most `most`; returns how many.
    pub fn steps(&mut self, token: TokenId, most: usize) -> usize {
        for count in 0..most {
            self.settle();
            let Some(step) = self.take_step() else { return count };
            self.finish(step, |_| token);
        }
        most
    }
}

/// Answers a step: `token` says what each sampling row gives. It took a millisecond.
pub fn sample(step: &mut Step, token: impl Fn(&PlanRow) -> TokenId) {
    step.result.elapsed_ns = 1_000_000;
    for row in step.plan.rows.iter().filter(|row| row.sample) {
        let sampled = Sampled { seq: row.seq, token: token(row), logprob: -1.0, top_count: 0 };
        step.result.sampled.push(sampled);
    }
}
