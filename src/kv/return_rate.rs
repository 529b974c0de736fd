//! How soon does a silent conversation come back, judged by what others like it did?
//!
//! Conversations are of one class that had as many turns, ended their last one alike, and said about as much in it. For
//! each class and each half-octave of silence, two counts: how many were silent that long, and how many of those came back
//! then. A conversation's return rate is the best chance of its return over the time until then, over all horizons: what
//! holding its place is worth now (a Gittins index). Learned whether or not a conversation is still cached.
//! Invariant: time is an argument, so that the same turns teach the same. Cost: O(1) a turn, amortised; the table is made
//! anew every 256 turns, in tens of microseconds. Memory is bounded by `SILENCES`.

use std::collections::{HashMap, VecDeque};

use crate::types::{KvKey, Tick, TokenCount};

/// Classes of idle conversations: five of turn numbers, two of ends, four of lengths; and shared prefixes.
pub const CLASSES: usize = 41;
/// Buckets of silence: up to a second, then half-octaves, the last from 24 days on.
const AGES: usize = 44;
/// Silences that are known at a time; past that the oldest is no longer followed.
const SILENCES: usize = 1 << 18;
/// Silences after which what was learned is believed.
const ENOUGH: u64 = 200;
/// Turns between two reckonings of the table.
const RECKON_EVERY: u64 = 256;
/// Silences of a class after which its counts are halved, so that old habits fade.
const HALVE_AT: u32 = 50_000;
/// What is believed of a bucket before anything was seen: two silences, of which a fifth of one came back.
const PRIOR_REACHED: f32 = 2.0;
const PRIOR_RETURNED: f32 = 0.2;

/// What a turn tells of whether its conversation goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TurnShape {
    /// The conversation's which turn it is, from 1.
    pub number: u32,
    /// What it adds to the history before it.
    pub new_tokens: TokenCount,
}

/// Which conversations an idle one is like. Fixed when its turn ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Class(u8);

impl Class {
    /// A prefix that conversations share, once none of them is left.
    pub const SHARED: Class = Class(40);

    /// The class after a turn whose answer called no tool.
    pub fn after(turn: TurnShape) -> Self {
        let number = match turn.number {
            0 | 1 => 0,
            2 => 1,
            3 | 4 => 2,
            5..=8 => 3,
            _ => 4,
        };
        // A question, a long one, a document, a long one.
        let length = match turn.new_tokens.0 {
            0..=256 => 0,
            257..=1024 => 1,
            1025..=4096 => 2,
            _ => 3,
        };
        Self(number + 10 * length)
    }

    /// The same, for one that waits for a tool's answer.
    pub fn awaiting_tool(self) -> Self {
        if self == Self::SHARED { self } else { Self(self.0 % 5 + self.0 / 10 * 10 + 5) }
    }

    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// The class of an index below `CLASSES`.
    pub const fn of_index(index: usize) -> Self {
        Self(index as u8)
    }

    /// In words, after "like it".
    pub fn describe(self) -> String {
        if self == Self::SHARED {
            return "as the prefix of conversations that have gone".to_owned();
        }
        let turn = ["its first turn", "its second turn", "turn 3 or 4", "turn 5 to 8", "turn 9 or a later one"];
        let awaits = if self.0 % 10 >= 5 { ", awaiting a tool's answer" } else { "" };
        let length = ["up to 256", "up to 1024", "up to 4096", "over 4096"];
        format!("after {} of {} new tokens{awaits}", turn[self.index() % 5], length[self.index() / 10])
    }
}

/// How often conversations like one come back, in billionths of a return a second.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct ReturnRate(pub u32);

impl ReturnRate {
    fn of_per_s(per_s: f64) -> Self {
        // Saturates; no rate comes near four a second.
        Self((per_s * 1e9) as u32)
    }

    pub fn per_s(self) -> f64 {
        f64::from(self.0) * 1e-9
    }
}

impl std::fmt::Display for ReturnRate {
    /// For people: "1 in 40 comes back per minute".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (unit, seconds) in [("second", 1.0), ("minute", 60.0), ("hour", 3600.0), ("day", 86_400.0)] {
            let one_in = 1.0 / (self.per_s() * seconds).max(1e-9);
            if one_in <= if unit == "day" { 1000.0 } else { 100.0 } {
                return write!(f, "1 in {:.0} comes back per {unit}", one_in.max(1.0));
            }
        }
        f.write_str("almost none comes back")
    }
}

