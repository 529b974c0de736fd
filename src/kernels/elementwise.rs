//! What happens to each row between the matrix products: rotary positions, SwiGLU, and the exponential they share.
//!
//! Every function works row by row, so a row's result doesn't depend on what else is in the batch.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, InplaceOp1, Layout, Result, Shape};
use rayon::prelude::*;

/// Below this, `exp` is as good as zero, and its result would leave the range of normal floats.
pub(super) const EXP_LOWEST: f32 = -87.0;
/// Above this, `exp` would overflow.
pub(super) const EXP_HIGHEST: f32 = 88.0;
/// Coefficients of 2^f for f in -0.5..=0.5, highest power first: `ln(2)^n / n!`. Relative error below 2e-7.
pub(super) const EXP2: [f32; 7] =
    [1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, 6.931_472e-1, 1.0];

/// `e^x`, clamped to the range of normal floats. The AVX2 kernels do the same operations, eight lanes at a time.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let scaled = x.clamp(EXP_LOWEST, EXP_HIGHEST) * std::f32::consts::LOG2_E;
    let whole = scaled.round_ties_even();
    let fraction = scaled - whole;
    let power = EXP2[1..].iter().fold(EXP2[0], |power, &coefficient| power.mul_add(fraction, coefficient));
    // Adds `whole` to the exponent; the clamp keeps it in range.
    f32::from_bits(power.to_bits().wrapping_add_signed((whole as i32) << 23))
}

#[inline(always)]
fn swiglu_row(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((&gate, &up), out) in gate.iter().zip(up).zip(out) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// The same code as `swiglu_row`; the compiler vectorises it for the features named here.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn swiglu_row_avx2(gate: &[f32], up: &[f32], out: &mut [f32]) {
    swiglu_row(gate, up, out);
}

/// SwiGLU: `[rows, 2 * width]`, gates then ups, to `[rows, width]`: `silu(gate) * up`.
pub struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, both) = layout.shape().dims2()?;
        let width = both / 2;
        let gated = contiguous(storage, layout)?;
        let mut out = vec![0.0; rows * width];
        out.par_chunks_mut(width).zip(gated.par_chunks(both)).for_each(|(out, gated)| {
            let (gate, up) = gated.split_at(width);
            #[cfg(target_arch = "x86_64")]
            if super::has_avx2() {
                // SAFETY: the features were detected above.
                return unsafe { swiglu_row_avx2(gate, up, out) };
            }
            swiglu_row(gate, up, out);
        });
        Ok((CpuStorage::F32(out), Shape::from((rows, width))))
    }
}

/// Which elements of a head rotary positions turn together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopePairs {
    /// `2i` with `2i + 1`: GGUF files of the Llama family, whose rows of q and k are permuted for it.
    Interleaved,
    /// `i` with `i + head_dim / 2`.
    Halves,
}

/// Cosines and sines of a step's rows: made once a step, used by every layer and head.
pub struct Rotation {
    head_dim: usize,
    pairs: RopePairs,
    /// `[rows, head_dim / 2]`, (cosine, sine).
    turns: Vec<(f32, f32)>,
}

impl Rotation {
    /// `base`: the wavelength's base. Angles are taken in f64, so that far positions lose nothing.
    pub fn new(positions: impl Iterator<Item = usize>, head_dim: usize, base: f32, pairs: RopePairs) -> Self {
        let frequencies: Vec<f64> =
            (0..head_dim / 2).map(|i| f64::from(base).powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let turns = positions
            .flat_map(|position| frequencies.iter().map(move |frequency| (position as f64 * frequency).sin_cos()))
            .map(|(sin, cos)| (cos as f32, sin as f32))
            .collect();
        Self { head_dim, pairs, turns }
    }

    fn turn(&self, row: usize, head: &mut [f32]) {
        let half = self.head_dim / 2;
        let turns = &self.turns[row * half..][..half];
        match self.pairs {
            RopePairs::Interleaved => {
                for (pair, &(cos, sin)) in head.chunks_exact_mut(2).zip(turns) {
                    (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
                }
            }
            RopePairs::Halves => {
                let (first, second) = head.split_at_mut(half);
                for ((a, b), &(cos, sin)) in first.iter_mut().zip(second).zip(turns) {
                    (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                }
            }
        }
    }
}

/// Norms (where the family does) and turns the queries and keys of `[rows, (heads + 2 * kv_heads) * head_dim]` in place.
pub struct PrepareHeads {
    pub rotation: Arc<Rotation>,
    pub heads: usize,
    pub kv_heads: usize,
    pub norms: Option<HeadNorms>,
}

/// RMS norms of single heads, as Qwen 3 has them.
#[derive(Clone)]
pub struct HeadNorms {
    /// `[head_dim]` each.
    pub query: Arc<[f32]>,
    pub key: Arc<[f32]>,
    pub epsilon: f32,
}

fn rms_norm(head: &mut [f32], weight: &[f32], epsilon: f32) {
    let mean = head.iter().map(|x| x * x).sum::<f32>() / head.len() as f32;
    let scale = 1.0 / (mean + epsilon).sqrt();
    for (x, weight) in head.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

impl InplaceOp1 for PrepareHeads {
    fn name(&self) -> &'static str {
        "prepare-heads"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let head_dim = self.rotation.head_dim;
        let width = (self.heads + 2 * self.kv_heads) * head_dim;
        let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("q, k, v must be contiguous") };
        let CpuStorage::F32(values) = storage else { candle_core::bail!("q, k, v must be f32") };
        values[start..end].par_chunks_mut(width).enumerate().for_each(|(row, values)| {
            for (index, head) in values.chunks_exact_mut(head_dim).take(self.heads + self.kv_heads).enumerate() {
                if let Some(norms) = &self.norms {
                    let weight = if index < self.heads { &norms.query } else { &norms.key };
                    rms_norm(head, weight, norms.epsilon);
                }
                self.rotation.turn(row, head);
            }
        });
        Ok(())
    }
}

/// The values of a contiguous f32 tensor.
pub(super) fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a kernel was given a tensor that is not contiguous"),
    }
}
