//! What must always hold in the block manager?
//!
//! Free and held places are a pool's total, and all that is held is on somebody's account; tables are chains, and only who
//! is idle is in line. For tests.

use std::collections::HashMap;
use std::sync::Arc;

use super::Manager;
use super::accounts::HolderId;
use super::block::{OpenBlock, Place, Places, PrefixHash, SealedBlock, Slot, TailBlock};
use super::disk::Above;
use super::table::BlockTable;
use super::tiers::{Arrival, InFlight};
use crate::types::{BlockCount, TenantId, Tier};

/// The places of a tier that somebody holds.
#[derive(Default)]
struct Found {
    /// Whose account each is on.
    places: HashMap<u32, (TenantId, Option<HolderId>)>,
    /// Of each full block: how many tables name it, and among how many it is split.
    full: HashMap<u32, (u32, u32)>,
}

impl Found {
    fn table<P: Place>(&mut self, table: &BlockTable<P>) {
        for block in table.full() {
            self.sealed(block);
            self.full.entry(block.id().index()).or_default().0 += 1;
        }
        if let Some(tail) = &table.tail {
            assert_eq!(tail.owner(), Some(table.holder()), "a tail is its own conversation's");
            self.tail(tail);
        }
    }

    fn sealed<P: Place>(&mut self, block: &SealedBlock<P>) {
        self.places.insert(block.id().index(), (block.tenant(), None));
        self.full.entry(block.id().index()).or_default().1 = block.split().lock().holders();
    }

    fn tail<P: Place>(&mut self, tail: &TailBlock<P>) {
        self.places.insert(tail.id().index(), (tail.tenant(), tail.owner()));
    }

    fn slot<P: Place>(&mut self, slot: &Slot<P>) {
        self.places.insert(slot.place().index(), (slot.tenant(), slot.owner()));
    }

    /// Checks that accounts say the same.
    fn assert_accounted(&self, places: &Places, sums: &HashMap<TenantId, u128>) {
        places.accounts(|now, accounts| {
            for (place, (named, split)) in &self.full {
                assert_eq!(split, named, "a block's holders are the tables that name it");
                assert_eq!(self.places[place].1, None, "a full block is on nobody's own account");
            }
            let named = |place: &u32| self.full.get(place).map_or(0, |(named, _)| *named);
            let mut own = HashMap::<HolderId, u32>::new();
            let mut tenants = HashMap::<TenantId, (u32, u32)>::new();
            for (place, (tenant, owner)) in &self.places {
                let (held, nobodys) = tenants.entry(*tenant).or_default();
                *held += 1;
                match owner {
                    Some(id) => *own.entry(*id).or_default() += 1,
                    None => *nobodys += u32::from(named(place) == 0),
                }
            }
            accounts.assert_own(&own);
            for tenant in (0..).map(TenantId).take(accounts.tenants()) {
                let line = accounts.of_tenant(now, tenant);
                let (held, nobodys) = tenants.get(&tenant).copied().unwrap_or_default();
                assert_eq!((line.held.blocks.0, line.nobodys.blocks.0), (held, nobodys), "what {tenant} holds");
            }
            accounts.assert_sums(now, sums, self.full.values().map(|(named, _)| named).sum());
        });
        let waiting = places.accounts(|now, accounts| accounts.waiting(now).blocks);
        let used = places.total().get() - places.free().get();
        assert_eq!(
            self.places.len() + waiting.get(),
            used,
            "held places and those that wait are all but the free ones"
        );
    }
}

