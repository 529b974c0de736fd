//! How does history survive on one machine?
//!
//! SQLite in one file: WAL, `synchronous=FULL`. A durable commit costs one fsync in every library, so one thread owns the
//! writing connection and commits what waits as one group: each request in a savepoint of its own, so that one that
//! fails takes no other with it. Two more threads read.
//! Invariants: a write is answered after its group's fsync, never before. What a delete removed is in no file of the
//! store when the delete is answered. One process has a data folder at a time.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod records;
mod responses;
mod schema;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode, OptionalExtension};
use tokio::sync::{mpsc, oneshot};

use super::{
    Commit, ConversationRecord, Counted, ItemRecord, ListQuery, Listed, NewestOf, ResultRecord, Store, StoreError,
    StoreFuture, StoredConversation, StoredResponse,
};
use crate::telemetry::metrics;

/// Requests that wait for a thread; callers beyond that wait for room.
const QUEUE_DEPTH: usize = 1024;
/// Requests in one group, and how long one is filled: a group holds what waits already, and waits for nobody.
const GROUP_REQUESTS: usize = 256;
const GROUP_FILL: Duration = Duration::from_millis(2);
const READERS: usize = 2;

/// The embedded store. Dropping it, or `close`, finishes what was sent and leaves one tidy file.
pub struct Embedded {
    writes: Option<mpsc::Sender<Request>>,
    reads: Option<mpsc::Sender<Request>>,
    threads: Vec<JoinHandle<()>>,
    /// Locked while this process has the folder; the kernel lets go of it however the process ends.
    _lock: File,
}

impl Embedded {
    /// Opens the store in `data_dir`, and makes both if they aren't there (readable by this user only).
    ///
    /// Errors with `Locked` if another process has it, `Version` if another build wrote it, `Corrupt` if it is no store.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let failed = |reason: String| StoreError::Open { path: data_dir.display().to_string(), reason };
        DirBuilder::new().recursive(true).mode(0o700).create(data_dir).map_err(|e| failed(e.to_string()))?;
        let lock = lock(data_dir)?;
        let path = data_dir.join("rekindle.db");
        let writer = schema::open_writer(&path)?;
        // The folder's entries must be as durable as what is in the files.
        for folder in [Some(data_dir), data_dir.parent().filter(|p| !p.as_os_str().is_empty())].into_iter().flatten() {
            File::open(folder).and_then(|f| f.sync_all()).map_err(|e| failed(e.to_string()))?;
        }

        let mut threads = Vec::new();
        let (reads, queue) = mpsc::channel(QUEUE_DEPTH);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..READERS {
            let connection = schema::open_reader(&path)?;
            let queue = Arc::clone(&queue);
            threads.push(spawn("store-read", move || read_loop(&connection, &queue)).map_err(failed)?);
        }
        let (writes, queue) = mpsc::channel(QUEUE_DEPTH);
        threads.push(spawn("store-write", move || Writer { connection: writer, queue }.run()).map_err(failed)?);
        Ok(Self { writes: Some(writes), reads: Some(reads), threads, _lock: lock })
    }

    /// Commits what was sent, folds the log into the file, and ends; later calls are refused with `Closed`.
    pub async fn close(&self) -> Result<(), StoreError> {
        // Its place in the queue is behind everything sent before it.
        let (reply, closed) = oneshot::channel();
        let queue = self.writes.as_ref().ok_or(StoreError::Closed)?;
        queue.send(Request::Close(reply)).await.map_err(|_| StoreError::Closed)?;
        closed.await.map_err(|_| StoreError::Closed)?
    }

    async fn write<T: Send + 'static>(
        &self,
        erases: Erases,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        ask(self.writes.as_ref(), erases, work).await
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        ask(self.reads.as_ref(), Erases::Nothing, work).await
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        let join = |thread: JoinHandle<()>| {
            if thread.join().is_err() {
                tracing::error!("a thread of the store panicked");
            }
        };
        // Closed queues are drained, then the threads end. The writer's last: whichever connection is closed last folds the
        // log into the file and removes it, and a reader's may not.
        let writer = self.threads.pop();
        self.reads = None;
        self.threads.drain(..).for_each(join);
        self.writes = None;
        writer.into_iter().for_each(join);
    }
}

