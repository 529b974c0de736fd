//! By what are the blocks of a prompt known, and which of them are new?
//!
//! A prompt that goes on from another takes over its tokens and their hashes by copying, and hashes only what follows. So
//! tokens and hashes can't disagree, and nobody need be believed that a prompt begins like the one before.

use std::sync::Arc;

use crate::kv::block::PrefixHash;
use crate::types::{BlockSize, TenantKey, TokenCount, TokenId};

/// A prompt's tokens, and the chain over its full blocks under a tenant's key.
#[derive(Clone, Debug)]
pub struct HashedPrompt {
    tokens: Arc<[TokenId]>,
    hashes: Vec<PrefixHash>,
    key: TenantKey,
    size: BlockSize,
    fresh_blocks: usize,
}

impl HashedPrompt {
    /// No tokens yet.
    pub fn empty(key: TenantKey, size: BlockSize) -> Self {
        Self { tokens: Arc::default(), hashes: Vec::new(), key, size, fresh_blocks: 0 }
    }

    /// The prompt of the first `keep` tokens of this one, or of all if there are fewer, and then these. Hashes only blocks
    /// that aren't whole in what is kept.
    pub fn after(&self, keep: usize, fresh: impl Iterator<Item = TokenId>) -> Self {
        let kept = self.tokens.get(..keep).unwrap_or(&self.tokens);
        // Two copies, each of whole slices, are faster than one that goes token by token.
        let mut tokens = Vec::with_capacity(kept.len() + fresh.size_hint().0);
        tokens.extend_from_slice(kept);
        tokens.extend(fresh);
        let size = self.size.0 as usize;
        let whole = kept.len() / size;
        let mut hashes = Vec::with_capacity(tokens.len() / size);
        hashes.extend_from_slice(&self.hashes[..whole]);
        let mut parent = hashes.last().copied().unwrap_or(PrefixHash::ROOT);
        for block in tokens[whole * size..].chunks_exact(size) {
            parent = parent.child(&self.key, block);
            hashes.push(parent);
        }
        let fresh_blocks = hashes.len() - whole;
        Self { tokens: tokens.into(), hashes, key: self.key, size: self.size, fresh_blocks }
    }

    pub fn tokens(&self) -> &Arc<[TokenId]> {
        &self.tokens
    }

    pub fn len(&self) -> TokenCount {
        TokenCount::of(&self.tokens)
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Blocks that were hashed for this prompt; the others are those of the one before.
    pub fn fresh_blocks(&self) -> usize {
        self.fresh_blocks
    }

    pub(super) fn hashes(&self) -> &[PrefixHash] {
        &self.hashes
    }

    pub(super) fn key(&self) -> &TenantKey {
        &self.key
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const KEY: TenantKey = TenantKey([3; 32]);
    const SIZE: BlockSize = BlockSize(4);

    proptest! {
        #[test]
        fn the_chain_of_a_prompt_that_went_on_is_that_of_its_tokens(steps in vec((0..30_usize, vec(0..9_u32, 0..30)), 1..8)) {
            let mut prompt = HashedPrompt::empty(KEY, SIZE);
            let mut tokens: Vec<TokenId> = Vec::new();
            for (keep, fresh) in steps {
                tokens.truncate(keep);
                let kept = tokens.len();
                tokens.extend(fresh.into_iter().map(TokenId));
                prompt = prompt.after(keep, tokens[kept..].iter().copied());
                prop_assert_eq!(&**prompt.tokens(), tokens.as_slice());
                prop_assert_eq!(prompt.hashes(), PrefixHash::chain(&KEY, &tokens, SIZE));
                prop_assert_eq!(prompt.fresh_blocks(), tokens.len() / 4 - kept / 4);
            }
        }
    }
}
