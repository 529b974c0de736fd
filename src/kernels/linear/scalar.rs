//! What does a linear layer compute? The plain form, which the SIMD forms must equal bit for bit.

use half::f16;

use super::{PANEL, Task, Weight};

impl Weight for f32 {
    fn to_f32(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn widen(weights: &[f32; PANEL]) -> [std::arch::x86_64::__m256; 2] {
        // SAFETY: the machine has AVX2 (the caller's promise), and the reference is to 16 floats.
        unsafe { super::avx2::widen_f32(weights) }
    }
}

impl Weight for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn widen(weights: &[f16; PANEL]) -> [std::arch::x86_64::__m256; 2] {
        // SAFETY: the machine has AVX2 and F16C (the caller's promise), and the reference is to 16 halves.
        unsafe { super::avx2::widen_f16(weights) }
    }
}

/// Multiplies all rows of `input` by the task's panels; `store(panel, row, sums)` takes the results.
pub(super) fn multiply<W: Weight>(
    task: &Task<'_, W>,
    input: &[f32],
    mut store: impl FnMut(usize, usize, &mut [f32; PANEL]),
) {
    for (panel, weights) in task.panels.chunks_exact(task.inputs).enumerate() {
        for (row, input) in input.chunks_exact(task.inputs).enumerate() {
            let mut sums = [0.0_f32; PANEL];
            for (weights, &x) in weights.iter().zip(input) {
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = weight.to_f32().mul_add(x, *sum);
                }
            }
            store(task.first_panel + panel, row, &mut sums);
        }
    }
}
