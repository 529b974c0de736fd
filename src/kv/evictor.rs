//! Which conversation loses blocks of a tier when it runs short?
//!
//! Of the tenants that may lose some: ended ones first, oldest first; then the one least likely to be continued soon, by
//! how long it has been silent and how those like it behaved (`return_rate`), or, as long as too little of that is known,
//! the one silent for the longest; those of which a turn waits come last. Who may lose is the asker's to say.
//! Invariant: a running conversation is in no list, so it is never a victim. Cost: O(1) a change; a choice looks once at
//! each tenant, and at the heads of the lists of those that changed, never at conversations. Owned by the engine's thread:
//! no locks.

use std::collections::HashMap;

use super::journal::Rule;
use super::return_rate::{CLASSES, Class, ReturnRate, ReturnRates};
use crate::types::{KvKey, TenantId, Tick, TokenCount};

/// By what the idle ones are put in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// The longest silent goes first.
    Lru,
    /// The one least likely to be continued soon goes first. As `Lru` until enough was seen.
    ReturnRate,
}

impl Policy {
    /// From which length on a conversation that is given up for good loses its first tokens first: half of that at which a
    /// token costs the model twice what the first one does. Plain LRU always takes the last ones, as others do.
    pub fn front_first_from(self, doubles_at: TokenCount) -> Option<TokenCount> {
        (self == Policy::ReturnRate).then_some(TokenCount(doubles_at.0 / 2))
    }
}

/// What is expected of a conversation that doesn't run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It is over.
    Ended,
    /// It is silent, and one of these.
    Idle(Class),
    /// A turn of it waits.
    Expected,
}

/// Lists of a tenant: the ended ones, the idle ones by class, the expected ones.
const LISTS: usize = CLASSES + 2;
const ENDED: usize = 0;
const EXPECTED: usize = LISTS - 1;
/// No node: the end of a list.
const NONE: u32 = u32::MAX;

impl Standing {
    fn list(self) -> usize {
        match self {
            Standing::Ended => ENDED,
            Standing::Idle(class) => 1 + class.index(),
            Standing::Expected => EXPECTED,
        }
    }
}

/// Its place in the order: the least goes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Rank {
    order: Order,
    since: Tick,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Order {
    Ended,
    /// By what its place is worth; 0 if that is not known, or not asked for.
    Idle(u64),
    Expected,
}

/// By what ranks are given at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Judge<'a> {
    pub now: Tick,
    /// `None`: by silence alone.
    pub rates: Option<&'a ReturnRates>,
    /// Length at which a return is worth twice as much as at none; `None`: length counts for nothing.
    pub doubles_at: Option<TokenCount>,
}

impl<'a> Judge<'a> {
    pub fn new(policy: Policy, doubles_at: Option<TokenCount>, rates: &'a ReturnRates, now: Tick) -> Self {
        let believed = policy == Policy::ReturnRate && rates.knows_enough();
        Self { now, rates: believed.then_some(rates), doubles_at }
    }

    pub fn rank(&self, standing: Standing, since: Tick, length: TokenCount) -> Rank {
        let order = match standing {
            Standing::Ended => Order::Ended,
            Standing::Idle(class) => match self.rates {
                Some(rates) => Order::Idle(self.worth(rates.rate(class, since, self.now), length)),
                None => Order::Idle(0),
            },
            Standing::Expected => Order::Expected,
        };
        Rank { order, since }
    }

    /// What holding its place is worth: returns in a time, weighed by what each saves.
    fn worth(&self, rate: ReturnRate, length: TokenCount) -> u64 {
        let rate = u64::from(rate.0);
        match self.doubles_at {
            Some(doubles_at) => rate + rate * u64::from(length.0) / u64::from(doubles_at.0.max(1)),
            None => rate,
        }
    }
}

/// Who goes first, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Victim {
    pub key: KvKey,
    pub rule: Rule,
    pub rank: Rank,
    pub reason: Reason,
}

