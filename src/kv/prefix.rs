//! Which full blocks of a tier can be shared, by their prefix hash?
//!
//! The index owns nothing: it finds blocks that conversations hold, and an entry whose last holder has gone is no entry. It
//! is small, so that among a million blocks looking one up waits for memory as seldom as can be: an entry has the first
//! bytes of a hash, and the block itself the rest. Of two blocks whose first bytes are the same, once in 2⁶⁴, the newer is
//! found.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Weak};

use super::block::{Place, PrefixHash, SealedBlock};

/// Takes a number that is as good as random for its own hash.
#[derive(Debug, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("the index hashes numbers alone");
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Prefix hash → block, for one tier.
#[derive(Debug)]
pub struct PrefixIndex<P: Place> {
    /// By the short form of their hashes.
    blocks: HashMap<u64, Weak<SealedBlock<P>>, BuildHasherDefault<AsItIs>>,
    /// Size at which dead entries are swept out next; doubles with the living, so that sweeping costs O(1) an insertion.
    sweep_at: usize,
}

impl<P: Place> Default for PrefixIndex<P> {
    fn default() -> Self {
        Self { blocks: HashMap::default(), sweep_at: 1024 }
    }
}

impl<P: Place> PrefixIndex<P> {
    pub fn get(&self, hash: &PrefixHash) -> Option<Arc<SealedBlock<P>>> {
        self.blocks.get(&hash.short())?.upgrade().filter(|block| block.hash() == *hash)
    }

    /// Makes a block known, and gives the one that is: `block`, or an equal one that was there first (then `block`'s place
    /// is given back).
    pub fn insert(&mut self, block: SealedBlock<P>) -> Arc<SealedBlock<P>> {
        if let Some(known) = self.get(&block.hash()) {
            assert_eq!(known.tenant(), block.tenant(), "a block crossed tenants");
            return known;
        }
        if self.blocks.len() >= self.sweep_at {
            self.blocks.retain(|_, block| block.strong_count() > 0);
            self.sweep_at = (2 * self.blocks.len()).max(1024);
        }
        let block = Arc::new(block);
        self.blocks.insert(block.hash().short(), Arc::downgrade(&block));
        block
    }

    /// Makes a block unknown, such as one whose bytes were found damaged; its holders keep it.
    pub fn remove(&mut self, hash: &PrefixHash) {
        self.blocks.remove(&hash.short());
    }
}

#[cfg(test)]
mod tests {
    use super::super::block::Places;
    use super::*;
    use crate::types::{BlockCount, BlockId, TenantId};

    #[test]
    fn of_two_blocks_whose_hashes_begin_alike_none_is_taken_for_the_other() {
        let places = Places::new(BlockCount(2));
        let holder = places.accounts(|_, accounts| accounts.open(TenantId(0)));
        let mut index = PrefixIndex::<BlockId>::default();
        let hashes = [1, 2].map(|end| {
            let mut hash = [7; 32];
            hash[31] = end;
            PrefixHash(hash)
        });
        let [first, second] = hashes.map(|hash| {
            let slot = places.take(TenantId(0), holder).unwrap();
            index.insert(SealedBlock::found(slot, PrefixHash::ROOT, hash, ()))
        });
        assert_ne!(first.id(), second.id());
        assert!(index.get(&hashes[0]).is_none(), "the newer is found");
        assert_eq!(index.get(&hashes[1]).map(|block| block.id()), Some(second.id()));
        drop(second);
        assert!(index.get(&hashes[1]).is_none(), "its holder has gone");
    }
}