/// Beginning of a bucket, in microseconds of silence.
fn begins_us(age: usize) -> u64 {
    match age {
        0 => 0,
        _ => (((age - 1) as f64 / 2.0).exp2() * 1e6) as u64,
    }
}

/// The bucket of a silence.
fn bucket(silent_us: u64) -> usize {
    let seconds = silent_us as f64 * 1e-6;
    if seconds < 1.0 {
        return 0;
    }
    // The binary exponent of the square counts half-octaves.
    let half_octaves = ((seconds * seconds).to_bits() >> 52) as usize - 1023;
    (half_octaves + 1).min(AGES - 1)
}

/// What is counted of one class.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Counts {
    returned: [f32; AGES],
    reached: [f32; AGES],
    /// Silences begun since the counts were halved.
    begun: u32,
}

impl Counts {
    const NONE: Counts = Counts { returned: [PRIOR_RETURNED; AGES], reached: [PRIOR_REACHED; AGES], begun: 0 };

    fn begin(&mut self) {
        self.reached[0] += 1.0;
        self.begun += 1;
        if self.begun >= HALVE_AT {
            self.begun /= 2;
            self.returned.iter_mut().chain(&mut self.reached).for_each(|count| *count /= 2.0);
        }
    }

    /// One that has just begun teaches nothing after all.
    fn take_back(&mut self) {
        self.begun = self.begun.saturating_sub(1);
        // It may have been halved since, with all others.
        self.reached[0] = (self.reached[0] - 1.0).max(0.0);
    }

    /// The return rate at each age.
    fn rates(&self) -> [ReturnRate; AGES] {
        let returns = |age: usize| (f64::from(self.returned[age]) / f64::from(self.reached[age]).max(1e-9)).min(0.999);
        let lasts_s: [f64; AGES] = std::array::from_fn(|age| (begins_us(age + 1) - begins_us(age)) as f64 * 1e-6);
        std::array::from_fn(|age| {
            let (mut best, mut still_silent, mut time_s, mut returned) = (0.0_f64, 1.0, 0.0, 0.0);
            for (until, lasts_s) in lasts_s.iter().enumerate().skip(age) {
                let share = returns(until);
                time_s += still_silent * lasts_s * (1.0 - share / 2.0);
                returned += still_silent * share;
                still_silent *= 1.0 - share;
                best = best.max(returned / time_s);
            }
            ReturnRate::of_per_s(best)
        })
    }
}

/// A silence that may still end.
#[derive(Clone, Copy, Debug)]
struct Silence {
    since: Tick,
    /// Tells it from earlier ones of the conversation.
    id: u32,
    class: Class,
}

/// A silence on its way through the ages: it waits for the end of the bucket in whose queue it is.
#[derive(Clone, Copy, Debug)]
struct Passing {
    key: KvKey,
    since: Tick,
    id: u32,
}

/// What was learned, to be kept over a restart.
#[derive(Clone, PartialEq, Debug)]
pub struct Learned {
    classes: Box<[Counts; CLASSES]>,
    silences: u64,
}

/// Says of which form kept counts are: a change of classes or ages is another one.
const FORM: &[u8; 8] = b"returns1";

impl Learned {
    /// Silences that it was learned from.
    pub fn silences(&self) -> u64 {
        self.silences
    }

    /// To be kept over a restart.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = [FORM.as_slice(), &self.silences.to_le_bytes()].concat();
        for class in self.classes.iter() {
            bytes.extend(class.begun.to_le_bytes());
            let counts = class.returned.iter().chain(&class.reached);
            counts.for_each(|count| bytes.extend(count.to_le_bytes()));
        }
        bytes
    }

    /// What was kept; `None` if it is of another form. A class whose counts are none begins anew.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (silences, mut rest) = bytes.strip_prefix(FORM)?.split_first_chunk()?;
        let mut next = || -> Option<[u8; 4]> {
            let (word, after) = rest.split_first_chunk()?;
            rest = after;
            Some(*word)
        };
        let mut classes = Box::new([Counts::NONE; CLASSES]);
        for class in classes.iter_mut() {
            class.begun = u32::from_le_bytes(next()?).min(HALVE_AT - 1);
            for count in class.returned.iter_mut().chain(&mut class.reached) {
                *count = f32::from_le_bytes(next()?);
            }
            // One class's damage is that class's alone.
            if !class.returned.iter().chain(&class.reached).all(|count| (0.0..1e9).contains(count)) {
                *class = Counts::NONE;
            }
        }
        rest.is_empty().then_some(Self { classes, silences: u64::from_le_bytes(*silences) })
    }
}

