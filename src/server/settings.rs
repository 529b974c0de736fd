//! What are the engine, the sessions and the API told of the configuration?

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::{HEADER_BYTES, KEEP_ALIVE};
use crate::api::websocket::{Bounds, SocketSettings};
use crate::api::{self, ApiSettings, Limits, UnknownFields};
use crate::config::{self, Config};
use crate::engine::Policy;
use crate::engine::flight::{FLIGHT_FOLDER, FlightSettings};
use crate::engine::thread::{ColdDtype, DiskSettings, EngineSettings};
use crate::model::ModelSpec;
use crate::sessions::SessionSettings;
use crate::types::{BlockSize, KvKey, TenantId, TenantKey, TokenCount};

/// The disk tier, if there is to be one.
pub(super) fn disk_settings(
    config: &Config,
    tenants: Vec<(TenantId, TenantKey)>,
    lives: HashSet<KvKey>,
) -> Option<DiskSettings> {
    let folder = config.kv.disk_dir.clone().unwrap_or_else(|| config.server.data_dir.join("kv"));
    let disk = DiskSettings { folder, bytes: config.kv.disk_bytes.0, tenants, lives };
    Some(disk).filter(|disk| disk.bytes > 0)
}

pub(super) fn engine_settings(config: &Config, disk: Option<DiskSettings>) -> EngineSettings {
    EngineSettings {
        block_size: BlockSize(config.kv.block_size),
        cold: match config.kv.cold_dtype {
            config::ColdDtype::Same => ColdDtype::Same,
            config::ColdDtype::Int8 => ColdDtype::Int8,
        },
        device_bytes: config.kv.device_bytes.0,
        host_bytes: config.kv.host_bytes.0,
        disk,
        background_offload: config.kv.background_offload,
        policy: match config.kv.eviction_policy {
            config::EvictionPolicy::ReturnRate => Policy::ReturnRate,
            config::EvictionPolicy::Lru => Policy::Lru,
        },
        doubles_at: Some(TokenCount(config.kv.eviction_doubles_at)).filter(|length| length.0 > 0),
        journal_entries: config.kv.journal_entries,
        max_running: config.engine.max_running,
        step_tokens: TokenCount(config.engine.step_tokens),
        queue_depth: config.engine.queue_depth,
        reuse: config.engine.reuse,
        flight: Some(FlightSettings {
            folder: config.server.data_dir.join(FLIGHT_FOLDER),
            bytes: config.engine.flight_record_bytes.0,
        })
        .filter(|flight| flight.bytes > 0),
    }
}

pub(super) fn session_settings(config: &Config) -> SessionSettings {
    SessionSettings {
        queue_depth: config.sessions.queue_depth,
        idle: Duration::from_secs(config.sessions.idle_s),
        max_live: config.sessions.max_live as u64,
        default_max_tokens: TokenCount(config.api.default_max_tokens),
        max_items: config.api.limits.conversation_items,
        response_ttl_s: i64::try_from(config.store.response_ttl_s).unwrap_or(i64::MAX),
        recalled_tokens: config.sessions.recalled_tokens,
        done_after: Some(Duration::from_secs(config.ws.done_after_s)).filter(|time| !time.is_zero()),
    }
}

pub(super) fn api_settings(
    config: &Config,
    spec: &ModelSpec,
    window: TokenCount,
    longest_token_bytes: usize,
    tick_zero_us: i64,
) -> ApiSettings {
    let limits = &config.api.limits;
    let bytes = |bytes: config::Bytes| usize::try_from(bytes.0).unwrap_or(usize::MAX);
    ApiSettings {
        model: config.model.name.clone().unwrap_or_else(|| spec.name.clone()),
        context_length: spec.context_length,
        window,
        vocab: spec.vocab,
        system_fingerprint: system_fingerprint(spec, config.kv.cold_dtype),
        created_at: tick_zero_us / 1_000_000,
        tick_zero_us,
        unknown_fields: match config.api.unknown_fields {
            config::UnknownFields::Ignore => UnknownFields::Ignore,
            config::UnknownFields::Refuse => UnknownFields::Refuse,
        },
        cors: Arc::new(api::cors::Cors { allow_origins: config.api.cors.allow_origins.clone() }),
        limits: Limits {
            body_bytes: bytes(limits.body_bytes),
            header_bytes: HEADER_BYTES,
            text_bytes: bytes(limits.text_bytes),
            longest_token_bytes,
            window,
            json_depth: limits.json_depth,
            messages: limits.messages,
            input_items: limits.input_items,
            post_items: limits.post_items,
            body_timeout: Duration::from_secs(limits.body_timeout_s),
        },
        queue_deadline: Duration::from_secs(config.engine.queue_deadline_s),
        max_pin_ttl: Duration::from_secs(config.tenants.max_pin_ttl_s),
        keep_alive: KEEP_ALIVE,
        sockets: SocketSettings {
            bounds: Bounds { lanes: config.ws.max_lanes, depth: config.ws.lane_depth },
            message_bytes: bytes(config.ws.message_bytes),
            max_age: Duration::from_secs(config.ws.max_age_s),
            idle: Duration::from_secs(config.ws.idle_s),
        },
    }
}

/// Changes with the build, with the model and with how KV is stored: answers of two servers with one fingerprint are
/// comparable.
fn system_fingerprint(spec: &ModelSpec, cold: config::ColdDtype) -> String {
    let mut hash = blake3::Hasher::new();
    hash.update(env!("CARGO_PKG_VERSION").as_bytes());
    hash.update(&spec.fingerprint);
    match cold {
        config::ColdDtype::Same => {}
        config::ColdDtype::Int8 => {
            hash.update(b"int8 below the device");
        }
    }
    format!("fp_{}", &hash.finalize().to_hex()[..12])
}
