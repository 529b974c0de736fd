//! How does AVX2 multiply panels by a tile of rows?
//!
//! `maddubs` multiplies unsigned bytes by signed ones and adds pairs in 16 bits, with saturation. Nibbles fit: all eight
//! products of a lane's block add up in 16 bits (8 * 2 * 15 * 127 = 30,480). Two products of 8-bit weights fit as well, if
//! the weights' absolute values are taken and their signs given to the row's bytes, which are never -128: but that takes
//! three instructions of the two units that multiply, where `madd` on words takes two. So several rows come as words, with
//! even and odd columns apart as the weights are by shifts alone, and a single row, which waits for memory, as bytes.
//!
//! A tile is a panel by up to four rows: its sums of products take half of the 16 registers, and its sums of blocks wait in
//! the first cache. Each read of a row serves a whole panel; with half a panel, two reads a cycle were the limit.

use std::arch::asm;
use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T0, _MM_HINT_T1, _mm_cvtsi32_si128, _mm_loadu_si128, _mm_prefetch,
    _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_cvtepi32_ps,
    _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_load_si256, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_mul_ps, _mm256_or_si256, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_setzero_si256, _mm256_sign_epi8, _mm256_sll_epi16, _mm256_slli_epi16, _mm256_srai_epi16,
    _mm256_srl_epi16, _mm256_srli_epi16, _mm256_storeu_ps,
};
use std::ops::Range;

use super::super::activations::Tile;
use super::super::{Out, PANEL};
use super::{GROUP, GROUPS, Packing, Panels, with_packing};

/// Rows of a tile.
pub const TILE: usize = 4;
/// How far ahead quants are asked for: bytes into the first cache, nibbles, which are multiplied faster than memory gives
/// them, earlier and into the second. Each was a sixth faster than the other's way on Zen 4.
const BYTES_AHEAD: usize = 4096;
const NIBBLES_AHEAD: usize = 8192;
/// Vectors of a panel.
const VECTORS: usize = 2;
/// Weights of a vector.
const HALF: usize = PANEL / VECTORS;

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
            // SAFETY: the caller's promise.
            1 => unsafe { multiply_tile::<F, 1>(panels, panel, tile, out) },
            // SAFETY: as above.
            2 => unsafe { multiply_tile::<F, 2>(panels, panel, tile, out) },
            // SAFETY: as above.
            3 => unsafe { multiply_tile::<F, 3>(panels, panel, tile, out) },
            // SAFETY: as above.
            TILE => unsafe { multiply_tile::<F, TILE>(panels, panel, tile, out) },
            rows => unreachable!("a tile of {rows} rows"),
        }
    }
}

/// `T` rows by a panel.
///
/// # Safety
/// As `Kernel`; the tile has `T` rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_tile<F: Packing, const T: usize>(panels: &Panels, panel: usize, tile: &Tile<'_>, out: &Out) {
    let walk = panels.walk(panel);
    let counted = T * panels.blocks;
    let words = if F::BYTES && T > 1 { counted * GROUPS * GROUP } else { 0 };
    assert!(tile.quants.len() == counted * GROUPS * GROUP && tile.scales.len() == counted, "a tile of another shape");
    assert!(tile.sums.len() == counted && tile.words.len() >= words, "a tile of another shape");
    if T > 1 {
        // SAFETY: the caller's promise.
        unsafe { out.prefetch(T, panel) };
    }
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; T];
    for block in 0..panels.blocks {
        // The tile has `T` rows of `panels.blocks` blocks, and the panel as many (above).
        let at = block * T * GROUPS * GROUP;
        // SAFETY: as above, here and below.
        let lines = unsafe { walk.quants.add(block * F::LINES * 64) };
        let dots = if !F::BYTES {
            // SAFETY: as above.
            unsafe { multiply_nibbles::<F, T>(lines, tile.quants.as_ptr().add(at)) }
        } else if T > 1 {
            // SAFETY: as above; of a tile of several rows, there are words.
            unsafe { multiply_words::<T>(lines, tile.words.as_ptr().add(at)) }
        } else {
            // SAFETY: as above.
            unsafe { multiply_bytes::<T>(lines, tile.quants.as_ptr().add(at)) }
        };
        let mut scales = [_mm256_setzero_ps(); VECTORS];
        let mut mins = [_mm256_setzero_ps(); VECTORS];
        for v in 0..VECTORS {
            let at = block * PANEL + v * HALF;
            // SAFETY: as above: eight halves.
            scales[v] = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(walk.scales.add(at).cast::<__m128i>()) });
            if F::AFFINE {
                // SAFETY: as above.
                mins[v] = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(walk.mins.add(at).cast::<__m128i>()) });
            }
        }
        for t in 0..T {
            // SAFETY: as above.
            let scale = _mm256_set1_ps(unsafe { *tile.scales.as_ptr().add(block * T + t) });
            // SAFETY: as above.
            let sum = unsafe { *tile.sums.as_ptr().add(block * T + t) };
            for v in 0..VECTORS {
                let dot = _mm256_cvtepi32_ps(dots[t][v]);
                let scaled = if F::ZERO != 0.0 {
                    _mm256_fmadd_ps(dot, scale, _mm256_set1_ps(F::ZERO * -sum))
                } else {
                    _mm256_mul_ps(dot, scale)
                };
                sums[t][v] = _mm256_fmadd_ps(scaled, scales[v], sums[t][v]);
                if F::AFFINE {
                    sums[t][v] = _mm256_fmadd_ps(mins[v], _mm256_set1_ps(sum), sums[t][v]);
                }
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        for (v, &sums) in sums.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { put(out, t, panel, v, sums) };
        }
    }
}

