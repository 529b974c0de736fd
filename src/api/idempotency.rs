//! What happens to a request that bears an `Idempotency-Key`?
//!
//! It is made once: while it runs a second one is refused, and when it is over its status and body are given again. What
//! passes with time, and changed nothing, is not remembered. A stream is remembered as it was sent, once it was sent to
//! its end; one that was broken off is not, and a turn that is sent again then is known as a retry.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::pin::Pin;
use std::task::{Context, Poll};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use actix_web::http::{Method, StatusCode};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage, HttpResponse, web};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use serde::{Deserialize, Serialize};

use super::body::{self, IDEMPOTENCY_KEY};
use super::error::ApiError;
use super::{ApiState, Limits};
use crate::sessions::{Claim, Once};
use crate::tenants::Tenant;

const KEY_MAX_BYTES: usize = 255;
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
const IGNORED: HeaderName = HeaderName::from_static("x-rekindle-ignored");

/// The layer behind the one that finds the tenant.
pub async fn once(
    state: web::Data<ApiState>,
    mut request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let key = request.headers().get(IDEMPOTENCY_KEY).cloned();
    let Some(key) = key.filter(|_| [Method::POST, Method::DELETE].contains(request.method())) else {
        return next.call(request).await;
    };
    let claim = match claim(&state, &mut request, &key).await {
        Ok(Known::New(claim)) => claim,
        Ok(Known::Over(response)) => return Ok(request.into_response(response)),
        Err(error) => return Ok(request.error_response(error)),
    };
    let response = next.call(request).await?;
    Ok(remember(response, claim, state.settings.limits.body_bytes).await)
}

enum Known {
    New(Claim),
    Over(HttpResponse),
}

/// Reads the body, which is given back to the request, and asks whether the request was made before.
async fn claim(state: &ApiState, request: &mut ServiceRequest, key: &HeaderValue) -> Result<Known, ApiError> {
    let usable =
        (1..=KEY_MAX_BYTES).contains(&key.len()) && key.as_bytes().iter().all(|byte| matches!(byte, b' '..=b'~'));
    let key = key.to_str().ok().filter(|_| usable).ok_or_else(|| {
        let message = format!("`Idempotency-Key` must be 1 to {KEY_MAX_BYTES} printable ASCII characters");
        ApiError::invalid_value("Idempotency-Key", message)
    })?;
    let tenant = request.extensions().get::<Tenant>().cloned().ok_or_else(ApiError::internal)?;
    let body = whole_body(request, &state.settings.limits).await?;
    let digest = *blake3::hash(&body).as_bytes();
    let named = format!("{} {} {key}", request.method(), request.path().trim_end_matches('/'));
    match state.sessions.once(&tenant, &named, digest).await? {
        Once::New(claim) => Ok(Known::New(claim)),
        Once::Runs => Err(ApiError::idempotency_in_progress()),
        Once::Another => Err(ApiError::idempotency_key_reused()),
        Once::Over(kept) => Ok(Known::Over(replay(&kept).ok_or_else(ApiError::internal)?)),
    }
}

async fn whole_body(request: &mut ServiceRequest, limits: &Limits) -> Result<Bytes, ApiError> {
    let payload = request.take_payload();
    let body = body::whole(request.request(), payload, limits).await?.freeze();
    let again = body.clone();
    request.set_payload(Payload::Stream { payload: Box::pin(stream::once(async { Ok(again) })) });
    Ok(body)
}

/// What is kept before a body's bytes, as one line of JSON.
#[derive(Serialize, Deserialize)]
struct Head {
    status: u16,
    content_type: Option<String>,
    ignored: Option<String>,
}

