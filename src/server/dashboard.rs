//! What is the dashboard told of the configuration?

use crate::config::{ColdDtype, Config, EvictionPolicy};
use crate::dashboard::{Active, Settings};
use crate::model::ModelSpec;
use crate::types::TokenCount;

/// Its settings, out of those of the server.
pub(super) fn settings(config: &Config, spec: &ModelSpec, tick_zero_us: i64) -> Settings {
    let kv = &config.kv;
    let policy = match kv.eviction_policy {
        EvictionPolicy::ReturnRate => "return_rate",
        EvictionPolicy::Lru => "lru",
    };
    let cold = match kv.cold_dtype {
        ColdDtype::Same => "same",
        ColdDtype::Int8 => "int8",
    };
    let front_first = match kv.eviction_policy {
        EvictionPolicy::ReturnRate => Some(TokenCount(spec.doubles_at.0 / 2)),
        EvictionPolicy::Lru => None,
    };
    let active = Active {
        policy,
        eviction_doubles_at: Some(kv.eviction_doubles_at).filter(|tokens| *tokens > 0),
        front_first_from: front_first.map(|tokens| tokens.0),
        device_bytes: kv.device_bytes.0,
        host_bytes: kv.host_bytes.0,
        disk_bytes: kv.disk_bytes.0,
        cold_dtype: cold,
        background_offload: kv.background_offload,
    };
    let text = format!(
        "[kv]\ndevice_bytes = \"{}\"\nhost_bytes = \"{}\"\ndisk_bytes = \"{}\"\neviction_policy = \"{policy}\"\neviction_doubles_at = {}\n",
        kv.device_bytes, kv.host_bytes, kv.disk_bytes, kv.eviction_doubles_at
    );
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    Settings {
        node: config.admin.node.clone().unwrap_or_else(host),
        model: config.model.name.clone().unwrap_or_else(|| spec.name.clone()),
        kv_dtype: spec.kv.dtype.name(),
        block_size: kv.block_size,
        active,
        config: text,
        read_only: config.admin.read_only,
        secure_cookie: !config.server.listen.ip().is_loopback(),
        data_dir: config.server.data_dir.clone(),
        tick_zero_us,
    }
}
