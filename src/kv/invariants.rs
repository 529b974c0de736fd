//! What must always hold in the block manager?
//!
//! Free and held places are a pool's total, tables are chains, and only who is idle is in line. For tests.

use std::collections::HashSet;
use std::sync::Arc;

use super::Manager;
use super::block::{OpenBlock, Place, PrefixHash, SealedBlock, Slot};
use super::disk::Above;
use super::table::BlockTable;
use super::tiers::{Arrival, InFlight};

impl Manager {
    /// Checks what must always hold; for tests. Cost: O(everything).
    pub fn assert_invariants(&self) {
        let mut device = HashSet::new();
        let mut host = HashSet::new();
        let mut disk = HashSet::new();
        let mut in_flight = 0;
        for conversation in self.conversations.values() {
            let tables = (&conversation.device, &conversation.host);
            device.extend(tables.0.full().map(|block| block.id()));
            device.extend(tables.0.tail.iter().map(|block| block.id()));
            host.extend(tables.1.full().map(|block| block.id()));
            host.extend(tables.1.tail.iter().map(|block| block.id()));
            disk.extend(conversation.disk.full().map(|block| block.id()));
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
                device.extend(running.open.iter().chain(running.later.iter().map(|(_, open)| open)).map(OpenBlock::id));
                device.extend(running.spare.iter().map(Slot::place));
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
                    device.extend(sealed.iter().map(|(block, _)| block.id()));
                    device.extend(tail.iter().map(|(block, _)| block.id()));
                    host.extend(sealed.iter().map(|(_, slot)| slot.place()));
                    host.extend(tail.iter().map(|(_, slot)| slot.place()));
                }
                InFlight::PartOf(_) | InFlight::Erase { .. } => {}
                InFlight::Store { blocks, .. } => {
                    for (above, slot) in blocks {
                        disk.insert(slot.place());
                        match above {
                            Above::Device(block) => drop(device.insert(block.id())),
                            Above::Host(block) => drop(host.insert(block.id())),
                        }
                    }
                }
                InFlight::Reload { blocks, tail, .. } => {
                    for (_, block) in blocks {
                        match block {
                            Arrival::Here(block) => drop(device.insert(block.id())),
                            Arrival::Loading(from, to) => {
                                disk.insert(from.id());
                                device.insert(to.place());
                            }
                            Arrival::Coming(from, to) => {
                                host.insert(from.id());
                                device.insert(to.place());
                            }
                        }
                    }
                    host.extend(tail.iter().map(|tail| tail.from.id()));
                    device.extend(tail.iter().map(|tail| tail.to.place()));
                }
            }
        }
        assert!(in_flight as usize <= self.in_flight.len(), "a transfer belongs to one conversation");
        device.extend(self.chores.zero_device.iter().map(Slot::place));
        device.extend(self.chores.copied_from.iter().map(|block| block.id()));
        host.extend(self.chores.zero_host.iter().map(Slot::place));
        assert_eq!(self.device.free().get() + device.len(), self.device.total().get(), "device places add up");
        assert_eq!(self.host.free().get() + host.len(), self.host.total().get(), "host places add up");
        let places = &self.disk.places;
        let gone = places.soon().get() + places.out_of_use().get();
        assert_eq!(gone + disk.len(), places.total().get(), "disk places add up");
        let (kept, _) = self.pinned();
        let window = self.settings.window.blocks(self.settings.block_size);
        assert!(kept.0 + window.0 <= self.device.total().0, "pins leave room for a sequence of the full window");
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
