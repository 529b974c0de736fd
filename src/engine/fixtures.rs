//! What do the tests of the layers above stand on?

use super::Language;
use crate::model::weights::gguf::Value;

/// A small vocabulary: a token a byte, then ChatML's two control tokens, 256 and 257.
pub fn chatml_over_bytes() -> Language {
    let mut other = '\u{100}'..;
    let bytes = (0..=255_u8).map(|byte| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte).to_string(),
        _ => other.next().unwrap().to_string(),
    });
    let tokens: Vec<String> = bytes.chain(["<|im_start|>".into(), "<|im_end|>".into()]).collect();
    let metadata = [
        ("tokenizer.ggml.model", Value::Str("gpt2".into())),
        ("tokenizer.ggml.pre", Value::Str("gpt-2".into())),
        ("tokenizer.ggml.tokens", Value::Strs(tokens)),
        ("tokenizer.ggml.token_type", Value::I32s([vec![1; 256], vec![3; 2]].concat())),
        ("tokenizer.ggml.merges", Value::Strs(Vec::new())),
    ];
    Language::from_metadata(&metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()).unwrap()
}