/// What a choice went by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reason {
    /// How long it had been silent.
    pub silent_ms: u64,
    pub class: Option<Class>,
    pub rate: Option<ReturnRate>,
}

/// A conversation in line, linked with its neighbours in its list.
#[derive(Clone, Copy, Debug)]
struct Node {
    key: KvKey,
    since: Tick,
    length: TokenCount,
    before: u32,
    after: u32,
    tenant: TenantId,
    list: u8,
}

impl Node {
    /// What it would go by.
    fn victim(&self, judge: &Judge<'_>, rank: Rank) -> Victim {
        let class = match standing(usize::from(self.list)) {
            Standing::Idle(class) => Some(class),
            Standing::Ended | Standing::Expected => None,
        };
        let rate = class.and_then(|class| Some(judge.rates?.rate(class, self.since, judge.now)));
        let rule = match rank.order {
            Order::Ended => Rule::Ended,
            Order::Idle(_) if rate.is_some() => Rule::ReturnRate,
            Order::Idle(_) | Order::Expected => Rule::Lru,
        };
        let silent_ms = judge.now.ms_since(self.since);
        Victim { key: self.key, rule, rank, reason: Reason { silent_ms, class, rate } }
    }
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    first: u32,
    last: u32,
}

#[derive(Clone, Debug)]
struct Lists {
    ends: [Ends; LISTS],
    /// Which lists are not empty, a bit each.
    taken: u64,
    /// Who of them goes first, as long as that holds.
    first: Option<First>,
}

/// The least of a tenant, found once: rates change now and then, and lists with what happens.
#[derive(Clone, Copy, Debug)]
struct First {
    rank: Rank,
    node: u32,
    edition: Option<u64>,
    until: Tick,
}

impl Default for Lists {
    fn default() -> Self {
        Self { ends: [Ends { first: NONE, last: NONE }; LISTS], taken: 0, first: None }
    }
}

impl Lists {
    /// The least of the lists' heads.
    fn find_first(&self, nodes: &[Node], judge: &Judge<'_>, edition: Option<u64>) -> Option<First> {
        let mut first: Option<First> = None;
        let mut until = Tick(u64::MAX);
        let mut taken = self.taken;
        while taken != 0 {
            let list = taken.trailing_zeros() as usize;
            taken &= taken - 1;
            let place = self.ends[list].first;
            let node = &nodes[place as usize];
            let rank = judge.rank(standing(list), node.since, node.length);
            if let (Standing::Idle(_), Some(rates)) = (standing(list), judge.rates) {
                until = until.min(rates.changes_at(node.since, judge.now));
            }
            if first.is_none_or(|least| rank < least.rank) {
                first = Some(First { rank, node: place, edition, until });
            }
            // Whoever is over goes before all others.
            if list == ENDED {
                break;
            }
        }
        first.map(|first| First { until, ..first })
    }
}

/// The idle conversations that hold blocks of one tier, by tenant and standing, oldest first.
#[derive(Debug, Default)]
pub struct Evictor {
    tenants: Vec<Lists>,
    nodes: Vec<Node>,
    /// Nodes that nobody has.
    spare: Vec<u32>,
    places: HashMap<KvKey, u32>,
}

impl Evictor {
    /// Puts a conversation last of those of its standing: it fell silent just now. Times only rise.
    pub fn add(&mut self, tenant: TenantId, key: KvKey, since: Tick, standing: Standing, length: TokenCount) {
        let node = self.take_node(tenant, key, since, standing, length);
        let ends = self.ends(tenant, standing.list());
        let before = std::mem::replace(&mut ends.last, node);
        if before == NONE {
            ends.first = node;
        } else {
            self.nodes[before as usize].after = node;
        }
        self.nodes[node as usize].before = before;
    }

