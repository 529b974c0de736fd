//! How does a row attend to its sequence's keys and values, which lie in blocks all over an arena?
//!
//! A step first writes the keys and values of its new rows into their blocks, then attends. A sequence's context is cut in
//! partitions of 256 tokens, counted from its start. In a partition softmax is taken online, by chunks of four blocks; the
//! partitions' results are folded in their order. So every sum has one order, and threads may share one long sequence.
//! Invariant: a row's result is the same bits in decode, in a prefill chunk of any size, alone or batched, on any number of
//! threads, in the scalar and in the SIMD forms. After PagedAttention (arXiv:2309.06180, section 4.1) and Flash-Decoding.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod element;
mod fp8;
mod kernel;
mod piece;
mod plan;
mod scalar;
mod work;

use std::marker::PhantomData;

use half::{bf16, f16};

use self::element::Element;
pub(super) use self::element::{HIGHEST, code_of, extent, scale_of};
use self::fp8::Fp8;
use self::kernel::Kernel;
use self::piece::{Scratch, Step};
pub use self::plan::{Plan, PlanError, Rows};
use self::work::{Shape, Work};
use super::SharedOut;
use super::isa::Isa;
use super::threads::Threads;
use crate::types::KvDtype;

/// Tokens of a block: a vector of AVX-512, two of AVX2.
pub const BLOCK_TOKENS: usize = 16;
/// Changes whenever bytes of KV written before would be read wrongly.
const KV_LAYOUT_VERSION: u32 = 1;
/// Blocks of a chunk: softmax rescales once a chunk.
const CHUNK_BLOCKS: usize = 4;
const CHUNK_TOKENS: usize = CHUNK_BLOCKS * BLOCK_TOKENS;
/// Tokens of a partition: what one thread attends to by itself, at the least.
const PARTITION_TOKENS: usize = 4 * CHUNK_TOKENS;

/// How keys and values lie in a block: layer after layer, all K `[kv_head][dim][16]`, then all V `[kv_head][16][dim]`; where
/// the numbers have scales, those of a head's 16 tokens lie behind its K, and behind its V.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvLayout {
    pub layers: usize,
    pub kv_heads: usize,
    /// A multiple of 8.
    pub head_dim: usize,
    pub dtype: KvDtype,
}

impl KvLayout {
    pub fn block_bytes(&self) -> usize {
        self.layers * 2 * self.kv_heads * self.plane_bytes()
    }

    /// Another number for each way in which the same model's KV may lie in memory.
    pub fn version(&self) -> u32 {
        let of_dtype = match self.dtype {
            KvDtype::F16 => 0,
            KvDtype::F32 => 1,
            KvDtype::Bf16 => 2,
            KvDtype::Int8 => 3,
            KvDtype::Fp8 => 4,
        };
        KV_LAYOUT_VERSION | of_dtype << 16
    }

    /// Bytes of one head's K, or V, in a block, with their scales.
    pub(super) fn plane_bytes(&self) -> usize {
        self.dtype.vector_bytes(self.head_dim) * BLOCK_TOKENS
    }

    /// Where K of a head starts in a block, in bytes.
    fn keys_at(&self, layer: usize, kv_head: usize) -> usize {
        (layer * 2 * self.kv_heads + kv_head) * self.plane_bytes()
    }

    /// Where V of a head starts in a block, in bytes.
    fn values_at(&self, layer: usize, kv_head: usize) -> usize {
        self.keys_at(layer, kv_head) + self.kv_heads * self.plane_bytes()
    }
}

/// Attention of all layers of one model: the kernel, chosen once, and memory for its threads.
pub struct Attention {
    layout: KvLayout,
    heads: usize,
    kernel: Kernel,
    work: Work,
    scratch: Vec<Scratch>,
    /// Results of partitions that wait for their merge.
    partials: Vec<f32>,
}

