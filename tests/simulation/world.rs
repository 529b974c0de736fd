//! What happens to the core in one simulated run?
//!
//! Clients ask, copies are made late, steps run, and each thing that the core tells is checked against what the clients
//! know. One seed decides it all. Time is simulated; the whole run is one thread.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use rekindle::engine::core::{Command, Core, CoreSettings, Event, Plan, StartTurn};
use rekindle::engine::flight::recorder::Scribe;
use rekindle::engine::flight::{Beginning, DiskBefore, FlightSettings, Step};
use rekindle::engine::status::PromptTotals;
use rekindle::engine::{FinishReason, Sampling, TurnEvent, TurnFailure, TurnRequest, TurnShape, TurnUsage};
use rekindle::kernels::cold::ColdForm;
use rekindle::kernels::files::{Contents, FoundSlot, Label};
use rekindle::kernels::memory::Arena;
use rekindle::kv::block::PrefixHash;
use rekindle::kv::evictor::Policy;
use rekindle::kv::journal::Entry;
use rekindle::kv::transfer::{self, Direction, TransferDone, TransferOrder};
use rekindle::kv::{KvSettings, Manager};
use rekindle::model::fake::FakeModel;
use rekindle::model::{ForwardError, Logits, Model};
use rekindle::types::{
    BlockBytes, BlockCount, BlockSize, Grant, KvKey, PoolPart, TenantId, TenantKey, Tick, Tier, TierBudget, TokenCount,
    TokenId, TurnId, Weight,
};

use crate::conversation::{Conversation, Turn};
use crate::random::Luck;

const VOCAB: usize = 64;
/// Earlier positions that a row reads: most of a short sequence, so that a wrong byte shows soon.
const READS: usize = 12;
/// Steps in which a turn must have ended, whatever else is asked.
const PATIENCE: u64 = 4_000;

/// Which bytes change that should not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    None,
    /// Of the host pool: checksums catch it.
    Host,
    /// Of the host pool, and the driver says that all sums are right.
    HostUnchecked,
    /// Of the device pool: nothing catches it but the answers.
    Device,
}

/// At times nothing happens for a while: pins end, and a disk that refused a write is tried again.
const LULL_EVERY: u64 = 97;
const LULL_US: u64 = 31_000_000;

/// What is drawn for a run.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub steps: u64,
    pub block_size: u32,
    pub window: u32,
    pub device_blocks: u32,
    pub host_blocks: u32,
    pub disk_blocks: u32,
    pub front_first_from: Option<TokenCount>,
    pub background_offload: bool,
    pub policy: Policy,
    pub doubles_at: Option<TokenCount>,
    pub reuse: bool,
    pub max_running: usize,
    pub step_tokens: usize,
    pub tenants: usize,
    pub conversations: usize,
    /// Copies end in the order in which they began, as with one copier thread.
    pub in_order: bool,
    /// A copy makes no headway in so many of a hundred looks.
    pub slowness: usize,
    pub damage: Damage,
    /// Host and disk count for half of a device's bytes. They are given all of them: the fake model's KV is a digest, and
    /// nothing is left of one that was rounded.
    pub narrow_below: bool,
}

impl Scenario {
    pub fn draw(seed: u64, steps: u64) -> Self {
        let luck = &mut Luck::new(seed ^ 0x5ce_a210);
        let block_size = luck.of(&[4, 4, 8, 16]);
        let window_blocks = luck.between(5, 20);
        let device_blocks = window_blocks * luck.between(2, 8) / 2;
        let host_blocks = luck.of(&[0, device_blocks / 2, 2 * device_blocks, 8 * device_blocks]);
        Self {
            seed,
            steps,
            block_size: block_size as u32,
            window: (block_size * window_blocks - luck.below(block_size)) as u32,
            device_blocks: device_blocks as u32,
            host_blocks: host_blocks as u32,
            background_offload: !luck.once_in(3),
            policy: luck.of(&[Policy::ReturnRate, Policy::ReturnRate, Policy::Lru]),
            doubles_at: luck.once_in(3).then_some(TokenCount(64)),
            reuse: !luck.once_in(10),
            max_running: luck.of(&[1, 4, 8, 32]),
            step_tokens: luck.of(&[8, 16, 64, 256]),
            tenants: luck.between(1, 5),
            conversations: luck.between(4, 40),
            in_order: !luck.once_in(3),
            slowness: luck.of(&[0, 30, 80, 95]),
            damage: luck.of(&[Damage::None, Damage::Host, Damage::Host]),
            disk_blocks: luck.of(&[0, device_blocks, 4 * device_blocks, 20 * device_blocks]) as u32,
            front_first_from: (!luck.once_in(3)).then_some(TokenCount(32)),
            narrow_below: luck.once_in(3),
        }
    }

    pub fn with(self, damage: Damage) -> Self {
        Self { damage, ..self }
    }
}