/// A block's products of nibbles, with a fifth bit or without, by rows of bytes.
///
/// # Safety
/// `lines` points at a block's lines of the form, `quants` at a block of `T` rows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn multiply_nibbles<F: Packing, const T: usize>(lines: *const u8, quants: *const i8) -> Sums<T> {
    let mut dots = [[_mm256_setzero_si256(); VECTORS]; T];
    // Half a block of 5-bit weights fits 16 bits, a whole one of 4-bit weights.
    let parts = if F::FIFTH_BIT { 2 } else { 1 };
    for part in 0..parts {
        let mut pairs = [[_mm256_setzero_si256(); VECTORS]; T];
        for line in part * GROUPS / 2 / parts..(part + 1) * GROUPS / 2 / parts {
            // SAFETY: the caller's promise.
            let at = unsafe { lines.add(line * 64) };
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(NIBBLES_AHEAD).cast());
            // SAFETY: as above.
            let weights = unsafe { load(at) };
            let mut low = weights.map(|weights| _mm256_and_si256(weights, _mm256_set1_epi8(15)));
            let mut high = weights.map(|w| _mm256_and_si256(_mm256_srli_epi16::<4>(w), _mm256_set1_epi8(15)));
            if F::FIFTH_BIT {
                // SAFETY: as above: the last line of the block.
                let fifth = unsafe { load(lines.add(GROUPS / 2 * 64)) };
                for v in 0..VECTORS {
                    low[v] = _mm256_or_si256(low[v], bit_four(_mm256_sll_epi16(fifth[v], shift(4 - line))));
                    high[v] = _mm256_or_si256(high[v], bit_four(_mm256_srl_epi16(fifth[v], shift(line))));
                }
            }
            for (group, weights) in [(line, low), (line + GROUPS / 2, high)] {
                for (t, pairs) in pairs.iter_mut().enumerate() {
                    // SAFETY: as above: four bytes.
                    let row = unsafe { spread(quants.add((group * T + t) * GROUP).cast()) };
                    for v in 0..VECTORS {
                        pairs[v] = in_turn(_mm256_add_epi16(pairs[v], _mm256_maddubs_epi16(weights[v], row)));
                    }
                }
            }
        }
        for (dots, pairs) in dots.iter_mut().zip(pairs) {
            for v in 0..VECTORS {
                let wide = _mm256_madd_epi16(pairs[v], _mm256_set1_epi16(1));
                dots[v] = if part == 0 { wide } else { _mm256_add_epi32(dots[v], wide) };
            }
        }
    }
    dots
}

/// A block's products of bytes, by rows of words.
///
/// # Safety
/// `lines` points at a block's lines of bytes, `words` at the words of a block of `T` rows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn multiply_words<const T: usize>(lines: *const u8, words: *const i16) -> Sums<T> {
    let mut dots = [[_mm256_setzero_si256(); VECTORS]; T];
    for group in 0..GROUPS {
        // SAFETY: the caller's promise.
        let at = unsafe { lines.add(group * 64) };
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(BYTES_AHEAD).cast());
        // SAFETY: as above.
        let weights = unsafe { load(at) };
        let even = weights.map(|weights| _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(weights)));
        let odd = weights.map(|weights| _mm256_srai_epi16::<8>(weights));
        for (t, dots) in dots.iter_mut().enumerate() {
            for (columns, weights) in [even, odd].into_iter().enumerate() {
                // SAFETY: as above: two words.
                let row = unsafe { spread(words.add((group * T + t) * GROUP + 2 * columns).cast()) };
                for v in 0..VECTORS {
                    dots[v] = in_turn(_mm256_add_epi32(dots[v], _mm256_madd_epi16(weights[v], row)));
                }
            }
        }
    }
    dots
}

/// A block's products of bytes, by rows of bytes.
///
/// # Safety
/// `lines` points at a block's lines of bytes, `quants` at a block of `T` rows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn multiply_bytes<const T: usize>(lines: *const u8, quants: *const i8) -> Sums<T> {
    let mut dots = [[_mm256_setzero_si256(); VECTORS]; T];
    for group in 0..GROUPS {
        // SAFETY: the caller's promise.
        let at = unsafe { lines.add(group * 64) };
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(BYTES_AHEAD).cast());
        // SAFETY: as above.
        let weights = unsafe { load(at) };
        let sizes = weights.map(|weights| _mm256_abs_epi8(weights));
        for (t, dots) in dots.iter_mut().enumerate() {
            // SAFETY: as above: four bytes.
            let row = unsafe { spread(quants.add((group * T + t) * GROUP).cast()) };
            for v in 0..VECTORS {
                let pairs = _mm256_maddubs_epi16(sizes[v], _mm256_sign_epi8(row, weights[v]));
                dots[v] = _mm256_add_epi32(dots[v], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
    }
    dots
}

/// Of the products of a block, `[row]`: a panel's.
type Sums<const T: usize> = [[__m256i; VECTORS]; T];

/// A line.
///
/// # Safety
/// `at` points at one, aligned as one.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(at: *const u8) -> [__m256i; VECTORS] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|v| unsafe { _mm256_load_si256(at.add(v * 32).cast::<__m256i>()) })
}

/// The 32 bits at `at`, which need not be aligned, in every lane.
///
/// # Safety
/// There are 32 bits.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn spread(at: *const i32) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { at.read_unaligned() })
}

/// The same value. The compiler computes it before the next that it is told of in this way: left alone, it works on all
/// groups of a block side by side, has no registers for that, and waits for its own stores.
#[inline]
#[target_feature(enable = "avx2")]
fn in_turn(mut value: __m256i) -> __m256i {
    // SAFETY: no instruction.
    unsafe { asm!("/* {0} */", inout(ymm_reg) value, options(nomem, nostack, preserves_flags)) };
    value
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
