//! What can be asked of a conversation's KV?
//!
//! Where it is and what its next turn would cost; to bring it up, take it down, or share it with a branch. `{id}` is a
//! conversation, or the newest response of a chain.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use actix_web::{HttpRequest, HttpResponse, rt, web};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::auth::Caller;
use super::error::ApiError;
use super::fields::Fields;
use super::warming::{self, Wanted};
use super::{ApiSettings, ApiState, body, conversations, ids, input, unix_now};
use crate::engine::status::{ResidencyState, TierShare};
use crate::sessions::messages::{
    ConversationId, ConversationResidency, OffloadTo, Predicted, Residency, ReturnPath, SessionError,
};
use crate::tenants::Tenant;
use crate::types::{TenantId, Tick, TokenCount};

/// POST `/v1/conversations/{id}/offload`.
pub async fn offload(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let parsed = body::object(&request, payload, &state.settings.limits).await?;
    let id = id_or_tip(&state, &caller, &path).await?;
    let mut fields = Fields::of(&parsed);
    let (to, word) = match fields.string("to")? {
        None | Some("host") => (OffloadTo::Host, "host"),
        Some("none") => (OffloadTo::None, "none"),
        Some("disk") if (state.status)().disk.total.0 > 0 => (OffloadTo::Disk, "disk"),
        Some("disk") => {
            return Err(ApiError::unsupported_value("to", "this server has no disk tier; offload to host or none"));
        }
        Some(_) => return Err(ApiError::invalid_value("to", "`to` must be host, disk or none")),
    };
    let ignored = body::unknown(&fields, &state.settings)?;
    let moved = state.sessions.offload(&caller, id, to).await?;
    let response = json!({
        "object": "conversation.offload",
        "conversation": ids::conversation(id),
        "to": word,
        "bytes": moved.bytes,
        "ms": moved.ms,
    });
    Ok(body::answer_naming(HttpResponse::Ok().json(response), ignored))
}

/// GET `/v1/conversations/{id}/residency`: where its KV is now. Never waits for the engine.
pub async fn residency(
    path: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let id = id_or_tip(&state, &caller, &path).await?;
    let residency = state.sessions.residency(&caller, id).await?;
    Ok(HttpResponse::Ok().json(residency_object(id, &residency, caller.id, &state.settings)))
}

