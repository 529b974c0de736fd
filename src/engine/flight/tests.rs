//! Is the record within its bound, without content, and does its trace say who followed whom?

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::recorder::Scribe;
use super::*;
use crate::engine::core::StartTurn;
use crate::engine::replay::ReplaySettings;
use crate::engine::replay::record::{How, Record, RecordError};
use crate::engine::replay::times::Work;
use crate::engine::{Sampling, TurnRequest, TurnShape};
use crate::kv::block::PrefixHash;
use crate::kv::evictor::Policy;
use crate::types::{BlockBytes, BlockCount, BlockSize, TokenCount};

const SIZE: BlockSize = BlockSize(16);
const KEY: TenantKey = TenantKey([0xa7; 32]);

fn beginning() -> Beginning {
    let kv = KvSettings {
        block_size: SIZE,
        block_bytes: BlockBytes::all(64),
        device_blocks: BlockCount(600),
        host_blocks: BlockCount(0),
        disk_blocks: BlockCount(0),
        window: TokenCount(8000),
        background_offload: false,
        policy: Policy::Lru,
        doubles_at: None,
        front_first_from: None,
        journal_entries: 100,
        reuse: true,
    };
    let core = CoreSettings { max_running: 8, step_tokens: 4096 };
    Beginning { version: env!("CARGO_PKG_VERSION").to_owned(), tick_zero_us: 5, core, kv }
}

/// A server whose model says the same token again and again.
struct Server {
    core: crate::engine::core::Core,
    scribe: Scribe,
    now: Tick,
    turns: u64,
}

impl Server {
    fn start(folder: &Path, bytes: u64) -> Self {
        let settings = FlightSettings { folder: folder.to_owned(), bytes };
        let scribe = Scribe::begin(&settings, beginning(), Some(&DiskBefore::default())).unwrap();
        let core = crate::engine::core::Core::new(beginning().core, beginning().kv);
        Self { core, scribe, now: Tick(0), turns: 0 }
    }

    /// A turn to its end: a prompt, and so many times the token.
    fn turn(&mut self, key: u128, prompt: &[TokenId], answer: u32, token: TokenId) {
        self.turns += 1;
        let request = TurnRequest {
            prompt: prompt.into(),
            encoded_before: TokenCount(0),
            shape: TurnShape { number: 1, new_tokens: TokenCount(9) },
            sampling: Sampling::default(),
            max_tokens: TokenCount(answer),
            stop_tokens: Arc::from([]),
            queue_deadline: Duration::from_secs(1),
            logprobs: None,
        };
        let start = StartTurn {
            turn: TurnId(self.turns),
            key: KvKey(key),
            tenant: TenantId(0),
            tenant_key: KEY,
            hashes: PrefixHash::chain(&KEY, prompt, SIZE),
            request,
        };
        self.step(vec![Command::Start(Box::new(start))], token);
        while !self.core.is_idle() {
            self.step(Vec::new(), token);
        }
        self.scribe.write();
    }

    fn step(&mut self, mut commands: Vec<Command>, token: TokenId) {
        self.now.0 += 1000;
        let mut step = Step::begin(self.now, &commands);
        let mut plan = self.core.plan(self.now, &mut commands);
        step.plan(&plan.events);
        drop(std::mem::take(&mut plan.chores));
        let mut events = Vec::new();
        let tokens = vec![token; plan.sampled.len()];
        if !plan.is_empty() {
            self.core.commit_known(self.now, &plan, Ok(&tokens), &mut events);
            step.commit(self.now, false, &events);
        }
        self.scribe.step(&step);
    }
}

/// Tokens that nobody takes for anything else.
fn tokens(from: u32, count: u32) -> Vec<TokenId> {
    (from..from + count).map(|n| TokenId(0x00c0_ffee ^ n << 8)).collect()
}

fn bytes(folder: &Path) -> Vec<u8> {
    let files = std::fs::read_dir(folder).unwrap();
    files.flat_map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect()
}

fn settings(record: &Record) -> ReplaySettings {
    ReplaySettings { warm_up: 0.0, ..record.settings() }
}

