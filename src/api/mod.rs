//! Which routes does the server have, and what does each handler need?
//!
//! REST and SSE: parse, ask `sessions`, map errors. No policy lives here.

pub mod body;
pub mod chat_completions;
pub mod conversations;
pub mod cors;
pub mod edge;
pub mod error;
pub mod fields;
pub mod idempotency;
pub mod ids;
pub mod input;
pub mod items;
pub mod ops;
pub mod responses;
pub mod sse;
pub mod usage;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use actix_web::HttpRequest;
use actix_web::http::header::HeaderMap;
use actix_web::web::{self, ServiceConfig};

use crate::engine::status::EngineStatus;
use crate::sessions::Sessions;
use crate::tenants::Tenant;
use crate::types::TokenCount;
use error::ApiError;

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
    /// Silence on a stream after which a comment is sent.
    pub keep_alive: Duration,
}

pub type Reasons = Pin<Box<dyn Future<Output = Vec<String>> + Send>>;

/// What every handler may use. Cheap to share.
pub struct ApiState {
    pub sessions: Sessions,
    pub tenant: Tenant,
    pub settings: ApiSettings,
    /// The engine's newest snapshot.
    pub status: Arc<dyn Fn() -> Arc<EngineStatus> + Send + Sync>,
    /// Why the server is not ready; empty when it is.
    pub not_ready: Arc<dyn Fn() -> Reasons + Send + Sync>,
    /// The metrics page.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
}

macro_rules! resource {
    ($config:expr, $path:expr, $allow:literal, $($route:expr),+) => {
        $config.service(web::resource($path)$(.route($route))+.default_service(web::to(|request: HttpRequest| async move {
            Err::<actix_web::HttpResponse, _>(ApiError::method_not_allowed(request.method().as_str(), $allow))
        })))
    };
}

async fn unknown_url(request: HttpRequest) -> Result<actix_web::HttpResponse, ApiError> {
    Err(ApiError::unknown_url(request.method().as_str(), request.path()))
}

/// Adds every route to an app whose data has an `ApiState`. `bare_paths`: those under `/v1` answer without it too.
pub fn routes(config: &mut ServiceConfig, bare_paths: bool) {
    routes_under(config, "/v1");
    resource!(config, "/healthz", "GET, HEAD", web::get().to(ops::healthz), web::head().to(ops::healthz));
    resource!(config, "/readyz", "GET, HEAD", web::get().to(ops::readyz), web::head().to(ops::readyz));
    resource!(config, "/metrics", "GET", web::get().to(ops::metrics));
    if bare_paths {
        routes_under(config, "");
    }
    config.default_service(web::to(unknown_url));
}

fn routes_under(config: &mut ServiceConfig, root: &str) {
    let under = |path: &str| format!("{root}{path}");
    resource!(config, under("/chat/completions"), "POST", web::post().to(chat_completions::create));
    resource!(
        config,
        under("/responses"),
        "GET, POST",
        web::post().to(responses::create),
        web::get().to(responses::upgrade)
    );
    resource!(config, under("/responses/input_tokens"), "POST", web::post().to(responses::count));
    // A word that is no id: its route is not there.
    config.service(web::resource(under("/responses/compact")).to(unknown_url));
    resource!(
        config,
        under("/responses/{id}"),
        "GET, DELETE",
        web::get().to(responses::get),
        web::delete().to(responses::delete)
    );
    resource!(config, under("/responses/{id}/cancel"), "POST", web::post().to(responses::cancel));
    resource!(config, under("/responses/{id}/input_items"), "GET", web::get().to(responses::input_items));
    resource!(
        config,
        under("/conversations"),
        "GET, POST",
        web::get().to(conversations::list),
        web::post().to(conversations::create)
    );
    resource!(
        config,
        under("/conversations/{id}"),
        "GET, POST, DELETE",
        web::get().to(conversations::get),
        web::post().to(conversations::set_metadata),
        web::delete().to(conversations::delete)
    );
    resource!(
        config,
        under("/conversations/{id}/items"),
        "GET, POST",
        web::get().to(conversations::list_items),
        web::post().to(conversations::add_items)
    );
    resource!(
        config,
        under("/conversations/{id}/items/{item}"),
        "GET, DELETE",
        web::get().to(conversations::get_item),
        web::delete().to(conversations::delete_item)
    );
    resource!(config, under("/conversations/{id}/residency"), "GET", web::get().to(conversations::residency));
    resource!(config, under("/conversations/{id}/offload"), "POST", web::post().to(conversations::offload));
    resource!(config, under("/models"), "GET", web::get().to(ops::models));
    resource!(config, under("/models/{id:.+}"), "GET", web::get().to(ops::model));
}

/// How long a request may queue: the server's deadline, or the client's own patience where that is shorter.
fn queue_deadline(headers: &HeaderMap, settings: &ApiSettings) -> Duration {
    let patience = headers.get("x-stainless-read-timeout").and_then(|value| value.to_str().ok()?.parse::<f64>().ok());
    let patience = patience.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    patience.filter(|patience| !patience.is_zero()).map_or(settings.queue_deadline, |p| p.min(settings.queue_deadline))
}

/// Seconds since 1970.
fn unix_now() -> i64 {
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
            keep_alive: Duration::from_secs(15),
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
