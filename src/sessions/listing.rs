//! Which conversations does a tenant have?

use super::Sessions;
use super::messages::{Conversation, ConversationId, ConversationQuery, ListedConversation, SessionError};
use crate::store::{ListQuery, Listed};
use crate::tenants::Tenant;
use crate::types::{KvKey, TokenCount};

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
        let listed = |found: Listed| {
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
