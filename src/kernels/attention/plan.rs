//! Which rows has a step, and in which blocks do their keys and values lie?
//!
//! Checked once and used by every layer: each table covers its rows and lies in the arena, and no block that the step
//! writes is in another sequence's table, or twice in one. What a plan holds is used again by the next step.

use std::sync::Arc;

use super::{BLOCK_TOKENS, KvLayout};
use crate::kernels::memory::Arena;
use crate::types::BlockId;

/// The rows that one sequence has in a step.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// First row of the sequence in the batch.
    pub first_row: usize,
    pub rows: usize,
    /// Tokens in the blocks before this step: row `i` has position `context + i`.
    pub context: usize,
    /// Blocks of positions `0..context + rows`, in order.
    pub table: &'a [BlockId],
}

/// Why a step's tables can't be served. Each is a bug of whoever made the batch, and worth a refusal.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("blocks of {found} bytes, where this model's KV needs {wanted}")]
    BlockBytes { wanted: usize, found: usize },
    #[error("sequence {sequence} starts at row {found}, where row {wanted} is next")]
    Gap { sequence: usize, wanted: usize, found: usize },
    #[error("sequence {sequence} has no rows")]
    Empty { sequence: usize },
    #[error("the table of sequence {sequence} has {blocks} blocks, too few for {tokens} tokens")]
    ShortTable { sequence: usize, blocks: usize, tokens: usize },
    #[error("the table of sequence {sequence} names block {block}, outside an arena of {blocks}")]
    OutsideArena { sequence: usize, block: BlockId, blocks: usize },
    #[error("sequences {writer} and {other} share block {block}, which this step writes")]
    SharedWrite { writer: usize, other: usize, block: BlockId },
}

/// A step's tables.
pub struct Plan {
    layout: KvLayout,
    /// Of the step; none before the first.
    arena: Option<Arc<Arena>>,
    rows: usize,
    sequences: Vec<Sequence>,
    /// Blocks of all sequences, one table behind the other.
    tables: Vec<u32>,
    fills: Vec<Fill>,
    /// For each block of the arena, which of `fills` writes it, from 1; all 0 between steps.
    writers: Vec<u32>,
}

/// The rows of one sequence in the step.
#[derive(Clone, Copy)]
pub(super) struct Sequence {
    pub first_row: usize,
    pub rows: usize,
    pub context: usize,
    /// Where its table starts in `Plan::tables`.
    table: usize,
}

impl Sequence {
    /// Tokens in its blocks once the step has written its own.
    pub fn tokens(&self) -> usize {
        self.context + self.rows
    }
}

/// Rows of one sequence that come into one block.
#[derive(Clone, Copy)]
pub(super) struct Fill {
    pub sequence: usize,
    /// The block's place in the sequence's table.
    at: usize,
    pub block: u32,
    /// In the batch.
    pub first_row: usize,
    pub rows: usize,
    /// Place of the first row's token in the block.
    pub slot: usize,
}

impl Plan {
    /// Of no rows. `layout`: of the arenas that it is set for.
    pub fn new(layout: KvLayout) -> Self {
        Self {
            layout,
            arena: None,
            rows: 0,
            sequences: Vec::new(),
            tables: Vec::new(),
            fills: Vec::new(),
            writers: Vec::new(),
        }
    }