/// What a run saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub steps: u64,
    pub finished: u64,
    pub cancelled: u64,
    pub failed: u64,
    pub wrong_answers: u64,
    pub preemptions: u64,
    pub evictions: u64,
    pub early_returns: u64,
    pub reloads: u64,
    pub loads: u64,
    pub stores: u64,
    pub stores_refused: u64,
    pub verification_failures: u64,
    pub resident_tokens: u64,
    pub shared_tokens: u64,
    pub reloaded_tokens: u64,
    pub loaded_tokens: u64,
    /// Chunks encoded before what was there already, or came meanwhile.
    pub gaps: u64,
    pub encoded_tokens: u64,
    pub forgotten: u64,
    pub left: u64,
    pub pins: u64,
    pub pins_refused: u64,
    /// Steps of the turn that took the most.
    pub longest_turn: u64,
}

impl Seen {
    pub fn add(self, other: Seen) -> Seen {
        Seen {
            steps: self.steps + other.steps,
            finished: self.finished + other.finished,
            cancelled: self.cancelled + other.cancelled,
            failed: self.failed + other.failed,
            wrong_answers: self.wrong_answers + other.wrong_answers,
            preemptions: self.preemptions + other.preemptions,
            evictions: self.evictions + other.evictions,
            early_returns: self.early_returns + other.early_returns,
            reloads: self.reloads + other.reloads,
            loads: self.loads + other.loads,
            stores: self.stores + other.stores,
            stores_refused: self.stores_refused + other.stores_refused,
            verification_failures: self.verification_failures + other.verification_failures,
            resident_tokens: self.resident_tokens + other.resident_tokens,
            shared_tokens: self.shared_tokens + other.shared_tokens,
            reloaded_tokens: self.reloaded_tokens + other.reloaded_tokens,
            loaded_tokens: self.loaded_tokens + other.loaded_tokens,
            gaps: self.gaps + other.gaps,
            encoded_tokens: self.encoded_tokens + other.encoded_tokens,
            forgotten: self.forgotten + other.forgotten,
            left: self.left + other.left,
            pins: self.pins + other.pins,
            pins_refused: self.pins_refused + other.pins_refused,
            longest_turn: self.longest_turn.max(other.longest_turn),
        }
    }
}

/// A copy on its way.
struct Copying {
    order: TransferOrder,
    sums: Option<Vec<Option<u32>>>,
}

pub struct World {
    scenario: Scenario,
    luck: Luck,
    core: Core,
    model: FakeModel,
    logits: Logits,
    device: Arc<Arena>,
    host: Arc<Arena>,
    /// What lies in each slot of the disk: its label, and a block's bytes.
    disk: HashMap<u32, (Label, Vec<u8>)>,
    now: Tick,
    step: u64,
    conversations: Vec<Conversation>,
    turns: BTreeMap<TurnId, Turn>,
    copies: Vec<Copying>,
    commands: Vec<Command>,
    next_id: u64,
    prompt: PromptTotals,
    /// Sums of host blocks, by place; kept for `Damage::HostUnchecked`.
    sums: HashMap<u32, Option<u32>>,
    /// Pins asked for and not answered.
    pins_asked: usize,
    /// Blocks (of the device, of the host) that were overwritten, and that were told as forgotten.
    overwritten: (usize, usize),
    told_forgotten: (usize, usize),
    seen: Seen,
    /// Writes the flight record, if one is kept.
    scribe: Option<Scribe>,
    /// Of all runs.
    journal: Vec<Entry>,
}

/// Entries of the journal that are kept: all, so that a replay's can be compared.
const JOURNAL: usize = 1_000_000;

fn settings(scenario: &Scenario) -> (CoreSettings, KvSettings) {
    let block_size = BlockSize(scenario.block_size);
    let block_bytes = FakeModel::new(VOCAB, TokenCount(scenario.window)).spec().kv.block_bytes(block_size) as u64;
    let cold = if scenario.narrow_below { block_bytes / 2 } else { block_bytes };
    let kv = KvSettings {
        block_size,
        block_bytes: BlockBytes { device: block_bytes, cold },
        device_blocks: BlockCount(scenario.device_blocks),
        host_blocks: BlockCount(scenario.host_blocks),
        disk_blocks: BlockCount(scenario.disk_blocks),
        window: TokenCount(scenario.window),
        background_offload: scenario.background_offload,
        policy: scenario.policy,
        doubles_at: scenario.doubles_at,
        front_first_from: scenario.front_first_from,
        journal_entries: JOURNAL,
        reuse: scenario.reuse,
    };
    (CoreSettings { max_running: scenario.max_running, step_tokens: scenario.step_tokens }, kv)
}

fn tenant_key(tenant: TenantId) -> TenantKey {
    TenantKey([tenant.0 as u8 + 1; 32])
}

impl World {
    pub fn new(scenario: Scenario) -> Self {
        let (core, kv) = settings(&scenario);
        let model = FakeModel::new(VOCAB, TokenCount(scenario.window)).with_reads(READS);
        let arena = |blocks: u32| {
            Arc::new(Arena::new(blocks as usize, kv.block_bytes.device as usize).expect("an arena of the test's size"))
        };
        Self {
            luck: Luck::new(scenario.seed),
            core: Core::new(core, kv),
            model,
            logits: Logits::default(),
            device: arena(scenario.device_blocks),
            host: arena(scenario.host_blocks),
            disk: HashMap::new(),
            now: Tick(0),
            step: 0,
            conversations: Vec::new(),
            turns: BTreeMap::new(),
            copies: Vec::new(),
            commands: Vec::new(),
            next_id: 0,
            prompt: PromptTotals::default(),
            sums: HashMap::new(),
            pins_asked: 0,
            overwritten: (0, 0),
            told_forgotten: (0, 0),
            seen: Seen::default(),
            scribe: None,
            journal: Vec::new(),
            scenario,
        }
    }

