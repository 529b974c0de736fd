//! Which turns run now, and how are they reached by their response's id?
//!
//! A turn is here from before its client hears of it until after its end is stored: whoever finds it in neither place is
//! asking for one that never was.

use std::sync::Arc;

use dashmap::DashMap;

use super::messages::{ConversationId, ResponseId};
use super::stream::{TurnLog, TurnStream};
use crate::types::TenantId;

/// A turn as its client sees it: what it was asked with, and what it says.
pub struct Turn {
    pub id: ResponseId,
    /// The conversation or chain that it is a turn of; `None`: it stands alone.
    pub conversation: Option<ConversationId>,
    /// As it was given when the turn was asked for.
    pub about: Arc<str>,
    pub stream: TurnStream,
}

/// A turn that runs.
#[derive(Clone)]
pub(super) struct Running {
    pub id: ResponseId,
    pub conversation: Option<ConversationId>,
    pub about: Arc<str>,
    pub log: TurnLog,
    /// Whether it can be retrieved.
    pub kept: bool,
}

impl Running {
    /// One more reader.
    pub fn join(&self) -> Turn {
        self.turn(self.log.join())
    }

    /// The turn, as this reader sees it.
    pub fn turn(&self, stream: TurnStream) -> Turn {
        Turn { id: self.id, conversation: self.conversation, about: Arc::clone(&self.about), stream }
    }
}

/// All turns that run.
#[derive(Default)]
pub(super) struct Live {
    turns: DashMap<(TenantId, ResponseId), Running>,
}

/// A turn's place among those that run; dropping it says that it is over.
pub(super) struct Presence {
    live: Arc<Live>,
    key: (TenantId, ResponseId),
}

impl Live {
    pub fn enter(self: &Arc<Self>, tenant: TenantId, running: Running) -> Presence {
        let key = (tenant, running.id);
        self.turns.insert(key, running);
        Presence { live: Arc::clone(self), key }
    }

    /// A conversation's turn, if one runs.
    pub fn of_conversation(&self, tenant: TenantId, id: ConversationId) -> Option<Running> {
        let mut turns = self.turns.iter();
        let found = turns.find(|turn| turn.key().0 == tenant && turn.value().conversation == Some(id));
        found.map(|turn| turn.value().clone())
    }

    pub fn find(&self, tenant: TenantId, id: ResponseId) -> Option<Running> {
        self.turns.get(&(tenant, id)).map(|found| found.value().clone())
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.live.turns.remove(&self.key);
    }
}
