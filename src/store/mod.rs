//! What must survive the process, and in which shape does it lie there?
//!
//! Conversations, their items, and their token logs. The store knows neither JSON of the API nor blocks: an item's body
//! is an opaque string, a log is token ids. Every write is durable when its future resolves.

pub mod embedded;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;

use crate::types::TokenId;

pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Why the store did not do what it was asked. Nothing of a failed write is kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the store at {path} could not be opened: {reason}")]
    Open { path: String, reason: String },
    #[error("the store at {path} has version {found} and this build reads {expected}; use the build that wrote it")]
    Version { path: String, found: i64, expected: i64 },
    #[error("the store is used by another process: {path}")]
    Locked { path: String },
    #[error("the store failed: {0}")]
    Failed(String),
    #[error("a record in the store can't be read: {0}")]
    Corrupt(String),
    #[error("item `{0}` is in the conversation already")]
    DuplicateItem(String),
    #[error("no such conversation")]
    NoConversation,
    #[error("the store has shut down")]
    Closed,
}

/// A conversation's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConversationRecord {
    /// 128 random bits: the conversation's id, and its `KvKey`.
    pub id: u128,
    pub tenant: String,
    /// Seconds since 1970.
    pub created_at: i64,
    pub last_used_at: i64,
    pub metadata: BTreeMap<String, String>,
}

/// An item's row. `seq` orders a conversation's items and has no gaps that mean anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemRecord {
    pub id: String,
    pub seq: u64,
    /// The item as `sessions` wrote it (JSON), opaque here.
    pub body: String,
}

/// A token of a transcript's log and how many bytes of rendered text it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogToken {
    pub id: TokenId,
    pub bytes: u16,
}

/// A change of a token log: keep this many tokens of the front, then append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogWrite {
    pub keep: usize,
    pub append: Vec<LogToken>,
}

/// What one commit adds to a conversation; all of it or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commit {
    /// Appended in this order; the store gives them their `seq`.
    pub items: Vec<(String, String)>,
    pub log: Option<LogWrite>,
    /// Tokens at the log's front whose KV has been computed once; `None` leaves what is stored.
    pub encoded: Option<usize>,
    pub last_used_at: i64,
}

/// A whole conversation, as an actor loads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredConversation {
    pub conversation: ConversationRecord,
    pub items: Vec<ItemRecord>,
    pub log: Vec<LogToken>,
    pub encoded: usize,
}

/// History that survives. Implementations are cheap to clone through an `Arc`, and safe to call from any task.
pub trait Store: Send + Sync {
    fn create(&self, conversation: ConversationRecord, items: Vec<(String, String)>) -> StoreFuture<'_, ()>;
    fn conversation(&self, tenant: &str, id: u128) -> StoreFuture<'_, Option<ConversationRecord>>;
    fn load(&self, tenant: &str, id: u128) -> StoreFuture<'_, Option<StoredConversation>>;
    /// Replaces the metadata; false if there is no such conversation.
    fn set_metadata(&self, tenant: &str, id: u128, metadata: BTreeMap<String, String>) -> StoreFuture<'_, bool>;
    /// Appends items and token log in one transaction, durable when it resolves.
    fn commit(&self, id: u128, commit: Commit) -> StoreFuture<'_, ()>;
    /// Removes one item and cuts the token log to `log_keep` tokens; false if there is no such item.
    fn delete_item(&self, id: u128, item: &str, log_keep: usize) -> StoreFuture<'_, bool>;
    /// Removes a conversation and everything of it; false if there is none. Freed pages are overwritten.
    fn delete(&self, tenant: &str, id: u128) -> StoreFuture<'_, bool>;
    /// A cheap call that fails if the store can't be reached: for readiness.
    fn ping(&self) -> StoreFuture<'_, ()>;
}