    /// The same, which keeps a flight record.
    pub fn recorded(scenario: Scenario, flight: &FlightSettings) -> Self {
        let (core, kv) = settings(&scenario);
        let beginning = Beginning { version: env!("CARGO_PKG_VERSION").to_owned(), tick_zero_us: 1, core, kv };
        let scribe = Scribe::begin(flight, beginning, Some(&DiskBefore::default())).expect("a folder of the test's");
        let mut world = Self::new(scenario);
        world.scribe = Some(scribe);
        world
    }

    /// The world after its process was killed and another one has begun, which has no more than the disk.
    pub fn killed(mut self, flight: &FlightSettings) -> Self {
        self.end_run();
        let mut next = Self::new(self.scenario.clone());
        let mut slots: Vec<_> = self.disk.iter().collect();
        slots.sort_unstable_by_key(|(slot, _)| **slot);
        let found = slots.into_iter().map(|(slot, (label, bytes))| FoundSlot {
            slot: *slot,
            label: *label,
            bytes_sum: crc_fast::crc32_iscsi(bytes),
        });
        let found = Contents { blocks: found.collect(), unfinished: Vec::new() };
        // A tenant that is gone, and a conversation that was deleted meanwhile.
        let tenants = (1..self.scenario.tenants as u32 + 1).map(TenantId).map(|tenant| (tenant, tenant_key(tenant)));
        let lives = self.conversations.iter().skip(1).map(|conversation| conversation.key).collect();
        let before = DiskBefore { found, tenants: tenants.collect(), lives };
        let (core, kv) = settings(&self.scenario);
        let beginning = Beginning { version: env!("CARGO_PKG_VERSION").to_owned(), tick_zero_us: 2, core, kv };
        next.scribe = Some(Scribe::begin(flight, beginning, Some(&before)).expect("a folder of the test's"));
        let mut manager = Manager::new(kv);
        manager.recover(before.found, &before.tenants, |key| before.lives.contains(&key));
        next.core = Core::over(core, manager);
        for mut conversation in std::mem::take(&mut self.conversations) {
            (conversation.turn, conversation.leaving, conversation.forgetting) = (None, false, false);
            next.conversations.push(conversation);
        }
        (next.luck, next.next_id) = (self.luck.clone(), self.next_id);
        (next.disk, next.journal) = (std::mem::take(&mut self.disk), std::mem::take(&mut self.journal));
        next
    }

    /// Lets clients and engine do what they do, for as many steps as the scenario has.
    pub fn live(&mut self) {
        for _ in 0..self.scenario.steps {
            self.act();
            self.step();
        }
    }

    /// Ends the record as it is; all that was decided until then, by all processes.
    pub fn stop(mut self) -> Vec<Entry> {
        self.end_run();
        std::mem::take(&mut self.journal)
    }

    fn end_run(&mut self) {
        self.scribe.iter_mut().for_each(Scribe::write);
        self.journal.extend(self.core.manager().journal().entries());
    }

    /// Tokens that turns of this process were told to have been found on device, host and disk.
    pub fn found(&self) -> [u64; 3] {
        let told = self.prompt;
        [told.resident_tokens + told.shared_tokens, told.reloaded_host_tokens, told.reloaded_disk_tokens]
    }

    /// Runs the scenario, then lets everything come to rest and forgets it all.
    pub fn run(mut self) -> Seen {
        self.live();
        let quiet = |world: &World| world.turns.is_empty() && world.copies.is_empty() && world.commands.is_empty();
        self.step_until("every turn and copy ends once nobody asks for more", quiet);
        assert!(self.core.is_idle());
        assert!(self.conversations.iter().all(|conversation| !conversation.leaving), "an offload was never answered");
        assert_eq!(self.pins_asked, 0, "a pin was never answered");
        self.core.manager().assert_invariants();
        for index in 0..self.conversations.len() {
            self.forget(index);
        }
        self.step_until("every conversation is forgotten", |world| {
            world.conversations.iter().all(|conversation| !conversation.forgetting)
        });
        assert_eq!(self.told_forgotten, self.overwritten, "what was overwritten was told");
        let free = |tier| self.core.manager().free(tier).0;
        assert_eq!(free(Tier::Device), self.scenario.device_blocks, "device blocks that nobody holds are not free");
        assert_eq!(free(Tier::Host), self.scenario.host_blocks, "host blocks that nobody holds are not free");
        let bad = self.core.status(self.now).disk_bad_slots as u32;
        assert_eq!(free(Tier::Disk) + bad, self.scenario.disk_blocks, "disk blocks that nobody holds are not free");
        assert!(self.disk.is_empty(), "something is left on disk of what was forgotten");
        self.check_status();
        let status = self.core.status(self.now);
        self.seen.steps = status.steps;
        self.seen.preemptions = status.preemptions;
        self.seen.evictions = status.evictions;
        let tenants = self.core.accounts(self.now).tenants;
        self.seen.early_returns = tenants.iter().map(|tenant| tenant.early.returned).sum();
        self.seen.verification_failures = status.verification_failures;
        self.seen.resident_tokens = self.prompt.resident_tokens;
        self.seen.shared_tokens = self.prompt.shared_tokens;
        self.seen.reloaded_tokens = self.prompt.reloaded_host_tokens;
        self.seen.loaded_tokens = self.prompt.reloaded_disk_tokens;
        self.seen.encoded_tokens = self.prompt.encoded_tokens;
        std::mem::take(&mut self.seen)
    }

