//! Does the block manager agree with a reference that shares nothing?
//!
//! The reference knows only which tokens were written for whom. A pool is a list of places, each with what a step or a
//! copy last wrote there: per token, whose it is and a hash of the history up to it. What the manager finds must have been
//! written; what a table names must hold the sequence's own history, position for position; what others hold stays theirs.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use rekindle::kernels::files::{Contents, FoundSlot, Label};
use rekindle::kv::block::PrefixHash;
use rekindle::kv::evictor::Policy;
use rekindle::kv::manager::{Admission, Admit};
use rekindle::kv::pins::PinRefused;
use rekindle::kv::return_rate::TurnShape;
use rekindle::kv::transfer::{Direction, TransferDone, TransferOrder};
use rekindle::kv::{KvSettings, Manager};
use rekindle::types::{
    BlockBytes, BlockCount, BlockSize, Grant, KvKey, PoolPart, TenantId, TenantKey, Tick, Tier, TierBudget, TokenCount,
    TokenId, Weight,
};

const SIZE: BlockSize = BlockSize(4);
const WINDOW: usize = 23;
const CONVERSATIONS: usize = 7;
const TENANTS: u32 = 3;

#[derive(Clone, Debug)]
enum Op {
    /// Asks for a turn that keeps part of the history and says something more.
    Admit {
        conversation: usize,
        keep: usize,
        words: usize,
        voice: u32,
    },
    /// Encodes some of a running sequence's tokens, or generates.
    Append {
        conversation: usize,
        tokens: usize,
    },
    Rest(usize),
    Forget(usize),
    Leave(usize, Tier),
    End(usize),
    Reopen(usize),
    Expect(usize),
    AwaitTool(usize),
    /// The oldest copy on its way is made, and told.
    Copy {
        damage: bool,
    },
    /// The process dies, and another finds what is on disk.
    Restart,
    WorkAhead,
    /// A load takes longer than foretold: its sequence encodes meanwhile.
    EncodeMeanwhile(usize),
    LoadHangs(usize),
    /// Floors, ceilings and what may be pinned in thousandths of the pools, by tenant; one without any is gone.
    Grant(Vec<Option<(u32, u32, u32)>>),
    /// Keeps a conversation's blocks for so many of the world's ticks.
    Pin {
        conversation: usize,
        ticks: u64,
    },
    Unpin(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let conversation = 0..CONVERSATIONS;
    let part = (0..=1000u32, 0..=1000u32, 0..=1000u32);
    prop_oneof![
        4 => (conversation.clone(), 0..=2 * WINDOW, 1..8usize, 0..3u32)
            .prop_map(|(conversation, keep, words, voice)| Op::Admit { conversation, keep, words, voice }),
        6 => (conversation.clone(), 1..10usize).prop_map(|(conversation, tokens)| Op::Append { conversation, tokens }),
        3 => conversation.clone().prop_map(Op::Rest),
        1 => conversation.clone().prop_map(Op::Forget),
        1 => conversation.clone().prop_map(Op::EncodeMeanwhile),
        1 => conversation.clone().prop_map(Op::LoadHangs),
        1 => (conversation.clone(), prop_oneof![Just(Tier::Host), Just(Tier::Disk)])
            .prop_map(|(conversation, to)| Op::Leave(conversation, to)),
        1 => conversation.clone().prop_map(Op::End),
        1 => conversation.clone().prop_map(Op::Reopen),
        1 => conversation.clone().prop_map(Op::Expect),
        1 => conversation.clone().prop_map(Op::AwaitTool),
        2 => (conversation.clone(), 1..40u64).prop_map(|(conversation, ticks)| Op::Pin { conversation, ticks }),
        1 => conversation.prop_map(Op::Unpin),
        6 => proptest::bool::weighted(0.1).prop_map(|damage| Op::Copy { damage }),
        1 => proptest::bool::weighted(0.3).prop_map(|dies| if dies { Op::Restart } else { Op::WorkAhead }),
        2 => Just(Op::WorkAhead),
        1 => vec(proptest::option::weighted(0.8, part), TENANTS as usize).prop_map(Op::Grant),
    ]
}

/// What one token's place holds: whose, and the hash of all tokens up to this one. `None`: zeros, or damage.
type Cell = Option<(TenantId, u64)>;
type Pool = Vec<[Cell; SIZE.0 as usize]>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Idle,
    Reloading,
    Running,
}

struct Sequence {
    tokens: Vec<TokenId>,
    state: State,
}

