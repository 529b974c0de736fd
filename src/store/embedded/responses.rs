//! How do responses, and the results of requests that must not happen twice, lie in the tables?
//!
//! A response belongs to the conversation that its items are in, and goes with it. Rows are read back as input: a digest
//! or an id of the wrong length is an error, not a panic.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::StoreError;
use crate::store::{NewestOf, ResponseRecord, ResultRecord, StoredResponse};

/// Adds a response, or puts it in the place of the one with its id.
pub(super) fn put(db: &Connection, conversation: i64, response: &ResponseRecord) -> Result<(), StoreError> {
    let ResponseRecord { id, created_at, expires_at, kept, request, previous, body, answer, logprobs } = response;
    db.prepare_cached(
        "INSERT INTO responses
             (id, conversation, created_at, expires_at, kept, request, previous, body, answer, logprobs)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
         ON CONFLICT (id) DO UPDATE SET body = ?8, answer = ?9, logprobs = ?10",
    )?
    .execute(params![
        id.to_be_bytes(),
        conversation,
        created_at,
        expires_at,
        kept,
        request,
        previous.map(u128::to_be_bytes),
        body,
        answer,
        logprobs
    ])?;
    Ok(())
}

const COLUMNS: &str = "responses.id, responses.created_at, expires_at, kept, request, previous, body, answer, logprobs,
    conversations.id, conversations.chain";

fn read(row: &Row<'_>) -> rusqlite::Result<StoredResponse> {
    let response = ResponseRecord {
        id: u128::from_be_bytes(row.get(0)?),
        created_at: row.get(1)?,
        expires_at: row.get(2)?,
        kept: row.get(3)?,
        request: row.get(4)?,
        previous: row.get::<_, Option<[u8; 16]>>(5)?.map(u128::from_be_bytes),
        body: row.get(6)?,
        answer: row.get(7)?,
        logprobs: row.get(8)?,
    };
    Ok(StoredResponse { response, conversation: u128::from_be_bytes(row.get(9)?), chain: row.get(10)? })
}

pub(super) fn find(db: &Connection, tenant: &str, id: u128) -> Result<Option<StoredResponse>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS} FROM responses JOIN conversations ON conversations.row = conversation
         WHERE responses.id = ?1 AND tenant = ?2"
    );
    Ok(db.prepare_cached(&sql)?.query_row(params![id.to_be_bytes(), tenant], read).optional()?)
}

pub(super) fn newest(db: &Connection, tenant: &str, of: NewestOf) -> Result<Option<StoredResponse>, StoreError> {
    let (which, id) = match of {
        NewestOf::Conversation(id) => ("conversations.id", id),
        NewestOf::Continuations(id) => ("previous", id),
    };
    let sql = format!(
        "SELECT {COLUMNS} FROM responses JOIN conversations ON conversations.row = conversation
         WHERE {which} = ?1 AND tenant = ?2 ORDER BY responses.row DESC LIMIT 1"
    );
    Ok(db.prepare_cached(&sql)?.query_row(params![id.to_be_bytes(), tenant], read).optional()?)
}

pub(super) fn delete(db: &Connection, tenant: &str, id: u128) -> Result<bool, StoreError> {
    let sql = "DELETE FROM responses WHERE id = ?1
               AND conversation IN (SELECT row FROM conversations WHERE tenant = ?2)";
    Ok(db.prepare_cached(sql)?.execute(params![id.to_be_bytes(), tenant])? == 1)
}

pub(super) fn result(db: &Connection, key: [u8; 32], since: i64) -> Result<Option<ResultRecord>, StoreError> {
    let sql = "SELECT request, body FROM results WHERE key = ?1 AND at >= ?2";
    let read = |row: &Row<'_>| Ok(ResultRecord { request: row.get(0)?, body: row.get(1)? });
    Ok(db.prepare_cached(sql)?.query_row(params![key, since], read).optional()?)
}

pub(super) fn keep_result(db: &Connection, key: [u8; 32], at: i64, result: &ResultRecord) -> Result<(), StoreError> {
    db.prepare_cached("INSERT OR REPLACE INTO results (key, at, request, body) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![key, at, result.request, result.body])?;
    Ok(())
}

/// Chains that one sweep gives back: each is deleted by itself afterwards.
const SWEPT_CHAINS: usize = 256;

pub(super) fn sweep(db: &Connection, now: i64, results_since: i64) -> Result<Vec<(String, u128)>, StoreError> {
    db.prepare_cached("DELETE FROM responses WHERE expires_at < ?1")?.execute([now])?;
    db.prepare_cached("DELETE FROM results WHERE at < ?1")?.execute([results_since])?;
    let sql = format!(
        "SELECT tenant, id FROM conversations WHERE chain = 1
         AND NOT EXISTS (SELECT 1 FROM responses WHERE conversation = conversations.row) LIMIT {SWEPT_CHAINS}"
    );
    let mut chains = db.prepare_cached(&sql)?;
    let chains = chains.query_map([], |row| Ok((row.get(0)?, u128::from_be_bytes(row.get(1)?))))?;
    Ok(chains.collect::<Result<_, _>>()?)
}