impl Manager {
    /// Checks what must always hold; for tests. Cost: O(everything).
    pub fn assert_invariants(&self) {
        let (mut device, mut host, mut disk) = (Found::default(), Found::default(), Found::default());
        let mut in_flight = 0;
        for conversation in self.conversations.values() {
            let tables = (&conversation.device, &conversation.host);
            device.table(tables.0);
            host.table(tables.1);
            disk.table(&conversation.disk);
            assert!(conversation.disk.tail.is_none(), "full blocks alone are on disk");
            for index in 0..tables.0.end() {
                let Some(above) = tables.0.get(index) else { continue };
                let on_host = tables.1.get(index).is_none_or(|below| below.hash() == above.hash());
                assert!(on_host, "a host table copies the device table");
                let on_disk = conversation.disk.get(index).is_none_or(|below| below.hash() == above.hash());
                assert!(on_disk, "a disk table copies the device table");
            }
            if tables.0.tail.is_some() && conversation.is_idle() {
                assert!(tables.1.end() <= tables.0.end(), "no full block lies below where the device has a tail");
            }
            assert_table(&conversation.device);
            assert_table(&conversation.host);
            assert_table(&conversation.disk);
            if let Some(running) = conversation.running() {
                let open = || running.open.iter().chain(running.later.iter().map(|(_, open)| open));
                open().for_each(|open| device.slot(open.slot()));
                running.spare.iter().for_each(|slot| device.slot(slot));
                let own = open().map(OpenBlock::slot).chain(&running.spare);
                let holder = Some(conversation.device.holder());
                assert!(
                    own.into_iter().all(|slot| slot.owner() == holder),
                    "a sequence's places are its conversation's"
                );
                assert!(!self.device_line.contains(conversation.key), "a running one is in line");
                if running.arriving.is_none() {
                    let sealed = conversation.device.sealed.iter().map(|block| block.id());
                    let spare = running.spare.iter().rev().map(Slot::place);
                    let ids: Vec<_> = sealed.chain(running.open.iter().map(OpenBlock::id)).chain(spare).collect();
                    assert_eq!(running.ids, ids, "the block table names the blocks in order");
                }
            } else if conversation.is_idle() {
                let in_line = self.device_line.contains(conversation.key);
                assert_eq!(in_line, conversation.exposes_device(), "in line is who is idle, but for what pins keep");
                let in_line = self.host_line.contains(conversation.key);
                assert!(in_line || !conversation.exposes_host(), "who is idle is in the host's line");
                let in_line = self.disk.line.contains(conversation.key);
                assert!(in_line || conversation.disk.is_empty(), "who is idle is in the disk's line");
            }
            in_flight += conversation.in_flight;
        }
        for transfer in self.in_flight.values() {
            match transfer {
                InFlight::Offload { sealed, tail, .. } => {
                    for (block, slot) in sealed {
                        device.sealed(block);
                        host.slot(slot);
                    }
                    if let Some((block, slot)) = tail {
                        device.tail(block);
                        host.slot(slot);
                    }
                }
                InFlight::PartOf(_) | InFlight::Erase { .. } => {}
                InFlight::Store { blocks, .. } => {
                    for (above, slot) in blocks {
                        disk.slot(slot);
                        match above {
                            Above::Device(block) => device.sealed(block),
                            Above::Host(block) => host.sealed(block),
                        }
                    }
                }
                InFlight::Reload { blocks, tail, .. } => {
                    for (_, block) in blocks {
                        match block {
                            Arrival::Here(block) => device.sealed(block),
                            Arrival::Loading(from, to) => {
                                disk.sealed(from);
                                device.slot(to);
                            }
                            Arrival::Coming(from, to) => {
                                host.sealed(from);
                                device.slot(to);
                            }
                        }
                    }
                    if let Some(tail) = tail {
                        host.tail(&tail.from);
                        device.slot(&tail.to);
                    }
                }
            }
        }
        assert!(in_flight as usize <= self.in_flight.len(), "a transfer belongs to one conversation");
        self.chores.zero_device.iter().for_each(|slot| device.slot(slot));
        self.chores.copied_from.iter().for_each(|block| device.tail(block));
        self.chores.zero_host.iter().for_each(|slot| host.slot(slot));
        for (tier, found) in [(Tier::Device, &device), (Tier::Host, &host), (Tier::Disk, &disk)] {
            let mut sums = HashMap::<TenantId, u128>::new();
            for (key, conversation) in &self.conversations {
                *sums.entry(conversation.tenant).or_default() += self.holding(*key, tier).unit_us;
            }
            found.assert_accounted(self.places(tier), &sums);
        }
        assert_eq!(self.waiting(Tier::Device).blocks, BlockCount(0), "device places are free or held");
        assert_eq!(self.waiting(Tier::Host).blocks, BlockCount(0), "host places are free or held");
        let places = &self.disk.places;
        let gone = places.soon().get() + places.out_of_use().get();
        assert_eq!(gone + disk.places.len(), places.total().get(), "disk places add up");
        let (kept, _) = self.pinned();
        let window = self.settings.window.blocks(self.settings.block_size);
        assert!(kept.0 + window.0 <= self.device.total().0, "pins leave room for a sequence of the full window");
        assert_eq!(self.displacements.total(), self.counters.evictions, "each eviction has its pair");
        let rules: u64 = (0..).map(TenantId).take(self.tenants()).flat_map(|id| self.displacements.by_rule(id)).sum();
        assert_eq!(rules, self.counters.evictions, "each eviction has its rule");
        assert_eq!(self.counters.isolation_faults, 0, "nobody was pushed below the floor for another");
    }
}

/// A table's front is one chain, and so is its back, which begins behind a gap.
fn assert_table<P: Place>(table: &BlockTable<P>) {
    let assert_chain = |from: PrefixHash, blocks: &mut dyn Iterator<Item = &Arc<SealedBlock<P>>>| {
        blocks.fold(from, |parent, block| {
            assert_eq!(block.parent(), parent, "a table is a chain");
            block.hash()
        });
    };
    assert_chain(PrefixHash::ROOT, &mut table.sealed.iter());
    if let Some(back) = &table.back {
        assert!(back.first > table.sealed.len(), "there is a gap before what lies behind it");
        let first = back.sealed.front().expect("a back is not empty");
        assert_chain(first.parent(), &mut back.sealed.iter());
    }
}