struct World {
    manager: Manager,
    now: Tick,
    device: Pool,
    host: Pool,
    /// Label, bytes and their sum.
    disk: Vec<Option<(Label, [Cell; SIZE.0 as usize], u32)>>,
    settings: KvSettings,
    sequences: Vec<Sequence>,
    written: HashSet<(TenantId, u64)>,
    copies: VecDeque<TransferOrder>,
    forgetting: HashSet<KvKey>,
    /// Until when who is pinned.
    pinned: HashMap<KvKey, Tick>,
    leaving: HashSet<KvKey>,
    /// What each conversation has held of each tier, summed up interval by interval.
    sums: HashMap<(usize, Tier), Sum>,
}

/// Units of a block's microsecond, and by how much they may be too few.
#[derive(Clone, Copy, Default)]
struct Sum {
    unit_us: u128,
    rounding: u128,
}

const TIERS: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Disk];
/// Between two operations, in microseconds.
const INTERVAL: u64 = 1_000;

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

fn key(conversation: usize) -> KvKey {
    KvKey(conversation as u128)
}

fn tenant(conversation: usize) -> TenantId {
    TenantId(conversation as u32 % TENANTS)
}

fn tenant_key(tenant: TenantId) -> TenantKey {
    TenantKey([tenant.0 as u8 + 1; 32])
}

fn grant(tenant: TenantId, (floor, ceiling, pins): (u32, u32, u32)) -> Grant {
    let part = |permille| Some(PoolPart::Permille(permille));
    let budget = TierBudget { floor: part(floor), ceiling: part(ceiling), pins: part(pins) };
    Grant { tenant, weight: Weight::ORDINARY, device: budget, host: budget, disk: budget }
}

fn sum(cells: &[Cell]) -> u32 {
    hash(cells) as u32
}

impl World {
    fn new(device: u32, host: u32, disk: u32, background_offload: bool, policy: Policy) -> Self {
        let settings = KvSettings {
            block_size: SIZE,
            block_bytes: BlockBytes { device: 64, cold: 33 },
            device_blocks: BlockCount(device),
            host_blocks: BlockCount(host),
            disk_blocks: BlockCount(disk),
            window: TokenCount(WINDOW as u32),
            background_offload,
            policy,
            doubles_at: None,
            front_first_from: Some(TokenCount(3 * SIZE.0)),
            journal_entries: 16,
            reuse: true,
        };
        Self {
            manager: Manager::new(settings),
            now: Tick(0),
            device: vec![[None; SIZE.0 as usize]; device as usize],
            host: vec![[None; SIZE.0 as usize]; host as usize],
            disk: vec![None; disk as usize],
            settings,
            sequences: (0..CONVERSATIONS).map(|_| Sequence { tokens: Vec::new(), state: State::Idle }).collect(),
            written: HashSet::new(),
            copies: VecDeque::new(),
            forgetting: HashSet::new(),
            pinned: HashMap::new(),
            leaving: HashSet::new(),
            sums: HashMap::new(),
        }
    }

