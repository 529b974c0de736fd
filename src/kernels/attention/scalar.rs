//! What does a tile of attention compute? The plain form, which the SIMD form must equal bit for bit.

use super::{BLOCK_TOKENS, CHUNK_BLOCKS, CHUNK_TOKENS, Cache, Softmax, Tile};
use crate::kernels::elementwise::exp;

pub(super) fn attend(tile: &mut Tile, cache: &Cache<'_>) {
    let dim = tile.head_dim;
    let queries = tile.queries.chunks_exact(dim).zip(tile.sums.chunks_exact_mut(dim));
    for ((query, sums), &length) in queries.zip(&tile.lengths) {
        attend_one(query, length, cache, sums);
    }
}

fn attend_one(query: &[f32], length: usize, cache: &Cache<'_>, sums: &mut [f32]) {
    let mut softmax = Softmax::START;
    for chunk in 0..length.div_ceil(CHUNK_TOKENS) {
        let first = chunk * CHUNK_TOKENS;
        let seen = CHUNK_TOKENS.min(length - first);
        let mut scores = [0.0_f32; CHUNK_TOKENS];
        for (block, scores) in scores.chunks_exact_mut(BLOCK_TOKENS).enumerate().take(seen.div_ceil(BLOCK_TOKENS)) {
            for (keys, &q) in cache.keys(chunk * CHUNK_BLOCKS + block).iter().zip(query) {
                for (score, key) in scores.iter_mut().zip(keys) {
                    *score = key.to_f32().mul_add(q, *score);
                }
            }
        }
        let rescale = probabilities(&mut softmax, &mut scores, seen);
        for sum in sums.iter_mut() {
            *sum *= rescale;
        }
        for (token, &probability) in scores[..seen].iter().enumerate() {
            let values = cache.values(chunk * CHUNK_BLOCKS + token / BLOCK_TOKENS);
            for (sum, value) in sums.iter_mut().zip(&values[token % BLOCK_TOKENS * query.len()..]) {
                *sum = value.to_f32().mul_add(probability, *sum);
            }
        }
    }
    let scale = 1.0 / softmax.sum;
    for sum in sums {
        *sum *= scale;
    }
}

/// Turns the first `seen` scores into unnormalised probabilities, the rest into zeros, and takes them into the running
/// softmax. Returns by what all sums so far must be multiplied.
fn probabilities(softmax: &mut Softmax, scores: &mut [f32; CHUNK_TOKENS], seen: usize) -> f32 {
    let max = scores[..seen].iter().fold(softmax.max, |max, &score| max.max(score));
    let rescale = exp(softmax.max - max);
    // Eight running sums, as the lanes of a vector.
    let mut lanes = [0.0_f32; 8];
    for (index, score) in scores.iter_mut().enumerate() {
        *score = if index < seen { exp(*score - max) } else { 0.0 };
        lanes[index % 8] += *score;
    }
    let halves: [f32; 4] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 4]);
    let sum = (halves[0] + halves[2]) + (halves[1] + halves[3]);
    *softmax = Softmax { max, sum: softmax.sum * rescale + sum };
    rescale
}
