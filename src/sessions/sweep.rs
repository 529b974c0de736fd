//! Which responses, chains and results are over, and who forgets them?
//!
//! A task on the sessions' thread, once a minute.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::once::RESULT_TTL_S;
use super::{Shared, unix_now};
use crate::store::StoreError;

const SWEEP: Duration = Duration::from_secs(60);

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
        Err(StoreError::Closed) => {}
        Err(error) => tracing::warn!(%error, "what is over was not swept"),
    }
}
