//! How are full blocks kept on disk, and found there after a restart?
//!
//! A conversation's disk table is a copy of a prefix of its history, as its host table is. Blocks are written behind the
//! turns, from the tier above, and loaded to the device when a turn wants them. A slot's label says whose block it is, so
//! that tables are rebuilt from the labels alone. A slot that is let go is overwritten before it is free: what a
//! conversation gave up is in no file of the tier once that is answered. A disk that refuses a write is left alone for a
//! while; what it holds is still read.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::mem::take;
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
use crate::kernels::files::{Contents, FoundSlot, Label};
use crate::types::{BlockCount, BlockId, DiskBlockId, HostBlockId, KvKey, TenantId, TenantKey, Tick, Tier};

/// Most blocks of one store.
const STORE_BLOCKS: usize = 16;
/// Most stores under way: nobody waits for them, and loads have a queue of their own.
const STORES: usize = 2;
/// Most slots that are overwritten by one order, so that a deletion waits for no more than that before its own.
const ERASE_BLOCKS: usize = 64;
/// Most conversations that wait to be stored.
const MOST_WAITING: usize = 1 << 20;
/// How long a disk that refused a write is left alone.
const REST_US: u64 = 30_000_000;

/// A full block of a tier above the disk.
#[derive(Clone, Debug)]
pub(super) enum Above {
    Device(Arc<SealedBlock<BlockId>>),
    Host(Arc<SealedBlock<HostBlockId>>),
}

impl Above {
    fn tier(&self) -> Tier {
        match self {
            Above::Device(_) => Tier::Device,
            Above::Host(_) => Tier::Host,
        }
    }

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

/// A forgotten conversation that waits for erasures.
#[derive(Debug)]
struct Forget {
    key: KvKey,
    freed: Freed,
    waits: BTreeSet<Ticket>,
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
    /// Erasures under way.
    erasures: BTreeSet<Ticket>,
    forgets: Vec<Forget>,
    /// Slots that were let go and could not be overwritten.
    unerased: Vec<u32>,
    /// Conversations that are asked to the disk, and wait for room there.
    leavers: Vec<KvKey>,
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
            erasures: BTreeSet::new(),
            forgets: Vec::new(),
            unerased: Vec::new(),
            leavers: Vec::new(),
        }
    }

    pub fn exists(&self) -> bool {
        self.places.total().0 > 0
    }

    /// Whether it takes no writes for now.
    fn rests(&self, now: Tick) -> bool {
        self.rests_until.is_some_and(|until| now < until)
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
            ended: matches!(self.activity, Activity::Ended),
        }
    }

    pub fn label_of(&self, index: usize, block: &SealedBlock<DiskBlockId>) -> Label {
        self.label(index, block.parent(), block.hash())
    }
}

impl Manager {
    /// Takes over what a disk tier held when the process before ended. Slots of tenants that are not among these, of
    /// conversations that are no more, and that were not written to their end, are given up.
    pub fn recover(&mut self, found: Contents, tenants: &[(TenantId, TenantKey)], lives: impl Fn(KvKey) -> bool) {
        let marks: HashMap<[u8; 16], (TenantId, TenantKey)> =
            tenants.iter().map(|(id, key)| (tenant_mark(key), (*id, *key))).collect();
        let longest = self.settings.window.blocks(self.settings.block_size).0;
        let labelled = found.blocks.iter().map(|found| found.slot);
        self.disk.places.occupy(labelled.chain(found.unfinished.iter().copied()));
        found.unfinished.into_iter().for_each(|slot| self.disk.places.release(slot));
        let mut blocks: HashMap<PrefixHash, Arc<SealedBlock<DiskBlockId>>> = HashMap::new();
        let mut ends: HashMap<KvKey, Vec<FoundSlot>> = HashMap::new();
        for found in found.blocks {
            let (label, hash) = (found.label, PrefixHash(found.label.hash));
            let owner = marks.get(&label.tenant).filter(|_| label.index < longest);
            let owner = owner.filter(|(id, _)| blocks.get(&hash).is_none_or(|known| known.tenant() == *id));
            let Some((tenant, _)) = owner else {
                self.disk.places.release(found.slot);
                continue;
            };
            self.disk.budget.see(*tenant);
            let slot = self.disk.places.claim(found.slot, *tenant);
            let block = SealedBlock::found(slot, PrefixHash(label.parent), hash, Checksum(found.bytes_sum));
            blocks.insert(hash, self.disk.index.insert(block));
            let key = KvKey(label.conversation);
            // What was over serves as a prefix; what was deleted is gone, though others may have its front.
            if lives(key) || label.ended {
                ends.entry(key).or_default().push(found);
            }
        }
        let newest = |found: &Vec<FoundSlot>| found.iter().map(|found| found.label.used).max().unwrap_or(0);
        let mut known: Vec<_> = ends.into_iter().map(|(key, found)| (newest(&found), key, found)).collect();
        known.sort_unstable_by_key(|(used, key, _)| (*used, *key));
        for (used, key, mut found) in known {
            // The newest chain. Its front may be another conversation's, which wrote it first.
            found.sort_unstable_by_key(|found| std::cmp::Reverse((found.label.used, found.label.index)));
            // The newest of two with one parent.
            let by_parent: HashMap<[u8; 32], &FoundSlot> =
                found.iter().rev().map(|found| (found.label.parent, found)).collect();
            let end = found.iter().find(|end| chain_to(end, &blocks).is_some());
            // What lies behind it is older, where a gap before it was closed since.
            let end = end.map(|end| last_after(end, &by_parent));
            let end = end.and_then(|end| Some((end, chain_to(end, &blocks)?)));
            let Some((end, (first, sealed))) = end else { continue };
            let (tenant, tenant_key) = marks[&end.label.tenant];
            let pools = [&self.device, &self.host, &self.disk.places];
            let mut conversation = Conversation::new(key, tenant, tenant_key, pools);
            let ended = !lives(key);
            if first == 0 {
                conversation.disk.sealed.extend(sealed);
            } else {
                conversation.disk.sealed.extend(chain_from_root(first, &by_parent, &blocks));
                conversation.disk.put_behind_gap(first, sealed);
            }
            conversation.used = used;
            if ended {
                conversation.activity = Activity::Ended;
            }
            self.uses = self.uses.max(used);
            let length = conversation.length(self.settings.block_size);
            self.disk.line.add(tenant, key, conversation.silent_since, conversation.standing(), length);
            self.conversations.insert(key, conversation);
            self.touch(key);
        }
    }

