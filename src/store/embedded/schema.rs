//! Which tables does the store have, and under which settings are they opened?
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::StoreError;

/// What this build reads and writes; in the file's `user_version`.
pub(super) const VERSION: i64 = 4;
/// Marks the file as ours: "rkdl".
const APPLICATION_ID: i64 = 0x726b_646c;
/// A checkpoint waits this long for the readers' transactions, which take milliseconds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

const TABLES: &str = "
    CREATE TABLE conversations (
        row          INTEGER PRIMARY KEY,
        id           BLOB    NOT NULL UNIQUE,   -- 16 bytes, big-endian
        tenant       TEXT    NOT NULL,
        created_at   INTEGER NOT NULL,          -- seconds since 1970
        last_used_at INTEGER NOT NULL,
        metadata     TEXT    NOT NULL,          -- a JSON object of strings
        next_seq     INTEGER NOT NULL,          -- of the next item; never given twice
        log_tokens   INTEGER NOT NULL,          -- length of the token log
        encoded      INTEGER NOT NULL,          -- at most log_tokens
        chain        INTEGER NOT NULL DEFAULT 0 -- 1: made for responses, and without a name
    ) STRICT;
    CREATE INDEX conversations_by_use ON conversations (tenant, last_used_at);
    CREATE TABLE items (
        conversation INTEGER NOT NULL REFERENCES conversations ON DELETE CASCADE,
        seq          INTEGER NOT NULL,
        id           TEXT    NOT NULL,
        body         TEXT    NOT NULL,
        PRIMARY KEY (conversation, seq),
        UNIQUE (conversation, id)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE log_chunks (
        conversation INTEGER NOT NULL REFERENCES conversations ON DELETE CASCADE,
        chunk        INTEGER NOT NULL,
        tokens       BLOB    NOT NULL,
        PRIMARY KEY (conversation, chunk)
    ) STRICT, WITHOUT ROWID;
";

/// What version 2 added.
const RESPONSES: &str = "
    CREATE TABLE responses (
        row          INTEGER PRIMARY KEY,       -- in the order they were made
        id           BLOB    NOT NULL UNIQUE,   -- 16 bytes, big-endian
        conversation INTEGER NOT NULL REFERENCES conversations ON DELETE CASCADE,
        created_at   INTEGER NOT NULL,
        expires_at   INTEGER NOT NULL,
        kept         INTEGER NOT NULL,
        request      BLOB    NOT NULL,          -- 32 bytes
        previous     BLOB,
        body         TEXT    NOT NULL,
        answer       TEXT,                      -- the item that it made
        logprobs     TEXT
    ) STRICT;
    CREATE INDEX items_by_id ON items (id);
    CREATE INDEX responses_of_conversations ON responses (conversation);
    CREATE INDEX responses_by_previous ON responses (previous) WHERE previous IS NOT NULL;
    CREATE INDEX responses_by_expiry ON responses (expires_at);
    CREATE TABLE results (
        key          BLOB    PRIMARY KEY,       -- 32 bytes
        at           INTEGER NOT NULL,
        request      BLOB    NOT NULL,          -- 32 bytes
        body         BLOB    NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX results_by_age ON results (at);
";

/// What version 3 added.
const NOTES: &str = "
    CREATE TABLE notes (
        name         TEXT    PRIMARY KEY,
        value        BLOB    NOT NULL
    ) STRICT, WITHOUT ROWID;
";

/// What version 4 added; neither is known of conversations from before it.
const LINEAGE: &str = "
    ALTER TABLE conversations ADD COLUMN parent BLOB;   -- the conversation that it branched off, while that is there
    ALTER TABLE conversations ADD COLUMN turns INTEGER; -- the number of its newest turn
    CREATE INDEX conversations_by_parent ON conversations (parent) WHERE parent IS NOT NULL;
";

/// Opens the one connection that writes, and makes the tables in a new file.
pub(super) fn open_writer(path: &Path) -> Result<Connection, StoreError> {
    let db = Connection::open(path).map_err(|error| open_error(path, &error))?;
    prepare_writer(&db, path).map_err(|error| match error {
        PrepareError::Sqlite(error) => open_error(path, &error),
        PrepareError::Store(error) => error,
    })?;
    Ok(db)
}

/// Opens a connection that only reads. It maps the file, so that a read copies each page once.
pub(super) fn open_reader(path: &Path) -> Result<Connection, StoreError> {
    let open = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(path, flags)?;
        db.busy_timeout(BUSY_TIMEOUT)?;
        db.execute_batch("PRAGMA query_only = ON; PRAGMA cache_size = -16384; PRAGMA mmap_size = 1073741824;")?;
        Ok(db)
    };
    open().map_err(|error| open_error(path, &error))
}

/// Makes sure that what the last transaction deleted is in no file: its pages, zeroed by `secure_delete`, go into the
/// database file, and the log, where their old contents are, is cut to nothing.
pub(super) fn erase(db: &Connection) {
    match checkpoint(db) {
        Ok(true) => {}
        // The next delete, the next checkpoint or the end does it.
        Ok(false) => tracing::warn!("a long read keeps deleted text in the store's log for now"),
        Err(error) => tracing::error!(%error, "deleted text stays in the store's log"),
    }
}

/// Gives free pages back to the file system, and folds the log into the file.
pub(super) fn tidy(db: &Connection) -> Result<(), StoreError> {
    let mut vacuum = db.prepare("PRAGMA incremental_vacuum")?;
    let mut steps = vacuum.query([])?;
    while steps.next()?.is_some() {} // a page a step
    if checkpoint(db)? {
        Ok(())
    } else {
        Err(StoreError::Failed("the log is still read, so it could not be folded into the file".to_owned()))
    }
}

/// False if a reader was in the way.
fn checkpoint(db: &Connection) -> rusqlite::Result<bool> {
    db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| Ok(row.get::<_, i64>(0)? == 0))
}

