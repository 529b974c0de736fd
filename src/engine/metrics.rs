//! Which of the engine's numbers does a scraper see?
//!
//! The same snapshot that everyone else looks at, so that metrics and pages can't disagree. Published at scrape time: the
//! engine's loop spends nothing on it.

use std::collections::HashMap;

use super::Path;
use super::status::accounts::{Accounts, TIERS, TenantAccount};
use super::status::{EngineStatus, PoolStatus};
use crate::kv::displacement::Displaced;
use crate::kv::journal::Rule;
use crate::telemetry::metrics::{self, Recorder};
use crate::types::{TenantId, Tick, Tier};

/// Where the loop records its steps: it allocates nothing there.
pub(super) struct Steps {
    prefill: Recorder,
    decode: Recorder,
    rows: Recorder,
}

impl Steps {
    pub fn new() -> Self {
        let of = |kind| metrics::STEP_SECONDS.recorder(&[("kind", kind)]);
        Self { prefill: of("prefill"), decode: of("decode"), rows: metrics::STEP_ROWS.recorder(&[]) }
    }

    /// A step is over. `prefills`: it encoded part of a prompt.
    pub fn note(&self, (began, ended): (Tick, Tick), rows: usize, prefills: bool) {
        let recorder = if prefills { &self.prefill } else { &self.decode };
        recorder.record(ended.0.saturating_sub(began.0) as f64 / 1e6);
        self.rows.record(rows as f64);
    }
}

impl EngineStatus {
    /// Brings the engine's metrics up to this snapshot.
    pub fn publish(&self) {
        metrics::ENGINE_STEPS.set_total(self.steps, &[]);
        metrics::ENGINE_RUNNING.set(self.running.into(), &[]);
        metrics::ENGINE_QUEUED.set(self.queued.into(), &[]);
        metrics::ENGINE_RELOADING.set(self.reloading.into(), &[]);
        for (outcome, total) in
            [("finished", self.turns_finished), ("cancelled", self.turns_cancelled), ("failed", self.turns_failed)]
        {
            metrics::TURNS.set_total(total, &[("outcome", outcome)]);
        }
        metrics::PREEMPTIONS.set_total(self.preemptions, &[]);
        metrics::STALLED_LOADS.set_total(self.stalled_loads, &[]);
        metrics::EVICTIONS.set_total(self.evictions, &[]);
        let prompt = &self.prompt;
        for (source, total) in [
            ("resident", prompt.resident_tokens),
            ("shared", prompt.shared_tokens),
            ("reloaded_host", prompt.reloaded_host_tokens),
            ("reloaded_disk", prompt.reloaded_disk_tokens),
            ("encoded", prompt.encoded_tokens),
        ] {
            metrics::PROMPT_TOKENS.set_total(total, &[("source", source)]);
        }
        metrics::REENCODED_TOKENS.set_total(prompt.reencoded_tokens, &[]);
        metrics::GENERATED_TOKENS.set_total(self.generated_tokens, &[]);
        metrics::ISOLATION_FAULTS.set_total(self.isolation_faults, &[]);
        metrics::VERIFICATION_FAILURES.set_total(self.verification_failures, &[]);
        metrics::OFFLOADED_BYTES.set_total(self.offloaded_bytes, &[]);
        metrics::RELOADED_BYTES.set_total(self.reloaded_bytes, &[]);
        metrics::RUNNING_BYTES.set((self.running_blocks * self.device.block_bytes) as f64, &[]);
        publish_pool(Tier::Device, &self.device);
        publish_pool(Tier::Host, &self.host);
        publish_pool(Tier::Disk, &self.disk);
        let up = self.disk.total.0 > 0 && !self.disk_rests;
        metrics::DISK_UP.set(f64::from(u8::from(up)), &[]);
        metrics::DISK_BAD_SLOTS.set(self.disk_bad_slots as f64, &[]);
        metrics::DISK_WRITE_FAILURES.set_total(self.disk_write_failures, &[]);
        metrics::STORED_BYTES.set_total(self.stored_bytes, &[]);
        metrics::LOADED_BYTES.set_total(self.loaded_bytes, &[]);
        metrics::LOAD_RATE.set(self.load_bytes_per_s as f64, &[]);
        metrics::PREFILL_RATE.set(self.prefill_tokens_per_s as f64, &[]);
        metrics::RELOAD_RATE.set(self.reload_bytes_per_s as f64, &[]);
    }
}

impl Accounts {
    /// Brings tenants' metrics up to this snapshot, and times to now. Tenants of whom nothing happened yet are at 0.
    pub fn publish(&self, now: Tick, names: &HashMap<TenantId, String>) {
        // Pairs of tenants would be too many series: whose turn it was is told as far as a tenant can do something about it.
        let mut displaced: HashMap<TenantId, [Displaced; 2]> = HashMap::new();
        for (whose, for_tenant, of_pair) in &self.displaced {
            let both = displaced.entry(*whose).or_default();
            let sum = &mut both[usize::from(whose != for_tenant)];
            sum.evictions += of_pair.evictions;
            sum.freed_bytes += of_pair.freed_bytes;
            sum.lost_bytes += of_pair.lost_bytes;
        }
        for (id, name) in names {
            let account = self.tenants.get(id.0 as usize).copied().unwrap_or_default();
            account.publish(self.at, now, name);
            metrics::begin_tenant(name);
            for (whose, sum) in ["own", "other"].into_iter().zip(displaced.remove(id).unwrap_or_default()) {
                let labels = [("tenant", name.as_str()), ("for_tenant", whose)];
                metrics::DISPLACED.set_total(sum.evictions, &labels);
                metrics::DISPLACED_BYTES.set_total(sum.freed_bytes, &labels);
                metrics::LOST_BYTES.set_total(sum.lost_bytes, &labels);
            }
        }
        for (tier, bytes) in TIERS.iter().zip(self.waiting_bytes) {
            metrics::POOL_WAITING_BYTES.set(bytes as f64, &[("tier", tier.name())]);
        }
    }
}

