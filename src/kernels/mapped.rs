//! How do a model file's bytes get into the address space?

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

/// A file mapped for reading.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
}

impl MappedFile {
    /// Maps a file. Whoever cuts the file short while it is mapped kills the process: model files are replaced by
    /// renaming, never written in place.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the mapping is read-only and private to this process; that the file is not changed under it is the
        // operator's side of the bargain, stated above.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}
