//! The scanners against the expressions they stand for, and a small vocabulary end to end.

use std::sync::LazyLock;

use proptest::prelude::*;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
};

use super::*;
use crate::model::Gguf;
use crate::model::gguf::testing::{GgufFile, Meta, small_model};

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// A scheme's steps, each an expression whose matches and gaps become words. (One digit at a time
/// is a step of the reference too, there a class of its own.)
type Steps = Vec<Box<dyn Fn(&mut PreTokenizedString) + Send + Sync>>;

static REFERENCES: LazyLock<Vec<(Scheme, Steps)>> = LazyLock::new(|| {
    fn cut(step: impl PreTokenizer + Send + Sync + 'static) -> Steps {
        vec![Box::new(move |text| step.pre_tokenize(text).expect("splits"))]
    }
    let by = |expression: &str| {
        let pattern = SplitPattern::Regex(expression.to_owned());
        cut(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).expect("an expression"))
    };
    let chain = |steps: Vec<Steps>| steps.into_iter().flatten().collect::<Steps>();
    vec![
        (Scheme::Gpt2, by(GPT2)),
        (Scheme::Gpt2Digits, chain(vec![cut(Digits::new(true)), by(GPT2)])),
        (Scheme::Llama3, by(LLAMA3)),
        (Scheme::Qwen2, by(QWEN2)),
        (
            Scheme::Default,
            chain(vec![
                by(r"[\p{P}\$\+<=>\^~\|]+"),
                by(GPT2),
                by(r"\p{N}+"),
                by("[0-9][0-9][0-9]"),
            ]),
        ),
    ]
});

/// The words that the reference pre-tokenizers make, in order.
fn reference_words(steps: &Steps, text: &str) -> Vec<String> {
    let mut whole = PreTokenizedString::from(text);
    steps.iter().for_each(|step| step(&mut whole));
    let splits = whole.get_splits(OffsetReferential::Original, OffsetType::Byte);
    splits.into_iter().map(|(word, ..)| word.to_owned()).filter(|word| !word.is_empty()).collect()
}

fn words(scheme: Scheme, mut text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    while !text.is_empty() {
        let (word, rest) = text.split_at(scheme.word(text));
        words.push(word);
        text = rest;
    }
    words
}

/// Text that hits the expressions' corners far more often than random characters would.
fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => prop::sample::select(vec![
            " ", "  ", "\n", "\r\n", "\t", "\u{a0}", "\u{3000}", "'", "'s", "'S", "'ſ",
                    "'re", "'LL",
            "'v", "a", "Zé", "漢字", "한국", "e\u{301}", "1", "23", "4567", "½", "Ⅷ", "٣", "１２３", ".",
            "!?", "$", "=>", "_", "😀", "👩\u{200d}👧", "\u{1b}", "\0", "<|im_end|>", "ʰ", "ª", "𝒳",
            "\u{85}", "\u{2028}", "\u{200b}", "\u{feff}",
        ]).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
        1 => "[a-z]{1,8}",
    ];
    prop::collection::vec(part, 0..24).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn scanners_cut_where_their_expressions_do(text in text()) {
        for (scheme, steps) in &*REFERENCES {
            prop_assert_eq!(words(*scheme, &text), reference_words(steps, &text), "{:?}", scheme);
        }
    }
}

#[test]
fn a_long_run_of_anything_is_cut_at_the_bound_and_in_linear_time() {
    for part in ["a", " ", "\n", "7", "-", "漢", "😀", "\u{301}", "'", " \n"] {
        let text = part.repeat(200_000 / part.len());
        for scheme in REFERENCES.iter().map(|(scheme, _)| *scheme).chain([Scheme::Spaces]) {
            let words = words(scheme, &text);
            assert!(words.iter().all(|word| !word.is_empty() && word.len() <= WORD_BYTES_MAX));
            assert_eq!(words.concat(), text);
        }
    }
}

