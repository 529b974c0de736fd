//! How are conversations made, read, changed, deleted, and where is their KV?
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::fields::{Fields, METADATA_PAIRS};
use super::items::{self, Page};
use super::{ApiSettings, ApiState, Limits, body, ids, input};
use crate::engine::status::{ResidencyState, TierShare};
use crate::sessions::messages::{
    Conversation, ConversationId, ConversationQuery, ConversationResidency, ListedConversation, NewItem, OffloadTo,
    Predicted, Residency, ReturnPath,
};
use crate::types::{TenantId, Tick, TokenCount};

fn id(path: &str) -> Result<ConversationId, ApiError> {
    ids::parse_conversation(path).ok_or_else(ApiError::conversation_not_found)
}

fn object(conversation: &Conversation) -> Value {
    json!({
        "id": ids::conversation(conversation.id),
        "object": "conversation",
        "created_at": conversation.created_at,
        "metadata": conversation.metadata,
    })
}

fn new_items(fields: &mut Fields<'_>, limits: &Limits) -> Result<Option<Vec<NewItem>>, ApiError> {
    fields.array("items")?.map(|list| input::items("items", list, limits.post_items, limits)).transpose()
}

/// POST `/v1/conversations`.
pub async fn create(
    request: HttpRequest,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let parsed = body::object(&request, payload, &state.settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let metadata = fields.metadata()?.unwrap_or_default();
    let items = new_items(&mut fields, &state.settings.limits)?.unwrap_or_default();
    let ignored = body::unknown(&fields, &state.settings)?;
    let conversation = state.sessions.create(&caller, metadata, items).await?;
    Ok(body::answer_naming(HttpResponse::Ok().json(object(&conversation)), ignored))
}

/// GET `/v1/conversations`: those whose metadata has all the asked-for pairs, and whose KV is in the asked-for state.
pub async fn list(request: HttpRequest, state: web::Data<ApiState>, caller: Caller) -> Result<HttpResponse, ApiError> {
    let page = Page::parse(request.query_string())?;
    let Filters { metadata, state: wanted } = filters(request.query_string())?;
    let after = page.after.as_deref();
    let mut after = after.map(|text| ids::parse_conversation(text).ok_or_else(unknown_after)).transpose()?;
    let mut found: Vec<Value> = Vec::new();
    // What state a conversation is in, the store doesn't know: pages are read until one is full, and one more is seen.
    loop {
        let limit = LIST_STEP.max(page.limit + 1);
        let query = ConversationQuery { newest_first: page.newest_first, after, limit, metadata: metadata.clone() };
        let read = state.sessions.list(&caller, query).await?.ok_or_else(unknown_after)?;
        let is_last = read.len() < limit;
        after = read.last().map(|last| last.conversation.id);
        let matches = |found: &&ListedConversation| {
            wanted.as_deref().is_none_or(|wanted| wanted == state_word(found.residency.as_ref(), found.tokens))
        };
        found.extend(read.iter().filter(matches).map(|found| object(&found.conversation)));
        if is_last || found.len() > page.limit {
            break;
        }
    }
    let has_more = found.len() > page.limit;
    found.truncate(page.limit);
    Ok(HttpResponse::Ok().json(items::list(found, has_more)))
}

/// Conversations that a list reads at a time.
const LIST_STEP: usize = 256;
const STATES: [&str; 7] = ["empty", "running", "resident", "partial", "reloading", "offloaded", "none"];

fn unknown_after() -> ApiError {
    ApiError::conversation_not_found().about("after")
}

/// What the conversations of a list must have.
#[derive(Debug, Default)]
struct Filters {
    metadata: Vec<(String, String)>,
    state: Option<String>,
}

/// `metadata[k]=v`, any number of them, and `state=`.
fn filters(query: &str) -> Result<Filters, ApiError> {
    let Filters { mut metadata, mut state } = Filters::default();
    for (key, value) in items::pairs(query)? {
        if let Some(name) = key.strip_prefix("metadata[").and_then(|name| name.strip_suffix(']')) {
            metadata.push((name.to_owned(), value));
        } else if key == "state" {
            if !STATES.contains(&value.as_str()) {
                let message = format!("`state` must be one of {}", STATES.join(", "));
                return Err(ApiError::invalid_value("state", message));
            }
            state = Some(value);
        }
    }
    if metadata.len() > METADATA_PAIRS {
        return Err(ApiError::array_too_long("metadata", metadata.len(), METADATA_PAIRS));
    }
    Ok(Filters { metadata, state })
}

/// GET `/v1/conversations/{id}`.
pub async fn get(
    path: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let conversation = state.sessions.get(&caller, id(&path)?).await?;
    Ok(HttpResponse::Ok().json(object(&conversation)))
}

/// POST `/v1/conversations/{id}`: replaces `metadata`.
pub async fn set_metadata(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let parsed = body::object(&request, payload, &state.settings.limits).await?;
    let id = id(&path)?;
    let mut fields = Fields::of(&parsed);
    let metadata = match fields.metadata()? {
        Some(metadata) => metadata,
        None if fields.has("metadata") => Default::default(),
        None => return Err(ApiError::missing("metadata")),
    };
    let ignored = body::unknown(&fields, &state.settings)?;
    let conversation = state.sessions.set_metadata(&caller, id, metadata).await?;
    Ok(body::answer_naming(HttpResponse::Ok().json(object(&conversation)), ignored))
}

/// DELETE `/v1/conversations/{id}`: answers after every tier and the store have let go, with the proof.
pub async fn delete(
    path: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let id = id(&path)?;
    let deleted = state.sessions.delete(&caller, id).await?;
    Ok(HttpResponse::Ok().json(json!({
        "id": ids::conversation(id),
        "object": "conversation.deleted",
        "deleted": true,
        "rekindle": {
            "freed": {"device_bytes": deleted.device_bytes, "host_bytes": deleted.host_bytes, "disk_bytes": 0},
            "kept_shared_bytes": deleted.kept_shared_bytes,
            "remaining_bytes": 0,
            "nodes": 1,
        },
    })))
}

/// GET `/v1/conversations/{id}/items`.
pub async fn list_items(
    request: HttpRequest,
    path: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let id = id(&path)?;
    let page = Page::parse(request.query_string())?;
    let items = state.sessions.items(&caller, id).await?;
    Ok(HttpResponse::Ok().json(page.cut(&items)?))
}

/// POST `/v1/conversations/{id}/items`: answers the list of what it made.
pub async fn add_items(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let parsed = body::object(&request, payload, &state.settings.limits).await?;
    let id = id(&path)?;
    let mut fields = Fields::of(&parsed);
    let items = new_items(&mut fields, &state.settings.limits)?.ok_or_else(|| ApiError::missing("items"))?;
    if fields.array("items")?.is_none_or(<[Value]>::is_empty) {
        return Err(ApiError::invalid_value("items", "`items` is empty; give at least one"));
    }
    let ignored = body::unknown(&fields, &state.settings)?;
    let added = state.sessions.append_items(&caller, id, items).await?;
    let list = items::whole_list(added.iter().map(|item| items::item(item)).collect());
    Ok(body::answer_naming(HttpResponse::Ok().json(list), ignored))
}

/// GET `/v1/conversations/{id}/items/{item_id}`.
pub async fn get_item(
    path: web::Path<(String, String)>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let (conversation, item) = path.into_inner();
    let items = state.sessions.items(&caller, id(&conversation)?).await?;
    let found = items.iter().find(|found| found.id == item).ok_or_else(|| ApiError::item_not_found(None))?;
    Ok(HttpResponse::Ok().json(items::item(found)))
}

/// DELETE `/v1/conversations/{id}/items/{item_id}`: answers the conversation.
pub async fn delete_item(
    path: web::Path<(String, String)>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let (conversation, item) = path.into_inner();
    let conversation = state.sessions.delete_item(&caller, id(&conversation)?, &item).await?;
    Ok(HttpResponse::Ok().json(object(&conversation)))
}

/// POST `/v1/conversations/{id}/offload`.
pub async fn offload(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let parsed = body::object(&request, payload, &state.settings.limits).await?;
    let id = id(&path)?;
    let mut fields = Fields::of(&parsed);
    let (to, word) = match fields.string("to")? {
        None | Some("host") => (OffloadTo::Host, "host"),
        Some("none") => (OffloadTo::None, "none"),
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
    let id = id(&path)?;
    let residency = state.sessions.residency(&caller, id).await?;
    Ok(HttpResponse::Ok().json(residency_object(id, &residency, caller.id, &state.settings)))
}

fn residency_object(id: ConversationId, of: &ConversationResidency, tenant: TenantId, settings: &ApiSettings) -> Value {
    let now = of.residency.as_ref();
    let state = state_word(now, of.tokens);
    let last_eviction = now.and_then(|now| now.last_eviction.as_ref()).map(|eviction| {
        json!({
            "id": format!("jrn_{:032x}", eviction.journal),
            "at": unix_seconds(eviction.at, settings),
            "rule": eviction.rule,
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
        "pinned": false,
        "pin_expires_at": null,
        "tiers": {
            "device": tier(now.map(|now| now.device).unwrap_or_default()),
            "host": tier(now.map(|now| now.host).unwrap_or_default()),
            "disk": tier(TierShare::default()),
        },
        "predicted": predicted(of.predicted),
        "last_eviction": last_eviction,
    })
}

/// In one word, where a conversation's KV is.
fn state_word(now: Option<&Residency>, tokens: TokenCount) -> &'static str {
    match now.map(|now| now.state) {
        None if tokens.0 == 0 => "empty",
        None => "none",
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

fn unix_seconds(tick: Tick, settings: &ApiSettings) -> i64 {
    settings.tick_zero_us.saturating_add_unsigned(tick.0) / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::super::tests::settings;
    use super::*;
    use crate::engine::status::LastEviction;
    use crate::types::Tier;

    #[test]
    fn residency_has_every_key_of_the_contract_and_no_tenants_name() {
        let eviction = LastEviction {
            journal: 7,
            at: Tick(3_000_000),
            rule: "lru",
            for_tenant: TenantId(1),
            from: Tier::Device,
            freed_bytes: 4096,
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
                last_used: Tick(1),
                last_eviction: Some(eviction),
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
        assert_eq!(shown["last_eviction"]["at"], 1_790_000_003);
        assert_eq!(shown["last_eviction"]["for_tenant"], "other");
        assert_eq!(shown["last_eviction"]["id"], format!("jrn_{:032x}", 7));
    }

    #[test]
    fn a_list_is_filtered_by_metadata_and_state() {
        let Filters { metadata, state } =
            filters("metadata[topic]=a%20b&metadata%5Bx%5D=&state=offloaded&limit=3").unwrap();
        assert_eq!(metadata, [("topic".to_owned(), "a b".to_owned()), ("x".to_owned(), String::new())]);
        assert_eq!(state.as_deref(), Some("offloaded"));
        assert_eq!(filters("state=asleep").unwrap_err().param(), Some("state"));
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
