//! What would a policy and a memory have cost on a day that is known?
//!
//! The real core over a trace's turns, at the trace's times, with a model that computes nothing: what is found, reloaded,
//! evicted and encoded again is what the server would have decided. A token here stands for a block of the trace's, so that
//! a week takes seconds. A turn's answer is part of what it encodes, its copies between tiers end before the next turn, and
//! what is longer than the pool is encoded anew each time. The same trace and settings give the same outcome.

pub mod record;
mod recorded;
pub mod times;
pub mod trace;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub use super::Policy;
use super::core::{Command, Core, CoreSettings, Event, StartTurn};
use super::flight::reading::tenant_key;
use super::{Sampling, TurnEvent, TurnRequest};
use crate::kv::KvSettings;
use crate::kv::block::PrefixHash;
use crate::kv::journal::Entry;
use crate::kv::return_rate::TurnShape;
use crate::kv::transfer::TransferDone;
use crate::model::Logits;
use crate::types::{
    BlockBytes, BlockCount, BlockSize, Grant, KvKey, PoolPart, TenantId, Tick, TierBudget, TokenCount, TokenId, TurnId,
    Weight, counted,
};
use times::Work;
use trace::{End, Notice, Request, Told, Trace};

pub use crate::engine::flight::FLIGHT_FOLDER;

/// What is replayed, and on what.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplaySettings {
    pub policy: Policy,
    pub device_tokens: u64,
    pub host_tokens: u64,
    pub disk_tokens: u64,
    /// The trace's tokens that one block holds.
    pub block_tokens: u32,
    /// Of the KV of one token, on the device and below it.
    pub device_token_bytes: u64,
    pub token_bytes: u64,
    /// Part of the trace that is not measured, [0, 1): the memory fills, and habits are learned.
    pub warm_up: f64,
    /// If so: only what came so long before the last request is measured, whatever the warm-up.
    pub last: Option<Duration>,
    /// Part of the conversations whose end the server hears of, [0, 1].
    pub ends: f64,
    /// All turns are of one tenant: no floors, no ceilings.
    pub one_tenant: bool,
    /// What tenants have of the device, other than they were given.
    pub given: BTreeMap<TenantId, Given>,
    /// A token at this position costs twice what the first does, because of attention.
    pub doubles_at: f64,
    /// Whether the policy takes that into account.
    pub weighs_length: bool,
    pub journal_entries: usize,
}

/// A tenant's floor and ceiling of the device in bytes; `None`: as it was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    pub floor: Option<u64>,
    pub ceiling: Option<u64>,
}

impl Given {
    fn of(self, budget: TierBudget) -> TierBudget {
        let or = |bytes: Option<u64>, part| bytes.map(PoolPart::Bytes).or(part);
        TierBudget { floor: or(self.floor, budget.floor), ceiling: or(self.ceiling, budget.ceiling), ..budget }
    }
}

impl ReplaySettings {
    /// The first of the trace's requests that is measured.
    pub fn first_counted(&self, trace: &Trace) -> usize {
        let Some(last) = self.last else { return (trace.requests.len() as f64 * self.warm_up) as usize };
        let end = trace.requests.last().map_or(0, |request| request.at.0);
        let since = end.saturating_sub(u64::try_from(last.as_micros()).unwrap_or(u64::MAX));
        trace.requests.partition_point(|request| request.at.0 < since)
    }

    /// A decision of this replay in words.
    pub fn sentence(&self, entry: &Entry) -> String {
        entry.sentence(BlockSize(self.block_tokens))
    }
}

/// Why a replay came to no end.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("a device of {} has not {LEAST_BLOCKS} blocks of {block_tokens}; give it more", counted(*tokens, "token", "tokens"))]
    DeviceTooSmall { tokens: u64, block_tokens: u32 },
    #[error("{tokens} tokens are more blocks of {block_tokens} than there are numbers for; use larger blocks")]
    PoolTooLarge { tokens: u64, block_tokens: u32 },
    #[error("request {number} has not ended after {STEPS} steps")]
    Stuck { number: usize },
    #[error("what is told before request {number} is not done after {STEPS} steps")]
    StuckNotice { number: usize },
    #[error(
        "the record's run {run} went another way at {} s: {why}; version {version} wrote it, and this is {}",
        at.0 / 1_000_000, env!("CARGO_PKG_VERSION")
    )]
    Diverged { run: usize, at: Tick, why: &'static str, version: String },
}

