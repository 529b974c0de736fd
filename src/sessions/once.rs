//! Has this very request been made before?
//!
//! A client names its request with a key. While it runs nobody else may run it; when it is over its result is kept, and
//! given to whoever sends the same again. What the key and the result are made of is the caller's business.

use std::sync::Arc;
use std::time::Duration;

use dashmap::{DashMap, Entry};
use tokio::sync::watch;

use super::messages::SessionError;
use super::{Sessions, Shared, unix_now};
use crate::store::ResultRecord;
use crate::tenants::Tenant;

/// A result is kept for a day.
pub(super) const RESULT_TTL_S: i64 = 24 * 3600;

type Key = [u8; 32];

/// A client may send a request again as soon as it has the last byte of the result, which is being kept just then.
const KEEPING: Duration = Duration::from_millis(500);

/// The keys whose requests run; who waits for one is told of its end.
#[derive(Default)]
pub(super) struct Running {
    keys: DashMap<Key, watch::Sender<()>>,
}

impl Running {
    /// Takes a key, or gives back what its end is told by.
    fn take(&self, key: Key) -> Result<(), watch::Receiver<()>> {
        match self.keys.entry(key) {
            Entry::Occupied(running) => Err(running.get().subscribe()),
            Entry::Vacant(free) => {
                free.insert(watch::Sender::new(()));
                Ok(())
            }
        }
    }
}

/// What is known of a request.
pub enum Once {
    /// Nothing: make it.
    New(Claim),
    /// It runs.
    Runs,
    /// It is over, and this came of it.
    Over(Vec<u8>),
    /// Another request had this key.
    Another,
}

/// The right to make a request; dropping it without a result gives the key free.
pub struct Claim {
    shared: Arc<Shared>,
    key: Key,
    request: [u8; 32],
}

impl Sessions {
    /// Asks for the right to make a request, by the client's key and a digest of the request.
    pub async fn once(&self, tenant: &Tenant, key: &str, request: [u8; 32]) -> Result<Once, SessionError> {
        let mut hasher = blake3::Hasher::new();
        for field in [tenant.name.as_str(), key] {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field.as_bytes());
        }
        let key = *hasher.finalize().as_bytes();
        // The claim comes first, so that of two only one looks and finds nothing.
        if let Err(mut running) = self.shared.once.take(key) {
            // The sender goes with the claim.
            let ended = tokio::time::timeout(KEEPING, running.changed()).await.is_ok();
            if !ended || self.shared.once.take(key).is_err() {
                return Ok(Once::Runs);
            }
        }
        let claim = Claim { shared: Arc::clone(&self.shared), key, request };
        match self.shared.store.result(key, unix_now() - RESULT_TTL_S).await? {
            None => Ok(Once::New(claim)),
            Some(kept) if kept.request == request => Ok(Once::Over(kept.body)),
            Some(_) => Ok(Once::Another),
        }
    }
}

impl Claim {
    /// Keeps what came of the request.
    pub async fn keep(self, body: Vec<u8>) {
        let result = ResultRecord { request: self.request, body };
        if let Err(error) = self.shared.store.keep_result(self.key, unix_now(), result).await {
            tracing::warn!(%error, "the result of a request with a key was not kept");
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.once.keys.remove(&self.key);
    }
}
