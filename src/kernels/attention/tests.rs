//! Does attention over blocks give what attention over a plain list gives?

use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::kernels::memory::Arena;
use crate::types::{BlockId, KvDtype};

/// One sequence of a random step: what is in its blocks already, and what comes.
#[derive(Clone, Debug)]
struct Case {
    context: usize,
    rows: usize,
}

#[derive(Clone, Debug)]
struct Step {
    dtype: KvDtype,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    layers: usize,
    sequences: Vec<Case>,
    seed: u64,
}

fn step() -> impl Strategy<Value = Step> {
    let case = (0..150_usize, 1..40_usize).prop_map(|(context, rows)| Case { context, rows });
    let sequences = proptest::collection::vec(case, 1..5);
    let dtype = proptest::sample::select(&KvDtype::ALL[..]);
    (dtype, 1..4_usize, 1..17_usize, 1..11_usize, 1..3_usize, sequences, any::<u64>()).prop_map(
        |(dtype, kv_heads, group, eighths, layers, sequences, seed)| Step {
            dtype,
            kv_heads,
            group,
            head_dim: 8 * eighths,
            layers,
            sequences,
            seed,
        },
    )
}

/// How a step is computed.
#[derive(Clone, Copy, Debug)]
struct Way {
    isa: Isa,
    threads: usize,
    /// Rows of a sequence in one step, at most.
    chunk: usize,
    /// One sequence after the other.
    alone: bool,
}

/// The row of q, k, v that sequence `sequence` has at `position`: a function of these alone.
fn qkv_row(step: &Step, sequence: usize, position: usize) -> Vec<f32> {
    let width = (step.group + 2) * step.kv_heads * step.head_dim;
    let mut state = step.seed ^ ((sequence as u64) << 32) ^ position as u64 ^ 0x9e37_79b9;
    (0..width)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 3.0
        })
        .collect()
}

/// An arena and the tables of some sequences, scattered over it. Its bytes are all ones, NaN to who reads them.
struct World<'a> {
    step: &'a Step,
    layout: KvLayout,
    arena: Arc<Arena>,
    tables: Vec<Vec<BlockId>>,
}

impl<'a> World<'a> {
    fn new(step: &'a Step) -> Self {
        let Step { dtype, layers, kv_heads, head_dim, .. } = *step;
        let layout = KvLayout { layers, kv_heads, head_dim, dtype };
        let arena = Arc::new(Arena::new(239, layout.block_bytes()).unwrap());
        (0..239).for_each(|block| arena.with_bytes_mut(block, |bytes| bytes.fill(0xff)));
        let mut free = (0..239).map(|block| BlockId(block * 23 % 239));
        let blocks = step.sequences.iter().map(|case| (case.context + case.rows).div_ceil(BLOCK_TOKENS));
        let tables = blocks.map(|blocks| free.by_ref().take(blocks).collect()).collect();
        Self { step, layout, arena, tables }
    }

    /// Attends in one step with rows `parts[s]` of each sequence `s` that has some. Rows of the result: per sequence.
    fn run(&self, engine: &mut Engine, layer: usize, parts: &[Range<usize>]) -> Vec<Vec<Vec<f32>>> {
        let width = self.step.group * self.step.kv_heads * self.step.head_dim;
        let (mut rows, mut qkv) = (Vec::new(), Vec::new());
        let mut first_row = 0;
        for (sequence, part) in parts.iter().enumerate().filter(|(_, part)| !part.is_empty()) {
            rows.push(Rows { first_row, rows: part.len(), context: part.start, table: &self.tables[sequence] });
            first_row += part.len();
            part.clone().for_each(|position| qkv.extend(qkv_row(self.step, sequence, position)));
        }
        let mut out = vec![f32::NAN; first_row * width];
        engine.plan.set(&self.arena, rows).unwrap();
        engine.attention.run(&mut engine.threads, &engine.plan, layer, &qkv, &mut out);
        let mut out = out.chunks_exact(width).map(<[f32]>::to_vec);
        parts.iter().map(|part| out.by_ref().take(part.len()).collect()).collect()
    }

