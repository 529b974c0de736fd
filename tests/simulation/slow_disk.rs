//! Is a turn that finds its history on a slow disk ever much slower than one that encodes it?
//!
//! The real core in simulated time: the model encodes so many tokens a second, and the disk gives so many bytes, more or
//! less, and now and then far fewer. From much slower than encoding to much faster.

use rekindle::engine::core::{Command, Core, CoreSettings, Event, StartTurn};
use rekindle::engine::{Sampling, TurnEvent, TurnRequest, TurnShape};
use rekindle::kv::KvSettings;
use rekindle::kv::block::PrefixHash;
use rekindle::kv::evictor::Policy;
use rekindle::kv::transfer::{Direction, TransferDone, TransferOrder};
use rekindle::model::Logits;
use rekindle::types::{
    BlockBytes, BlockCount, BlockSize, KvKey, TenantId, TenantKey, Tick, Tier, TokenCount, TokenId, TurnId,
};

use super::random::Luck;

const SIZE: BlockSize = BlockSize(16);
const BLOCK_BYTES: u64 = 100_000;
/// Of the history that a turn finds.
const HISTORY: usize = 1600;
const SAID: usize = 15;
const PREFILL_PER_S: u64 = 1000;
const TENANT: TenantId = TenantId(0);
const SECRET: TenantKey = TenantKey([9; 32]);
/// Turns that are measured, after those in which the core comes to know the disk.
const TURNS: usize = 300;
const WARM_UP: usize = 15;

/// A transfer on its way.
struct Coming {
    order: TransferOrder,
    began: Tick,
    ends: Tick,
}

struct World {
    core: Core,
    now: Tick,
    luck: Luck,
    /// Bytes a second; `None`: nothing comes from disk.
    disk: Option<u64>,
    disk_is_free: Tick,
    coming: Vec<Coming>,
    commands: Vec<Command>,
    turn: u64,
}

impl World {
    fn new(disk: Option<u64>) -> Self {
        let blocks = |tokens: usize| BlockCount((tokens / SIZE.0 as usize) as u32);
        let disk_blocks = blocks(if disk.is_some() { 4 * HISTORY } else { 0 });
        let core = Core::new(
            CoreSettings { max_running: 4, step_tokens: 128 },
            KvSettings {
                block_size: SIZE,
                block_bytes: BlockBytes::all(BLOCK_BYTES),
                device_blocks: blocks(4 * HISTORY),
                host_blocks: BlockCount(0),
                disk_blocks,
                window: TokenCount(2 * HISTORY as u32),
                background_offload: true,
                policy: Policy::ReturnRate,
                doubles_at: None,
                front_first_from: None,
                journal_entries: 16,
                reuse: true,
            },
        );
        let (luck, coming, commands) = (Luck::new(5), Vec::new(), Vec::new());
        Self { core, now: Tick(0), luck, disk, disk_is_free: Tick(0), coming, commands, turn: 0 }
    }

    /// What the disk takes for so many blocks: now and then it is busy with something else.
    fn takes_us(&mut self, blocks: usize) -> u64 {
        let per_s = self.disk.expect("there is a disk");
        let even = blocks as u64 * BLOCK_BYTES * 1_000_000 / per_s;
        let part = if self.luck.once_in(33) { self.luck.between(300, 1000) } else { self.luck.between(80, 120) };
        even * part as u64 / 100
    }

    /// One round of the engine's loop.
    fn step(&mut self) -> Vec<Event> {
        for Coming { order, began, ends } in self.coming.extract_if(.., |coming| coming.ends <= self.now) {
            // A slot's checksum is its number.
            let of_slot = |(from, to): &(u32, u32)| if order.direction == Direction::Load { *from } else { *to };
            let sums = order.pairs.iter().map(of_slot).map(Some).collect();
            let done = TransferDone { ticket: order.ticket, sums, took_us: ends.0 - began.0 };
            self.commands.push(Command::Transferred(done));
        }
        let mut plan = self.core.plan(self.now, &mut self.commands);
        for order in plan.orders.drain(..) {
            let began = self.now;
            let ends = match order.direction {
                Direction::Load => Tick(self.now.0.max(self.disk_is_free.0) + self.takes_us(order.pairs.len())),
                _ => self.now,
            };
            if order.direction == Direction::Load {
                self.disk_is_free = ends;
            }
            self.coming.push(Coming { order, began, ends });
        }
        let mut events = std::mem::take(&mut plan.events);
        let next = self.coming.iter().map(|coming| coming.ends.0).min().unwrap_or(u64::MAX);
        if plan.is_empty() {
            self.now.0 = next.clamp(self.now.0, self.now.0 + 1_000);
            return events;
        }
        self.now.0 += plan.tokens.len() as u64 * 1_000_000 / PREFILL_PER_S;
        let mut logits = Logits::default();
        logits.reset(plan.sampled.len(), 2).fill(0.0);
        self.core.commit(self.now, &plan, Ok(&mut logits), &mut events);
        events
    }

