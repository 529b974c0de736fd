//! Does the running engine keep what its handles promise?

use std::time::Duration;

use super::*;
use crate::engine::status::ResidencyState;
use crate::engine::{
    FinishReason, KvHandle, Sampling, TurnEvents, TurnFailure, TurnHandle, TurnRequest, TurnShape, TurnUsage,
};
use crate::model::fake::FakeModel;
use crate::types::{TenantId, TenantKey, TokenId};

const VOCAB: usize = 64;
const SIZE: BlockSize = BlockSize(16);
/// Bytes of a block of the fake model.
const BLOCK: u64 = 32 * 16;

fn settings(device_blocks: u64, host_blocks: u64) -> EngineSettings {
    EngineSettings {
        block_size: SIZE,
        cold: ColdDtype::Same,
        device_bytes: device_blocks * BLOCK,
        host_bytes: host_blocks * BLOCK,
        disk: None,
        background_offload: true,
        policy: Policy::ReturnRate,
        doubles_at: None,
        journal_entries: 100,
        max_running: 8,
        step_tokens: TokenCount(64),
        queue_depth: 16,
        reuse: true,
        flight: None,
    }
}

fn engine(settings: EngineSettings) -> Engine {
    start(Box::new(FakeModel::new(VOCAB, TokenCount(100_000))), settings).unwrap()
}

fn kv(engine: &Engine, key: u128) -> KvHandle {
    engine.handle.kv(TenantId(0), TenantKey([7; 32]), KvKey(key))
}

fn ask(prompt: &[TokenId], max_tokens: u32) -> TurnRequest {
    TurnRequest {
        prompt: prompt.into(),
        encoded_before: TokenCount(0),
        shape: TurnShape { number: 1, new_tokens: TokenCount::of(prompt) },
        sampling: Sampling::default(),
        max_tokens: TokenCount(max_tokens),
        stop_tokens: [].into(),
        queue_deadline: Duration::from_secs(60),
        logprobs: None,
    }
}

fn tokens(seed: u32, n: u32) -> Vec<TokenId> {
    (0..n).map(|index| TokenId((seed * 31 + index * 7 + index / 5) % VOCAB as u32)).collect()
}

/// What the model says alone, with no blocks at all.
fn alone(prompt: &[TokenId], n: usize) -> Vec<TokenId> {
    let mut flat = FakeModel::new(VOCAB, TokenCount(100_000)).flat();
    prompt.iter().for_each(|token| flat.push(*token));
    let mut said = Vec::new();
    for _ in 0..n {
        let logits = flat.logits();
        let best = (0..VOCAB).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        said.push(TokenId(best as u32));
        flat.push(TokenId(best as u32));
    }
    said
}

/// All that a turn says.
async fn listen(mut events: TurnEvents) -> (Vec<TokenId>, Result<(FinishReason, TurnUsage), TurnFailure>) {
    let mut said = Vec::new();
    loop {
        match events.next().await.expect("a turn ends before its channel") {
            TurnEvent::Started(_) => {}
            TurnEvent::Token(token) => said.push(token.id),
            TurnEvent::Finished { reason, usage } => return (said, Ok((reason, usage))),
            TurnEvent::Failed(failure) => return (said, Err(failure)),
        }
    }
}

async fn turn(kv: &mut KvHandle, prompt: &[TokenId], n: u32) -> (Vec<TokenId>, TurnUsage) {
    let (_turn, events) = kv.start_turn(ask(prompt, n)).unwrap();
    let (said, end) = listen(events).await;
    (said, end.unwrap().1)
}

fn stop(engine: Engine) {
    engine.handle.shut_down();
    engine.join.join().unwrap();
}

#[tokio::test]
async fn an_answer_is_the_same_hot_reloaded_and_alone() {
    let engine = engine(settings(64, 64));
    let mut kv = kv(&engine, 1);
    let mut log = tokens(1, 100);
    let (said, usage) = turn(&mut kv, &log, 20).await;
    assert_eq!(said, alone(&log, 20));
    assert_eq!(usage.prompt.encoded, TokenCount(100));
    log.extend(said);

    log.extend(tokens(2, 5));
    let (said, usage) = turn(&mut kv, &log, 20).await;
    assert_eq!(said, alone(&log, 20));
    assert_eq!((usage.prompt.resident, usage.prompt.encoded), (TokenCount(119), TokenCount(6)), "the last was not fed");
    log.extend(said);

    let offloaded = kv.offload(OffloadTo::Host).await.unwrap();
    assert_eq!(offloaded.bytes, 9 * BLOCK);
    let residency = engine.handle.residency(kv.key()).unwrap();
    assert_eq!((residency.state, residency.device.tokens), (ResidencyState::Offloaded, TokenCount(0)));
    log.extend(tokens(3, 5));
    let (said, usage) = turn(&mut kv, &log, 20).await;
    assert_eq!(said, alone(&log, 20));
    assert_eq!((usage.prompt.reloaded_host, usage.prompt.encoded), (TokenCount(144), TokenCount(6)));
    stop(engine);
}

