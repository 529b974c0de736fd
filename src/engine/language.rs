//! Stands in for `model::language` until that is there: ChatML over bytes, a token a byte.

use std::ops::Range;
use std::sync::Arc;

use crate::types::TokenId;

pub struct ChatMessage<'a> {
    pub role: &'a str,
    pub name: Option<&'a str>,
    pub content: &'a str,
}

pub struct Rendered {
    pub text: String,
    pub plain: Vec<Range<usize>>,
}

impl Rendered {
    pub fn is_plain(&self, at: usize) -> bool {
        self.plain.iter().any(|plain| plain.contains(&at))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(pub String);

pub struct Language {
    stop: Arc<[TokenId]>,
    bytes: Vec<Vec<u8>>,
}

impl Default for Language {
    fn default() -> Self {
        let bytes = (0..=255u8).map(|byte| vec![byte]);
        let controls = [b"<|im_start|>".to_vec(), b"<|im_end|>".to_vec()];
        Self { stop: Arc::new([TokenId(257)]), bytes: bytes.chain(controls).collect() }
    }
}

impl Language {
    pub fn render(&self, messages: &[ChatMessage<'_>], add_generation_prompt: bool) -> Result<Rendered, TemplateError> {
        let (mut text, mut plain) = (String::new(), Vec::new());
        for message in messages {
            text += &format!("<|im_start|>{}\n", message.role);
            plain.push(text.len()..text.len() + message.content.len());
            text += message.content;
            text += "<|im_end|>\n";
        }
        if add_generation_prompt {
            text += "<|im_start|>assistant\n";
        }
        Ok(Rendered { text, plain })
    }

    pub fn tokenize(&self, rendered: &Rendered, from_byte: usize) -> Vec<(TokenId, u16)> {
        let (mut at, mut tokens) = (from_byte, Vec::new());
        while let Some(rest) = rendered.text.as_bytes().get(at..).filter(|rest| !rest.is_empty()) {
            let control = [256, 257].into_iter().find(|&id| rest.starts_with(&self.bytes[id]));
            let control = control.filter(|_| !rendered.plain.iter().any(|plain| plain.contains(&at)));
            let id = control.unwrap_or(usize::from(rest[0]));
            let length = self.bytes[id].len();
            tokens.push((TokenId(u32::try_from(id).unwrap_or(0)), u16::try_from(length).unwrap_or(0)));
            at += length;
        }
        tokens
    }

    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.bytes.get(id.0 as usize).map_or(&[], Vec::as_slice)
    }

    pub fn is_control(&self, id: TokenId) -> bool {
        id.0 >= 256
    }

    pub fn stop_tokens(&self) -> &Arc<[TokenId]> {
        &self.stop
    }
}

#[derive(Default)]
pub struct TextDecoder {
    rest: Vec<u8>,
}

impl TextDecoder {
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.rest) {
                Ok(whole) => {
                    text += whole;
                    self.rest.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text += &String::from_utf8_lossy(&self.rest[..valid]);
                    match error.error_len() {
                        Some(bad) => {
                            text.push('\u{FFFD}');
                            self.rest.drain(..valid + bad);
                        }
                        None => {
                            self.rest.drain(..valid);
                            return text;
                        }
                    }
                }
            }
        }
    }

    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.rest).into_owned();
        self.rest.clear();
        text
    }
}
