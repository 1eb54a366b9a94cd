//! `forebay run`: one generation in this process, straight on the backend. No server, no queue.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Failure;
use super::args;
use super::backend::{BackendSizes, Choice};
use super::pull::{self, Progress};
use crate::config::Config;
use crate::device::Backend;
use crate::message::{BLOCK_POSITIONS, PlanRow, SeqKey, SlotSetup, Step};
use crate::model::{ChatTemplate, Gguf, Message, ModelConfig, Tokenizer, Utf8Assembler};
use crate::request::{SamplingParams, TokenId};

/// Prints the model's answer to the prompt as it comes.
pub(super) fn run(args: &args::Run) -> Result<(), Failure> {
    let config = super::settings::load(&args.settings)?.config;
    let sampling = args.sampling.params()?;
    let prompt = prompt_text(&args.prompt)?;
    let path = pull::ensure(&config.model, Progress::Show)?;
    let mut generation = Generation::start(&config, &path, args, sampling, &prompt)?;
    let mut text = String::new();
    let mut characters = Utf8Assembler::new();
    let mut output = io::stdout().lock();
    while let Some(token) = generation.next()? {
        text.clear();
        characters.push(generation.tokenizer.token_bytes(token), &mut text);
        match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
            // The reader has had enough (`| head`).
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result.map_err(|error| unwritable(&error))?,
        }
    }
    text.clear();
    characters.finish(&mut text);
    writeln!(output, "{text}").map_err(|error| unwritable(&error))?;
    if args.stats {
        eprintln!("{}", generation.stats());
    }
    Ok(())
}

fn unwritable(error: &io::Error) -> Failure {
    Failure::Runtime(format!("cannot write to standard output: {error}"))
}

/// The prompt as given, or standard input for `-`.
fn prompt_text(prompt: &str) -> Result<String, Failure> {
    if prompt != "-" {
        return Ok(prompt.to_owned());
    }
    // As much as the largest request to a server.
    const BYTES_MAX: u64 = 1 << 20;
    let mut text = String::new();
    let read = io::stdin().take(BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|error| Failure::Usage(format!("cannot read the prompt: {error}")))?;
    if text.len() as u64 > BYTES_MAX {
        return Err(Failure::Usage("the prompt on standard input is longer than 1 MiB".into()));
    }
    Ok(text)
}

/// One sequence, alone on a backend.
struct Generation {
    backend: Box<dyn Backend>,
    tokenizer: Tokenizer,
    step: Option<Box<Step>>,
    sampling: Arc<SamplingParams>,
    /// Prompt and output.
    tokens: Vec<TokenId>,
    prompt_tokens: usize,
    /// Positions whose keys and values are in the cache.
    done: usize,
    /// Prompt and output at most.
    tokens_max: usize,
    chunk_tokens_max: usize,
    begun: Instant,
    first_token: Option<Duration>,
}

impl Generation {
    fn start(
        config: &Config,
        path: &Path,
        args: &args::Run,
        sampling: SamplingParams,
        prompt: &str,
    ) -> Result<Generation, Failure> {
        let gguf = Gguf::open(path).map_err(|e| unusable(path, &e))?;
        let shape = gguf.config().map_err(|e| unusable(path, &e))?;
        let tokenizer = Tokenizer::from_gguf(&gguf).map_err(|e| unusable(path, &e))?;
        let tokens = if args.raw {
            tokenizer.encode(prompt)
        } else {
            let template =
                ChatTemplate::from_gguf(&gguf, &tokenizer).map_err(|e| unusable(path, &e))?;
            conversation(template.as_ref(), &tokenizer, args.system.as_deref(), prompt)?
        };
        let context = (config.limits.context_max as usize).min(shape.context);
        if tokens.is_empty() || tokens.len() >= context {
            let count = tokens.len();
            return Err(Failure::Usage(format!(
                "the prompt has {count} tokens; it must have at least 1, and fewer than the \
                 context of {context}"
            )));
        }
        let tokens_max = context.min(tokens.len() + args.max_tokens as usize);
        let chunk_tokens_max = config.limits.chunk_tokens_max as usize;
        let backend = load(config, &gguf, &shape, tokens_max, chunk_tokens_max)?;
        Ok(Generation {
            backend,
            tokenizer,
            step: Some(Box::default()),
            sampling: Arc::new(sampling),
            prompt_tokens: tokens.len(),
            tokens,
            done: 0,
            tokens_max,
            chunk_tokens_max,
            begun: Instant::now(),
            first_token: None,
        })
    }

