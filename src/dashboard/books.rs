//! What is known of all conversations, turns and decisions, for those who look?
//!
//! Follows the engine and the sessions from beside: a thread of its own takes in what has happened a few times a second,
//! and never makes them wait. Everything here is kept as things change, so that no answer looks at all conversations.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::history::{History, LINES, Sample};
use super::index::{Index, Row, State};
use super::journal::{Entry, Journal};
use super::turns::{Turns, spread};
use crate::engine::status::accounts::Accounts;
use crate::engine::status::happened::{Happened, TurnStep};
use crate::engine::status::{EngineStatus, Path, Residency, ResidencyState};
use crate::sessions::messages::{Predicted, ReturnPath};
use crate::sessions::news::News;
use crate::sessions::predict;
use crate::types::{KvKey, TenantId, Tick, Tier, TokenCount};

const SECOND_US: u64 = 1_000_000;
/// What rates are taken over.
const WINDOW_US: u64 = 60 * SECOND_US;

/// A conversation that the store had at the start.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    pub key: KvKey,
    pub tenant: TenantId,
    pub tokens: u32,
    /// Milliseconds since 1970.
    pub created: i64,
    pub parent: Option<KvKey>,
    pub turns: Option<u32>,
}

/// Totals at one moment, to take rates of.
#[derive(Clone, Debug)]
struct Totals {
    at: Tick,
    status: Arc<EngineStatus>,
    evicted: u64,
    returned: u64,
    waits: u64,
}

/// What a second brought.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    pub tokens_per_s: f64,
    pub prefill_tokens_per_s: f64,
    pub evictions_per_min: f64,
    /// Up to the device, and down from it.
    pub in_bps: f64,
    pub out_bps: f64,
    pub load_bps: f64,
    pub store_bps: f64,
    pub saved: Option<f64>,
    pub early: Option<f64>,
    /// Turns that had to wait for memory.
    pub waits: u64,
    pub stalled_loads: u64,
    pub steps_per_s: f64,
    /// Of the window in which something ran, the part.
    pub busy: f64,
}

pub struct Books {
    pub index: Index,
    pub turns: Turns,
    pub journal: Journal,
    pub history: History,
    pub status: Arc<EngineStatus>,
    pub accounts: Arc<Accounts>,
    /// When it was looked last.
    pub now: Tick,
    /// Totals of each second, the oldest first, as far back as rates look.
    totals: VecDeque<Totals>,
    /// Whether something ran, at each look of the window.
    ran: VecDeque<(Tick, bool)>,
    waits: u64,
    tick_zero_ms: i64,
    ranks: HashMap<KvKey, usize>,
}

/// What changed in one look, for those who listen.
#[derive(Debug, Default)]
pub struct Changes {
    pub rows: Vec<KvKey>,
    pub gone: Vec<KvKey>,
    pub entries: Vec<Entry>,
    /// A second is over.
    pub sample: Option<Sample>,
}

impl Changes {
    /// Whether no conversation is other than it was.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.gone.is_empty()
    }
}

impl Books {
    pub fn new(tick_zero_us: i64, stored: Vec<Stored>) -> Self {
        let mut books = Self {
            index: Index::default(),
            turns: Turns::default(),
            journal: Journal::default(),
            history: History::default(),
            status: Arc::default(),
            accounts: Arc::default(),
            now: Tick(0),
            totals: VecDeque::new(),
            ran: VecDeque::new(),
            waits: 0,
            tick_zero_ms: tick_zero_us / 1000,
            ranks: HashMap::new(),
        };
        for Stored { key, tenant, tokens, created, parent, turns } in stored {
            let created = Some(created);
            books.index.put(key, Row { tokens, created, parent, turns, stored: true, ..Row::blank(tenant) });
        }
        books
    }

    /// Milliseconds since 1970.
    pub fn ms(&self, at: Tick) -> i64 {
        self.tick_zero_ms + i64::try_from(at.0 / 1000).unwrap_or(i64::MAX)
    }

    /// The tick of a time in milliseconds since 1970; 0 for what was before the process.
    pub fn tick(&self, ms: i64) -> Tick {
        Tick(u64::try_from(ms - self.tick_zero_ms).map_or(0, |ms| ms.saturating_mul(1000)))
    }

    /// A conversation's place among those who go next, from 1.
    pub fn rank(&self, key: KvKey) -> Option<usize> {
        self.ranks.get(&key).copied()
    }

