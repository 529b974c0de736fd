//! Which model shows every wrong byte of KV in its answer?
//!
//! One whose KV of a token is a digest of the token, its position and the KV that it reads from the arena, through the
//! block table, at the position before and at some more earlier ones; and whose next token is a digest of that KV. A
//! wrong block, a stale byte, a missed copy or another tenant's block changes the answer. `Flat` is the same function over
//! a plain list, with no blocks, as the oracle. Cost of a row: a bounded number of digests of 32 bytes, whatever its
//! position, so that a step's cost is the engine's own.

use std::sync::Arc;

use super::{Batch, ForwardError, KvShape, Logits, Model, ModelSpec};
use crate::kernels::memory::Arena;
use crate::types::{BlockId, TokenCount, TokenId};

/// Bytes of one token's KV: one layer, one head of 8 values, K and V.
const KV_BYTES: usize = 32;
const SHAPE: KvShape = KvShape { layers: 1, kv_heads: 1, head_dim: 8 };

/// One token's KV. A block holds those of its tokens one after the other.
type Kv = [u8; KV_BYTES];

/// How many earlier positions a row reads, besides the one before it, unless told otherwise.
const READS: usize = 3;
/// It reads a few positions wherever it is; this is for those who plan by it.
const DOUBLES_AT: u32 = 1000;

/// A deterministic model without weights.
#[derive(Debug)]
pub struct FakeModel {
    spec: ModelSpec,
    reads: usize,
}

impl FakeModel {
    /// A model with `vocab` tokens whose longest sequence is `context_length`. A row reads 4 earlier positions.
    pub fn new(vocab: usize, context_length: TokenCount) -> Self {
        let (name, doubles_at) = ("fake".to_owned(), TokenCount(DOUBLES_AT));
        let spec = ModelSpec { name, vocab, context_length, kv: SHAPE, doubles_at, fingerprint: [0xfa; 32] };
        Self { spec, reads: READS }
    }

    /// Reads `reads` earlier positions besides the one before: the more, the sooner an answer shows a wrong byte.
    pub fn with_reads(self, reads: usize) -> Self {
        Self { reads, ..self }
    }

    /// The same function over a plain list of tokens.
    pub fn flat(&self) -> Flat {
        Flat { vocab: self.spec.vocab, reads: self.reads, kv: Vec::new() }
    }
}

impl Model for FakeModel {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn forward(&mut self, batch: &Batch<'_>, kv: &Arc<Arena>, logits: &mut Logits) -> Result<(), ForwardError> {
        let vocab = self.spec.vocab;
        let mut sampled = batch.sampled.iter().peekable();
        let mut out = logits.reset(batch.sampled.len(), vocab).chunks_exact_mut(vocab);
        for sequence in batch.sequences {
            for row in 0..sequence.rows {
                let position = sequence.context + row;
                let token = batch.tokens[sequence.first_row + row];
                if token.0 as usize >= vocab {
                    return Err(ForwardError::UnknownToken { token, vocab });
                }
                let made = digest(token, position, self.reads, |earlier| read(kv, sequence.table, earlier));
                write(kv, sequence.table, position, &made);
                if sampled.next_if_eq(&&(sequence.first_row + row)).is_some()
                    && let Some(out) = out.next()
                {
                    speak(&read(kv, sequence.table, position), out);
                }
            }
        }
        Ok(())
    }
}

/// The model's function over a plain list of tokens.
#[derive(Clone, Debug)]
pub struct Flat {
    vocab: usize,
    reads: usize,
    kv: Vec<Kv>,
}

impl Flat {
    /// Takes in the next token.
    pub fn push(&mut self, token: TokenId) {
        let made = digest(token, self.kv.len(), self.reads, |earlier| self.kv[earlier]);
        self.kv.push(made);
    }

    /// Forgets all but the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        self.kv.truncate(tokens);
    }

    pub fn len(&self) -> usize {
        self.kv.len()
    }

    pub fn is_empty(&self) -> bool {
        self.kv.is_empty()
    }

    /// Logits after the newest token, `[vocab]`. Panics before the first.
    pub fn logits(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.vocab];
        speak(self.kv.last().expect("a model speaks after a token"), &mut out);
        out
    }
}

/// The finaliser of SplitMix64 (Steele et al., OOPSLA '14): each bit of the input changes about half of the output's.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A digest of all the bytes of one token's KV, after those before.
fn absorb(state: u64, kv: &Kv) -> u64 {
    let (words, _) = kv.as_chunks::<8>();
    words.iter().fold(state, |state, word| mix(state.rotate_left(5) ^ u64::from_le_bytes(*word)))
}

/// The KV of a token: what it reads is the position before it and `reads` others, drawn by its position.
fn digest(token: TokenId, position: usize, reads: usize, read: impl Fn(usize) -> Kv) -> Kv {
    let seed = mix(u64::from(token.0) << 32 | position as u64 ^ 0x9e37_79b9_7f4a_7c15);
    let mut state = seed;
    if let Some(before) = position.checked_sub(1) {
        state = absorb(state, &read(before));
        for draw in 0..reads as u64 {
            let drawn = mix(seed.wrapping_add(draw)) % position as u64;
            state = absorb(state, &read(drawn as usize));
        }
    }
    let mut kv = [0; KV_BYTES];
    let (words, _) = kv.as_chunks_mut::<8>();
    for (word, index) in words.iter_mut().zip(1..) {
        *word = mix(state.wrapping_add(index)).to_le_bytes();
    }
    kv
}

