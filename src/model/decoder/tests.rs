//! Is a row's answer its own, whatever it was batched with, and is it the right one?

use std::path::PathBuf;
use std::sync::OnceLock;

use candle_core::quantized::{QTensor, gguf_file};
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama;

use super::*;
use crate::model::SequenceRows;
use crate::types::{BlockId, KvDtype};

mod dtypes;
mod exactness;

/// The small published model that the tests share.
fn real_model_path() -> PathBuf {
    let path = std::env::var_os("REKINDLE_TEST_MODEL").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(path.exists(), "{} is missing: `make test` fetches it, or set REKINDLE_TEST_MODEL", path.display());
    path
}

/// What the tests run on, unless they say otherwise.
fn compute() -> Compute {
    Compute { threads: 2, isa: Isa::best(), kv: KvDtype::F16 }
}

fn real_model() -> &'static Decoder {
    static MODEL: OnceLock<Decoder> = OnceLock::new();
    MODEL.get_or_init(|| Decoder::load(&real_model_path(), compute(), &mut |_, _| {}).expect("the test model loads"))
}

/// Blocks of a bench's arena: a prime, so that any stride scatters.
const BLOCKS: u32 = 127;

/// A sequence under test: its tokens so far in the cache, and its blocks, scattered over the arena.
struct Running {
    tokens: Vec<TokenId>,
    cached: usize,
    table: Vec<BlockId>,
}

/// A model with an arena, whose blocks are given out in a scattered order.
struct Bench {
    model: Decoder,
    arena: Arc<Arena>,
    free: Vec<BlockId>,
}

impl Bench {
    fn new(model: &Decoder) -> Self {
        let arena = Arc::new(Arena::new(BLOCKS as usize, model.spec().kv.block_bytes(BLOCK_SIZE)).unwrap());
        // What a forgotten sequence left must never be seen: here it is all NaN.
        for block in 0..BLOCKS {
            arena.with_bytes_mut(block, |bytes| bytes.fill(0xff));
        }
        Self { model: model.sibling(), arena, free: (0..BLOCKS).map(|i| BlockId(i * 37 % BLOCKS)).collect() }
    }

    fn start(&mut self, tokens: &[u32]) -> Running {
        Running { tokens: tokens.iter().map(|&token| TokenId(token)).collect(), cached: 0, table: Vec::new() }
    }

    /// One step: the next `rows` tokens of each sequence. Returns the logits of every row, sequence after sequence.
    fn step(&mut self, running: &mut [(&mut Running, usize)]) -> Vec<Vec<f32>> {
        let mut tokens = Vec::new();
        let mut sequences = Vec::new();
        for (sequence, rows) in running.iter_mut() {
            let end = sequence.cached + *rows;
            while sequence.table.len() < end.div_ceil(BLOCK_TOKENS) {
                sequence.table.push(self.free.pop().unwrap());
            }
            sequences.push((tokens.len(), *rows, sequence.cached));
            tokens.extend_from_slice(&sequence.tokens[sequence.cached..end]);
            sequence.cached = end;
        }
        let sequences: Vec<_> = sequences
            .into_iter()
            .zip(running.iter())
            .map(|((first_row, rows, context), (sequence, _))| SequenceRows {
                first_row,
                rows,
                context,
                table: &sequence.table,
            })
            .collect();
        let sampled: Vec<usize> = (0..tokens.len()).collect();
        let batch = Batch { tokens: &tokens, sequences: &sequences, sampled: &sampled };
        let mut logits = Logits::default();
        self.model.forward(&batch, &self.arena, &mut logits).unwrap();
        (0..sampled.len()).map(|row| logits.row(row).to_vec()).collect()
    }

