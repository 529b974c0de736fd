//! What did turns gain by finding their KV?
//!
//! By tenant: where prompt tokens came from, how turns found their history, how long their first token took, and the time
//! that the device would have taken to encode what was found. Cost: O(1) a turn; bounded by the tenants that there were.

use super::status::PromptTotals;
use super::{Path, TurnUsage};
use crate::telemetry::metrics::LATENCY_S;
use crate::types::TenantId;

/// First tokens by time, at most `LATENCY_S` of the same place, and the slower ones last. Not summed up.
pub type FirstTokens = [u64; LATENCY_S.len() + 1];

/// One tenant's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantGains {
    pub prompt: PromptTotals,
    /// In the order of `Path::ALL`.
    pub paths: [PathTotals; Path::ALL.len()],
    /// What encoding the found tokens would have taken, less what reloading them took.
    pub saved_us: u64,
}

/// Turns that found their history in one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathTotals {
    pub turns: u64,
    pub first_token_ms: u64,
}

#[derive(Debug, Default)]
pub struct Gains {
    tenants: Vec<TenantGains>,
    first_tokens: [FirstTokens; Path::ALL.len()],
}

impl Gains {
    /// A turn's first token is there. `prefill_per_s`: tokens that the model was seen to encode; 0: not known yet.
    pub fn note(&mut self, tenant: TenantId, path: Path, usage: &TurnUsage, prefill_per_s: u64) {
        let (prompt, path) = (&usage.prompt, path as usize);
        let index = tenant.0 as usize;
        if self.tenants.len() <= index {
            self.tenants.resize(index + 1, TenantGains::default());
        }
        let gains = &mut self.tenants[index];
        gains.prompt.add(prompt);
        gains.paths[path].turns += 1;
        gains.paths[path].first_token_ms += usage.ttft_ms;
        let encoding_us = (u64::from(prompt.cached().0) * 1_000_000).checked_div(prefill_per_s).unwrap_or(0);
        gains.saved_us += encoding_us.saturating_sub(prompt.reload_ms * 1000);
        let seconds = usage.ttft_ms as f64 / 1e3;
        let bucket = LATENCY_S.iter().position(|most| seconds <= *most).unwrap_or(LATENCY_S.len());
        self.first_tokens[path][bucket] += 1;
    }

    pub fn of_tenant(&self, tenant: TenantId) -> TenantGains {
        self.tenants.get(tenant.0 as usize).copied().unwrap_or_default()
    }

    /// Tenants that have had a turn: ids from 0 on.
    pub fn tenants(&self) -> usize {
        self.tenants.len()
    }

    /// First tokens of all tenants, in the order of `Path::ALL`.
    pub fn first_tokens(&self) -> [FirstTokens; Path::ALL.len()] {
        self.first_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::super::PromptUsage;
    use super::*;
    use crate::types::TokenCount;

    const T: TenantId = TenantId(1);

    fn usage(found: [u32; 3], reload_ms: u64, ttft_ms: u64) -> TurnUsage {
        let [resident, shared, reloaded_host] = found.map(TokenCount);
        let encoded = TokenCount(7);
        let prompt = PromptUsage { resident, shared, reloaded_host, encoded, reload_ms, ..PromptUsage::default() };
        TurnUsage { prompt, ttft_ms, ..TurnUsage::default() }
    }

    #[test]
    fn what_is_saved_is_the_time_of_encoding_less_that_of_reloading_and_never_less_than_none() {
        let mut gains = Gains::default();
        // 1000 tokens a second.
        gains.note(T, Path::Hot, &usage([300, 100, 0], 0, 5), 1000);
        gains.note(T, Path::Reloaded, &usage([100, 0, 500], 250, 40), 1000);
        gains.note(T, Path::Reloaded, &usage([0, 0, 100], 400, 500), 1000);
        gains.note(T, Path::Fresh, &usage([0, 0, 0], 0, 200_000), 0);
        let told = gains.of_tenant(T);
        assert_eq!(told.saved_us, 400_000 + (600_000 - 250_000));
        assert_eq!((told.prompt.resident_tokens, told.prompt.shared_tokens), (400, 100));
        assert_eq!((told.prompt.reloaded_host_tokens, told.prompt.encoded_tokens), (600, 28));
        let path = |path: Path| told.paths[path as usize];
        assert_eq!(path(Path::Reloaded), PathTotals { turns: 2, first_token_ms: 540 });
        assert_eq!((path(Path::Hot).turns, path(Path::Fresh).turns, path(Path::Reencoded).turns), (1, 1, 0));
        let buckets = gains.first_tokens();
        assert_eq!(buckets[Path::Hot as usize][2], 1, "5 ms are in the bucket up to 5 ms");
        assert_eq!(buckets[Path::Fresh as usize].last(), Some(&1), "slower than the slowest bucket");
        assert_eq!((gains.of_tenant(TenantId(0)), gains.tenants()), (TenantGains::default(), 2));
    }
}
