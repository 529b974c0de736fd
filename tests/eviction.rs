//! Is the evictor worth what it is said to be, on a day of chat that is made here?
//!
//! A short stand-in for `make eviction`, which replays real traces: conversations that mostly end after their first turn,
//! some pasted documents that nobody asks about twice, and system prompts that tenants share. The replay by silence alone
//! must agree with a cache of blocks that is written here and shares nothing with the engine.

#![expect(clippy::unwrap_used, reason = "a test: what can't be had fails it")]

use std::collections::{BTreeMap, BTreeSet, HashMap};

use rekindle::engine::Policy;
use rekindle::engine::replay::trace::{End, Request, Trace};
use rekindle::engine::replay::{Given, Outcome, ReplaySettings, replay};
use rekindle::types::{KvKey, TenantId, Tick, TokenCount};

const BLOCK: u32 = 16;
const CONVERSATIONS: u128 = 5_000;
const TENANTS: u32 = 8;
const SECOND: u64 = 1_000_000;

/// SplitMix64 (Steele et al., OOPSLA '14).
struct Luck(u64);

impl Luck {
    /// From 0 to 1.
    fn draw(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Exponential.
    fn about(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.draw()).ln()
    }
}

/// Turns in order of time: at, conversation, turn, new tokens, answer.
fn turns() -> Vec<(u64, u128, u32, u32, u32)> {
    let mut luck = Luck(7);
    let mut turns = Vec::new();
    for conversation in 0..CONVERSATIONS {
        let mut at = conversation as u64 * SECOND + (luck.draw() * 1e6) as u64;
        let is_document = luck.draw() < 0.25;
        for turn in 1.. {
            let new = if turn == 1 && is_document { 1500.0 + luck.about(1500.0) } else { 20.0 + luck.about(80.0) };
            turns.push((at, conversation, turn, new as u32, 20 + luck.about(150.0) as u32));
            let goes_on = match turn {
                1 if is_document => 0.1,
                1 => 0.35,
                2 => 0.6,
                _ => 0.8,
            };
            if luck.draw() > goes_on {
                break;
            }
            at += (5.0 * 1e6) as u64 + (luck.about(60.0) * 1e6) as u64;
        }
    }
    turns.sort_unstable();
    turns
}

fn trace() -> Trace {
    let mut requests: Vec<Request> = Vec::new();
    let mut last: HashMap<u128, usize> = HashMap::new();
    let mut first_of: HashMap<TenantId, usize> = HashMap::new();
    for (at, conversation, turn, new, answer) in turns() {
        // Half of the tenants' conversations are the first two's.
        let tenant = TenantId(
            (conversation % 2) as u32 + if conversation % 4 < 2 { 0 } else { conversation as u32 % TENANTS / 2 * 2 },
        );
        let tenant = TenantId(tenant.0 % TENANTS);
        let system = TokenCount(160);
        let number = requests.len();
        let follows = match last.get(&conversation) {
            Some(before) => Some((*before, requests[*before].sequence())),
            None => first_of.get(&tenant).map(|first| (*first, system)),
        };
        first_of.entry(tenant).or_insert(number);
        let history = follows.map_or(system, |(_, shared)| shared);
        let prompt = TokenCount(history.0 + new);
        let (answer, end) = (TokenCount(answer), End::Other);
        requests.push(Request {
            at: Tick(at),
            tenant,
            conversation: KvKey(conversation),
            turn,
            prompt,
            answer,
            follows,
            end,
        });
        last.insert(conversation, number);
    }
    Trace { requests, ..Trace::default() }
}

fn settings(trace: &Trace, share: f64, policy: Policy) -> ReplaySettings {
    ReplaySettings {
        policy,
        device_tokens: (trace.distinct_tokens() as f64 * share) as u64,
        host_tokens: 0,
        disk_tokens: 0,
        block_tokens: BLOCK,
        device_token_bytes: 100,
        token_bytes: 100,
        warm_up: 0.25,
        last: None,
        ends: 0.0,
        one_tenant: true,
        given: BTreeMap::new(),
        doubles_at: 30_000.0,
        weighs_length: false,
        journal_entries: 100_000,
    }
}

fn run(trace: &Trace, settings: &ReplaySettings) -> Outcome {
    replay(trace, settings, &mut |_, _| {}).unwrap()
}

fn percent(outcome: &Outcome) -> f64 {
    100.0 * outcome.all.reencoded_tokens as f64 / outcome.all.reusable_tokens as f64
}

/// Blocks by the time of their last use, in a plain ordered set: what LRU is, tail first.
fn plain_lru(trace: &Trace, share: f64) -> f64 {
    let capacity = (trace.distinct_tokens() as f64 * share) as usize / BLOCK as usize;
    let mut sequences: Vec<Vec<u32>> = Vec::new();
    let mut fresh = 0;
    let mut by_use: BTreeSet<(usize, i64, u32)> = BTreeSet::new();
    let mut used: HashMap<u32, (usize, i64)> = HashMap::new();
    let (mut again, mut all) = (0, 0);
    for (number, request) in trace.requests.iter().enumerate() {
        let blocks = |tokens: TokenCount| (tokens.0 / BLOCK) as usize;
        let mut sequence: Vec<u32> = request
            .follows
            .map(|(before, shared)| sequences[before].iter().copied().take(blocks(shared)).collect())
            .unwrap_or_default();
        let reusable = sequence.len();
        while sequence.len() < blocks(request.sequence()) {
            sequence.push(fresh);
            fresh += 1;
        }
        let found = sequence.iter().take(reusable).take_while(|block| used.contains_key(block)).count();
        if number >= trace.requests.len() / 4 {
            all += reusable;
            again += reusable - found;
        }
        for (depth, block) in (0..).zip(&sequence) {
            if let Some((at, depth)) = used.insert(*block, (number, -depth)) {
                by_use.remove(&(at, depth, *block));
            }
            by_use.insert((number, -depth, *block));
        }
        while used.len() > capacity {
            let (_, _, block) = by_use.pop_first().unwrap();
            used.remove(&block);
        }
        sequences.push(sequence);
    }
    100.0 * again as f64 / all as f64
}

