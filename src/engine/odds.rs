//! How likely are the tokens of a row of logits, each beside the likeliest?
//!
//! A vocabulary is long and a draw looks at few of its tokens. So a row is read in chunks, in lanes that a compiler turns
//! into vector registers, and what is kept of a chunk (its largest logit, its sum) tells which chunks to open at all.

use crate::types::TokenId;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub token: TokenId,
    pub logit: f32,
    /// Of a curve: `Curve::weight`.
    pub weight: f32,
}

/// Tokens of a chunk.
const CHUNK: usize = 128;
/// Floats that are worked on side by side: a few registers, so that one's latency hides another's.
const LANES: usize = 16;

/// Likeliest first; equal ones by id, so that the order is the same on every machine.
pub(super) fn likelier(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// How a weight falls with the distance from the largest logit: `e^((logit - top) / temperature)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Curve {
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
        /// Adding it to a small float leaves no room for a fraction, so the sum is rounded to a whole number.
        const ROUND: f32 = 12_582_912.0;
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

/// What is known of one row's chunks. Kept from row to row for its memory alone.
#[derive(Debug, Default)]
pub(super) struct Odds {
    /// The largest logit of each chunk.
    maxima: Vec<f32>,
    /// The sum of each chunk's weights.
    masses: Vec<f32>,
    ranked: Vec<f32>,
}

impl Odds {
    /// Reads a row; all other methods are about the row that was read last. Its largest logit; NaN never is.
    pub fn read(&mut self, row: &[f32]) -> f32 {
        self.maxima.clear();
        self.maxima.extend(row.chunks(CHUNK).map(largest));
        largest(&self.maxima)
    }

    /// The first token with the largest logit; token 0 if no logit is a number above negative infinity.
    pub fn likeliest(&self, row: &[f32]) -> TokenId {
        let top = largest(&self.maxima);
        let chunk = self.maxima.iter().position(|max| *max == top).unwrap_or(0);
        let first = (0u32..).zip(row).skip(chunk * CHUNK).find(|(_, logit)| **logit == top);
        TokenId(first.map_or(0, |(id, _)| id))
    }

    /// Weighs all tokens and returns the sum.
    pub fn weigh(&mut self, row: &[f32], curve: Curve) -> f64 {
        self.masses.clear();
        self.masses.extend(row.chunks(CHUNK).map(|chunk| mass(chunk, curve)));
        self.masses.iter().copied().map(f64::from).sum()
    }

    /// The token at `point` of the line on which all tokens lie by id, each as long as its weight.
    pub fn token_at(&self, row: &[f32], curve: Curve, point: f64) -> Option<TokenId> {
        let mut left = point;
        let mut found = None;
        for (chunk, mass) in self.masses.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
            found = Some((chunk * CHUNK, left));
            left -= f64::from(*mass);
            if left < 0.0 {
                break;
            }
        }
        let (first, left) = found?;
        at((0..).map(TokenId).zip(row).skip(first).take(CHUNK).map(|(id, logit)| (id, curve.weight(*logit))), left)
    }

    /// All tokens with at least this logit, by id.
    pub fn at_least(&self, row: &[f32], curve: Curve, floor: f32, found: &mut Vec<Candidate>) {
        found.clear();
        let mut keep = |first: usize, logits: &[f32]| {
            // Written for each token and kept for few: a branch for each would often be guessed wrong.
            let mut some = [(0, 0.0); LANES];
            let mut count = 0;
            for (token, logit) in (first as u32..).zip(logits) {
                some[count % LANES] = (token, *logit);
                count += usize::from(*logit >= floor);
            }
            found.extend(some[..count].iter().map(|&(token, logit)| Candidate {
                token: TokenId(token),
                logit,
                weight: curve.weight(logit),
            }));
        };
        for ((first, chunk), max) in (0..).step_by(CHUNK).zip(row.chunks(CHUNK)).zip(&self.maxima) {
            if *max < floor {
                continue;
            }
            let (groups, rest) = chunk.as_chunks::<LANES>();
            for (first, group) in (first..).step_by(LANES).zip(groups) {
                if group.iter().fold(false, |any, logit| any | (*logit >= floor)) {
                    keep(first, group);
                }
            }
            keep(first + groups.len() * LANES, rest);
        }
    }

    /// A logit that at least `count` tokens reach, and not many more: those of the chunks' largest.
    pub fn reached_by(&mut self, count: usize) -> f32 {
        if count > self.maxima.len() {
            return f32::NEG_INFINITY;
        }
        self.ranked.clone_from(&self.maxima);
        *self.ranked.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
    }
}

/// The token at `point` of a line of tokens, each as long as its weight. Rounding may leave a point past the end: then it is
/// the last token that has any length.
pub(super) fn at(line: impl Iterator<Item = (TokenId, f32)>, mut point: f64) -> Option<TokenId> {
    let mut last = None;
    for (token, weight) in line.filter(|(_, weight)| *weight > 0.0) {
        last = Some(token);
        point -= f64::from(weight);
        if point < 0.0 {
            break;
        }
    }
    last
}

/// The largest of some logits; negative infinity if there are none but NaN.
fn largest(logits: &[f32]) -> f32 {
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
    fn the_likeliest_is_the_first_of_the_largest_wherever_it_is() {
        for width in [1, 5, 16, 17, 100, 300] {
            for place in 0..width {
                let mut logits = vec![-1.0; width];
                logits[place] = 2.0;
                logits[width - 1] = 2.0;
                let mut odds = Odds::default();
                assert_eq!(odds.read(&logits), 2.0);
                assert_eq!(odds.likeliest(&logits), TokenId(place as u32), "{place} of {width}");
            }
        }
    }

    #[test]
    fn a_floor_finds_every_token_at_or_above_it() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32).collect();
        let mut odds = Odds::default();
        let curve = Curve::new(odds.read(&logits), 1.0);
        let mut found = Vec::new();
        for count in 1..9 {
            let floor = odds.reached_by(count);
            odds.at_least(&logits, curve, floor, &mut found);
            assert!(found.len() >= count);
            let wanted: Vec<_> = (0..1000).filter(|i| logits[*i as usize] >= floor).collect();
            assert_eq!(found.iter().map(|candidate| candidate.token.0).collect::<Vec<_>>(), wanted);
        }
        assert_eq!(odds.reached_by(9), f32::NEG_INFINITY, "more than there are chunks");
    }
}
