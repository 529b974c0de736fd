//! What does each page show?
//!
//! The books as the API tells them: no figure is made here that they don't have. Cost: what a page shows, and a look at each
//! tenant.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::books::{Books, predicted_ms};
use super::index::{Row, State};
use super::journal::{self, Entry};
use super::verdict::{Verdict, slow_because};
use super::{Settings, session_id};
use crate::engine::EngineHandle;
use crate::engine::status::accounts::{InLine, TenantAccount};
use crate::engine::status::{Path, PoolStatus, Residency, TierShare};
use crate::sessions::messages::{Predicted, ReturnPath};
use crate::types::{KvKey, TenantId, Tier, TokenCount};

const MINUTE_US: u64 = 60_000_000;
/// What a tenant's turns are looked at over.
const TENANT_WINDOW_US: u64 = 5 * MINUTE_US;
/// Most cells of the map, and most tenants that are told by themselves.
const CELLS: usize = 600;
const TENANTS: usize = 50;
/// Idle times that the lower tiers are told by, and their words.
const AGES_US: [u64; 5] = [MINUTE_US, 5 * MINUTE_US, 15 * MINUTE_US, 60 * MINUTE_US, 360 * MINUTE_US];
const AGES: [&str; 6] = ["<1 m", "1–5 m", "5–15 m", "15–60 m", "1–6 h", ">6 h"];

/// The books, with what it takes to tell of them.
pub struct View<'a> {
    pub books: &'a Books,
    pub engine: &'a EngineHandle,
    pub settings: &'a Settings,
    pub names: &'a HashMap<TenantId, String>,
}

