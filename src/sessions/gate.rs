//! May a turn begin, and how are the running ones brought to an end?
//!
//! Each turn holds a `Pass` from its begin to its last commit. Draining refuses new passes, waits for those given out, and
//! at the deadline asks their turns to end as cancelled.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::messages::TurnError;

#[derive(Clone, Copy, Default)]
struct Turns {
    running: usize,
    draining: bool,
}

/// The way in for turns.
pub(super) struct Gate {
    turns: watch::Sender<Turns>,
    cancel: watch::Sender<bool>,
}

/// A turn's leave to run; dropping it says that the turn is over.
pub(super) struct Pass {
    gate: Arc<Gate>,
}

impl Gate {
    pub fn open() -> Arc<Self> {
        Arc::new(Self { turns: watch::Sender::new(Turns::default()), cancel: watch::Sender::new(false) })
    }

    /// Lets a turn in, unless the server drains.
    pub fn enter(self: &Arc<Self>) -> Result<Pass, TurnError> {
        let entered = self.turns.send_if_modified(|turns| {
            turns.running += usize::from(!turns.draining);
            !turns.draining
        });
        if entered { Ok(Pass { gate: Arc::clone(self) }) } else { Err(TurnError::Draining) }
    }

    /// Turns true when running turns must end.
    pub fn cancelled(&self) -> watch::Receiver<bool> {
        self.cancel.subscribe()
    }

    /// Resolves when no turn runs and none can begin. Turns that run past the deadline are cancelled, not abandoned.
    pub async fn drain(&self, deadline: Duration) {
        self.turns.send_modify(|turns| turns.draining = true);
        let mut turns = self.turns.subscribe();
        let over = |turns: &Turns| turns.running == 0;
        if tokio::time::timeout(deadline, turns.wait_for(over)).await.is_err() {
            let running = self.turns.borrow().running;
            tracing::info!(running, "the drain deadline is over; running turns end here");
            self.cancel.send_replace(true);
            // The sender is ours, so this can't fail.
            drop(turns.wait_for(over).await);
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.turns.send_modify(|turns| turns.running -= 1);
    }
}
