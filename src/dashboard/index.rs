//! Which conversations are there, in any order that an operator asks for?
//!
//! A row for each, and for each tenant and state a set in each order, so that a page costs what it shows and no more than
//! one look at each set. Kept as things change, beside the engine. Invariant: a row is in the sets of its tenant and state
//! with the values that it had when it was last put.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

use crate::engine::status::Path;
use crate::types::{KvKey, TenantId, Tick};

/// Rows that a search looks at.
const SEARCHED: usize = 10_000;

/// Where a conversation's KV is, told by tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Running,
    Reloading,
    /// Idle on the device, all or some of it.
    Hot,
    /// On the host.
    Warm,
    /// On disk alone.
    Cold,
    /// Nowhere.
    None,
}

impl State {
    pub const ALL: [State; 6] = [State::Running, State::Reloading, State::Hot, State::Warm, State::Cold, State::None];

    pub fn name(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Reloading => "reloading",
            State::Hot => "hot",
            State::Warm => "warm",
            State::Cold => "cold",
            State::None => "none",
        }
    }
}

/// What is known of one conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub tenant: TenantId,
    pub state: State,
    pub pinned: bool,
    pub tokens: u32,
    /// The number of its newest turn; `None`: it had none, or none since that is written down.
    pub turns: Option<u32>,
    /// Bytes of each tier, what is shared counted whole.
    pub bytes: [u64; 3],
    pub shared: u64,
    /// `None`: not since the start.
    pub last_used: Option<Tick>,
    pub ttft_ms: Option<u64>,
    pub path: Option<Path>,
    /// About how long its return would take.
    pub return_ms: u64,
    /// Milliseconds since 1970.
    pub created: Option<i64>,
    /// The event after which it was as it is.
    pub changed: u64,
    /// The place of its newest turn.
    pub turn: Option<u64>,
    /// The conversation that it branched off.
    pub parent: Option<KvKey>,
    /// The store has it: it is there even if no tier has anything of it.
    pub stored: bool,
}

impl Row {
    /// A conversation of which nothing is known yet.
    pub fn blank(tenant: TenantId) -> Self {
        Self {
            tenant,
            state: State::None,
            pinned: false,
            tokens: 0,
            turns: None,
            bytes: [0; 3],
            shared: 0,
            last_used: None,
            ttft_ms: None,
            path: None,
            return_ms: 0,
            created: None,
            changed: 0,
            turn: None,
            parent: None,
            stored: false,
        }
    }
}

/// By what rows are put in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    Idle,
    Tokens,
    Device,
    Return,
    Turns,
}

impl Sort {
    const ALL: [Sort; 5] = [Sort::Idle, Sort::Tokens, Sort::Device, Sort::Return, Sort::Turns];

    pub fn named(name: &str) -> Option<Self> {
        match name {
            "idle" => Some(Sort::Idle),
            "tokens" => Some(Sort::Tokens),
            "device" => Some(Sort::Device),
            "return" => Some(Sort::Return),
            "turns" => Some(Sort::Turns),
            _ => None,
        }
    }

    fn value(self, row: &Row) -> u64 {
        match self {
            // Idle for longer is more.
            Sort::Idle => u64::MAX - row.last_used.map_or(0, |last| last.0),
            Sort::Tokens => row.tokens.into(),
            Sort::Device => row.bytes[0],
            Sort::Return => row.return_ms,
            Sort::Turns => row.turns.unwrap_or(0).into(),
        }
    }
}

/// Where a page begins: behind this row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(pub u64, pub KvKey);

/// Which rows, in which order.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    pub tenant: Option<TenantId>,
    pub state: Option<State>,
    pub pinned: bool,
    pub sort: Sort,
    pub descending: bool,
    pub after: Option<Cursor>,
    pub limit: usize,
}

/// A page of rows.
#[derive(Debug, Default)]
pub struct Page {
    pub rows: Vec<KvKey>,
    pub total: usize,
    pub next: Option<Cursor>,
    /// Not all were looked at.
    pub truncated: bool,
}

type Set = BTreeSet<(u64, KvKey)>;
/// Conversations and bytes by the minute of their last use.
type Ages = BTreeMap<u64, (u64, u64)>;

#[derive(Debug, Default)]
pub struct Index {
    rows: BTreeMap<KvKey, Row>,
    sets: HashMap<(TenantId, State), [Set; Sort::ALL.len()]>,
    pinned: BTreeSet<KvKey>,
    ages: HashMap<(TenantId, usize), Ages>,
    forks: HashMap<KvKey, Vec<KvKey>>,
    /// Conversations that have something in each tier.
    held: [usize; 3],
}

