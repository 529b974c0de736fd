//! What are the states of a block, and how is a full one identified?
//!
//! `Slot` (a place) → `OpenBlock` (being filled, one owner) → `SealedBlock` (full, immutable, shared) or `TailBlock` (part
//! full, at rest). A transition moves the slot into the next type; dropping the last owner gives the place back.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::types::{BlockSize, TenantKey, TokenId};

/// Identity of a full block: a chain of keyed BLAKE3 over (tenant's key, parent's hash, the block's token ids), 256 bits.
/// Two blocks with one hash hold the same tokens at the same positions after the same history, of one tenant.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixHash(pub [u8; 32]);

impl std::fmt::Debug for PrefixHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PrefixHash({:02x}{:02x}{:02x}{:02x}…)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

impl PrefixHash {
    /// The parent of a sequence's first block.
    pub const ROOT: PrefixHash = PrefixHash([0; 32]);

    /// The hash of the block that holds `tokens` after the block `self`.
    pub fn child(self, key: &TenantKey, tokens: &[TokenId]) -> PrefixHash {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(&self.0);
        hasher.update(bytemuck::cast_slice(tokens));
        PrefixHash(*hasher.finalize().as_bytes())
    }

    /// The hashes of all full blocks of a sequence, in order. O(tokens), about 4 GB/s of token ids.
    pub fn chain(key: &TenantKey, tokens: &[TokenId], size: BlockSize) -> Vec<PrefixHash> {
        let mut parent = PrefixHash::ROOT;
        let blocks = tokens.chunks_exact(size.0 as usize);
        blocks
            .map(|block| {
                parent = parent.child(key, block);
                parent
            })
            .collect()
    }
}

/// The free places of one pool. Shared by its slots, so that dropping one gives it back from whatever thread it is on.
#[derive(Debug)]
pub struct Places {
    free: Mutex<Vec<u32>>,
    total: u32,
}

impl Places {
    /// All places free, lowest first.
    pub fn new(total: u32) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new((0..total).rev().collect()), total })
    }

    /// Takes a place, if one is free.
    pub fn take(self: &Arc<Self>) -> Option<Slot> {
        let place = self.free.lock().pop()?;
        Some(Slot { place, places: Arc::clone(self) })
    }

    pub fn free(&self) -> u32 {
        u32::try_from(self.free.lock().len()).expect("a pool has at most u32::MAX places")
    }

    pub fn total(&self) -> u32 {
        self.total
    }
}

/// A place in a pool, owned. Its `Drop` gives the place back: there is no `free()` to forget or to call twice.
#[derive(Debug)]
pub struct Slot {
    place: u32,
    places: Arc<Places>,
}

impl Slot {
    pub fn place(&self) -> u32 {
        self.place
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.places.free.lock().push(self.place);
    }
}
