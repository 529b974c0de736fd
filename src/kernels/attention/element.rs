//! As what are the numbers of keys and values stored, and what do they become in a register?
//!
//! Every form widens to f32 without rounding, a scaled one together with its scale, so that attention over any of them is
//! attention over plain f32 values. Rounding happens once, when a token's key and value are written.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128i, __m256, __m512, _MM_FROUND_TO_NEAREST_INT, _mm_and_si128, _mm_cmpeq_epi16, _mm_cvtepu8_epi16,
    _mm_loadl_epi64, _mm_loadu_si128, _mm_or_si128, _mm_set1_epi16, _mm_slli_epi16, _mm_storeu_si128, _mm256_and_si256,
    _mm256_castsi256_ps, _mm256_cmpeq_epi16, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_max_ps,
    _mm256_min_ps, _mm256_mul_ps, _mm256_or_si256, _mm256_set1_epi16, _mm256_set1_ps, _mm256_slli_epi16,
    _mm256_slli_epi32, _mm512_castsi512_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_slli_epi32,
};

use half::{bf16, f16};

use super::fp8::Fp8;

/// A number of a key or a value, as it is stored.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// Whether each token and head has a scale, by which its numbers are to be multiplied.
    const SCALED: bool;
    /// Most queries of a tile of AVX-512. Only the usual form has all of them: each number is machine code of its own, and
    /// what half of them would save is the widening alone.
    #[cfg(target_arch = "x86_64")]
    const TILE_512: usize;

    /// The number's value, without its scale.
    fn widen(self) -> f32;

    /// The nearest to a value, which was divided by its scale.
    fn narrow(value: f32) -> Self;

    /// As `narrow`, eight at a time.
    ///
    /// # Safety
    /// The machine has AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn narrow_eight(values: &[f32; 8]) -> [Self; 8] {
        values.map(Self::narrow)
    }

    /// As `widen`, eight at a time.
    ///
    /// # Safety
    /// The machine has AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn widen_eight(values: &[Self; 8]) -> __m256;

    /// As `widen`, sixteen at a time.
    ///
    /// # Safety
    /// The machine has AVX-512 F, BW and VL, AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn widen_sixteen(values: &[Self; 16]) -> __m512;
}

