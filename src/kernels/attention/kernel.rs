//! Which instructions attend, and what do they get?

use std::ops::Range;

use half::f16;

use super::{BLOCK_TOKENS, CHUNK_BLOCKS, CHUNK_TOKENS, scalar};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::kernels::isa::Isa;

/// Queries of one KV head that share each key and value that is read and widened.
pub(super) struct Tile<'a> {
    /// `[head_dim][queries]`, scaled.
    pub queries: &'a [f32],
    /// Tokens of the sequence that each query sees, ascending.
    pub seen: &'a [usize],
    /// Room for each query's scores, then weights, of a chunk.
    pub scores: &'a mut [Scores],
    /// Each query's highest score so far.
    pub maxima: &'a mut [f32],
    /// Each query's sum of weights, in parts: every sixteenth token has the same.
    pub sums: &'a mut [[f32; BLOCK_TOKENS]],
    /// Each query's weighted values: `[queries][head_dim]`.
    pub values: &'a mut [f32],
}

/// One query's scores, then weights, for the tokens of a chunk.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Scores(pub [f32; CHUNK_TOKENS]);

/// Keys and values of one KV head in up to four blocks that follow each other in a sequence. Blocks past its end are empty.
pub(super) struct Chunk<'a> {
    /// Place of the first token in the sequence.
    pub first: usize,
    pub head_dim: usize,
    /// Of each block `[head_dim][16]`.
    pub keys: [&'a [[f16; BLOCK_TOKENS]]; CHUNK_BLOCKS],
    /// Of each block `[16][head_dim]`.
    pub values: [&'a [f16]; CHUNK_BLOCKS],
}

/// One query's softmax over some tokens: its highest score, and the sum of two to the power of all scores less that.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    pub max: f32,
    pub sum: f32,
}

impl Softmax {
    pub const START: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// The form of all kernels here, chosen once.
#[derive(Clone, Copy)]
pub(super) enum Kernel {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(Here),
    #[cfg(target_arch = "x86_64")]
    Avx512(Here),
}

/// Proof that the machine has the instructions: only `Kernel::of` makes one.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Here(());

impl Kernel {
    /// Panics if this machine doesn't have the instructions.
    pub fn of(isa: Isa) -> Self {
        let isa = isa.check().expect("whoever chose the instructions has looked for them");
        #[cfg(target_arch = "x86_64")]
        match isa {
            Isa::Avx512 => return Self::Avx512(Here(())),
            Isa::AvxVnni | Isa::Avx2 => return Self::Avx2(Here(())),
            Isa::Neon | Isa::Scalar => {}
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = isa;
        Self::Scalar
    }

    /// Cuts queries into tiles of nearly equal size.
    pub fn tiles(self, queries: usize) -> impl Iterator<Item = Range<usize>> {
        let most = match self {
            Self::Scalar => usize::MAX,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => avx2::TILE,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => avx512::TILE,
        };
        let tiles = queries.div_ceil(most);
        (0..tiles).map(move |tile| queries * tile / tiles..queries * (tile + 1) / tiles)
    }

    /// Takes a chunk's tokens into each query's sums, while `ahead` is brought nearer.
    pub fn attend(self, tile: &mut Tile<'_>, chunk: &Chunk<'_>, ahead: &Chunk<'_>) {
        match self {
            Self::Scalar => scalar::attend(tile, chunk),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Here` says that the machine has the instructions.
            Self::Avx2(_) => unsafe { avx2::attend(tile, chunk, ahead) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::Avx512(_) => unsafe { avx512::attend(tile, chunk, ahead) },
        }
    }

    /// Folds the softmax and sums of a partition into those of all before it.
    pub fn fold(self, total: &mut Softmax, total_values: &mut [f32], part: Softmax, part_values: &[f32]) {
        match self {
            Self::Scalar => scalar::fold(total, total_values, part, part_values),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Here` says that the machine has the instructions.
            Self::Avx2(_) | Self::Avx512(_) => unsafe { avx2::fold(total, total_values, part, part_values) },
        }
    }

    /// Writes one token's key into place `slot` of a block's keys, and its value to `value_place`, as f16.
    pub fn write(
        self,
        key: &[f32],
        value: &[f32],
        slot: usize,
        keys: &mut [[f16; BLOCK_TOKENS]],
        value_place: &mut [f16],
    ) {
        match self {
            Self::Scalar => scalar::write(key, value, slot, keys, value_place),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Here` says that the machine has the instructions.
            Self::Avx2(_) | Self::Avx512(_) => unsafe { avx2::write(key, value, slot, keys, value_place) },
        }
    }
}