impl TenantAccount {
    fn publish(&self, at: Tick, now: Tick, name: &str) {
        let tenant = ("tenant", name);
        for (tier, account) in TIERS.iter().zip(&self.tiers) {
            let labels = [tenant, ("tier", tier.name())];
            metrics::TENANT_BYTES.set(account.held.bytes as f64, &labels);
            metrics::TENANT_BYTE_SECONDS.set_total(account.held.byte_seconds(at, now), &labels);
        }
        for (rule, evictions) in Rule::EVICTIONS.iter().zip(self.evictions) {
            metrics::TENANT_EVICTIONS.set_total(evictions, &[tenant, ("rule", rule.name())]);
        }
        metrics::CAUSED_EVICTIONS.set_total(self.caused, &[tenant]);
        metrics::EVICTED_SILENCES.set_total(self.early.evicted, &[tenant]);
        metrics::EARLY_RETURNS.set_total(self.early.returned, &[tenant]);
        for (path, totals) in Path::ALL.iter().zip(&self.gains.paths) {
            metrics::PATH_TURNS.set_total(totals.turns, &[tenant, ("path", path.name())]);
        }
        metrics::SAVED_TOKENS.set_total(self.gains.prompt.cached_tokens(), &[tenant]);
        metrics::SAVED_MS.set_total(self.gains.saved_us / 1000, &[tenant]);
    }
}

fn publish_pool(tier: Tier, pool: &PoolStatus) {
    let bytes = |blocks: u32| (u64::from(blocks) * pool.block_bytes) as f64;
    metrics::POOL_BYTES.set(bytes(pool.total.0), &[("tier", tier.name())]);
    metrics::POOL_FREE_BYTES.set(bytes(pool.free.0), &[("tier", tier.name())]);
    metrics::POOL_PINNED_BYTES.set(bytes(pool.pinned.0), &[("tier", tier.name())]);
}

#[cfg(test)]
mod tests {
    use super::super::status::PromptTotals;
    use super::*;
    use crate::telemetry::metrics::Metrics;
    use crate::types::BlockCount;

    #[test]
    fn a_snapshot_is_in_the_text_number_for_number() {
        let metrics = Metrics::install().unwrap();
        let status = EngineStatus {
            turns_finished: 41,
            evictions: 5,
            prompt: PromptTotals { encoded_tokens: 900, reencoded_tokens: 30, ..PromptTotals::default() },
            device: PoolStatus {
                total: BlockCount(100),
                free: BlockCount(40),
                pinned: BlockCount(2),
                block_bytes: 368_640,
            },
            ..EngineStatus::default()
        };
        status.publish();
        let text = metrics.render();
        for line in [
            "rekindle_turns_total{outcome=\"finished\"} 41",
            "rekindle_turns_total{outcome=\"failed\"} 0",
            "rekindle_evictions_total 5",
            "rekindle_prompt_tokens_total{source=\"encoded\"} 900",
            "rekindle_reencoded_tokens_total 30",
            "rekindle_pool_free_bytes{tier=\"device\"} 14745600",
            "rekindle_pool_pinned_bytes{tier=\"device\"} 737280",
            "rekindle_isolation_faults_total 0",
        ] {
            assert!(text.lines().any(|l| l == line), "`{line}` is not in:\n{text}");
        }
    }

    #[test]
    fn whom_a_tenant_gave_way_to_is_told_as_its_own_turns_or_others() {
        let metrics = Metrics::install().unwrap();
        let [a, b, c] = [TenantId(0), TenantId(1), TenantId(2)];
        let evictions = |evictions| Displaced { evictions, freed_bytes: 10 * evictions, lost_bytes: 0 };
        let displaced = vec![(a, a, evictions(1)), (a, b, evictions(2)), (a, c, evictions(4))];
        let accounts = Accounts { displaced, ..Accounts::default() };
        let names = [(a, "given".to_owned()), (b, "quiet".to_owned())].into_iter().collect();
        accounts.publish(Tick(0), &names);
        let text = metrics.render();
        for line in [
            "rekindle_displaced_evictions_total{tenant=\"given\",for_tenant=\"own\"} 1",
            "rekindle_displaced_evictions_total{tenant=\"given\",for_tenant=\"other\"} 6",
            "rekindle_displaced_bytes_total{tenant=\"given\",for_tenant=\"other\"} 60",
            "rekindle_displaced_evictions_total{tenant=\"quiet\",for_tenant=\"other\"} 0",
            "rekindle_caused_evictions_total{tenant=\"quiet\"} 0",
            "rekindle_path_turns_total{tenant=\"quiet\",path=\"reloaded\"} 0",
            "rekindle_limited_total{tenant=\"quiet\",limit=\"sockets\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "`{line}` is not in:\n{text}");
        }
    }
}
