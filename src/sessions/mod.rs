//! Who keeps a conversation's turns in order, its history durable, and its KV claimed?
//!
//! One actor per live conversation. What is seen from outside is `Sessions`, plain and cheap to clone; actix stays inside.

mod actor;
mod attendance;
mod command;
mod completion;
pub mod digests;
#[cfg(test)]
mod fixtures;
mod forecast;
mod fork;
mod gate;
mod habits;
mod kept;
mod listing;
mod live;
pub mod messages;
pub mod news;
mod once;
pub mod prompt;
mod recall;
mod registry;
mod responses;
pub mod speech;
mod stored;
mod stream;
mod sweep;
pub mod token_log;
mod traced;
pub mod transcript;
mod turn;
mod warm;
mod work;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, SystemTime};

use actix::System;
use tokio::sync::oneshot;

pub use attendance::Attendance;
use attendance::Attended;
use command::{Command, Refusal, Reply};
pub use forecast::predict;
use gate::Gate;
use live::Live;
pub use live::Turn;
use messages::{
    Complete, Conversation, ConversationId, ConversationResidency, Deleted, Item, NewItem, OffloadTo, Offloaded,
    Pinned, SessionError, TurnError,
};
use news::News;
pub use once::{Claim, Once};
use recall::Recall;
use registry::{Identity, Registry};
pub use stream::TurnStream;

use crate::engine::{EngineHandle, Language};
use crate::store::{ConversationRecord, Store};
use crate::tenants::Tenant;
use crate::types::{KvKey, TokenCount};

/// How sessions behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionSettings {
    /// Turns that may wait behind a running one of the same conversation.
    pub queue_depth: usize,
    /// A conversation this long without a request gives up its actor and its claim on the KV.
    pub idle: Duration,
    /// Live conversations past this many give up the one that was silent longest.
    pub max_live: u64,
    /// Most tokens of an answer whose request sets no limit.
    pub default_max_tokens: TokenCount,
    /// Most items of a conversation.
    pub max_items: usize,
    /// How long a response can be retrieved and continued.
    pub response_ttl_s: i64,
    /// Tokens that are remembered for each tenant's clients that send their history as text.
    pub recalled_tokens: usize,
    /// How long after its last socket a conversation is over; `None`: never because of that.
    pub done_after: Option<Duration>,
}

/// What all sessions use.
struct Shared {
    engine: EngineHandle,
    language: Arc<Language>,
    store: Arc<dyn Store>,
    settings: SessionSettings,
    gate: Arc<Gate>,
    registry: Registry,
    attended: Arc<Attended>,
    live: Arc<Live>,
    recall: Recall,
    once: Arc<once::Running>,
    unread: news::Unread,
    /// The engine has what was learned before, so that what it knows by now may replace that.
    goes_on: AtomicBool,
}

/// All conversations, for those above. Cheap to clone; callable from any tokio task. The actors have a thread of their own,
/// which ends with the last clone.
#[derive(Clone)]
pub struct Sessions {
    shared: Arc<Shared>,
    _thread: Arc<ActorThread>,
}

impl Sessions {
    /// Starts the actors' thread. Panics if the system has no thread to give, as nothing works without.
    pub fn new(
        engine: EngineHandle,
        language: Arc<Language>,
        store: Arc<dyn Store>,
        settings: SessionSettings,
    ) -> Self {
        let thread = ActorThread::start();
        let registry = Registry::new(thread.system.arbiter().clone(), &settings);
        let shared = Arc::new(Shared {
            engine,
            language,
            store,
            settings,
            gate: Gate::open(),
            registry,
            attended: Attended::new(settings.done_after),
            live: Arc::default(),
            recall: Recall::new(settings.recalled_tokens),
            once: Arc::default(),
            unread: news::Unread::default(),
            goes_on: AtomicBool::new(false),
        });
        if !thread.system.arbiter().spawn(registry::tick(Arc::downgrade(&shared), settings.idle)) {
            tracing::error!("the sessions' thread ended at its start");
        }
        if !thread.system.arbiter().spawn(attendance::tick(Arc::downgrade(&shared))) {
            tracing::error!("the sessions' thread ended at its start");
        }
        if !thread.system.arbiter().spawn(sweep::sweep(Arc::downgrade(&shared))) {
            tracing::error!("the sessions' thread ended at its start");
        }
        if !thread.system.arbiter().spawn(habits::keep_up(Arc::downgrade(&shared))) {
            tracing::error!("the sessions' thread ended at its start");
        }
        Self { shared, _thread: Arc::new(thread) }
    }

    /// Makes a conversation, durable with its items when this resolves.
    pub async fn create(
        &self,
        tenant: &Tenant,
        metadata: BTreeMap<String, String>,
        items: Vec<NewItem>,
    ) -> Result<Conversation, SessionError> {
        let (most, items) = (self.shared.settings.max_items, work::rows(&work::new_items(items)));
        if items.len() > most {
            return Err(SessionError::TooManyItems { items: items.len(), most });
        }
        let (id, now) = (rand::random(), unix_now());
        let record = ConversationRecord {
            id,
            tenant: tenant.name.clone(),
            created_at: now,
            last_used_at: now,
            metadata: metadata.clone(),
            chain: false,
            parent: None,
        };
        self.shared.store.create(record, items).await?;
        self.shared.unread.add(News::Made { tenant: tenant.id, id: ConversationId(id) });
        Ok(Conversation { id: ConversationId(id), created_at: now, metadata })
    }

