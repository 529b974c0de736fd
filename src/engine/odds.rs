//! How likely are the tokens of a row of logits, each beside the likeliest?
//!
//! A vocabulary is long and a draw looks at few of its tokens. So a row is read in chunks, and what is kept of a chunk (its
//! largest logit, its sum) tells which chunks to open at all.

use crate::kernels::isa::Isa;
use crate::kernels::softmax::{self, CHUNK, Curve, largest};
use crate::types::TokenId;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub token: TokenId,
    pub logit: f32,
    /// Of a curve: `Curve::weight`.
    pub weight: f32,
}

/// Tokens that are looked at side by side.
const LANES: usize = 16;

/// Likeliest first; equal ones by id, so that the order is the same on every machine.
pub(super) fn likelier(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// What is known of one row's chunks. Kept from row to row for its memory alone.
#[derive(Debug)]
pub(super) struct Odds {
    /// The bits of all sums are the same with all sets, so that the fastest needs no asking.
    isa: Isa,
    /// The largest logit of each chunk.
    maxima: Vec<f32>,
    /// The sum of each chunk's weights.
    masses: Vec<f32>,
    ranked: Vec<f32>,
}

impl Default for Odds {
    fn default() -> Self {
        Self { isa: Isa::best(), maxima: Vec::new(), masses: Vec::new(), ranked: Vec::new() }
    }
}

impl Odds {
    /// Reads a row; all other methods are about the row that was read last. Its largest logit; NaN never is.
    pub fn read(&mut self, row: &[f32]) -> f32 {
        self.maxima.resize(row.len().div_ceil(CHUNK), 0.0);
        softmax::maxima(self.isa, row, &mut self.maxima);
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
        self.masses.resize(row.len().div_ceil(CHUNK), 0.0);
        softmax::masses(self.isa, row, curve, &mut self.masses);
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

#[cfg(test)]
mod tests {
    use super::*;

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
