//! A plan that breaks its contract is refused whole: nothing is computed, nothing remembered.

#[path = "common/gguf_file.rs"]
mod gguf_file;
#[path = "cpu_support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use forebay::device::Backend;
use forebay::device::cpu::{CpuBackend, CpuOptions, Isa, LoadError, kv_block_bytes};
use forebay::message::{PlanRow, SeqKey, SlotSetup, Step, StepFailure};
use forebay::model::Gguf;
use forebay::request::SamplingParams;
use support::options;

fn small() -> Gguf {
    Gguf::from_bytes(gguf_file::small_model().bytes()).expect("a valid file")
}

fn seq(slot: u32) -> SeqKey {
    SeqKey { slot, generation: 1 }
}

fn setup(slot: u16) -> SlotSetup {
    SlotSetup {
        slot,
        seq: seq(slot.into()),
        sampling: Arc::new(SamplingParams { temperature: 0.0, ..Default::default() }),
        history_start: 0,
        history_count: 0,
        history_prompt_count: 0,
    }
}

/// Two rows: a prompt of 70 tokens on blocks 4 and 5, and a decode row at position 3 on block 9.
fn valid() -> Box<Step> {
    let mut step = Box::<Step>::default();
    step.plan.number = 1;
    step.plan.setups = vec![setup(0), setup(1)];
    step.plan.tokens = (0..71).map(|token| token % 64).collect();
    step.plan.blocks = vec![4, 5, 9];
    step.plan.rows = vec![
        PlanRow {
            seq: seq(0),
            slot: 0,
            sample: true,
            token_start: 0,
            token_count: 70,
            position: 0,
            block_start: 0,
            block_count: 2,
        },
        PlanRow {
            seq: seq(1),
            slot: 1,
            sample: true,
            token_start: 70,
            token_count: 1,
            position: 3,
            block_start: 2,
            block_count: 1,
        },
    ];
    step
}

fn backend(options: &CpuOptions) -> CpuBackend {
    CpuBackend::load(&small(), options, Box::new(|| {})).expect("the model loads")
}