/// Blocks of the smallest device that is of any use, as in `thread`.
const LEAST_BLOCKS: u32 = 4;
/// Steps in which a turn, all alone, has ended.
const STEPS: usize = 1_000_000;

/// What turns found of the tokens that a memory without end would still have.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reuse {
    pub requests: u64,
    pub prompt_tokens: u64,
    pub reusable_tokens: u64,
    pub device_tokens: u64,
    pub host_tokens: u64,
    pub disk_tokens: u64,
    pub reencoded_tokens: u64,
    /// Of what was encoded again, in tokens at the first position.
    pub reencode_cost: f64,
}

impl Reuse {
    fn add(&mut self, other: Reuse) {
        self.requests += other.requests;
        self.prompt_tokens += other.prompt_tokens;
        self.reusable_tokens += other.reusable_tokens;
        self.device_tokens += other.device_tokens;
        self.host_tokens += other.host_tokens;
        self.disk_tokens += other.disk_tokens;
        self.reencoded_tokens += other.reencoded_tokens;
        self.reencode_cost += other.reencode_cost;
    }
}

/// What came of it, after the warm-up.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub all: Reuse,
    /// By the trace's tenant numbers.
    pub tenants: Vec<Reuse>,
    pub bytes_down: u64,
    pub bytes_up: u64,
    pub evictions: u64,
    /// Turns that were longer than the whole device.
    pub too_long: u64,
    pub journal: Vec<Entry>,
    /// What each turn asked of the machine before its first token.
    pub works: Vec<Work>,
}

/// A request's sequence in blocks, and its tenant's chain over them.
#[derive(Clone, Default)]
struct Sequence {
    tenant: Option<TenantId>,
    tokens: Vec<TokenId>,
    hashes: Vec<PrefixHash>,
}

/// Replays a trace. `progress` hears of every thousandth request.
pub fn replay(
    trace: &Trace,
    settings: &ReplaySettings,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Outcome, ReplayError> {
    let mut driver = Driver::new(trace, settings)?;
    let warm = settings.first_counted(trace);
    let last_uses = last_uses(trace);
    let last_turns = last_turns(trace);
    let mut sequences: Vec<Sequence> = vec![Sequence::default(); trace.requests.len()];
    let mut before = Moved::default();
    let mut notices = trace.notices.iter().peekable();
    for (number, request) in trace.requests.iter().enumerate() {
        while let Some(notice) = notices.next_if(|notice| notice.before <= number) {
            driver.tell(number, notice)?;
        }
        if number % 1000 == 0 {
            progress(number, trace.requests.len());
        }
        if number == warm {
            driver.outcome = Outcome { journal: Vec::new(), ..empty() };
            before = Moved::of(&driver.core);
        }
        let sequence = driver.sequence(request, &sequences);
        driver.turn(number, request, &sequence, last_turns[number])?;
        if last_uses[number] > number {
            sequences[number] = sequence;
        }
        if let Some((followed, _)) = request.follows.filter(|(followed, _)| last_uses[*followed] == number) {
            sequences[followed] = Sequence::default();
        }
    }
    let moved = Moved::of(&driver.core);
    Ok(Outcome {
        bytes_down: moved.down - before.down,
        bytes_up: moved.up - before.up,
        evictions: moved.evictions - before.evictions,
        journal: driver.core.manager().journal().entries().copied().collect(),
        ..driver.outcome
    })
}

impl Outcome {
    /// Counts a request of a tenant's. `token_bytes`: of the tiers below the device.
    fn count(&mut self, tenant: TenantId, reuse: Reuse, token_bytes: u64) {
        self.all.add(reuse);
        self.works.push(Work::of(tenant, &reuse, token_bytes));
        let tenant = tenant.0 as usize;
        if self.tenants.len() <= tenant {
            self.tenants.resize(tenant + 1, Reuse::default());
        }
        self.tenants[tenant].add(reuse);
    }
}

/// What encoding these positions costs, in tokens at the first position.
fn cost_of(from: u64, to: u64, doubles_at: f64) -> f64 {
    let (from, to) = (from as f64, to as f64);
    (to - from) * (1.0 + (from + to) / 2.0 / doubles_at)
}

fn empty() -> Outcome {
    let (all, tenants, journal, works) = (Reuse::default(), Vec::new(), Vec::new(), Vec::new());
    Outcome { all, tenants, bytes_down: 0, bytes_up: 0, evictions: 0, too_long: 0, journal, works }
}

/// By request, the number of the last that follows it; its own if none does.
fn last_uses(trace: &Trace) -> Vec<usize> {
    let mut last: Vec<usize> = (0..trace.requests.len()).collect();
    for (number, request) in trace.requests.iter().enumerate() {
        if let Some((followed, _)) = request.follows {
            last[followed] = number;
        }
    }
    last
}

/// By request, whether its conversation has no later one.
fn last_turns(trace: &Trace) -> Vec<bool> {
    let mut seen = std::collections::HashSet::new();
    let mut last: Vec<bool> = trace.requests.iter().rev().map(|request| seen.insert(request.conversation)).collect();
    last.reverse();
    last
}

/// Totals of the core since the start.
#[derive(Clone, Copy, Default)]
struct Moved {
    down: u64,
    up: u64,
    evictions: u64,
}

impl Moved {
    fn of(core: &Core) -> Self {
        let counters = core.manager().counters();
        Self {
            down: counters.offloaded_bytes + counters.stored_bytes,
            up: counters.reloaded_bytes + counters.loaded_bytes,
            evictions: counters.evictions,
        }
    }
}

struct Driver<'a> {
    settings: &'a ReplaySettings,
    core: Core,
    window: usize,
    logits: Logits,
    commands: Vec<Command>,
    next_token: u32,
    outcome: Outcome,
}

