//! Which places of a tier does one conversation hold?
//!
//! A table's full blocks, and whatever places are taken for its conversation. Each block that comes into the table or goes
//! out of it is told to the tier's accounts, here and nowhere else.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;

use super::accounts::{HolderId, Holding};
use super::block::{Place, Places, SealedBlock, Slot};
use crate::types::{BlockCount, TenantId};

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

    /// Of these full blocks, how many are this conversation's alone, and how many other conversations of the tenant have too.
    pub fn shares(&self, places: impl Iterator<Item = u32>) -> (BlockCount, BlockCount) {
        self.places.accounts(|_, accounts| {
            places.fold((BlockCount(0), BlockCount(0)), |mut shares, place| {
                let share = if accounts.holders(place) > 1 { &mut shares.1 } else { &mut shares.0 };
                share.0 += 1;
                shares
            })
        })
    }

    /// What the conversation holds, and has held, whose table names the full blocks in these places.
    pub fn holding(&self, places: impl Iterator<Item = u32>) -> Holding {
        self.places.accounts(|now, accounts| accounts.holding(now, self.id, places))
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
        self.account.places.accounts(|now, accounts| accounts.join(now, block.id().index(), self.account.id));
        self.blocks.push_back(block);
    }

    pub fn pop(&mut self) -> Option<Arc<SealedBlock<P>>> {
        let block = self.blocks.pop_back()?;
        self.account.places.accounts(|now, accounts| accounts.leave(now, block.id().index(), self.account.id));
        Some(block)
    }

    /// Gives up the first.
    pub fn pop_front(&mut self) -> Option<Arc<SealedBlock<P>>> {
        let block = self.blocks.pop_front()?;
        self.account.places.accounts(|now, accounts| accounts.leave(now, block.id().index(), self.account.id));
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
        self.account.places.accounts(|now, accounts| {
            gone.iter().for_each(|block| accounts.leave(now, block.id().index(), self.account.id));
        });
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
