//! How does a client talk over one socket instead of many requests?
//!
//! WebSocket mode: the same creates and the same events as over HTTP, one JSON object a frame. `requests` reads what clients
//! send, `lanes` keep its order, `outbox` holds what they have not read yet, and `connection` is one socket's life.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod connection;
mod lanes;
mod outbox;
mod requests;

use std::time::Duration;

use actix_web::http::header::{CONNECTION, HeaderMap, ORIGIN, UPGRADE};
use actix_web::{HttpMessage, HttpRequest, HttpResponse, rt, web};

use super::ApiState;
use super::auth::{self, Caller};
use super::edge::Trail;
use super::error::ApiError;
use crate::telemetry::metrics::LIMITED;
use crate::tenants::quota;
use connection::Connection;
pub use lanes::Bounds;

/// What browsers, which can't set headers, offer beside the protocol that bears their key.
const PROTOCOL: &str = "rekindle.v1";

/// What an upgrade may be refused with, and what an `error` event may tell besides what a create is refused with.
pub const CODES: &[&str] = &[
    "upgrade_required",
    "origin_not_allowed",
    "invalid_value",
    "concurrency_limit_exceeded",
    "conversation_not_found",
    "too_many_pending",
    "websocket_connection_limit_reached",
];

/// How sockets behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketSettings {
    pub bounds: Bounds,
    /// Bytes of one message.
    pub message_bytes: usize,
    /// A socket this old runs no more turns.
    pub max_age: Duration,
    /// A socket this long without frames or turns closes.
    pub idle: Duration,
}

/// GET `/v1/responses` with an upgrade.
pub async fn upgrade(
    request: HttpRequest,
    payload: web::Payload,
    state: web::Data<ApiState>,
    tenant: Caller,
) -> Result<HttpResponse, ApiError> {
    if !asks_for_a_socket(request.headers()) {
        return Err(ApiError::upgrade_required());
    }
    if request.headers().contains_key(ORIGIN) && state.settings.cors.allowed(request.headers()).is_none() {
        return Err(ApiError::origin_not_allowed());
    }
    let warms = requests::conversation_of(request.query_string())?;
    let permit = tenant.quota.open_socket().inspect_err(|_| {
        LIMITED.add(1, &[("tenant", &tenant.name), ("limit", quota::SOCKETS)]);
    })?;
    let key = auth::key_of(request.headers()).map(str::to_owned);
    let opened = actix_ws::handle_with_protocols(&request, payload, &[PROTOCOL]);
    let (response, session, frames) = opened.map_err(|error| ApiError::bad_handshake(&error.to_string()))?;
    let trail = request.extensions().get::<Trail>().cloned().unwrap_or_default();
    let connection = Connection::new(state, tenant.into_inner(), key, trail, permit);
    rt::spawn(connection.run(session, frames, warms));
    Ok(response)
}

fn asks_for_a_socket(headers: &HeaderMap) -> bool {
    let names = |name, word: &str| {
        let values = headers.get_all(name).filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    names(UPGRADE, "websocket") && names(CONNECTION, "upgrade")
}