impl Store for Embedded {
    fn create(&self, conversation: ConversationRecord, items: Vec<(String, String)>) -> StoreFuture<'_, ()> {
        Box::pin(self.write(Erases::Nothing, move |db| records::create(db, &conversation, &items)))
    }

    fn begin(&self, conversation: ConversationRecord, commit: Commit) -> StoreFuture<'_, ()> {
        Box::pin(self.write(Erases::Nothing, move |db| {
            records::create(db, &conversation, &[])?;
            records::append(db, conversation.id, &commit)
        }))
    }

    fn census(&self) -> StoreFuture<'_, Vec<Counted>> {
        Box::pin(self.read(records::census))
    }

    fn conversations(&self, tenant: &str, query: ListQuery) -> StoreFuture<'_, Option<Vec<Listed>>> {
        let tenant = tenant.to_owned();
        Box::pin(self.read(move |db| records::list(db, &tenant, &query)))
    }

    fn conversation(&self, tenant: &str, id: u128) -> StoreFuture<'_, Option<ConversationRecord>> {
        let tenant = tenant.to_owned();
        Box::pin(self.read(move |db| records::conversation(db, &tenant, id)))
    }

    fn load(&self, tenant: &str, id: u128) -> StoreFuture<'_, Option<StoredConversation>> {
        let tenant = tenant.to_owned();
        Box::pin(self.read(move |db| records::load(db, &tenant, id)))
    }

    fn set_metadata(&self, tenant: &str, id: u128, metadata: BTreeMap<String, String>) -> StoreFuture<'_, bool> {
        let tenant = tenant.to_owned();
        // The old values count as deleted: they may be why a client replaces them.
        Box::pin(self.write(Erases::Old, move |db| records::set_metadata(db, &tenant, id, &metadata)))
    }

    fn commit(&self, id: u128, commit: Commit) -> StoreFuture<'_, ()> {
        let erases = if commit.remove.is_some() { Erases::Old } else { Erases::Nothing };
        Box::pin(self.write(erases, move |db| records::append(db, id, &commit)))
    }

    fn items(&self, conversation: u128, ids: Vec<String>) -> StoreFuture<'_, Vec<ItemRecord>> {
        Box::pin(self.read(move |db| records::items(db, conversation, &ids)))
    }

    fn item(&self, tenant: &str, id: &str) -> StoreFuture<'_, Option<ItemRecord>> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        Box::pin(self.read(move |db| records::item(db, &tenant, &id)))
    }

    fn response(&self, tenant: &str, id: u128) -> StoreFuture<'_, Option<StoredResponse>> {
        let tenant = tenant.to_owned();
        Box::pin(self.read(move |db| responses::find(db, &tenant, id)))
    }

    fn newest_response(&self, tenant: &str, of: NewestOf) -> StoreFuture<'_, Option<StoredResponse>> {
        let tenant = tenant.to_owned();
        Box::pin(self.read(move |db| responses::newest(db, &tenant, of)))
    }

    fn delete_response(&self, tenant: &str, id: u128) -> StoreFuture<'_, bool> {
        let tenant = tenant.to_owned();
        Box::pin(self.write(Erases::Old, move |db| responses::delete(db, &tenant, id)))
    }

    fn result(&self, key: [u8; 32], since: i64) -> StoreFuture<'_, Option<ResultRecord>> {
        Box::pin(self.read(move |db| responses::result(db, key, since)))
    }

    fn keep_result(&self, key: [u8; 32], at: i64, result: ResultRecord) -> StoreFuture<'_, ()> {
        Box::pin(self.write(Erases::Nothing, move |db| responses::keep_result(db, key, at, &result)))
    }

    fn sweep(&self, now: i64, results_since: i64) -> StoreFuture<'_, Vec<(String, u128)>> {
        Box::pin(self.write(Erases::Nothing, move |db| responses::sweep(db, now, results_since)))
    }

    fn delete_item(&self, id: u128, item: &str, log_keep: usize) -> StoreFuture<'_, bool> {
        let item = item.to_owned();
        Box::pin(self.write(Erases::Old, move |db| records::delete_item(db, id, &item, log_keep)))
    }

    fn delete(&self, tenant: &str, id: u128) -> StoreFuture<'_, bool> {
        let tenant = tenant.to_owned();
        Box::pin(self.write(Erases::Old, move |db| records::delete(db, &tenant, id)))
    }

    fn note(&self, name: &str) -> StoreFuture<'_, Option<Vec<u8>>> {
        let name = name.to_owned();
        Box::pin(self.read(move |db| {
            let mut found = db.prepare_cached("SELECT value FROM notes WHERE name = ?1")?;
            Ok(found.query_row([name], |row| row.get(0)).optional()?)
        }))
    }

    fn keep_note(&self, name: &str, value: Vec<u8>) -> StoreFuture<'_, ()> {
        let name = name.to_owned();
        Box::pin(self.write(Erases::Nothing, move |db| {
            let sql = "INSERT OR REPLACE INTO notes (name, value) VALUES (?1, ?2)";
            db.prepare_cached(sql)?.execute(rusqlite::params![name, value])?;
            Ok(())
        }))
    }

    fn ping(&self) -> StoreFuture<'_, ()> {
        // Through the writer, whose failure is what matters. It writes nothing, so it costs no fsync.
        Box::pin(self.write(Erases::Nothing, |db| Ok(db.query_row("SELECT 1", [], |_| Ok(()))?)))
    }
}

