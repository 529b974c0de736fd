//! What is a number of eight bits with an exponent?
//!
//! E4M3 as the Open Compute Project's "8-bit Floating Point Specification" (OFP8, revision 1.0) has it: a sign, four bits of
//! exponent with bias 7, three of mantissa; no infinities, and one NaN of each sign. Rounded to the nearest, ties to even;
//! what is beyond 448 becomes 448 (the specification's saturating mode).

use half::f16;

/// A number in E4M3.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub(super) struct Fp8(u8);

/// The highest number, 2^8 * 1.75.
const HIGHEST: f32 = 448.0;
/// The lowest with a full mantissa, 2^-6; below, numbers are multiples of 2^-9.
const LEAST_NORMAL: f32 = 1.0 / 64.0;
const STEPS_BELOW: f32 = 512.0;
/// Bits of an f32's mantissa that are too many.
const SPARE_BITS: u32 = 23 - 3;

impl Fp8 {
    /// What an f16 with the same exponent bits lacks, whose bias is 15.
    pub(super) const BIAS: f32 = 256.0;

    #[cfg(test)]
    pub(super) fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// Exponent and mantissa are put where f16 has its own, whose small numbers have no full mantissa either.
    #[inline(always)]
    pub(super) fn to_f32(self) -> f32 {
        let magnitude = u16::from(self.0 & 0x7f);
        let nan = if magnitude == 0x7f { 0x7c00 } else { 0 };
        let sign = u16::from(self.0 & 0x80) << 8;
        f16::from_bits(magnitude << 7 | sign | nan).to_f32() * Self::BIAS
    }

    #[inline(always)]
    pub(super) fn from_f32(value: f32) -> Self {
        let sign = (value.to_bits() >> 24) as u8 & 0x80;
        let magnitude = value.abs().min(HIGHEST);
        let code = if value.is_nan() {
            0x7f
        } else if magnitude < LEAST_NORMAL {
            // One that is rounded up to the least normal number has its code.
            (magnitude * STEPS_BELOW).round_ties_even() as u8
        } else {
            let bits = magnitude.to_bits();
            let to_even = (1 << (SPARE_BITS - 1)) - 1 + (bits >> SPARE_BITS & 1);
            (((bits + to_even) >> SPARE_BITS) - ((127 - 7) << 3)) as u8
        };
        Self(sign | code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the specification's own formula.
    fn value(code: u8) -> f64 {
        let (sign, exponent, mantissa) = (code >> 7, i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = match (exponent, code & 7) {
            (15, 7) => f64::NAN,
            (0, _) => mantissa / 8.0 * 2.0_f64.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2.0_f64.powi(exponent - 7),
        };
        if sign == 1 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_code_has_the_value_that_the_specification_gives_it() {
        for code in 0..=u8::MAX {
            let (ours, wanted) = (f64::from(Fp8(code).to_f32()), value(code));
            assert!(ours == wanted || (ours.is_nan() && wanted.is_nan()), "{code:#x}: {ours} for {wanted}");
        }
        assert_eq!((value(0x7e), value(0x01), value(0x08)), (448.0, 1.0 / 512.0, 1.0 / 64.0));
    }

    #[test]
    fn every_value_becomes_the_nearest_code_and_a_tie_the_even_one() {
        // All codes, all ties between two, and a little to both sides of these.
        for code in 0..0x7e_u8 {
            let (low, high) = (value(code), value(code + 1));
            let tie = ((low + high) / 2.0) as f32;
            let even = if code % 2 == 0 { code } else { code + 1 };
            for sign in [0, 0x80] {
                let signed = |value: f32| if sign == 0 { value } else { -value };
                assert_eq!(Fp8::from_f32(signed(low as f32)).0, code | sign);
                assert_eq!(Fp8::from_f32(signed(tie)).0, even | sign, "{tie}");
                assert_eq!(Fp8::from_f32(signed(tie.next_down())).0, code | sign, "{tie}");
                assert_eq!(Fp8::from_f32(signed(tie.next_up())).0, (code + 1) | sign, "{tie}");
            }
        }
    }

    #[test]
    fn what_is_too_large_becomes_the_highest_and_what_is_no_number_stays_so() {
        for large in [448.0, 464.0, 500.0, 1e9, f32::INFINITY] {
            assert_eq!((Fp8::from_f32(large).0, Fp8::from_f32(-large).0), (0x7e, 0xfe), "{large}");
        }
        assert!(Fp8::from_f32(f32::NAN).to_f32().is_nan() && Fp8::from_f32(-f32::NAN).to_f32().is_nan());
        assert_eq!((Fp8::from_f32(1e-9).0, Fp8::from_f32(-0.0).0), (0, 0x80));
    }
}
