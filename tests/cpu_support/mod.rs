//! Drives a backend the way an engine would: sequences, slots, blocks, steps.

#![allow(dead_code)]

use std::sync::Arc;

use forebay::device::Backend;
use forebay::device::cpu::{CpuBackend, CpuOptions, Isa};
use forebay::message::{BLOCK_POSITIONS, BlockId, PlanRow, SeqKey, SlotSetup, Step};
use forebay::model::Gguf;
use forebay::request::{SamplingParams, TokenId};

/// Sizes for small models.
pub fn options(workers: usize, isa: Isa) -> CpuOptions {
    CpuOptions {
        cpus: vec![None; workers],
        kv_blocks: 40,
        rows_max: 8,
        step_tokens_max: 256,
        context_max: 512,
        sampled_rows_max: 8,
        isa: Some(isa),
    }
}

/// A sequence as an engine keeps it.
pub struct Sequence {
    pub tokens: Vec<TokenId>,
    pub prompt_count: usize,
    /// Positions whose keys and values are in the cache.
    pub cached: usize,
    pub blocks: Vec<BlockId>,
    pub slot: Option<u16>,
    pub sampling: Arc<SamplingParams>,
    /// Bits of each sampled token's logits, and its log-probability's.
    pub logits: Vec<Vec<u32>>,
    pub logprobs: Vec<(u32, Vec<(TokenId, u32)>)>,
}

impl Sequence {
    /// The tokens the model chose.
    pub fn output(&self) -> &[TokenId] {
        &self.tokens[self.prompt_count..]
    }
}

/// A backend that shows the logits of the rows that its last step sampled.
pub trait Shown: Backend {
    /// Those of one row.
    fn row(&mut self, sampled: usize) -> Vec<f32>;
}

impl Shown for CpuBackend {
    fn row(&mut self, sampled: usize) -> Vec<f32> {
        self.logits(sampled).expect("between steps").to_vec()
    }
}

/// A backend and the sequences it works on.
pub struct Driver<B = CpuBackend> {
    pub backend: B,
    pub sequences: Vec<Sequence>,
    pub free_blocks: Vec<BlockId>,
    pub free_slots: Vec<u16>,
    pub step: Option<Box<Step>>,
}

impl Driver<CpuBackend> {
    pub fn new(gguf: &Gguf, options: &CpuOptions) -> Driver {
        let backend = CpuBackend::load(gguf, options, Box::new(|| {})).expect("the model loads");
        Driver::over(backend, options.rows_max as u16)
    }
}

impl<B: Shown> Driver<B> {
    /// Drives this backend, which nobody has used yet.
    pub fn over(backend: B, rows_max: u16) -> Driver<B> {
        Driver {
            sequences: Vec::new(),
            free_blocks: (0..backend.description().kv_blocks).collect(),
            free_slots: (0..rows_max).rev().collect(),
            step: Some(Box::default()),
            backend,
        }
    }

    pub fn add(&mut self, prompt: &[TokenId], sampling: &SamplingParams) -> usize {
        self.sequences.push(Sequence {
            tokens: prompt.to_vec(),
            prompt_count: prompt.len(),
            cached: 0,
            blocks: Vec::new(),
            slot: None,
            sampling: Arc::new(sampling.clone()),
            logits: Vec::new(),
            logprobs: Vec::new(),
        });
        self.sequences.len() - 1
    }

    /// Takes a sequence's slot and blocks away: it must compute everything again.
    pub fn park(&mut self, index: usize) {
        let sequence = &mut self.sequences[index];
        self.free_blocks.append(&mut sequence.blocks);
        self.free_slots.extend(sequence.slot.take());
        sequence.cached = 0;
    }

    /// One step: each row is a sequence and how many of its waiting tokens to take at most. A row
    /// that takes all samples.
    pub fn advance(&mut self, rows: &[(usize, usize)]) {
        let mut step = self.step.take().expect("between steps");
        step.plan.clear();
        step.plan.number += 1;
        for &(index, tokens_max) in rows {
            self.add_row(&mut step, index, tokens_max);
        }
        let mut step = self.backend.run(step);
        assert_eq!(step.result.failure, None);
        let mut top = step.result.top.iter();
        let mut sampled = step.result.sampled.iter().enumerate();
        for row in step.plan.rows.iter().filter(|row| row.sample) {
            let (number, sampled) = sampled.next().expect("one per sampling row");
            assert_eq!(sampled.seq, row.seq);
            let sequence = &mut self.sequences[row.seq.slot as usize];
            sequence.tokens.push(sampled.token);
            let logits = self.backend.row(number);
            sequence.logits.push(logits.iter().map(|logit| logit.to_bits()).collect());
            let top = top.by_ref().take(usize::from(sampled.top_count));
            let top = top.map(|&(token, logprob)| (token, logprob.to_bits())).collect();
            sequence.logprobs.push((sampled.logprob.to_bits(), top));
        }
        assert!(sampled.next().is_none() && top.next().is_none());
        step.result.clear();
        self.step = Some(step);
    }

    fn add_row(&mut self, step: &mut Step, index: usize, tokens_max: usize) {
        let sequence = &mut self.sequences[index];
        let seq = SeqKey { slot: index as u32, generation: 1 };
        let plan = &mut step.plan;
        let slot = *sequence.slot.get_or_insert_with(|| {
            let slot = self.free_slots.pop().expect("a free slot");
            let history_start = plan.history.len() as u32;
            let has_penalties = sequence.sampling.has_penalties();
            plan.history.extend(sequence.tokens.iter().filter(|_| has_penalties));
            plan.setups.push(SlotSetup {
                slot,
                seq,
                sampling: sequence.sampling.clone(),
                history_start,
                history_count: plan.history.len() as u32 - history_start,
                history_prompt_count: if has_penalties { sequence.prompt_count as u32 } else { 0 },
            });
            slot
        });
        let count = tokens_max.min(sequence.tokens.len() - sequence.cached);
        let end = sequence.cached + count;
        while sequence.blocks.len() < end.div_ceil(BLOCK_POSITIONS) {
            sequence.blocks.push(self.free_blocks.pop().expect("a free block"));
        }
        plan.rows.push(PlanRow {
            seq,
            slot,
            sample: end == sequence.tokens.len(),
            token_start: plan.tokens.len() as u32,
            token_count: count as u32,
            position: sequence.cached as u32,
            block_start: plan.blocks.len() as u32,
            block_count: sequence.blocks.len() as u32,
        });
        plan.tokens.extend(&sequence.tokens[sequence.cached..end]);
        plan.blocks.extend(&sequence.blocks);
        sequence.cached = end;
    }

    /// Runs one sequence alone, its prompt in chunks, until it has put out `count` tokens.
    pub fn generate(&mut self, index: usize, chunk: usize, count: usize) {
        while self.sequences[index].output().len() < count {
            self.advance(&[(index, chunk)]);
        }
    }
}
