//! What does a client hear while a conversation is warmed, over HTTP or a socket?
//!
//! What it will cost, and then what it did; or why it was not done.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::time::Instant;

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::{ApiState, ids};
use crate::sessions::messages::{ConversationId, ConversationResidency, ResponseId, ReturnPath, SessionError};
use crate::tenants::Tenant;

/// Whose KV to warm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Wanted {
    Conversation(ConversationId),
    /// The chain that this response is the tip of, though it was not to be stored if `sees_unkept`.
    Chain {
        tip: ResponseId,
        sees_unkept: bool,
    },
}

impl Wanted {
    /// The conversation that this is; an error if the tenant has none such.
    pub async fn find(self, state: &ApiState, tenant: &Tenant) -> Result<ConversationId, ApiError> {
        match self {
            Wanted::Conversation(id) => Ok(id),
            Wanted::Chain { tip, sees_unkept } => Ok(state.sessions.chain_of(tenant, tip, sees_unkept).await?),
        }
    }
}

/// Most steps that one warming tells.
pub const STATES: usize = 2;

/// `tier`: where to bring it.
pub fn check_tier(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    match fields.string("tier")? {
        None | Some("device") => Ok(()),
        Some(_) => Err(ApiError::unsupported_value("tier", "a session is warmed on the device; leave `tier` out")),
    }
}

/// One thing to tell.
pub struct Step {
    pub id: ConversationId,
    /// `warming`, then `warm`; or `skipped` or `refused`.
    pub state: &'static str,
    cost: Cost,
    reason: Option<&'static str>,
}

impl Step {
    pub fn object(&self) -> Value {
        let Cost { from, reload_tokens, reencode_tokens, bytes, predicted_ms, elapsed_ms } = self.cost;
        let mut object = json!({
            "conversation": ids::conversation(self.id),
            "state": self.state,
            "cost": {
                "from": from, "reload_tokens": reload_tokens, "reencode_tokens": reencode_tokens, "bytes": bytes,
                "predicted_ms": predicted_ms, "elapsed_ms": elapsed_ms,
            },
        });
        if let (Value::Object(object), Some(reason)) = (&mut object, self.reason) {
            object.insert("reason".into(), json!(reason));
        }
        object
    }
}

/// Warms a conversation on the device, and tells of it.
pub async fn warm(
    state: &ApiState,
    tenant: &Tenant,
    wanted: Wanted,
    instructions: Option<String>,
    told: impl Fn(Step),
) -> Result<(), ApiError> {
    let id = wanted.find(state, tenant).await?;
    let started = Instant::now();
    let before = state.sessions.residency(tenant, id).await?;
    // Even if there is nothing to bring.
    state.sessions.reopen(tenant, id).await?;
    let predicted = Cost::predicted(&before);
    let tell = |state, cost, reason| told(Step { id, state, cost, reason });
    let nothing_to_do = before.predicted.is_some_and(|predicted| predicted.choice == ReturnPath::Resident);
    if nothing_to_do && instructions.is_none() || before.turns == 0 && before.tokens.0 == 0 {
        tell("skipped", predicted, None);
        return Ok(());
    }
    // Turns that somebody waits for come first.
    if (state.status)().queued > 0 {
        tell("refused", predicted, Some("pressure"));
        return Ok(());
    }
    tell("warming", predicted, None);
    let elapsed_ms = |cost: Cost| Cost { elapsed_ms: Some(ms(started)), ..cost };
    match state.sessions.warm(tenant, id, instructions).await {
        Ok(Some(usage)) => {
            let cost = Cost {
                reload_tokens: u64::from(usage.prompt.reloaded().0),
                reencode_tokens: u64::from(usage.prompt.reencoded.0),
                ..predicted
            };
            tell("warm", elapsed_ms(cost), None);
        }
        Ok(None) | Err(SessionError::Busy) => tell("skipped", elapsed_ms(predicted), None),
        Err(SessionError::Overloaded(_)) => {
            tell("refused", elapsed_ms(predicted), Some("budget"));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// What bringing a conversation back takes.
#[derive(Clone, Copy)]
struct Cost {
    from: &'static str,
    reload_tokens: u64,
    reencode_tokens: u64,
    bytes: u64,
    predicted_ms: Option<u64>,
    elapsed_ms: Option<u64>,
}

impl Cost {
    fn predicted(of: &ConversationResidency) -> Self {
        let found = of.residency.as_ref().map(|found| (found.device, found.host, found.disk));
        let (device, host, disk) = found.unwrap_or_default();
        let missing = u64::from(of.tokens.0.saturating_sub(device.tokens.0));
        let (lower, from) = if host.tokens >= disk.tokens { (host, "host") } else { (disk, "disk") };
        let below = u64::from(lower.tokens.0.saturating_sub(device.tokens.0)).min(missing);
        let bytes = lower.bytes_private + lower.bytes_shared;
        let token_bytes = bytes.checked_div(u64::from(lower.tokens.0)).unwrap_or(0);
        let predicted_ms = of.predicted.map(|predicted| match predicted.choice {
            ReturnPath::Resident => 0,
            ReturnPath::Reload => predicted.reload_ms.unwrap_or(predicted.reencode_ms),
            ReturnPath::Reencode => predicted.reencode_ms,
        });
        Self {
            from: if missing == 0 {
                "device"
            } else if below > 0 {
                from
            } else {
                "none"
            },
            reload_tokens: below,
            reencode_tokens: missing - below,
            bytes: below * token_bytes,
            predicted_ms,
            elapsed_ms: None,
        }
    }
}