/// Logits after a token with this KV: one stands out, by which the rest are told apart too.
fn speak(kv: &Kv, out: &mut [f32]) {
    let state = absorb(0, kv);
    for (index, logit) in (0u64..).zip(out.iter_mut()) {
        *logit = (state.wrapping_mul(2 * index + 1) >> 56) as f32 / 64.0;
    }
    let loudest = (state % out.len() as u64) as usize;
    out[loudest] = 8.0;
}

fn place(arena: &Arena, table: &[BlockId], position: usize) -> (u32, usize) {
    let size = arena.block_bytes() / KV_BYTES;
    (table[position / size].0, position % size * KV_BYTES)
}

fn read(arena: &Arena, table: &[BlockId], position: usize) -> Kv {
    let (block, start) = place(arena, table, position);
    let (kv, _) = arena.bytes(block)[start..].split_first_chunk().expect("a place lies in its block");
    *kv
}

fn write(arena: &Arena, table: &[BlockId], position: usize, kv: &Kv) {
    let (block, start) = place(arena, table, position);
    arena.with_bytes_mut(block, |bytes| bytes[start..][..KV_BYTES].copy_from_slice(kv));
}

#[cfg(test)]
mod tests {
    use super::super::SequenceRows;
    use super::*;
    use crate::types::BlockSize;

    const SIZE: BlockSize = BlockSize(4);

    fn arena(blocks: usize) -> Arc<Arena> {
        Arc::new(Arena::new(blocks, SHAPE.block_bytes(SIZE)).unwrap())
    }

    fn tokens(n: u32) -> Vec<TokenId> {
        (0..n).map(|index| TokenId(index * 7 % 61)).collect()
    }

    /// Runs one sequence's rows; logits of the last.
    fn run(model: &mut FakeModel, kv: &Arc<Arena>, all: &[TokenId], context: usize, table: &[BlockId]) -> Vec<f32> {
        let rows = all.len() - context;
        let sequences = [SequenceRows { first_row: 0, rows, context, table }];
        let batch = Batch { tokens: &all[context..], sequences: &sequences, sampled: &[rows - 1] };
        let mut logits = Logits::default();
        model.forward(&batch, kv, &mut logits).unwrap();
        logits.row(0).to_vec()
    }

    fn flat(model: &FakeModel, all: &[TokenId]) -> Vec<f32> {
        let mut flat = model.flat();
        all.iter().for_each(|token| flat.push(*token));
        flat.logits()
    }

    #[test]
    fn blocks_anywhere_and_chunks_of_any_length_give_what_a_plain_list_gives() {
        let (mut model, kv, all) = (FakeModel::new(64, TokenCount(64)), arena(8), tokens(14));
        let table = [BlockId(6), BlockId(1), BlockId(3), BlockId(0)];
        run(&mut model, &kv, &all[..5], 0, &table);
        run(&mut model, &kv, &all[..6], 5, &table);
        assert_eq!(run(&mut model, &kv, &all, 6, &table), flat(&model, &all));
    }

    #[test]
    fn any_byte_changed_in_any_place_changes_an_answer_that_reads_it() {
        let (mut model, kv, all) = (FakeModel::new(64, TokenCount(64)).with_reads(64), arena(4), tokens(14));
        let table: Vec<BlockId> = (0..4).map(BlockId).collect();
        run(&mut model, &kv, &all[..13], 0, &table);
        let right = run(&mut model, &kv, &all, 13, &table);
        for byte in 0..13 * KV_BYTES {
            let (block, at) = ((byte / kv.block_bytes()) as u32, byte % kv.block_bytes());
            kv.with_bytes_mut(block, |bytes| bytes[at] ^= 1);
            let wrong = run(&mut model, &kv, &all, 13, &table);
            kv.with_bytes_mut(block, |bytes| bytes[at] ^= 1);
            // A row with 64 draws out of 13 positions leaves one out once in a hundred times.
            assert!(wrong != right, "byte {byte} does not count");
        }
    }

    #[test]
    fn answers_depend_on_tokens_positions_and_history() {
        let model = FakeModel::new(64, TokenCount(64));
        let all = tokens(9);
        let mut other = all.clone();
        other[0] = TokenId(63);
        assert_ne!(flat(&model, &all), flat(&model, &other), "the first token counts for the last");
        assert_ne!(flat(&model, &all), flat(&model, &all[1..]));
        let loudest = |logits: Vec<f32>| (0..64).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        let said: std::collections::HashSet<usize> = (1..60).map(|n| loudest(flat(&model, &tokens(n)))).collect();
        assert!(said.len() > 20, "it says only {said:?}");
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_an_error() {
        let (mut model, kv) = (FakeModel::new(8, TokenCount(64)), arena(1));
        let sequences = [SequenceRows { first_row: 0, rows: 1, context: 0, table: &[BlockId(0)] }];
        let batch = Batch { tokens: &[TokenId(8)], sequences: &sequences, sampled: &[0] };
        assert!(model.forward(&batch, &kv, &mut Logits::default()).is_err());
    }
}
