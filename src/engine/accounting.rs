//! What does the core know of tenants and conversations, for those who ask?

use super::core::Core;
use super::status::accounts::{Accounts, DeviceBytes, HeldBytes, InLine, Learned, TIERS, TenantAccount, TierAccount};
use crate::kv::next::DevicePart;
use crate::types::{BlockCount, KvKey, TenantId, Tick, Tier};

/// Conversations that are told of those that go next.
const IN_LINE: usize = 24;

impl Core {
    /// What each tenant holds, loses, takes and gains. Cost: O(tenants, and pairs of them that displaced each other).
    pub fn accounts(&self, now: Tick) -> Accounts {
        let manager = &self.manager;
        manager.tell_time(now);
        let block_bytes = manager.settings().block_bytes;
        let bytes = |tier, blocks: BlockCount| u64::from(blocks.0) * block_bytes.of(tier);
        let (displacements, early) = (manager.displacements(), manager.early_returns());
        let mut tenants = vec![TenantAccount::default(); manager.tenants().max(self.gains.tenants())];
        for (id, account) in (0..).map(TenantId).zip(&mut tenants) {
            let tiers = TIERS.map(|tier| {
                let line = manager.tenant_holding(id, tier);
                let byte_us = line.held.block_us * u128::from(block_bytes.of(tier));
                let held = HeldBytes { bytes: bytes(tier, line.held.blocks), byte_us };
                TierAccount { held, nobodys_bytes: bytes(tier, line.nobodys.blocks) }
            });
            let (evictions, early, gains) = (displacements.by_rule(id), early.of_tenant(id), self.gains.of_tenant(id));
            let DevicePart { weight, share, floor, ceiling, pins, pinned } = manager.device_part(id);
            let device = |blocks| bytes(Tier::Device, blocks);
            let given = DeviceBytes {
                weight,
                share: device(share),
                floor: device(floor),
                ceiling: device(ceiling),
                pin_budget: device(pins),
                pinned: device(pinned),
            };
            *account = TenantAccount { tiers, given, evictions, early, gains, caused: 0 };
        }
        let mut displaced: Vec<_> = displacements.pairs().collect();
        displaced.sort_unstable_by_key(|(whose, for_tenant, _)| (*whose, *for_tenant));
        for (_, for_tenant, displaced) in &displaced {
            tenants[for_tenant.0 as usize].caused += displaced.evictions;
        }
        let waiting_bytes = TIERS.map(|tier| bytes(tier, manager.waiting(tier).blocks));
        let line = manager
            .next_victims(now, IN_LINE)
            .into_iter()
            .map(|next| InLine::new(next.victim, next.tenant, bytes(Tier::Device, next.blocks), next.is_clean));
        let learned = Learned { silences: manager.learned().silences(), is_enough: manager.has_learned_enough() };
        let first_tokens = self.gains.first_tokens();
        Accounts { at: now, tenants, displaced, first_tokens, waiting_bytes, line: line.collect(), learned }
    }

    /// What a conversation holds of each tier, in the order of `TIERS`: of what it shares, its part. Cost: O(its blocks).
    pub fn holding(&self, now: Tick, key: KvKey) -> [HeldBytes; TIERS.len()] {
        self.manager.tell_time(now);
        let block_bytes = self.manager.settings().block_bytes;
        TIERS.map(|tier| {
            let (holding, block_bytes) = (self.manager.holding(key, tier), block_bytes.of(tier));
            HeldBytes { bytes: holding.bytes(block_bytes), byte_us: holding.byte_us(block_bytes) }
        })
    }
}
