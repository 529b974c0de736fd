//! How do 256-bit vectors with VNNI multiply panels by a tile of rows?
//!
//! As `avx512`, with half a panel a vector. The same code for two encodings of `vpdpbusd`: AVX-VNNI's, on processors
//! without AVX-512, and that of AVX-512 VL, which no machine would choose, so that those with it can test this file.

/// Rows of a tile: with half a panel, sums and weights fill the 16 registers.
pub const TILE: usize = 6;

macro_rules! kernel {
    ($module:ident, $features:literal, $dot:ident, $doc:literal) => {
        #[doc = $doc]
        pub mod $module {
            use std::arch::x86_64::{
                __m128i, __m256i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_and_si256, _mm256_cvtepi32_ps,
                _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_load_si256, _mm256_mul_ps, _mm256_or_si256, _mm256_set1_epi8,
                _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_sll_epi16,
                _mm256_srl_epi16, _mm256_srli_epi16, _mm256_xor_si256, $dot,
            };
            use std::ops::Range;

            use super::super::super::activations::Tile;
            use super::super::super::{Out, PANEL};
            use super::super::avx2::{bit_four, put, shift};
            use super::super::{GROUP, GROUPS, Packing, Panels, with_packing};
            use super::TILE;

            /// How far ahead a single row reads weights from memory.
            const PREFETCH_BYTES: usize = 2048;
            /// Weights of a vector.
            const HALF: usize = PANEL / 2;

            /// As `Kernel` says.
            ///
            /// # Safety
            /// As `Kernel`.
            #[target_feature(enable = $features)]
            pub unsafe fn multiply(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
                with_packing!(panels.form, rows(panels, range, tile, out))
            }

            /// # Safety
            /// As `Kernel`.
            #[target_feature(enable = $features)]
            unsafe fn rows<F: Packing>(panels: &Panels, range: Range<usize>, tile: &Tile<'_>, out: &Out) {
                for panel in range {
                    for half in 0..2 {
                        match tile.rows {
                            // SAFETY: the caller's promise.
                            1 => unsafe { multiply_tile::<F, 1>(panels, panel, half, tile, out) },
                            // SAFETY: as above.
                            2 => unsafe { multiply_tile::<F, 2>(panels, panel, half, tile, out) },
                            // SAFETY: as above.
                            3 => unsafe { multiply_tile::<F, 3>(panels, panel, half, tile, out) },
                            // SAFETY: as above.
                            4 => unsafe { multiply_tile::<F, 4>(panels, panel, half, tile, out) },
                            // SAFETY: as above.
                            5 => unsafe { multiply_tile::<F, 5>(panels, panel, half, tile, out) },
                            // SAFETY: as above.
                            TILE => unsafe { multiply_tile::<F, TILE>(panels, panel, half, tile, out) },
                            rows => unreachable!("a tile of {rows} rows"),
                        }
                    }
                }
            }

            /// `T` rows by half a panel.
            ///
            /// # Safety
            /// As `Kernel`; the tile has `T` rows.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn multiply_tile<F: Packing, const T: usize>(
                panels: &Panels,
                panel: usize,
                half: usize,
                tile: &Tile<'_>,
                out: &Out,
            ) {
                let walk = panels.walk(panel);
                let counted = T * panels.blocks;
                assert!(
                    tile.quants.len() == counted * GROUPS * GROUP && tile.scales.len() == counted,
                    "a tile of another shape"
                );
                assert!(tile.sums.len() == counted && tile.counts.len() == counted, "a tile of another shape");
                if T > 1 && half == 0 {
                    // SAFETY: the caller's promise.
                    unsafe { out.prefetch(T, panel) };
                }
                let mut sums = [_mm256_setzero_ps(); T];
                for block in 0..panels.blocks {
                    // SAFETY: the tile has `T` rows of `panels.blocks` blocks, and the panel as many (above), here and
                    // below.
                    let quants = unsafe { tile.quants.as_ptr().add(block * T * GROUPS * GROUP) };
                    let mut dots = [_mm256_setzero_si256(); T];
                    if F::BYTES {
                        for (t, dot) in dots.iter_mut().enumerate() {
                            // SAFETY: as above.
                            let count = unsafe { *tile.counts.as_ptr().add(block * T + t) };
                            *dot = _mm256_set1_epi32(-128 * count);
                        }
                    }
                    let mut fifth = _mm256_setzero_si256();
                    if F::FIFTH_BIT {
                        // SAFETY: as above: the last line of the block.
                        let at = unsafe { walk.quants.add((block * F::LINES + GROUPS / 2) * 64 + half * 32) };
                        // SAFETY: half a line, aligned as one.
                        fifth = unsafe { _mm256_load_si256(at.cast::<__m256i>()) };
                    }
                    for line in 0..if F::BYTES { GROUPS } else { GROUPS / 2 } {
                        // SAFETY: as above.
                        let at = unsafe { walk.quants.add((block * F::LINES + line) * 64 + half * 32) };
                        if T == 1 {
                            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES).cast());
                        }
                        // SAFETY: half a line, aligned as one.
                        let weights = unsafe { _mm256_load_si256(at.cast::<__m256i>()) };
                        if F::BYTES {
                            let flipped = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
                            // SAFETY: as above.
                            unsafe { add_group::<T>(flipped, quants, line, &mut dots) };
                            continue;
                        }
                        let mut low = _mm256_and_si256(weights, _mm256_set1_epi8(15));
                        let mut high = _mm256_and_si256(_mm256_srli_epi16::<4>(weights), _mm256_set1_epi8(15));
                        if F::FIFTH_BIT {
                            low = _mm256_or_si256(low, bit_four(_mm256_sll_epi16(fifth, shift(4 - line))));
                            high = _mm256_or_si256(high, bit_four(_mm256_srl_epi16(fifth, shift(line))));
                        }
                        // SAFETY: as above.
                        unsafe { add_group::<T>(low, quants, line, &mut dots) };
                        // SAFETY: as above.
                        unsafe { add_group::<T>(high, quants, line + GROUPS / 2, &mut dots) };
                    }
                    let at = block * PANEL + half * HALF;
                    // SAFETY: as above: eight halves.
                    let scales = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(walk.scales.add(at).cast::<__m128i>()) });
                    // SAFETY: as above; without mins, the scales stand in.
                    let mins = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(walk.mins.add(at).cast::<__m128i>()) });
                    for (t, out) in sums.iter_mut().enumerate() {
                        // SAFETY: as above.
                        let scale = _mm256_set1_ps(unsafe { *tile.scales.as_ptr().add(block * T + t) });
                        // SAFETY: as above.
                        let sum = unsafe { *tile.sums.as_ptr().add(block * T + t) };
                        let dot = _mm256_cvtepi32_ps(dots[t]);
                        let scaled = if F::ZERO != 0.0 {
                            _mm256_fmadd_ps(dot, scale, _mm256_set1_ps(F::ZERO * -sum))
                        } else {
                            _mm256_mul_ps(dot, scale)
                        };
                        *out = _mm256_fmadd_ps(scaled, scales, *out);
                        if F::AFFINE {
                            *out = _mm256_fmadd_ps(mins, _mm256_set1_ps(sum), *out);
                        }
                    }
                }
                for (t, &sums) in sums.iter().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe { put(out, t, panel, half, sums) };
                }
            }

            /// Adds one group's products.
            ///
            /// # Safety
            /// `quants` points at a block of `T` rows.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn add_group<const T: usize>(
                weights: __m256i,
                quants: *const i8,
                group: usize,
                dots: &mut [__m256i; T],
            ) {
                for (t, dot) in dots.iter_mut().enumerate() {
                    // SAFETY: inside the block; four bytes that need not be aligned.
                    let row = unsafe { quants.add((group * T + t) * GROUP).cast::<i32>().read_unaligned() };
                    *dot = $dot(*dot, weights, _mm256_set1_epi32(row));
                }
            }
        }
    };
}

kernel!(avxvnni, "avx2,fma,f16c,avxvnni", _mm256_dpbusd_avx_epi32, "AVX-VNNI's encoding.");
#[cfg(test)]
kernel!(avx512vl, "avx2,fma,f16c,avx512f,avx512vl,avx512vnni", _mm256_dpbusd_epi32, "AVX-512's encoding.");
