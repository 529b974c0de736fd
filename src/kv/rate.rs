//! How fast does something go, as far as was seen?

use crate::types::TokenCount;

/// No memory gives more bytes a second.
const MOST_PER_S: f64 = 1e12;

/// A moving average of a rate, in units a second: what was moved of late, over the time that it took. So what was large
/// counts for more than what was small, of which most is the way there and back.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    amount: f64,
    us: f64,
}

impl Rate {
    /// What was seen before weighs this part of what it did, each time that more is seen.
    const FADES: f64 = 0.8;

    /// Takes in that `amount` units took `took_us`.
    pub fn add(&mut self, amount: u64, took_us: u64) {
        self.amount = self.amount * Self::FADES + amount as f64;
        self.us = self.us * Self::FADES + took_us.max(1) as f64;
    }

    /// Takes it for a little faster than was seen: what is not tried any more would else stay slow for ever.
    pub fn hope(&mut self) {
        self.amount = (self.amount * 1.1).min(self.us * MOST_PER_S / 1e6);
    }

    /// Units a second; 0 before the first observation.
    pub fn per_s(self) -> u64 {
        if self.us > 0.0 { (self.amount * 1e6 / self.us) as u64 } else { 0 }
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    pub reload_bytes_per_s: Rate,
    pub load_bytes_per_s: Rate,
}

/// How fast tokens are encoded: slower, the more tokens there are before them, since each attends to all of those.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Of a sequence's first tokens; 0: not known yet.
    pub first_per_s: u64,
    /// Where a token takes twice as long as the first; `None`: as far as was seen, nowhere.
    pub doubles_at: Option<TokenCount>,
}

impl Encoding {
    /// Microseconds that the tokens between two positions take. `None`: not known yet.
    pub fn time_us(self, from: TokenCount, to: TokenCount) -> Option<u64> {
        let (from, to) = (u64::from(from.0), u64::from(to.0.max(from.0)));
        let first_us = ((to - from) * 1_000_000).checked_div(self.first_per_s)?;
        let twice_us = |at: TokenCount| (first_us * (from + to)).checked_div(2 * u64::from(at.0)).unwrap_or(0);
        Some(first_us + self.doubles_at.map_or(0, twice_us))
    }

    /// Tokens a second of so many from the first on; 0: not known yet.
    pub fn per_s(self, tokens: TokenCount) -> u64 {
        let time_us = self.time_us(TokenCount(0), tokens).filter(|time_us| *time_us > 0);
        time_us.map_or(self.first_per_s, |time_us| u64::from(tokens.0) * 1_000_000 / time_us)
    }
}

/// What was seen of encoding.
#[derive(Clone, Copy, Debug, Default)]
pub struct EncodingRate {
    /// Tells how fast it goes: the machine may have other work for a while.
    lately: Seen,
    /// Tells how much slower it gets with the position: for that, many positions must have been seen.
    long: Seen,
}

impl EncodingRate {
    /// Tokens that are remembered.
    const LATELY: f64 = 2_048.0;
    const LONG: f64 = 65_536.0;
    /// Positions that lie closer together than this say nothing of what a position costs.
    const APART: f64 = 128.0;

    /// Takes in that a step's tokens took so long; `middle`: their mean position.
    pub fn add(&mut self, tokens: u64, middle: f64, took_us: u64) {
        self.lately.add(Self::LATELY, tokens as f64, middle, took_us as f64);
        self.long.add(Self::LONG, tokens as f64, middle, took_us as f64);
    }

    pub fn encoding(self) -> Encoding {
        let doubles_at = self.long.doubles_at(Self::APART);
        let Seen { tokens, positions, us, .. } = self.lately;
        if us <= 0.0 {
            return Encoding::default();
        }
        let first_per_s = 1e6 * (tokens + doubles_at.map_or(0.0, |at| positions / at)) / us;
        Encoding { first_per_s: first_per_s as u64, doubles_at: doubles_at.map(|at| TokenCount(at as u32)) }
    }

    /// Tokens a second, at the positions where they were; 0 before the first.
    pub fn per_s(self) -> u64 {
        if self.lately.us > 0.0 { (1e6 * self.lately.tokens / self.lately.us) as u64 } else { 0 }
    }
}