    /// Puts a conversation first of those of its standing: it comes back to a line that had dropped it as the coldest.
    pub fn add_first(&mut self, tenant: TenantId, key: KvKey, since: Tick, standing: Standing, length: TokenCount) {
        let node = self.take_node(tenant, key, since, standing, length);
        let ends = self.ends(tenant, standing.list());
        let after = std::mem::replace(&mut ends.first, node);
        if after == NONE {
            ends.last = node;
        } else {
            self.nodes[after as usize].before = node;
        }
        self.nodes[node as usize].after = after;
    }

    /// Takes a conversation out of line: it runs, is pinned, or holds nothing here.
    pub fn remove(&mut self, key: KvKey) {
        let Some(place) = self.places.remove(&key) else { return };
        let Node { before, after, tenant, list, .. } = self.nodes[place as usize];
        if before != NONE {
            self.nodes[before as usize].after = after;
        }
        if after != NONE {
            self.nodes[after as usize].before = before;
        }
        let lists = &mut self.tenants[tenant.0 as usize];
        lists.first = None;
        let ends = &mut lists.ends[usize::from(list)];
        if before == NONE {
            ends.first = after;
        }
        if after == NONE {
            ends.last = before;
        }
        if ends.first == NONE {
            lists.taken &= !(1 << list);
        }
        self.spare.push(place);
    }

    /// Notes that a conversation lost some of what it held; it stays where it is.
    pub fn shorten(&mut self, key: KvKey, length: TokenCount) {
        if let Some(place) = self.places.get(&key) {
            let node = &mut self.nodes[*place as usize];
            node.length = length;
            self.tenants[node.tenant.0 as usize].first = None;
        }
    }

    /// The first in line among tenants for whom `may_lose` holds.
    pub fn victim(&mut self, judge: &Judge<'_>, may_lose: impl Fn(TenantId) -> bool) -> Option<Victim> {
        let mut first: Option<First> = None;
        for (lists, tenant) in self.tenants.iter_mut().zip(0u32..) {
            if lists.taken == 0 || !may_lose(TenantId(tenant)) {
                continue;
            }
            let edition = judge.rates.map(ReturnRates::edition);
            let known = lists.first.filter(|known| known.edition == edition && judge.now < known.until);
            lists.first = known.or_else(|| lists.find_first(&self.nodes, judge, edition));
            if let Some(of_tenant) = lists.first
                && first.is_none_or(|least| of_tenant.rank < least.rank)
            {
                first = Some(of_tenant);
            }
        }
        let First { rank, node, .. } = first?;
        Some(self.nodes[node as usize].victim(judge, rank))
    }

    /// Tenants that have had somebody in line: ids from 0 on.
    pub fn tenants(&self) -> usize {
        self.tenants.len()
    }

    /// A tenant's conversations in the order in which they would go if nothing else happened. Cost: its lists, and then
    /// those lists' number for each.
    pub fn in_order<'a>(&'a self, judge: &Judge<'a>, tenant: TenantId) -> impl Iterator<Item = Victim> + use<'a> {
        let lists = self.tenants.get(tenant.0 as usize);
        let mut heads: Vec<u32> = lists.map_or(Vec::new(), |lists| {
            lists.ends.iter().map(|ends| ends.first).filter(|node| *node != NONE).collect()
        });
        let judge = *judge;
        std::iter::from_fn(move || {
            let rank = |place: u32| {
                let node = &self.nodes[place as usize];
                judge.rank(standing(usize::from(node.list)), node.since, node.length)
            };
            let (index, place) = heads.iter().copied().enumerate().min_by_key(|(_, place)| rank(*place))?;
            let victim = self.nodes[place as usize].victim(&judge, rank(place));
            match self.nodes[place as usize].after {
                NONE => drop(heads.swap_remove(index)),
                after => heads[index] = after,
            }
            Some(victim)
        })
    }

    /// Whether a conversation is in line.
    pub fn contains(&self, key: KvKey) -> bool {
        self.places.contains_key(&key)
    }

    fn ends(&mut self, tenant: TenantId, list: usize) -> &mut Ends {
        &mut self.tenants[tenant.0 as usize].ends[list]
    }

