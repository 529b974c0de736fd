//! How is a batch of rows multiplied by a weight matrix?
//!
//! A layer is one or more matrices, one below the other (q over k over v), each packed in the form that keeps what its file
//! holds: `quantised` for int8 rows, `float` for rows as they are. All are multiplied as one job of the threads.
//! Invariant: a row's outputs are the same bits alone and in any batch, with any number of threads, on every machine.

pub mod activations;
mod float;
mod gated;
pub mod quantised;

use std::ops::Range;

use half::{bf16, f16};

use super::SharedOut;
use super::huge_pages::HugePages;
use super::isa::Isa;
use super::prefetch::{Near, prefetch};
use super::threads::Threads;
pub use activations::{Activations, Wants};
pub use quantised::Encoding;

/// Output rows of a panel.
const PANEL: usize = 16;
/// Bytes of input that a panel passes over before the next panel's turn: part of a common L2 cache.
const INPUT_BLOCK_BYTES: usize = 384 * 1024;
/// Panels that are multiplied with one tile before the next tile's turn: their bytes stay in the L1 cache.
const PANELS_AT_ONCE: usize = 2;
/// Most panels that a thread takes at a time.
const PANELS_A_CHUNK: usize = 8;
/// Chunks that each thread finds, where there are panels enough: more would cost, fewer would leave threads waiting.
const CHUNKS_A_THREAD: usize = 6;

/// Writes a row of weights, dequantised, on any thread: `(row, values)`.
pub type FillRow<'a, E> = dyn Fn(usize, &mut [f32]) -> Result<(), E> + Sync + 'a;

