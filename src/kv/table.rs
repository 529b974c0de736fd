//! Which blocks hold a sequence, in order?

use std::sync::Arc;

use super::accounts::{HolderId, Holding};
use super::block::{Place, Places, PrefixHash, SealedBlock, Slot, TailBlock};
use super::held::{Account, Blocks};
use crate::types::{BlockCount, BlockId, BlockSize, TenantId, Tick, TokenCount};

/// A conversation's blocks in one tier: full ones from the first token on, then perhaps a gap and more full ones, then
/// perhaps a tail.
#[derive(Debug)]
pub struct BlockTable<P: Place> {
    account: Arc<Account>,
    pub sealed: Blocks<P>,
    /// Full blocks behind a gap.
    pub back: Option<Back<P>>,
    /// Follows the last full block.
    pub tail: Option<Arc<TailBlock<P>>>,
}

/// Full blocks that follow each other behind a gap: what lies in the gap is encoded again, which they need not be, since
/// their KV was made of the same tokens before them. Never empty, and never where the front reaches it.
#[derive(Debug)]
pub struct Back<P: Place> {
    /// Index of the first.
    pub first: usize,
    pub sealed: Blocks<P>,
}

impl<P: Place> Back<P> {
    fn end(&self) -> usize {
        self.first + self.sealed.len()
    }
}

impl<P: Place> BlockTable<P> {
    /// An empty one, of a tenant's conversation.
    pub fn new(places: &Arc<Places>, tenant: TenantId) -> Self {
        let account = Account::open(places, tenant);
        Self { sealed: Blocks::none(&account), back: None, tail: None, account }
    }

    /// Takes a place for the conversation, if one is free.
    pub fn take_place(&self) -> Option<Slot<P>> {
        self.account.take_place()
    }

    /// What the conversation holds of the tier, and has held.
    pub fn holding(&self) -> Holding {
        self.account.holding(self.full().map(|block| *block.split().lock()))
    }

    /// Names the conversation's account; for tests.
    pub fn holder(&self) -> HolderId {
        self.account.holder()
    }

    pub fn clear(&mut self) {
        self.sealed.truncate(0);
        self.back = None;
        self.tail = None;
    }

    /// Puts full blocks behind a gap that ends at block `first`. For a table that has nothing there.
    pub fn put_behind_gap(&mut self, first: usize, blocks: impl IntoIterator<Item = Arc<SealedBlock<P>>>) {
        let mut sealed = Blocks::none(&self.account);
        sealed.extend(blocks);
        self.back = Some(Back { first, sealed });
    }

    pub fn is_empty(&self) -> bool {
        self.sealed.is_empty() && self.back.is_none() && self.tail.is_none()
    }

    /// All full blocks.
    pub fn full(&self) -> impl Iterator<Item = &Arc<SealedBlock<P>>> {
        self.sealed.iter().chain(self.back.iter().flat_map(|back| back.sealed.iter()))
    }

    /// The full block of this index in the sequence.
    pub fn get(&self, index: usize) -> Option<&Arc<SealedBlock<P>>> {
        let in_back = || self.back.as_ref().and_then(|back| back.sealed.get(index.checked_sub(back.first)?));
        self.sealed.get(index).or_else(in_back)
    }

    /// Index after the last full block: where the tail is, if there is one.
    pub fn end(&self) -> usize {
        self.back.as_ref().map_or(self.sealed.len(), Back::end)
    }

    /// Blocks of the sequence up to the table's end, the gap and the tail included.
    pub fn end_with_tail(&self) -> usize {
        self.end() + usize::from(self.tail.is_some())
    }

    /// The first full block from index `from` on that is not in the gap.
    pub fn first_from(&self, from: usize) -> usize {
        self.back.as_ref().map_or(from, |back| back.first)
    }

    /// Blocks that the table names, the tail included.
    pub fn blocks(&self) -> BlockCount {
        let back = self.back.as_ref().map_or(0, |back| back.sealed.len());
        let blocks = self.sealed.len() + back + usize::from(self.tail.is_some());
        BlockCount(u32::try_from(blocks).expect("a window bounds a table"))
    }

    /// Tokens whose KV the table holds.
    pub fn tokens(&self, size: BlockSize) -> TokenCount {
        let full = self.blocks().0 - u32::from(self.tail.is_some());
        TokenCount(full * size.0 + self.tail.as_ref().map_or(0, |tail| tail.len().0))
    }

    /// If all that is left is a prefix that conversations share, and no other holds it: when it was last used.
    pub fn last_of_shared(&self) -> Option<Tick> {
        let end = self.sealed.last().filter(|_| self.tail.is_none() && self.back.is_none())?;
        end.shared_at().filter(|_| Arc::strong_count(end) == 1)
    }

