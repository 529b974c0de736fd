//! What is the bottleneck: memory, compute or transfer?
//!
//! Three pressures, each the part of a limit that is in use, of the last minute; the headline is of the largest. Memory
//! presses when what can't be evicted fills the device, when turns wait for it, when histories are encoded again, or when
//! what was evicted is back at once. Compute presses when a turn always runs and others wait for their rows. Transfer
//! presses when a tier gives bytes as fast as it was seen to, or loads hang.

use serde_json::{Value, json};

use super::books::{Books, Rates};
use crate::engine::status::Path;
use crate::types::{TenantId, Tick, counted};

/// From here on a pressure is worth a word, and from there on it hurts.
const WATCH: f64 = 0.6;
const BAD: f64 = 0.85;
const MINUTE_US: u64 = 60_000_000;

/// Parts of limits, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressures {
    pub memory: f64,
    pub compute: f64,
    pub transfer: f64,
}

/// The headline.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub bottleneck: &'static str,
    pub severity: &'static str,
    pub title: String,
    pub detail: Vec<Value>,
    pub pressures: Pressures,
}

impl Verdict {
    pub fn json(&self, since_ms: i64) -> Value {
        let Pressures { memory, compute, transfer } = self.pressures;
        json!({
            "bottleneck": self.bottleneck,
            "severity": self.severity,
            "title": self.title,
            "detail": self.detail,
            "since": since_ms,
            "pressures": {"memory": round(memory), "compute": round(compute), "transfer": round(transfer)},
        })
    }
}

/// What the minute's figures come to.
pub fn verdict(books: &Books, name: &dyn Fn(TenantId) -> String) -> Verdict {
    let (status, rates) = (&books.status, books.rates(MINUTE_US));
    let device = &status.device;
    let kept = part(
        status.running_blocks.min(u64::from(device.total.0)) + u64::from(device.pinned.0),
        u64::from(device.total.0),
    );
    let turns = books.first_tokens(MINUTE_US);
    let of = |path: Path| turns[path as usize].turns as u64;
    let with_history = of(Path::Hot) + of(Path::Reloaded) + of(Path::Reencoded);
    let again = part(of(Path::Reencoded), with_history);
    let waits = rates.waits > 0;
    // Half of what was evicted being back at once is as bad as it gets.
    let early = rates.early.map_or(0.0, |early| (2.0 * early).min(1.0));
    let memory = kept.max(if with_history >= 5 { again } else { 0.0 }).max(if waits { 0.9 } else { 0.0 }).max(early);
    let waiting_for_rows = status.queued > 0 && !waits;
    let compute = if waiting_for_rows { rates.busy.max(BAD) } else { rates.busy * 0.8 };
    let transfer = transfer(books, &rates);
    let pressures = Pressures { memory: memory.min(1.0), compute: compute.min(1.0), transfer: transfer.min(1.0) };
    let by_size = [("memory", pressures.memory), ("transfer", pressures.transfer), ("compute", pressures.compute)];
    let (bottleneck, most) =
        by_size.into_iter().fold(("none", WATCH), |most, next| if next.1 > most.1 { next } else { most });
    let severity = match most {
        _ if bottleneck == "none" => "ok",
        most if most >= BAD => "bad",
        _ => "watch",
    };
    let title = match bottleneck {
        "memory" if waits => {
            let turns = counted(rates.waits, "turn", "turns");
            format!("Memory: {turns} had to wait for it in the last minute")
        }
        "memory" if again >= WATCH => {
            let turns = counted(with_history, "turn", "turns");
            format!("Memory: {} of {turns} encoded history again", of(Path::Reencoded))
        }
        "memory" if early >= WATCH => "Memory: much of what is evicted is back within a minute".to_owned(),
        "memory" => format!("Memory: running and pinned conversations keep {:.0} % of the device", kept * 100.0),
        "transfer" if rates.stalled_loads > 0 => "Transfer: loads from disk hang".to_owned(),
        "transfer" => format!("Transfer: tiers give {} as fast as they can", bytes_per_s(rates.in_bps)),
        "compute" if waiting_for_rows => {
            format!("Compute: {} for the model", counted(status.queued, "turn waits", "turns wait"))
        }
        "compute" => "Compute: the model is busy all the time".to_owned(),
        _ => "No bottleneck: turns find memory, rows and bytes when they need them".to_owned(),
    };
    let detail = detail(books, &rates, bottleneck, name);
    Verdict { bottleneck, severity, title, detail, pressures }
}

