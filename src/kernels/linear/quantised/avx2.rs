//! How does AVX2 multiply panels by a tile of rows?
//!
//! `maddubs` multiplies unsigned bytes by signed ones and adds pairs in 16 bits, with saturation. Nibbles fit: all eight
//! products of a lane's block add up in 16 bits (8 * 2 * 15 * 127 = 30,480). Of 8-bit weights the absolute value is taken,
//! and their sign given to the row's byte, which is never -128: 2 * 128 * 127 fits. A tile is half a panel (8 rows of
//! weights) by up to six rows of input.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T0, _MM_HINT_T1, _mm_cvtsi32_si128, _mm_loadu_si128, _mm_prefetch,
    _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_cvtepi32_ps,
    _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_load_si256, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_mul_ps, _mm256_or_si256, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_setzero_si256, _mm256_sign_epi8, _mm256_sll_epi16, _mm256_srl_epi16, _mm256_srli_epi16,
    _mm256_storeu_ps,
};
use std::ops::Range;

use super::super::activations::Tile;
use super::super::{Out, PANEL};
use super::{GROUP, GROUPS, Packing, Panels, with_packing};

/// Rows of a tile: with half a panel, sums and weights fill the 16 registers.
pub const TILE: usize = 6;
/// How far ahead quants are asked for: bytes into the first cache, nibbles, which are multiplied faster than memory gives
/// them, earlier and into the second. Each was a sixth faster than the other's way on Zen 4.
const BYTES_AHEAD: usize = 4096;
const NIBBLES_AHEAD: usize = 8192;
/// Weights of a vector.
const HALF: usize = PANEL / 2;

/// As `Kernel` says.
///
/// # Safety
/// As `Kernel`.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn multiply(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
    with_packing!(panels.form, rows(panels, range, tile, out))
}

/// As `Kernel`, for one form.
///
/// # Safety
/// As `Kernel`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn rows<F: Packing>(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
    for panel in range {
        match tile.rows {
            // Few rows have registers left for the whole panel.
            // SAFETY: the caller's promise.
            1 => unsafe { multiply_tile::<F, 1, 2>(panels, panel, 0, tile, out) },
            // SAFETY: as above.
            2 => unsafe { multiply_tile::<F, 2, 2>(panels, panel, 0, tile, out) },
            // SAFETY: as above.
            3 => unsafe { multiply_halves::<F, 3>(panels, panel, tile, out) },
            // SAFETY: as above.
            4 => unsafe { multiply_halves::<F, 4>(panels, panel, tile, out) },
            // SAFETY: as above.
            5 => unsafe { multiply_halves::<F, 5>(panels, panel, tile, out) },
            // SAFETY: as above.
            TILE => unsafe { multiply_halves::<F, TILE>(panels, panel, tile, out) },
            rows => unreachable!("a tile of {rows} rows"),
        }
    }
}

/// `T` rows by one half of a panel after the other.
///
/// # Safety
/// As `Kernel`; the tile has `T` rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_halves<F: Packing, const T: usize>(panels: &Panels, panel: usize, tile: &Tile<'_>, out: &Out) {
    // SAFETY: the caller's promise.
    unsafe { multiply_tile::<F, T, 1>(panels, panel, 0, tile, out) };
    // SAFETY: as above.
    unsafe { multiply_tile::<F, T, 1>(panels, panel, 1, tile, out) };
}

