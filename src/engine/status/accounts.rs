//! What does each tenant hold, lose, take and gain?
//!
//! A snapshot of its own, made at most every quarter of a second, since it is as long as there are tenants. What is held is
//! known for later moments too, as long as nothing has changed.

use crate::engine::Path;
use crate::engine::gains::{FirstTokens, TenantGains};
use crate::kv::displacement::Displaced;
use crate::kv::early_return::Early;
use crate::kv::evictor::Victim;
use crate::kv::journal::Rule;
use crate::types::{KvKey, TenantId, Tick, Tier};

/// Totals and amounts by tenant; totals only ever rise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Accounts {
    pub at: Tick,
    /// By id, from 0 on.
    pub tenants: Vec<TenantAccount>,
    /// (Whose conversations lost memory, for whose turns, how much): the pairs that occurred, in order.
    pub displaced: Vec<(TenantId, TenantId, Displaced)>,
    /// First tokens of all tenants' turns, in the order of `Path::ALL`.
    pub first_tokens: [FirstTokens; Path::ALL.len()],
    /// Bytes that wait to be overwritten, or are out of use, in the order of `TIERS`.
    pub waiting_bytes: [u64; TIERS.len()],
    /// Who loses device memory next, the first ones.
    pub line: Vec<InLine>,
    pub learned: Learned,
}

/// A conversation in line to lose device memory.
#[derive(Clone, Debug, PartialEq)]
pub struct InLine {
    pub key: KvKey,
    pub tenant: TenantId,
    pub rule: &'static str,
    pub silent_ms: u64,
    /// What conversations like it have in common, in words.
    pub class: Option<String>,
    /// How many of those like it come back in a minute, of one.
    pub per_minute: Option<f64>,
    /// Device bytes that it names.
    pub bytes: u64,
    /// It can go at once: what goes first has a copy below.
    pub is_clean: bool,
}

impl InLine {
    pub(in crate::engine) fn new(victim: Victim, tenant: TenantId, bytes: u64, is_clean: bool) -> Self {
        let Victim { key, rule, reason, .. } = victim;
        Self {
            key,
            tenant,
            rule: rule.name(),
            silent_ms: reason.silent_ms,
            class: reason.class.map(|class| class.describe()),
            per_minute: reason.rate.map(|rate| rate.per_s() * 60.0),
            bytes,
            is_clean,
        }
    }
}

/// What the evictor has seen of how conversations come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    pub silences: u64,
    /// Enough to go by it.
    pub is_enough: bool,
}

/// What a tenant is given of the device pool, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceBytes {
    /// In thousandths; 0: it is gone.
    pub weight: u32,
    pub share: u64,
    pub floor: u64,
    pub ceiling: u64,
    pub pin_budget: u64,
    pub pinned: u64,
}

/// The tiers that accounts are kept of.
pub const TIERS: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Disk];

/// One tenant's account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantAccount {
    /// In the order of `TIERS`.
    pub tiers: [TierAccount; TIERS.len()],
    pub given: DeviceBytes,
    /// Evictions of its conversations: those it suffered, in the order of `Rule::EVICTIONS`.
    pub evictions: [u64; Rule::EVICTIONS.len()],
    /// Evictions for its turns.
    pub caused: u64,
    pub early: Early,
    pub gains: TenantGains,
}

/// What a tenant holds of a tier, and has held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierAccount {
    pub held: HeldBytes,
    /// Of these, what is no conversation's: under way, or about to be overwritten.
    pub nobodys_bytes: u64,
}

/// What is held of a tier, and has been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldBytes {
    pub bytes: u64,
    /// Bytes times microseconds, up to the snapshot.
    pub byte_us: u128,
}

impl HeldBytes {
    /// Bytes times seconds until a moment after the snapshot `at`, if nothing has changed since.
    pub fn byte_seconds(&self, at: Tick, now: Tick) -> u64 {
        let since = u128::from(self.bytes) * u128::from(now.0.saturating_sub(at.0));
        u64::try_from((self.byte_us + since) / 1_000_000).unwrap_or(u64::MAX)
    }
}
