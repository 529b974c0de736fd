//! What does each command do, between the actor's taking it and its end?
//!
//! Futures over the store and the engine's handle. None touches the actor: what they bring back, it takes in.

use std::sync::Arc;

use tokio::sync::watch;

use super::command::Refusal;
use super::messages::{
    Deleted, FinishReason, Item, ItemStatus, Message, NewItem, OffloadTo, Part, Role, SessionError, TurnError,
    TurnUpdate,
};
use super::registry::Identity;
use super::stream::TurnWriter;
use super::transcript::{Prompt, TokenLog, Transcript, render};
use super::turn::{Answered, Ended, RunningTurn, prepare};
use super::{Shared, new_item_id, stored, unix_now};
use crate::engine::KvHandle;
use crate::store::{Commit, StoreError};

/// What a command's future takes with it.
pub(super) struct Work {
    pub shared: Arc<Shared>,
    pub who: Identity,
}

/// A turn that the engine runs.
pub(super) struct Started {
    pub running: RunningTurn,
    pub prompt: Prompt,
    pub item_id: String,
    pub writer: TurnWriter,
    pub cancelled: watch::Receiver<bool>,
}

/// A turn that is over: what the store has of it, and what the client has yet to hear.
pub(super) struct Closing {
    pub writer: TurnWriter,
    pub end: TurnUpdate,
    pub kept: Option<Kept>,
}

/// What a turn left behind.
pub(super) struct Kept {
    pub item: Option<Arc<Item>>,
    pub log: TokenLog,
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
    Ok(Transcript { items, log, last_used_at: stored.conversation.last_used_at })
}

/// Checks a turn, makes its prompt, and only then makes its input durable.
pub(super) async fn open(
    work: Work,
    transcript: Arc<Transcript>,
    input: Vec<Arc<Item>>,
    instructions: Option<String>,
) -> Result<(Vec<Arc<Item>>, Prompt), TurnError> {
    let messages = input.iter().map(|item| item.message.clone()).collect();
    let prompt = prepare(&work.shared, transcript, messages, instructions).await?;
    if !input.is_empty() {
        commit_items(&work, &input).await?;
    }
    Ok((input, prompt))
}

/// Follows a turn to its end and makes what came of it durable.
pub(super) async fn close(work: Work, kv: KvHandle, started: Option<Started>) -> (KvHandle, Option<Closing>) {
    let Some(Started { running, prompt, item_id, mut writer, cancelled }) = started else { return (kv, None) };
    let answered = match running.follow(&work.shared, &mut writer, cancelled).await {
        Ended::Answered(answered) => answered,
        Ended::Failed(error) => {
            return (kv, Some(Closing { writer, end: TurnUpdate::Failed(error), kept: None }));
        }
    };
    let end = answered.done(item_id.clone());
    if !answered.encoded {
        return (kv, Some(Closing { writer, end, kept: None }));
    }
    let item = (!answered.is_silent()).then(|| Arc::new(answer_item(item_id, &answered)));
    let (log, write) = prompt.answered(&answered.said);
    let commit = Commit {
        items: item.iter().map(|item| (item.id.clone(), stored::encode(item))).collect(),
        log: Some(write),
        encoded: Some(log.encoded()),
        last_used_at: unix_now(),
    };
    let closing = match work.shared.store.commit(work.who.id.0, commit).await {
        Ok(()) => Closing { writer, end, kept: Some(Kept { item, log }) },
        Err(error) => Closing { writer, end: TurnUpdate::Failed(error.into()), kept: None },
    };
    (kv, Some(closing))
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
            // What the template can't render without the item has no front in common with anything.
            match render(&language, None, rest.map(|(_, item)| &item.message), false) {
                Ok(rendered) => transcript.log.prefix_of(&language, &rendered).0,
                Err(_) => 0,
            }
        });
        let log_keep = log_keep.await.map_err(|error| SessionError::Internal(error.to_string()))?;
        kv.offload(OffloadTo::None).await?;
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
    if !work.shared.store.delete(&work.who.tenant.name, work.who.id.0).await? {
        return Err(SessionError::NoConversation);
    }
    Ok(Deleted {
        device_bytes: forgotten.device_bytes,
        host_bytes: forgotten.host_bytes,
        kept_shared_bytes: forgotten.kept_shared_bytes,
    })
}

pub(super) async fn commit_items(work: &Work, items: &[Arc<Item>]) -> Result<(), StoreError> {
    let items = items.iter().map(|item| (item.id.clone(), stored::encode(item))).collect();
    let commit = Commit { items, last_used_at: unix_now(), ..Commit::default() };
    work.shared.store.commit(work.who.id.0, commit).await
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
    let content = vec![Part::Text(answered.said.text.clone())];
    Item { id, message: Message { role: Role::Assistant, name: None, content }, status }
}
