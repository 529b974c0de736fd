//! Which models are served, and is the server alive, ready, and how does it do?
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use actix_web::http::header::CONTENT_TYPE;
use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

use super::auth::{self, Caller};
use super::error::ApiError;
use super::{ApiSettings, ApiState};

/// GET `/v1/models`.
pub async fn models(state: web::Data<ApiState>, caller: Caller) -> HttpResponse {
    let served = Some(entry(&state.settings)).filter(|_| caller.may_use(&state.settings.model));
    HttpResponse::Ok().json(json!({"object": "list", "data": served.as_slice()}))
}

/// GET `/v1/models/{id}`; ids may hold `/`.
pub async fn model(
    id: web::Path<String>,
    state: web::Data<ApiState>,
    caller: Caller,
) -> Result<HttpResponse, ApiError> {
    if *id != state.settings.model {
        return Err(ApiError::model_not_found(&id, &state.settings.model));
    }
    auth::check_model(&caller, &state.settings)?;
    Ok(HttpResponse::Ok().json(entry(&state.settings)))
}

fn entry(settings: &ApiSettings) -> Value {
    json!({
        "id": settings.model,
        "object": "model",
        "created": settings.created_at,
        "owned_by": "rekindle",
        "name": settings.model,
        "context_length": settings.context_length.0,
        "max_model_len": settings.window.0,
    })
}

/// GET `/healthz`: the process lives.
pub async fn healthz() -> HttpResponse {
    HttpResponse::Ok().json(json!({"status": "ok"}))
}

/// GET `/readyz`: model loaded, store reachable, engine stepping, not draining.
pub async fn readyz(state: web::Data<ApiState>) -> HttpResponse {
    let reasons = (state.not_ready)().await;
    if reasons.is_empty() {
        HttpResponse::Ok().json(json!({"status": "ready", "reasons": []}))
    } else {
        HttpResponse::ServiceUnavailable().json(json!({"status": "not_ready", "reasons": reasons}))
    }
}

/// GET `/metrics`, in the Prometheus text format.
pub async fn metrics(state: web::Data<ApiState>) -> HttpResponse {
    HttpResponse::Ok().insert_header((CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")).body((state.metrics)())
}
