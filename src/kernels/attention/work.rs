//! How is a step's attention cut into pieces that threads share evenly?
//!
//! A piece is some rows of one sequence with some of its KV heads. Where one sequence is too much for a thread, its context
//! is cut too, in whole partitions: each of these gives a partial result, and a merge folds them in the order in which
//! one thread would have. So the cut changes who does what, and no bit of the result.
//! Invariant: every row and head is in one piece for each of its partitions, whatever the threads.

use std::ops::Range;

use super::PARTITION_TOKENS;
use super::plan::Plan;

/// Query heads that walk through keys and values together: as many rows and KV heads as give these.
const QUERIES: usize = 96;
/// Most floats of the queries that walk together, so that they and their sums stay in the second cache.
const QUERY_FLOATS: usize = QUERIES * 128;
/// Pieces that each thread should find, so that the last ones end together.
const PIECES_A_THREAD: usize = 4;
/// Chunks of pieces that each thread should find: a bound for steps of very many short sequences.
const CHUNKS_A_THREAD: usize = 16;
/// Products of a query's and a key's dimension that are worth a thread's attention: some microseconds. Tests cut all.
const LEAST_PRODUCTS: usize = if cfg!(test) { 0 } else { 1 << 16 };

/// The sizes that decide how work is cut.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    pub head_dim: usize,
}

impl Shape {
    /// Most queries of a piece: at least one row with one head.
    pub fn queries(self) -> usize {
        (QUERY_FLOATS / self.head_dim).min(QUERIES).max(self.group)
    }
}

/// What one thread does at a time.
#[derive(Clone)]
pub(super) struct Piece {
    pub sequence: usize,
    /// Of the sequence, counted from its first row in the step.
    pub rows: Range<usize>,
    /// KV heads.
    pub heads: Range<usize>,
    pub partitions: Range<usize>,
    /// Where a partial result goes; `None`: the piece has all partitions of its rows.
    pub partial: Option<Partials>,
}

/// Partial results of some rows and heads: `[partitions][heads][queries]`, each a maximum, a sum and `[head_dim]` sums.
#[derive(Clone)]
pub(super) struct Partials {
    /// In the buffer of all partial results.
    start: usize,
    heads: Range<usize>,
    queries: usize,
    record: usize,
}

impl Partials {
    /// Where the result of a query is in the buffer.
    pub fn at(&self, partition: usize, head: usize, query: usize) -> Range<usize> {
        let index = (partition * self.heads.len() + head - self.heads.start) * self.queries + query;
        self.start + index * self.record..self.start + (index + 1) * self.record
    }
}

/// Rows and heads whose partial results are to be merged.
pub(super) struct Merge {
    pub sequence: usize,
    pub rows: Range<usize>,
    pub heads: Range<usize>,
    pub partitions: usize,
    pub partials: Partials,
}

/// The pieces of one layer of one step. Its memory is used again.
#[derive(Default)]
pub(super) struct Work {
    pieces: Vec<Piece>,
    /// Where each chunk of pieces ends.
    chunks: Vec<usize>,
    pub merges: Vec<Merge>,
    /// Floats of all partial results.
    pub partial_floats: usize,
}

impl Work {
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    pub fn chunk(&self, chunk: usize) -> &[Piece] {
        let first = if chunk == 0 { 0 } else { self.chunks[chunk - 1] };
        &self.pieces[first..self.chunks[chunk]]
    }

    /// Cuts the attention of a layer for so many threads.
    pub fn cut(&mut self, plan: &Plan, shape: Shape, threads: usize) {
        self.pieces.clear();
        self.chunks.clear();
        self.merges.clear();
        self.partial_floats = 0;
        let Shape { kv_heads, group, head_dim } = shape;
        // Costs are pairs of a query and a token. A chunk of prefill costs less: early rows see less.
        let all: usize = plan.sequences().iter().map(|sequence| sequence.rows * sequence.tokens()).sum();
        let (fair, chunk) = if threads == 1 {
            (usize::MAX, usize::MAX)
        } else {
            let share =
                |parts: usize| (all * kv_heads * group / (threads * parts)).max(LEAST_PRODUCTS / head_dim).max(1);
            (share(PIECES_A_THREAD), share(CHUNKS_A_THREAD))
        };
        let rows_at_once = shape.queries() / group;
        let mut waiting = 0;
        for (index, sequence) in plan.sequences().iter().enumerate() {
            // The last rows see most: they go first, so that no long piece is left for the end.
            for end in (1..=sequence.rows).rev().step_by(rows_at_once) {
                let rows = end.saturating_sub(rows_at_once)..end;
                let tokens = sequence.context + rows.end;
                let heads_at_once = (shape.queries() / (rows.len() * group)).clamp(1, kv_heads);
                for first in (0..kv_heads).step_by(heads_at_once) {
                    let heads = first..kv_heads.min(first + heads_at_once);
                    let before = self.pieces.len();
                    self.add(index, rows.clone(), heads, tokens, shape, fair);
                    for piece in before..self.pieces.len() {
                        waiting += cost(&self.pieces[piece], tokens, group);
                        if waiting >= chunk {
                            self.chunks.push(piece + 1);
                            waiting = 0;
                        }
                    }
                }
            }
        }
        if waiting > 0 {
            self.chunks.push(self.pieces.len());
        }
    }