/// `T` rows by `H` halves of a panel, from half `first`.
///
/// # Safety
/// As `Kernel`; the tile has `T` rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_tile<F: Packing, const T: usize, const H: usize>(
    panels: &Panels,
    panel: usize,
    first: usize,
    tile: &Tile<'_>,
    out: &Out,
) {
    let walk = panels.walk(panel);
    let counted = T * panels.blocks;
    assert!(tile.quants.len() == counted * GROUPS * GROUP && tile.scales.len() == counted, "a tile of another shape");
    assert!(tile.sums.len() == counted && first + H <= 2, "a tile of another shape");
    let mut sums = [[_mm256_setzero_ps(); H]; T];
    for block in 0..panels.blocks {
        // SAFETY: the tile has `T` rows of `panels.blocks` blocks, and the panel as many (above), here and below.
        let quants = unsafe { tile.quants.as_ptr().add(block * T * GROUPS * GROUP) };
        let mut dots = [[_mm256_setzero_si256(); H]; T];
        let mut pairs = [[_mm256_setzero_si256(); H]; T];
        let mut fifth = [_mm256_setzero_si256(); H];
        if F::FIFTH_BIT {
            for (h, fifth) in fifth.iter_mut().enumerate() {
                // SAFETY: as above: the last line of the block.
                let at = unsafe { walk.quants.add((block * F::LINES + GROUPS / 2) * 64 + (first + h) * 32) };
                // SAFETY: half a line, aligned as one.
                *fifth = unsafe { _mm256_load_si256(at.cast::<__m256i>()) };
            }
        }
        for line in 0..if F::BYTES { GROUPS } else { GROUPS / 2 } {
            // SAFETY: as above.
            let at = unsafe { walk.quants.add((block * F::LINES + line) * 64) };
            if F::BYTES {
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(BYTES_AHEAD).cast());
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(NIBBLES_AHEAD).cast());
            }
            let mut weights = [_mm256_setzero_si256(); H];
            for (h, weights) in weights.iter_mut().enumerate() {
                // SAFETY: half a line, aligned as one.
                *weights = unsafe { _mm256_load_si256(at.add((first + h) * 32).cast::<__m256i>()) };
            }
            if F::BYTES {
                // SAFETY: as above.
                unsafe { add_bytes::<T, H>(&weights, quants, line, &mut dots) };
                continue;
            }
            let (mut low, mut high) = (weights, weights);
            for h in 0..H {
                low[h] = _mm256_and_si256(weights[h], _mm256_set1_epi8(15));
                high[h] = _mm256_and_si256(_mm256_srli_epi16::<4>(weights[h]), _mm256_set1_epi8(15));
                if F::FIFTH_BIT {
                    low[h] = _mm256_or_si256(low[h], bit_four(_mm256_sll_epi16(fifth[h], shift(4 - line))));
                    high[h] = _mm256_or_si256(high[h], bit_four(_mm256_srl_epi16(fifth[h], shift(line))));
                }
            }
            // SAFETY: as above.
            unsafe { add_nibbles::<T, H>(&low, quants, line, &mut pairs) };
            // SAFETY: as above.
            unsafe { add_nibbles::<T, H>(&high, quants, line + GROUPS / 2, &mut pairs) };
            // Half a block of 5-bit weights fits 16 bits, a whole one of 4-bit weights.
            if line == 3 || F::FIFTH_BIT && line == 1 {
                for t in 0..T {
                    for h in 0..H {
                        let wide = _mm256_madd_epi16(pairs[t][h], _mm256_set1_epi16(1));
                        dots[t][h] = _mm256_add_epi32(dots[t][h], wide);
                        pairs[t][h] = _mm256_setzero_si256();
                    }
                }
            }
        }
        let mut scales = [_mm256_setzero_ps(); H];
        let mut mins = [_mm256_setzero_ps(); H];
        for h in 0..H {
            let at = block * PANEL + (first + h) * HALF;
            // SAFETY: as above: eight halves.
            scales[h] = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(walk.scales.add(at).cast::<__m128i>()) });
            if F::AFFINE {
                // SAFETY: as above.
                mins[h] = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(walk.mins.add(at).cast::<__m128i>()) });
            }
        }
        for t in 0..T {
            // SAFETY: as above.
            let scale = _mm256_set1_ps(unsafe { *tile.scales.as_ptr().add(block * T + t) });
            // SAFETY: as above.
            let sum = unsafe { *tile.sums.as_ptr().add(block * T + t) };
            for h in 0..H {
                let dot = _mm256_cvtepi32_ps(dots[t][h]);
                let scaled = if F::ZERO != 0.0 {
                    _mm256_fmadd_ps(dot, scale, _mm256_set1_ps(F::ZERO * -sum))
                } else {
                    _mm256_mul_ps(dot, scale)
                };
                sums[t][h] = _mm256_fmadd_ps(scaled, scales[h], sums[t][h]);
                if F::AFFINE {
                    sums[t][h] = _mm256_fmadd_ps(mins[h], _mm256_set1_ps(sum), sums[t][h]);
                }
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        for (h, &sums) in sums.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { put(out, t, panel, first + h, sums) };
        }
    }
}

/// Bit 4 of each byte.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn bit_four(bits: __m256i) -> __m256i {
    _mm256_and_si256(bits, _mm256_set1_epi8(16))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn shift(bits: usize) -> __m128i {
    _mm_cvtsi32_si128(bits as i32)
}

/// Adds one group's products of nibbles, in 16 bits.
///
/// # Safety
/// `quants` points at a block of `T` rows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_nibbles<const T: usize, const H: usize>(
    weights: &[__m256i; H],
    quants: *const i8,
    group: usize,
    dots: &mut [[__m256i; H]; T],
) {
    for (t, dots) in dots.iter_mut().enumerate() {
        // SAFETY: inside the block; four bytes that need not be aligned.
        let row = unsafe { quants.add((group * T + t) * GROUP).cast::<i32>().read_unaligned() };
        let row = _mm256_set1_epi32(row);
        for (dot, &weights) in dots.iter_mut().zip(weights) {
            *dot = _mm256_add_epi16(*dot, _mm256_maddubs_epi16(weights, row));
        }
    }
}

/// Adds one group's products of bytes, in 32 bits.
///
/// # Safety
/// `quants` points at a block of `T` rows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_bytes<const T: usize, const H: usize>(
    weights: &[__m256i; H],
    quants: *const i8,
    group: usize,
    dots: &mut [[__m256i; H]; T],
) {
    let mut sizes = *weights;
    for sizes in &mut sizes {
        *sizes = _mm256_abs_epi8(*sizes);
    }
    for (t, dots) in dots.iter_mut().enumerate() {
        // SAFETY: inside the block; four bytes that need not be aligned.
        let row = unsafe { quants.add((group * T + t) * GROUP).cast::<i32>().read_unaligned() };
        let row = _mm256_set1_epi32(row);
        for h in 0..H {
            let pairs = _mm256_maddubs_epi16(sizes[h], _mm256_sign_epi8(row, weights[h]));
            dots[h] = _mm256_add_epi32(dots[h], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    }
}

/// As `Out::put`, half a panel.
///
/// # Safety
/// As `Out::put`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn put(out: &Out, row: usize, panel: usize, half: usize, sums: __m256) {
    // SAFETY: the caller's promise.
    if let Some(at) = unsafe { out.whole(row, panel) } {
        let at = at.wrapping_add(half * HALF);
        // SAFETY: eight floats that are this thread's alone.
        let sums = if out.adds() { _mm256_add_ps(unsafe { _mm256_loadu_ps(at) }, sums) } else { sums };
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(at, sums) };
    } else {
        let mut lanes = [0.0; HALF];
        // SAFETY: eight floats.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums) };
        // SAFETY: the caller's promise.
        unsafe { out.put_part(row, panel, half * HALF, &lanes) };
    }
}
