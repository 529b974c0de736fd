//! Where does a turn go, and how is its response found again?
//!
//! A response without a conversation belongs to a chain, a conversation without a name. Continuing its newest response
//! goes on in it; continuing an older one, or one of a named conversation, makes a chain of its own out of the history up
//! to there, whose KV it shares.
//! Invariant: a request that was sent twice adds its items once.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::command::{Command, Follows, QueuedTurn, Refusal, Reply, Taken};
use super::kept::{End, Kept, RETRY_WINDOW_S};
use super::live::Turn;
use super::messages::{ConversationId, Item, Place, Respond, ResponseId, SessionError, TurnError};
use super::prompt::PromptRules;
use super::registry::Identity;
use super::stream::told_stream;
use super::traced::turn_span;
use super::transcript::{Transcript, text_of};
use super::turn::prepare;
use super::{Sessions, completion, stored, unix_now};
use crate::store::{ItemRecord, NewestOf, StoredResponse};
use crate::tenants::Tenant;
use crate::types::TokenCount;

/// A response of the store, and where its items are.
struct Found {
    kept: Kept,
    conversation: ConversationId,
    chain: bool,
}

/// What a retry finds of the turn that was sent before.
enum Before {
    /// Nothing, or another turn: this one is new.
    Nothing,
    Turn(Turn),
    /// Its answer was broken off.
    Broken(Box<Found>),
}

impl Sessions {
    /// Starts a turn. Resolves when the input is durable and the engine has taken the turn, so that whatever can be known
    /// before generation is known by then. A retry may be answered with the turn that it repeats.
    pub async fn respond(&self, tenant: &Tenant, mut turn: Respond) -> Result<Turn, TurnError> {
        let deadline = Instant::now() + turn.limits.queue_deadline;
        if let Some(turn) = self.repeated(tenant, &turn, deadline).await? {
            return Ok(turn);
        }
        match turn.place {
            Place::Alone => completion::respond(&self.shared, tenant, turn).await,
            Place::NewChain => self.begin_chain(tenant, turn, None, Transcript::default(), deadline).await,
            Place::After(previous) => self.continue_from(tenant, turn, previous, deadline).await,
            Place::Conversation(id) => loop {
                let asked = turn.clone();
                let queue = |reply| queued(asked, None, Follows::Anything, deadline, reply);
                match self.ask(tenant, id, queue).await? {
                    Taken::Runs(turn) => return Ok(turn),
                    Taken::NotTip => return Err(Refusal::Lost.into()),
                    Taken::Repeats => {
                        if let Some(turn) = self.repeated(tenant, &turn, deadline).await? {
                            return Ok(turn);
                        }
                        // It is too long ago, or another turn came since: this one is new.
                        turn.response.is_retry = false;
                    }
                }
            },
        }
    }

    /// The turn that a retry repeats, if there is one: the turn itself, or its answer once more.
    async fn repeated(&self, tenant: &Tenant, turn: &Respond, deadline: Instant) -> Result<Option<Turn>, TurnError> {
        if !turn.response.is_retry {
            return Ok(None);
        }
        match self.before(tenant, turn, deadline).await? {
            Before::Nothing => Ok(None),
            Before::Turn(turn) => Ok(Some(turn)),
            Before::Broken(found) => self.regenerate(tenant, turn, *found, deadline).await,
        }
    }

    /// A response, running or over.
    pub async fn response(&self, tenant: &Tenant, id: ResponseId) -> Result<Turn, SessionError> {
        if let Some(running) = self.shared.live.find(tenant.id, id) {
            return if running.kept { Ok(running.join()) } else { Err(SessionError::NoResponse) };
        }
        let found = self.find(tenant, id).await?.ok_or(SessionError::NoResponse)?;
        self.told(&found).await
    }

    /// Ends a running response; one that is over comes back as it is.
    pub async fn cancel(&self, tenant: &Tenant, id: ResponseId) -> Result<Turn, SessionError> {
        if let Some(running) = self.shared.live.find(tenant.id, id) {
            running.log.stop();
            let mut turn = running.join();
            turn.stream.finished().await;
            return Ok(turn);
        }
        self.response(tenant, id).await
    }

