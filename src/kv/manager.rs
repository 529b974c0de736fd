//! What may the engine ask of KV memory?
//!
//! The façade: admit a sequence, let it grow, note what was written, lay it to rest, forget it. Every operation costs
//! O(1) or O(blocks of the conversation it names or evicts); nothing scans conversations. One owner, the engine's thread.
//! Invariants: free + held places are a pool's total; a running conversation is never a victim; a place that a transfer
//! reads or writes is not reused before its outcome is back.

use std::collections::VecDeque;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::block::{OpenBlock, Places, PrefixHash, Slot};
use super::budget::Budget;
use super::chores::Chores;
use super::disk::Disk;
use super::displacement::Displacements;
use super::early_return::EarlyReturns;
use super::evictor::{Evictor, Policy, Reason};
use super::forget::Freed;
use super::journal::{Entry, Journal, Rule};
use super::lookup::{Match, Matched, TailMatch};
use super::pins::Pins;
use super::prefix::PrefixIndex;
use super::rate::Rates;
use super::reclaim::Room;
use super::residency::{Activity, Arriving, Conversation, Running};
use super::return_rate::ReturnRates;
use super::table::Resident;
use super::tiers::{Arrival, ArrivingTail, InFlight, Part};
use super::transfer::{Direction, Ticket, TransferOrder};
use crate::types::{
    BlockBytes, BlockCount, BlockId, BlockSize, HostBlockId, KvKey, TenantId, TenantKey, Tick, Tier, TokenCount,
    TokenId,
};

/// Sizes and switches of the block manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSettings {
    pub block_size: BlockSize,
    pub block_bytes: BlockBytes,
    pub device_blocks: BlockCount,
    pub host_blocks: BlockCount,
    pub disk_blocks: BlockCount,
    /// The longest sequence; the device pool holds at least one of it.
    pub window: TokenCount,
    /// Keep clean host copies of idle conversations, so that an eviction copies nothing.
    pub background_offload: bool,
    pub policy: Policy,
    /// Length at which a return is worth twice what it is worth at none, since long contexts cost more to encode again.
    /// `None`: length counts for nothing.
    pub doubles_at: Option<TokenCount>,
    /// From this length on, what is given up for good of a conversation are its first own tokens: they are the cheapest to
    /// encode again, and what follows them stays valid meanwhile. `None`: always its last ones.
    pub front_first_from: Option<TokenCount>,
    pub journal_entries: usize,
    /// Find and keep KV between turns; off only to compare.
    pub reuse: bool,
}

/// A sequence that wants in.
#[derive(Clone, Copy, Debug)]
pub struct Admit<'a> {
    pub key: KvKey,
    pub tenant: TenantId,
    pub tenant_key: TenantKey,
    pub tokens: &'a [TokenId],
    /// The chain over the full blocks of `tokens`.
    pub hashes: &'a [PrefixHash],
    /// Tokens a second that the model was seen to encode; 0: not known yet.
    pub prefill_per_s: u64,
}

/// What of a sequence's tokens was found in a tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub resident: TokenCount,
    pub shared: TokenCount,
    pub reloaded: TokenCount,
    /// The part of `reloaded` that comes from disk.
    pub from_disk: TokenCount,
}

impl Found {
    /// All of it.
    pub fn tokens(&self) -> TokenCount {
        TokenCount(self.resident.0 + self.shared.0 + self.reloaded.0)
    }
}

/// The answer to `admit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It runs: places for all its tokens are its own. What is reloaded lies behind what it encodes meanwhile.
    Ready(Found),
    /// It runs as soon as its reload is back.
    Reloading(Found),
    /// Copies are under way that will make room: ask again.
    Wait,
    /// Running turns and others' floors hold what it needs: ask again when one has ended.
    NoRoom,
}

/// A growing sequence found no place for its next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// Copies under way will make room.
    Coming,
    /// Only a preemption makes room.
    Short,
}