    fn step_until(&mut self, what: &str, done: impl Fn(&World) -> bool) {
        let last = self.step + PATIENCE;
        while !done(self) {
            assert!(self.step < last, "not so after {PATIENCE} steps: {what}");
            self.step();
        }
    }

    /// Lets clients do something, or nothing; at times a lot at once.
    fn act(&mut self) {
        let asked = match self.luck.below(40) {
            0 => 12,
            1..=12 => self.luck.between(1, 2),
            _ => 0,
        };
        for _ in 0..asked {
            match self.luck.below(24) {
                0 | 1 => self.cancel_one(),
                2 => self.leave_one(),
                3 => self.end_one(),
                7 | 8 => self.await_tool(),
                4 => self.forget_one(),
                5 => self.fork_one(),
                6 => self.pin_one(),
                _ => self.start_one(),
            }
        }
        if self.luck.once_in(200) {
            let tenants: Vec<_> = (0..self.scenario.tenants as u32).map(TenantId).collect();
            let grants = tenants.into_iter().filter_map(|tenant| self.grant(tenant)).collect();
            self.commands.push(Command::Grant(grants));
        }
        match self.scenario.damage {
            Damage::None => {}
            Damage::Host => {
                self.damage_host();
                self.damage_disk();
            }
            Damage::HostUnchecked => self.damage_host(),
            Damage::Device => damage(&mut self.luck, &self.device, 40, None),
        }
    }

    /// What a tenant is given from now on; at times nothing, as if it were gone.
    fn grant(&mut self, tenant: TenantId) -> Option<Grant> {
        let luck = &mut self.luck;
        let mut part = || (!luck.once_in(3)).then(|| PoolPart::Permille(luck.below(1001) as u32));
        let mut budget = || TierBudget { floor: part(), ceiling: part(), pins: part() };
        let (device, host, disk) = (budget(), budget(), budget());
        let weight = Weight(luck.between(100, 4000) as u32);
        (!luck.once_in(10)).then_some(Grant { tenant, weight, device, host, disk })
    }

    fn pick(&mut self) -> Option<usize> {
        (!self.conversations.is_empty()).then(|| self.luck.below(self.conversations.len()))
    }

    fn words(&mut self, low: usize, high: usize) -> Vec<TokenId> {
        let count = self.luck.between(low, high);
        (0..count).map(|_| TokenId(self.luck.below(VOCAB) as u32)).collect()
    }

    fn fresh_key(&mut self) -> KvKey {
        self.next_id += 1;
        KvKey(u128::from(self.next_id))
    }

    /// A new conversation opens with one of a few system prompts; tenants have the same ones.
    fn open(&mut self) -> usize {
        let tenant = TenantId(self.luck.below(self.scenario.tenants) as u32);
        let prompt = self.luck.below(3);
        let length = (prompt + 1) * self.scenario.window as usize / 6;
        let log = (0..length).map(|index| TokenId(((index * (prompt + 3)) % VOCAB) as u32)).collect();
        let key = self.fresh_key();
        self.conversations.push(Conversation::new(key, tenant, log, self.model.flat()));
        self.conversations.len() - 1
    }

    fn start_one(&mut self) {
        let open = self.conversations.len() < self.scenario.conversations && self.luck.once_in(3);
        let Some(index) = (if open { Some(self.open()) } else { self.pick() }) else { return };
        if let Some(turn) = self.conversations[index].turn {
            // Now and then a client gives up on an answer and asks anew, in either order.
            if !self.luck.once_in(8) {
                return;
            }
            self.turns.get_mut(&turn).expect("a conversation's turn is known").cancelled = true;
            if self.luck.once_in(2) {
                self.commands.push(Command::Cancel(turn));
                self.start(index);
            } else {
                self.start(index);
                self.commands.push(Command::Cancel(turn));
            }
            return;
        }
        if self.luck.once_in(12) {
            let tokens = self.luck.below(self.conversations[index].log.len() + 1);
            self.conversations[index].rewind(tokens);
        }
        let asked = self.conversations[index].asked;
        if asked > 0 && asked <= self.conversations[index].log.len() && self.luck.once_in(8) {
            // The same again: another answer to the same prompt.
            self.conversations[index].rewind(asked);
            return self.ask(index, &[]);
        }
        self.start(index);
    }

    fn start(&mut self, index: usize) {
        let window = TokenCount(self.scenario.window);
        let words = self.words(1, window.get() / 4);
        if self.conversations[index].log.len() + words.len() >= window.get() {
            self.conversations[index].rewind(window.get() / 5);
        }
        self.ask(index, &words);
    }

