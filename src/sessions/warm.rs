//! How is a conversation's KV brought back before it is needed?
//!
//! By a turn that says nothing: its history is its prompt, so that what a lower tier has is reloaded and what no tier has is
//! encoded, under the same rules as for any turn. Nothing is stored, and the transcript stays as it is.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::Sessions;
use super::command::Command;
use super::messages::{
    Audience, ConversationId, Goal, Overflow, ResponseId, Sampling, SessionError, TurnError, TurnLimits, TurnUsage,
};
use super::prompt::PromptRules;
use super::stream::turn_stream;
use super::transcript::Transcript;
use super::turn::{Ended, prepare, start};
use super::work::Work;
use crate::engine::KvHandle;
use crate::store::NewestOf;
use crate::tenants::Tenant;
use crate::types::TokenCount;

impl Sessions {
    /// Brings a conversation's KV to the device, and resolves when it is there. `Busy`: a turn runs or waits, which brings it
    /// itself. `None`: there is no history to bring.
    pub async fn warm(
        &self,
        tenant: &Tenant,
        id: ConversationId,
        instructions: Option<String>,
    ) -> Result<Option<TurnUsage>, SessionError> {
        self.ask(tenant, id, |reply| Command::Warm { instructions, reply }).await
    }

    /// The conversation, or nameless chain, whose newest response this is. `sees_unkept`: also one that was not to be
    /// stored.
    pub async fn chain_of(
        &self,
        tenant: &Tenant,
        tip: ResponseId,
        sees_unkept: bool,
    ) -> Result<ConversationId, SessionError> {
        let store = &self.shared.store;
        let found = store.response(&tenant.name, tip.0).await?;
        let found = found.filter(|found| found.response.kept || sees_unkept).ok_or(SessionError::NoResponse)?;
        let newest = store.newest_response(&tenant.name, NewestOf::Conversation(found.conversation)).await?;
        if newest.is_some_and(|newest| newest.response.id == tip.0) {
            Ok(ConversationId(found.conversation))
        } else {
            Err(SessionError::NoResponse)
        }
    }
}

/// Runs the silent turn.
pub(super) async fn warm(
    work: Work,
    transcript: Arc<Transcript>,
    mut kv: KvHandle,
    instructions: Option<String>,
    cancelled: watch::Receiver<bool>,
) -> (KvHandle, Result<Option<TurnUsage>, SessionError>) {
    if transcript.items.is_empty() {
        return (kv, Ok(None));
    }
    let warmed = async {
        let Work { shared, who } = &work;
        let deadline = Instant::now() + PATIENCE;
        let _pass = shared.gate.enter(&who.tenant)?;
        let rules = PromptRules {
            instructions,
            overflow: Overflow::Refuse,
            goal: Goal::Encode,
            answer: TokenCount(1),
            arguments: Vec::new(),
        };
        let prompt = prepare(shared, &who.tenant, transcript, Arc::from([]), rules).await?;
        let limits = TurnLimits {
            sampling: Sampling::default(),
            max_tokens: Some(TokenCount(1)),
            stop: Vec::new(),
            queue_deadline: PATIENCE,
            logprobs: None,
            arguments: Vec::new(),
        };
        let running = start(shared, &mut kv, &prompt, limits, Goal::Encode, deadline)?;
        // Nobody reads it; its end is the flag's or the engine's.
        let (mut writer, reader) = turn_stream(String::new(), Audience::Background);
        drop(reader);
        match running.follow(shared, &mut writer, cancelled).await {
            Ended::Answered(answered) => Ok(Some(answered.usage)),
            Ended::Failed(error) => Err(error),
        }
    };
    let warmed: Result<_, TurnError> = warmed.await;
    (kv, warmed.map_err(SessionError::from))
}

/// How long a warming may wait for its place: what is not warm by then is not wanted any more.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

impl From<TurnError> for SessionError {
    fn from(error: TurnError) -> Self {
        match error {
            TurnError::NoConversation => Self::NoConversation,
            TurnError::Store(reason) => Self::Store(reason),
            TurnError::Locked { .. } => Self::Busy,
            TurnError::Internal(reason) | TurnError::Lost(reason) => Self::Internal(reason),
            other => Self::Overloaded(other.to_string()),
        }
    }
}
