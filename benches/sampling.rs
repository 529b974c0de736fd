//! How long does choosing 32 tokens take, beside the decode step that gave their logits?
//!
//! Logits of the real model (`make test` fetches it, or set REKINDLE_TEST_MODEL) on a real text, because the shape of a row
//! decides how many of its tokens are looked at; and flat ones, the worst there are. One thread, as in the engine.

use std::path::PathBuf;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use rekindle::engine::sampler::{Sampler, Sampling, Scratch, logprob};
use rekindle::kernels::isa::Isa;
use rekindle::kernels::memory::Arena;
use rekindle::model::decoder::{BLOCK_SIZE, Compute, Decoder};
use rekindle::model::tokenizer::Tokenizer;
use rekindle::model::weights::WeightFile;
use rekindle::model::{Batch, Logits, Model, SequenceRows};
use rekindle::types::{BlockId, KvDtype, TokenCount, TokenId};

const TEXT: &str = include_str!("../load-tests/text/alice.txt");
/// Rows of a step, and tokens of text before the first.
const ROWS: usize = 32;
const CONTEXT: usize = 480;

fn path() -> PathBuf {
    std::env::var_os("REKINDLE_TEST_MODEL").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    )
}

/// The text's first tokens, and the logits after each of the last ones.
fn rows() -> (Vec<TokenId>, Vec<Vec<f32>>) {
    let file = WeightFile::open(&path()).expect("the test model; `make test` fetches it");
    let tokenizer = Tokenizer::from_metadata(file.metadata()).expect("a tokenizer");
    let tokens = tokenizer.tokenize(TEXT, &[], 0).into_iter().map(|(token, _)| token);
    let tokens: Vec<_> = tokens.take(CONTEXT + ROWS).collect();
    let compute = Compute { threads: 1, isa: Isa::best(), kv: KvDtype::F16 };
    let mut model = Decoder::load(&path(), compute, &mut |_, _| {}).expect("a model");
    let blocks = TokenCount((CONTEXT + ROWS) as u32).blocks(BLOCK_SIZE).0;
    let arena = Arena::new(blocks as usize, model.spec().kv.block_bytes(BLOCK_SIZE)).expect("memory for the bench");
    let table: Vec<_> = (0..blocks).map(BlockId).collect();
    let sequences = [SequenceRows { first_row: 0, rows: tokens.len(), context: 0, table: &table }];
    let sampled: Vec<_> = (CONTEXT..CONTEXT + ROWS).collect();
    let mut logits = Logits::default();
    let batch = Batch { tokens: &tokens, sequences: &sequences, sampled: &sampled };
    model.forward(&batch, &Arc::new(arena), &mut logits).expect("a step");
    (tokens, (0..ROWS).map(|row| logits.row(row).to_vec()).collect())
}

fn sampling(c: &mut Criterion) {
    let (prompt, mut real) = rows();
    let vocab = real[0].len() as u32;
    // Each token within one of the others, in no order.
    let flat = (0..vocab).map(|id| (id.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32).collect();
    let mut flat = vec![flat; ROWS];
    let plain = |temperature, top_p| Sampling { temperature, top_p, ..Sampling::default() };
    let penalised = |temperature| Sampling {
        repetition_penalty: 1.1,
        presence_penalty: 0.5,
        frequency_penalty: 0.2,
        ..plain(temperature, 0.95)
    };
    let mut scratch = Scratch::default();
    let mut group = c.benchmark_group("sample 32 rows");
    let mut measure = |name: &str, rows: &mut [Vec<f32>], sampling: &Sampling| {
        // New samplers each time: one that sees the same row again and again penalises its likely tokens until none is.
        let samplers = || (0..ROWS).map(|_| Sampler::new(sampling.clone(), &prompt)).collect::<Vec<_>>();
        let mut choose = |samplers: &mut Vec<Sampler>| {
            for (sampler, row) in samplers.iter_mut().zip(&mut *rows) {
                std::hint::black_box(sampler.sample(row, &[], &mut scratch));
            }
        };
        group.bench_function(name, |b| b.iter_batched_ref(samplers, &mut choose, BatchSize::SmallInput));
    };
    measure("greedy", &mut real, &Sampling::default());
    measure("temperature 0.8, top-p 0.95, penalties", &mut real, &penalised(0.8));
    measure("temperature 1, top-p 0.95", &mut real, &plain(1.0, 0.95));
    measure("temperature 1.5, top-p 0.95, penalties", &mut real, &penalised(1.5));
    measure("temperature 1", &mut real, &plain(1.0, 1.0));
    measure("temperature 1, top-k 50", &mut real, &Sampling { top_k: 50, ..plain(1.0, 0.95) });
    measure("flat, top-p 0.95, penalties", &mut flat, &penalised(1.0));
    group.bench_function("log probabilities, top 5", |b| {
        b.iter(|| real.iter().for_each(|row| drop(logprob(row, prompt[0], 5, &mut scratch))));
    });
}

criterion_group!(benches, sampling);
criterion_main!(benches);