impl<'a> Driver<'a> {
    fn new(trace: &Trace, settings: &'a ReplaySettings) -> Result<Self, ReplayError> {
        let block_tokens = settings.block_tokens;
        let blocks = |tokens: u64| {
            let blocks = u32::try_from(tokens / u64::from(block_tokens));
            blocks.map(BlockCount).map_err(|_| ReplayError::PoolTooLarge { tokens, block_tokens })
        };
        let (device_blocks, host_blocks) = (blocks(settings.device_tokens)?, blocks(settings.host_tokens)?);
        let disk_blocks = blocks(settings.disk_tokens)?;
        if device_blocks.0 < LEAST_BLOCKS {
            return Err(ReplayError::DeviceTooSmall { tokens: settings.device_tokens, block_tokens });
        }
        // One more than the longest: the token that a turn says.
        let longest = trace.longest().0 / block_tokens + 2;
        let window = TokenCount(longest.min(device_blocks.0));
        let kv = KvSettings {
            block_size: BlockSize(1),
            block_bytes: BlockBytes {
                device: u64::from(block_tokens) * settings.device_token_bytes,
                cold: u64::from(block_tokens) * settings.token_bytes,
            },
            device_blocks,
            host_blocks,
            disk_blocks,
            window,
            background_offload: true,
            policy: settings.policy,
            doubles_at: settings.weighs_length.then(|| TokenCount(settings.doubles_at as u32 / block_tokens)),
            front_first_from: settings.policy.front_first_from(TokenCount(settings.doubles_at as u32 / block_tokens)),
            journal_entries: settings.journal_entries,
            reuse: true,
        };
        let core = Core::new(CoreSettings { max_running: 1, step_tokens: window.get() }, kv);
        let mut logits = Logits::default();
        logits.reset(1, 1).fill(0.0);
        let mut driver = Self {
            settings,
            core,
            window: window.get(),
            logits,
            commands: Vec::new(),
            next_token: 0,
            outcome: empty(),
        };
        // For what comes before the record says what tenants are given.
        if !settings.given.is_empty() && !settings.one_tenant {
            let usual = TierBudget::default();
            let (weight, host, disk) = (Weight::ORDINARY, usual, usual);
            let tenants = settings.given.keys();
            let grants = tenants.map(|tenant| Grant { tenant: *tenant, weight, device: usual, host, disk }).collect();
            let grants = driver.grants(grants);
            driver.commands.push(Command::Grant(grants));
        }
        Ok(driver)
    }

