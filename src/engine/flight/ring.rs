//! How does the record lie on disk, within its bound, and whole after any end of the process?
//!
//! A folder of numbered files, one a *part*: a magic number, then *chunks*, each with its length and a CRC-32C. The first
//! chunk says which run it is of, which part of that, and what the run began with. The oldest files go when there is no
//! room. A chunk is one write: what a killed process leaves is whole chunks and at most one that is not, which ends the part.
//! Reading a folder that is being written gives what was written when it was looked at.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Beginning;
use super::bytes::{Cursor, put};

const MAGIC: &[u8; 8] = b"rkflight";
/// Of the format: a change of anything that is written is another one.
const VERSION: u8 = 1;
const SUFFIX: &str = "flight";
/// A part is this part of the bound, so that about that much is lost when the oldest one goes, and no more than that: its
/// blocks' names are kept in memory while it is written.
const PARTS: u64 = 8;
const LARGEST_PART: u64 = 64 << 20;
/// Files at most: many short runs leave many short ones.
const MOST_FILES: usize = 256;
/// Before a chunk: its length, and its sum.
const FRAME: usize = 8;

/// Which part of which run.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// Drawn anew for each run.
    pub run: u64,
    /// From 0.
    pub part: u64,
    pub beginning: Beginning,
}

impl Head {
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        put(&mut out, self.run);
        put(&mut out, self.part);
        self.beginning.put(&mut out);
        out
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let mut cursor = Cursor::new(bytes);
        (cursor.byte()? == VERSION).then_some(())?;
        Some(Self { run: cursor.number()?, part: cursor.number()?, beginning: Beginning::read(&mut cursor)? })
    }
}

fn path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:010}.{SUFFIX}"))
}

