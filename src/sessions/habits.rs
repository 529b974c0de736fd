//! How does the engine know after a restart how conversations come back?
//!
//! What it has learned is a note in the store: read when the sessions begin, written every few minutes and at the end. What
//! was kept in another form is passed over, since all of it is learned again.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Shared;
use crate::engine::SubmitError;
use crate::store::StoreError;

const NOTE: &str = "return_rates";
const EVERY: Duration = Duration::from_secs(300);

/// Gives the engine what it knew, then keeps what it learns. Ends with the sessions.
pub(super) async fn keep_up(shared: Weak<Shared>) {
    if let Some(shared) = shared.upgrade() {
        recall(&shared).await;
    }
    let mut ticks = tokio::time::interval(EVERY);
    ticks.tick().await; // the first is at once
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        keep(&shared).await;
    }
}

async fn recall(shared: &Arc<Shared>) {
    match shared.store.note(NOTE).await {
        Ok(Some(learned)) => match shared.engine.go_on_from(&learned) {
            Ok(silences) => tracing::info!(silences, "eviction goes on from what was learned before"),
            Err(error) => tracing::info!(%error, "eviction learns anew"),
        },
        Ok(None) | Err(StoreError::Closed) => {}
        Err(error) => tracing::warn!(%error, "what eviction had learned was not read"),
    }
}

/// Writes down what was learned so far.
pub(super) async fn keep(shared: &Shared) {
    let learned = match shared.engine.learned().await {
        Ok(learned) => learned,
        Err(SubmitError::Gone) => return,
        Err(error) => return tracing::debug!(%error, "the engine was not asked what it has learned"),
    };
    match shared.store.keep_note(NOTE, learned).await {
        Ok(()) | Err(StoreError::Closed) => {}
        Err(error) => tracing::warn!(%error, "what eviction has learned was not kept"),
    }
}