#[test]
fn nothing_of_what_was_said_is_in_the_record() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1 << 20);
    let prompt = tokens(0, 100);
    let word = TokenId(0x00ab_cdef);
    server.turn(1, &prompt, 40, word);
    let bytes = bytes(folder.path());
    let contains = |what: &[u8]| bytes.windows(what.len()).any(|window| window == what);
    for token in prompt.iter().chain([&word]) {
        assert!(!contains(&token.0.to_le_bytes()) && !contains(&token.0.to_be_bytes()), "token {token}");
    }
    for hash in PrefixHash::chain(&KEY, &prompt, SIZE) {
        assert!(!contains(&hash.0[..4]), "{hash:?}");
    }
    assert!(!contains(&KEY.0[..4]));
    // Forty times the same word: each time another pseudonym. Some four bytes across the ends of entries are equal by chance.
    let mut fours: Vec<&[u8]> = bytes.windows(4).filter(|four| four.iter().all(|byte| *byte > 2)).collect();
    let all = fours.len();
    fours.sort_unstable();
    fours.dedup();
    assert!(all - fours.len() < 25, "{} of {all} are there again", all - fours.len());
}

#[test]
fn the_ring_keeps_to_its_bound_and_says_what_is_lost() {
    const BOUND: u64 = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(folder.path(), BOUND);
    for turn in 0..300 {
        server.turn(turn.into(), &tokens(turn * 3000, 2000), 20, TokenId(1));
        let held: u64 =
            std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(held <= BOUND, "{held} bytes");
        assert!(turn < 200 || held > BOUND / 2, "{held} bytes are far less than it may have");
    }
    let record = Record::read(folder.path()).unwrap();
    assert!(record.faults.iter().any(|fault| fault.contains("has lost its beginning")), "{:?}", record.faults);
    let settings = settings(&record);
    let (outcome, how) = record.replay(&settings, &mut |_, _| {}).unwrap();
    assert_eq!((how, outcome.all.requests), (How::WhatIf, record.trace.requests.len() as u64));
    assert!(record.trace.requests.len() > 50 && record.runs() == (1, 0));
    // The next process's run has its beginning, and is replayed as recorded.
    let mut server = Server::start(folder.path(), BOUND);
    (0..20).for_each(|turn| server.turn(turn, &tokens(0, 2000), 2, TokenId(1)));
    let record = Record::read(folder.path()).unwrap();
    assert_eq!(record.runs(), (2, 1));
    let (outcome, how) = record.replay(&settings, &mut |_, _| {}).unwrap();
    assert_eq!((how, outcome.all.requests), (How::AsRecorded, 20));
}

#[test]
fn the_trace_says_whom_a_turn_follows_and_how_far() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1 << 20);
    let (first, word) = (tokens(0, 100), TokenId(7));
    server.turn(1, &first, 10, word);
    // It goes on: all but the last word had been there, in the middle of a block.
    let second = [first.as_slice(), &[word; 10], &tokens(500, 30)].concat();
    server.turn(1, &second, 5, word);
    // Another conversation of the tenant has the same front, up to some place in a block.
    server.turn(2, &[&first[..70], &tokens(900, 9)].concat(), 5, word);
    server.turn(3, &tokens(2000, 64), 5, word);
    let record = Record::read(folder.path()).unwrap();
    let follows: Vec<_> =
        record.trace.requests.iter().map(|request| (request.prompt.0, request.answer.0, request.follows)).collect();
    // What is shared with another conversation counts by whole blocks.
    let expected =
        [(100, 10, None), (140, 5, Some((0, TokenCount(110)))), (79, 5, Some((1, TokenCount(64)))), (64, 5, None)];
    assert_eq!(follows, expected);
    let (outcome, how) = record.replay(&settings(&record), &mut |_, _| {}).unwrap();
    let all = outcome.all;
    assert_eq!((how, all.requests, all.reusable_tokens, all.reencoded_tokens), (How::AsRecorded, 4, 174, 1));
    assert_eq!(all.device_tokens, 109 + 64, "the last word's KV was never computed");
}

#[test]
fn steps_that_were_lost_end_the_replay_as_recorded_and_not_the_trace() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1 << 20);
    server.turn(1, &tokens(0, 100), 10, TokenId(7));
    server.scribe.step(&Step { lost_before: 3, planned: server.now, ..Step::default() });
    server.turn(2, &tokens(300, 100), 10, TokenId(7));
    let record = Record::read(folder.path()).unwrap();
    assert_eq!(record.faults, ["run 1 lacks 3 steps in its middle"]);
    let own = settings(&record);
    assert_eq!(record.replay(&own, &mut |_, _| {}).unwrap().0.all.requests, 1);
    let other = ReplaySettings { policy: Policy::ReturnRate, ..own };
    assert_eq!(record.replay(&other, &mut |_, _| {}).unwrap().0.all.requests, 2);
}

