//! How does a client pin a conversation's KV, and unpin it?
//!
//! A pin keeps what the conversation has on the device, and in lower tiers, from the evictor for a while, within its
//! tenant's budget. `{id}` is a conversation, or the newest response of a chain.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::fields::Fields;
use super::residency::{id_or_tip, pin_expiry};
use super::{ApiSettings, ApiState, body, ids};
use crate::sessions::messages::{ConversationId, Pinned};

/// How long a pin lasts if nobody says.
const USUAL: Duration = Duration::from_secs(3600);

/// POST `/v1/conversations/{id}/pin`. One that is pinned already stays so until the new end.
pub async fn pin(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let parsed = body::object(&request, payload, &state.settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let most = state.settings.max_pin_ttl;
    let range = 1..=i64::try_from(most.as_secs()).unwrap_or(i64::MAX);
    let ttl = fields.integer_in("ttl_seconds", range)?.and_then(|seconds| u64::try_from(seconds).ok());
    let ttl = ttl.map_or(USUAL.min(most), Duration::from_secs);
    let ignored = body::unknown(&fields, &state.settings)?;
    let id = id_or_tip(&state, &caller, &path).await?;
    let pinned = state.sessions.pin(&caller, id, Some(ttl)).await?;
    Ok(body::answer_naming(HttpResponse::Ok().json(object(id, &pinned, &state.settings)), ignored))
}

/// DELETE `/v1/conversations/{id}/pin`. Does nothing to one that isn't pinned.
pub async fn unpin(
    path: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let id = id_or_tip(&state, &caller, &path).await?;
    let unpinned = state.sessions.pin(&caller, id, None).await?;
    Ok(HttpResponse::Ok().json(object(id, &unpinned, &state.settings)))
}

fn object(id: ConversationId, of: &Pinned, settings: &ApiSettings) -> Value {
    json!({
        "object": "conversation.pin",
        "conversation": ids::conversation(id),
        "pinned": of.until.is_some(),
        "expires_at": pin_expiry(of.until, settings),
        "budget": {"limit_bytes": of.limit_bytes, "used_bytes": of.used_bytes},
    })
}
