//! What are the states of a block, and how is a full one identified?
//!
//! `Slot` (a place) → `OpenBlock` (being filled, one owner) → `SealedBlock` (full, immutable, shared) or `TailBlock` (part
//! full, at rest). A transition moves the slot into the next type; dropping the last owner gives the place back, so there
//! is no `free()` to forget or to call twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::accounts::{Accounts, HolderId, Split};
use crate::kernels::prefetch::{Near, prefetch};
use crate::types::{
    BlockCount, BlockId, BlockSize, DiskBlockId, HostBlockId, KvKey, TenantId, TenantKey, Tick, Tier, TokenCount,
    TokenId,
};

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
    /// A name for the prefix that ends with this block, in the space of conversations' keys.
    pub fn as_key(&self) -> KvKey {
        let (half, _) = self.0.split_first_chunk().expect("a hash has 32 bytes");
        KvKey(u128::from_le_bytes(*half))
    }

    /// Tells it from nearly all others, as evenly as chance: the hash is keyed, so that nobody can make two of them alike.
    pub fn short(&self) -> u64 {
        let (first, _) = self.0.split_first_chunk().expect("a hash has 32 bytes");
        u64::from_le_bytes(*first)
    }

    /// The parent of a sequence's first block.
    pub const ROOT: PrefixHash = PrefixHash([0; 32]);

    /// The hash of the block that holds `tokens` after the block `self`.
    pub fn child(self, key: &TenantKey, tokens: &[TokenId]) -> PrefixHash {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(&self.0);
        hasher.update(bytemuck::cast_slice(tokens));
        PrefixHash(*hasher.finalize().as_bytes())
    }

    /// The hashes of all full blocks of a sequence, in order. O(tokens).
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

/// The id of a place in some tier's pool, and what is known of the bytes in it.
pub trait Place: Copy + Eq + std::fmt::Debug {
    const TIER: Tier;
    /// What proves a copy's bytes: nothing on the device, where they were made; a checksum below.
    type Proof: Copy + std::fmt::Debug;
    fn from_index(index: u32) -> Self;
    fn index(self) -> u32;
}

/// CRC-32C of a block's bytes, taken while they were copied down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checksum(pub u32);

impl Place for BlockId {
    const TIER: Tier = Tier::Device;
    type Proof = ();
    fn from_index(index: u32) -> Self {
        BlockId(index)
    }
    fn index(self) -> u32 {
        self.0
    }
}

impl Place for HostBlockId {
    const TIER: Tier = Tier::Host;
    type Proof = Checksum;
    fn from_index(index: u32) -> Self {
        HostBlockId(index)
    }
    fn index(self) -> u32 {
        self.0
    }
}

impl Place for DiskBlockId {
    const TIER: Tier = Tier::Disk;
    type Proof = Checksum;
    fn from_index(index: u32) -> Self {
        DiskBlockId(index)
    }
    fn index(self) -> u32 {
        self.0
    }
}

#[derive(Debug)]
struct Counts {
    free: Vec<u32>,
    /// Let go, and not free before what was in them is overwritten.
    released: Vec<u32>,
    /// Of those, how many are being overwritten.
    being_erased: u32,
    out_of_use: u32,
    accounts: Accounts,
}

/// The places of one tier, shared by its slots: dropping a slot gives its place back from whatever thread it is on.
#[derive(Debug)]
pub struct Places {
    counts: Mutex<Counts>,
    /// The time, in microseconds.
    now: AtomicU64,
    total: u32,
    holds_back: bool,
}

impl Places {
    /// All places free; the lowest is taken first.
    pub fn new(total: BlockCount) -> Arc<Self> {
        Self::with(total, false)
    }

    /// Places that are not free before `give_back` says that what was in them is overwritten.
    pub fn that_hold_back(total: BlockCount) -> Arc<Self> {
        Self::with(total, true)
    }

    fn with(total: BlockCount, holds_back: bool) -> Arc<Self> {
        let free = (0..total.0).rev().collect();
        let accounts = Accounts::default();
        let counts = Counts { free, released: Vec::new(), being_erased: 0, out_of_use: 0, accounts };
        Arc::new(Self { counts: Mutex::new(counts), now: AtomicU64::new(0), total: total.0, holds_back })
    }

    /// Tells the time, by which places are accounted for.
    pub fn tell_time(&self, now: Tick) {
        self.now.store(now.0, Ordering::Relaxed);
    }

    fn now(&self) -> Tick {
        Tick(self.now.load(Ordering::Relaxed))
    }