    /// Runs one sequence alone in chunks of `chunk` tokens; logits of every position.
    fn alone(&mut self, tokens: &[u32], chunk: usize) -> Vec<Vec<f32>> {
        let mut running = self.start(tokens);
        let mut all = Vec::new();
        while running.cached < tokens.len() {
            let rows = chunk.min(tokens.len() - running.cached);
            all.extend(self.step(&mut [(&mut running, rows)]));
        }
        self.free.append(&mut running.table);
        all
    }
}

fn assert_same_bits(left: &[Vec<f32>], right: &[Vec<f32>], what: &str) {
    assert_eq!(left.len(), right.len(), "{what}");
    for (position, (left, right)) in left.iter().zip(right).enumerate() {
        let differing = left.iter().zip(right).filter(|(l, r)| l.to_bits() != r.to_bits()).count();
        assert_eq!(differing, 0, "{what}: {differing} logits differ at position {position}");
        assert!(left.iter().all(|value| value.is_finite()), "{what}: a logit is not finite");
    }
}

/// Tokens without a meaning, but not all alike.
fn some_tokens(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32)
        .map(|i| (seed.wrapping_mul(2_654_435_761).wrapping_add(i.wrapping_mul(40_503)) >> 7) % 49_000)
        .collect()
}

#[test]
fn logits_are_the_same_bits_whatever_the_chunks_of_the_prefill() {
    let mut bench = Bench::new(real_model());
    let tokens = some_tokens(1, 75);
    let whole = bench.alone(&tokens, tokens.len());
    for chunk in [1, 7, 16, 64] {
        assert_same_bits(&whole, &bench.alone(&tokens, chunk), &format!("chunks of {chunk}"));
    }
}

#[test]
fn logits_are_the_same_bits_alone_and_in_a_mixed_batch() {
    let mut bench = Bench::new(real_model());
    let prompts = [some_tokens(1, 40), some_tokens(2, 90), some_tokens(3, 23), some_tokens(4, 70)];
    let alone: Vec<_> = prompts.iter().map(|tokens| bench.alone(tokens, tokens.len())).collect();
    let mut running: Vec<_> = prompts.iter().map(|tokens| bench.start(tokens)).collect();
    let mut batched = vec![Vec::new(); prompts.len()];
    // Prefill chunks of one beside decodes of the others, in a shape that changes from step to step.
    for step in 0.. {
        let mut parts: Vec<_> = running
            .iter_mut()
            .enumerate()
            .map(|(index, running)| {
                let left = running.tokens.len() - running.cached;
                let wanted = if (step + index) % 3 == 0 { 17 } else { 1 };
                (index, running, wanted.min(left))
            })
            .filter(|(.., rows)| *rows > 0)
            .collect();
        if parts.is_empty() {
            break;
        }
        let shape: Vec<_> = parts.iter().map(|(index, _, rows)| (*index, *rows)).collect();
        let mut step_parts: Vec<_> = parts.iter_mut().map(|(_, running, rows)| (&mut **running, *rows)).collect();
        let mut logits = bench.step(&mut step_parts).into_iter();
        for (index, rows) in shape {
            batched[index].extend(logits.by_ref().take(rows));
        }
    }
    for (index, (alone, batched)) in alone.iter().zip(&batched).enumerate() {
        assert_same_bits(alone, batched, &format!("sequence {index}"));
    }
}

#[test]
fn a_decoded_token_has_the_same_bits_alone_and_with_1_7_and_33_others() {
    let mut bench = Bench::new(real_model());
    let tokens = some_tokens(1, 41);
    let alone = bench.alone(&tokens, 40);
    for others in [1, 7, 33] {
        let mut first = bench.start(&tokens);
        bench.step(&mut [(&mut first, 40)]);
        let mut crowd: Vec<_> =
            (0..others).map(|other| bench.start(&some_tokens(other as u32 + 2, 8 + other % 20))).collect();
        for other in &mut crowd {
            let before = other.tokens.len() - 1;
            bench.step(&mut [(other, before)]);
        }
        // In the middle of the batch.
        let (left, right) = crowd.split_at_mut(others / 2);
        let mut parts: Vec<_> = left.iter_mut().map(|other| (other, 1)).collect();
        parts.push((&mut first, 1));
        parts.extend(right.iter_mut().map(|other| (other, 1)));
        let batched = bench.step(&mut parts);
        assert_same_bits(&alone[40..], &batched[others / 2..=others / 2], &format!("{others} others"));
        bench.free.append(&mut first.table);
        crowd.iter_mut().for_each(|other| bench.free.append(&mut other.table));
    }
}

