//! Which places of a tier does one conversation hold?
//!
//! A table's full blocks, and whatever places are taken for its conversation. Each block that comes into the table or goes
//! out of it is told to the tier's accounts, here and nowhere else.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;

use super::accounts::{HolderId, Holding, Split};
use super::block::{Place, Places, SealedBlock, Slot};
use crate::types::TenantId;

/// A conversation's account with one tier. Its `Drop` closes it.
#[derive(Debug)]
pub struct Account {
    places: Arc<Places>,
    tenant: TenantId,
    id: HolderId,
}

impl Account {
    /// Of a tenant's conversation.
    pub fn open(places: &Arc<Places>, tenant: TenantId) -> Arc<Self> {
        let id = places.accounts(|_, accounts| accounts.open(tenant));
        Arc::new(Self { places: Arc::clone(places), tenant, id })
    }

    /// Takes a place for the conversation, if one is free.
    pub fn take_place<P: Place>(&self) -> Option<Slot<P>> {
        self.places.take(self.tenant, self.id)
    }

    /// What the conversation holds, and has held, whose table names full blocks that are split so.
    pub fn holding(&self, splits: impl Iterator<Item = Split>) -> Holding {
        self.places.accounts(|now, accounts| accounts.holding(now, self.id, splits))
    }

    /// Notes that its table names a full block from now on.
    fn join<P: Place>(&self, block: &SealedBlock<P>) {
        self.places.accounts(|now, accounts| accounts.join(now, &mut block.split().lock(), self.id));
    }

    /// Notes that it does so no more.
    fn leave<P: Place>(&self, block: &SealedBlock<P>) {
        self.places.accounts(|now, accounts| accounts.leave(now, &mut block.split().lock(), self.id));
    }

    /// Names it; for tests.
    pub fn holder(&self) -> HolderId {
        self.id
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.places.accounts(|now, accounts| accounts.close(now, self.id));
    }
}

/// A victim gives up one block after the other, which it has not touched for long: while one goes, the fourth after it is
/// brought from memory.
const AHEAD: usize = 3;

/// Full blocks of a table that follow each other.
#[derive(Debug)]
pub struct Blocks<P: Place> {
    blocks: VecDeque<Arc<SealedBlock<P>>>,
    account: Arc<Account>,
}

impl<P: Place> Blocks<P> {
    /// None yet.
    pub fn none(account: &Arc<Account>) -> Self {
        Self { blocks: VecDeque::new(), account: Arc::clone(account) }
    }

    pub fn last(&self) -> Option<&Arc<SealedBlock<P>>> {
        self.blocks.back()
    }

    pub fn push(&mut self, block: Arc<SealedBlock<P>>) {
        self.account.join(&block);
        self.blocks.push_back(block);
    }

    pub fn pop(&mut self) -> Option<Arc<SealedBlock<P>>> {
        let block = self.blocks.pop_back()?;
        self.blocks.iter().nth_back(AHEAD).inspect(|block| block.prefetch());
        self.account.leave(&block);
        Some(block)
    }

    /// Gives up the first.
    pub fn pop_front(&mut self) -> Option<Arc<SealedBlock<P>>> {
        let block = self.blocks.pop_front()?;
        self.blocks.get(AHEAD).inspect(|block| block.prefetch());
        self.account.leave(&block);
        Some(block)
    }

    /// Those from `at` on, as a part of the same table.
    pub fn split_off(&mut self, at: usize) -> Self {
        let blocks = self.blocks.split_off(at.min(self.blocks.len()));
        Self { blocks, account: Arc::clone(&self.account) }
    }

    /// Takes up a part of the same table.
    pub fn append(&mut self, mut other: Self) {
        self.blocks.append(&mut other.blocks);
    }

    pub fn extend(&mut self, blocks: impl IntoIterator<Item = Arc<SealedBlock<P>>>) {
        blocks.into_iter().for_each(|block| self.push(block));
    }

    /// Keeps the first `full`.
    pub fn truncate(&mut self, full: usize) {
        drop(self.give_up(full));
    }

    /// Gives all of them up.
    pub fn take(&mut self) -> impl Iterator<Item = Arc<SealedBlock<P>>> + use<P> {
        self.give_up(0).into_iter()
    }

    /// Those from `at` on, which the table names no more.
    fn give_up(&mut self, at: usize) -> VecDeque<Arc<SealedBlock<P>>> {
        let gone = self.blocks.split_off(at.min(self.blocks.len()));
        gone.iter().for_each(|block| self.account.leave(block));
        gone
    }
}

impl<P: Place> Deref for Blocks<P> {
    type Target = VecDeque<Arc<SealedBlock<P>>>;

    fn deref(&self) -> &Self::Target {
        &self.blocks
    }
}

impl<P: Place> Drop for Blocks<P> {
    fn drop(&mut self) {
        self.truncate(0);
    }
}
