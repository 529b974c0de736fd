//! What if the policy or the memory had been another?
//!
//! The flight record, replayed by the real core: as it was recorded, for what really happened, and under the settings that
//! are asked for. What counts is the record's last hour; what came before fills memory. In a process of its own, of the
//! lowest priority, so that it takes neither time nor memory from the engine; it ends when whoever asked goes away.

use std::collections::HashMap;
use std::process::Stdio;
use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Map, Value, json};
use tokio::process::Command;

use super::turns::{Spread, spread};
use super::view::View;
use super::{Api, Dashboard};
use crate::api::body;
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::engine::status::EngineStatus;
use crate::types::{TenantId, counted};

const PATIENCE: Duration = Duration::from_secs(120);
/// What of the record counts.
const HOUR_S: u64 = 3600;

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
    let given = given(&mut fields, &dashboard.inner.read(|view| view.names.clone()))?;
    other.extend(given);
    let Some(_alone) = dashboard.inner.replaying.try_acquire().ok() else { return Err(ApiError::replay_running()) };
    let speeds = [
        ("--prefill-per-s", Some(status.encoding.first_per_s)),
        ("--prefill-doubles-at", status.encoding.doubles_at.map(|at| at.0.into())),
        ("--reload-per-s", Some(status.reload_bytes_per_s)),
        ("--load-per-s", Some(status.load_bytes_per_s)),
    ];
    let speeds: Vec<String> =
        speeds.into_iter().filter_map(|(flag, seen)| Some([flag.to_owned(), seen?.to_string()])).flatten().collect();
    let base = run(&dashboard, &speeds).await?;
    let sim = if other.is_empty() { base.clone() } else { run(&dashboard, &[speeds, other].concat()).await? };
    let answer = dashboard.inner.read(|view| answer(view, &status, &base, &sim));
    Ok(HttpResponse::Ok().json(answer))
}

/// Floors and ceilings of tenants, by their names, as arguments that have the engine's numbers.
fn given(fields: &mut Fields<'_>, names: &HashMap<TenantId, String>) -> Result<Vec<String>, ApiError> {
    let Some(tenants) = fields.object("tenants")? else { return Ok(Vec::new()) };
    let mut arguments = Vec::new();
    for (name, value) in tenants.pairs() {
        let path = tenants.path(name);
        let Some((id, _)) = names.iter().find(|(_, known)| *known == name) else {
            let mut known: Vec<&str> = names.values().map(String::as_str).collect();
            known.sort_unstable();
            known.truncate(10);
            let known = known.join(", ");
            return Err(ApiError::invalid_value(&path, format!("there is no tenant `{name}` here; known are {known}")));
        };
        let mut parts = Fields::at(path, value)?;
        let floor = parts.integer_in("floor", 0..=i64::MAX)?;
        let ceiling = parts.integer_in("ceiling", 0..=i64::MAX)?;
        if floor.zip(ceiling).is_some_and(|(floor, ceiling)| floor > ceiling) {
            let message = format!("the floor of `{name}` is above its ceiling");
            return Err(ApiError::invalid_value(&parts.path("floor"), message));
        }
        if floor.is_some() || ceiling.is_some() {
            let bytes = |part: Option<i64>| part.map_or(String::new(), |bytes| bytes.to_string());
            arguments.extend(["--tenant".to_owned(), format!("{}={}:{}", id.0, bytes(floor), bytes(ceiling))]);
        }
    }
    Ok(arguments)
}

