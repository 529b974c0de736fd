//! Which types of weights do the float kernels read?

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::PANEL;
#[cfg(target_arch = "x86_64")]
use super::avx2;

/// A form of weight that the kernels read.
pub(in crate::kernels::linear) trait Weight:
    Copy + bytemuck::Zeroable + Send + Sync
{
    fn from_le_bytes(bytes: &[u8]) -> Self;
    fn to_f32(self) -> f32;
    /// Sixteen weights as two vectors.
    ///
    /// # Safety
    /// The machine has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn widen(weights: &[Self; PANEL]) -> [std::arch::x86_64::__m256; 2];
}

/// The first bytes, as many as a type has.
fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    *bytes.first_chunk().expect("the bytes of a weight")
}

impl Weight for f32 {
    fn from_le_bytes(bytes: &[u8]) -> Self {
        Self::from_le_bytes(first(bytes))
    }

    fn to_f32(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn widen(weights: &[f32; PANEL]) -> [std::arch::x86_64::__m256; 2] {
        // SAFETY: the machine has AVX2 (the caller's promise).
        unsafe { avx2::widen_f32(weights) }
    }
}

impl Weight for f16 {
    fn from_le_bytes(bytes: &[u8]) -> Self {
        Self::from_le_bytes(first(bytes))
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn widen(weights: &[f16; PANEL]) -> [std::arch::x86_64::__m256; 2] {
        // SAFETY: the machine has AVX2 and F16C (the caller's promise).
        unsafe { avx2::widen_f16(weights) }
    }
}

impl Weight for bf16 {
    fn from_le_bytes(bytes: &[u8]) -> Self {
        Self::from_le_bytes(first(bytes))
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn widen(weights: &[bf16; PANEL]) -> [std::arch::x86_64::__m256; 2] {
        // SAFETY: the machine has AVX2 (the caller's promise).
        unsafe { avx2::widen_bf16(weights) }
    }
}