#[tokio::test]
async fn what_two_conversations_share_is_split_and_their_tenant_holds_it_once() {
    let engine = engine(settings(64, 0));
    let (mut one, mut other) = (kv(&engine, 1), kv(&engine, 2));
    let shared = tokens(1, 4 * 16);
    turn(&mut one, &[&shared[..], &tokens(2, 16)].concat(), 2).await;
    turn(&mut other, &[&shared[..], &tokens(3, 20)].concat(), 2).await;
    let [device, host, _] = engine.handle.holding(one.key()).await.unwrap();
    // A block and a part of one of its own, and half of four.
    assert_eq!((device.bytes, host.bytes), ((2 + 4 / 2) * BLOCK, 0));
    let [others, ..] = engine.handle.holding(other.key()).await.unwrap();
    let shown = || engine.handle.accounts().0.tenants.first().map(|tenant| tenant.tiers[0].held.bytes);
    for _ in 0..1000 {
        if shown() == Some(8 * BLOCK) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (accounts, now) = engine.handle.accounts();
    let held = accounts.tenants[0].tiers[0].held;
    assert_eq!((held.bytes, held.bytes), (device.bytes + others.bytes, 8 * BLOCK));
    assert!(held.byte_us > 0 && held.byte_seconds(accounts.at, Tick(now.0 + 10_000_000)) >= 10 * held.bytes);
    assert!(device.byte_us > others.byte_us, "it came first");
    other.forget().await.unwrap();
    let [device, ..] = engine.handle.holding(one.key()).await.unwrap();
    assert_eq!(device.bytes, 6 * BLOCK, "what they shared is its own now");
    stop(engine);
}

#[tokio::test]
async fn many_conversations_share_a_pool_that_holds_few_and_nothing_is_encoded_twice() {
    let engine = engine(settings(40, 1000));
    let mut conversations: Vec<_> = (0..24u32).map(|n| (kv(&engine, n.into()), tokens(n, 60))).collect();
    for round in 0..4 {
        for few in conversations.chunks_mut(6) {
            let mut running = Vec::new();
            for (kv, log) in few.iter_mut() {
                let encoded_before = TokenCount(if round == 0 { 0 } else { TokenCount::of(log).0 - 1 });
                log.extend(tokens(round, 7));
                running.push(kv.start_turn(TurnRequest { encoded_before, ..ask(log, 9) }).unwrap());
            }
            for ((_turn, events), (_, log)) in running.into_iter().zip(few) {
                let (said, end) = listen(events).await;
                assert_eq!(said, alone(log, 9));
                let prompt = end.unwrap().1.prompt;
                assert_eq!(prompt.cached().0 + prompt.encoded.0, TokenCount::of(log).0);
                assert_eq!(prompt.reencoded, TokenCount(0));
                log.extend(said);
            }
        }
    }
    let status = engine.handle.status();
    assert!(status.evictions > 0 && status.reloaded_bytes > 0, "the pool holds few: {status:?}");
    stop(engine);
}

#[tokio::test]
async fn what_is_over_goes_first_unless_it_is_reopened_or_goes_on() {
    for (then, victim, rule) in [("nothing", 2, "ended"), ("reopen", 1, "lru"), ("turn", 1, "lru")] {
        let engine = engine(settings(16, 0));
        let (mut first, mut second, mut third) = (kv(&engine, 1), kv(&engine, 2), kv(&engine, 3));
        let log = tokens(2, 60);
        turn(&mut first, &tokens(1, 60), 4).await;
        // Told while it runs: it is over after its turn, unless that is taken back before.
        let (_turn, events) = second.start_turn(ask(&log, 4)).unwrap();
        engine.handle.end(KvKey(2)).unwrap();
        let (said, _) = listen(events).await;
        match then {
            "reopen" => engine.handle.reopen(KvKey(2)).unwrap(),
            "turn" => drop(turn(&mut second, &[log, said, tokens(3, 1)].concat(), 1).await),
            _ => {}
        }
        // The pool has room for this and one of the two.
        turn(&mut third, &tokens(9, 160), 1).await;
        for key in [1, 2] {
            let eviction = engine.handle.residency(KvKey(key)).unwrap().last_eviction;
            let found = eviction.map(|eviction| eviction.rule);
            assert_eq!(found, (key == victim).then_some(rule), "conversation {key} after its end and then: {then}");
        }
        stop(engine);
    }
}

#[tokio::test]
async fn a_listener_that_goes_away_cancels_its_turn() {
    let engine = engine(settings(4000, 0));
    let mut kv = kv(&engine, 1);
    let (turn, mut events) = kv.start_turn(ask(&tokens(1, 40), 50_000)).unwrap();
    while !matches!(events.next().await, Some(TurnEvent::Token(_))) {}
    drop(turn);
    let (_, end) = listen(events).await;
    assert_eq!(end.unwrap().0, FinishReason::Cancelled);
    let status = engine.handle.status();
    assert_eq!((status.running, status.turns_cancelled), (0, 1));
    stop(engine);
}

#[tokio::test]
async fn a_slow_listener_slows_nobody_and_misses_nothing() {
    let engine = engine(settings(400, 0));
    let (mut slow, mut quick) = (kv(&engine, 1), kv(&engine, 2));
    let (_slow_turn, slow_events) = slow.start_turn(ask(&tokens(1, 40), 500)).unwrap();
    let (said, _) = turn(&mut quick, &tokens(2, 40), 600).await;
    assert_eq!(said, alone(&tokens(2, 40), 600));
    let (said, _) = listen(slow_events).await;
    assert_eq!(said, alone(&tokens(1, 40), 500));
    stop(engine);
}

#[tokio::test]
async fn a_turn_that_can_get_no_place_in_time_is_told_so() {
    let engine = engine(EngineSettings { max_running: 1, ..settings(4000, 0) });
    let (mut first, mut second) = (kv(&engine, 1), kv(&engine, 2));
    let (_running, mut events) = first.start_turn(ask(&tokens(1, 40), 60_000)).unwrap();
    events.next().await.unwrap();
    let hurried = TurnRequest { queue_deadline: Duration::from_millis(1), ..ask(&tokens(2, 10), 1) };
    let (_waiting, waiting) = second.start_turn(hurried).unwrap();
    let (_, end) = listen(waiting).await;
    assert!(matches!(end, Err(TurnFailure::QueueTimeout { .. })), "{end:?}");
    stop(engine);
}

#[tokio::test]
async fn more_turns_than_may_wait_are_refused() {
    let engine = engine(EngineSettings { max_running: 1, queue_depth: 3, ..settings(4000, 0) });
    let mut kvs: Vec<KvHandle> = (0..6).map(|key| kv(&engine, key)).collect();
    let mut turns: Vec<(TurnHandle, TurnEvents)> = Vec::new();
    let first = kvs[0].start_turn(ask(&tokens(1, 40), 60_000)).unwrap();
    turns.push(first);
    turns[0].1.next().await.unwrap();
    let mut refused = 0;
    for kv in &mut kvs[1..] {
        match kv.start_turn(ask(&tokens(2, 10), 1)) {
            Ok(turn) => turns.push(turn),
            Err(SubmitError::Overloaded { queued: 3 }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(refused, 2);
    // The queue moves on once the first is gone.
    turns.remove(0);
    for (_turn, events) in turns {
        assert_eq!(listen(events).await.0, alone(&tokens(2, 10), 1));
    }
    stop(engine);
}

#[tokio::test]
async fn forgetting_gives_every_block_back_and_offloading_waits_for_no_running_turn() {
    let engine = engine(settings(4000, 100));
    let mut kv = kv(&engine, 1);
    let (running, mut events) = kv.start_turn(ask(&tokens(1, 40), 50_000)).unwrap();
    events.next().await.unwrap();
    assert_eq!(kv.offload(OffloadTo::Host).await, Err(SubmitError::Busy));
    assert_eq!(kv.offload(OffloadTo::None).await, Err(SubmitError::Busy));
    drop(running);
    assert_eq!(listen(events).await.1.unwrap().0, FinishReason::Cancelled);
    let key = kv.key();
    let forgotten = kv.forget().await.unwrap();
    assert!(forgotten.device_bytes >= 3 * BLOCK, "{forgotten:?}");
    assert_eq!(engine.handle.residency(key), None);
    let mut other = self::kv(&engine, 2);
    turn(&mut other, &tokens(1, 40), 1).await;
    other.forget().await.unwrap();
    let status = engine.handle.status();
    assert_eq!((status.device.free, status.host.free), (status.device.total, status.host.total));
    stop(engine);
}

#[tokio::test]
async fn shutting_down_ends_what_runs_and_what_waits_as_cancelled() {
    let engine = engine(EngineSettings { max_running: 1, ..settings(4000, 0) });
    let (mut first, mut second) = (kv(&engine, 1), kv(&engine, 2));
    let (_a, mut running) = first.start_turn(ask(&tokens(1, 40), 60_000)).unwrap();
    let (_b, waiting) = second.start_turn(ask(&tokens(2, 40), 10)).unwrap();
    running.next().await.unwrap();
    engine.handle.shut_down();
    assert_eq!(listen(running).await.1.unwrap().0, FinishReason::Cancelled);
    assert_eq!(listen(waiting).await.1.unwrap().0, FinishReason::Cancelled);
    let handle = engine.handle.clone();
    engine.join.join().unwrap();
    let mut third = handle.kv(TenantId(0), TenantKey([7; 32]), KvKey(3));
    assert_eq!(third.start_turn(ask(&tokens(1, 4), 1)).err(), Some(SubmitError::Gone));
}

#[test]
fn a_pool_too_small_for_any_conversation_is_refused_by_name() {
    let small = EngineSettings { device_bytes: BLOCK, ..settings(0, 0) };
    let error = start(Box::new(FakeModel::new(VOCAB, TokenCount(100))), small).err().unwrap().to_string();
    assert_eq!(
        error,
        "`kv.device_bytes` = 512 holds 1 block of 512 bytes, and a conversation needs 4 or more; set it to 2048 or more"
    );
}