/// One replay in a process of its own.
async fn run(dashboard: &Dashboard, arguments: &[String]) -> Result<Value, ApiError> {
    let program = std::env::current_exe().map_err(|_| ApiError::internal())?;
    let child = Command::new("nice")
        .args(["-n", "19"])
        .arg(program)
        .args(["replay", "--json", "--last", &HOUR_S.to_string(), "--data-dir"])
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

fn answer(view: &View<'_>, status: &EngineStatus, base: &Value, sim: &Value) -> Value {
    let window = &base["record"]["counted"];
    let (from, to) = (window["from_ms"].as_i64().unwrap_or(0), window["to_ms"].as_i64().unwrap_or(0));
    // What was measured is known by the time of the first token, which comes after the turn.
    let measured: Vec<_> = view.books.turns.since_tick(view.books.tick(from)).collect();
    let measured_of = |tenant: Option<TenantId>| {
        let of = measured.iter().filter(|first| tenant.is_none_or(|tenant| tenant == first.tenant));
        spread(of.map(|first| first.ttft_ms).collect())
    };
    let mut really = shown(base);
    if let Value::Object(fields) = &mut really {
        let Spread { p50_ms, p95_ms, turns } = measured_of(None);
        let told = (turns > 0).then(|| json!({"p50_ms": p50_ms, "p95_ms": p95_ms, "turns": turns}));
        fields.insert("measured".into(), told.into());
    }
    let numbers = base["tenants"].as_array().map_or(0, Vec::len);
    let numbers = (0..numbers).filter(|number| base["tenants"][*number]["requests"].as_u64() > Some(0));
    let mut by_tenant: Vec<Value> = numbers
        .map(|number| {
            let (base, sim) = (&base["tenants"][number], &sim["tenants"][number]);
            let id = TenantId(u32::try_from(number).unwrap_or(u32::MAX));
            json!({
                "id": view.name(id),
                "turns": base["requests"],
                "base_ms": base["ttft"]["p95_ms"],
                "sim_ms": sim["ttft"]["p95_ms"],
                "base_reencoded_tokens": base["reencoded_tokens"],
                "sim_reencoded_tokens": sim["reencoded_tokens"],
                "measured_ms": measured_of(Some(id)).p95_ms,
            })
        })
        .collect();
    by_tenant.sort_by_key(|tenant| std::cmp::Reverse(tenant["base_ms"].as_u64()));
    json!({
        "window": {
            "from": from,
            "to": to,
            "turns": window["turns"],
            "trace": format!("{} of the flight record", counted(runs(base), "run", "runs")),
            "faults": base["record"]["faults"],
        },
        "seen": {
            "prefill_tokens_per_s": status.encoding.first_per_s,
            "prefill_doubles_at": status.encoding.doubles_at.map(|at| at.0),
            "reload_bytes_per_s": status.reload_bytes_per_s,
            "load_bytes_per_s": status.load_bytes_per_s,
        },
        "base": really,
        "sim": shown(sim),
        "by_tenant": by_tenant,
        "assumptions": assumptions(status, base, sim),
    })
}

/// Of how many processes the record is.
fn runs(of: &Value) -> u64 {
    of["record"]["runs"].as_u64().unwrap_or(0)
}

/// What a replay came to.
fn shown(of: &Value) -> Value {
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
        "replayed": of["record"]["replayed"],
        "ttft": of["ttft"],
    })
}

/// How the figures came about, in sentences.
fn assumptions(status: &EngineStatus, base: &Value, sim: &Value) -> String {
    let is_recorded = |of: &Value| of["record"]["replayed"] == "as_recorded";
    let how = match (is_recorded(base), is_recorded(sim)) {
        (true, true) => "As it was recorded: the same decisions, entry for entry.",
        (true, false) => {
            "What happened is replayed as it was recorded, decision for decision; what if: the same turns at the same times, as \
             if memory had been empty at the record's first and the server never restarted."
        }
        (false, _) => {
            "The record can't be replayed as it was recorded (a beginning or some steps are missing, or another version wrote \
             it), so that both are: the same turns at the same times, under these settings or those, as if memory had been empty \
             at the record's first and the server never restarted."
        }
    };
    let mut told = vec![how.to_owned()];
    if [base, sim].iter().any(|of| of["ttft"].is_null()) {
        let has = |tier: &str| [base, sim].iter().any(|of| of["hit_share"][tier].as_f64() > Some(0.0));
        let unknown = if status.encoding.first_per_s == 0 {
            "it has encoded nothing yet"
        } else if status.reload_bytes_per_s == 0 && has("host") {
            "it has brought nothing back from the host yet"
        } else if status.load_bytes_per_s == 0 && has("disk") {
            "it has loaded nothing from disk yet"
        } else {
            "no turn counts"
        };
        told.push(format!(
            "Times to first tokens can't be foretold of all that this server would do, since {unknown}."
        ));
    } else {
        told.push(
            "Times to first tokens are foretold for both alike: tokens to encode by the encoding rate that this server has \
             seen at their place in the prompt, and bytes over its tiers' rates; no turn waits for another, so that what was measured may be longer."
                .to_owned(),
        );
    }
    if runs(base) > 1 {
        told.push(
            "Tenants are known by their numbers of today: where a run before had another tenants file, they may be others' there."
                .to_owned(),
        );
    }
    told.join(" ")
}