impl View<'_> {
    pub fn name(&self, tenant: TenantId) -> String {
        self.names.get(&tenant).cloned().unwrap_or_else(|| format!("gone-{tenant}"))
    }

    pub fn tenant_named(&self, name: &str) -> Option<TenantId> {
        self.names.iter().find(|(_, known)| *known == name).map(|(id, _)| *id)
    }

    /// GET `/overview`, without `as_of`.
    pub fn overview(&self, verdict: &Verdict, since_ms: i64, is_draining: bool) -> Map<String, Value> {
        let (books, status) = (self.books, &self.books.status);
        let (minute, lately) = (books.rates(MINUTE_US), books.rates(5_000_000));
        let first = books.first_tokens(MINUTE_US);
        let spreads = Path::ALL.iter().map(|path| {
            let spread = first[*path as usize];
            (path.name().to_owned(), json!({"p50_ms": spread.p50_ms, "p95_ms": spread.p95_ms, "turns": spread.turns}))
        });
        let sum = |of: fn(&TenantAccount) -> u64| books.accounts.tenants.iter().map(of).sum::<u64>();
        let saved_us = sum(|tenant| tenant.gains.saved_us);
        let saved_turns = |tenant: &TenantAccount| {
            [Path::Hot, Path::Reloaded].map(|path| tenant.gains.paths[path as usize].turns).iter().sum::<u64>()
        };
        let step_ms =
            (lately.steps_per_s > 0.0 && lately.busy > 0.0).then(|| 1000.0 * lately.busy / lately.steps_per_s);
        let counts = State::ALL.map(|state| (state.name().to_owned(), json!(books.index.count(None, state))));
        let mut sessions: Map<String, Value> = counts.into_iter().collect();
        sessions.insert("pinned".into(), books.index.pinned().into());
        sessions.insert("total".into(), books.index.len().into());
        let uptime_s = self.engine.now().0 / 1_000_000;
        let value = json!({
            "node": {
                "id": self.settings.node,
                "version": env!("CARGO_PKG_VERSION"),
                "uptime_s": uptime_s,
                "state": if is_draining { "draining" } else { "ready" },
            },
            "model": {
                "id": self.settings.model,
                "kv_dtype": self.settings.kv_dtype,
                "bytes_per_token": status.device.block_bytes / u64::from(self.settings.block_size.max(1)),
                "block_size": self.settings.block_size,
            },
            "verdict": verdict.json(since_ms),
            "tiers": self.tiers(),
            "ttft": spreads.collect::<Map<_, _>>(),
            "rates": {
                "tokens_per_s": tenth(lately.tokens_per_s),
                "prefill_tokens_per_s": tenth(lately.prefill_tokens_per_s),
                "evictions_per_min": tenth(minute.evictions_per_min),
                "reload_bps": lately.in_bps.round(),
                "prefill_saved_ratio": minute.saved.map(thousandth),
                "early_return_ratio": books.rates(TENANT_WINDOW_US).early.map(thousandth),
                "queued": status.queued,
                "step_ms": step_ms.map(tenth),
            },
            "seen": {
                "prefill_tokens_per_s": status.prefill_tokens_per_s,
                "reload_bytes_per_s": status.reload_bytes_per_s,
                "load_bytes_per_s": status.load_bytes_per_s,
            },
            "saved": {
                "tokens": sum(|tenant| tenant.gains.prompt.cached_tokens()),
                "device_seconds": tenth(saved_us as f64 / 1e6),
                "turns": books.accounts.tenants.iter().map(saved_turns).sum::<u64>(),
            },
            "sessions": sessions,
            "isolation_faults": status.isolation_faults,
        });
        match value {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }

    fn tiers(&self) -> Vec<Value> {
        let (status, accounts) = (&self.books.status, &self.books.accounts);
        let rates = self.books.rates(5_000_000);
        let pools = [(Tier::Device, &status.device), (Tier::Host, &status.host), (Tier::Disk, &status.disk)];
        let tier = |(index, (tier, pool)): (usize, (Tier, &PoolStatus))| {
            let bytes = |blocks: u32| u64::from(blocks) * pool.block_bytes;
            let used = pool.total.0 - pool.free.0;
            let (into, out) = match tier {
                Tier::Device => (rates.in_bps, rates.out_bps - rates.store_bps),
                Tier::Host => (rates.out_bps - rates.store_bps, rates.in_bps - rates.load_bps),
                Tier::Disk => (rates.store_bps, rates.load_bps),
            };
            let mut object = json!({
                "tier": tier.name(),
                "enabled": pool.total.0 > 0,
                "capacity_bytes": bytes(pool.total.0),
                "used_bytes": bytes(used),
                "pinned_bytes": bytes(pool.pinned.0),
                "waiting_bytes": accounts.waiting_bytes[index],
                "sessions": self.books.index.held(index),
                "in_bps": into.max(0.0).round(),
                "out_bps": out.max(0.0).round(),
                "blocks": {"total": pool.total.0, "used": used},
            });
            if let (Tier::Disk, Value::Object(fields)) = (tier, &mut object) {
                fields.insert("resting".into(), status.disk_rests.into());
                fields.insert("bad_slots".into(), status.disk_bad_slots.into());
            }
            object
        };
        pools.into_iter().enumerate().map(tier).collect()
    }

    /// A row of GET `/sessions`.
    pub fn row(&self, key: KvKey, row: &Row) -> Value {
        let residency = self.engine.residency(key);
        let [device, host, disk] = row.bytes;
        let idle_s = row.last_used.map(|last| self.books.now.0.saturating_sub(last.0) / 1_000_000);
        json!({
            "id": session_id(key),
            "tenant": self.name(row.tenant),
            "state": row.state.name(),
            "pinned": row.pinned,
            "stateless": !row.stored,
            "tokens": row.tokens,
            "turns": row.turns,
            "bytes": {"device": device, "host": host, "disk": disk, "shared": row.shared, "total": device + host + disk},
            "idle_s": idle_s,
            "last_ttft_ms": row.ttft_ms,
            "last_path": row.path.map(Path::name),
            "rank": self.books.rank(key).filter(|_| row.state == State::Hot),
            "return": self.way_back(row, residency.as_ref()),
            "seq": row.changed,
        })
    }

    /// What its return takes as it is now, and would take after an eviction.
    fn way_back(&self, row: &Row, residency: Option<&Residency>) -> Value {
        let evicted = residency.filter(|found| found.device.tokens.0 > 0).map(without_device);
        let evicted = evicted.and_then(|evicted| self.books.forecast(row, Some(&evicted)));
        let mut told = foretold(self.books.forecast(row, residency));
        if let Value::Object(fields) = &mut told {
            fields.insert("if_evicted_ms".into(), evicted.map(predicted_ms).into());
        }
        told
    }

    /// GET `/sessions/{id}`, without `as_of`.
    pub fn session(&self, key: KvKey, row: &Row) -> Value {
        let mut object = self.row(key, row);
        let Value::Object(fields) = &mut object else { return object };
        let residency = self.engine.residency(key);
        let runs = residency.as_ref().map(|found| found.runs).unwrap_or_default();
        let told: Vec<Value> = runs
            .iter()
            .map(|(tier, from, to)| json!({"tier": tier.map_or("none", Tier::name), "from": from, "to": to}))
            .collect();
        let turns: Vec<Value> = self
            .books
            .turns
            .back_from(row.turn)
            .take(12)
            .map(|turn| {
                let prompt = turn.prompt;
                let encoded = u64::from(prompt.encoded.0.max(1));
                let reencode_ms = prompt.prefill_ms * u64::from(prompt.reencoded.0) / encoded;
                json!({
                    "n": turn.number,
                    "ts": self.books.ms(turn.at),
                    "path": turn.path.name(),
                    "input_tokens": prompt.encoded.0 - prompt.reencoded.0,
                    "output_tokens": turn.answer.map(|(tokens, _)| tokens),
                    "history_tokens": prompt.cached().0 + prompt.reencoded.0,
                    "wait_ms": prompt.queue_ms,
                    "reload_ms": prompt.reload_ms,
                    "reencode_ms": reencode_ms,
                    "prefill_ms": prompt.prefill_ms - reencode_ms,
                    "ttft_ms": turn.ttft_ms,
                    "decode_ms": turn.answer.map(|(_, ms)| ms),
                })
            })
            .collect();
        let family = row.parent.unwrap_or(key);
        let members = std::iter::once(family).chain(self.books.index.forks(family).iter().copied());
        let others = self.books.index.forks(key).iter().copied().filter(|_| family != key);
        let forks: Vec<Value> = members
            .chain(others)
            .filter_map(|member| {
                let found = self.books.index.get(member)?;
                Some(json!({
                    "id": session_id(member),
                    "parent": found.parent.map(session_id),
                    "tokens": found.tokens,
                    "state": found.state.name(),
                    "self": member == key,
                }))
            })
            .collect();
        let query = journal::Query { session: Some(key), limit: 12, ..journal::Query::default() };
        let entries: Vec<Value> =
            self.books.journal.find(&query).0.into_iter().map(|entry| self.entry(entry)).collect();
        let shared = residency.as_ref().map_or(0, |found| found.device.bytes_shared);
        fields.insert("created".into(), row.created.into());
        fields.insert("last_used".into(), row.last_used.map(|last| self.books.ms(last)).into());
        fields.insert(
            "pinned_until".into(),
            residency.and_then(|found| found.pinned_until).map(|until| self.books.ms(until)).into(),
        );
        fields.insert("host_copy".into(), (row.bytes[1] > 0).into());
        fields.insert("blocks".into(), json!({"total": runs.blocks(), "runs": told, "shared_device_bytes": shared}));
        fields.insert("forks".into(), forks.into());
        fields.insert("turns_detail".into(), turns.into());
        fields.insert("evictions".into(), entries.into());
        object
    }

    pub fn entry(&self, entry: &Entry) -> Value {
        entry.json(&|tenant| self.name(tenant), &|at| self.books.ms(at))
    }

    /// Tenants that have something, the largest on the device first.
    pub fn tenants_by_size(&self) -> Vec<(TenantId, &TenantAccount)> {
        let accounts = self.books.accounts.tenants.iter();
        let mut tenants: Vec<_> =
            (0..).map(TenantId).zip(accounts).filter(|(id, _)| self.names.contains_key(id)).collect();
        tenants.sort_by_key(|(id, account)| (std::cmp::Reverse(account.tiers[0].held.bytes), *id));
        tenants
    }

    /// An item of GET `/tenants`.
    pub fn tenant(&self, id: TenantId, account: &TenantAccount, running: usize) -> Value {
        let firsts: Vec<_> =
            self.books.turns.since(self.books.now, TENANT_WINDOW_US).filter(|first| first.tenant == id).collect();
        let p95 = super::turns::spread(firsts.iter().map(|first| first.ttft_ms).collect()).p95_ms;
        let of = |path: Path| firsts.iter().filter(|first| first.path == path).count();
        let with_history = of(Path::Hot) + of(Path::Reloaded) + of(Path::Reencoded);
        let ratio = |path| (with_history > 0).then(|| thousandth(of(path) as f64 / with_history as f64));
        let minutes = (self.books.now.0.min(TENANT_WINDOW_US) as f64 / MINUTE_US as f64).max(1.0 / 60.0);
        let seconds = |tier: usize| account.tiers[tier].held.byte_seconds(self.books.accounts.at, self.books.now);
        let given = account.given;
        let sessions: usize = State::ALL.iter().map(|state| self.books.index.count(Some(id), *state)).sum();
        json!({
            "id": self.name(id),
            "name": self.name(id),
            "weight": f64::from(given.weight) / 1000.0,
            "device": {
                "used_bytes": account.tiers[0].held.bytes,
                "share_bytes": given.share,
                "floor_bytes": given.floor,
                "ceiling_bytes": given.ceiling,
                "pinned_bytes": given.pinned,
                "pin_budget_bytes": given.pin_budget,
            },
            "host_bytes": account.tiers[1].held.bytes,
            "disk_bytes": account.tiers[2].held.bytes,
            "byte_seconds": {"device": seconds(0), "host": seconds(1), "disk": seconds(2)},
            "sessions": sessions,
            "running": running,
            "turns_per_min": tenth(firsts.len() as f64 / minutes),
            "ttft_p95_ms": p95,
            "paths": {"hot": ratio(Path::Hot), "reloaded": ratio(Path::Reloaded), "reencoded": ratio(Path::Reencoded)},
            "evictions": {"suffered": account.evictions.iter().sum::<u64>(), "caused": account.caused},
            "early": {"evicted": account.early.evicted, "returned": account.early.returned},
            "saved_device_s": tenth(account.gains.saved_us as f64 / 1e6),
            "saved_tokens": account.gains.prompt.cached_tokens(),
            "slow_because": slow_because(self.books, id, TENANT_WINDOW_US),
        })
    }

    /// GET `/tenants`, without `as_of`: the largest by themselves, and how many others there are.
    pub fn tenants(&self) -> Value {
        let tenants = self.tenants_by_size();
        let items: Vec<Value> =
            tenants.iter().take(TENANTS).map(|(id, account)| self.tenant(*id, account, self.running(*id))).collect();
        let others = &tenants[TENANTS.min(tenants.len())..];
        let bytes: u64 = others.iter().map(|(_, account)| account.tiers[0].held.bytes).sum();
        json!({
            "items": items,
            "displaced": self.displaced(),
            "others": {"tenants": others.len(), "device_bytes": bytes},
            "next": null,
        })
    }

    /// Whose conversations lost memory for whose turns, and how often.
    pub fn displaced(&self) -> Map<String, Value> {
        let pairs = self.books.accounts.displaced.iter();
        let told = pairs.map(|(whose, for_tenant, what)| {
            (format!("{}>{}", self.name(*whose), self.name(*for_tenant)), what.evictions.into())
        });
        told.collect()
    }

    pub fn running(&self, tenant: TenantId) -> usize {
        [State::Running, State::Reloading].iter().map(|state| self.books.index.count(Some(tenant), *state)).sum()
    }

    /// A cell of the device's map.
    pub fn cell(&self, key: KvKey, row: &Row) -> Value {
        let idle_s = row.last_used.map_or(0, |last| self.books.now.0.saturating_sub(last.0) / 1_000_000);
        json!({
            "s": session_id(key),
            "n": 1,
            "bytes": row.bytes[0],
            "idle_s": idle_s,
            "st": row.state.name(),
            "pin": row.pinned,
            "rank": self.books.rank(key).filter(|_| row.state == State::Hot),
        })
    }

    /// GET `/map`, without `as_of`.
    pub fn map(&self, tier: Tier) -> Value {
        let index = tier as usize;
        let pool = match tier {
            Tier::Device => &self.books.status.device,
            Tier::Host => &self.books.status.host,
            Tier::Disk => &self.books.status.disk,
        };
        let capacity = u64::from(pool.total.0) * pool.block_bytes;
        let tenants = self.tenants_by_size();
        let with_some: Vec<_> =
            tenants.into_iter().filter(|(_, account)| account.tiers[index].held.bytes > 0).collect();
        let each = (CELLS / with_some.len().max(1)).max(1);
        let tenants: Vec<Value> = with_some
            .into_iter()
            .map(|(id, account)| {
                let used = account.tiers[index].held.bytes;
                let cells =
                    if tier == Tier::Device { self.cells(id, used, capacity, each) } else { self.ages(id, index) };
                let share = if tier == Tier::Device { account.given.share } else { 0 };
                json!({"id": self.name(id), "used_bytes": used, "share_bytes": share, "cells": cells})
            })
            .collect();
        json!({"tier": tier.name(), "capacity_bytes": capacity, "tenants": tenants})
    }

    /// The largest conversations of a tenant, and the others as one.
    fn cells(&self, tenant: TenantId, used: u64, capacity: u64, most: usize) -> Vec<Value> {
        use super::index::{Query, Sort};
        let query = Query {
            tenant: Some(tenant),
            state: None,
            pinned: false,
            sort: Sort::Device,
            descending: true,
            after: None,
            limit: most,
        };
        let least = capacity / CELLS as u64;
        let (mut cells, mut told) = (Vec::new(), 0);
        for key in self.books.index.page(&query).rows {
            let Some(row) = self.books.index.get(key).filter(|row| row.bytes[0] > 0) else { break };
            if row.bytes[0] < least && cells.len() > most / 2 {
                break;
            }
            told += row.bytes[0];
            cells.push(self.cell(key, row));
        }
        let all = self.books.index.by_age(tenant, 0, self.books.now, &[])[0].0;
        let others = all.saturating_sub(cells.len() as u64);
        if others > 0 {
            let bytes = used.saturating_sub(told).max(1);
            cells
                .push(json!({"s": null, "n": others, "bytes": bytes, "bucket": "smaller ones", "age": 2, "st": "hot"}));
        }
        cells
    }

    fn ages(&self, tenant: TenantId, tier: usize) -> Vec<Value> {
        let state = if tier == 1 { "warm" } else { "cold" };
        let sums = self.books.index.by_age(tenant, tier, self.books.now, &AGES_US);
        let cells = sums.into_iter().zip(AGES).enumerate().filter(|(_, ((count, _), _))| *count > 0);
        cells
            .map(|(age, ((n, bytes), bucket))| {
                json!({"s": null, "n": n, "bytes": bytes, "bucket": bucket, "age": age, "st": state})
            })
            .collect()
    }

    /// GET `/policy`, without `as_of`.
    pub fn policy(&self) -> Value {
        let (books, accounts) = (self.books, &self.books.accounts);
        let victims: Vec<Value> = accounts.line.iter().zip(1..).map(|(next, rank)| self.victim(rank, next)).collect();
        let below_floor = accounts
            .tenants
            .iter()
            .filter(|account| account.given.floor > 0 && account.tiers[0].held.bytes <= account.given.floor)
            .count();
        let device = &books.status.device;
        let tenants: Vec<Value> = self
            .tenants_by_size()
            .into_iter()
            .take(TENANTS)
            .map(|(id, account)| {
                json!({
                    "id": self.name(id),
                    "used_bytes": account.tiers[0].held.bytes,
                    "floor_bytes": account.given.floor,
                    "ceiling_bytes": account.given.ceiling,
                })
            })
            .collect();
        let active = &self.settings.active;
        let active = json!({
            "policy": active.policy,
            "learned_silences": accounts.learned.silences,
            "learned_enough": accounts.learned.is_enough,
            "eviction_doubles_at": active.eviction_doubles_at,
            "front_first_from": active.front_first_from,
            "device_bytes": active.device_bytes,
            "host_bytes": active.host_bytes,
            "disk_bytes": active.disk_bytes,
            "block_size": self.settings.block_size,
            "kv_dtype": self.settings.kv_dtype,
            "cold_dtype": active.cold_dtype,
            "background_offload": active.background_offload,
        });
        json!({
            "active": active,
            "victims": victims,
            "protected": {
                "running": books.index.count(None, State::Running) + books.index.count(None, State::Reloading),
                "pinned": books.index.pinned(),
                "below_floor": below_floor,
            },
            "free_bytes": u64::from(device.free.0) * device.block_bytes,
            "isolation_faults": books.status.isolation_faults,
            "tenants": tenants,
            "config": self.settings.config,
        })
    }

    fn victim(&self, rank: usize, next: &InLine) -> Value {
        let account = self.books.accounts.tenants.get(next.tenant.0 as usize);
        let of_ceiling = account
            .filter(|account| account.given.ceiling > 0)
            .map(|account| thousandth(account.tiers[0].held.bytes as f64 / account.given.ceiling as f64));
        let row = self.books.index.get(next.key);
        json!({
            "rank": rank,
            "session": session_id(next.key),
            "tenant": self.name(next.tenant),
            "rule": next.rule,
            "class": next.class,
            "rate_per_min": next.per_minute,
            "of_ceiling": of_ceiling,
            "frees_bytes": next.bytes,
            "idle_s": next.silent_ms / 1000,
            "clean": next.is_clean,
            "return": row.map(|row| {
                let evicted = self.engine.residency(next.key).as_ref().map(without_device);
                foretold(self.books.forecast(row, evicted.as_ref()))
            }),
        })
    }
}