    /// The next token; `None` when the model ended its answer or all tokens are there.
    fn next(&mut self) -> Result<Option<TokenId>, Failure> {
        if self.tokens.len() >= self.tokens_max {
            return Ok(None);
        }
        let token = loop {
            if let Some(token) = self.run_step()? {
                break token;
            }
        };
        self.first_token.get_or_insert_with(|| self.begun.elapsed());
        if self.tokenizer.table().is_end_of_text(token) {
            return Ok(None);
        }
        self.tokens.push(token);
        Ok(Some(token))
    }

    /// Computes the next chunk. A token comes of the one that ends with the newest.
    fn run_step(&mut self) -> Result<Option<TokenId>, Failure> {
        let mut step = self.step.take().expect("it came back from the last run");
        self.plan(&mut step);
        let count = step.plan.rows[0].token_count as usize;
        let step = self.backend.run(step);
        let failure = step.result.failure;
        let token = step.result.sampled.first().map(|sampled| sampled.token);
        self.step = Some(step);
        if let Some(failure) = failure {
            return Err(Failure::Runtime(format!("the step failed: {failure:?}")));
        }
        self.done += count;
        Ok(token)
    }

    fn plan(&self, step: &mut Step) {
        let seq = SeqKey { slot: 0, generation: 1 };
        step.result.clear();
        let plan = &mut step.plan;
        plan.clear();
        plan.number += 1;
        let chunk = (self.tokens.len() - self.done).min(self.chunk_tokens_max);
        let end = self.done + chunk;
        if self.done == 0 {
            // Penalties count the prompt as seen.
            let history = if self.sampling.has_penalties() { self.prompt_tokens } else { 0 };
            plan.history.extend_from_slice(&self.tokens[..history]);
            plan.setups.push(SlotSetup {
                slot: 0,
                seq,
                sampling: Arc::clone(&self.sampling),
                history_start: 0,
                history_count: history as u32,
                history_prompt_count: history as u32,
            });
        }
        plan.tokens.extend_from_slice(&self.tokens[self.done..end]);
        let blocks = end.div_ceil(BLOCK_POSITIONS) as u32;
        plan.blocks.extend(0..blocks);
        plan.rows.push(PlanRow {
            seq,
            slot: 0,
            sample: end == self.tokens.len(),
            token_start: 0,
            token_count: chunk as u32,
            position: self.done as u32,
            block_start: 0,
            block_count: blocks,
        });
    }

    fn stats(&self) -> String {
        let total = self.begun.elapsed();
        let first = self.first_token.unwrap_or(total);
        let output = self.tokens.len() - self.prompt_tokens;
        let rate = output.saturating_sub(1) as f64 / (total - first).as_secs_f64().max(1e-9);
        format!(
            "{} prompt tokens, first token after {:.0} ms; {output} output tokens, {rate:.1} \
             tokens/s",
            self.prompt_tokens,
            first.as_secs_f64() * 1e3,
        )
    }
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::Model(format!("{}: {error}", path.display()))
}

fn conversation(
    template: Option<&ChatTemplate>,
    tokenizer: &Tokenizer,
    system: Option<&str>,
    prompt: &str,
) -> Result<Vec<TokenId>, Failure> {
    let template = template.ok_or_else(|| {
        Failure::Usage(
            "the model has no chat template: use --raw to continue the prompt's text".into(),
        )
    })?;
    let system = system.map(|content| Message { role: "system", content });
    let user = Message { role: "user", content: prompt };
    let messages: Vec<_> = system.into_iter().chain([user]).collect();
    let prompt = template
        .render(tokenizer, &messages, true)
        .map_err(|error| Failure::Usage(error.to_string()))?;
    Ok(tokenizer.encode_prompt(prompt))
}

/// The backend for one sequence: with a pool of just its size.
fn load(
    config: &Config,
    gguf: &Gguf,
    shape: &ModelConfig,
    tokens_max: usize,
    chunk_tokens_max: usize,
) -> Result<Box<dyn Backend>, Failure> {
    let sizes = BackendSizes {
        kv_blocks: tokens_max.div_ceil(BLOCK_POSITIONS) as u32,
        rows_max: 1,
        step_tokens_max: chunk_tokens_max.min(tokens_max),
        context_max: tokens_max.min(shape.context),
        workers: super::plan::core_map(config, &crate::runtime::probe()).workers,
    };
    let choice = Choice::new(config)?;
    if let Some(doubt) = choice.doubt() {
        tracing::warn!("{doubt}");
    }
    // `Backend::run` polls; it need not wait for its next look when the step is done before.
    let thread = std::thread::current();
    Ok(choice.load(config, gguf, &sizes, Box::new(move || thread.unpark()))?)
}
