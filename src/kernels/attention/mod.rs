//! How does a row attend to its sequence's keys and values, which lie in blocks all over an arena?
//!
//! A step first writes the keys and values of its new rows into their blocks, then attends. Softmax is taken online, by
//! chunks of four blocks counted from the sequence's start, and every sum has one order.
//! Invariant: a row's result is the same bits in decode, in a prefill chunk of any size, alone or batched, in the scalar
//! and in the SIMD form. After PagedAttention (arXiv:2309.06180, section 4.1).

#[cfg(target_arch = "x86_64")]
mod avx2;
mod scalar;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape};
use half::f16;
use rayon::prelude::*;

use super::SharedOut;
use super::elementwise::contiguous;
use super::memory::Arena;
use crate::types::BlockId;

/// Tokens of a block: two vectors of eight.
pub const BLOCK_TOKENS: usize = 16;
/// Changes whenever bytes of KV written before would be read wrongly.
pub const KV_LAYOUT_VERSION: u32 = 1;
/// Blocks of a chunk: softmax rescales once a chunk.
const CHUNK_BLOCKS: usize = 4;
const CHUNK_TOKENS: usize = CHUNK_BLOCKS * BLOCK_TOKENS;
/// Most query rows of a tile: with two vectors of sums each, they fill the 16 registers of AVX2.
const TILE: usize = 6;
/// Tiles that a thread takes at a time.
const TILES_A_TASK: usize = 4;

/// How keys and values lie in a block: layer after layer, all K `[kv_head][dim][16]`, then all V `[kv_head][16][dim]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvLayout {
    pub layers: usize,
    pub kv_heads: usize,
    /// A multiple of 8.
    pub head_dim: usize,
}

impl KvLayout {
    pub fn block_bytes(&self) -> usize {
        self.layers * 2 * self.plane() * size_of::<f16>()
    }

    /// Values of one layer's K, or V, in a block.
    fn plane(&self) -> usize {
        self.kv_heads * self.head_dim * BLOCK_TOKENS
    }

    /// Where K of a head starts in a block, counted in f16.
    fn keys_at(&self, layer: usize, kv_head: usize) -> usize {
        layer * 2 * self.plane() + kv_head * self.head_dim * BLOCK_TOKENS
    }

    /// Where V of a head starts in a block, counted in f16.
    fn values_at(&self, layer: usize, kv_head: usize) -> usize {
        self.keys_at(layer, kv_head) + self.plane()
    }
}

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

/// A step's tables, checked once and used by every layer.
pub struct Plan {
    arena: Arc<Arena>,
    layout: KvLayout,
    rows: usize,
    sequences: Vec<Sequence>,
}

struct Sequence {
    first_row: usize,
    rows: usize,
    context: usize,
    table: Vec<u32>,
}

impl Sequence {
    /// Places in the table that this step writes.
    fn written(&self) -> Range<usize> {
        self.context / BLOCK_TOKENS..(self.context + self.rows).div_ceil(BLOCK_TOKENS)
    }
}

