//! How soon would first tokens have come?
//!
//! What a turn asked of the machine before its first token, over the speeds at which a server was seen to do that: tokens
//! to encode by where they stand in the prompt, and bytes over the rate of the tier that had them, host and disk side by side.
//! Turns don't wait for each other here, so that two replays are compared by what they found and by nothing else.

use super::Reuse;
pub use crate::kv::rate::Encoding;
use crate::types::{TenantId, TokenCount};

/// What a server was seen to do in a second; 0: it was not seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub encoding: Encoding,
    pub reload_bytes_per_s: u64,
    pub load_bytes_per_s: u64,
}

/// What a turn asked of the machine before its first token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    pub tenant: TenantId,
    /// What was found, taken for the prompt's front, though there may be a gap before some of it; the rest was encoded.
    pub cached: TokenCount,
    pub prompt: TokenCount,
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
        let tokens = |tokens: u64| TokenCount(u32::try_from(tokens).unwrap_or(u32::MAX));
        Self {
            tenant,
            cached: tokens(cached),
            prompt: tokens(found.prompt_tokens),
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
        let encoding = if work.cached < work.prompt { self.encoding.time_us(work.cached, work.prompt)? } else { 0 };
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

    const ENCODING: Encoding = Encoding { first_per_s: 1000, doubles_at: None };

    fn work(encoded: u32, host_bytes: u64, disk_bytes: u64) -> Work {
        Work { tenant: TenantId(0), cached: TokenCount(0), prompt: TokenCount(encoded), host_bytes, disk_bytes }
    }

    #[test]
    fn a_first_token_takes_its_encoding_and_the_slower_of_its_tiers() {
        let rates = Rates { encoding: ENCODING, reload_bytes_per_s: 1_000_000, load_bytes_per_s: 100_000 };
        let of = |work| rates.first_tokens([work].iter()).unwrap().p50_ms;
        assert_eq!(of(work(50, 0, 0)), 50);
        assert_eq!(of(work(50, 20_000, 0)), 70);
        assert_eq!(of(work(50, 20_000, 10_000)), 150);
        let works: Vec<Work> = (1..=100).map(|tokens| work(tokens, 0, 0)).collect();
        assert_eq!(rates.first_tokens(works.iter()), Some(Spread { p50_ms: 51, p95_ms: 96 }));
    }

    #[test]
    fn the_end_of_a_long_prompt_takes_longer_than_its_beginning() {
        let encoding = Encoding { doubles_at: Some(TokenCount(1000)), ..ENCODING };
        let of = |cached, prompt| {
            let work = Work { cached: TokenCount(cached), ..work(prompt, 0, 0) };
            Rates { encoding, ..Rates::default() }.first_tokens([work].iter()).unwrap().p50_ms
        };
        // A token takes 1 ms at the beginning, 2 at the 1,000th and 3 at the 2,000th.
        assert_eq!((of(0, 1000), of(1000, 2000), of(0, 2000), of(2000, 2000)), (1500, 2500, 4000, 0));
    }

    #[test]
    fn nothing_is_foretold_by_a_speed_that_was_never_seen() {
        let rates = Rates { encoding: ENCODING, ..Rates::default() };
        assert!(rates.first_tokens([work(9, 0, 0)].iter()).is_some());
        assert_eq!(rates.first_tokens([work(9, 0, 0), work(9, 1, 0)].iter()), None);
        assert_eq!(rates.first_tokens([work(9, 0, 1)].iter()), None);
        assert_eq!(Rates::default().first_tokens([work(9, 0, 0)].iter()), None);
        assert_eq!(rates.first_tokens([].iter()), None);
    }
}
