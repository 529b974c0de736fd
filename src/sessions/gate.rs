//! May a turn begin, and how are the running ones brought to an end?
//!
//! Each turn holds a `Pass` from its begin to its last commit, and with it its tenant's leave to run one turn more. Draining refuses new passes, waits for those given out, and
//! at the deadline asks their turns to end as cancelled.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::messages::TurnError;
use crate::telemetry::metrics::LIMITED;
use crate::tenants::Tenant;
use crate::tenants::quota::{CONCURRENT_TURNS, TurnPermit};

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
    _permit: TurnPermit,
}

impl Gate {
    pub fn open() -> Arc<Self> {
        Arc::new(Self { turns: watch::Sender::new(Turns::default()), cancel: watch::Sender::new(false) })
    }

    /// Lets a turn in, unless the server drains or its tenant has enough of them.
    pub fn enter(self: &Arc<Self>, tenant: &Tenant) -> Result<Pass, TurnError> {
        let permit = tenant.quota.begin_turn().inspect_err(|_| {
            LIMITED.add(1, &[("tenant", &tenant.name), ("limit", CONCURRENT_TURNS)]);
        })?;
        let entered = self.turns.send_if_modified(|turns| {
            turns.running += usize::from(!turns.draining);
            !turns.draining
        });
        if entered { Ok(Pass { gate: Arc::clone(self), _permit: permit }) } else { Err(TurnError::Draining) }
    }

    pub fn is_draining(&self) -> bool {
        self.turns.borrow().draining
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenants::quota::{Limits, Quota, TurnsExceeded};
    use crate::types::{TenantId, TenantKey};

    fn tenant(concurrent_turns: u32) -> Tenant {
        let limits = Limits { requests_per_minute: None, concurrent_turns, sockets: 0 };
        let quota = Arc::new(Quota::new(limits, std::time::Instant::now()));
        Tenant { id: TenantId(0), name: "a".into(), key: TenantKey([0; 32]), models: None, quota }
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn draining_waits_for_the_turns_that_run_and_lets_none_in() {
        let gate = Gate::open();
        let pass = gate.enter(&tenant(8)).unwrap();
        let draining = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.drain(LONG).await }
        });
        gate.turns.subscribe().wait_for(|turns| turns.draining).await.unwrap();
        assert_eq!(gate.enter(&tenant(8)).err(), Some(TurnError::Draining));
        assert!(!draining.is_finished());
        drop(pass);
        draining.await.unwrap();
        assert!(!*gate.cancelled().borrow());
    }

    #[test]
    fn a_tenant_with_enough_turns_begins_no_more_until_one_is_over() {
        let (gate, tenant) = (Gate::open(), tenant(1));
        let pass = gate.enter(&tenant).unwrap();
        assert_eq!(gate.enter(&tenant).err(), Some(TurnError::TooManyTurns(TurnsExceeded { limit: 1 })));
        drop(pass);
        assert!(gate.enter(&tenant).is_ok());
    }

    #[tokio::test]
    async fn at_the_deadline_running_turns_are_asked_to_end_and_waited_for() {
        let gate = Gate::open();
        let pass = gate.enter(&tenant(8)).unwrap();
        let mut cancelled = gate.cancelled();
        let turn = tokio::spawn(async move {
            cancelled.wait_for(|cancelled| *cancelled).await.unwrap();
            drop(pass);
        });
        gate.drain(Duration::ZERO).await;
        turn.await.unwrap();
    }
}
