//! Which status, type and code does an error have at the API?
//!
//! The one mapping, and nowhere else: no `_` arms, so that whoever adds a variant chooses its status and stable code.
//! Every error of every route has the same JSON body: `message`, `type`, `param`, `code`.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::fmt;
use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::http::header::{ALLOW, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::{HttpResponse, ResponseError};
use serde_json::{Value, json};

use super::codes;
use crate::sessions::messages::{SessionError, TurnError};
use crate::tenants::quota::{RateExceeded, SocketsExceeded};
use crate::types::counted;

const INVALID_REQUEST: &str = "invalid_request_error";
const SERVER_ERROR: &str = "server_error";

/// An error as the client gets it.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    param: Option<String>,
    message: String,
    retry_after: Option<Duration>,
    /// `x-should-retry`, where the SDKs' own rule would do the wrong thing.
    should_retry: Option<bool>,
    allow: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        let listed = codes::find(code).map(|code| code.status);
        debug_assert_eq!(listed, Some(status.as_u16()), "`{code}` is in the table of codes with its status");
        Self { status, kind, code, param: None, message, retry_after: None, should_retry: None, allow: None }
    }

    fn bad_request(code: &'static str, param: Option<&str>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, code, message);
        Self { param: param.map(str::to_owned), ..error }
    }

    fn not_found(code: &'static str, param: Option<&str>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, code, message);
        Self { param: param.map(str::to_owned), ..error }
    }

    fn unavailable(code: &'static str, message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER_ERROR, code, message);
        Self { retry_after: Some(retry_after), ..error }
    }

    pub fn invalid_json(message: String) -> Self {
        Self::bad_request("invalid_json", None, message)
    }

    pub fn missing(param: &str) -> Self {
        Self::bad_request("missing_required_parameter", Some(param), format!("`{param}` is required"))
    }

    pub fn invalid_type(param: &str, message: String) -> Self {
        Self::bad_request("invalid_type", Some(param), message)
    }

    pub fn invalid_value(param: &str, message: impl Into<String>) -> Self {
        Self::bad_request("invalid_value", Some(param), message)
    }

    pub fn unknown_parameter(param: &str) -> Self {
        Self::bad_request("unknown_parameter", Some(param), format!("`{param}` is not a parameter of this route"))
    }

    pub fn unsupported_parameter(param: &str) -> Self {
        Self::bad_request(
            "unsupported_parameter",
            Some(param),
            format!("`{param}` is not supported here; leave it out"),
        )
    }

    pub fn unsupported_value(param: &str, message: impl Into<String>) -> Self {
        Self::bad_request("unsupported_value", Some(param), message)
    }

    pub fn mutually_exclusive(param: &str, message: impl Into<String>) -> Self {
        Self::bad_request("mutually_exclusive_parameters", Some(param), message)
    }

    pub fn array_too_long(param: &str, found: usize, most: usize) -> Self {
        let message = format!("`{param}` has {found} elements, at most {most} are allowed");
        Self::bad_request("array_above_max_length", Some(param), message)
    }

    pub fn string_too_long(param: &str, message: String) -> Self {
        Self::bad_request("string_above_max_length", Some(param), message)
    }

    pub fn model_not_found(asked: &str, served: &str) -> Self {
        let asked: String = asked.chars().take(128).collect();
        Self::not_found(
            "model_not_found",
            Some("model"),
            format!("no model `{asked}` is served here; there is `{served}`"),
        )
    }

    pub fn conversation_not_found() -> Self {
        Self::not_found("conversation_not_found", None, "no such conversation: it never was, or it was deleted")
    }

    pub fn item_not_found(param: Option<&str>) -> Self {
        Self::not_found("item_not_found", param, "the conversation has no such item")
    }

    pub fn response_not_found() -> Self {
        Self::not_found(
            "response_not_found",
            None,
            "no such response: it never was, was deleted or not stored, or is forgotten",
        )
    }

    pub fn idempotency_in_progress() -> Self {
        let message = "the request with this `Idempotency-Key` is running; retry in a moment for its result";
        let error = Self::new(StatusCode::CONFLICT, "conflict_error", "idempotency_in_progress", message);
        Self { retry_after: Some(Duration::from_secs(1)), should_retry: Some(true), ..error }
    }

    pub fn idempotency_key_reused() -> Self {
        let message = "another request had this `Idempotency-Key`; a key names one request, with one body";
        Self::bad_request("idempotency_key_reused", Some("Idempotency-Key"), message)
    }

    /// 401; every route that takes a key.
    pub fn invalid_api_key(message: String) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, INVALID_REQUEST, "invalid_api_key", message)
    }

    /// 403: the key is good, and not for this.
    pub fn forbidden(code: &'static str, message: String) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", code, message)
    }

    pub fn login_required() -> Self {
        Self::invalid_api_key("log in at /admin, or send an admin key as `Authorization: Bearer <key>`".to_owned())
    }

    pub fn invalid_admin_key() -> Self {
        let message = "this is no admin key: that of the tenants file, or the one in `admin.key` of the data folder";
        Self::new(StatusCode::UNAUTHORIZED, INVALID_REQUEST, "invalid_admin_key", message)
    }

    pub fn too_many_tries(wait: Duration) -> Self {
        let message = "too many wrong keys from this address; wait a little";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "too_many_tries", message);
        Self { retry_after: Some(wait), ..error }
    }

    pub fn too_many_streams() -> Self {
        let message = "this login follows the server in enough tabs already; close one";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "too_many_streams", message);
        Self { retry_after: Some(Duration::from_secs(5)), ..error }
    }

    pub fn csrf_failed(message: &str) -> Self {
        Self::forbidden("csrf_failed", message.to_owned())
    }

    pub fn read_only() -> Self {
        Self::forbidden("read_only", "the dashboard is read-only here: `admin.read_only` is set".to_owned())
    }

    pub fn session_changed() -> Self {
        let message = "the conversation has changed since it was shown; look again, and then decide";
        Self::new(StatusCode::CONFLICT, "conflict_error", "session_changed", message)
    }

    pub fn stateless_session() -> Self {
        let message = "this is the KV of a chat that its client sends whole each time: no conversation is stored, so there is \
                       nothing to act on, and the evictor takes it when it is in the way";
        Self::new(StatusCode::CONFLICT, "conflict_error", "stateless_session", message)
    }

    pub fn not_possible(message: &str) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict_error", "not_possible", message)
    }

    pub fn undo_expired() -> Self {
        Self::not_found("undo_expired", None, "it can't be taken back any more")
    }

    pub fn replay_running() -> Self {
        let message = "another replay runs; ask again when it is done";
        let error = Self::new(StatusCode::CONFLICT, "conflict_error", "replay_running", message);
        Self { retry_after: Some(Duration::from_secs(2)), ..error }
    }

    pub fn nothing_recorded(reason: String) -> Self {
        Self::not_found("nothing_recorded", None, reason)
    }

    pub fn model_not_allowed(model: &str) -> Self {
        let message = format!("this tenant may not use the model `{model}`; ask who runs this server");
        Self { param: Some("model".into()), ..Self::forbidden("model_not_allowed", message) }
    }

    pub fn unknown_url(method: &str, path: &str) -> Self {
        let path: String = path.chars().take(256).collect();
        Self::not_found("unknown_url", None, format!("there is no route for {method} {path}; /docs lists all"))
    }

    /// 405; `allow` lists the methods of the route.
    pub fn method_not_allowed(method: &str, allow: &'static str) -> Self {
        let message = format!("{method} is not allowed on this route; it takes {allow}");
        let error = Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID_REQUEST, "method_not_allowed", message);
        Self { allow: Some(allow), ..error }
    }

    pub fn upgrade_required() -> Self {
        let message = "GET on this route is the WebSocket mode, which begins with an upgrade; POST over HTTP instead";
        Self::new(StatusCode::UPGRADE_REQUIRED, INVALID_REQUEST, "upgrade_required", message)
    }

    /// An upgrade that is none.
    pub fn bad_handshake(reason: &str) -> Self {
        Self::bad_request("invalid_value", None, format!("the upgrade to a WebSocket is malformed: {reason}"))
    }

    /// A page that the server does not know may not open sockets in the name of who looks at it.
    pub fn origin_not_allowed() -> Self {
        let message = "pages of this origin may not open sockets; `api.cors.allow_origins` lists those that may";
        Self::new(StatusCode::FORBIDDEN, "permission_error", "origin_not_allowed", message)
    }

    /// On a socket: enough waits already.
    pub fn too_many_pending(message: String) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "too_many_pending", message)
    }

    /// On a socket: it is too old for new turns.
    pub fn connection_limit_reached(max_age: Duration) -> Self {
        let message = format!("a socket lives for {} s at most; open another for new turns", max_age.as_secs());
        Self::bad_request("websocket_connection_limit_reached", None, message)
    }

    pub fn body_timeout(limit: Duration) -> Self {
        let message = format!("the body did not arrive within {} s", limit.as_secs());
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID_REQUEST, "request_timeout", message)
    }

    pub fn body_broken(reason: &str) -> Self {
        Self::bad_request("invalid_json", None, format!("the body could not be read: {reason}"))
    }

    pub fn too_large(limit_bytes: usize) -> Self {
        let message = format!("the body is larger than {limit_bytes} bytes, the limit `api.limits.body_bytes`");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID_REQUEST, "request_too_large", message)
    }

    pub fn media_type(found: &str) -> Self {
        let found: String = found.chars().take(128).collect();
        let message = format!("the body must be application/json, plainly encoded in UTF-8, and is {found}");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID_REQUEST, "unsupported_media_type", message)
    }

    pub fn headers_too_large(limit_bytes: usize) -> Self {
        let message = format!("the headers are larger than {limit_bytes} bytes");
        Self::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, INVALID_REQUEST, "headers_too_large", message)
    }

    /// 500. What went wrong is in the log, under the request's id.
    pub fn internal() -> Self {
        let message =
            "the server failed to handle this request; its log says why, under the x-request-id of this answer";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER_ERROR, "internal_error", message)
    }

    /// Once the user's items are stored a blind retry would append them twice.
    pub fn after_storing(mut self) -> Self {
        if self.status.is_server_error() {
            self.should_retry = Some(false);
        }
        self
    }

    /// The same refusal, said of another field.
    pub fn of_param(mut self, from: &str, to: &str) -> Self {
        if self.param.as_deref() == Some(from) {
            self.param = Some(to.to_owned());
        }
        self
    }

    /// The same, said of a field.
    pub fn about(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }

    pub fn code(&self) -> &'static str {
        self.code
    }

    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The `error` object.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }

    /// `response.error`, whose codes are a closed set in the SDKs: ours goes into the message.
    pub fn as_response_error(&self) -> Value {
        let code = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_exceeded",
            StatusCode::BAD_REQUEST => "invalid_prompt",
            _ => "server_error",
        };
        json!({"code": code, "message": format!("{} ({})", self.message, self.code)})
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status).json(self.body());
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            // Rounded up, so that whoever waits for so long is let in.
            let ms = wait.as_micros().div_ceil(1000) as u64;
            headers.insert(RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000)));
            headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(ms));
        }
        if let Some(retry) = self.should_retry {
            let value = HeaderValue::from_static(if retry { "true" } else { "false" });
            headers.insert(HeaderName::from_static("x-should-retry"), value);
        }
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.status == StatusCode::UPGRADE_REQUIRED {
            headers.insert(actix_web::http::header::UPGRADE, HeaderValue::from_static("websocket"));
        }
        response
    }
}