    /// How a conversation would come back.
    pub fn forecast(&self, row: &Row, residency: Option<&Residency>) -> Option<Predicted> {
        predict(TokenCount(row.tokens), residency, &self.status)
    }

    /// Takes in what has happened. `all`: every residency, if something is missing. `seq`: of the event that will tell it.
    pub fn take_in(
        &mut self,
        happened: Happened,
        news: impl IntoIterator<Item = News>,
        (status, accounts, now): (Arc<EngineStatus>, Arc<Accounts>, Tick),
        residency: &dyn Fn(KvKey) -> Option<Residency>,
        all: &dyn Fn() -> Vec<KvKey>,
        seq: u64,
    ) -> Changes {
        let mut changes = Changes::default();
        self.status = status;
        self.accounts = accounts;
        self.now = now;
        self.ranks = self.accounts.line.iter().zip(1..).map(|(next, rank)| (next.key, rank)).collect();
        for news in news {
            self.hear(news, seq, &mut changes);
        }
        let mut changed = happened.changed;
        if happened.overflowed {
            changed.extend(all());
        }
        changed.sort_unstable();
        changed.dedup();
        for key in changed {
            self.look_at(key, residency(key).as_ref(), seq, &mut changes);
        }
        self.note_turns(&happened.turns, residency, seq, &mut changes);
        if happened.overflowed {
            let index = &self.index;
            let runs = |row: &Row| matches!(row.state, State::Running | State::Reloading);
            self.turns.forget_ended(|key| index.get(key).is_some_and(runs));
        }
        for why in &happened.decisions {
            let block_bytes = match why.entry.from {
                Tier::Device => self.status.device.block_bytes,
                Tier::Host => self.status.host.block_bytes,
                Tier::Disk => self.status.disk.block_bytes,
            };
            let entry = Entry::decided(why, block_bytes);
            self.waits += u64::from(entry.kind == "refuse");
            changes.entries.push(self.journal.add(entry).clone());
        }
        changes.rows.sort_unstable();
        changes.rows.dedup();
        changes.sample = self.end_second();
        changes
    }

    fn hear(&mut self, news: News, seq: u64, changes: &mut Changes) {
        match news {
            News::Made { tenant, id } => {
                let key = KvKey(id.0);
                let row = self.index.get(key).cloned().unwrap_or_else(|| Row::blank(tenant));
                let created = Some(self.ms(self.now));
                self.index.put(key, Row { created, stored: true, changed: seq, ..row });
            }
            News::Forked { tenant, of, fork, tokens } => {
                let key = KvKey(fork.0);
                let row = self.index.get(key).cloned().unwrap_or_else(|| Row::blank(tenant));
                let (created, parent) = (Some(self.ms(self.now)), Some(KvKey(of.0)));
                self.index.put(key, Row { created, parent, tokens: tokens.0, stored: true, changed: seq, ..row });
            }
            News::Deleted(id) => {
                let key = KvKey(id.0);
                if self.index.remove(key) {
                    changes.gone.push(key);
                }
            }
        }
    }

    /// Brings a row up to where its KV is.
    fn look_at(&mut self, key: KvKey, residency: Option<&Residency>, seq: u64, changes: &mut Changes) {
        let known = self.index.get(key).cloned();
        let Some(found) = residency else {
            let Some(row) = known else { return };
            if !row.stored {
                self.index.remove(key);
                changes.gone.push(key);
                return;
            }
            let row = Row { state: State::None, bytes: [0; 3], shared: 0, pinned: false, changed: seq, ..row };
            let return_ms = self.return_ms(&row, None);
            self.index.put(key, Row { return_ms, ..row });
            changes.rows.push(key);
            return;
        };
        let row = known.unwrap_or_else(|| Row::blank(found.tenant));
        let state = match found.state {
            ResidencyState::Running => State::Running,
            ResidencyState::Reloading => State::Reloading,
            ResidencyState::Resident | ResidencyState::Partial => State::Hot,
            ResidencyState::Offloaded if found.below.0.0 > 0 => State::Warm,
            ResidencyState::Offloaded => State::Cold,
            ResidencyState::Nowhere => State::None,
        };
        let tiers = [found.device, found.host, found.disk];
        let held = found.device.tokens.0 + found.below.0.0 + found.below.1.0;
        let last_used = Some(found.last_used).filter(|last| last.0 > 0).max(row.last_used);
        let (pinned, tokens) = (found.pinned_until.is_some(), row.tokens.max(held));
        let bytes = tiers.map(|share| share.bytes_private + share.bytes_shared);
        // Who else has its blocks is no change of its own.
        let is_same = (row.state, row.pinned, row.tokens, row.bytes) == (state, pinned, tokens, bytes);
        let row = Row {
            state,
            pinned,
            tokens,
            bytes,
            shared: tiers[0].bytes_shared.max(tiers[1].bytes_shared).max(tiers[2].bytes_shared),
            last_used,
            changed: if is_same { row.changed } else { seq },
            ..row
        };
        let return_ms = self.return_ms(&row, Some(found));
        self.index.put(key, Row { return_ms, ..row });
        changes.rows.push(key);
    }

