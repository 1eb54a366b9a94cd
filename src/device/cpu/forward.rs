//! One step: embed, all layers, head, sampling, as stages that all workers go through together.
//!
//! Who may touch what: a stage's tiles write disjoint parts and read only what earlier stages
//! wrote. Each `SAFETY` below that speaks of tiles means this; the barrier at the end of a stage
//! hands the parts on.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;

use crate::device::contract::Bounds;
use crate::device::cpu::acts::{Acts, Output};
use crate::device::cpu::attention::{AttentionScratch, Queries, attend};
use crate::device::cpu::kernels::{GROUP_MAX, Kernels, PANEL_ROWS};
use crate::device::cpu::kv::KvPool;
use crate::device::cpu::memory::{Region, Staged};
use crate::device::cpu::pack::Matrix;
use crate::device::cpu::sample::{Choice, History, Scratch, choose};
use crate::device::cpu::schedule::{AttendTask, Schedule, WriteTask};
use crate::device::cpu::weights::{Layer, Weights};
use crate::device::cpu::workers::Lane;
use crate::message::{BlockId, Sampled, Step, StepPlan, StepResult};
use crate::model::{ModelConfig, Rope};
use crate::request::{SamplingParams, TokenId};

/// For so few tokens every worker does the norms itself, rather than sharing them out and meeting
/// at a barrier afterwards.
const DUPLICATED_TOKENS: usize = 2;
/// Tokens of a tile of a product: their activations stay in the first or second cache level.
const TILE_TOKENS: usize = 96;
/// The same for the feed-forward's inner layer, whose tile has an intermediate result.
const SWIGLU_TOKENS: usize = 64;

/// A batch slot's sampling state.
struct Slot {
    params: Arc<SamplingParams>,
    history: History,
}

/// What sampling a row gave.
struct Outcome {
    choice: Choice,
    top: Vec<(TokenId, f32)>,
}

/// One worker's own memory.
struct Own {
    attention: AttentionScratch,
    sampling: Scratch,
    /// Activations of at most [`DUPLICATED_TOKENS`] tokens.
    acts: Acts,
    /// A normed row.
    row: Vec<f32>,
    /// A head.
    head: Vec<f32>,
    /// Queries of an attention task, scaled and rotated.
    queries: Vec<u16>,
    /// Attention's result for at most [`GROUP_MAX`] queries.
    attended: Vec<f32>,
    /// Gates and ups of a tile.
    tile: Vec<[f32; 2 * PANEL_ROWS]>,
}

/// The model, its memory, and everything that a step works on.
pub struct Forward {
    kernels: &'static Kernels,
    config: ModelConfig,
    weights: Weights,
    kv: KvPool,
    /// (cosine, sine) of every rotated pair at every position.
    turns: Region<f32>,
    /// The residual stream, a row a token.
    hidden: Region<f32>,
    /// Queries, keys and values of a layer, a row a token.
    qkv: Region<f32>,
    /// Attention's result, a row a token; used when heads are not whole blocks.
    attended: Option<Region<f32>>,
    hidden_acts: Acts,
    attended_acts: Acts,
    inner_acts: Acts,
    head_acts: Acts,
    /// Logits of the sampled rows.
    logits: Region<f32>,
    schedule: Staged<Schedule>,
    slots: Vec<Staged<Slot>>,
    outcomes: Vec<Staged<Outcome>>,
    own: Vec<Staged<Own>>,
    /// Workspace bytes besides weights and KV.
    workspace_bytes: u64,
    history_bytes: u64,
}

/// Widths of rows as stored: whole panels.
fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PANEL_ROWS)
}

/// (cosine, sine) of every pair at every position below `context`.
fn turns(rope: &Rope, context: usize) -> io::Result<Region<f32>> {
    let mut turns = Region::backed(context * rope.frequencies.len() * 2)?;
    rope.turns(turns.as_mut_slice());
    Ok(turns)
}

