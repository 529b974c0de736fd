//! How soon would first tokens have come?
//!
//! What a turn asked of the machine before its first token, over the speeds at which a server was seen to do that: tokens
//! to encode over the encoding rate, and bytes over the rate of the tier that had them, host and disk side by side. Turns
//! don't wait for each other here, so that two replays are compared by what they found and by nothing else.

use super::Reuse;
use crate::types::TenantId;

/// What a server was seen to do in a second; 0: it was not seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub prefill_tokens_per_s: u64,
    pub reload_bytes_per_s: u64,
    pub load_bytes_per_s: u64,
}

/// What a turn asked of the machine before its first token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    pub tenant: TenantId,
    pub encoded_tokens: u64,
    pub host_bytes: u64,
    pub disk_bytes: u64,
}

/// Quantiles of times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    pub p50_ms: u64,
    pub p95_ms: u64,
}

impl Work {
    pub(super) fn of(tenant: TenantId, found: &Reuse, token_bytes: u64) -> Self {
        let cached = found.device_tokens + found.host_tokens + found.disk_tokens;
        Self {
            tenant,
            encoded_tokens: found.prompt_tokens.saturating_sub(cached),
            host_bytes: found.host_tokens * token_bytes,
            disk_bytes: found.disk_tokens * token_bytes,
        }
    }
}

impl Rates {
    /// Time to the first token; `None` if a speed that it depends on was never seen.
    fn first_token_us(self, work: &Work) -> Option<u64> {
        let us = |units: u64, per_s: u64| match units {
            0 => Some(0),
            units => units.saturating_mul(1_000_000).checked_div(per_s),
        };
        let encoding = us(work.encoded_tokens, self.prefill_tokens_per_s)?;
        let bringing = us(work.host_bytes, self.reload_bytes_per_s)?.max(us(work.disk_bytes, self.load_bytes_per_s)?);
        Some(encoding + bringing)
    }

    /// Of these turns; `None` if there are none, or for one of them a speed was never seen.
    pub fn first_tokens<'a>(self, works: impl Iterator<Item = &'a Work>) -> Option<Spread> {
        let mut us = works.map(|work| self.first_token_us(work)).collect::<Option<Vec<u64>>>()?;
        us.sort_unstable();
        let at = |percent: usize| us.get(us.len() * percent / 100).map(|us| us.div_ceil(1000));
        Some(Spread { p50_ms: at(50)?, p95_ms: at(95)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(encoded_tokens: u64, host_bytes: u64, disk_bytes: u64) -> Work {
        Work { tenant: TenantId(0), encoded_tokens, host_bytes, disk_bytes }
    }

    #[test]
    fn a_first_token_takes_its_encoding_and_the_slower_of_its_tiers() {
        let rates = Rates { prefill_tokens_per_s: 1000, reload_bytes_per_s: 1_000_000, load_bytes_per_s: 100_000 };
        let of = |work| rates.first_tokens([work].iter()).unwrap().p50_ms;
        assert_eq!(of(work(50, 0, 0)), 50);
        assert_eq!(of(work(50, 20_000, 0)), 70);
        assert_eq!(of(work(50, 20_000, 10_000)), 150);
        let works: Vec<Work> = (1..=100).map(|tokens| work(tokens, 0, 0)).collect();
        assert_eq!(rates.first_tokens(works.iter()), Some(Spread { p50_ms: 51, p95_ms: 96 }));
    }

    #[test]
    fn nothing_is_foretold_by_a_speed_that_was_never_seen() {
        let rates = Rates { prefill_tokens_per_s: 1000, ..Rates::default() };
        assert!(rates.first_tokens([work(9, 0, 0)].iter()).is_some());
        assert_eq!(rates.first_tokens([work(9, 0, 0), work(9, 1, 0)].iter()), None);
        assert_eq!(rates.first_tokens([work(9, 0, 1)].iter()), None);
        assert_eq!(Rates::default().first_tokens([work(9, 0, 0)].iter()), None);
        assert_eq!(rates.first_tokens([].iter()), None);
    }
}
