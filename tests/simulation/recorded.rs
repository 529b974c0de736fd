//! Does the flight record hold all that decisions came of?
//!
//! The same simulated days as for the answers: evictions over all tiers, pins, forks, offloads, forgets, failing steps and
//! transfers, preemptions, budgets that change, and processes that are killed. Each is recorded and replayed.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use rekindle::engine::Policy;
use rekindle::engine::flight::FlightSettings;
use rekindle::engine::replay::ReplaySettings;
use rekindle::engine::replay::record::{How, Record};
use rekindle::kv::journal::{Entry, Rule};
use rekindle::types::Tier;
use tempfile::TempDir;

use super::random::Luck;
use super::world::{Damage, Scenario, World};

const SEEDS: u64 = 60;
const STEPS: u64 = 1_500;
const RUNS: usize = 3;

/// A world's record, in a folder that goes with it.
struct Recorded {
    folder: TempDir,
    journal: Vec<Entry>,
    found: [u64; 3],
}

fn flight(folder: &TempDir) -> FlightSettings {
    FlightSettings { folder: folder.path().join("flight"), bytes: 256 << 20 }
}

/// A world whose process is killed and started again, or one whose memory is damaged.
fn recorded(seed: u64) -> Recorded {
    let folder = TempDir::with_prefix("rekindle-flight-").unwrap();
    let flight = flight(&folder);
    let damage = if seed.is_multiple_of(4) { Damage::Host } else { Damage::None };
    let mut world = World::recorded(Scenario::draw(seed, STEPS).with(damage), &flight);
    let runs = if damage == Damage::None { RUNS } else { 1 };
    let mut found = [0; 3];
    for run in 0..runs {
        if run > 0 {
            world = world.killed(&flight);
        }
        world.live();
        let told = world.found();
        found = std::array::from_fn(|tier| found[tier] + told[tier]);
    }
    Recorded { journal: world.stop(), folder, found }
}

fn as_recorded(record: &Record) -> ReplaySettings {
    ReplaySettings { warm_up: 0.0, journal_entries: 1_000_000, ..record.settings() }
}

fn parts(folder: &Path) -> Vec<PathBuf> {
    let mut parts: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    parts.sort();
    parts
}

#[test]
fn a_recorded_day_is_decided_again_entry_for_entry() {
    let journals: Vec<Vec<Entry>> = (0..SEEDS)
        .into_par_iter()
        .map(|seed| {
            let Recorded { folder, journal, found } = recorded(seed);
            let record = Record::read(&flight(&folder).folder).unwrap();
            assert!(record.faults.is_empty(), "seed {seed}: {:?}", record.faults);
            let settings = as_recorded(&record);
            let (outcome, how) =
                record.replay(&settings, &mut |_, _| {}).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert_eq!(how, How::AsRecorded);
            let first = journal.iter().zip(&outcome.journal).find(|(really, again)| really != again);
            assert_eq!(first, None, "seed {seed}: the first that differs");
            assert_eq!(outcome.journal.len(), journal.len(), "seed {seed}");
            let all = outcome.all;
            assert_eq!([all.device_tokens, all.host_tokens, all.disk_tokens], found, "seed {seed}");
            journal
        })
        .collect();
    // A record in which nothing happens proves nothing.
    let count = |what: &dyn Fn(&Entry) -> bool| journals.iter().flatten().filter(|entry| what(entry)).count();
    for (what, count) in [
        ("preemptions", count(&|entry| entry.rule == Rule::Preempted)),
        ("by return rate", count(&|entry| entry.rule == Rule::ReturnRate)),
        ("by silence", count(&|entry| entry.rule == Rule::Lru)),
        ("over a ceiling", count(&|entry| entry.rule == Rule::OverCeiling)),
        ("that were over", count(&|entry| entry.rule == Rule::Ended)),
        ("on request", count(&|entry| entry.rule == Rule::Requested)),
        ("from the host", count(&|entry| entry.from == Tier::Host)),
        ("from disk", count(&|entry| entry.from == Tier::Disk)),
    ] {
        println!("{count} {what}");
        assert!(count > 100, "only {count} {what}");
    }
}

#[test]
fn under_another_policy_the_same_turns_come_and_other_decisions_are_made() {
    let Recorded { folder, journal, .. } = recorded(5);
    let record = Record::read(&flight(&folder).folder).unwrap();
    let own = as_recorded(&record);
    let other = if own.policy == Policy::Lru { Policy::ReturnRate } else { Policy::Lru };
    let (outcome, how) = record.replay(&ReplaySettings { policy: other, ..own }, &mut |_, _| {}).unwrap();
    assert_eq!((how, outcome.all.requests), (How::WhatIf, record.trace.requests.len() as u64));
    assert!(!outcome.journal.is_empty() && outcome.journal != journal);
}

#[test]
fn a_torn_or_changed_record_is_read_up_to_there() {
    let Recorded { folder, journal, .. } = recorded(1);
    let folder = flight(&folder).folder;
    let part = parts(&folder).remove(0);
    let whole = fs::read(&part).unwrap();
    let luck = &mut Luck::new(11);
    for attempt in 0..30 {
        let at = luck.between(1, whole.len() - 1);
        let mut bytes = whole.clone();
        if attempt % 2 == 0 {
            bytes.truncate(at);
        } else {
            bytes[at] ^= luck.between(1, 255) as u8;
        }
        fs::write(&part, &bytes).unwrap();
        let record = Record::read(&folder).unwrap();
        assert!(!record.faults.is_empty(), "byte {at}, attempt {attempt}");
        // What is replayed of that run is its front, and the runs after it are as they were.
        let (outcome, _) = record.replay(&as_recorded(&record), &mut |_, _| {}).unwrap();
        let same = outcome.journal.iter().zip(&journal).take_while(|(again, really)| again == really).count();
        let after = outcome.journal.len() - same;
        assert_eq!(outcome.journal[same..], journal[journal.len() - after..], "byte {at}, attempt {attempt}");
    }
}

/// Bytes that somebody made, with sums that are right.
#[test]
fn no_record_whatever_it_says_panics() {
    const FRAME: usize = 8;
    let Recorded { folder, .. } = recorded(2);
    let folder = flight(&folder).folder;
    let part = parts(&folder).remove(0);
    let whole = fs::read(&part).unwrap();
    let luck = &mut Luck::new(12);
    for _ in 0..200 {
        let mut bytes = whole.clone();
        let mut at = FRAME;
        let chosen = luck.below(bytes.len() / (64 << 10) + 2);
        for chunk in 0.. {
            let length = u32::from_le_bytes(bytes[at..][..4].try_into().unwrap()) as usize;
            if chunk == chosen || at + FRAME + length >= bytes.len() {
                let body = &mut bytes[at + FRAME..][..length];
                body[luck.below(length)] = luck.next() as u8;
                let sum = crc_fast::crc32_iscsi(body).to_le_bytes();
                bytes[at + 4..][..4].copy_from_slice(&sum);
                break;
            }
            at += FRAME + length;
        }
        fs::write(&part, &bytes).unwrap();
        if let Ok(record) = Record::read(&folder) {
            drop(record.replay(&as_recorded(&record), &mut |_, _| {}));
        }
    }
}