impl Attention {
    /// `threads`: the most that `run` will be called with. Panics if the KV heads don't divide the heads, or heads are not
    /// a multiple of 8 wide.
    pub fn new(layout: KvLayout, heads: usize, isa: Isa, threads: usize) -> Self {
        assert!(heads > 0 && heads.is_multiple_of(layout.kv_heads), "{heads} heads over {} of KV", layout.kv_heads);
        assert!(layout.head_dim > 0 && layout.head_dim.is_multiple_of(8), "heads {} wide", layout.head_dim);
        let mut attention = Self {
            layout,
            heads,
            kernel: Kernel::of(isa),
            work: Work::default(),
            scratch: Vec::new(),
            partials: Vec::new(),
        };
        let queries = attention.shape().queries();
        attention.scratch.resize_with(threads.max(1), || Scratch::new(queries, layout.head_dim));
        attention
    }

    /// Attends with all rows of a step in one layer.
    ///
    /// `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`: queries, keys, values, turned to their positions. `out`: `[rows,
    /// heads * head_dim]`. Writes the keys and values into the plan's blocks, as the layout's dtype, clamped to its finite
    /// range. Scores are scaled by `1/sqrt(head_dim)`; all sums are f32. Panics if the sizes are others.
    pub fn run(&mut self, threads: &mut Threads, plan: &Plan, layer: usize, qkv: &[f32], out: &mut [f32]) {
        match self.layout.dtype {
            KvDtype::F16 => self.run_over::<f16>(threads, plan, layer, qkv, out),
            KvDtype::F32 => self.run_over::<f32>(threads, plan, layer, qkv, out),
            KvDtype::Bf16 => self.run_over::<bf16>(threads, plan, layer, qkv, out),
            KvDtype::Int8 => self.run_over::<i8>(threads, plan, layer, qkv, out),
            KvDtype::Fp8 => self.run_over::<Fp8>(threads, plan, layer, qkv, out),
        }
    }

    /// As `run`, over KV that is stored as `E`.
    fn run_over<E: Element>(&mut self, threads: &mut Threads, plan: &Plan, layer: usize, qkv: &[f32], out: &mut [f32]) {
        let KvLayout { layers, kv_heads, head_dim, .. } = self.layout;
        assert!(plan.layout() == self.layout && layer < layers, "layer {layer} of {:?}", plan.layout());
        assert_eq!(qkv.len(), plan.rows() * (self.heads + 2 * kv_heads) * head_dim, "q, k, v of another size");
        assert_eq!(out.len(), plan.rows() * self.heads * head_dim, "an output of another size");
        let Some(arena) = plan.arena() else { return };
        let shape = self.shape();
        let step = Step { plan, arena, layer, shape, kernel: self.kernel, qkv, stored_as: PhantomData::<E> };
        // A row that is its sequence's only one is written by the piece that attends to it.
        if plan.sequences().iter().any(|sequence| sequence.rows > 1) {
            threads.run(plan.fills().len(), |fill| {
                let fill = &plan.fills()[fill];
                if plan.sequences()[fill.sequence].rows > 1 {
                    step.write(fill, 0..kv_heads);
                }
            });
        }
        let work = &mut self.work;
        work.cut(plan, shape, threads.count());
        if self.partials.len() < work.partial_floats {
            self.partials.resize(work.partial_floats, 0.0);
        }
        let (out, partials) = (SharedOut::new(out), SharedOut::new(&mut self.partials));
        threads.run_with(&mut self.scratch, work.chunks(), |scratch, chunk| {
            for piece in work.chunk(chunk) {
                step.attend(piece, scratch, &out, &partials);
            }
        });
        let partials = &self.partials;
        threads.run_with(&mut self.scratch, work.merges.len(), |scratch, merge| {
            step.merge(&work.merges[merge], scratch, partials, &out);
        });
    }

    fn shape(&self) -> Shape {
        let KvLayout { kv_heads, head_dim, .. } = self.layout;
        Shape { kv_heads, group: self.heads / kv_heads, head_dim }
    }
}

#[cfg(test)]
mod tests;
