//! What do the layers above and a session say to each other?

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

pub use crate::engine::handle::{OffloadTo, Offloaded, Pinned};
pub use crate::engine::status::Residency;
pub use crate::engine::{Argument, FinishReason, RESERVED, Sampling, ToolCall, TurnUsage};
use crate::tenants::quota::TurnsExceeded;
use crate::types::{TokenCount, TokenId};

/// A conversation's id: `conv_` and 32 hex digits at the API.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConversationId(pub u128);

impl fmt::Display for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "conv_{:032x}", self.0)
    }
}

/// A response's id: `resp_` and 32 hex digits at the API.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ResponseId(pub u128);

impl fmt::Display for ResponseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "resp_{:032x}", self.0)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

impl Role {
    /// Its word in the API and in chat templates.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::Developer => "developer",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// A part of a message's content. Other kinds are refused at the API.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
    Text(String),
    Refusal(String),
}

/// A message of a conversation, or of a stateless request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    pub role: Role,
    pub name: Option<String>,
    pub content: Vec<Part>,
    /// Functions that an assistant's message calls.
    pub calls: Vec<ToolCall>,
    /// The call that a tool's message answers.
    pub call_id: Option<String>,
}

impl Message {
    /// One that says something, and no more.
    pub fn new(role: Role, content: Vec<Part>) -> Self {
        Self { role, name: None, content, calls: Vec::new(), call_id: None }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ItemStatus {
    Completed,
    /// Cut by a limit, a cancel or a lost connection.
    Incomplete,
}

/// A message with its id, as it lies in a conversation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Item {
    pub id: String,
    pub message: Message,
    pub status: ItemStatus,
}

/// An item to add: the client's own id if it gave a usable one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewItem {
    pub id: Option<String>,
    pub message: Message,
}

/// A conversation as clients see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conversation {
    pub id: ConversationId,
    pub created_at: i64,
    pub metadata: BTreeMap<String, String>,
}

/// What to do when a turn runs already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnConflict {
    Queue,
    Reject,
}

/// How to answer, common to every kind of turn.
#[derive(Clone, Debug)]
pub struct TurnLimits {
    pub sampling: Sampling,
    /// `None`: what the window still holds, at most `api.default_max_tokens`.
    pub max_tokens: Option<TokenCount>,
    /// Strings that end the answer; the match is never sent.
    pub stop: Vec<String>,
    pub queue_deadline: Duration,
    /// Alternatives to report with each token; `None`: no log probabilities.
    pub logprobs: Option<u8>,
    /// Values for variables of the chat template.
    pub arguments: Vec<(String, Argument)>,
}

/// Where a turn's history is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Nowhere: what is said is forgotten at the end.
    Alone,
    /// In a chain that begins with this turn.
    NewChain,
    /// Behind this response, which other turns may have continued already.
    After(ResponseId),
    Conversation(ConversationId),
}

/// What a turn is known by, and what is kept of its request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewResponse {
    pub id: ResponseId,
    /// Whatever the asker wants back with the response, as a JSON text; opaque here.
    pub about: String,
    /// Whether it can be retrieved later.
    pub kept: bool,
    /// A digest of the request: a retry has the same.
    pub request: [u8; 32],
    /// Whether the client may have sent this request before.
    pub is_retry: bool,
}

/// What to do when the prompt is longer than the window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Overflow {
    Refuse,
    /// Leave out the oldest whole turns.
    DropOldest,
}

/// What a turn is to bring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Goal {
    Answer,
    /// Encode the input; say nothing.
    Encode,
}

/// Who keeps a turn running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Audience {
    /// Its readers: when the last one goes, it ends.
    Readers,
    /// Nobody.
    Background,
}

/// A turn.
#[derive(Clone, Debug)]
pub struct Respond {
    /// Whether it may continue a response that was not to be kept: whoever asks had that from the same socket.
    pub sees_unkept: bool,
    pub place: Place,
    pub response: NewResponse,
    pub input: Vec<NewItem>,
    /// One system message before everything, for this turn only.
    pub instructions: Option<String>,
    pub limits: TurnLimits,
    pub on_conflict: OnConflict,
    pub overflow: Overflow,
    pub goal: Goal,
    pub audience: Audience,
}

/// A stateless turn: the client sends all messages.
#[derive(Clone, Debug)]
pub struct Complete {
    pub messages: Vec<Message>,
    pub limits: TurnLimits,
    /// How many answers; they share the prompt.
    pub choices: u8,
}

/// A generated token with its log probability, as clients see it.
#[derive(Clone, PartialEq, Debug)]
pub struct TokenLogprob {
    pub token: TokenId,
    pub bytes: Vec<u8>,
    pub logprob: f32,
    pub top: Vec<(TokenId, Vec<u8>, f32)>,
}

