//! Which conversations have an actor now, and when does one give it up?
//!
//! A session is found by tenant and id, so another tenant's id finds nothing, in the time it takes to look. The idle clock
//! only sends a message: the session itself knows whether it works. Nothing here holds a lock over an await.

use std::sync::{Arc, Weak};
use std::time::Duration;

use actix::dev::SendError;
use actix::{Actor, Addr, ArbiterHandle};
use dashmap::mapref::one::RefMut;
use dashmap::{DashMap, Entry};
use moka::future::Cache;
use moka::notification::RemovalCause;
use moka::policy::EvictionPolicy;

use super::actor::Session;
use super::command::{Command, Passivate, Refusal};
use super::messages::ConversationId;
use super::transcript::Transcript;
use super::{SessionSettings, Shared};
use crate::tenants::Tenant;
use crate::types::TenantId;

/// Commands that may wait in a session's mailbox.
const MAILBOX: usize = 64;

/// Whose conversation, and which.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub tenant: Tenant,
    pub id: ConversationId,
}

/// A conversation among all tenants'.
pub(super) type Key = (TenantId, ConversationId);

impl Identity {
    fn key(&self) -> Key {
        (self.tenant.id, self.id)
    }
}

/// The live sessions.
pub(super) struct Registry {
    live: Arc<DashMap<Key, Addr<Session>>>,
    /// Goes off for a session that nobody touched, or for the most silent one when there are too many.
    idle: Cache<Key, ()>,
    arbiter: ArbiterHandle,
}

impl Registry {
    /// `arbiter` runs the actors.
    pub fn new(arbiter: ArbiterHandle, settings: &SessionSettings) -> Self {
        let live: Arc<DashMap<Key, Addr<Session>>> = Arc::default();
        let sessions = Arc::clone(&live);
        let went_off = move |key: Arc<Key>, (), cause: RemovalCause| {
            let session = sessions.get(&*key).filter(|_| cause.was_evicted()).map(|entry| entry.value().clone());
            // Full means that it works, and works it touches the clock again; closed, that there is nothing to give up.
            if let Some(Err(error)) = session.map(|session| session.try_send(Passivate)) {
                tracing::debug!(session = %key.1, %error, "a session was not asked to rest");
            }
        };
        let idle = Cache::builder()
            .max_capacity(settings.max_live)
            .eviction_policy(EvictionPolicy::lru())
            .time_to_idle(settings.idle)
            .eviction_listener(went_off)
            .build();
        Self { live, idle, arbiter }
    }

    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// Says that a session was asked something, or has just become idle.
    pub async fn touch(&self, who: &Identity) {
        self.idle.get_with(who.key(), std::future::ready(())).await;
    }

    /// Hands a command to the conversation's session, making one if there is none. If that can't be, the command is refused.
    ///
    /// It is in the mailbox before the map's lock is given back: what was sent to a session came before its retirement.
    pub fn deliver(&self, shared: &Arc<Shared>, who: &Identity, command: Command) {
        shared.attended.hear_of(&who.key());
        let session = self.session(shared, who);
        let sent = session.try_send(command);
        drop(session);
        match sent {
            Ok(()) => {}
            Err(SendError::Full(command)) => command.refuse(Refusal::Overloaded),
            Err(SendError::Closed(command)) => command.refuse(Refusal::Lost),
        }
    }

    /// Makes the session of a conversation that the store doesn't have yet, and hands it its first command.
    pub fn deliver_newborn(&self, shared: &Arc<Shared>, who: &Identity, history: Transcript, command: Command) {
        let session = self.start(Session::newborn(Arc::clone(shared), who.clone(), history));
        self.live.insert(who.key(), session.clone());
        if let Err(SendError::Full(command) | SendError::Closed(command)) = session.try_send(command) {
            command.refuse(Refusal::Lost);
        }
    }

    /// Forgets a session, unless another has taken its place.
    pub fn remove(&self, who: &Identity, session: &Addr<Session>) {
        self.live.remove_if(&who.key(), |_, live| live == session);
    }

    /// The conversation's session, locked in its place. One that has failed is replaced.
    fn session(&self, shared: &Arc<Shared>, who: &Identity) -> RefMut<'_, Key, Addr<Session>> {
        let start = || self.start(Session::new(Arc::clone(shared), who.clone()));
        match self.live.entry(who.key()) {
            Entry::Occupied(entry) if entry.get().connected() => entry.into_ref(),
            Entry::Occupied(mut entry) => {
                tracing::error!(session = %who.id, tenant = %who.tenant.id, "a session failed and is started again");
                entry.insert(start());
                entry.into_ref()
            }
            Entry::Vacant(entry) => entry.insert(start()),
        }
    }

    fn start(&self, session: Session) -> Addr<Session> {
        Session::start_in_arbiter(&self.arbiter, move |context| {
            context.set_mailbox_capacity(MAILBOX);
            session
        })
    }
}

/// Lets the idle clock go off while nobody asks for anything. Ends with the registry.
pub(super) async fn tick(shared: Weak<Shared>, idle: Duration) {
    let period = (idle / 8).clamp(Duration::from_millis(10), Duration::from_secs(1));
    let mut ticks = tokio::time::interval(period);
    loop {
        ticks.tick().await;
        match shared.upgrade() {
            Some(shared) => shared.registry.idle.run_pending_tasks().await,
            None => return,
        }
    }
}