    /// Adds pieces for rows and heads that walk together, of at most the `fair` cost where that can be.
    fn add(
        &mut self,
        sequence: usize,
        rows: Range<usize>,
        heads: Range<usize>,
        tokens: usize,
        shape: Shape,
        fair: usize,
    ) {
        let queries = rows.len() * shape.group;
        let partitions = tokens.div_ceil(PARTITION_TOKENS);
        let mut piece = Piece { sequence, rows, heads, partitions: 0..partitions, partial: None };
        if cost(&piece, tokens, shape.group) <= fair {
            return self.pieces.push(piece);
        }
        let slice = queries * PARTITION_TOKENS;
        let heads = piece.heads.clone();
        // Heads of a block lie side by side, so they are parted last.
        let (heads_each, partitions_each) = match fair / (slice * heads.len()) {
            0 => ((fair / slice).max(1), 1),
            partitions => (heads.len(), partitions),
        };
        if partitions_each < partitions {
            let record = 2 + shape.head_dim;
            let partials = Partials { start: self.partial_floats, heads: heads.clone(), queries, record };
            self.partial_floats += partitions * heads.len() * queries * record;
            piece.partial = Some(partials.clone());
            self.merges.push(Merge { sequence, rows: piece.rows.clone(), heads: heads.clone(), partitions, partials });
        }
        for first in (0..partitions).step_by(partitions_each) {
            for head in heads.clone().step_by(heads_each) {
                self.pieces.push(Piece {
                    heads: head..heads.end.min(head + heads_each),
                    partitions: first..partitions.min(first + partitions_each),
                    ..piece.clone()
                });
            }
        }
    }
}

/// Pairs of a query and a token, of `tokens` that the sequence's last row of the piece sees.
fn cost(piece: &Piece, tokens: usize, group: usize) -> usize {
    let seen = tokens.min(piece.partitions.end * PARTITION_TOKENS) - piece.partitions.start * PARTITION_TOKENS;
    piece.rows.len() * group * piece.heads.len() * seen
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::kernels::attention::{BLOCK_TOKENS, KvLayout, Rows};
    use crate::kernels::memory::Arena;
    use crate::types::{BlockId, KvDtype};

    proptest! {
        #[test]
        fn every_row_and_head_is_in_one_piece_for_each_of_its_partitions(
            cases in proptest::collection::vec((0..2000_usize, 1..300_usize), 1..6),
            kv_heads in 1..5_usize,
            group in 1..17_usize,
            threads in 1..5_usize,
        ) {
            let layout = KvLayout { layers: 1, kv_heads, head_dim: 64, dtype: KvDtype::F16 };
            let arena = Arc::new(Arena::new(1000, layout.block_bytes()).unwrap());
            let mut free = (0..1000).map(BlockId);
            let blocks = |&(context, rows): &(usize, usize)| (context + rows).div_ceil(BLOCK_TOKENS);
            let tables: Vec<Vec<_>> = cases.iter().map(|case| free.by_ref().take(blocks(case)).collect()).collect();
            let mut first_row = 0;
            let rows = cases.iter().zip(&tables).map(|(&(context, rows), table)| {
                first_row += rows;
                Rows { first_row: first_row - rows, rows, context, table }
            });
            let mut plan = Plan::new(layout);
            plan.set(&arena, rows).unwrap();
            let shape = Shape { kv_heads, group, head_dim: 64 };
            let mut work = Work::default();
            work.cut(&plan, shape, threads);
            prop_assert!(threads > 1 || work.chunks() == 1);
            prop_assert!(work.chunks() <= 2 * threads * CHUNKS_A_THREAD + work.pieces.len() / 2);
            let mut found: HashMap<(usize, usize, usize), Vec<usize>> = HashMap::new();
            let mut records = Vec::new();
            for piece in (0..work.chunks()).flat_map(|chunk| work.chunk(chunk)) {
                prop_assert!(piece.rows.len() * group * piece.heads.len() <= shape.queries());
                for (row, head) in piece.rows.clone().flat_map(|row| piece.heads.clone().map(move |head| (row, head))) {
                    found.entry((piece.sequence, row, head)).or_default().extend(piece.partitions.clone());
                }
                let Some(partial) = &piece.partial else { continue };
                for (partition, head) in piece.partitions.clone().flat_map(|p| piece.heads.clone().map(move |h| (p, h))) {
                    records.extend((0..piece.rows.len() * group).map(|query| partial.at(partition, head, query).start));
                }
            }
            for (sequence, &(context, rows)) in cases.iter().enumerate() {
                for (row, head) in (0..rows).flat_map(|row| (0..kv_heads).map(move |head| (row, head))) {
                    let mut partitions = found.remove(&(sequence, row, head)).unwrap();
                    partitions.sort_unstable();
                    prop_assert!(partitions.iter().enumerate().all(|(index, &partition)| index == partition));
                    prop_assert!(partitions.len() * PARTITION_TOKENS > context + row);
                }
            }
            prop_assert!(found.is_empty());
            let all = records.len();
            records.sort_unstable();
            records.dedup();
            prop_assert_eq!((records.len(), all * 66), (all, work.partial_floats));
        }
    }
}
