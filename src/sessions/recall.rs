//! Which tokens did we generate for a history that a client sends back as text?
//!
//! A stateless client resends what it read from us; tokenised anew it may become other ids than those that were generated,
//! and their KV would not be found. So the token logs of conversations are remembered by what was said in them: a chain of
//! digests, one behind each answer, keyed by tenant. What is found is only a proposal: a prompt takes its tokens as far
//! as they stand for the rendered text, so that a wrong one costs a comparison. If what the client sends is to the letter
//! what the log's prompt was rendered from, it isn't rendered again.
//! Bounds: tokens a tenant, the logs longest unused go first. Cost: O(new messages) a turn that goes on from a log.

use std::collections::HashMap;

use dashmap::DashMap;
use hashlink::LinkedHashMap;

use super::digests::{Digest, Digests};
use super::prompt::{Known, Recalled};
use super::token_log::TokenLog;
use crate::engine::Front;
use crate::types::{KvKey, TenantId};

/// A log's number within its tenant's memory.
type LogId = u64;

/// A log, and the digests that lead to it.
struct Remembered {
    key: KvKey,
    log: TokenLog,
    digests: Vec<Digest>,
    /// The front of the log's prompt, and the exact digest of the messages that it depends on.
    front: Option<(Front, Digest)>,
}

/// What one tenant's conversations were made of.
#[derive(Default)]
struct Memory {
    /// The most lately used last.
    logs: LinkedHashMap<LogId, Remembered>,
    by_key: HashMap<KvKey, LogId>,
    by_digest: HashMap<Digest, LogId>,
    made: LogId,
    tokens: usize,
}

impl Memory {
    fn find(&mut self, digests: &Digests) -> Option<Recalled> {
        let id = *digests.answers().iter().rev().find_map(|digest| self.by_digest.get(digest))?;
        let found = self.logs.to_back(&id)?;
        let front = found.front.as_ref().filter(|(front, digest)| digests.exact(front.depends_on()) == Some(*digest));
        Some(Recalled { log: found.log.clone(), front: front.map(|(front, _)| front.clone()) })
    }

    fn keep(&mut self, key: KvKey, known: &Known, log: TokenLog, most: usize) {
        let answers = known.digests().answers();
        let front = known.front().and_then(|front| Some((front.clone(), known.digests().exact(front.depends_on())?)));
        let (id, had) = match self.goes_on_from(key, answers) {
            Some((id, had)) => {
                if let Some(other) = self.by_key.get(&key).copied().filter(|other| *other != id) {
                    self.forget(other);
                }
                (id, had)
            }
            None => {
                if let Some(other) = self.by_key.get(&key).copied() {
                    self.forget(other);
                }
                self.made += 1;
                (self.made, 0)
            }
        };
        let mut digests = Vec::new();
        if let Some(before) = self.logs.remove(&id) {
            self.by_key.remove(&before.key);
            self.tokens -= before.log.len().get();
            digests = before.digests;
        }
        digests.extend_from_slice(&answers[had..]);
        self.tokens += log.len().get();
        self.by_key.insert(key, id);
        self.logs.insert(id, Remembered { key, log, digests, front });
        for digest in &answers[had..] {
            // A log of the same beginning that nothing else leads to is of no use any more.
            if let Some(older) = self.by_digest.insert(*digest, id)
                && older != id
                && !self.is_reachable(older)
            {
                self.forget(older);
            }
        }
        while self.tokens > most
            && let Some((oldest, _)) = self.logs.front()
        {
            self.forget(*oldest);
        }
    }

    /// The log whose place one with these answers takes, since all that leads to it leads on to this one, and how many
    /// answers that are.
    fn goes_on_from(&self, key: KvKey, answers: &[Digest]) -> Option<(LogId, usize)> {
        let of_digest = || answers.iter().rev().find_map(|digest| self.by_digest.get(digest));
        let id = *self.by_key.get(&key).or_else(of_digest)?;
        let had = &self.logs.get(&id)?.digests;
        let last = had.len().checked_sub(1)?;
        (answers.get(last) == had.last()).then_some((id, had.len()))
    }

