//! How fast does this machine read memory, and multiply bytes?
//!
//! The bounds of a decode step, which reads all weights once, and of a prefill, which multiplies them with all rows.

use std::hint::black_box;
use std::time::Instant;

use rekindle::kernels::huge_pages::HugePages;
use rekindle::kernels::isa::Isa;
use rekindle::kernels::peak;
use serde_json::{Value, json};

/// Far more than any cache holds.
const BYTES: usize = 256 << 20;
/// Of one measurement: what 64 steps of a decode read of a small model, so that a moment's luck counts for neither.
const PASSES: usize = 24;
const MEASUREMENTS: usize = 3;
/// Sums that don't wait for one another.
const SUMS: usize = 16;

/// What this machine can do at most.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Of all threads.
    pub read_bytes_per_s: f64,
    /// Of one core; `None` if it is not known how.
    pub multiply_adds_per_s: Option<f64>,
}

impl Limits {
    pub fn measure(isa: Isa, threads: usize) -> Self {
        Self { read_bytes_per_s: read_bytes_per_s(threads), multiply_adds_per_s: multiply_adds_per_s(isa) }
    }

    pub fn json(self) -> Value {
        json!({"read_bytes_per_s": self.read_bytes_per_s, "multiply_adds_per_s": self.multiply_adds_per_s})
    }

    /// Of two measurements the better: what disturbs one only ever makes it slower.
    pub fn or_better(self, other: Self) -> Self {
        let of_multiplying = [self, other].into_iter().filter_map(|limits| limits.multiply_adds_per_s).reduce(f64::max);
        Self {
            read_bytes_per_s: self.read_bytes_per_s.max(other.read_bytes_per_s),
            multiply_adds_per_s: of_multiplying,
        }
    }
}

/// How fast a large buffer is read again and again, each thread its own part, in bytes/s; the fastest of some measurements.
/// The buffer lies as weights do.
pub fn read_bytes_per_s(threads: usize) -> f64 {
    let mut words = HugePages::default().zeroed::<u64>(BYTES / 8);
    // Pages that nobody wrote are all the same one.
    (0..).zip(words.iter_mut()).for_each(|(value, word)| *word = value);
    let measure = |_| {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(|| (0..PASSES).for_each(|_| _ = black_box(sum(black_box(part)))));
            }
        });
        (PASSES * BYTES) as f64 / started.elapsed().as_secs_f64()
    };
    (0..MEASUREMENTS).map(measure).fold(0.0, f64::max)
}

/// Rounds of multiplying: about as long as a prefill takes.
const ROUNDS: usize = 80_000_000;

/// The most multiply-adds of bytes that one core does a second with these instructions; `None` if it is not known how.
pub fn multiply_adds_per_s(isa: Isa) -> Option<f64> {
    let measure = |_| {
        let started = Instant::now();
        let done = peak::multiply_bytes(isa, ROUNDS)?;
        Some(done as f64 / started.elapsed().as_secs_f64())
    };
    (0..MEASUREMENTS).filter_map(measure).reduce(f64::max)
}

fn sum(words: &[u64]) -> u64 {
    let mut sums = [0_u64; SUMS];
    let chunks = words.chunks_exact(SUMS);
    let rest: u64 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(rest, |all, sum| all.wrapping_add(*sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read() {
        let words: Vec<u64> = (0..1003).collect();
        assert_eq!(sum(&words), 1003 * 1002 / 2);
    }
}
