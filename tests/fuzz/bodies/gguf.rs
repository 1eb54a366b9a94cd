//! Everything that is done with a model file before the first step, on bytes that may be anything.

use forebay::model::{ChatTemplate, Gguf, Message, Tokenizer, quant};

/// How far the bytes got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// They are no GGUF file.
    Refused,
    /// They are one, but no model.
    Parsed,
    /// They are a model without a tokenizer.
    Model,
    /// They are a model with a tokenizer, and text went through it.
    Tokenizer,
}

/// Loads `bytes` as far as they let it. Panics only when something that must hold does not.
pub fn run(bytes: &[u8]) -> Stage {
    let Ok(gguf) = Gguf::from_bytes(bytes) else {
        return Stage::Refused;
    };
    read_all(&gguf);
    let config = gguf.config();
    if let Ok(config) = &config {
        let _ = config.rope(&gguf);
        for weight in config.weights() {
            let tensor = gguf.tensor(&weight.name).expect("checked by config");
            assert!(tensor.dtype.is_supported(), "checked by config");
            let values: usize = weight.shape.iter().product();
            assert_eq!(tensor.columns() * tensor.rows(), values, "checked by config");
        }
    }
    let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) else {
        return if config.is_ok() { Stage::Model } else { Stage::Parsed };
    };
    let text = "Hello <|im_end|> 123\n é😀";
    let tokens = tokenizer.encode(text);
    let table = tokenizer.table();
    assert!(tokens.iter().all(|&token| (token as usize) < table.len()));
    assert!(tokens.iter().all(|&token| !table.is_control(token)), "text is text");
    let _ = tokenizer.decode(&tokens);
    if let Ok(Some(template)) = ChatTemplate::from_gguf(&gguf, &tokenizer) {
        let _ = template.render(&tokenizer, &[Message { role: "user", content: text }], true);
    }
    if config.is_ok() { Stage::Tokenizer } else { Stage::Parsed }
}

/// Touches every value and every tensor's first and last row.
fn read_all(gguf: &Gguf) {
    for key in gguf.keys() {
        let value = gguf.value(key).expect("every parsed value can be decoded");
        let _ = value.describe();
        if let Ok(Some(array)) = gguf.array(key) {
            let count = array.scalars().count() + array.strings().count();
            assert_eq!(count, array.len(), "an array has as many elements as it says");
        }
    }
    let mut row = Vec::new();
    for tensor in gguf.tensors() {
        let bytes = tensor.dtype.row_bytes(tensor.columns()).expect("whole blocks");
        assert_eq!(bytes * tensor.rows(), tensor.data.len(), "a tensor is all of its rows");
        if tensor.dtype.is_supported() {
            row.resize(tensor.columns(), 0.0);
            quant::dequantize_row(tensor.dtype, tensor.row(0), &mut row);
            quant::dequantize_row(tensor.dtype, tensor.row(tensor.rows() - 1), &mut row);
        }
    }
}