fn transfer(books: &Books, rates: &Rates) -> f64 {
    let status = &books.status;
    let of = |seen: f64, limit: u64| if limit > 0 { seen / limit as f64 } else { 0.0 };
    let from_host = of(rates.in_bps - rates.load_bps, status.reload_bytes_per_s);
    let from_disk = of(rates.load_bps, status.load_bytes_per_s);
    if rates.stalled_loads > 0 { 1.0 } else { from_host.max(from_disk) }
}

fn detail(books: &Books, rates: &Rates, bottleneck: &str, name: &dyn Fn(TenantId) -> String) -> Vec<Value> {
    let mut detail = Vec::new();
    let since = Tick(books.now.0.saturating_sub(MINUTE_US));
    match bottleneck {
        "memory" => {
            let over = books
                .accounts
                .tenants
                .iter()
                .zip(0..)
                .max_by_key(|(account, _)| account.tiers[0].held.bytes.saturating_sub(account.given.ceiling));
            if let Some((account, id)) = over.filter(|(account, _)| account.tiers[0].held.bytes > account.given.ceiling)
            {
                let used = account.tiers[0].held.bytes as f64 / account.given.ceiling.max(1) as f64;
                detail.push(json!({"tenant": name(TenantId(id))}));
                detail.push(json!(format!(" holds {:.0} % of its ceiling and is evicted first. ", used * 100.0)));
            }
            let refused = books.journal.since(since).find(|entry| entry.kind == "refuse");
            if let Some((entry, session)) = refused.and_then(|entry| Some((entry, entry.session?))) {
                detail.push(json!({"session": super::session_id(session)}));
                detail.push(json!(format!(": {} ", entry.sentence)));
            }
            detail.push(json!(format!("{:.1} evictions a minute.", rates.evictions_per_min)));
        }
        "transfer" => detail.push(json!(format!(
            "{} come up and {} go down; {} hung in the last minute.",
            bytes_per_s(rates.in_bps),
            bytes_per_s(rates.out_bps),
            counted(rates.stalled_loads, "load", "loads")
        ))),
        "compute" => detail.push(json!(format!(
            "{} and {}; {} and {} a second.",
            counted(books.status.running, "turn runs", "turns run"),
            counted(books.status.queued, "waits", "wait"),
            counted(rates.prefill_tokens_per_s.round(), "prompt token", "prompt tokens"),
            counted(rates.tokens_per_s.round(), "answer token", "answer tokens")
        ))),
        _ => detail.push(json!(format!(
            "{}; {:.1} evictions a minute.",
            counted(books.status.running, "turn runs", "turns run"),
            rates.evictions_per_min
        ))),
    }
    detail
}

/// Why a tenant's turns are slow, if they are, in a sentence. `window_us`: what its first tokens are taken from.
pub fn slow_because(books: &Books, tenant: TenantId, window_us: u64) -> Option<String> {
    let firsts: Vec<_> = books.turns.since(books.now, window_us).filter(|first| first.tenant == tenant).collect();
    let of = |path: Path| firsts.iter().filter(|first| first.path == path).count();
    let with_history = of(Path::Hot) + of(Path::Reloaded) + of(Path::Reencoded);
    let since = Tick(books.now.0.saturating_sub(window_us));
    let waits: Vec<&str> = books
        .journal
        .since(since)
        .filter(|entry| entry.kind == "refuse" && entry.tenant == Some(tenant))
        .map(|entry| entry.rule)
        .collect();
    let at_ceiling = waits.iter().filter(|rule| **rule == "at_ceiling").count();
    let waits = waits.len();
    let account = books.accounts.tenants.get(tenant.0 as usize)?;
    let percent = |count: usize| count * 100 / with_history.max(1);
    if at_ceiling > 0 {
        return Some(format!("{at_ceiling} of its turns waited at its ceiling, behind its own running turns"));
    }
    if waits > 0 {
        return Some(format!("{waits} of its turns waited for memory that running turns held"));
    }
    if with_history >= 3 && percent(of(Path::Reencoded)) >= 15 {
        return Some(format!(
            "{} % of its turns encoded their history again: no tier had it",
            percent(of(Path::Reencoded))
        ));
    }
    if account.tiers[0].held.bytes > account.given.ceiling && account.given.ceiling > 0 {
        return Some("it is over its ceiling, and evicted first".to_owned());
    }
    if with_history >= 3 && percent(of(Path::Reloaded)) >= 50 {
        return Some(format!(
            "{} % of its turns waited for a reload: it is silent for longer than it stays",
            percent(of(Path::Reloaded))
        ));
    }
    None
}

fn part(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn bytes_per_s(bytes: f64) -> String {
    match bytes {
        bytes if bytes >= 1e9 => format!("{:.1} GB/s", bytes / 1e9),
        bytes => format!("{:.0} MB/s", bytes / 1e6),
    }
}
