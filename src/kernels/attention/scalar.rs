//! What does attention compute? The plain form, which the SIMD forms must equal bit for bit.

use super::element::{Element, extent, scale_of};
use super::kernel::{Chunk, PlaneMut, Scales, Softmax, Tile};
use super::{BLOCK_TOKENS, CHUNK_BLOCKS, CHUNK_TOKENS};

/// Below this, `2^x` is as good as zero, and its result would leave the range of normal floats.
pub(super) const EXP2_LOWEST: f32 = -125.0;
/// Coefficients of `2^f` for f in -0.5..=0.5, highest power first; the last is exact, so that `2^0` is 1. Found by least
/// squares of the relative error, weighted until it was even: below 1.7e-7 when computed in f32.
pub(super) const EXP2: [f32; 6] =
    [1.330_026_6e-3, 9.669_709e-3, 5.550_56e-2, 2.402_228_2e-1, std::f32::consts::LN_2, 1.0];

/// `2^x` for x up to 0.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    let x = x.max(EXP2_LOWEST);
    let whole = x.round_ties_even();
    let fraction = x - whole;
    let power = EXP2[1..].iter().fold(EXP2[0], |power, &coefficient| power.mul_add(fraction, coefficient));
    // Adds `whole` to the exponent; the clamp keeps it in range.
    f32::from_bits(power.to_bits().wrapping_add_signed((whole as i32) << 23))
}

pub(super) fn attend<E: Element>(tile: &mut Tile<'_>, chunk: &Chunk<'_, E>) {
    let key_scales = scales::<E>(chunk.key_scales);
    let value_scales = scales::<E>(chunk.value_scales);
    let queries = tile.seen.len();
    for query in 0..queries {
        let seen = tile.seen[query].saturating_sub(chunk.first).min(CHUNK_TOKENS);
        if seen == 0 {
            continue;
        }
        let scores = &mut tile.scores[query].0;
        scores.fill(0.0);
        let blocks = scores.chunks_exact_mut(BLOCK_TOKENS).zip(key_scales.chunks_exact(BLOCK_TOKENS)).zip(chunk.keys);
        for ((scores, scales), keys) in blocks.take(seen.div_ceil(BLOCK_TOKENS)) {
            for (keys, &q) in keys.iter().zip(tile.queries[query..].iter().step_by(queries)) {
                for ((score, key), scale) in scores.iter_mut().zip(keys).zip(scales) {
                    *score = (key.widen() * scale).mul_add(q, *score);
                }
            }
        }
        let rescale = weights(&mut tile.maxima[query], &mut tile.sums[query], scores, seen);
        let values = &mut tile.values[query * chunk.head_dim..][..chunk.head_dim];
        for (d, sum) in values.iter_mut().enumerate() {
            let mut of_chunk = 0.0_f32;
            for (token, &weight) in scores[..seen].iter().enumerate() {
                let value = chunk.values[token / BLOCK_TOKENS][token % BLOCK_TOKENS * chunk.head_dim + d];
                of_chunk = (value.widen() * value_scales[token]).mul_add(weight, of_chunk);
            }
            *sum = sum.mul_add(rescale, of_chunk);
        }
    }
}

/// A factor for each token of a chunk: 1 where the numbers have no scales, which changes none of them.
fn scales<E: Element>(of_blocks: [&Scales; CHUNK_BLOCKS]) -> [f32; CHUNK_TOKENS] {
    let mut scales = [1.0; CHUNK_TOKENS];
    if E::SCALED {
        let places = scales.iter_mut().zip(of_blocks.into_iter().flatten());
        places.for_each(|(place, scale)| *place = scale.to_f32());
    }
    scales
}

/// Turns the first `seen` scores into weights, the rest into zeros, and takes them into the highest score and the sums.
/// Returns by what all weights before must be multiplied.
fn weights(max: &mut f32, sums: &mut [f32; BLOCK_TOKENS], scores: &mut [f32; CHUNK_TOKENS], seen: usize) -> f32 {
    let before = *max;
    *max = scores[..seen].iter().fold(before, |max, &score| max.max(score));
    let rescale = exp2(before - *max);
    let mut of_chunk = [0.0_f32; BLOCK_TOKENS];
    for (index, score) in scores.iter_mut().enumerate() {
        *score = if index < seen { exp2(*score - *max) } else { 0.0 };
        of_chunk[index % BLOCK_TOKENS] += *score;
    }
    for (sum, of_chunk) in sums.iter_mut().zip(of_chunk) {
        *sum = sum.mul_add(rescale, of_chunk);
    }
    rescale
}

/// The sum of a query's weights, from its parts.
pub(super) fn sum_of(mut parts: [f32; BLOCK_TOKENS]) -> f32 {
    for half in [8, 4, 2, 1] {
        for part in 0..half {
            parts[part] += parts[part + half];
        }
    }
    parts[0]
}

/// As `Kernel::fold`.
#[inline(always)]
pub(super) fn fold(total: &mut Softmax, total_values: &mut [f32], part: Softmax, part_values: &[f32]) {
    if part.sum == 0.0 {
        // None of the partition's tokens is for this query.
        return;
    }
    let max = total.max.max(part.max);
    let (before, added) = (exp2(total.max - max), exp2(part.max - max));
    *total = Softmax { max, sum: part.sum.mul_add(added, total.sum * before) };
    for (total, &part) in total_values.iter_mut().zip(part_values) {
        *total = part.mul_add(added, *total * before);
    }
}

/// As `Kernel::write`.
#[inline(always)]
pub(super) fn write<E: Element>(
    (key, value): (&[f32], &[f32]),
    slot: usize,
    keys: &mut PlaneMut<'_, E>,
    values: &mut PlaneMut<'_, E>,
) {
    let scale = put_scale::<E>(key, slot, keys);
    let places = keys.numbers[slot..].iter_mut().step_by(BLOCK_TOKENS);
    places.zip(key).for_each(|(place, &key)| *place = E::narrow(key / scale));
    let scale = put_scale::<E>(value, slot, values);
    let places = &mut values.numbers[slot * value.len()..][..value.len()];
    places.iter_mut().zip(value).for_each(|(place, &value)| *place = E::narrow(value / scale));
}

/// Chooses and writes a token's scale; 1 where there is none, which changes no number that it divides.
#[inline(always)]
pub(super) fn put_scale<E: Element>(numbers: &[f32], slot: usize, plane: &mut PlaneMut<'_, E>) -> f32 {
    if !E::SCALED {
        return 1.0;
    }
    let scale = scale_of(numbers.iter().fold(0.0, |highest, &number| extent(number).max(highest)));
    plane.scales[slot] = scale;
    scale.to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_right_to_the_last_bits_and_the_zeroth_is_one() {
        assert_eq!(exp2(0.0), 1.0);
        for step in 0..125_000_u32 {
            let x = -(step as f32) / 1000.0;
            let wanted = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) / wanted - 1.0).abs() < 1.7e-7, "2^{x} is {}", exp2(x));
        }
        assert!(exp2(f32::NEG_INFINITY) < 1e-37);
    }
}