    /// Writes down to disk what idle conversations have above it, as long as few stores are under way.
    pub(super) fn store_ahead(&mut self, now: Tick) {
        if self.disk.rests(now) {
            return;
        }
        self.disk.rests_until = None;
        for place in take(&mut self.disk.unerased) {
            self.disk.places.release_again(place);
        }
        while self.disk.stores_under_way < STORES {
            let Some(key) = self.disk.unstored.pop_front() else { return };
            let Some(conversation) = self.conversations.get_mut(&key) else { continue };
            conversation.waits_for_store = false;
            let may = conversation.is_idle() && conversation.storing.is_none();
            if may && !self.store(now, key) && self.is_short_of_disk() {
                // Room is being made: it is tried again once that is there.
                self.conversations.get_mut(&key).expect("looked up above").waits_for_store = true;
                self.disk.unstored.push_front(key);
                return;
            }
        }
    }

    /// Lets a conversation that is to go to disk wait for the room that is being made there. False if none is.
    pub(super) fn waits_for_disk_room(&mut self, key: KvKey) -> bool {
        let waits = self.is_short_of_disk();
        if waits {
            self.disk.leavers.push(key);
        }
        waits
    }

    fn is_short_of_disk(&self) -> bool {
        self.disk.places.free().0 == 0 && self.disk.places.soon().0 > 0
    }

    /// Notes that a tier above has full blocks of a conversation that the disk may lack.
    pub(super) fn wants_store(&mut self, key: KvKey) {
        let conversation = self.conversation(key);
        let lacks = self.above(conversation) > conversation.disk.sealed.len();
        // More than that wait only while the disk takes nothing; then what has a turn later comes later.
        if self.disk.exists() && lacks && !conversation.waits_for_store && self.disk.unstored.len() < MOST_WAITING {
            self.disk.unstored.push_back(key);
            self.conversations.get_mut(&key).expect("looked up above").waits_for_store = true;
        }
    }

    /// Full blocks that the tier which is copied to disk has: the host, or the device of a server without one.
    fn above(&self, conversation: &Conversation) -> usize {
        let (host, device) = (conversation.host.sealed.len(), conversation.device.sealed.len());
        if self.stores_from_device(conversation) { host.max(device) } else { host }
    }

    /// Whether the disk copies what the device has: there is no host tier, or it had no room for what is to go to disk.
    fn stores_from_device(&self, conversation: &Conversation) -> bool {
        self.host.total().0 == 0 || conversation.leaving == Some(Tier::Disk)
    }

    fn block_above(&self, conversation: &Conversation, index: usize) -> Option<Above> {
        let on_host = conversation.host.sealed.get(index).cloned().map(Above::Host);
        let from_device = self.stores_from_device(conversation);
        let on_device = || conversation.device.sealed.get(index).filter(|_| from_device).cloned().map(Above::Device);
        on_host.or_else(on_device)
    }