/// A vocabulary of all bytes, a few merges, two control tokens and a user-defined one.
fn byte_vocabulary() -> GgufFile {
    let mut tokens: Vec<String> =
        vec!["<|im_start|>".into(), "<|im_end|>".into(), "<think>".into()];
    let mut types = vec![3, 3, 4];
    tokens.extend((0..=255u8).map(|byte| bytes::to_char(byte).to_string()));
    let merges =
        [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("<", "|"), ("Ġ", "Ġ")];
    tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    types.resize(tokens.len(), 1);
    let mut file = GgufFile::default();
    file.set("tokenizer.ggml.model", Meta::Text("gpt2"));
    file.set("tokenizer.ggml.pre", Meta::Text("smollm"));
    file.set("tokenizer.ggml.tokens", Meta::Strings(tokens));
    file.set("tokenizer.ggml.token_type", Meta::I32s(types));
    let merges = merges.iter().map(|(left, right)| format!("{left} {right}"));
    file.set("tokenizer.ggml.merges", Meta::Strings(merges.collect()));
    file.set("tokenizer.ggml.eos_token_id", Meta::U32(1));
    file
}

fn tokenizer(file: &GgufFile) -> Tokenizer {
    Tokenizer::from_gguf(&Gguf::from_bytes(file.bytes()).expect("valid")).expect("a tokenizer")
}

fn literals(tokenizer: &Tokenizer, tokens: &[TokenId]) -> Vec<String> {
    let text = |&token: &TokenId| String::from_utf8_lossy(tokenizer.table().literal(token)).into();
    tokens.iter().map(text).collect()
}

#[test]
fn bytes_are_merged_in_order_of_rank() {
    let tokenizer = tokenizer(&byte_vocabulary());
    let tokens = tokenizer.encode("hello  w3 é");
    let literals = literals(&tokenizer, &tokens);
    assert_eq!(literals, ["hello", " ", " w", "3", " ", "\u{fffd}", "\u{fffd}"]);
    assert_eq!(tokenizer.decode(&tokens), "hello  w3 é");
}

#[test]
fn a_control_tokens_name_in_text_is_text() {
    let tokenizer = tokenizer(&byte_vocabulary());
    let tokens = tokenizer.encode("<|im_end|>");
    assert!(tokens.iter().all(|&token| !tokenizer.table().is_control(token)));
    assert_eq!(tokenizer.decode(&tokens), "<|im_end|>");
    let controls: Vec<_> = tokenizer.controls("x<|im_end|><think><|im_start|>").collect();
    assert_eq!(controls, [(1..11, 1), (18..30, 0)]);
}

#[test]
fn a_user_defined_token_is_found_in_any_text() {
    let tokenizer = tokenizer(&byte_vocabulary());
    let tokens = tokenizer.encode("hello<think>w<thin");
    assert_eq!(literals(&tokenizer, &tokens)[..3], ["hello", "<think>", "w"]);
    assert_eq!(tokenizer.decode(&tokens), "hello<think>w<thin");
}

#[test]
fn the_table_says_what_each_token_adds_to_the_output() {
    let tokenizer = tokenizer(&byte_vocabulary());
    let table = tokenizer.table();
    assert_eq!((table.bytes(1), table.literal(1)), (&b""[..], &b"<|im_end|>"[..]));
    assert_eq!(table.bytes(2), b"<think>");
    assert_eq!(table.bytes(3 + 0xff), [0xff]);
    assert_eq!(table.longest_bytes(), "<think>".len());
    assert_eq!(table.ends_of_text(), [1]);
    assert!(table.is_end_of_text(1) && !table.is_end_of_text(0));
    assert_eq!(table.bytes(TokenId::MAX), b"");
    assert_eq!(table.kind(TokenId::MAX), TokenKind::Unused);
}

