//! Which blocks hold a sequence, in order?

use std::sync::Arc;

use super::accounts::{HolderId, Holding};
use super::block::{Place, Places, Slot, TailBlock};
use super::held::{Account, Blocks};
use crate::types::{BlockCount, BlockId, BlockSize, TenantId, Tick, TokenCount};

/// A conversation's blocks at rest in one tier: full ones from the first token on without a gap, then perhaps a tail.
#[derive(Debug)]
pub struct BlockTable<P: Place> {
    account: Arc<Account>,
    pub sealed: Blocks<P>,
    pub tail: Option<Arc<TailBlock<P>>>,
}

impl<P: Place> BlockTable<P> {
    /// An empty one, of a tenant's conversation.
    pub fn new(places: &Arc<Places>, tenant: TenantId) -> Self {
        let account = Account::open(places, tenant);
        Self { sealed: Blocks::none(&account), tail: None, account }
    }

    /// Takes a place for the conversation, if one is free.
    pub fn take_place(&self) -> Option<Slot<P>> {
        self.account.take_place()
    }

    /// What the conversation holds of the tier, and has held.
    pub fn holding(&self) -> Holding {
        self.account.holding(self.sealed.iter().map(|block| block.id().index()))
    }

    /// Names the conversation's account; for tests.
    pub fn holder(&self) -> HolderId {
        self.account.holder()
    }

    pub fn clear(&mut self) {
        self.sealed.truncate(0);
        self.tail = None;
    }

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

    /// Blocks (private, shared): another conversation's table in this tier names a shared one too.
    pub fn shares(&self) -> (BlockCount, BlockCount) {
        let (private, shared) = self.account.shares(self.sealed.iter().map(|block| block.id().index()));
        (BlockCount(private.0 + u32::from(self.tail.is_some())), shared)
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
