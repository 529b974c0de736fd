//! How are weights that are no quants kept, and multiplied by rows of f32?
//!
//! Panels of 16 output rows, `[panel][column][16]`, in the file's own type, so that nothing is lost. Each output is one
//! chain of fused multiply-adds over the columns, in their order, whatever the number of rows and whichever kernel runs.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod scalar;
mod weight;

use std::ops::Range;

use super::{Out, PANEL};
use crate::kernels::SharedOut;
use crate::kernels::huge_pages::{HugePages, Piece};
use crate::kernels::isa::Isa;
use crate::kernels::threads::Threads;
use weight::Weight;

/// Bytes of input that a panel passes over before the next panel's turn: half of a common L2 cache.
const INPUT_BLOCK_BYTES: usize = 256 * 1024;
/// Most rows of input of one tile: with two vectors of outputs each, they fill the 16 registers of AVX2.
const TILE: usize = 6;

/// Weights, packed.
pub struct Panels<W> {
    outputs: usize,
    inputs: usize,
    /// `[panel][column]` of 16 rows; rows past the last are zeros.
    panels: Piece<[W; PANEL]>,
}

/// Some panels to multiply.
struct Task<'a, W> {
    /// `[panel][column]`.
    panels: &'a [[W; PANEL]],
    inputs: usize,
}

impl<W: Weight> Panels<W> {
    /// Packs a matrix of `outputs` rows from their bytes. Panics if they are of another size.
    pub fn pack(
        (threads, memory): (&mut Threads, &mut HugePages),
        outputs: usize,
        inputs: usize,
        bytes: &[u8],
    ) -> Self {
        assert_eq!(bytes.len(), outputs * inputs * size_of::<W>(), "bytes of another shape");
        let mut panels = memory.zeroed::<[W; PANEL]>(outputs.div_ceil(PANEL) * inputs);
        let shared = SharedOut::new(&mut panels);
        threads.run(outputs.div_ceil(PANEL), |panel| {
            // SAFETY: borrowed for the whole run; only this call has this panel.
            let packed = unsafe { shared.part(panel * inputs, inputs) };
            for lane in 0..PANEL.min(outputs - panel * PANEL) {
                let row = &bytes[(panel * PANEL + lane) * inputs * size_of::<W>()..];
                for (weights, bytes) in packed.iter_mut().zip(row.chunks_exact(size_of::<W>())) {
                    weights[lane] = W::from_le_bytes(bytes);
                }
            }
        });
        Self { outputs, inputs, panels }
    }

    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// Writes row `row` to `out`.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        let (first, lane) = (row / PANEL * self.inputs, row % PANEL);
        for (out, weights) in out.iter_mut().zip(&self.panels[first..][..self.inputs]) {
            *out = weights[lane].to_f32();
        }
    }

    /// Multiplies panels by rows, `[rows, inputs]`. The columns of these panels are the calling thread's alone.
    pub(super) fn multiply(&self, isa: Isa, range: Range<usize>, input: &[f32], out: &Out) {
        let task =
            Task { panels: &self.panels[range.start * self.inputs..range.end * self.inputs], inputs: self.inputs };
        let block = (INPUT_BLOCK_BYTES / (self.inputs * size_of::<f32>())).max(1).next_multiple_of(TILE);
        for (index, input) in input.chunks(block * self.inputs).enumerate() {
            let store = |panel: usize, row: usize, sums: &[f32; PANEL]| {
                // SAFETY: the caller has these columns; `out` is borrowed by whoever made it.
                unsafe { out.put(index * block + row, range.start + panel, sums) }
            };
            #[cfg(target_arch = "x86_64")]
            if isa.has_avx2() {
                // SAFETY: the instructions were checked for when they were chosen.
                unsafe { avx2::multiply(&task, input, store) }
                continue;
            }
            let _ = isa;
            scalar::multiply(&task, input, store);
        }
    }
}