    /// Orders a store of the first blocks of an idle conversation that the disk lacks. False if there are none, or no room.
    pub(super) fn store(&mut self, now: Tick, key: KvKey) -> bool {
        self.adopt_disk_copies(key);
        let conversation = self.conversation(key);
        let first = conversation.disk.sealed.len();
        let reach = conversation.disk.back.as_ref().map_or(usize::MAX, |back| back.first);
        let missing = self.above(conversation).min(reach).saturating_sub(first).min(STORE_BLOCKS);
        if missing == 0 || self.disk.rests(now) {
            return false;
        }
        self.make_disk_room(now, BlockCount(u32::try_from(missing).expect("bounded above")), key);
        let conversation = self.conversation(key);
        let (mut blocks, mut pairs, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for index in first..first + missing {
            let Some(block) = self.block_above(conversation, index) else { break };
            // One order copies from one tier.
            if blocks.first().is_some_and(|(first, _): &(Above, _)| first.tier() != block.tier()) {
                break;
            }
            let Some(slot) = conversation.disk.take_place() else { break };
            pairs.push((block.place(), slot.place().0));
            labels.push((conversation.label(index, block.parent(), block.hash()), block.sum()));
            blocks.push((block, slot));
        }
        if pairs.is_empty() {
            return false;
        }
        let from = blocks[0].0.tier();
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
            let Some(copy) = next.and_then(|block| self.disk.index.get(&block.hash())) else { break };
            self.conversations.get_mut(&key).expect("looked up above").disk.add(copy);
        }
        self.in_disk_line(key);
    }

