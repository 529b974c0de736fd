//! Which conversation loses blocks of a tier when it runs short?
//!
//! Of the tenants that may lose some: ended ones first, oldest first; then the one silent for the longest. Who may lose is
//! the asker's to say. Invariant: a running conversation is in no list, so it is never a victim. Cost: O(1) a change, O(tenants) a choice, never O(conversations). Owned by the engine's thread: no locks.

use hashlink::LinkedHashMap;

use super::journal::Rule;
use crate::types::{KvKey, TenantId};

/// When a conversation was last used, in the order of uses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct UseOrder(pub u64);

#[derive(Debug, Default)]
struct Lists {
    ended: LinkedHashMap<KvKey, UseOrder>,
    idle: LinkedHashMap<KvKey, UseOrder>,
}

/// The idle conversations that hold blocks of one tier, by tenant, coldest first.
#[derive(Debug, Default)]
pub struct Evictor {
    tenants: Vec<Lists>,
}

impl Evictor {
    /// Puts a conversation last in line: it was used just now. Uses only rise.
    pub fn add(&mut self, tenant: TenantId, key: KvKey, used: UseOrder, ended: bool) {
        let index = tenant.0 as usize;
        if self.tenants.len() <= index {
            self.tenants.resize_with(index + 1, Lists::default);
        }
        let lists = &mut self.tenants[index];
        if ended {
            lists.idle.remove(&key);
            lists.ended.insert(key, used);
        } else {
            lists.ended.remove(&key);
            lists.idle.insert(key, used);
        }
    }

    /// Puts a conversation first in line: it comes back to a line that had dropped it as the coldest.
    pub fn add_first(&mut self, tenant: TenantId, key: KvKey, used: UseOrder, ended: bool) {
        self.add(tenant, key, used, ended);
        let lists = &mut self.tenants[tenant.0 as usize];
        let list = if ended { &mut lists.ended } else { &mut lists.idle };
        list.to_front(&key);
    }

    /// Takes a conversation out of line: it runs, or holds nothing here.
    pub fn remove(&mut self, tenant: TenantId, key: KvKey) {
        if let Some(lists) = self.tenants.get_mut(tenant.0 as usize) {
            lists.idle.remove(&key);
            lists.ended.remove(&key);
        }
    }

    /// The first in line among tenants for whom `may_lose` holds, by which rule, and when it was used.
    pub fn victim(&self, may_lose: impl Fn(TenantId) -> bool) -> Option<(KvKey, Rule, UseOrder)> {
        let candidates = || self.tenants.iter().zip(0u32..).filter(|(_, tenant)| may_lose(TenantId(*tenant)));
        let first = |list: fn(&Lists) -> &LinkedHashMap<KvKey, UseOrder>| {
            candidates().filter_map(|(lists, _)| list(lists).front()).min_by_key(|(_, used)| **used)
        };
        let ended = first(|lists| &lists.ended).map(|(key, used)| (*key, Rule::Ended, *used));
        ended.or_else(|| first(|lists| &lists.idle).map(|(key, used)| (*key, Rule::Lru, *used)))
    }

    /// Whether a conversation is in line.
    pub fn contains(&self, tenant: TenantId, key: KvKey) -> bool {
        let lists = self.tenants.get(tenant.0 as usize);
        lists.is_some_and(|lists| lists.idle.contains_key(&key) || lists.ended.contains_key(&key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(0);
    const B: TenantId = TenantId(1);

    fn everyone(_: TenantId) -> bool {
        true
    }

    #[test]
    fn the_longest_silent_goes_first_whatever_its_tenant() {
        let mut evictor = Evictor::default();
        evictor.add(B, KvKey(1), UseOrder(1), false);
        evictor.add(A, KvKey(2), UseOrder(2), false);
        assert_eq!(evictor.victim(everyone), Some((KvKey(1), Rule::Lru, UseOrder(1))));
        evictor.add(B, KvKey(1), UseOrder(3), false);
        assert_eq!(evictor.victim(everyone), Some((KvKey(2), Rule::Lru, UseOrder(2))));
    }

    #[test]
    fn an_ended_conversation_goes_before_all_others() {
        let mut evictor = Evictor::default();
        evictor.add(A, KvKey(1), UseOrder(1), false);
        evictor.add(A, KvKey(2), UseOrder(2), true);
        assert_eq!(evictor.victim(everyone), Some((KvKey(2), Rule::Ended, UseOrder(2))));
        evictor.remove(A, KvKey(2));
        assert_eq!(evictor.victim(everyone).unwrap().0, KvKey(1));
    }

    #[test]
    fn a_tenant_that_may_not_lose_is_passed_over() {
        let mut evictor = Evictor::default();
        evictor.add(A, KvKey(1), UseOrder(1), true);
        evictor.add(B, KvKey(2), UseOrder(2), false);
        assert_eq!(evictor.victim(|tenant| tenant == B).unwrap().0, KvKey(2));
        assert_eq!(evictor.victim(|_| false), None);
    }
}