impl Element for f16 {
    const SCALED: bool = false;
    #[cfg(target_arch = "x86_64")]
    const TILE_512: usize = 24;

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    /// Clamped to the finite range.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value.clamp(Self::MIN.to_f32(), Self::MAX.to_f32()))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn narrow_eight(values: &[f32; 8]) -> [Self; 8] {
        let (lowest, highest) = (_mm256_set1_ps(Self::MIN.to_f32()), _mm256_set1_ps(Self::MAX.to_f32()));
        // SAFETY: eight floats.
        let values = unsafe { _mm256_loadu_ps(values.as_ptr()) };
        // In this order of operands, what is no number stays so.
        let clamped = _mm256_min_ps(highest, _mm256_max_ps(lowest, values));
        let narrowed = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(clamped);
        let mut halves = [Self::ZERO; 8];
        // SAFETY: eight halves, of 16 bytes.
        unsafe { _mm_storeu_si128(halves.as_mut_ptr().cast(), narrowed) };
        halves
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen_eight(values: &[Self; 8]) -> __m256 {
        // SAFETY: eight halves, of 16 bytes.
        let halves: __m128i = unsafe { _mm_loadu_si128(values.as_ptr().cast()) };
        _mm256_cvtph_ps(halves)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn widen_sixteen(values: &[Self; 16]) -> __m512 {
        // SAFETY: sixteen halves, of 32 bytes.
        let halves = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
        _mm512_cvtph_ps(halves)
    }
}

impl Element for f32 {
    const SCALED: bool = false;
    #[cfg(target_arch = "x86_64")]
    const TILE_512: usize = 12;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen_eight(values: &[Self; 8]) -> __m256 {
        // SAFETY: eight floats.
        unsafe { _mm256_loadu_ps(values.as_ptr()) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn widen_sixteen(values: &[Self; 16]) -> __m512 {
        // SAFETY: sixteen floats.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }
}

impl Element for bf16 {
    const SCALED: bool = false;
    #[cfg(target_arch = "x86_64")]
    const TILE_512: usize = 12;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Clamped to the finite range.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value.clamp(Self::MIN.to_f32(), Self::MAX.to_f32()))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen_eight(values: &[Self; 8]) -> __m256 {
        // SAFETY: eight halves, of 16 bytes.
        let halves: __m128i = unsafe { _mm_loadu_si128(values.as_ptr().cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn widen_sixteen(values: &[Self; 16]) -> __m512 {
        // SAFETY: sixteen halves, of 32 bytes.
        let halves = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    }
}

impl Element for i8 {
    const SCALED: bool = true;
    #[cfg(target_arch = "x86_64")]
    const TILE_512: usize = 12;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    /// Up to 127 either way; what is no number becomes 0.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        code_of(value)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen_eight(values: &[Self; 8]) -> __m256 {
        // SAFETY: eight bytes.
        let bytes = unsafe { _mm_loadl_epi64(values.as_ptr().cast()) };
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn widen_sixteen(values: &[Self; 16]) -> __m512 {
        // SAFETY: sixteen bytes.
        let bytes = unsafe { _mm_loadu_si128(values.as_ptr().cast()) };
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
    }
}

impl Element for Fp8 {
    const SCALED: bool = false;
    #[cfg(target_arch = "x86_64")]
    const TILE_512: usize = 12;

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }

    /// As `Fp8::to_f32`, operation by operation.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen_eight(values: &[Self; 8]) -> __m256 {
        // SAFETY: eight bytes.
        let codes = _mm_cvtepu8_epi16(unsafe { _mm_loadl_epi64(values.as_ptr().cast()) });
        let magnitude = _mm_and_si128(codes, _mm_set1_epi16(0x7f));
        let nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7c00));
        let sign = _mm_slli_epi16::<8>(_mm_and_si128(codes, _mm_set1_epi16(0x80)));
        let halves = _mm_or_si128(_mm_or_si128(_mm_slli_epi16::<7>(magnitude), sign), nan);
        _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(Fp8::BIAS))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    unsafe fn widen_sixteen(values: &[Self; 16]) -> __m512 {
        // SAFETY: sixteen bytes.
        let codes = _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(values.as_ptr().cast()) });
        let magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
        let nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7c00));
        let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)));
        let halves = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16::<7>(magnitude), sign), nan);
        _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(Fp8::BIAS))
    }
}

/// The highest code of int8: the scale is symmetric, so that -128 means nothing.
pub(in crate::kernels) const HIGHEST: f32 = 127.0;

/// The nearest code to a number that was divided by its scale; 0 for what is no number.
#[inline(always)]
pub(in crate::kernels) fn code_of(value: f32) -> i8 {
    value.round_ties_even().clamp(-HIGHEST, HIGHEST) as i8
}

/// What a number counts for when a scale is chosen: infinities and what is no number must not take the others' precision.
#[inline(always)]
pub(in crate::kernels) fn extent(value: f32) -> f32 {
    let magnitude = value.abs();
    if magnitude < f32::INFINITY { magnitude } else { 0.0 }
}

