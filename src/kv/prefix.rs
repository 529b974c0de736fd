//! Which full blocks of a tier can be shared, by their prefix hash?
//!
//! The index owns nothing: it finds blocks that conversations hold, and an entry whose last holder has gone is no entry; the
//! next block in its place takes its room. It is small, so that among a million blocks looking one up waits for memory as
//! seldom as can be: an entry is eight bytes in a table with open addressing, what a place is known for is sixteen, and the
//! block itself has the rest of its hash.

use std::sync::{Arc, Weak};

use super::block::{Place, PrefixHash, SealedBlock};
use crate::kernels::prefetch::{Near, prefetch};

/// Where a hash leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// The upper half of the short form of the hash.
    tag: u32,
    place: u32,
}

/// No entry: no pool has such a place.
const NONE: Entry = Entry { tag: 0, place: u32::MAX };

/// The newest full block of a place.
#[derive(Debug)]
struct Known<P: Place> {
    /// The short form of its hash.
    short: u64,
    block: Weak<SealedBlock<P>>,
}

/// Prefix hash → block, for one tier.
#[derive(Debug)]
pub struct PrefixIndex<P: Place> {
    /// Each entry is the first free one from where its hash points to, or behind that. A power of two of them. The entry of
    /// a place for what it was known for before is stale, and stays until the table is made anew.
    entries: Vec<Entry>,
    used: usize,
    /// By place.
    known: Vec<Option<Known<P>>>,
}

impl<P: Place> Default for PrefixIndex<P> {
    fn default() -> Self {
        Self { entries: vec![NONE; 64], used: 0, known: Vec::new() }
    }
}

impl<P: Place> PrefixIndex<P> {
    pub fn get(&self, hash: &PrefixHash) -> Option<Arc<SealedBlock<P>>> {
        self.find(hash).map(|(_, block)| block)
    }

    /// Has what `insert` will touch for such a block brought from memory.
    pub fn prefetch(&self, block: &SealedBlock<P>) {
        prefetch(&raw const self.entries[self.start(block.hash().short())], Near::First);
        prefetch(self.known.as_ptr().wrapping_add(block.id().index() as usize), Near::First);
    }

    /// Makes a block known, and gives the one that is: `block`, or an equal one that was there first (then `block`'s place
    /// is given back).
    pub fn insert(&mut self, block: SealedBlock<P>) -> Arc<SealedBlock<P>> {
        if let Some(known) = self.get(&block.hash()) {
            assert_eq!(known.tenant(), block.tenant(), "a block crossed tenants");
            return known;
        }
        self.make_room();
        let (place, short) = (block.id().index(), block.hash().short());
        let block = Arc::new(block);
        self.enter(short, place);
        if self.known.len() <= place as usize {
            self.known.resize_with(place as usize + 1, || None);
        }
        self.known[place as usize] = Some(Known { short, block: Arc::downgrade(&block) });
        block
    }

    /// Makes a block unknown, such as one whose bytes were found damaged; its holders keep it.
    pub fn remove(&mut self, hash: &PrefixHash) {
        if let Some((place, _)) = self.find(hash) {
            self.known[place as usize] = None;
        }
    }

    /// A block with this hash that somebody holds, and its place.
    fn find(&self, hash: &PrefixHash) -> Option<(u32, Arc<SealedBlock<P>>)> {
        let short = hash.short();
        let mut at = self.start(short);
        while self.entries[at] != NONE {
            let Entry { tag, place } = self.entries[at];
            if tag == upper(short)
                && let Some(known) = self.known[place as usize].as_ref().filter(|known| known.short == short)
                && let Some(block) = known.block.upgrade().filter(|block| block.hash() == *hash)
            {
                return Some((place, block));
            }
            at = (at + 1) & (self.entries.len() - 1);
        }
        None
    }

    /// Where the search for a hash begins.
    fn start(&self, short: u64) -> usize {
        short as usize & (self.entries.len() - 1)
    }

    /// Makes an entry. There is room for it.
    fn enter(&mut self, short: u64, place: u32) {
        let mut at = self.start(short);
        while self.entries[at] != NONE {
            at = (at + 1) & (self.entries.len() - 1);
        }
        self.entries[at] = Entry { tag: upper(short), place };
        self.used += 1;
    }

    /// Drops all stale entries once half are used, so that a search seldom leaves a cache line; with four entries for each
    /// place that is O(1) a block.
    fn make_room(&mut self) {
        if self.used < self.entries.len() / 2 {
            return;
        }
        let size = (4 * self.known.len()).next_power_of_two().max(self.entries.len());
        self.entries.clear();
        self.entries.resize(size, NONE);
        self.used = 0;
        let known = std::mem::take(&mut self.known);
        for (place, known) in (0..).zip(&known) {
            known.iter().for_each(|known| self.enter(known.short, place));
        }
        self.known = known;
    }
}

fn upper(short: u64) -> u32 {
    (short >> 32) as u32
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
        assert_eq!(index.get(&hashes[0]).map(|block| block.id()), Some(first.id()));
        assert_eq!(index.get(&hashes[1]).map(|block| block.id()), Some(second.id()));
        drop(second);
        assert!(index.get(&hashes[1]).is_none(), "its holder has gone");
    }

    #[test]
    fn what_somebody_holds_is_found_and_what_is_gone_takes_no_room() {
        let places = Places::new(BlockCount(40));
        let holder = places.accounts(|_, accounts| accounts.open(TenantId(0)));
        let mut index = PrefixIndex::<BlockId>::default();
        let mut held: Vec<Option<Arc<SealedBlock<BlockId>>>> = vec![None; 60];
        let mut random = 1_u64;
        for step in 0..20_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let which = (random >> 33) as usize % held.len();
            // Some begin where others do, and some end in the table's last entry.
            let mut hash = [which as u8 % 7; 32];
            (hash[0], hash[31]) = (if which < 30 { 63 } else { which as u8 }, which as u8);
            let hash = PrefixHash(hash);
            assert_eq!(
                index.get(&hash).map(|block| block.id()),
                held[which].as_ref().map(|block| block.id()),
                "{step}"
            );
            held[which] = match held[which].take() {
                Some(_) => None,
                None => places
                    .take(TenantId(0), holder)
                    .map(|slot| index.insert(SealedBlock::found(slot, PrefixHash::ROOT, hash, ()))),
            };
        }
        assert_eq!(index.entries.len(), 256, "four for each place, in a power of two");
        let last = held.iter().flatten().next().expect("some are held");
        index.remove(&last.hash());
        assert!(index.get(&last.hash()).is_none(), "it is unknown, and is held");
    }
}
