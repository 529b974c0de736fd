//! How does AVX-512 with VNNI multiply panels by a tile of rows?
//!
//! One vector is a group of a panel: `vpdpbusd` multiplies its 64 bytes by four bytes of a row and adds into 16 sums. It
//! wants one side unsigned: nibbles are; 8-bit weights get 128 added by flipping their top bit, and the sums start at -128
//! times the row's own sum. Two panels share each read of a row's bytes.

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512i, _MM_HINT_T0, _mm_cvtsi32_si128, _mm_prefetch, _mm256_loadu_si256, _mm512_add_ps,
    _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_load_si512,
    _mm512_loadu_ps, _mm512_mul_ps, _mm512_or_si512, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_sll_epi16, _mm512_srl_epi16, _mm512_srli_epi16, _mm512_storeu_ps,
    _mm512_xor_si512,
};
use std::ops::Range;

use super::super::activations::Tile;
use super::super::{Out, PANEL};
use super::{GROUP, GROUPS, Packing, Panels, Walk, avx2, with_packing};

/// Rows of a tile: with two panels, 24 of the 32 registers are sums.
pub const TILE: usize = 6;
/// How far ahead weights are read from memory.
const PREFETCH_BYTES: usize = 2048;

/// As `Kernel` says.
///
/// # Safety
/// As `Kernel`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub unsafe fn multiply(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
    with_packing!(panels.form, rows(panels, range, tile, out))
}

/// # Safety
/// As `Kernel`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn rows<F: Packing>(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
    match tile.rows {
        // One row waits for memory, and narrow vectors wait less: the same bits.
        // SAFETY: the caller's promise; AVX2 is among these instructions.
        1 => unsafe { avx2::rows::<F>(panels, range, tile, out) },
        // SAFETY: the caller's promise.
        2 => unsafe { walk::<F, 2>(panels, range, tile, out) },
        // SAFETY: as above.
        3 => unsafe { walk::<F, 3>(panels, range, tile, out) },
        // SAFETY: as above.
        4 => unsafe { walk::<F, 4>(panels, range, tile, out) },
        // SAFETY: as above.
        5 => unsafe { walk::<F, 5>(panels, range, tile, out) },
        // SAFETY: as above.
        TILE => unsafe { walk::<F, TILE>(panels, range, tile, out) },
        rows => unreachable!("a tile of {rows} rows"),
    }
}

/// # Safety
/// As `Kernel`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn walk<F: Packing, const T: usize>(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
    let mut panel = range.start;
    while range.end - panel >= 2 {
        // SAFETY: the caller's promise.
        unsafe { multiply_tile::<F, T, 2>(panels, panel, tile, out) };
        panel += 2;
    }
    while panel < range.end {
        // SAFETY: the caller's promise.
        unsafe { multiply_tile::<F, T, 1>(panels, panel, tile, out) };
        panel += 1;
    }
}

