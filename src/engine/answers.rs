//! What is known of the tokens that a step's rows say?
//!
//! A model gives odds, of which each sequence's sampler chooses; a replay knows what was chosen.

use crate::model::Logits;
use crate::types::TokenId;

/// Of a plan's sampled rows, in their order.
pub(super) enum Answers<'a> {
    Logits(&'a mut Logits),
    Known(&'a [TokenId]),
}

/// Of one of them.
pub(super) enum Answer<'a> {
    Logits(&'a mut [f32]),
    Known(TokenId),
}

impl Answers<'_> {
    /// Of the `index`-th sampled row. Panics if there is none: whoever commits a plan has all its answers.
    pub fn get(&mut self, index: usize) -> Answer<'_> {
        match self {
            Self::Logits(logits) => Answer::Logits(logits.row_mut(index)),
            Self::Known(tokens) => Answer::Known(tokens[index]),
        }
    }
}