impl Forward {
    /// Takes the model and reserves all memory a step needs, backed.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(
        kernels: &'static Kernels,
        (config, rope): (ModelConfig, &Rope),
        weights: Weights,
        kv: KvPool,
        bounds: Bounds,
        lanes: usize,
    ) -> io::Result<Forward> {
        let tokens = bounds.step_tokens_max;
        let layers = &weights.layers;
        let all = |parts: &dyn Fn(&Layer) -> Vec<Matrix>| layers.iter().flat_map(parts).collect();
        let inputs: Vec<Matrix> = all(&|l: &Layer| vec![l.q, l.k, l.v, l.gate, l.up]);
        let inputs: Vec<&Matrix> = inputs.iter().collect();
        let outputs: Vec<&Matrix> = layers.iter().map(|layer| &layer.o).collect();
        let downs: Vec<&Matrix> = layers.iter().map(|layer| &layer.down).collect();
        let (query, kv_width) = (config.query_width(), config.kv_width());
        let own = || -> io::Result<Staged<Own>> {
            Ok(Staged::new(Own::new(&config, &bounds, kv.layout().padded_dim(), &inputs)?))
        };
        let slot = || Slot {
            params: Arc::new(SamplingParams::default()),
            history: History::new(config.vocab, bounds.context_max),
        };
        let top_max = usize::from(SamplingParams::TOP_LOGPROBS_MAX);
        let outcome = || Outcome {
            choice: Choice { token: 0, logprob: 0.0 },
            top: Vec::with_capacity(top_max),
        };
        let heads_are_blocks = config.head_dim % PANEL_ROWS == 0;
        let mut forward = Forward {
            kernels,
            turns: turns(rope, bounds.context_max)?,
            hidden: Region::backed(tokens * padded(config.hidden))?,
            qkv: Region::backed(tokens * (padded(query) + 2 * padded(kv_width)))?,
            attended: (!heads_are_blocks).then(|| Region::backed(tokens * query)).transpose()?,
            hidden_acts: Acts::new(tokens, config.hidden, &inputs)?,
            attended_acts: Acts::new(tokens, query, &outputs)?,
            inner_acts: Acts::new(tokens, config.ffn, &downs)?,
            head_acts: Acts::new(bounds.sampled_rows_max, config.hidden, &[&weights.head])?,
            logits: Region::backed(bounds.sampled_rows_max * padded(config.vocab))?,
            schedule: Staged::new(Schedule::new(bounds, config.kv_heads, config.group())),
            slots: (0..bounds.rows_max).map(|_| Staged::new(slot())).collect(),
            outcomes: (0..bounds.sampled_rows_max).map(|_| Staged::new(outcome())).collect(),
            own: (0..lanes).map(|_| own()).collect::<io::Result<_>>()?,
            config,
            weights,
            kv,
            workspace_bytes: 0,
            history_bytes: 0,
        };
        forward.workspace_bytes = forward.count_workspace(&bounds);
        forward.history_bytes = forward.count_histories();
        Ok(forward)
    }

    fn count_workspace(&mut self, bounds: &Bounds) -> u64 {
        let rows = [&self.turns, &self.hidden, &self.qkv, &self.logits];
        let rows = rows.iter().map(|region| region.mapped_bytes()).sum::<u64>()
            + self.attended.as_ref().map_or(0, Region::mapped_bytes);
        let acts = [&self.hidden_acts, &self.attended_acts, &self.inner_acts, &self.head_acts];
        let acts = acts.iter().map(|acts| acts.mapped_bytes()).sum::<u64>();
        // SAFETY: `&mut self` is alone.
        let (schedule, own) = unsafe {
            (self.schedule.get().bytes(), self.own.iter().map(|own| own.get().bytes()).sum::<u64>())
        };
        let top_max = u64::from(SamplingParams::TOP_LOGPROBS_MAX);
        let outcomes = bounds.sampled_rows_max as u64 * top_max * 8;
        rows + acts + schedule + own + outcomes
    }

    fn count_histories(&mut self) -> u64 {
        // SAFETY: `&mut self` is alone.
        self.slots.iter().map(|slot| unsafe { slot.get() }.history.bytes()).sum()
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The KV cache.
    pub fn kv(&self) -> &KvPool {
        &self.kv
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Bytes of everything but weights, KV and penalty histories.
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace_bytes
    }

    /// Bytes of the slots' penalty histories. Their pages come as slots use penalties: most never
    /// do, and a count for each token of the vocabulary is much memory for nothing.
    pub fn history_bytes(&self) -> u64 {
        self.history_bytes
    }

    /// Logits of a sampled row of the last step, after penalties and bias.
    ///
    /// # Safety
    /// No step runs while the slice lives.
    pub unsafe fn logits(&self, sampled: usize) -> &[f32] {
        let stride = padded(self.config.vocab);
        // SAFETY: the caller's word.
        unsafe { self.logits.slice(sampled * stride, self.config.vocab) }
    }

    /// One worker's share of a step. Every worker calls it, with the same step.
    ///
    /// # Safety
    /// Until every worker has returned, nobody but them uses the step and this object's memory.
    pub unsafe fn run(&self, lane: &Lane<'_>, step: &Staged<Option<Box<Step>>>) {
        if lane.index() == 0 {
            // SAFETY: the other workers wait at the barrier below.
            let step = unsafe { step.get_mut() }.as_mut().expect("a step was begun");
            step.result.clear();
            // SAFETY: as above.
            let prepared = unsafe { self.schedule.get_mut() }.prepare(&step.plan);
            step.result.failure = prepared.err();
            if prepared.is_ok() {
                self.set_up(&step.plan);
            }
        }
        lane.barrier();
        // SAFETY: nobody writes to step and schedule before the last barrier.
        let (plan, failure, schedule) = unsafe {
            let step = step.get().as_ref().expect("a step was begun");
            (&step.plan, step.result.failure, self.schedule.get())
        };
        if failure.is_some() || schedule.tokens.is_empty() {
            return;
        }
        // SAFETY: each worker has its own.
        let own = unsafe { self.own[lane.index()].get_mut() };
        let pass = Pass { forward: self, lane, schedule, blocks: &plan.blocks };
        pass.embed();
        for (index, layer) in self.weights.layers.iter().enumerate() {
            pass.attention(index, layer, own);
            pass.feed_forward(layer, own);
        }
        pass.head(own);
        pass.sample(own);
        if lane.index() == 0 {
            // SAFETY: after the last stage the other workers touch neither the step nor outcomes.
            unsafe {
                let step = step.get_mut().as_mut().expect("a step was begun");
                self.report(&mut step.result);
            }
        }
    }

    /// Hands slots to their new owners. Called by one worker while the others wait.
    fn set_up(&self, plan: &StepPlan) {
        for setup in &plan.setups {
            // SAFETY: the other workers wait.
            let slot = unsafe { self.slots[usize::from(setup.slot)].get_mut() };
            slot.params = setup.sampling.clone();
            slot.history.clear();
            let (start, count) = (setup.history_start as usize, setup.history_count as usize);
            let history = &plan.history[start..start + count];
            let (prompt, output) = history.split_at(setup.history_prompt_count as usize);
            prompt.iter().for_each(|&token| slot.history.add_prompt(token));
            output.iter().for_each(|&token| slot.history.add_output(token));
        }
    }

    /// # Safety
    /// Sampling is over and nobody else uses outcomes and schedule.
    unsafe fn report(&self, result: &mut StepResult) {
        // SAFETY: the caller's word.
        let samples = unsafe { &self.schedule.get().samples };
        for (task, outcome) in samples.iter().zip(&self.outcomes) {
            // SAFETY: the caller's word.
            let Outcome { choice, top } = unsafe { outcome.get() };
            result.sampled.push(Sampled {
                seq: task.seq,
                token: choice.token,
                logprob: choice.logprob,
                top_count: top.len() as u8,
            });
            result.top.extend_from_slice(top);
        }
    }
}