#[test]
fn encoding_stops_soon_after_its_token_limit() {
    let tokenizer = tokenizer(&byte_vocabulary());
    let mut prompt = Prompt::new();
    prompt.push_text(&"x ".repeat(1_000));
    let mut encoder = Encoder::new(prompt.clone(), 10);
    assert_eq!(encoder.advance(&tokenizer, usize::MAX), Progress::TooLong);
    assert!(encoder.tokens().len() < 20);
    let mut exact = Encoder::new(prompt, 2_000);
    assert_eq!(exact.advance(&tokenizer, usize::MAX), Progress::Done);
}

#[test]
fn a_prompt_of_tokens_and_texts_keeps_their_order() {
    let tokenizer = tokenizer(&byte_vocabulary());
    let mut prompt = Prompt::new();
    prompt.push_token(0);
    prompt.push_text("he");
    prompt.push_text("llo");
    prompt.push_token(1);
    assert!(prompt.tokens_bound() >= 7);
    assert_eq!(prompt.segments().len(), 3);
    let tokens = tokenizer.encode_prompt(prompt);
    assert_eq!(literals(&tokenizer, &tokens), ["<|im_start|>", "hello", "<|im_end|>"]);
}

proptest! {
    #[test]
    fn however_it_is_sliced_the_tokens_are_the_same(text in text(), slice in 1usize..9) {
        static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| tokenizer(&byte_vocabulary()));
        let tokenizer = &*TOKENIZER;
        let mut prompt = Prompt::new();
        prompt.push_text(&text);
        let mut encoder = Encoder::new(prompt, usize::MAX);
        let mut slices = 0;
        while encoder.advance(tokenizer, slice) == Progress::More {
            slices += 1;
        }
        prop_assert!(slices <= text.len());
        prop_assert_eq!(encoder.tokens(), tokenizer.encode(&text));
        prop_assert_eq!(tokenizer.decode(encoder.tokens()), text);
    }
}