/// What a running turn tells, in this order: `Started`, any number of `Text`, one of `Done` and `Failed`. A turn that is
/// cancelled before its prompt is encoded has no `Started`.
#[derive(Clone, PartialEq, Debug)]
pub enum TurnUpdate {
    Started {
        prompt_tokens: TokenCount,
    },
    /// Whole characters only. Deltas add up to the answer exactly, and are the same for every reader. Each token that is
    /// shown has its log probability with the first text that reaches past its beginning; control tokens have none.
    Text {
        delta: String,
        logprobs: Vec<TokenLogprob>,
    },
    Done(TurnDone),
    Failed(TurnError),
}

/// A finished turn.
#[derive(Clone, PartialEq, Debug)]
pub struct TurnDone {
    pub text: String,
    pub finish: FinishReason,
    pub prompt_tokens: TokenCount,
    pub usage: TurnUsage,
    /// The answer's item id (`msg_…`), durable by now where the conversation is stored.
    pub item_id: String,
    pub logprobs: Vec<TokenLogprob>,
    pub goal: Goal,
    /// Items of the history that were left out of the prompt.
    pub dropped_items: usize,
    /// Seconds since 1970.
    pub ended_at: i64,
}

/// Why a turn was not done.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum TurnError {
    #[error("no such conversation")]
    NoConversation,
    #[error("there is no such response to continue: it never was, was deleted, or is forgotten")]
    NoPrevious,
    #[error("the conversation would have {items} items, and may have {most}; delete some, or start a new one")]
    TooManyItems { items: usize, most: usize },
    #[error("a turn runs in this conversation and {waiting} wait; retry when it is done")]
    Locked { waiting: usize },
    #[error("item `{0}` is in the conversation already")]
    DuplicateItem(String),
    #[error("there is nothing to answer: give `input`, or a conversation that has items")]
    NothingToAnswer,
    #[error("the prompt has {prompt} tokens and the window {window}")]
    ContextLength { prompt: TokenCount, window: TokenCount },
    #[error("the model's chat template refuses these messages: {0}")]
    Template(String),
    #[error("{0}")]
    Overloaded(String),
    #[error("{0}")]
    QueueTimeout(String),
    #[error(transparent)]
    TooManyTurns(#[from] TurnsExceeded),
    #[error("the store can't be reached: {0}")]
    Store(String),
    #[error("the server is draining; retry on another node or later")]
    Draining,
    /// As it is told later of a turn that failed, or that the server went down under.
    #[error("{0}")]
    Lost(String),
    #[error("{0}")]
    Internal(String),
}

/// Why a conversation could not be read or changed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SessionError {
    #[error("no such conversation")]
    NoConversation,
    #[error("no such response")]
    NoResponse,
    #[error("the conversation would have {items} items, and may have {most}; delete some, or start a new one")]
    TooManyItems { items: usize, most: usize },
    #[error("no item `{0}` in this conversation")]
    NoItem(String),
    #[error("item `{0}` is in the conversation already")]
    DuplicateItem(String),
    #[error("a turn of this conversation runs or waits; retry when it is done")]
    Busy,
    #[error("the conversation can't be pinned: {0}")]
    PinBudget(String),
    #[error("{0}")]
    Overloaded(String),
    #[error("the store can't be reached: {0}")]
    Store(String),
    #[error("{0}")]
    Internal(String),
}

/// Which conversations to list.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ConversationQuery {
    pub newest_first: bool,
    pub after: Option<ConversationId>,
    pub limit: usize,
    /// All of these pairs.
    pub metadata: Vec<(String, String)>,
}

/// A conversation in a list, and where its KV is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedConversation {
    pub conversation: Conversation,
    pub tokens: TokenCount,
    pub residency: Option<Residency>,
}

/// The proof of a deletion: what every tier gave back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Deleted {
    pub device_bytes: u64,
    pub host_bytes: u64,
    pub disk_bytes: u64,
    /// Bytes on disk that could not be overwritten; the log says why.
    pub remaining_bytes: u64,
    /// Bytes that stay, because other conversations of the tenant share them.
    pub kept_shared_bytes: u64,
}

/// Where a conversation's KV is, and what its next turn would cost.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConversationResidency {
    /// Tokens of the history as the KV has them; 0 before the first turn.
    pub tokens: TokenCount,
    /// Answers in the history.
    pub turns: usize,
    /// Seconds since 1970.
    pub last_used_at: i64,
    /// `None`: no tier holds any of it.
    pub residency: Option<Residency>,
    /// `None` until the engine has measured the rates that a forecast needs.
    pub predicted: Option<Predicted>,
}

/// What it would take to bring the missing tokens back to the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Predicted {
    /// Copying what the host has and encoding what it lacks; `None` if the host has nothing that the device lacks.
    pub reload_ms: Option<u64>,
    /// Encoding all that is missing.
    pub reencode_ms: u64,
    pub choice: ReturnPath,
}

/// How the next turn would get its history back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReturnPath {
    /// All of it is on the device.
    Resident,
    Reload,
    Reencode,
}
