//! How do quantised weights lie in memory, and which kernel multiplies them?
//!
//! A panel is 16 rows of weights. Its columns lie in blocks of 32, a block in groups of 4 columns, `[panel][block][group]
//! [16 rows][4]`: 64 bytes are one vector of AVX-512, two of AVX2, four of NEON, and each lane of 32 bits holds what one
//! lane of the result multiplies. 4-bit weights keep group `j` in the low nibbles and group `j + 4` in the high ones; 5-bit
//! ones have a line more, whose bit `g` of each byte is the fifth bit of that place in group `g`. Scales lie apart, so that
//! the quants stay aligned.
//! Invariant: `out[row][output]` is one chain of the same operations over the blocks, in their order, in every kernel and
//! whatever the batch: `scalar` says which, and the others give its very bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ops::Range;

use half::f16;

use super::activations::{Tile, Wants};
use super::{Out, PANEL};
use crate::kernels::huge_pages::Piece;
use crate::kernels::isa::Isa;
pub use pack::Encoding;

/// Columns that share a scale.
pub const BLOCK: usize = 32;
/// Columns of a group: what one lane multiplies at once.
pub const GROUP: usize = 4;
/// Groups of a block.
pub const GROUPS: usize = BLOCK / GROUP;

/// How a quant becomes a weight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// `scale * quant`, 8 bits with a sign.
    Eight,
    /// `scale * (quant - 8)`, 4 bits.
    Four,
    /// `scale * quant + min`, 4 bits.
    FourAffine,
    /// `scale * (quant - 16)`, 5 bits.
    Five,
    /// `scale * quant + min`, 5 bits.
    FiveAffine,
}

impl Form {
    /// Vectors of 64 bytes that a block's quants take.
    const fn lines(self) -> usize {
        match self {
            Self::Eight => GROUPS,
            Self::Four | Self::FourAffine => GROUPS / 2,
            Self::Five | Self::FiveAffine => GROUPS / 2 + 1,
        }
    }

    /// What a weight of zero is as a quant, if the form has no min.
    const fn zero(self) -> u8 {
        match self {
            Self::Eight | Self::FourAffine | Self::FiveAffine => 0,
            Self::Four => 8,
            Self::Five => 16,
        }
    }

    const fn is_affine(self) -> bool {
        matches!(self, Self::FourAffine | Self::FiveAffine)
    }
}

/// A form as a type, so that each kernel is compiled for each.
trait Packing {
    const FORM: Form;
    const LINES: usize = Self::FORM.lines();
    /// Quants of 8 bits rather than nibbles.
    const BYTES: bool = matches!(Self::FORM, Form::Eight);
    const FIFTH_BIT: bool = matches!(Self::FORM, Form::Five | Form::FiveAffine);
    const AFFINE: bool = Self::FORM.is_affine();
    const ZERO: f32 = Self::FORM.zero() as f32;
}

struct Eight;
struct Four;
struct FourAffine;
struct Five;
struct FiveAffine;

impl Packing for Eight {
    const FORM: Form = Form::Eight;
}
impl Packing for Four {
    const FORM: Form = Form::Four;
}
impl Packing for FourAffine {
    const FORM: Form = Form::FourAffine;
}
impl Packing for Five {
    const FORM: Form = Form::Five;
}
impl Packing for FiveAffine {
    const FORM: Form = Form::FiveAffine;
}

/// Calls a function that is generic over `Packing` with the one of `form`.
macro_rules! with_packing {
    ($form:expr, $function:ident($($arg:expr),*)) => {
        match $form {
            // SAFETY: the caller's promise, in every arm.
            $crate::kernels::linear::quantised::Form::Eight => unsafe { $function::<$crate::kernels::linear::quantised::Eight>($($arg),*) },
            // SAFETY: as above.
            $crate::kernels::linear::quantised::Form::Four => unsafe { $function::<$crate::kernels::linear::quantised::Four>($($arg),*) },
            // SAFETY: as above.
            $crate::kernels::linear::quantised::Form::FourAffine => unsafe { $function::<$crate::kernels::linear::quantised::FourAffine>($($arg),*) },
            // SAFETY: as above.
            $crate::kernels::linear::quantised::Form::Five => unsafe { $function::<$crate::kernels::linear::quantised::Five>($($arg),*) },
            // SAFETY: as above.
            $crate::kernels::linear::quantised::Form::FiveAffine => unsafe { $function::<$crate::kernels::linear::quantised::FiveAffine>($($arg),*) },
        }
    };
}
use with_packing;

