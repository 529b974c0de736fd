//! How are the two halves of a gated layer multiplied and put together?
//!
//! SwiGLU (arXiv:2002.05202) wants the products of two matrices, gate and up, of which only `silu(gate) * up` is used. Each
//! chunk of work has the same columns of both: their products wait in the thread's own cache, and what goes to memory is
//! the next layer's input, in the form that it reads.
//! Invariant: the bits are those of a product, then `swiglu`, then `Activations::fill`.

use super::quantised::BLOCK;
use super::*;
use crate::kernels::elementwise::swiglu;

/// Products of a chunk that wait at a time, at the most: 64 KiB, a part of the second cache.
const WAITING: usize = 16 * 1024;
/// Most blocks of the next layer's input that a chunk makes: few rows wait for memory, which long runs ask less often.
const BLOCKS_A_CHUNK: usize = 4;

impl Linear {
    /// Fills `out` with `silu(gate) * up` for a layer of two matrices of the same size, gates and ups: rows of
    /// `outputs / 2`, in the forms that `wants` says. Panics on a layer of another shape, and as `multiply`.
    pub fn multiply_gated(&self, threads: &mut Threads, input: &Activations, wants: Wants, out: &mut Activations) {
        let [(0, gate), (width, up)] = &self.parts[..] else { panic!("a gated layer is two matrices") };
        let (rows, width) = (input.rows(), *width);
        assert_eq!(self.outputs, 2 * width, "as many gates as ups");
        self.check(input);
        let (places, scratch) = out.places(rows, width, wants);
        if rows == 0 {
            return;
        }
        let blocks = width.div_ceil(BLOCK) / (CHUNKS_A_THREAD * threads.count());
        let a_chunk = BLOCK * blocks.min(WAITING / (2 * BLOCK * rows)).clamp(1, BLOCKS_A_CHUNK);
        let at_once = (WAITING / (2 * a_chunk * input.tile_rows())).max(1) * input.tile_rows();
        // Always as many, so that no later step needs more.
        scratch.iter_mut().for_each(|products| products.resize(WAITING, 0.0));
        threads.run_with(scratch, width.div_ceil(a_chunk), |products, chunk| {
            let columns = chunk * a_chunk..width.min((chunk + 1) * a_chunk);
            let panels = columns.start / PANEL..columns.end.div_ceil(PANEL);
            for first in (0..rows).step_by(at_once) {
                let rows = first..rows.min(first + at_once);
                let products = &mut products[..rows.len() * 2 * a_chunk];
                let shared = SharedOut::new(products);
                for (matrix, first) in [(gate, 0), (up, a_chunk)] {
                    let out = Out {
                        out: shared,
                        row: 0,
                        panel: panels.start,
                        first,
                        outputs: columns.len(),
                        stride: 2 * a_chunk,
                        update: Update::Set,
                    };
                    self.multiply_part(matrix, panels.clone(), input, rows.clone(), out);
                }
                swiglu(self.isa, products, a_chunk);
                // SAFETY: these columns are this chunk's alone.
                unsafe { places.put(rows, columns.clone(), products, 2 * a_chunk) };
            }
        });
    }
}
