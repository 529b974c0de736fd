//! What should a conversation's turn answer?
//!
//! The fake model's function over the conversation's own plain list of tokens, one after the other, alone. It shares no
//! code with paging, tiers or the scheduler.

use std::sync::Arc;

use rekindle::engine::sampler::{Sampler, Scratch};
use rekindle::engine::{FinishReason, PromptUsage, TurnRequest};
use rekindle::model::fake::Flat;
use rekindle::types::{KvKey, TenantId, TokenCount, TokenId, TurnId};

/// One conversation, as its client sees it.
#[derive(Debug)]
pub struct Conversation {
    pub key: KvKey,
    pub tenant: TenantId,
    /// Prompts and answers so far.
    pub log: Vec<TokenId>,
    /// Length of the newest prompt.
    pub asked: usize,
    /// Tokens at the log's front that an earlier turn encoded.
    pub encoded: usize,
    /// The turn whose answer goes into the log.
    pub turn: Option<TurnId>,
    pub leaving: bool,
    pub forgetting: bool,
    /// The oracle, and the tokens that it has heard.
    alone: Flat,
    heard: Vec<TokenId>,
}

/// A turn on its way.
#[derive(Debug)]
pub struct Turn {
    pub conversation: usize,
    pub request: TurnRequest,
    pub since_step: u64,
    pub cancelled: bool,
    pub started: Option<PromptUsage>,
    pub answer: Vec<TokenId>,
    pub expected: Vec<TokenId>,
    pub expected_reason: FinishReason,
}

impl Conversation {
    pub fn new(key: KvKey, tenant: TenantId, log: Vec<TokenId>, alone: Flat) -> Self {
        Self {
            key,
            tenant,
            log,
            asked: 0,
            encoded: 0,
            turn: None,
            leaving: false,
            forgetting: false,
            alone,
            heard: Vec::new(),
        }
    }

    /// Cuts the log, as a client does that edits an earlier message.
    pub fn rewind(&mut self, tokens: usize) {
        self.log.truncate(tokens);
        self.encoded = self.encoded.min(tokens);
    }

    /// What `request` is answered with.
    pub fn answer(&mut self, request: &TurnRequest, window: TokenCount) -> (Vec<TokenId>, FinishReason) {
        let same = self.heard.iter().zip(request.prompt.iter()).take_while(|(heard, asked)| heard == asked).count();
        self.heard.truncate(same);
        self.alone.truncate(same);
        for token in &request.prompt[same..] {
            self.hear(*token);
        }
        let sampling = &request.sampling;
        let mut sampler = Sampler::new(sampling.clone(), &request.prompt);
        let mut scratch = Scratch::default();
        let mut answer = Vec::new();
        loop {
            let too_early = !sampling.ignore_eos && (answer.len() as u32) < sampling.min_tokens;
            let banned: &[TokenId] = if too_early { &request.stop_tokens } else { &[] };
            let token = sampler.sample(&mut self.alone.logits(), banned, &mut scratch);
            answer.push(token);
            if !sampling.ignore_eos && request.stop_tokens.contains(&token) {
                return (answer, FinishReason::Stop);
            }
            if answer.len() >= request.max_tokens.get() || request.prompt.len() + answer.len() >= window.get() {
                return (answer, FinishReason::Length);
            }
            self.hear(token);
        }
    }

    fn hear(&mut self, token: TokenId) {
        self.heard.push(token);
        self.alone.push(token);
    }

    /// The prompt of a next turn that says `words`.
    pub fn prompt(&self, words: &[TokenId]) -> Arc<[TokenId]> {
        self.log.iter().chain(words).copied().collect()
    }
}
