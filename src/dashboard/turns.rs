//! How did turns go lately, of everybody and of one conversation?
//!
//! A ring of the newest turns, each linked with the one before it of the same conversation, and the times to first tokens
//! of the last minutes. Bounded: what has left the ring is forgotten.

use std::collections::{HashMap, VecDeque};

use crate::engine::status::happened::{TurnNote, TurnStep};
use crate::engine::status::{Path, PromptUsage};
use crate::types::{KvKey, TenantId, Tick, TurnId};

/// Turns that are remembered.
const RING: usize = 1 << 16;
/// First tokens that windows look back on.
const RECENT: usize = 20_000;
/// How far they look back, in microseconds.
const LOOK_BACK_US: u64 = 300_000_000;

/// A turn, as far as it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnRecord {
    pub key: KvKey,
    pub tenant: TenantId,
    /// When its first token was there.
    pub at: Tick,
    pub number: u32,
    pub path: Path,
    pub prompt: PromptUsage,
    pub ttft_ms: u64,
    /// (tokens, ms); `None` while it runs.
    pub answer: Option<(u32, u64)>,
    /// The place of the one before it of its conversation.
    before: Option<u64>,
}

/// A first token of the last minutes.
#[derive(Clone, Copy, Debug)]
pub struct FirstToken {
    pub at: Tick,
    pub tenant: TenantId,
    pub path: Path,
    pub ttft_ms: u64,
}

#[derive(Debug, Default)]
pub struct Turns {
    ring: VecDeque<TurnRecord>,
    /// Turns that have left the ring.
    gone: u64,
    running: HashMap<TurnId, u64>,
    recent: VecDeque<FirstToken>,
}

/// Quantiles of times.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    pub p50_ms: Option<u64>,
    pub p95_ms: Option<u64>,
    pub turns: usize,
}

impl Turns {
    /// Takes in a note. `before`: the place of the conversation's turn before. Says the place of a turn that has come to its
    /// first token.
    pub fn note(&mut self, note: &TurnNote, before: Option<u64>) -> Option<u64> {
        match note.step {
            TurnStep::FirstToken { number, path, prompt, ttft_ms } => {
                if self.ring.len() == RING {
                    self.ring.pop_front();
                    self.gone += 1;
                }
                let place = self.gone + self.ring.len() as u64;
                let (key, tenant, at) = (note.key, note.tenant, note.at);
                self.ring.push_back(TurnRecord {
                    key,
                    tenant,
                    at,
                    number,
                    path,
                    prompt,
                    ttft_ms,
                    answer: None,
                    before,
                });
                self.running.insert(note.turn, place);
                if self.recent.len() == RECENT {
                    self.recent.pop_front();
                }
                self.recent.push_back(FirstToken { at, tenant: note.tenant, path, ttft_ms });
                Some(place)
            }
            TurnStep::Ended(usage) => {
                let place = self.running.remove(&note.turn)?;
                let record = self.ring.get_mut(usize::try_from(place.checked_sub(self.gone)?).ok()?)?;
                record.answer = Some((usage.generated.0, usage.decode_ms));
                record.prompt = usage.prompt;
                record.ttft_ms = usage.ttft_ms;
                None
            }
            TurnStep::Failed => {
                self.running.remove(&note.turn);
                None
            }
        }
    }

    /// Forgets turns that are over, of which nobody told: those of conversations where nothing runs.
    pub fn forget_ended(&mut self, runs: impl Fn(KvKey) -> bool) {
        let (ring, gone) = (&self.ring, self.gone);
        self.running.retain(|_, place| {
            let index = place.checked_sub(gone).and_then(|index| usize::try_from(index).ok());
            index.and_then(|index| ring.get(index)).is_some_and(|record| runs(record.key))
        });
    }

    /// A conversation's turns, from the one at a place back, as far as they are remembered.
    pub fn back_from(&self, place: Option<u64>) -> impl Iterator<Item = &TurnRecord> {
        let get = |place: u64| self.ring.get(usize::try_from(place.checked_sub(self.gone)?).ok()?);
        let mut next = place;
        std::iter::from_fn(move || {
            let record = get(next?)?;
            next = record.before;
            Some(record)
        })
    }

