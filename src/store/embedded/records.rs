//! How does a conversation lie in the tables, and how does each call change it?
//!
//! Bytes read back from our own disk are input: what doesn't fit is `Corrupt`, with the conversation's name.
//! Invariants: a log has exactly `log_tokens` tokens, in chunks of `CHUNK_TOKENS` of which only the last may be short;
//! `encoded` is at most that.
#![deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, params};

use super::{StoreError, responses};
use crate::store::{
    Commit, ConversationRecord, Counted, ItemRecord, ListQuery, Listed, LogToken, LogWrite, StoredConversation,
};
use crate::types::{TokenId, counted};

/// Tokens of a full chunk: 3 KiB, so that a turn's commit rewrites little and a long history is few rows.
pub(super) const CHUNK_TOKENS: usize = 512;
/// A token in a chunk: its id (u32), then its bytes of text (u16), little-endian.
const TOKEN_BYTES: usize = 6;

pub(super) fn create(
    db: &Connection,
    conversation: &ConversationRecord,
    items: &[(String, String)],
) -> Result<(), StoreError> {
    let ConversationRecord { id, tenant, created_at, last_used_at, metadata, chain, parent } = conversation;
    let insert = db
        .prepare_cached(
            "INSERT INTO conversations
                 (id, tenant, created_at, last_used_at, metadata, next_seq, log_tokens, encoded, chain, parent)
             VALUES (?1, ?2, ?3, ?4, ?5, 0, 0, 0, ?6, ?7)",
        )?
        .insert(params![
            id.to_be_bytes(),
            tenant,
            created_at,
            last_used_at,
            to_json(metadata)?,
            chain,
            parent.map(u128::to_be_bytes)
        ]);
    let row = insert.map_err(|error| match error.sqlite_error_code() {
        Some(ErrorCode::ConstraintViolation) => StoreError::Failed(format!("conversation {id:032x} is there already")),
        _ => error.into(),
    })?;
    let next_seq = insert_items(db, row, 0, items)?;
    db.prepare_cached("UPDATE conversations SET next_seq = ?2 WHERE row = ?1")?.execute(params![row, next_seq])?;
    Ok(())
}

pub(super) fn conversation(db: &Connection, tenant: &str, id: u128) -> Result<Option<ConversationRecord>, StoreError> {
    Ok(find(db, tenant, id)?.map(|(_, record)| record))
}

