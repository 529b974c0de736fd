//! Which token comes next, given a row of logits?

use crate::types::TokenId;

/// How to choose tokens. `temperature == 0` or `top_p == 0` is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    /// Keep the likeliest `top_k`; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens whose probabilities add up to `top_p`, (0, 1].
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the likeliest, [0, 1].
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) the logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the answer so far (OpenAI's definition).
    pub presence_penalty: f32,
    /// Subtracted for each occurrence in the answer so far.
    pub frequency_penalty: f32,
    /// Added to logits before anything else.
    pub logit_bias: Vec<(TokenId, f32)>,
    pub seed: u64,
    /// No stop token before this many tokens of answer.
    pub min_tokens: u32,
    /// Stop tokens don't stop.
    pub ignore_eos: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            min_tokens: 0,
            ignore_eos: false,
        }
    }
}