    /// Gives up what doesn't lie before block `end`. The tail stays only if that is nothing else.
    pub fn truncate(&mut self, end: usize) {
        if end >= self.end() {
            return;
        }
        self.tail = None;
        self.sealed.truncate(end);
        if let Some(back) = &mut self.back {
            back.sealed.truncate(end.saturating_sub(back.first));
        }
        self.back.take_if(|back| back.sealed.is_empty());
    }

    /// Gives up what is not of the sequence with this chain.
    pub fn keep(&mut self, chain: &[PrefixHash]) {
        let same = |(index, block): (usize, &Arc<SealedBlock<P>>)| chain.get(index) == Some(&block.hash());
        let end = self.end();
        let front = self.sealed.iter().enumerate().take_while(|&block| same(block)).count();
        match &mut self.back {
            None => self.sealed.truncate(front),
            Some(back) => {
                // Its hashes say what lies before it, whatever of that is here.
                let kept = (back.first..).zip(back.sealed.iter()).take_while(|&block| same(block)).count();
                back.sealed.truncate(kept);
                self.sealed.truncate(front);
            }
        }
        self.back.take_if(|back| back.sealed.is_empty());
        self.tail.take_if(|_| self.back.as_ref().map_or(self.sealed.len(), Back::end) < end);
    }

    /// Adds a full block to the front's end. A tail from before is older than it, unless it lies behind the gap.
    pub fn add(&mut self, block: Arc<SealedBlock<P>>) {
        if self.back.is_none() {
            self.tail = None;
        }
        self.sealed.push(block);
        self.close();
    }

    /// Adds a full block where it belongs, if that is the front's end or the back's. Whether it is the front's. With a
    /// second gap there is no place for it.
    pub fn arrive(&mut self, index: usize, block: Arc<SealedBlock<P>>) -> bool {
        if index == self.sealed.len() {
            self.sealed.push(block);
            self.close();
            return true;
        }
        if index > self.sealed.len() {
            let back = self.back.get_or_insert_with(|| Back { first: index, sealed: Blocks::none(&self.account) });
            if back.end() == index {
                back.sealed.push(block);
            }
        }
        false
    }

    /// Joins what the front has reached. Whether there was anything.
    pub fn close(&mut self) -> bool {
        let Some(mut back) = self.back.take_if(|back| back.first <= self.sealed.len()) else { return false };
        let reached = self.sealed.len() - back.first;
        self.sealed.append(back.sealed.split_off(reached));
        true
    }

    /// Gives up the last block: the tail, else the last full one.
    pub fn take_end(&mut self) -> Option<Taken> {
        let index = self.end_with_tail().checked_sub(1)?;
        if let Some(tail) = self.tail.take() {
            return Some(Taken { index, freed: Arc::strong_count(&tail) == 1 });
        }
        let block = match &mut self.back {
            Some(back) => back.sealed.pop(),
            None => self.sealed.pop(),
        };
        self.back.take_if(|back| back.sealed.is_empty());
        Some(Taken { index, freed: Arc::strong_count(&block?) == 1 })
    }

    /// Gives up the first full block from index `from` on that is not in the gap yet, so that the gap begins there. `None`
    /// if none is left, or the tail follows the last one: that goes first.
    pub fn take_front(&mut self, from: usize) -> Option<Taken> {
        let left = self.back.as_ref().map_or(self.sealed.len().saturating_sub(from), |back| back.sealed.len());
        if left == 0 || left == 1 && self.tail.is_some() {
            return None;
        }
        let sealed = &mut self.sealed;
        let back = self.back.get_or_insert_with(|| Back { first: from, sealed: sealed.split_off(from) });
        let index = back.first;
        let block = back.sealed.pop_front()?;
        back.first += 1;
        self.back.take_if(|back| back.sealed.is_empty());
        Some(Taken { index, freed: Arc::strong_count(&block) == 1 })
    }

    /// Blocks (private, shared): another conversation's table in this tier names a shared one too.
    pub fn shares(&self) -> (BlockCount, BlockCount) {
        let shared = self.full().filter(|block| block.split().lock().holders() > 1).count();
        let shared = BlockCount(u32::try_from(shared).expect("a window bounds a table"));
        (BlockCount(self.blocks().0 - shared.0), shared)
    }
}

/// A block that was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// In the sequence.
    pub index: usize,
    /// Whether its place is free now: nobody else holds it.
    pub freed: bool,
}

