//! How does AVX2 narrow and widen a head's keys or values, bit by bit as plain Rust does?
//!
//! Eight numbers at a time: heads are a multiple of that wide.

use std::arch::x86_64::{
    __m256, _CMP_LT_OQ, _CMP_ORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm_loadl_epi64, _mm_loadu_si128,
    _mm_packs_epi16, _mm_packs_epi32, _mm_storel_epi64, _mm_storeu_si128, _mm256_and_ps, _mm256_andnot_ps,
    _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtph_ps,
    _mm256_cvtps_epi32, _mm256_cvtps_ph, _mm256_div_ps, _mm256_extracti128_si256, _mm256_loadu_ps, _mm256_max_ps,
    _mm256_min_ps, _mm256_mul_ps, _mm256_round_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

use half::f16;

use super::super::attention::{BLOCK_TOKENS, HIGHEST, scale_of};

const LANES: usize = 8;

/// Keys, `[head_dim][16]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn narrow_keys(halves: &[f16], codes: &mut [i8], scales: &mut [f16]) {
    let mut highest = [_mm256_setzero_ps(); BLOCK_TOKENS / LANES];
    for row in halves.as_chunks::<LANES>().0.chunks_exact(highest.len()) {
        highest.iter_mut().zip(row).for_each(|(highest, halves)| *highest = higher(*highest, halves));
    }
    let mut divisors = [_mm256_setzero_ps(); BLOCK_TOKENS / LANES];
    for ((scales, highest), divisors) in scales.chunks_exact_mut(LANES).zip(highest).zip(&mut divisors) {
        let mut values = floats(highest);
        for (scale, value) in scales.iter_mut().zip(&mut values) {
            *scale = scale_of(*value);
            *value = scale.to_f32();
        }
        *divisors = lanes(&values);
    }
    let eights = halves.as_chunks::<LANES>().0.iter().zip(codes.as_chunks_mut::<LANES>().0);
    for ((halves, codes), divisor) in eights.zip(divisors.into_iter().cycle()) {
        *codes = codes_of(wide(halves), divisor);
    }
}

/// Values, `[16][head_dim]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn narrow_values(halves: &[f16], codes: &mut [i8], scales: &mut [f16]) {
    let head_dim = halves.len() / BLOCK_TOKENS;
    let tokens = halves.chunks_exact(head_dim).zip(codes.chunks_exact_mut(head_dim));
    for ((halves, codes), scale) in tokens.zip(scales) {
        let (halves, codes) = (halves.as_chunks::<LANES>().0, codes.as_chunks_mut::<LANES>().0);
        // Two side by side, since one maximum would wait for the other.
        let mut highest = [_mm256_setzero_ps(); 2];
        for pair in halves.chunks(highest.len()) {
            highest.iter_mut().zip(pair).for_each(|(highest, halves)| *highest = higher(*highest, halves));
        }
        let highest = floats(_mm256_max_ps(highest[0], highest[1]));
        *scale = scale_of(highest.into_iter().fold(0.0, f32::max));
        let divisor = _mm256_set1_ps(scale.to_f32());
        for (halves, codes) in halves.iter().zip(codes) {
            *codes = codes_of(wide(halves), divisor);
        }
    }
}

/// Keys, `[head_dim][16]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_keys(codes: &[i8], scales: &[f16], halves: &mut [f16]) {
    let mut factors = [_mm256_setzero_ps(); BLOCK_TOKENS / LANES];
    factors.iter_mut().zip(scales.as_chunks::<LANES>().0).for_each(|(factors, scales)| *factors = wide(scales));
    let eights = codes.as_chunks::<LANES>().0.iter().zip(halves.as_chunks_mut::<LANES>().0);
    for ((codes, halves), factors) in eights.zip(factors.into_iter().cycle()) {
        *halves = halves_of(codes, factors);
    }
}

/// Values, `[16][head_dim]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_values(codes: &[i8], scales: &[f16], halves: &mut [f16]) {
    let head_dim = halves.len() / BLOCK_TOKENS;
    let tokens = halves.chunks_exact_mut(head_dim).zip(codes.chunks_exact(head_dim));
    for ((halves, codes), scale) in tokens.zip(scales) {
        let factor = _mm256_set1_ps(scale.to_f32());
        for (codes, halves) in codes.as_chunks::<LANES>().0.iter().zip(halves.as_chunks_mut::<LANES>().0) {
            *halves = halves_of(codes, factor);
        }
    }
}

/// The higher ones of what was highest and what these count for.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn higher(highest: __m256, halves: &[f16; LANES]) -> __m256 {
    let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), wide(halves));
    // Neither what is infinite nor what is no number.
    let counts = _mm256_cmp_ps::<_CMP_LT_OQ>(magnitude, _mm256_set1_ps(f32::INFINITY));
    _mm256_max_ps(highest, _mm256_and_ps(magnitude, counts))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn codes_of(numbers: __m256, divisors: __m256) -> [i8; LANES] {
    let numbers = _mm256_div_ps(numbers, divisors);
    let numbers = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(numbers);
    let is_number = _mm256_cmp_ps::<_CMP_ORD_Q>(numbers, numbers);
    let clamped = _mm256_min_ps(_mm256_set1_ps(HIGHEST), _mm256_max_ps(_mm256_set1_ps(-HIGHEST), numbers));
    let whole = _mm256_cvtps_epi32(_mm256_and_ps(clamped, is_number));
    let halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256::<1>(whole));
    let mut codes = [0; LANES];
    // SAFETY: eight bytes.
    unsafe { _mm_storel_epi64(codes.as_mut_ptr().cast(), _mm_packs_epi16(halves, halves)) };
    codes
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves_of(codes: &[i8; LANES], factors: __m256) -> [f16; LANES] {
    // SAFETY: eight bytes.
    let codes = unsafe { _mm_loadl_epi64(codes.as_ptr().cast()) };
    let numbers = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), factors);
    let (lowest, highest) = (_mm256_set1_ps(f16::MIN.to_f32()), _mm256_set1_ps(f16::MAX.to_f32()));
    // In this order of operands, what is no number stays so.
    let clamped = _mm256_min_ps(highest, _mm256_max_ps(lowest, numbers));
    let mut halves = [f16::ZERO; LANES];
    // SAFETY: eight halves, of 16 bytes.
    unsafe {
        _mm_storeu_si128(halves.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(clamped));
    }
    halves
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn wide(halves: &[f16; LANES]) -> __m256 {
    // SAFETY: eight halves, of 16 bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(halves.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn lanes(floats: &[f32; LANES]) -> __m256 {
    // SAFETY: eight floats.
    unsafe { _mm256_loadu_ps(floats.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn floats(lanes: __m256) -> [f32; LANES] {
    let mut floats = [0.0; LANES];
    // SAFETY: eight floats.
    unsafe { _mm256_storeu_ps(floats.as_mut_ptr(), lanes) };
    floats
}
