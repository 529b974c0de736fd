//! Which blocks hold a sequence, in order?

use std::sync::Arc;

use super::block::{Place, SealedBlock, TailBlock};
use crate::types::{BlockCount, BlockId, BlockSize, Tick, TokenCount};

/// A conversation's blocks at rest in one tier: full ones from the first token on without a gap, then perhaps a tail.
#[derive(Debug)]
pub struct BlockTable<P: Place> {
    pub sealed: Vec<Arc<SealedBlock<P>>>,
    pub tail: Option<Arc<TailBlock<P>>>,
}

impl<P: Place> Default for BlockTable<P> {
    fn default() -> Self {
        Self { sealed: Vec::new(), tail: None }
    }
}

impl<P: Place> BlockTable<P> {
    pub fn is_empty(&self) -> bool {
        self.sealed.is_empty() && self.tail.is_none()
    }

    /// Blocks that the table names, the tail included.
    pub fn blocks(&self) -> BlockCount {
        let tail = usize::from(self.tail.is_some());
        BlockCount(u32::try_from(self.sealed.len() + tail).expect("a window bounds a table"))
    }

    /// Tokens whose KV the table holds.
    pub fn tokens(&self, size: BlockSize) -> TokenCount {
        let full = u32::try_from(self.sealed.len()).expect("a window bounds a table") * size.0;
        TokenCount(full + self.tail.as_ref().map_or(0, |tail| tail.len().0))
    }

    /// If all that is left is a prefix that conversations share, and no other holds it: when it was last used.
    pub fn last_of_shared(&self) -> Option<Tick> {
        let end = self.sealed.last().filter(|_| self.tail.is_none())?;
        end.shared_at().filter(|_| Arc::strong_count(end) == 1)
    }

    /// Keeps the first `full` full blocks, and the tail only if it follows them directly.
    pub fn truncate(&mut self, full: usize) {
        if full < self.sealed.len() {
            self.sealed.truncate(full);
            self.tail = None;
        }
    }

    /// Blocks (private, shared): a shared one has another holder in this tier.
    pub fn shares(&self) -> (BlockCount, BlockCount) {
        let mut shares = (BlockCount(0), BlockCount(0));
        let sealed = self.sealed.iter().map(Arc::strong_count);
        for holders in sealed.chain(self.tail.as_ref().map(Arc::strong_count)) {
            let share = if holders > 1 { &mut shares.1 } else { &mut shares.0 };
            share.0 += 1;
        }
        shares
    }
}

/// Proof that a running sequence's blocks are all on the device: it borrows the manager, so nothing is evicted, moved or
/// given back while it lives. A batch is made of these and of nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Resident<'pool> {
    table: &'pool [BlockId],
    context: TokenCount,
}

impl<'pool> Resident<'pool> {
    pub(super) fn new(table: &'pool [BlockId], context: TokenCount) -> Self {
        Self { table, context }
    }

    /// Device blocks in order; those past the context are there to be written.
    pub fn table(&self) -> &'pool [BlockId] {
        self.table
    }

    /// Tokens whose KV the blocks hold.
    pub fn context(&self) -> TokenCount {
        self.context
    }
}
