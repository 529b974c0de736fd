//! How does a decoder-only transformer run one step?
//!
//! Rows flow through buffers that every step uses again: linear layers, attention over block tables and what is between
//! them are our kernels, each a job of the decoder's own threads. Every kernel works row by row or in an order that the
//! row's own sequence fixes, which is what makes logits batch-invariant.
//! Invariant: a step no larger than one before it allocates nothing.

use std::path::Path;
use std::sync::Arc;

use super::families::{self, Family, FamilyError, MAX_HEAD_DIM, Sizes};
use super::weights::{OpenError, TensorError, WeightFile};
use super::{Batch, ForwardError, KvShape, Logits, Model, ModelSpec};
use crate::kernels::attention::{Attention, BLOCK_TOKENS, KvLayout, Plan, Rows};
use crate::kernels::elementwise::{Rotation, rms_norm};
use crate::kernels::huge_pages::HugePages;
use crate::kernels::isa::Isa;
pub use crate::kernels::isa::IsaError;
use crate::kernels::linear::{Activations, Linear, Update};
use crate::kernels::memory::Arena;
use crate::kernels::threads::Threads;
use crate::types::{BlockSize, KvDtype, TokenCount, TokenId};

/// Tokens of a block that the decoder's kernels work on.
pub const BLOCK_SIZE: BlockSize = BlockSize(BLOCK_TOKENS as u32);

/// With what a model is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Compute {
    /// Threads of a step, the caller's own among them.
    pub threads: usize,
    pub isa: Isa,
    /// As what keys and values are stored.
    pub kv: KvDtype,
}

