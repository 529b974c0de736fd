//! What stands for a token in the record?
//!
//! 32 bits of a keyed digest of all that led to it: the tenant, the blocks before, and the block's tokens up to it. So equal
//! prefixes of a tenant look equal, and an equal token anywhere else does not. The last token of a block is written as the
//! beginning of the block's *name*, a digest of its prefix hash: so a block that was found on disk, of which only the hash is
//! known, is known again in prompts. The key is drawn for each run and kept in memory alone: once the process has ended,
//! nobody can try which tokens a pseudonym may stand for.

use crate::kv::block::PrefixHash;
use crate::types::{TenantKey, TokenId};

/// Stands for every stop token that ended a turn. It is never fed, so that its identity is of no use.
pub const STOP: TokenId = TokenId(u32::MAX);

/// A run's key.
pub struct Pseudonyms {
    key: [u8; 32],
}

/// A block on its way: what its next token's pseudonym goes by.
#[derive(Clone, Copy, Debug)]
pub struct Chain([u8; 32]);

impl Pseudonyms {
    /// Under a key that nobody else has.
    pub fn random() -> Self {
        Self { key: rand::random() }
    }

    // The four inputs differ in length, so that no digest of one kind is one of another.

    /// A full block's name; 0 for the place before the first.
    pub fn name(&self, hash: PrefixHash) -> u64 {
        if hash == PrefixHash::ROOT {
            return 0;
        }
        let digest = blake3::keyed_hash(&self.key, &hash.0);
        first_word(&digest).max(1)
    }

    /// The block that follows `parent`.
    pub fn chain(&self, parent: PrefixHash, tenant: &TenantKey) -> Chain {
        let mut input = [0; 64];
        input[..32].copy_from_slice(&parent.0);
        input[32..].copy_from_slice(&tenant.0);
        Chain(*blake3::keyed_hash(&self.key, &input).as_bytes())
    }

    /// The pseudonym of a block's next token, unless that is its last.
    pub fn next(&self, chain: &mut Chain, token: TokenId) -> u32 {
        let mut input = [0; 36];
        input[..32].copy_from_slice(&chain.0);
        input[32..].copy_from_slice(&token.0.to_le_bytes());
        let digest = blake3::keyed_hash(&self.key, &input);
        chain.0 = *digest.as_bytes();
        last_token(first_word(&digest))
    }

    /// What stands for a checksum of KV, which else would tell whether a guess of the tokens is right.
    pub fn sum(&self, sum: u32) -> [u8; 4] {
        let digest = blake3::keyed_hash(&self.key, &sum.to_le_bytes());
        last_token(first_word(&digest)).to_le_bytes()
    }
}

fn first_word(digest: &blake3::Hash) -> u64 {
    let (word, _) = digest.as_bytes().split_first_chunk().expect("a digest has 32 bytes");
    u64::from_le_bytes(*word)
}

/// The pseudonym of a block's last token.
pub fn last_token(name: u64) -> u32 {
    // Never that of a stop.
    ((name & u64::from(u32::MAX)) as u32).min(STOP.0 - 1)
}
