//! Which instructions attend, and what do they get?

use std::ops::Range;

use half::f16;

use super::element::Element;
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
pub(super) struct Chunk<'a, E> {
    /// Place of the first token in the sequence.
    pub first: usize,
    pub head_dim: usize,
    /// Of each block `[head_dim][16]`.
    pub keys: [&'a [[E; BLOCK_TOKENS]]; CHUNK_BLOCKS],
    /// Of each block `[16][head_dim]`.
    pub values: [&'a [E]; CHUNK_BLOCKS],
    /// Of each block's keys, and of its values, a scale for each token; `NO_SCALES` where the numbers have none.
    pub key_scales: [&'a Scales; CHUNK_BLOCKS],
    pub value_scales: [&'a Scales; CHUNK_BLOCKS],
}

/// What the numbers of each token of a block are to be multiplied with, in one head's keys or values.
pub(super) type Scales = [f16; BLOCK_TOKENS];

pub(super) const NO_SCALES: &Scales = &[f16::ONE; BLOCK_TOKENS];

/// Keys, `[head_dim][16]`, or values, `[16][head_dim]`, of one KV head in a block, to write.
pub(super) struct PlaneMut<'a, E> {
    pub numbers: &'a mut [E],
    /// Empty where the numbers have none.
    pub scales: &'a mut [f16],
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
    pub fn tiles<E: Element>(self, queries: usize) -> impl Iterator<Item = Range<usize>> {
        let most = match self {
            Self::Scalar => usize::MAX,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => avx2::TILE,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => E::TILE_512,
        };
        let tiles = queries.div_ceil(most);
        (0..tiles).map(move |tile| queries * tile / tiles..queries * (tile + 1) / tiles)
    }

    /// Takes a chunk's tokens into each query's sums, while `ahead` is brought nearer.
    pub fn attend<E: Element>(self, tile: &mut Tile<'_>, chunk: &Chunk<'_, E>, ahead: &Chunk<'_, E>) {
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

    /// Writes one token's key and value into place `slot` of a block.
    pub fn write<E: Element>(
        self,
        (key, value): (&[f32], &[f32]),
        slot: usize,
        keys: &mut PlaneMut<'_, E>,
        values: &mut PlaneMut<'_, E>,
    ) {
        match self {
            Self::Scalar => scalar::write((key, value), slot, keys, values),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Here` says that the machine has the instructions.
            Self::Avx2(_) | Self::Avx512(_) => unsafe { avx2::write((key, value), slot, keys, values) },
        }
    }
}
