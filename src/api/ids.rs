//! How are ids written and read?
//!
//! A prefix and 32 lower-case hex digits, 128 random bits. An id that isn't written so names nothing: it is not found,
//! like any other that never was.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use crate::sessions::messages::{ConversationId, ResponseId};

const CONVERSATION: &str = "conv_";
const RESPONSE: &str = "resp_";
const CLIENT_ID_MAX: usize = 128;

/// A new id with this prefix, such as `req_`.
pub fn new(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}

pub fn conversation(id: ConversationId) -> String {
    format!("{CONVERSATION}{:032x}", id.0)
}

pub fn response(id: ResponseId) -> String {
    format!("{RESPONSE}{:032x}", id.0)
}

/// Reads a conversation's id, exactly as it is written.
pub fn parse_conversation(text: &str) -> Option<ConversationId> {
    number(text, CONVERSATION).map(ConversationId)
}

/// Reads a response's id, exactly as it is written.
pub fn parse_response(text: &str) -> Option<ResponseId> {
    number(text, RESPONSE).map(ResponseId)
}

fn number(text: &str, prefix: &str) -> Option<u128> {
    let digits = text.strip_prefix(prefix)?;
    let exact = digits.len() == 32 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    exact.then(|| u128::from_str_radix(digits, 16).ok())?
}

/// Whether an id that a client gave for an item is kept.
pub fn is_usable_item_id(text: &str) -> bool {
    (1..=CLIENT_ID_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_id_reads_back_and_nothing_else_does() {
        let id = ConversationId(0xab);
        let text = conversation(id);
        assert_eq!(text, "conv_000000000000000000000000000000ab");
        assert_eq!(parse_conversation(&text), Some(id));
        assert_eq!(parse_response(&text), None);
        for wrong in
            ["", "conv_", "conv_ab", "000000000000000000000000000000ab", "conv_+00000000000000000000000000000ab"]
        {
            assert_eq!(parse_conversation(wrong), None, "{wrong}");
        }
        assert_eq!(parse_conversation(&text.to_uppercase()), None);
        assert_eq!(parse_conversation(&format!("{text}0")), None);
        assert_eq!(parse_conversation(&text.replace("ab", "AB")), None);
    }

    #[test]
    fn new_ids_have_their_prefix_and_128_bits() {
        let (a, b) = (new("req_"), new("req_"));
        assert_eq!(a.len(), 36);
        assert!(a.starts_with("req_"));
        assert_ne!(a, b);
    }

    #[test]
    fn item_ids_of_clients_are_kept_if_they_are_plain() {
        assert!(is_usable_item_id("msg_1-A"));
        for odd in ["", "a b", "ü", "a/b", &"x".repeat(129)] {
            assert!(!is_usable_item_id(odd), "{odd}");
        }
    }
}
