//! Where do the bytes of KV blocks lie on disk, and how are they found again after a restart?
//!
//! A folder of preallocated files, cut into slots of one size. A slot is a page that says what is in it, its *label*, and
//! a block's bytes. The labels are the whole index: there is no database beside them. A slot's bytes are written and synced
//! before its label, so that a label on disk speaks of bytes on disk; what is torn all the same shows in the checksum.
//! One process owns a folder. Which block is whose, and which slot is free, is `kv`'s business.
//! Invariant: `read` gives out bytes that are what was asked for, whole, or an error.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};
use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::memory::Arena;

/// Unit of direct transfers: a page, and a multiple of every disk's sector.
const PAGE: usize = 4096;
/// Largest size of one file.
const FILE_BYTES: u64 = 1 << 30;
/// Most files of a new tier, unless it is made larger later.
const MOST_FILES: u64 = 256;
/// Most slots of one read: some megabytes, as disks like it.
const RUN: usize = 8;
/// Threads that read labels at the start.
const SCANNERS: u32 = 8;
/// Of the folder's format; a change of layout makes it another one.
const FORMAT: &str = "rekindle kv tier, format 1";
const SLOTS_A_FILE: &str = "slots a file: ";
/// Opens every label.
const MAGIC: [u8; 8] = *b"rkslot1\n";

/// Why a folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("another process uses {}", .path.display())]
    Locked { path: PathBuf },
    #[error("{} holds other things than a tier; name an empty folder", .path.display())]
    Foreign { path: PathBuf },
    #[error("{} was written by another version ({found:?} instead of {FORMAT:?}); remove it, or name another folder", .path.display())]
    Version { path: PathBuf, found: String },
    #[error("{} is of another model, or of other settings of its KV ({found}, not {wanted}); remove it, or name another folder", .path.display())]
    Model { path: PathBuf, found: String, wanted: String },
    #[error("no room for a single block: {bytes} bytes are wanted at least")]
    NoRoom { bytes: usize },
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Why a slot's bytes were not given out.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("the slot holds something else than it should, or nothing")]
    Label,
    #[error("the bytes do not match their checksum")]
    Checksum,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A block's bytes and their CRC-32C.
pub type ReadBlock<'a> = Result<(&'a [u8], u32), ReadError>;

/// What is in a slot: one full block, of whom, and where in its history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label {
    /// A digest that only the tenant's hash key gives.
    pub tenant: [u8; 16],
    pub conversation: u128,
    /// Which block of the conversation.
    pub index: u32,
    pub parent: [u8; 32],
    pub hash: [u8; 32],
    /// When the conversation was used, in the order of uses.
    pub used: u64,
    /// It was over: nobody goes on with it, and its front may serve others.
    pub ended: bool,
}

/// A label as it lies on disk, in the machine's own order of bytes.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Page {
    magic: [u8; 8],
    fingerprint: [u8; 32],
    tenant: [u8; 16],
    conversation: [u8; 16],
    parent: [u8; 32],
    hash: [u8; 32],
    used: u64,
    index: u32,
    ended: u32,
    /// CRC-32C of the block's bytes.
    bytes_sum: u32,
    /// CRC-32C of all above.
    label_sum: u32,
}

/// Opens the page of a slot whose bytes are being written.
const UNFINISHED: [u8; 8] = *b"rkbusy1\n";

const LABEL_BYTES: usize = size_of::<Page>();
const SUMMED: usize = LABEL_BYTES - 4;

impl Page {
    fn new(label: &Label, fingerprint: [u8; 32], bytes_sum: u32) -> Self {
        let mut page = Self {
            magic: MAGIC,
            fingerprint,
            tenant: label.tenant,
            conversation: label.conversation.to_ne_bytes(),
            parent: label.parent,
            hash: label.hash,
            used: label.used,
            index: label.index,
            ended: label.ended.into(),
            bytes_sum,
            label_sum: 0,
        };
        page.label_sum = page.sum();
        page
    }

    /// What a page of a slot says; `None` if it is no label of this model, or torn.
    fn read(page: &[u8], fingerprint: [u8; 32]) -> Option<Self> {
        let page: Self = bytemuck::pod_read_unaligned(page.get(..LABEL_BYTES)?);
        let good = page.magic == MAGIC && page.fingerprint == fingerprint && page.label_sum == page.sum();
        good.then_some(page)
    }

