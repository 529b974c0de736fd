//! What does each command do, between the actor's taking it and its end?
//!
//! Futures over the store and the engine's handle. None touches the actor: what they bring back, it takes in.

use std::sync::Arc;

use tokio::sync::watch;

use super::command::Refusal;
use super::kept::Kept;
use super::live::Presence;
use super::messages::{
    Deleted, FinishReason, Item, ItemStatus, Message, NewItem, OffloadTo, Part, Role, SessionError, TurnError,
    TurnUpdate,
};
use super::news::News;
use super::prompt::{Known, Prompt, PromptRules};
use super::registry::Identity;
use super::stream::TurnWriter;
use super::token_log::TokenLog;
use super::transcript::{Birth, Transcript};
use super::turn::{Answered, Ended, RunningTurn, prepare};
use super::{Shared, new_item_id, stored, unix_now};
use crate::engine::KvHandle;
use crate::store::{Commit, ConversationRecord, StoreError};
use crate::types::KvKey;

/// What a command's future takes with it.
pub(super) struct Work {
    pub shared: Arc<Shared>,
    pub who: Identity,
}

/// What a turn begins with.
pub(super) struct Opening {
    /// The history before it, without what it replaces.
    pub transcript: Arc<Transcript>,
    pub input: Vec<Arc<Item>>,
    pub rules: PromptRules,
    /// The item that its answer replaces.
    pub replaces: Option<String>,
    pub response: Kept,
}

/// A turn whose input is durable.
pub(super) struct Opened {
    pub input: Vec<Arc<Item>>,
    pub replaces: Option<String>,
    pub prompt: Prompt,
    pub response: Kept,
}

/// A turn that the engine runs.
pub(super) struct Started {
    pub running: RunningTurn,
    pub prompt: Prompt,
    pub response: Kept,
    pub item_id: String,
    pub writer: TurnWriter,
    pub cancelled: watch::Receiver<bool>,
    pub presence: Presence,
}

/// What the engine made of a turn.
pub(super) enum Outcome {
    /// Refused before anything was stored.
    Refused,
    /// Refused after its input was: the response says so.
    Unstarted(Box<Kept>, TurnError),
    Started(Box<Started>),
}

/// A turn that is over: what the store has of it, and what the client has yet to hear.
pub(super) struct Closing {
    pub writer: TurnWriter,
    pub end: TurnUpdate,
    pub left: Option<Left>,
    /// Given up when the client has been told.
    pub presence: Presence,
}

/// What a turn left behind.
pub(super) struct Left {
    pub item: Option<Arc<Item>>,
    pub log: TokenLog,
    pub known: Known,
}

/// The history, from the store.
pub(super) async fn load(work: Work) -> Result<Transcript, Refusal> {
    let Work { shared, who } = work;
    let stored = match shared.store.load(&who.tenant.name, who.id.0).await {
        Ok(Some(stored)) => stored,
        Ok(None) => return Err(Refusal::NoConversation),
        Err(error) => return Err(Refusal::Store(error.to_string())),
    };
    let items: Result<Vec<_>, _> =
        stored.items.into_iter().map(|record| stored::decode(record.id, &record.body).map(Arc::new)).collect();
    let items = items.map_err(|error| Refusal::Store(format!("an item of {} can't be read: {error}", who.id)))?;
    let log = TokenLog::new(stored.log, stored.encoded);
    Ok(Transcript { items, log, last_used_at: stored.conversation.last_used_at, ..Transcript::default() })
}

/// Checks a turn, makes its prompt, and only then makes its input durable.
pub(super) async fn open(work: Work, opening: Opening) -> Result<Opened, TurnError> {
    let Opening { transcript, input, rules, replaces, mut response } = opening;
    let messages = input.iter().map(|item| item.message.clone()).collect();
    let prompt = prepare(&work.shared, &work.who.tenant, Arc::clone(&transcript), messages, rules).await?;
    let tip = input.last().map(|item| item.id.as_str()).or_else(|| transcript.tip());
    response.body.tip = tip.map(str::to_owned);
    if response.body.input.is_empty() {
        response.body.input = input.iter().map(|item| item.id.clone()).collect();
    }
    let commit = Commit {
        remove: replaces.clone(),
        items: rows(&input),
        last_used_at: unix_now(),
        response: Some(response.record()),
        ..Commit::default()
    };
    let store = &work.shared.store;
    match &transcript.unborn {
        None => store.commit(work.who.id.0, commit).await?,
        Some(birth) => {
            let items = [rows(&transcript.items), commit.items].concat();
            let (log, encoded) = (Some(transcript.log.whole()), Some(transcript.log.encoded()));
            store.begin(record(&work, birth), Commit { items, log, encoded, ..commit }).await?;
            work.shared.unread.add(News::Made { tenant: work.who.tenant.id, id: work.who.id });
        }
    }
    Ok(Opened { input, replaces, prompt, response })
}

/// The row of a conversation that is about to be stored.
fn record(work: &Work, birth: &Birth) -> ConversationRecord {
    ConversationRecord {
        id: work.who.id.0,
        tenant: work.who.tenant.name.clone(),
        created_at: birth.created_at,
        last_used_at: birth.created_at,
        metadata: birth.metadata.clone(),
        chain: birth.chain,
        parent: None,
    }
}

