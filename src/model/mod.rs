//! What does the engine ask of a model?
//!
//! One forward pass over a flat batch: rows of tokens of many sequences, each with its own block table. A model reads and
//! writes KV only through the tables, and knows nothing of who owns a sequence or what is evicted.
//! Invariant: a row's logits depend on its own sequence alone, bit for bit: not on what else is in the batch.

pub mod chat_template;
pub mod decoder;
pub mod fake;
pub mod families;
pub mod language;
pub mod markup;
mod rounds;
mod strftime;
pub mod tokenizer;
pub mod weights;

use crate::kernels::attention::PlanError;
use crate::kernels::memory::Arena;
use crate::types::{BlockId, BlockSize, TokenCount, TokenId};

/// What a loaded model is.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    /// The name that clients use, such as `smollm2-135m-instruct`.
    pub name: String,
    /// Tokens of the vocabulary: the width of a row of logits.
    pub vocab: usize,
    /// The longest sequence that the model was trained for.
    pub context_length: TokenCount,
    /// Shape of the KV of one token.
    pub kv: KvShape,
    /// Position at which a token costs the model twice what the first one does, since it attends to all before it.
    pub doubles_at: TokenCount,
    /// BLAKE3 over what the KV's bytes depend on: weights, tokenizer, KV layout.
    pub fingerprint: [u8; 32],
}

/// Shape of one token's KV. Stored as f16, K then V per layer: K `[kv_head][dim][block]`, V `[kv_head][block][dim]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of one token's KV over all layers.
    pub fn token_bytes(&self) -> usize {
        self.layers * 2 * self.kv_heads * self.head_dim * size_of::<half::f16>()
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self, size: BlockSize) -> usize {
        self.token_bytes() * size.0 as usize
    }
}

/// The rows that one sequence has in a step, and where its KV lies.
#[derive(Clone, Copy, Debug)]
pub struct SequenceRows<'a> {
    /// First row of this sequence in `Batch::tokens`.
    pub first_row: usize,
    /// Its rows: 1 in decode, a chunk in prefill. Row `i` has position `context + i`.
    pub rows: usize,
    /// Tokens whose KV is in the table already, before this step.
    pub context: usize,
    /// Blocks that hold positions `0..context + rows`, in order; the step writes the new rows' KV into them.
    pub table: &'a [BlockId],
}

/// One step's work. Made by `engine::batch` alone, out of `kv::Resident`.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// `[rows]`, sequence after sequence.
    pub tokens: &'a [TokenId],
    pub sequences: &'a [SequenceRows<'a>],
    /// Rows whose logits are wanted, ascending.
    pub sampled: &'a [usize],
}

/// Logits of the sampled rows, `[sampled, vocab]`, f32.
#[derive(Debug, Default)]
pub struct Logits {
    vocab: usize,
    values: Vec<f32>,
}

impl Logits {
    /// Room for `rows` rows of `vocab` values; contents are whatever was there.
    pub fn reset(&mut self, rows: usize, vocab: usize) -> &mut [f32] {
        self.vocab = vocab;
        self.values.resize(rows * vocab, 0.0);
        &mut self.values
    }

    /// Logits of the `index`-th sampled row.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.vocab..][..self.vocab]
    }

    pub fn row_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.values[index * self.vocab..][..self.vocab]
    }

    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.vocab).unwrap_or(0)
    }
}

/// Why a forward pass failed. The step's turns fail; the server goes on.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("the step's block tables can't be served: {0}")]
    Tables(#[from] PlanError),
    #[error("token {token} is outside a vocabulary of {vocab}")]
    UnknownToken { token: TokenId, vocab: usize },
    #[error("a batch of {tokens} tokens for {rows} rows, of which {sampled:?} are sampled")]
    Shape { tokens: usize, rows: usize, sampled: Vec<usize> },
}

/// A model that the engine can run.
pub trait Model: Send {
    fn spec(&self) -> &ModelSpec;

    /// Runs one step: writes the KV of every row into the arena, and the sampled rows' logits into `logits`.
    fn forward(
        &mut self,
        batch: &Batch<'_>,
        kv: &std::sync::Arc<Arena>,
        logits: &mut Logits,
    ) -> Result<(), ForwardError>;
}
