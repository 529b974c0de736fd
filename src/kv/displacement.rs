//! Who lost memory to whom, and by which rule?
//!
//! Pairs of tenants that occurred: tenants are configured, and keep their ids while the process lives, so that no more are
//! kept than the pairs of those that there were. Cost: O(1) a decision.

use std::collections::HashMap;

use super::journal::{Entry, Rule};
use crate::types::TenantId;

/// What one tenant's conversations lost to another's turns, or to its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Displaced {
    pub evictions: u64,
    pub freed_bytes: u64,
    /// Of these, the last copies.
    pub lost_bytes: u64,
}

/// Evictions since the start.
#[derive(Debug, Default)]
pub struct Displacements {
    /// By whose it was, and for whose turn.
    pairs: HashMap<(TenantId, TenantId), Displaced>,
    /// By tenant, of its conversations, in the order of `Rule::EVICTIONS`.
    rules: Vec<[u64; Rule::EVICTIONS.len()]>,
}

impl Displacements {
    /// Takes in a decision. `block_bytes`: of the tier that it took blocks from.
    pub fn note(&mut self, entry: &Entry, block_bytes: u64) {
        let Some(rule) = Rule::EVICTIONS.iter().position(|rule| *rule == entry.rule) else { return };
        let pair = self.pairs.entry((entry.tenant, entry.for_tenant)).or_default();
        pair.evictions += 1;
        pair.freed_bytes += u64::from(entry.freed.0) * block_bytes;
        pair.lost_bytes += u64::from(entry.lost.0) * block_bytes;
        let tenant = entry.tenant.0 as usize;
        if self.rules.len() <= tenant {
            self.rules.resize(tenant + 1, Default::default());
        }
        self.rules[tenant][rule] += 1;
    }

    /// (Whose it was, for whose turn, what), in no order.
    pub fn pairs(&self) -> impl Iterator<Item = (TenantId, TenantId, Displaced)> {
        self.pairs.iter().map(|((whose, for_tenant), displaced)| (*whose, *for_tenant, *displaced))
    }

    /// Evictions of a tenant's conversations, in the order of `Rule::EVICTIONS`.
    pub fn by_rule(&self, tenant: TenantId) -> [u64; Rule::EVICTIONS.len()] {
        self.rules.get(tenant.0 as usize).copied().unwrap_or_default()
    }

    /// All evictions.
    pub fn total(&self) -> u64 {
        self.pairs.values().map(|displaced| displaced.evictions).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::evictor::Reason;
    use super::*;
    use crate::types::{BlockCount, KvKey, Tick, Tier};

    const A: TenantId = TenantId(0);
    const B: TenantId = TenantId(4);

    fn entry(tenant: TenantId, for_tenant: TenantId, rule: Rule, (freed, lost): (u32, u32)) -> Entry {
        let (freed, lost, reason) = (BlockCount(freed), BlockCount(lost), Reason::default());
        Entry {
            id: 0,
            at: Tick(0),
            victim: KvKey(1),
            tenant,
            for_tenant,
            rule,
            reason,
            from: Tier::Device,
            freed,
            lost,
        }
    }

    #[test]
    fn pairs_and_rules_count_evictions_and_nothing_else() {
        let mut displacements = Displacements::default();
        displacements.note(&entry(A, B, Rule::Lru, (3, 1)), 10);
        displacements.note(&entry(A, B, Rule::OverCeiling, (2, 0)), 10);
        displacements.note(&entry(B, B, Rule::Lru, (1, 1)), 10);
        displacements.note(&entry(A, B, Rule::Preempted, (0, 0)), 10);
        displacements.note(&entry(A, A, Rule::Requested, (9, 0)), 10);
        let mut pairs: Vec<_> = displacements.pairs().collect();
        pairs.sort_unstable_by_key(|(whose, ..)| *whose);
        let displaced = |evictions, freed_bytes, lost_bytes| Displaced { evictions, freed_bytes, lost_bytes };
        assert_eq!(pairs, [(A, B, displaced(2, 50, 10)), (B, B, displaced(1, 10, 10))]);
        let of = |tenant, rule| {
            let place = Rule::EVICTIONS.iter().position(|known| *known == rule).unwrap();
            displacements.by_rule(tenant)[place]
        };
        assert_eq!((of(A, Rule::Lru), of(A, Rule::OverCeiling), of(B, Rule::Lru)), (1, 1, 1));
        assert_eq!((displacements.total(), displacements.by_rule(TenantId(9))), (3, [0; 4]));
    }
}
