//! What can be asked of a session, and what is it told when it can't be done now?
//!
//! A command carries its own way to answer, so that it may wait in a session's queue, be passed on to the session's
//! successor, or be refused by whoever holds it.

use std::sync::Arc;
use std::time::Duration;

use actix::Message;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::Span;

use super::live::Turn;
use super::messages::{
    Deleted, Item, NewItem, OffloadTo, Offloaded, Pinned, Respond, ResponseId, SessionError, TurnError, TurnUsage,
};
use super::transcript::Transcript;
use crate::engine::SubmitError;
use crate::engine::handle::PinError;
use crate::store::StoreError;

pub(super) type Reply<T, E> = oneshot::Sender<Result<T, E>>;

/// A request to one session. The answer comes through the reply inside; the mailbox has a bound.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) enum Command {
    Respond(Box<QueuedTurn>),
    Append {
        items: Vec<NewItem>,
        reply: Reply<Vec<Arc<Item>>, SessionError>,
    },
    DeleteItem {
        item: String,
        reply: Reply<(), SessionError>,
    },
    Items {
        reply: Reply<Vec<Arc<Item>>, SessionError>,
    },
    /// The history up to an item.
    Copy {
        up_to: String,
        reply: Reply<Option<Transcript>, SessionError>,
    },
    /// The history up to an item; all of it if none is named, unless a turn runs or waits.
    Fork {
        after_item: Option<String>,
        reply: Reply<Transcript, SessionError>,
    },
    Describe {
        reply: Reply<Description, SessionError>,
    },
    /// Bring the KV to the device.
    Warm {
        instructions: Option<String>,
        reply: Reply<Option<TurnUsage>, SessionError>,
    },
    Offload {
        to: OffloadTo,
        reply: Reply<Offloaded, SessionError>,
    },
    /// Keep the KV from the evictor for so long; `None`: no longer.
    Pin {
        time: Option<Duration>,
        reply: Reply<Pinned, SessionError>,
    },
    /// Tell the engine what is to be expected of the conversation.
    Expect {
        outlook: Outlook,
        reply: Reply<(), SessionError>,
    },
    Delete {
        reply: Reply<Deleted, SessionError>,
    },
}

/// What is to be expected of a conversation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outlook {
    /// It is over.
    Over,
    /// It isn't, whatever was said before.
    Open,
}

/// Asks an idle session to give up its actor. One that works stays.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Passivate;

/// A turn that waits for its place in the conversation.
pub(super) struct QueuedTurn {
    pub turn: Respond,
    /// The response that it continues.
    pub previous: Option<ResponseId>,
    pub follows: Follows,
    /// When it must have started.
    pub deadline: Instant,
    /// Whatever is done for it is done there.
    pub span: Span,
    pub reply: Reply<Taken, TurnError>,
}

/// What a turn comes behind.
#[derive(Clone, Debug)]
pub(super) enum Follows {
    /// Whatever is there by then.
    Anything,
    /// This item, which must be the last.
    Tip(Option<String>),
    /// The same turn, whose answer was broken off: `answer` is what was said, `input` is in the conversation already.
    Broken { tip: Option<String>, answer: Option<String>, input: Vec<String> },
}

impl Follows {
    /// The item that must be the last; `None`: any may be.
    pub fn tip(&self) -> Option<Option<&str>> {
        match self {
            Follows::Anything => None,
            Follows::Tip(tip) | Follows::Broken { tip, .. } => Some(tip.as_deref()),
        }
    }
}

/// What became of a turn that was asked for.
pub(super) enum Taken {
    Runs(Turn),
    /// The conversation has gone on, or goes on now, from where the turn was to begin.
    NotTip,
    /// It is a retry of the newest turn, which had not begun when it was looked for.
    Repeats,
}

/// What a session says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Description {
    pub tokens: crate::types::TokenCount,
    pub turns: usize,
    pub last_used_at: i64,
}

/// Why a command was not even tried.
#[derive(Clone, Debug)]
pub(super) enum Refusal {
    NoConversation,
    Overloaded,
    Store(String),
    /// Whoever held the command is gone.
    Lost,
}