    /// Every sequence from its first token on, in some way. Rows per sequence.
    fn run_all(&self, way: Way, layer: usize) -> Vec<Vec<Vec<f32>>> {
        let mut engine = Engine::new(self.layout, self.step.group, way.isa, way.threads);
        let ends: Vec<_> = self.step.sequences.iter().map(|case| case.context + case.rows).collect();
        let mut done = vec![0; ends.len()];
        let mut out = vec![Vec::new(); ends.len()];
        let steps: Vec<Vec<usize>> =
            if way.alone { (0..ends.len()).map(|s| vec![s]).collect() } else { vec![(0..ends.len()).collect()] };
        for sequences in steps {
            while sequences.iter().any(|&s| done[s] < ends[s]) {
                let parts: Vec<_> = (0..ends.len())
                    .map(|s| {
                        let end = if sequences.contains(&s) { ends[s].min(done[s] + way.chunk) } else { done[s] };
                        done[s]..end
                    })
                    .collect();
                for (s, rows) in self.run(&mut engine, layer, &parts).into_iter().enumerate() {
                    out[s].extend(rows);
                    done[s] = parts[s].end;
                }
            }
        }
        out
    }
}

/// What a model would hold.
struct Engine {
    threads: Threads,
    plan: Plan,
    attention: Attention,
}

impl Engine {
    fn new(layout: KvLayout, group: usize, isa: Isa, threads: usize) -> Self {
        Self {
            threads: Threads::new(threads).unwrap(),
            plan: Plan::new(layout),
            attention: Attention::new(layout, group * layout.kv_heads, isa, threads),
        }
    }
}