impl Compute {
    /// `instructions`: `auto` for the fastest that this machine has, or the name of an `Isa`.
    pub fn choose(threads: usize, instructions: &str, kv: KvDtype) -> Result<Self, IsaError> {
        let isa = if instructions == "auto" { Isa::best() } else { instructions.parse::<Isa>()?.check()? };
        Ok(Self { threads, isa, kv })
    }
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Family(#[from] FamilyError),
    #[error(transparent)]
    Tensor(#[from] TensorError),
    #[error("the threads of the model could not be started: {0}")]
    Threads(#[from] std::io::Error),
}

/// A loaded model of one of the families.
pub struct Decoder {
    weights: Arc<Weights>,
    run: Run,
}

/// What a file holds, packed.
struct Weights {
    spec: ModelSpec,
    family: &'static Family,
    sizes: Sizes,
    isa: Isa,
    /// `[vocab, hidden]`.
    embedding: Linear,
    layers: Vec<Layer>,
    /// `[hidden]`.
    final_norm: Vec<f32>,
    /// `[vocab, hidden]`; `None`: the embedding's.
    head: Option<Linear>,
}

struct Layer {
    /// `[hidden]`.
    attention_norm: Vec<f32>,
    /// Queries, keys, values: `[(heads + 2 * kv_heads) * head_dim, hidden]`.
    qkv: Linear,
    /// `[(heads + 2 * kv_heads) * head_dim]`.
    qkv_bias: Option<Vec<f32>>,
    head_norms: Option<HeadNorms>,
    attention_out: Linear,
    /// `[hidden]`.
    feed_forward_norm: Vec<f32>,
    /// Gates, then ups: `[2 * feed_forward, hidden]`.
    gate_up: Linear,
    down: Linear,
}

/// RMS norms of single heads, as Qwen 3 has them: `[head_dim]` each.
struct HeadNorms {
    query: Vec<f32>,
    key: Vec<f32>,
}

/// Threads and memory of the steps.
struct Run {
    threads: Threads,
    plan: Plan,
    rotation: Rotation,
    attention: Attention,
    /// Input of the next linear layer.
    input: Activations,
    /// What gates let through: input of `Layer::down`.
    gated: Activations,
    /// The residual stream: `[rows, hidden]`.
    x: Vec<f32>,
    /// `[rows, (heads + 2 * kv_heads) * head_dim]`.
    qkv: Vec<f32>,
    /// `[rows, heads * head_dim]`.
    attended: Vec<f32>,
}

impl Run {
    fn new(weights: &Weights, threads: Threads) -> Self {
        let Sizes { heads, head_dim, rope_base, .. } = weights.sizes;
        let layout = weights.spec.kv.layout();
        Self {
            plan: Plan::new(layout),
            rotation: Rotation::new(head_dim, rope_base, weights.family.rope),
            attention: Attention::new(layout, heads, weights.isa, threads.count()),
            input: Activations::new(weights.isa, threads.count()),
            gated: Activations::new(weights.isa, threads.count()),
            threads,
            x: Vec::new(),
            qkv: Vec::new(),
            attended: Vec::new(),
        }
    }
}

impl Decoder {
    /// Loads a GGUF file. `progress(done, total)` is told the bytes of weights that are ready.
    pub fn load(path: &Path, compute: Compute, progress: &mut dyn FnMut(u64, u64)) -> Result<Self, LoadError> {
        let file = WeightFile::open(path)?;
        let (family, sizes) = families::read(file.metadata())?;
        let vocab = match *file.shape("token_embd.weight")? {
            [vocab, _] => vocab,
            _ => 0,
        };
        let mut threads = Threads::new(compute.threads)?;
        let mut loader = Loader {
            file: &file,
            isa: compute.isa,
            threads: &mut threads,
            memory: HugePages::default(),
            progress,
            done: 0,
        };
        let Sizes { layers, kv_heads, head_dim, .. } = sizes;
        let kv = KvShape { layers, kv_heads, head_dim, dtype: compute.kv };
        let mut hash = [0; 32];
        // Hashing is one long chain, packing many short ones: side by side they take as long as the longer one.
        let (layers, embedding, final_norm, head) = std::thread::scope(|scope| {
            let (bytes, hash) = (file.bytes(), &mut hash);
            scope.spawn(move || *hash = fingerprint(bytes, kv.layout()));
            loader.all(vocab, family, &sizes)
        })?;
        file.refuse_leftovers()?;
        let spec = ModelSpec {
            name: name(path),
            vocab,
            context_length: TokenCount(sizes.context_length),
            kv,
            doubles_at: sizes.doubles_at(),
            fingerprint: hash,
        };
        let weights = Weights { spec, family, sizes, isa: compute.isa, embedding, layers, final_norm, head };
        let run = Run::new(&weights, threads);
        Ok(Self { weights: Arc::new(weights), run })
    }

    /// Another decoder on the same weights.
    #[cfg(test)]
    fn sibling(&self) -> Self {
        let threads = Threads::new(self.run.threads.count()).expect("threads");
        Self { weights: Arc::clone(&self.weights), run: Run::new(&self.weights, threads) }
    }
}

impl Weights {
    fn head(&self) -> &Linear {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Runs the step that `run.plan` describes.
    fn step(&self, run: &mut Run, batch: &Batch<'_>, logits: &mut Logits) -> Result<(), ForwardError> {
        let rows = run.plan.rows();
        if batch.tokens.len() != rows || batch.sampled.iter().any(|&row| row >= rows) {
            let (tokens, sampled) = (batch.tokens.len(), batch.sampled.to_vec());
            return Err(ForwardError::Shape { tokens, rows, sampled });
        }
        self.embed(run, batch.tokens)?;
        run.rotation.set(run.plan.positions());
        for (index, layer) in self.layers.iter().enumerate() {
            self.attend(run, index, layer);
            if index + 1 == self.layers.len() {
                // The last layer needs the other rows' keys and values only.
                keep_rows(&mut run.x, self.sizes.hidden, batch.sampled);
                keep_rows(&mut run.attended, self.sizes.heads * self.sizes.head_dim, batch.sampled);
            }
            self.feed_forward(run, layer);
        }
        self.speak(run, logits);
        Ok(())
    }

    /// Rows of the embedding into `run.x`.
    fn embed(&self, run: &mut Run, tokens: &[TokenId]) -> Result<(), ForwardError> {
        let (hidden, vocab) = (self.sizes.hidden, self.spec.vocab);
        if let Some(&token) = tokens.iter().find(|token| token.0 as usize >= vocab) {
            return Err(ForwardError::UnknownToken { token, vocab });
        }
        run.x.resize(tokens.len() * hidden, 0.0);
        run.threads.for_rows(&mut run.x, hidden, |row, x| self.embedding.copy_row(tokens[row].0 as usize, x));
        Ok(())
    }

    /// Attention of one layer: from `run.x` into `run.attended`.
    fn attend(&self, run: &mut Run, index: usize, layer: &Layer) {
        let Sizes { hidden, heads, kv_heads, head_dim, rms_epsilon, .. } = self.sizes;
        let (isa, rows, width) = (self.isa, run.plan.rows(), (heads + 2 * kv_heads) * head_dim);
        let x = &run.x;
        run.input.fill(&mut run.threads, rows, hidden, layer.qkv.wants(), |row, out| {
            rms_norm(isa, &x[row * hidden..][..hidden], &layer.attention_norm, rms_epsilon, out);
        });
        run.qkv.resize(rows * width, 0.0);
        layer.qkv.multiply(&mut run.threads, &run.input, Update::Set, &mut run.qkv);
        let rotation = &run.rotation;
        run.threads.for_rows(&mut run.qkv, width, |row, values| {
            if let Some(bias) = &layer.qkv_bias {
                values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
            for (index, head) in values.chunks_exact_mut(head_dim).take(heads + kv_heads).enumerate() {
                if let Some(norms) = &layer.head_norms {
                    norms.apply(isa, index < heads, rms_epsilon, head);
                }
                rotation.turn(isa, row, head);
            }
        });
        run.attended.resize(rows * heads * head_dim, 0.0);
        run.attention.run(&mut run.threads, &run.plan, index, &run.qkv, &mut run.attended);
    }

    /// The rest of a layer: adds to `run.x` what attention found, and what the feed-forward network makes of it.
    fn feed_forward(&self, run: &mut Run, layer: &Layer) {
        let Sizes { hidden, heads, head_dim, rms_epsilon, .. } = self.sizes;
        let (isa, rows) = (self.isa, run.x.len() / hidden);
        run.input.take(&mut run.threads, &run.attended, heads * head_dim, layer.attention_out.wants());
        layer.attention_out.multiply(&mut run.threads, &run.input, Update::Add, &mut run.x);
        let x = &run.x;
        run.input.fill(&mut run.threads, rows, hidden, layer.gate_up.wants(), |row, out| {
            rms_norm(isa, &x[row * hidden..][..hidden], &layer.feed_forward_norm, rms_epsilon, out);
        });
        layer.gate_up.multiply_gated(&mut run.threads, &run.input, layer.down.wants(), &mut run.gated);
        layer.down.multiply(&mut run.threads, &run.gated, Update::Add, &mut run.x);
    }

    /// Logits of the rows that are left in `run.x`.
    fn speak(&self, run: &mut Run, logits: &mut Logits) {
        let Sizes { hidden, rms_epsilon, .. } = self.sizes;
        let (head, rows, x) = (self.head(), run.x.len() / hidden, &run.x);
        let out = logits.reset(rows, self.spec.vocab);
        run.input.fill(&mut run.threads, rows, hidden, head.wants(), |row, out| {
            rms_norm(self.isa, &x[row * hidden..][..hidden], &self.final_norm, rms_epsilon, out);
        });
        head.multiply(&mut run.threads, &run.input, Update::Set, out);
    }
}

impl HeadNorms {
    fn apply(&self, isa: Isa, is_query: bool, epsilon: f32, head: &mut [f32]) {
        let weight = if is_query { &self.query } else { &self.key };
        let mut normed = [0.0; MAX_HEAD_DIM];
        let normed = &mut normed[..head.len()];
        rms_norm(isa, head, weight, epsilon, normed);
        head.copy_from_slice(normed);
    }
}

/// Keeps the rows with these numbers, ascending, of `[rows, width]`.
fn keep_rows(values: &mut Vec<f32>, width: usize, kept: &[usize]) {
    for (to, &from) in kept.iter().enumerate() {
        values.copy_within(from * width..(from + 1) * width, to * width);
    }
    values.truncate(kept.len() * width);
}

impl Model for Decoder {
    fn spec(&self) -> &ModelSpec {
        &self.weights.spec
    }

    fn forward(&mut self, batch: &Batch<'_>, kv: &Arc<Arena>, logits: &mut Logits) -> Result<(), ForwardError> {
        let rows = batch.sequences.iter().map(|sequence| Rows {
            first_row: sequence.first_row,
            rows: sequence.rows,
            context: sequence.context,
            table: sequence.table,
        });
        self.run.plan.set(kv, rows)?;
        self.weights.step(&mut self.run, batch, logits)
    }
}

/// Takes tensors out of a file, in the decoder's arrangement.
struct Loader<'a> {
    file: &'a WeightFile,
    isa: Isa,
    threads: &'a mut Threads,
    /// For all weights.
    memory: HugePages,
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
}

impl Loader<'_> {
    #[expect(clippy::type_complexity, reason = "the four parts of a decoder, named where they are taken apart")]
    fn all(
        &mut self,
        vocab: usize,
        family: &Family,
        sizes: &Sizes,
    ) -> Result<(Vec<Layer>, Linear, Vec<f32>, Option<Linear>), LoadError> {
        let embedding = self.linear(&[("token_embd.weight", vocab)], sizes.hidden)?;
        let layers = (0..sizes.layers).map(|layer| self.layer(layer, family, sizes)).collect::<Result<_, _>>()?;
        let final_norm = self.file.vector("output_norm.weight", sizes.hidden)?;
        let head = match self.file.contains("output.weight") {
            true => Some(self.linear(&[("output.weight", vocab)], sizes.hidden)?),
            false => None,
        };
        Ok((layers, embedding, final_norm, head))
    }

    fn layer(&mut self, layer: usize, family: &Family, sizes: &Sizes) -> Result<Layer, LoadError> {
        let Sizes { hidden, feed_forward, heads, kv_heads, head_dim, .. } = *sizes;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let [q, k, v] = ["attn_q", "attn_k", "attn_v"].map(name);
        let rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        let parts = [(&q, rows[0]), (&k, rows[1]), (&v, rows[2])];
        let weights = parts.map(|(part, rows)| (format!("{part}.weight"), rows));
        let qkv = self.linear(&weights.each_ref().map(|(name, rows)| (name.as_str(), *rows)), hidden)?;
        let qkv_bias = if family.qkv_bias {
            let mut bias = Vec::new();
            for (part, rows) in parts {
                bias.extend(self.file.vector(&format!("{part}.bias"), rows)?);
            }
            Some(bias)
        } else {
            None
        };
        let head_norms = if family.qk_norm {
            let query = self.file.vector(&name("attn_q_norm.weight"), head_dim)?;
            Some(HeadNorms { query, key: self.file.vector(&name("attn_k_norm.weight"), head_dim)? })
        } else {
            None
        };
        let [gate, up] = ["ffn_gate.weight", "ffn_up.weight"].map(name);
        Ok(Layer {
            attention_norm: self.file.vector(&name("attn_norm.weight"), hidden)?,
            qkv,
            qkv_bias,
            head_norms,
            attention_out: self.linear(&[(&name("attn_output.weight"), hidden)], heads * head_dim)?,
            feed_forward_norm: self.file.vector(&name("ffn_norm.weight"), hidden)?,
            gate_up: self.linear(&[(&gate, feed_forward), (&up, feed_forward)], hidden)?,
            down: self.linear(&[(&name("ffn_down.weight"), hidden)], feed_forward)?,
        })
    }

    /// Packs matrices one below the other, and tells how far the loading is.
    fn linear(&mut self, parts: &[(&str, usize)], inputs: usize) -> Result<Linear, TensorError> {
        let linear = self.file.linear(self.isa, (self.threads, &mut self.memory), parts, inputs)?;
        self.done += parts.iter().map(|(name, _)| self.file.tensor_bytes(name)).sum::<u64>();
        (self.progress)(self.done, self.file.bytes().len() as u64);
        Ok(linear)
    }
}

/// BLAKE3 over all of the file (weights, tokenizer, sizes) and the version of the KV's layout, which its dtype is part of.
fn fingerprint(file: &[u8], layout: KvLayout) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&layout.version().to_le_bytes());
    hasher.update(file);
    *hasher.finalize().as_bytes()
}

/// The name that clients use: the file's own, in lower case and without its quantisation, since `general.name` is often
/// that of a training run. `SmolLM2-135M-Instruct.Q4_1.gguf` is `smollm2-135m-instruct`.
fn name(path: &Path) -> String {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().to_lowercase()).unwrap_or_default();
    let base = match stem.rsplit_once(['.', '-']) {
        Some((base, last)) if !base.is_empty() && is_quantisation(last) => base,
        _ => &stem,
    };
    let name: String = base.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    if name.is_empty() { "model".to_owned() } else { name }
}

/// Whether a part of a file's name is like `q4_1`, `iq3_xxs` or `bf16`.
fn is_quantisation(part: &str) -> bool {
    let quantised = part
        .trim_start_matches('i')
        .strip_prefix('q')
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    quantised || matches!(part, "f16" | "bf16" | "fp16" | "f32" | "fp32")
}

#[cfg(test)]
mod tests;