    fn sum(&self) -> u32 {
        crc_fast::crc32_iscsi(&bytemuck::bytes_of(self)[..SUMMED])
    }

    fn label(&self) -> Label {
        Label {
            tenant: self.tenant,
            conversation: u128::from_ne_bytes(self.conversation),
            index: self.index,
            parent: self.parent,
            hash: self.hash,
            used: self.used,
            ended: self.ended != 0,
        }
    }
}

/// A block that was found at the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FoundSlot {
    pub slot: u32,
    pub label: Label,
    pub bytes_sum: u32,
}

/// What a folder held at the start.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Contents {
    pub blocks: Vec<FoundSlot>,
    /// Slots that hold something without saying what: their process died while it wrote.
    pub unfinished: Vec<u32>,
}

/// Room for a run of slots, aligned as direct transfers want it; one for each thread that reads or writes.
#[derive(Debug)]
pub struct Buffer {
    room: Arena,
}

/// The slots of one folder.
#[derive(Debug)]
pub struct Slots {
    files: Vec<File>,
    slots: u32,
    slots_per_file: u32,
    block_bytes: usize,
    fingerprint: [u8; 32],
    direct: bool,
    /// Held as long as this lives.
    _lock: File,
}

impl Slots {
    /// Opens a folder, or makes it, with as many slots as `bytes` hold, or as the filesystem has room for. `fingerprint`:
    /// what the bytes depend on: weights, tokenizer, type and layout of the KV. Says what is there already.
    pub fn open(
        folder: &Path,
        bytes: u64,
        block_bytes: usize,
        fingerprint: [u8; 32],
    ) -> Result<(Self, Contents), FolderError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| FolderError::Io { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at(folder))?;
        let lock = lock(folder)?;
        let slot_bytes = (PAGE + block_bytes.next_multiple_of(PAGE)) as u64;
        let wanted = u32::try_from(bytes / slot_bytes).unwrap_or(u32::MAX);
        if wanted == 0 {
            return Err(FolderError::NoRoom { bytes: usize::try_from(slot_bytes).unwrap_or(usize::MAX) });
        }
        // A file is open for each: not too many of them, however large the tier.
        let file_bytes = FILE_BYTES.max(bytes.div_ceil(MOST_FILES));
        let usual = u32::try_from((file_bytes / slot_bytes).max(1)).unwrap_or(u32::MAX);
        let slots_per_file = check_format(folder, block_bytes, fingerprint, usual)?;
        let (mut files, mut slots, mut direct) = (Vec::new(), 0, true);
        for number in 0..wanted.div_ceil(slots_per_file) {
            let path = file_path(folder, number);
            let here = slots_per_file.min(wanted - number * slots_per_file);
            let file = open_file(&path, &mut direct).map_err(at(&path))?;
            let before = file.metadata().map_err(at(&path))?.len();
            let sized = set_size(&file, u64::from(here) * slot_bytes);
            // What was there stays there, whatever comes of more.
            let here = if sized.is_ok() { here } else { u32::try_from(before / slot_bytes).unwrap_or(0).min(here) };
            slots += here;
            if let Err(error) = sized {
                let path = path.display();
                tracing::warn!(%error, %path, slots, wanted, "the disk tier is smaller than it was asked to be");
                file.set_len(u64::from(here) * slot_bytes).map_err(at(folder))?;
            }
            if here > 0 {
                files.push(file);
            }
            if here < slots_per_file {
                break;
            }
        }
        remove_others(folder, files.len()).map_err(at(folder))?;
        sync_folder(folder).map_err(at(folder))?;
        if slots == 0 {
            return Err(FolderError::NoRoom { bytes: usize::try_from(slot_bytes).unwrap_or(usize::MAX) });
        }
        let this = Self { files, slots, slots_per_file, block_bytes, fingerprint, direct, _lock: lock };
        let found = this.scan().map_err(at(folder))?;
        Ok((this, found))
    }

    pub fn count(&self) -> u32 {
        self.slots
    }

    /// Whether transfers pass by the system's page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    pub fn buffer(&self) -> io::Result<Buffer> {
        Arena::new(1, RUN * self.slot_bytes()).map(|room| Buffer { room }).map_err(io::Error::other)
    }

    fn slot_bytes(&self) -> usize {
        PAGE + self.block_bytes.next_multiple_of(PAGE)
    }

    /// The file that a slot is in, and where. Panics if there is no such slot.
    fn place(&self, slot: u32) -> (&File, u64) {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let file = &self.files[(slot / self.slots_per_file) as usize];
        (file, u64::from(slot % self.slots_per_file) * self.slot_bytes() as u64)
    }

    /// Writes a block's bytes, which the slot says are unfinished; `label` makes them known. Returns their CRC-32C.
    pub fn write(&self, slot: u32, bytes: &[u8], buffer: &Buffer) -> io::Result<u32> {
        assert_eq!(bytes.len(), self.block_bytes, "a slot holds one block");
        let (file, at) = self.place(slot);
        buffer.room.with_bytes_mut(0, |room| {
            room[..PAGE].fill(0);
            room[..UNFINISHED.len()].copy_from_slice(&UNFINISHED);
            room[PAGE..][..bytes.len()].copy_from_slice(bytes);
            let sum = crc_fast::crc32_iscsi(&room[PAGE..][..bytes.len()]);
            file.write_all_at(&room[..self.slot_bytes()], at)?;
            Ok(sum)
        })
    }

    /// Says what is in a slot whose bytes are written and synced.
    pub fn label(&self, slot: u32, label: &Label, bytes_sum: u32, buffer: &Buffer) -> io::Result<()> {
        let (file, at) = self.place(slot);
        buffer.room.with_bytes_mut(0, |room| {
            room[..PAGE].fill(0);
            room[..LABEL_BYTES].copy_from_slice(bytemuck::bytes_of(&Page::new(label, self.fingerprint, bytes_sum)));
            file.write_all_at(&room[..PAGE], at)
        })
    }

    /// How many of these slots, from the first on, one read gives: they follow one another in a file.
    pub fn run(&self, mut slots: impl Iterator<Item = u32>) -> usize {
        let Some(first) = slots.next() else { return 0 };
        let end = (first / self.slots_per_file + 1) * self.slots_per_file;
        let next = (first + 1..end).zip(slots).take_while(|(wanted, slot)| wanted == slot);
        1 + next.take(RUN - 1).count()
    }

    /// Reads a run of slots in one go, and gives `take` each block and its CRC-32C, if the slot holds just this one.
    pub fn read(&self, first: u32, wanted: &[&Label], buffer: &Buffer, take: &mut dyn FnMut(usize, ReadBlock<'_>)) {
        let ((file, at), slot_bytes) = (self.place(first), self.slot_bytes());
        let whole =
            buffer.room.with_bytes_mut(0, |room| file.read_exact_at(&mut room[..wanted.len() * slot_bytes], at));
        match whole {
            Ok(()) => {
                let slots = buffer.room.bytes(0).chunks(slot_bytes);
                for (index, (slot, wanted)) in slots.zip(wanted).enumerate() {
                    take(index, self.check(slot, wanted));
                }
            }
            Err(error) if wanted.len() == 1 => take(0, Err(error.into())),
            // One bad sector is one slot's.
            Err(_) => {
                for (index, wanted) in wanted.iter().enumerate() {
                    let slot = first + u32::try_from(index).unwrap_or(u32::MAX);
                    self.read(slot, &[*wanted], buffer, &mut |_, read| take(index, read));
                }
            }
        }
    }

    /// What a slot holds, if it is just what was wanted.
    fn check<'a>(&self, slot: &'a [u8], wanted: &Label) -> ReadBlock<'a> {
        let page = Page::read(slot, self.fingerprint).ok_or(ReadError::Label)?;
        // When it was used, and by which of the conversations that share it, is no part of what it is.
        let label = page.label();
        let same = (label.tenant, label.index, label.parent, label.hash)
            == (wanted.tenant, wanted.index, wanted.parent, wanted.hash);
        if !same {
            return Err(ReadError::Label);
        }
        let bytes = &slot[PAGE..][..self.block_bytes];
        if crc_fast::crc32_iscsi(bytes) != page.bytes_sum {
            return Err(ReadError::Checksum);
        }
        Ok((bytes, page.bytes_sum))
    }

    /// Overwrites slots with zeros: all bytes, and once that is on the disk, the labels, so that a slot that says nothing
    /// holds nothing. Says of each whether it is done.
    pub fn erase(&self, slots: &[u32], buffer: &Buffer) -> Vec<io::Result<()>> {
        buffer.room.with_bytes_mut(0, |room| {
            room.fill(0);
            let write = |slot: u32, from: usize, to: usize| {
                let (file, at) = self.place(slot);
                file.write_all_at(&room[from..to], at + from as u64)
            };
            let emptied = slots.iter().map(|slot| write(*slot, PAGE, self.slot_bytes()));
            let mut done: Vec<io::Result<()>> = emptied.collect();
            let mut and_then = |step: &dyn Fn(u32) -> io::Result<()>| {
                for (slot, done) in slots.iter().zip(&mut done).filter(|(_, done)| done.is_ok()) {
                    *done = step(*slot);
                }
            };
            and_then(&|slot| self.sync_once(slots, slot));
            and_then(&|slot| write(slot, 0, PAGE));
            and_then(&|slot| self.sync_once(slots, slot));
            done
        })
    }

    /// Syncs the file of a slot, if no slot before it in the list is in that file: one sync serves all.
    fn sync_once(&self, slots: &[u32], slot: u32) -> io::Result<()> {
        let file = |slot: u32| slot / self.slots_per_file;
        let first = slots.iter().find(|other| file(**other) == file(slot));
        if first == Some(&slot) { self.sync(std::iter::once(slot)) } else { Ok(()) }
    }

    /// Waits until all that was written to these slots is on the disk.
    pub fn sync(&self, slots: impl Iterator<Item = u32>) -> io::Result<()> {
        let mut files: Vec<u32> = slots.map(|slot| slot / self.slots_per_file).collect();
        files.sort_unstable();
        files.dedup();
        files.into_iter().try_for_each(|file| self.files[file as usize].sync_data())
    }

    /// Reads all labels, several at a time.
    fn scan(&self) -> io::Result<Contents> {
        let part = self.slots.div_ceil(SCANNERS).max(1);
        let starts = (0..self.slots).step_by(part as usize);
        let parts = std::thread::scope(|scope| {
            let scan = |start: u32| scope.spawn(move || self.scan_part(start..self.slots.min(start + part)));
            let threads: Vec<_> = starts.map(scan).collect();
            threads.into_iter().map(|thread| thread.join().map_err(|_| io::Error::other("a scan panicked"))?).collect()
        });
        let parts: io::Result<Vec<Contents>> = parts;
        Ok(parts?.into_iter().fold(Contents::default(), |mut all, part| {
            all.blocks.extend(part.blocks);
            all.unfinished.extend(part.unfinished);
            all
        }))
    }

    fn scan_part(&self, slots: std::ops::Range<u32>) -> io::Result<Contents> {
        let buffer = self.buffer()?;
        let mut found = Contents::default();
        buffer.room.with_bytes_mut(0, |room| {
            for slot in slots {
                let (file, at) = self.place(slot);
                let page = &mut room[..PAGE];
                // One that can't be read may hold anything.
                let read = file.read_exact_at(page, at);
                match Page::read(page, self.fingerprint).filter(|_| read.is_ok()) {
                    Some(page) => {
                        found.blocks.push(FoundSlot { slot, label: page.label(), bytes_sum: page.bytes_sum });
                    }
                    None if read.is_ok() && page.iter().all(|byte| *byte == 0) => {}
                    None => found.unfinished.push(slot),
                }
            }
        });
        Ok(found)
    }
}