impl Own {
    fn new(
        config: &ModelConfig,
        bounds: &Bounds,
        padded_dim: usize,
        inputs: &[&Matrix],
    ) -> io::Result<Own> {
        let queries = Schedule::attend_tokens(config.group()) * config.group();
        Ok(Own {
            attention: AttentionScratch::new(padded_dim),
            sampling: Scratch::new(config.vocab, bounds.context_max),
            acts: Acts::new(DUPLICATED_TOKENS, config.hidden, inputs)?,
            row: vec![0.0; config.hidden],
            head: vec![0.0; config.head_dim],
            queries: vec![0; queries * padded_dim],
            attended: vec![0.0; GROUP_MAX * padded_dim],
            tile: vec![[0.0; 2 * PANEL_ROWS]; SWIGLU_TOKENS],
        })
    }

    fn bytes(&self) -> u64 {
        let floats = self.row.len() + self.head.len() + self.attended.len();
        let floats = floats + self.tile.len() * 2 * PANEL_ROWS;
        self.attention.bytes()
            + self.sampling.bytes()
            + self.acts.mapped_bytes()
            + (floats * 4 + self.queries.len() * 2) as u64
    }
}

/// One worker's way through a step.
struct Pass<'a> {
    forward: &'a Forward,
    lane: &'a Lane<'a>,
    schedule: &'a Schedule,
    blocks: &'a [BlockId],
}