/// Follows a turn to its end and makes what came of it durable.
pub(super) async fn close(work: Work, kv: KvHandle, outcome: Outcome) -> (KvHandle, Option<Closing>) {
    let started = match outcome {
        Outcome::Refused => return (kv, None),
        Outcome::Unstarted(response, error) => {
            fail(&work, *response, &error).await;
            return (kv, None);
        }
        Outcome::Started(started) => *started,
    };
    let Started { running, prompt, response, item_id, mut writer, cancelled, presence } = started;
    let answered = match running.follow(&work.shared, &mut writer, cancelled).await {
        Ended::Answered(answered) => answered,
        Ended::Failed(error) => {
            fail(&work, response, &error).await;
            return (kv, Some(Closing { writer, end: TurnUpdate::Failed(error), left: None, presence }));
        }
    };
    let done = answered.done(item_id.clone());
    let item = (!answered.is_silent()).then(|| Arc::new(answer_item(item_id, &answered)));
    let ended = response.done(&done, &writer.cuts(), answered.stopped, item.is_some());
    let mut commit = Commit { last_used_at: unix_now(), response: Some(ended), ..Commit::default() };
    let mut left = None;
    if answered.encoded {
        let number = prompt.turn;
        let (log, write, mut known) = prompt.answered(&answered.said);
        commit.items = item.iter().map(|item| (item.id.clone(), stored::encode(item))).collect();
        (commit.log, commit.encoded) = (Some(write), Some(log.encoded()));
        commit.turns = Some(number);
        if let Some(item) = &item {
            known = known.answered(&item.message);
            work.shared.recall.keep(work.who.tenant.id, KvKey(work.who.id.0), &known, log.clone());
        }
        left = Some(Left { item, log, known });
    }
    let closing = match work.shared.store.commit(work.who.id.0, commit).await {
        Ok(()) => Closing { writer, end: TurnUpdate::Done(done), left, presence },
        Err(error) => Closing { writer, end: TurnUpdate::Failed(error.into()), left: None, presence },
    };
    (kv, Some(closing))
}

/// Says of a response that its turn failed. If even that can't be stored, it is one that was cut off.
async fn fail(work: &Work, response: Kept, error: &TurnError) {
    let commit = Commit { last_used_at: unix_now(), response: Some(response.failed(error)), ..Commit::default() };
    if let Err(error) = work.shared.store.commit(work.who.id.0, commit).await {
        tracing::error!(%error, session = %work.who.id, "the end of a failed turn was not stored");
    }
}

/// Removes an item: first its KV, which can't be told apart in the blocks that follow it, then the item and the log from
/// there on. Answers how much of the log is kept.
pub(super) async fn remove(
    work: Work,
    transcript: Arc<Transcript>,
    index: usize,
    kv: KvHandle,
) -> (KvHandle, Result<usize, SessionError>) {
    let removed = async {
        let item = transcript.items[index].id.clone();
        let language = Arc::clone(&work.shared.language);
        let log_keep = tokio::task::spawn_blocking(move || {
            let rest = transcript.items.iter().enumerate().filter(|(at, _)| *at != index);
            transcript.log.standing_for(&language, rest.map(|(_, item)| &item.message))
        });
        let log_keep = log_keep.await.map_err(|error| SessionError::Internal(error.to_string()))?;
        kv.offload(OffloadTo::None).await?;
        work.shared.recall.forget(work.who.tenant.id, KvKey(work.who.id.0));
        if work.shared.store.delete_item(work.who.id.0, &item, log_keep).await? {
            Ok(log_keep)
        } else {
            Err(SessionError::NoItem(item))
        }
    };
    let removed = removed.await;
    (kv, removed)
}

/// Gives up the KV in every tier, then deletes the conversation.
pub(super) async fn delete(work: Work, kv: KvHandle) -> Result<Deleted, SessionError> {
    let forgotten = kv.forget().await?;
    work.shared.recall.forget(work.who.tenant.id, KvKey(work.who.id.0));
    if !work.shared.store.delete(&work.who.tenant.name, work.who.id.0).await? {
        return Err(SessionError::NoConversation);
    }
    work.shared.unread.add(News::Deleted(work.who.id));
    Ok(Deleted {
        device_bytes: forgotten.device_bytes,
        host_bytes: forgotten.host_bytes,
        disk_bytes: forgotten.disk_bytes,
        remaining_bytes: forgotten.remaining_bytes,
        kept_shared_bytes: forgotten.kept_shared_bytes,
    })
}

pub(super) async fn commit_items(work: &Work, items: &[Arc<Item>]) -> Result<(), StoreError> {
    let commit = Commit { items: rows(items), last_used_at: unix_now(), ..Commit::default() };
    work.shared.store.commit(work.who.id.0, commit).await
}

/// Items as the store takes them.
pub(super) fn rows(items: &[Arc<Item>]) -> Vec<(String, String)> {
    items.iter().map(|item| (item.id.clone(), stored::encode(item))).collect()
}

/// New items with their ids.
pub(super) fn new_items(items: Vec<NewItem>) -> Vec<Arc<Item>> {
    let item = |NewItem { id, message }| {
        Arc::new(Item { id: id.unwrap_or_else(new_item_id), message, status: ItemStatus::Completed })
    };
    items.into_iter().map(item).collect()
}

fn answer_item(id: String, answered: &Answered) -> Item {
    let status = match answered.finish {
        FinishReason::Stop => ItemStatus::Completed,
        FinishReason::Length | FinishReason::Cancelled => ItemStatus::Incomplete,
    };
    Item { id, message: answer_message(answered), status }
}

/// What was said, as the history has it.
pub(super) fn answer_message(answered: &Answered) -> Message {
    Message::new(Role::Assistant, vec![Part::Text(answered.said.text.clone())])
}
