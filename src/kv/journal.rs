//! What was decided about residency, and why?
//!
//! A bounded ring; ids only rise, so a reader sees what it has missed. An entry can be said as sentences, for whoever asks
//! why a conversation has to wait.

use std::collections::VecDeque;

use super::evictor::Reason;
use crate::types::{BlockCount, BlockSize, KvKey, TenantId, Tick, Tier, counted};

/// Why a conversation lost its copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// Its conversation was over.
    Ended,
    /// It had been silent the longest.
    Lru,
    /// It was the least likely to be continued soon.
    ReturnRate,
    /// One of these two, of a tenant that has more than its ceiling: those go first.
    OverCeiling,
    /// Its turn was preempted: the newest of the tenant furthest above its floor.
    Preempted,
    /// A client asked for it.
    Requested,
    /// Nothing was lost: a turn of it has to wait, since its tenant has all that its ceiling leaves it.
    AtCeiling,
    /// Nothing was lost: a turn of it has to wait, since nobody may lose what it needs.
    NoVictim,
    /// What came back was not what had been stored.
    Checksum,
}

impl Rule {
    /// Those by which memory is taken for somebody's turn.
    pub const EVICTIONS: [Rule; 4] = [Rule::Ended, Rule::Lru, Rule::ReturnRate, Rule::OverCeiling];

    pub fn name(self) -> &'static str {
        match self {
            Rule::Ended => "ended",
            Rule::Lru => "lru",
            Rule::ReturnRate => "return_rate",
            Rule::OverCeiling => "over_ceiling",
            Rule::Preempted => "preempted",
            Rule::Requested => "requested",
            Rule::AtCeiling => "at_ceiling",
            Rule::NoVictim => "no_victim",
            Rule::Checksum => "checksum",
        }
    }

    /// Whether it says why a conversation lost its place: the others say what a turn met with.
    pub fn takes(self) -> bool {
        !matches!(self, Rule::AtCeiling | Rule::NoVictim | Rule::Checksum)
    }
}

/// One decision.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub id: u64,
    pub at: Tick,
    /// Who lost blocks, and whose it is.
    pub victim: KvKey,
    pub tenant: TenantId,
    /// For whose turn.
    pub for_tenant: TenantId,
    pub rule: Rule,
    pub reason: Reason,
    pub from: Tier,
    /// Blocks that became free.
    pub freed: BlockCount,
    /// Blocks of which this was the last copy: they are re-encoded if the conversation goes on.
    pub lost: BlockCount,
}

impl Entry {
    /// The decision as an operator reads it.
    pub fn sentence(&self, block: BlockSize) -> String {
        // Tenants read of their own conversations, and not whose turn it was.
        let asked = if self.for_tenant == self.tenant { "its own tenant" } else { "another tenant" };
        let from = self.from.name();
        let why = match self.rule {
            Rule::Ended => "it was over".to_owned(),
            Rule::Lru => format!("it was silent the longest, for {}", span(self.reason.silent_ms)),
            Rule::ReturnRate => format!("it was the least likely to go on soon: {}", self.reason),
            Rule::OverCeiling => {
                format!("its tenant has more than its ceiling, and of its conversations it went first: {}", self.reason)
            }
            Rule::Preempted => {
                return format!("Its turn was set back for a turn of {asked}, and goes on as soon as there is room.");
            }
            Rule::Requested => "a client asked for it".to_owned(),
            Rule::AtCeiling => {
                let why = "its tenant has all that its ceiling leaves it while memory is short";
                return format!("Its turn has to wait: {why}, and its running turns hold that.");
            }
            Rule::NoVictim => {
                return "Its turn has to wait: running turns and other tenants' floors hold the memory.".to_owned();
            }
            Rule::Checksum => {
                let tokens = counted(self.lost.tokens(block).0, "token is", "tokens are");
                return format!(
                    "What came back from the {from} tier was not what had been stored: {tokens} encoded again."
                );
            }
        };
        let cost = match self.lost.tokens(block).0 {
            0 => "nothing is lost by it".to_owned(),
            tokens => {
                format!("{} encoded again if it goes on", counted(tokens, "token is", "tokens are"))
            }
        };
        let blocks = counted(self.freed.0, "block", "blocks");
        format!("It gave {blocks} of the {from} tier to {asked}, because {why}; {cost}.")
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "silent for {}", span(self.silent_ms))?;
        if let Some(class) = self.class {
            write!(f, " {}", class.describe())?;
        }
        match self.rate {
            Some(rate) => write!(f, ", and of those like it {rate}"),
            None => Ok(()),
        }
    }
}

/// A time as people say it, in its largest whole unit.
fn span(ms: u64) -> String {
    match ms / 1000 {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

/// The newest decisions.
#[derive(Debug)]
pub struct Journal {
    entries: VecDeque<Entry>,
    bound: usize,
    next: u64,
}

impl Journal {
    /// Keeps the newest `bound` entries.
    pub fn new(bound: usize) -> Self {
        Self { entries: VecDeque::new(), bound, next: 0 }
    }

    /// Adds an entry under the next id, which it returns.
    pub fn add(&mut self, entry: Entry) -> u64 {
        let id = self.next;
        self.next += 1;
        if self.entries.len() == self.bound {
            self.entries.pop_front();
        }
        if self.bound > 0 {
            self.entries.push_back(Entry { id, ..entry });
        }
        id
    }

    /// Oldest first.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &Entry> {
        self.entries.iter()
    }

    /// Entries ever made.
    pub fn total(&self) -> u64 {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::super::return_rate::{Class, ReturnRate, TurnShape};
    use super::*;
    use crate::types::TokenCount;

    #[test]
    fn an_entry_says_who_lost_what_to_whom_and_why() {
        let class = Class::after(TurnShape { number: 1, new_tokens: TokenCount(9) });
        let reason = Reason { silent_ms: 750_000, class: Some(class), rate: Some(ReturnRate(416_667)) };
        let entry = Entry {
            id: 1,
            at: Tick(0),
            victim: KvKey(5),
            tenant: TenantId(0),
            for_tenant: TenantId(1),
            rule: Rule::ReturnRate,
            reason,
            from: Tier::Device,
            freed: BlockCount(12),
            lost: BlockCount(3),
        };
        assert_eq!(
            entry.sentence(BlockSize(16)),
            "It gave 12 blocks of the device tier to another tenant, because it was the least likely to go on soon: silent for \
             12 min after its first turn of up to 256 new tokens, and of those like it 1 in 40 comes back per minute; 48 tokens are encoded again if \
             it goes on."
        );
        let reason = Reason { silent_ms: 7_200_000, ..Reason::default() };
        let lru = Entry { rule: Rule::Lru, for_tenant: TenantId(0), lost: BlockCount(0), reason, ..entry };
        assert_eq!(
            lru.sentence(BlockSize(16)),
            "It gave 12 blocks of the device tier to its own tenant, because it was silent the longest, for 2 h; nothing is \
             lost by it."
        );
        let one = Entry { freed: BlockCount(1), lost: BlockCount(1), ..lru };
        let sentence = one.sentence(BlockSize(1));
        assert!(sentence.starts_with("It gave 1 block of the device tier"), "{sentence}");
        assert!(sentence.ends_with("; 1 token is encoded again if it goes on."), "{sentence}");
    }
}
