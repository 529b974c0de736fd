//! What does each tenant hold, lose, take and gain?
//!
//! A snapshot of its own, made at most every quarter of a second, since it is as long as there are tenants. What is held is
//! known for later moments too, as long as nothing has changed.

use crate::engine::Path;
use crate::engine::gains::{FirstTokens, TenantGains};
use crate::kv::displacement::Displaced;
use crate::kv::early_return::Early;
use crate::kv::journal::Rule;
use crate::types::{TenantId, Tick, Tier};

/// Totals and amounts by tenant; totals only ever rise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
}

/// The tiers that accounts are kept of.
pub const TIERS: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Disk];

/// One tenant's account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantAccount {
    /// In the order of `TIERS`.
    pub tiers: [TierAccount; TIERS.len()],
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
