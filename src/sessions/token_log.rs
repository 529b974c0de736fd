//! Which tokens does the KV of a conversation hold, or held, and how many bytes of text does each stand for?
//!
//! A log only grows at its end and is cut from its end, and turns, memories and forks share what they have in common: it is
//! chunks that nobody changes. What goes on from a log costs its chunks, of a thousand tokens and more, not its tokens.

use std::sync::Arc;

use crate::engine::HashedPrompt;
use crate::store::{LogToken, LogWrite};
use crate::types::{TokenCount, TokenId};

/// Neighbours that together have at most so many tokens become one chunk.
const CHUNK_TOKENS: usize = 1024;

/// A token log.
#[derive(Clone, Debug, Default)]
pub struct TokenLog {
    chunks: Vec<Chunk>,
    /// Tokens at the front whose KV has been computed once.
    encoded: usize,
    /// A prompt that the log begins with, as the engine knows it, and how many of its tokens are the log's still.
    prompt: Option<(Arc<HashedPrompt>, usize)>,
}

#[derive(Clone, Debug)]
struct Chunk {
    /// Tokens of the log up to this chunk's end.
    end: usize,
    tokens: Arc<[LogToken]>,
}

impl TokenLog {
    /// A log as the store had it.
    pub fn new(tokens: Vec<LogToken>, encoded: usize) -> Self {
        let encoded = encoded.min(tokens.len());
        let mut log = Self { encoded, ..Self::default() };
        log.extend(&tokens);
        log
    }

    /// How long the history is for the KV.
    pub fn len(&self) -> TokenCount {
        TokenCount(u32::try_from(self.tokens()).expect("the window bounds a log"))
    }

    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    fn tokens(&self) -> usize {
        self.chunks.last().map_or(0, |chunk| chunk.end)
    }

    pub fn encoded(&self) -> usize {
        self.encoded
    }

    pub fn set_encoded(&mut self, tokens: usize) {
        self.encoded = tokens.min(self.tokens());
    }

    /// All of it, for a store that has none of it.
    pub fn whole(&self) -> LogWrite {
        LogWrite { keep: 0, append: self.from(0).collect() }
    }

    /// The tokens from this one on. O(chunks) to find it, then O(1) each.
    pub fn from(&self, first: usize) -> impl Iterator<Item = LogToken> {
        let chunk = self.chunks.partition_point(|chunk| chunk.end <= first);
        let skipped = first - chunk.checked_sub(1).map_or(0, |before| self.chunks[before].end);
        self.chunks[chunk..].iter().flat_map(|chunk| chunk.tokens.iter().copied()).skip(skipped)
    }

    /// From the last token backwards: how many tokens of the front stand for how many bytes of a text of so many.
    pub fn ends(&self, text_bytes: usize) -> impl Iterator<Item = (usize, usize)> {
        let backwards = self.chunks.iter().rev().flat_map(|chunk| chunk.tokens.iter().rev());
        let (mut tokens, mut bytes) = (self.tokens(), text_bytes);
        backwards.map(move |token| {
            let end = (tokens, bytes);
            tokens -= 1;
            bytes = bytes.saturating_sub(usize::from(token.bytes));
            end
        })
    }

    /// Appends.
    pub fn extend(&mut self, tokens: &[LogToken]) {
        if tokens.is_empty() {
            return;
        }
        let end = self.tokens() + tokens.len();
        match self.chunks.last_mut() {
            Some(last) if last.tokens.len() + tokens.len() <= CHUNK_TOKENS => {
                *last = Chunk { end, tokens: [&last.tokens, tokens].concat().into() };
            }
            _ => self.chunks.push(Chunk { end, tokens: tokens.into() }),
        }
    }

    /// Keeps this many tokens of the front.
    pub fn truncate(&mut self, tokens: usize) {
        while let Some(last) = self.chunks.pop() {
            let start = last.end - last.tokens.len();
            if last.end <= tokens {
                self.chunks.push(last);
                break;
            }
            if start < tokens {
                self.chunks.push(Chunk { end: tokens, tokens: last.tokens[..tokens - start].into() });
                break;
            }
        }
        self.encoded = self.encoded.min(tokens);
        if let Some((_, kept)) = &mut self.prompt {
            *kept = tokens.min(*kept);
        }
    }

    /// The log's tokens as a prompt. What of it was one is hashed already; `empty`: where hashing begins if nothing was.
    pub fn hashed(&self, empty: impl FnOnce() -> HashedPrompt) -> HashedPrompt {
        let ids = |from: usize| self.from(from).map(|token: LogToken| -> TokenId { token.id });
        match &self.prompt {
            Some((prompt, kept)) => prompt.after(*kept, ids(*kept)),
            None => empty().after(0, ids(0)),
        }
    }

    /// Says that all of the log is this prompt.
    pub fn is_prompt(&mut self, prompt: Arc<HashedPrompt>) {
        let kept = self.tokens();
        debug_assert_eq!(prompt.tokens().len(), kept);
        self.prompt = Some((prompt, kept));
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::types::{BlockSize, TenantKey};

    fn tokens(ids: &[u32]) -> Vec<LogToken> {
        ids.iter().map(|id| LogToken { id: TokenId(*id), bytes: (*id % 3) as u16 }).collect()
    }

    #[test]
    fn a_stored_log_claims_no_more_than_it_has() {
        assert_eq!(TokenLog::new(tokens(&[7; 3]), 9).encoded(), 3);
    }

    proptest! {
        #[test]
        fn a_log_is_what_was_appended_and_not_cut(steps in vec((0..4000_usize, vec(0..9_u32, 0..900)), 1..12)) {
            let empty = || HashedPrompt::empty(TenantKey([1; 32]), BlockSize(16));
            let (mut log, mut flat) = (TokenLog::default(), Vec::new());
            for (keep, appended) in steps {
                let before = (log.clone(), flat.clone());
                flat.truncate(keep);
                log.truncate(keep);
                flat.extend(tokens(&appended));
                log.extend(&tokens(&appended));
                prop_assert_eq!(log.len().get(), flat.len());
                for first in [0, keep / 2, flat.len() / 2, flat.len()] {
                    prop_assert!(log.from(first).eq(flat.iter().skip(first).copied()));
                }
                let mut bytes: usize = flat.iter().map(|token| usize::from(token.bytes)).sum();
                let ends: Vec<_> = log.ends(bytes).collect();
                for (index, token) in flat.iter().enumerate().rev() {
                    prop_assert_eq!(ends[flat.len() - 1 - index], (index + 1, bytes));
                    bytes -= usize::from(token.bytes);
                }
                let prompt = Arc::new(log.hashed(empty));
                prop_assert!(prompt.tokens().iter().copied().eq(flat.iter().map(|token| token.id)));
                log.is_prompt(prompt);
                prop_assert!(before.0.from(0).eq(before.1), "what shares it stays as it was");
            }
        }
    }
}
