//! Where do a model's weights lie?
//!
//! In large mappings for which huge pages are asked, one weight behind the other. A decode step reads all weights once, as
//! fast as memory gives them: with pages of 4 KiB the processor stops at the end of each to look up the next, and one
//! thread reads 24 GB/s where it reads 30 in pages of 2 MiB (Zen 4). Where the system has none, nothing else changes.
//! Invariant: pieces don't overlap, and a mapping lives as long as one of its pieces.

use std::alloc::{Layout, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytemuck::Zeroable;

use super::memory::Mapping;

/// Of a mapping, at the least. What no piece takes is never touched, and costs addresses alone.
const MAPPING_BYTES: usize = 64 << 20;
/// Every piece begins on a cache line.
const ALIGN: usize = 64;

/// Gives out zeroed memory in pieces.
#[derive(Default)]
pub struct HugePages {
    mapping: Option<Arc<Mapping>>,
    /// Where in the mapping the next piece may begin.
    next: usize,
}

impl HugePages {
    /// `len` values whose bytes are all zero. Aborts if the system gives no memory, as every other allocation does.
    pub fn zeroed<T: Zeroable + Copy>(&mut self, len: usize) -> Piece<T> {
        const { assert!(align_of::<T>() <= ALIGN) }
        let bytes = len.checked_mul(size_of::<T>()).expect("fewer bytes than addresses");
        let (mapping, at) = match self.mapping.take() {
            Some(mapping) if bytes <= mapping.bytes().saturating_sub(self.next) => (mapping, self.next),
            _ => {
                let bytes = bytes.max(MAPPING_BYTES);
                let failed = |_| handle_alloc_error(Layout::array::<u8>(bytes).unwrap_or(Layout::new::<T>()));
                (Arc::new(Mapping::new(bytes).unwrap_or_else(failed)), 0)
            }
        };
        let start = mapping.base().wrapping_add(at).cast();
        self.next = (at + bytes).next_multiple_of(ALIGN);
        self.mapping = Some(Arc::clone(&mapping));
        Piece { start, len, _mapping: mapping, owned: PhantomData }
    }
}

/// Values in a mapping, which it keeps alive.
pub struct Piece<T> {
    start: *mut T,
    len: usize,
    _mapping: Arc<Mapping>,
    owned: PhantomData<T>,
}

// SAFETY: as a `Vec<T>`: the values are this piece's alone.
unsafe impl<T: Send> Send for Piece<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Piece<T> {}

impl<T> Deref for Piece<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: inside the mapping and aligned (`zeroed`); zeros are values of `T`, and only this piece reaches them.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T> DerefMut for Piece<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zeroed_aligned_and_apart_and_outlive_their_giver() {
        let mut memory = HugePages::default();
        let mut pieces: Vec<Piece<u32>> = [1, 0, 17, 4096, 100_000].map(|len| memory.zeroed(len)).into();
        // More than is left, and more than any mapping has.
        pieces.push(memory.zeroed(MAPPING_BYTES / 4 - 50_000));
        pieces.push(memory.zeroed(MAPPING_BYTES / 4 + 1));
        pieces.push(memory.zeroed(3));
        drop(memory);
        for (index, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.iter().all(|value| *value == 0), "piece {index}");
            assert_eq!(piece.start.align_offset(ALIGN), 0);
            piece.fill(index as u32 + 1);
        }
        for (index, piece) in pieces.iter().enumerate() {
            assert!(piece.iter().all(|value| *value == index as u32 + 1), "piece {index}");
        }
    }
}