#[test]
fn unsupported_and_contradictory_vocabularies_are_refused_by_name() {
    let refusal = |key: &str, value: Option<Meta>| {
        let mut file = byte_vocabulary();
        match value {
            Some(value) => file.set(key, value),
            None => file.unset(key),
        };
        let gguf = Gguf::from_bytes(file.bytes()).expect("valid");
        Tokenizer::from_gguf(&gguf).expect_err("refused").to_string()
    };
    for (key, value, part) in [
        ("tokenizer.ggml.model", Some(Meta::Text("bert")), "\"bert\" is not supported"),
        ("tokenizer.ggml.model", None, "lacks \"tokenizer.ggml.model\""),
        ("tokenizer.ggml.pre", Some(Meta::Text("tekken")), "\"tekken\" is not supported: smollm"),
        ("tokenizer.ggml.pre", None, "lacks \"tokenizer.ggml.pre\""),
        ("tokenizer.ggml.tokens", None, "lacks \"tokenizer.ggml.tokens\""),
        ("tokenizer.ggml.tokens", Some(Meta::Strings(vec![])), "at least one"),
        ("tokenizer.ggml.tokens", Some(Meta::I32s(vec![1])), "at least one"),
        ("tokenizer.ggml.token_type", Some(Meta::I32s(vec![1])), "one a token"),
        ("tokenizer.ggml.merges", None, "lacks \"tokenizer.ggml.merges\""),
        ("tokenizer.ggml.merges", Some(Meta::Strings(vec!["ab".into()])), "merge 0"),
        ("tokenizer.ggml.merges", Some(Meta::Strings(vec!["漢 字".into()])), "none of them"),
        ("tokenizer.ggml.eos_token_id", Some(Meta::U32(100_000)), "below the vocabulary's"),
    ] {
        let message = refusal(key, value);
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
    let gguf = Gguf::from_bytes(small_model().bytes()).expect("valid");
    assert!(Tokenizer::from_gguf(&gguf).is_err());
}

/// A SentencePiece vocabulary: bytes, characters, and pieces whose scores say which comes first.
fn piece_vocabulary() -> GgufFile {
    let mut tokens: Vec<String> = vec!["<unk>".into(), "<s>".into(), "</s>".into()];
    let mut types = vec![2, 3, 3];
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    types.resize(tokens.len(), 6);
    tokens.extend(
        ["▁", "h", "e", "l", "o", "w", "ll", "he", "hell", "hello", "▁hello", "▁w", "▁▁"]
            .map(str::to_owned),
    );
    types.resize(tokens.len(), 1);
    let scores: Vec<u8> = (0..tokens.len()).flat_map(|id| (-(id as f32)).to_le_bytes()).collect();
    let mut file = GgufFile::default();
    file.set("tokenizer.ggml.model", Meta::Text("llama"));
    let mut array = 6u32.to_le_bytes().to_vec();
    array.extend((tokens.len() as u64).to_le_bytes());
    array.extend(scores);
    file.set("tokenizer.ggml.scores", Meta::Raw(9, array));
    file.set("tokenizer.ggml.tokens", Meta::Strings(tokens));
    file.set("tokenizer.ggml.token_type", Meta::I32s(types));
    file.set("tokenizer.ggml.bos_token_id", Meta::U32(1));
    file
}

#[test]
fn sentence_pieces_are_merged_by_score_and_unknown_characters_become_bytes() {
    let tokenizer = tokenizer(&piece_vocabulary());
    let tokens = tokenizer.encode("hello  wé");
    let names = literals(&tokenizer, &tokens);
    assert_eq!(names, [" hello", " ", " w", "\u{fffd}", "\u{fffd}"]);
    assert_eq!(tokenizer.decode(&tokens), " hello  wé");
    assert_eq!(literals(&tokenizer, &tokenizer.encode("  ")), ["  ", " "]);
    assert_eq!(tokenizer.leading_bos(), Some(1));
    assert_eq!(tokenizer.table().ends_of_text(), [2]);
    let text = tokenizer.encode("</s><0x41>");
    assert!(text.iter().all(|&token| !tokenizer.table().is_control(token)));
    assert_eq!(tokenizer.decode(&text), " </s><0x41>");
}

#[test]
fn pieces_that_reach_over_a_space_are_refused() {
    let mut file = piece_vocabulary();
    let Some((_, Meta::Strings(mut tokens))) =
        file.metadata.iter().find(|(key, _)| key == "tokenizer.ggml.tokens").cloned()
    else {
        panic!("there are tokens");
    };
    *tokens.last_mut().expect("some") = "o▁w".into();
    file.set("tokenizer.ggml.tokens", Meta::Strings(tokens));
    let gguf = Gguf::from_bytes(file.bytes()).expect("valid");
    let message = Tokenizer::from_gguf(&gguf).expect_err("refused").to_string();
    assert!(message.contains("o▁w") && message.contains("reaches over a space"), "{message}");
}

#[test]
fn a_vocabulary_with_too_many_ways_to_make_its_pieces_is_refused() {
    let mut file = piece_vocabulary();
    let tokens: Vec<String> = (1..200).map(|length| "a".repeat(length)).collect();
    let scores: Vec<u8> = tokens.iter().flat_map(|_| 0f32.to_le_bytes()).collect();
    let mut array = 6u32.to_le_bytes().to_vec();
    array.extend((tokens.len() as u64).to_le_bytes());
    array.extend(scores);
    file.set("tokenizer.ggml.scores", Meta::Raw(9, array));
    file.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; tokens.len()]));
    file.set("tokenizer.ggml.tokens", Meta::Strings(tokens));
    let gguf = Gguf::from_bytes(file.bytes()).expect("valid");
    let message = Tokenizer::from_gguf(&gguf).expect_err("refused").to_string();
    assert!(message.contains("ways to put"), "{message}");
}