impl From<TurnError> for ApiError {
    fn from(error: TurnError) -> Self {
        let message = error.to_string();
        match error {
            TurnError::NoConversation => Self { param: Some("conversation".into()), ..Self::conversation_not_found() },
            TurnError::NoPrevious => {
                Self::bad_request("previous_response_not_found", Some("previous_response_id"), message)
            }
            TurnError::TooManyItems { .. } => Self::bad_request("array_above_max_length", Some("input"), message),
            TurnError::Locked { .. } => Self {
                retry_after: Some(Duration::from_secs(1)),
                ..Self::bad_request("conversation_locked", Some("conversation"), message)
            },
            TurnError::DuplicateItem(_) => Self::bad_request("duplicate_item", Some("input"), message),
            TurnError::NothingToAnswer => Self { message, ..Self::missing("input") },
            TurnError::ContextLength { prompt, window } => Self::bad_request(
                "context_length_exceeded",
                None,
                format!(
                    "The prompt is too long: {prompt} tokens; it exceeds the context window, this model's maximum context \
                     length is {window} tokens (context_length_exceeded). Shorten the input, or start a new conversation."
                ),
            ),
            TurnError::Template(_) => Self::unsupported_value("messages", message),
            TurnError::Overloaded(_) => Self::unavailable("engine_overloaded", message, Duration::from_secs(1)),
            TurnError::QueueTimeout(_) => Self::unavailable("queue_timeout", message, Duration::from_secs(5)),
            TurnError::TooManyTurns(_) => Self {
                retry_after: Some(Duration::from_secs(1)),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "concurrency_limit_exceeded", message)
            },
            TurnError::Store(reason) => Self::store_unavailable(&reason),
            TurnError::Draining => Self::unavailable("draining", message, Duration::from_secs(5)),
            TurnError::Lost(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER_ERROR, "internal_error", message),
            TurnError::Internal(reason) => {
                tracing::error!(reason, "a turn failed inside");
                Self::internal()
            }
        }
    }
}

