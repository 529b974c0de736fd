//! What does every request and every answer have, whatever its route?
//!
//! An `x-request-id`, the time it took, a span for log and trace, and an answer in JSON even if a handler panics.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::error::InternalError;
use actix_web::http::StatusCode;
use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage, HttpResponse, ResponseError, web};
use futures_util::FutureExt;
use tracing::{Instrument, Span};

use super::cors::Cors;
use super::error::ApiError;
use super::timing::{Timed, Timer};
use super::{ApiState, ids};
use crate::telemetry::trace;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CLIENT_REQUEST_ID: HeaderName = HeaderName::from_static("x-client-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
const CLIENT_REQUEST_ID_MAX: usize = 512;

/// What a request is known by in log and trace, for what goes on after its answer.
#[derive(Clone, Debug, Default)]
pub(super) struct Trail {
    pub request: String,
    traceparent: Option<String>,
    tracestate: Option<String>,
}

impl Trail {
    fn of(request: String, headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).map(str::to_owned);
        Self { request, traceparent: text("traceparent"), tracestate: text("tracestate") }
    }

    /// Makes a span part of the client's trace, if the client told of one.
    pub fn claims(&self, span: &Span) {
        trace::continue_from(span, self.traceparent.as_deref(), self.tracestate.as_deref());
    }
}

/// The outermost layer, around every route.
pub async fn edge<B: MessageBody + 'static>(
    state: web::Data<ApiState>,
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let started = Instant::now();
    let client_id = request.headers().get(CLIENT_REQUEST_ID).filter(|value| is_plain(value)).cloned();
    let origin = state.settings.cors.allowed(request.headers());
    let about = About { id: ids::new("req_"), client_id, started, origin, cors: state.settings.cors.clone() };
    let span = tracing::info_span!(
        "request",
        request = about.id,
        tenant = tracing::field::Empty, // once it is known
        method = %request.method(),
        path = request.path(),
        client_request = about.client_id.as_ref().and_then(|value| value.to_str().ok()),
    );
    let trail = Trail::of(about.id.clone(), request.headers());
    trail.claims(&span);
    request.extensions_mut().insert(trail);
    let method = request.method().clone();
    let timer = |route, status| Timer::new(started, span.clone(), &method, route, status);
    let header_bytes: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if header_bytes > state.settings.limits.header_bytes {
        let error = ApiError::headers_too_large(state.settings.limits.header_bytes);
        drop(timer(None, error.status_code()));
        return Ok(request.into_response(about.mark(error.error_response())));
    }
    if let Some(response) = state.settings.cors.preflight(request.method(), request.headers()) {
        drop(timer(None, response.status()));
        return Ok(request.into_response(about.mark(response)));
    }
    let answered = AssertUnwindSafe(next.call(request)).catch_unwind().instrument(span.clone()).await;
    let _entered = span.enter();
    match answered {
        Ok(Ok(mut response)) => {
            about.mark_headers(response.headers_mut());
            let (status, ms) = (response.status().as_u16(), about.started.elapsed().as_millis());
            tracing::debug!(status, ms, "answered");
            let timer = timer(response.request().match_pattern(), response.status());
            // A socket lives on, and is no answer that takes long.
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                return Ok(response.map_into_boxed_body());
            }
            let response = response.map_body(|_, body| Timed { body: body.boxed(), timer });
            Ok(response.map_into_boxed_body())
        }
        Ok(Err(error)) => {
            let response = about.mark(error.error_response());
            drop(timer(None, response.status()));
            Err(InternalError::from_response(error, response).into())
        }
        Err(panic) => {
            let reason = panic.downcast_ref::<String>().map(String::as_str);
            let reason = reason.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words");
            tracing::error!(reason, "a handler panicked");
            let error = ApiError::internal();
            let response = about.mark(error.error_response());
            drop(timer(None, response.status()));
            Err(InternalError::from_response(error, response).into())
        }
    }
}

struct About {
    id: String,
    client_id: Option<HeaderValue>,
    started: Instant,
    /// The page that asks, if it may.
    origin: Option<HeaderValue>,
    cors: Arc<Cors>,
}

impl About {
    fn mark(&self, mut response: HttpResponse) -> HttpResponse {
        self.mark_headers(response.headers_mut());
        response
    }

    fn mark_headers(&self, headers: &mut HeaderMap) {
        if let Ok(id) = HeaderValue::from_str(&self.id) {
            headers.insert(REQUEST_ID, id);
        }
        if let Some(id) = &self.client_id {
            headers.insert(CLIENT_REQUEST_ID, id.clone());
        }
        self.cors.mark(self.origin.as_ref(), headers);
        let ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        headers.insert(PROCESSING_MS, HeaderValue::from(ms));
    }
}

/// A client's own request id is echoed if it is printable ASCII and not too long.
fn is_plain(value: &HeaderValue) -> bool {
    value.len() <= CLIENT_REQUEST_ID_MAX && value.as_bytes().iter().all(|byte| matches!(byte, b' '..=b'~'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_client_request_ids_are_echoed() {
        assert!(is_plain(&HeaderValue::from_static("abc 1-2")));
        assert!(!is_plain(&HeaderValue::from_bytes("ä".as_bytes()).unwrap()));
        assert!(!is_plain(&HeaderValue::from_str(&"x".repeat(513)).unwrap()));
    }
}
