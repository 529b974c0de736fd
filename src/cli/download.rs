//! How does a file come whole over a connection that may break?
//!
//! Bytes gather in `NAME.part`, and what the server says of their version (`ETag`, else `Last-Modified`) beside it in
//! `NAME.part.version`. The next run asks for the rest, provided that the version is still that; a server that can't do
//! so sends the file from its start. Invariant: bytes of two versions are never joined.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use aws_lc_rs::digest;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, IF_RANGE, LAST_MODIFIED, RANGE};
use reqwest::{Client, Response, StatusCode, Url};

/// Longest wait for a connection, and for the next bytes of one.
const PATIENCE: Duration = Duration::from_secs(60);

/// A file being received. Locked: a second process that wants it is refused.
#[derive(Debug)]
pub struct Part {
    path: PathBuf,
    version_path: PathBuf,
    file: File,
}

impl Part {
    /// Opens what there is of the file that will be `target`, or an empty one.
    pub fn open(target: &Path) -> Result<Self> {
        let beside = |suffix: &str| {
            let mut name = target.file_name().unwrap_or_default().to_owned();
            name.push(suffix);
            target.with_file_name(name)
        };
        let (path, version_path) = (beside(".part"), beside(".part.version"));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.with_context(|| format!("can't write {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { path, version_path, file }),
            Err(TryLockError::WouldBlock) => bail!("another process is pulling {}; wait for it", target.display()),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("can't lock {}", path.display())),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Receives what is missing. An error leaves what has come, and says how to go on.
    pub async fn receive(&mut self, url: &Url, bearer: Option<&str>) -> Result<()> {
        let client = Client::builder().connect_timeout(PATIENCE).read_timeout(PATIENCE).build()?;
        let have = self.file.seek(SeekFrom::End(0))?;
        let version = std::fs::read_to_string(&self.version_path).ok().filter(|_| have > 0);
        let ask = |from: Option<(u64, &str)>| {
            let mut request = client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
            if let Some(token) = bearer {
                request = request.bearer_auth(token);
            }
            if let Some((have, version)) = from {
                request = request.header(RANGE, format!("bytes={have}-")).header(IF_RANGE, version);
            }
            request.send()
        };
        let mut response = ask(version.as_deref().map(|version| (have, version))).await?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            let (_, total) = content_range(response.headers());
            if total == Some(have) {
                return Ok(());
            }
            response = ask(None).await?;
        }
        let (start, total) = match response.status() {
            StatusCode::OK => (0, response.content_length()),
            StatusCode::PARTIAL_CONTENT => match content_range(response.headers()) {
                (Some(start), total) if start == have => (have, total),
                _ => bail!("{url} sent another part than was asked for; remove {} and run again", self.path.display()),
            },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                bail!("{url}: {}; a private or gated model needs a token in HF_TOKEN", response.status())
            }
            status => bail!("{url}: {status}"),
        };
        if start == 0 {
            self.file.set_len(0)?;
            self.file.rewind()?;
            match version_of(response.headers()) {
                Some(version) => std::fs::write(&self.version_path, version)?,
                None => remove(&self.version_path)?,
            }
        }
        self.append(response, start, total).await
    }

    async fn append(&mut self, mut response: Response, start: u64, total: Option<u64>) -> Result<()> {
        let mut progress = Progress::new(start, total);
        let mut have = start;
        let broken = loop {
            match response.chunk().await {
                Ok(Some(bytes)) => {
                    self.file.write_all(&bytes).with_context(|| format!("can't write {}", self.path.display()))?;
                    have += bytes.len() as u64;
                    progress.reach(have);
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        progress.finish();
        if broken.is_none() && total.is_none_or(|total| have == total) {
            return Ok(());
        }
        let reason = broken.map(|error| format!(" ({})", error.without_url())).unwrap_or_default();
        let of = total.map(|total| format!(" of {}", HumanBytes(total))).unwrap_or_default();
        bail!("the connection broke after {}{of}{reason}; run again to go on", HumanBytes(have))
    }

    /// Fills the part with a local file's bytes, sharing them where the file system can.
    pub fn copy_from(&mut self, source: &Path) -> Result<()> {
        let mut from = File::open(source).with_context(|| format!("can't open {}", source.display()))?;
        self.file.set_len(0)?;
        self.file.rewind()?;
        std::io::copy(&mut from, &mut self.file).with_context(|| format!("can't copy {}", source.display()))?;
        remove(&self.version_path)
    }

    /// The whole part's SHA-256 in hex.
    pub fn sha256(&mut self) -> Result<String> {
        self.file.rewind()?;
        sha256_of(&mut self.file).with_context(|| format!("can't read {}", self.path.display()))
    }

    /// Makes the part the file itself, durably, in one step.
    pub fn finish(self, target: &Path) -> Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.path, target).with_context(|| format!("can't write {}", target.display()))?;
        remove(&self.version_path)?;
        if let Some(folder) = target.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }

    /// Gives up what has come.
    pub fn discard(self) -> Result<()> {
        remove(&self.path)?;
        remove(&self.version_path)
    }
}

/// SHA-256 of all that can be read, in hex.
pub fn sha256_of(from: &mut impl Read) -> std::io::Result<String> {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer)? {
            0 => break,
            bytes => context.update(buffer.get(..bytes).unwrap_or_default()),
        }
    }
    Ok(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("can't remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What a range may depend on: a strong `ETag`, else `Last-Modified`.
fn version_of(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::to_owned);
    text(ETAG).filter(|etag| !etag.starts_with("W/")).or_else(|| text(LAST_MODIFIED))
}

/// First byte and total length of `bytes 5-9/10`, `bytes 5-9/*`, `bytes */10`.
fn content_range(headers: &HeaderMap) -> (Option<u64>, Option<u64>) {
    let range = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok()?.strip_prefix("bytes "));
    let Some((range, total)) = range.and_then(|range| range.split_once('/')) else { return (None, None) };
    (range.split_once('-').and_then(|(start, _)| start.parse().ok()), total.parse().ok())
}

/// How far it is: a bar on a terminal, else a line each tenth.
enum Progress {
    Bar(ProgressBar),
    Lines { total: u64, next_tenth: u64 },
    Silent,
}

impl Progress {
    fn new(start: u64, total: Option<u64>) -> Self {
        match (total, std::io::stderr().is_terminal()) {
            (_, true) => {
                let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new).with_position(start);
                let style = "{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} to go";
                if let (Ok(style), Some(_)) = (ProgressStyle::with_template(style), total) {
                    bar.set_style(style);
                }
                Self::Bar(bar)
            }
            (Some(total), false) if total > 0 => Self::Lines { total, next_tenth: start * 10 / total + 1 },
            _ => Self::Silent,
        }
    }

    fn reach(&mut self, have: u64) {
        match self {
            Self::Bar(bar) => bar.set_position(have),
            Self::Lines { total, next_tenth } => {
                let tenth = have.saturating_mul(10) / *total;
                if tenth >= *next_tenth {
                    eprintln!("{} % of {}", tenth * 10, HumanBytes(*total));
                    *next_tenth = tenth + 1;
                }
            }
            Self::Silent => {}
        }
    }

    fn finish(self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
