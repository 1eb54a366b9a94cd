//! The CPU backend on the real model.

use std::path::PathBuf;
use std::sync::Arc;

use forebay::device::Backend;
use forebay::device::cpu::{CpuBackend, CpuOptions};
use forebay::message::{PlanRow, SeqKey, SlotSetup, Step};
use forebay::model::Gguf;
use forebay::model::gguf::Value;
use forebay::request::SamplingParams;

fn main_model() -> PathBuf {
    PathBuf::from("/work/models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

#[test]
fn it_answers() {
    let gguf = Gguf::open(&main_model()).unwrap();
    let Some(Value::Array(tokens)) = gguf.value("tokenizer.ggml.tokens") else { panic!() };
    let tokens: Vec<String> =
        tokens.strings().map(|s| String::from_utf8_lossy(s).into_owned()).collect();
    let id = |t: &str| tokens.iter().position(|x| x == t).unwrap_or_else(|| panic!("{t}")) as u32;
    let start = std::time::Instant::now();
    let options = CpuOptions {
        cpus: vec![Some(0), Some(1)],
        kv_blocks: 64,
        rows_max: 8,
        step_tokens_max: 512,
        context_max: 2048,
        sampled_rows_max: 8,
        isa: None,
    };
    let mut backend = CpuBackend::load(&gguf, &options, Box::new(|| {})).unwrap();
    println!("loaded in {:?}: {:?}", start.elapsed(), backend.description());
    let mut text: Vec<u32> =
        ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"].iter().map(|t| id(t)).collect();
    let seq = SeqKey { slot: 0, generation: 1 };
    let mut done = 0;
    let mut step = Box::new(Step::default());
    for n in 0..60 {
        step.plan.clear();
        step.plan.number += 1;
        if n == 0 {
            step.plan.setups.push(SlotSetup {
                slot: 0,
                seq,
                sampling: Arc::new(SamplingParams { temperature: 0.0, ..Default::default() }),
                history_start: 0,
                history_count: 0,
                history_prompt_count: 0,
            });
        }
        step.plan.tokens.extend(&text[done..]);
        let blocks = text.len().div_ceil(64) as u32;
        step.plan.blocks.extend(0..blocks);
        step.plan.rows.push(PlanRow {
            seq,
            slot: 0,
            sample: true,
            token_start: 0,
            token_count: (text.len() - done) as u32,
            position: done as u32,
            block_start: 0,
            block_count: blocks,
        });
        done = text.len();
        step = backend.run(step);
        assert_eq!(step.result.failure, None);
        println!("{} us", step.result.elapsed_ns / 1000);
        text.push(step.result.sampled[0].token);
    }
    let s: String =
        text.iter().map(|&t| tokens[t as usize].replace('Ġ', " ").replace('Ċ', "\n")).collect();
    println!("{s}");
}