    fn ask(&mut self, index: usize, words: &[TokenId]) {
        let window = TokenCount(self.scenario.window);
        self.next_id += 1;
        let turn = TurnId(self.next_id);
        let hot = self.luck.once_in(4);
        let sampling = Sampling {
            temperature: if hot { 1.0 } else { 0.0 },
            seed: self.next_id,
            min_tokens: self.luck.below(4) as u32,
            ignore_eos: self.luck.once_in(4),
            ..Sampling::default()
        };
        let deadline_ms = if self.luck.once_in(20) { self.luck.below(200) as u64 } else { 1_000_000_000 };
        // Long and short ones, so that each class of conversations has some.
        let (number, new_tokens) = (self.luck.between(1, 10) as u32, self.luck.between(0, 1024) as u32);
        let conversation = &mut self.conversations[index];
        let request = TurnRequest {
            prompt: conversation.prompt(words),
            encoded_before: TokenCount(conversation.encoded as u32),
            shape: TurnShape { number, new_tokens: TokenCount(new_tokens) },
            sampling,
            max_tokens: TokenCount(self.luck.between(1, 24) as u32),
            stop_tokens: Arc::from([TokenId(0), TokenId(1)]),
            queue_deadline: Duration::from_millis(deadline_ms),
            logprobs: None,
        };
        let (expected, expected_reason) = conversation.answer(&request, window);
        conversation.turn = Some(turn);
        conversation.asked = request.prompt.len();
        let tenant_key = tenant_key(conversation.tenant);
        let hashes = PrefixHash::chain(&tenant_key, &request.prompt, BlockSize(self.scenario.block_size));
        let start = StartTurn {
            turn,
            key: conversation.key,
            tenant: conversation.tenant,
            tenant_key,
            hashes,
            request: request.clone(),
        };
        self.commands.push(Command::Start(Box::new(start)));
        let answer = Vec::new();
        let (since_step, cancelled, started) = (self.step, false, None);
        let turn_now =
            Turn { conversation: index, request, since_step, cancelled, started, answer, expected, expected_reason };
        self.turns.insert(turn, turn_now);
    }

    fn cancel_one(&mut self) {
        if self.turns.is_empty() {
            return;
        }
        let nth = self.luck.below(self.turns.len());
        let (turn, state) = self.turns.iter_mut().nth(nth).expect("drawn below the count");
        state.cancelled = true;
        self.commands.push(Command::Cancel(*turn));
    }

    fn leave_one(&mut self) {
        let Some(index) = self.pick() else { return };
        let conversation = &mut self.conversations[index];
        if !conversation.leaving {
            conversation.leaving = true;
            let to = if self.luck.once_in(2) { Tier::Host } else { Tier::Disk };
            self.commands.push(Command::Leave(conversation.key, to));
        }
    }

    fn end_one(&mut self) {
        let Some(index) = self.pick() else { return };
        self.commands.push(Command::End(self.conversations[index].key));
    }

    /// A conversation's answer was a call of a tool, or so it is said.
    fn await_tool(&mut self) {
        if let Some(index) = self.pick() {
            self.commands.push(Command::AwaitTool(self.conversations[index].key));
        }
    }

    fn forget_one(&mut self) {
        if let Some(index) = self.pick() {
            self.forget(index);
        }
    }

    fn forget(&mut self, index: usize) {
        let conversation = &mut self.conversations[index];
        if conversation.forgetting {
            return;
        }
        conversation.forgetting = true;
        conversation.encoded = 0;
        self.commands.push(Command::Forget(conversation.key));
        for turn in self.turns.values_mut().filter(|turn| turn.conversation == index) {
            turn.cancelled = true;
        }
    }

    /// Pins a conversation for a while, or unpins it.
    fn pin_one(&mut self) {
        let Some(index) = self.pick() else { return };
        let conversation = &self.conversations[index];
        let (key, tenant) = (conversation.key, conversation.tenant);
        let for_us = (!self.luck.once_in(4)).then(|| self.luck.between(1, 1_000_000) as u64);
        self.pins_asked += 1;
        self.commands.push(Command::Pin { key, tenant, tenant_key: tenant_key(tenant), for_us });
    }

    /// Another conversation of the tenant takes up the history of one.
    fn fork_one(&mut self) {
        let (Some(from), Some(to)) = (self.pick(), self.pick()) else { return };
        let (from, to_now) = (&self.conversations[from], &self.conversations[to]);
        if from.tenant == to_now.tenant && to_now.turn.is_none() {
            self.conversations[to].log = from.log.clone();
            self.conversations[to].encoded = 0;
        }
    }

    /// Changes a byte of a block that is about to be reloaded, or of any.
    fn damage_host(&mut self) {
        let waits = |copy: &&Copying| copy.sums.is_none() && copy.order.direction == Direction::Reload;
        let sources: Vec<u32> =
            self.copies.iter().filter(waits).flat_map(|copy| copy.order.pairs.iter().map(|(from, _)| *from)).collect();
        let source = (!sources.is_empty()).then(|| self.luck.of(&sources));
        damage(&mut self.luck, &self.host, 40, source);
    }

