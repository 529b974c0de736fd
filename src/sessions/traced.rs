//! What do log and trace say of a turn?
//!
//! One span a turn, within that of the request that asked for it: whatever is logged while it is worked on is logged there.
//! The engine knows nothing of spans; where a turn's time went there is told from its own account, once that is known.
//! Invariant: ids, counts, times and words of ours; never what somebody said.

use std::time::{Duration, SystemTime};

use tracing::Span;
use tracing::field::{Empty, display};

use super::messages::{ConversationId, FinishReason, ResponseId, TurnError};
use super::turn::Answered;
use crate::engine::{Path, TurnUsage};
use crate::telemetry::trace::{self, Value};
use crate::types::TurnId;

/// The span of a turn that is asked for here and now. Which conversation it is of may be known later only.
pub(super) fn turn_span(response: Option<ResponseId>) -> Span {
    let span = tracing::info_span!("turn", session = Empty, response = Empty, turn = Empty);
    if let Some(id) = response {
        span.record("response", display(id));
    }
    span
}

/// Says which conversation a turn is of.
pub(super) fn belongs_to(span: &Span, id: ConversationId) {
    span.record("session", display(id));
    trace::annotate(span, vec![("gen_ai.conversation.id", Value::Text(id.to_string()))]);
}

/// Says that the engine has the turn of this span.
pub(super) fn given(turn: TurnId, prompt_tokens: u32) {
    Span::current().record("turn", display(turn));
    tracing::debug!(prompt_tokens, "the engine has the turn");
}

/// What is known of a turn that the engine has, beside its usage.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    pub at: SystemTime,
    /// The conversation's which turn it is.
    pub number: u32,
}

/// Tells of a turn that the engine has answered.
pub(super) fn answered(begun: Begun, answered: &Answered, model: &str) {
    let Answered { finish, usage, prompt_tokens, encoded, .. } = answered;
    let (prompt, span) = (&usage.prompt, Span::current());
    let (decision, path) = (prompt.decision().name(), Path::of(prompt.decision(), begun.number).name());
    let TurnUsage { generated, ttft_ms, decode_ms, .. } = *usage;
    tracing::debug!(
        finish = word(*finish),
        path,
        decision,
        prompt_tokens = prompt_tokens.0,
        encoded_tokens = prompt.encoded.0,
        generated_tokens = generated.0,
        queue_ms = prompt.queue_ms,
        reload_ms = prompt.reload_ms,
        ttft_ms,
        decode_ms,
        "the turn is answered"
    );
    let count = |tokens: u32| Value::Count(tokens.into());
    trace::annotate(
        &span,
        vec![
            ("gen_ai.operation.name", Value::Text("chat".to_owned())),
            ("gen_ai.provider.name", Value::Text("rekindle".to_owned())),
            ("gen_ai.response.model", Value::Text(model.to_owned())),
            ("gen_ai.response.finish_reasons", Value::Only(word(*finish))),
            ("gen_ai.usage.input_tokens", count(prompt_tokens.0)),
            ("gen_ai.usage.cache_read.input_tokens", count(prompt.cached().0)),
            ("gen_ai.usage.output_tokens", count(generated.0)),
            ("rekindle.path", Value::Text(path.to_owned())),
            ("rekindle.decision", Value::Text(decision.to_owned())),
            ("rekindle.tokens.resident", count(prompt.resident.0)),
            ("rekindle.tokens.shared", count(prompt.shared.0)),
            ("rekindle.tokens.reloaded_host", count(prompt.reloaded_host.0)),
            ("rekindle.tokens.reloaded_disk", count(prompt.reloaded_disk.0)),
            ("rekindle.tokens.encoded", count(prompt.encoded.0)),
            ("rekindle.tokens.reencoded", count(prompt.reencoded.0)),
        ],
    );
    if *encoded {
        phases(&span, begun.at, usage);
    }
}

/// Where the time went, as the engine counts it. While blocks come from a slow tier the front may be encoded: the two
/// overlap then.
fn phases(span: &Span, at: SystemTime, usage: &TurnUsage) {
    let prompt = &usage.prompt;
    let after = |ms: u64| at + Duration::from_millis(ms);
    let count = |tokens: u32| Value::Count(tokens.into());
    trace::child(span, "queue", (at, after(prompt.queue_ms)), Vec::new());
    if prompt.reload_ms > 0 || prompt.reloaded().0 > 0 {
        // Transfers beside each other are counted one by one: no reload outlasts the wait for its token.
        let until = (prompt.queue_ms + prompt.reload_ms).min(usage.ttft_ms);
        let came = [
            ("rekindle.tokens.reloaded_host", count(prompt.reloaded_host.0)),
            ("rekindle.tokens.reloaded_disk", count(prompt.reloaded_disk.0)),
        ];
        trace::child(span, "reload", (after(prompt.queue_ms), after(until)), came.into());
    }
    let encodes = after(usage.ttft_ms.saturating_sub(prompt.prefill_ms));
    let encoded = [
        ("rekindle.tokens.encoded", count(prompt.encoded.0)),
        ("rekindle.tokens.reencoded", count(prompt.reencoded.0)),
    ];
    trace::child(span, "prefill", (encodes, after(usage.ttft_ms)), encoded.into());
    let generated = vec![("gen_ai.usage.output_tokens", count(usage.generated.0))];
    trace::child(span, "decode", (after(usage.ttft_ms), after(usage.ttft_ms + usage.decode_ms)), generated);
}

/// Tells of a turn that came to nothing.
pub(super) fn failed(span: &Span, error: &TurnError) {
    let kind = kind(error);
    span.in_scope(|| tracing::debug!(kind, "the turn failed"));
    trace::fail(span, kind);
}

fn word(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
    }
}

/// A word for what went wrong: the sentence may quote what somebody said.
fn kind(error: &TurnError) -> &'static str {
    match error {
        TurnError::NoConversation => "conversation_not_found",
        TurnError::NoPrevious => "previous_response_not_found",
        TurnError::TooManyItems { .. } => "too_many_items",
        TurnError::Locked { .. } => "conversation_locked",
        TurnError::DuplicateItem(_) => "duplicate_item",
        TurnError::NothingToAnswer => "nothing_to_answer",
        TurnError::ContextLength { .. } => "context_length_exceeded",
        TurnError::Template(_) => "template",
        TurnError::Overloaded(_) => "engine_overloaded",
        TurnError::QueueTimeout(_) => "queue_timeout",
        TurnError::TooManyTurns(_) => "concurrency_limit_exceeded",
        TurnError::Store(_) => "store_unavailable",
        TurnError::Draining => "draining",
        TurnError::Lost(_) => "lost",
        TurnError::Internal(_) => "internal_error",
    }
}
