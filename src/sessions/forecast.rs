//! What would it take to bring a conversation's KV back to the device?
//!
//! An estimate out of the rates that the engine has measured, for those who look; the engine decides for itself.

use super::messages::{Predicted, ReturnPath};
use crate::engine::status::{EngineStatus, Residency, TierShare, split_pays};
use crate::types::{Tier, TokenCount};

/// `tokens`: the history as the KV has it. `None` until the engine has measured what the forecast needs.
pub fn predict(tokens: TokenCount, residency: Option<&Residency>, status: &EngineStatus) -> Option<Predicted> {
    let here = residency.map_or(TokenCount(0), |found| found.device.tokens);
    let missing = tokens.0.saturating_sub(here.0);
    // The last token that was said is fed with the next turn's, whatever is where.
    if missing <= 1 && here.0 > 0 || missing == 0 {
        return Some(Predicted { reload_ms: None, reencode_ms: 0, choice: ReturnPath::Resident });
    }
    let reencode_us = status.encoding.time_us(here, tokens)?;
    let reload_us = residency.and_then(|found| reload_us(tokens, found, status));
    let choice = match reload_us {
        Some(reload_us) if reload_us <= reencode_us => ReturnPath::Reload,
        Some(_) | None => ReturnPath::Reencode,
    };
    let ms = |us: u64| (us + 500) / 1000;
    Some(Predicted { reload_ms: reload_us.map(ms), reencode_ms: ms(reencode_us), choice })
}

/// What is below, brought up, and the rest encoded; and encoded meanwhile whatever the engine would. `None`: nothing is
/// below, or it isn't known how fast that comes.
fn reload_us(tokens: TokenCount, found: &Residency, status: &EngineStatus) -> Option<u64> {
    let missing = tokens.0 - found.device.tokens.0;
    let on_host = found.below.0.0.min(missing);
    let on_disk = found.below.1.0.min(missing - on_host);
    let below = on_host + on_disk;
    let from = |share: TierShare, tokens: u32, per_s: u64| {
        let bytes = (share.bytes_private + share.bytes_shared).checked_div(u64::from(share.tokens.0)).unwrap_or(0);
        if tokens > 0 { (u64::from(tokens) * bytes * 1_000_000).checked_div(per_s) } else { Some(0) }
    };
    // Both are read at the same time.
    let host_us = from(found.host, on_host, status.reload_bytes_per_s)?;
    let brought_us = host_us.max(from(found.disk, on_disk, status.load_bytes_per_s)?);
    let encoded_us = |from: u32, tokens: u32| status.encoding.time_us(TokenCount(from), TokenCount(from + tokens));
    // The last token that was said is fed with the next turn's.
    let (here, rest) = (found.device.tokens.0, (missing - below).saturating_sub(1));
    let lacks_front =
        found.runs.iter().find(|(tier, ..)| *tier != Some(Tier::Device)).is_some_and(|run| run.0.is_none());
    if below == 0 {
        return None;
    }
    if lacks_front {
        return Some(brought_us.max(encoded_us(here, rest)?));
    }
    let rest_us = encoded_us(here + below, rest)?;
    // As much of the front as is encoded by the time that what follows it is there.
    let (mut least, mut most) = (0, below);
    while least < most {
        let front = (least + most) / 2;
        let meanwhile_us = brought_us * u64::from(below - front) / u64::from(below);
        if encoded_us(here, front)? < meanwhile_us { least = front + 1 } else { most = front }
    }
    let (split_us, whole_us) = (encoded_us(here, least)? + rest_us, brought_us + rest_us);
    Some(if split_pays(split_us, whole_us) { split_us } else { whole_us })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::status::{Encoding, ResidencyState, Runs};
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
        EngineStatus {
            encoding: Encoding { first_per_s: 100, doubles_at: None },
            reload_bytes_per_s: 1_000_000,
            ..EngineStatus::default()
        }
    }

    #[test]
    fn nothing_is_foretold_before_anything_was_measured() {
        assert_eq!(predict(TokenCount(10), None, &EngineStatus::default()), None);
    }

    #[test]
    fn what_the_host_has_is_reloaded_and_the_rest_encoded() {
        let found = predict(TokenCount(1000), Some(&residency(0, 900)), &measured()).unwrap();
        assert_eq!((found.reload_ms, found.reencode_ms, found.choice), (Some(900 + 990), 10_000, ReturnPath::Reload));
    }

    #[test]
    fn what_comes_so_slowly_that_its_front_is_encoded_meanwhile_takes_as_long_as_the_slower_half() {
        let slow = EngineStatus { reload_bytes_per_s: 100_000, ..measured() };
        let found = predict(TokenCount(1000), Some(&residency(0, 1000)), &slow).unwrap();
        assert_eq!((found.reload_ms, found.reencode_ms), (Some(5_000), 10_000));
    }

    #[test]
    fn what_lies_further_behind_takes_longer_to_encode() {
        let encoding = Encoding { doubles_at: Some(TokenCount(1000)), ..measured().encoding };
        let found = predict(TokenCount(2000), Some(&residency(1000, 1000)), &EngineStatus { encoding, ..measured() });
        assert_eq!(found.unwrap().reencode_ms, 25_000);
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
