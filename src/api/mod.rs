//! What does each handler of the API need?
//!
//! REST and SSE: parse, ask `sessions`, map errors. No policy lives here.

pub mod auth;
pub mod body;
pub mod chat_completions;
pub mod codes;
pub mod conversations;
pub mod cors;
pub mod edge;
pub mod error;
pub mod fields;
pub mod idempotency;
pub mod ids;
pub mod input;
pub mod items;
pub mod openapi;
pub mod ops;
pub mod pinning;
pub mod residency;
pub mod responses;
pub mod routes;
pub mod sse;
mod timing;
pub mod usage;
pub mod warming;
pub mod websocket;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use actix_web::http::header::HeaderMap;

use crate::engine::status::EngineStatus;
use crate::sessions::Sessions;
use crate::tenants::directory::Directory;
use crate::types::TokenCount;

/// What to do with a field that no route knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnknownFields {
    /// Ignored, and named in `x-rekindle-ignored`.
    Ignore,
    /// 400 `unknown_parameter`.
    Refuse,
}

/// How much one request may hold; `api.limits` of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub body_bytes: usize,
    /// Names and values of all headers together.
    pub header_bytes: usize,
    /// One text part, or `instructions`.
    pub text_bytes: usize,
    /// Bytes of the vocabulary's longest token: no text has fewer tokens than it fills.
    pub longest_token_bytes: usize,
    /// The longest sequence that can run here.
    pub window: TokenCount,
    /// Nesting of arrays and objects.
    pub json_depth: usize,
    pub messages: usize,
    /// Items of one `input`.
    pub input_items: usize,
    /// Items of one POST that adds some.
    pub post_items: usize,
    pub body_timeout: Duration,
}

/// What the API must know of the model and of the configuration.
#[derive(Clone, Debug)]
pub struct ApiSettings {
    /// The id of the one model that is served.
    pub model: String,
    /// The longest sequence that the model was trained for.
    pub context_length: TokenCount,
    /// The longest sequence that can run here.
    pub window: TokenCount,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Changes with build, model or kernels: `fp_…`.
    pub system_fingerprint: String,
    /// When the server started, seconds since 1970: the model's `created`.
    pub created_at: i64,
    /// When the engine's tick was 0, microseconds since 1970.
    pub tick_zero_us: i64,
    pub unknown_fields: UnknownFields,
    pub cors: Arc<cors::Cors>,
    pub limits: Limits,
    pub queue_deadline: Duration,
    /// Longest time for which a conversation is pinned.
    pub max_pin_ttl: Duration,
    /// Silence on a stream after which a comment is sent.
    pub keep_alive: Duration,
    pub sockets: websocket::SocketSettings,
}

pub type Reasons = Pin<Box<dyn Future<Output = Vec<String>> + Send>>;

/// What every handler may use. Cheap to share.
pub struct ApiState {
    pub sessions: Sessions,
    pub tenants: Arc<Directory>,
    pub settings: ApiSettings,
    /// The engine's newest snapshot.
    pub status: Arc<dyn Fn() -> Arc<EngineStatus> + Send + Sync>,
    /// Why the server is not ready; empty when it is.
    pub not_ready: Arc<dyn Fn() -> Reasons + Send + Sync>,
    /// The metrics page.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
}

/// How long a request may queue: the server's deadline, or the client's own patience where that is shorter.
fn queue_deadline(headers: &HeaderMap, settings: &ApiSettings) -> Duration {
    let patience = headers.get("x-stainless-read-timeout").and_then(|value| value.to_str().ok()?.parse::<f64>().ok());
    let patience = patience.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    patience.filter(|patience| !patience.is_zero()).map_or(settings.queue_deadline, |p| p.min(settings.queue_deadline))
}

/// Seconds since 1970.
pub fn unix_now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.ok().and_then(|since| i64::try_from(since.as_secs()).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub const LIMITS: Limits = Limits {
        body_bytes: 8 << 20,
        header_bytes: 32 << 10,
        text_bytes: 1 << 20,
        longest_token_bytes: 64,
        window: TokenCount(4096),
        json_depth: 64,
        messages: 4096,
        input_items: 1024,
        post_items: 20,
        body_timeout: Duration::from_secs(30),
    };

    /// Settings as a small server has them.
    pub fn settings() -> ApiSettings {
        ApiSettings {
            model: "smollm2".into(),
            context_length: TokenCount(8192),
            window: TokenCount(4096),
            vocab: 49152,
            system_fingerprint: "fp_test".into(),
            created_at: 1_790_000_000,
            tick_zero_us: 1_790_000_000_000_000,
            unknown_fields: UnknownFields::Ignore,
            cors: Arc::default(),
            limits: LIMITS,
            queue_deadline: Duration::from_secs(60),
            max_pin_ttl: Duration::from_secs(86_400),
            keep_alive: Duration::from_secs(15),
            sockets: websocket::SocketSettings {
                bounds: websocket::Bounds { lanes: 8, depth: 4 },
                message_bytes: 16 << 20,
                max_age: Duration::from_secs(3600),
                idle: Duration::from_secs(600),
            },
        }
    }

    #[test]
    fn nobody_queues_for_longer_than_the_client_waits() {
        let with = |value: &'static str| {
            let mut headers = HeaderMap::new();
            let value = actix_web::http::header::HeaderValue::from_static(value);
            headers.insert(actix_web::http::header::HeaderName::from_static("x-stainless-read-timeout"), value);
            queue_deadline(&headers, &settings())
        };
        assert_eq!(with("5"), Duration::from_secs(5));
        assert_eq!(with("0.5"), Duration::from_millis(500));
        for odd in ["600", "-1", "nan", "inf", "0", "soon"] {
            assert_eq!(with(odd), Duration::from_secs(60), "{odd}");
        }
    }
}
