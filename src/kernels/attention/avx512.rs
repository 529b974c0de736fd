//! How does AVX-512 attend with a tile of queries?
//!
//! As AVX2 does, with twice the lanes and twice the registers: the 16 tokens of a block are one vector, and up to 24
//! queries share a key or value that is widened, which then costs next to nothing.

use std::arch::x86_64::{
    __m512, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cvtps_epi32,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_max_ps, _mm512_roundscale_ps,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};

use super::avx2::{ROOM, add_values as add_eight_values, parts, parts_mut, prefetch, value_scales};
use super::element::Element;
use super::kernel::{Chunk, Scales, Scores, Tile};
use super::scalar::{EXP2, EXP2_LOWEST};
use super::{BLOCK_TOKENS, CHUNK_BLOCKS, CHUNK_TOKENS};

/// Rounds to the nearest, ties to even, without exceptions.
const NEAREST_EVEN: i32 = 0x08;

/// Bytes that one prefetch brings.
const LINE: usize = 64;

/// As `scalar::attend`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) fn attend<E: Element>(tile: &mut Tile<'_>, chunk: &Chunk<'_, E>, ahead: &Chunk<'_, E>) {
    macro_rules! by_queries {
        ($($queries:literal)*) => {
            match tile.seen.len() {
                $($queries if $queries <= E::TILE_512 => attend_tile::<E, $queries>(tile, chunk, ahead),)*
                queries => unreachable!("a tile of {queries} queries"),
            }
        };
    }
    by_queries!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn attend_tile<E: Element, const Q: usize>(tile: &mut Tile<'_>, chunk: &Chunk<'_, E>, ahead: &Chunk<'_, E>) {
    let dim = chunk.head_dim;
    let tokens = CHUNK_TOKENS.min(tile.seen[Q - 1] - chunk.first);
    let blocks = tokens.div_ceil(BLOCK_TOKENS);
    let (queries, _) = tile.queries.as_chunks();
    let scores: &mut [Scores; Q] = tile.scores.try_into().expect("room for each query's scores");
    if Q <= 6 && blocks == CHUNK_BLOCKS {
        // Few queries alone would wait for each of their sums.
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
    if Q <= 6 {
        while d + 64 <= dim {
            add_values::<E, Q, 4>(weights, &rescales, chunk, ahead, tokens, d, tile.values);
            d += 64;
        }
    }
    if Q <= 12 {
        while d + 32 <= dim {
            add_values::<E, Q, 2>(weights, &rescales, chunk, ahead, tokens, d, tile.values);
            d += 32;
        }
    }
    while d + 16 <= dim {
        add_values::<E, Q, 1>(weights, &rescales, chunk, ahead, tokens, d, tile.values);
        d += 16;
    }
    if d < dim {
        add_eight_values::<E, Q, 1>(weights, &rescales, chunk, ahead, tokens, d, tile.values);
    }
}

/// Scores of all queries for the tokens of `B` blocks, of which `first` is the first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn chunk_scores<E: Element, const Q: usize, const B: usize>(
    queries: &[[f32; Q]],
    keys: [&[[E; BLOCK_TOKENS]]; B],
    scales: [&Scales; B],
    ahead: [&[[E; BLOCK_TOKENS]]; B],
    first: usize,
    scores: &mut [Scores; Q],
) {
    assert!(keys.iter().all(|keys| keys.len() == queries.len()), "keys of another width");
    let factors = scales.map(|scales| if E::SCALED { widen(scales) } else { _mm512_setzero_ps() });
    let mut sums = [[_mm512_setzero_ps(); B]; Q];
    for (d, query) in queries.iter().enumerate() {
        for block in 0..B {
            prefetch(ahead[block], d);
            let mut keys = widen(&keys[block][d]);
            if E::SCALED {
                keys = _mm512_mul_ps(keys, factors[block]);
            }
            for (sums, &q) in sums.iter_mut().zip(query) {
                sums[block] = _mm512_fmadd_ps(keys, _mm512_set1_ps(q), sums[block]);
            }
        }
    }
    for (sums, Scores(scores)) in sums.iter().zip(scores) {
        for (block, &sums) in sums.iter().enumerate() {
            store(sums, &mut scores[(first + block) * BLOCK_TOKENS..][..BLOCK_TOKENS]);
        }
    }
}

/// As `avx2::weigh`.
#[target_feature(enable = "avx512f")]
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
    for (rescales, maxima) in rescales.chunks_exact_mut(16).zip(maxima.chunks_exact(16)).take(queries.div_ceil(16)) {
        store(exp2_lanes(_mm512_sub_ps(load(rescales), load(maxima))), rescales);
    }
    tile.maxima.copy_from_slice(&maxima[..queries]);
    for (query, Scores(scores)) in tile.scores.iter_mut().enumerate() {
        let seen = tile.seen[query].saturating_sub(first);
        weights(&mut scores[..width], seen, maxima[query], rescales[query], &mut tile.sums[query]);
    }
    rescales
}