#[test]
fn by_silence_alone_it_is_a_plain_lru_of_blocks() {
    let trace = trace();
    for share in [0.01, 0.03, 0.1] {
        let (replayed, plain) =
            (percent(&run(&trace, &settings(&trace, share, Policy::Lru))), plain_lru(&trace, share));
        println!("{share}: replayed {replayed:.2} %, plain {plain:.2} %");
        assert!((replayed - plain).abs() < 1.0, "{share}: replayed {replayed:.2} %, plain {plain:.2} %");
    }
}

#[test]
fn what_was_learned_is_worth_memory_and_never_costs_much() {
    let trace = trace();
    for (share, least_gain) in [(0.005, 3.0), (0.01, 3.0), (0.02, 2.0), (0.1, -0.3), (0.5, -0.3)] {
        let [lru, learned] =
            [Policy::Lru, Policy::ReturnRate].map(|policy| percent(&run(&trace, &settings(&trace, share, policy))));
        println!("{share}: LRU {lru:.2} %, return rate {learned:.2} %");
        assert!(lru - learned >= least_gain, "{share}: LRU {lru:.2} %, return rate {learned:.2} %");
    }
}

#[test]
fn knowing_of_ends_is_worth_more_still() {
    let trace = trace();
    let plain = settings(&trace, 0.02, Policy::ReturnRate);
    let told = ReplaySettings { ends: 0.5, ..plain.clone() };
    let (without, with) = (percent(&run(&trace, &plain)), percent(&run(&trace, &told)));
    assert!(without - with > 3.0, "without {without:.2} %, with half of the ends told {with:.2} %");
}

#[test]
fn a_tenant_that_scans_costs_the_others_little() {
    let trace = trace();
    let mut luck = Luck(9);
    let scan = (0..4_000u32).map(|number| Request {
        at: Tick((1_000.0 * 1e6 + luck.draw() * 4_000.0 * 1e6) as u64),
        tenant: TenantId(TENANTS),
        conversation: KvKey(1 << 64 | u128::from(number)),
        turn: 1,
        prompt: TokenCount(300),
        answer: TokenCount(64),
        follows: None,
        end: End::Other,
    });
    let mut all: Vec<(Request, Option<usize>)> = trace.requests.iter().copied().zip((0..).map(Some)).collect();
    all.extend(scan.map(|request| (request, None)));
    all.sort_by_key(|(request, _)| request.at);
    let places: HashMap<usize, usize> =
        all.iter().zip(0..).filter_map(|((_, own), place)| Some(((*own)?, place))).collect();
    let requests = all.iter().map(|(request, _)| Request {
        follows: request.follows.map(|(before, shared)| (places[&before], shared)),
        ..*request
    });
    let scanned = Trace { requests: requests.collect(), ..Trace::default() };
    let tenants = |policy| ReplaySettings { one_tenant: false, ..settings(&trace, 0.02, policy) };
    let others = |trace: &Trace, policy| {
        let outcome = run(trace, &tenants(policy));
        let others = &outcome.tenants[..TENANTS as usize];
        let again: u64 = others.iter().map(|tenant| tenant.reencoded_tokens).sum();
        100.0 * again as f64 / others.iter().map(|tenant| tenant.reusable_tokens).sum::<u64>() as f64
    };
    let rise = |policy| others(&scanned, policy) - others(&trace, policy);
    let (lru, learned) = (rise(Policy::Lru), rise(Policy::ReturnRate));
    println!("the others' rise: LRU {lru:.2} points, return rate {learned:.2}");
    assert!(learned < 3.0 && learned < lru, "LRU {lru:.2} points, return rate {learned:.2}");
}

#[test]
fn a_tenant_has_the_floor_and_the_ceiling_that_it_is_given_for_the_replay() {
    let trace = trace();
    let plain = ReplaySettings { one_tenant: false, ..settings(&trace, 0.02, Policy::Lru) };
    let pool = plain.device_tokens * plain.device_token_bytes;
    let again = |given| {
        let given = BTreeMap::from([(TenantId(0), given)]);
        run(&trace, &ReplaySettings { given, ..plain.clone() }).tenants[0].reencoded_tokens
    };
    let (half, as_it_was) = (again(Given { floor: Some(pool / 2), ceiling: Some(pool) }), again(Given::default()));
    let held_down = again(Given { floor: Some(0), ceiling: Some(1) });
    assert_eq!(as_it_was, run(&trace, &plain).tenants[0].reencoded_tokens);
    assert!(half < as_it_was && as_it_was < held_down, "{half}, {as_it_was}, {held_down}");
}

#[test]
fn the_same_trace_gives_the_same_journal_entry_for_entry() {
    let trace = trace();
    let settings = ReplaySettings { host_tokens: 100_000, ..settings(&trace, 0.01, Policy::ReturnRate) };
    let (first, second) = (run(&trace, &settings), run(&trace, &settings));
    assert!(first.journal.len() > 1_000 && first.all.host_tokens > 0 && first.bytes_up > 0);
    assert_eq!(first, second);
    assert!(settings.sentence(first.journal.last().unwrap()).contains("comes back"));
}
