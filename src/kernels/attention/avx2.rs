//! How does AVX2 attend with a tile of queries?
//!
//! All queries of a tile share each key and value that is read and widened. The tokens of a block are the lanes for the
//! scores, the dimensions of a head are the lanes for the values, so that neither needs sums across lanes.

use std::arch::x86_64::{
    __m128i, __m256, _mm_loadu_si128, _mm256_add_epi32, _mm256_add_ps, _mm256_castps_si256, _mm256_castsi256_ps,
    _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps,
    _mm256_round_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps,
};

use half::f16;

use super::{BLOCK_TOKENS, CHUNK_BLOCKS, CHUNK_TOKENS, Cache, Softmax, TILE, Tile};
use crate::kernels::elementwise::{EXP_HIGHEST, EXP_LOWEST, EXP2, exp};

/// As `scalar::attend`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend(tile: &mut Tile, cache: &Cache<'_>) {
    match tile.queries.len() / tile.head_dim {
        1 => attend_tile::<1>(tile, cache),
        2 => attend_tile::<2>(tile, cache),
        3 => attend_tile::<3>(tile, cache),
        4 => attend_tile::<4>(tile, cache),
        5 => attend_tile::<5>(tile, cache),
        TILE => attend_tile::<TILE>(tile, cache),
        queries => unreachable!("a tile of {queries} queries"),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn attend_tile<const Q: usize>(tile: &mut Tile, cache: &Cache<'_>) {
    let dim = tile.head_dim;
    let mut softmax = [Softmax::START; Q];
    let longest = tile.lengths[Q - 1];
    let mut scores = [[0.0_f32; CHUNK_TOKENS]; Q];
    for chunk in 0..longest.div_ceil(CHUNK_TOKENS) {
        let first = chunk * CHUNK_TOKENS;
        let tokens = CHUNK_TOKENS.min(longest - first);
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        for block in 0..blocks {
            block_scores(&tile.queries, dim, cache.keys(chunk * CHUNK_BLOCKS + block), block, &mut scores);
        }
        for (query, scores) in scores.iter_mut().enumerate() {
            let seen = tile.lengths[query].saturating_sub(first).min(CHUNK_TOKENS);
            let rescale = probabilities(&mut softmax[query], scores, seen, blocks * BLOCK_TOKENS);
            if rescale != 1.0 {
                for sum in &mut tile.sums[query * dim..][..dim] {
                    *sum *= rescale;
                }
            }
        }
        let values: [&[f16]; CHUNK_BLOCKS] =
            std::array::from_fn(|block| if block < blocks { cache.values(chunk * CHUNK_BLOCKS + block) } else { &[] });
        let mut d = 0;
        while d + 16 <= dim {
            add_values::<Q, 2>(&scores, &values, tokens, dim, d, &mut tile.sums);
            d += 16;
        }
        if d < dim {
            add_values::<Q, 1>(&scores, &values, tokens, dim, d, &mut tile.sums);
        }
    }
    for (softmax, sums) in softmax.iter().zip(tile.sums.chunks_exact_mut(dim)) {
        let scale = 1.0 / softmax.sum;
        for sum in sums {
            *sum *= scale;
        }
    }
}

/// Scores of all queries for the 16 tokens of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn block_scores<const Q: usize>(
    queries: &[f32],
    dim: usize,
    keys: &[[f16; BLOCK_TOKENS]],
    block: usize,
    scores: &mut [[f32; CHUNK_TOKENS]; Q],
) {
    assert!(queries.len() == Q * dim && keys.len() == dim, "a tile of another shape");
    let mut sums = [[_mm256_setzero_ps(); 2]; Q];
    for (d, keys) in keys.iter().enumerate() {
        let (low, high) = keys.split_at(8);
        let keys = [widen(low), widen(high)];
        for (query, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `query < Q` and `d < dim`, and the slice is `Q * dim` long.
            let q = _mm256_set1_ps(*unsafe { queries.get_unchecked(query * dim + d) });
            sums[0] = _mm256_fmadd_ps(keys[0], q, sums[0]);
            sums[1] = _mm256_fmadd_ps(keys[1], q, sums[1]);
        }
    }
    for (sums, scores) in sums.iter().zip(scores) {
        let scores = &mut scores[block * BLOCK_TOKENS..][..BLOCK_TOKENS];
        store(sums[0], &mut scores[..8]);
        store(sums[1], &mut scores[8..]);
    }
}

