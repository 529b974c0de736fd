//! How are full blocks kept on disk, and found there after a restart?
//!
//! A conversation's disk table is a copy of a prefix of its history, as its host table is. Blocks are written behind the
//! turns, from the tier above, and loaded to the device when a turn wants them. A slot's label says whose block it is, so
//! that tables are rebuilt from the labels alone. A slot that is let go is overwritten before it is free: what a
//! conversation gave up is in no file of the tier once that is answered. A disk that refuses a write is left alone for a
//! while; what it holds is still read.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::block::{Checksum, Places, PrefixHash, SealedBlock, Slot};
use super::budget::Budget;
use super::evictor::{Evictor, Judge, Victim};
use super::forget::Freed;
use super::journal::Entry;
use super::manager::Manager;
use super::prefix::PrefixIndex;
use super::residency::{Activity, Conversation};
use super::return_rate::Class;
use super::tiers::InFlight;
use super::transfer::{Direction, Ticket};
use crate::kernels::files::{FoundSlot, Label};
use crate::types::{BlockCount, BlockId, DiskBlockId, HostBlockId, KvKey, TenantId, TenantKey, Tick, Tier};

/// Most blocks of one store.
const STORE_BLOCKS: usize = 16;
/// Most stores under way: nobody waits for them, and loads have a queue of their own.
const STORES: usize = 2;
/// How long a disk that refused a write is left alone.
const REST_US: u64 = 30_000_000;

/// A full block of a tier above the disk.
#[derive(Clone, Debug)]
pub(super) enum Above {
    Device(Arc<SealedBlock<BlockId>>),
    Host(Arc<SealedBlock<HostBlockId>>),
}

impl Above {
    fn place(&self) -> u32 {
        match self {
            Above::Device(block) => block.id().0,
            Above::Host(block) => block.id().0,
        }
    }

    /// The sum of its bytes, where there is one: they may have been damaged since.
    fn sum(&self) -> Option<u32> {
        match self {
            Above::Device(_) => None,
            Above::Host(block) => Some(block.proof().0),
        }
    }

    fn parent(&self) -> PrefixHash {
        match self {
            Above::Device(block) => block.parent(),
            Above::Host(block) => block.parent(),
        }
    }

    pub fn hash(&self) -> PrefixHash {
        match self {
            Above::Device(block) => block.hash(),
            Above::Host(block) => block.hash(),
        }
    }

    fn copied(&self, slot: Slot<DiskBlockId>, sum: Checksum) -> SealedBlock<DiskBlockId> {
        match self {
            Above::Device(block) => SealedBlock::copied(block, slot, sum),
            Above::Host(block) => SealedBlock::copied(block, slot, sum),
        }
    }
}

/// The disk's part of the block manager.
#[derive(Debug)]
pub(super) struct Disk {
    pub places: Arc<Places>,
    pub index: PrefixIndex<DiskBlockId>,
    pub line: Evictor,
    pub budget: Budget,
    /// Idle conversations of which a tier above has full blocks that the disk lacks.
    unstored: VecDeque<KvKey>,
    stores_under_way: usize,
    /// Until then nothing is written: the last write failed.
    rests_until: Option<Tick>,
    /// Slots whose bytes were not what they should be: overwritten as the others are, and never used again.
    bad: HashSet<u32>,
    /// Forgotten conversations that wait for the next erasure.
    forgets: Vec<(KvKey, Freed)>,
}

impl Disk {
    pub fn new(blocks: BlockCount, block_bytes: u64) -> Self {
        Self {
            places: Places::that_hold_back(blocks),
            index: PrefixIndex::default(),
            line: Evictor::default(),
            budget: Budget::new(blocks, block_bytes, BlockCount(0)),
            unstored: VecDeque::new(),
            stores_under_way: 0,
            rests_until: None,
            bad: HashSet::new(),
            forgets: Vec::new(),
        }
    }

    pub fn exists(&self) -> bool {
        self.places.total().0 > 0
    }