enum PrepareError {
    Sqlite(rusqlite::Error),
    Store(StoreError),
}

impl From<rusqlite::Error> for PrepareError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

fn prepare_writer(db: &Connection, path: &Path) -> Result<(), PrepareError> {
    db.busy_timeout(BUSY_TIMEOUT)?;
    // These two shape the file, so they come before anything is written to it.
    db.execute_batch("PRAGMA page_size = 8192; PRAGMA auto_vacuum = INCREMENTAL;")?;
    db.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON; PRAGMA foreign_keys = ON;
         PRAGMA cache_size = -131072; PRAGMA wal_autocheckpoint = 16000;",
    )?;
    let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let application: i64 = db.query_row("PRAGMA application_id", [], |row| row.get(0))?;
    let tables: i64 = db.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    let path = || path.display().to_string();
    match (application, version, tables) {
        (APPLICATION_ID, VERSION, _) => Ok(()),
        (APPLICATION_ID, 1, _) => Ok(db.execute_batch(&format!(
            "BEGIN; ALTER TABLE conversations ADD COLUMN chain INTEGER NOT NULL DEFAULT 0; {RESPONSES} {NOTES} {LINEAGE}
             PRAGMA user_version = {VERSION}; COMMIT;"
        ))?),
        (APPLICATION_ID, 2, _) => {
            Ok(db.execute_batch(&format!("BEGIN; {NOTES} {LINEAGE} PRAGMA user_version = {VERSION}; COMMIT;"))?)
        }
        (APPLICATION_ID, 3, _) => {
            Ok(db.execute_batch(&format!("BEGIN; {LINEAGE} PRAGMA user_version = {VERSION}; COMMIT;"))?)
        }
        (APPLICATION_ID, found, _) => {
            Err(PrepareError::Store(StoreError::Version { path: path(), found, expected: VERSION }))
        }
        // New, or its first start was cut off before the tables were there: all of this is one transaction.
        (0, 0, 0) => Ok(db.execute_batch(&format!(
            "BEGIN; {TABLES} {RESPONSES} {NOTES} {LINEAGE} PRAGMA application_id = {APPLICATION_ID};
             PRAGMA user_version = {VERSION}; COMMIT;"
        ))?),
        _ => {
            let reason = "it is a SQLite file, but not a store of rekindle".to_owned();
            Err(PrepareError::Store(StoreError::Open { path: path(), reason }))
        }
    }
}

fn open_error(path: &Path, error: &rusqlite::Error) -> StoreError {
    StoreError::Open { path: path.display().to_string(), reason: error.to_string() }
}
