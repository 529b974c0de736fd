//! How does a decoder-only transformer run one step?
//!
//! Tensors flow through candle; linear layers and what is between them are our custom ops, attention is our own call.
//! Every op works row by row or in an order that the row's own sequence fixes, which is what makes logits batch-invariant.
//! The caller chooses the threads: `forward` and `load` run on the rayon pool that they are called in.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};

use super::families::{self, Family, FamilyError, Sizes};
use super::weights::{OpenError, TensorError, WeightFile};
use super::{Batch, ForwardError, KvShape, Logits, Model, ModelSpec};
use crate::kernels::attention::{Attention, BLOCK_TOKENS, KV_LAYOUT_VERSION, KvLayout, Plan, Rows};
use crate::kernels::elementwise::{HeadNorms, PrepareHeads, Rotation, SwiGlu};
use crate::kernels::isa::Isa;
use crate::kernels::linear::{Linear, PackedMatrix};
use crate::kernels::memory::Arena;
use crate::kernels::threads::Threads;
use crate::types::{BlockSize, TokenCount, TokenId};

/// Tokens of a block that the decoder's kernels work on.
pub const BLOCK_SIZE: BlockSize = BlockSize(BLOCK_TOKENS as u32);

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Family(#[from] FamilyError),
    #[error(transparent)]
    Tensor(#[from] TensorError),
    #[error("preparing the weights failed: {0}")]
    Compute(#[from] candle_core::Error),
    #[error("the model's threads could not be started: {0}")]
    Threads(#[from] std::io::Error),
}

/// A loaded model of one of the families.
pub struct Decoder {
    spec: ModelSpec,
    family: &'static Family,
    sizes: Sizes,
    embedding: Arc<PackedMatrix>,
    layers: Vec<Layer>,
    /// `[hidden]`.
    final_norm: Tensor,
    head: Arc<PackedMatrix>,
    /// For one step at a time.
    attending: Mutex<Attending>,
}

/// What attends, for all layers.
struct Attending {
    threads: Threads,
    plan: Plan,
    attention: Attention,
}

struct Layer {
    /// `[hidden]`.
    attention_norm: Tensor,
    /// Queries, keys, values: `[(heads + 2 * kv_heads) * head_dim, hidden]`.
    qkv: Linear,
    head_norms: Option<HeadNorms>,
    attention_out: Linear,
    /// `[hidden]`.
    feed_forward_norm: Tensor,
    /// Gates, then ups: `[2 * feed_forward, hidden]`.
    gate_up: Linear,
    down: Linear,
}

impl Decoder {
    /// Loads a GGUF file. `progress(done, total)` is told the bytes of weights that are ready.
    pub fn load(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Self, LoadError> {
        let file = WeightFile::open(path)?;
        let (family, sizes) = families::read(file.metadata())?;
        let vocab = match *file.shape("token_embd.weight")? {
            [vocab, _] => vocab,
            _ => 0,
        };
        let mut loader = Loader { file: &file, progress, done: 0 };
        let mut hash = [0; 32];
        // Hashing is one long chain, packing many short ones: side by side they take as long as the longer one.
        let (layers, embedding, final_norm, head) = rayon::in_place_scope(|scope| {
            let bytes = file.bytes();
            scope.spawn(|_| hash = fingerprint(bytes));
            loader.all(vocab, family, &sizes)
        })?;
        file.refuse_leftovers()?;
        let spec = ModelSpec {
            name: name(path),
            vocab,
            context_length: TokenCount(sizes.context_length),
            kv: KvShape { layers: sizes.layers, kv_heads: sizes.kv_heads, head_dim: sizes.head_dim },
            fingerprint: hash,
        };
        let KvShape { layers: kv_layers, kv_heads, head_dim } = spec.kv;
        let layout = KvLayout { layers: kv_layers, kv_heads, head_dim };
        let threads = Threads::new(rayon::current_num_threads())?;
        let attention = Attention::new(layout, sizes.heads, Isa::best(), threads.count());
        let attending = Mutex::new(Attending { threads, plan: Plan::new(layout), attention });
        Ok(Self { spec, family, sizes, embedding, layers, final_norm, head, attending })
    }

    /// Rows of the embedding: `[tokens, hidden]`.
    fn embed(&self, tokens: &[TokenId]) -> candle_core::Result<Tensor> {
        let hidden = self.sizes.hidden;
        let mut values = vec![0.0; tokens.len() * hidden];
        for (token, out) in tokens.iter().zip(values.chunks_exact_mut(hidden)) {
            if token.0 as usize >= self.spec.vocab {
                candle_core::bail!("token {token} is outside a vocabulary of {}", self.spec.vocab);
            }
            self.embedding.copy_row(token.0 as usize, out);
        }
        Tensor::from_vec(values, (tokens.len(), hidden), &Device::Cpu)
    }

    /// All layers. Comes back with the rows in `sampled` alone: the last layer needs the others' keys and values only.
    fn run_layers(&self, mut x: Tensor, attending: &mut Attending, sampled: &[usize]) -> candle_core::Result<Tensor> {
        let Sizes { heads, kv_heads, head_dim, rope_base, rms_epsilon, .. } = self.sizes;
        let Attending { threads, plan, attention } = attending;
        let rows = plan.rows();
        let rotation = Arc::new(Rotation::new(plan.positions(), head_dim, rope_base, self.family.rope));
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = candle_nn::ops::rms_norm(&x, &layer.attention_norm, rms_epsilon)?;
            let qkv = normed.apply_op1_no_bwd(&layer.qkv)?;
            let norms = layer.head_norms.clone();
            qkv.inplace_op1(&PrepareHeads { rotation: Arc::clone(&rotation), heads, kv_heads, norms })?;
            let mut out = vec![0.0; rows * heads * head_dim];
            attention.run(threads, plan, index, &qkv.flatten_all()?.to_vec1::<f32>()?, &mut out);
            let mut attended = Tensor::from_vec(out, (rows, heads * head_dim), &Device::Cpu)?;
            if index + 1 == self.layers.len() {
                let rows = sampled.iter().map(|&row| row as u32).collect::<Vec<_>>();
                let rows = Tensor::from_vec(rows, sampled.len(), &Device::Cpu)?;
                x = x.index_select(&rows, 0)?;
                attended = attended.index_select(&rows, 0)?;
                if sampled.is_empty() {
                    return Ok(x);
                }
            }
            x = (x + attended.apply_op1_no_bwd(&layer.attention_out)?)?;
            let normed = candle_nn::ops::rms_norm(&x, &layer.feed_forward_norm, rms_epsilon)?;
            let gated = normed.apply_op1_no_bwd(&layer.gate_up)?.apply_op1_no_bwd(&SwiGlu)?;
            x = (x + gated.apply_op1_no_bwd(&layer.down)?)?;
        }
        Ok(x)
    }

    fn step(&self, batch: &Batch<'_>, kv: &Arc<Arena>, logits: &mut Logits) -> candle_core::Result<()> {
        let mut attending = self.attending.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = batch.sequences.iter().map(|sequence| Rows {
            first_row: sequence.first_row,
            rows: sequence.rows,
            context: sequence.context,
            table: sequence.table,
        });
        attending.plan.set(kv, rows).map_err(candle_core::Error::wrap)?;
        let rows = attending.plan.rows();
        if batch.tokens.len() != rows || batch.sampled.iter().any(|&row| row >= rows) {
            candle_core::bail!("a batch of {} tokens for {rows} rows", batch.tokens.len());
        }
        let x = self.run_layers(self.embed(batch.tokens)?, &mut attending, batch.sampled)?;
        let out = logits.reset(batch.sampled.len(), self.spec.vocab);
        if batch.sampled.is_empty() {
            return Ok(());
        }
        let x = candle_nn::ops::rms_norm(&x, &self.final_norm, self.sizes.rms_epsilon)?;
        self.head.multiply(&x.flatten_all()?.to_vec1::<f32>()?, None, out);
        Ok(())
    }
}

impl Model for Decoder {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn forward(&mut self, batch: &Batch<'_>, kv: &Arc<Arena>, logits: &mut Logits) -> Result<(), ForwardError> {
        Ok(self.step(batch, kv, logits)?)
    }
}

/// Takes tensors out of a file, in the decoder's arrangement.
struct Loader<'a> {
    file: &'a WeightFile,
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
    ) -> Result<(Vec<Layer>, Arc<PackedMatrix>, Tensor, Arc<PackedMatrix>), LoadError> {
        let embedding = Arc::new(self.matrix(&[("token_embd.weight", vocab)], sizes.hidden)?);
        let layers = (0..sizes.layers).map(|layer| self.layer(layer, family, sizes)).collect::<Result<_, _>>()?;
        let final_norm = self.norm("output_norm.weight", sizes.hidden)?;
        let head = match self.file.contains("output.weight") {
            true => Arc::new(self.matrix(&[("output.weight", vocab)], sizes.hidden)?),
            false => Arc::clone(&embedding),
        };
        Ok((layers, embedding, final_norm, head))
    }

    fn layer(&mut self, layer: usize, family: &Family, sizes: &Sizes) -> Result<Layer, LoadError> {
        let Sizes { hidden, feed_forward, heads, kv_heads, head_dim, rms_epsilon, .. } = *sizes;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let [q, k, v] = ["attn_q", "attn_k", "attn_v"].map(name);
        let rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        let parts = [(&q, rows[0]), (&k, rows[1]), (&v, rows[2])];
        let weights = parts.map(|(part, rows)| (format!("{part}.weight"), rows));
        let qkv = self.matrix(&weights.each_ref().map(|(name, rows)| (name.as_str(), *rows)), hidden)?;
        let bias = if family.qkv_bias {
            let mut bias = Vec::new();
            for (part, rows) in parts {
                bias.extend(self.file.vector(&format!("{part}.bias"), rows)?);
            }
            Some(Arc::from(bias))
        } else {
            None
        };
        let head_norms = if family.qk_norm {
            Some(HeadNorms {
                query: self.file.vector(&name("attn_q_norm.weight"), head_dim)?.into(),
                key: self.file.vector(&name("attn_k_norm.weight"), head_dim)?.into(),
                epsilon: rms_epsilon,
            })
        } else {
            None
        };
        let [gate, up] = ["ffn_gate.weight", "ffn_up.weight"].map(name);
        let gate_up = self.matrix(&[(&gate, feed_forward), (&up, feed_forward)], hidden)?;
        let attention_out = self.matrix(&[(&name("attn_output.weight"), hidden)], heads * head_dim)?;
        let down = self.matrix(&[(&name("ffn_down.weight"), hidden)], feed_forward)?;
        let plain = |weight| Linear { weight: Arc::new(weight), bias: None };
        Ok(Layer {
            attention_norm: self.norm(&name("attn_norm.weight"), hidden)?,
            qkv: Linear { weight: Arc::new(qkv), bias },
            head_norms,
            attention_out: plain(attention_out),
            feed_forward_norm: self.norm(&name("ffn_norm.weight"), hidden)?,
            gate_up: plain(gate_up),
            down: plain(down),
        })
    }

    /// Packs matrices one below the other, and tells how far the loading is.
    fn matrix(&mut self, parts: &[(&str, usize)], inputs: usize) -> Result<PackedMatrix, TensorError> {
        let matrix = self.file.stacked(parts, inputs)?;
        self.done += parts.iter().map(|(name, _)| self.file.tensor_bytes(name)).sum::<u64>();
        (self.progress)(self.done, self.file.bytes().len() as u64);
        Ok(matrix)
    }

    fn norm(&self, name: &str, length: usize) -> Result<Tensor, LoadError> {
        Ok(Tensor::from_vec(self.file.vector(name, length)?, length, &Device::Cpu)?)
    }
}

/// BLAKE3 over all of the file (weights, tokenizer, sizes) and the version of the KV's layout.
fn fingerprint(file: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&KV_LAYOUT_VERSION.to_le_bytes());
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
