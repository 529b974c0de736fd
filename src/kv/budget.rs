//! How much of the device pool is a tenant's own?
//!
//! The floor: what no other tenant's turn may take from it. Half of an equal share among the tenants that hold anything,
//! and never so much that all floors together leave no room for one sequence of the full window.

use crate::types::{BlockCount, TenantId};

/// Floors of one pool.
#[derive(Debug)]
pub struct Budget {
    total: BlockCount,
    window: BlockCount,
    /// Tenants seen so far.
    tenants: u32,
}

impl Budget {
    /// For a pool of `total` blocks, in which a sequence of `window` blocks must always find room.
    pub fn new(total: BlockCount, window: BlockCount) -> Self {
        Self { total, window, tenants: 1 }
    }

    /// Notes a tenant. Ids are given out from 0 without gaps.
    pub fn see(&mut self, tenant: TenantId) {
        self.tenants = self.tenants.max(tenant.0 + 1);
    }

    /// Blocks that other tenants' turns leave each tenant.
    pub fn floor(&self) -> BlockCount {
        let spare = self.total.0.saturating_sub(self.window.0);
        BlockCount((self.total.0 / 2).min(spare) / self.tenants)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_leave_room_for_a_sequence_of_the_full_window() {
        let mut budget = Budget::new(BlockCount(100), BlockCount(90));
        assert_eq!(budget.floor(), BlockCount(10));
        budget.see(TenantId(4));
        assert_eq!(budget.floor(), BlockCount(2));
        assert_eq!(Budget::new(BlockCount(100), BlockCount(10)).floor(), BlockCount(50));
    }
}