impl Head {
    fn of(response: &ServiceResponse<BoxBody>) -> Self {
        let header = |name| {
            let value: Option<&HeaderValue> = response.headers().get(name);
            value.and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let status = response.status().as_u16();
        Self { status, content_type: header(CONTENT_TYPE), ignored: header(IGNORED) }
    }

    /// Head and body as they are kept.
    fn with(&self, body: &[u8]) -> Option<Vec<u8>> {
        let mut kept = serde_json::to_vec(self).ok()?;
        kept.push(b'\n');
        kept.extend_from_slice(body);
        Some(kept)
    }
}

/// The first result again; `None` if what was kept can't be read.
fn replay(kept: &[u8]) -> Option<HttpResponse> {
    let (head, body) = kept.split_at_checked(kept.iter().position(|byte| *byte == b'\n')?)?;
    let head: Head = serde_json::from_slice(head).ok()?;
    let body = body.get(1..)?.to_vec();
    let mut response = HttpResponse::build(StatusCode::from_u16(head.status).ok()?).body(body);
    let headers = response.headers_mut();
    headers.insert(REPLAYED, HeaderValue::from_static("true"));
    for (name, value) in [(CONTENT_TYPE, head.content_type), (IGNORED, head.ignored)] {
        if let Some(value) = value.and_then(|value| HeaderValue::from_str(&value).ok()) {
            headers.insert(name, value);
        }
    }
    Some(response)
}

/// Keeps the result before it is answered; a stream's when it was sent to its end.
async fn remember(response: ServiceResponse<BoxBody>, claim: Claim, most_bytes: usize) -> ServiceResponse<BoxBody> {
    if !is_lasting(&response) {
        return response;
    }
    let head = Head::of(&response);
    if response.response().body().size() == BodySize::Stream {
        let sent = Sent { claim, head, sent: BytesMut::new(), most_bytes };
        return response.map_body(|_, body| BoxBody::new(Told { body, sent: Some(sent) }));
    }
    let (request, response) = response.into_parts();
    let (response, body) = response.into_parts();
    // Bodies of this kind are in memory already.
    let body = actix_web::body::to_bytes(body).await.unwrap_or_default();
    if let Some(kept) = head.with(&body) {
        claim.keep(kept).await;
    }
    ServiceResponse::new(request, response.set_body(BoxBody::new(body)))
}

/// Whether the same request would have the same result, or must not be made again.
fn is_lasting(response: &ServiceResponse<BoxBody>) -> bool {
    let status = response.status();
    let after_storing = response.headers().get(SHOULD_RETRY).is_some_and(|value| value == "false");
    match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::CONFLICT => false,
        status if status.is_server_error() => after_storing,
        _ => true,
    }
}

/// A stream that is remembered while it is sent.
struct Told {
    body: BoxBody,
    /// `None`: too long to be kept, or at its end.
    sent: Option<Sent>,
}

struct Sent {
    claim: Claim,
    head: Head,
    sent: BytesMut,
    most_bytes: usize,
}

impl MessageBody for Told {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let told = self.get_mut();
        let polled = Pin::new(&mut told.body).poll_next(context);
        match &polled {
            Poll::Ready(Some(Ok(bytes))) => {
                if let Some(sent) = &mut told.sent {
                    sent.sent.extend_from_slice(bytes);
                }
                told.sent.take_if(|sent| sent.sent.len() > sent.most_bytes);
            }
            Poll::Ready(None) => {
                if let Some(Sent { claim, head, sent, .. }) = told.sent.take()
                    && let Some(kept) = head.with(&sent)
                {
                    tokio::spawn(claim.keep(kept));
                }
            }
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix_web::test]
    async fn a_result_comes_back_with_its_status_its_type_and_every_byte() {
        let head = Head { status: 404, content_type: Some("application/json".into()), ignored: None };
        let kept = head.with(b"{\"a\":1}\n\n{").unwrap();
        let response = replay(&kept).unwrap();
        assert_eq!(response.status(), 404);
        assert_eq!(response.headers().get(CONTENT_TYPE).unwrap(), "application/json");
        assert_eq!(response.headers().get(REPLAYED).unwrap(), "true");
        let body = actix_web::body::to_bytes(response.into_body()).await.unwrap();
        assert_eq!(body.as_ref(), b"{\"a\":1}\n\n{");
    }

    #[test]
    fn what_was_torn_is_no_result() {
        for torn in [&b""[..], b"{}", b"{}\nbody", b"no json\nbody"] {
            assert!(replay(torn).is_none());
        }
    }
}