impl From<SocketsExceeded> for ApiError {
    fn from(exceeded: SocketsExceeded) -> Self {
        let message = exceeded.to_string();
        Self {
            retry_after: Some(Duration::from_secs(5)),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "concurrency_limit_exceeded", message)
        }
    }
}

impl From<RateExceeded> for ApiError {
    fn from(exceeded: RateExceeded) -> Self {
        let limit = exceeded.left.limit;
        let message = match exceeded.retry_after {
            Some(wait) => format!(
                "this tenant may send {} a minute, all spent; retry in {} ms",
                counted(limit, "request", "requests"),
                wait.as_millis()
            ),
            None => "this tenant may send no requests; ask who runs this server".to_owned(),
        };
        let should_retry = exceeded.retry_after.is_none().then_some(false);
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", "rate_limit_exceeded", message);
        Self { retry_after: exceeded.retry_after, should_retry, ..error }
    }
}

impl From<SessionError> for ApiError {
    fn from(error: SessionError) -> Self {
        let message = error.to_string();
        match error {
            SessionError::NoConversation => Self::conversation_not_found(),
            SessionError::NoResponse => Self::response_not_found(),
            SessionError::TooManyItems { .. } => Self::bad_request("array_above_max_length", Some("items"), message),
            SessionError::NoItem(_) => Self::item_not_found(None),
            SessionError::DuplicateItem(_) => Self::bad_request("duplicate_item", Some("items"), message),
            SessionError::Busy => Self {
                should_retry: Some(false),
                ..Self::new(StatusCode::CONFLICT, "conflict_error", "conversation_busy", message)
            },
            SessionError::PinBudget(_) => Self {
                should_retry: Some(false),
                ..Self::new(StatusCode::CONFLICT, "conflict_error", "pin_budget_exceeded", message)
            },
            SessionError::Overloaded(_) => Self::unavailable("engine_overloaded", message, Duration::from_secs(1)),
            SessionError::Store(reason) => Self::store_unavailable(&reason),
            SessionError::Internal(reason) => {
                tracing::error!(reason, "a session failed inside");
                Self::internal()
            }
        }
    }
}