/// A reload is back: the sequence may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reloaded {
    pub key: KvKey,
    pub took_ms: u64,
}

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub evictions: u64,
    pub isolation_faults: u64,
    pub verification_failures: u64,
    pub offloaded_bytes: u64,
    pub reloaded_bytes: u64,
    pub stored_bytes: u64,
    pub loaded_bytes: u64,
    pub disk_write_failures: u64,
}

/// The block manager.
#[derive(Debug)]
pub struct Manager {
    pub(super) settings: KvSettings,
    pub(super) device: Arc<Places>,
    pub(super) host: Arc<Places>,
    pub(super) device_index: PrefixIndex<BlockId>,
    pub(super) host_index: PrefixIndex<HostBlockId>,
    pub(super) conversations: HashMap<KvKey, Conversation>,
    pub(super) device_line: Evictor,
    pub(super) host_line: Evictor,
    pub(super) returns: ReturnRates,
    pub(super) device_budget: Budget,
    pub(super) host_budget: Budget,
    pub(super) disk: Disk,
    pub(super) pins: Pins,
    /// Idle conversations whose newest blocks have no host copy.
    pub(super) uncopied: VecDeque<KvKey>,
    pub(super) in_flight: HashMap<Ticket, InFlight>,
    pub(super) offloads_under_way: usize,
    /// Device places that loads from disk write, and whatever else of their turns.
    pub(super) loading_places: u64,
    /// Loads that nobody waits for any longer, since they took too long.
    pub(super) hanging_loads: HashSet<Ticket>,
    pub(super) next_ticket: u64,
    pub(super) orders: Vec<TransferOrder>,
    pub(super) journal: Journal,
    pub(super) counters: Counters,
    pub(super) displacements: Displacements,
    pub(super) early_returns: EarlyReturns,
    pub(super) rates: Rates,
    /// Conversations whose residency changed since it was last asked.
    touched: Vec<KvKey>,
    pub(super) forgotten: Vec<(KvKey, Freed)>,
    pub(super) left: Vec<(KvKey, u64)>,
    pub(super) chores: Chores,
    pub(super) uses: u64,
}

impl Manager {
    /// Panics if the device pool does not hold one sequence of the full window: `engine::thread` caps the window first.
    pub fn new(settings: KvSettings) -> Self {
        let window = settings.window.blocks(settings.block_size);
        assert!(window <= settings.device_blocks, "the device pool holds one sequence of the full window");
        Self {
            device: Places::new(settings.device_blocks),
            host: Places::new(settings.host_blocks),
            device_index: PrefixIndex::default(),
            host_index: PrefixIndex::default(),
            conversations: HashMap::new(),
            device_line: Evictor::default(),
            host_line: Evictor::default(),
            returns: ReturnRates::default(),
            device_budget: Budget::new(settings.device_blocks, settings.block_bytes.device, window),
            // No sequence runs there, so that none must find room.
            host_budget: Budget::new(settings.host_blocks, settings.block_bytes.cold, BlockCount(0)),
            disk: Disk::new(settings.disk_blocks, settings.block_bytes.cold),
            pins: Pins::default(),
            uncopied: VecDeque::new(),
            in_flight: HashMap::new(),
            offloads_under_way: 0,
            loading_places: 0,
            hanging_loads: HashSet::new(),
            next_ticket: 0,
            orders: Vec::new(),
            journal: Journal::new(settings.journal_entries),
            counters: Counters::default(),
            displacements: Displacements::default(),
            early_returns: EarlyReturns::default(),
            rates: Rates::default(),
            touched: Vec::new(),
            forgotten: Vec::new(),
            left: Vec::new(),
            chores: Chores::default(),
            uses: 0,
            settings,
        }
    }