    /// Puts an idle conversation of which the disk has something back into line, which had dropped it as the coldest.
    fn in_disk_line(&mut self, key: KvKey) {
        let conversation = self.conversation(key);
        let belongs = conversation.is_idle() && !conversation.disk.is_empty();
        if belongs && !self.disk.line.contains(key) {
            let (tenant, since, standing) = (conversation.tenant, conversation.silent_since, conversation.standing());
            let length = conversation.length(self.settings.block_size);
            self.disk.line.add_first(tenant, key, since, standing, length);
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
                self.damaged_on_host(now, key, index, of.hash());
                break;
            }
            let copy = self.disk.index.insert(of.copied(slot, Checksum(sum)));
            let Some(conversation) = self.conversations.get_mut(&key) else { continue };
            // The conversation may have gone another way since: only what continues its own chain is its copy.
            let end = conversation.disk.sealed.last().map_or(PrefixHash::ROOT, |block| block.hash());
            if conversation.storing == Some(ticket) && conversation.disk.sealed.len() == index && end == copy.parent() {
                conversation.disk.add(copy);
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
        let leaving = conversation.leaving;
        self.in_disk_line(key);
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
            // Nor does it make room for itself by what it has there.
            let Some(victim) = victim.filter(|victim| victim.rank < own_rank && victim.key != key) else { return };
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
        let is_above = |conversation: &Conversation, index| {
            conversation.device.get(index).is_some() || conversation.host.get(index).is_some()
        };
        let front = conversation.front_to_lose(self.settings.front_first_from, self.settings.block_size);
        let front = front.filter(|from| !is_above(conversation, conversation.disk.first_from(*from)));
        while self.disk.places.soon() < need && may_lose(self.disk.places.held(tenant)) {
            let from_front = front.and_then(|from| conversation.disk.take_front(from));
            let Some(taken) = from_front.or_else(|| conversation.disk.take_end()) else { break };
            freed.0 += u32::from(taken.freed);
            lost.0 += u32::from(taken.freed && !is_above(conversation, taken.index));
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
    fn damaged_on_host(&mut self, now: Tick, key: KvKey, index: usize, hash: PrefixHash) {
        self.counters.verification_failures += 1;
        if self.conversations.contains_key(&key) {
            self.note_damage(now, key, Tier::Host, 1);
        }
        tracing::warn!("a block on the host does not match its checksum: it is not stored on disk, and given up");
        self.host_index.remove(&hash);
        let conversation = self.conversations.get_mut(&key);
        let own = conversation.filter(|held| held.host.get(index).is_some_and(|block| block.hash() == hash));
        if let Some(conversation) = own {
            conversation.host.truncate(index);
        }
    }

    /// Puts a slot whose bytes were wrong, or could not be read, out of use.
    pub(super) fn give_up_slot(&mut self, block: &SealedBlock<DiskBlockId>) {
        self.disk.index.remove(&block.hash());
        self.disk.bad.insert(block.id().0);
    }

    /// Says of a forgotten conversation that it is gone, as soon as all that was let go until now is overwritten.
    pub(super) fn forgotten_once_erased(&mut self, key: KvKey, freed: Freed) {
        self.erase_released();
        let waits = self.disk.erasures.clone();
        if waits.is_empty() {
            return self.forgot(key, freed);
        }
        self.disk.forgets.push(Forget { key, freed, waits });
    }

    /// Orders that slots which were let go are overwritten. They are free once that is done.
    pub(super) fn erase_released(&mut self) {
        for places in self.disk.places.take_released().chunks(ERASE_BLOCKS) {
            let pairs = places.iter().map(|place| (*place, *place)).collect();
            let ticket = self.order(Direction::Erase, pairs, InFlight::Erase { places: places.to_vec() });
            self.disk.erasures.insert(ticket);
        }
    }

    /// Takes in an erasure's outcome. What could not be overwritten is tried again with the next write, and is told as
    /// remaining.
    pub(super) fn erased(&mut self, now: Tick, ticket: Ticket, places: &[u32], sums: &[Option<u32>]) {
        self.disk.erasures.remove(&ticket);
        let (done, failed): (Vec<_>, Vec<_>) = places.iter().zip(sums).partition(|(_, sum)| sum.is_some());
        let good = done.into_iter().map(|(place, _)| *place).filter(|place| !self.disk.bad.contains(place));
        self.disk.places.give_back(places.len(), good);
        if !failed.is_empty() {
            tracing::error!(slots = failed.len(), "slots of the disk tier could not be overwritten; it is tried again");
            self.disk.unerased.extend(failed.iter().map(|(place, _)| **place));
        }
        for key in take(&mut self.disk.leavers) {
            let leaves = self.conversations.get(&key).filter(|conversation| conversation.is_idle());
            if leaves.is_some_and(|conversation| conversation.leaving.is_some()) {
                self.go_on_leaving(now, key);
            }
        }
        for mut forget in take(&mut self.disk.forgets) {
            if forget.waits.remove(&ticket) && !failed.is_empty() {
                forget.freed.remaining = forget.freed.disk;
            }
            if forget.waits.is_empty() {
                let Forget { key, freed, .. } = forget;
                self.forgot(key, Freed { disk: BlockCount(freed.disk.0 - freed.remaining.0), ..freed });
            } else {
                self.disk.forgets.push(forget);
            }
        }
    }

    /// Whether the disk is left alone for now, since it refused a write.
    pub fn disk_rests(&self, now: Tick) -> bool {
        self.disk.rests(now)
    }

    /// Disk places that are out of use for good, or will be once they are let go.
    pub fn bad_slots(&self) -> usize {
        self.disk.bad.len()
    }
}

type DiskBlocks = HashMap<PrefixHash, Arc<SealedBlock<DiskBlockId>>>;

/// The blocks before this one, it included, as far back as none is missing, and the index of the first. `None` if their
/// labels contradict each other.
fn chain_to(end: &FoundSlot, blocks: &DiskBlocks) -> Option<(usize, VecDeque<Arc<SealedBlock<DiskBlockId>>>)> {
    let after = end.label.index as usize + 1;
    let mut chain = VecDeque::new();
    let mut hash = PrefixHash(end.label.hash);
    // A chain is as long as its end says, so that this ends whatever the labels say.
    while let Some(block) = blocks.get(&hash).filter(|_| chain.len() < after) {
        hash = block.parent();
        chain.push_front(Arc::clone(block));
    }
    let first = after - chain.len();
    ((first == 0) == (hash == PrefixHash::ROOT) && !chain.is_empty()).then_some((first, chain))
}

/// The conversation's last block that follows this one without a gap.
fn last_after<'a>(end: &'a FoundSlot, by_parent: &HashMap<[u8; 32], &'a FoundSlot>) -> &'a FoundSlot {
    let mut end = end;
    // Indices rise, so that this ends.
    while let Some(next) = by_parent.get(&end.label.hash).filter(|next| next.label.index == end.label.index + 1) {
        end = next;
    }
    end
}

/// The conversation's own blocks from the root on, before the one of index `end`.
fn chain_from_root(
    end: usize,
    by_parent: &HashMap<[u8; 32], &FoundSlot>,
    blocks: &DiskBlocks,
) -> Vec<Arc<SealedBlock<DiskBlockId>>> {
    let mut chain: Vec<Arc<SealedBlock<DiskBlockId>>> = Vec::new();
    while chain.len() + 1 < end {
        let parent = chain.last().map_or(PrefixHash::ROOT, |block| block.hash());
        let next = by_parent.get(&parent.0).filter(|next| next.label.index as usize == chain.len());
        let Some(next) = next.and_then(|found| blocks.get(&PrefixHash(found.label.hash))) else { break };
        chain.push(Arc::clone(next));
    }
    chain
}
