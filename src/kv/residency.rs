//! Where are one conversation's blocks, and in which state is it?

use std::sync::Arc;

use super::Manager;
use super::block::{OpenBlock, Places, PrefixHash, Slot};
use super::evictor::Standing;
use super::journal::Entry;
use super::pins::Pin;
use super::return_rate::Class;
use super::runs::Runs;
use super::table::BlockTable;
use super::transfer::Ticket;
use crate::types::{
    BlockCount, BlockId, BlockSize, DiskBlockId, HostBlockId, KvKey, TenantId, TenantKey, Tick, Tier, TokenCount,
};

/// What the manager knows of one conversation.
///
/// The host table is always a copy of what the device table holds or held, and so is the disk's, which has no tail: where
/// two have a block of the same index, their hashes are equal.
#[derive(Debug)]
pub(super) struct Conversation {
    pub key: KvKey,
    pub tenant: TenantId,
    pub tenant_key: TenantKey,
    pub device: BlockTable<BlockId>,
    pub host: BlockTable<HostBlockId>,
    pub disk: BlockTable<DiskBlockId>,
    pub activity: Activity,
    pub last_used: Tick,
    /// When it fell silent, or was last heard of.
    pub silent_since: Tick,
    /// Rises with each use of any conversation, over restarts too.
    pub used: u64,
    pub class: Class,
    /// Full blocks at the front that it had from other conversations, by their prefix.
    pub shared: usize,
    pub last_eviction: Option<Entry>,
    /// It has lost device blocks since its last turn.
    pub lost_in_silence: bool,
    /// An offload that is under way; at most one.
    pub copying: Option<Ticket>,
    /// A store that is under way; at most one.
    pub storing: Option<Ticket>,
    /// It is among those that wait to be stored.
    pub waits_for_store: bool,
    /// Transfers under way that read or write its blocks.
    pub in_flight: u32,
    /// A client wants it in this tier and in none above, as soon as it is copied.
    pub leaving: Option<Tier>,
    pub pin: Option<Pin>,
}

#[derive(Debug)]
pub(super) enum Activity {
    Idle,
    /// A turn of it waits: last in line.
    Expected,
    /// Over: first in line, and a shared prefix until then.
    Ended,
    /// To be forgotten as soon as the transfer that holds its blocks is back.
    Forgetting,
    Running(Running),
}

/// A running sequence's blocks beyond the sealed ones.
#[derive(Debug, Default)]
pub(super) struct Running {
    pub open: Option<OpenBlock>,
    /// Places that the coming tokens will fill, the next one last.
    pub spare: Vec<Slot<BlockId>>,
    /// Ids of sealed, open and spare blocks in order: the sequence's block table.
    pub ids: Vec<BlockId>,
    /// An open block behind full blocks that are not there yet, and its index in the sequence.
    pub later: Option<(usize, OpenBlock)>,
    /// Blocks that it has been given places for, those on their way included.
    pub places: usize,
    /// The reload that brings some of its blocks.
    pub arriving: Option<Arriving>,
}

/// A reload, as the sequence sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arriving {
    pub ticket: Ticket,
    /// Index of the first block that it brings.
    pub first: usize,
    /// The sequence encodes nothing from there on until it is back.
    pub waited_for: bool,
}

impl Running {
    /// Told how many full blocks are there from the first one on: the block that was open behind them goes on, unless what
    /// was encoded meanwhile is longer.
    pub fn reach(&mut self, full: usize) {
        let Some((index, later)) = self.later.take_if(|(index, _)| *index <= full) else { return };
        let encoded = self.open.as_ref().map_or(0, |open| open.tokens().len());
        let unused =
            if index < full || encoded >= later.tokens().len() { Some(later) } else { self.open.replace(later) };
        self.spare.extend(unused.map(OpenBlock::into_slot));
    }