fn lock(folder: &Path) -> Result<File, FolderError> {
    let path = folder.join("lock");
    let io = |source| FolderError::Io { path: path.clone(), source };
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(FolderError::Locked { path: folder.to_owned() }),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

/// Checks that the folder is a tier of this format and of this model; an empty one becomes it. Returns how many slots its
/// files have.
fn check_format(folder: &Path, block_bytes: usize, fingerprint: [u8; 32], usual: u32) -> Result<u32, FolderError> {
    let path = folder.join("format");
    let io = |source| FolderError::Io { path: path.clone(), source };
    let hex: String = fingerprint.iter().map(|byte| format!("{byte:02x}")).collect();
    let wanted = format!("blocks of {block_bytes} bytes, model {hex}");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let mut lines = text.lines();
            let (format, found) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
            let slots = lines.next().and_then(|line| line.strip_prefix(SLOTS_A_FILE)?.parse().ok());
            let short = |text: &str| text.chars().take(160).collect::<String>();
            match slots.filter(|slots| *slots > 0 && format == FORMAT) {
                None => Err(FolderError::Version { path: folder.to_owned(), found: short(format) }),
                Some(_) if found != wanted => {
                    Err(FolderError::Model { path: folder.to_owned(), found: short(found), wanted })
                }
                Some(slots) => Ok(slots),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let ours = |name: &std::ffi::OsStr| name == "lock" || name == "format.new" || name == "lost+found";
            let names = std::fs::read_dir(folder).map_err(io)?.filter_map(|entry| Some(entry.ok()?.file_name()));
            if names.into_iter().any(|name| !ours(&name)) {
                return Err(FolderError::Foreign { path: folder.to_owned() });
            }
            // Whole or not at all.
            let new = folder.join("format.new");
            std::fs::write(&new, format!("{FORMAT}\n{wanted}\n{SLOTS_A_FILE}{usual}\n")).map_err(io)?;
            File::open(&new).and_then(|file| file.sync_all()).map_err(io)?;
            std::fs::rename(&new, &path).map_err(io)?;
            Ok(usual)
        }
        Err(source) => Err(io(source)),
    }
}