pub(super) fn census(db: &Connection) -> Result<Vec<Counted>, StoreError> {
    let mut query = db.prepare_cached("SELECT id, tenant, created_at, log_tokens, parent, turns FROM conversations")?;
    // A name for each tenant, not for each conversation.
    let mut names: HashMap<String, Arc<str>> = HashMap::new();
    let rows = query.query_map([], |row| {
        let tenant: String = row.get(1)?;
        let tenant = Arc::clone(names.entry(tenant).or_insert_with_key(|name| Arc::from(name.as_str())));
        Ok(Counted {
            id: row.get(0).map(u128::from_be_bytes)?,
            tenant,
            created_at: row.get(2)?,
            log_tokens: row.get::<_, u32>(3)? as usize,
            parent: row.get::<_, Option<[u8; 16]>>(4)?.map(u128::from_be_bytes),
            turns: row.get(5)?,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub(super) fn load(db: &Connection, tenant: &str, id: u128) -> Result<Option<StoredConversation>, StoreError> {
    // One transaction, so that all of it is of the same moment.
    let db = db.unchecked_transaction()?;
    let Some((head, conversation)) = find(&db, tenant, id)? else { return Ok(None) };
    let items = db
        .prepare_cached("SELECT id, seq, body FROM items WHERE conversation = ?1 ORDER BY seq")?
        .query_map([head.row], |row| {
            Ok(ItemRecord { id: row.get(0)?, seq: row.get::<_, u32>(1)?.into(), body: row.get(2)? })
        })?
        .collect::<Result<_, _>>()?;
    let log = read_log(&db, &head)?;
    Ok(Some(StoredConversation { conversation, items, log, encoded: head.encoded as usize }))
}

pub(super) fn set_metadata(
    db: &Connection,
    tenant: &str,
    id: u128,
    metadata: &BTreeMap<String, String>,
) -> Result<bool, StoreError> {
    let changed = db
        .prepare_cached("UPDATE conversations SET metadata = ?3 WHERE id = ?1 AND tenant = ?2")?
        .execute(params![id.to_be_bytes(), tenant, to_json(metadata)?])?;
    Ok(changed == 1)
}

pub(super) fn append(db: &Connection, id: u128, commit: &Commit) -> Result<(), StoreError> {
    let mut head = head(db, id)?.ok_or(StoreError::NoConversation)?;
    if let Some(item) = &commit.remove {
        remove_item(db, &head, item)?;
    }
    let next_seq = insert_items(db, head.row, head.next_seq, &commit.items)?;
    if let Some(write) = &commit.log {
        write_log(db, &mut head, write)?;
    }
    let encoded = match commit.encoded {
        Some(encoded) => stored(encoded)?.min(head.log_tokens),
        None => head.encoded,
    };
    db.prepare_cached(
        "UPDATE conversations
         SET last_used_at = ?2, next_seq = ?3, log_tokens = ?4, encoded = ?5, turns = coalesce(?6, turns) WHERE row = ?1",
    )?
    .execute(params![head.row, commit.last_used_at, next_seq, head.log_tokens, encoded, commit.turns])?;
    if let Some(response) = &commit.response {
        responses::put(db, head.row, response)?;
    }
    Ok(())
}

pub(super) fn delete_item(db: &Connection, id: u128, item: &str, log_keep: usize) -> Result<bool, StoreError> {
    let Some(mut head) = head(db, id)? else { return Ok(false) };
    if !remove_item(db, &head, item)? {
        return Ok(false);
    }
    let keep = log_keep.min(head.log_tokens as usize);
    write_log(db, &mut head, &LogWrite { keep, append: Vec::new() })?;
    db.prepare_cached("UPDATE conversations SET log_tokens = ?2, encoded = ?3 WHERE row = ?1")?.execute(params![
        head.row,
        head.log_tokens,
        head.encoded
    ])?;
    Ok(true)
}

pub(super) fn delete(db: &Connection, tenant: &str, id: u128) -> Result<bool, StoreError> {
    // Items and log go by cascade.
    let deleted = db
        .prepare_cached("DELETE FROM conversations WHERE id = ?1 AND tenant = ?2")?
        .execute(params![id.to_be_bytes(), tenant])?;
    if deleted == 1 {
        let sql = "UPDATE conversations SET parent = NULL WHERE parent = ?1";
        db.prepare_cached(sql)?.execute([id.to_be_bytes()])?;
    }
    Ok(deleted == 1)
}

/// What a change of a conversation needs to know of it.
struct Head {
    id: u128,
    row: i64,
    next_seq: u32,
    log_tokens: u32,
    encoded: u32,
}

const HEAD_COLUMNS: &str = "row, next_seq, log_tokens, encoded";

impl Head {
    fn read(id: u128, row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self { id, row: row.get(0)?, next_seq: row.get(1)?, log_tokens: row.get(2)?, encoded: row.get(3)? })
    }

    fn corrupt(&self, what: impl std::fmt::Display) -> StoreError {
        StoreError::Corrupt(format!("conversation {:032x}: {what}", self.id))
    }
}

fn head(db: &Connection, id: u128) -> Result<Option<Head>, StoreError> {
    let sql = format!("SELECT {HEAD_COLUMNS} FROM conversations WHERE id = ?1");
    Ok(db.prepare_cached(&sql)?.query_row([id.to_be_bytes()], |row| Head::read(id, row)).optional()?)
}

fn find(db: &Connection, tenant: &str, id: u128) -> Result<Option<(Head, ConversationRecord)>, StoreError> {
    let sql = format!("SELECT {HEAD_COLUMNS}, {RECORD_COLUMNS} FROM conversations WHERE id = ?1 AND tenant = ?2");
    let found = db
        .prepare_cached(&sql)?
        .query_row(params![id.to_be_bytes(), tenant], |row| Ok((Head::read(id, row)?, Rest::read(row)?)))
        .optional()?;
    let Some((head, rest)) = found else { return Ok(None) };
    let record = rest.record(&head, tenant)?;
    Ok(Some((head, record)))
}

pub(super) fn list(db: &Connection, tenant: &str, query: &ListQuery) -> Result<Option<Vec<Listed>>, StoreError> {
    let (mut start, beyond, order) = if query.newest_first { (i64::MAX, "<", "DESC") } else { (-1, ">", "ASC") };
    if let Some(after) = query.after {
        let sql = "SELECT row FROM conversations WHERE id = ?1 AND tenant = ?2 AND chain = 0";
        let row = db.prepare_cached(sql)?.query_row(params![after.to_be_bytes(), tenant], |row| row.get(0));
        let Some(row) = row.optional()? else { return Ok(None) };
        start = row;
    }
    let wanted: Vec<_> = query.metadata.iter().map(|(key, value)| serde_json::json!([key, value])).collect();
    let wanted = serde_json::Value::from(wanted).to_string();
    // No pair that is wanted is missing. Metadata that can't be read matches nothing.
    let sql = format!(
        "SELECT {HEAD_COLUMNS}, {RECORD_COLUMNS}, id FROM conversations
         WHERE tenant = ?1 AND chain = 0 AND row {beyond} ?2 AND NOT EXISTS (
             SELECT 1 FROM json_each(?3) AS wanted WHERE NOT EXISTS (
                 SELECT 1 FROM json_each(iif(json_valid(metadata), metadata, '{{}}')) AS pair
                 WHERE pair.key = wanted.value ->> 0 AND pair.value = wanted.value ->> 1))
         ORDER BY row {order} LIMIT ?4"
    );
    let mut found = db.prepare_cached(&sql)?;
    let limit = i64::try_from(query.limit).unwrap_or(i64::MAX);
    let rows = found.query_map(params![tenant, start, wanted, limit], |row| {
        let id = u128::from_be_bytes(row.get(9)?);
        Ok((Head::read(id, row)?, Rest::read(row)?))
    })?;
    let mut page = Vec::new();
    for row in rows {
        let (head, rest) = row?;
        let conversation = rest.record(&head, tenant)?;
        page.push(Listed { conversation, log_tokens: head.log_tokens as usize });
    }
    Ok(Some(page))
}

/// Those of the items that are there, in the order of `ids`.
pub(super) fn items(db: &Connection, conversation: u128, ids: &[String]) -> Result<Vec<ItemRecord>, StoreError> {
    let Some(head) = head(db, conversation)? else { return Ok(Vec::new()) };
    let mut find = db.prepare_cached("SELECT seq, body FROM items WHERE conversation = ?1 AND id = ?2")?;
    let mut items = Vec::new();
    for id in ids {
        let found = find.query_row(params![head.row, id], |row| {
            Ok(ItemRecord { id: id.clone(), seq: row.get::<_, u32>(0)?.into(), body: row.get(1)? })
        });
        items.extend(found.optional()?);
    }
    Ok(items)
}

/// The newest item with this id in the tenant's conversations.
pub(super) fn item(db: &Connection, tenant: &str, id: &str) -> Result<Option<ItemRecord>, StoreError> {
    let sql = "SELECT seq, body FROM items JOIN conversations ON conversations.row = items.conversation
               WHERE items.id = ?1 AND tenant = ?2 ORDER BY items.conversation DESC LIMIT 1";
    let read =
        |row: &Row<'_>| Ok(ItemRecord { id: id.to_owned(), seq: row.get::<_, u32>(0)?.into(), body: row.get(1)? });
    Ok(db.prepare_cached(sql)?.query_row(params![id, tenant], read).optional()?)
}

const RECORD_COLUMNS: &str = "created_at, last_used_at, metadata, chain, parent";

/// What of a conversation's row is not its `Head`.
struct Rest {
    created_at: i64,
    last_used_at: i64,
    metadata: String,
    chain: bool,
    parent: Option<[u8; 16]>,
}

impl Rest {
    /// Behind the columns of a `Head`.
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            created_at: row.get(4)?,
            last_used_at: row.get(5)?,
            metadata: row.get(6)?,
            chain: row.get(7)?,
            parent: row.get(8)?,
        })
    }

    fn record(self, head: &Head, tenant: &str) -> Result<ConversationRecord, StoreError> {
        let Self { created_at, last_used_at, metadata, chain, parent } = self;
        let metadata = serde_json::from_str(&metadata).map_err(|error| head.corrupt(format!("metadata: {error}")))?;
        let (id, tenant, parent) = (head.id, tenant.to_owned(), parent.map(u128::from_be_bytes));
        Ok(ConversationRecord { id, tenant, created_at, last_used_at, metadata, chain, parent })
    }
}

/// Removes an item, and what responses know of its text; false if there is none.
fn remove_item(db: &Connection, head: &Head, item: &str) -> Result<bool, StoreError> {
    let sql = "DELETE FROM items WHERE conversation = ?1 AND id = ?2";
    let removed = db.prepare_cached(sql)?.execute(params![head.row, item])? > 0;
    let sql = "UPDATE responses SET logprobs = NULL WHERE conversation = ?1 AND answer = ?2";
    db.prepare_cached(sql)?.execute(params![head.row, item])?;
    Ok(removed)
}

/// Adds items from `seq` on; the next free `seq` comes back.
fn insert_items(db: &Connection, row: i64, mut seq: u32, items: &[(String, String)]) -> Result<u32, StoreError> {
    let mut insert = db.prepare_cached("INSERT INTO items (conversation, seq, id, body) VALUES (?1, ?2, ?3, ?4)")?;
    for (id, body) in items {
        insert.execute(params![row, seq, id, body]).map_err(|error| match error.sqlite_error_code() {
            Some(ErrorCode::ConstraintViolation) => StoreError::DuplicateItem(id.clone()),
            _ => error.into(),
        })?;
        seq += 1;
    }
    Ok(seq)
}

/// A count as it lies in a column.
fn stored(count: usize) -> Result<u32, StoreError> {
    u32::try_from(count).map_err(|_| StoreError::Failed(format!("{count} is more than a conversation can have")))
}

fn to_json(metadata: &BTreeMap<String, String>) -> Result<String, StoreError> {
    serde_json::to_string(metadata).map_err(|error| StoreError::Failed(error.to_string()))
}

/// Cuts a log and appends to it. `head` knows its new length, and that no more than was kept is encoded.
fn write_log(db: &Connection, head: &mut Head, write: &LogWrite) -> Result<(), StoreError> {
    let LogWrite { keep, append } = write;
    let had = head.log_tokens as usize;
    if *keep > had {
        return Err(StoreError::Failed(format!(
            "the log has {}, so {keep} can't be kept",
            counted(had, "token", "tokens")
        )));
    }
    if *keep == had && append.is_empty() {
        return Ok(());
    }
    // The chunk in which the cut falls is written anew; what is behind it goes.
    let first = keep / CHUNK_TOKENS;
    let kept = keep % CHUNK_TOKENS;
    let mut tokens = if kept == 0 { Vec::new() } else { read_chunk(db, head, first)? };
    if tokens.len() < kept {
        return Err(head.corrupt(format!("chunk {first} of its log is short")));
    }
    tokens.truncate(kept);
    tokens.extend_from_slice(append);
    db.prepare_cached("DELETE FROM log_chunks WHERE conversation = ?1 AND chunk >= ?2")?
        .execute(params![head.row, stored(first)?])?;
    let mut insert = db.prepare_cached("INSERT INTO log_chunks (conversation, chunk, tokens) VALUES (?1, ?2, ?3)")?;
    for (index, chunk) in tokens.chunks(CHUNK_TOKENS).enumerate() {
        insert.execute(params![head.row, stored(first + index)?, to_bytes(chunk)])?;
    }
    head.log_tokens = stored(keep + append.len())?;
    head.encoded = head.encoded.min(stored(*keep)?);
    Ok(())
}

fn read_log(db: &Connection, head: &Head) -> Result<Vec<LogToken>, StoreError> {
    let mut log = Vec::with_capacity(head.log_tokens.min(1 << 20) as usize); // a corrupt length must not allocate
    let mut chunks =
        db.prepare_cached("SELECT chunk, tokens FROM log_chunks WHERE conversation = ?1 ORDER BY chunk")?;
    let mut rows = chunks.query([head.row])?;
    while let Some(row) = rows.next()? {
        let chunk: u32 = row.get(0)?;
        if log.len() != chunk as usize * CHUNK_TOKENS {
            return Err(head.corrupt(format!("its log has a gap before chunk {chunk}")));
        }
        from_bytes(head, chunk as usize, row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?, &mut log)?;
    }
    if log.len() != head.log_tokens as usize || head.encoded > head.log_tokens {
        let (has, says, encoded) = (log.len(), head.log_tokens, head.encoded);
        return Err(head.corrupt(format!(
            "its log has {}, its row says {says}, {encoded} of them encoded",
            counted(has, "token", "tokens")
        )));
    }
    Ok(log)
}

fn read_chunk(db: &Connection, head: &Head, chunk: usize) -> Result<Vec<LogToken>, StoreError> {
    let bytes: Vec<u8> = db
        .prepare_cached("SELECT tokens FROM log_chunks WHERE conversation = ?1 AND chunk = ?2")?
        .query_row(params![head.row, stored(chunk)?], |row| row.get(0))
        .optional()?
        .ok_or_else(|| head.corrupt(format!("chunk {chunk} of its log is missing")))?;
    let mut tokens = Vec::with_capacity(CHUNK_TOKENS);
    from_bytes(head, chunk, &bytes, &mut tokens)?;
    Ok(tokens)
}

fn to_bytes(tokens: &[LogToken]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(tokens.len() * TOKEN_BYTES);
    for token in tokens {
        bytes.extend_from_slice(&token.id.0.to_le_bytes());
        bytes.extend_from_slice(&token.bytes.to_le_bytes());
    }
    bytes
}

fn from_bytes(head: &Head, chunk: usize, bytes: &[u8], log: &mut Vec<LogToken>) -> Result<(), StoreError> {
    let (tokens, rest) = bytes.as_chunks::<TOKEN_BYTES>();
    if !rest.is_empty() || tokens.is_empty() || tokens.len() > CHUNK_TOKENS {
        return Err(head.corrupt(format!("chunk {chunk} of its log has {}", counted(bytes.len(), "byte", "bytes"))));
    }
    log.extend(tokens.iter().map(|&[a, b, c, d, e, f]| LogToken {
        id: TokenId(u32::from_le_bytes([a, b, c, d])),
        bytes: u16::from_le_bytes([e, f]),
    }));
    Ok(())
}