/// The record's files in a folder, oldest first: number and bytes.
fn list(folder: &Path) -> io::Result<Vec<(u64, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)?.strip_suffix('.')?.parse().ok());
        if let Some(number) = number {
            files.push((number, entry.metadata()?.len()));
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// The writing end.
#[derive(Debug)]
pub struct Ring {
    folder: PathBuf,
    bound: u64,
    /// Oldest first; the last is the one that is written, if one is.
    files: VecDeque<(u64, u64)>,
    current: Option<File>,
}

impl Ring {
    /// Goes on after what earlier processes left.
    pub fn open(folder: &Path, bound: u64) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        Ok(Self { folder: folder.to_owned(), bound, files: list(folder)?.into(), current: None })
    }

    /// The largest chunk that may be written.
    pub fn largest(&self) -> usize {
        usize::try_from(self.part_bytes()).unwrap_or(usize::MAX)
    }

    fn part_bytes(&self) -> u64 {
        (self.bound / PARTS).min(LARGEST_PART)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Whether the part that is being written has its length, or there is none.
    pub fn wants_part(&self) -> bool {
        let length = self.files.back().map_or(0, |(_, bytes)| *bytes);
        self.current.is_none() || length >= self.part_bytes()
    }

    pub fn begin_part(&mut self, head: &Head) -> io::Result<()> {
        self.current = None;
        let bytes = [MAGIC.as_slice(), &framed(&head.to_bytes())].concat();
        self.make_room(bytes.len() as u64)?;
        while self.files.len() >= MOST_FILES {
            self.drop_oldest()?;
        }
        let number = self.files.back().map_or(1, |(number, _)| number + 1);
        let path = path(&self.folder, number);
        let mut file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path)?;
        if let Err(error) = file.write_all(&bytes) {
            // Nobody can read it, and as one of the files it would take a good one's place.
            fs::remove_file(&path)?;
            return Err(error);
        }
        self.files.push_back((number, bytes.len() as u64));
        self.current = Some(file);
        Ok(())
    }

    /// Adds a chunk to the part. After an error the part is over.
    pub fn append(&mut self, chunk: &[u8]) -> io::Result<()> {
        let bytes = framed(chunk);
        self.make_room(bytes.len() as u64)?;
        let mut file = self.current.take().ok_or(io::ErrorKind::NotFound)?;
        let written = file.write_all(&bytes);
        if let Some((_, length)) = self.files.back_mut() {
            // Of a chunk that failed, part may be there.
            *length += bytes.len() as u64;
        }
        written?;
        self.current = Some(file);
        Ok(())
    }

    /// Removes the oldest files, though never the one that is written, until there is room.
    fn make_room(&mut self, bytes: u64) -> io::Result<()> {
        while self.bytes() + bytes > self.bound && self.files.len() > usize::from(self.current.is_some()) {
            self.drop_oldest()?;
        }
        Ok(())
    }

    fn drop_oldest(&mut self) -> io::Result<()> {
        let Some((number, _)) = self.files.pop_front() else { return Ok(()) };
        match fs::remove_file(path(&self.folder, number)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

fn framed(chunk: &[u8]) -> Vec<u8> {
    let length = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(FRAME + chunk.len());
    bytes.extend(length.to_le_bytes());
    bytes.extend(crc_fast::crc32_iscsi(chunk).to_le_bytes());
    bytes.extend_from_slice(chunk);
    bytes
}

/// A part that was read.
#[derive(Debug)]
pub struct Part {
    pub number: u64,
    pub head: Head,
    /// Its entries, chunk after chunk.
    pub chunks: Vec<Vec<u8>>,
    /// Where it stops being whole, if it does.
    pub torn_at: Option<u64>,
}

/// Why there is nothing to read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("there is no flight record in {}: no server has run with this data folder, or with `engine.flight_record_bytes` = 0", .0.display())]
    None(PathBuf),
    #[error("the flight record in {} can't be read", folder.display())]
    Unreadable { folder: PathBuf, source: io::Error },
}

/// All parts in a folder that can be read, oldest first, and the names of files that can't.
pub fn read(folder: &Path) -> Result<(Vec<Part>, Vec<String>), ReadError> {
    let unreadable = |source| ReadError::Unreadable { folder: folder.to_owned(), source };
    let files = match list(folder) {
        Ok(files) if !files.is_empty() => files,
        Ok(_) => return Err(ReadError::None(folder.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ReadError::None(folder.to_owned())),
        Err(error) => return Err(unreadable(error)),
    };
    let (mut parts, mut refused) = (Vec::new(), Vec::new());
    for (number, _) in files {
        let bytes = match fs::read(path(folder, number)) {
            Ok(bytes) => bytes,
            // The server that writes it has just let it go.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(unreadable(error)),
        };
        match part(number, &bytes) {
            Some(part) => parts.push(part),
            None => refused.push(format!("{number:010}.{SUFFIX}")),
        }
    }
    Ok((parts, refused))
}

fn part(number: u64, bytes: &[u8]) -> Option<Part> {
    let mut cursor = Cursor::new(bytes.strip_prefix(MAGIC)?);
    let mut at = MAGIC.len() as u64;
    let mut next = |cursor: &mut Cursor<'_>| {
        let chunk = chunk(cursor)?;
        at += (FRAME + chunk.len()) as u64;
        Some((at, chunk.to_vec()))
    };
    let (mut whole, head) = next(&mut cursor)?;
    let head = Head::read(&head)?;
    let mut chunks = Vec::new();
    while let Some((end, chunk)) = next(&mut cursor) {
        whole = end;
        chunks.push(chunk);
    }
    let torn_at = (whole < bytes.len() as u64).then_some(whole);
    Some(Part { number, head, chunks, torn_at })
}

fn chunk<'a>(cursor: &mut Cursor<'a>) -> Option<&'a [u8]> {
    let length = u32::from_le_bytes(cursor.array()?);
    let sum = u32::from_le_bytes(cursor.array()?);
    let chunk = cursor.bytes(usize::try_from(length).ok()?)?;
    (crc_fast::crc32_iscsi(chunk) == sum).then_some(chunk)
}