    /// What tenants are given, with what they have instead in this replay.
    fn grants(&self, mut grants: Vec<Grant>) -> Vec<Grant> {
        for grant in &mut grants {
            let given = self.settings.given.get(&grant.tenant).copied().unwrap_or_default();
            grant.device = given.of(grant.device);
        }
        grants
    }

    fn tenant(&self, request: &Request) -> TenantId {
        if self.settings.one_tenant { TenantId(0) } else { request.tenant }
    }

    fn blocks(&self, tokens: TokenCount) -> usize {
        (tokens.0 / self.settings.block_tokens) as usize
    }

    /// What the request's prompt and answer are: the front of the one that it follows, then tokens that nobody had.
    fn sequence(&mut self, request: &Request, sequences: &[Sequence]) -> Sequence {
        let tenant = self.tenant(request);
        let key = tenant_key(tenant);
        let mut sequence = Sequence { tenant: Some(tenant), ..Sequence::default() };
        if let Some((followed, shared)) = request.follows {
            let followed = &sequences[followed];
            let shared = &followed.tokens[..self.blocks(shared).min(followed.tokens.len())];
            sequence.tokens.extend_from_slice(shared);
            // Of another tenant, the tokens are the same, and their hashes are not.
            if followed.tenant == Some(tenant) {
                sequence.hashes.extend_from_slice(&followed.hashes[..shared.len()]);
            } else {
                sequence.hashes = PrefixHash::chain(&key, shared, BlockSize(1));
            }
        }
        let mut parent = sequence.hashes.last().copied().unwrap_or(PrefixHash::ROOT);
        while sequence.tokens.len() < self.blocks(request.sequence()).max(1) {
            let token = TokenId(self.next_token);
            self.next_token += 1;
            parent = parent.child(&key, &[token]);
            sequence.tokens.push(token);
            sequence.hashes.push(parent);
        }
        sequence
    }

    fn turn(
        &mut self,
        number: usize,
        request: &Request,
        sequence: &Sequence,
        is_last: bool,
    ) -> Result<(), ReplayError> {
        let block_tokens = u64::from(self.settings.block_tokens);
        // The last block is always encoded: its logits are wanted.
        let reusable = self.blocks(request.reusable()).min(sequence.tokens.len() - 1);
        let found = if sequence.tokens.len() < self.window {
            self.run(number, request, sequence, reusable)?
        } else {
            self.outcome.too_long += 1;
            Found { reencode_cost: self.cost(0..reusable), ..Found::default() }
        };
        let device = found.device.min(reusable);
        let host = found.host.min(reusable - device);
        let disk = found.disk.min(reusable - device - host);
        let cached = device + host + disk;
        let tokens = |blocks: usize| blocks as u64 * block_tokens;
        let reuse = Reuse {
            requests: 1,
            prompt_tokens: u64::from(request.prompt.0),
            reusable_tokens: tokens(reusable),
            device_tokens: tokens(device),
            host_tokens: tokens(host),
            disk_tokens: tokens(disk),
            reencoded_tokens: tokens(reusable - cached),
            reencode_cost: found.reencode_cost,
        };
        self.outcome.count(request.tenant, reuse, self.settings.token_bytes);
        if is_last && is_told(request.conversation, self.settings.ends) {
            self.commands.push(Command::End(request.conversation));
        } else if request.end == End::ToolCall {
            self.commands.push(Command::AwaitTool(request.conversation));
        }
        Ok(())
    }

    /// Tells the core what the server was told, and lets it do that.
    fn tell(&mut self, number: usize, notice: &Notice) -> Result<(), ReplayError> {
        let one_tenant = self.settings.one_tenant;
        let command = match &notice.told {
            Told::Over(key) => Command::End(*key),
            Told::NotOver(key) => Command::Reopen(*key),
            Told::Forget(key) => Command::Forget(*key),
            Told::Leave(key, to) => Command::Leave(*key, *to),
            // What tenants are given means nothing where there is one.
            Told::Pin { .. } | Told::Grant(_) if one_tenant => return Ok(()),
            Told::Pin { conversation, tenant, for_us } => {
                let (tenant, tenant_key) = (*tenant, tenant_key(*tenant));
                Command::Pin { key: *conversation, tenant, tenant_key, for_us: *for_us }
            }
            Told::Grant(grants) => Command::Grant(self.grants(grants.clone())),
            Told::GoOnFrom(learned) => Command::GoOnFrom(learned.clone()),
        };
        self.commands.push(command);
        for _ in 0..STEPS {
            drop(self.step(notice.at));
            if self.commands.is_empty() {
                return Ok(());
            }
        }
        Err(ReplayError::StuckNotice { number })
    }

