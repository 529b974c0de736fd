//! How is a turn's account told to the client?
//!
//! OpenAI's fields, and ours beside them: where the prompt's tokens came from and what that took. Units: tokens, ms.

use serde_json::{Value, json};

use crate::sessions::messages::TurnDone;

/// The `usage` of a chat completion, of its first choice and the tokens that all of them generated.
pub fn of_chat(done: &TurnDone, generated: u32) -> Value {
    let prompt = done.prompt_tokens.0;
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {
            "cached_tokens": done.usage.prompt.cached().0, "cache_write_tokens": done.usage.prompt.encoded.0
        },
        "completion_tokens_details": {"reasoning_tokens": 0},
        "rekindle": ours(done),
    })
}

/// The `usage` of a response.
pub fn of_response(done: &TurnDone) -> Value {
    let (prompt, generated) = (done.prompt_tokens.0, done.usage.generated.0);
    json!({
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": done.usage.prompt.cached().0, "cache_write_tokens": done.usage.prompt.encoded.0
        },
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + generated,
        "rekindle": ours(done),
    })
}

fn ours(done: &TurnDone) -> Value {
    let (usage, prompt) = (&done.usage, &done.usage.prompt);
    json!({
        "resident_tokens": prompt.resident.0,
        "shared_tokens": prompt.shared.0,
        "reloaded_tokens": prompt.reloaded().0,
        "encoded_tokens": prompt.encoded.0,
        "reencoded_tokens": prompt.reencoded.0,
        "reloaded": {"host": prompt.reloaded_host.0, "disk": prompt.reloaded_disk.0},
        "decision": prompt.decision().name(),
        "queue_ms": prompt.queue_ms,
        "reload_ms": prompt.reload_ms,
        "prefill_ms": prompt.prefill_ms,
        "ttft_ms": usage.ttft_ms,
        "decode_ms": usage.decode_ms,
        "dropped_items": done.dropped_items,
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::sessions::messages::{FinishReason, Goal, TurnUsage};
    use crate::types::TokenCount;

    /// A turn of 40 prompt tokens, 3 of them new, that said "Hello!".
    pub fn done() -> TurnDone {
        let mut usage = TurnUsage { generated: TokenCount(3), ttft_ms: 31, decode_ms: 9, ..TurnUsage::default() };
        usage.prompt.resident = TokenCount(32);
        usage.prompt.reloaded_host = TokenCount(5);
        usage.prompt.encoded = TokenCount(3);
        TurnDone {
            text: "Hello!".into(),
            finish: FinishReason::Stop,
            prompt_tokens: TokenCount(40),
            usage,
            item_id: "msg_1".into(),
            logprobs: Vec::new(),
            goal: Goal::Answer,
            dropped_items: 0,
            ended_at: 1_790_000_000,
        }
    }

    #[test]
    fn the_parts_add_up_to_the_prompt() {
        let usage = of_response(&done());
        let ours = &usage["rekindle"];
        let parts = ["resident_tokens", "shared_tokens", "reloaded_tokens", "encoded_tokens"];
        let sum: u64 = parts.iter().map(|part| ours[part].as_u64().unwrap()).sum();
        assert_eq!(usage["input_tokens"].as_u64().unwrap(), sum);
        assert_eq!(usage["total_tokens"], 43);
        assert_eq!(usage["input_tokens_details"]["cached_tokens"], 37);
        assert_eq!(of_chat(&done(), 3)["total_tokens"], 43);
    }

    #[test]
    fn the_decision_follows_from_the_counts() {
        let with = |resident, reloaded, reencoded| {
            let mut usage = TurnUsage::default();
            usage.prompt.resident = TokenCount(resident);
            usage.prompt.reloaded_host = TokenCount(reloaded);
            usage.prompt.reencoded = TokenCount(reencoded);
            usage.prompt.decision().name()
        };
        assert_eq!(with(0, 0, 0), "fresh");
        assert_eq!(with(16, 0, 0), "resident");
        assert_eq!(with(16, 16, 0), "reload");
        assert_eq!(with(16, 0, 16), "reencode");
        assert_eq!(with(0, 16, 16), "split");
    }
}
