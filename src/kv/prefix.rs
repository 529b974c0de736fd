//! Which full blocks of a tier can be shared, by their prefix hash?
//!
//! The index owns nothing: it finds blocks that conversations hold, and an entry whose last holder has gone is no entry.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Weak};

use super::block::{Place, PrefixHash, SealedBlock};

/// Takes a number for its own hash. For prefix hashes alone: they are keyed, so that nobody can make them collide.
#[derive(Debug, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("a prefix hash is hashed as one number");
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Prefix hash → block, for one tier.
#[derive(Debug)]
pub struct PrefixIndex<P: Place> {
    blocks: HashMap<PrefixHash, Weak<SealedBlock<P>>, BuildHasherDefault<AsItIs>>,
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
        self.blocks.get(hash)?.upgrade()
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
        self.blocks.insert(block.hash(), Arc::downgrade(&block));
        block
    }

    /// Makes a block unknown, such as one whose bytes were found damaged; its holders keep it.
    pub fn remove(&mut self, hash: &PrefixHash) {
        self.blocks.remove(hash);
    }
}