    /// What encoding these blocks of a sequence costs, in tokens at the first position.
    fn cost(&self, blocks: Range<usize>) -> f64 {
        let tokens = |blocks: usize| blocks as u64 * u64::from(self.settings.block_tokens);
        cost_of(tokens(blocks.start), tokens(blocks.end), self.settings.doubles_at)
    }

    /// Runs a turn to its end, and the copies that follow from it.
    fn run(
        &mut self,
        number: usize,
        request: &Request,
        sequence: &Sequence,
        reusable: usize,
    ) -> Result<Found, ReplayError> {
        let tenant = self.tenant(request);
        let new_tokens = TokenCount(request.prompt.0 - request.reusable().0);
        let start = StartTurn {
            turn: TurnId(number as u64),
            key: request.conversation,
            tenant,
            tenant_key: tenant_key(tenant),
            hashes: sequence.hashes.clone(),
            request: TurnRequest {
                prompt: sequence.tokens.as_slice().into(),
                encoded_before: TokenCount(0),
                shape: TurnShape { number: request.turn, new_tokens },
                sampling: Sampling::default(),
                max_tokens: TokenCount(1),
                stop_tokens: Arc::from([]),
                queue_deadline: Duration::MAX,
                logprobs: None,
            },
        };
        self.commands.push(Command::Start(Box::new(start)));
        let mut found = Found::default();
        for _ in 0..STEPS {
            let (events, encoded) = self.step(request.at);
            let encoded = encoded.start.min(reusable)..encoded.end.min(reusable);
            found.reencode_cost += self.cost(encoded);
            for event in events {
                if let Event::Turn(_, TurnEvent::Started(usage)) = event {
                    found.device = usage.resident.get() + usage.shared.get();
                    found.host = usage.reloaded_host.get();
                    found.disk = usage.reloaded_disk.get();
                }
            }
            if self.core.is_idle() && self.commands.is_empty() {
                return Ok(found);
            }
        }
        Err(ReplayError::Stuck { number })
    }

    /// One round of the engine's loop, whose copies take no time, and the part of the turn's sequence that it encoded.
    fn step(&mut self, now: Tick) -> (Vec<Event>, Range<usize>) {
        let mut plan = self.core.plan(now, &mut self.commands);
        for order in plan.orders.drain(..) {
            let sums = vec![Some(0); order.pairs.len()];
            self.commands.push(Command::Transferred(TransferDone { ticket: order.ticket, sums, took_us: 1 }));
        }
        let mut events = std::mem::take(&mut plan.events);
        let encoded = plan.spans.first().map_or(0..0, |span| {
            let first = self.core.manager().resident(span.key).context().get();
            first..first + span.rows
        });
        if !plan.is_empty() {
            self.core.commit(now, &plan, Ok(&mut self.logits), &mut events);
        }
        // Nobody asks where conversations are.
        drop(self.core.take_residencies());
        (events, encoded)
    }
}

/// Blocks of a prompt that the tiers had.
#[derive(Clone, Copy, Default)]
struct Found {
    device: usize,
    host: usize,
    disk: usize,
    /// Of what it encoded although it was reusable.
    reencode_cost: f64,
}

/// Whether the server hears of a conversation's end: so it is for this part of them, the same in each replay.
fn is_told(conversation: KvKey, part: f64) -> bool {
    let hash = blake3::hash(&conversation.0.to_le_bytes());
    let (first, _) = hash.as_bytes().split_at(4);
    let drawn = first.iter().fold(0, |drawn, byte| drawn << 8 | u32::from(*byte));
    f64::from(drawn) < part * f64::from(u32::MAX)
}
