//! How does a conversation branch?
//!
//! A branch has the history up to an item, with its tokens, and none of the KV: the blocks are found by their hashes when
//! its first turn comes, in whatever tier they are then. So nothing is copied, and what is shared is never written to.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::command::Command;
use super::messages::{Conversation, ConversationId, SessionError};
use super::news::News;
use super::transcript::Transcript;
use super::work::rows;
use super::{Sessions, unix_now};
use crate::store::{Commit, ConversationRecord};
use crate::tenants::Tenant;
use crate::types::{KvKey, TokenCount};

/// A branch that was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forked {
    pub conversation: Conversation,
    /// Tokens of its history whose KV some tier has.
    pub shared: TokenCount,
    pub items: usize,
}

impl Sessions {
    /// Makes a conversation with the history of another up to and with an item, or with all of it: then `Busy` while a turn
    /// runs or waits, since nobody could say what all of it is. Durable when this resolves.
    pub async fn fork(
        &self,
        tenant: &Tenant,
        id: ConversationId,
        after_item: Option<String>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Forked, SessionError> {
        let history = self.ask(tenant, id, |reply| Command::Fork { after_item, reply }).await?;
        let Transcript { items, mut log, .. } = self.with_its_own_log(history).await?;
        log.set_encoded(0);
        let held = self.shared.engine.residency(KvKey(id.0));
        let held = held.map_or(TokenCount(0), |held| held.device.tokens.max(held.host.tokens).max(held.disk.tokens));
        let (fork, now) = (rand::random(), unix_now());
        let record = ConversationRecord {
            id: fork,
            tenant: tenant.name.clone(),
            created_at: now,
            last_used_at: now,
            metadata: metadata.clone(),
            chain: false,
            parent: Some(id.0),
        };
        let commit = Commit {
            items: rows(&items),
            log: Some(log.whole()),
            encoded: Some(log.encoded()),
            last_used_at: now,
            ..Commit::default()
        };
        self.shared.store.begin(record, commit).await?;
        let (fork, tokens) = (ConversationId(fork), log.len());
        self.shared.unread.add(News::Forked { tenant: tenant.id, of: id, fork, tokens });
        let conversation = Conversation { id: fork, created_at: now, metadata };
        Ok(Forked { conversation, shared: held.min(log.len()), items: items.len() })
    }

    /// Cuts the log to what the items stand for.
    async fn with_its_own_log(&self, mut history: Transcript) -> Result<Transcript, SessionError> {
        let language = Arc::clone(&self.shared.language);
        let cut = tokio::task::spawn_blocking(move || {
            let keep = history.log.standing_for(&language, history.items.iter().map(|item| &item.message));
            history.log.truncate(keep);
            history
        });
        cut.await.map_err(|error| SessionError::Internal(error.to_string()))
    }
}
