//! Who asks, and may they?
//!
//! Each resource of the router says what opens it; this stands before its handlers, so that none can forget to ask. A
//! handler takes the tenant as `Caller`, which only a request that passed here has.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::time::{Duration, Instant};

use actix_web::body::BoxBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_PROTOCOL};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage, ResponseError, web};

use super::error::ApiError;
use super::{ApiSettings, ApiState, unix_now};
use crate::telemetry::metrics::LIMITED;
use crate::tenants::Tenant;
use crate::tenants::directory::KeyError;
use crate::tenants::quota::{REQUESTS_PER_MINUTE, RateExceeded, RequestsLeft};

/// The tenant whose key a request brought.
pub type Caller = web::ReqData<Tenant>;

const KEY_PROTOCOL: &str = "openai-insecure-api-key.";
const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit-requests");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining-requests");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset-requests");

/// Before routes that take a tenant's key: finds the tenant, and counts the request against its limit.
pub async fn tenant(
    state: web::Data<ApiState>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let tenant = match state.tenants.tenant_of(key_of(request.headers()), unix_now()) {
        Ok(tenant) => tenant,
        Err(error) => return Ok(refuse(request, &error.into())),
    };
    tracing::Span::current().record("tenant", tenant.name.as_str());
    let left = match count(&tenant) {
        Ok(left) => left,
        Err(exceeded) => {
            let mut response = refuse(request, &exceeded.into());
            tell(&exceeded.left, response.headers_mut());
            return Ok(response);
        }
    };
    request.extensions_mut().insert(tenant);
    let mut response = next.call(request).await?;
    if let Some(left) = left {
        tell(&left, response.headers_mut());
    }
    Ok(response)
}

/// Before routes that take an admin's key.
pub async fn admin(
    state: web::Data<ApiState>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    match state.tenants.check_admin(bearer(request.headers()), unix_now()) {
        Ok(()) => next.call(request).await,
        Err(error) => Ok(refuse(request, &error.into())),
    }
}

/// Before what admins read: without a tenants file the server listens on this machine alone, and anybody on it may.
pub async fn reader(
    state: web::Data<ApiState>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    if state.tenants.is_open() { next.call(request).await } else { admin(state, request, next).await }
}

/// Counts one request against the tenant's limit.
pub fn count(tenant: &Tenant) -> Result<Option<RequestsLeft>, RateExceeded> {
    tenant.quota.take_request(Instant::now()).inspect_err(|_| {
        LIMITED.add(1, &[("tenant", &tenant.name), ("limit", REQUESTS_PER_MINUTE)]);
    })
}

fn refuse(request: ServiceRequest, error: &ApiError) -> ServiceResponse<BoxBody> {
    request.into_response(error.error_response())
}

/// Refuses a turn whose model the tenant may not use.
pub fn check_model(tenant: &Tenant, settings: &ApiSettings) -> Result<(), ApiError> {
    if tenant.may_use(&settings.model) { Ok(()) } else { Err(ApiError::model_not_allowed(&settings.model)) }
}

/// The key of `Authorization: Bearer <key>`; else, of an upgrade, that of the subprotocol `openai-insecure-api-key.<key>`,
/// since a browser can't set headers. What is written otherwise is none.
pub fn key_of(headers: &HeaderMap) -> Option<&str> {
    bearer(headers).or_else(|| {
        let offered = headers.get_all(SEC_WEBSOCKET_PROTOCOL).filter_map(|value| value.to_str().ok());
        let mut offered = offered.flat_map(|value| value.split(',')).map(str::trim);
        offered.find_map(|protocol| protocol.strip_prefix(KEY_PROTOCOL)).filter(|key| !key.is_empty())
    })
}

/// The key of `Authorization: Bearer <key>`.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

/// Says how the tenant stands with its limit.
fn tell(left: &RequestsLeft, headers: &mut HeaderMap) {
    headers.insert(LIMIT, HeaderValue::from(left.limit));
    headers.insert(REMAINING, HeaderValue::from(left.remaining));
    if let Ok(reset) = HeaderValue::from_str(&duration(left.reset)) {
        headers.insert(RESET, reset);
    }
}

/// As OpenAI writes durations: `120ms`, `7s`, `6m0s`; rounded up.
fn duration(time: Duration) -> String {
    let ms = time.as_micros().div_ceil(1000);
    if ms < 1000 {
        return format!("{ms}ms");
    }
    match (ms.div_ceil(1000) / 60, ms.div_ceil(1000) % 60) {
        (0, seconds) => format!("{seconds}s"),
        (minutes, seconds) => format!("{minutes}m{seconds}s"),
    }
}

impl From<KeyError> for ApiError {
    fn from(error: KeyError) -> Self {
        let message = error.to_string();
        match error {
            KeyError::Missing | KeyError::Unknown | KeyError::Expired => Self::invalid_api_key(message),
            KeyError::Suspended => Self::forbidden("tenant_suspended", message),
            KeyError::TenantOnAdminRoute | KeyError::AdminOnTenantRoute => Self::forbidden("wrong_key_kind", message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_what_stands_behind_bearer_and_nothing_else() {
        let key = |value: &'static [u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, HeaderValue::from_bytes(value).unwrap());
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(key(b"Bearer rk_1").as_deref(), Some("rk_1"));
        assert_eq!(key(b"bearer  rk_1 ").as_deref(), Some("rk_1"));
        for odd in [&b"Bearer"[..], b"Bearer ", b"Basic rk_1", b"rk_1", b"", b"Bearer \xff"] {
            assert_eq!(key(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn a_browser_offers_its_key_as_a_subprotocol() {
        let mut headers = HeaderMap::new();
        let offered = HeaderValue::from_static("rekindle.v1, openai-insecure-api-key.rk_2");
        headers.insert(SEC_WEBSOCKET_PROTOCOL, offered);
        assert_eq!(key_of(&headers), Some("rk_2"));
        headers.insert(AUTHORIZATION, HeaderValue::from_static("Bearer rk_1"));
        assert_eq!(key_of(&headers), Some("rk_1"));
    }

    #[test]
    fn durations_are_written_as_openai_does() {
        for (ms, text) in
            [(0, "0ms"), (120, "120ms"), (999, "999ms"), (1000, "1s"), (59_001, "1m0s"), (360_000, "6m0s")]
        {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
        assert_eq!(duration(Duration::from_micros(1)), "1ms");
    }
}
