//! What happens in the next step? Pure: no clock, channel, thread or randomness of its own.

use super::TurnRequest;
use crate::kv::block::PrefixHash;
use crate::types::{KvKey, TenantId, TenantKey, TurnId};

/// A turn to start.
#[derive(Clone, Debug)]
pub struct StartTurn {
    pub turn: TurnId,
    pub key: KvKey,
    pub tenant: TenantId,
    pub tenant_key: TenantKey,
    /// The chain over the prompt's full blocks.
    pub hashes: Vec<PrefixHash>,
    pub request: TurnRequest,
}
