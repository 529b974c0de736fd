//! How is a turn answered that belongs to no stored conversation?
//!
//! The client sends all messages; nothing is stored. Its KV has a key that nobody else knows and ends with the turn: its
//! blocks are the first to go, and serve as shared prefixes until then.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::Shared;
use super::messages::{Message, TurnError, TurnLimits, TurnUpdate};
use super::stream::{TurnStream, turn_stream};
use super::turn::{Ended, prepare, start};
use crate::tenants::Tenant;
use crate::types::KvKey;

/// Starts a stateless turn. It runs as a task of its own, and ends when the stream is dropped.
pub(super) async fn complete(
    shared: &Arc<Shared>,
    tenant: &Tenant,
    messages: Vec<Message>,
    instructions: Option<String>,
    limits: TurnLimits,
) -> Result<TurnStream, TurnError> {
    let deadline = Instant::now() + limits.queue_deadline;
    let pass = shared.gate.enter(tenant)?;
    let prompt = prepare(shared, Arc::default(), messages.into(), instructions).await?;
    let mut kv = shared.engine.kv(tenant.id, tenant.key, KvKey(rand::random()));
    let running = start(shared, &mut kv, &prompt, limits, deadline)?;
    let item_id = super::new_item_id();
    let (mut writer, stream) = turn_stream(None, item_id.clone());
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let (_never, uncancelled) = watch::channel(false);
        let ended = running.follow(&shared, &mut writer, uncancelled).await;
        kv.end();
        writer.end(match ended {
            Ended::Answered(answered) => answered.done(item_id),
            Ended::Failed(error) => TurnUpdate::Failed(error),
        });
        drop(pass);
    });
    Ok(stream)
}