/// As if all of it were where its copies are, or nowhere.
fn without_device(found: &Residency) -> Residency {
    let (host, disk) = (found.host.tokens, found.disk.tokens);
    let on_disk_alone = TokenCount(disk.0.saturating_sub(host.0));
    Residency { device: TierShare::default(), below: (host, on_disk_alone), ..found.clone() }
}

/// A forecast as the API tells it; nothing before the engine has measured what it needs.
fn foretold(predicted: Option<Predicted>) -> Value {
    let plan = predicted.map(|predicted| match predicted.choice {
        ReturnPath::Resident => "resident",
        ReturnPath::Reload => "reload",
        ReturnPath::Reencode => "reencode",
    });
    json!({
        "plan": plan,
        "predicted_ms": predicted.map(predicted_ms),
        "reload_ms": predicted.and_then(|predicted| predicted.reload_ms),
        "reencode_ms": predicted.map(|predicted| predicted.reencode_ms),
    })
}

fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn thousandth(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Only what is not as it was.
pub fn changed(now: &Map<String, Value>, before: &Map<String, Value>) -> Map<String, Value> {
    now.iter()
        .filter(|(key, value)| before.get(*key) != Some(value))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// As the first thing of an answer: which events are in it.
pub fn as_of(seq: u64, ts: i64, boot: &str) -> Value {
    json!({"seq": seq, "ts": ts, "boot": boot})
}