#[test]
fn a_sequence_that_left_the_device_and_came_back_to_other_blocks_goes_on_with_the_same_bits() {
    let mut bench = Bench::new(real_model());
    let tokens = some_tokens(5, 60);
    let whole = bench.alone(&tokens, tokens.len());
    let mut running = bench.start(&tokens);
    bench.step(&mut [(&mut running, 55)]);
    let host = Arena::new(running.table.len(), bench.arena.block_bytes()).unwrap();
    let table = std::mem::take(&mut running.table);
    for (place, block) in (0..).zip(&table) {
        host.copy_from(place, &bench.arena, block.0);
        bench.arena.with_bytes_mut(block.0, |bytes| bytes.fill(0xff));
    }
    running.table = bench.free.split_off(bench.free.len() - table.len());
    for (place, block) in (0..).zip(&running.table) {
        bench.arena.copy_from(block.0, &host, place);
    }
    assert_same_bits(&whole[55..], &bench.step(&mut [(&mut running, 5)]), "reloaded");
}

#[test]
fn logits_are_the_same_bits_with_all_instructions_and_any_number_of_threads() {
    let tokens = some_tokens(9, 9);
    let wanted = Bench::new(real_model()).alone(&tokens, tokens.len());
    for isa in Isa::available() {
        for threads in [1, 3] {
            let model =
                Decoder::load(&real_model_path(), Compute { threads, isa, kv: KvDtype::F16 }, &mut |_, _| {}).unwrap();
            let found = Bench::new(&model).alone(&tokens, tokens.len());
            assert_same_bits(&found, &wanted, &format!("{isa} on {threads} threads"));
        }
    }
}

/// The same file with all its weights dequantised, so that candle multiplies in f32 too.
fn dequantised_copy() -> std::io::Cursor<Vec<u8>> {
    let mut file = std::fs::File::open(real_model_path()).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let tensors: Vec<_> = content
        .tensor_infos
        .keys()
        .map(|name| {
            let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
            (name.clone(), QTensor::quantize(&tensor, candle_core::quantized::GgmlDType::F32).unwrap())
        })
        .collect();
    let metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut bytes = std::io::Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &tensors).unwrap();
    bytes.set_position(0);
    bytes
}

#[test]
fn logits_agree_with_candles_own_llama_on_the_real_model() {
    let tokens = [1, 4093, 198, 1780, 314, 253, 1443, 5345];
    let mut file = dequantised_copy();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dequantised.gguf");
    std::fs::write(&path, file.get_ref()).unwrap();
    let ours = Decoder::load(&path, compute(), &mut |_, _| {}).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut oracle = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let ours = Bench::new(&ours).alone(&tokens, tokens.len());
    for (position, (token, ours)) in tokens.iter().zip(&ours).enumerate() {
        let token = Tensor::new(&[[*token]], &Device::Cpu).unwrap();
        let theirs: Vec<f32> = oracle.forward(&token, position).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let cosine = dot(ours, &theirs) / (dot(ours, ours) * dot(&theirs, &theirs)).sqrt();
        let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // KV is rounded to f16 here, and to nothing there.
        assert!(cosine > 0.999_99 && worst < 0.1, "position {position}: cosine {cosine}, worst difference {worst}");
        eprintln!("position {position}: cosine {cosine}, worst {worst}");
    }
}