    /// Looks into the accounts, or makes an entry, at the time that was told last.
    pub(super) fn accounts<T>(&self, look: impl FnOnce(Tick, &mut Accounts) -> T) -> T {
        look(self.now(), &mut self.counts.lock().accounts)
    }

    /// Takes a place for a tenant's conversation, if one is free.
    pub fn take<P: Place>(self: &Arc<Self>, tenant: TenantId, owner: HolderId) -> Option<Slot<P>> {
        let mut counts = self.counts.lock();
        let place = counts.free.pop()?;
        counts.accounts.take(self.now(), tenant, Some(owner));
        Some(Slot { place: P::from_index(place), tenant, owner: Some(owner), places: Arc::clone(self) })
    }

    /// Takes these out of the free places: something is in them.
    pub fn occupy(&self, places: impl Iterator<Item = u32>) {
        let taken: std::collections::HashSet<u32> = places.collect();
        let mut counts = self.counts.lock();
        let before = counts.free.len();
        counts.free.retain(|place| !taken.contains(place));
        let occupied = before - counts.free.len();
        counts.accounts.wait(self.now(), occupied);
    }

    /// Gives an occupied place to its tenant.
    pub fn claim<P: Place>(self: &Arc<Self>, place: u32, tenant: TenantId) -> Slot<P> {
        let mut counts = self.counts.lock();
        counts.accounts.end_wait(self.now(), 1);
        counts.accounts.take(self.now(), tenant, None);
        Slot { place: P::from_index(place), tenant, owner: None, places: Arc::clone(self) }
    }

    /// Lets go of an occupied place that nobody owns.
    pub fn release(&self, place: u32) {
        self.counts.lock().released.push(place);
    }

    /// Places that were let go since; each is to come back by `give_back`, or is lost.
    pub fn take_released(&self) -> Vec<u32> {
        let mut counts = self.counts.lock();
        let released = std::mem::take(&mut counts.released);
        counts.being_erased += u32::try_from(released.len()).expect("a pool has at most u32::MAX places");
        released
    }

    /// Makes places free again that `take_released` gave out; the others of those `taken` are out of use from now on.
    pub fn give_back(&self, taken: usize, good: impl Iterator<Item = u32>) {
        let mut counts = self.counts.lock();
        let (taken, before) = (u32::try_from(taken).expect("as many as were taken"), counts.free.len());
        counts.free.extend(good);
        let good = u32::try_from(counts.free.len() - before).expect("some of those taken");
        counts.being_erased -= taken;
        counts.out_of_use += taken - good;
        counts.accounts.end_wait(self.now(), good as usize);
    }

    /// Whether some places wait to be overwritten.
    pub fn is_erasing(&self) -> bool {
        let counts = self.counts.lock();
        !counts.released.is_empty() || counts.being_erased > 0
    }

    /// Lets go once more of a place that could not be overwritten.
    pub fn release_again(&self, place: u32) {
        let mut counts = self.counts.lock();
        counts.out_of_use -= 1;
        counts.released.push(place);
    }

    /// Places that nobody will have again.
    pub fn out_of_use(&self) -> BlockCount {
        BlockCount(self.counts.lock().out_of_use)
    }

    /// Places that are free, or will be once what was in them is overwritten.
    pub fn soon(&self) -> BlockCount {
        let counts = self.counts.lock();
        let ready = counts.free.len() + counts.released.len();
        BlockCount(u32::try_from(ready).expect("a pool has at most u32::MAX places") + counts.being_erased)
    }

    pub fn free(&self) -> BlockCount {
        BlockCount(u32::try_from(self.counts.lock().free.len()).expect("a pool has at most u32::MAX places"))
    }

    /// Places that a tenant's blocks hold; a shared block counts once.
    pub fn held(&self, tenant: TenantId) -> BlockCount {
        self.accounts(|now, accounts| accounts.of_tenant(now, tenant).held.blocks)
    }

    pub fn total(&self) -> BlockCount {
        BlockCount(self.total)
    }
}

/// A place in a pool, owned. Its `Drop` gives the place back.
#[derive(Debug)]
pub struct Slot<P: Place> {
    place: P,
    tenant: TenantId,
    /// The conversation that it was taken for, until what is in it is full.
    owner: Option<HolderId>,
    places: Arc<Places>,
}

impl<P: Place> Slot<P> {
    pub fn place(&self) -> P {
        self.place
    }

    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// Whose account it is on.
    pub(super) fn owner(&self) -> Option<HolderId> {
        self.owner
    }

