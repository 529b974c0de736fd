//! How fast does this machine read memory?
//!
//! The bound of a decode step: each reads all weights once.

use std::hint::black_box;
use std::time::Instant;

/// Far more than any cache holds.
const BYTES: usize = 256 << 20;
const PASSES: usize = 6;
/// Sums that don't wait for one another.
const SUMS: usize = 16;

/// The fastest pass over all of a large buffer, each thread over its own part, in bytes/s.
pub fn read_bytes_per_s(threads: usize) -> f64 {
    let words: Vec<u64> = (0..BYTES as u64 / 8).collect();
    let pass = |_| {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(|| black_box(sum(part)));
            }
        });
        BYTES as f64 / started.elapsed().as_secs_f64()
    };
    (0..PASSES).map(pass).fold(0.0, f64::max)
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
