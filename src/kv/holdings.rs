//! What do tenants and conversations hold of each tier, and what have they held?
//!
//! Times are those that the manager was told last.

use std::sync::Arc;

use super::Manager;
use super::accounts::{Held, Holding, TenantHeld};
use super::block::Places;
use super::displacement::Displacements;
use super::early_return::EarlyReturns;
use crate::types::{KvKey, TenantId, Tick, Tier};

impl Manager {
    /// Tells the time: what is taken and given back from now on is accounted for from now on.
    pub fn tell_time(&self, now: Tick) {
        for tier in [Tier::Device, Tier::Host, Tier::Disk] {
            self.places(tier).tell_time(now);
        }
    }

    /// What a conversation holds of a tier; nothing if no tier holds any of it. Cost: O(its blocks).
    pub fn holding(&self, key: KvKey, tier: Tier) -> Holding {
        let conversation = self.conversations.get(&key);
        conversation.map_or(Holding::default(), |conversation| match tier {
            Tier::Device => conversation.device.holding(),
            Tier::Host => conversation.host.holding(),
            Tier::Disk => conversation.disk.holding(),
        })
    }

    /// What a tenant holds of a tier.
    pub fn tenant_holding(&self, tenant: TenantId, tier: Tier) -> TenantHeld {
        self.places(tier).accounts(|now, accounts| accounts.of_tenant(now, tenant))
    }

    /// Places of a tier that are neither free nor a tenant's: they wait to be overwritten, or are out of use.
    pub fn waiting(&self, tier: Tier) -> Held {
        self.places(tier).accounts(|now, accounts| accounts.waiting(now))
    }

    /// Who lost memory to whom, and by which rule.
    pub fn displacements(&self) -> &Displacements {
        &self.displacements
    }

    /// Who lost memory, and was back at once.
    pub fn early_returns(&self) -> &EarlyReturns {
        &self.early_returns
    }

    /// Tenants of which something is accounted for: ids from 0 on.
    pub fn tenants(&self) -> usize {
        self.places(Tier::Device).accounts(|_, accounts| accounts.tenants())
    }

    pub(super) fn places(&self, tier: Tier) -> &Arc<Places> {
        match tier {
            Tier::Device => &self.device,
            Tier::Host => &self.host,
            Tier::Disk => &self.disk.places,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::accounts::UNITS;
    use super::super::block::PrefixHash;
    use super::super::displacement::Displaced;
    use super::super::early_return::Early;
    use super::super::evictor::Policy;
    use super::super::manager::{Admission, Admit};
    use super::super::return_rate::TurnShape;
    use super::*;
    use crate::kv::KvSettings;
    use crate::types::{BlockBytes, BlockCount, BlockSize, TenantKey, TokenCount, TokenId};

    const T: TenantId = TenantId(0);
    const S: u64 = 1_000_000;

    /// Blocks of 4 tokens and 64 bytes; the window is 4 of them.
    fn manager(device_blocks: u32) -> Manager {
        Manager::new(KvSettings {
            block_size: BlockSize(4),
            block_bytes: BlockBytes::all(64),
            device_blocks: BlockCount(device_blocks),
            host_blocks: BlockCount(0),
            disk_blocks: BlockCount(0),
            window: TokenCount(16),
            background_offload: false,
            policy: Policy::Lru,
            doubles_at: None,
            front_first_from: None,
            journal_entries: 16,
            reuse: true,
        })
    }

    /// A turn of nothing but this prompt.
    fn turn(manager: &mut Manager, now: Tick, key: u128, tokens: &[u32]) {
        let (key, tenant_key) = (KvKey(key), TenantKey([1; 32]));
        let tokens: Vec<TokenId> = tokens.iter().copied().map(TokenId).collect();
        let hashes = PrefixHash::chain(&tenant_key, &tokens, BlockSize(4));
        let (tenant, tokens) = (T, tokens.as_slice());
        let admit = Admit { key, tenant, tenant_key, tokens, hashes: &hashes, prefill_per_s: 0 };
        manager.expect_soon(now, key);
        assert!(matches!(manager.admit(now, admit), Admission::Ready(_)), "there is room");
        let found = manager.resident(key).context().get();
        manager.append(key, &tokens[found..]);
        manager.rest(now, key, TurnShape { number: 1, new_tokens: TokenCount(4) });
        manager.assert_invariants();
    }

    /// Two blocks that all have, and one of its own.
    fn prompt(own: u32) -> Vec<u32> {
        (0..8).chain(own..own + 4).collect()
    }

    #[test]
    fn a_prefix_is_split_by_those_who_have_it_and_one_that_goes_leaves_it_to_the_others() {
        let mut manager = manager(20);
        turn(&mut manager, Tick(0), 1, &prompt(100));
        turn(&mut manager, Tick(6 * S), 2, &prompt(200));
        turn(&mut manager, Tick(12 * S), 3, &prompt(300));
        let units = |manager: &Manager| [1, 2, 3].map(|key| manager.holding(KvKey(key), Tier::Device).units);
        assert_eq!(units(&manager), [UNITS + 2 * (UNITS / 3); 3]);
        manager.tell_time(Tick(18 * S));
        manager.forget(KvKey(1));
        assert_eq!(units(&manager), [0, UNITS + 2 * (UNITS / 2), UNITS + 2 * (UNITS / 2)]);
        let line = manager.tenant_holding(T, Tier::Device);
        assert_eq!((line.held.blocks, line.nobodys.blocks), (BlockCount(5), BlockCount(1)), "one waits for zeros");
        manager.assert_invariants();
        drop(manager.take_chores());
        manager.tell_time(Tick(20 * S));
        manager.assert_invariants();
        let line = manager.tenant_holding(T, Tier::Device);
        assert_eq!((line.held.blocks, line.nobodys.blocks), (BlockCount(4), BlockCount(0)));
        // Three blocks for 6 s, four for 6 s, five for 6 s, four for 2 s.
        assert_eq!(line.held.block_us, u128::from(S * (18 + 24 + 30 + 8)));
        // 3: its own for 8 s, two thirds of a block for 6 s, one block for 2 s.
        let held = manager.holding(KvKey(3), Tier::Device);
        assert_eq!((held.bytes(64), held.byte_us(64)), (128, u128::from(64 * S * (8 + 4 + 2))));
    }

    #[test]
    fn what_an_eviction_took_is_told_of_by_pair_rule_and_early_return() {
        let mut manager = manager(5);
        turn(&mut manager, Tick(0), 1, &prompt(100));
        turn(&mut manager, Tick(S), 2, &prompt(200));
        // Of five blocks one is free, and four are wanted.
        turn(&mut manager, Tick(2 * S), 3, &(500..516).collect::<Vec<_>>());
        // Both lost their own, 1 its part of what they shared, and 2 all of that but a block.
        assert_eq!([1, 2].map(|key| manager.holding(KvKey(key), Tier::Device).units), [0, UNITS]);
        let (_, _, displaced) = manager.displacements().pairs().next().unwrap();
        let evictions = manager.counters().evictions;
        assert_eq!(displaced, Displaced { evictions, freed_bytes: 64 * 3, lost_bytes: 64 * 3 });
        assert_eq!(manager.early_returns().of_tenant(T), Early { evicted: 2, returned: 0 });
        manager.expect_soon(Tick(50 * S), KvKey(2));
        manager.expect_soon(Tick(90 * S), KvKey(1));
        assert_eq!(manager.early_returns().of_tenant(T), Early { evicted: 2, returned: 1 });
    }
}
