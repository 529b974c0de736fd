//! Which conversations lost device memory, and were back at once?
//!
//! Those are what an eviction was wrong about. A conversation that loses blocks is remembered for as long as its return
//! would be early, also when no tier holds any of it any more. Cost: O(1) an eviction and a turn, amortised.

use std::collections::{HashMap, VecDeque};

use crate::types::{KvKey, TenantId, Tick};

/// A turn that comes so soon after an eviction is early, in microseconds.
const EARLY_US: u64 = 60_000_000;
/// Most conversations that are remembered; past that the oldest is forgotten, and its return counted by nobody.
const MOST: usize = 1 << 16;

/// Of one tenant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Early {
    /// Silences in which a conversation lost device blocks.
    pub evicted: u64,
    /// Of these, how many ended within a minute after the loss.
    pub returned: u64,
}

#[derive(Debug, Default)]
pub struct EarlyReturns {
    tenants: Vec<Early>,
    /// When a silent conversation lost blocks last, and whose it is.
    lost: HashMap<KvKey, (Tick, TenantId)>,
    /// The same, the oldest first, and those that were overtaken by a later loss.
    order: VecDeque<(Tick, KvKey)>,
}

impl EarlyReturns {
    /// A silent conversation loses device blocks; `first`: it had lost none in this silence.
    pub fn lose(&mut self, now: Tick, key: KvKey, tenant: TenantId, first: bool) {
        while let Some(&(at, oldest)) = self.order.front() {
            if now.0.saturating_sub(at.0) <= EARLY_US && self.order.len() < MOST {
                break;
            }
            self.order.pop_front();
            if self.lost.get(&oldest).is_some_and(|(last, _)| *last == at) {
                self.lost.remove(&oldest);
            }
        }
        self.of(tenant).evicted += u64::from(first);
        if self.lost.insert(key, (now, tenant)).is_none_or(|(last, _)| last != now) {
            self.order.push_back((now, key));
        }
    }

    /// A turn of a conversation comes.
    pub fn come_back(&mut self, now: Tick, key: KvKey) {
        if let Some((at, tenant)) = self.lost.remove(&key)
            && now.0.saturating_sub(at.0) <= EARLY_US
        {
            self.of(tenant).returned += 1;
        }
    }

    /// A tenant's, so far.
    pub fn of_tenant(&self, tenant: TenantId) -> Early {
        self.tenants.get(tenant.0 as usize).copied().unwrap_or_default()
    }

    fn of(&mut self, tenant: TenantId) -> &mut Early {
        let index = tenant.0 as usize;
        if self.tenants.len() <= index {
            self.tenants.resize(index + 1, Early::default());
        }
        &mut self.tenants[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(0);
    const B: TenantId = TenantId(2);
    const S: u64 = 1_000_000;

    #[test]
    fn a_return_within_a_minute_is_early_and_counts_once() {
        let mut early = EarlyReturns::default();
        early.lose(Tick(0), KvKey(1), A, true);
        early.lose(Tick(10 * S), KvKey(2), A, true);
        early.lose(Tick(20 * S), KvKey(3), B, true);
        // From its last loss on.
        early.lose(Tick(50 * S), KvKey(1), A, false);
        early.come_back(Tick(110 * S), KvKey(1));
        early.come_back(Tick(110 * S), KvKey(1));
        early.come_back(Tick(70 * S + 1), KvKey(2));
        early.come_back(Tick(21 * S), KvKey(4));
        assert_eq!(early.of_tenant(A), Early { evicted: 2, returned: 1 });
        assert_eq!(early.of_tenant(B), Early { evicted: 1, returned: 0 });
        early.come_back(Tick(80 * S), KvKey(3));
        assert_eq!(early.of_tenant(B), Early { evicted: 1, returned: 1 });
    }

    #[test]
    fn no_more_is_remembered_than_a_minutes_losses() {
        let mut early = EarlyReturns::default();
        for at in 0..200 {
            early.lose(Tick(at * S), KvKey(u128::from(at)), A, true);
        }
        assert_eq!((early.lost.len(), early.order.len()), (61, 61));
        for key in 0..2 * MOST as u128 {
            early.lose(Tick(200 * S), KvKey(key), A, true);
        }
        assert!(early.lost.len() <= MOST && early.order.len() <= MOST);
    }
}
