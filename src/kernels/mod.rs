//! What runs close to the machine: arenas, attention, linear layers. The only room with unsafe code.
//!
//! Each kernel has a scalar form that does the same operations in the same order as its SIMD form, so that the two agree
//! bit for bit; the SIMD form is chosen at run time.
#![expect(unsafe_code, reason = "arenas and SIMD; each use says why it is sound")]

pub mod attention;
pub mod elementwise;
pub mod isa;
pub mod linear;
pub mod mapped;
pub mod memory;
pub mod threads;

/// Whether this machine has what the AVX2 kernels need. The standard library remembers the answer.
#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// A buffer that several threads write, each its own part.
#[derive(Clone, Copy)]
struct SharedOut {
    start: *mut f32,
    len: usize,
}

// SAFETY: it is a pointer to plain floats; `write` asks its callers to keep their parts apart.
unsafe impl Send for SharedOut {}
// SAFETY: as above.
unsafe impl Sync for SharedOut {}

impl SharedOut {
    fn new(out: &mut [f32]) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len() }
    }

    /// Copies `values` to `at`. Panics if they don't fit.
    ///
    /// # Safety
    /// The buffer that `new` borrowed is still borrowed, and no other thread touches the same part of it.
    unsafe fn write(&self, at: usize, values: &[f32]) {
        assert!(at <= self.len && values.len() <= self.len - at, "a kernel wrote past its output");
        // SAFETY: in bounds (above), and the caller promises that the part is this thread's alone.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(at), values.len()) }
    }
}