// ---- The queue and its threads

/// Whether a write removes what must not stay in the files.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Erases {
    Nothing,
    Old,
}

enum Request {
    Work(Box<dyn Work>, Erases),
    Close(oneshot::Sender<Result<(), StoreError>>),
}

/// A call of the store on its way through a thread.
trait Work: Send {
    /// Does it; false if it failed, and nothing of it may stay.
    fn run(&mut self, db: &Connection) -> bool;
    /// Tells the caller. `Err` is why nothing of the group was committed.
    fn answer(self: Box<Self>, group: Result<(), &str>);
}

struct Call<F, T> {
    work: Option<F>,
    result: Option<Result<T, StoreError>>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T: Send, F: FnOnce(&Connection) -> Result<T, StoreError> + Send> Work for Call<F, T> {
    fn run(&mut self, db: &Connection) -> bool {
        self.result = self.work.take().map(|work| work(db));
        matches!(self.result, Some(Ok(_)))
    }

    fn answer(self: Box<Self>, group: Result<(), &str>) {
        let result = match (self.result, group) {
            (Some(result), Ok(())) => result,
            (Some(Err(own)), Err(_)) => Err(own),
            (Some(Ok(_)) | None, Err(reason)) => Err(StoreError::Failed(reason.to_owned())),
            (None, Ok(())) => Err(StoreError::Failed("the request was not run".to_owned())),
        };
        // Nobody listens if the caller was cancelled; what was committed stands all the same.
        drop(self.reply.send(result));
    }
}

async fn ask<T: Send + 'static>(
    queue: Option<&mpsc::Sender<Request>>,
    erases: Erases,
    work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let (reply, answer) = oneshot::channel();
    let call = Box::new(Call { work: Some(work), result: None, reply });
    let queue = queue.ok_or(StoreError::Closed)?;
    queue.send(Request::Work(call, erases)).await.map_err(|_| StoreError::Closed)?;
    answer.await.map_err(|_| StoreError::Closed)?
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, String> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|error| error.to_string())
}

fn read_loop(connection: &Connection, queue: &Mutex<mpsc::Receiver<Request>>) {
    loop {
        // Locked while it waits for work, not while it does it: the readers take turns.
        let request = queue.lock().blocking_recv();
        match request {
            Some(Request::Work(mut work, _)) => {
                work.run(connection);
                work.answer(Ok(()));
            }
            Some(Request::Close(reply)) => drop(reply.send(Ok(()))),
            None => return,
        }
    }
}

