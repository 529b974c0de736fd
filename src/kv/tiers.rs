//! How do copies go down to the host pool and come back up?
//!
//! Orders go out in `Manager::orders`; what they read and write is owned by `InFlight` until the outcome is back, so no
//! place is reused under a copy. A conversation has one offload under way at most, of a bounded number of blocks.

use std::sync::Arc;

use super::block::{Checksum, OpenBlock, PrefixHash, SealedBlock, Slot, TailBlock};
use super::disk::Above;
use super::evictor::Reason;
use super::journal::{Entry, Rule};
use super::manager::{Manager, Reloaded};
use super::residency::Activity;
use super::transfer::{Direction, Ticket, TransferDone, TransferOrder};
use crate::kernels::files::Label;
use crate::types::{BlockCount, BlockId, DiskBlockId, HostBlockId, KvKey, Tick, Tier, TokenCount};

/// Most blocks of one offload: about a millisecond of copying, so that a reload behind it waits no longer.
const OFFLOAD_BLOCKS: usize = 16;
/// Most offloads under way that nobody waits for.
const BACKGROUND_OFFLOADS: usize = 2;

/// Full blocks, and the places that they are copied to.
type CopyingDown = Vec<(Arc<SealedBlock<BlockId>>, Slot<HostBlockId>)>;
/// A part-full last block, and the place that it is copied to.
type TailCopyingDown = Option<(Arc<TailBlock<BlockId>>, Slot<HostBlockId>)>;

/// A transfer under way, and all that it reads and writes.
#[derive(Debug)]
pub(super) enum InFlight {
    Offload {
        key: KvKey,
        /// Index of the first block in the conversation's tables.
        first: usize,
        /// Hash of the last full block, copied now or before: by it a sequence knows whether all this is its own.
        end: PrefixHash,
        sealed: CopyingDown,
        tail: TailCopyingDown,
    },
    Reload {
        key: KvKey,
        started: Tick,
        /// With their indices in the sequence, which rise.
        blocks: Vec<(usize, Arrival)>,
        tail: Option<ArrivingTail>,
        host: Part,
        disk: Part,
    },
    /// The disk's part of a reload that the host has a part in too.
    PartOf(Ticket),
    Store {
        key: KvKey,
        /// Index of the first block in the conversation's tables.
        first: usize,
        blocks: Vec<(Above, Slot<DiskBlockId>)>,
    },
    Erase {
        places: Vec<u32>,
    },
}

/// What one tier brings of a reload.
#[derive(Debug)]
pub(super) enum Part {
    Nothing,
    Coming,
    Here(Vec<Option<u32>>),
}

impl Part {
    pub fn of(pairs: usize) -> Self {
        if pairs == 0 { Part::Nothing } else { Part::Coming }
    }

    fn is_coming(&self) -> bool {
        matches!(self, Part::Coming)
    }

    fn sums(self) -> std::vec::IntoIter<Option<u32>> {
        match self {
            Part::Nothing | Part::Coming => Vec::new(),
            Part::Here(sums) => sums,
        }
        .into_iter()
    }
}

/// A full block that a reload adds to the device table.
#[derive(Debug)]
pub(super) enum Arrival {
    /// On the device already, held for this conversation meanwhile.
    Here(Arc<SealedBlock<BlockId>>),
    /// Copied up from the host into a place.
    Coming(Arc<SealedBlock<HostBlockId>>, Slot<BlockId>),
    /// Loaded from disk into a place.
    Loading(Arc<SealedBlock<DiskBlockId>>, Slot<BlockId>),
}

/// A tail that a reload brings, its place, and how many of its tokens are wanted.
#[derive(Debug)]
pub(super) struct ArrivingTail {
    /// Of the block in the sequence.
    pub index: usize,
    pub from: Arc<TailBlock<HostBlockId>>,
    pub to: Slot<BlockId>,
    pub keep: TokenCount,
}

impl Manager {
    /// Starts the copies that nobody waits for, of idle conversations that have none yet, as long as few are under way.
    /// Called once a step, after all that must have room.
    pub fn work_ahead(&mut self, now: Tick) {
        if self.disk.exists() {
            self.store_ahead(now);
        }
        while self.offloads_under_way < BACKGROUND_OFFLOADS {
            let Some(key) = self.uncopied.pop_front() else { return };
            let idle = self.conversations.get_mut(&key).filter(|conversation| conversation.is_idle());
            let Some(conversation) = idle else { continue };
            if conversation.copying.is_none() {
                self.start_offload(now, key);
            }
        }
    }