    fn return_ms(&self, row: &Row, residency: Option<&Residency>) -> u64 {
        self.forecast(row, residency).map_or(0, predicted_ms)
    }

    fn note_turns(
        &mut self,
        notes: &[crate::engine::status::happened::TurnNote],
        residency: &dyn Fn(KvKey) -> Option<Residency>,
        seq: u64,
        changes: &mut Changes,
    ) {
        for note in notes {
            let known = self.index.get(note.key).cloned();
            let place = self.turns.note(note, known.as_ref().and_then(|row| row.turn));
            match note.step {
                TurnStep::FirstToken { number, path, prompt, ttft_ms } => {
                    let prefill = self.status.prefill_tokens_per_s;
                    if let Some(entry) = Entry::came_back(note.at, note.key, note.tenant, &prompt, prefill) {
                        changes.entries.push(self.journal.add(entry).clone());
                    }
                    // What is neither stored nor held anywhere is nobody's any more.
                    let Some(row) = known.or_else(|| residency(note.key).map(|found| Row::blank(found.tenant))) else {
                        continue;
                    };
                    let tokens = prompt.cached().0 + prompt.encoded.0;
                    let (turns, ttft_ms, path) = (Some(number), Some(ttft_ms), Some(path));
                    let last_used = Some(note.at);
                    let row = Row { turns, ttft_ms, path, tokens, last_used, turn: place, changed: seq, ..row };
                    self.index.put(note.key, row);
                    changes.rows.push(note.key);
                }
                TurnStep::Ended(usage) => {
                    if let Some(row) = known {
                        let prompt = usage.prompt;
                        let tokens = prompt.cached().0 + prompt.encoded.0 + usage.generated.0;
                        self.index.put(note.key, Row { tokens, last_used: Some(note.at), changed: seq, ..row });
                        changes.rows.push(note.key);
                    }
                }
                TurnStep::Failed => {}
            }
        }
    }

    /// Notes what an operator did.
    pub fn add(&mut self, entry: Entry) -> Entry {
        self.journal.add(entry).clone()
    }

    /// Once a second: the totals, and a sample of all lines.
    fn end_second(&mut self) -> Option<Sample> {
        let now = self.now;
        self.ran.push_back((now, self.status.running + self.status.reloading > 0));
        while self.ran.front().is_some_and(|(at, _)| at.0 + WINDOW_US < now.0) {
            self.ran.pop_front();
        }
        if self.totals.back().is_some_and(|last| last.at.0 + SECOND_US > now.0) {
            return None;
        }
        let sum =
            |of: fn(&crate::engine::status::accounts::TenantAccount) -> u64| self.accounts.tenants.iter().map(of).sum();
        let (evicted, returned) = (sum(|tenant| tenant.early.evicted), sum(|tenant| tenant.early.returned));
        let status = Arc::clone(&self.status);
        self.totals.push_back(Totals { at: now, status, evicted, returned, waits: self.waits });
        while self.totals.get(1).is_some_and(|second| second.at.0 + 5 * WINDOW_US < now.0) {
            self.totals.pop_front();
        }
        let sample = self.sample();
        self.history.add(sample);
        Some(sample)
    }