/// Attention over a plain list, in f64.
fn naive(step: &Step, sequence: usize, position: usize) -> Vec<f64> {
    let (dim, heads) = (step.head_dim, step.group * step.kv_heads);
    let rounded = |values: &[f32]| stored(step.dtype, values);
    let rows: Vec<_> = (0..=position).map(|position| qkv_row(step, sequence, position)).collect();
    let query_row = &rows[position];
    let mut out = Vec::new();
    for head in 0..heads {
        let kv_head = head / step.group;
        let query = &query_row[head * dim..][..dim];
        let scores: Vec<f64> = rows
            .iter()
            .map(|row| {
                let keys = rounded(&row[(heads + kv_head) * dim..][..dim]);
                query.iter().zip(keys).map(|(q, k)| f64::from(*q) * k).sum::<f64>() / (dim as f64).sqrt()
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut sums = vec![0.0; dim];
        for (row, weight) in rows.iter().zip(weights) {
            let values = rounded(&row[(heads + step.kv_heads + kv_head) * dim..][..dim]);
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
        }
        out.extend(sums.into_iter().map(|value| value / sum));
    }
    out
}

/// What is left of one token's numbers of one head once they are stored.
fn stored(dtype: KvDtype, values: &[f32]) -> Vec<f64> {
    let each = |round: &dyn Fn(f32) -> f64| values.iter().map(|&value| round(value)).collect();
    match dtype {
        KvDtype::F32 => each(&f64::from),
        KvDtype::F16 => each(&|value| f16::from_f32(value).to_f64()),
        KvDtype::Bf16 => each(&|value| bf16::from_f32(value).to_f64()),
        KvDtype::Int8 => {
            let highest = values.iter().fold(0.0_f32, |highest, value| highest.max(value.abs()));
            let scale = f16::from_f32(highest / 127.0).to_f64();
            each(&|value| (value / scale as f32).round_ties_even().clamp(-127.0, 127.0) as f64 * scale)
        }
        KvDtype::Fp8 => {
            let codes: Vec<f64> = (0..=0x7e).map(|code| Fp8::from_bits(code).to_f32().into()).collect();
            let nearest = |value: f32| {
                let off = |code: f64| (code - f64::from(value.abs())).abs();
                let even_first = codes.iter().step_by(2).chain(codes.iter().skip(1).step_by(2));
                *even_first.min_by(|a, b| off(**a).total_cmp(&off(**b))).unwrap()
            };
            each(&|value| nearest(value).copysign(value.into()))
        }
    }
}

fn bits(rows: &[Vec<Vec<f32>>]) -> Vec<u32> {
    rows.iter().flatten().flatten().map(|value| value.to_bits()).collect()
}

proptest! {
    // About twenty of each dtype.
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn attention_over_scattered_blocks_is_attention_over_a_list_however_it_is_computed(step in step()) {
        let layer = step.layers - 1;
        let ways = Isa::available().into_iter().flat_map(|isa| {
            [(1, false, 1), (7, true, 2), (16, false, 3), (1000, true, 1), (33, false, 2)]
                .map(|(chunk, alone, threads)| Way { isa, threads, chunk, alone })
        });
        // The plain form is slow, and has no code that depends on how many rows come.
        let ways = ways.filter(|way| way.isa != Isa::Scalar || way.chunk == 16);
        let all = results(&step, layer, ways)?;
        for (sequence, rows) in all.iter().enumerate() {
            for position in [0, rows.len() / 2, rows.len() - 1] {
                near(&step, sequence, position, &rows[position])?;
            }
        }
    }
}

/// What all ways give, each in a world of its own; fails if they differ.
fn results(
    step: &Step,
    layer: usize,
    ways: impl IntoIterator<Item = Way>,
) -> Result<Vec<Vec<Vec<f32>>>, TestCaseError> {
    let mut first = None;
    for way in ways {
        let result = World::new(step).run_all(way, layer);
        match &first {
            None => first = Some(result),
            Some(first) => prop_assert!(bits(&result) == bits(first), "{way:?} gives other bits than the first way"),
        }
    }
    Ok(first.unwrap())
}

fn near(step: &Step, sequence: usize, position: usize, row: &[f32]) -> Result<(), TestCaseError> {
    for (ours, wanted) in row.iter().zip(naive(step, sequence, position)) {
        prop_assert!((f64::from(*ours) - wanted).abs() < 2e-5, "{ours} for {wanted} at {position}");
    }
    Ok(())
}

#[test]
fn a_long_context_gives_the_same_on_both_sides_of_each_border_of_partitions() {
    for dtype in [KvDtype::F16, KvDtype::Int8] {
        borders_of_partitions(dtype);
    }
}

fn borders_of_partitions(dtype: KvDtype) {
    let cases = [1030, 256, 511, 512, 513, 515].map(|tokens| Case { context: tokens - 1, rows: 1 });
    let step = Step { dtype, kv_heads: 2, group: 3, head_dim: 24, layers: 1, sequences: cases.to_vec(), seed: 5 };
    let ways = Isa::available().into_iter().flat_map(|isa| {
        [(1, false, 2), (1, true, 3), (1030, false, 1), (300, true, 3), (97, false, 2), (256, true, 2)]
            .map(|(chunk, alone, threads)| Way { isa, threads, chunk, alone })
    });
    let ways = ways.filter(|way| way.isa != Isa::Scalar || way.chunk == 97);
    let all = results(&step, 0, ways).unwrap();
    for position in [0, 255, 256, 257, 511, 512, 513, 767, 768, 1029] {
        near(&step, 0, position, &all[0][position]).unwrap();
    }
    for (sequence, rows) in all.iter().enumerate() {
        near(&step, sequence, rows.len() - 1, &rows[rows.len() - 1]).unwrap();
    }
}

/// Kernels read and write no byte outside the blocks of a table: those beside them may not be touched at all.
#[cfg(target_os = "linux")]
#[test]
fn the_blocks_beside_a_sequences_own_are_never_touched() {
    unsafe extern "C" {
        fn mprotect(start: *mut std::ffi::c_void, bytes: usize, protection: i32) -> i32;
    }
    let shapes = [(8, 1), (24, 3), (40, 7), (64, 9), (128, 2)];
    for (dtype, (head_dim, group)) in KvDtype::ALL.into_iter().flat_map(|dtype| shapes.map(|shape| (dtype, shape))) {
        // As many layers as make whole pages.
        let layers = if dtype == KvDtype::Int8 { 64 } else { 8 };
        let cases = vec![Case { context: 0, rows: 32 }];
        let step = Step { dtype, kv_heads: 2, group, head_dim, layers, sequences: cases, seed: 3 };
        let mut world = World::new(&step);
        world.tables = vec![vec![BlockId(1), BlockId(3)]];
        let bytes = world.layout.block_bytes();
        assert!(bytes.is_multiple_of(4096), "blocks of {bytes} bytes are no whole pages");
        for block in [0, 2, 4] {
            let start = world.arena.block_ptr(block).cast();
            // SAFETY: whole pages of the arena, which nothing but a faulty kernel uses before they are unmapped.
            assert_eq!(unsafe { mprotect(start, bytes, 0) }, 0);
        }
        for isa in Isa::available() {
            for layer in [0, layers - 1] {
                for chunk in [1, 5, 32] {
                    world.run_all(Way { isa, threads: 1, chunk, alone: true }, layer);
                }
            }
        }
    }
}

#[test]
fn a_layer_writes_its_own_planes_and_no_others() {
    KvDtype::ALL.into_iter().for_each(writes_its_own_planes);
}

fn writes_its_own_planes(dtype: KvDtype) {
    let step = Step {
        dtype,
        kv_heads: 2,
        group: 2,
        head_dim: 16,
        layers: 3,
        sequences: vec![Case { context: 0, rows: 20 }],
        seed: 1,
    };
    let world = World::new(&step);
    let whole = 0..20;
    world.run(&mut Engine::new(world.layout, 2, Isa::best(), 2), 1, std::slice::from_ref(&whole));
    let layer_bytes = world.layout.block_bytes() / 3;
    for block in 0..239 {
        let used = world.tables[0].contains(&BlockId(block));
        for (layer, bytes) in world.arena.bytes(block).chunks_exact(layer_bytes).enumerate() {
            let touched = bytes.iter().any(|&byte| byte != 0xff);
            assert_eq!(touched, used && layer == 1, "block {block}, layer {layer}");
        }
    }
}

#[test]
fn keys_and_values_beyond_f16_are_clamped_rather_than_infinite() {
    let layout = KvLayout { layers: 1, kv_heads: 1, head_dim: 8, dtype: KvDtype::F16 };
    let arena = Arc::new(Arena::new(1, layout.block_bytes()).unwrap());
    let table = [BlockId(0)];
    let qkv = [[1e-3; 8], [1e9; 8], [-1e9; 8], [1e-3; 8], [-1e9; 8], [1.0; 8]].concat();
    for isa in Isa::available() {
        let Engine { mut threads, mut plan, mut attention } = Engine::new(layout, 1, isa, 1);
        plan.set(&arena, [Rows { first_row: 0, rows: 2, context: 0, table: &table }]).unwrap();
        let mut out = [0.0; 16];
        attention.run(&mut threads, &plan, 0, &qkv, &mut out);
        assert!(out.iter().all(|value| value.is_finite()), "{isa}: {out:?}");
        assert_eq!(out[0], -65504.0, "{isa}");
    }
}

#[test]
fn a_token_that_is_no_number_or_infinite_leaves_other_sequences_as_they_are() {
    for dtype in KvDtype::ALL {
        let layout = KvLayout { layers: 1, kv_heads: 1, head_dim: 8, dtype };
        for isa in Isa::available() {
            let outputs = [f32::NAN, f32::INFINITY, 1.0].map(|odd| {
                let arena = Arc::new(Arena::new(2, layout.block_bytes()).unwrap());
                let Engine { mut threads, mut plan, mut attention } = Engine::new(layout, 1, isa, 1);
                let tables = [[BlockId(0)], [BlockId(1)]];
                let rows = |first_row, table| Rows { first_row, rows: 2, context: 0, table };
                plan.set(&arena, [rows(0, &tables[0][..]), rows(2, &tables[1][..])]).unwrap();
                let row = |number: f32| [number; 24];
                let qkv = [row(0.5), row(odd), row(0.25), row(0.75)].concat();
                let mut out = [0.0; 32];
                attention.run(&mut threads, &plan, 0, &qkv, &mut out);
                // Another sequence's; and where the form has no such numbers, the token's before it.
                let before = if dtype == KvDtype::Int8 { &out[..8] } else { &[] };
                [before, &out[16..]].concat()
            });
            assert!(outputs[0] == outputs[2] && outputs[1] == outputs[2], "{dtype}, {isa}: {outputs:?}");
        }
    }
}

#[test]
fn narrow_forms_take_the_bytes_that_they_promise() {
    let bytes = |dtype| KvLayout { layers: 30, kv_heads: 3, head_dim: 64, dtype }.block_bytes() as f64;
    let of_f16 = |dtype| bytes(dtype) / bytes(KvDtype::F16);
    assert_eq!([KvDtype::F32, KvDtype::Bf16, KvDtype::Fp8].map(of_f16), [2.0, 1.0, 0.5]);
    assert!(of_f16(KvDtype::Int8) <= 0.53, "{}", of_f16(KvDtype::Int8));
}

#[test]
fn each_dtype_is_another_version_of_the_layout_and_the_usual_one_is_still_the_first() {
    let version = |dtype| KvLayout { layers: 1, kv_heads: 1, head_dim: 8, dtype }.version();
    let versions: std::collections::BTreeSet<_> = KvDtype::ALL.map(version).into();
    assert_eq!((versions.len(), version(KvDtype::F16)), (5, 1));
}

/// How far attention over each dtype is from attention over what was to be stored.
#[test]
fn each_dtype_is_as_near_to_exact_attention_as_its_bits_allow() {
    let sequences = vec![Case { context: 0, rows: 200 }];
    let exact = Step { dtype: KvDtype::F32, kv_heads: 2, group: 3, head_dim: 64, layers: 1, sequences, seed: 11 };
    let way = Way { isa: Isa::best(), threads: 2, chunk: 64, alone: true };
    let wanted = naive(&exact, 0, 199);
    let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
    let bounds = [
        (KvDtype::F32, 1e-5),
        (KvDtype::F16, 1e-3),
        (KvDtype::Bf16, 8e-3),
        (KvDtype::Int8, 2e-2),
        (KvDtype::Fp8, 8e-2),
    ];
    for (dtype, bound) in bounds {
        let step = Step { dtype, ..exact.clone() };
        let ours = &World::new(&step).run_all(way, 0)[0][199];
        let off: Vec<f64> = ours.iter().zip(&wanted).map(|(ours, wanted)| f64::from(*ours) - wanted).collect();
        let error = norm(&off) / norm(&wanted);
        assert!(error < bound, "{dtype}: {error}");
        assert!(dtype == KvDtype::F32 || error > bound / 50.0, "{dtype}: {error} is too good to be true");
    }
}

#[test]
fn tables_that_would_write_anothers_block_or_leave_the_arena_are_refused() {
    let layout = KvLayout { layers: 1, kv_heads: 1, head_dim: 8, dtype: KvDtype::F16 };
    let arena = Arc::new(Arena::new(8, layout.block_bytes()).unwrap());
    let mut step = Plan::new(layout);
    let mut plan = |sequences: &[(usize, usize, usize, &[u32])]| {
        let tables: Vec<Vec<_>> = sequences.iter().map(|s| s.3.iter().map(|&id| BlockId(id)).collect()).collect();
        let rows = sequences.iter().zip(&tables).map(|(&(first_row, rows, context, _), table)| Rows {
            first_row,
            rows,
            context,
            table,
        });
        step.set(&arena, rows).map(|()| step.rows()).map_err(|error| error.to_string())
    };
    // A full block that both have read before, and a block each to write: the prefix is shared.
    assert_eq!(plan(&[(0, 1, 16, &[0, 1]), (1, 2, 16, &[0, 2])]), Ok(3));
    assert!(plan(&[(0, 1, 15, &[0, 1]), (1, 2, 16, &[0, 2])]).unwrap_err().contains("share block 0"));
    assert!(plan(&[(0, 1, 16, &[0, 1]), (1, 2, 32, &[0, 1, 2])]).unwrap_err().contains("share block 1"));
    assert!(plan(&[(0, 17, 0, &[3, 3])]).unwrap_err().contains("share block 3"));
    assert!(plan(&[(0, 1, 0, &[8])]).unwrap_err().contains("outside an arena of 8"));
    assert!(plan(&[(0, 1, 16, &[0])]).unwrap_err().contains("1 blocks, too few for 17 tokens"));
    assert!(plan(&[(1, 1, 0, &[0])]).unwrap_err().contains("starts at row 1, where row 0 is next"));
    assert!(plan(&[(0, 0, 0, &[0])]).unwrap_err().contains("has no rows"));
    // Blocks behind the rows are nobody's business in this step.
    assert_eq!(plan(&[(0, 1, 0, &[0, 5]), (1, 1, 0, &[5])]), Ok(2));
    let other = KvLayout { layers: 2, ..layout };
    assert!(matches!(Plan::new(other).set(&arena, []), Err(PlanError::BlockBytes { wanted: 1024, found: 512 })));
}