    /// Lets go of copies under way of what the conversation, which goes on with this chain, has left behind: they are made
    /// for nobody.
    pub(super) fn disown_copies(&mut self, key: KvKey, hashes: &[PrefixHash]) {
        let conversation = self.conversations.get_mut(&key).expect("the caller knows the conversation");
        let left_behind = |ticket: &Ticket| {
            let (full, end) = match self.in_flight.get(ticket) {
                Some(InFlight::Offload { first, end, sealed, .. }) => (first + sealed.len(), *end),
                Some(InFlight::Store { first, blocks, .. }) => {
                    (first + blocks.len(), blocks.last().map_or(PrefixHash::ROOT, |(above, _)| above.hash()))
                }
                Some(InFlight::Reload { .. } | InFlight::PartOf(_) | InFlight::Erase { .. }) | None => return false,
            };
            full > 0 && hashes.get(full - 1) != Some(&end)
        };
        conversation.copying = conversation.copying.filter(|ticket| !left_behind(ticket));
        conversation.storing = conversation.storing.filter(|ticket| !left_behind(ticket));
    }

    pub(super) fn copies_under_way(&self) -> bool {
        self.offloads_under_way > 0
    }

    /// Copies a victim down before it may go. False if the host pool has no room for it.
    pub(super) fn copy_down_now(&mut self, now: Tick, key: KvKey) -> bool {
        let conversation = self.conversations.get(&key).expect("a conversation in line is known");
        conversation.copying.is_some() || self.start_offload(now, key)
    }

    /// Takes part in host copies that others hold of the same blocks.
    pub(super) fn adopt_host_copies(&mut self, key: KvKey) {
        let conversation = self.conversations.get_mut(&key).expect("the caller knows the conversation");
        while let Some(block) = conversation.device.sealed.get(conversation.host.sealed.len()) {
            let Some(copy) = self.host_index.get(&block.hash()) else { break };
            conversation.host.add(copy);
        }
        self.in_host_line(key);
    }

    /// Puts an idle conversation of which the host has something back into line, which had dropped it as the coldest.
    pub(super) fn in_host_line(&mut self, key: KvKey) {
        let conversation = self.conversation(key);
        if conversation.is_idle() && conversation.exposes_host() && !self.host_line.contains(key) {
            let (tenant, since, standing) = (conversation.tenant, conversation.silent_since, conversation.standing());
            let length = conversation.length(self.settings.block_size);
            self.host_line.add_first(tenant, key, since, standing, length);
        }
    }

    /// Orders copies of the first blocks of an idle conversation that have none. False if there is nothing to copy or no
    /// room for a single block.
    fn start_offload(&mut self, now: Tick, key: KvKey) -> bool {
        self.adopt_host_copies(key);
        let conversation = self.conversations.get_mut(&key).expect("the caller knows the conversation");
        if conversation.end_is_clean() {
            return false;
        }
        let first = conversation.host.sealed.len();
        // A host tail is older than what is copied now, or the same block: the device has all of it, if it reaches so far.
        if conversation.device.end() >= conversation.host.end() {
            conversation.host.tail = None;
        }
        // Only what follows the front: a gap is copied once it is closed.
        let reach = conversation.host.back.as_ref().map_or(usize::MAX, |back| back.first);
        let missing = conversation.device.sealed.len().min(reach).saturating_sub(first);
        let is_end = conversation.device.back.is_none() && conversation.host.back.is_none();
        let wanted = (missing + usize::from(is_end && conversation.device.tail.is_some())).min(OFFLOAD_BLOCKS);
        let wanted = BlockCount(u32::try_from(wanted).expect("bounded above"));
        self.make_host_room(now, wanted, key);
        let conversation = self.conversations.get(&key).expect("making host room keeps a conversation on the device");
        let mut end = conversation.host.sealed.last().map_or(PrefixHash::ROOT, |block| block.hash());
        let mut sealed = Vec::new();
        let mut pairs = Vec::new();
        for block in conversation.device.sealed.iter().skip(first).take(missing.min(OFFLOAD_BLOCKS)) {
            let Some(slot) = conversation.host.take_place() else { break };
            pairs.push((block.id().0, slot.place().0));
            end = block.hash();
            sealed.push((Arc::clone(block), slot));
        }
        let reaches_tail = is_end && sealed.len() == missing && pairs.len() < OFFLOAD_BLOCKS;
        let tail = conversation.device.tail.as_ref().filter(|_| reaches_tail);
        let tail = tail.and_then(|tail| Some((Arc::clone(tail), conversation.host.take_place()?)));
        pairs.extend(tail.iter().map(|(block, slot)| (block.id().0, slot.place().0)));
        if pairs.is_empty() {
            return false;
        }
        let ticket = self.order(Direction::Offload, pairs, InFlight::Offload { key, first, end, sealed, tail });
        self.offloads_under_way += 1;
        let conversation = self.conversations.get_mut(&key).expect("looked up above");
        conversation.copying = Some(ticket);
        conversation.in_flight += 1;
        true
    }

