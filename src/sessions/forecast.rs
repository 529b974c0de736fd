//! What would it take to bring a conversation's KV back to the device?
//!
//! An estimate out of the rates that the engine has measured, for those who look; the engine decides for itself.

use super::messages::{Predicted, ReturnPath};
use crate::engine::status::{EngineStatus, Residency};
use crate::types::TokenCount;

/// `tokens`: the history as the KV has it. `None` until the engine has measured what the forecast needs.
pub(super) fn predict(tokens: TokenCount, residency: Option<&Residency>, status: &EngineStatus) -> Option<Predicted> {
    let (device, host) = residency.map(|found| (found.device, found.host)).unwrap_or_default();
    let missing = u64::from(tokens.0.saturating_sub(device.tokens.0));
    if missing == 0 {
        return Some(Predicted { reload_ms: None, reencode_ms: 0, choice: ReturnPath::Resident });
    }
    let ms = |amount: u64, per_s: u64| (amount * 1000).checked_div(per_s);
    let reencode_ms = ms(missing, status.prefill_tokens_per_s)?;
    let below = u64::from(host.tokens.0.saturating_sub(device.tokens.0)).min(missing);
    let reload_ms = (below > 0).then(|| {
        let token_bytes = (host.bytes_private + host.bytes_shared) / u64::from(host.tokens.0);
        let copied = ms(below * token_bytes, status.reload_bytes_per_s)?;
        Some(copied + ms(missing - below, status.prefill_tokens_per_s)?)
    });
    let reload_ms = reload_ms.flatten();
    let choice = match reload_ms {
        Some(reload) if reload <= reencode_ms => ReturnPath::Reload,
        Some(_) | None => ReturnPath::Reencode,
    };
    Some(Predicted { reload_ms, reencode_ms, choice })
}