/// Sums over tokens, the older ones fading.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    tokens: f64,
    positions: f64,
    squares: f64,
    us: f64,
    us_at_positions: f64,
}

impl Seen {
    fn add(&mut self, remembered: f64, tokens: f64, middle: f64, us: f64) {
        let fades = remembered / (remembered + tokens);
        let add = |sum: &mut f64, new: f64| *sum = *sum * fades + new;
        add(&mut self.tokens, tokens);
        add(&mut self.positions, tokens * middle);
        add(&mut self.squares, tokens * middle * middle);
        add(&mut self.us, us);
        add(&mut self.us_at_positions, us * middle);
    }

    /// Where the straight line through the times of tokens, by their positions, reaches twice its beginning.
    fn doubles_at(&self, apart: f64) -> Option<f64> {
        let Self { tokens, positions, squares, us, us_at_positions } = *self;
        let (middle, mean_us) = (positions / tokens, us / tokens);
        let spread = squares / tokens - middle * middle;
        let slope = (us_at_positions / tokens - middle * mean_us) / spread;
        let first_us = mean_us - slope * middle;
        // A line that falls, or begins below nothing, is chance.
        (spread > apart * apart && slope > 0.0 && first_us > 0.0).then(|| (first_us / slope).clamp(1.0, 1e9))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_transfer_tells_more_of_a_rate_than_small_ones() {
        let mut rate = Rate::default();
        assert_eq!(rate.per_s(), 0);
        (0..3).for_each(|_| rate.add(1_000, 1_000));
        rate.add(1_000_000, 100_000);
        assert!(rate.per_s() > 9_000_000, "{}", rate.per_s());
        (0..2).for_each(|_| rate.add(1_000_000, 1_000_000));
        assert!(rate.per_s() < 2_000_000, "a disk that slows down is noticed soon: {}", rate.per_s());
    }

    /// Steps of 256 tokens up to a length, on a machine where a token takes 500 µs, and twice that at 2,000.
    fn encode(rate: &mut EncodingRate, length: u32, slowness: f64) {
        for first in (0..length).step_by(256) {
            let middle = f64::from(first) + 127.5;
            rate.add(256, middle, (slowness * 256.0 * 500.0 * (1.0 + middle / 2000.0)) as u64);
        }
    }

    #[test]
    fn what_was_seen_of_one_length_tells_of_another() {
        let mut rate = EncodingRate::default();
        assert_eq!((rate.encoding().time_us(TokenCount(0), TokenCount(9)), rate.per_s()), (None, 0));
        encode(&mut rate, 1024, 1.0);
        let encoding = rate.encoding();
        let wanted_us = 3000.0 * 500.0 * (1.0 + 2500.0 / 2000.0);
        let time_us = encoding.time_us(TokenCount(1000), TokenCount(4000)).unwrap() as f64;
        assert!((time_us / wanted_us - 1.0).abs() < 0.01, "{time_us} for {wanted_us}: {encoding:?}");
        let per_s = encoding.per_s(TokenCount(2000)) as f64;
        assert!((per_s / (2000.0 / 1.5) - 1.0).abs() < 0.01, "{per_s}");
    }

    #[test]
    fn a_machine_that_slows_down_is_noticed_soon_and_keeps_its_proportions() {
        let mut rate = EncodingRate::default();
        (0..20).for_each(|_| encode(&mut rate, 2048, 1.0));
        (0..3).for_each(|_| encode(&mut rate, 2048, 2.0));
        let time_us = rate.encoding().time_us(TokenCount(0), TokenCount(4000)).unwrap() as f64;
        assert!((time_us / (4000.0 * 1000.0 * 2.0) - 1.0).abs() < 0.1, "{time_us}");
    }

    #[test]
    fn steps_at_one_place_say_nothing_of_others() {
        let mut rate = EncodingRate::default();
        rate.add(100, 50.0, 100_000);
        rate.add(100, 51.0, 200_000);
        assert_eq!(rate.encoding(), Encoding { first_per_s: 661, doubles_at: None });
    }
}
