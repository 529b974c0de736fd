//! What does the engine show to those who only look?
//!
//! A snapshot swapped after each step, and one residency entry a conversation, kept as things change. Readers never
//! touch the engine's loop.

pub mod accounts;
pub mod happened;

use std::fmt;

pub use super::{Decision, Path, PromptUsage, TurnUsage};
pub use crate::kv::cost::split_pays;
use crate::kv::journal::Entry;
pub use crate::kv::rate::Encoding;
pub use crate::kv::runs::Runs;
use crate::types::{BlockCount, BlockSize, TenantId, Tick, Tier, TokenCount};

/// Counters and gauges since the start; totals only ever rise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineStatus {
    pub now: Tick,
    pub steps: u64,
    pub running: u32,
    pub queued: u32,
    pub reloading: u32,
    /// Device blocks of running turns; one that several share counts for each.
    pub running_blocks: u64,
    pub device: PoolStatus,
    pub host: PoolStatus,
    pub disk: PoolStatus,
    /// The disk tier refused a write a moment ago, and is left alone.
    pub disk_rests: bool,
    /// Slots of the disk tier that are out of use, since what was read from them was wrong.
    pub disk_bad_slots: u64,
    pub disk_write_failures: u64,
    pub turns_finished: u64,
    pub turns_cancelled: u64,
    pub turns_failed: u64,
    pub preemptions: u64,
    /// Loads from disk that were not waited for any longer; their turns were re-encoded.
    pub stalled_loads: u64,
    pub evictions: u64,
    pub prompt: PromptTotals,
    pub generated_tokens: u64,
    /// Evictions for another tenant that took one below its floor. There are none.
    pub isolation_faults: u64,
    /// Blocks whose bytes did not match their checksum on reload; each was re-encoded.
    pub verification_failures: u64,
    pub offloaded_bytes: u64,
    pub reloaded_bytes: u64,
    pub stored_bytes: u64,
    pub loaded_bytes: u64,
    /// Moving averages of what was seen; 0 before the first.
    pub prefill_tokens_per_s: u64,
    /// What the model takes by where in a sequence it encodes.
    pub encoding: Encoding,
    pub reload_bytes_per_s: u64,
    pub load_bytes_per_s: u64,
}

/// Where prompt tokens came from, summed over all turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptTotals {
    pub resident_tokens: u64,
    pub shared_tokens: u64,
    pub reloaded_host_tokens: u64,
    pub reloaded_disk_tokens: u64,
    pub encoded_tokens: u64,
    pub reencoded_tokens: u64,
}

impl PromptTotals {
    /// What was not encoded again.
    pub fn cached_tokens(&self) -> u64 {
        self.resident_tokens + self.shared_tokens + self.reloaded_host_tokens + self.reloaded_disk_tokens
    }

    pub fn add(&mut self, prompt: &PromptUsage) {
        self.resident_tokens += u64::from(prompt.resident.0);
        self.shared_tokens += u64::from(prompt.shared.0);
        self.reloaded_host_tokens += u64::from(prompt.reloaded_host.0);
        self.reloaded_disk_tokens += u64::from(prompt.reloaded_disk.0);
        self.encoded_tokens += u64::from(prompt.encoded.0);
        self.reencoded_tokens += u64::from(prompt.reencoded.0);
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStatus {
    pub total: BlockCount,
    pub free: BlockCount,
    /// Blocks that pins keep from the evictor.
    pub pinned: BlockCount,
    pub block_bytes: u64,
}

/// One conversation's whereabouts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residency {
    pub tenant: TenantId,
    pub state: ResidencyState,
    pub device: TierShare,
    pub host: TierShare,
    pub disk: TierShare,
    /// Of what the device lacks, what the host has, and what the disk alone has.
    pub below: (TokenCount, TokenCount),
    /// Which tier has each block of it.
    pub runs: Runs,
    pub last_used: Tick,
    pub last_eviction: Option<LastEviction>,
    pub pinned_until: Option<Tick>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResidencyState {
    /// A turn runs, or waits for its place.
    Running,
    Reloading,
    /// All of it on the device.
    Resident,
    /// Some of it on the device.
    Partial,
    /// None on the device, some of it below.
    Offloaded,
    /// None anywhere; it is pinned for when there is.
    Nowhere,
}

/// What a tier holds of a conversation. Shared bytes are counted whole for every sharer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierShare {
    pub tokens: TokenCount,
    pub bytes_private: u64,
    pub bytes_shared: u64,
}

/// The newest decision that took KV of this conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastEviction {
    pub journal: u64,
    pub at: Tick,
    pub rule: &'static str,
    pub why: Why,
    pub for_tenant: TenantId,
    pub from: Tier,
    pub freed_bytes: u64,
}

/// A decision in words, which are found when somebody asks for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Why {
    pub entry: Entry,
    pub block_size: BlockSize,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.entry.sentence(self.block_size))
    }
}