#[test]
fn the_last_hour_is_counted_on_the_memory_that_came_before_it() {
    const HOUR: Duration = Duration::from_hours(1);
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1 << 20);
    server.turn(1, &tokens(0, 160), 1, TokenId(7));
    server.now.0 += 2 * HOUR.as_micros() as u64;
    let longer = [tokens(0, 160), tokens(500, 16)].concat();
    server.turn(1, &longer, 1, TokenId(7));
    let record = Record::read(folder.path()).unwrap();
    let hour = ReplaySettings { last: Some(HOUR), ..record.settings() };
    let other = ReplaySettings { policy: Policy::ReturnRate, ..hour.clone() };
    for (settings, expected) in [(&hour, How::AsRecorded), (&other, How::WhatIf)] {
        let (outcome, how) = record.replay(settings, &mut |_, _| {}).unwrap();
        assert_eq!((how, outcome.all.requests, outcome.all.device_tokens), (expected, 1, 160));
        let work = Work {
            tenant: TenantId(0),
            cached: TokenCount(160),
            prompt: TokenCount(176),
            host_bytes: 0,
            disk_bytes: 0,
        };
        assert_eq!(outcome.works, [work]);
    }
    // Where a step of the hour's run is missing, what really happened to all of its turns is not known.
    server.scribe.step(&Step { lost_before: 3, planned: server.now, ..Step::default() });
    server.turn(2, &tokens(900, 100), 1, TokenId(7));
    let record = Record::read(folder.path()).unwrap();
    let (outcome, how) = record.replay(&hour, &mut |_, _| {}).unwrap();
    assert_eq!((how, outcome.all.requests), (How::WhatIf, 2));
}

#[test]
fn where_there_is_no_record_it_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let missing = Record::read(&folder.path().join("flight")).err().unwrap().to_string();
    assert!(missing.contains("there is no flight record"), "{missing}");
    drop(Server::start(folder.path(), 1 << 20));
    assert!(matches!(Record::read(folder.path()), Err(RecordError::NoTurns)));
}

/// What the engine's loop spends, and what the thread that writes.
#[test]
fn the_record_costs_a_small_part_of_a_step() {
    const STEPS: u32 = 4000;
    const ROWS: u32 = 8;
    let folder = tempfile::tempdir().unwrap();
    let settings = FlightSettings { folder: folder.path().to_owned(), bytes: 64 << 20 };
    let mut recorder = recorder::Recorder::start(&settings, beginning(), Some(&DiskBefore::default())).unwrap();
    let said = |turn| {
        let token = crate::engine::Token { id: TokenId(9), logprob: None };
        Event::Turn(TurnId(turn), TurnEvent::Token(token))
    };
    let events: Vec<Event> = (0..u64::from(ROWS)).map(said).collect();
    let started = std::time::Instant::now();
    for step in 0..STEPS {
        recorder.begin(Tick(step.into()), &[]);
        recorder.planned(&[]);
        recorder.committed(Tick(step.into()), false, &events);
        recorder.end_step();
    }
    let of_the_loop = started.elapsed() / STEPS;
    recorder.end();

    let mut server = Server::start(&folder.path().join("other"), 64 << 20);
    let prompt = tokens(0, 4000);
    server.turn(1, &prompt, 1, TokenId(1));
    let start = Command::Start(Box::new(StartTurn {
        turn: TurnId(7),
        key: KvKey(1),
        tenant: TenantId(0),
        tenant_key: KEY,
        hashes: PrefixHash::chain(&KEY, &tokens(1, 4000), SIZE),
        request: TurnRequest {
            prompt: tokens(1, 4000).into(),
            encoded_before: TokenCount(0),
            shape: TurnShape { number: 1, new_tokens: TokenCount(9) },
            sampling: Sampling::default(),
            max_tokens: TokenCount(STEPS),
            stop_tokens: Arc::from([]),
            queue_deadline: Duration::from_secs(1),
            logprobs: None,
        },
    }));
    let begun = Step::begin(Tick(1), &[start]);
    let started = std::time::Instant::now();
    server.scribe.step(&begun);
    let of_a_token = started.elapsed() / 4000;
    let mut decode = Step::begin(Tick(2), &[]);
    decode.commit(Tick(3), false, &[said(7)]);
    let started = std::time::Instant::now();
    for _ in 0..STEPS {
        server.scribe.step(&decode);
    }
    let of_a_decode = started.elapsed() / STEPS;
    println!(
        "the loop: {of_the_loop:?} a step of {ROWS} answers; the thread: {of_a_token:?} a new token, {of_a_decode:?} a step of \
         one answer"
    );
    // A step of the smallest model takes some 5 ms. Far above what is measured, for machines that are busy.
    assert!(of_the_loop < Duration::from_micros(50) && of_a_decode < Duration::from_micros(50));
}