/// As `scalar::probabilities`, for the first `width` scores, a multiple of 8; those behind are not looked at.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn probabilities(softmax: &mut Softmax, scores: &mut [f32; CHUNK_TOKENS], seen: usize, width: usize) -> f32 {
    if seen == 0 {
        // A later row of the tile has opened this chunk; for this one it holds nothing.
        scores[..width].fill(0.0);
        return 1.0;
    }
    scores[seen..width].fill(f32::NEG_INFINITY);
    let mut maxima = _mm256_set1_ps(softmax.max);
    for scores in scores[..width].chunks_exact(8) {
        maxima = _mm256_max_ps(maxima, load(scores));
    }
    let max = lanes(maxima).into_iter().fold(f32::NEG_INFINITY, f32::max);
    let rescale = exp(softmax.max - max);
    for scores in scores[..width].chunks_exact_mut(8) {
        store(exp_lanes(_mm256_sub_ps(load(scores), _mm256_set1_ps(max))), scores);
    }
    scores[seen..width].fill(0.0);
    let mut sums = _mm256_setzero_ps();
    for scores in scores[..width].chunks_exact(8) {
        sums = _mm256_add_ps(sums, load(scores));
    }
    let lanes = lanes(sums);
    let halves = [lanes[0] + lanes[4], lanes[1] + lanes[5], lanes[2] + lanes[6], lanes[3] + lanes[7]];
    let sum = (halves[0] + halves[2]) + (halves[1] + halves[3]);
    *softmax = Softmax { max, sum: softmax.sum * rescale + sum };
    rescale
}

/// Adds the tokens' values, weighted, to dimensions `d..d + 8 * V` of all queries' sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_values<const Q: usize, const V: usize>(
    probabilities: &[[f32; CHUNK_TOKENS]; Q],
    values: &[&[f16]; CHUNK_BLOCKS],
    tokens: usize,
    dim: usize,
    d: usize,
    sums: &mut [f32],
) {
    let mut lanes = [[_mm256_setzero_ps(); V]; Q];
    for (query, lanes) in lanes.iter_mut().enumerate() {
        for (v, lane) in lanes.iter_mut().enumerate() {
            *lane = load(&sums[query * dim + d + v * 8..][..8]);
        }
    }
    for (block, values) in values.iter().enumerate().take(tokens.div_ceil(BLOCK_TOKENS)) {
        for token in 0..BLOCK_TOKENS.min(tokens - block * BLOCK_TOKENS) {
            let values = &values[token * dim + d..][..8 * V];
            let mut wide = [_mm256_setzero_ps(); V];
            for (wide, values) in wide.iter_mut().zip(values.chunks_exact(8)) {
                *wide = widen(values);
            }
            for (lanes, probabilities) in lanes.iter_mut().zip(probabilities) {
                let probability = _mm256_set1_ps(probabilities[block * BLOCK_TOKENS + token]);
                for (lane, &wide) in lanes.iter_mut().zip(&wide) {
                    *lane = _mm256_fmadd_ps(wide, probability, *lane);
                }
            }
        }
    }
    for (query, lanes) in lanes.iter().enumerate() {
        for (v, &lane) in lanes.iter().enumerate() {
            store(lane, &mut sums[query * dim + d + v * 8..][..8]);
        }
    }
}

/// `elementwise::exp`, eight at a time, operation by operation.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp_lanes(x: __m256) -> __m256 {
    const NEAREST_EVEN: i32 = 0x08;
    let x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(EXP_LOWEST)), _mm256_set1_ps(EXP_HIGHEST));
    let scaled = _mm256_mul_ps(x, _mm256_set1_ps(std::f32::consts::LOG2_E));
    let whole = _mm256_round_ps::<NEAREST_EVEN>(scaled);
    let fraction = _mm256_sub_ps(scaled, whole);
    let mut power = _mm256_set1_ps(EXP2[0]);
    for &coefficient in &EXP2[1..] {
        power = _mm256_fmadd_ps(power, fraction, _mm256_set1_ps(coefficient));
    }
    let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(whole));
    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(values: &[f32]) -> __m256 {
    assert!(values.len() == 8);
    // SAFETY: eight floats (above).
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(lanes: __m256, values: &mut [f32]) {
    assert!(values.len() == 8);
    // SAFETY: eight floats (above).
    unsafe { _mm256_storeu_ps(values.as_mut_ptr(), lanes) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn lanes(vector: __m256) -> [f32; 8] {
    let mut lanes = [0.0; 8];
    store(vector, &mut lanes);
    lanes
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen(values: &[f16]) -> __m256 {
    assert!(values.len() == 8);
    // SAFETY: eight halves (above), of 16 bytes.
    let halves: __m128i = unsafe { _mm_loadu_si128(values.as_ptr().cast()) };
    _mm256_cvtph_ps(halves)
}