    /// Whether a digest leads to this log. A log that takes others' digests takes them from the oldest on, so that the last
    /// is the last to go.
    fn is_reachable(&self, id: LogId) -> bool {
        let last = self.logs.get(&id).and_then(|known| known.digests.last());
        last.is_some_and(|digest| self.by_digest.get(digest) == Some(&id))
    }

    fn forget(&mut self, id: LogId) {
        let Some(gone) = self.logs.remove(&id) else { return };
        self.tokens -= gone.log.len().get();
        self.by_key.remove(&gone.key);
        for digest in gone.digests {
            if self.by_digest.get(&digest) == Some(&id) {
                self.by_digest.remove(&digest);
            }
        }
    }
}

/// The memories of all tenants.
pub(super) struct Recall {
    tenants: DashMap<TenantId, Memory>,
    /// Tokens that a tenant's memory holds.
    most: usize,
}

impl Recall {
    pub fn new(most: usize) -> Self {
        Self { tenants: DashMap::new(), most }
    }

    /// The log of the longest beginning of this conversation that is remembered.
    pub fn find(&self, tenant: TenantId, conversation: &Digests) -> Option<Recalled> {
        self.tenants.get_mut(&tenant)?.find(conversation)
    }

    /// Remembers the log of a conversation, or of a turn that has its own key, in the place of what was known of it.
    pub fn keep(&self, tenant: TenantId, key: KvKey, conversation: &Known, log: TokenLog) {
        if log.len().get() <= self.most && !conversation.digests().answers().is_empty() {
            self.tenants.entry(tenant).or_default().keep(key, conversation, log, self.most);
        }
    }