/// Most silences that are looked at in one go: after a night in which nothing happened the rest is for the next.
const MOST_AT_ONCE: usize = 1024;

/// Learns and tells return rates.
#[derive(Debug)]
pub struct ReturnRates {
    learned: Learned,
    rates: Box<[[ReturnRate; AGES]; CLASSES]>,
    silences: HashMap<KvKey, Silence>,
    /// By bucket, oldest first. Of equal length of wait, so that the first in a queue is the first due.
    passing: [VecDeque<Passing>; AGES],
    next_id: u32,
    edition: u64,
    /// Silences that began since rates were reckoned.
    unreckoned: u64,
    /// Ends of buckets, in microseconds of silence.
    ends_us: [u64; AGES],
}

impl Default for ReturnRates {
    fn default() -> Self {
        Self::new(Learned { classes: Box::new([Counts::NONE; CLASSES]), silences: 0 })
    }
}

impl ReturnRates {
    /// Goes on from what was learned before.
    pub fn new(learned: Learned) -> Self {
        let mut rates = Self {
            learned,
            rates: Box::new([[ReturnRate::default(); AGES]; CLASSES]),
            silences: HashMap::new(),
            passing: std::array::from_fn(|_| VecDeque::new()),
            next_id: 0,
            edition: 0,
            unreckoned: 0,
            ends_us: std::array::from_fn(|age| if age + 1 < AGES { begins_us(age + 1) } else { u64::MAX }),
        };
        rates.reckon();
        rates
    }

    pub fn learned(&self) -> &Learned {
        &self.learned
    }

    /// Whether enough was seen to go by.
    pub fn knows_enough(&self) -> bool {
        self.learned.silences >= ENOUGH
    }

    /// Rises whenever rates change.
    pub fn edition(&self) -> u64 {
        self.edition
    }

    /// When the rate of one that was silent since then is another one, while the edition is the same.
    pub fn changes_at(&self, since: Tick, now: Tick) -> Tick {
        Tick(since.0.saturating_add(self.ends_us[bucket(now.0.saturating_sub(since.0))]))
    }

    /// How often those of a class come back that were silent since then.
    pub fn rate(&self, class: Class, since: Tick, now: Tick) -> ReturnRate {
        self.rates[class.index()][bucket(now.0.saturating_sub(since.0))]
    }