    fn apply(&mut self, op: &Op) -> Result<(), TestCaseError> {
        self.sum_up();
        self.now.0 += INTERVAL;
        let held = |manager: &Manager| (0..TENANTS).map(|id| manager.held(TenantId(id)).0).collect::<Vec<u32>>();
        self.manager.expire_pins(self.now);
        self.pinned.retain(|_, until| *until > self.now);
        self.drop_sums();
        let before = held(&self.manager);
        let pinned = self.pinned_at_rest();
        match *op {
            Op::Admit { conversation, keep, words, voice } => self.admit(conversation, keep, words, voice)?,
            Op::Append { conversation, tokens } => self.append(conversation, tokens)?,
            Op::Rest(conversation) => self.rest(conversation),
            Op::Forget(conversation) => {
                self.rest(conversation);
                if self.forgetting.insert(key(conversation)) {
                    self.pinned.remove(&key(conversation));
                    self.manager.forget(key(conversation));
                    self.sequences[conversation].tokens.clear();
                }
            }
            Op::Leave(conversation, to) => {
                let idle = self.sequences[conversation].state == State::Idle;
                if idle && !self.forgetting.contains(&key(conversation)) && self.leaving.insert(key(conversation)) {
                    self.manager.leave(self.now, key(conversation), to);
                }
            }
            Op::End(conversation) => self.manager.end(key(conversation)),
            Op::Reopen(conversation) => self.manager.reopen(self.now, key(conversation)),
            Op::Expect(conversation) => self.manager.expect_soon(self.now, key(conversation)),
            Op::AwaitTool(conversation) => self.manager.await_tool(key(conversation)),
            Op::Copy { damage } => self.copy(damage)?,
            Op::WorkAhead => self.manager.work_ahead(self.now),
            Op::EncodeMeanwhile(conversation) => {
                let waits = self.sequences[conversation].state == State::Reloading;
                if waits && self.manager.encode_meanwhile(key(conversation)) {
                    self.sequences[conversation].state = State::Running;
                }
            }
            Op::LoadHangs(conversation) => {
                if self.sequences[conversation].state != State::Idle {
                    self.manager.load_hangs(key(conversation));
                }
            }
            Op::Restart => self.restart(),
            Op::Pin { conversation, ticks } => self.pin(conversation, ticks)?,
            Op::Unpin(conversation) => {
                self.manager.unpin(self.now, key(conversation));
                self.pinned.remove(&key(conversation));
            }
            Op::Grant(ref parts) => {
                let given = (0..TENANTS).map(TenantId).zip(parts);
                let given: Vec<Grant> = given.filter_map(|(tenant, part)| Some(grant(tenant, (*part)?))).collect();
                self.manager.grant(&given);
            }
        }
        if let Op::Admit { conversation, .. } | Op::Append { conversation, .. } = *op {
            for ((other, was), is) in (0..TENANTS).map(TenantId).zip(before).zip(held(&self.manager)) {
                let floor = self.manager.floor(other).0;
                let safe = other == tenant(conversation) || is >= was.min(floor);
                prop_assert!(safe, "tenant {other} fell from {was} to {is}, below its floor of {floor}");
            }
        }
        if let Op::Admit { .. } | Op::Append { .. } | Op::WorkAhead = *op {
            self.check_kept(op, &pinned)?;
        }
        self.do_chores()?;
        self.manager.assert_invariants();
        self.check_sums()?;
        self.check_tables()
    }

    /// Adds what conversations hold now, for as long as until the next operation.
    fn sum_up(&mut self) {
        for conversation in 0..CONVERSATIONS {
            for tier in TIERS {
                let units = self.manager.holding(key(conversation), tier).units;
                let sum = self.sums.entry((conversation, tier)).or_default();
                sum.unit_us += u128::from(units * INTERVAL);
                // A part of a block is less than a unit too small; nobody has more than a window.
                sum.rounding += u128::from(WINDOW as u64 * INTERVAL);
            }
        }
    }

    /// One that nothing is known of begins anew.
    fn drop_sums(&mut self) {
        self.sums.retain(|(conversation, _), _| self.manager.whereabouts(key(*conversation)).is_some());
    }

    /// The accounts have come to what was summed up here.
    fn check_sums(&mut self) -> Result<(), TestCaseError> {
        self.drop_sums();
        for conversation in 0..CONVERSATIONS {
            for tier in TIERS {
                let held = self.manager.holding(key(conversation), tier).unit_us;
                let Sum { unit_us, rounding } = self.sums.get(&(conversation, tier)).copied().unwrap_or_default();
                let right = (unit_us..=unit_us + rounding).contains(&held);
                prop_assert!(right, "{held} units of the {tier:?} are accounted to {conversation}, of {unit_us}");
            }
        }
        Ok(())
    }

    fn pin(&mut self, conversation: usize, ticks: u64) -> Result<(), TestCaseError> {
        let (key, tenant) = (key(conversation), tenant(conversation));
        let until = Tick(self.now.0 + 1_000 * ticks);
        let before = self.manager.pin_budget(tenant);
        match self.manager.pin(tenant, tenant_key(tenant), key, until) {
            Ok(budget) => {
                prop_assert!(budget.used <= budget.limit, "{:?}", budget);
                self.pinned.insert(key, until);
            }
            Err(PinRefused::OverBudget(budget, size)) => {
                prop_assert!(!self.pinned.contains_key(&key), "a pin is renewed without asking for more");
                prop_assert!(budget.used.0 + size.0 > budget.limit.0, "{budget:?} has room for {size}");
                prop_assert!(budget.limit <= before.limit, "a new tenant makes no other one's budget larger");
            }
            Err(PinRefused::Forgetting) => prop_assert!(self.forgetting.contains(&key)),
        }
        Ok(())
    }

