//! How fast does the CPU decoder load, prefill and decode?
//!
//! The real model (`make test` fetches it, or set REKINDLE_TEST_MODEL), on pools of 1 and 2 threads. Wall clock: only
//! runs on an idle machine mean anything, and the figures to keep are those of one run, side by side.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rekindle::kernels::isa::Isa;
use rekindle::kernels::memory::Arena;
use rekindle::model::decoder::{BLOCK_SIZE, Compute, Decoder};
use rekindle::model::{Batch, Logits, Model, SequenceRows};
use rekindle::types::{BlockId, TokenCount, TokenId};

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
        let compute = Compute { threads, isa: Isa::best() };
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

criterion_group!(benches, decoder);
criterion_main!(benches);
