//! What do the tests of sessions stand on?

use super::messages::{Message, Part, Role};
use crate::engine::{ChatMessage, Language, Token};
use crate::types::TokenId;

/// A small language: ChatML over bytes.
pub fn language() -> Language {
    Language::chatml_over_bytes()
}

/// The tokens of a text as an answer might have them.
pub fn tokens_of(language: &Language, text: &str) -> Vec<TokenId> {
    let message = ChatMessage { role: "user", name: None, content: text.into(), calls: &[], call_id: None };
    let rendered = language.render(&[message], false, &[]).unwrap();
    let start = rendered.text.find('\n').unwrap() + 1;
    let mut left = text.len();
    let tokens = language.tokenize(&rendered, start).into_iter();
    let own = tokens.take_while(|(_, bytes)| {
        let fits = left >= usize::from(*bytes) && left > 0;
        left = left.saturating_sub(usize::from(*bytes));
        fits
    });
    own.map(|(id, _)| id).collect()
}

pub fn token(id: TokenId) -> Token {
    Token { id, logprob: None }
}

pub fn message(role: Role, text: &str) -> Message {
    Message::new(role, vec![Part::Text(text.into())])
}