    /// A conversation falls silent.
    pub fn begin(&mut self, now: Tick, key: KvKey, class: Class) {
        self.pass_on(now);
        if self.silences.len() >= SILENCES && !self.silences.contains_key(&key) {
            self.drop_oldest();
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.silences.insert(key, Silence { since: now, id, class });
        self.passing[0].push_back(Passing { key, since: now, id });
        self.learned.classes[class.index()].begin();
        // A prefix's uses are no conversation's silences: they say nothing of whether enough is known of those.
        self.learned.silences += u64::from(class != Class::SHARED);
        self.unreckoned += 1;
        if self.unreckoned >= RECKON_EVERY || self.learned.silences == ENOUGH {
            self.reckon();
        }
    }

    /// It turned out that the conversation is of another class: the silence that has just begun is one of those.
    pub fn reclassify(&mut self, key: KvKey, class: Class) {
        let Some(silence) = self.silences.get_mut(&key) else { return };
        let before = std::mem::replace(&mut silence.class, class);
        self.learned.classes[before.index()].take_back();
        self.learned.classes[class.index()].begin();
    }

    /// A conversation is back.
    pub fn end(&mut self, now: Tick, key: KvKey) {
        self.pass_on(now);
        if let Some(silence) = self.silences.remove(&key) {
            let age = bucket(now.0.saturating_sub(silence.since.0));
            self.learned.classes[silence.class.index()].returned[age] += 1.0;
        }
    }

    /// Nothing is to be learned from a conversation's silence any more: it is known to be over.
    pub fn forget(&mut self, key: KvKey) {
        let Some(silence) = self.silences.remove(&key) else { return };
        // Still in the first bucket, it would count there as one that did not come back.
        if self.passing[0].front().is_some_and(|first| first.since <= silence.since) {
            self.learned.classes[silence.class.index()].take_back();
            self.learned.silences -= u64::from(silence.class != Class::SHARED).min(self.learned.silences);
        }
    }

    /// Counts the buckets that silences have reached.
    fn pass_on(&mut self, now: Tick) {
        let mut left = MOST_AT_ONCE;
        for age in 0..AGES - 1 {
            while let Some(first) = self.passing[age].front() {
                if left == 0 {
                    return;
                }
                left -= 1;
                if now.0.saturating_sub(first.since.0) < self.ends_us[age] {
                    break;
                }
                let Some(passing) = self.passing[age].pop_front() else { break };
                let Some(silence) = self.silences.get(&passing.key).filter(|silence| silence.id == passing.id) else {
                    continue;
                };
                self.learned.classes[silence.class.index()].reached[age + 1] += 1.0;
                self.passing[age + 1].push_back(passing);
            }
        }
    }

    /// Stops following the silence that began first.
    fn drop_oldest(&mut self) {
        for queue in self.passing.iter_mut().rev() {
            while let Some(passing) = queue.pop_front() {
                if self.silences.get(&passing.key).is_some_and(|silence| silence.id == passing.id) {
                    self.silences.remove(&passing.key);
                    return;
                }
            }
        }
    }

    fn reckon(&mut self) {
        self.edition += 1;
        self.unreckoned = 0;
        for (rates, counts) in self.rates.iter_mut().zip(self.learned.classes.iter()) {
            *rates = counts.rates();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;

    fn class(number: u32) -> Class {
        Class::after(TurnShape { number, new_tokens: TokenCount(10) })
    }

    /// Conversations of a class that come back after so many seconds each, or never.
    fn teach(rates: &mut ReturnRates, now: &mut Tick, class: Class, returns_s: impl Iterator<Item = Option<u64>>) {
        for (index, after) in returns_s.enumerate() {
            let key = KvKey((u128::from(now.0) << 32) + index as u128);
            rates.begin(*now, key, class);
            now.0 += after.unwrap_or(1) * S;
            if after.is_some() {
                rates.end(*now, key);
            }
        }
    }

    #[test]
    fn buckets_are_half_octaves_of_seconds() {
        assert_eq!([0, 999_999, S, 2 * S - 1, 2 * S, 4 * S].map(bucket), [0, 0, 1, 2, 3, 5]);
        assert_eq!(bucket(u64::MAX), AGES - 1);
        for age in 1..AGES {
            assert_eq!((bucket(begins_us(age) - 1), bucket(begins_us(age) + 1)), (age - 1, age));
        }
    }

    #[test]
    fn classes_tell_turns_ends_and_lengths_apart() {
        let long = Class::after(TurnShape { number: 1, new_tokens: TokenCount(1025) });
        let all = [1, 2, 3, 5, 9].map(class).into_iter().flat_map(|class| [class, class.awaiting_tool()]);
        let indices: std::collections::BTreeSet<usize> =
            all.chain([long, long.awaiting_tool()]).map(Class::index).collect();
        assert_eq!(indices.len(), 12);
        assert_eq!(class(4), class(3));
        assert_eq!(class(1).awaiting_tool().awaiting_tool(), class(1).awaiting_tool());
        assert_eq!(class(9).describe(), "after turn 9 or a later one of up to 256 new tokens");
        assert_eq!(
            long.awaiting_tool().describe(),
            "after its first turn of up to 4096 new tokens, awaiting a tool's answer"
        );
    }

    #[test]
    fn those_whose_like_came_back_are_worth_more() {
        let (mut rates, mut now) = (ReturnRates::default(), Tick(0));
        assert!(!rates.knows_enough());
        for _ in 0..300 {
            teach(&mut rates, &mut now, class(1), [None].into_iter());
            teach(&mut rates, &mut now, class(5), [Some(20)].into_iter());
        }
        assert!(rates.knows_enough());
        let at = |class, silent_s: u64| rates.rate(class, Tick(0), Tick(silent_s * S));
        assert!(at(class(5), 5).0 > 20 * at(class(1), 5).0, "{:?} {:?}", at(class(5), 5), at(class(1), 5));
        // None of them was ever silent for a minute and came back.
        assert!(at(class(5), 60) < at(class(5), 5));
    }

    #[test]
    fn a_silence_counts_in_each_age_that_it_reaches_and_in_the_one_in_which_it_ends() {
        let mut rates = ReturnRates::default();
        rates.begin(Tick(0), KvKey(1), class(1));
        rates.end(Tick(3 * S), KvKey(1));
        // Its place in the queues is stale, and a later silence of the same conversation is not taken for it.
        rates.begin(Tick(3 * S), KvKey(1), class(2));
        rates.end(Tick(100 * S), KvKey(1));
        rates.end(Tick(200 * S), KvKey(1));
        let seen = |class: Class, of: fn(&Counts) -> &[f32; AGES], prior: f32| -> Vec<usize> {
            let counts = of(&rates.learned.classes[class.index()]);
            (0..AGES).filter(|age| counts[*age] - prior > 0.5).collect()
        };
        assert_eq!(seen(class(1), |counts| &counts.reached, PRIOR_REACHED), [0, 1, 2, 3, 4]);
        assert_eq!(seen(class(1), |counts| &counts.returned, PRIOR_RETURNED), [bucket(3 * S)]);
        assert_eq!(seen(class(2), |counts| &counts.returned, PRIOR_RETURNED), [bucket(97 * S)]);
        assert_eq!(seen(class(2), |counts| &counts.reached, PRIOR_REACHED).len(), bucket(97 * S) + 1);
    }

    #[test]
    fn one_that_is_over_or_forgotten_teaches_nothing_more() {
        let mut rates = ReturnRates::default();
        let reached = |rates: &ReturnRates| rates.learned.classes[class(1).index()].reached;
        let before = reached(&rates);
        rates.begin(Tick(0), KvKey(1), class(1));
        rates.forget(KvKey(1));
        rates.end(Tick(50 * S), KvKey(1));
        assert_eq!(reached(&rates), before);
    }

    #[test]
    fn what_was_learned_survives_as_bytes_and_other_bytes_are_refused() {
        let (mut rates, mut now) = (ReturnRates::default(), Tick(0));
        teach(&mut rates, &mut now, class(2), (0..300).map(|n| (n % 3 > 0).then_some(n)));
        let bytes = rates.learned().to_bytes();
        let again = ReturnRates::new(Learned::from_bytes(&bytes).unwrap());
        assert!(again.learned() == rates.learned() && again.knows_enough());
        let at = |rates: &ReturnRates| rates.rate(class(2), Tick(0), Tick(30 * S));
        assert_eq!(at(&again), at(&ReturnRates::new(rates.learned().clone())));
        let mut no_number = bytes.clone();
        no_number[20..24].copy_from_slice(&f32::NAN.to_le_bytes());
        let longer = [bytes.as_slice(), &[0]].concat();
        for other in [&bytes[..bytes.len() - 1], &bytes[1..], &[], &longer] {
            assert_eq!(Learned::from_bytes(other), None);
        }
        let damaged = Learned::from_bytes(&no_number).unwrap();
        assert!(damaged.classes[0] == Counts::NONE && damaged.classes[1..] == rates.learned().classes[1..]);
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_silence_goes() {
        let mut rates = ReturnRates::default();
        for key in 0..SILENCES as u64 + 10 {
            rates.begin(Tick(key * 1000), KvKey(u128::from(key)), class(1));
        }
        assert_eq!(rates.silences.len(), SILENCES);
        assert!(!rates.silences.contains_key(&KvKey(9)) && rates.silences.contains_key(&KvKey(10)));
        assert_eq!(rates.passing.iter().map(VecDeque::len).sum::<usize>(), SILENCES);
    }

    #[test]
    fn a_rate_reads_as_one_in_so_many() {
        let says = |per_s: f64| ReturnRate::of_per_s(per_s).to_string();
        assert_eq!(says(0.02), "1 in 50 comes back per second");
        assert_eq!(says(1.0 / 2400.0), "1 in 40 comes back per minute");
        assert_eq!(says(1.0 / 86_400.0 / 30.0), "1 in 30 comes back per day");
        assert_eq!(says(0.0), "almost none comes back");
    }
}
