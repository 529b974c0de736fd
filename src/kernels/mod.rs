//! What runs close to the machine: arenas, attention, linear layers. The only room with unsafe code.
//!
//! Each kernel has a scalar form that does the same operations in the same order as its SIMD form, so that the two agree
//! bit for bit; the SIMD form is chosen at run time.
#![expect(unsafe_code, reason = "arenas and SIMD; each use says why it is sound")]

pub mod attention;
pub mod cold;
pub mod elementwise;
pub mod files;
pub mod huge_pages;
pub mod isa;
pub mod linear;
pub mod mapped;
pub mod memory;
pub mod peak;
pub mod prefetch;
pub mod softmax;
pub mod threads;

/// A slice that several threads write, each its own part.
struct SharedOut<T> {
    start: *mut T,
    len: usize,
}

impl<T> Clone for SharedOut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedOut<T> {}

// SAFETY: it is a pointer to values that may be sent; whoever reaches them promises to keep the parts apart.
unsafe impl<T: Send> Send for SharedOut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedOut<T> {}

impl<T> SharedOut<T> {
    fn new(out: &mut [T]) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len() }
    }

    /// Where `len` values from `at` lie. Panics if they are not inside.
    #[inline(always)]
    fn at(&self, at: usize, len: usize) -> *mut T {
        assert!(at <= self.len && len <= self.len - at, "a kernel wrote past its output");
        self.start.wrapping_add(at)
    }

    /// `len` values from `at`. Panics if they are not inside.
    ///
    /// # Safety
    /// The slice that `new` borrowed is still borrowed, and no other thread touches the same part of it.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "the parts are apart, which is what the caller promises")]
    unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        // SAFETY: in bounds (`at` looks), and the caller promises that the part is this thread's alone.
        unsafe { std::slice::from_raw_parts_mut(self.at(at, len), len) }
    }

    /// Copies `values` to `at`. Panics if they don't fit.
    ///
    /// # Safety
    /// As `part`.
    #[inline(always)]
    unsafe fn write(&self, at: usize, values: &[T])
    where
        T: Copy,
    {
        // SAFETY: the caller's promise.
        unsafe { self.part(at, values.len()) }.copy_from_slice(values);
    }
}