impl Pass<'_> {
    fn tokens(&self) -> usize {
        self.schedule.tokens.len()
    }

    fn hidden_stride(&self) -> usize {
        padded(self.forward.config.hidden)
    }

    /// Where queries, keys and values start in a row of theirs, and the row's length.
    fn qkv_columns(&self) -> [usize; 4] {
        let config = &self.forward.config;
        let (query, kv) = (padded(config.query_width()), padded(config.kv_width()));
        [0, query, query + kv, query + 2 * kv]
    }

    fn embed(&self) {
        let forward = self.forward;
        self.lane.stage(self.tokens(), |token| {
            let at = token * self.hidden_stride();
            // SAFETY: a tile is a token, and a token has its own row.
            let row = unsafe { forward.hidden.slice_mut(at, forward.config.hidden) };
            forward.weights.embed(self.schedule.tokens[token].token as usize, row);
        });
    }

    /// Norms one token's hidden state into a row of activations.
    ///
    /// # Safety
    /// Nobody else uses that row of `acts`, nor writes to the hidden state, meanwhile.
    unsafe fn norm(&self, from: usize, weight: &[f32], row: &mut [f32], acts: &Acts, to: usize) {
        let forward = self.forward;
        let at = from * self.hidden_stride();
        // SAFETY: the caller's word.
        unsafe {
            let hidden = forward.hidden.slice(at, forward.config.hidden);
            forward.kernels.rms_norm(hidden, weight, forward.config.norm_eps, row);
            acts.store(forward.kernels, to, 0, row);
        }
    }

    /// Norms all tokens; returns the activations.
    fn norm_all<'b>(&'b self, weight: &[f32], row: &mut [f32], own_acts: &'b Acts) -> &'b Acts {
        if self.tokens() <= DUPLICATED_TOKENS {
            for token in 0..self.tokens() {
                // SAFETY: the activations are this worker's, and no stage that writes hidden
                // states runs.
                unsafe { self.norm(token, weight, row, own_acts, token) };
            }
            return own_acts;
        }
        let acts = &self.forward.hidden_acts;
        self.lane.stage(self.tokens(), |token| {
            // SAFETY: a tile is a token; nobody writes hidden states in this stage.
            unsafe { self.norm(token, weight, row, acts, token) };
        });
        acts
    }

    /// Cuts the product of `panels` panels of `panel_bytes` with all tokens into tiles and runs
    /// them: `tile(first panel, panels, first token, tokens)`.
    fn product_stage(
        &self,
        (panels, panel_bytes): (usize, usize),
        (tokens, tokens_max): (usize, usize),
        mut tile: impl FnMut(usize, usize, usize, usize),
    ) {
        let chunks = tokens.div_ceil(tokens_max).max(1);
        let chunk = tokens.div_ceil(chunks);
        // A tile should take a microsecond or two: claiming it then costs nothing, and little is
        // lost with a worker's CPU. Roughly 25 bytes/ns are read, or as many multiplied with 6
        // tokens.
        let tile_ns = panel_bytes * (chunk + 6) / 6 / 25;
        let group = (1_500 / tile_ns.max(1)).clamp(1, (panels / (2 * self.lane.lanes())).max(1));
        let groups = panels.div_ceil(group);
        self.lane.stage(groups * chunks, |index| {
            let (first, start) = ((index % groups) * group, (index / groups) * chunk);
            tile(first, group.min(panels - first), start, chunk.min(tokens - start));
        });
    }

    /// Multiplies some matrices with the same activations; each goes to its own columns of `out`.
    fn multiply(
        &self,
        acts: &Acts,
        tokens: usize,
        parts: &[(&Matrix, usize)],
        (out, stride, add): (&Region<f32>, usize, bool),
    ) {
        let forward = self.forward;
        let panels = parts.iter().map(|(matrix, _)| matrix.panels()).sum();
        let panel_bytes = parts[0].0.panel_bytes();
        self.product_stage(
            (panels, panel_bytes),
            (tokens, TILE_TOKENS),
            |first, count, start, n| {
                for mut panel in first..first + count {
                    let mut part = 0;
                    while panel >= parts[part].0.panels() {
                        panel -= parts[part].0.panels();
                        part += 1;
                    }
                    let (matrix, column) = parts[part];
                    let at = start * stride + column + panel * PANEL_ROWS;
                    let at = out.at(at, (n - 1) * stride + PANEL_ROWS);
                    let out = Output { at, stride, add };
                    let (kernels, weights) = (forward.kernels, &forward.weights);
                    // SAFETY: a tile is some panels and some tokens, and a (panel, token) has its
                    // own
                    // 32 values (in range: checked by `at`).
                    unsafe { acts.multiply(kernels, weights, (matrix, panel), (start, n), out) };
                }
            },
        );
    }

    fn attention(&self, index: usize, layer: &Layer, own: &mut Own) {
        let forward = self.forward;
        let acts = self.norm_all(&layer.attn_norm, &mut own.row, &own.acts);
        let [q, k, v, stride] = self.qkv_columns();
        let parts = [(&layer.q, q), (&layer.k, k), (&layer.v, v)];
        self.multiply(acts, self.tokens(), &parts, (&forward.qkv, stride, false));
        if !self.schedule.writes.is_empty() {
            self.lane.stage(self.schedule.writes.len(), |task| {
                let task = &self.schedule.writes[task];
                // SAFETY: a tile is a (row, kv head) and whole pairs of positions, and no two rows
                // write to the same block (checked by the schedule).
                unsafe { self.write(index, task, &mut own.head) };
            });
        }
        self.lane.stage(self.schedule.attends.len(), |task| {
            let task = &self.schedule.attends[task];
            if task.writes {
                let write = WriteTask { first: task.first, count: 1, kv_head: task.kv_head };
                // SAFETY: as above; this row's only query is this task's.
                unsafe { self.write(index, &write, &mut own.head) };
            }
            self.attend(index, task, own);
        });
        if let Some(attended) = &forward.attended {
            let width = forward.config.query_width();
            self.lane.stage(self.tokens(), |token| {
                // SAFETY: a tile is a token; attention is over.
                unsafe {
                    let row = attended.slice(token * width, width);
                    forward.attended_acts.store(forward.kernels, token, 0, row);
                }
            });
        }
        let out = (&forward.hidden, self.hidden_stride(), true);
        self.multiply(&forward.attended_acts, self.tokens(), &[(&layer.o, 0)], out);
    }

    /// One head of queries, keys or values of a token.
    fn head_of(&self, column: usize, token: usize, head: usize) -> &[f32] {
        let [_, _, _, stride] = self.qkv_columns();
        let head_dim = self.forward.config.head_dim;
        // SAFETY: only the products' stage writes there, and it is over.
        unsafe { self.forward.qkv.slice(token * stride + column + head * head_dim, head_dim) }
    }

    /// (cosine, sine) of the pairs at a token's position.
    fn turns(&self, token: usize) -> &[f32] {
        let position = self.schedule.tokens[token].position as usize;
        let dims = self.forward.config.rope.dims;
        // SAFETY: never written after construction.
        unsafe { self.forward.turns.slice(position * dims, dims) }
    }

    /// Rotates keys and puts them into the cache, with their values.
    ///
    /// # Safety
    /// As for [`KvPool::write`], for all positions of the task.
    unsafe fn write(&self, layer: usize, task: &WriteTask, key: &mut [f32]) {
        let [_, k, v, _] = self.qkv_columns();
        for token in task.first..task.first + task.count {
            let at = self.schedule.tokens[token];
            key.copy_from_slice(self.head_of(k, token, task.kv_head));
            self.forward.kernels.rotate(key, self.turns(token));
            let value = self.head_of(v, token, task.kv_head);
            let place = (at.block, layer, task.kv_head);
            let position = at.position as usize % crate::message::BLOCK_POSITIONS;
            // SAFETY: the caller's word.
            unsafe { self.forward.kv.write(place, position, key, value) };
        }
    }

    fn attend(&self, layer: usize, task: &AttendTask, own: &mut Own) {
        let forward = self.forward;
        let (group, dim) = (forward.config.group(), forward.kv.layout().padded_dim());
        let total = task.count * group;
        for query in 0..total {
            let token = task.first + query / group;
            let head = self.head_of(0, token, task.kv_head * group + query % group);
            let scale = std::f64::consts::LOG2_E / (forward.config.head_dim as f64).sqrt();
            for (out, value) in own.head.iter_mut().zip(head) {
                *out = value * scale as f32;
            }
            forward.kernels.rotate(&mut own.head, self.turns(token));
            let out = &mut own.queries[query * dim..(query + 1) * dim];
            forward.kernels.to_bf16(&own.head, out);
        }
        let blocks = &self.blocks[task.block_start..][..task.block_count];
        for start in (0..total).step_by(GROUP_MAX) {
            let count = GROUP_MAX.min(total - start);
            let queries = Queries {
                values: &own.queries[start * dim..(start + count) * dim],
                position: self.schedule.tokens[task.first + start / group].position as usize,
                first_head: start % group,
                group,
                blocks,
                layer,
                kv_head: task.kv_head,
            };
            let out = &mut own.attended[..count * dim];
            // SAFETY: the row's keys and values are written: a prompt's in the stage before, a
            // decode row's by this very task. Nobody else writes to this row's blocks.
            unsafe { attend(forward.kernels, &forward.kv, &queries, &mut own.attention, out) };
            for (index, out) in out.chunks_exact(dim).enumerate() {
                let query = start + index;
                let head = task.kv_head * group + query % group;
                // SAFETY: a (token, head) belongs to one task.
                unsafe { self.put_attended(task.first + query / group, head, out) };
            }
        }
    }

    /// # Safety
    /// Nobody else uses this head of this token's result meanwhile.
    unsafe fn put_attended(&self, token: usize, head: usize, values: &[f32]) {
        let forward = self.forward;
        let head_dim = forward.config.head_dim;
        let values = &values[..head_dim];
        // SAFETY: the caller's word.
        unsafe {
            if let Some(attended) = &forward.attended {
                let at = token * forward.config.query_width() + head * head_dim;
                attended.slice_mut(at, head_dim).copy_from_slice(values);
            } else {
                let block = head * head_dim / PANEL_ROWS;
                forward.attended_acts.store(forward.kernels, token, block, values);
            }
        }
    }

    fn feed_forward(&self, layer: &Layer, own: &mut Own) {
        let forward = self.forward;
        let (kernels, weights) = (forward.kernels, &forward.weights);
        let acts = self.norm_all(&layer.ffn_norm, &mut own.row, &own.acts);
        let shape = (layer.gate.panels(), layer.gate.panel_bytes() + layer.up.panel_bytes());
        let tokens = (self.tokens(), SWIGLU_TOKENS);
        self.product_stage(shape, tokens, |first, count, start, n| {
            for panel in first..first + count {
                let tile = &mut own.tile[..n];
                let stride = 2 * PANEL_ROWS;
                let gates = tile.as_mut_ptr().cast::<f32>();
                // SAFETY: the tile is this worker's and holds `n` rows of gates, then ups; the
                // block of inner activations belongs to this (panel, tokens).
                unsafe {
                    let out = Output { at: gates, stride, add: false };
                    acts.multiply(kernels, weights, (&layer.gate, panel), (start, n), out);
                    let out = Output { at: gates.add(PANEL_ROWS), ..out };
                    acts.multiply(kernels, weights, (&layer.up, panel), (start, n), out);
                    forward.inner_acts.store_swiglu(kernels, tile, start, panel);
                }
            }
        });
        let out = (&forward.hidden, self.hidden_stride(), true);
        self.multiply(&forward.inner_acts, self.tokens(), &[(&layer.down, 0)], out);
    }

    fn head(&self, own: &mut Own) {
        let forward = self.forward;
        let samples = &self.schedule.samples;
        if samples.is_empty() {
            return;
        }
        let acts = &forward.head_acts;
        self.lane.stage(samples.len(), |index| {
            let weight = &forward.weights.output_norm;
            // SAFETY: a tile is a sampled row; nobody writes hidden states in this stage.
            unsafe { self.norm(samples[index].last, weight, &mut own.row, acts, index) };
        });
        let out = (&forward.logits, padded(forward.config.vocab), false);
        self.multiply(acts, samples.len(), &[(&forward.weights.head, 0)], out);
    }

    fn sample(&self, own: &mut Own) {
        let forward = self.forward;
        let stride = padded(forward.config.vocab);
        self.lane.stage(self.schedule.samples.len(), |index| {
            let task = &self.schedule.samples[index];
            // SAFETY: a tile is a sampled row, and no two rows have the same slot (checked by the
            // schedule).
            let (logits, slot, outcome) = unsafe {
                (
                    forward.logits.slice_mut(index * stride, forward.config.vocab),
                    forward.slots[task.slot].get_mut(),
                    forward.outcomes[index].get_mut(),
                )
            };
            let scratch = &mut own.sampling;
            let (params, history) = (&slot.params, &slot.history);
            outcome.choice =
                choose(forward.kernels, logits, params, history, task.position, scratch);
            outcome.top.clear();
            outcome.top.extend_from_slice(scratch.top());
            if slot.params.has_penalties() {
                slot.history.add_output(outcome.choice.token);
            }
        });
    }
}