    pub async fn get(&self, tenant: &Tenant, id: ConversationId) -> Result<Conversation, SessionError> {
        let found = self.shared.store.conversation(&tenant.name, id.0).await?.ok_or(SessionError::NoConversation)?;
        Ok(Conversation { id, created_at: found.created_at, metadata: found.metadata })
    }

    /// Replaces the metadata.
    pub async fn set_metadata(
        &self,
        tenant: &Tenant,
        id: ConversationId,
        metadata: BTreeMap<String, String>,
    ) -> Result<Conversation, SessionError> {
        if self.shared.store.set_metadata(&tenant.name, id.0, metadata).await? {
            self.get(tenant, id).await
        } else {
            Err(SessionError::NoConversation)
        }
    }

    /// Cancels a running turn, gives up the KV in every tier, deletes the conversation, and only then resolves.
    pub async fn delete(&self, tenant: &Tenant, id: ConversationId) -> Result<Deleted, SessionError> {
        self.ask(tenant, id, |reply| Command::Delete { reply }).await
    }

    /// Adds items, after a turn that runs. Durable when this resolves.
    pub async fn append_items(
        &self,
        tenant: &Tenant,
        id: ConversationId,
        items: Vec<NewItem>,
    ) -> Result<Vec<Arc<Item>>, SessionError> {
        self.ask(tenant, id, |reply| Command::Append { items, reply }).await
    }

    /// All items, oldest first, as far as they are durable.
    pub async fn items(&self, tenant: &Tenant, id: ConversationId) -> Result<Vec<Arc<Item>>, SessionError> {
        self.ask(tenant, id, |reply| Command::Items { reply }).await
    }

    /// Removes an item, after a turn that runs, and drops the KV.
    pub async fn delete_item(
        &self,
        tenant: &Tenant,
        id: ConversationId,
        item: &str,
    ) -> Result<Conversation, SessionError> {
        self.ask(tenant, id, |reply| Command::DeleteItem { item: item.into(), reply }).await?;
        self.get(tenant, id).await
    }

    /// Starts a stateless turn: a stream for each choice. Resolves when the engine has taken the first.
    pub async fn complete(&self, tenant: &Tenant, turn: Complete) -> Result<Vec<TurnStream>, TurnError> {
        completion::complete(&self.shared, tenant, turn).await
    }

    /// Where a conversation's KV is. Never waits for the engine.
    pub async fn residency(&self, tenant: &Tenant, id: ConversationId) -> Result<ConversationResidency, SessionError> {
        let described = self.ask(tenant, id, |reply| Command::Describe { reply }).await?;
        let residency = self.shared.engine.residency(KvKey(id.0));
        let predicted = forecast::predict(described.tokens, residency.as_ref(), &self.shared.engine.status());
        let command::Description { tokens, turns, last_used_at } = described;
        Ok(ConversationResidency { tokens, turns, last_used_at, residency, predicted })
    }

    /// Moves the KV down a tier, or forgets it. `Busy` while a turn runs or waits.
    pub async fn offload(&self, tenant: &Tenant, id: ConversationId, to: OffloadTo) -> Result<Offloaded, SessionError> {
        self.ask(tenant, id, |reply| Command::Offload { to, reply }).await
    }

    /// Keeps the KV from the evictor for so long, within the tenant's budget; `None`: no longer. Doesn't wait for turns.
    pub async fn pin(
        &self,
        tenant: &Tenant,
        id: ConversationId,
        time: Option<Duration>,
    ) -> Result<Pinned, SessionError> {
        self.ask(tenant, id, |reply| Command::Pin { time, reply }).await
    }

    /// Conversations that have an actor now.
    pub fn live(&self) -> usize {
        self.shared.registry.live()
    }

    /// Refuses new turns, lets running ones finish until the deadline, then cancels them; what was said is kept. Resolves
    /// when none runs.
    pub async fn drain(&self, deadline: Duration) {
        self.shared.gate.drain(deadline).await;
        habits::keep(&self.shared).await;
    }

    /// Whether the server takes no new turns any more.
    pub fn is_draining(&self) -> bool {
        self.shared.gate.is_draining()
    }

    async fn ask<T, E: From<Refusal>>(
        &self,
        tenant: &Tenant,
        id: ConversationId,
        command: impl FnOnce(Reply<T, E>) -> Command,
    ) -> Result<T, E> {
        let who = Identity { tenant: tenant.clone(), id };
        let (reply, answer) = oneshot::channel();
        self.shared.registry.touch(&who).await;
        self.shared.registry.deliver(&self.shared, &who, command(reply));
        answer.await.unwrap_or_else(|_| Err(Refusal::Lost.into()))
    }
}

/// The thread that runs the actors. It ends when this is dropped.
struct ActorThread {
    system: System,
}

impl ActorThread {
    fn start() -> Self {
        let (tell, told) = sync_channel(1);
        let run = move || {
            let runner = System::new();
            // Nobody to tell means that nobody waits for it.
            drop(tell.send(System::current()));
            if let Err(error) = runner.run() {
                tracing::error!(%error, "the sessions' thread failed");
            }
        };
        std::thread::Builder::new().name("sessions".into()).spawn(run).expect("the system gives a thread at start");
        Self { system: told.recv().expect("the thread tells its system first") }
    }
}

impl Drop for ActorThread {
    fn drop(&mut self) {
        self.system.stop();
    }
}

/// An id for an item that came without one.
fn new_item_id() -> String {
    format!("msg_{:032x}", rand::random::<u128>())
}

/// Seconds since 1970.
fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
