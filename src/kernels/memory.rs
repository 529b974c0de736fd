//! Where do the bytes of KV blocks lie?
//!
//! An arena is one anonymous mapping cut into blocks of equal size. It moves and checks bytes; which block is whose is
//! the pools' business (`kv::pool`).
//! Invariant: a block has one writer, or any number of readers. `kv` keeps it by ownership: an `OpenBlock` has one owner
//! and is written by the step alone; sealed blocks and tails at rest are only read.

use std::cell::UnsafeCell;

use memmap2::MmapMut;

/// Of a huge page, on x86 and, mostly, on ARM.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Zeroed memory in huge pages, where the system offers them; nothing depends on it.
pub(super) struct Mapping {
    /// Its bytes are reached through `base` alone.
    _map: UnsafeCell<MmapMut>,
    base: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory that is not tied to a thread; whoever reaches it through the pointer keeps readers and writers apart.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Pages are only used once they are written.
    pub fn new(bytes: usize) -> std::io::Result<Self> {
        // Linux before 6.7 puts a mapping anywhere, and a huge page begins at a multiple of its size.
        let slack = if bytes < HUGE_PAGE_BYTES { 0 } else { HUGE_PAGE_BYTES };
        let mut map = MmapMut::map_anon(bytes.saturating_add(slack).max(1))?;
        #[cfg(target_os = "linux")]
        if let Err(error) = map.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "no huge pages");
        }
        let start = map.as_mut_ptr();
        let base = if slack == 0 { start } else { start.wrapping_add(start.align_offset(HUGE_PAGE_BYTES)) };
        Ok(Self { _map: UnsafeCell::new(map), base, bytes })
    }

    /// The first byte; of a huge page, if there is room for one.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// A fixed number of blocks of `block_bytes` bytes each, page aligned, zeroed at first.
pub struct Arena {
    mapping: Mapping,
    block_bytes: usize,
    blocks: usize,
}

/// Why an arena could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    #[error("a pool of {blocks} blocks of {block_bytes} bytes does not fit an address space")]
    TooLarge { blocks: usize, block_bytes: usize },
    #[error("the system did not give {bytes} bytes for a pool: {source}")]
    Map { bytes: usize, source: std::io::Error },
}

impl Arena {
    /// Reserves room for `blocks` blocks. Pages are only used once they are written.
    pub fn new(blocks: usize, block_bytes: usize) -> Result<Self, ArenaError> {
        let bytes = blocks.checked_mul(block_bytes).ok_or(ArenaError::TooLarge { blocks, block_bytes })?;
        let mapping = Mapping::new(bytes).map_err(|source| ArenaError::Map { bytes, source })?;
        Ok(Self { mapping, block_bytes, blocks })
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// The first byte of a block. Panics if the arena has no such block.
    pub(super) fn block_ptr(&self, block: u32) -> *mut u8 {
        let block = block as usize;
        assert!(block < self.blocks, "block {block} is outside an arena of {} blocks", self.blocks);
        // SAFETY: the block lies inside the mapping, whose size is `blocks * block_bytes`.
        unsafe { self.mapping.base().add(block * self.block_bytes) }
    }

    /// The bytes of a block, to read.
    pub fn bytes(&self, block: u32) -> &[u8] {
        let start = self.block_ptr(block);
        // SAFETY: in bounds (above); no one writes a block that is being read (the module's invariant).
        unsafe { std::slice::from_raw_parts(start, self.block_bytes) }
    }

    /// Runs `write` on the bytes of a block.
    pub fn with_bytes_mut<R>(&self, block: u32, write: impl FnOnce(&mut [u8]) -> R) -> R {
        let start = self.block_ptr(block);
        // SAFETY: in bounds (above); the caller owns the block alone (the module's invariant).
        write(unsafe { std::slice::from_raw_parts_mut(start, self.block_bytes) })
    }

    /// Copies a block of `source` into block `to` and returns the CRC-32C of what was copied.
    ///
    /// Each piece is summed where it comes from, which brings it into the first cache, and copied from there: summed and
    /// copied so it is there as soon as by a plain copy. (To sum what was just written takes half as long again, measured on
    /// Zen 4.)
    pub fn copy_from(&self, to: u32, source: &Arena, from: u32) -> u32 {
        const PIECE: usize = 4 * 1024;
        assert_eq!(self.block_bytes, source.block_bytes, "blocks of two sizes");
        let from = source.bytes(from);
        let mut sum = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        self.with_bytes_mut(to, |to| {
            for (to, from) in to.chunks_mut(PIECE).zip(from.chunks(PIECE)) {
                sum.update(from);
                to.copy_from_slice(from);
            }
        });
        // A sum of 32 bits in a number of 64.
        sum.finalize() as u32
    }

    /// Overwrites a block with zeros, so that a forgotten conversation leaves nothing behind.
    pub fn zero(&self, block: u32) {
        self.with_bytes_mut(block, |bytes| bytes.fill(0));
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arena({} blocks of {} bytes)", self.blocks, self.block_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_that_has_room_for_huge_pages_begins_with_one() {
        for bytes in [HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1, 5 * HUGE_PAGE_BYTES] {
            let arena = Arena::new(1, bytes).unwrap();
            assert_eq!(arena.block_ptr(0).align_offset(HUGE_PAGE_BYTES), 0);
            arena.with_bytes_mut(0, |all| (all[0], all[bytes - 1]) = (1, 2));
            assert_eq!((arena.bytes(0)[0], arena.bytes(0)[bytes - 1]), (1, 2));
        }
    }

    #[test]
    fn a_copy_is_summed_by_crc_32c_across_its_pieces() {
        // The check value of CRC-32/ISCSI: RFC 3720, B.4, and the catalogue of CRCs.
        assert_eq!(crc_fast::crc32_iscsi(b"123456789"), 0xe306_9283);
        for bytes in [1, 4095, 4096, 4097, 10_000] {
            let (from, to) = (Arena::new(2, bytes).unwrap(), Arena::new(2, bytes).unwrap());
            from.with_bytes_mut(1, |block| {
                block.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at % 251) as u8)
            });
            let sum = to.copy_from(0, &from, 1);
            assert_eq!((sum, to.bytes(0)), (crc_fast::crc32_iscsi(from.bytes(1)), from.bytes(1)), "{bytes} bytes");
        }
    }
}