impl Plan {
    /// Copies and checks the tables: each covers its rows, lies in the arena, and no block that the step writes is in
    /// another sequence's table, or twice in one.
    pub fn new<'a>(
        arena: &Arc<Arena>,
        layout: KvLayout,
        sequences: impl IntoIterator<Item = Rows<'a>>,
    ) -> Result<Self, PlanError> {
        if arena.block_bytes() != layout.block_bytes() {
            return Err(PlanError::BlockBytes { wanted: layout.block_bytes(), found: arena.block_bytes() });
        }
        let mut plan = Self { arena: Arc::clone(arena), layout, rows: 0, sequences: Vec::new() };
        for (sequence, rows) in sequences.into_iter().enumerate() {
            if rows.first_row != plan.rows {
                return Err(PlanError::Gap { sequence, wanted: plan.rows, found: rows.first_row });
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
            plan.rows += rows.rows;
            plan.sequences.push(Sequence {
                first_row: rows.first_row,
                rows: rows.rows,
                context: rows.context,
                table: table.iter().map(|block| block.0).collect(),
            });
        }
        plan.refuse_shared_writes()?;
        Ok(plan)
    }

    fn refuse_shared_writes(&self) -> Result<(), PlanError> {
        let written: HashMap<u32, (usize, usize)> = self
            .sequences
            .iter()
            .enumerate()
            .flat_map(|(index, sequence)| sequence.written().map(move |at| (sequence.table[at], (index, at))))
            .collect();
        for (other, sequence) in self.sequences.iter().enumerate() {
            for (at, &block) in sequence.table.iter().enumerate() {
                match written.get(&block) {
                    Some(&(writer, written_at)) if (writer, written_at) != (other, at) => {
                        return Err(PlanError::SharedWrite { writer, other, block: BlockId(block) });
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Rows of the whole step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Positions of the rows, in their order.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.sequences.iter().flat_map(|sequence| (0..sequence.rows).map(|row| sequence.context + row))
    }
}

/// Attention of one layer, as candle runs it.
///
/// In: `[rows, (heads + 2 * kv_heads) * head_dim]`: queries, keys, values, all turned to their positions. Out: `[rows,
/// heads * head_dim]`. Writes the keys and values into the plan's blocks. Scores are scaled by `1/sqrt(head_dim)` and
/// summed in f32; keys and values are f16, clamped to its finite range.
pub struct PagedAttention {
    pub plan: Arc<Plan>,
    pub layer: usize,
    pub heads: usize,
}

impl CustomOp1 for PagedAttention {
    fn name(&self) -> &'static str {
        "paged-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let KvLayout { kv_heads, head_dim, layers } = self.plan.layout;
        let wanted = (self.plan.rows, (self.heads + 2 * kv_heads) * head_dim);
        if layout.shape().dims2()? != wanted || self.layer >= layers || !self.heads.is_multiple_of(kv_heads) {
            candle_core::bail!("attention of layer {} wants {wanted:?}, not {:?}", self.layer, layout.shape());
        }
        let width = self.heads * head_dim;
        let mut out = vec![0.0; self.plan.rows * width];
        #[cfg(target_arch = "x86_64")]
        let kernel = if super::has_avx2() { Kernel::Avx2 } else { Kernel::Scalar };
        #[cfg(not(target_arch = "x86_64"))]
        let kernel = Kernel::Scalar;
        self.run(kernel, contiguous(storage, layout)?, &mut out);
        Ok((CpuStorage::F32(out), Shape::from((self.plan.rows, width))))
    }
}

#[derive(Clone, Copy)]
enum Kernel {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl PagedAttention {
    fn run(&self, kernel: Kernel, qkv: &[f32], out: &mut [f32]) {
        let layout = self.plan.layout;
        let per_head = || (0..self.plan.sequences.len()).flat_map(|s| (0..layout.kv_heads).map(move |h| (s, h)));
        per_head().collect::<Vec<_>>().into_par_iter().for_each(|(sequence, kv_head)| {
            self.write(&self.plan.sequences[sequence], kv_head, qkv);
        });
        let group = self.heads / layout.kv_heads;
        let mut tasks = Vec::new();
        for (sequence, kv_head) in per_head() {
            let queries = self.plan.sequences[sequence].rows * group;
            for first in (0..queries).step_by(TILE * TILES_A_TASK) {
                tasks.push((sequence, kv_head, first..queries.min(first + TILE * TILES_A_TASK)));
            }
        }
        let shared = SharedOut::new(out);
        tasks.into_par_iter().for_each(|(sequence, kv_head, queries)| {
            let sequence = &self.plan.sequences[sequence];
            let cache = Cache { plan: &self.plan, table: &sequence.table, layer: self.layer, kv_head };
            for first in queries.clone().step_by(TILE) {
                let count = TILE.min(queries.end - first);
                self.attend(kernel, sequence, &cache, first..first + count, qkv, &shared);
            }
        });
    }

    /// Writes the new rows' keys and values of one head into their blocks.
    fn write(&self, sequence: &Sequence, kv_head: usize, qkv: &[f32]) {
        let layout = self.plan.layout;
        let dim = layout.head_dim;
        let width = (self.heads + 2 * layout.kv_heads) * dim;
        let narrow = |value: f32| f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()));
        for row in 0..sequence.rows {
            let position = sequence.context + row;
            let (block, slot) = (sequence.table[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
            let row = &qkv[(sequence.first_row + row) * width..][..width];
            let keys = &row[(self.heads + kv_head) * dim..][..dim];
            let values = &row[(self.heads + layout.kv_heads + kv_head) * dim..][..dim];
            let start = self.plan.arena.block_ptr(block).cast::<f16>();
            let (keys_at, values_at) = (layout.keys_at(self.layer, kv_head), layout.values_at(self.layer, kv_head));
            for (d, (&key, &value)) in keys.iter().zip(values).enumerate() {
                // SAFETY: inside the block by the layout, whose size the plan checked; only this task writes this head,
                // and by the plan's check no other sequence has the block.
                unsafe { start.add(keys_at + d * BLOCK_TOKENS + slot).write(narrow(key)) };
                // SAFETY: as above.
                unsafe { start.add(values_at + slot * dim + d).write(narrow(value)) };
            }
        }
    }

    /// Attends with queries `queries` of one KV head: query `i` is row `i / group`, head `i % group` of the group.
    fn attend(
        &self,
        kernel: Kernel,
        sequence: &Sequence,
        cache: &Cache<'_>,
        queries: Range<usize>,
        qkv: &[f32],
        out: &SharedOut,
    ) {
        let layout = self.plan.layout;
        let (dim, group) = (layout.head_dim, self.heads / layout.kv_heads);
        let width = (self.heads + 2 * layout.kv_heads) * dim;
        let scale = 1.0 / (dim as f32).sqrt();
        let place = |query: usize| (query / group, cache.kv_head * group + query % group);
        let mut tile =
            Tile { head_dim: dim, queries: Vec::new(), lengths: [0; TILE], sums: vec![0.0; queries.len() * dim] };
        for (index, query) in queries.clone().enumerate() {
            let (row, head) = place(query);
            let values = &qkv[(sequence.first_row + row) * width + head * dim..][..dim];
            tile.queries.extend(values.iter().map(|value| value * scale));
            tile.lengths[index] = sequence.context + row + 1;
        }
        match kernel {
            Kernel::Scalar => scalar::attend(&mut tile, cache),
            // SAFETY: the kernel was chosen by `has_avx2`.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { avx2::attend(&mut tile, cache) },
        }
        for (query, sums) in queries.zip(tile.sums.chunks_exact(dim)) {
            let (row, head) = place(query);
            let at = (sequence.first_row + row) * self.heads * dim + head * dim;
            // SAFETY: `out` is borrowed for the whole run, and only this tile has this row and head.
            unsafe { out.write(at, sums) };
        }
    }
}

/// Up to six queries that share a sequence and a KV head.
struct Tile {
    head_dim: usize,
    /// `[queries, head_dim]`, scaled.
    queries: Vec<f32>,
    /// Tokens that each query sees, ascending.
    lengths: [usize; TILE],
    /// `[queries, head_dim]`: the result.
    sums: Vec<f32>,
}

/// One sequence's keys and values of one layer and head.
struct Cache<'a> {
    plan: &'a Plan,
    table: &'a [u32],
    layer: usize,
    kv_head: usize,
}

impl<'a> Cache<'a> {
    /// Keys of a block: `[head_dim][16]`.
    fn keys(&self, block: usize) -> &'a [[f16; BLOCK_TOKENS]] {
        let layout = self.plan.layout;
        let start = self.plan.arena.block_ptr(self.table[block]).cast::<f16>();
        // SAFETY: inside the block by the layout, whose size the plan checked.
        let start = unsafe { start.add(layout.keys_at(self.layer, self.kv_head)) };
        // SAFETY: all writes of this head are done, and no other sequence writes the block (the plan's check).
        unsafe { std::slice::from_raw_parts(start.cast(), layout.head_dim) }
    }

    /// Values of a block: `[16][head_dim]`, flat.
    fn values(&self, block: usize) -> &'a [f16] {
        let layout = self.plan.layout;
        let start = self.plan.arena.block_ptr(self.table[block]).cast::<f16>();
        // SAFETY: inside the block by the layout, whose size the plan checked.
        let start = unsafe { start.add(layout.values_at(self.layer, self.kv_head)) };
        // SAFETY: all writes of this head are done, and no other sequence writes the block (the plan's check).
        unsafe { std::slice::from_raw_parts(start, BLOCK_TOKENS * layout.head_dim) }
    }
}

/// Running state of one query's softmax.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    sum: f32,
}

impl Softmax {
    const START: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}