    /// What happened in the last `window_us`.
    pub fn rates(&self, window_us: u64) -> Rates {
        let (Some(last), now) = (self.totals.back(), self.now) else { return Rates::default() };
        let since = now.0.saturating_sub(window_us);
        let first = self.totals.iter().find(|totals| totals.at.0 >= since).unwrap_or(last);
        let (then, now_is) = (&first.status, &self.status);
        let seconds = (now.0.saturating_sub(first.at.0)) as f64 / 1e6;
        let per_s = |of: fn(&EngineStatus) -> u64| {
            if seconds > 0.0 { of(now_is).saturating_sub(of(then)) as f64 / seconds } else { 0.0 }
        };
        let cached = now_is.prompt.cached_tokens().saturating_sub(then.prompt.cached_tokens()) as f64;
        let encoded = now_is.prompt.encoded_tokens.saturating_sub(then.prompt.encoded_tokens) as f64;
        let ran = self.ran.iter().filter(|(at, _)| at.0 >= since);
        let (looks, busy) = ran.fold((0, 0), |(looks, busy), (_, ran)| (looks + 1, busy + u32::from(*ran)));
        let ratio = |part: f64, whole: f64| (whole > 0.0).then(|| part / whole);
        let (evicted, returned) =
            (last.evicted - first.evicted.min(last.evicted), last.returned - first.returned.min(last.returned));
        Rates {
            tokens_per_s: per_s(|status| status.generated_tokens),
            prefill_tokens_per_s: per_s(|status| status.prompt.encoded_tokens),
            evictions_per_min: per_s(|status| status.evictions) * 60.0,
            in_bps: per_s(|status| status.reloaded_bytes + status.loaded_bytes),
            out_bps: per_s(|status| status.offloaded_bytes + status.stored_bytes),
            load_bps: per_s(|status| status.loaded_bytes),
            store_bps: per_s(|status| status.stored_bytes),
            saved: ratio(cached, cached + encoded),
            early: ratio(returned as f64, evicted as f64),
            waits: last.waits - first.waits,
            stalled_loads: now_is.stalled_loads - then.stalled_loads,
            steps_per_s: per_s(|status| status.steps),
            busy: ratio(f64::from(busy), f64::from(looks)).unwrap_or(0.0),
        }
    }

    /// Times to first tokens by path, of the last minute, in the order of `Path::ALL`.
    pub fn first_tokens(&self, window_us: u64) -> [super::turns::Spread; Path::ALL.len()] {
        let mut by_path: [Vec<u64>; Path::ALL.len()] = Default::default();
        for first in self.turns.since(self.now, window_us) {
            by_path[first.path as usize].push(first.ttft_ms);
        }
        by_path.map(spread)
    }

    fn sample(&self) -> Sample {
        let (status, rates, lately) = (&self.status, self.rates(WINDOW_US), self.rates(5 * SECOND_US));
        let first = self.first_tokens(WINDOW_US);
        let [fresh, hot, reloaded, reencoded] = Path::ALL.map(|path| first[path as usize]);
        let ms = |ms: Option<u64>| ms.map(|ms| ms as f64);
        let used = |pool: &crate::engine::status::PoolStatus| {
            (pool.total.0 > 0).then(|| f64::from(pool.total.0 - pool.free.0) * 100.0 / f64::from(pool.total.0))
        };
        let values = LINES.map(|line| match line {
            "hot50" => ms(hot.p50_ms),
            "hot95" => ms(hot.p95_ms),
            "rel50" => ms(reloaded.p50_ms),
            "rel95" => ms(reloaded.p95_ms),
            "enc50" => ms(reencoded.p50_ms),
            "enc95" => ms(reencoded.p95_ms),
            "fresh50" => ms(fresh.p50_ms),
            "fresh95" => ms(fresh.p95_ms),
            "toks" => Some(lately.tokens_per_s),
            "pre" => Some(lately.prefill_tokens_per_s),
            "dev" => used(&status.device),
            "host" => used(&status.host),
            "disk" => used(&status.disk),
            "evm" => Some(rates.evictions_per_min),
            "inb" => Some(lately.in_bps),
            "outb" => Some(lately.out_bps),
            "saved" => rates.saved.map(|part| part * 100.0),
            "running" => Some(status.running.into()),
            "queue" => Some(status.queued.into()),
            "early" => rates.early.map(|part| part * 100.0),
            _ => None,
        });
        Sample { ts: u64::try_from(self.ms(status.now) / 1000).unwrap_or(0), values }
    }
}

/// How long a return takes in the way that is foretold.
pub fn predicted_ms(predicted: Predicted) -> u64 {
    match predicted.choice {
        ReturnPath::Resident => 0,
        ReturnPath::Reload => predicted.reload_ms.unwrap_or(predicted.reencode_ms),
        ReturnPath::Reencode => predicted.reencode_ms,
    }
}