    /// Whether it takes no writes for now.
    pub fn rests(&self) -> bool {
        self.rests_until.is_some()
    }
}

/// What marks a tenant's slots: nobody without its key can make it, and it tells nobody the tenant's name.
pub fn tenant_mark(key: &TenantKey) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(&key.0);
    hasher.update(b"slots of the disk tier");
    let mut mark = [0; 16];
    hasher.finalize_xof().fill(&mut mark);
    mark
}

impl Conversation {
    /// What the slot of its block `index` must say.
    fn label(&self, index: usize, parent: PrefixHash, hash: PrefixHash) -> Label {
        Label {
            tenant: tenant_mark(&self.tenant_key),
            conversation: self.key.0,
            index: u32::try_from(index).expect("a window bounds a table"),
            parent: parent.0,
            hash: hash.0,
            used: self.used,
        }
    }

    pub fn label_of(&self, index: usize, block: &SealedBlock<DiskBlockId>) -> Label {
        self.label(index, block.parent(), block.hash())
    }
}

impl Manager {
    /// Takes over what a disk tier held when the process before ended. Slots of tenants that are not among these, and
    /// blocks whose chain has a gap, are given up.
    pub fn recover(&mut self, found: Vec<FoundSlot>, tenants: &[(TenantId, TenantKey)]) {
        let marks: HashMap<[u8; 16], (TenantId, TenantKey)> =
            tenants.iter().map(|(id, key)| (tenant_mark(key), (*id, *key))).collect();
        self.disk.places.occupy(found.iter().map(|found| found.slot));
        let mut blocks: HashMap<PrefixHash, Arc<SealedBlock<DiskBlockId>>> = HashMap::new();
        let mut ends: HashMap<KvKey, Vec<FoundSlot>> = HashMap::new();
        for found in found {
            let Some((tenant, _)) = marks.get(&found.label.tenant) else {
                self.disk.places.release(found.slot);
                continue;
            };
            let slot = self.disk.places.claim(found.slot, *tenant);
            let label = found.label;
            let block =
                SealedBlock::found(slot, PrefixHash(label.parent), PrefixHash(label.hash), Checksum(found.bytes_sum));
            let block = self.disk.index.insert(block);
            blocks.insert(block.hash(), block);
            ends.entry(KvKey(label.conversation)).or_default().push(found);
        }
        let mut known: Vec<(u64, KvKey, Vec<FoundSlot>)> = ends
            .into_iter()
            .map(|(key, found)| (found.iter().map(|found| found.label.used).max().unwrap_or(0), key, found))
            .collect();
        known.sort_unstable_by_key(|(used, key, _)| (*used, *key));
        for (used, key, mut found) in known {
            // The longest chain without a gap. Its front may be another conversation's, which wrote it first.
            found.sort_unstable_by_key(|found| std::cmp::Reverse(found.label.index));
            let Some((end, sealed)) = found.iter().find_map(|end| Some((end, chain_to(end, &blocks)?))) else {
                continue;
            };
            let (tenant, tenant_key) = marks[&end.label.tenant];
            let mut conversation = Conversation::new(key, tenant, tenant_key);
            conversation.disk.sealed = sealed;
            conversation.used = used;
            self.uses = self.uses.max(used);
            let length = conversation.disk.tokens(self.settings.block_size);
            self.disk.line.add(tenant, key, conversation.silent_since, conversation.standing(), length);
            self.conversations.insert(key, conversation);
            self.touch(key);
        }
    }

    /// Writes down to disk what idle conversations have above it, as long as few stores are under way.
    pub(super) fn store_ahead(&mut self, now: Tick) {
        if self.disk.rests_until.is_some_and(|until| now < until) {
            return;
        }
        self.disk.rests_until = None;
        while self.disk.stores_under_way < STORES {
            let Some(key) = self.disk.unstored.pop_front() else { return };
            let idle = self.conversations.get(&key).is_some_and(Conversation::is_idle);
            if idle && self.conversation(key).storing.is_none() && !self.store(now, key) && self.is_short_of_disk() {
                // Room is being made: it is tried again once that is there.
                self.disk.unstored.push_front(key);
                return;
            }
        }
    }

