//! How is memory asked for before it is needed?

/// How near the processor a line is brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Near {
    /// It is needed at once, by one access or two.
    First,
    /// It is one of many: the first cache is for others.
    Second,
}

/// Has the line of memory brought that begins a value, or that its first byte is in. Does nothing that a program can see.
#[inline(always)]
pub fn prefetch<T>(value: *const T, near: Near) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch touches nothing, whatever the address.
        unsafe {
            match near {
                Near::First => _mm_prefetch::<_MM_HINT_T0>(value.cast()),
                Near::Second => _mm_prefetch::<_MM_HINT_T1>(value.cast()),
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        match near {
            Near::First => {
                std::arch::asm!("prfm pldl1keep, [{}]", in(reg) value, options(nostack, readonly, preserves_flags))
            }
            Near::Second => {
                std::arch::asm!("prfm pldl2keep, [{}]", in(reg) value, options(nostack, readonly, preserves_flags))
            }
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = (value, near);
}
