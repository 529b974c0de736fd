//! What if the policy or the memory had been another?
//!
//! The flight record, replayed by the real core: as it was recorded, for what really happened, and under the settings that
//! are asked for. In a process of its own, of the lowest priority, so that it takes neither time nor memory from the
//! engine; it ends when whoever asked goes away.

use std::process::Stdio;
use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Map, Value, json};
use tokio::process::Command;

use super::view::View;
use super::{Api, Dashboard};
use crate::api::body;
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::types::TenantId;

const PATIENCE: Duration = Duration::from_secs(120);

/// POST `/admin/api/policy/replay`.
pub async fn replay(
    request: HttpRequest,
    payload: web::Payload,
    api: Api,
    dashboard: web::Data<Dashboard>,
) -> Result<HttpResponse, ApiError> {
    let parsed = body::object(&request, payload, &api.settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let mut other = Vec::new();
    match fields.string("policy")? {
        None => {}
        Some(policy @ ("return_rate" | "lru")) => other.extend(["--policy".to_owned(), policy.to_owned()]),
        Some(_) => return Err(ApiError::invalid_value("policy", "`policy` must be return_rate or lru")),
    }
    let doubles_at = fields.integer_in("eviction_doubles_at", 1..=1_000_000)?;
    if let Some(tokens) = doubles_at {
        other.extend(["--weigh-length".to_owned(), "--doubles-at".to_owned(), tokens.to_string()]);
    }
    let status = dashboard.inner.engine.status();
    for (name, flag, block_bytes) in [
        ("device_bytes", "--device-tokens", status.device.block_bytes),
        ("host_bytes", "--host-tokens", status.host.block_bytes),
        ("disk_bytes", "--disk-tokens", status.disk.block_bytes),
    ] {
        let bytes = fields.integer_in(name, 0..=i64::MAX)?.and_then(|bytes| u64::try_from(bytes).ok());
        if let Some(bytes) = bytes {
            let blocks = bytes.checked_div(block_bytes).unwrap_or(0);
            let tokens = blocks * u64::from(dashboard.inner.settings.block_size);
            other.extend([flag.to_owned(), tokens.to_string()]);
        }
    }
    let Some(_alone) = dashboard.inner.replaying.try_acquire().ok() else { return Err(ApiError::replay_running()) };
    let base = run(&dashboard, &[]).await?;
    let sim = if other.is_empty() { base.clone() } else { run(&dashboard, &other).await? };
    let answer = dashboard.inner.read(|view| answer(view, &base, &sim));
    Ok(HttpResponse::Ok().json(answer))
}

/// One replay in a process of its own.
async fn run(dashboard: &Dashboard, arguments: &[String]) -> Result<Value, ApiError> {
    let program = std::env::current_exe().map_err(|_| ApiError::internal())?;
    let child = Command::new("nice")
        .args(["-n", "19"])
        .arg(program)
        .args(["replay", "--json", "--warm-up", "0", "--data-dir"])
        .arg(&dashboard.inner.settings.data_dir)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let child = child.map_err(|error| {
        tracing::error!(%error, "a replay could not be started");
        ApiError::internal()
    })?;
    let ended = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
    let output = match ended {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            tracing::error!(%error, "a replay failed");
            return Err(ApiError::internal());
        }
        Err(_) => {
            return Err(ApiError::nothing_recorded(format!("the replay took more than {} s", PATIENCE.as_secs())));
        }
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it ended without a word");
        return Err(ApiError::nothing_recorded(reason.trim_start_matches("Error: ").to_owned()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| {
        tracing::error!(%error, "a replay's answer can't be read");
        ApiError::internal()
    })
}

fn answer(view: &View<'_>, base: &Value, sim: &Value) -> Value {
    let now = view.books.ms(view.books.now);
    let span_s = base["record"]["span_s"].as_i64().unwrap_or(0);
    let shown = |of: &Value| {
        let reusable = of["reusable_tokens"].as_f64().unwrap_or(0.0);
        let hits = ["device", "host", "disk"].map(|tier| {
            let tokens = of["hit_share"][tier].as_f64().map(|share| (share * reusable).round());
            (tier.to_owned(), json!(tokens))
        });
        json!({
            "turns": of["requests"],
            "reusable_tokens": of["reusable_tokens"],
            "reencoded_tokens": of["reencoded_tokens"],
            "cached_ratio": of["reencoded_share"].as_f64().map(|share| ((1.0 - share) * 1000.0).round() / 1000.0),
            "evictions": of["evictions"],
            "bytes_moved": of["bytes_moved"]["up"].as_u64().zip(of["bytes_moved"]["down"].as_u64()).map(|(up, down)| up + down),
            "hits": hits.into_iter().collect::<Map<_, _>>(),
        })
    };
    let tenant = |of: &Value, id: usize| of["tenants"][id]["reencoded_tokens"].clone();
    let by_tenant: Vec<Value> = (0..base["tenants"].as_array().map_or(0, Vec::len))
        .filter(|id| base["tenants"][*id]["requests"].as_u64() > Some(0))
        .map(|id| {
            let name = view.name(TenantId(u32::try_from(id).unwrap_or(u32::MAX)));
            json!({"id": name, "base_reencoded_tokens": tenant(base, id), "sim_reencoded_tokens": tenant(sim, id)})
        })
        .collect();
    let assumptions = match sim["record"]["replayed"].as_str() {
        Some("what_if") => {
            "The same turns at the same times, as if memory had been empty at the first and the server never restarted; \
             steps take no time, so that nothing queues."
        }
        _ => "As it was recorded: the same decisions, entry for entry.",
    };
    json!({
        "window": {
            "from": now - span_s * 1000,
            "to": now,
            "turns": base["record"]["turns"],
            "trace": format!("{} runs of the flight record", base["record"]["runs"]),
            "faults": base["record"]["faults"],
        },
        "base": shown(base),
        "sim": shown(sim),
        "by_tenant": by_tenant,
        "assumptions": assumptions,
    })
}