    fn is_short_of_disk(&self) -> bool {
        self.disk.places.free().0 == 0 && self.disk.places.soon().0 > 0
    }

    /// Notes that a tier above has full blocks of a conversation that the disk may lack.
    pub(super) fn wants_store(&mut self, key: KvKey) {
        let conversation = self.conversation(key);
        if self.disk.exists() && self.above(conversation) > conversation.disk.sealed.len() {
            self.disk.unstored.push_back(key);
        }
    }

    /// Full blocks that the tier which is copied to disk has: the host, or the device of a server without one.
    fn above(&self, conversation: &Conversation) -> usize {
        if self.host.total().0 > 0 { conversation.host.sealed.len() } else { conversation.device.sealed.len() }
    }

    fn block_above(&self, conversation: &Conversation, index: usize) -> Option<Above> {
        if self.host.total().0 > 0 {
            conversation.host.sealed.get(index).cloned().map(Above::Host)
        } else {
            conversation.device.sealed.get(index).cloned().map(Above::Device)
        }
    }

    /// Orders a store of the first blocks of an idle conversation that the disk lacks. False if there are none, or no room.
    pub(super) fn store(&mut self, now: Tick, key: KvKey) -> bool {
        self.adopt_disk_copies(key);
        let conversation = self.conversation(key);
        let (first, tenant) = (conversation.disk.sealed.len(), conversation.tenant);
        let missing = self.above(conversation).saturating_sub(first).min(STORE_BLOCKS);
        if missing == 0 || self.disk.rests() {
            return false;
        }
        self.make_disk_room(now, BlockCount(u32::try_from(missing).expect("bounded above")), key);
        let conversation = self.conversation(key);
        let (mut blocks, mut pairs, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for index in first..first + missing {
            let Some(block) = self.block_above(conversation, index) else { break };
            let Some(slot) = self.disk.places.take::<DiskBlockId>(tenant) else { break };
            pairs.push((block.place(), slot.place().0));
            labels.push((conversation.label(index, block.parent(), block.hash()), block.sum()));
            blocks.push((block, slot));
        }
        if pairs.is_empty() {
            return false;
        }
        let from = if self.host.total().0 > 0 { Tier::Host } else { Tier::Device };
        let ticket =
            self.order_labelled(Direction::Store { from }, pairs, labels, InFlight::Store { key, first, blocks });
        self.disk.stores_under_way += 1;
        let conversation = self.conversations.get_mut(&key).expect("looked up above");
        conversation.storing = Some(ticket);
        conversation.in_flight += 1;
        true
    }

    /// Takes part in disk copies that others hold of the same blocks.
    fn adopt_disk_copies(&mut self, key: KvKey) {
        loop {
            let conversation = self.conversation(key);
            let next = self.block_above(conversation, conversation.disk.sealed.len());
            let Some(copy) = next.and_then(|block| self.disk.index.get(&block.hash())) else { return };
            self.conversations.get_mut(&key).expect("looked up above").disk.sealed.push(copy);
        }
    }

    /// Takes in a store's outcome.
    pub(super) fn stored(
        &mut self,
        now: Tick,
        key: KvKey,
        ticket: Ticket,
        first: usize,
        blocks: Vec<(Above, Slot<DiskBlockId>)>,
        sums: &[Option<u32>],
    ) {
        self.disk.stores_under_way -= 1;
        let written = blocks.len() == sums.len() && sums.iter().all(Option::is_some);
        if !written {
            self.counters.disk_write_failures += 1;
            if self.disk.rests_until.is_none() {
                tracing::warn!(
                    rest_s = REST_US / 1_000_000,
                    "the disk tier did not take a write; it is left alone for a while"
                );
            }
            self.disk.rests_until = Some(Tick(now.0 + REST_US));
        }
        for ((index, (of, slot)), sum) in (first..).zip(blocks).zip(sums) {
            let Some(sum) = *sum else { break };
            if of.sum().is_some_and(|expected| expected != sum) {
                self.damaged_on_host(key, index, of.hash());
                break;
            }
            let copy = self.disk.index.insert(of.copied(slot, Checksum(sum)));
            let Some(conversation) = self.conversations.get_mut(&key) else { continue };
            // The conversation may have gone another way since: only what continues its own chain is its copy.
            let end = conversation.disk.sealed.last().map_or(PrefixHash::ROOT, |block| block.hash());
            if conversation.storing == Some(ticket) && conversation.disk.sealed.len() == index && end == copy.parent() {
                conversation.disk.sealed.push(copy);
            }
        }
        let Some(conversation) = self.conversations.get_mut(&key) else { return };
        conversation.in_flight -= 1;
        if conversation.storing == Some(ticket) {
            conversation.storing = None;
        }
        if matches!(conversation.activity, Activity::Forgetting) {
            return self.finish_forgetting(key);
        }
        if !conversation.is_idle() {
            return;
        }
        let (tenant, leaving) = (conversation.tenant, conversation.leaving);
        if !conversation.disk.is_empty() && !self.disk.line.contains(key) {
            let length = conversation.length(self.settings.block_size);
            self.disk.line.add_first(tenant, key, conversation.silent_since, conversation.standing(), length);
        }
        if leaving.is_some() {
            self.go_on_leaving(now, key);
        } else if written {
            self.wants_store(key);
        }
        self.touch(key);
        self.drop_if_empty(key);
    }

    /// Makes up to `need` disk places free soon, as `make_host_room` does for the host.
    fn make_disk_room(&mut self, now: Tick, need: BlockCount, key: KvKey) {
        let conversation = self.conversation(key);
        let (tenant, standing, since) = (conversation.tenant, conversation.standing(), conversation.silent_since);
        let length = conversation.length(self.settings.block_size);
        while self.disk.places.soon() < need {
            let (places, budget) = (&self.disk.places, &self.disk.budget);
            let at_ceiling = places.held(tenant).0 + need.0 > budget.ceiling(tenant).0;
            let others_may = |other| !at_ceiling && places.held(other) > budget.floor(other);
            let judge = Judge::new(self.settings.policy, self.settings.doubles_at, &self.returns, now);
            let own_rank = judge.rank(standing, since, length);
            let victim = self.disk.line.victim(&judge, |other| other == tenant || others_may(other));
            let Some(victim) = victim.filter(|victim| victim.rank < own_rank) else { return };
            if !self.stands_as_shared(&victim, Tier::Disk) {
                self.drop_disk_end(now, victim, need, tenant);
            }
        }
    }

    /// Takes disk blocks off a conversation's end until `need` places are free soon. Journalled where copies were the last.
    fn drop_disk_end(&mut self, now: Tick, victim: Victim, need: BlockCount, for_tenant: TenantId) {
        let Victim { key, rule, reason, .. } = victim;
        let conversation = self.conversations.get_mut(&key).expect("a conversation in line is known");
        let tenant = conversation.tenant;
        let floor = self.disk.budget.floor(tenant);
        let may_lose = |held: BlockCount| tenant == for_tenant || held > floor;
        let (mut freed, mut lost) = (BlockCount(0), BlockCount(0));
        while self.disk.places.soon() < need && may_lose(self.disk.places.held(tenant)) {
            let above = conversation.device.sealed.len().max(conversation.host.sealed.len());
            let is_last_copy = conversation.disk.sealed.len() > above;
            let Some(block) = conversation.disk.sealed.pop() else { break };
            let alone = Arc::strong_count(&block) == 1;
            freed.0 += u32::from(alone);
            lost.0 += u32::from(alone && is_last_copy);
            if reason.class != Some(Class::SHARED) && conversation.disk.last_of_shared().is_some() {
                break;
            }
        }
        if conversation.disk.is_empty() {
            self.disk.line.remove(key);
        }
        if lost.0 > 0 {
            self.counters.evictions += 1;
            let from = Tier::Disk;
            self.note(Entry { id: 0, at: now, victim: key, tenant, for_tenant, rule, reason, from, freed, lost });
        }
        self.drop_if_empty(key);
    }

    /// Gives up a host block whose bytes have changed, and what follows it there.
    fn damaged_on_host(&mut self, key: KvKey, index: usize, hash: PrefixHash) {
        self.counters.verification_failures += 1;
        tracing::warn!("a block on the host does not match its checksum: it is not stored on disk, and given up");
        self.host_index.remove(&hash);
        let conversation = self.conversations.get_mut(&key);
        let own = conversation.filter(|held| held.host.sealed.get(index).is_some_and(|block| block.hash() == hash));
        if let Some(conversation) = own {
            conversation.host.truncate(index);
        }
    }

    /// Puts a slot whose bytes were wrong, or could not be read, out of use.
    pub(super) fn give_up_slot(&mut self, block: &SealedBlock<DiskBlockId>) {
        self.disk.index.remove(&block.hash());
        self.disk.bad.insert(block.id().0);
    }

    /// Says of a forgotten conversation that it is gone, as soon as its slots are overwritten.
    pub(super) fn forgotten_once_erased(&mut self, key: KvKey, freed: Freed) {
        self.disk.forgets.push((key, freed));
    }

    /// Orders that slots which were let go are overwritten. They are free once that is done.
    pub(super) fn erase_released(&mut self) {
        let places = self.disk.places.take_released();
        let forgets = std::mem::take(&mut self.disk.forgets);
        if places.is_empty() && forgets.is_empty() {
            return;
        }
        let pairs = places.iter().map(|place| (*place, *place)).collect();
        self.order(Direction::Erase, pairs, InFlight::Erase { places, forgets });
    }

    /// Takes in an erasure's outcome. What could not be overwritten stays out of use, and is told as remaining.
    pub(super) fn erased(&mut self, places: Vec<u32>, forgets: Vec<(KvKey, Freed)>, sums: &[Option<u32>]) {
        let done = sums.len() == places.len() && sums.iter().all(Option::is_some);
        if done {
            let good = places.iter().copied().filter(|place| !self.disk.bad.contains(place));
            self.disk.places.give_back(places.len(), good);
        } else {
            self.disk.bad.extend(&places);
            self.disk.places.give_back(places.len(), std::iter::empty());
            tracing::error!(
                slots = places.len(),
                "slots of the disk tier could not be overwritten; they stay out of use"
            );
        }
        for (key, freed) in forgets {
            let remaining = if done { BlockCount(0) } else { freed.disk };
            self.forgot(key, Freed { remaining, disk: BlockCount(freed.disk.0 - remaining.0), ..freed });
        }
    }

    /// Whether the disk is left alone for now, since it refused a write.
    pub fn disk_rests(&self) -> bool {
        self.disk.rests()
    }

    /// Disk places that are out of use for good, or will be once they are let go.
    pub fn bad_slots(&self) -> usize {
        self.disk.bad.len()
    }
}

/// The blocks from the root to this one; `None` if one is missing.
fn chain_to(
    end: &FoundSlot,
    blocks: &HashMap<PrefixHash, Arc<SealedBlock<DiskBlockId>>>,
) -> Option<Vec<Arc<SealedBlock<DiskBlockId>>>> {
    let mut chain = Vec::new();
    let mut hash = PrefixHash(end.label.hash);
    while hash != PrefixHash::ROOT {
        // A chain is as long as its end says, so that this ends whatever the labels say.
        if chain.len() > end.label.index as usize {
            return None;
        }
        let block = blocks.get(&hash)?;
        hash = block.parent();
        chain.push(Arc::clone(block));
    }
    chain.reverse();
    (chain.len() == end.label.index as usize + 1).then_some(chain)
}