/// Rows of weights as a file has them, and the form that they are to have.
pub enum Source<'a, E> {
    /// Kept as they are.
    Blocks(Encoding, &'a [u8]),
    F32(&'a [u8]),
    F16(&'a [u8]),
    BF16(&'a [u8]),
    /// Quantised to 8 bits.
    Quantise(&'a FillRow<'a, E>),
}

/// A matrix, packed.
enum Matrix {
    Quantised(quantised::Panels),
    F32(float::Panels<f32>),
    F16(float::Panels<f16>),
    BF16(float::Panels<bf16>),
}

impl Matrix {
    fn panels(&self) -> usize {
        match self {
            Self::Quantised(panels) => panels.panels(),
            Self::F32(panels) => panels.panels(),
            Self::F16(panels) => panels.panels(),
            Self::BF16(panels) => panels.panels(),
        }
    }
}

/// What becomes of a product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Update {
    /// It is written over what was there.
    Set,
    /// It is added to what was there.
    Add,
}

/// A linear layer without bias: `[rows, inputs]` to `[rows, outputs]`.
pub struct Linear {
    isa: Isa,
    inputs: usize,
    outputs: usize,
    /// The matrices, and the first output of each.
    parts: Vec<(usize, Matrix)>,
}

impl Linear {
    /// A layer without outputs, for kernels of these instructions.
    pub fn new(isa: Isa, inputs: usize) -> Self {
        assert!(inputs > 0, "a layer of no inputs");
        Self { isa, inputs, outputs: 0, parts: Vec::new() }
    }

    /// Packs a matrix of `outputs` rows below those that the layer has.
    pub fn push<E: Send>(
        &mut self,
        (threads, memory): (&mut Threads, &mut HugePages),
        outputs: usize,
        source: Source<'_, E>,
    ) -> Result<(), E> {
        let inputs = self.inputs;
        let matrix = match source {
            Source::Blocks(encoding, bytes) => {
                Matrix::Quantised(quantised::Panels::pack((threads, memory), outputs, inputs, encoding, bytes))
            }
            Source::F32(bytes) => Matrix::F32(float::Panels::pack((threads, memory), outputs, inputs, bytes)),
            Source::F16(bytes) => Matrix::F16(float::Panels::pack((threads, memory), outputs, inputs, bytes)),
            Source::BF16(bytes) => Matrix::BF16(float::Panels::pack((threads, memory), outputs, inputs, bytes)),
            Source::Quantise(fill) => {
                Matrix::Quantised(quantised::Panels::quantise((threads, memory), outputs, inputs, fill)?)
            }
        };
        self.parts.push((self.outputs, matrix));
        self.outputs += outputs;
        Ok(())
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether the scales of all quantised weights are numbers.
    pub fn is_finite(&self) -> bool {
        self.parts.iter().all(|(_, matrix)| match matrix {
            Matrix::Quantised(panels) => panels.is_finite(),
            Matrix::F32(_) | Matrix::F16(_) | Matrix::BF16(_) => true,
        })
    }

    /// In which forms the layer reads its input.
    pub fn wants(&self) -> Wants {
        let wants = |matrix: &Matrix| match matrix {
            Matrix::Quantised(panels) => panels.wants(self.isa),
            Matrix::F32(_) | Matrix::F16(_) | Matrix::BF16(_) => Wants { float: true, ..Wants::default() },
        };
        self.parts.iter().map(|(_, matrix)| wants(matrix)).fold(Wants::default(), Wants::and)
    }

    /// Copies row `row` of the weights to `out`, `[inputs]`: what an embedding does.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.outputs, "row {row} of a matrix of {} rows", self.outputs);
        let (first, matrix) = self.parts.iter().rev().find(|(first, _)| *first <= row).expect("parts start at row 0");
        match matrix {
            Matrix::Quantised(panels) => panels.copy_row(row - first, out),
            Matrix::F32(panels) => panels.copy_row(row - first, out),
            Matrix::F16(panels) => panels.copy_row(row - first, out),
            Matrix::BF16(panels) => panels.copy_row(row - first, out),
        }
    }

    /// `out[r][o] = Σ input[r][i] * weight[o][i]`, or that added. `out`: `[rows, outputs]`. Panics if the input was not
    /// filled for this layer.
    pub fn multiply(&self, threads: &mut Threads, input: &Activations, update: Update, out: &mut [f32]) {
        let rows = input.rows();
        self.check(input);
        assert_eq!(out.len(), rows * self.outputs, "a product of another shape");
        if rows == 0 {
            return;
        }
        let out = SharedOut::new(out);
        let panels: usize = self.parts.iter().map(|(_, matrix)| matrix.panels()).sum();
        let a_chunk = (panels / (CHUNKS_A_THREAD * threads.count())).clamp(1, PANELS_A_CHUNK);
        let chunks = |matrix: &Matrix| matrix.panels().div_ceil(a_chunk);
        let all = self.parts.iter().map(|(_, matrix)| chunks(matrix)).sum();
        threads.run(all, |mut chunk| {
            for (first_output, matrix) in &self.parts {
                if chunk >= chunks(matrix) {
                    chunk -= chunks(matrix);
                    continue;
                }
                let range = chunk * a_chunk..matrix.panels().min((chunk + 1) * a_chunk);
                let next = self.parts.iter().map(|(first, _)| *first).find(|first| first > first_output);
                let outputs = next.unwrap_or(self.outputs) - first_output;
                let out = Out { out, row: 0, panel: 0, first: *first_output, outputs, stride: self.outputs, update };
                return self.multiply_part(matrix, range, input, 0..rows, out);
            }
        });
    }

    /// Panics if the input was not filled for this layer.
    fn check(&self, input: &Activations) {
        let (wants, has) = (self.wants(), input.wants());
        assert_eq!(input.inputs(), self.inputs, "an input of another width");
        assert_eq!(has.and(wants), has, "an input of another form");
    }

    /// Some panels of one matrix by some rows, from the start of a tile.
    fn multiply_part(&self, matrix: &Matrix, range: Range<usize>, input: &Activations, rows: Range<usize>, out: Out) {
        let floats = || &input.floats()[rows.start * self.inputs..rows.end * self.inputs];
        match matrix {
            Matrix::Quantised(panels) => {
                let (kernel, tile_rows) = quantised::kernel(self.isa);
                let tiles = rows.start / tile_rows..rows.end.div_ceil(tile_rows);
                let at_once = (INPUT_BLOCK_BYTES / (self.inputs * tile_rows)).max(1);
                let panels_at_once = if tiles.len() == 1 { range.len() } else { PANELS_AT_ONCE };
                for first_tile in tiles.clone().step_by(at_once) {
                    for panel in range.clone().step_by(panels_at_once) {
                        for tile in first_tile..tiles.end.min(first_tile + at_once) {
                            let out = Out { row: out.row + tile * tile_rows - rows.start, ..out };
                            let panel = panel..range.end.min(panel + panels_at_once);
                            // SAFETY: the instructions were checked for when they were chosen; these panels' columns are
                            // this chunk's alone, and `out` is borrowed until all chunks are done.
                            unsafe { kernel(panels, panel, &input.tile(tile), &out) };
                        }
                    }
                }
            }
            Matrix::F32(panels) => panels.multiply(self.isa, range, floats(), &out),
            Matrix::F16(panels) => panels.multiply(self.isa, range, floats(), &out),
            Matrix::BF16(panels) => panels.multiply(self.isa, range, floats(), &out),
        }
    }
}

/// Where the products of some rows by one matrix go.
#[derive(Clone, Copy)]
struct Out {
    out: SharedOut<f32>,
    /// Where the tile's first row is.
    row: usize,
    /// The panel whose outputs come first.
    panel: usize,
    /// Where they are in a row.
    first: usize,
    /// Outputs from there on that the matrix has, or that are wanted.
    outputs: usize,
    /// From one row to the next.
    stride: usize,
    update: Update,
}

impl Out {
    fn adds(&self) -> bool {
        self.update == Update::Add
    }

    /// Where a panel's 16 products of row `row` of the tile go; `None` if the matrix has fewer left.
    ///
    /// # Safety
    /// The row is one of the product.
    #[inline(always)]
    unsafe fn whole(&self, row: usize, panel: usize) -> Option<*mut f32> {
        let column = (panel - self.panel) * PANEL;
        let at = (self.row + row) * self.stride + self.first + column;
        (column + PANEL <= self.outputs).then(|| self.out.at(at, PANEL))
    }

    /// Has the lines brought that a panel's products with `rows` rows of the tile will be written to. The processor would
    /// ask for them only when it comes to write, in their order, and the next tile's products would queue behind these.
    ///
    /// # Safety
    /// The rows are some of the product.
    #[inline(always)]
    unsafe fn prefetch(&self, rows: usize, panel: usize) {
        for row in 0..rows {
            // SAFETY: the caller's promise.
            if let Some(at) = unsafe { self.whole(row, panel) } {
                prefetch(at, Near::First);
            }
        }
    }

    /// Takes the products of a panel with row `row` of the tile.
    ///
    /// # Safety
    /// The output is borrowed, and these columns are this thread's alone.
    unsafe fn put(&self, row: usize, panel: usize, sums: &[f32; PANEL]) {
        // SAFETY: the caller's promise.
        unsafe { self.put_part(row, panel, 0, sums) }
    }

    /// As `put`, from lane `lane` of the panel.
    ///
    /// # Safety
    /// As `put`.
    unsafe fn put_part(&self, row: usize, panel: usize, lane: usize, sums: &[f32]) {
        let column = (panel - self.panel) * PANEL + lane;
        let width = sums.len().min(self.outputs.saturating_sub(column));
        if width == 0 {
            return;
        }
        // SAFETY: the caller's promise.
        let out = unsafe { self.out.part((self.row + row) * self.stride + self.first + column, width) };
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if self.adds() { *out + sum } else { *sum };
        }
    }
}

#[cfg(test)]
mod tests;
