//! What was decided about residency, and why?
//!
//! A bounded ring; ids only rise, so a reader sees what it has missed.

use std::collections::VecDeque;

use crate::types::{BlockCount, KvKey, TenantId, Tick, Tier};

/// Why a conversation lost its copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// Its conversation was over.
    Ended,
    /// It had been silent the longest.
    Lru,
    /// The same, of a tenant that has more than its ceiling: those go first.
    OverCeiling,
    /// Its turn was preempted: the newest of the tenant furthest above its floor.
    Preempted,
    /// A client asked for it.
    Requested,
}

impl Rule {
    pub fn name(self) -> &'static str {
        match self {
            Rule::Ended => "ended",
            Rule::Lru => "lru",
            Rule::OverCeiling => "over_ceiling",
            Rule::Preempted => "preempted",
            Rule::Requested => "requested",
        }
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
    pub from: Tier,
    /// Blocks that became free.
    pub freed: BlockCount,
    /// Blocks of which this was the last copy: they are re-encoded if the conversation goes on.
    pub lost: BlockCount,
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
