//! How is one piece of a step's attention done?
//!
//! Chunks of tokens are walked outside, heads inside, since the heads of a block lie side by side; queries go over each
//! chunk in tiles as large as the kernel's registers hold.

use std::marker::PhantomData;
use std::ops::Range;

use half::f16;

use super::element::Element;
use super::kernel::{Chunk, Kernel, NO_SCALES, PlaneMut, Scales, Scores, Softmax, Tile};
use super::plan::{Fill, Plan, Sequence};
use super::work::{Merge, Piece, Shape};
use super::{BLOCK_TOKENS, CHUNK_BLOCKS, CHUNK_TOKENS, PARTITION_TOKENS, scalar};
use crate::kernels::SharedOut;
use crate::kernels::memory::Arena;

/// One layer of one step, over KV that is stored as `E`.
pub(super) struct Step<'a, E> {
    pub plan: &'a Plan,
    pub arena: &'a Arena,
    pub layer: usize,
    pub shape: Shape,
    pub kernel: Kernel,
    /// `[rows, (heads + 2 * kv_heads) * head_dim]`.
    pub qkv: &'a [f32],
    pub stored_as: PhantomData<E>,
}

/// What one thread works in: places for as many queries as walk together.
pub(super) struct Scratch {
    /// For each tile `[head_dim][queries]`, scaled.
    queries: Vec<f32>,
    /// Tokens that each query of a head sees.
    seen: Vec<usize>,
    scores: Vec<Scores>,
    /// Of the partition at hand, as in `Tile`.
    maxima: Vec<f32>,
    sums: Vec<[f32; BLOCK_TOKENS]>,
    values: Vec<f32>,
    total: Total,
}

/// Softmax and weighted values, `[queries][head_dim]`, of all partitions so far.
struct Total {
    softmax: Vec<Softmax>,
    values: Vec<f32>,
}

impl Total {
    fn clear(&mut self, queries: usize, head_dim: usize) {
        self.softmax[..queries].fill(Softmax::START);
        self.values[..queries * head_dim].fill(0.0);
    }
}

impl Scratch {
    pub fn new(queries: usize, head_dim: usize) -> Self {
        Self {
            queries: vec![0.0; queries * head_dim],
            seen: vec![0; queries],
            scores: vec![Scores([0.0; CHUNK_TOKENS]); queries],
            maxima: vec![0.0; queries],
            sums: vec![[0.0; BLOCK_TOKENS]; queries],
            values: vec![0.0; queries * head_dim],
            total: Total { softmax: vec![Softmax::START; queries], values: vec![0.0; queries * head_dim] },
        }
    }

    fn clear_partition(&mut self, queries: usize, head_dim: usize) {
        self.maxima[..queries].fill(f32::NEG_INFINITY);
        self.sums[..queries].fill([0.0; BLOCK_TOKENS]);
        self.values[..queries * head_dim].fill(0.0);
    }

    /// Softmax of a query over the partition at hand.
    fn softmax(&self, query: usize) -> Softmax {
        Softmax { max: self.maxima[query], sum: scalar::sum_of(self.sums[query]) }
    }
}

