//! How does the engine know after a restart how conversations come back?
//!
//! What it has learned is a note in the store: read when the sessions begin, written every few minutes and at the end. What
//! was kept in another form is passed over, since all of it is learned again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Shared;
use crate::engine::SubmitError;
use crate::engine::handle::GoOnError;
use crate::store::StoreError;

const NOTE: &str = "return_rates";
const EVERY: Duration = Duration::from_secs(300);

/// Gives the engine what it knew, then keeps what it learns. Ends with the sessions.
pub(super) async fn keep_up(shared: Weak<Shared>) {
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await; // the first is at once
        let Some(shared) = shared.upgrade() else { return };
        if shared.goes_on.load(Ordering::Relaxed) {
            keep(&shared).await;
        } else {
            recall(&shared).await;
        }
    }
}

/// What can't be read now is tried again the next time, and not written over until then.
async fn recall(shared: &Arc<Shared>) {
    match shared.store.note(NOTE).await {
        Ok(Some(learned)) => match shared.engine.go_on_from(&learned) {
            Ok(silences) => tracing::info!(silences, "eviction goes on from what was learned before"),
            Err(GoOnError::OtherForm) => tracing::info!("eviction learns anew: it was learned in another form before"),
            Err(error) => return tracing::warn!(%error, "the engine was not told what it had learned"),
        },
        Ok(None) => {}
        Err(StoreError::Closed) => return,
        Err(error) => return tracing::warn!(%error, "what eviction had learned was not read"),
    }
    shared.goes_on.store(true, Ordering::Relaxed);
}

/// Writes down what was learned so far.
pub(super) async fn keep(shared: &Shared) {
    if !shared.goes_on.load(Ordering::Relaxed) {
        return;
    }
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