    /// One round of the engine's loop.
    fn step(&mut self) {
        self.step += 1;
        self.now.0 += self.luck.between(200, 5_000) as u64;
        if self.step.is_multiple_of(LULL_EVERY) {
            self.now.0 += LULL_US;
        }
        let mut noted = self.scribe.as_ref().map(|_| Step::begin(self.now, &self.commands));
        let mut plan = self.core.plan(self.now, &mut self.commands);
        noted.iter_mut().for_each(|step| step.plan(&plan.events));
        plan.chores.execute(&self.device, &self.host);
        self.copies.extend(plan.orders.drain(..).map(|order| Copying { order, sums: None }));
        let told = std::mem::take(&mut plan.events);
        self.check_forgotten(&told, &plan);
        told.into_iter().for_each(|event| self.hear(event));
        self.copy();
        let manager = self.core.manager();
        let in_gap = plan.spans.iter().filter(|span| manager.resident(span.key).gap_ends().is_some());
        self.seen.gaps += in_gap.count() as u64;
        if !plan.is_empty() {
            let mut events = Vec::new();
            let outcome = if self.luck.once_in(400) {
                Err(ForwardError::Shape { tokens: 0, rows: 0, sampled: Vec::new() })
            } else {
                let rows = self.core.rows(&plan);
                self.model.forward(&rows.batch(), &self.device, &mut self.logits)
            };
            self.copy();
            self.now.0 += self.luck.between(100, 2_000) as u64;
            let failed = outcome.is_err();
            self.core.commit(self.now, &plan, outcome.map(|()| &mut self.logits), &mut events);
            noted.iter_mut().for_each(|step| step.commit(self.now, failed, &events));
            events.into_iter().for_each(|event| self.hear(event));
        }
        if let (Some(scribe), Some(step)) = (&mut self.scribe, &noted) {
            scribe.step(step);
        }
        drop(plan);
        self.copy();
        if self.step.is_multiple_of(8) {
            self.core.manager().assert_invariants();
        }
        if self.step.is_multiple_of(64) {
            self.check_status();
            for turn in self.turns.values() {
                let waited = self.step - turn.since_step;
                assert!(waited < PATIENCE, "a turn has not ended after {PATIENCE} steps: {turn:?}");
            }
        }
    }

    /// What is told as forgotten was overwritten before: in memory in this step or an earlier one, and on disk too.
    fn check_forgotten(&mut self, told: &[Event], plan: &Plan) {
        self.overwritten.0 += plan.chores.zero_device.len();
        self.overwritten.1 += plan.chores.zero_host.len();
        for event in told {
            if let Event::Forgotten(_, freed) = event {
                self.told_forgotten.0 += freed.device.get();
                self.told_forgotten.1 += freed.host.get();
            }
        }
        let (told, done) = (self.told_forgotten, self.overwritten);
        assert!(told.0 <= done.0 && told.1 <= done.1, "{told:?} blocks are told as forgotten, {done:?} overwritten");
    }

    /// Lets copies make headway: some are made, some of those made are told.
    fn copy(&mut self) {
        let mut waiting = std::mem::take(&mut self.copies);
        if !self.scenario.in_order && waiting.len() > 1 {
            let first = self.luck.below(waiting.len());
            waiting.swap(0, first);
        }
        let mut stuck = false;
        for mut copy in waiting {
            stuck |= self.luck.below(100) < self.scenario.slowness;
            if stuck {
                self.copies.push(copy);
                continue;
            }
            let Some(sums) = copy.sums.take() else {
                copy.sums = Some(self.execute(&copy.order));
                self.copies.push(copy);
                stuck = self.scenario.in_order;
                continue;
            };
            let took_us = self.luck.between(10, 1_000) as u64;
            self.commands.push(Command::Transferred(TransferDone { ticket: copy.order.ticket, sums, took_us }));
        }
    }

    fn execute(&mut self, order: &TransferOrder) -> Vec<Option<u32>> {
        if !order.direction.is_copy() {
            return self.execute_on_disk(order);
        }
        if order.direction == Direction::Reload {
            self.seen.reloads += 1;
        }
        let sums = transfer::execute(order, &self.device, &self.host, ColdForm::Same);
        if self.scenario.damage != Damage::HostUnchecked {
            return sums;
        }
        // The sum that was taken on the way down is told on the way up, whatever has become of the bytes.
        let pairs = order.pairs.iter().zip(sums);
        match order.direction {
            Direction::Offload => pairs.map(|((_, to), sum)| *self.sums.entry(*to).insert_entry(sum).get()).collect(),
            Direction::Reload => pairs.map(|((from, _), _)| self.sums[from]).collect(),
            Direction::Store { .. } | Direction::Load | Direction::Erase => unreachable!("made above"),
        }
    }

