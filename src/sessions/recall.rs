//! Which tokens did we generate for a history that a client sends back as text?
//!
//! A stateless client resends what it read from us; tokenised anew it may become other ids than those that were generated,
//! and their KV would not be found. So the token logs of conversations are remembered by what was said in them: a chain of
//! digests, one behind each answer, keyed by tenant. What is found is only a proposal: a prompt takes its tokens as far
//! as they stand for the rendered text, so that a wrong one costs a comparison.
//! Bounds: tokens a tenant, the logs longest unused go first. Cost: O(messages) a turn.

use std::collections::HashMap;
use std::sync::Arc;

use dashmap::DashMap;
use hashlink::LinkedHashMap;

use super::messages::{Message, Role};
use super::transcript::{TokenLog, text_of};
use crate::types::{KvKey, TenantId, TenantKey};

type Digest = [u8; 32];

/// What the messages of a conversation are known by, up to each answer and to the end.
#[derive(Clone, Debug, Default)]
pub(super) struct Digests {
    answers: Vec<Digest>,
    /// Of all messages; to be continued with the answer.
    end: Option<Digest>,
    key: Option<TenantKey>,
}

impl Digests {
    pub fn of<'a>(key: &TenantKey, instructions: Option<&str>, messages: impl Iterator<Item = &'a Message>) -> Self {
        let mut digests = Self { answers: Vec::new(), end: Some([0; 32]), key: Some(*key) };
        if let Some(instructions) = instructions {
            digests.add(Role::System, None, instructions);
        }
        for message in messages {
            digests.add(message.role, message.name.as_deref(), &text_of(message));
        }
        digests
    }

    /// Spaces at a text's ends are not told apart: clients trim what they show.
    fn add(&mut self, role: Role, name: Option<&str>, text: &str) {
        let (Some(end), Some(key)) = (self.end, self.key) else { return };
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(&end);
        for field in [role.name(), name.unwrap_or_default(), text.trim()] {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field.as_bytes());
        }
        let digest = *hasher.finalize().as_bytes();
        self.end = Some(digest);
        if role == Role::Assistant {
            self.answers.push(digest);
        }
    }

    /// The conversation with its answer.
    pub fn answered(mut self, text: &str) -> Self {
        self.add(Role::Assistant, None, text);
        self
    }
}

/// A log, and the digests that lead to it.
struct Remembered {
    log: Arc<TokenLog>,
    digests: Vec<Digest>,
}

/// What one tenant's conversations were made of.
#[derive(Default)]
struct Memory {
    /// The most lately used last.
    logs: LinkedHashMap<KvKey, Remembered>,
    by_digest: HashMap<Digest, KvKey>,
    tokens: usize,
}

impl Memory {
    fn find(&mut self, digests: &Digests) -> Option<Arc<TokenLog>> {
        let key = *digests.answers.iter().rev().find_map(|digest| self.by_digest.get(digest))?;
        self.logs.to_back(&key).map(|found| Arc::clone(&found.log))
    }

    fn keep(&mut self, key: KvKey, digests: Digests, log: Arc<TokenLog>, most: usize) {
        self.forget(key);
        for digest in &digests.answers {
            // A log that goes on from another one takes its place.
            if let Some(older) = self.by_digest.insert(*digest, key)
                && !self.is_reachable(older)
            {
                self.forget(older);
            }
        }
        self.tokens += log.len().get();
        self.logs.insert(key, Remembered { log, digests: digests.answers });
        while self.tokens > most
            && let Some((oldest, _)) = self.logs.front()
        {
            self.forget(*oldest);
        }
    }

    fn is_reachable(&self, key: KvKey) -> bool {
        let leads = |digest| self.by_digest.get(digest) == Some(&key);
        self.logs.get(&key).is_some_and(|known| known.digests.iter().any(leads))
    }

