//! How fast does the CPU decoder load, prefill and decode?
//!
//! The real model (`make test` fetches it, or set REKINDLE_TEST_MODEL), on pools of 1 and 2 threads. Wall clock: only
//! runs on an idle machine mean anything, and the figures to keep are those of one run, side by side.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rekindle::kernels::attention::{Attention, BLOCK_TOKENS, KvLayout, Plan, Rows};
use rekindle::kernels::isa::Isa;
use rekindle::kernels::memory::Arena;
use rekindle::kernels::threads::Threads;
use rekindle::model::decoder::{BLOCK_SIZE, Compute, Decoder};
use rekindle::model::{Batch, Logits, Model, SequenceRows};
use rekindle::types::{BlockId, KvDtype, TokenCount, TokenId};

fn path() -> PathBuf {
    std::env::var_os("REKINDLE_TEST_MODEL").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    )
}

/// Runs one step of `sequences` sequences with `rows` rows each, `context` tokens deep.
struct Step {
    arena: Arc<Arena>,
    tables: Vec<Vec<BlockId>>,
    tokens: Vec<TokenId>,
    rows: usize,
    context: usize,
    logits: Logits,
}

impl Step {
    fn new(model: &Decoder, sequences: usize, rows: usize, context: usize) -> Self {
        let blocks = TokenCount((context + rows) as u32).blocks(BLOCK_SIZE).0;
        let arena = Arena::new(blocks as usize * sequences, model.spec().kv.block_bytes(BLOCK_SIZE));
        // Interleaved, so that no sequence is contiguous.
        let tables = (0..sequences as u32).map(|s| (0..blocks).map(|b| BlockId(b * sequences as u32 + s)).collect());
        Self {
            arena: Arc::new(arena.expect("memory for the bench")),
            tables: tables.collect(),
            tokens: (0..(sequences * rows) as u32).map(|i| TokenId(i * 7919 % 49_000)).collect(),
            rows,
            context,
            logits: Logits::default(),
        }
    }

    fn run(&mut self, model: &mut Decoder) {
        let sequences: Vec<_> = self
            .tables
            .iter()
            .enumerate()
            .map(|(index, table)| SequenceRows {
                first_row: index * self.rows,
                rows: self.rows,
                context: self.context,
                table,
            })
            .collect();
        let sampled: Vec<_> = sequences.iter().map(|sequence| sequence.first_row + self.rows - 1).collect();
        let batch = Batch { tokens: &self.tokens, sequences: &sequences, sampled: &sampled };
        model.forward(&batch, &self.arena, &mut self.logits).expect("a step");
    }
}

fn decoder(c: &mut Criterion) {
    for threads in [1, 2] {
        let compute = Compute { threads, isa: Isa::best(), kv: KvDtype::F16 };
        let load = || Decoder::load(&path(), compute, &mut |_, _| {});
        let mut model = load().expect("the test model; `make test` fetches it");
        let mut group = c.benchmark_group(format!("{threads} threads"));
        group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(4));
        group.bench_function("load", |b| b.iter(|| load().is_ok()));
        for context in [0, 2048] {
            let mut step = Step::new(&model, 1, 512, context);
            group.throughput(Throughput::Elements(512));
            group
                .bench_function(BenchmarkId::new("prefill 512 at depth", context), |b| b.iter(|| step.run(&mut model)));
        }
        for (sequences, context) in [(1, 0), (4, 0), (16, 0), (1, 2048), (16, 512)] {
            let mut step = Step::new(&model, sequences, 1, context);
            group.throughput(Throughput::Elements(sequences as u64));
            let name = BenchmarkId::new(format!("decode {sequences} at depth"), context);
            group.bench_function(name, |b| b.iter(|| step.run(&mut model)));
        }
        group.finish();
    }
}

/// A decode step's attention over 2,000 tokens, in all layers of a model like SmolLM2-135M, by how its KV is stored.
fn attention(c: &mut Criterion) {
    const TOKENS: usize = 2000;
    const LAYERS: usize = 30;
    const HEADS: usize = 9;
    const KV_HEADS: usize = 3;
    const HEAD_DIM: usize = 64;
    let mut group = c.benchmark_group("attention over 2000 tokens");
    for dtype in KvDtype::ALL {
        let layout = KvLayout { layers: LAYERS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, dtype };
        let mut threads = Threads::new(1).expect("threads");
        let (mut attention, mut plan) = (Attention::new(layout, HEADS, Isa::best(), 1), Plan::new(layout));
        let blocks = TOKENS.div_ceil(BLOCK_TOKENS);
        let arena = Arc::new(Arena::new(blocks, layout.block_bytes()).expect("memory for the bench"));
        let table: Vec<BlockId> = (0..blocks).map(|block| BlockId((block * 37 % blocks) as u32)).collect();
        let rows = Rows { first_row: 0, rows: 1, context: TOKENS - 1, table: &table };
        plan.set(&arena, [rows]).expect("a table of the arena");
        let qkv: Vec<f32> = (0..(HEADS + 2 * KV_HEADS) * HEAD_DIM).map(|at| (at % 17) as f32 / 8.0 - 1.0).collect();
        let mut out = vec![0.0; HEADS * HEAD_DIM];
        group.bench_function(dtype.name(), |b| {
            b.iter(|| (0..LAYERS).for_each(|layer| attention.run(&mut threads, &plan, layer, &qkv, &mut out)));
        });
    }
    group.finish();
}

criterion_group!(benches, decoder, attention);
criterion_main!(benches);
