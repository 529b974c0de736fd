//! How does a response look in JSON?
//!
//! Every field is always there, since SDKs read them blindly. What repeats the request is kept with the response, as
//! `Echo`; the rest is how the turn stands.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::{ApiSettings, ids, items, unix_now, usage};
use crate::sessions::Turn;
use crate::sessions::messages::{FinishReason, Goal, Place, ResponseId, TurnDone, TurnError, TurnUpdate};

/// How far a response is.
pub enum Outcome<'a> {
    Running,
    Ended(&'a TurnDone),
    Failed(&'a ApiError),
}

/// What a response repeats of its request: the same in all its events, and when it is retrieved.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Echo {
    created_at: i64,
    model: String,
    conversation: Option<String>,
    previous_response_id: Option<String>,
    background: bool,
    store: bool,
    request: Map<String, Value>,
}

impl Echo {
    /// Of a request that goes to `place`.
    pub fn of(request: &Map<String, Value>, place: Place, settings: &ApiSettings) -> Self {
        const REPEATED: [&str; 16] = [
            "instructions",
            "metadata",
            "max_output_tokens",
            "max_tool_calls",
            "parallel_tool_calls",
            "tool_choice",
            "temperature",
            "top_p",
            "top_logprobs",
            "truncation",
            "text",
            "reasoning",
            "prompt_cache_key",
            "safety_identifier",
            "user",
            "service_tier",
        ];
        let repeated = request.iter().filter(|(key, value)| REPEATED.contains(&key.as_str()) && !value.is_null());
        let is = |key: &str, default| request.get(key).and_then(Value::as_bool).unwrap_or(default);
        let (conversation, previous) = match place {
            Place::Alone | Place::NewChain => (None, None),
            Place::After(previous) => (None, Some(ids::response(previous))),
            Place::Conversation(id) => (Some(ids::conversation(id)), None),
        };
        Self {
            created_at: unix_now(),
            model: settings.model.clone(),
            conversation,
            previous_response_id: previous,
            background: is("background", false),
            store: is("store", true),
            request: repeated.map(|(key, value)| (key.clone(), value.clone())).collect(),
        }
    }

    /// As it is kept with the turn.
    pub fn to_about(&self) -> Result<String, ApiError> {
        serde_json::to_string(self).map_err(|error| TurnError::Internal(error.to_string()).into())
    }

    pub fn from_about(about: &str) -> Result<Self, ApiError> {
        serde_json::from_str(about)
            .map_err(|error| TurnError::Internal(format!("an echo can't be read: {error}")).into())
    }

    fn or(&self, key: &str, default: Value) -> Value {
        self.request.get(key).cloned().unwrap_or(default)
    }

    fn within(&self, object: &str, key: &str, default: Value) -> Value {
        let value = self.request.get(object).and_then(|object| object.get(key)).filter(|value| !value.is_null());
        value.cloned().unwrap_or(default)
    }

    /// The object.
    pub fn response(&self, id: ResponseId, outcome: &Outcome<'_>) -> Value {
        let (status, completed_at, error, incomplete_details, output, usage) = match outcome {
            Outcome::Running => ("in_progress", None, None, None, Vec::new(), Value::Null),
            Outcome::Failed(error) => ("failed", None, Some(error.as_response_error()), None, Vec::new(), Value::Null),
            Outcome::Ended(done) => {
                let (status, reason) = match done.finish {
                    FinishReason::Stop => ("completed", None),
                    FinishReason::Length => ("incomplete", Some(json!({"reason": "max_output_tokens"}))),
                    FinishReason::Cancelled => ("cancelled", None),
                };
                let completed_at = (done.finish == FinishReason::Stop).then_some(done.ended_at);
                (status, completed_at, None, reason, answer(done).into_iter().collect(), usage::of_response(done))
            }
        };
        json!({
            "id": ids::response(id),
            "object": "response",
            "created_at": self.created_at,
            "completed_at": completed_at,
            "status": status,
            "background": self.background,
            "error": error,
            "incomplete_details": incomplete_details,
            "conversation": self.conversation.as_ref().map(|id| json!({"id": id})),
            "previous_response_id": self.previous_response_id,
            "instructions": self.or("instructions", Value::Null),
            "model": self.model,
            "metadata": self.or("metadata", json!({})),
            "max_output_tokens": self.or("max_output_tokens", Value::Null),
            "max_tool_calls": self.or("max_tool_calls", Value::Null),
            "output": output,
            "parallel_tool_calls": self.or("parallel_tool_calls", json!(true)),
            "tool_choice": self.or("tool_choice", json!("auto")),
            "tools": [],
            "temperature": self.or("temperature", json!(1.0)),
            "top_p": self.or("top_p", json!(1.0)),
            "top_logprobs": self.or("top_logprobs", json!(0)),
            "truncation": self.or("truncation", json!("disabled")),
            "store": self.store,
            "text": {"format": {"type": "text"}, "verbosity": self.within("text", "verbosity", json!("medium"))},
            "reasoning": {
                "effort": self.within("reasoning", "effort", Value::Null),
                "summary": self.within("reasoning", "summary", Value::Null),
            },
            "service_tier": "default",
            "prompt_cache_key": self.or("prompt_cache_key", Value::Null),
            "safety_identifier": self.or("safety_identifier", Value::Null),
            "user": self.or("user", Value::Null),
            "usage": usage,
        })
    }