    /// Lets a sequence in, with a place for each of its tokens: what a tier holds of it is claimed or reloaded, and at
    /// least its last token is left to encode. Other conversations make room as the evictor says.
    ///
    /// Panics if the conversation runs already: an actor runs one turn at a time.
    pub fn admit(&mut self, now: Tick, admit: Admit<'_>) -> Admission {
        let Admit { key, tenant, tenant_key, tokens, .. } = admit;
        self.tell_time(now);
        if self.device_budget.see(tenant) | self.host_budget.see(tenant) | self.disk.budget.see(tenant) {
            self.settle_all_pins();
        }
        let pools = [&self.device, &self.host, &self.disk.places];
        let new = || Conversation::new(key, tenant, tenant_key, pools);
        let conversation = self.conversations.entry(key).or_insert_with(new);
        assert_eq!(conversation.tenant, tenant, "a conversation crossed tenants");
        if matches!(conversation.activity, Activity::Forgetting) {
            return Admission::Wait;
        }
        assert!(conversation.is_idle(), "a conversation runs one turn at a time");
        if conversation.leaving.take().is_some() {
            self.left.push((key, 0));
        }
        // Out of line while it looks for room: it is no victim of its own turn.
        self.device_line.remove(key);
        self.host_line.remove(key);
        self.disk.line.remove(key);
        self.disown_copies(key, admit.usable_hashes(self.settings.block_size));
        let matched = self.find(&admit);
        let (matched, passed_over) = self.weigh(&admit, matched);
        let size = self.settings.block_size;
        let total = TokenCount::of(tokens).blocks(size);
        let kept_tail = matches!(&matched.tail, TailMatch::Resident { alone: true, .. });
        let need = total.get() - matched.own - matched.here() - usize::from(kept_tail);
        let need = BlockCount(u32::try_from(need).expect("a window bounds a table"));
        match self.make_room(now, need, tenant) {
            Room::Made => {}
            room @ (Room::Coming | Room::None) => {
                self.settle_pin_of(key);
                self.back_in_line(key);
                self.drop_if_empty(key);
                return if room == Room::Coming { Admission::Wait } else { Admission::NoRoom };
            }
        }
        self.hope_for(passed_over);
        let table = &self.conversation(key).device;
        let slots = (0..need.0).map(|_| table.take_place().expect("room was made"));
        let slots: Vec<Slot<BlockId>> = slots.collect();
        self.run(now, key, matched, slots, total)
    }

