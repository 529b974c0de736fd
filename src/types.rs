//! Which ids and units cross module borders?
//!
//! Newtypes over integers; each conversion between units is written once, here. Uses nothing, is used by all.

use std::fmt;

/// A tenant as the engine knows it: an index that `tenants` gave out. Names and keys stay above.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TenantId(pub u32);

/// The secret that keys a tenant's prefix hashes (BLAKE3 keyed mode): equal prefixes of two tenants never meet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TenantKey(pub [u8; 32]);

impl fmt::Debug for TenantKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantKey(..)")
    }
}

/// Identity of one conversation's KV: 128 random bits. `sessions` uses the conversation's own id.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct KvKey(pub u128);

/// One turn in the engine, unique in a process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TurnId(pub u64);

/// A token of the model's vocabulary.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct TokenId(pub u32);

/// A block of the device pool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlockId(pub u32);

/// A block of the host pool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct HostBlockId(pub u32);

/// A slot of the disk tier.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct DiskBlockId(pub u32);

/// Microseconds since the engine started. The core has no clock: its driver tells the time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Tick(pub u64);

impl Tick {
    /// Milliseconds from `earlier` to `self`; 0 if `earlier` is later.
    pub fn ms_since(self, earlier: Tick) -> u64 {
        self.0.saturating_sub(earlier.0) / 1000
    }
}

/// As what the numbers of keys and values are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum KvDtype {
    F32,
    #[default]
    F16,
    Bf16,
    /// Eight bits, and a scale in f16 for each token and head.
    Int8,
    /// E4M3 of the OCP 8-bit floating point specification, revision 1.0: no infinities, 448 at most.
    Fp8,
}

impl KvDtype {
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::Int8, Self::Fp8];

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }

    /// Bytes of one head's key, or value, of one token.
    pub fn vector_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::F16 | Self::Bf16 => 2 * head_dim,
            Self::Int8 => head_dim + 2,
            Self::Fp8 => head_dim,
        }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Tokens of one block; a power of two is not needed. 16 on the CPU, the kernels' panel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockSize(pub u32);

/// A number of tokens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct TokenCount(pub u32);

impl TokenCount {
    /// Blocks that hold this many tokens; the last may be part full.
    pub fn blocks(self, size: BlockSize) -> BlockCount {
        BlockCount(self.0.div_ceil(size.0))
    }

    /// Blocks that this many tokens fill.
    pub fn full_blocks(self, size: BlockSize) -> BlockCount {
        BlockCount(self.0 / size.0)
    }

    /// As an index or a length.
    pub fn get(self) -> usize {
        self.0 as usize
    }

    /// The length of a token list. Lists longer than `u32::MAX` can't exist: a window bounds them.
    pub fn of(tokens: &[TokenId]) -> Self {
        Self(u32::try_from(tokens.len()).expect("a token list is bounded by the window"))
    }
}

/// A number of blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct BlockCount(pub u32);

impl BlockCount {
    /// Tokens that this many blocks hold.
    pub fn tokens(self, size: BlockSize) -> TokenCount {
        TokenCount(self.0 * size.0)
    }

    /// As an index or a length.
    pub fn get(self) -> usize {
        self.0 as usize
    }
}

/// So many of something, as a sentence says it: `1 block`, `12 blocks`; `1 token is`, `2 tokens are`.
pub fn counted<N: Copy + fmt::Display + PartialEq + From<u8>>(number: N, one: &str, many: &str) -> String {
    let words = if number == N::from(1) { one } else { many };
    format!("{number} {words}")
}

macro_rules! display_inner {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display_inner!(TenantId, TurnId, TokenId, BlockId, HostBlockId, DiskBlockId, TokenCount, BlockCount, BlockSize);

/// A part of a tier's pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PoolPart {
    Bytes(u64),
    /// Thousandths of the pool, up to 1000.
    Permille(u32),
}

impl PoolPart {
    /// Bytes of it in a pool of `pool_bytes`.
    pub fn bytes(self, pool_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Permille(permille) => {
                pool_bytes / 1000 * u64::from(permille) + pool_bytes % 1000 * u64::from(permille) / 1000
            }
        }
    }
}

/// What a tenant is given of one tier's pool; `None` is the default, which depends on who else is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TierBudget {
    /// What no other tenant's turn takes from it.
    pub floor: Option<PoolPart>,
    /// What it may have once memory is short.
    pub ceiling: Option<PoolPart>,
    /// What of it its pinned conversations may keep from everybody.
    pub pins: Option<PoolPart>,
}

/// A tenant's part where there is not enough for all, in thousandths: an ordinary tenant has 1000.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Weight(pub u32);

impl Weight {
    pub const ORDINARY: Weight = Weight(1000);
}

/// What one tenant is given of the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    pub tenant: TenantId,
    pub weight: Weight,
    pub device: TierBudget,
    pub host: TierBudget,
    pub disk: TierBudget,
}

/// Where KV may be, from fast to slow.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Tier {
    Device,
    Host,
    Disk,
}

impl Tier {
    /// Its word in the API, in metrics and in logs.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Device => "device",
            Tier::Host => "host",
            Tier::Disk => "disk",
        }
    }
}

/// Bytes of a block in each tier: host and disk may hold it in a smaller form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockBytes {
    pub device: u64,
    /// Of host and disk.
    pub cold: u64,
}

impl BlockBytes {
    /// The same in all tiers.
    pub fn all(bytes: u64) -> Self {
        Self { device: bytes, cold: bytes }
    }

    pub fn of(self, tier: Tier) -> u64 {
        match tier {
            Tier::Device => self.device,
            Tier::Host | Tier::Disk => self.cold,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_something_is_not_said_as_several() {
        let of = |blocks: u32| counted(blocks, "block is", "blocks are");
        assert_eq!([0, 1, 2, 11].map(of), ["0 blocks are", "1 block is", "2 blocks are", "11 blocks are"]);
        assert_eq!(counted(1_usize, "entry", "entries"), "1 entry");
    }
}