    pub(super) fn order(&mut self, direction: Direction, pairs: Vec<(u32, u32)>, in_flight: InFlight) -> Ticket {
        self.order_labelled(direction, pairs, Vec::new(), in_flight)
    }

    pub(super) fn order_labelled(
        &mut self,
        direction: Direction,
        pairs: Vec<(u32, u32)>,
        labels: Vec<(Label, Option<u32>)>,
        in_flight: InFlight,
    ) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.orders.push(TransferOrder { ticket, direction, pairs, labels });
        self.in_flight.insert(ticket, in_flight);
        ticket
    }

    /// Takes in a transfer's outcome. If it was the reload of a sequence that still waits for it, says what is there now.
    ///
    /// Panics on a ticket that was never ordered.
    pub fn transferred(&mut self, now: Tick, done: TransferDone) -> Option<Reloaded> {
        self.tell_time(now);
        let bytes = done.sums.len() as u64 * self.settings.block_bytes.cold;
        match self.in_flight.remove(&done.ticket).expect("a transfer was ordered once") {
            InFlight::Offload { key, first, sealed, tail, .. } => {
                self.offloads_under_way -= 1;
                self.counters.offloaded_bytes += bytes;
                self.offloaded(key, done.ticket, first, (sealed, tail), &done.sums);
                self.after_offload(now, key);
                None
            }
            InFlight::Store { key, first, blocks } => {
                self.counters.stored_bytes += bytes;
                self.stored(now, key, done.ticket, first, blocks, &done.sums);
                None
            }
            InFlight::Erase { places } => {
                self.erased(now, done.ticket, &places, &done.sums);
                None
            }
            InFlight::PartOf(ticket) => {
                self.loaded(&done);
                let Some(InFlight::Reload { disk, .. }) = self.in_flight.get_mut(&ticket) else {
                    unreachable!("a reload waits for its parts")
                };
                *disk = Part::Here(done.sums);
                self.reloaded_if_all_here(now, ticket)
            }
            InFlight::Reload { key, started, blocks, tail, mut host, mut disk } => {
                if host.is_coming() {
                    self.counters.reloaded_bytes += bytes;
                    self.rates.reload_bytes_per_s.add(bytes, done.took_us);
                    host = Part::Here(done.sums);
                } else {
                    self.loaded(&done);
                    disk = Part::Here(done.sums);
                }
                self.in_flight.insert(done.ticket, InFlight::Reload { key, started, blocks, tail, host, disk });
                self.reloaded_if_all_here(now, done.ticket)
            }
        }
    }

    /// Takes in what a disk gave: what it did not give says nothing about its speed.
    fn loaded(&mut self, done: &TransferDone) {
        self.loading_places -= done.sums.len() as u64;
        let bytes = done.sums.iter().flatten().count() as u64 * self.settings.block_bytes.cold;
        self.counters.loaded_bytes += bytes;
        if bytes > 0 {
            self.rates.load_bytes_per_s.add(bytes, done.took_us);
        }
    }

    fn reloaded_if_all_here(&mut self, now: Tick, ticket: Ticket) -> Option<Reloaded> {
        let Some(InFlight::Reload { host, disk, .. }) = self.in_flight.get(&ticket) else { return None };
        if host.is_coming() || disk.is_coming() {
            return None;
        }
        self.hanging_loads.remove(&ticket);
        let Some(InFlight::Reload { key, started, blocks, tail, host, disk }) = self.in_flight.remove(&ticket) else {
            return None;
        };
        self.reloaded(now, key, ticket, started, (blocks, tail), (host.sums(), disk.sums()))
    }

    fn offloaded(
        &mut self,
        key: KvKey,
        ticket: Ticket,
        first: usize,
        (sealed, tail): (CopyingDown, TailCopyingDown),
        sums: &[Option<u32>],
    ) {
        let mut conversation = self.conversations.get_mut(&key);
        if let Some(conversation) = conversation.as_deref_mut() {
            conversation.in_flight -= 1;
        }
        let mut conversation = conversation.filter(|conversation| conversation.copying == Some(ticket));
        let full = first + sealed.len();
        for ((index, (of, slot)), sum) in (first..).zip(sealed).zip(sums) {
            let Some(sum) = *sum else { break };
            let copy = self.host_index.insert(SealedBlock::copied(&of, slot, Checksum(sum)));
            // The conversation may have gone another way since: only what continues its own chain is its copy.
            if let Some(conversation) = conversation.as_deref_mut() {
                let end = conversation.host.sealed.last().map_or(PrefixHash::ROOT, |block| block.hash());
                if conversation.host.sealed.len() == index && end == copy.parent() {
                    conversation.host.add(copy);
                }
            }
        }
        let last = sums.last().copied().flatten();
        if let (Some(conversation), Some((of, slot)), Some(sum)) = (conversation.as_deref_mut(), tail, last)
            && conversation.host.end() == full
        {
            conversation.host.tail = Some(Arc::new(TailBlock::copied(&of, slot, Checksum(sum))));
        }
        if let Some(conversation) = conversation {
            conversation.copying = None;
        }
    }

    /// What an idle conversation does next, after some of it was copied.
    fn after_offload(&mut self, now: Tick, key: KvKey) {
        let Some(conversation) = self.conversations.get(&key) else { return };
        if matches!(conversation.activity, Activity::Forgetting) {
            return self.finish_forgetting(key);
        }
        if !conversation.is_idle() {
            return;
        }
        self.settle_pin_of(key);
        let conversation = self.conversation(key);
        let (leaving, clean) = (conversation.leaving.is_some(), conversation.end_is_clean());
        self.in_host_line(key);
        if leaving {
            self.go_on_leaving(now, key);
        } else if !clean && self.settings.background_offload {
            self.uncopied.push_back(key);
        } else {
            self.wants_store(key);
        }
        self.touch(key);
        self.drop_if_empty(key);
    }

    fn reloaded(
        &mut self,
        now: Tick,
        key: KvKey,
        ticket: Ticket,
        started: Tick,
        (blocks, tail): (Vec<(usize, Arrival)>, Option<ArrivingTail>),
        (mut host_sums, mut disk_sums): (std::vec::IntoIter<Option<u32>>, std::vec::IntoIter<Option<u32>>),
    ) -> Option<Reloaded> {
        let conversation = self.conversations.get_mut(&key)?;
        conversation.in_flight -= 1;
        if matches!(conversation.activity, Activity::Forgetting) {
            drop((blocks, tail));
            self.finish_forgetting(key);
            return None;
        }
        let Activity::Running(running) = &mut conversation.activity else {
            drop((blocks, tail));
            self.drop_if_empty(key);
            return None;
        };
        running.arriving.take_if(|arriving| arriving.ticket == ticket)?;
        let device = &mut conversation.device;
        let mut bad: Vec<Arc<SealedBlock<DiskBlockId>>> = Vec::new();
        let mut damaged = 0;
        for (index, block) in blocks {
            let (arrived, slot) = match block {
                Arrival::Here(block) => (Some(block), None),
                Arrival::Coming(of, slot) => {
                    if host_sums.next().flatten().map(Checksum) == Some(of.proof()) {
                        (Some(self.device_index.insert(SealedBlock::copied(&of, slot, ()))), None)
                    } else {
                        tracing::warn!(block = of.id().0, "a reloaded block does not match its checksum: re-encoding");
                        damaged += 1;
                        self.host_index.remove(&of.hash());
                        conversation.host.truncate(index);
                        (None, Some(slot))
                    }
                }
                Arrival::Loading(of, slot) => {
                    if disk_sums.next().flatten().map(Checksum) == Some(of.proof()) {
                        (Some(self.device_index.insert(SealedBlock::copied(&of, slot, ()))), None)
                    } else {
                        if bad.is_empty() {
                            tracing::warn!(slot = of.id().0, "a block on disk is not what it should be: re-encoding");
                        }
                        damaged += 1;
                        conversation.disk.truncate(index);
                        bad.push(of);
                        (None, Some(slot))
                    }
                }
            };
            running.spare.extend(slot);
            // The sequence may have encoded it meanwhile, or be in the middle of it.
            if let Some(block) = arrived
                && device.arrive(index, block)
            {
                running.spare.extend(running.open.take().map(OpenBlock::into_slot));
            }
        }
        if let Some(ArrivingTail { index, from, to, keep }) = tail {
            if host_sums.next().flatten().map(Checksum) != Some(from.proof()) {
                tracing::warn!(block = from.id().0, "a reloaded tail does not match its checksum: re-encoding");
                damaged += 1;
                conversation.host.tail = None;
                running.spare.push(to);
            } else {
                let open = OpenBlock::with_tokens(to, from.tokens()[..keep.get()].to_vec());
                running.later = Some((index, open));
            }
        }
        running.reach(device.sealed.len());
        running.later.take_if(|(index, _)| *index != device.end());
        running.return_spare(device.blocks().get());
        running.list(device.sealed.iter().map(|block| block.id()));
        self.counters.verification_failures += damaged;
        if damaged > 0 {
            let from = if bad.is_empty() { Tier::Host } else { Tier::Disk };
            self.note_damage(now, key, from, damaged);
        }
        for block in bad {
            self.give_up_slot(&block);
        }
        self.touch(key);
        Some(Reloaded { key, took_ms: now.ms_since(started) })
    }

    /// Notes that blocks of a conversation were not what had been stored.
    pub(super) fn note_damage(&mut self, at: Tick, victim: KvKey, from: Tier, blocks: u64) {
        let tenant = self.conversation(victim).tenant;
        let lost = BlockCount(u32::try_from(blocks).expect("a window bounds a reload"));
        let (rule, reason, freed) = (Rule::Checksum, Reason::default(), BlockCount(0));
        self.note(Entry { id: 0, at, victim, tenant, for_tenant: tenant, rule, reason, from, freed, lost });
    }

    /// Starts taking an idle conversation down to a tier, and off those above it: what has no copy there is copied first.
    /// Nothing if it isn't idle.
    pub fn leave(&mut self, now: Tick, key: KvKey, to: Tier) {
        match self.conversations.get_mut(&key) {
            Some(conversation) if conversation.is_idle() => {
                conversation.leaving = Some(to);
                self.go_on_leaving(now, key);
            }
            Some(_) | None => self.left.push((key, 0)),
        }
    }

    pub(super) fn go_on_leaving(&mut self, now: Tick, key: KvKey) {
        if self.host.total().0 > 0 && self.copy_down_now(now, key) {
            return;
        }
        let to_disk = self.conversation(key).leaving == Some(Tier::Disk) && self.disk.exists();
        let is_stored = || self.conversation(key).storing.is_some();
        if to_disk && (is_stored() || self.store(now, key) || self.waits_for_disk_room(key)) {
            return;
        }
        let conversation = self.conversations.get_mut(&key).expect("the caller knows the conversation");
        conversation.leaving = None;
        let tenant = conversation.tenant;
        let before = self.device.free();
        let on_disk = conversation.disk.sealed.len();
        if to_disk && on_disk >= conversation.device.end().max(conversation.host.end()) {
            // Full blocks alone are kept on disk: a part-full last one is encoded again.
            conversation.device.tail = None;
            conversation.host.clear();
        }
        // Only what has a copy goes: an offload loses nothing.
        while !conversation.device.is_empty() && conversation.end_is_clean() {
            conversation.device.take_end();
        }
        let (no_device, no_host) = (conversation.device.is_empty(), conversation.host.is_empty());
        if no_device {
            self.device_line.remove(key);
        }
        if no_device && no_host {
            self.host_line.remove(key);
        }
        let freed = BlockCount(self.device.free().0 - before.0);
        if freed.0 > 0 {
            let (rule, reason, from, lost) = (Rule::Requested, Reason::default(), Tier::Device, BlockCount(0));
            let for_tenant = tenant;
            self.note(Entry { id: 0, at: now, victim: key, tenant, for_tenant, rule, reason, from, freed, lost });
        }
        self.left.push((key, u64::from(freed.0) * self.settings.block_bytes.device));
        self.settle_pin_of(key);
        self.touch(key);
        self.drop_if_empty(key);
    }
}