    /// Ends a conversation's running turn, whoever asked for it; what was said is kept. False if none runs.
    pub async fn cancel_turn_of(&self, tenant: &Tenant, id: ConversationId) -> bool {
        let Some(running) = self.shared.live.of_conversation(tenant.id, id) else { return false };
        let mut stream = running.join().stream;
        // Its end is told before it leaves those that run.
        if stream.end().is_some() {
            return false;
        }
        running.log.stop();
        stream.finished().await;
        true
    }

    /// Forgets a response; its items stay, unless nothing else needs them. A running one is cancelled first.
    pub async fn delete_response(&self, tenant: &Tenant, id: ResponseId) -> Result<(), SessionError> {
        let found = self.find(tenant, id).await?.ok_or(SessionError::NoResponse)?;
        self.cancel(tenant, id).await?;
        self.forget_response(tenant, &found).await
    }

    async fn forget_response(&self, tenant: &Tenant, found: &Found) -> Result<(), SessionError> {
        if !self.shared.store.delete_response(&tenant.name, found.kept.id().0).await? {
            return Err(SessionError::NoResponse);
        }
        if found.chain {
            let newest = NewestOf::Conversation(found.conversation.0);
            if self.shared.store.newest_response(&tenant.name, newest).await?.is_none() {
                match self.delete(tenant, found.conversation).await {
                    // The sweep was there before.
                    Ok(_) | Err(SessionError::NoConversation) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// The items of a response's own input, as far as they are still there.
    pub async fn input_items(&self, tenant: &Tenant, id: ResponseId) -> Result<Vec<Arc<Item>>, SessionError> {
        let found = self.find(tenant, id).await?.ok_or(SessionError::NoResponse)?;
        let records = self.shared.store.items(found.conversation.0, found.kept.body.input).await?;
        let read = |record: ItemRecord| {
            let item = stored::decode(record.id, &record.body);
            item.map(Arc::new).map_err(|error| SessionError::Store(format!("an item can't be read: {error}")))
        };
        records.into_iter().map(read).collect()
    }

    /// An item of the tenant's, wherever it is.
    pub async fn item(&self, tenant: &Tenant, id: &str) -> Result<Option<Item>, SessionError> {
        let found = self.shared.store.item(&tenant.name, id).await?;
        let read = |record: ItemRecord| {
            let item = stored::decode(record.id, &record.body);
            item.map_err(|error| SessionError::Store(format!("an item can't be read: {error}")))
        };
        found.map(read).transpose()
    }

    /// How many tokens the prompt of this turn would have. Changes nothing.
    pub async fn count(&self, tenant: &Tenant, mut turn: Respond) -> Result<TokenCount, TurnError> {
        let transcript = match turn.place {
            Place::Alone | Place::NewChain => Transcript::default(),
            Place::After(previous) => {
                let found = self.previous(tenant, previous, turn.sees_unkept, Instant::now()).await?;
                self.copy(tenant, &found).await?
            }
            Place::Conversation(id) => {
                let items = self.items(tenant, id).await?;
                match items.last().map(|item| item.id.clone()) {
                    Some(up_to) => {
                        self.ask(tenant, id, |reply| Command::Copy { up_to, reply }).await?.unwrap_or_default()
                    }
                    None => Transcript::default(),
                }
            }
        };
        let rules = PromptRules::of(&self.shared, &mut turn);
        let input = turn.input.into_iter().map(|item| item.message).collect();
        let prompt = prepare(&self.shared, tenant, Arc::new(transcript), input, rules).await?;
        Ok(prompt.len())
    }

    async fn continue_from(
        &self,
        tenant: &Tenant,
        turn: Respond,
        previous: ResponseId,
        deadline: Instant,
    ) -> Result<Turn, TurnError> {
        let found = self.previous(tenant, previous, turn.sees_unkept, deadline).await?;
        if found.chain {
            let (asked, follows) = (turn.clone(), Follows::Tip(found.kept.body.tip.clone()));
            let queue = |reply| queued(asked, Some(previous), follows, deadline, reply);
            match self.ask(tenant, found.conversation, queue).await {
                Ok(Taken::Runs(turn)) => return Ok(turn),
                // A retry may have come while the turn that it repeats was about to begin.
                Ok(Taken::NotTip | Taken::Repeats) => {
                    if let Some(turn) = self.repeated(tenant, &turn, deadline).await? {
                        return Ok(turn);
                    }
                }
                Err(TurnError::NoConversation) => return Err(TurnError::NoPrevious),
                Err(error) => return Err(error),
            }
        }
        let history = self.copy(tenant, &found).await?;
        self.begin_chain(tenant, turn, Some(previous), history, deadline).await
    }

    async fn begin_chain(
        &self,
        tenant: &Tenant,
        turn: Respond,
        previous: Option<ResponseId>,
        history: Transcript,
        deadline: Instant,
    ) -> Result<Turn, TurnError> {
        let who = Identity { tenant: tenant.clone(), id: ConversationId(rand::random()) };
        let (reply, answer) = oneshot::channel();
        let history = Transcript::newborn(history, BTreeMap::new(), true);
        let command = queued(turn, previous, Follows::Anything, deadline, reply);
        self.shared.registry.touch(&who).await;
        self.shared.registry.deliver_newborn(&self.shared, &who, history, command);
        match answer.await.unwrap_or_else(|_| Err(Refusal::Lost.into()))? {
            Taken::Runs(turn) => Ok(turn),
            Taken::NotTip | Taken::Repeats => Err(Refusal::Lost.into()),
        }
    }

    /// The response that is to be continued; one that runs is waited for.
    async fn previous(
        &self,
        tenant: &Tenant,
        id: ResponseId,
        sees_unkept: bool,
        deadline: Instant,
    ) -> Result<Found, TurnError> {
        if let Some(running) = self.shared.live.find(tenant.id, id) {
            let mut turn = running.join();
            let ended = tokio::time::timeout_at(deadline, turn.stream.finished()).await;
            ended.map_err(|_| TurnError::QueueTimeout("the response to continue runs still; retry".into()))?;
        }
        let found = if sees_unkept { self.find_any(tenant, id).await? } else { self.find(tenant, id).await? };
        found.ok_or(TurnError::NoPrevious)
    }

    /// Forgets a response that was not to be kept, whose asker has gone.
    pub async fn forget_unkept(&self, tenant: &Tenant, id: ResponseId) -> Result<(), SessionError> {
        match self.find_any(tenant, id).await? {
            Some(found) => self.forget_response(tenant, &found).await,
            None => Ok(()),
        }
    }

    /// The history up to and with a response.
    async fn copy(&self, tenant: &Tenant, found: &Found) -> Result<Transcript, TurnError> {
        let Some(up_to) = found.kept.body.tip.clone() else { return Err(TurnError::NoPrevious) };
        let copied = self.ask(tenant, found.conversation, |reply| Command::Copy { up_to, reply }).await;
        match copied {
            Ok(Some(history)) => Ok(history),
            Ok(None) | Err(SessionError::NoConversation) => Err(TurnError::NoPrevious),
            Err(error) => Err(TurnError::Store(error.to_string())),
        }
    }

    /// Whether this turn was sent before, and what became of it.
    async fn before(&self, tenant: &Tenant, turn: &Respond, deadline: Instant) -> Result<Before, TurnError> {
        let of = match turn.place {
            Place::Alone | Place::NewChain => return Ok(Before::Nothing),
            Place::After(previous) => NewestOf::Continuations(previous.0),
            Place::Conversation(id) => NewestOf::Conversation(id.0),
        };
        let newest = async || -> Result<Option<Found>, TurnError> {
            let newest = self.shared.store.newest_response(&tenant.name, of).await?;
            let since = unix_now() - RETRY_WINDOW_S;
            let same = |found: &StoredResponse| {
                found.response.request == turn.response.request && found.response.created_at >= since
            };
            newest.filter(same).map(read).transpose().map_err(TurnError::from)
        };
        let Some(mut found) = newest().await? else { return Ok(Before::Nothing) };
        if let Some(running) = self.shared.live.find(tenant.id, found.kept.id()) {
            if !running.log.is_stopped() {
                return Ok(Before::Turn(running.join()));
            }
            // It is being broken off right now.
            let ended = tokio::time::timeout_at(deadline, running.join().stream.finished()).await;
            ended.map_err(|_| TurnError::QueueTimeout("the turn that was broken off has not ended; retry".into()))?;
            let Some(ended) = newest().await? else { return Ok(Before::Nothing) };
            found = ended;
        }
        match &found.kept.body.end {
            Some(End::Done(done)) if !done.abandoned => Ok(Before::Turn(self.told(&found).await?)),
            Some(End::Done(_) | End::Failed { .. }) | None => Ok(Before::Broken(Box::new(found))),
        }
    }

    /// Answers once more what is in the conversation already; `None` if that has gone on since.
    async fn regenerate(
        &self,
        tenant: &Tenant,
        turn: &Respond,
        found: Found,
        deadline: Instant,
    ) -> Result<Option<Turn>, TurnError> {
        let answer = found.kept.answer().map(str::to_owned);
        let previous = match turn.place {
            Place::After(previous) => Some(previous),
            Place::Alone | Place::NewChain | Place::Conversation(_) => None,
        };
        let follows = Follows::Broken { tip: found.kept.body.tip, answer, input: found.kept.body.input };
        let again = Respond { input: Vec::new(), ..turn.clone() };
        let queue = |reply| queued(again, previous, follows, deadline, reply);
        match self.ask(tenant, found.conversation, queue).await? {
            Taken::Runs(turn) => Ok(Some(turn)),
            Taken::NotTip | Taken::Repeats => Ok(None),
        }
    }

    /// A response that is in the store, whether or not it can be retrieved.
    async fn find_any(&self, tenant: &Tenant, id: ResponseId) -> Result<Option<Found>, SessionError> {
        self.shared.store.response(&tenant.name, id.0).await?.map(read).transpose()
    }

    /// A response that can be retrieved.
    async fn find(&self, tenant: &Tenant, id: ResponseId) -> Result<Option<Found>, SessionError> {
        let found = self.shared.store.response(&tenant.name, id.0).await?;
        let now = unix_now();
        found.filter(|found| found.response.kept && found.response.expires_at >= now).map(read).transpose()
    }

    /// A response that is over, as its readers heard it.
    async fn told(&self, found: &Found) -> Result<Turn, SessionError> {
        let mut text = String::new();
        if let Some(answer) = found.kept.answer() {
            for record in self.shared.store.items(found.conversation.0, vec![answer.to_owned()]).await? {
                let item = stored::decode(record.id, &record.body);
                let item = item.map_err(|error| SessionError::Store(format!("an answer can't be read: {error}")))?;
                text = text_of(&item.message).into_owned();
            }
        }
        let (item_id, end, cuts) = found.kept.told(text);
        let about = found.kept.body.about.as_str().into();
        let (id, conversation) = (found.kept.id(), Some(found.conversation));
        Ok(Turn { id, conversation, about, stream: told_stream(item_id, end, cuts) })
    }
}

fn read(stored: StoredResponse) -> Result<Found, SessionError> {
    let StoredResponse { response, conversation, chain } = stored;
    let kept = Kept::read(response);
    let kept = kept.map_err(|error| SessionError::Store(format!("a response can't be read: {error}")))?;
    Ok(Found { kept, conversation: ConversationId(conversation), chain })
}

fn queued(
    turn: Respond,
    previous: Option<ResponseId>,
    follows: Follows,
    deadline: Instant,
    reply: Reply<Taken, TurnError>,
) -> Command {
    let span = turn_span(Some(turn.response.id));
    Command::Respond(Box::new(QueuedTurn { turn, previous, follows, deadline, span, reply }))
}

impl From<SessionError> for TurnError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::NoConversation => TurnError::NoConversation,
            SessionError::NoResponse => TurnError::NoPrevious,
            SessionError::TooManyItems { items, most } => TurnError::TooManyItems { items, most },
            SessionError::DuplicateItem(item) => TurnError::DuplicateItem(item),
            SessionError::Overloaded(reason) => TurnError::Overloaded(reason),
            SessionError::Store(reason) => TurnError::Store(reason),
            SessionError::NoItem(_) | SessionError::Busy | SessionError::PinBudget(_) => {
                TurnError::Internal(error.to_string())
            }
            SessionError::Internal(reason) => TurnError::Internal(reason),
        }
    }
}
