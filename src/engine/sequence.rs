//! What is known of one turn while the engine has it?

use super::core::StartTurn;
use super::sampler::Sampler;
use super::{PromptUsage, TurnUsage};
use crate::kv::block::PrefixHash;
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
    pub found: Found,
    /// When its load from disk is not waited for any longer.
    pub load_due: Option<Tick>,
    /// It has stalled once.
    pub avoids_disk: bool,
    /// First admission is over: later ones are resumptions.
    pub admitted_once: bool,
    /// Where the prompt's tokens came from is known.
    pub accounted: bool,
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
            found: Found::default(),
            load_due: None,
            avoids_disk: false,
            admitted_once: false,
            accounted: false,
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

    /// Notes where the prompt's tokens came from, once it runs for the first time with `context` tokens in place.
    ///
    /// A reload that failed in the middle has less in place than was found; the rest counts as encoded.
    pub fn account(&mut self, context: TokenCount) {
        self.accounted = true;
        let Found { resident, shared, reloaded, from_disk } = self.found;
        let cached = context.0.min(resident.0 + shared.0 + reloaded.0);
        let resident = resident.0.min(cached);
        let reloaded = reloaded.0.min(cached - resident);
        // The host has the front of what is below, if it has any: what is missing is the disk's.
        let from_disk = reloaded.saturating_sub(self.found.reloaded.0 - from_disk.0);
        let shared = cached - resident - reloaded;
        let encoded = self.prompt_tokens().0 - cached;
        let reencoded = self.start.request.encoded_before.0.saturating_sub(cached);
        self.usage.prompt = PromptUsage {
            resident: TokenCount(resident),
            shared: TokenCount(shared),
            reloaded_host: TokenCount(reloaded - from_disk),
            reloaded_disk: TokenCount(from_disk),
            encoded: TokenCount(encoded),
            reencoded: TokenCount(reencoded.min(encoded)),
            ..self.usage.prompt
        };
    }
}
