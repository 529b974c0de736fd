//! How does AVX2 multiply rows by panels?
//!
//! Tiles of 6, 4, 2 or 1 rows by 16 outputs keep their sums in registers. One or two rows alone would wait for each
//! multiply-add's latency, so they take several panels at once. Neither changes the order of any output's sum.

use std::arch::x86_64::{
    __m256, _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};

use half::{bf16, f16};

use super::{PANEL, Task, Weight};

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn widen_f32(weights: &[f32; PANEL]) -> [__m256; 2] {
    let start = weights.as_ptr();
    // SAFETY: lanes 0 to 7 of 16.
    let low = unsafe { _mm256_loadu_ps(start) };
    // SAFETY: lanes 8 to 15 of 16.
    let high = unsafe { _mm256_loadu_ps(start.add(8)) };
    [low, high]
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen_f16(weights: &[f16; PANEL]) -> [__m256; 2] {
    let start = weights.as_ptr();
    // SAFETY: lanes 0 to 7 of 16.
    let low = unsafe { _mm_loadu_si128(start.cast()) };
    // SAFETY: lanes 8 to 15 of 16.
    let high = unsafe { _mm_loadu_si128(start.add(8).cast()) };
    [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn widen_bf16(weights: &[bf16; PANEL]) -> [__m256; 2] {
    let start = weights.as_ptr();
    // SAFETY: lanes 0 to 7 of 16.
    let low = unsafe { _mm_loadu_si128(start.cast()) };
    // SAFETY: lanes 8 to 15 of 16.
    let high = unsafe { _mm_loadu_si128(start.add(8).cast()) };
    // The upper half of an f32's bits.
    [low, high].map(|half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))))
}

/// As `scalar::multiply`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn multiply<W: Weight>(task: &Task<'_, W>, input: &[f32], store: impl Fn(usize, usize, &[f32; PANEL])) {
    let (rows, panels) = (input.len() / task.inputs, task.panels.len() / task.inputs);
    let sixes = rows / 6 * 6;
    let tiled = if rows - sixes >= 4 { sixes + 4 } else { sixes };
    for panel in 0..panels {
        for row in (0..sixes).step_by(6) {
            tile::<6, 1, W>(task, panel, input, row, &store);
        }
        if tiled > sixes {
            tile::<4, 1, W>(task, panel, input, sixes, &store);
        }
    }
    match rows - tiled {
        0 => {}
        1 => few_rows::<1, W>(task, input, tiled, &store),
        2 => few_rows::<2, W>(task, input, tiled, &store),
        _ => few_rows::<3, W>(task, input, tiled, &store),
    }
}

/// All panels for the last `T` rows, four panels at a time for one row, two for two.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn few_rows<const T: usize, W: Weight>(
    task: &Task<'_, W>,
    input: &[f32],
    row: usize,
    store: &impl Fn(usize, usize, &[f32; PANEL]),
) {
    let panels = task.panels.len() / task.inputs;
    let mut panel = 0;
    while T == 1 && panels - panel >= 4 {
        tile::<T, 4, W>(task, panel, input, row, store);
        panel += 4;
    }
    while T <= 2 && panels - panel >= 2 {
        tile::<T, 2, W>(task, panel, input, row, store);
        panel += 2;
    }
    while panel < panels {
        tile::<T, 1, W>(task, panel, input, row, store);
        panel += 1;
    }
}

/// `T` rows by `P` panels.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const T: usize, const P: usize, W: Weight>(
    task: &Task<'_, W>,
    panel: usize,
    input: &[f32],
    row: usize,
    store: &impl Fn(usize, usize, &[f32; PANEL]),
) {
    let inputs = task.inputs;
    let weights: [&[[W; PANEL]]; P] = std::array::from_fn(|p| &task.panels[(panel + p) * inputs..][..inputs]);
    let input: [&[f32]; T] = std::array::from_fn(|t| &input[(row + t) * inputs..][..inputs]);
    let mut sums = [[[_mm256_setzero_ps(); 2]; P]; T];
    for column in 0..inputs {
        let mut wide = [[_mm256_setzero_ps(); 2]; P];
        for (wide, weights) in wide.iter_mut().zip(&weights) {
            // SAFETY: each slice of `weights` has `inputs` columns, and `column` is below that.
            let weights = unsafe { weights.get_unchecked(column) };
            // SAFETY: this function runs on machines with AVX2 and F16C only.
            *wide = unsafe { W::widen(weights) };
        }
        for (sums, input) in sums.iter_mut().zip(&input) {
            // SAFETY: each slice of `input` has `inputs` columns, and `column` is below that.
            let x = _mm256_set1_ps(*unsafe { input.get_unchecked(column) });
            for (sums, wide) in sums.iter_mut().zip(&wide) {
                sums[0] = _mm256_fmadd_ps(wide[0], x, sums[0]);
                sums[1] = _mm256_fmadd_ps(wide[1], x, sums[1]);
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        for (p, sums) in sums.iter().enumerate() {
            let mut lanes = [0.0; PANEL];
            // SAFETY: lanes 0 to 7 of 16.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums[0]) };
            // SAFETY: lanes 8 to 15 of 16.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr().add(8), sums[1]) };
            store(panel + p, row + t, &lanes);
        }
    }
}
