//! The fuzz target for model files, run on some thousand inputs: whole files with a few bytes,
//! numbers or stretches changed. And, because the allocator counts: no input makes the loader ask
//! for memory that its size does not justify.

#[path = "fuzz/bodies/gguf.rs"]
mod body;
#[path = "common/gguf_file.rs"]
mod gguf_file;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use body::Stage;
use gguf_file::{Meta, Numbers};

/// Remembers the largest single allocation.
struct Watching;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed to the system's allocator as it came; the counter beside it is an
// atomic maximum and touches no memory of the caller's. A global allocator cannot be written
// without unsafe code.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on unchanged.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on unchanged.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static WATCHING: Watching = Watching;

/// The largest allocation that loading a file of some 60 KB may make: the tables of character
/// classes (64 KB), a regular expression's program, a template's environment, maps of the
/// vocabulary. A count believed from a header would be far above.
const ALLOCATION_MAX: usize = 4 << 20;

/// A whole small model with tokenizer and template.
fn whole() -> Vec<u8> {
    let mut file = gguf_file::random_model(&gguf_file::SMALL, gguf_file::Q4_0, gguf_file::F32, 5);
    let tokens = (0..64u8).map(|at| match at {
        0 => "<|im_end|>".to_owned(),
        1 => "he".to_owned(),
        2 => "hel".to_owned(),
        _ => char::from(b'@' + at).to_string(),
    });
    let types = (0..64).map(|at| if at == 0 { 3 } else { 1 }).collect();
    file.set("tokenizer.ggml.model", Meta::Text("gpt2"));
    file.set("tokenizer.ggml.pre", Meta::Text("llama-bpe"));
    file.set("tokenizer.ggml.tokens", Meta::Strings(tokens.collect()));
    file.set("tokenizer.ggml.token_type", Meta::I32s(types));
    file.set("tokenizer.ggml.merges", Meta::Strings(vec!["h e".into(), "he l".into()]));
    file.set("tokenizer.ggml.eos_token_id", Meta::U32(0));
    let template = "{% for m in messages %}{{ m.role + ':' + m.content }}<|im_end|>{% endfor %}";
    file.set("tokenizer.chat_template", Meta::Text(template));
    file.bytes()
}

/// Values that length and count fields break on.
const NUMBERS: [u64; 10] =
    [0, 1, 2, 31, 0xff, 1 << 31, u32::MAX as u64, 1 << 62, u64::MAX / 2, u64::MAX];

fn changed(whole: &[u8], numbers: &mut Numbers, header: usize) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for _ in 0..1 + numbers.below(4) {
        // Nearly all that can go wrong is in the header.
        let within = if numbers.below(8) == 0 { bytes.len() } else { header.min(bytes.len()) };
        let at = numbers.below(within.max(1) as u64) as usize;
        match numbers.below(6) {
            0 => bytes[at] ^= 1 << numbers.below(8),
            1 => bytes[at] = numbers.next_u64() as u8,
            2 => {
                let number = NUMBERS[numbers.below(NUMBERS.len() as u64) as usize].to_le_bytes();
                let width = [1, 4, 8][numbers.below(3) as usize].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
            3 => bytes.truncate(at.max(1)),
            4 => {
                let end = (at + numbers.below(64) as usize).min(bytes.len());
                bytes.drain(at..end);
            }
            _ => {
                let end = (at + numbers.below(64) as usize).min(bytes.len());
                let stretch = bytes[at..end].to_vec();
                bytes.splice(at..at, stretch);
            }
        }
        if bytes.is_empty() {
            return bytes;
        }
    }
    bytes
}

#[test]
fn no_change_to_a_file_makes_loading_panic_or_ask_for_absurd_memory() {
    const INPUTS: usize = 20_000;
    let whole = whole();
    assert_eq!(body::run(&whole), Stage::Tokenizer, "unchanged, it loads");
    // Metadata and tensor descriptions are the first 4 KB or so; the rest is weights.
    let header = 4_096.min(whole.len());
    let mut numbers = Numbers(20_240_607);
    let mut stages = [0usize; 4];
    LARGEST.store(0, Ordering::Relaxed);
    for _ in 0..INPUTS {
        let input = changed(&whole, &mut numbers, header);
        stages[body::run(&input) as usize] += 1;
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest < ALLOCATION_MAX, "asked for {largest} bytes");
    }
    // Otherwise the inputs would all be refused at the door and test nothing.
    assert!(stages.iter().all(|&count| count > INPUTS / 100), "{stages:?}");
}

#[test]
#[ignore = "writes a file: what the coverage-guided fuzzer begins with (tests/fuzz/run)"]
fn a_whole_model_is_a_seed_of_the_fuzzer() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus/gguf");
    std::fs::create_dir_all(corpus).unwrap();
    std::fs::write(format!("{corpus}/whole"), whole()).unwrap();
}
