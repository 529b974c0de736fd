//! What does a product of float weights and rows compute? The plain form, which the SIMD form equals bit for bit.

use super::{PANEL, Task, Weight};

/// Multiplies rows by panels. `store(panel, row, sums)` takes each result.
pub(super) fn multiply<W: Weight>(task: &Task<'_, W>, input: &[f32], store: impl Fn(usize, usize, &[f32; PANEL])) {
    for (panel, weights) in task.panels.chunks_exact(task.inputs).enumerate() {
        for (row, input) in input.chunks_exact(task.inputs).enumerate() {
            let mut sums = [0.0_f32; PANEL];
            for (weights, &x) in weights.iter().zip(input) {
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = weight.to_f32().mul_add(x, *sum);
                }
            }
            store(panel, row, &sums);
        }
    }
}
