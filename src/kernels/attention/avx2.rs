//! How does AVX2 attend with a tile of queries?
//!
//! All queries of a tile share each key and value that is read and widened. The tokens of a block are the lanes for the
//! scores, the dimensions of a head are the lanes for the values, so that neither needs sums across lanes.

use std::arch::x86_64::{
    __m256, _mm_cvtss_f32, _mm_max_ps, _mm_max_ss, _mm_movehdup_ps, _mm_movehl_ps, _mm256_add_epi32, _mm256_add_ps,
    _mm256_castps_si256, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtps_epi32, _mm256_extractf128_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_mul_ps, _mm256_round_ps, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps,
};

use super::element::Element;
use super::kernel::{Chunk, PlaneMut, Scales, Scores, Softmax, Tile};
use super::scalar::{self, EXP2, EXP2_LOWEST};
use super::{BLOCK_TOKENS, CHUNK_BLOCKS, CHUNK_TOKENS};
use crate::kernels::prefetch::{self, Near};

/// Most queries of a tile: with two vectors of sums each, they fill the 16 registers.
pub(super) const TILE: usize = 6;
/// Rounds to the nearest, ties to even, without exceptions.
const NEAREST_EVEN: i32 = 0x08;
/// Places for a number of each query, in whole vectors.
pub(super) const ROOM: usize = 32;

/// As `scalar::attend`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend<E: Element>(tile: &mut Tile<'_>, chunk: &Chunk<'_, E>, ahead: &Chunk<'_, E>) {
    match tile.seen.len() {
        1 => attend_tile::<E, 1>(tile, chunk, ahead),
        2 => attend_tile::<E, 2>(tile, chunk, ahead),
        3 => attend_tile::<E, 3>(tile, chunk, ahead),
        4 => attend_tile::<E, 4>(tile, chunk, ahead),
        5 => attend_tile::<E, 5>(tile, chunk, ahead),
        TILE => attend_tile::<E, TILE>(tile, chunk, ahead),
        queries => unreachable!("a tile of {queries} queries"),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn attend_tile<E: Element, const Q: usize>(tile: &mut Tile<'_>, chunk: &Chunk<'_, E>, ahead: &Chunk<'_, E>) {
    let dim = chunk.head_dim;
    let tokens = CHUNK_TOKENS.min(tile.seen[Q - 1] - chunk.first);
    let blocks = tokens.div_ceil(BLOCK_TOKENS);
    let (queries, _) = tile.queries.as_chunks();
    let scores: &mut [Scores; Q] = tile.scores.try_into().expect("room for each query's scores");
    if Q == 1 && blocks == CHUNK_BLOCKS {
        // One query alone would wait for each of its sums.
        chunk_scores::<E, Q, CHUNK_BLOCKS>(queries, chunk.keys, chunk.key_scales, ahead.keys, 0, scores);
    } else {
        for block in 0..blocks {
            let (keys, scales) = ([chunk.keys[block]], [chunk.key_scales[block]]);
            chunk_scores::<E, Q, 1>(queries, keys, scales, [ahead.keys[block]], block, scores);
        }
    }
    let rescales = weigh(tile, chunk.first, blocks * BLOCK_TOKENS);
    let scores: &[Scores; Q] = (&*tile.scores).try_into().expect("weights of each query");
    let scales = value_scales(chunk);
    let weights = (scores, &scales);
    let mut d = 0;
    if Q <= 3 {
        while d + 32 <= dim {
            add_values::<E, Q, 4>(weights, &rescales, chunk, ahead, tokens, d, tile.values);
            d += 32;
        }
    }
    while d + 16 <= dim {
        add_values::<E, Q, 2>(weights, &rescales, chunk, ahead, tokens, d, tile.values);
        d += 16;
    }
    if d < dim {
        add_values::<E, Q, 1>(weights, &rescales, chunk, ahead, tokens, d, tile.values);
    }
}

/// Scores of all queries for the tokens of `B` blocks, of which `first` is the first.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn chunk_scores<E: Element, const Q: usize, const B: usize>(
    queries: &[[f32; Q]],
    keys: [&[[E; BLOCK_TOKENS]]; B],
    scales: [&Scales; B],
    ahead: [&[[E; BLOCK_TOKENS]]; B],
    first: usize,
    scores: &mut [Scores; Q],
) {
    assert!(keys.iter().all(|keys| keys.len() == queries.len()), "keys of another width");
    let mut factors = [[_mm256_setzero_ps(); 2]; B];
    if E::SCALED {
        for (factors, scales) in factors.iter_mut().zip(scales) {
            let (low, high) = scales.split_at(8);
            *factors = [widen(low), widen(high)];
        }
    }
    let mut sums = [[[_mm256_setzero_ps(); 2]; B]; Q];
    for (d, query) in queries.iter().enumerate() {
        for block in 0..B {
            prefetch(ahead[block], d);
            let (low, high) = keys[block][d].split_at(8);
            let mut keys = [widen(low), widen(high)];
            if E::SCALED {
                keys = [_mm256_mul_ps(keys[0], factors[block][0]), _mm256_mul_ps(keys[1], factors[block][1])];
            }
            for (sums, &q) in sums.iter_mut().zip(query) {
                let q = _mm256_set1_ps(q);
                sums[block][0] = _mm256_fmadd_ps(keys[0], q, sums[block][0]);
                sums[block][1] = _mm256_fmadd_ps(keys[1], q, sums[block][1]);
            }
        }
    }
    for (sums, Scores(scores)) in sums.iter().zip(scores) {
        for (block, sums) in sums.iter().enumerate() {
            let scores = &mut scores[(first + block) * BLOCK_TOKENS..][..BLOCK_TOKENS];
            store(sums[0], &mut scores[..8]);
            store(sums[1], &mut scores[8..]);
        }
    }
}

