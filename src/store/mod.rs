//! What must survive the process, and in which shape does it lie there?
//!
//! Conversations, their items and token logs, the responses made in them, and the results of requests that must not
//! happen twice. The store knows neither JSON of the API nor blocks: the body of an item, a response or a result is
//! opaque, a log is token ids. Every write is durable when its future resolves.

pub mod embedded;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

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
    /// Made for responses that continue each other: no client can name it, and it ends with the last of them.
    pub chain: bool,
    /// The conversation that it branched off, while that is there; `None` also if nobody wrote it down then.
    pub parent: Option<u128>,
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

/// A response's row: what a turn was asked, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseRecord {
    pub id: u128,
    /// Seconds since 1970.
    pub created_at: i64,
    /// When it is forgotten.
    pub expires_at: i64,
    /// False: nobody can retrieve it; it is known for a while, so that a retry is told from a new turn.
    pub kept: bool,
    /// A digest of the request.
    pub request: [u8; 32],
    /// The response that it continued.
    pub previous: Option<u128>,
    /// As `sessions` wrote it (JSON), opaque here.
    pub body: String,
    /// The answer's item. When that goes, `logprobs` go with it: they hold its text.
    pub answer: Option<String>,
    pub logprobs: Option<String>,
}

/// A response, and the conversation that its items are in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredResponse {
    pub response: ResponseRecord,
    pub conversation: u128,
    /// Whether that is a chain.
    pub chain: bool,
}

/// Where to look for the newest response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewestOf {
    Conversation(u128),
    /// Of those that continued this response.
    Continuations(u128),
}

/// Which conversations of a tenant to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListQuery {
    pub newest_first: bool,
    /// Strictly after this one, in that order.
    pub after: Option<u128>,
    pub limit: usize,
    /// All of these pairs.
    pub metadata: Vec<(String, String)>,
}

/// A conversation in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub conversation: ConversationRecord,
    pub log_tokens: usize,
}

/// A conversation, as far as all of them are counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    pub id: u128,
    pub tenant: Arc<str>,
    /// Seconds since 1970.
    pub created_at: i64,
    pub log_tokens: usize,
    pub parent: Option<u128>,
    /// The number of its newest turn; `None`: it had none, or nobody wrote it down then.
    pub turns: Option<u32>,
}

/// The result of a request that must not happen twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultRecord {
    /// A digest of the request.
    pub request: [u8; 32],
    /// Opaque here.
    pub body: Vec<u8>,
}

/// What one commit changes in a conversation; all of it or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commit {
    /// An item that goes, before the others come.
    pub remove: Option<String>,
    /// Appended in this order; the store gives them their `seq`.
    pub items: Vec<(String, String)>,
    pub log: Option<LogWrite>,
    /// Tokens at the log's front whose KV has been computed once; `None` leaves what is stored.
    pub encoded: Option<usize>,
    /// The number of the turn that this ends; `None` leaves what is stored.
    pub turns: Option<u32>,
    pub last_used_at: i64,
    /// Added, or put in the place of the one with its id.
    pub response: Option<ResponseRecord>,
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
    /// Makes a conversation with all that the commit brings, in one transaction.
    fn begin(&self, conversation: ConversationRecord, commit: Commit) -> StoreFuture<'_, ()>;
    fn conversation(&self, tenant: &str, id: u128) -> StoreFuture<'_, Option<ConversationRecord>>;
    /// All conversations that there are, nameless chains among them.
    fn census(&self) -> StoreFuture<'_, Vec<Counted>>;
    /// A page of the conversations that clients can name; `None` if there is no `after`.
    fn conversations(&self, tenant: &str, query: ListQuery) -> StoreFuture<'_, Option<Vec<Listed>>>;
    fn load(&self, tenant: &str, id: u128) -> StoreFuture<'_, Option<StoredConversation>>;
    /// Replaces the metadata; false if there is no such conversation.
    fn set_metadata(&self, tenant: &str, id: u128, metadata: BTreeMap<String, String>) -> StoreFuture<'_, bool>;
    /// Appends items and token log in one transaction, durable when it resolves.
    fn commit(&self, id: u128, commit: Commit) -> StoreFuture<'_, ()>;
    /// Removes one item and cuts the token log to `log_keep` tokens; false if there is no such item.
    fn delete_item(&self, id: u128, item: &str, log_keep: usize) -> StoreFuture<'_, bool>;
    /// Removes a conversation and everything of it; false if there is none. Freed pages are overwritten.
    fn delete(&self, tenant: &str, id: u128) -> StoreFuture<'_, bool>;
    /// Those of the items that are still there, in the order asked for.
    fn items(&self, conversation: u128, ids: Vec<String>) -> StoreFuture<'_, Vec<ItemRecord>>;
    /// The newest item of the tenant's conversations with this id.
    fn item(&self, tenant: &str, id: &str) -> StoreFuture<'_, Option<ItemRecord>>;
    fn response(&self, tenant: &str, id: u128) -> StoreFuture<'_, Option<StoredResponse>>;
    fn newest_response(&self, tenant: &str, of: NewestOf) -> StoreFuture<'_, Option<StoredResponse>>;
    /// Removes a response; its items stay. False if there is none. Freed pages are overwritten.
    fn delete_response(&self, tenant: &str, id: u128) -> StoreFuture<'_, bool>;
    /// The result kept under a key, if it is not older than `since`.
    fn result(&self, key: [u8; 32], since: i64) -> StoreFuture<'_, Option<ResultRecord>>;
    fn keep_result(&self, key: [u8; 32], at: i64, result: ResultRecord) -> StoreFuture<'_, ()>;
    /// Forgets responses that expired before `now` and results from before `results_since`. What comes back are the
    /// chains that have no response any more, and whose they are: their end is the caller's.
    fn sweep(&self, now: i64, results_since: i64) -> StoreFuture<'_, Vec<(String, u128)>>;
    /// A cheap call that fails if the store can't be reached: for readiness.
    /// What was kept under a name, of what is no conversation's.
    fn note(&self, name: &str) -> StoreFuture<'_, Option<Vec<u8>>>;
    /// Keeps something under a name, in place of what was there.
    fn keep_note(&self, name: &str, value: Vec<u8>) -> StoreFuture<'_, ()>;
    fn ping(&self) -> StoreFuture<'_, ()>;
}