    /// Makes the conversation a running one, out of what was found and as many places as are missing.
    fn run(
        &mut self,
        now: Tick,
        key: KvKey,
        matched: Matched,
        mut slots: Vec<Slot<BlockId>>,
        total: BlockCount,
    ) -> Admission {
        let size = self.settings.block_size;
        let (gap_ends, end, gap) = (matched.gap_ends(), matched.end(), matched.gap);
        let conversation = self.conversations.get_mut(&key).expect("the caller made it known");
        // Places are taken from the back: the first tokens get the lowest.
        slots.reverse();
        let mut running = Running { spare: slots, places: total.get(), ..Running::default() };
        let own_back = conversation.device.back.take().map(|back| back.first..back.first + back.sealed.len());
        let mut found = Found { resident: BlockCount(matched.own as u32).tokens(size), ..Found::default() };
        let old_tail = conversation.device.tail.take();
        let (mut open, mut arriving_tail) = (None, None);
        match matched.tail {
            TailMatch::None => {}
            TailMatch::Resident { keep, .. } => {
                found.resident.0 += keep.0;
                let tail = old_tail.expect("the tail was found here");
                open = Some(match Arc::try_unwrap(tail) {
                    Ok(alone) => alone.open(keep),
                    Err(shared) => {
                        let slot = running.spare.pop().expect("a place was counted for the copy");
                        self.chores.copies.push((shared.id(), slot.place()));
                        let tokens = shared.tokens()[..keep.get()].to_vec();
                        self.chores.copied_from.push(shared);
                        OpenBlock::with_tokens(slot, tokens)
                    }
                });
            }
            TailMatch::Below { keep, block } => {
                found.reloaded.0 += keep.0;
                let to = running.spare.pop().expect("a place was counted for each block");
                arriving_tail = Some(ArrivingTail { index: end, from: block, to, keep });
            }
        }
        let indices = (matched.own..).take(matched.front.len()).chain(gap_ends..);
        let mut arrivals = Vec::with_capacity(matched.front.len() + matched.back.len());
        for (index, block) in indices.zip(matched.front.into_iter().chain(matched.back)) {
            let arrival = match block {
                Match::Here(block) => {
                    let is_own = own_back.as_ref().is_some_and(|own| own.contains(&index));
                    let whose = if is_own { &mut found.resident } else { &mut found.shared };
                    whose.0 += size.0;
                    Arrival::Here(block)
                }
                Match::Below(block) => {
                    found.reloaded.0 += size.0;
                    let to = running.spare.pop().expect("a place was counted for each block");
                    Arrival::Coming(block, to)
                }
                Match::OnDisk(block) => {
                    found.reloaded.0 += size.0;
                    found.from_disk.0 += size.0;
                    let to = running.spare.pop().expect("a place was counted for each block");
                    Arrival::Loading(block, to)
                }
            };
            arrivals.push((index, arrival));
        }
        conversation.last_used = now;
        conversation.shared = matched.shared;
        self.touched.push(key);
        // What is here is taken at once, as far as nothing before it is on its way.
        let is_here = |(_, arrival): &&(usize, Arrival)| matches!(arrival, Arrival::Here(_));
        let at_once =
            arrivals.iter().take_while(is_here).take_while(|(index, _)| *index < gap_ends || gap == 0).count();
        for (_, arrival) in arrivals.drain(..at_once) {
            if let Arrival::Here(block) = arrival {
                conversation.device.sealed.push(block);
            }
        }
        // So is what is here behind the last that is on its way: whatever becomes of the turn, it stays.
        let last = arrivals.iter().rposition(|found| !is_here(&found)).map_or(0, |last| last + 1);
        // What lies before the gap is not followed by what lies behind it.
        let last = if gap > 0 { last.max(arrivals.partition_point(|(index, _)| *index < gap_ends)) } else { last };
        if let Some(&(index, _)) = arrivals.get(last) {
            let sealed = arrivals.drain(last..).filter_map(|(_, arrival)| match arrival {
                Arrival::Here(block) => Some(block),
                Arrival::Coming(..) | Arrival::Loading(..) => None,
            });
            conversation.device.put_behind_gap(index, sealed);
        }
        if arrivals.is_empty() && gap == 0 {
            running.open = open;
        } else {
            running.later = open.map(|open| (end, open));
        }
        let (mut pairs, mut loads, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for (index, arrival) in &arrivals {
            match arrival {
                Arrival::Here(_) => {}
                Arrival::Coming(from, to) => pairs.push((from.id().0, to.place().0)),
                Arrival::Loading(from, to) => {
                    loads.push((from.id().0, to.place().0));
                    labels.push((conversation.label_of(*index, from), Some(from.proof().0)));
                }
            }
        }
        pairs.extend(arriving_tail.iter().map(|tail| (tail.from.id().0, tail.to.place().0)));
        let first_arriving =
            arrivals.first().map(|(index, _)| *index).or(arriving_tail.as_ref().map(|tail| tail.index));
        running.list(conversation.device.sealed.iter().map(|block| block.id()));
        conversation.activity = Activity::Running(running);
        let Some(first_arriving) = first_arriving else { return Admission::Ready(found) };
        conversation.in_flight += 1;
        self.loading_places += loads.len() as u64;
        let (host, disk) = (Part::of(pairs.len()), Part::of(loads.len()));
        let reload = InFlight::Reload { key, started: now, blocks: arrivals, tail: arriving_tail, host, disk };
        let ticket = if pairs.is_empty() {
            self.order_labelled(Direction::Load, loads, labels, reload)
        } else {
            let ticket = self.order(Direction::Reload, pairs, reload);
            if !loads.is_empty() {
                self.order_labelled(Direction::Load, loads, labels, InFlight::PartOf(ticket));
            }
            ticket
        };
        let running = self.running_mut(key);
        running.arriving = Some(Arriving { ticket, first: first_arriving, waited_for: true });
        if gap > 0 && first_arriving >= gap_ends { Admission::Ready(found) } else { Admission::Reloading(found) }
    }

    /// Makes sure that a running sequence has places for `tokens` tokens in all.
    pub fn grow(&mut self, now: Tick, key: KvKey, tokens: TokenCount) -> Result<(), NoPlace> {
        let tenant = self.conversation(key).tenant;
        let has = self.running(key).ids.len();
        let missing = tokens.blocks(self.settings.block_size).get().saturating_sub(has);
        for _ in 0..missing {
            match self.make_room(now, BlockCount(1), tenant) {
                Room::Made => {}
                Room::Coming => return Err(NoPlace::Coming),
                Room::None => return Err(NoPlace::Short),
            }
            let slot = self.conversation(key).device.take_place().expect("room was made");
            let running = self.running_mut(key);
            running.ids.push(slot.place());
            running.spare.insert(0, slot);
            running.places = running.places.max(running.ids.len());
        }
        Ok(())
    }

    /// The blocks of a running sequence, for a step.
    ///
    /// Panics if it doesn't run.
    pub fn resident(&self, key: KvKey) -> Resident<'_> {
        let conversation = self.conversation(key);
        let running = self.running(key);
        let size = self.settings.block_size;
        let tokens = |blocks: usize| BlockCount(u32::try_from(blocks).expect("a window bounds a table")).tokens(size);
        let open = running.open.as_ref().map_or(0, |open| TokenCount::of(open.tokens()).0);
        let context = TokenCount(tokens(conversation.device.sealed.len()).0 + open);
        let waits_at = running.arriving.filter(|arriving| arriving.waited_for).map(|arriving| arriving.first);
        let gap_ends = conversation.device.back.as_ref().map(|back| back.first).into_iter().chain(waits_at).min();
        Resident::new(&running.ids, context, gap_ends.map(tokens))
    }

