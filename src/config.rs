//! What can be set, and what is it by default?
//!
//! `config/default.toml` is the one source of defaults and of each key's unit, range and reason. Over it lie a file, the
//! environment, `--set`, and the flags of `serve`, in this order. An unknown key or an impossible value is an error that
//! names the full key and where it came from.
//! Invariant: a `Config` that exists is possible; nobody checks it again.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod bytes;
mod layers;
pub mod tenants;

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::Deserialize;

pub use bytes::Bytes;
pub use layers::{Layers, Source};

use crate::types::KvDtype;

const DEFAULTS: &str = include_str!("../config/default.toml");
const MIB: u64 = 1 << 20;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration file {path} can't be read: {reason}")]
    Unreadable { path: String, reason: String },
    #[error("the configuration file {path} is not TOML: {reason}")]
    Syntax { path: String, reason: String },
    #[error("`{key}` ({from}) is no setting{}", did_you_mean(suggestion.as_deref()))]
    UnknownKey { key: String, from: Source, suggestion: Option<String> },
    #[error("`{key}` ({from}) can't be that: {reason}")]
    Impossible { key: String, from: Source, reason: String },
    #[error("`{0}` is no `key=value`; write for example kv.device_bytes=1GiB")]
    NotAPair(String),
}

fn did_you_mean(suggestion: Option<&str>) -> String {
    match suggestion {
        Some(key) => format!("; did you mean `{key}`?"),
        None => "; config/default.toml lists all".to_owned(),
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub server: Server,
    pub model: Model,
    pub kv: Kv,
    pub engine: Engine,
    pub sessions: Sessions,
    pub store: Store,
    pub api: Api,
    pub ws: WebSocket,
    pub tenants: Tenants,
    pub admin: Admin,
    pub log: Log,
    pub telemetry: Telemetry,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    pub listen: SocketAddr,
    pub data_dir: PathBuf,
    pub drain_deadline_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub path: PathBuf,
    /// `None`: the name in the model file.
    #[serde(deserialize_with = "empty_is_none")]
    pub name: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kv {
    pub device_bytes: Bytes,
    pub host_bytes: Bytes,
    /// 0: there is no disk tier.
    pub disk_bytes: Bytes,
    /// `None`: beside the conversations.
    #[serde(deserialize_with = "empty_is_none")]
    pub disk_dir: Option<PathBuf>,
    pub block_size: u32,
    #[serde(deserialize_with = "kv_dtype")]
    pub dtype: KvDtype,
    pub cold_dtype: ColdDtype,
    pub eviction_policy: EvictionPolicy,
    /// 0: length counts for nothing.
    pub eviction_doubles_at: u32,
    pub background_offload: bool,
    pub journal_entries: usize,
}

/// As what host and disk store KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColdDtype {
    Same,
    Int8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvictionPolicy {
    ReturnRate,
    Lru,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// As set; `thread_count` says what 0 comes to.
    pub threads: usize,
    /// `auto`, or the name of a set of instructions.
    pub instructions: String,
    pub max_running: usize,
    pub step_tokens: u32,
    pub queue_depth: usize,
    pub queue_deadline_s: u64,
    pub reuse: bool,
    /// 0: none is kept.
    pub flight_record_bytes: Bytes,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sessions {
    pub queue_depth: usize,
    pub idle_s: u64,
    pub max_live: usize,
    pub recalled_tokens: usize,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    pub response_ttl_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Api {
    pub default_max_tokens: u32,
    pub unknown_fields: UnknownFields,
    pub bare_paths: bool,
    pub cors: Cors,
    pub limits: Limits,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cors {
    pub allow_origins: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebSocket {
    pub message_bytes: Bytes,
    pub max_lanes: usize,
    pub lane_depth: usize,
    pub max_age_s: u64,
    pub idle_s: u64,
    pub done_after_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenants {
    /// `None`: one tenant, for whoever can reach the port.
    #[serde(deserialize_with = "empty_is_none")]
    pub file: Option<PathBuf>,
    pub max_pin_ttl_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// `None`: the host's.
    #[serde(deserialize_with = "empty_is_none")]
    pub node: Option<String>,
    pub read_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnknownFields {
    Ignore,
    Refuse,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    pub body_bytes: Bytes,
    pub text_bytes: Bytes,
    pub json_depth: usize,
    pub messages: usize,
    pub input_items: usize,
    pub post_items: usize,
    pub conversation_items: usize,
    pub body_timeout_s: u64,
    pub concurrent_turns: u32,
    pub sockets: u32,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub format: LogFormat,
    pub level: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Telemetry {
    /// `None`: no traces.
    #[serde(deserialize_with = "empty_is_none")]
    pub otlp_endpoint: Option<String>,
    pub trace_ratio: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    Text,
    Json,
}

impl Config {
    /// The defaults alone.
    pub fn defaults() -> Result<Self, ConfigError> {
        Layers::defaults()?.build()
    }
}

impl Engine {
    /// Threads that run the model: as set, or one a physical core that this process may use.
    pub fn thread_count(&self) -> usize {
        if self.threads > 0 { self.threads } else { physical_cores() }
    }
}

impl Layers {
    /// All layers as one checked configuration.
    pub fn build(self) -> Result<Config, ConfigError> {
        let config: Config = serde_path_to_error::deserialize(toml::Value::Table(self.table().clone()))
            .map_err(|error| self.impossible(&error.path().to_string(), error.inner().message()))?;
        self.check(&config)?;
        Ok(config)
    }

    fn check(&self, config: &Config) -> Result<(), ConfigError> {
        let Config { server, model, kv, engine, sessions, store, api, ws, tenants, admin: _, log, telemetry } = config;
        if !server.listen.ip().is_loopback() && tenants.file.is_none() {
            let reason = format!(
                "{} can be reached from other machines, and without API keys anyone there could use the server; give \
                 keys with --tenants FILE (config/tenants.example.toml shows how), or listen on 127.0.0.1 or [::1]",
                server.listen.ip()
            );
            return Err(self.impossible("server.listen", &reason));
        }
        self.set("server.data_dir", &server.data_dir)?;
        self.range("server.drain_deadline_s", server.drain_deadline_s, 0..=3600)?;
        self.set("model.path", &model.path)?;
        self.range("kv.device_bytes", kv.device_bytes, Bytes(MIB)..=Bytes(1 << 44))?;
        self.range("kv.host_bytes", kv.host_bytes, Bytes(0)..=Bytes(1 << 44))?;
        self.range("kv.disk_bytes", kv.disk_bytes, Bytes(0)..=Bytes(1 << 48))?;
        if kv.block_size != 16 {
            return Err(self.impossible("kv.block_size", "the CPU kernels work on blocks of 16 tokens"));
        }
        if kv.cold_dtype == ColdDtype::Int8 && kv.dtype != KvDtype::F16 {
            let reason = format!("only f16 is stored as int8 below the device, and `kv.dtype` is {}", kv.dtype);
            return Err(self.impossible("kv.cold_dtype", &reason));
        }
        self.range("kv.eviction_doubles_at", kv.eviction_doubles_at, 0..=1_000_000_000)?;
        self.range("kv.journal_entries", kv.journal_entries, 100..=1_000_000)?;
        self.range("engine.threads", engine.threads, 0..=1024)?;
        self.range("engine.max_running", engine.max_running, 1..=4096)?;
        self.range("engine.step_tokens", engine.step_tokens, 16..=65_536)?;
        self.range("engine.queue_depth", engine.queue_depth, 1..=100_000)?;
        self.range("engine.queue_deadline_s", engine.queue_deadline_s, 1..=3600)?;
        let flight = engine.flight_record_bytes;
        if flight != Bytes(0) {
            self.range("engine.flight_record_bytes", flight, Bytes(MIB)..=Bytes(1 << 34))?;
        }
        self.range("sessions.queue_depth", sessions.queue_depth, 0..=1024)?;
        self.range("sessions.idle_s", sessions.idle_s, 1..=86_400)?;
        self.range("sessions.max_live", sessions.max_live, 1..=1_000_000)?;
        self.range("sessions.recalled_tokens", sessions.recalled_tokens, 0..=1_000_000_000)?;
        self.range("store.response_ttl_s", store.response_ttl_s, 60..=315_360_000)?;
        for origin in &api.cors.allow_origins {
            let scheme = ["http://", "https://"].iter().find_map(|scheme| origin.strip_prefix(scheme));
            if scheme.is_none_or(|host| host.is_empty() || host.contains(['/', '*', ' '])) {
                let reason = format!("`{origin}` is no origin; write for example https://app.example, without a path");
                return Err(self.impossible("api.cors.allow_origins", &reason));
            }
        }
        self.range("api.default_max_tokens", api.default_max_tokens, 1..=1_000_000)?;
        let limits = &api.limits;
        self.range("api.limits.body_bytes", limits.body_bytes, Bytes(1 << 10)..=Bytes(1 << 30))?;
        self.range("api.limits.text_bytes", limits.text_bytes, Bytes(1 << 10)..=Bytes(1 << 30))?;
        self.range("api.limits.json_depth", limits.json_depth, 8..=128)?;
        self.range("api.limits.messages", limits.messages, 1..=100_000)?;
        self.range("api.limits.input_items", limits.input_items, 1..=100_000)?;
        self.range("api.limits.post_items", limits.post_items, 1..=100_000)?;
        self.range("api.limits.conversation_items", limits.conversation_items, 1..=1_000_000)?;
        self.range("api.limits.body_timeout_s", limits.body_timeout_s, 1..=3600)?;
        self.range("api.limits.concurrent_turns", limits.concurrent_turns, 1..=100_000)?;
        self.range("api.limits.sockets", limits.sockets, 0..=100_000)?;
        self.range("ws.message_bytes", ws.message_bytes, Bytes(1 << 10)..=Bytes(1 << 30))?;
        self.range("tenants.max_pin_ttl_s", tenants.max_pin_ttl_s, 1..=31_536_000)?;
        self.range("ws.max_lanes", ws.max_lanes, 1..=64)?;
        self.range("ws.lane_depth", ws.lane_depth, 0..=64)?;
        self.range("ws.max_age_s", ws.max_age_s, 1..=86_400)?;
        self.range("ws.idle_s", ws.idle_s, 1..=86_400)?;
        self.range("ws.done_after_s", ws.done_after_s, 0..=86_400)?;
        crate::telemetry::log::parse_filter(&log.level)
            .map_err(|error| self.impossible("log.level", &error.to_string()))?;
        if let Some(endpoint) = &telemetry.otlp_endpoint {
            let host = ["http://", "https://"].iter().find_map(|scheme| endpoint.strip_prefix(scheme));
            if host.is_none_or(|host| host.is_empty() || host.starts_with('/') || host.contains(['?', '#', ' '])) {
                let reason = format!("`{endpoint}` is no address; write for example http://127.0.0.1:4318");
                return Err(self.impossible("telemetry.otlp_endpoint", &reason));
            }
            if !cfg!(feature = "otel") {
                let reason = "this program was built without the feature `otel`";
                return Err(self.impossible("telemetry.otlp_endpoint", reason));
            }
        }
        self.range("telemetry.trace_ratio", telemetry.trace_ratio, 0.0..=1.0)?;
        Ok(())
    }

    fn set(&self, key: &str, path: &std::path::Path) -> Result<(), ConfigError> {
        if path.as_os_str().is_empty() { Err(self.impossible(key, "it is empty")) } else { Ok(()) }
    }

    fn range<T: PartialOrd + fmt::Display>(
        &self,
        key: &str,
        value: T,
        range: RangeInclusive<T>,
    ) -> Result<(), ConfigError> {
        if range.contains(&value) {
            return Ok(());
        }
        Err(self.impossible(key, &format!("{value} is not within {} to {}", range.start(), range.end())))
    }
}

fn empty_is_none<'de, D: serde::Deserializer<'de>, T: From<String>>(value: D) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(value)?;
    Ok(if text.is_empty() { None } else { Some(text.into()) })
}

fn kv_dtype<'de, D: serde::Deserializer<'de>>(name: D) -> Result<KvDtype, D::Error> {
    let name = String::deserialize(name)?;
    KvDtype::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| {
        let known = KvDtype::ALL.map(|dtype| format!("`{dtype}`")).join(", ");
        serde::de::Error::custom(format!("`{name}` is none of {known}"))
    })
}

/// Two threads of one core share its arithmetic units, so that a second one only gets in the way.
fn physical_cores() -> usize {
    let usable = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let siblings = |cpu: usize| {
        std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).ok()
    };
    let cores: std::collections::BTreeSet<String> = (0..).map_while(siblings).collect();
    if cores.is_empty() { usable } else { usable.min(cores.len()) }
}

#[cfg(test)]
mod tests;