    /// Gives back the spare places that it needs no longer, now that so many full blocks have come to it.
    pub fn return_spare(&mut self, full: usize) {
        let open = usize::from(self.open.is_some()) + usize::from(self.later.is_some());
        let needed = self.places.saturating_sub(full + open);
        self.spare.drain(..self.spare.len().saturating_sub(needed));
    }

    /// Writes the block table anew: after `sealed` come the open block and the spare places.
    pub fn list(&mut self, sealed: impl Iterator<Item = BlockId>) {
        self.ids.clear();
        self.ids.extend(sealed);
        self.ids.extend(self.open.as_ref().map(OpenBlock::id));
        self.ids.extend(self.spare.iter().rev().map(Slot::place));
    }
}

impl Conversation {
    /// One of which no tier holds anything. `pools`: device, host, disk.
    pub fn new(key: KvKey, tenant: TenantId, tenant_key: TenantKey, pools: [&Arc<Places>; 3]) -> Self {
        let [device, host, disk] = pools;
        Self {
            key,
            tenant,
            tenant_key,
            device: BlockTable::new(device, tenant),
            host: BlockTable::new(host, tenant),
            disk: BlockTable::new(disk, tenant),
            activity: Activity::Idle,
            last_used: Tick(0),
            silent_since: Tick(0),
            used: 0,
            class: Class::default(),
            shared: 0,
            last_eviction: None,
            lost_in_silence: false,
            copying: None,
            storing: None,
            waits_for_store: false,
            in_flight: 0,
            leaving: None,
            pin: None,
        }
    }

    pub fn is_idle(&self) -> bool {
        match self.activity {
            Activity::Idle | Activity::Expected | Activity::Ended => true,
            Activity::Forgetting | Activity::Running(_) => false,
        }
    }

    /// Whether no turn of it runs or waits.
    pub fn is_silent(&self) -> bool {
        match self.activity {
            Activity::Idle | Activity::Ended => true,
            Activity::Expected | Activity::Forgetting | Activity::Running(_) => false,
        }
    }

    /// How long it is where it is longest: what a return saves, and the same in every tier's line, so that of two
    /// conversations at most one displaces the other's copies.
    pub fn length(&self, size: BlockSize) -> TokenCount {
        let blocks = self.device.end_with_tail().max(self.host.end_with_tail()).max(self.disk.end_with_tail());
        BlockCount(u32::try_from(blocks).expect("a window bounds a table")).tokens(size)
    }

    /// Where it stands in line, while it doesn't run.
    pub fn standing(&self) -> Standing {
        match self.activity {
            Activity::Ended => Standing::Ended,
            Activity::Expected => Standing::Expected,
            Activity::Idle | Activity::Forgetting | Activity::Running(_) => Standing::Idle(self.class),
        }
    }

    pub fn running(&self) -> Option<&Running> {
        match &self.activity {
            Activity::Running(running) => Some(running),
            Activity::Idle | Activity::Expected | Activity::Ended | Activity::Forgetting => None,
        }
    }

    pub fn running_mut(&mut self) -> Option<&mut Running> {
        match &mut self.activity {
            Activity::Running(running) => Some(running),
            Activity::Idle | Activity::Expected | Activity::Ended | Activity::Forgetting => None,
        }
    }

    /// Hash of the last sealed device block.
    pub fn parent(&self) -> PrefixHash {
        self.device.sealed.last().map_or(PrefixHash::ROOT, |block| block.hash())
    }

    /// Whether no tier holds any of it.
    pub fn is_nowhere(&self) -> bool {
        self.device.is_empty() && self.host.is_empty() && self.disk.is_empty()
    }

    /// Whether the last block of the device table has a copy below, so that it can go at once.
    pub fn end_is_clean(&self) -> bool {
        match &self.device.tail {
            Some(tail) => {
                self.host.end() == self.device.end()
                    && self.host.tail.as_ref().is_some_and(|copy| copy.tokens() == tail.tokens())
            }
            None => self.device.end().checked_sub(1).is_none_or(|last| self.is_below(last)),
        }
    }