    /// A node for a conversation, in no list yet; its list is marked as taken.
    fn take_node(&mut self, tenant: TenantId, key: KvKey, since: Tick, standing: Standing, length: TokenCount) -> u32 {
        self.remove(key);
        let index = tenant.0 as usize;
        if self.tenants.len() <= index {
            self.tenants.resize_with(index + 1, Lists::default);
        }
        let list = standing.list();
        self.tenants[index].taken |= 1 << list;
        self.tenants[index].first = None;
        let node = Node { key, since, length, before: NONE, after: NONE, tenant, list: list as u8 };
        let place = match self.spare.pop() {
            Some(place) => {
                self.nodes[place as usize] = node;
                place
            }
            None => {
                self.nodes.push(node);
                u32::try_from(self.nodes.len() - 1).expect("memory ends before four billion conversations")
            }
        };
        self.places.insert(key, place);
        place
    }
}

fn standing(list: usize) -> Standing {
    match list {
        ENDED => Standing::Ended,
        EXPECTED => Standing::Expected,
        class => Standing::Idle(Class::of_index(class - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::return_rate::TurnShape;
    use super::*;

    const A: TenantId = TenantId(0);
    const B: TenantId = TenantId(1);
    const IDLE: Standing = Standing::Idle(Class::of_index(0));
    const LENGTH: TokenCount = TokenCount(500);
    const S: u64 = 1_000_000;

    fn everyone(_: TenantId) -> bool {
        true
    }

    fn by_silence(now: u64) -> Judge<'static> {
        Judge { now: Tick(now), rates: None, doubles_at: None }
    }

    fn first(evictor: &mut Evictor) -> Option<u128> {
        evictor.victim(&by_silence(10), everyone).map(|victim| victim.key.0)
    }

    fn class(number: u32) -> Class {
        Class::after(TurnShape { number, new_tokens: TokenCount(1) })
    }

    /// Seen often enough to go by: after a first turn nobody came back, after a fifth all did.
    fn where_only_fifth_turns_come_back() -> ReturnRates {
        let mut rates = ReturnRates::default();
        for round in 0..150u64 {
            let (now, key) = (Tick(round * 100 * S), u128::from(round) * 2);
            rates.begin(now, KvKey(key), class(1));
            rates.begin(now, KvKey(key + 1), class(5));
            rates.end(Tick(now.0 + 50 * S), KvKey(key + 1));
        }
        rates
    }

    #[test]
    fn the_longest_silent_goes_first_whatever_its_tenant_and_class() {
        let mut evictor = Evictor::default();
        evictor.add(B, KvKey(1), Tick(1), Standing::Idle(Class::of_index(7)), LENGTH);
        evictor.add(A, KvKey(2), Tick(2), IDLE, LENGTH);
        assert_eq!(first(&mut evictor), Some(1));
        evictor.add(B, KvKey(1), Tick(3), IDLE, LENGTH);
        assert_eq!(first(&mut evictor), Some(2));
        assert_eq!(evictor.victim(&by_silence(10), everyone).unwrap().rule, Rule::Lru);
    }

    #[test]
    fn an_ended_conversation_goes_before_all_others_and_an_expected_one_after() {
        let mut evictor = Evictor::default();
        evictor.add(B, KvKey(3), Tick(0), Standing::Expected, LENGTH);
        evictor.add(A, KvKey(1), Tick(1), IDLE, LENGTH);
        evictor.add(A, KvKey(2), Tick(2), Standing::Ended, LENGTH);
        let victim = evictor.victim(&by_silence(5000), everyone).unwrap();
        assert_eq!((victim.key, victim.rule, victim.reason.silent_ms), (KvKey(2), Rule::Ended, 4));
        evictor.remove(KvKey(2));
        assert_eq!(first(&mut evictor), Some(1));
        evictor.remove(KvKey(1));
        assert_eq!(first(&mut evictor), Some(3));
        evictor.remove(KvKey(3));
        assert_eq!(first(&mut evictor), None);
    }

    #[test]
    fn a_tenant_that_may_not_lose_is_passed_over() {
        let mut evictor = Evictor::default();
        evictor.add(A, KvKey(1), Tick(1), Standing::Ended, LENGTH);
        evictor.add(B, KvKey(2), Tick(2), IDLE, LENGTH);
        assert_eq!(evictor.victim(&by_silence(9), |tenant| tenant == B).unwrap().key, KvKey(2));
        assert_eq!(evictor.victim(&by_silence(9), |_| false), None);
    }

    #[test]
    fn lists_keep_their_order_through_changes_at_both_ends_and_in_the_middle() {
        let mut evictor = Evictor::default();
        (1..=5).for_each(|key| evictor.add(A, KvKey(key), Tick(key as u64), IDLE, LENGTH));
        evictor.add_first(A, KvKey(6), Tick(0), IDLE, LENGTH);
        evictor.remove(KvKey(3));
        evictor.add(A, KvKey(1), Tick(7), IDLE, LENGTH);
        evictor.remove(KvKey(9));
        let mut order = Vec::new();
        while let Some(key) = first(&mut evictor) {
            order.push(key);
            evictor.remove(KvKey(key));
        }
        assert_eq!(order, [6, 2, 4, 5, 1]);
        assert!(!evictor.contains(KvKey(1)));
    }

    #[test]
    fn the_one_whose_like_comes_back_least_goes_first_once_enough_was_seen() {
        let rates = where_only_fifth_turns_come_back();
        let mut evictor = Evictor::default();
        let now = Tick(20_000 * S);
        evictor.add(A, KvKey(1), Tick(now.0 - 30 * S), Standing::Idle(class(5)), LENGTH);
        evictor.add(A, KvKey(2), Tick(now.0 - 20 * S), Standing::Idle(class(1)), LENGTH);
        let mut judged = |policy| evictor.victim(&Judge::new(policy, None, &rates, now), everyone).unwrap();
        assert_eq!((judged(Policy::Lru).key, judged(Policy::Lru).rule), (KvKey(1), Rule::Lru));
        let victim = judged(Policy::ReturnRate);
        assert_eq!((victim.key, victim.rule), (KvKey(2), Rule::ReturnRate));
        assert_eq!((victim.reason.class, victim.reason.silent_ms), (Some(class(1)), 20_000));
        // Before that, by silence.
        let judge = Judge::new(Policy::ReturnRate, None, &rates, now);
        assert!(
            judge.rates.is_some() && Judge::new(Policy::ReturnRate, None, &ReturnRates::default(), now).rates.is_none()
        );
    }

    #[test]
    fn the_order_that_is_told_is_the_one_in_which_they_go() {
        let rates = where_only_fifth_turns_come_back();
        let now = Tick(20_000 * S);
        let judge = Judge::new(Policy::ReturnRate, None, &rates, now);
        let mut evictor = Evictor::default();
        for key in 0..40u64 {
            let standing = if key % 9 == 4 { Standing::Ended } else { Standing::Idle(class([1, 5][key as usize % 2])) };
            evictor.add(A, KvKey(key.into()), Tick(key * 450 * S), standing, LENGTH);
        }
        let told: Vec<KvKey> = evictor.in_order(&judge, A).map(|victim| victim.key).collect();
        let mut went = Vec::new();
        while let Some(victim) = evictor.victim(&judge, everyone) {
            went.push(victim.key);
            evictor.remove(victim.key);
        }
        assert_eq!((told.len(), &told), (40, &went));
    }

    #[test]
    fn books_take_less_than_110_bytes_a_conversation() {
        let mut evictor = Evictor::default();
        (0..100_000).for_each(|key| evictor.add(A, KvKey(key), Tick(key as u64), IDLE, LENGTH));
        let places = evictor.places.capacity() * 8 / 7 * (size_of::<(KvKey, u32)>() + 1);
        let bytes = evictor.nodes.capacity() * size_of::<Node>() + places;
        assert!(bytes < 110 * 100_000, "{bytes}");
    }
}