    /// Forgets what a conversation was made of.
    pub fn forget(&self, tenant: TenantId, key: KvKey) {
        if let Some(mut memory) = self.tenants.get_mut(&tenant)
            && let Some(id) = memory.by_key.get(&key).copied()
        {
            memory.forget(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::sessions::fixtures::message;
    use crate::sessions::messages::Role;
    use crate::store::LogToken;
    use crate::types::{TenantKey, TokenId};

    const KEY: TenantKey = TenantKey([7; 32]);

    fn log(tokens: u32) -> TokenLog {
        TokenLog::new((0..tokens).map(|id| LogToken { id: TokenId(id), bytes: 1 }).collect(), 0)
    }

    /// A conversation of these texts, the user's first.
    fn said(texts: &[&str]) -> Known {
        let roles = [Role::User, Role::Assistant].into_iter().cycle();
        let mut digests = Digests::new(&KEY, None);
        texts.iter().zip(roles).for_each(|(text, role)| digests.add(&message(role, text)));
        Known::of(digests)
    }

    fn found(recall: &Recall, tenant: u32, texts: &[&str]) -> Option<usize> {
        recall.find(TenantId(tenant), said(texts).digests()).map(|found| found.log.len().get())
    }

    #[test]
    fn the_longest_known_beginning_is_found_and_no_other_tenants() {
        let recall = Recall::new(100);
        recall.keep(TenantId(1), KvKey(1), &said(&["Hi", "Hello"]), log(10));
        assert_eq!(found(&recall, 1, &["Hi", "Hello", "More"]), Some(10));
        assert_eq!(found(&recall, 1, &["Hi", " Hello\n", "More"]), Some(10));
        assert_eq!(found(&recall, 1, &["Hi", "Hullo", "More"]), None);
        assert_eq!(found(&recall, 1, &["Hi"]), None, "nothing was answered yet");
        assert_eq!(found(&recall, 2, &["Hi", "Hello", "More"]), None);
    }

    #[test]
    fn a_conversation_that_goes_on_is_one_log_and_its_beginning_still_leads_there() {
        let recall = Recall::new(100);
        recall.keep(TenantId(1), KvKey(2), &said(&["Hi", "Hello"]), log(10));
        recall.keep(TenantId(1), KvKey(3), &said(&["Hi", "Hello", "More", "Well"]), log(20));
        assert_eq!(found(&recall, 1, &["Hi", "Hello", "Other"]), Some(20));
        assert_eq!(recall.tenants.get(&TenantId(1)).unwrap().tokens, 20);
    }

    #[test]
    fn the_log_longest_unused_goes_and_leaves_nothing() {
        let recall = Recall::new(25);
        for (key, question) in [(10, "a"), (11, "b")] {
            recall.keep(TenantId(1), KvKey(key), &said(&[question, "x"]), log(10));
        }
        assert_eq!(found(&recall, 1, &["a", "x", "?"]), Some(10));
        recall.keep(TenantId(1), KvKey(5), &said(&["c", "x"]), log(10));
        assert_eq!(found(&recall, 1, &["b", "x", "?"]), None);
        assert_eq!(found(&recall, 1, &["a", "x", "?"]), Some(10));
        let memory = recall.tenants.get(&TenantId(1)).unwrap();
        let sizes = (memory.tokens, memory.logs.len(), memory.by_digest.len(), memory.by_key.len());
        assert_eq!(sizes, (20, 2, 2, 2));
        drop(memory);
        recall.keep(TenantId(1), KvKey(6), &said(&["long", "x"]), log(26));
        assert_eq!(found(&recall, 1, &["long", "x", "?"]), None, "one that never fits pushes nobody out");
        assert_eq!(found(&recall, 1, &["a", "x", "?"]), Some(10));
        recall.forget(TenantId(1), KvKey(10));
        assert_eq!(found(&recall, 1, &["a", "x", "?"]), None);
    }

    proptest! {
        /// Whatever branches, goes on or is taken back: so that this one digest tells whether a log can be found.
        #[test]
        fn the_last_digest_of_every_log_leads_to_it(
            kept in vec((0..4_u128, vec(prop::sample::select(vec!["a", "b"]), 1..5), any::<bool>(), 0..5_usize), 1..40),
            most in 10..100_usize,
        ) {
            let recall = Recall::new(most);
            for (key, answers, forgets, touched) in &kept {
                let texts: Vec<&str> = answers.iter().flat_map(|answer| ["?", answer]).collect();
                recall.keep(TenantId(1), KvKey(*key), &said(&texts), log(10));
                prop_assert_eq!(found(&recall, 1, &texts), Some(10));
                found(&recall, 1, &texts[..texts.len().min(2 * touched)]);
                if *forgets {
                    recall.forget(TenantId(1), KvKey((key + 1) % 4));
                }
                let memory = recall.tenants.get(&TenantId(1)).unwrap();
                for (id, known) in &memory.logs {
                    prop_assert_eq!(memory.by_digest.get(known.digests.last().unwrap()), Some(id));
                }
                prop_assert!(memory.by_digest.values().all(|id| memory.logs.contains_key(id)));
                prop_assert_eq!(memory.logs.len(), memory.by_key.len());
            }
        }
    }

    #[test]
    fn a_branch_of_a_conversation_leaves_the_others_tokens_where_they_are() {
        let recall = Recall::new(100);
        recall.keep(TenantId(1), KvKey(1), &said(&["a", "x", "b", "y"]), log(10));
        recall.keep(TenantId(1), KvKey(2), &said(&["a", "x", "c", "z"]), log(12));
        assert_eq!(found(&recall, 1, &["a", "x", "b", "y", "?"]), Some(10));
        recall.keep(TenantId(1), KvKey(1), &said(&["a", "x", "b", "y", "d", "w"]), log(14));
        assert_eq!(found(&recall, 1, &["a", "x", "b", "y", "?"]), Some(14));
        assert_eq!(found(&recall, 1, &["a", "x", "c", "z", "?"]), Some(12));
        // What was said before is taken back.
        recall.keep(TenantId(1), KvKey(1), &said(&["a", "x"]), log(5));
        assert_eq!(found(&recall, 1, &["a", "x", "b", "y", "?"]), Some(5));
        let memory = recall.tenants.get(&TenantId(1)).unwrap();
        let sizes = (memory.tokens, memory.logs.len(), memory.by_digest.len(), memory.by_key.len());
        assert_eq!(sizes, (17, 2, 2, 2));
    }
}