const MINUTE_US: u64 = 60_000_000;

impl Index {
    pub fn get(&self, key: KvKey) -> Option<&Row> {
        self.rows.get(&key)
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Conversations that have something in a tier.
    pub fn held(&self, tier: usize) -> usize {
        self.held[tier]
    }

    pub fn pinned(&self) -> usize {
        self.pinned.len()
    }

    /// Conversations in a state, of a tenant or of all.
    pub fn count(&self, tenant: Option<TenantId>, state: State) -> usize {
        match tenant {
            Some(tenant) => self.sets.get(&(tenant, state)).map_or(0, |sets| sets[0].len()),
            None => self.sets.iter().filter(|((_, of), _)| *of == state).map(|(_, sets)| sets[0].len()).sum(),
        }
    }

    /// Puts a row in the place of the one that there was.
    pub fn put(&mut self, key: KvKey, row: Row) {
        self.take_out(key);
        let sets = self.sets.entry((row.tenant, row.state)).or_default();
        for (set, sort) in sets.iter_mut().zip(Sort::ALL) {
            set.insert((sort.value(&row), key));
        }
        if row.pinned {
            self.pinned.insert(key);
        }
        let minute = row.last_used.map_or(0, |last| last.0 / MINUTE_US + 1);
        for (tier, bytes) in row.bytes.iter().enumerate().filter(|(_, bytes)| **bytes > 0) {
            self.held[tier] += 1;
            let of_minute = self.ages.entry((row.tenant, tier)).or_default().entry(minute).or_default();
            of_minute.0 += 1;
            of_minute.1 += bytes;
        }
        if let Some(parent) = row.parent {
            let forks = self.forks.entry(parent).or_default();
            if !forks.contains(&key) {
                forks.push(key);
            }
        }
        self.rows.insert(key, row);
    }

    /// Forgets a conversation.
    pub fn remove(&mut self, key: KvKey) -> bool {
        let row = self.take_out(key);
        if let Some(parent) = row.as_ref().and_then(|row| row.parent) {
            self.forks.entry(parent).and_modify(|forks| forks.retain(|fork| *fork != key));
        }
        self.forks.remove(&key);
        row.is_some()
    }

    fn take_out(&mut self, key: KvKey) -> Option<Row> {
        let row = self.rows.remove(&key)?;
        if let Some(sets) = self.sets.get_mut(&(row.tenant, row.state)) {
            for (set, sort) in sets.iter_mut().zip(Sort::ALL) {
                set.remove(&(sort.value(&row), key));
            }
        }
        self.pinned.remove(&key);
        let minute = row.last_used.map_or(0, |last| last.0 / MINUTE_US + 1);
        for (tier, bytes) in row.bytes.iter().enumerate().filter(|(_, bytes)| **bytes > 0) {
            self.held[tier] -= 1;
            if let Some(ages) = self.ages.get_mut(&(row.tenant, tier))
                && let Some(of_minute) = ages.get_mut(&minute)
            {
                of_minute.0 -= 1;
                of_minute.1 -= bytes;
                if of_minute.0 == 0 {
                    ages.remove(&minute);
                }
            }
        }
        Some(row)
    }

    /// Branches of a conversation.
    pub fn forks(&self, key: KvKey) -> &[KvKey] {
        self.forks.get(&key).map_or(&[], Vec::as_slice)
    }

    /// A tenant's conversations of a tier by how long they have been idle: at most so many microseconds each, and the rest
    /// last. (conversations, bytes). Cost: the minutes in which they were used last.
    pub fn by_age(&self, tenant: TenantId, tier: usize, now: Tick, up_to_us: &[u64]) -> Vec<(u64, u64)> {
        let mut sums = vec![(0, 0); up_to_us.len() + 1];
        for (minute, (count, bytes)) in self.ages.get(&(tenant, tier)).into_iter().flatten() {
            let idle_us =
                if *minute == 0 { u64::MAX } else { now.0.saturating_sub((minute - 1) * MINUTE_US + MINUTE_US / 2) };
            let bucket = up_to_us.iter().position(|most| idle_us <= *most).unwrap_or(up_to_us.len());
            sums[bucket].0 += count;
            sums[bucket].1 += bytes;
        }
        sums
    }

    /// A page in the order that is asked for. Cost: O(page × log(sets)), and one look at each set.
    pub fn page(&self, query: &Query) -> Page {
        if query.pinned {
            return self.pinned_page(query);
        }
        let wanted = self.sets.iter().filter(|((tenant, state), _)| {
            query.tenant.is_none_or(|of| of == *tenant) && query.state.is_none_or(|of| of == *state)
        });
        let sets: Vec<&Set> = wanted.map(|(_, sets)| &sets[query.sort as usize]).collect();
        let total = sets.iter().map(|set| set.len()).sum();
        let rows = if query.descending {
            let before = query.after.map_or((u64::MAX, KvKey(u128::MAX)), |after| (after.0, after.1));
            let is_first = query.after.is_none();
            let heads =
                sets.iter().map(|set| set.range(..=before).rev().skip_while(move |row| !is_first && **row == before));
            merged(heads.map(|rows| rows.map(|row| Reverse(*row))).collect(), query.limit + 1)
                .into_iter()
                .map(|Reverse(row)| row)
                .collect()
        } else {
            let from = query.after.map_or((0, KvKey(0)), |after| (after.0, after.1));
            let is_first = query.after.is_none();
            let heads = sets.iter().map(|set| set.range(from..).skip_while(move |row| !is_first && **row == from));
            merged(heads.map(|rows| rows.copied()).collect(), query.limit + 1)
        };
        page(rows, query.limit, total)
    }

    /// Pins are few: a budget bounds them.
    fn pinned_page(&self, query: &Query) -> Page {
        let found = self.pinned.iter().filter_map(|key| Some((*key, self.rows.get(key)?)));
        let of_tenant = found.filter(|(_, row)| query.tenant.is_none_or(|of| of == row.tenant));
        let mut rows: Vec<_> = of_tenant.map(|(key, row)| (query.sort.value(row), key)).collect();
        rows.sort_unstable();
        if query.descending {
            rows.reverse();
        }
        let total = rows.len();
        if let Some(Cursor(value, key)) = query.after {
            let is_behind = |row: &(u64, KvKey)| {
                if query.descending { *row < (value, key) } else { *row > (value, key) }
            };
            rows.retain(is_behind);
        }
        page(rows, query.limit, total)
    }

    /// Conversations whose id begins with these hex digits, in the order of their ids.
    pub fn search(&self, digits: &str, query: &Query) -> Option<Page> {
        let (from, to) = span(digits)?;
        let after = query.after.map_or(from, |Cursor(_, key)| KvKey(key.0.saturating_add(1)).max(from));
        let mut page = Page::default();
        if after > to {
            return Some(page);
        }
        let fits = |row: &Row| {
            query.tenant.is_none_or(|of| of == row.tenant)
                && query.state.is_none_or(|of| of == row.state)
                && (!query.pinned || row.pinned)
        };
        for (looked, (key, row)) in self.rows.range(after..=to).enumerate() {
            if looked == SEARCHED {
                page.truncated = true;
                break;
            }
            if fits(row) {
                page.total += 1;
                if page.rows.len() < query.limit {
                    page.rows.push(*key);
                }
            }
        }
        let has_more = page.total > page.rows.len() || page.truncated;
        page.next = page.rows.last().filter(|_| has_more).map(|key| Cursor(0, *key));
        Some(page)
    }
}

/// The first and last key that begin with these hex digits.
fn span(digits: &str) -> Option<(KvKey, KvKey)> {
    if digits.len() > 32 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let parse = |fill: &str| u128::from_str_radix(&format!("{digits}{}", fill.repeat(32 - digits.len())), 16).ok();
    Some((KvKey(parse("0")?), KvKey(parse("f")?)))
}

/// The first of many ordered rows.
fn merged<T: Ord + Copy, I: Iterator<Item = T>>(mut sources: Vec<I>, most: usize) -> Vec<T> {
    let mut heads: BinaryHeap<Reverse<(T, usize)>> =
        sources.iter_mut().enumerate().filter_map(|(index, rows)| Some(Reverse((rows.next()?, index)))).collect();
    let mut first = Vec::with_capacity(most);
    while first.len() < most
        && let Some(Reverse((row, index))) = heads.pop()
    {
        first.push(row);
        heads.extend(sources[index].next().map(|next| Reverse((next, index))));
    }
    first
}

fn page(mut rows: Vec<(u64, KvKey)>, limit: usize, total: usize) -> Page {
    let has_more = rows.len() > limit;
    rows.truncate(limit);
    let next = rows.last().filter(|_| has_more).map(|(value, key)| Cursor(*value, *key));
    Page { rows: rows.into_iter().map(|(_, key)| key).collect(), total, next, truncated: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn row(tenant: u32, state: State, tokens: u32, last_used: Option<u64>) -> Row {
        Row {
            state,
            pinned: tokens.is_multiple_of(10),
            tokens,
            bytes: [u64::from(tokens) * 10, 0, 0],
            last_used: last_used.map(Tick),
            stored: true,
            ..Row::blank(TenantId(tenant))
        }
    }

    fn query(sort: Sort, descending: bool) -> Query {
        Query { tenant: None, state: None, pinned: false, sort, descending, after: None, limit: 7 }
    }

    fn filled() -> Index {
        let mut index = Index::default();
        for key in 0..100u32 {
            let state = State::ALL[key as usize % 6];
            // Put twice: only the second counts.
            index.put(KvKey(key.into()), row(key % 3, State::Hot, 1, None));
            index.put(KvKey(key.into()), row(key % 3, state, key * 37 % 101, Some(u64::from(key) * 7 % 50)));
        }
        index
    }

    #[test]
    fn pages_add_up_to_all_rows_in_order_under_every_sort_and_filter() {
        let index = filled();
        for sort in Sort::ALL {
            for descending in [false, true] {
                for (tenant, state) in
                    [(None, None), (Some(1), None), (None, Some(State::Warm)), (Some(2), Some(State::Hot))]
                {
                    let mut asked = Query { tenant: tenant.map(TenantId), state, ..query(sort, descending) };
                    let mut seen = Vec::new();
                    let total = loop {
                        let page = index.page(&asked);
                        seen.extend(page.rows);
                        asked.after = page.next;
                        if page.next.is_none() {
                            break page.total;
                        }
                    };
                    let fits = |row: &Row| {
                        asked.tenant.is_none_or(|of| of == row.tenant) && state.is_none_or(|of| of == row.state)
                    };
                    let mut expected: Vec<_> = index
                        .rows
                        .iter()
                        .filter(|(_, row)| fits(row))
                        .map(|(key, row)| (sort.value(row), *key))
                        .collect();
                    expected.sort_unstable();
                    if descending {
                        expected.reverse();
                    }
                    let expected: Vec<_> = expected.into_iter().map(|(_, key)| key).collect();
                    assert_eq!((total, &seen), (expected.len(), &expected), "{asked:?}");
                }
            }
        }
    }

    #[test]
    fn a_search_finds_what_begins_so_and_says_where_it_stopped() {
        let mut index = Index::default();
        for low in 0..20u128 {
            index.put(KvKey(0xabc << 116 | low), row(0, State::Hot, 1, None));
            index.put(KvKey(0xabd << 116 | low), row(0, State::Hot, 1, None));
        }
        let first = index.search("abc", &query(Sort::Idle, false)).unwrap();
        assert_eq!((first.rows.len(), first.total, first.truncated), (7, 20, false));
        let rest = index.search("abc", &Query { after: first.next, limit: 50, ..query(Sort::Idle, false) }).unwrap();
        assert_eq!((rest.rows.len(), rest.next), (13, None));
        assert_eq!(index.search("ab", &Query { limit: 99, ..query(Sort::Idle, false) }).unwrap().rows.len(), 40);
        assert!(index.search("xyz", &query(Sort::Idle, false)).is_none());
        assert_eq!(index.search("fff", &query(Sort::Idle, false)).unwrap().total, 0);
    }

    #[test]
    fn ages_and_counts_follow_what_is_put_and_removed() {
        let mut index = Index::default();
        let now = Tick(100 * MINUTE_US);
        index.put(KvKey(1), row(0, State::Hot, 10, Some(99 * MINUTE_US)));
        index.put(KvKey(2), row(0, State::Hot, 20, Some(50 * MINUTE_US)));
        index.put(KvKey(3), row(0, State::Hot, 30, None));
        let ages = |index: &Index| index.by_age(TenantId(0), 0, now, &[5 * MINUTE_US, 60 * MINUTE_US]);
        assert_eq!(ages(&index), [(1, 100), (1, 200), (1, 300)]);
        assert_eq!((index.count(None, State::Hot), index.pinned()), (3, 3));
        assert!(index.remove(KvKey(2)) && !index.remove(KvKey(2)));
        assert_eq!(ages(&index), [(1, 100), (0, 0), (1, 300)]);
        assert_eq!((index.count(Some(TenantId(0)), State::Hot), index.pinned(), index.len()), (2, 2, 2));
        assert_eq!((index.held(0), index.held(1)), (2, 0));
    }

    #[test]
    fn branches_are_known_by_what_they_branched_off() {
        let mut index = Index::default();
        index.put(KvKey(1), row(0, State::Hot, 1, None));
        index.put(KvKey(2), Row { parent: Some(KvKey(1)), ..row(0, State::Hot, 1, None) });
        assert_eq!(index.forks(KvKey(1)), [KvKey(2)]);
        index.remove(KvKey(2));
        assert_eq!(index.forks(KvKey(1)), []);
    }
}