/// What transformers computes for a small random model: see `tests/golden/make_logits.py`.
struct Golden {
    model: Decoder,
    tokens: Vec<u32>,
    prompt: usize,
    logits: Vec<Vec<f32>>,
}

impl Golden {
    fn read(architecture: &str) -> Self {
        let stem = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/tiny-{architecture}"));
        let bytes = std::fs::read(stem.with_extension("logits")).unwrap();
        let words: Vec<u32> = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        let (count, prompt, vocab) = (words[0] as usize, words[1] as usize, words[2] as usize);
        let logits: Vec<f32> = words[3 + count..].iter().map(|&word| f32::from_bits(word)).collect();
        assert_eq!(logits.len(), count * vocab);
        Self {
            model: Decoder::load(&stem.with_extension("gguf"), compute(), &mut |_, _| {}).unwrap(),
            tokens: words[3..3 + count].to_vec(),
            prompt,
            logits: logits.chunks_exact(vocab).map(<[f32]>::to_vec).collect(),
        }
    }

    /// The largest difference of any logit, over the largest logit.
    fn worst(&self, ours: &[Vec<f32>]) -> f32 {
        assert_eq!(ours.len(), self.logits.len());
        let largest = self.logits.iter().flatten().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
        let differences = ours.iter().flatten().zip(self.logits.iter().flatten()).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f32::max) / largest
    }
}

/// All is f32 in both, but for keys and values, which both round to f16. So only the order of sums is left, and, rarely, a
/// value that it rounds to the other side; a wrong pairing, bias or norm makes more than a tenth.
const GOLDEN_TOLERANCE: f32 = 4e-4;

#[test]
fn logits_agree_with_transformers_for_a_prompt_and_step_by_step() {
    for architecture in ["llama", "qwen2"] {
        let golden = Golden::read(architecture);
        let mut bench = Bench::new(&golden.model);
        let mut running = bench.start(&golden.tokens);
        let mut ours = bench.step(&mut [(&mut running, golden.prompt)]);
        while ours.len() < golden.tokens.len() {
            ours.extend(bench.step(&mut [(&mut running, 1)]));
        }
        let worst = golden.worst(&ours);
        assert!(worst < GOLDEN_TOLERANCE, "{architecture}: {worst}");
        eprintln!("{architecture}: worst relative difference {worst}");
        assert_same_bits(&ours, &bench.alone(&golden.tokens, 5), architecture);
    }
}

#[test]
fn a_family_run_as_another_is_far_from_its_golden_logits() {
    // The tolerance means something: turning the wrong pairs is seen.
    let mut golden = Golden::read("llama");
    Arc::get_mut(&mut golden.model.weights).unwrap().family = families::read(
        &[
            ("general.architecture", "qwen2".into()),
            ("qwen2.block_count", 2.into()),
            ("qwen2.context_length", 256.into()),
            ("qwen2.embedding_length", 64.into()),
            ("qwen2.feed_forward_length", 88.into()),
            ("qwen2.attention.head_count", 4.into()),
            ("qwen2.attention.layer_norm_rms_epsilon", 1e-5.into()),
        ]
        .into_iter()
        .map(|(key, value): (&str, crate::model::weights::gguf::Value)| (key.to_owned(), value))
        .collect(),
    )
    .unwrap()
    .0;
    let ours = Bench::new(&golden.model).alone(&golden.tokens, golden.tokens.len());
    assert!(golden.worst(&ours) > 100.0 * GOLDEN_TOLERANCE);
}