fn file_path(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("slots.{number:04}"))
}

/// Makes the names in a folder as durable as what is in its files.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Opens a file past the page cache where the filesystem can; `direct` says whether it can.
fn open_file(path: &Path, direct: &mut bool) -> io::Result<File> {
    let open = |flags: i32| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(path)
    };
    if *direct {
        let flag = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
        match open(flag) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => *direct = false,
            opened => return opened,
        }
    }
    open(0)
}

/// Gives a file just this size, with room on the disk for all of it.
fn set_size(file: &File, bytes: u64) -> io::Result<()> {
    file.set_len(bytes)?;
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => return Ok(()),
            Err(error) if error == rustix::io::Errno::INTR => {}
            // A filesystem that reserves nothing: a full disk shows when it is written.
            Err(error) if error == rustix::io::Errno::OPNOTSUPP => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes the files of a larger tier, the last first, so that what is left has no gap.
fn remove_others(folder: &Path, files: usize) -> io::Result<()> {
    let names = std::fs::read_dir(folder)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let number = |name: String| name.strip_prefix("slots.")?.parse::<u32>().ok();
    let mut others: Vec<u32> = names.filter_map(number).filter(|number| *number as usize >= files).collect();
    others.sort_unstable_by(|a, b| b.cmp(a));
    others.into_iter().try_for_each(|number| std::fs::remove_file(file_path(folder, number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 5000;
    const MODEL: [u8; 32] = [7; 32];

    fn label(index: u32) -> Label {
        Label {
            tenant: [1; 16],
            conversation: 9,
            index,
            parent: [index as u8; 32],
            hash: [index as u8 + 1; 32],
            used: 40 + u64::from(index),
            ended: index % 2 == 1,
        }
    }

    fn bytes(seed: u8) -> Vec<u8> {
        (0..BLOCK).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
    }

    fn slots_of(bytes: usize) -> u64 {
        (bytes * (PAGE + 2 * PAGE)) as u64
    }

    fn open(folder: &Path, slots: usize) -> (Slots, Contents) {
        Slots::open(folder, slots_of(slots), BLOCK, MODEL).unwrap()
    }

    /// Writes a block into a slot, label and all.
    fn store(slots: &Slots, slot: u32, index: u32) {
        let buffer = slots.buffer().unwrap();
        let sum = slots.write(slot, &bytes(index as u8), &buffer).unwrap();
        slots.sync(std::iter::once(slot)).unwrap();
        slots.label(slot, &label(index), sum, &buffer).unwrap();
    }

    fn load(slots: &Slots, slot: u32, index: u32) -> Result<Vec<u8>, ReadError> {
        let (mut read, buffer) = (None, slots.buffer().unwrap());
        slots
            .read(slot, &[&label(index)], &buffer, &mut |_, found| read = Some(found.map(|(bytes, _)| bytes.to_vec())));
        read.unwrap()
    }

    #[test]
    fn what_was_labelled_is_found_again_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (slots, found) = open(folder.path(), 5);
        assert_eq!((slots.count(), found), (5, Contents::default()));
        store(&slots, 3, 0);
        store(&slots, 0, 1);
        // Bytes without a label: the process died between the two.
        slots.write(2, &bytes(9), &slots.buffer().unwrap()).unwrap();
        drop(slots);
        let (slots, found) = open(folder.path(), 5);
        let seen: Vec<_> = found.blocks.iter().map(|f| (f.slot, f.label.index, f.label.used, f.label.ended)).collect();
        assert_eq!(seen, [(0, 1, 41, true), (3, 0, 40, false)]);
        assert_eq!(found.unfinished, [2]);
        assert_eq!(found.blocks[1].bytes_sum, crc_fast::crc32_iscsi(&bytes(0)));
        assert_eq!(load(&slots, 3, 0).unwrap(), bytes(0));
        assert!(matches!(load(&slots, 2, 0), Err(ReadError::Label)));
        assert!(matches!(load(&slots, 0, 0), Err(ReadError::Label)), "another block of the conversation");
        let erased = slots.erase(&[3, 2], &slots.buffer().unwrap());
        assert!(erased.iter().all(Result::is_ok));
        assert!(matches!(load(&slots, 3, 0), Err(ReadError::Label)));
        let raw = std::fs::read(folder.path().join("slots.0000")).unwrap();
        assert!(raw[2 * 3 * PAGE..4 * 3 * PAGE].iter().all(|byte| *byte == 0), "forgotten bytes are gone");
    }

    #[test]
    fn every_changed_byte_of_a_slot_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let (slots, _) = open(folder.path(), 1);
        store(&slots, 0, 0);
        let file = OpenOptions::new().read(true).write(true).open(folder.path().join("slots.0000")).unwrap();
        let places = (0..LABEL_BYTES).chain((PAGE..PAGE + BLOCK).step_by(37));
        for at in places {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at as u64).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at as u64).unwrap();
            assert!(load(&slots, 0, 0).is_err(), "byte {at}");
            file.write_all_at(&byte, at as u64).unwrap();
        }
        assert_eq!(load(&slots, 0, 0).unwrap(), bytes(0));
    }

    /// Whatever happens to the files behind its back, the tier gives out what was stored, or an error.
    #[test]
    fn no_corruption_of_the_files_is_given_out() {
        const SLOTS: usize = 8;
        const CASES: u32 = 2_000;
        let slot_bytes = (3 * PAGE) as u64;
        let folder = tempfile::tempdir().unwrap();
        let (slots, _) = open(folder.path(), SLOTS);
        let other = tempfile::tempdir().unwrap();
        let (foreign, _) = Slots::open(other.path(), slots_of(SLOTS), BLOCK, [8; 32]).unwrap();
        for slot in 0..SLOTS as u32 {
            // What the slot held before, then what it holds now; and another model's, which looks alike.
            store(&slots, slot, slot + 100);
            store(&foreign, slot, slot);
        }
        let read = |path: &Path| std::fs::read(path.join("slots.0000")).unwrap();
        let (old, foreign) = (read(folder.path()), read(other.path()));
        (0..SLOTS as u32).for_each(|slot| store(&slots, slot, slot));
        let good = read(folder.path());
        let file = OpenOptions::new().read(true).write(true).open(folder.path().join("slots.0000")).unwrap();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut luck = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let mut noticed = 0;
        for case in 0..CASES {
            let slot = luck(SLOTS as u64);
            let at = slot * slot_bytes;
            let whole = at as usize..(at + slot_bytes) as usize;
            match case % 6 {
                0 => {
                    // Within the label or the bytes: what pads them means nothing.
                    let used = (LABEL_BYTES + BLOCK) as u64;
                    let place = luck(used);
                    let place = if place < LABEL_BYTES as u64 { place } else { place + (PAGE - LABEL_BYTES) as u64 };
                    let byte = good[(at + place) as usize] ^ (1 << luck(8));
                    file.write_all_at(&[byte], at + place).unwrap();
                }
                1 => {
                    let end = at + luck(PAGE as u64 + BLOCK as u64);
                    file.set_len(end).unwrap();
                    file.set_len(good.len() as u64).unwrap();
                }
                2 => {
                    let with = (slot + 1 + luck(SLOTS as u64 - 1)) % SLOTS as u64 * slot_bytes;
                    file.write_all_at(&good[with as usize..(with + slot_bytes) as usize], at).unwrap();
                }
                3 => file.write_all_at(&vec![0; slot_bytes as usize], at).unwrap(),
                4 => file.write_all_at(&old[whole], at).unwrap(),
                _ => file.write_all_at(&foreign[whole], at).unwrap(),
            }
            noticed += u32::from(load(&slots, slot as u32, slot as u32).is_err());
            file.write_all_at(&good, 0).unwrap();
            assert_eq!(load(&slots, slot as u32, slot as u32).unwrap(), bytes(slot as u8));
        }
        assert_eq!(noticed, CASES);
    }

    #[test]
    fn slots_that_follow_one_another_are_read_in_one_go_and_each_is_checked() {
        let folder = tempfile::tempdir().unwrap();
        let (slots, _) = open(folder.path(), 12);
        (0..12).for_each(|slot| store(&slots, slot, slot));
        let runs = [&[3][..], &[0, 1, 2, 4], &[5, 4], &[2, 3, 4, 5, 6, 7, 8, 9, 10, 11]];
        let lengths = runs.map(|run| slots.run(run.iter().copied()));
        assert_eq!(lengths, [1, 3, 1, RUN]);
        let labels: Vec<Label> = [4, 5, 99, 7].map(label).into();
        let mut read = Vec::new();
        slots.read(4, &labels.iter().collect::<Vec<_>>(), &slots.buffer().unwrap(), &mut |index, found| {
            read.push((index, found.map(|(found, _)| found.to_vec()).ok()));
        });
        assert_eq!(read, [(0, Some(bytes(4))), (1, Some(bytes(5))), (2, None), (3, Some(bytes(7)))]);
    }

    #[test]
    fn a_tier_may_grow_and_shrink() {
        let folder = tempfile::tempdir().unwrap();
        let (slots, _) = open(folder.path(), 2);
        store(&slots, 1, 0);
        drop(slots);
        let (slots, found) = open(folder.path(), 8);
        assert_eq!((slots.count(), found.blocks.len()), (8, 1));
        drop(slots);
        let (slots, found) = open(folder.path(), 1);
        assert_eq!((slots.count(), found), (1, Contents::default()));
    }

    #[test]
    fn a_folder_that_is_not_ours_or_of_another_model_is_refused_in_words() {
        let folder = tempfile::tempdir().unwrap();
        let said = |path: &Path, model| Slots::open(path, slots_of(2), BLOCK, model).map(drop).unwrap_err().to_string();
        let (slots, _) = open(folder.path(), 2);
        assert!(said(folder.path(), MODEL).contains("another process"));
        drop(slots);
        assert!(said(folder.path(), [8; 32]).contains("another model"));
        assert!(Slots::open(folder.path(), slots_of(2), BLOCK + 1, MODEL).is_err(), "blocks of another size");
        std::fs::write(folder.path().join("format"), "rekindle kv tier, format 0\nx").unwrap();
        assert!(said(folder.path(), MODEL).contains("another version"));
        let full = tempfile::tempdir().unwrap();
        std::fs::write(full.path().join("letters.txt"), "x").unwrap();
        assert!(said(full.path(), MODEL).contains("other things"));
        assert!(Slots::open(&full.path().join("none"), 10, BLOCK, MODEL).is_err(), "no room for a block");
    }
}