/// Turns the first `width` scores of each query, whole blocks, into weights, and takes them into the highest scores and the
/// sums. Returns by what all weights before must be multiplied.
#[target_feature(enable = "avx2,fma")]
fn weigh(tile: &mut Tile<'_>, first: usize, width: usize) -> [f32; ROOM] {
    let queries = tile.seen.len();
    let mut maxima = [f32::NEG_INFINITY; ROOM];
    let mut rescales = [f32::NEG_INFINITY; ROOM];
    rescales[..queries].copy_from_slice(tile.maxima);
    for (query, Scores(scores)) in tile.scores.iter_mut().enumerate() {
        let seen = tile.seen[query].saturating_sub(first);
        if seen < width {
            // What a query doesn't see must not count.
            scores[seen..width].fill(f32::NEG_INFINITY);
        }
        maxima[query] = highest(tile.maxima[query], &scores[..width]);
    }
    for (rescales, maxima) in rescales.chunks_exact_mut(8).zip(maxima.chunks_exact(8)).take(queries.div_ceil(8)) {
        store(exp2_lanes(_mm256_sub_ps(load(rescales), load(maxima))), rescales);
    }
    tile.maxima.copy_from_slice(&maxima[..queries]);
    for (query, Scores(scores)) in tile.scores.iter_mut().enumerate() {
        let seen = tile.seen[query].saturating_sub(first);
        weights(&mut scores[..width], seen, maxima[query], rescales[query], &mut tile.sums[query]);
    }
    rescales
}

/// The highest of some scores, whole vectors of them, and of one more.
#[inline]
#[target_feature(enable = "avx2")]
fn highest(max: f32, scores: &[f32]) -> f32 {
    let mut maxima = _mm256_set1_ps(max);
    for scores in scores.chunks_exact(8) {
        maxima = _mm256_max_ps(maxima, load(scores));
    }
    let halves = _mm_max_ps(_mm256_castps256_ps128(maxima), _mm256_extractf128_ps::<1>(maxima));
    let pairs = _mm_max_ps(halves, _mm_movehl_ps(halves, halves));
    _mm_cvtss_f32(_mm_max_ss(pairs, _mm_movehdup_ps(pairs)))
}

/// Turns the first `seen` of some whole blocks' scores into weights, the rest into zeros, and takes them into the sums.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn weights(scores: &mut [f32], seen: usize, max: f32, rescale: f32, sums: &mut [f32; BLOCK_TOKENS]) {
    for scores in scores.chunks_exact_mut(8) {
        store(exp2_lanes(_mm256_sub_ps(load(scores), _mm256_set1_ps(max))), scores);
    }
    if seen < scores.len() {
        scores[seen..].fill(0.0);
    }
    let mut of_chunk = [_mm256_setzero_ps(); 2];
    for scores in scores.chunks_exact(BLOCK_TOKENS) {
        let (low, high) = scores.split_at(8);
        of_chunk = [_mm256_add_ps(of_chunk[0], load(low)), _mm256_add_ps(of_chunk[1], load(high))];
    }
    for (sums, of_chunk) in sums.chunks_exact_mut(8).zip(of_chunk) {
        store(_mm256_fmadd_ps(load(sums), _mm256_set1_ps(rescale), of_chunk), sums);
    }
}

/// The factor of each token's values in a chunk; zeros that nobody reads where they have none.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn value_scales<E: Element>(chunk: &Chunk<'_, E>) -> [f32; CHUNK_TOKENS] {
    let mut factors = [0.0; CHUNK_TOKENS];
    if E::SCALED {
        let scales = chunk.value_scales.iter().flat_map(|scales| scales.chunks_exact(8));
        factors.chunks_exact_mut(8).zip(scales).for_each(|(factors, scales)| store(widen(scales), factors));
    }
    factors
}

