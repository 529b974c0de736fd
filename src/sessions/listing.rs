//! Which conversations does a tenant have, and which responses and results are over?

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::messages::{Conversation, ConversationId, ConversationQuery, ListedConversation, SessionError};
use super::once::RESULT_TTL_S;
use super::{Sessions, Shared, unix_now};
use crate::store::ListQuery;
use crate::tenants::Tenant;
use crate::types::{KvKey, TokenCount};

const SWEEP: Duration = Duration::from_secs(60);

impl Sessions {
    /// A page of the tenant's conversations, in the order in which they were made; `None` if `after` is none of them.
    pub async fn list(
        &self,
        tenant: &Tenant,
        query: ConversationQuery,
    ) -> Result<Option<Vec<ListedConversation>>, SessionError> {
        let ConversationQuery { newest_first, after, limit, metadata } = query;
        let query = ListQuery { newest_first, after: after.map(|id| id.0), limit, metadata };
        let Some(page) = self.shared.store.conversations(&tenant.name, query).await? else { return Ok(None) };
        let listed = |found: crate::store::Listed| {
            let record = found.conversation;
            ListedConversation {
                tokens: TokenCount(u32::try_from(found.log_tokens).unwrap_or(u32::MAX)),
                residency: self.shared.engine.residency(KvKey(record.id)),
                conversation: Conversation {
                    id: ConversationId(record.id),
                    created_at: record.created_at,
                    metadata: record.metadata,
                },
            }
        };
        Ok(Some(page.into_iter().map(listed).collect()))
    }
}

/// Forgets what is over, now and then. Ends with the sessions.
pub(super) async fn sweep(shared: Weak<Shared>) {
    let mut ticks = tokio::time::interval(SWEEP);
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        sweep_once(&shared).await;
    }
}

async fn sweep_once(shared: &Arc<Shared>) {
    let now = unix_now();
    let swept = shared.store.sweep(now, now - RESULT_TTL_S).await;
    match swept {
        Ok(chains) => {
            for (tenant, id) in chains {
                // Its KV has a key that nobody uses any more: the evictor takes it in its time.
                if let Err(error) = shared.store.delete(&tenant, id).await {
                    tracing::warn!(%error, "a chain without responses was not deleted");
                }
            }
        }
        Err(crate::store::StoreError::Closed) => {}
        Err(error) => tracing::warn!(%error, "what is over was not swept"),
    }
}