    /// From which block on it loses its first ones rather than its last when its last copy goes: none that others share,
    /// and none of one that is pinned or shorter than `from`.
    pub fn front_to_lose(&self, from: Option<TokenCount>, size: BlockSize) -> Option<usize> {
        let is_long = from.is_some_and(|from| self.length(size) >= from);
        (is_long && self.pin.is_none()).then_some(self.shared)
    }

    /// Of what the device lacks, what the host has, and what the disk alone has. Cost: O(its blocks).
    fn below(&self, size: BlockSize) -> (TokenCount, TokenCount) {
        let (mut host, mut disk) = (TokenCount(0), TokenCount(0));
        let lacking = (0..self.host.end().max(self.disk.end())).filter(|index| self.device.get(*index).is_none());
        for index in lacking {
            if self.host.get(index).is_some() {
                host.0 += size.0;
            } else if self.disk.get(index).is_some() {
                disk.0 += size.0;
            }
        }
        if self.device.end_with_tail() <= self.host.end()
            && let Some(tail) = &self.host.tail
        {
            host.0 += tail.len().0;
        }
        (host, disk)
    }

    /// Which tier has each part of it. Cost: O(its blocks).
    fn runs(&self) -> Runs {
        let mut runs = Runs::default();
        let front = self.device.sealed.len();
        runs.add(Some(Tier::Device), front);
        for index in front..self.device.end().max(self.host.end()).max(self.disk.end()) {
            let tier = if self.device.get(index).is_some() {
                Some(Tier::Device)
            } else if self.host.get(index).is_some() {
                Some(Tier::Host)
            } else {
                self.disk.get(index).map(|_| Tier::Disk)
            };
            runs.add(tier, 1);
        }
        if self.device.tail.is_some() {
            runs.add(Some(Tier::Device), 1);
        } else if self.host.tail.is_some() && self.device.end_with_tail() <= self.host.end() {
            runs.add(Some(Tier::Host), 1);
        }
        runs
    }

    /// Whether host or disk have its full block of this index.
    pub fn is_below(&self, index: usize) -> bool {
        self.host.get(index).is_some() || self.disk.get(index).is_some()
    }
}

/// Where one conversation is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whereabouts {
    pub tenant: TenantId,
    pub running: bool,
    pub reloading: bool,
    pub device_tokens: TokenCount,
    /// (private, shared).
    pub device_blocks: (BlockCount, BlockCount),
    pub host_tokens: TokenCount,
    pub host_blocks: (BlockCount, BlockCount),
    pub disk_tokens: TokenCount,
    pub disk_blocks: (BlockCount, BlockCount),
    /// Of what the device lacks, what the host has, and what the disk alone has.
    pub below: (TokenCount, TokenCount),
    pub runs: Runs,
    pub last_used: Tick,
    pub last_eviction: Option<Entry>,
    pub pinned_until: Option<Tick>,
}

impl Manager {
    /// Where a conversation is; `None` if no tier holds any of it, and it isn't pinned.
    pub fn whereabouts(&self, key: KvKey) -> Option<Whereabouts> {
        let conversation = self.conversations.get(&key)?;
        let size = self.settings.block_size;
        Some(Whereabouts {
            tenant: conversation.tenant,
            running: conversation.running().is_some(),
            reloading: conversation.running().is_some_and(|running| running.arriving.is_some()),
            device_tokens: conversation.device.tokens(size),
            device_blocks: conversation.device.shares(),
            host_tokens: conversation.host.tokens(size),
            host_blocks: conversation.host.shares(),
            disk_tokens: conversation.disk.tokens(size),
            below: conversation.below(size),
            runs: conversation.runs(),
            disk_blocks: conversation.disk.shares(),
            last_used: conversation.last_used,
            last_eviction: conversation.last_eviction,
            pinned_until: conversation.pinned_until(),
        })
    }
}