impl ApiError {
    fn store_unavailable(reason: &str) -> Self {
        tracing::error!(reason, "the store failed");
        Self::unavailable(
            "store_unavailable",
            "the store can't be reached; nothing was changed",
            Duration::from_secs(5),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenants::quota::{RequestsLeft, TurnsExceeded};
    use crate::types::TokenCount;

    fn header<'a>(response: &'a HttpResponse, name: &str) -> Option<&'a str> {
        response.headers().get(name).map(|value| value.to_str().unwrap())
    }

    #[test]
    fn every_turn_error_has_its_status_code_and_param() {
        let (prompt, window) = (TokenCount(5120), TokenCount(4096));
        let table: Vec<(TurnError, u16, &str, Option<&str>)> = vec![
            (TurnError::NoConversation, 404, "conversation_not_found", Some("conversation")),
            (TurnError::NoPrevious, 400, "previous_response_not_found", Some("previous_response_id")),
            (TurnError::TooManyItems { items: 9, most: 8 }, 400, "array_above_max_length", Some("input")),
            (TurnError::Lost("cut".into()), 500, "internal_error", None),
            (TurnError::Locked { waiting: 4 }, 400, "conversation_locked", Some("conversation")),
            (TurnError::DuplicateItem("msg_1".into()), 400, "duplicate_item", Some("input")),
            (TurnError::NothingToAnswer, 400, "missing_required_parameter", Some("input")),
            (TurnError::ContextLength { prompt, window }, 400, "context_length_exceeded", None),
            (TurnError::Template("no".into()), 400, "unsupported_value", Some("messages")),
            (TurnError::Overloaded("full".into()), 503, "engine_overloaded", None),
            (TurnError::QueueTimeout("late".into()), 503, "queue_timeout", None),
            (TurnError::TooManyTurns(TurnsExceeded { limit: 2 }), 429, "concurrency_limit_exceeded", None),
            (TurnError::Store("gone".into()), 503, "store_unavailable", None),
            (TurnError::Draining, 503, "draining", None),
            (TurnError::Internal("bug".into()), 500, "internal_error", None),
        ];
        for (error, status, code, param) in table {
            let mapped = ApiError::from(error.clone());
            assert_eq!((mapped.status().as_u16(), mapped.code(), mapped.param()), (status, code, param), "{error:?}");
            let waits = header(&mapped.error_response(), "retry-after").is_some();
            assert_eq!(waits, [429, 503].contains(&status) || code == "conversation_locked", "{error:?}");
        }
    }