impl Command {
    /// Answers with a refusal, whatever it is.
    pub fn refuse(self, refusal: Refusal) {
        match self {
            Command::Respond(queued) => refuse(queued.reply, refusal),
            Command::Append { reply, .. } | Command::Items { reply } => refuse(reply, refusal),
            Command::DeleteItem { reply, .. } | Command::Expect { reply, .. } => refuse(reply, refusal),
            Command::Copy { reply, .. } => refuse(reply, refusal),
            Command::Fork { reply, .. } => refuse(reply, refusal),
            Command::Describe { reply } => refuse(reply, refusal),
            Command::Warm { reply, .. } => refuse(reply, refusal),
            Command::Offload { reply, .. } => refuse(reply, refusal),
            Command::Pin { reply, .. } => refuse(reply, refusal),
            Command::Delete { reply } => refuse(reply, refusal),
        }
    }

    /// Whether nobody waits for the answer any more. What was not begun then need not be.
    pub fn is_abandoned(&self) -> bool {
        match self {
            Command::Respond(queued) => queued.reply.is_closed(),
            Command::Append { reply, .. } | Command::Items { reply } => reply.is_closed(),
            Command::DeleteItem { reply, .. } | Command::Expect { reply, .. } => reply.is_closed(),
            Command::Copy { reply, .. } => reply.is_closed(),
            Command::Fork { reply, .. } => reply.is_closed(),
            Command::Describe { reply } => reply.is_closed(),
            Command::Warm { reply, .. } => reply.is_closed(),
            Command::Offload { reply, .. } => reply.is_closed(),
            Command::Pin { reply, .. } => reply.is_closed(),
            Command::Delete { reply } => reply.is_closed(),
        }
    }
}

fn refuse<T, E: From<Refusal>>(reply: Reply<T, E>, refusal: Refusal) {
    answer(reply, Err(refusal.into()));
}

/// Answers; a caller that has gone away misses nothing.
pub(super) fn answer<T, E>(reply: Reply<T, E>, result: Result<T, E>) {
    drop(reply.send(result));
}

const OVERLOADED: &str = "too many requests wait for this conversation; retry in a moment";
const LOST: &str = "the session failed; its conversation starts again from what is stored";

impl From<Refusal> for SessionError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoConversation => SessionError::NoConversation,
            Refusal::Overloaded => SessionError::Overloaded(OVERLOADED.into()),
            Refusal::Store(reason) => SessionError::Store(reason),
            Refusal::Lost => SessionError::Internal(LOST.into()),
        }
    }
}

impl From<Refusal> for TurnError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoConversation => TurnError::NoConversation,
            Refusal::Overloaded => TurnError::Overloaded(OVERLOADED.into()),
            Refusal::Store(reason) => TurnError::Store(reason),
            Refusal::Lost => TurnError::Internal(LOST.into()),
        }
    }
}

impl From<StoreError> for SessionError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::DuplicateItem(item) => SessionError::DuplicateItem(item),
            StoreError::NoConversation => SessionError::NoConversation,
            StoreError::Open { .. }
            | StoreError::Version { .. }
            | StoreError::Locked { .. }
            | StoreError::Failed(_)
            | StoreError::Corrupt(_)
            | StoreError::Closed => SessionError::Store(error.to_string()),
        }
    }
}

impl From<StoreError> for TurnError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::DuplicateItem(item) => TurnError::DuplicateItem(item),
            StoreError::NoConversation => TurnError::NoConversation,
            StoreError::Open { .. }
            | StoreError::Version { .. }
            | StoreError::Locked { .. }
            | StoreError::Failed(_)
            | StoreError::Corrupt(_)
            | StoreError::Closed => TurnError::Store(error.to_string()),
        }
    }
}

impl From<SubmitError> for SessionError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Busy => SessionError::Busy,
            SubmitError::Overloaded { .. } => SessionError::Overloaded(error.to_string()),
            SubmitError::PromptTooLong { .. } | SubmitError::PromptEmpty | SubmitError::Gone => {
                SessionError::Internal(error.to_string())
            }
        }
    }
}

impl From<PinError> for SessionError {
    fn from(error: PinError) -> Self {
        match error {
            PinError::OverBudget { .. } => SessionError::PinBudget(error.to_string()),
            PinError::Forgetting => SessionError::NoConversation,
            PinError::NotAsked(error) => error.into(),
        }
    }
}