    /// The object of a turn as it stands now.
    pub fn as_it_stands(&self, turn: &Turn) -> Value {
        match turn.stream.end() {
            Some(TurnUpdate::Done(done)) => self.response(turn.id, &Outcome::Ended(&done)),
            Some(TurnUpdate::Failed(error)) => self.response(turn.id, &Outcome::Failed(&error.into())),
            Some(TurnUpdate::Started { .. } | TurnUpdate::Text { .. }) | None => {
                self.response(turn.id, &Outcome::Running)
            }
        }
    }
}

/// The answer as the one item of `output`; none if nothing was to be said, or the turn was cancelled before it said any.
pub fn answer(done: &TurnDone) -> Option<Value> {
    let status = match done.finish {
        FinishReason::Stop => "completed",
        FinishReason::Cancelled if done.text.is_empty() => return None,
        FinishReason::Length | FinishReason::Cancelled => "incomplete",
    };
    let content = [items::output_text(&done.text, &done.logprobs)];
    (done.goal == Goal::Answer).then(|| items::message(&done.item_id, "assistant", status, &content))
}

#[cfg(test)]
mod tests {
    use super::super::super::fields::parse_object;
    use super::super::super::tests::settings;
    use super::super::super::usage::tests::done;
    use super::*;
    use crate::sessions::messages::ConversationId;

    #[test]
    fn a_response_always_has_every_field_and_repeats_its_request() {
        let request =
            r#"{"temperature":0.7,"metadata":{"a":"b"},"text":{"verbosity":"low"},"top_p":null,"store":false}"#;
        let request = parse_object(request.as_bytes(), 64).unwrap();
        let echo = Echo::of(&request, Place::Conversation(ConversationId(1)), &settings());
        let running = echo.response(ResponseId(1), &Outcome::Running);
        let keys: Vec<_> = running.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "id",
                "object",
                "created_at",
                "completed_at",
                "status",
                "background",
                "error",
                "incomplete_details",
                "conversation",
                "previous_response_id",
                "instructions",
                "model",
                "metadata",
                "max_output_tokens",
                "max_tool_calls",
                "output",
                "parallel_tool_calls",
                "tool_choice",
                "tools",
                "temperature",
                "top_p",
                "top_logprobs",
                "truncation",
                "store",
                "text",
                "reasoning",
                "service_tier",
                "prompt_cache_key",
                "safety_identifier",
                "user",
                "usage"
            ]
        );
        assert_eq!((&running["temperature"], &running["top_p"]), (&json!(0.7), &json!(1.0)));
        assert_eq!(running["text"], json!({"format": {"type": "text"}, "verbosity": "low"}));
        assert_eq!((&running["output"], &running["store"]), (&json!([]), &json!(false)));
        assert_eq!(running["conversation"]["id"], ids::conversation(ConversationId(1)));
        let ended = echo.response(ResponseId(1), &Outcome::Ended(&done()));
        let same: Vec<_> = ended.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, same);
        assert!(ended["completed_at"].is_i64());
        let kept = Echo::from_about(&echo.to_about().unwrap()).unwrap();
        assert_eq!(kept.response(ResponseId(1), &Outcome::Running), running);
    }

    #[test]
    fn a_turn_that_was_to_say_nothing_has_no_output() {
        let echo = Echo::of(&Map::new(), Place::NewChain, &settings());
        let silent = TurnDone { goal: Goal::Encode, text: String::new(), ..done() };
        let response = echo.response(ResponseId(1), &Outcome::Ended(&silent));
        assert_eq!((&response["output"], &response["status"]), (&json!([]), &json!("completed")));
    }
}