    /// Notes that the KV of a running sequence's next tokens was written. Blocks that fill up are sealed and shared.
    pub fn append(&mut self, key: KvKey, tokens: &[TokenId]) {
        let size = self.settings.block_size;
        let conversation = self.conversations.get_mut(&key).expect("a running sequence is known");
        let tenant_key = conversation.tenant_key;
        let mut parent = conversation.parent();
        let Activity::Running(running) = &mut conversation.activity else { panic!("the conversation runs") };
        let mut full = Vec::new();
        for &token in tokens {
            let mut open = running.open.take().unwrap_or_else(|| {
                OpenBlock::new(running.spare.pop().expect("the sequence has grown for its tokens"), size)
            });
            open.push(token, size);
            match open.seal(parent, &tenant_key, size) {
                Err(open) => running.open = Some(*open),
                Ok(sealed) => {
                    parent = sealed.hash();
                    // While the next one's hash is made.
                    self.device_index.prefetch(&sealed);
                    full.push(sealed);
                }
            }
        }
        for sealed in full {
            let block = if self.settings.reuse { self.device_index.insert(sealed) } else { Arc::new(sealed) };
            running.ids[conversation.device.sealed.len()] = block.id();
            conversation.device.sealed.push(block);
        }
        if conversation.device.close() {
            running.reach(conversation.device.sealed.len());
            running.list(conversation.device.sealed.iter().map(|block| block.id()));
        }
    }

    pub(super) fn back_in_line(&mut self, key: KvKey) {
        let conversation = self.conversation(key);
        let (tenant, since, standing) = (conversation.tenant, conversation.silent_since, conversation.standing());
        let exposes = conversation.exposes_device();
        let (device, host) = (!conversation.device.is_empty(), !conversation.host.is_empty());
        let length = conversation.length(self.settings.block_size);
        if exposes {
            self.device_line.add(tenant, key, since, standing, length);
        }
        if host || (device && self.host.total().0 > 0) {
            self.host_line.add(tenant, key, since, standing, length);
        }
        // Like the host's: in its place before anything of it is there.
        if self.disk.exists() && !self.conversation(key).is_nowhere() {
            self.disk.line.add(tenant, key, since, standing, length);
        }
    }

