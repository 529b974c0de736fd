//! What would it take to bring a conversation's KV back to the device?
//!
//! An estimate out of the rates that the engine has measured, for those who look; the engine decides for itself.

use super::messages::{Predicted, ReturnPath};
use crate::engine::status::{EngineStatus, Residency, TierShare};
use crate::types::TokenCount;

/// `tokens`: the history as the KV has it. `None` until the engine has measured what the forecast needs.
pub fn predict(tokens: TokenCount, residency: Option<&Residency>, status: &EngineStatus) -> Option<Predicted> {
    let (device, host, disk) = residency.map(|found| (found.device, found.host, found.disk)).unwrap_or_default();
    let (on_host, on_disk) = residency.map(|found| found.below).unwrap_or_default();
    let missing = u64::from(tokens.0.saturating_sub(device.tokens.0));
    // The last token that was said is fed with the next turn's, whatever is where.
    if missing <= 1 && device.tokens.0 > 0 || missing == 0 {
        return Some(Predicted { reload_ms: None, reencode_ms: 0, choice: ReturnPath::Resident });
    }
    let ms = |amount: u64, per_s: u64| (amount * 1000).checked_div(per_s);
    let reencode_ms = ms(missing, status.prefill_tokens_per_s)?;
    let below = u64::from(on_host.0).min(missing);
    let on_disk = u64::from(on_disk.0).min(missing - below);
    let reload_ms = (below + on_disk > 0).then(|| {
        let from = |share: TierShare, tokens: u64, per_s: u64| {
            let bytes = (share.bytes_private + share.bytes_shared).checked_div(u64::from(share.tokens.0)).unwrap_or(0);
            if tokens > 0 { ms(tokens * bytes, per_s) } else { Some(0) }
        };
        // Both are read at the same time.
        let copied = from(host, below, status.reload_bytes_per_s)?;
        let copied = copied.max(from(disk, on_disk, status.load_bytes_per_s)?);
        Some(copied + ms(missing - below - on_disk, status.prefill_tokens_per_s)?)
    });
    let reload_ms = reload_ms.flatten();
    let choice = match reload_ms {
        Some(reload) if reload <= reencode_ms => ReturnPath::Reload,
        Some(_) | None => ReturnPath::Reencode,
    };
    Some(Predicted { reload_ms, reencode_ms, choice })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::status::{ResidencyState, Runs};
    use crate::types::{TenantId, Tick};

    fn residency(device: u32, host: u32) -> Residency {
        let share = |tokens: u32| TierShare {
            tokens: TokenCount(tokens),
            bytes_private: u64::from(tokens) * 1000,
            bytes_shared: 0,
        };
        Residency {
            tenant: TenantId(0),
            state: ResidencyState::Partial,
            device: share(device),
            host: share(host),
            disk: TierShare::default(),
            below: (TokenCount(host.saturating_sub(device)), TokenCount(0)),
            runs: Runs::default(),
            last_used: Tick(0),
            last_eviction: None,
            pinned_until: None,
        }
    }

    fn measured() -> EngineStatus {
        EngineStatus { prefill_tokens_per_s: 100, reload_bytes_per_s: 1_000_000, ..EngineStatus::default() }
    }

    #[test]
    fn nothing_is_foretold_before_anything_was_measured() {
        assert_eq!(predict(TokenCount(10), None, &EngineStatus::default()), None);
    }

    #[test]
    fn what_the_host_has_is_reloaded_and_the_rest_encoded() {
        let found = predict(TokenCount(1000), Some(&residency(0, 900)), &measured()).unwrap();
        assert_eq!((found.reload_ms, found.reencode_ms, found.choice), (Some(900 + 1000), 10_000, ReturnPath::Reload));
    }

    #[test]
    fn without_a_copy_below_the_way_back_is_encoding() {
        let found = predict(TokenCount(1000), Some(&residency(500, 500)), &measured()).unwrap();
        assert_eq!((found.reload_ms, found.reencode_ms, found.choice), (None, 5000, ReturnPath::Reencode));
    }

    #[test]
    fn what_is_on_the_device_costs_nothing() {
        let found = predict(TokenCount(500), Some(&residency(500, 0)), &EngineStatus::default()).unwrap();
        assert_eq!(found.choice, ReturnPath::Resident);
    }
}