    #[test]
    fn the_overflow_sentence_has_the_words_that_clients_look_for() {
        let (prompt, window) = (TokenCount(5120), TokenCount(4096));
        let message = ApiError::from(TurnError::ContextLength { prompt, window }).to_string();
        let start = "The prompt is too long: 5120 tokens; it exceeds the context window, this model's maximum context \
                     length is 4096 tokens (context_length_exceeded). Shorten ";
        assert!(message.starts_with(start), "{message}");
    }

    #[test]
    fn a_refusal_that_passes_says_when_and_a_conflict_says_not_to_retry() {
        let locked = ApiError::from(TurnError::Locked { waiting: 1 }).error_response();
        assert_eq!((header(&locked, "retry-after"), header(&locked, "retry-after-ms")), (Some("1"), Some("1000")));
        let busy = ApiError::from(SessionError::Busy).error_response();
        assert_eq!((busy.status().as_u16(), header(&busy, "x-should-retry")), (409, Some("false")));
        let stored = ApiError::internal().after_storing().error_response();
        assert_eq!(header(&stored, "x-should-retry"), Some("false"));
        assert_eq!(header(&ApiError::missing("a").after_storing().error_response(), "x-should-retry"), None);
    }

    #[test]
    fn a_spent_rate_says_exactly_when_and_a_rate_of_none_not_to_retry() {
        let left = RequestsLeft { limit: 2, remaining: 0, reset: Duration::from_secs(60) };
        let spent = RateExceeded { left, retry_after: Some(Duration::from_micros(1_200_400)) };
        let response = ApiError::from(spent).error_response();
        assert_eq!((header(&response, "retry-after"), header(&response, "retry-after-ms")), (Some("2"), Some("1201")));
        let never = ApiError::from(RateExceeded { left, retry_after: None }).error_response();
        assert_eq!((header(&never, "retry-after"), header(&never, "x-should-retry")), (None, Some("false")));
    }

    #[test]
    fn the_body_always_has_four_keys() {
        let body = ApiError::internal().body();
        let keys: Vec<_> = body["error"].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(!body["error"]["message"].as_str().unwrap().is_empty());
    }
}
