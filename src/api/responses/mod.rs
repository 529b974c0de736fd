//! What can be done with responses over HTTP?
//!
//! `request` reads a create, `object` is the response in JSON, `events` its numbered events: what of these is SSE is here
//! and in `sse`, so that a socket can tell the same.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod events;
pub mod object;
pub mod request;

use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::stream;
use serde_json::json;

use super::auth::Caller;
use super::error::ApiError;
use super::fields::Fields;
use super::items::{self, Page};
use super::{ApiState, body, ids, queue_deadline, sse};
use crate::sessions::Turn;
use crate::sessions::messages::{Audience, Place, ResponseId};
use events::Events;
use object::Echo;
use request::Sent;

/// POST `/v1/responses`.
pub async fn create(
    request: HttpRequest,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let settings = &state.settings;
    let (parsed, digest) = body::object_and_digest(&request, payload, &settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let sent = Sent {
        digest,
        is_retry: body::may_be_a_retry(request.headers()),
        deadline: queue_deadline(request.headers(), settings),
    };
    let turn = request::read(&state, &caller, &parsed, &mut fields, sent).await?;
    let streams = fields.boolean("stream")?.unwrap_or(false);
    let ignored = body::unknown(&fields, settings)?;

    let (place, audience) = (turn.place, turn.audience);
    let turn = state.sessions.respond(&caller, turn).await;
    let mut turn = turn.map_err(|error| ApiError::from(error).of_param("messages", "input"))?;
    let response = if streams {
        stream_from(turn, None, &state)?
    } else {
        let echo = Echo::from_about(&turn.about)?;
        if audience == Audience::Readers {
            sse::finish(&mut turn.stream).await.map_err(|error| {
                let error = ApiError::from(error);
                if place == Place::Alone { error } else { error.after_storing() }
            })?;
        }
        HttpResponse::Ok().json(echo.as_it_stands(&turn))
    };
    Ok(body::answer_naming(response, ignored))
}

/// POST `/v1/responses/input_tokens`: what the prompt of such a create would have.
pub async fn count(
    request: HttpRequest,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let settings = &state.settings;
    let (parsed, digest) = body::object_and_digest(&request, payload, &settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let sent = Sent { digest, is_retry: false, deadline: queue_deadline(request.headers(), settings) };
    let turn = request::read(&state, &caller, &parsed, &mut fields, sent).await?;
    fields.boolean("stream")?;
    let ignored = body::unknown(&fields, settings)?;
    let tokens = state.sessions.count(&caller, turn).await;
    let tokens = tokens.map_err(|error| ApiError::from(error).of_param("messages", "input"))?;
    let counted = json!({"object": "response.input_tokens", "input_tokens": tokens.0});
    Ok(body::answer_naming(HttpResponse::Ok().json(counted), ignored))
}

/// GET `/v1/responses/{id}`: as it stands, or its events, replayed and then followed.
pub async fn get(
    request: HttpRequest,
    path: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let (streams, after) = replay(request.query_string())?;
    let turn = state.sessions.response(&caller, id(&path)?).await?;
    if streams {
        return stream_from(turn, after, &state);
    }
    Ok(HttpResponse::Ok().json(Echo::from_about(&turn.about)?.as_it_stands(&turn)))
}

/// DELETE `/v1/responses/{id}`.
pub async fn delete(
    path: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let id = id(&path)?;
    state.sessions.delete_response(&caller, id).await?;
    Ok(HttpResponse::Ok().json(json!({"id": ids::response(id), "object": "response", "deleted": true})))
}

/// POST `/v1/responses/{id}/cancel`. Its body says nothing, and is read all the same: a connection with an unread one can't
/// be used again.
pub async fn cancel(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    body::whole(&request, payload, &state.settings.limits).await?;
    let turn = state.sessions.cancel(&caller, id(&path)?).await?;
    Ok(HttpResponse::Ok().json(Echo::from_about(&turn.about)?.as_it_stands(&turn)))
}

/// GET `/v1/responses/{id}/input_items`.
pub async fn input_items(
    request: HttpRequest,
    path: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    let page = Page::parse(request.query_string())?;
    let items = state.sessions.input_items(&caller, id(&path)?).await?;
    Ok(HttpResponse::Ok().json(page.cut(&items)?))
}

fn id(path: &str) -> Result<ResponseId, ApiError> {
    ids::parse_response(path).ok_or_else(ApiError::response_not_found)
}

fn stream_from(turn: Turn, after: Option<u64>, state: &ApiState) -> Result<HttpResponse, ApiError> {
    let events = Events::of(turn, after)?;
    let told = stream::unfold(events, |mut events| async move {
        let event = events.next().await?;
        Some((event.to_sse(), events))
    });
    Ok(sse::respond(told, state.settings.keep_alive))
}

/// `stream` and `starting_after` of a query string.
fn replay(query: &str) -> Result<(bool, Option<u64>), ApiError> {
    let (mut streams, mut after) = (false, None);
    for (key, value) in items::pairs(query)? {
        match (key.as_str(), value.as_str()) {
            ("stream", "true") => streams = true,
            ("stream", "false") => streams = false,
            ("stream", _) => return Err(ApiError::invalid_value("stream", "`stream` must be true or false")),
            ("starting_after", number) => {
                let message = "`starting_after` must be the number of an event, 0 or more";
                let number = number.parse().map_err(|_| ApiError::invalid_value("starting_after", message))?;
                after = Some(number);
            }
            _ => {}
        }
    }
    if after.is_some() && !streams {
        return Err(ApiError::invalid_value("starting_after", "`starting_after` needs `stream=true`"));
    }
    Ok((streams, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_starts_where_the_client_says() {
        assert_eq!(replay("").unwrap(), (false, None));
        assert_eq!(replay("stream=true&starting_after=3&include=x").unwrap(), (true, Some(3)));
        for (query, param) in [
            ("stream=yes", "stream"),
            ("stream=true&starting_after=-1", "starting_after"),
            ("starting_after=1", "starting_after"),
        ] {
            let error = replay(query).unwrap_err();
            assert_eq!((error.code(), error.param()), ("invalid_value", Some(param)), "{query}");
        }
    }
}