    /// The pinned conversations of tenants of which none runs: (who, its device tokens, all blocks of the tenant's pins).
    fn pinned_at_rest(&self) -> Vec<(KvKey, TokenCount, u32)> {
        let mut blocks = HashMap::<TenantId, u32>::new();
        let mut at_rest = Vec::new();
        for key in self.pinned.keys() {
            let at = self.manager.whereabouts(*key).expect("a pinned conversation is known");
            let all = |(private, shared): (BlockCount, BlockCount)| private.0 + shared.0;
            let size = if at.running { u32::MAX / 64 } else { all(at.device_blocks).max(all(at.host_blocks)).max(1) };
            *blocks.entry(at.tenant).or_default() += size;
            at_rest.push((*key, at.device_tokens, at.tenant));
        }
        at_rest.into_iter().map(|(key, tokens, tenant)| (key, tokens, blocks[&tenant])).collect()
    }

    /// Nothing that others asked for has taken device blocks of tenants whose pins fit their budget together.
    fn check_kept(&self, op: &Op, before: &[(KvKey, TokenCount, u32)]) -> Result<(), TestCaseError> {
        let own = match op {
            Op::Admit { conversation, .. } | Op::Append { conversation, .. } => Some(*conversation),
            _ => None,
        };
        for (key, was, blocks) in before.iter().filter(|(key, ..)| Some(key.0 as usize) != own) {
            let limit = self.manager.pin_budget(tenant(key.0 as usize)).limit;
            let is = self.manager.whereabouts(*key).map_or(TokenCount(0), |at| at.device_tokens);
            prop_assert!(is >= *was || *blocks > limit.0, "{op:?} left {is} of {was} tokens of the pinned {key:?}");
        }
        Ok(())
    }

    fn admit(&mut self, conversation: usize, keep: usize, words: usize, voice: u32) -> Result<(), TestCaseError> {
        let (others_rest, no_copies) =
            (self.sequences.iter().all(|sequence| sequence.state == State::Idle), self.copies.is_empty());
        let sequence = &mut self.sequences[conversation];
        if sequence.state != State::Idle {
            return Ok(());
        }
        sequence.tokens.truncate(keep.min(WINDOW / 2));
        // Few words and voices, so that histories meet, within a tenant and across.
        let said = sequence.tokens.len() as u32;
        sequence.tokens.extend((0..words as u32).map(|word| TokenId((said + word) % 5 * 3 + voice / 2)));
        let (key, tenant) = (key(conversation), tenant(conversation));
        let (tokens, tenant_key) = (&sequence.tokens, tenant_key(tenant));
        let hashes = PrefixHash::chain(&tenant_key, tokens, SIZE);
        let prefill_per_s = self.now.0 % 3 * 1_000;
        let admit = Admit { key, tenant, tenant_key, tokens, hashes: &hashes, prefill_per_s };
        let admission = self.manager.admit(self.now, admit);
        let (state, found) = match admission {
            Admission::Ready(found) => (State::Running, found.tokens().get()),
            Admission::Reloading(found) => (State::Reloading, found.tokens().get()),
            Admission::Wait => return Ok(()),
            Admission::NoRoom => {
                prop_assert!(!others_rest || !no_copies, "nobody runs, and there is no room for one sequence");
                return Ok(());
            }
        };
        prop_assert!(found < tokens.len(), "a token is left to encode");
        if state == State::Running {
            let resident = self.manager.resident(key);
            let context = resident.context().get();
            let known = context == 0 || self.written.contains(&(tenant, hash(&tokens[..context])));
            prop_assert!(known, "{context} tokens are found that were never written: {tokens:?}");
            prop_assert!(context == found || resident.gap_ends().is_some_and(|end| context <= end.get()));
        }
        sequence.state = state;
        Ok(())
    }