#[test]
fn rows_that_are_not_sampled_change_nothing_but_the_cache() {
    let golden = Golden::read("llama");
    let mut bench = Bench::new(&golden.model);
    let whole = bench.alone(&golden.tokens, golden.tokens.len());
    let table: Vec<_> = bench.free.split_off(bench.free.len() - 6);
    let tokens: Vec<_> = golden.tokens.iter().map(|&token| TokenId(token)).collect();
    let arena = Arc::clone(&bench.arena);
    let mut model = golden.model;
    let mut logits = Logits::default();
    // A chunk of which nothing is wanted, then one of which the last row is.
    for (context, end, sampled) in [(0, 50, &[][..]), (50, 83, &[32][..])] {
        let sequences = [SequenceRows { first_row: 0, rows: end - context, context, table: &table }];
        let batch = Batch { tokens: &tokens[context..end], sequences: &sequences, sampled };
        model.forward(&batch, &arena, &mut logits).unwrap();
        assert_eq!(logits.rows(), sampled.len());
    }
    assert_same_bits(&[logits.row(0).to_vec()], &whole[82..], "the sampled row");
}

#[test]
fn a_batch_that_names_a_token_or_a_block_that_is_not_there_fails_with_a_sentence() {
    let mut model = Golden::read("llama").model;
    let arena = Arc::new(Arena::new(4, model.spec().kv.block_bytes(BLOCK_SIZE)).unwrap());
    let mut fail = |tokens: &[u32], tables: &[&[u32]], rows: usize| {
        let tokens: Vec<_> = tokens.iter().map(|&token| TokenId(token)).collect();
        let tables: Vec<Vec<_>> = tables.iter().map(|table| table.iter().map(|&id| BlockId(id)).collect()).collect();
        let sequences: Vec<_> = tables
            .iter()
            .enumerate()
            .map(|(index, table)| SequenceRows { first_row: index * rows, rows, context: 0, table })
            .collect();
        let batch = Batch { tokens: &tokens, sequences: &sequences, sampled: &[0] };
        model.forward(&batch, &arena, &mut Logits::default()).unwrap_err().to_string()
    };
    assert!(fail(&[131], &[&[0]], 1).contains("token 131 is outside a vocabulary of 131"));
    assert!(fail(&[1], &[&[4]], 1).contains("names block 4, outside an arena of 4"));
    assert!(fail(&[1; 17], &[&[0]], 17).contains("1 blocks, too few for 17 tokens"));
    assert!(fail(&[1, 1], &[&[2], &[2]], 1).contains("share block 2, which this step writes"));
    assert!(fail(&[1; 17], &[&[3, 3]], 17).contains("share block 3, which this step writes"));
    assert!(fail(&[1, 1, 1], &[&[0]], 2).contains("a batch of 3 tokens for 2 rows"));
}

#[test]
fn the_name_of_a_model_is_that_of_its_file_without_the_quantisation() {
    for (file, wanted) in [
        ("/m/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("Qwen2.5-0.5B-Instruct-Q8_0.gguf", "qwen2.5-0.5b-instruct"),
        ("my model-IQ3_XXS.gguf", "my-model"),
        ("tiny-llama.gguf", "tiny-llama"),
        ("Q4_0.gguf", "q4-0"),
    ] {
        assert_eq!(name(Path::new(file)), wanted, "{file}");
    }
}

#[test]
fn loading_tells_how_far_it_is_and_fingerprints_every_byte() {
    let stem = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-llama.gguf");
    let mut told = Vec::new();
    let model = Decoder::load(&stem, compute(), &mut |done, total| told.push((done, total))).unwrap();
    let bytes = std::fs::read(&stem).unwrap();
    assert!(told.is_sorted() && told.iter().all(|&(done, total)| done <= total && total == bytes.len() as u64));
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy.gguf");
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    std::fs::write(&copy, changed).unwrap();
    let other = Decoder::load(&copy, compute(), &mut |_, _| {}).unwrap();
    assert_ne!(model.spec().fingerprint, other.spec().fingerprint, "a weight's last bit");
    std::fs::write(&copy, bytes).unwrap();
    let same = Decoder::load(&copy, compute(), &mut |_, _| {}).unwrap();
    assert_eq!(model.spec().fingerprint, same.spec().fingerprint);
}