/// Rescales dimensions `d..d + 8 * V` of all queries' sums and adds the tokens' values, weighted. `weights`: and each token's
/// scale.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_values<E: Element, const Q: usize, const V: usize>(
    (weights, scales): (&[Scores; Q], &[f32; CHUNK_TOKENS]),
    rescales: &[f32; ROOM],
    chunk: &Chunk<'_, E>,
    ahead: &Chunk<'_, E>,
    tokens: usize,
    d: usize,
    sums: &mut [f32],
) {
    let dim = chunk.head_dim;
    let mut places = sums.chunks_exact_mut(dim).map(|sums| parts_mut::<V, 8>(&mut sums[d..]));
    let places: [_; Q] = std::array::from_fn(|_| places.next().expect("sums of each query"));
    let mut lanes = [[_mm256_setzero_ps(); V]; Q];
    for (block, values) in chunk.values.iter().enumerate().take(tokens.div_ceil(BLOCK_TOKENS)) {
        for token in 0..BLOCK_TOKENS.min(tokens - block * BLOCK_TOKENS) {
            let (at, of_token) = (token * dim + d, block * BLOCK_TOKENS + token);
            assert!(of_token < CHUNK_TOKENS);
            prefetch(ahead.values[block], at);
            let values: &[[E; 8]; V] = parts(&values[at..]);
            let mut wide = values.map(|values| widen(&values));
            if E::SCALED {
                let scale = _mm256_set1_ps(scales[of_token]);
                wide = wide.map(|values| _mm256_mul_ps(values, scale));
            }
            // By index: the compiler unrolls that, and keeps all lanes in registers.
            for query in 0..Q {
                let weight = _mm256_set1_ps(weights[query].0[of_token]);
                for v in 0..V {
                    lanes[query][v] = _mm256_fmadd_ps(wide[v], weight, lanes[query][v]);
                }
            }
        }
    }
    for query in 0..Q {
        let rescale = _mm256_set1_ps(rescales[query]);
        for v in 0..V {
            let place = &mut places[query][v];
            store(_mm256_fmadd_ps(load(place), rescale, lanes[query][v]), place);
        }
    }
}

/// The first `V` times `N` of some values.
#[inline(always)]
pub(super) fn parts<T, const V: usize, const N: usize>(values: &[T]) -> &[[T; N]; V] {
    values.as_chunks().0.first_chunk().expect("the dimensions of a whole step")
}

#[inline(always)]
pub(super) fn parts_mut<const V: usize, const N: usize>(values: &mut [f32]) -> &mut [[f32; N]; V] {
    values.as_chunks_mut().0.first_chunk_mut().expect("the dimensions of a whole step")
}

/// The same code as `scalar::fold`; the compiler vectorises it for the features named here.
#[target_feature(enable = "avx2,fma")]
pub(super) fn fold(total: &mut Softmax, total_values: &mut [f32], part: Softmax, part_values: &[f32]) {
    scalar::fold(total, total_values, part, part_values);
}

/// As `scalar::write`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn write<E: Element>(
    (key, value): (&[f32], &[f32]),
    slot: usize,
    keys: &mut PlaneMut<'_, E>,
    values: &mut PlaneMut<'_, E>,
) {
    let scale = scalar::put_scale(key, slot, keys);
    let places = keys.numbers.as_chunks_mut::<BLOCK_TOKENS>().0;
    for (key, places) in key.as_chunks().0.iter().zip(places.chunks_exact_mut(8)) {
        places.iter_mut().zip(narrow::<E>(key, scale)).for_each(|(places, key)| places[slot] = key);
    }
    let scale = scalar::put_scale(value, slot, values);
    let places = values.numbers[slot * value.len()..].as_chunks_mut().0;
    for (value, place) in value.as_chunks().0.iter().zip(places) {
        *place = narrow::<E>(value, scale);
    }
}

/// Has the cache line of `values[at]` brought into the second cache, while another chunk is worked on.
#[inline]
pub(super) fn prefetch<T>(values: &[T], at: usize) {
    prefetch::prefetch(values.as_ptr().wrapping_add(at), Near::Second);
}

/// `scalar::exp2`, eight at a time, operation by operation.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp2_lanes(x: __m256) -> __m256 {
    let x = _mm256_max_ps(x, _mm256_set1_ps(EXP2_LOWEST));
    let whole = _mm256_round_ps::<NEAREST_EVEN>(x);
    let fraction = _mm256_sub_ps(x, whole);
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
#[target_feature(enable = "avx2,fma,f16c")]
fn widen<E: Element>(values: &[E]) -> __m256 {
    let values = values.try_into().expect("eight numbers");
    // SAFETY: this function has the instructions.
    unsafe { E::widen_eight(values) }
}

/// Eight numbers over their scale, as they are stored.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn narrow<E: Element>(values: &[f32; 8], scale: f32) -> [E; 8] {
    let values = if E::SCALED { values.map(|value| value / scale) } else { *values };
    // SAFETY: this function has the instructions.
    unsafe { E::narrow_eight(&values) }
}
