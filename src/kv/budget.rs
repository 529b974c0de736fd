//! How much of a pool is a tenant's own, and how much may it have?
//!
//! The floor is what no other tenant's turn takes from it; the ceiling what it may have once memory is short. By default
//! half of the tenant's weighted share among the active tenants, and 30 % of the pool or the share where that is more. Its
//! pins keep from everybody as much as its floor, unless it was given something else.
//! Invariants: floors together leave room for one sequence of the full window, and so does every ceiling, so that a
//! tenant's oldest turn always gets on; the same holds of what floors and pins keep together. Cost: O(1) to ask, O(tenants) when a tenant comes, goes or is given something else.

use crate::types::{BlockCount, PoolPart, TenantId, TierBudget, Weight};

/// Default ceiling, in thousandths of the pool.
const CEILING_PERMILLE: u32 = 300;

/// What one tenant was given, and what that comes to now.
#[derive(Clone, Copy, Debug)]
struct Account {
    /// `None`: the tenant is gone, and what it still holds is anybody's.
    weight: Option<Weight>,
    budget: TierBudget,
    /// It has had a turn.
    seen: bool,
    share: BlockCount,
    floor: BlockCount,
    ceiling: BlockCount,
    pins: BlockCount,
}

impl Account {
    const NEW: Account = Account {
        weight: Some(Weight::ORDINARY),
        budget: TierBudget { floor: None, ceiling: None, pins: None },
        seen: false,
        share: BlockCount(0),
        floor: BlockCount(0),
        ceiling: BlockCount(0),
        pins: BlockCount(0),
    };
}

/// Floors and ceilings of one pool.
#[derive(Debug)]
pub struct Budget {
    total: BlockCount,
    block_bytes: u64,
    /// Blocks of the longest sequence that must always find room.
    window: BlockCount,
    /// By tenant: ids are given out from 0 without gaps.
    accounts: Vec<Account>,
}

impl Budget {
    /// For a pool of `total` blocks, in which a sequence of `window` blocks must always find room.
    pub fn new(total: BlockCount, block_bytes: u64, window: BlockCount) -> Self {
        Self { total, block_bytes, window, accounts: Vec::new() }
    }

    /// Notes that a tenant has a turn: from now on it is one of those who share. Says whether that is new.
    pub fn see(&mut self, tenant: TenantId) -> bool {
        let account = self.account(tenant);
        let is_new = !std::mem::replace(&mut account.seen, true);
        if is_new {
            self.share_out();
        }
        is_new
    }

    /// Replaces what everybody was given. Whoever is not named is gone.
    pub fn grant(&mut self, grants: impl Iterator<Item = (TenantId, Weight, TierBudget)>) {
        self.accounts.iter_mut().for_each(|account| account.weight = None);
        for (tenant, weight, budget) in grants {
            let account = self.account(tenant);
            (account.weight, account.budget) = (Some(weight), budget);
        }
        self.share_out();
    }

    /// Its part of the pool by the weights of those who have had a turn.
    pub fn share(&self, tenant: TenantId) -> BlockCount {
        self.accounts.get(tenant.0 as usize).map_or(BlockCount(0), |account| account.share)
    }

    /// Its weight; `None`: it is gone.
    pub fn weight(&self, tenant: TenantId) -> Option<Weight> {
        self.accounts.get(tenant.0 as usize).map_or(Some(Weight::ORDINARY), |account| account.weight)
    }

    /// Blocks that other tenants' turns leave this one.
    pub fn floor(&self, tenant: TenantId) -> BlockCount {
        self.accounts.get(tenant.0 as usize).map_or(BlockCount(0), |account| account.floor)
    }

    /// Blocks that it may have while others want some.
    pub fn ceiling(&self, tenant: TenantId) -> BlockCount {
        self.accounts.get(tenant.0 as usize).map_or(self.total, |account| account.ceiling)
    }

    /// Blocks that its pins may keep from everybody.
    pub fn pins(&self, tenant: TenantId) -> BlockCount {
        self.accounts.get(tenant.0 as usize).map_or(BlockCount(0), |account| account.pins)
    }

    fn account(&mut self, tenant: TenantId) -> &mut Account {
        let index = tenant.0 as usize;
        if self.accounts.len() <= index {
            self.accounts.resize(index + 1, Account::NEW);
        }
        &mut self.accounts[index]
    }