    /// The same place, as nobody's.
    fn disowned(mut self) -> Self {
        if let Some(owner) = self.owner.take() {
            self.places.accounts(|now, accounts| accounts.disown(now, self.tenant, owner));
        }
        self
    }
}

impl<P: Place> Drop for Slot<P> {
    fn drop(&mut self) {
        let (now, mut counts) = (self.places.now(), self.places.counts.lock());
        counts.accounts.give_back(now, self.tenant, self.owner);
        if self.places.holds_back {
            counts.released.push(self.place.index());
            counts.accounts.wait(now, 1);
        } else {
            counts.free.push(self.place.index());
        }
    }
}

/// A device block that is being filled: one owner, not indexed.
#[derive(Debug)]
pub struct OpenBlock {
    slot: Slot<BlockId>,
    tokens: Vec<TokenId>,
}

impl OpenBlock {
    /// An empty block in a place.
    pub fn new(slot: Slot<BlockId>, size: BlockSize) -> Self {
        Self { slot, tokens: Vec::with_capacity(size.0 as usize) }
    }

    /// A block whose place holds the KV of these tokens already: a copied or reloaded tail.
    pub fn with_tokens(slot: Slot<BlockId>, tokens: Vec<TokenId>) -> Self {
        Self { slot, tokens }
    }

    pub fn id(&self) -> BlockId {
        self.slot.place()
    }

    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    pub(super) fn slot(&self) -> &Slot<BlockId> {
        &self.slot
    }

    /// Notes that a token's KV was written. Panics if the block is full: its owner seals it first.
    pub fn push(&mut self, token: TokenId, size: BlockSize) {
        assert!(self.tokens.len() < size.0 as usize, "a token was pushed into a full block");
        self.tokens.push(token);
    }

    /// Seals a full block. One that isn't full comes back as it was, so that no path loses a slot.
    pub fn seal(
        self,
        parent: PrefixHash,
        key: &TenantKey,
        size: BlockSize,
    ) -> Result<SealedBlock<BlockId>, Box<OpenBlock>> {
        if self.tokens.len() < size.0 as usize {
            return Err(Box::new(self));
        }
        let hash = parent.child(key, &self.tokens);
        Ok(SealedBlock::found(self.slot, parent, hash, ()))
    }

    /// Gives its place back, and what is in it up.
    pub fn into_slot(self) -> Slot<BlockId> {
        self.slot
    }

    /// Lays a part-full block to rest; an empty one gives its place back.
    pub fn rest(self) -> Option<TailBlock<BlockId>> {
        (!self.tokens.is_empty()).then_some(TailBlock { slot: self.slot, tokens: self.tokens, proof: () })
    }
}

/// A full, immutable block. Shared through `Arc`: each conversation that holds it in a tier has one.
///
/// What comes first is what its coming into a table and its going touch, so that they wait for memory once.
#[derive(Debug)]
#[repr(C)]
pub struct SealedBlock<P: Place> {
    split: Mutex<Split>,
    slot: Slot<P>,
    hash: PrefixHash,
    parent: PrefixHash,
    proof: P::Proof,
    /// When a conversation last used it that had it from another one, if it is the last of what they share; 0: never.
    shared_at: AtomicU64,
}

impl<P: Place> SealedBlock<P> {
    /// A copy of a block in another tier's place.
    pub fn copied<Q: Place>(of: &SealedBlock<Q>, slot: Slot<P>, proof: P::Proof) -> Self {
        assert_eq!(of.slot.tenant, slot.tenant, "a block crossed tenants");
        let copy = Self::found(slot, of.parent, of.hash, proof);
        copy.shared_at.store(of.shared_at.load(Ordering::Relaxed), Ordering::Relaxed);
        copy
    }

    /// A block whose bytes are in a place already, such as one that a tier held when this process began.
    pub fn found(slot: Slot<P>, parent: PrefixHash, hash: PrefixHash, proof: P::Proof) -> Self {
        let (slot, split, shared_at) = (slot.disowned(), Mutex::default(), AtomicU64::new(0));
        Self { split, slot, hash, parent, proof, shared_at }
    }

    /// How it is split among those who hold it. To be changed by the accounts of its tier alone.
    pub(super) fn split(&self) -> &Mutex<Split> {
        &self.split
    }

    /// Has what its going touches brought from memory.
    pub(super) fn prefetch(&self) {
        prefetch(&raw const self.split, Near::First);
        prefetch(&raw const self.hash, Near::First);
    }

    pub fn id(&self) -> P {
        self.slot.place()
    }

    pub fn tenant(&self) -> TenantId {
        self.slot.tenant()
    }