/// The highest of some whole blocks' scores, and of one more.
#[inline]
#[target_feature(enable = "avx512f")]
fn highest(max: f32, scores: &[f32]) -> f32 {
    let mut maxima = _mm512_set1_ps(max);
    for scores in scores.chunks_exact(BLOCK_TOKENS) {
        maxima = _mm512_max_ps(maxima, load(scores));
    }
    _mm512_reduce_max_ps(maxima)
}

/// As `avx2::weights`.
#[inline]
#[target_feature(enable = "avx512f")]
fn weights(scores: &mut [f32], seen: usize, max: f32, rescale: f32, sums: &mut [f32; BLOCK_TOKENS]) {
    for scores in scores.chunks_exact_mut(BLOCK_TOKENS) {
        store(exp2_lanes(_mm512_sub_ps(load(scores), _mm512_set1_ps(max))), scores);
    }
    if seen < scores.len() {
        scores[seen..].fill(0.0);
    }
    let mut of_chunk = _mm512_setzero_ps();
    for scores in scores.chunks_exact(BLOCK_TOKENS) {
        of_chunk = _mm512_add_ps(of_chunk, load(scores));
    }
    store(_mm512_fmadd_ps(load(sums), _mm512_set1_ps(rescale), of_chunk), sums);
}

/// Rescales dimensions `d..d + 16 * V` of all queries' sums and adds the tokens' values, weighted. `weights`: and each
/// token's scale.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn add_values<E: Element, const Q: usize, const V: usize>(
    (weights, scales): (&[Scores; Q], &[f32; CHUNK_TOKENS]),
    rescales: &[f32; ROOM],
    chunk: &Chunk<'_, E>,
    ahead: &Chunk<'_, E>,
    tokens: usize,
    d: usize,
    sums: &mut [f32],
) {
    let dim = chunk.head_dim;
    let mut places = sums.chunks_exact_mut(dim).map(|sums| parts_mut::<V, 16>(&mut sums[d..]));
    let places: [_; Q] = std::array::from_fn(|_| places.next().expect("sums of each query"));
    let mut lanes = [[_mm512_setzero_ps(); V]; Q];
    for (block, values) in chunk.values.iter().enumerate().take(tokens.div_ceil(BLOCK_TOKENS)) {
        for token in 0..BLOCK_TOKENS.min(tokens - block * BLOCK_TOKENS) {
            let (at, of_token) = (token * dim + d, block * BLOCK_TOKENS + token);
            assert!(of_token < CHUNK_TOKENS);
            for line in (0..V * 16).step_by(LINE / size_of::<E>()) {
                prefetch(ahead.values[block], at + line);
            }
            let values: &[[E; 16]; V] = parts(&values[at..]);
            let mut wide = values.map(|values| widen(&values));
            if E::SCALED {
                let scale = _mm512_set1_ps(scales[of_token]);
                wide = wide.map(|values| _mm512_mul_ps(values, scale));
            }
            // By index: the compiler unrolls that, and keeps all lanes in registers.
            for query in 0..Q {
                let weight = _mm512_set1_ps(weights[query].0[of_token]);
                for v in 0..V {
                    lanes[query][v] = _mm512_fmadd_ps(wide[v], weight, lanes[query][v]);
                }
            }
        }
    }
    for query in 0..Q {
        let rescale = _mm512_set1_ps(rescales[query]);
        for v in 0..V {
            let place = &mut places[query][v];
            store(_mm512_fmadd_ps(load(place), rescale, lanes[query][v]), place);
        }
    }
}

/// `scalar::exp2`, sixteen at a time, operation by operation.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2_lanes(x: __m512) -> __m512 {
    let x = _mm512_max_ps(x, _mm512_set1_ps(EXP2_LOWEST));
    let whole = _mm512_roundscale_ps::<NEAREST_EVEN>(x);
    let fraction = _mm512_sub_ps(x, whole);
    let mut power = _mm512_set1_ps(EXP2[0]);
    for &coefficient in &EXP2[1..] {
        power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(coefficient));
    }
    let exponent = _mm512_slli_epi32::<23>(_mm512_cvtps_epi32(whole));
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(power), exponent))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32]) -> __m512 {
    assert!(values.len() == 16);
    // SAFETY: sixteen floats (above).
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(lanes: __m512, values: &mut [f32]) {
    assert!(values.len() == 16);
    // SAFETY: sixteen floats (above).
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), lanes) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn widen<E: Element>(values: &[E; 16]) -> __m512 {
    // SAFETY: this function has the instructions.
    unsafe { E::widen_sixteen(values) }
}