/// POST `/v1/conversations/{id}/warm`: brings the KV to the device. Without `wait` it answers as soon as that is under way.
pub async fn warm(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let parsed = body::object(&request, payload, &state.settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let waits = fields.boolean("wait")?.unwrap_or(false);
    warming::check_tier(&mut fields)?;
    let instructions = input::instructions(&mut fields, &state.settings.limits)?;
    let ignored = body::unknown(&fields, &state.settings)?;
    let id = id_or_tip(&state, &caller, &path).await?;
    let (tell, mut told) = mpsc::channel(warming::STATES);
    let (warmed, tenant) = (state.clone(), caller.into_inner());
    let warming = rt::spawn(async move {
        warming::warm(&warmed, &tenant, Wanted::Conversation(id), instructions, |step| {
            // There is room for all that can be told; nobody may be left to hear it.
            drop(tell.try_send(step));
        })
        .await
    });
    let mut last = told.recv().await;
    while waits && let Some(step) = told.recv().await {
        last = Some(step);
    }
    let Some(step) = last else {
        warming.await.map_err(|_| ApiError::internal())??;
        return Err(ApiError::internal());
    };
    if waits {
        warming.await.map_err(|_| ApiError::internal())??;
    }
    let mut response = if step.state == "warming" { HttpResponse::Accepted() } else { HttpResponse::Ok() };
    let mut object = step.object();
    if let Value::Object(object) = &mut object {
        object.insert("object".into(), json!("conversation.warm"));
    }
    Ok(body::answer_naming(response.json(object), ignored))
}

/// POST `/v1/conversations/{id}/done`: nobody will go on with it, so its KV is the first to go. Nothing is dropped.
pub async fn done(
    path: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let id = id_or_tip(&state, &caller, &path).await?;
    state.sessions.end(&caller, id).await?;
    Ok(HttpResponse::Ok().json(json!({"object": "conversation.done", "conversation": ids::conversation(id)})))
}

/// POST `/v1/conversations/{id}/fork`: a branch, with the history up to an item or all of it.
pub async fn fork(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let parsed = body::object(&request, payload, &state.settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let after_item = fields.string("after_item_id")?.map(str::to_owned);
    let metadata = fields.metadata()?.unwrap_or_default();
    let ignored = body::unknown(&fields, &state.settings)?;
    let id = id_or_tip(&state, &caller, &path).await?;
    let forked = state.sessions.fork(&caller, id, after_item, metadata).await;
    let forked = forked.map_err(|error| ApiError::from(error).of_param("item_id", "after_item_id"))?;
    let mut object = conversations::object(&forked.conversation);
    if let Value::Object(object) = &mut object {
        let about = json!({
            "forked_from": ids::conversation(id), "shared_tokens": forked.shared.0, "items": forked.items,
        });
        object.insert("rekindle".into(), about);
    }
    Ok(body::answer_naming(HttpResponse::Created().json(object), ignored))
}

/// A conversation's id, or that of the chain whose newest response has this one.
pub async fn id_or_tip(state: &ApiState, tenant: &Tenant, path: &str) -> Result<ConversationId, ApiError> {
    if let Some(response) = ids::parse_response(path) {
        let chain = state.sessions.chain_of(tenant, response, false).await;
        return chain.map_err(|error| match error {
            SessionError::NoResponse => ApiError::conversation_not_found(),
            other => other.into(),
        });
    }
    ids::parse_conversation(path).ok_or_else(ApiError::conversation_not_found)
}

fn residency_object(id: ConversationId, of: &ConversationResidency, tenant: TenantId, settings: &ApiSettings) -> Value {
    let now = of.residency.as_ref();
    let state = state_word(now, of.tokens);
    // The engine takes note of an end with its next step, which may be long in coming.
    let pin_expires_at = pin_expiry(now.and_then(|now| now.pinned_until), settings).filter(|end| *end > unix_now());
    let last_eviction = now.and_then(|now| now.last_eviction.as_ref()).map(|eviction| {
        json!({
            "id": format!("jrn_{:032x}", eviction.journal),
            "at": unix_seconds(eviction.at, settings),
            "rule": eviction.rule,
            "why": eviction.why.to_string(),
            "for_tenant": if eviction.for_tenant == tenant { "self" } else { "other" },
            "freed_bytes": eviction.freed_bytes,
        })
    });
    json!({
        "object": "conversation.residency",
        "conversation": ids::conversation(id),
        "state": state,
        "tokens": of.tokens.0,
        "turns": of.turns,
        "last_used": of.last_used_at,
        "pinned": pin_expires_at.is_some(),
        "pin_expires_at": pin_expires_at,
        "tiers": {
            "device": tier(now.map(|now| now.device).unwrap_or_default()),
            "host": tier(now.map(|now| now.host).unwrap_or_default()),
            "disk": tier(now.map(|now| now.disk).unwrap_or_default()),
        },
        "predicted": predicted(of.predicted),
        "last_eviction": last_eviction,
    })
}

/// In one word, where a conversation's KV is.
pub fn state_word(now: Option<&Residency>, tokens: TokenCount) -> &'static str {
    match now.map(|now| now.state) {
        None | Some(ResidencyState::Nowhere) if tokens.0 == 0 => "empty",
        None | Some(ResidencyState::Nowhere) => "none",
        Some(ResidencyState::Running) => "running",
        Some(ResidencyState::Reloading) => "reloading",
        Some(ResidencyState::Resident) => "resident",
        Some(ResidencyState::Partial) => "partial",
        Some(ResidencyState::Offloaded) => "offloaded",
    }
}

fn tier(share: TierShare) -> Value {
    json!({"tokens": share.tokens.0, "bytes_private": share.bytes_private, "bytes_shared": share.bytes_shared})
}

fn predicted(forecast: Option<Predicted>) -> Value {
    let choice = forecast.map(|forecast| match forecast.choice {
        ReturnPath::Resident => "resident",
        ReturnPath::Reload => "reload",
        ReturnPath::Reencode => "reencode",
    });
    json!({
        "reload_ms": forecast.and_then(|forecast| forecast.reload_ms),
        "reencode_ms": forecast.map(|forecast| forecast.reencode_ms),
        "choice": choice,
    })
}

/// The second in which a pin ends, rounded up: it holds at least as long as it says.
pub fn pin_expiry(until: Option<Tick>, settings: &ApiSettings) -> Option<i64> {
    until.map(|until| unix_seconds(Tick(until.0.saturating_add(999_999)), settings))
}

fn unix_seconds(tick: Tick, settings: &ApiSettings) -> i64 {
    settings.tick_zero_us.saturating_add_unsigned(tick.0) / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::super::tests::settings;
    use super::*;
    use crate::engine::status::{LastEviction, Runs, Why};
    use crate::kv::evictor::Reason;
    use crate::kv::journal::{Entry, Rule};
    use crate::types::{BlockCount, BlockSize, KvKey, Tier};

    #[test]
    fn residency_has_every_key_of_the_contract_and_no_tenants_name() {
        let entry = Entry {
            id: 7,
            at: Tick(3_000_000),
            victim: KvKey(1),
            tenant: TenantId(0),
            for_tenant: TenantId(1),
            rule: Rule::Lru,
            reason: Reason { silent_ms: 90_000, ..Reason::default() },
            from: Tier::Device,
            freed: BlockCount(2),
            lost: BlockCount(0),
        };
        let eviction = LastEviction {
            journal: entry.id,
            at: entry.at,
            rule: entry.rule.name(),
            for_tenant: entry.for_tenant,
            from: entry.from,
            freed_bytes: 4096,
            why: Why { entry, block_size: BlockSize(16) },
        };
        let host = TierShare { tokens: TokenCount(32), bytes_private: 1, bytes_shared: 2 };
        let of = ConversationResidency {
            tokens: TokenCount(33),
            turns: 2,
            last_used_at: 1_790_000_001,
            residency: Some(Residency {
                tenant: TenantId(0),
                state: ResidencyState::Offloaded,
                device: TierShare::default(),
                host,
                disk: TierShare::default(),
                below: (TokenCount(32), TokenCount(0)),
                runs: Runs::default(),
                last_used: Tick(1),
                last_eviction: Some(eviction),
                pinned_until: Some(Tick(u64::MAX / 4)),
            }),
            predicted: Some(Predicted { reload_ms: Some(9), reencode_ms: 410, choice: ReturnPath::Reload }),
        };
        let shown = residency_object(ConversationId(1), &of, TenantId(0), &settings());
        let keys: Vec<_> = shown.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "object",
                "conversation",
                "state",
                "tokens",
                "turns",
                "last_used",
                "pinned",
                "pin_expires_at",
                "tiers",
                "predicted",
                "last_eviction"
            ]
        );
        assert_eq!((&shown["state"], &shown["tiers"]["host"]["tokens"]), (&json!("offloaded"), &json!(32)));
        assert_eq!(shown["predicted"], json!({"reload_ms": 9, "reencode_ms": 410, "choice": "reload"}));
        assert_eq!(shown["pinned"], true);
        assert_eq!(shown["last_eviction"]["at"], 1_790_000_003);
        assert_eq!(shown["last_eviction"]["for_tenant"], "other");
        assert_eq!(shown["last_eviction"]["id"], format!("jrn_{:032x}", 7));
        let why = shown["last_eviction"]["why"].as_str().unwrap();
        assert!(why.contains("another tenant") && why.contains("silent the longest, for 90 s"), "{why}");
    }

    #[test]
    fn a_conversation_without_kv_is_empty_or_only_its_transcript() {
        let of = |tokens| ConversationResidency {
            tokens: TokenCount(tokens),
            turns: 0,
            last_used_at: 0,
            residency: None,
            predicted: None,
        };
        let state =
            |tokens| residency_object(ConversationId(1), &of(tokens), TenantId(0), &settings())["state"].clone();
        assert_eq!((state(0), state(9)), (json!("empty"), json!("none")));
    }
}
