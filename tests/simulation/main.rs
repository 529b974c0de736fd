//! Does every turn get the answer that its conversation would get alone, whatever else happens?
//!
//! The core with a fake model whose next token is a digest of the KV it reads through the block table. A seed draws
//! tenants, turns, cancels, edits, forks, forgets, slow and reordered copies, failing steps and damaged host memory.
//! A failure prints its seed; `REKINDLE_SEED` repeats one, and `REKINDLE_SOAK=1` runs ten times as many steps.

mod conversation;
mod random;
#[cfg(test)]
mod recorded;
#[cfg(test)]
mod slow_disk;
mod world;

use rayon::prelude::*;
use world::{Damage, Scenario, Seen, World};

/// Steps of one seed.
const STEPS: u64 = 5_000;
/// Seeds of a plain run: half a million steps in all, 7 seconds of one core.
const SEEDS: u64 = 100;
/// Seeds of longer runs that found what these did not: 381, that what is here before a gap was put behind it.
const FOUND_A_FAULT: [u64; 1] = [381];

fn run(scenario: Scenario) -> Seen {
    World::new(scenario).run()
}

fn total(seen: impl ParallelIterator<Item = Seen>) -> Seen {
    seen.reduce(Seen::default, Seen::add)
}

#[test]
fn every_answer_is_the_one_that_the_conversation_alone_would_get() {
    if let Ok(seed) = std::env::var("REKINDLE_SEED") {
        let seed = seed.parse().expect("REKINDLE_SEED is a number");
        println!("{:#?}", run(Scenario::draw(seed, STEPS)));
        return;
    }
    let seeds = if std::env::var("REKINDLE_SOAK").is_ok_and(|soak| soak == "1") { 10 * SEEDS } else { SEEDS };
    let seeds: Vec<u64> = (0..seeds).chain(FOUND_A_FAULT).collect();
    let seen = total(seeds.into_par_iter().map(|seed| run(Scenario::draw(seed, STEPS))));
    println!("{seen:#?}");
    assert_eq!(seen.wrong_answers, 0);
    // A simulation in which nothing happens proves nothing.
    for (what, count) in [
        ("finished turns", seen.finished),
        ("cancelled turns", seen.cancelled),
        ("failed turns", seen.failed),
        ("preemptions", seen.preemptions),
        ("evictions", seen.evictions),
        ("evicted ones that were back at once", seen.early_returns),
        ("reloads", seen.reloads),
        ("damaged reloads that were caught", seen.verification_failures),
        ("tokens found on the device", seen.resident_tokens),
        ("shared tokens", seen.shared_tokens),
        ("reloaded tokens", seen.reloaded_tokens),
        ("loads from disk", seen.loads),
        ("stores to disk", seen.stores),
        ("stores that were refused", seen.stores_refused),
        ("tokens loaded from disk", seen.loaded_tokens),
        ("chunks encoded in gaps", seen.gaps),
        ("forgotten conversations", seen.forgotten),
        ("offloads that were asked for", seen.left),
        ("pins", seen.pins),
        ("pins beyond the budget", seen.pins_refused),
    ] {
        assert!(count > 100, "only {count} {what}");
    }
}

/// Without this, the test above could be blind.
#[test]
fn a_byte_that_changes_on_the_device_shows_in_the_answers() {
    let seen = total((0..6).into_par_iter().map(|seed| run(Scenario::draw(seed, 1_000).with(Damage::Device))));
    assert!(seen.wrong_answers > 50, "only {} answers of {} are wrong", seen.wrong_answers, seen.finished);
}

#[test]
fn damage_below_shows_in_the_answers_if_checksums_are_not_looked_at() {
    let scenario = |seed| Scenario { host_blocks: 400, ..Scenario::draw(seed, 1_000) }.with(Damage::HostUnchecked);
    let seen = total((0..8).into_par_iter().map(|seed| run(scenario(seed))));
    assert!(seen.wrong_answers > 5, "only {} answers of {} are wrong", seen.wrong_answers, seen.finished);
}

#[test]
fn a_seed_is_the_whole_of_a_run() {
    assert_eq!(run(Scenario::draw(7, 1_000)), run(Scenario::draw(7, 1_000)));
}
