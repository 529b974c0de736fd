//! How are conversations made, read, changed and deleted?
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::fields::{Fields, METADATA_PAIRS};
use super::items::{self, Page};
use super::residency::state_word;
use super::{ApiState, Limits, body, ids, input};
use crate::sessions::messages::{Conversation, ConversationId, ConversationQuery, ListedConversation, NewItem};

fn id(path: &str) -> Result<ConversationId, ApiError> {
    ids::parse_conversation(path).ok_or_else(ApiError::conversation_not_found)
}

pub fn object(conversation: &Conversation) -> Value {
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
            "freed": {"device_bytes": deleted.device_bytes, "host_bytes": deleted.host_bytes, "disk_bytes": deleted.disk_bytes},
            "kept_shared_bytes": deleted.kept_shared_bytes,
            "remaining_bytes": deleted.remaining_bytes,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_filtered_by_metadata_and_state() {
        let Filters { metadata, state } =
            filters("metadata[topic]=a%20b&metadata%5Bx%5D=&state=offloaded&limit=3").unwrap();
        assert_eq!(metadata, [("topic".to_owned(), "a b".to_owned()), ("x".to_owned(), String::new())]);
        assert_eq!(state.as_deref(), Some("offloaded"));
        assert_eq!(filters("state=asleep").unwrap_err().param(), Some("state"));
    }
}