/// Proof that a running sequence's blocks are all on the device: it borrows the manager, so nothing is evicted, moved or
/// given back while it lives. A batch is made of these and of nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Resident<'pool> {
    table: &'pool [BlockId],
    context: TokenCount,
    gap_ends: Option<TokenCount>,
}

impl<'pool> Resident<'pool> {
    pub(super) fn new(table: &'pool [BlockId], context: TokenCount, gap_ends: Option<TokenCount>) -> Self {
        Self { table, context, gap_ends }
    }

    /// Device blocks in order; those past the context are there to be written.
    pub fn table(&self) -> &'pool [BlockId] {
        self.table
    }

    /// Tokens whose KV the blocks hold, from the first one on.
    pub fn context(&self) -> TokenCount {
        self.context
    }

    /// Where what is encoded now ends, since the KV of what follows is here, or on its way.
    pub fn gap_ends(&self) -> Option<TokenCount> {
        self.gap_ends
    }
}

#[cfg(test)]
mod tests {
    use super::super::block::{OpenBlock, Places};
    use super::*;
    use crate::types::{TenantId, TenantKey, TokenId};

    const SIZE: BlockSize = BlockSize(2);
    const T: TenantId = TenantId(0);
    const KEY: TenantKey = TenantKey([3; 32]);

    /// Ten full blocks and a tail, and their chain.
    fn table(places: &Arc<Places>) -> (BlockTable<BlockId>, Vec<PrefixHash>) {
        let mut table = BlockTable::new(places, T);
        let mut parent = PrefixHash::ROOT;
        for index in 0..10 {
            let tokens = vec![TokenId(index), TokenId(index)];
            let open = OpenBlock::with_tokens(table.take_place().unwrap(), tokens);
            let sealed = open.seal(parent, &KEY, SIZE).unwrap();
            parent = sealed.hash();
            table.add(Arc::new(sealed));
        }
        let tail = OpenBlock::with_tokens(table.take_place().unwrap(), vec![TokenId(99)]);
        table.tail = tail.rest().map(Arc::new);
        let chain = table.full().map(|block| block.hash()).collect();
        (table, chain)
    }

    #[test]
    fn blocks_go_from_the_front_then_the_tail_then_the_rest() {
        let places = Places::new(BlockCount(11));
        let (mut table, _) = table(&places);
        for (gone, index) in (2..9).enumerate() {
            assert_eq!(table.take_front(2), Some(Taken { index, freed: true }));
            assert_eq!((table.end(), table.blocks()), (10, BlockCount(10 - gone as u32)));
        }
        assert_eq!(table.take_front(2), None, "the tail goes before the block that it follows");
        assert_eq!(table.take_end(), Some(Taken { index: 10, freed: true }));
        assert_eq!(table.take_front(2), Some(Taken { index: 9, freed: true }));
        assert_eq!((table.end(), table.back.is_none()), (2, true));
        assert_eq!(table.take_end(), Some(Taken { index: 1, freed: true }));
        assert_eq!(places.free(), BlockCount(10));
    }

    #[test]
    fn what_lies_behind_a_gap_is_kept_as_long_as_the_sequence_is_the_same() {
        let places = Places::new(BlockCount(11));
        let (mut table, chain) = table(&places);
        (0..4).for_each(|_| assert!(table.take_front(2).is_some()));
        table.keep(&chain);
        assert_eq!(
            (table.end(), table.tail.is_some(), table.get(6).is_some(), table.get(5).is_none()),
            (10, true, true, true)
        );
        table.keep(&chain[..8]);
        assert_eq!((table.end(), table.tail.is_some()), (8, false), "another end has another tail");
        table.keep(&chain[..4]);
        assert_eq!((table.end(), table.back.is_none()), (2, true));
    }

    #[test]
    fn a_closed_gap_is_no_gap() {
        let places = Places::new(BlockCount(11));
        let (mut table, chain) = table(&places);
        let fourth = Arc::clone(&table.sealed[3]);
        let fifth = Arc::clone(&table.sealed[4]);
        (0..3).for_each(|_| assert!(table.take_front(2).is_some()));
        let third = OpenBlock::with_tokens(table.take_place().unwrap(), vec![TokenId(2), TokenId(2)]);
        let third = Arc::new(third.seal(chain[1], &KEY, SIZE).unwrap());
        assert!(table.arrive(2, third));
        assert!(table.arrive(3, fourth));
        assert_eq!((table.sealed.len(), table.get(5).is_some()), (4, true));
        assert!(table.arrive(4, fifth) && table.back.is_none() && table.sealed.len() == 10);
        assert!(table.full().map(|block| block.hash()).eq(chain));
    }
}
