//! What has happened since somebody last asked?
//!
//! For one who keeps books of turns, decisions and residencies beside the engine, and asks a few times a second. Bounded:
//! whoever asks too rarely is told that something is missing, and looks at everything anew.

use super::{Path, PromptUsage, TurnUsage, Why};
use crate::types::{KvKey, TenantId, Tick, TurnId};

/// Most of each kind that is kept.
const MOST: usize = 1 << 16;

/// What has happened, in order.
#[derive(Debug, Default)]
pub struct Happened {
    /// Conversations whose residency changed, each once or more.
    pub changed: Vec<KvKey>,
    pub decisions: Vec<Why>,
    pub turns: Vec<TurnNote>,
    /// More happened than was kept.
    pub overflowed: bool,
}

impl Happened {
    /// Whether nothing has.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.decisions.is_empty() && self.turns.is_empty() && !self.overflowed
    }

    /// Adds what comes after, and leaves that empty.
    pub fn append(&mut self, next: &mut Self) {
        let full = self.changed.len() + next.changed.len() > MOST
            || self.decisions.len() + next.decisions.len() > MOST
            || self.turns.len() + next.turns.len() > MOST;
        if full {
            *self = Self { overflowed: true, ..Self::default() };
        }
        self.changed.append(&mut next.changed);
        self.decisions.append(&mut next.decisions);
        self.turns.append(&mut next.turns);
        self.overflowed |= std::mem::take(&mut next.overflowed);
    }
}

/// Something of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnNote {
    pub turn: TurnId,
    pub key: KvKey,
    pub tenant: TenantId,
    pub at: Tick,
    pub step: TurnStep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnStep {
    /// Its first token is there. `number`: of the conversation's turns, from 1.
    FirstToken {
        number: u32,
        path: Path,
        prompt: PromptUsage,
        ttft_ms: u64,
    },
    Ended(TurnUsage),
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asks_too_rarely_is_told_so_and_keeps_what_came_last() {
        let mut kept = Happened::default();
        for round in 0..5 {
            let mut next = Happened { changed: vec![KvKey(round); MOST / 2], ..Happened::default() };
            kept.append(&mut next);
            assert!(next.is_empty());
        }
        assert!(kept.overflowed && kept.changed.len() <= MOST && kept.changed.last() == Some(&KvKey(4)));
    }
}
