//! Files that are right, and files that are wrong in one way each.

use super::testing::{GgufFile, Meta, SMALL, random_model, small_model, small_model_with};
use super::*;

fn parse(file: &GgufFile) -> Result<Gguf, GgufError> {
    Gguf::from_bytes(file.bytes())
}

fn refusal(file: &GgufFile) -> String {
    match parse(file).and_then(|gguf| gguf.config()) {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn assert_refused(file: &GgufFile, parts: &[&str]) {
    let message = refusal(file);
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

#[test]
fn a_small_model_is_read_back_as_it_was_written() {
    let file = small_model();
    let gguf = parse(&file).expect("valid");
    for written in &file.tensors {
        let read = gguf.tensor(&written.name).expect("present");
        assert_eq!(read.data, written.data);
        assert_eq!(read.shape.len(), written.shape.len());
        assert_eq!(read.columns() as u64, written.shape[0]);
    }
    let config = gguf.config().expect("valid");
    assert_eq!((config.layers, config.hidden, config.ffn), (2, 32, 64));
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.vocab), (2, 1, 16, 64));
    assert!(config.tied_output);
    assert_eq!(config.weights().len(), file.tensors.len());
}

#[test]
fn version_2_is_read_like_version_3() {
    let mut file = small_model();
    file.version = 2;
    assert_eq!(parse(&file).expect("valid").version(), 2);
}

#[test]
fn every_storage_type_that_can_be_run_is_accepted() {
    use super::testing::{BF16, F16, F32, Q4_0, Q4_1, Q8_0};
    for dtype in [F32, F16, BF16, Q8_0, Q4_0, Q4_1] {
        let shape = super::testing::Shape { tied: false, ..SMALL };
        let gguf = parse(&random_model(&shape, dtype, Q8_0, 7)).expect("valid");
        let config = gguf.config().expect("valid");
        assert!(!config.tied_output);
        assert_eq!(gguf.tensor("blk.1.attn_q.weight").expect("present").dtype.number(), dtype);
    }
}

#[test]
fn metadata_of_every_type_is_read() {
    let mut file = GgufFile::default();
    file.set("a", Meta::U32(7));
    file.set("b", Meta::I32(-7));
    file.set("c", Meta::F32(0.5));
    file.set("d", Meta::Bool(true));
    file.set("e", Meta::Text("é"));
    file.set("f", Meta::Strings(vec!["x".into(), String::new(), "yz".into()]));
    file.set("g", Meta::I32s(vec![3, -1]));
    file.set("h", Meta::Raw(0, vec![200]));
    file.set("i", Meta::Raw(1, vec![200]));
    file.set("j", Meta::Raw(12, 2.5f64.to_le_bytes().to_vec()));
    let gguf = parse(&file).expect("valid");
    assert_eq!(gguf.value("a"), Some(Value::Unsigned(7)));
    assert_eq!(gguf.value("b"), Some(Value::Signed(-7)));
    assert_eq!(gguf.float("c").expect("a number"), Some(0.5));
    assert_eq!(gguf.boolean("d").expect("a boolean"), Some(true));
    assert_eq!(gguf.text("e").expect("text"), Some("é"));
    let strings: Vec<&[u8]> = gguf.array("f").expect("array").expect("there").strings().collect();
    assert_eq!(strings, [&b"x"[..], b"", b"yz"]);
    let numbers: Vec<Value> = gguf.array("g").expect("array").expect("there").scalars().collect();
    assert_eq!(numbers, [Value::Signed(3), Value::Signed(-1)]);
    assert_eq!(gguf.value("h"), Some(Value::Unsigned(200)));
    assert_eq!(gguf.value("i"), Some(Value::Signed(-56)));
    assert_eq!(gguf.float("j").expect("a number"), Some(2.5));
    assert_eq!(gguf.unsigned("absent").expect("no error"), None);
    assert!(gguf.unsigned("b").is_err());
    assert!(gguf.text("a").is_err());
}

#[test]
fn a_file_cut_anywhere_is_refused_and_never_a_panic() {
    let whole = small_model().bytes();
    // The header byte by byte, the tensor data in larger steps.
    let header = 3_000.min(whole.len());
    for end in (0..header).chain((header..whole.len()).step_by(97)) {
        let error = Gguf::from_bytes(&whole[..end]).expect_err("cut");
        assert!(!error.to_string().is_empty());
    }
    Gguf::from_bytes(whole).expect("whole");
}

#[test]
fn a_changed_byte_anywhere_in_the_header_never_panics() {
    let whole = small_model().bytes();
    for at in 0..3_000.min(whole.len()) {
        for change in [0x01, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            if let Ok(gguf) = Gguf::from_bytes(bytes) {
                let _ = gguf.config();
            }
        }
    }
}

#[test]
fn other_files_and_other_versions_are_named() {
    let message = |bytes: &[u8]| Gguf::from_bytes(bytes).expect_err("wrong").to_string();
    assert!(message(b"PK\x03\x04rest of a zip").contains("not a GGUF file"));
    assert!(message(b"").contains("not a GGUF file"));
    assert!(message(b"GGUF\x01\0\0\0").contains("GGUF version 1 is not supported"));
    assert!(message(b"GGUF\0\0\0\x03").contains("big-endian"));
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated_for_them() {
    let header = |tensors: u64, keys: u64| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        Gguf::from_bytes(bytes).expect_err("absurd").to_string()
    };
    assert!(header(u64::MAX, 0).contains("tensor count is 18446744073709551615, and at most"));
    assert!(header(0, 1 << 40).contains("metadata count"));
    let mut strings = 8u32.to_le_bytes().to_vec();
    strings.extend(u64::MAX.to_le_bytes());
    let mut file = GgufFile::default();
    file.set("many", Meta::Raw(9, strings));
    assert_refused(&file, &["truncated", "\"many\""]);
    let mut numbers = 10u32.to_le_bytes().to_vec();
    numbers.extend((u64::MAX / 8 + 2).to_le_bytes());
    file.set("many", Meta::Raw(9, numbers));
    assert_refused(&file, &["truncated", "\"many\""]);
    file.set("many", Meta::Raw(8, u64::MAX.to_le_bytes().to_vec()));
    assert_refused(&file, &["truncated", "\"many\""]);
}

#[test]
fn broken_metadata_is_refused_by_name() {
    let mut file = GgufFile::default();
    file.set("strange", Meta::Raw(13, vec![0; 8]));
    assert_refused(&file, &["type number", "\"strange\"", "from 0 (u8) to 12 (f64)"]);
    let mut nested = 9u32.to_le_bytes().to_vec();
    nested.extend(1u64.to_le_bytes());
    file.set("strange", Meta::Raw(9, nested));
    assert_refused(&file, &["array of arrays", "\"strange\""]);
    let mut latin1 = 1u64.to_le_bytes().to_vec();
    latin1.push(0xe9);
    file.set("strange", Meta::Raw(8, latin1));
    assert_refused(&file, &["\"strange\"", "UTF-8"]);
    let mut file = GgufFile::default();
    file.metadata.push(("twice".into(), Meta::U32(1)));
    file.metadata.push(("twice".into(), Meta::U32(2)));
    assert_refused(&file, &["\"twice\"", "occurs twice"]);
    let file = small_model_with(&[("general.alignment", Meta::U32(24))]);
    assert_refused(&file, &["general.alignment", "24", "a power of two"]);
    let file = small_model_with(&[("general.alignment", Meta::U32(0))]);
    assert_refused(&file, &["general.alignment", "a power of two"]);
}

#[test]
fn an_alignment_of_the_files_own_is_followed() {
    let mut file = small_model_with(&[("general.alignment", Meta::U32(256))]);
    file.alignment = 256;
    let gguf = parse(&file).expect("valid");
    let name = "blk.1.ffn_up.weight";
    assert_eq!(gguf.tensor(name).expect("present").data, file.tensor_mut(name).data);
}

#[test]
fn tensors_outside_the_file_or_on_each_others_bytes_are_refused() {
    let name = "blk.0.ffn_up.weight";
    let mut file = small_model();
    file.tensor_mut(name).offset = Some(1 << 40);
    assert_refused(&file, &["truncated", name]);
    file.tensor_mut(name).offset = Some(u64::MAX - 31);
    assert_refused(&file, &["truncated", name]);
    file.tensor_mut(name).offset = Some(64);
    assert_refused(&file, &[name, "overlaps"]);
    file.tensor_mut(name).offset = Some(7);
    assert_refused(&file, &[name, "a multiple of the alignment, 32"]);
    let mut file = small_model();
    file.tensors.push(file.tensors[3].clone());
    assert_refused(&file, &["occurs twice"]);
}

#[test]
fn impossible_shapes_and_types_are_refused() {
    let name = "blk.0.ffn_up.weight";
    let spoil = |shape: &[u64], dtype: u32| {
        let mut file = small_model();
        file.tensor_mut(name).shape = shape.to_vec();
        file.tensor_mut(name).dtype = dtype;
        file
    };
    assert_refused(&spoil(&[], 0), &["dimension count", name, "from 1 to 4"]);
    assert_refused(&spoil(&[1, 1, 1, 1, 1], 0), &["dimension count", "is 5"]);
    assert_refused(&spoil(&[32, 0], 0), &["dimension", name, "at least 1"]);
    assert_refused(&spoil(&[1 << 33, 1 << 33], 0), &["dimension", name, "below 2^64"]);
    assert_refused(&spoil(&[1 << 62, 2], 0), &["dimension", name]);
    assert_refused(&spoil(&[33, 32], 8), &["Q8_0", "33", "a multiple of 32"]);
    assert_refused(&spoil(&[32, 64], 4), &["type number 4", name, "Q8_0"]);
    assert_refused(&spoil(&[64, 32], 0), &[name, "[64, 32]", "[32, 64]"]);
    assert_refused(&spoil(&[32, 32], 0), &[name, "[32, 32]", "[32, 64]"]);
}

#[test]
fn a_type_that_is_not_run_is_refused_by_its_name() {
    let mut file = small_model();
    let tensor = file.tensor_mut("blk.0.ffn_up.weight");
    (tensor.dtype, tensor.data) = (6, vec![0; 22 * 64]);
    assert_refused(&file, &["type Q5_0", "blk.0.ffn_up.weight", "Q4_1 are"]);
    let mut file = small_model();
    let tensor = file.tensor_mut("output_norm.weight");
    (tensor.dtype, tensor.data) = (8, vec![0; 34]);
    assert_refused(&file, &["type Q8_0", "output_norm.weight", "F32, F16 and BF16"]);
}

#[test]
fn missing_and_superfluous_tensors_are_refused_by_name() {
    let mut file = small_model();
    file.tensors.retain(|tensor| tensor.name != "blk.1.attn_k.weight");
    assert_refused(&file, &["\"blk.1.attn_k.weight\" is missing", "[32, 16]"]);
    let mut file = small_model();
    file.tensors.retain(|tensor| tensor.name != "token_embd.weight");
    assert_refused(&file, &["\"token_embd.weight\" is missing"]);
    let mut file = small_model();
    file.tensor_f32("blk.0.attn_q.bias", &[32], &[0.0; 32]);
    assert_refused(&file, &["blk.0.attn_q.bias", "would not use it"]);
}

#[test]
fn values_out_of_range_are_refused_by_key() {
    let refused = |key: &'static str, value: Meta, parts: &[&str]| {
        assert_refused(&small_model_with(&[(key, value)]), &[&[key], parts].concat());
    };
    refused("llama.block_count", Meta::U32(0), &["from 1 to 1024"]);
    refused("llama.block_count", Meta::U32(u32::MAX), &["from 1 to 1024"]);
    refused("llama.block_count", Meta::Text("two"), &["\"two\"", "an integer"]);
    refused("llama.block_count", Meta::I32(-2), &["-2", "not negative"]);
    refused("llama.attention.head_count", Meta::U32(0), &["from 1"]);
    refused("llama.attention.head_count_kv", Meta::U32(3), &["a divisor of the 2 query heads"]);
    refused("llama.attention.layer_norm_rms_epsilon", Meta::F32(f32::NAN), &["above 0"]);
    refused("llama.rope.freq_base", Meta::F32(f32::INFINITY), &["above 1"]);
    refused("llama.rope.dimension_count", Meta::U32(18), &["at most the width of a head, 16"]);
    refused("llama.attention.value_length", Meta::U32(8), &["the width of keys, 16"]);
    refused("llama.vocab_size", Meta::U32(65), &["65", "64, the rows"]);
    refused("tokenizer.ggml.bos_token_id", Meta::U32(64), &["below the vocabulary's 64"]);
    refused("llama.expert_count", Meta::U32(8), &["not supported"]);
    refused("llama.rope.scaling.type", Meta::Text("longrope"), &["longrope", "\"yarn\""]);
}