    /// A step: places, then bytes, then the note that they are there.
    fn append(&mut self, conversation: usize, count: usize) -> Result<(), TestCaseError> {
        let (key, tenant) = (key(conversation), tenant(conversation));
        if self.sequences[conversation].state != State::Running {
            return Ok(());
        }
        let resident = self.manager.resident(key);
        let context = resident.context().get();
        // What follows a gap is there, or comes.
        let gap_ends = resident.gap_ends().map_or(WINDOW, TokenCount::get);
        let end = (context + count).min(WINDOW).min(gap_ends);
        let tokens = &mut self.sequences[conversation].tokens;
        while tokens.len() < end {
            tokens.push(TokenId(tokens.len() as u32 % 5 * 3));
        }
        if end == context || self.manager.grow(self.now, key, TokenCount(end as u32)).is_err() {
            return Ok(());
        }
        // Copies of tails come before a step writes.
        self.do_chores()?;
        let tokens = &self.sequences[conversation].tokens;
        let table = self.manager.resident(key).table().to_vec();
        for position in context..end {
            let history = hash(&tokens[..=position]);
            let size = SIZE.0 as usize;
            self.device[table[position / size].0 as usize][position % size] = Some((tenant, history));
            self.written.insert((tenant, history));
        }
        self.manager.append(key, &tokens[context..end]);
        let context = self.manager.resident(key).context().get();
        prop_assert!(context == end || end == gap_ends && context > end, "{context} tokens after {end}");
        Ok(())
    }

    fn rest(&mut self, conversation: usize) {
        let sequence = &mut self.sequences[conversation];
        if sequence.state != State::Idle {
            sequence.state = State::Idle;
            let number = self.now.0 as u32 / 1_000 % 10;
            self.manager.rest(self.now, key(conversation), TurnShape { number, new_tokens: TokenCount(number * 100) });
        }
    }

    fn copy(&mut self, damage: bool) -> Result<(), TestCaseError> {
        let Some(order) = self.copies.pop_front() else { return Ok(()) };
        let mut sums = Vec::new();
        for (index, &(from, to)) in order.pairs.iter().enumerate() {
            let (source, destination) = match order.direction {
                Direction::Offload => (&mut self.device, &mut self.host),
                Direction::Reload => (&mut self.host, &mut self.device),
                Direction::Store { .. } | Direction::Load | Direction::Erase => {
                    sums.push(self.move_on_disk(&order, index, damage));
                    continue;
                }
            };
            if damage && order.direction == Direction::Reload {
                source[from as usize][0] = Some((TenantId(99), self.now.0));
            }
            destination[to as usize] = source[from as usize];
            sums.push(Some(sum(&source[from as usize])));
        }
        let failures = self.manager.counters().verification_failures;
        let (direction, ticket) = (order.direction, order.ticket);
        let reloaded = self.manager.transferred(
            self.now,
            TransferDone { ticket, sums, took_us: if self.now.0.is_multiple_of(5_000) { 1 << 40 } else { 1 } },
        );
        if let Some(reloaded) = reloaded {
            let sequence = &mut self.sequences[reloaded.key.0 as usize];
            prop_assert!(sequence.state != State::Idle);
            sequence.state = State::Running;
            if damage && !order.pairs.is_empty() {
                prop_assert!(self.manager.counters().verification_failures > failures, "the damage was overlooked");
            }
        }
        prop_assert!(reloaded.is_none() || matches!(direction, Direction::Reload | Direction::Load));
        Ok(())
    }

    /// One block of a transfer from or to disk; `damage` is a write that fails, or bytes that have changed.
    fn move_on_disk(&mut self, order: &TransferOrder, index: usize, damage: bool) -> Option<u32> {
        let (from, to) = (order.pairs[index].0 as usize, order.pairs[index].1 as usize);
        match order.direction {
            Direction::Store { from: tier } => {
                let source = if tier == Tier::Host { &self.host } else { &self.device };
                let sum = sum(&source[from]);
                assert!(self.disk[to].is_none(), "slot {to} was not overwritten before it was used again");
                self.disk[to] = Some((order.labels[index].0, source[from], sum));
                (!damage).then_some(sum)
            }
            Direction::Load => {
                let (label, cells, sum) = self.disk[from].as_ref()?;
                self.device[to] = *cells;
                assert_eq!(label.hash, order.labels[index].0.hash, "a slot holds what the manager thinks");
                (!damage).then_some(*sum)
            }
            Direction::Erase => {
                self.disk[to] = None;
                Some(0)
            }
            Direction::Offload | Direction::Reload => unreachable!("copies between memories"),
        }
    }

    /// What was in memory is gone, and what nobody was told to have happened need not have.
    fn restart(&mut self) {
        self.manager = Manager::new(self.settings);
        self.manager.tell_time(self.now);
        self.sums.clear();
        self.copies.clear();
        self.forgetting.clear();
        self.leaving.clear();
        self.pinned.clear();
        self.sequences.iter_mut().for_each(|sequence| sequence.state = State::Idle);
        let blocks = self.disk.iter().enumerate().filter_map(|(slot, held)| {
            let (label, _, bytes_sum) = (*held)?;
            Some(FoundSlot { slot: slot as u32, label, bytes_sum })
        });
        let found = Contents { blocks: blocks.collect(), unfinished: Vec::new() };
        let tenants: Vec<_> = (0..TENANTS).map(TenantId).map(|id| (id, tenant_key(id))).collect();
        self.manager.recover(found, &tenants, |_| true);
    }