/// The scale of numbers up to `highest`: the nearest in f16, or the one above where the highest would be cut.
///
/// Not always the one above: what was narrowed, widened to f16 and is narrowed again then keeps its scale and its codes.
#[inline(always)]
pub(in crate::kernels) fn scale_of(highest: f32) -> f16 {
    let scale = f16::from_f32((highest / HIGHEST).min(f16::MAX.to_f32()));
    let cuts = highest > scale.to_f32() * (HIGHEST + 0.5);
    if cuts && scale < f16::MAX { f16::from_bits(scale.to_bits() + 1) } else { scale }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::Isa;

    /// Every code of a form becomes the same in a register as by itself.
    #[cfg(target_arch = "x86_64")]
    fn lanes_agree<E: Element>(codes: &[E]) {
        for codes in codes.as_chunks::<16>().0 {
            let wanted = codes.map(|code| code.widen());
            let same = |ours: f32, wanted: f32| ours == wanted || (ours.is_nan() && wanted.is_nan());
            let isas = Isa::available();
            if isas.iter().any(|isa| isa.has_avx2()) {
                for half in 0..2 {
                    let eight: &[E; 8] = codes[8 * half..][..8].try_into().unwrap();
                    // SAFETY: the machine has AVX2, and a vector is eight floats.
                    let lanes: [f32; 8] = unsafe { std::mem::transmute(E::widen_eight(eight)) };
                    assert!(lanes.iter().zip(&wanted[8 * half..]).all(|(a, b)| same(*a, *b)), "{lanes:?}, {wanted:?}");
                }
            }
            if isas.contains(&Isa::Avx512) {
                // SAFETY: the machine has AVX-512, and a vector is sixteen floats.
                let lanes: [f32; 16] = unsafe { std::mem::transmute(E::widen_sixteen(codes)) };
                assert!(lanes.iter().zip(&wanted).all(|(a, b)| same(*a, *b)), "{lanes:?}, {wanted:?}");
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_code_is_widened_to_the_same_number_by_all_instructions() {
        lanes_agree(&(0..=u16::MAX).map(f16::from_bits).collect::<Vec<_>>());
        lanes_agree(&(0..=u16::MAX).map(bf16::from_bits).collect::<Vec<_>>());
        lanes_agree(&(i8::MIN..=i8::MAX).collect::<Vec<_>>());
        lanes_agree(&(0..=u8::MAX).map(Fp8::from_bits).collect::<Vec<_>>());
        lanes_agree(&(0..1 << 12).map(|bits| f32::from_bits(bits << 20)).collect::<Vec<_>>());
    }

    #[test]
    fn a_scale_cuts_nothing_and_wastes_nothing() {
        let mut highest = 1e-9_f32;
        while highest < 8e6 {
            let scale = scale_of(highest).to_f32();
            let code = highest / scale;
            assert!(code < HIGHEST + 0.51, "{highest} becomes {code}");
            // Where f16 is that fine: below, its steps are all there is.
            assert!(code > HIGHEST - 0.51 || scale < 1e-3, "{highest} becomes {code}");
            highest *= 1.01;
        }
        assert_eq!(scale_of(0.0), f16::ZERO);
        assert_eq!(scale_of(f32::MAX), f16::MAX);
    }

    #[test]
    fn what_is_no_number_and_what_is_infinite_leave_the_scale_to_the_others() {
        let highest = [f32::NAN, f32::INFINITY, 1.0, f32::NEG_INFINITY, -2.54].map(extent);
        assert_eq!(highest, [0.0, 0.0, 1.0, 0.0, 2.54]);
        assert_eq!([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.5, 126.6].map(i8::narrow), [0, 127, -127, 0, 127]);
    }

    #[test]
    fn each_code_is_the_nearest_to_its_value() {
        for code in -127..=127_i8 {
            assert_eq!(i8::narrow(f32::from(code)), code);
            let beside = [-0.49, 0.49].map(|off| i8::narrow(f32::from(code) + off));
            assert_eq!(beside, [code, code]);
        }
        for bits in 0..=u16::MAX {
            let code = bf16::from_bits(bits);
            if code.is_finite() {
                assert_eq!(bf16::narrow(code.widen()), code);
            }
        }
        assert_eq!(bf16::narrow(f32::MAX), bf16::MAX);
        assert_eq!(bf16::narrow(f32::NEG_INFINITY), bf16::MIN);
        assert!(bf16::narrow(f32::NAN).is_nan() && f16::narrow(f32::NAN).is_nan());
    }
}
