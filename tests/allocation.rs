//! Does a step of the model allocate nothing, once it has its memory?
//!
//! The allocator counts for the whole process, all threads of the model included.

#![expect(clippy::unwrap_used, reason = "a test: what can't be had fails it")]
#![expect(unsafe_code, reason = "an allocator is unsafe to write; this one only counts and passes on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rekindle::engine::sampler::{Sampler, Sampling, Scratch};
use rekindle::kernels::isa::Isa;
use rekindle::kernels::memory::Arena;
use rekindle::model::decoder::{BLOCK_SIZE, Compute, Decoder};
use rekindle::model::{Batch, Logits, Model, SequenceRows};
use rekindle::types::{BlockId, KvDtype, TokenId};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: passes every call on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}

fn model_path() -> PathBuf {
    std::env::var_os("REKINDLE_TEST_MODEL").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    )
}

/// One sequence of a step: its rows, and the tokens before them.
type Shape = (usize, usize);

/// Blocks that each sequence may use.
const BLOCKS: usize = 8;

/// Runs a step of these sequences, each in blocks of its own.
fn run(model: &mut Decoder, arena: &Arc<Arena>, tables: &[Vec<BlockId>], shapes: &[Shape], memory: &mut Memory) {
    memory.tokens.clear();
    memory.sampled.clear();
    let mut sequences = [SequenceRows { first_row: 0, rows: 0, context: 0, table: &[] }; 16];
    for (index, &(rows, context)) in shapes.iter().enumerate() {
        sequences[index] = SequenceRows { first_row: memory.tokens.len(), rows, context, table: &tables[index] };
        memory.tokens.extend((0..rows as u32).map(|row| TokenId(row * 7919 % 40_000 + index as u32)));
        memory.sampled.push(memory.tokens.len() - 1);
    }
    let batch = Batch { tokens: &memory.tokens, sequences: &sequences[..shapes.len()], sampled: &memory.sampled };
    model.forward(&batch, arena, &mut memory.logits).unwrap();
    for (row, sampler) in memory.samplers.iter_mut().enumerate().take(shapes.len()) {
        sampler.sample(memory.logits.row_mut(row), &[], &mut memory.scratch);
    }
}

/// What the caller of a step keeps from step to step.
struct Memory {
    tokens: Vec<TokenId>,
    sampled: Vec<usize>,
    logits: Logits,
    samplers: Vec<Sampler>,
    scratch: Scratch,
}

#[test]
fn a_step_no_larger_than_one_before_it_allocates_nothing() {
    let compute = Compute { threads: 2, isa: Isa::best(), kv: KvDtype::F16 };
    let mut model = Decoder::load(&model_path(), compute, &mut |_, _| {}).unwrap();
    let arena = Arc::new(Arena::new(16 * BLOCKS, model.spec().kv.block_bytes(BLOCK_SIZE)).unwrap());
    let block = |sequence: usize, index: usize| BlockId((index * 16 + sequence) as u32);
    let tables: Vec<Vec<BlockId>> = (0..16).map(|s| (0..BLOCKS).map(|index| block(s, index)).collect()).collect();
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, ..Sampling::default() };
    let sampler = |seed| Sampler::new(Sampling { seed, ..sampling.clone() }, &[]);
    let mut memory = Memory {
        tokens: Vec::new(),
        sampled: Vec::new(),
        logits: Logits::default(),
        samplers: (0..16).map(sampler).collect(),
        scratch: Scratch::default(),
    };
    let prefill = [(100, 0), (17, 0), (1, 60), (1, 3)];
    let decode: Vec<Shape> = (0..16).map(|sequence| (1, 20 + sequence)).collect();
    let mixed: Vec<Shape> = (0..16).map(|sequence| (1 + sequence % 4, 50 + sequence)).collect();
    let round = |model: &mut Decoder, memory: &mut Memory| {
        for shapes in [&prefill[..], &decode, &mixed, &decode[..1], &decode[..7]] {
            run(model, &arena, &tables, shapes, memory);
        }
    };
    round(&mut model, &mut memory);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    // The counter counts: it has seen the model's loading.
    assert!(before > 1000, "{before} allocations of loading");
    (0..3).for_each(|_| round(&mut model, &mut memory));
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "allocations of 15 steps");
    // Of sizes that there were not before, all smaller.
    for rows in [2, 5, 31, 64, 65, 100, 118] {
        run(&mut model, &arena, &tables, &[(rows, 0)], &mut memory);
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "allocations of a step of {rows} rows");
    }
}
