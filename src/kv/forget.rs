//! How does every tier let go of a conversation?
//!
//! Blocks that nobody else holds are overwritten, in memory before the next step and on disk when its turn comes; only then
//! is it told. Until then the conversation is known, so that no turn of it begins.

use std::mem::take;
use std::sync::Arc;

use super::Manager;
use super::block::{Place, Slot};
use super::residency::Activity;
use super::table::BlockTable;
use crate::types::{BlockCount, KvKey};

/// What forgetting gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    pub device: BlockCount,
    pub host: BlockCount,
    pub disk: BlockCount,
    /// Blocks of any tier that other conversations hold too.
    pub kept_shared: BlockCount,
    /// Disk blocks that could not be overwritten.
    pub remaining: BlockCount,
}

impl Manager {
    /// Gives up every copy. `take_forgotten` tells when all transfers have let go too.
    ///
    /// Panics if it runs: the engine ends the turn first.
    pub fn forget(&mut self, key: KvKey) {
        self.returns.forget(key);
        let Some(conversation) = self.conversations.get_mut(&key) else {
            self.forgotten.push((key, Freed::default()));
            return;
        };
        assert!(conversation.running().is_none(), "a turn ends before its conversation is forgotten");
        if matches!(conversation.activity, Activity::Forgetting) {
            return;
        }
        self.end_pin(key);
        let Some(conversation) = self.conversations.get_mut(&key) else {
            self.forgotten.push((key, Freed::default()));
            return;
        };
        if conversation.leaving.take().is_some() {
            self.left.push((key, 0));
        }
        let conversation = self.conversations.get_mut(&key).expect("looked up above");
        conversation.activity = Activity::Forgetting;
        let waits = conversation.in_flight > 0;
        self.device_line.remove(key);
        self.host_line.remove(key);
        self.disk.line.remove(key);
        if !waits {
            self.finish_forgetting(key);
        }
    }

    pub(super) fn finish_forgetting(&mut self, key: KvKey) {
        if self.conversation(key).in_flight > 0 {
            return;
        }
        let conversation = self.conversations.get_mut(&key).expect("looked up above");
        let tables = (take(&mut conversation.device), take(&mut conversation.host), take(&mut conversation.disk));
        let (device, kept_device) = wipe(tables.0, &mut self.chores.zero_device);
        let (host, kept_host) = wipe(tables.1, &mut self.chores.zero_host);
        let alone = tables.2.full().filter(|block| Arc::strong_count(block) == 1).count();
        let disk = BlockCount(u32::try_from(alone).expect("a window bounds a table"));
        let kept_disk = tables.2.blocks().0 - disk.0;
        let kept_shared = BlockCount(kept_device.0 + kept_host.0 + kept_disk);
        let freed = Freed { device, host, disk, kept_shared, remaining: BlockCount(0) };
        drop(tables.2);
        // What was let go of it before may be on its way out still.
        if disk.0 > 0 || self.disk.places.is_erasing() {
            self.forgotten_once_erased(key, freed);
        } else {
            self.forgot(key, freed);
        }
    }

    /// Drops the record of a conversation that every tier has let go of.
    pub(super) fn forgot(&mut self, key: KvKey, freed: Freed) {
        self.conversations.remove(&key);
        self.forgotten.push((key, freed));
        self.touch(key);
    }
}

/// Takes a table apart: places of blocks that nobody else holds go to `zero`. Counts (freed, shared).
fn wipe<P: Place>(table: BlockTable<P>, zero: &mut Vec<Slot<P>>) -> (BlockCount, BlockCount) {
    let (mut freed, mut shared) = (BlockCount(0), BlockCount(0));
    let full = table.sealed.into_iter().chain(table.back.into_iter().flat_map(|back| back.sealed));
    let sealed = full.map(|block| Arc::try_unwrap(block).map(|block| block.into_slot()).ok());
    let tail = table.tail.map(|block| Arc::try_unwrap(block).map(|block| block.into_slot()).ok());
    for slot in sealed.chain(tail) {
        match slot {
            Some(slot) => {
                freed.0 += 1;
                zero.push(slot);
            }
            None => shared.0 += 1,
        }
    }
    (freed, shared)
}