    pub fn hash(&self) -> PrefixHash {
        self.hash
    }

    pub fn parent(&self) -> PrefixHash {
        self.parent
    }

    pub fn proof(&self) -> P::Proof {
        self.proof
    }

    /// Notes that what ends with this block is a prefix that conversations share, and was used.
    pub fn share(&self, now: Tick) {
        self.shared_at.store(now.0.max(1), Ordering::Relaxed);
    }

    /// When the prefix that ends with this block was last used, if conversations share one.
    pub fn shared_at(&self) -> Option<Tick> {
        Some(Tick(self.shared_at.load(Ordering::Relaxed))).filter(|at| at.0 > 0)
    }

    pub fn into_slot(self) -> Slot<P> {
        self.slot
    }
}

/// A part-full last block at rest. Immutable; whoever wants to go on writing owns it alone, or copies it first.
#[derive(Debug)]
pub struct TailBlock<P: Place> {
    slot: Slot<P>,
    tokens: Vec<TokenId>,
    proof: P::Proof,
}

impl<P: Place> TailBlock<P> {
    /// A copy of a tail in another tier's place.
    pub fn copied<Q: Place>(of: &TailBlock<Q>, slot: Slot<P>, proof: P::Proof) -> Self {
        assert_eq!(of.slot.tenant, slot.tenant, "a block crossed tenants");
        Self { slot, tokens: of.tokens.clone(), proof }
    }

    pub fn id(&self) -> P {
        self.slot.place()
    }

    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    pub fn len(&self) -> TokenCount {
        TokenCount::of(&self.tokens)
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    pub fn proof(&self) -> P::Proof {
        self.proof
    }

    /// Its place, for nobody.
    pub fn into_slot(self) -> Slot<P> {
        self.slot.disowned()
    }

    pub fn tenant(&self) -> TenantId {
        self.slot.tenant()
    }

    /// Whose account it is on.
    pub(super) fn owner(&self) -> Option<HolderId> {
        self.slot.owner()
    }
}

impl TailBlock<BlockId> {
    /// Opens the block again, keeping the KV of its first `keep` tokens.
    pub fn open(self, keep: TokenCount) -> OpenBlock {
        let mut tokens = self.tokens;
        tokens.truncate(keep.get());
        OpenBlock { slot: self.slot, tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: BlockSize = BlockSize(4);
    const T: TenantId = TenantId(0);

    fn tokens(range: std::ops::Range<u32>) -> Vec<TokenId> {
        range.map(TokenId).collect()
    }

    #[test]
    fn a_dropped_slot_gives_its_place_back() {
        let places = Places::new(BlockCount(2));
        let [a, b] = [T, TenantId(3)].map(|tenant| places.accounts(|_, accounts| accounts.open(tenant)));
        let first = places.take::<BlockId>(T, a).unwrap();
        let second = places.take::<BlockId>(TenantId(3), b).unwrap();
        assert!(places.take::<BlockId>(T, a).is_none());
        assert_eq!((places.held(T), places.held(TenantId(3))), (BlockCount(1), BlockCount(1)));
        drop(first);
        assert_eq!((places.free(), places.held(T)), (BlockCount(1), BlockCount(0)));
        drop(second);
        assert_eq!(places.free(), places.total());
    }

    #[test]
    fn a_block_that_is_not_full_comes_back_from_sealing() {
        let places = Places::new(BlockCount(1));
        let key = TenantKey([1; 32]);
        let holder = places.accounts(|_, accounts| accounts.open(T));
        let mut open = OpenBlock::new(places.take(T, holder).unwrap(), SIZE);
        for token in tokens(0..3) {
            open.push(token, SIZE);
        }
        let mut open = open.seal(PrefixHash::ROOT, &key, SIZE).unwrap_err();
        open.push(TokenId(3), SIZE);
        let sealed = open.seal(PrefixHash::ROOT, &key, SIZE).unwrap();
        assert_eq!(sealed.hash(), PrefixHash::chain(&key, &tokens(0..4), SIZE)[0]);
    }

    #[test]
    fn a_hash_depends_on_tenant_history_and_tokens() {
        let (a, b) = (TenantKey([1; 32]), TenantKey([2; 32]));
        let chain = PrefixHash::chain(&a, &tokens(0..9), SIZE);
        assert_eq!(chain.len(), 2, "a part-full block has no hash");
        assert_ne!(chain, PrefixHash::chain(&b, &tokens(0..9), SIZE));
        assert_ne!(chain[1], PrefixHash::ROOT.child(&a, &tokens(4..8)), "the history counts");
    }
}