/// One group of a panel: a cache line.
#[derive(Clone, Copy, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Quantised weights, packed.
pub struct Panels {
    form: Form,
    outputs: usize,
    /// Blocks of a row.
    blocks: usize,
    /// `[panel][block][line]`; rows past the last are zeros.
    quants: Piece<Line>,
    /// `[panel][block]` of 16 rows.
    scales: Piece<[f16; PANEL]>,
    /// As `scales`; empty if the form has none.
    mins: Piece<[f16; PANEL]>,
}

/// Multiplies some panels by a tile of rows.
///
/// # Safety
/// The machine has the kernel's instructions; the panels are in range; `out` may be written at the tile's rows and the
/// panels' columns, by this thread alone.
type Kernel = unsafe fn(&Panels, Range<usize>, &Tile<'_>, &Out);

/// The kernel for these instructions, and how many rows its tiles have at most.
pub(super) fn kernel(isa: Isa) -> (Kernel, usize) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => (avx512::multiply, avx512::TILE),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => (vnni::avxvnni::multiply, vnni::TILE),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (avx2::multiply, avx2::TILE),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => (neon::multiply, neon::TILE),
        _ => (scalar::multiply, scalar::TILE),
    }
}

impl Panels {
    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// In which forms the kernel for these instructions reads rows.
    pub(super) fn wants(&self, isa: Isa) -> Wants {
        Wants { quantised: true, words: isa == Isa::Avx2 && self.form == Form::Eight, float: false }
    }

    /// Writes row `row`, dequantised, to `out`.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.outputs && out.len() == self.blocks * BLOCK, "row {row} of {}", self.outputs);
        let (panel, lane) = (row / PANEL, row % PANEL);
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let block = panel * self.blocks + block;
            let scale = self.scales[block][lane].to_f32();
            let min = if self.form.is_affine() { self.mins[block][lane].to_f32() } else { 0.0 };
            for (column, out) in out.iter_mut().enumerate() {
                *out = (self.quant(block, lane, column) as f32).mul_add(scale, min);
            }
        }
    }

    /// A quant, less the form's zero.
    fn quant(&self, block: usize, lane: usize, column: usize) -> i32 {
        let (group, place) = (column / GROUP, lane * GROUP + column % GROUP);
        let lines = &self.quants[block * self.form.lines()..][..self.form.lines()];
        let nibble = || {
            let both = lines[group % (GROUPS / 2)].0[place];
            if group < GROUPS / 2 { both & 15 } else { both >> 4 }
        };
        let quant = match self.form {
            Form::Eight => return i32::from(lines[group].0[place].cast_signed()),
            Form::Four | Form::FourAffine => nibble(),
            Form::Five | Form::FiveAffine => nibble() | (lines[GROUPS / 2].0[place] >> group & 1) << 4,
        };
        i32::from(quant) - i32::from(self.form.zero())
    }
}

/// The part of a panel that a kernel walks: pointers to its first block.
#[derive(Clone, Copy)]
struct Walk {
    quants: *const u8,
    scales: *const f16,
    mins: *const f16,
}

impl Panels {
    /// Where a panel starts. Without mins, those of `scales` stand in: they are not read.
    #[inline(always)]
    fn walk(&self, panel: usize) -> Walk {
        let first = panel * self.blocks;
        let end = first + self.blocks;
        let quants = &self.quants[first * self.form.lines()..end * self.form.lines()];
        let scales = &self.scales[first..end];
        let mins = if self.form.is_affine() { &self.mins[first..end] } else { scales };
        Walk { quants: quants.as_ptr().cast(), scales: scales.as_ptr().cast(), mins: mins.as_ptr().cast() }
    }
}

#[cfg(test)]
mod tests;