type Breakage = (&'static str, fn(&mut Step));

const BREAKAGES: &[Breakage] = &[
    ("a token outside the vocabulary", |s| s.plan.tokens[5] = 64),
    ("a block outside the pool", |s| s.plan.blocks[1] = 40),
    ("a block used twice by a row", |s| s.plan.blocks[1] = 4),
    ("a block used by two rows", |s| s.plan.blocks[2] = 5),
    ("a slot outside the batch", |s| {
        s.plan.setups[1].slot = 8;
        s.plan.rows[1].slot = 8;
    }),
    ("a slot without an owner", |s| s.plan.rows[1].slot = 2),
    ("another's slot", |s| s.plan.rows[1].seq = seq(7)),
    ("a slot used twice", |s| s.plan.rows[1] = PlanRow { slot: 0, seq: seq(0), ..s.plan.rows[1] }),
    ("no tokens in a row", |s| s.plan.rows[1].token_count = 0),
    ("tokens past the end", |s| s.plan.rows[1].token_count = 2),
    ("tokens at the far end of u32", |s| s.plan.rows[1].token_start = u32::MAX),
    ("blocks past the end", |s| s.plan.rows[1].block_start = 3),
    ("too few blocks", |s| s.plan.rows[0].block_count = 1),
    ("too many blocks", |s| {
        s.plan.rows[1] = PlanRow { block_start: 1, block_count: 2, ..s.plan.rows[1] }
    }),
    ("a position outside the context", |s| {
        s.plan.blocks.extend(10..18);
        s.plan.rows[1].position = 512;
        s.plan.rows[1].block_count = 9;
    }),
    ("a position that overflows", |s| s.plan.rows[1].position = u32::MAX),
    ("more tokens than agreed", |s| {
        s.plan.tokens = vec![1; 257];
        s.plan.blocks = (0..6).collect();
        s.plan.rows[0].token_count = 256;
        s.plan.rows[0].block_count = 4;
        s.plan.rows[1].token_start = 256;
        s.plan.rows[1].block_start = 5;
    }),
    ("more rows than agreed", |s| {
        let row = s.plan.rows[1];
        s.plan.rows.extend([row; 7]);
    }),
    ("history past its end", |s| s.plan.setups[0].history_count = 1),
    ("history outside the vocabulary", |s| {
        s.plan.history = vec![64];
        s.plan.setups[0].history_count = 1;
    }),
    ("more prompt than history", |s| s.plan.setups[0].history_prompt_count = 1),
];

#[test]
fn every_breach_of_the_contract_is_refused_and_leaves_no_trace() {
    let mut reference = backend(&options(2, Isa::best()));
    let expected = reference.run(valid()).result;
    assert_eq!(expected.failure, None);
    assert_eq!(expected.sampled.len(), 2);
    for (what, breakage) in BREAKAGES {
        let mut backend = backend(&options(2, Isa::best()));
        let mut broken = valid();
        breakage(&mut broken);
        let result = backend.run(broken).result;
        assert_eq!(result.failure, Some(StepFailure::InvalidPlan), "{what}");
        assert!(result.sampled.is_empty() && result.top.is_empty(), "{what}");
        // Slots were not handed out...
        let mut step = valid();
        step.plan.setups.clear();
        let result = backend.run(step).result;
        assert_eq!(result.failure, Some(StepFailure::InvalidPlan), "{what}: slots");
        // ...and a valid plan gives what it gives on a fresh backend.
        let result = backend.run(valid()).result;
        assert_eq!(result.sampled, expected.sampled, "{what}: afterwards");
    }
}

#[test]
fn more_samples_than_agreed_are_refused() {
    let mut few = options(1, Isa::best());
    few.sampled_rows_max = 1;
    let mut backend = backend(&few);
    assert_eq!(backend.run(valid()).result.failure, Some(StepFailure::InvalidPlan));
    let mut step = valid();
    step.plan.rows[0].sample = false;
    let result = backend.run(step).result;
    assert_eq!((result.failure, result.sampled.len()), (None, 1));
}

#[test]
fn a_read_only_block_may_be_shared_and_a_written_one_may_not() {
    let mut backend = backend(&options(2, Isa::best()));
    let mut shared = valid();
    // Both rows continue behind the same full block 4.
    shared.plan.blocks = vec![4, 5, 4, 9];
    for (row, block_start) in [(0, 0), (1, 2)] {
        let row = &mut shared.plan.rows[row];
        (row.position, row.token_count) = (64, 1);
        (row.block_start, row.block_count) = (block_start, 2);
    }
    assert_eq!(backend.run(shared).result.failure, None);
    let mut clash = valid();
    // The second row reads block 4, which the first one is writing.
    clash.plan.blocks = vec![4, 5, 4, 9];
    clash.plan.rows[1].position = 64;
    clash.plan.rows[1].block_count = 2;
    assert_eq!(backend.run(clash).result.failure, Some(StepFailure::InvalidPlan));
}

#[test]
fn an_empty_plan_is_a_step_too() {
    let mut backend = backend(&options(2, Isa::best()));
    let step = backend.run(Box::default());
    assert_eq!(step.result.failure, None);
    assert!(step.result.sampled.is_empty());
}

#[test]
fn completion_is_told_once_a_step_and_poll_gives_the_step_back() {
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    let (done, finished) = std::sync::mpsc::sync_channel(1);
    let on_complete = Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        done.send(()).expect("the test listens");
    });
    let mut backend =
        CpuBackend::load(&small(), &options(2, Isa::best()), on_complete).expect("loads");
    assert!(backend.poll().is_none());
    for number in 1..=20 {
        let mut step = valid();
        step.plan.number = number;
        backend.submit(step);
        finished.recv().expect("the step ends");
        let step = backend.poll().expect("told, so finished");
        assert_eq!(step.plan.number, number);
        assert!(step.result.elapsed_ns > 0);
        assert!(backend.poll().is_none());
    }
    assert_eq!(told.load(Ordering::Relaxed), 20);
}

#[test]
fn a_backend_may_be_dropped_while_a_step_runs() {
    for _ in 0..10 {
        let mut backend = backend(&options(2, Isa::best()));
        backend.submit(valid());
        drop(backend);
    }
}

#[test]
fn options_that_cannot_be_are_named() {
    let gguf = small();
    let refused = |change: fn(&mut CpuOptions)| {
        let mut options = options(1, Isa::best());
        change(&mut options);
        match CpuBackend::load(&gguf, &options, Box::new(|| {})) {
            Err(LoadError::Options(text)) => text,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("loaded"),
        }
    };
    assert!(refused(|o| o.cpus.clear()).contains("workers"));
    assert!(refused(|o| o.context_max = 513).contains("512"));
    assert!(refused(|o| o.rows_max = 0).contains("rows"));
}

#[test]
fn the_description_counts_blocks_as_they_lie() {
    let gguf = small();
    let backend = backend(&options(1, Isa::best()));
    let description = backend.description();
    // 2 layers, 1 kv head, keys and values of 64 positions, 16 values padded to 32, 2 bytes each.
    assert_eq!(description.kv_block_bytes, 2 * 2 * 64 * 32 * 2);
    assert_eq!(description.kv_block_bytes, kv_block_bytes(&gguf.config().expect("valid")));
    assert_eq!((description.kv_blocks, description.depth), (40, 1));
    assert!(description.weight_bytes > 0 && description.workspace_bytes > 0);
}