    /// Turns whose first tokens came from then on, as far back as they are remembered, the newest first.
    pub fn since_tick(&self, since: Tick) -> impl Iterator<Item = &TurnRecord> {
        self.ring.iter().rev().take_while(move |record| record.at >= since)
    }

    /// First tokens of the last `window_us`, the newest first.
    pub fn since(&self, now: Tick, window_us: u64) -> impl Iterator<Item = &FirstToken> {
        let since = Tick(now.0.saturating_sub(window_us.min(LOOK_BACK_US)));
        self.recent.iter().rev().take_while(move |first| first.at >= since)
    }
}

/// Quantiles of times in milliseconds.
pub fn spread(mut ms: Vec<u64>) -> Spread {
    ms.sort_unstable();
    let at = |percent: usize| ms.get((ms.len() * percent / 100).min(ms.len().saturating_sub(1))).copied();
    Spread { p50_ms: at(50), p95_ms: at(95), turns: ms.len() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::status::TurnUsage;
    use crate::types::TokenCount;

    fn first(turn: u64, key: u128, ttft_ms: u64) -> TurnNote {
        let prompt = PromptUsage::default();
        let step = TurnStep::FirstToken { number: 1, path: Path::Hot, prompt, ttft_ms };
        TurnNote { turn: TurnId(turn), key: KvKey(key), tenant: TenantId(0), at: Tick(turn), step }
    }

    #[test]
    fn a_turn_whose_end_was_never_told_is_forgotten_with_its_conversations_rest() {
        let mut turns = Turns::default();
        for turn in 0..4 {
            turns.note(&first(turn, turn.into(), 1), None);
        }
        turns.forget_ended(|key| key == KvKey(2));
        assert_eq!(turns.running.keys().collect::<Vec<_>>(), [&TurnId(2)]);
        let ended = TurnStep::Ended(TurnUsage { generated: TokenCount(7), ..TurnUsage::default() });
        for turn in [1, 2] {
            turns.note(&TurnNote { step: ended, ..first(turn, turn.into(), 1) }, None);
        }
        let answers = [1, 2].map(|place| turns.back_from(Some(place)).next().unwrap().answer);
        assert_eq!((answers, turns.running.len()), ([None, Some((7, 0))], 0));
    }

    #[test]
    fn a_conversations_turns_are_found_back_from_its_newest_and_no_further_than_they_are_kept() {
        let mut turns = Turns::default();
        let mut newest = [None; 2];
        for turn in 0..RING as u64 + 3 {
            let of = (turn % 2) as usize;
            newest[of] = turns.note(&first(turn, of as u128, turn), newest[of]);
        }
        let ended = TurnStep::Ended(TurnUsage { generated: TokenCount(7), decode_ms: 9, ..TurnUsage::default() });
        let last = RING as u64 + 2;
        turns.note(&TurnNote { step: ended, ..first(last, 0, 0) }, None);
        let back: Vec<_> = turns.back_from(newest[0]).collect();
        assert_eq!((back[0].answer, back[1].at), (Some((7, 9)), Tick(last - 2)));
        assert!(back.len() < RING && back.iter().all(|record| record.key == KvKey(0)));
        assert_eq!(turns.back_from(None).count(), 0);
    }

    #[test]
    fn quantiles_are_of_the_window_alone() {
        let mut turns = Turns::default();
        for turn in 1..=100 {
            turns.note(&first(turn * 1_000_000, 1, turn), None);
        }
        let now = Tick(100_000_000);
        let ms = |window| spread(turns.since(now, window).map(|first| first.ttft_ms).collect());
        assert_eq!(ms(60_000_000), Spread { p50_ms: Some(70), p95_ms: Some(97), turns: 61 });
        assert_eq!(ms(1_000_000).turns, 2);
        assert_eq!(spread(Vec::new()), Spread::default());
    }
}