#[test]
fn other_architectures_are_named() {
    let file = small_model_with(&[("general.architecture", Meta::Text("mamba"))]);
    assert_refused(&file, &["\"mamba\"", "\"llama\" is"]);
    let mut file = small_model();
    file.unset("general.architecture");
    assert_refused(&file, &["general.architecture", "lacks"]);
}

#[test]
fn head_counts_may_be_given_per_layer_when_they_agree() {
    let key = "llama.attention.head_count_kv";
    let gguf = parse(&small_model_with(&[(key, Meta::I32s(vec![1, 1]))])).expect("valid");
    assert_eq!(gguf.config().expect("valid").kv_heads, 1);
    assert_refused(&small_model_with(&[(key, Meta::I32s(vec![1, 2]))]), &["differs", key]);
    assert_refused(&small_model_with(&[(key, Meta::I32s(Vec::new()))]), &["differs", key]);
}

#[test]
fn a_file_that_cannot_be_opened_is_named() {
    let error = Gguf::open(Path::new("/nonexistent/model.gguf")).expect_err("absent");
    assert!(error.to_string().contains("/nonexistent/model.gguf"));
    let error = Gguf::open(Path::new("/")).expect_err("a folder");
    assert!(error.to_string().contains("not a regular file"), "{error}");
}

#[test]
fn hostile_names_do_not_flood_messages() {
    let mut file = small_model();
    file.tensor_mut("blk.0.ffn_up.weight").name = "\u{1b}[2J".repeat(60);
    let message = refusal(&file);
    assert!(message.len() < 600 && !message.contains('\u{1b}'), "{message:?}");
}