    /// Copies and checks a step's tables. Of no rows after an error.
    pub fn set<'a>(
        &mut self,
        arena: &Arc<Arena>,
        sequences: impl IntoIterator<Item = Rows<'a>>,
    ) -> Result<(), PlanError> {
        self.clear();
        let outcome = self.copy(arena, sequences).and_then(|()| self.refuse_shared_writes());
        if outcome.is_err() {
            self.clear();
        }
        outcome
    }

    /// Rows of the whole step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Positions of the rows, in their order.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.sequences.iter().flat_map(|sequence| sequence.context..sequence.tokens())
    }

    pub(super) fn layout(&self) -> KvLayout {
        self.layout
    }

    pub(super) fn arena(&self) -> Option<&Arena> {
        self.arena.as_deref()
    }

    pub(super) fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// What the step writes.
    pub(super) fn fills(&self) -> &[Fill] {
        &self.fills
    }

    /// Blocks of the sequence's tokens, in order.
    pub(super) fn table(&self, sequence: &Sequence) -> &[u32] {
        &self.tables[sequence.table..][..sequence.tokens().div_ceil(BLOCK_TOKENS)]
    }

    fn clear(&mut self) {
        self.rows = 0;
        self.sequences.clear();
        self.tables.clear();
        self.fills.clear();
    }

    fn copy<'a>(&mut self, arena: &Arc<Arena>, sequences: impl IntoIterator<Item = Rows<'a>>) -> Result<(), PlanError> {
        if arena.block_bytes() != self.layout.block_bytes() {
            return Err(PlanError::BlockBytes { wanted: self.layout.block_bytes(), found: arena.block_bytes() });
        }
        for (sequence, rows) in sequences.into_iter().enumerate() {
            if rows.first_row != self.rows {
                return Err(PlanError::Gap { sequence, wanted: self.rows, found: rows.first_row });
            }
            if rows.rows == 0 {
                return Err(PlanError::Empty { sequence });
            }
            let tokens = rows.context + rows.rows;
            let Some(table) = rows.table.get(..tokens.div_ceil(BLOCK_TOKENS)) else {
                return Err(PlanError::ShortTable { sequence, blocks: rows.table.len(), tokens });
            };
            if let Some(&block) = table.iter().find(|block| block.0 as usize >= arena.blocks()) {
                return Err(PlanError::OutsideArena { sequence, block, blocks: arena.blocks() });
            }
            for (at, block) in table.iter().enumerate().skip(rows.context / BLOCK_TOKENS) {
                let first = rows.context.max(at * BLOCK_TOKENS);
                self.fills.push(Fill {
                    sequence,
                    at,
                    block: block.0,
                    first_row: rows.first_row + first - rows.context,
                    rows: tokens.min((at + 1) * BLOCK_TOKENS) - first,
                    slot: first % BLOCK_TOKENS,
                });
            }
            let (first_row, context) = (rows.first_row, rows.context);
            self.sequences.push(Sequence { first_row, rows: rows.rows, context, table: self.tables.len() });
            self.tables.extend(table.iter().map(|block| block.0));
            self.rows += rows.rows;
        }
        self.writers.resize(arena.blocks(), 0);
        self.arena = Some(Arc::clone(arena));
        Ok(())
    }

    fn refuse_shared_writes(&mut self) -> Result<(), PlanError> {
        let outcome = self.mark_writers().and_then(|()| self.look_for_writers());
        for fill in &self.fills {
            self.writers[fill.block as usize] = 0;
        }
        outcome
    }

    fn mark_writers(&mut self) -> Result<(), PlanError> {
        for (index, fill) in self.fills.iter().enumerate() {
            let writer = &mut self.writers[fill.block as usize];
            if *writer != 0 {
                let first = self.fills[*writer as usize - 1].sequence;
                return Err(PlanError::SharedWrite { writer: first, other: fill.sequence, block: BlockId(fill.block) });
            }
            *writer = index as u32 + 1;
        }
        Ok(())
    }

    fn look_for_writers(&self) -> Result<(), PlanError> {
        for (other, sequence) in self.sequences.iter().enumerate() {
            for (at, &block) in self.table(sequence).iter().enumerate() {
                let writer = self.writers[block as usize];
                if writer == 0 {
                    continue;
                }
                let fill = &self.fills[writer as usize - 1];
                if (fill.sequence, fill.at) != (other, at) {
                    return Err(PlanError::SharedWrite { writer: fill.sequence, other, block: BlockId(block) });
                }
            }
        }
        Ok(())
    }
}