impl<E: Element> Step<'_, E> {
    /// Writes new keys and values of some KV heads into their block.
    pub fn write(&self, fill: &Fill, heads: Range<usize>) {
        let Shape { kv_heads, group, head_dim } = self.shape;
        for row in 0..fill.rows {
            let row_values = self.row(fill.first_row + row);
            let (keys, values) = row_values[kv_heads * group * head_dim..].split_at(kv_heads * head_dim);
            for head in heads.clone() {
                let of_head = head * head_dim..(head + 1) * head_dim;
                let [mut key_plane, mut value_plane] = self.planes_mut(fill.block, head);
                let row_of_head = (&keys[of_head.clone()], &values[of_head]);
                self.kernel.write(row_of_head, fill.slot + row, &mut key_plane, &mut value_plane);
            }
        }
    }

    /// Attends with the rows and heads of a piece. Writes `out`, or partial results.
    pub fn attend(&self, piece: &Piece, scratch: &mut Scratch, out: &SharedOut<f32>, partials: &SharedOut<f32>) {
        let dim = self.shape.head_dim;
        let sequence = &self.plan.sequences()[piece.sequence];
        let tokens = sequence.context + piece.rows.end;
        if sequence.rows == 1 && tokens <= piece.partitions.end * PARTITION_TOKENS {
            self.write_alone(piece.sequence, sequence, piece.heads.clone());
        }
        let queries = piece.rows.len() * self.shape.group;
        self.load(piece, sequence, scratch);
        scratch.total.clear(piece.heads.len() * queries, dim);
        for partition in piece.partitions.clone() {
            scratch.clear_partition(piece.heads.len() * queries, dim);
            self.attend_partition(piece, sequence, partition, scratch);
            match &piece.partial {
                None => self.fold_partition(piece.heads.len() * queries, scratch),
                Some(places) => {
                    for (index, head) in piece.heads.clone().enumerate() {
                        for query in 0..queries {
                            let at = places.at(partition, head, query).start;
                            let place = index * queries + query;
                            let Softmax { max, sum } = scratch.softmax(place);
                            // SAFETY: the buffer is borrowed for the whole run, and this record is this piece's alone.
                            unsafe { partials.write(at, &[max, sum]) };
                            // SAFETY: as above.
                            unsafe { partials.write(at + 2, &scratch.values[place * dim..][..dim]) };
                        }
                    }
                }
            }
        }
        if piece.partial.is_none() {
            self.finish(sequence, &piece.rows, &piece.heads, &mut scratch.total, out);
        }
    }

    /// Folds the partial results of some rows and heads into theirs of `out`.
    pub fn merge(&self, merge: &Merge, scratch: &mut Scratch, partials: &[f32], out: &SharedOut<f32>) {
        let dim = self.shape.head_dim;
        let queries = merge.rows.len() * self.shape.group;
        let sequence = &self.plan.sequences()[merge.sequence];
        let total = &mut scratch.total;
        total.clear(merge.heads.len() * queries, dim);
        for partition in 0..merge.partitions {
            for (index, head) in merge.heads.clone().enumerate() {
                for query in 0..queries {
                    let record = &partials[merge.partials.at(partition, head, query)];
                    let (part, place) = (Softmax { max: record[0], sum: record[1] }, index * queries + query);
                    let values = &mut total.values[place * dim..][..dim];
                    self.kernel.fold(&mut total.softmax[place], values, part, &record[2..]);
                }
            }
        }
        self.finish(sequence, &merge.rows, &merge.heads, total, out);
    }

    /// Writes the key and value of a sequence's only row.
    fn write_alone(&self, index: usize, sequence: &Sequence, heads: Range<usize>) {
        // Fills are in the order of sequences, and each has one at least.
        let fills = self.plan.fills();
        let fill = fills.partition_point(|fill| fill.sequence < index);
        debug_assert_eq!((fills[fill].sequence, fills[fill].first_row), (index, sequence.first_row));
        self.write(&fills[fill], heads);
    }

    /// Brings the queries of a piece into the order that its tiles want, and notes what each sees.
    fn load(&self, piece: &Piece, sequence: &Sequence, scratch: &mut Scratch) {
        let Shape { group, head_dim: dim, .. } = self.shape;
        let queries = piece.rows.len() * group;
        // Scores are powers of two, not of e: one multiplication less for each.
        let scale = std::f32::consts::LOG2_E / (dim as f32).sqrt();
        for (query, seen) in scratch.seen[..queries].iter_mut().enumerate() {
            *seen = sequence.context + piece.rows.start + query / group + 1;
        }
        for (index, head) in piece.heads.clone().enumerate() {
            for tile in self.kernel.tiles::<E>(queries) {
                let start = (index * queries + tile.start) * dim;
                let columns = &mut scratch.queries[start..][..tile.len() * dim];
                for (column, query) in tile.clone().enumerate() {
                    let row = self.row(sequence.first_row + piece.rows.start + query / group);
                    let values = &row[(head * group + query % group) * dim..][..dim];
                    let places = columns[column..].iter_mut().step_by(tile.len());
                    places.zip(values).for_each(|(place, value)| *place = value * scale);
                }
            }
        }
    }

    fn attend_partition(&self, piece: &Piece, sequence: &Sequence, partition: usize, scratch: &mut Scratch) {
        let dim = self.shape.head_dim;
        let queries = piece.rows.len() * self.shape.group;
        let tokens = sequence.context + piece.rows.end;
        let table = &self.plan.table(sequence)[..tokens.div_ceil(BLOCK_TOKENS)];
        let end = tokens.min((partition + 1) * PARTITION_TOKENS);
        // Not past what is this piece's: another thread may write there.
        let last = tokens.min(piece.partitions.end * PARTITION_TOKENS);
        for first in (partition * PARTITION_TOKENS..end).step_by(CHUNK_TOKENS) {
            for (index, head) in piece.heads.clone().enumerate() {
                let chunk = self.chunk(table, first, head);
                let ahead = if first + CHUNK_TOKENS < last { first + CHUNK_TOKENS } else { first };
                let ahead = self.chunk(table, ahead, head);
                for tile in self.kernel.tiles::<E>(queries) {
                    let seen = &scratch.seen[tile.clone()];
                    if seen[seen.len() - 1] <= first {
                        continue;
                    }
                    let place = index * queries + tile.start;
                    let values = place * dim..(place + tile.len()) * dim;
                    self.kernel.attend(
                        &mut Tile {
                            queries: &scratch.queries[values.clone()],
                            seen,
                            scores: &mut scratch.scores[..tile.len()],
                            maxima: &mut scratch.maxima[place..][..tile.len()],
                            sums: &mut scratch.sums[place..][..tile.len()],
                            values: &mut scratch.values[values],
                        },
                        &chunk,
                        &ahead,
                    );
                }
            }
        }
    }

    /// Folds a partition's results into the totals.
    fn fold_partition(&self, queries: usize, scratch: &mut Scratch) {
        let dim = self.shape.head_dim;
        for query in 0..queries {
            let softmax = scratch.softmax(query);
            let of_query = query * dim..(query + 1) * dim;
            let Total { softmax: total, values } = &mut scratch.total;
            self.kernel.fold(&mut total[query], &mut values[of_query.clone()], softmax, &scratch.values[of_query]);
        }
    }

    /// Divides the totals by their softmax's sums, into their rows and heads of `out`.
    fn finish(
        &self,
        sequence: &Sequence,
        rows: &Range<usize>,
        heads: &Range<usize>,
        total: &mut Total,
        out: &SharedOut<f32>,
    ) {
        let Shape { kv_heads, group, head_dim: dim } = self.shape;
        let queries = rows.len() * group;
        let values = total.values.chunks_exact_mut(dim).take(heads.len() * queries).zip(&total.softmax);
        for (index, (values, softmax)) in values.enumerate() {
            let scale = 1.0 / softmax.sum;
            // What no query sees may have been added with the weight 0: a zero's sign must not tell.
            values.iter_mut().for_each(|value| *value = *value * scale + 0.0);
            let (head, query) = (heads.start + index / queries, index % queries);
            let row = sequence.first_row + rows.start + query / group;
            // SAFETY: `out` is borrowed for the whole run, and one piece or merge has this row and head.
            unsafe { out.write((row * kv_heads * group + head * group + query % group) * dim, values) };
        }
    }

    /// Queries, keys and values of a row of the batch.
    fn row(&self, row: usize) -> &[f32] {
        let width = self.shape.kv_heads * (self.shape.group + 2) * self.shape.head_dim;
        &self.qkv[row * width..][..width]
    }

    /// Keys and values of one head, of a chunk whose first token is `first`; less blocks where the table ends.
    fn chunk(&self, table: &[u32], first: usize, head: usize) -> Chunk<'_, E> {
        let mut chunk = Chunk {
            first,
            head_dim: self.shape.head_dim,
            keys: [&[]; _],
            values: [&[]; _],
            key_scales: [NO_SCALES; _],
            value_scales: [NO_SCALES; _],
        };
        let blocks = &table[first / BLOCK_TOKENS..];
        for (index, &block) in blocks.iter().take(CHUNK_BLOCKS).enumerate() {
            let [keys, values] = self.planes(block, head);
            (chunk.keys[index], chunk.key_scales[index]) = (keys.0.as_chunks().0, keys.1);
            (chunk.values[index], chunk.value_scales[index]) = values;
        }
        chunk
    }

    /// Keys, `[head_dim][16]`, and values, `[16][head_dim]`, of a head in a block, and their scales.
    fn planes(&self, block: u32, head: usize) -> [(&[E], &Scales); 2] {
        let numbers = BLOCK_TOKENS * self.shape.head_dim;
        self.plane_starts(block, head).map(|start| {
            // SAFETY: inside the block (`plane_starts`); all writes of this head are done, and no other sequence writes the
            // block (the plan's check).
            let plane = unsafe { std::slice::from_raw_parts(start, numbers) };
            if !E::SCALED {
                return (plane, NO_SCALES);
            }
            // SAFETY: as above: the scales lie behind the numbers, at an even place, since those are an even number of bytes.
            (plane, unsafe { &*start.add(numbers).cast() })
        })
    }

    fn planes_mut(&self, block: u32, head: usize) -> [PlaneMut<'_, E>; 2] {
        let numbers = BLOCK_TOKENS * self.shape.head_dim;
        self.plane_starts(block, head).map(|start| {
            let scales = if E::SCALED { BLOCK_TOKENS } else { 0 };
            // SAFETY: the numbers of a plane end inside the block, and the scales, if any, lie behind them.
            let behind = unsafe { start.add(numbers) }.cast::<f16>();
            // SAFETY: inside the block (`plane_starts`); by the plan's check only this sequence has a block that is written,
            // and of its threads only the one that writes touches this head now: all others wait, or attend to other
            // partitions.
            let plane = unsafe { std::slice::from_raw_parts_mut(start, numbers) };
            // SAFETY: as above, and numbers, scales and the other plane don't overlap. Even, as in `planes`.
            PlaneMut { numbers: plane, scales: unsafe { std::slice::from_raw_parts_mut(behind, scales) } }
        })
    }

    /// Where keys and values of a head start in a block.
    fn plane_starts(&self, block: u32, head: usize) -> [*mut E; 2] {
        let layout = self.plan.layout();
        let start = self.arena.block_ptr(block);
        [layout.keys_at(self.layer, head), layout.values_at(self.layer, head)].map(|at| {
            // SAFETY: inside the block by the layout, whose size the plan checked. Blocks and planes are multiples of 64 and
            // 32 bytes, and aligned for every form that numbers have.
            unsafe { start.add(at) }.cast()
        })
    }
}