    /// One turn, of which all is on disk alone before; its time to the first token.
    fn turn(&mut self, key: KvKey, tokens: &[TokenId]) -> u64 {
        self.turn += 1;
        let request = TurnRequest {
            prompt: tokens.into(),
            encoded_before: TokenCount(0),
            shape: TurnShape { number: 1, new_tokens: TokenCount(SAID as u32) },
            sampling: Sampling::default(),
            max_tokens: TokenCount(1),
            stop_tokens: [].into(),
            queue_deadline: std::time::Duration::MAX,
            logprobs: None,
        };
        let hashes = PrefixHash::chain(&SECRET, tokens, SIZE);
        let start = StartTurn { turn: TurnId(self.turn), key, tenant: TENANT, tenant_key: SECRET, hashes, request };
        self.commands.push(Command::Start(Box::new(start)));
        let arrived = self.now;
        let mut first = None;
        while first.is_none() || !self.core.is_idle() {
            let events = self.step();
            if events.iter().any(|event| matches!(event, Event::Turn(_, TurnEvent::Started(_)))) {
                first = Some(self.now.0 - arrived.0);
            }
        }
        // Down to disk, or away, and whatever hangs comes to its end: the next turn is another day's.
        let gone = if self.disk.is_some() { Command::Leave(key, Tier::Disk) } else { Command::LetGo(key) };
        self.commands.push(gone);
        let mut left = false;
        while !left || !self.coming.is_empty() {
            let events = self.step();
            left |= events.iter().any(|event| matches!(event, Event::Left(..) | Event::Forgotten(..)));
            self.now.0 += 1;
        }
        first.expect("the loop ends with it")
    }

    /// Times to the first token of turns that go on with one history, each from its end.
    fn first_tokens(mut self) -> Vec<u64> {
        let tokens: Vec<TokenId> = (0..HISTORY + SAID).map(|i| TokenId(i as u32)).collect();
        let times: Vec<u64> = (0..WARM_UP + TURNS).map(|_| self.turn(KvKey(1), &tokens)).collect();
        self.core.manager().assert_invariants();
        times[WARM_UP..].to_vec()
    }
}

#[test]
fn a_slow_disk_never_costs_much_more_than_encoding() {
    let encoding = *World::new(None).first_tokens().iter().max().unwrap();
    assert!(encoding >= (HISTORY + SAID) as u64 * 1_000_000 / PREFILL_PER_S);
    // At this speed the disk takes as long as encoding.
    let even = HISTORY as u64 / u64::from(SIZE.0) * BLOCK_BYTES * PREFILL_PER_S / HISTORY as u64;
    let mut medians = Vec::new();
    for percent in [5, 20, 50, 80, 100, 125, 200, 500, 2_000, 10_000] {
        let mut times = World::new(Some(even * percent / 100)).first_tokens();
        times.sort_unstable();
        let (median, p95) = (times[TURNS / 2], times[TURNS * 95 / 100]);
        println!("disk at {percent} %: {} and {} % of encoding", median * 100 / encoding, p95 * 100 / encoding);
        assert!(p95 <= encoding * 110 / 100, "disk at {percent} %: p95 {p95} us, encoding {encoding} us");
        medians.push(median);
    }
    assert!(medians[4] < encoding * 70 / 100, "half is encoded while half comes: {medians:?} us, {encoding} us");
    assert!(medians[9] < encoding * 10 / 100, "a quick disk is used: {medians:?} us, {encoding} us");
}
