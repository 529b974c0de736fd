//! How much does each logit of a vocabulary weigh, beside the largest?
//!
//! The sums of a softmax, chunk by chunk. Each is made in lanes that the compiler turns into vectors; additions and
//! multiplications only, none of them fused, in an order that the lanes fix: the same bits with all instruction sets.

use super::elementwise::ROUND;
use super::isa::vectorised;

/// Tokens of a chunk; the last may have fewer.
pub const CHUNK: usize = 128;
/// Floats that are worked on side by side: a few registers, so that one's latency hides another's.
const LANES: usize = 16;

/// How a weight falls with the distance from the largest logit: `e^((logit - top) / temperature)`.
#[derive(Clone, Copy, Debug)]
pub struct Curve {
    top: f32,
    /// Factors of two that a weight loses for each logit below the top.
    halvings: f32,
}

/// Weights this many halvings below the top are nothing: they would leave the range of normal floats.
const DEEPEST: f32 = 126.0;

impl Curve {
    pub fn new(top: f32, temperature: f32) -> Self {
        Self { top, halvings: std::f32::consts::LOG2_E / temperature }
    }

    /// In 0..=1, and 1 at the top; 0 for what is not a number. Within 4e-6 of the exponential, relatively, and the same
    /// bits on every machine: additions and multiplications only, none of them fused.
    #[inline(always)]
    pub fn weight(self, logit: f32) -> f32 {
        /// Of 2^f for f in -0.5..=0.5, highest power first; the largest relative error is the least that the degree allows.
        const POWERS: [f32; 5] = [9.582_853e-3, 5.590_642_6e-2, 2.402_41e-1, 6.931_242e-1, 1.0];
        let power = (logit - self.top) * self.halvings;
        let rounded = power + ROUND;
        let fraction = power - (rounded - ROUND);
        let weight = POWERS[1..].iter().fold(POWERS[0], |sum, coefficient| sum * fraction + coefficient);
        // The whole number stands in the lowest bits of `rounded`: it is added to the exponent.
        let weight = f32::from_bits(weight.to_bits().wrapping_add(rounded.to_bits() << 23));
        if power > -DEEPEST { weight } else { 0.0 }
    }

    /// How many halvings a logit is below the top.
    pub fn depth(self, logit: f32) -> f32 {
        (self.top - logit) * self.halvings
    }

    /// The logit whose weight is `2^-depth`; negative infinity when even a weight of nothing is above it.
    pub fn logit_at(self, depth: f32) -> f32 {
        if depth < DEEPEST { self.top - depth / self.halvings } else { f32::NEG_INFINITY }
    }
}

vectorised! {
    /// The largest logit of each chunk of a row; negative infinity if a chunk has none but NaN. `maxima`: `[chunks]`.
    pub fn maxima(row: &[f32], maxima: &mut [f32]) {
        for (max, chunk) in maxima.iter_mut().zip(row.chunks(CHUNK)) {
            *max = largest(chunk);
        }
    }
}

vectorised! {
    /// The sum of the weights of each chunk of a row. `masses`: `[chunks]`.
    pub fn masses(row: &[f32], curve: Curve, masses: &mut [f32]) {
        for (sum, chunk) in masses.iter_mut().zip(row.chunks(CHUNK)) {
            *sum = mass(chunk, curve);
        }
    }
}

/// The largest of some logits; negative infinity if there are none but NaN.
#[inline(always)]
pub fn largest(logits: &[f32]) -> f32 {
    let larger = |max: f32, logit: f32| if logit > max { logit } else { max };
    let (groups, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for group in groups {
        for (lane, logit) in lanes.iter_mut().zip(group) {
            *lane = larger(*lane, *logit);
        }
    }
    rest.iter().copied().fold(folded(lanes, larger), larger)
}

/// The sum of the weights of a chunk. Few are added to each lane, so that f32 is enough.
#[inline(always)]
fn mass(chunk: &[f32], curve: Curve) -> f32 {
    let (groups, rest) = chunk.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for group in groups {
        for (lane, logit) in lanes.iter_mut().zip(group) {
            *lane += curve.weight(*logit);
        }
    }
    let rest: f32 = rest.iter().map(|logit| curve.weight(*logit)).sum();
    folded(lanes, |a, b| a + b) + rest
}

/// All lanes in one, by halves: one after another, each would wait for the one before.
#[inline(always)]
fn folded(lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let half: [f32; LANES / 2] = std::array::from_fn(|lane| join(lanes[lane], lanes[lane + LANES / 2]));
    let quarter: [f32; LANES / 4] = std::array::from_fn(|lane| join(half[lane], half[lane + LANES / 4]));
    join(join(quarter[0], quarter[2]), join(quarter[1], quarter[3]))
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;

    #[test]
    fn a_weight_is_the_exponential_and_never_rises_above_the_tops() {
        let curve = Curve::new(3.0, 0.7);
        assert_eq!(curve.weight(3.0), 1.0);
        for step in 0..60_000 {
            let logit = 3.0 - step as f32 / 1000.0;
            let wanted = (f64::from(logit - 3.0) / f64::from(0.7_f32)).exp();
            // The argument's own rounding, scaled by its size, is part of the error.
            let tolerance = 4e-6 + 2e-7 * f64::from(3.0 - logit);
            assert!((f64::from(curve.weight(logit)) - wanted).abs() <= tolerance * wanted, "{logit}");
            assert!(curve.weight(logit) <= 1.0);
        }
        assert_eq!([f32::NAN, f32::NEG_INFINITY, -1e9].map(|logit| curve.weight(logit)), [0.0; 3]);
    }

    #[test]
    fn all_sets_give_the_bits_of_plain_rust() {
        let row: Vec<f32> = (0..1000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e6 - 8.0).collect();
        let curve = Curve::new(largest(&row), 0.8);
        let sums = |isa| {
            let mut sums = [[0.0; 1000_usize.div_ceil(CHUNK)]; 2];
            maxima(isa, &row, &mut sums[0]);
            masses(isa, &row, curve, &mut sums[1]);
            sums.map(|sums| sums.map(f32::to_bits))
        };
        for isa in Isa::available() {
            assert_eq!(sums(isa), sums(Isa::Scalar), "{isa}");
        }
        let [maxima, masses] = sums(Isa::Scalar).map(|sums| sums.map(f32::from_bits));
        for (chunk, (max, mass)) in row.chunks(CHUNK).zip(maxima.into_iter().zip(masses)) {
            assert_eq!(max, chunk.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let wanted: f64 = chunk.iter().map(|logit| f64::from(curve.weight(*logit))).sum();
            assert!((f64::from(mass) - wanted).abs() <= 1e-5 * wanted);
        }
    }
}