    /// Drops the record of an idle conversation of which no tier holds anything.
    pub(super) fn drop_if_empty(&mut self, key: KvKey) {
        let Some(conversation) = self.conversations.get(&key) else { return };
        let empty = conversation.is_nowhere();
        let wanted = conversation.leaving.is_some() || conversation.pin.is_some();
        if conversation.is_idle() && empty && conversation.in_flight == 0 && !wanted {
            self.device_line.remove(key);
            self.host_line.remove(key);
            self.disk.line.remove(key);
            self.conversations.remove(&key);
            self.touched.push(key);
        }
    }

    pub(super) fn touch(&mut self, key: KvKey) {
        self.touched.push(key);
    }

    pub(super) fn conversation(&self, key: KvKey) -> &Conversation {
        self.conversations.get(&key).expect("the caller knows the conversation")
    }

    pub(super) fn running(&self, key: KvKey) -> &Running {
        self.conversation(key).running().expect("the conversation runs")
    }

    fn running_mut(&mut self, key: KvKey) -> &mut Running {
        let conversation = self.conversations.get_mut(&key).expect("the caller knows the conversation");
        conversation.running_mut().expect("the conversation runs")
    }

    /// Device blocks of a running sequence.
    pub fn blocks(&self, key: KvKey) -> u64 {
        self.running(key).places as u64
    }

    /// Whether a conversation runs.
    pub fn runs(&self, key: KvKey) -> bool {
        self.conversations.get(&key).is_some_and(|conversation| conversation.running().is_some())
    }

    /// Transfers to make, in this order.
    pub fn take_orders(&mut self) -> Vec<TransferOrder> {
        self.erase_released();
        std::mem::take(&mut self.orders)
    }

    /// Copies and zeros to make before the next step.
    pub fn take_chores(&mut self) -> Chores {
        std::mem::take(&mut self.chores)
    }

    /// Conversations that every tier has let go of, once `Chores` are done.
    pub fn take_forgotten(&mut self) -> Vec<(KvKey, Freed)> {
        std::mem::take(&mut self.forgotten)
    }

    /// Conversations whose `leave` is over, with the device bytes given up.
    pub fn take_left(&mut self) -> Vec<(KvKey, u64)> {
        std::mem::take(&mut self.left)
    }

    /// Conversations whose residency changed; may name one twice.
    pub fn take_touched(&mut self) -> Vec<KvKey> {
        std::mem::take(&mut self.touched)
    }

    /// Writes down a decision that took no blocks by itself: a preemption, whose blocks go as the evictor says.
    pub fn note_decision(&mut self, at: Tick, victim: KvKey, for_tenant: TenantId, rule: Rule) {
        let tenant = self.conversation(victim).tenant;
        let (reason, from, freed, lost) = (Reason::default(), Tier::Device, BlockCount(0), BlockCount(0));
        self.note(Entry { id: 0, at, victim, tenant, for_tenant, rule, reason, from, freed, lost });
    }

    /// Notes that a turn has to wait for memory. Its conversation need not be known yet.
    pub fn note_wait(&mut self, at: Tick, victim: KvKey, tenant: TenantId, need: BlockCount) {
        let rule = if self.is_at_ceiling(tenant, need) { Rule::AtCeiling } else { Rule::NoVictim };
        let (reason, from, freed, lost) = (Reason::default(), Tier::Device, BlockCount(0), BlockCount(0));
        self.note(Entry { id: 0, at, victim, tenant, for_tenant: tenant, rule, reason, from, freed, lost });
    }

    pub fn settings(&self) -> &KvSettings {
        &self.settings
    }

    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    pub fn rates(&self) -> Rates {
        self.rates
    }

    /// Free places of a tier's pool.
    pub fn free(&self, tier: Tier) -> BlockCount {
        match tier {
            Tier::Device => self.device.free(),
            Tier::Host => self.host.free(),
            Tier::Disk => self.disk.places.free(),
        }
    }

    /// Device places that a tenant's blocks hold.
    pub fn held(&self, tenant: TenantId) -> BlockCount {
        self.device.held(tenant)
    }
}