    /// As the real one, on slots in memory that are at times full, torn, exchanged or gone.
    fn execute_on_disk(&mut self, order: &TransferOrder) -> Vec<Option<u32>> {
        let source = if order.direction == (Direction::Store { from: Tier::Host }) { &self.host } else { &self.device };
        match order.direction {
            Direction::Store { .. } if self.luck.once_in(50) => {
                self.seen.stores_refused += 1;
                vec![None; order.pairs.len()]
            }
            Direction::Store { .. } => {
                self.seen.stores += 1;
                let pairs = order.pairs.iter().zip(&order.labels);
                let mut damaged = false;
                let stored = pairs.map(|(&(from, to), (label, expected))| {
                    let bytes = source.bytes(from).to_vec();
                    let sum = crc_fast::crc32_iscsi(&bytes);
                    damaged |= expected.is_some_and(|expected| expected != sum);
                    if !damaged {
                        assert!(self.disk.insert(to, (*label, bytes)).is_none(), "slot {to} was not overwritten first");
                    }
                    Some(sum)
                });
                stored.collect()
            }
            Direction::Load => {
                self.seen.loads += 1;
                let pairs = order.pairs.iter().zip(&order.labels);
                let loaded = pairs.map(|(&(from, to), (wanted, _))| {
                    let (label, bytes) = self.disk.get(&from)?;
                    let same = (label.tenant, label.index, label.parent, label.hash)
                        == (wanted.tenant, wanted.index, wanted.parent, wanted.hash);
                    // The bytes are where they are to go before anybody knows what they are.
                    self.device.with_bytes_mut(to, |into| into.copy_from_slice(bytes));
                    same.then(|| crc_fast::crc32_iscsi(bytes))
                });
                loaded.collect()
            }
            Direction::Erase => {
                for (slot, _) in &order.pairs {
                    self.disk.remove(slot);
                }
                vec![Some(0); order.pairs.len()]
            }
            Direction::Offload | Direction::Reload => unreachable!("copies between memories"),
        }
    }

    /// Changes a byte on disk, exchanges two slots, or loses one.
    fn damage_disk(&mut self) {
        if self.disk.is_empty() || !self.luck.once_in(60) {
            return;
        }
        let mut slots: Vec<u32> = self.disk.keys().copied().collect();
        slots.sort_unstable();
        let (slot, other) = (self.luck.of(&slots), self.luck.of(&slots));
        match self.luck.below(3) {
            0 => {
                let (_, bytes) = self.disk.get_mut(&slot).expect("one of them");
                let (byte, change) = (self.luck.below(bytes.len()), self.luck.between(1, 255) as u8);
                bytes[byte] ^= change;
            }
            1 => {
                let (a, b) = (self.disk[&slot].clone(), self.disk[&other].clone());
                self.disk.insert(slot, b);
                self.disk.insert(other, a);
            }
            _ => drop(self.disk.remove(&slot)),
        }
    }

    /// Takes in what the core tells, and checks it.
    fn hear(&mut self, event: Event) {
        match event {
            Event::Forgotten(key, _) => {
                let conversation = self.of(key);
                assert!(conversation.forgetting, "forgotten twice, or without being asked");
                conversation.forgetting = false;
                self.seen.forgotten += 1;
            }
            Event::Left(key, _) => {
                let conversation = self.of(key);
                assert!(conversation.leaving, "an offload is answered twice, or without being asked");
                conversation.leaving = false;
                self.seen.left += 1;
            }
            Event::Pinned(pinned) => {
                self.pins_asked -= 1;
                match pinned {
                    Ok((budget, Some(_))) => {
                        assert!(budget.used <= budget.limit, "{budget:?}");
                        self.seen.pins += 1;
                    }
                    Ok((_, None)) => {}
                    Err(_) => self.seen.pins_refused += 1,
                }
            }
            Event::Turn(id, TurnEvent::Started(usage)) => {
                let turn = self.turn(id);
                assert!(turn.started.is_none() && turn.answer.is_empty(), "a turn starts once, and first");
                turn.started = Some(usage);
                let parts = usage.resident.0 + usage.shared.0 + usage.reloaded().0 + usage.encoded.0;
                assert_eq!(parts as usize, turn.request.prompt.len(), "usage adds up to the prompt: {usage:?}");
                assert!(usage.encoded.0 > 0 && usage.reencoded <= usage.encoded, "{usage:?}");
                self.prompt.resident_tokens += u64::from(usage.resident.0);
                self.prompt.shared_tokens += u64::from(usage.shared.0);
                self.prompt.reloaded_host_tokens += u64::from(usage.reloaded_host.0);
                self.prompt.reloaded_disk_tokens += u64::from(usage.reloaded_disk.0);
                self.prompt.encoded_tokens += u64::from(usage.encoded.0);
                self.prompt.reencoded_tokens += u64::from(usage.reencoded.0);
            }
            Event::Turn(id, TurnEvent::Token(token)) => {
                let turn = self.turn(id);
                assert!(turn.started.is_some(), "a token comes after the start");
                turn.answer.push(token.id);
            }
            Event::Turn(id, TurnEvent::Finished { reason, usage }) => self.finished(id, reason, usage),
            Event::Turn(id, TurnEvent::Failed(failure)) => self.failed(id, &failure),
        }
    }

    fn of(&mut self, key: KvKey) -> &mut Conversation {
        self.conversations.iter_mut().find(|conversation| conversation.key == key).expect("a known conversation")
    }

    fn turn(&mut self, id: TurnId) -> &mut Turn {
        self.turns.get_mut(&id).expect("a turn that has not ended")
    }

    fn finished(&mut self, id: TurnId, reason: FinishReason, usage: TurnUsage) {
        let turn = self.turns.remove(&id).expect("a turn ends once");
        assert_eq!(usage.generated.get(), turn.answer.len());
        let right = match reason {
            FinishReason::Cancelled => {
                assert!(turn.cancelled, "a turn that nobody cancelled is cancelled");
                self.seen.cancelled += 1;
                turn.expected.starts_with(&turn.answer)
            }
            FinishReason::Stop | FinishReason::Length => {
                self.seen.finished += 1;
                reason == turn.expected_reason && turn.answer == turn.expected
            }
        };
        if !right {
            self.seen.wrong_answers += 1;
            let hurt = matches!(self.scenario.damage, Damage::Device | Damage::HostUnchecked);
            assert!(hurt, "the answer differs from that of the conversation alone: {reason:?} {turn:?}");
        }
        self.seen.longest_turn = self.seen.longest_turn.max(self.step - turn.since_step);
        self.end(id, &turn);
    }

