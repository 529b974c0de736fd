//! How fast does something go, as far as was seen?

/// No memory gives more bytes a second.
const MOST_PER_S: f64 = 1e12;

/// A moving average of a rate, in units a second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    per_s: f64,
}

impl Rate {
    /// Takes in that `amount` units took `took_us`; the newest observation weighs a fifth.
    pub fn add(&mut self, amount: u64, took_us: u64) {
        let seen = amount as f64 * 1e6 / took_us.max(1) as f64;
        self.per_s = if self.per_s == 0.0 { seen } else { 0.8 * self.per_s + 0.2 * seen };
    }

    /// Takes it for a little faster than was seen: what is not tried any more would else stay slow for ever.
    pub fn hope(&mut self) {
        self.per_s = (self.per_s * 1.1).min(MOST_PER_S);
    }

    /// Units a second; 0 before the first observation.
    pub fn per_s(self) -> u64 {
        self.per_s as u64
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    pub reload_bytes_per_s: Rate,
    pub load_bytes_per_s: Rate,
}
