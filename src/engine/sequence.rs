//! What is known of one turn while the engine has it?

use super::core::StartTurn;
use super::sampler::Sampler;
use super::{PromptUsage, TurnUsage};
use crate::kv::block::PrefixHash;
use crate::kv::cost::Patience;
use crate::kv::manager::Found;
use crate::types::{BlockSize, KvKey, TenantId, Tick, TokenCount, TokenId, TurnId};

/// Where a turn is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Waits for its place, at first or after a preemption.
    Queued,
    /// Its blocks are being copied up; the others go on.
    Reloading,
    /// Its tokens are being encoded.
    Prefill,
    /// One token a step.
    Decode,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub turn: TurnId,
    pub key: KvKey,
    pub tenant: TenantId,
    pub start: Box<StartTurn>,
    /// Prompt and answer so far. The last token's KV is computed when it is fed.
    pub tokens: Vec<TokenId>,
    /// The chain over the full blocks of `tokens`, as far as it was needed: of the prompt, and at a preemption of them all.
    pub hashes: Vec<PrefixHash>,
    pub phase: Phase,
    pub sampler: Sampler,
    /// What was found of the prompt when it was first admitted; later admissions are resumptions.
    pub found: Option<Found>,
    /// Rows that it had before its first token.
    pub encoded: TokenCount,
    /// It has been noted that it has to wait for memory.
    pub told_to_wait: bool,
    /// How long a load for it is waited for.
    pub patience: Option<Patience>,
    /// Rises with each admission: the newest is preempted first.
    pub admission: u64,
    pub arrived: Tick,
    pub ready: Tick,
    pub usage: TurnUsage,
    pub first_token: Option<Tick>,
}

impl Sequence {
    pub fn new(mut start: Box<StartTurn>, now: Tick) -> Self {
        let sampler = Sampler::new(start.request.sampling.clone(), &start.request.prompt);
        Self {
            turn: start.turn,
            key: start.key,
            tenant: start.tenant,
            tokens: start.request.prompt.to_vec(),
            hashes: std::mem::take(&mut start.hashes),
            sampler,
            phase: Phase::Queued,
            found: None,
            encoded: TokenCount(0),
            told_to_wait: false,
            patience: None,
            admission: 0,
            arrived: now,
            ready: now,
            usage: TurnUsage::default(),
            first_token: None,
            start,
        }
    }

    pub fn prompt_tokens(&self) -> TokenCount {
        TokenCount::of(&self.start.request.prompt)
    }

    /// Carries the chain on over all full blocks, once for each: a preempted turn may wait for many steps.
    pub fn carry_chain_on(&mut self, size: BlockSize) {
        let size = size.0 as usize;
        let mut parent = self.hashes.last().copied().unwrap_or(PrefixHash::ROOT);
        for block in self.tokens[self.hashes.len() * size..].chunks_exact(size) {
            parent = parent.child(&self.start.tenant_key, block);
            self.hashes.push(parent);
        }
    }

    /// Notes where the prompt's tokens came from, once its first token is there.
    ///
    /// What was found need not have come: a reload may have been damaged, or slower than encoding the same tokens.
    pub fn account(&mut self) {
        let Found { resident, shared, reloaded, from_disk } = self.found.unwrap_or_default();
        let cached = self.prompt_tokens().0.saturating_sub(self.encoded.0).min(resident.0 + shared.0 + reloaded.0);
        let resident = resident.0.min(cached);
        let shared = shared.0.min(cached - resident);
        let came = cached - resident - shared;
        // The host has the front of what is below, if it has any: what is missing is the disk's.
        let from_disk = came.saturating_sub(reloaded.0 - from_disk.0);
        let encoded = self.prompt_tokens().0 - cached;
        let reencoded = self.start.request.encoded_before.0.saturating_sub(cached);
        self.usage.prompt = PromptUsage {
            resident: TokenCount(resident),
            shared: TokenCount(shared),
            reloaded_host: TokenCount(came - from_disk),
            reloaded_disk: TokenCount(from_disk),
            encoded: TokenCount(encoded),
            reencoded: TokenCount(reencoded.min(encoded)),
            ..self.usage.prompt
        };
    }
}