    fn forget(&mut self, key: KvKey) {
        let Some(gone) = self.logs.remove(&key) else { return };
        self.tokens -= gone.log.len().get();
        for digest in gone.digests {
            if self.by_digest.get(&digest) == Some(&key) {
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
    pub fn find(&self, tenant: TenantId, conversation: &Digests) -> Option<Arc<TokenLog>> {
        self.tenants.get_mut(&tenant)?.find(conversation)
    }

    /// Remembers the log of a conversation, or of a turn that has its own key, in the place of what was known of it.
    pub fn keep(&self, tenant: TenantId, key: KvKey, conversation: Digests, log: TokenLog) {
        if log.len().get() <= self.most && !conversation.answers.is_empty() {
            self.tenants.entry(tenant).or_default().keep(key, conversation, Arc::new(log), self.most);
        }
    }

    /// Forgets what a conversation was made of.
    pub fn forget(&self, tenant: TenantId, key: KvKey) {
        if let Some(mut memory) = self.tenants.get_mut(&tenant) {
            memory.forget(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sessions::fixtures::message;
    use crate::store::LogToken;
    use crate::types::TokenId;

    const KEY: TenantKey = TenantKey([7; 32]);

    fn log(tokens: u32) -> TokenLog {
        TokenLog::new((0..tokens).map(|id| LogToken { id: TokenId(id), bytes: 1 }).collect(), 0)
    }

    /// A conversation of these texts, the user's first.
    fn said(texts: &[&str]) -> Digests {
        let roles = [Role::User, Role::Assistant].into_iter().cycle();
        let messages: Vec<_> = texts.iter().zip(roles).map(|(text, role)| message(role, text)).collect();
        Digests::of(&KEY, None, messages.iter())
    }

    fn found(recall: &Recall, tenant: u32, texts: &[&str]) -> Option<usize> {
        recall.find(TenantId(tenant), &said(texts)).map(|log| log.len().get())
    }

    #[test]
    fn the_longest_known_beginning_is_found_and_no_other_tenants() {
        let recall = Recall::new(100);
        recall.keep(TenantId(1), KvKey(1), said(&["Hi"]).answered("Hello"), log(10));
        assert_eq!(found(&recall, 1, &["Hi", "Hello", "More"]), Some(10));
        assert_eq!(found(&recall, 1, &["Hi", " Hello\n", "More"]), Some(10));
        assert_eq!(found(&recall, 1, &["Hi", "Hullo", "More"]), None);
        assert_eq!(found(&recall, 1, &["Hi"]), None, "nothing was answered yet");
        assert_eq!(found(&recall, 2, &["Hi", "Hello", "More"]), None);
    }

    #[test]
    fn a_conversation_that_goes_on_is_one_log_and_its_beginning_still_leads_there() {
        let recall = Recall::new(100);
        recall.keep(TenantId(1), KvKey(2), said(&["Hi"]).answered("Hello"), log(10));
        recall.keep(TenantId(1), KvKey(3), said(&["Hi", "Hello", "More"]).answered("Well"), log(20));
        assert_eq!(found(&recall, 1, &["Hi", "Hello", "Other"]), Some(20));
        assert_eq!(recall.tenants.get(&TenantId(1)).unwrap().tokens, 20);
    }

    #[test]
    fn the_log_longest_unused_goes_and_leaves_nothing() {
        let recall = Recall::new(25);
        for (key, question) in [(10, "a"), (11, "b")] {
            recall.keep(TenantId(1), KvKey(key), said(&[question]).answered("x"), log(10));
        }
        assert_eq!(found(&recall, 1, &["a", "x", "?"]), Some(10));
        recall.keep(TenantId(1), KvKey(5), said(&["c"]).answered("x"), log(10));
        assert_eq!(found(&recall, 1, &["b", "x", "?"]), None);
        assert_eq!(found(&recall, 1, &["a", "x", "?"]), Some(10));
        let memory = recall.tenants.get(&TenantId(1)).unwrap();
        assert_eq!((memory.tokens, memory.logs.len(), memory.by_digest.len()), (20, 2, 2));
        drop(memory);
        recall.keep(TenantId(1), KvKey(6), said(&["long"]).answered("x"), log(26));
        assert_eq!(found(&recall, 1, &["long", "x", "?"]), None, "one that never fits pushes nobody out");
        assert_eq!(found(&recall, 1, &["a", "x", "?"]), Some(10));
        recall.forget(TenantId(1), KvKey(10));
        assert_eq!(found(&recall, 1, &["a", "x", "?"]), None);
    }
}