struct Writer {
    connection: Connection,
    queue: mpsc::Receiver<Request>,
}

impl Writer {
    fn run(mut self) {
        while let Some(first) = self.queue.blocking_recv() {
            let mut next = Some(first);
            while let Some(request) = next.take() {
                match request {
                    Request::Work(work, erases) => next = self.commit_group(work, erases),
                    Request::Close(reply) => {
                        self.queue.close();
                        drop(reply.send(schema::tidy(&self.connection)));
                    }
                }
            }
        }
        if let Err(error) = schema::tidy(&self.connection) {
            tracing::warn!(%error, "the store ended without folding its log into the file");
        }
    }

    /// Runs a request and what waits behind it as one transaction, then answers all. Gives back a request that it took
    /// and that is none of the group.
    fn commit_group(&mut self, first: Box<dyn Work>, erases: Erases) -> Option<Request> {
        let started = Instant::now();
        let mut group = Vec::new();
        let mut erased = false;
        let mut left_over = None;
        let mut next = Some((first, erases));
        let mut outcome = self.connection.execute_batch("BEGIN IMMEDIATE");
        while let Some((mut work, erases)) = next.take() {
            if outcome.is_ok() {
                outcome = run_in_savepoint(&self.connection, work.as_mut())
                    .map(|kept| erased |= kept && erases == Erases::Old);
            }
            group.push(work);
            if outcome.is_err() || group.len() == GROUP_REQUESTS || started.elapsed() > GROUP_FILL {
                break;
            }
            match self.queue.try_recv() {
                Ok(Request::Work(work, erases)) => next = Some((work, erases)),
                Ok(close @ Request::Close(_)) => left_over = Some(close),
                Err(_) => {}
            }
        }
        let outcome = outcome.and_then(|()| self.connection.execute_batch("COMMIT"));
        let outcome = outcome.map_err(|error| {
            tracing::error!(%error, requests = group.len(), "a group of writes was not committed");
            metrics::STORE_FAILED_COMMITS.add(1, &[]);
            // SQLite has rolled back by itself after some errors.
            if !self.connection.is_autocommit()
                && let Err(error) = self.connection.execute_batch("ROLLBACK")
            {
                tracing::error!(%error, "the failed group could not be rolled back");
            }
            error.to_string()
        });
        if erased && outcome.is_ok() {
            schema::erase(&self.connection);
        }
        metrics::STORE_GROUP_REQUESTS.record(group.len() as f64, &[]);
        metrics::STORE_COMMIT_SECONDS.record(started.elapsed().as_secs_f64(), &[]);
        for work in group {
            work.answer(outcome.as_ref().map(|_| ()).map_err(String::as_str));
        }
        left_over
    }
}

/// Runs one request of a group; false if it failed and was taken back. An error means that the whole group is lost: a
/// full disk, for one, makes SQLite roll back everything since BEGIN.
fn run_in_savepoint(db: &Connection, work: &mut dyn Work) -> rusqlite::Result<bool> {
    db.execute_batch("SAVEPOINT request")?;
    let kept = work.run(db);
    if !kept {
        db.execute_batch("ROLLBACK TO request")?;
    }
    db.execute_batch("RELEASE request")?;
    Ok(kept)
}

/// Takes the folder for this process. The kernel gives it back however the process ends.
fn lock(data_dir: &Path) -> Result<File, StoreError> {
    let path = data_dir.join("rekindle.lock");
    let failed = |reason: String| StoreError::Open { path: path.display().to_string(), reason };
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.map_err(|error| failed(error.to_string()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked { path: data_dir.display().to_string() }),
        Err(TryLockError::Error(error)) => Err(failed(error.to_string())),
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, Utf8Error};
        let unreadable = match &error {
            FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) | Utf8Error(..) => true,
            other => {
                matches!(other.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
            }
        };
        if unreadable { Self::Corrupt(error.to_string()) } else { Self::Failed(error.to_string()) }
    }
}