    fn do_chores(&mut self) -> Result<(), TestCaseError> {
        let chores = self.manager.take_chores();
        for (from, to) in &chores.copies {
            self.device[to.0 as usize] = self.device[from.0 as usize];
        }
        for slot in &chores.zero_device {
            self.device[slot.place().0 as usize] = [None; SIZE.0 as usize];
        }
        for slot in &chores.zero_host {
            self.host[slot.place().0 as usize] = [None; SIZE.0 as usize];
        }
        drop(chores);
        self.copies.extend(self.manager.take_orders());
        for (key, _) in self.manager.take_forgotten() {
            prop_assert!(self.forgetting.remove(&key), "forgotten without being asked, or twice");
        }
        for (key, _) in self.manager.take_left() {
            prop_assert!(self.leaving.remove(&key), "an offload is answered without being asked, or twice");
        }
        Ok(())
    }

    /// Each running sequence reads its own history at each position, from places that no other tenant's names.
    fn check_tables(&self) -> Result<(), TestCaseError> {
        let mut owners = HashMap::new();
        for (conversation, sequence) in self.sequences.iter().enumerate() {
            if sequence.state != State::Running {
                continue;
            }
            let (resident, tenant) = (self.manager.resident(key(conversation)), tenant(conversation));
            for place in resident.table() {
                let owner = *owners.entry(*place).or_insert(tenant);
                prop_assert_eq!(owner, tenant, "two tenants share place {}", place);
            }
            for position in 0..resident.context().get() {
                let size = SIZE.0 as usize;
                let cell = self.device[resident.table()[position / size].0 as usize][position % size];
                let own = Some((tenant, hash(&sequence.tokens[..=position])));
                prop_assert_eq!(cell, own, "conversation {} at position {}", conversation, position);
            }
        }
        Ok(())
    }

    fn forget_all(&mut self) -> Result<(), TestCaseError> {
        for conversation in 0..CONVERSATIONS {
            self.apply(&Op::Forget(conversation))?;
        }
        while !self.copies.is_empty() {
            self.apply(&Op::Copy { damage: false })?;
        }
        prop_assert!(self.forgetting.is_empty() && self.leaving.is_empty());
        let settings = *self.manager.settings();
        prop_assert_eq!(self.manager.free(Tier::Device), settings.device_blocks);
        prop_assert_eq!(self.manager.free(Tier::Host), settings.host_blocks);
        let bad = self.manager.bad_slots() as u32;
        prop_assert_eq!(self.manager.free(Tier::Disk).0 + bad, settings.disk_blocks.0);
        prop_assert!(self.disk.iter().all(Option::is_none), "something is left on disk of what was forgotten");
        Ok(())
    }
}

/// Retried at a block's border, its last full block is encoded anew: the copy of it that is under way is not its own.
#[test]
fn a_prompt_asked_again_while_it_is_copied_down_is_not_taken_for_copied() {
    let mut world = World::new(15, 8, 0, true, Policy::ReturnRate);
    for op in [
        Op::Admit { conversation: 4, keep: 0, words: 1, voice: 0 },
        Op::Append { conversation: 4, tokens: 16 },
        Op::Rest(4),
        Op::WorkAhead,
        Op::Admit { conversation: 4, keep: 11, words: 5, voice: 0 },
        Op::Append { conversation: 4, tokens: 1 },
        Op::Rest(4),
        Op::Copy { damage: false },
        Op::WorkAhead,
    ] {
        world.apply(&op).unwrap();
    }
    world.forget_all().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_block_manager_agrees_with_a_reference_that_shares_nothing(
        device in 6..24u32,
        host in prop_oneof![Just(0u32), 2..60u32],
        disk in prop_oneof![Just(0u32), 2..20u32, 20..200u32],
        background in any::<bool>(),
        policy in prop_oneof![3 => Just(Policy::ReturnRate), 1 => Just(Policy::Lru)],
        ops in vec(op(), 1..400),
    ) {
        let mut world = World::new(device, host, disk, background, policy);
        for op in &ops {
            world.apply(op)?;
        }
        world.forget_all()?;
    }
}