    fn failed(&mut self, id: TurnId, failure: &TurnFailure) {
        let turn = self.turns.remove(&id).expect("a turn ends once");
        match failure {
            TurnFailure::Model(_) => {}
            TurnFailure::QueueTimeout { waited_ms } | TurnFailure::AtCeiling { waited_ms } => {
                assert!(u128::from(*waited_ms) >= turn.request.queue_deadline.as_millis(), "too early: {turn:?}");
                assert!(turn.started.is_none());
            }
        }
        self.seen.failed += 1;
        self.end(id, &turn);
    }

    /// What was said goes into the log, unless the client has asked anew since.
    fn end(&mut self, id: TurnId, turn: &Turn) {
        let conversation = &mut self.conversations[turn.conversation];
        if conversation.turn == Some(id) {
            conversation.turn = None;
            conversation.log = turn.request.prompt.iter().chain(&turn.answer).copied().collect();
            if turn.started.is_some() {
                conversation.encoded = conversation.log.len() - 1;
            }
        }
    }

    fn check_status(&mut self) {
        let status = self.core.status(self.now);
        assert_eq!(status.prompt, self.prompt, "the status is the sum of what turns were told");
        assert_eq!(status.turns_finished, self.seen.finished);
        assert_eq!(status.turns_cancelled, self.seen.cancelled);
        assert_eq!(status.turns_failed, self.seen.failed);
        assert_eq!(status.isolation_faults, 0);
        self.check_accounts();
        if !matches!(self.scenario.damage, Damage::Host | Damage::HostUnchecked) {
            assert_eq!(status.verification_failures, 0, "sums differ although nothing was damaged");
        }
        for (key, residency) in self.core.take_residencies() {
            if let Some(residency) = residency {
                let conversation = self.of(key);
                assert_eq!(residency.tenant, conversation.tenant);
            }
        }
    }
}

impl World {
    /// What tenants hold, lose and gain is what there is of it in all.
    fn check_accounts(&self) {
        let (status, accounts) = (self.core.status(self.now), self.core.accounts(self.now));
        for (index, pool) in [status.device, status.host, status.disk].into_iter().enumerate() {
            let held: u64 = accounts.tenants.iter().map(|tenant| tenant.tiers[index].held.bytes).sum();
            let used = u64::from(pool.total.0 - pool.free.0) * pool.block_bytes;
            assert_eq!(held + accounts.waiting_bytes[index], used, "tenants hold what is not free");
        }
        let evictions: u64 = accounts.displaced.iter().map(|(_, _, displaced)| displaced.evictions).sum();
        assert_eq!(evictions, status.evictions, "each eviction is somebody's, for somebody");
        let mut prompt = PromptTotals::default();
        let mut turns = 0;
        for (tenant, account) in (0..).map(TenantId).zip(&accounts.tenants) {
            let pairs = || accounts.displaced.iter();
            let suffered: u64 = pairs().filter(|pair| pair.0 == tenant).map(|pair| pair.2.evictions).sum();
            let caused: u64 = pairs().filter(|pair| pair.1 == tenant).map(|pair| pair.2.evictions).sum();
            assert_eq!((account.evictions.iter().sum::<u64>(), account.caused), (suffered, caused));
            assert!(account.early.returned <= account.early.evicted && account.early.evicted <= suffered);
            let gained = account.gains.prompt;
            prompt.resident_tokens += gained.resident_tokens;
            prompt.shared_tokens += gained.shared_tokens;
            prompt.reloaded_host_tokens += gained.reloaded_host_tokens;
            prompt.reloaded_disk_tokens += gained.reloaded_disk_tokens;
            prompt.encoded_tokens += gained.encoded_tokens;
            prompt.reencoded_tokens += gained.reencoded_tokens;
            turns += account.gains.paths.iter().map(|path| path.turns).sum::<u64>();
        }
        assert_eq!(prompt, self.prompt, "tenants' prompts are all prompts");
        assert_eq!(turns, accounts.first_tokens.iter().flatten().sum::<u64>());
    }
}

/// Changes a byte once in `times`: of `block`, or of any.
fn damage(luck: &mut Luck, arena: &Arena, times: usize, block: Option<u32>) {
    if arena.blocks() == 0 || !luck.once_in(times) {
        return;
    }
    let block = block.unwrap_or_else(|| luck.below(arena.blocks()) as u32);
    let (byte, change) = (luck.below(arena.block_bytes()), luck.between(1, 255) as u8);
    arena.with_bytes_mut(block, |bytes| bytes[byte] ^= change);
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "seed {}, step {}: repeat with REKINDLE_SEED={} cargo test --profile ci --test simulation\n{:?}",
                self.scenario.seed, self.step, self.scenario.seed, self.scenario
            );
        }
    }
}