    fn share_out(&mut self) {
        let weight =
            |account: &Account| account.weight.filter(|_| account.seen).map_or(0, |weight| u64::from(weight.0));
        let (total, window) = (self.total, self.window);
        let all: u64 = self.accounts.iter().map(weight).sum();
        let pool_bytes = u64::from(total.0) * self.block_bytes;
        let blocks = |part: PoolPart| {
            let blocks = part.bytes(pool_bytes).checked_div(self.block_bytes).unwrap_or(0);
            BlockCount(u32::try_from(blocks).map_or(total.0, |blocks| blocks.min(total.0)))
        };
        for account in &mut self.accounts {
            let share = (u64::from(total.0) * weight(account)).checked_div(all).unwrap_or(0);
            let share = BlockCount(u32::try_from(share).unwrap_or(total.0));
            account.share = share;
            let usual = share.max(blocks(PoolPart::Permille(CEILING_PERMILLE)));
            account.ceiling = account.budget.ceiling.map_or(usual, blocks).max(window);
            let floor = account.budget.floor.map_or(BlockCount(share.0 / 2), blocks).min(account.ceiling);
            account.floor = if account.weight.is_some() { floor } else { BlockCount(0) };
        }
        let spare = u64::from(total.0.saturating_sub(window.0));
        let floors: u64 = self.accounts.iter().map(|account| u64::from(account.floor.0)).sum();
        if floors > spare {
            for account in &mut self.accounts {
                // No larger than it was: `spare` is less than `floors`.
                account.floor.0 = (u64::from(account.floor.0) * spare / floors) as u32;
            }
        }
        // A turn at the ceiling displaces only its own tenant's, so that its pins leave it a window below that.
        for account in self.accounts.iter_mut() {
            let most = BlockCount(account.ceiling.0 - window.0.min(account.ceiling.0));
            let given = account.budget.pins.map_or(account.floor, blocks);
            account.pins = if account.weight.is_some() { given.min(most) } else { BlockCount(0) };
        }
        // Beyond the floors they share what neither floors nor the window need.
        let beyond = |account: &Account| u64::from(account.pins.0.saturating_sub(account.floor.0));
        let wanted: u64 = self.accounts.iter().map(beyond).sum();
        let left = spare.saturating_sub(self.accounts.iter().map(|account| u64::from(account.floor.0)).sum());
        if wanted > left {
            for account in &mut self.accounts {
                // No larger than it was: `left` is less than `wanted`.
                let kept = (beyond(account) * left / wanted) as u32;
                account.pins.0 = account.pins.0.min(account.floor.0 + kept);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(0);
    const B: TenantId = TenantId(1);
    const C: TenantId = TenantId(2);

    fn pool(blocks: u32, window: u32) -> Budget {
        Budget::new(BlockCount(blocks), 1000, BlockCount(window))
    }

    fn given(floor: Option<PoolPart>, ceiling: Option<PoolPart>) -> TierBudget {
        TierBudget { floor, ceiling, pins: None }
    }

    #[test]
    fn floors_leave_room_for_a_sequence_of_the_full_window() {
        let mut budget = pool(100, 90);
        budget.see(A);
        assert_eq!(budget.floor(A), BlockCount(10));
        for tenant in 1..5 {
            assert!(budget.see(TenantId(tenant)));
        }
        assert_eq!(budget.floor(A), BlockCount(2));
        let mut budget = pool(100, 10);
        budget.see(A);
        assert_eq!(budget.floor(A), BlockCount(50));
        // Fixed ones shrink in proportion.
        budget.see(B);
        let fixed = |permille| given(Some(PoolPart::Permille(permille)), Some(PoolPart::Permille(1000)));
        budget.grant([(A, Weight(1000), fixed(600)), (B, Weight(1000), fixed(400))].into_iter());
        assert_eq!((budget.floor(A), budget.floor(B)), (BlockCount(54), BlockCount(36)));
    }

    #[test]
    fn shares_follow_the_weights_of_those_who_have_had_a_turn() {
        let mut budget = pool(1000, 10);
        let usual = TierBudget::default();
        budget.grant([(A, Weight(1000), usual), (B, Weight(3000), usual), (C, Weight(1000), usual)].into_iter());
        budget.see(A);
        assert_eq!((budget.floor(A), budget.ceiling(A)), (BlockCount(500), BlockCount(1000)));
        budget.see(B);
        assert_eq!((budget.floor(A), budget.floor(B)), (BlockCount(125), BlockCount(375)));
        assert_eq!((budget.ceiling(A), budget.ceiling(B)), (BlockCount(300), BlockCount(750)));
    }

    #[test]
    fn a_default_floor_stops_at_the_ceiling_and_a_ceiling_at_the_window() {
        let mut budget = pool(1000, 50);
        budget.see(A);
        let low = given(None, Some(PoolPart::Bytes(100_000)));
        budget.grant([(A, Weight(1000), low)].into_iter());
        assert_eq!((budget.floor(A), budget.ceiling(A)), (BlockCount(100), BlockCount(100)));
        budget.grant([(A, Weight(1000), given(None, Some(PoolPart::Permille(10))))].into_iter());
        assert_eq!(budget.ceiling(A), BlockCount(50));
    }

    #[test]
    fn pins_keep_the_floor_by_default_and_never_what_others_floors_and_the_window_need() {
        let given = |floor, pins| TierBudget {
            floor: Some(PoolPart::Permille(floor)),
            ceiling: Some(PoolPart::Permille(1000)),
            pins: Some(PoolPart::Permille(pins)),
        };
        let mut budget = pool(100, 10);
        budget.see(A);
        assert_eq!((budget.floor(A), budget.pins(A)), (BlockCount(50), BlockCount(50)));
        budget.see(B);
        budget.grant([(A, Weight(1000), given(100, 700)), (B, Weight(1000), given(200, 500))].into_iter());
        // 60 are left beside floors and window; 60 and 30 are wanted.
        assert_eq!((budget.pins(A), budget.pins(B)), (BlockCount(50), BlockCount(40)));
        budget.grant([(A, Weight(1000), given(100, 0))].into_iter());
        assert_eq!((budget.pins(A), budget.pins(B)), (BlockCount(0), BlockCount(0)));
    }

    #[test]
    fn pins_leave_a_window_below_the_ceiling() {
        let mut budget = pool(100, 30);
        budget.see(A);
        let low = TierBudget { ceiling: Some(PoolPart::Permille(400)), ..TierBudget::default() };
        budget.grant([(A, Weight(1000), low)].into_iter());
        assert_eq!((budget.ceiling(A), budget.pins(A)), (BlockCount(40), BlockCount(10)));
    }

    #[test]
    fn one_that_is_gone_keeps_nothing_for_itself() {
        let mut budget = pool(1000, 10);
        budget.see(A);
        budget.see(B);
        budget.grant([(A, Weight(1000), TierBudget::default())].into_iter());
        assert_eq!((budget.floor(A), budget.floor(B)), (BlockCount(500), BlockCount(0)));
    }
}