/// `T` rows by `P` panels.
///
/// # Safety
/// As `Kernel`; the tile has `T` rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn multiply_tile<F: Packing, const T: usize, const P: usize>(
    panels: &Panels,
    panel: usize,
    tile: &Tile<'_>,
    out: &Out,
) {
    let walks: [Walk; P] = std::array::from_fn(|p| panels.walk(panel + p));
    let counted = T * panels.blocks;
    assert!(tile.quants.len() == counted * GROUPS * GROUP && tile.scales.len() == counted, "a tile of another shape");
    assert!(tile.sums.len() == counted && tile.counts.len() == counted, "a tile of another shape");
    if T > 1 {
        for p in 0..P {
            // SAFETY: the caller's promise.
            unsafe { out.prefetch(T, panel + p) };
        }
    }
    let mut sums = [[_mm512_setzero_ps(); P]; T];
    for block in 0..panels.blocks {
        // SAFETY: the tile has `T` rows of `panels.blocks` blocks, and each walk as many blocks (above), here and below.
        let quants = unsafe { tile.quants.as_ptr().add(block * T * GROUPS * GROUP) };
        let mut dots = [[_mm512_setzero_si512(); P]; T];
        if F::BYTES {
            for (t, dots) in dots.iter_mut().enumerate() {
                // SAFETY: as above.
                let count = unsafe { *tile.counts.as_ptr().add(block * T + t) };
                *dots = [_mm512_set1_epi32(-128 * count); P];
            }
        }
        let mut fifth = [_mm512_setzero_si512(); P];
        if F::FIFTH_BIT {
            for (fifth, walk) in fifth.iter_mut().zip(&walks) {
                // SAFETY: as above: the last line of the block.
                let at = unsafe { walk.quants.add((block * F::LINES + GROUPS / 2) * 64) };
                // SAFETY: a whole line, aligned as one.
                *fifth = unsafe { _mm512_load_si512(at.cast::<__m512i>()) };
            }
        }
        for line in 0..if F::BYTES { GROUPS } else { GROUPS / 2 } {
            let mut weights = [_mm512_setzero_si512(); P];
            for (weights, walk) in weights.iter_mut().zip(&walks) {
                // SAFETY: as above.
                let at = unsafe { walk.quants.add((block * F::LINES + line) * 64) };
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES).cast());
                // SAFETY: a whole line, aligned as one.
                *weights = unsafe { _mm512_load_si512(at.cast::<__m512i>()) };
            }
            if F::BYTES {
                for weights in &mut weights {
                    *weights = _mm512_xor_si512(*weights, _mm512_set1_epi8(-128));
                }
                // SAFETY: as above.
                unsafe { add_group::<T, P>(&weights, quants, line, &mut dots) };
            } else {
                let (mut low, mut high) = (weights, weights);
                for p in 0..P {
                    low[p] = _mm512_and_si512(weights[p], _mm512_set1_epi8(15));
                    high[p] = _mm512_and_si512(_mm512_srli_epi16::<4>(weights[p]), _mm512_set1_epi8(15));
                    if F::FIFTH_BIT {
                        low[p] = _mm512_or_si512(low[p], bit_four(_mm512_sll_epi16(fifth[p], shift(4 - line))));
                        high[p] = _mm512_or_si512(high[p], bit_four(_mm512_srl_epi16(fifth[p], shift(line))));
                    }
                }
                // SAFETY: as above.
                unsafe { add_group::<T, P>(&low, quants, line, &mut dots) };
                // SAFETY: as above.
                unsafe { add_group::<T, P>(&high, quants, line + GROUPS / 2, &mut dots) };
            }
        }
        let mut scales = [_mm512_setzero_ps(); P];
        let mut mins = [_mm512_setzero_ps(); P];
        for p in 0..P {
            // SAFETY: as above: 16 halves.
            let half = unsafe { _mm256_loadu_si256(walks[p].scales.add(block * PANEL).cast::<__m256i>()) };
            scales[p] = _mm512_cvtph_ps(half);
            if F::AFFINE {
                // SAFETY: as above.
                let half = unsafe { _mm256_loadu_si256(walks[p].mins.add(block * PANEL).cast::<__m256i>()) };
                mins[p] = _mm512_cvtph_ps(half);
            }
        }
        for t in 0..T {
            // SAFETY: as above.
            let scale = _mm512_set1_ps(unsafe { *tile.scales.as_ptr().add(block * T + t) });
            // SAFETY: as above.
            let sum = unsafe { *tile.sums.as_ptr().add(block * T + t) };
            for p in 0..P {
                let dot = _mm512_cvtepi32_ps(dots[t][p]);
                let scaled = if F::ZERO != 0.0 {
                    _mm512_fmadd_ps(dot, scale, _mm512_set1_ps(F::ZERO * -sum))
                } else {
                    _mm512_mul_ps(dot, scale)
                };
                sums[t][p] = _mm512_fmadd_ps(scaled, scales[p], sums[t][p]);
                if F::AFFINE {
                    sums[t][p] = _mm512_fmadd_ps(mins[p], _mm512_set1_ps(sum), sums[t][p]);
                }
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        for (p, &sums) in sums.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { put(out, t, panel + p, sums) };
        }
    }
}

/// Bit 4 of each byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn bit_four(bits: __m512i) -> __m512i {
    _mm512_and_si512(bits, _mm512_set1_epi8(16))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn shift(bits: usize) -> __m128i {
    _mm_cvtsi32_si128(bits as i32)
}

/// Adds one group's products.
///
/// # Safety
/// `quants` points at a block of `T` rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn add_group<const T: usize, const P: usize>(
    weights: &[__m512i; P],
    quants: *const i8,
    group: usize,
    dots: &mut [[__m512i; P]; T],
) {
    for (t, dots) in dots.iter_mut().enumerate() {
        // SAFETY: inside the block; four bytes that need not be aligned.
        let row = unsafe { quants.add((group * T + t) * GROUP).cast::<i32>().read_unaligned() };
        let row = _mm512_set1_epi32(row);
        for (dot, &weights) in dots.iter_mut().zip(weights) {
            *dot = _mm512_dpbusd_epi32(*dot, weights, row);
        }
    }
}

/// As `Out::put`.
///
/// # Safety
/// As `Out::put`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn put(out: &Out, row: usize, panel: usize, sums: __m512) {
    // SAFETY: the caller's promise.
    if let Some(at) = unsafe { out.whole(row, panel) } {
        let sums = if out.adds() {
            // SAFETY: 16 floats that are this thread's alone.
            _mm512_add_ps(unsafe { _mm512_loadu_ps(at) }, sums)
        } else {
            sums
        };
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(at, sums) };
    } else {
        let mut lanes = [0.0; PANEL];
        // SAFETY: 16 floats.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sums) };
        // SAFETY: the caller's promise.
        unsafe { out.put(row, panel, &lanes) };
    }
}
