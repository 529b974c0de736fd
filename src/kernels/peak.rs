//! How many bytes can one core multiply and add, with nothing else to do?
//!
//! The limit that linear layers are measured against: the instructions that multiply bytes, on registers alone.

use std::hint::black_box;

use super::isa::Isa;

/// Sums side by side: enough to hide the latency of any of these instructions.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 10;

/// Multiplies and adds bytes in `rounds` rounds; returns how many multiply-adds that were, for the caller to time. `None`
/// where the set has no instruction for it that is known here.
pub fn multiply_bytes(isa: Isa, rounds: usize) -> Option<usize> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            // SAFETY: whoever chose the instructions checked for them.
            unsafe { avx512(rounds) };
            Some(rounds * CHAINS * 64)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => {
            // SAFETY: as above.
            unsafe { avxvnni(rounds) };
            Some(rounds * CHAINS * 32)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: as above.
            unsafe { avx2(rounds) };
            Some(rounds * CHAINS * 32)
        }
        _ => {
            black_box(rounds);
            None
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn avx512(rounds: usize) {
    use std::arch::x86_64::{_mm512_dpbusd_epi32, _mm512_set1_epi8, _mm512_setzero_si512};
    let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(5)));
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avxvnni")]
fn avxvnni(rounds: usize) {
    use std::arch::x86_64::{_mm256_dpbusd_avx_epi32, _mm256_set1_epi8, _mm256_setzero_si256};
    let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(5)));
    let mut sums = [_mm256_setzero_si256(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
        }
    }
    black_box(sums);
}

/// In 16 bits, as the kernels add products of 4-bit weights.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(rounds: usize) {
    use std::arch::asm;
    use std::arch::x86_64::{_mm256_add_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_setzero_si256};
    let (mut a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(5)));
    let mut sums = [_mm256_setzero_si256(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            // SAFETY: no instruction. The compiler takes it for a change of `a`; else it would multiply once for all rounds.
            unsafe { asm!("/* {0} */", inout(ymm_reg) a, options(nomem, nostack, preserves_flags)) };
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(a, b));
        }
    }
    black_box(sums);
}
