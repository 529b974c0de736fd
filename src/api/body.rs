//! How does a request's body get here, and which of its fields are told to be unknown?
//!
//! At most `body_bytes`, within `body_timeout`. What is too large is read to its end (to a bound) and thrown away, so
//! that the client gets the answer instead of a broken connection.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::time::Duration;

use actix_web::HttpRequest;
use actix_web::error::PayloadError;
use actix_web::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use actix_web::{HttpResponse, web};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{self, Fields};
use super::{ApiSettings, Limits, UnknownFields};

/// A client's own name for a request.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// How much of a body that is too large is read and thrown away.
const DRAIN_MAX_BYTES: usize = 256 << 20;
/// How long the next piece of it is waited for.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);
/// How many ignored names, and how long each, fit the header.
const NAMED_MAX: usize = 16;
const NAME_MAX_CHARS: usize = 64;

/// Reads a body as one JSON object.
pub async fn object(
    request: &HttpRequest,
    payload: web::Payload,
    limits: &Limits,
) -> Result<Map<String, Value>, ApiError> {
    Ok(object_and_digest(request, payload, limits).await?.0)
}

/// A body as one JSON object, and a digest by which a retry is known: of its bytes, and of the key that names it.
pub async fn object_and_digest(
    request: &HttpRequest,
    payload: web::Payload,
    limits: &Limits,
) -> Result<(Map<String, Value>, [u8; 32]), ApiError> {
    let body = whole(request, payload, limits).await?;
    if !body.is_empty() {
        check_media_type(request)?;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&body);
    if let Some(key) = request.headers().get(IDEMPOTENCY_KEY) {
        hasher.update(key.as_bytes());
    }
    Ok((fields::parse_object(&body, limits.json_depth)?, *hasher.finalize().as_bytes()))
}

/// Whether the client may have sent this request before: it counts its tries, or names the request.
pub fn may_be_a_retry(headers: &HeaderMap) -> bool {
    let tries = headers.get("x-stainless-retry-count").and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    tries.is_some_and(|tries| tries > 0) || headers.contains_key(IDEMPOTENCY_KEY)
}

/// The bytes of a body, within the bounds of size and time.
pub async fn whole(
    request: &HttpRequest,
    payload: impl Stream<Item = Result<Bytes, PayloadError>> + Unpin,
    limits: &Limits,
) -> Result<BytesMut, ApiError> {
    let read = tokio::time::timeout(limits.body_timeout, bytes(request, payload, limits.body_bytes));
    read.await.map_err(|_| ApiError::body_timeout(limits.body_timeout))?
}

async fn bytes(
    request: &HttpRequest,
    mut payload: impl Stream<Item = Result<Bytes, PayloadError>> + Unpin,
    limit: usize,
) -> Result<BytesMut, ApiError> {
    let declared = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut too_large = declared.is_some_and(|length| length > limit);
    let (mut body, mut seen) = (BytesMut::new(), 0_usize);
    loop {
        // A client that is not sending waits for the answer already.
        let patience = if too_large { DRAIN_PATIENCE } else { Duration::MAX };
        let Ok(Some(piece)) = tokio::time::timeout(patience, payload.next()).await else { break };
        let piece = piece.map_err(|error| ApiError::body_broken(&error.to_string()))?;
        seen = seen.saturating_add(piece.len());
        too_large |= seen > limit;
        if seen > DRAIN_MAX_BYTES {
            break;
        }
        if too_large {
            body = BytesMut::new();
        } else {
            body.extend_from_slice(&piece);
        }
    }
    if too_large { Err(ApiError::too_large(limit)) } else { Ok(body) }
}

/// JSON, or no word about it; never compressed.
fn check_media_type(request: &HttpRequest) -> Result<(), ApiError> {
    let header = |name| request.headers().get(name).map(|value: &HeaderValue| value.to_str().unwrap_or("?").to_owned());
    if let Some(encoding) = header(CONTENT_ENCODING).filter(|encoding| !encoding.eq_ignore_ascii_case("identity")) {
        return Err(ApiError::media_type(&format!("encoded as {encoding}")));
    }
    let Some(media_type) = header(CONTENT_TYPE) else { return Ok(()) };
    let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_json = essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"));
    if is_json { Ok(()) } else { Err(ApiError::media_type(&media_type)) }
}

/// Deals with the names that nobody asked for: refuses them, or gives them back for `answer_naming`.
pub fn unknown(fields: &Fields<'_>, settings: &ApiSettings) -> Result<Option<HeaderValue>, ApiError> {
    let names = fields.unknown();
    match (names.first(), settings.unknown_fields) {
        (None, _) => Ok(None),
        (Some(name), UnknownFields::Refuse) => {
            Err(ApiError::unknown_parameter(&name.chars().take(NAME_MAX_CHARS).collect::<String>()))
        }
        (Some(_), UnknownFields::Ignore) => {
            let shown = |name: &&str| -> String {
                let printable = |c: char| if c.is_ascii_graphic() && c != ',' { c } else { '?' };
                name.chars().take(NAME_MAX_CHARS).map(printable).collect()
            };
            let list: Vec<_> = names.iter().take(NAMED_MAX).map(shown).collect();
            Ok(HeaderValue::from_str(&list.join(", ")).ok())
        }
    }
}

/// Names the ignored fields on the answer.
pub fn answer_naming(mut response: HttpResponse, ignored: Option<HeaderValue>) -> HttpResponse {
    if let Some(names) = ignored {
        response.headers_mut().insert(HeaderName::from_static("x-rekindle-ignored"), names);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::super::tests::settings;
    use super::*;

    #[test]
    fn ignored_names_are_told_in_printable_form() {
        let body = fields::parse_object("{\"ä,\\n\":1,\"x_vendor\":{},\"model\":\"m\"}".as_bytes(), 64).unwrap();
        let mut fields = Fields::of(&body);
        fields.accept(&["model"]);
        assert_eq!(unknown(&fields, &settings()).unwrap().unwrap(), "???, x_vendor");
        let strict = ApiSettings { unknown_fields: UnknownFields::Refuse, ..settings() };
        assert_eq!(unknown(&fields, &strict).unwrap_err().code(), "unknown_parameter");
    }
}
