//! How fast does our model do one piece of work, in a process of its own?
//!
//! The half of `compare` that llama.cpp's own benchmarks are the other half of: the model alone, without engine, sampling
//! and HTTP, timed after a warm-up. The contexts are real ones, prefilled, in blocks that lie in no order.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use rekindle::kernels::memory::Arena;
use rekindle::model::decoder::{BLOCK_SIZE, Compute, Decoder};
use rekindle::model::{Batch, Logits, Model, SequenceRows};
use rekindle::types::{BlockId, KvDtype, TokenCount, TokenId};
use serde_json::{Value, json};

use super::shapes::{PREFILL_TOKENS, Shape};

/// Coprime to any number of blocks that isn't a multiple of it: neighbours in a sequence are none in the arena.
const STRIDE: usize = 7919;

#[derive(clap::Args)]
pub struct Args {
    /// Such as `prefill@0` or `decode16@512`
    #[arg(required = true)]
    shapes: Vec<Shape>,
    #[arg(long)]
    threads: usize,
    /// The instructions to use
    #[arg(long, default_value = "auto")]
    isa: String,
    /// Measurements of each shape
    #[arg(long, default_value_t = 1)]
    repeat: usize,
}

/// Prints an array of `{"shape", "seconds": [..]}`.
pub fn measure(model: &Path, args: &Args) -> anyhow::Result<()> {
    let compute = Compute::choose(args.threads, &args.isa, KvDtype::F16)?;
    let mut decoder = Decoder::load(model, compute, &mut |_, _| {})
        .with_context(|| format!("{} can't be loaded", model.display()))?;
    let results = args.shapes.iter().map(|shape| {
        let seconds = Sequences::new(&mut decoder, *shape)?.measure(args.repeat)?;
        Ok(json!({"shape": shape.to_string(), "seconds": seconds}))
    });
    println!("{}", Value::Array(results.collect::<anyhow::Result<_>>()?));
    Ok(())
}

/// The sequences of a shape, and where their KV lies.
struct Sequences<'a> {
    decoder: &'a mut Decoder,
    shape: Shape,
    arena: Arc<Arena>,
    tables: Vec<Vec<BlockId>>,
    logits: Logits,
}

impl<'a> Sequences<'a> {
    fn new(decoder: &'a mut Decoder, shape: Shape) -> anyhow::Result<Self> {
        let longest = shape.depth + shape.steps() * shape.rows();
        let each = TokenCount(u32::try_from(longest)?).blocks(BLOCK_SIZE).0 as usize;
        let blocks = each * shape.sequences();
        let arena = Arena::new(blocks, decoder.spec().kv.block_bytes(BLOCK_SIZE))?;
        let scattered = |place: usize| BlockId((place * STRIDE % blocks) as u32);
        let places: Vec<BlockId> = (0..blocks).map(scattered).collect();
        let tables = places.chunks_exact(each).map(<[BlockId]>::to_vec).collect();
        Ok(Self { decoder, shape, arena: Arc::new(arena), tables, logits: Logits::default() })
    }

    /// Seconds of each of `repeat` measurements.
    fn measure(mut self, repeat: usize) -> anyhow::Result<Vec<f64>> {
        self.fill()?;
        let Shape { depth, .. } = self.shape;
        let (rows, sequences) = (self.shape.rows(), self.shape.sequences());
        // Not timed: it touches memory for the first time.
        self.step(sequences, rows, depth)?;
        let mut seconds = Vec::new();
        for _ in 0..repeat {
            let started = Instant::now();
            for step in 0..self.shape.steps() {
                self.step(sequences, rows, depth + step)?;
            }
            seconds.push(started.elapsed().as_secs_f64());
        }
        Ok(seconds)
    }

    /// Makes the contexts: the first sequence's by prefill, the others' as copies in blocks of their own.
    fn fill(&mut self) -> anyhow::Result<()> {
        let depth = self.shape.depth;
        for context in (0..depth).step_by(PREFILL_TOKENS) {
            self.step(1, PREFILL_TOKENS.min(depth - context), context)?;
        }
        let filled = TokenCount(u32::try_from(depth)?).blocks(BLOCK_SIZE).0 as usize;
        if let Some((first, others)) = self.tables.split_first() {
            for table in others {
                for (to, from) in table.iter().zip(first).take(filled) {
                    self.arena.copy_from(to.0, &self.arena, from.0);
                }
            }
        }
        Ok(())
    }

    /// One step of the first `sequences` sequences: `rows` tokens of each after `context` of them.
    fn step(&mut self, sequences: usize, rows: usize, context: usize) -> anyhow::Result<()> {
        let vocab = self.decoder.spec().vocab;
        let tokens: Vec<TokenId> =
            (0..sequences * rows).map(|row| TokenId(((context + row) * STRIDE % vocab) as u32)).collect();
        let tables = self.tables.iter().take(sequences).enumerate();
        let batch: Vec<SequenceRows<'_>> =
            tables.map(|(index, table)| SequenceRows { first_row: index * rows, rows, context, table }).collect();
        let sampled: Vec<usize> = batch.iter().map(|sequence| sequence.first_row + rows - 1).collect();
        let batch = Batch { tokens: &tokens, sequences: &batch, sampled: &sampled };
        Ok(self.decoder.forward(&batch, &self.arena, &mut self.logits)?)
    }
}
