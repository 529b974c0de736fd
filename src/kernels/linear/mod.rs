//! How is a batch of rows multiplied by a weight matrix?
//!
//! Weights lie in panels of 16 output rows, `[panel][column][16]`, f32 or f16. Each output is one chain of fused
//! multiply-adds over the columns, in their order, whatever the number of rows and whichever kernel runs.
//! Invariant: a row's outputs are the same bits alone and in any batch, in the scalar and in the SIMD form.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod scalar;

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::SharedOut;
use super::elementwise::contiguous;

/// Output rows of a panel.
const PANEL: usize = 16;
/// Most rows of input of one tile: with two vectors of outputs each, they fill the 16 registers of AVX2.
const TILE: usize = 6;
/// Bytes of input that a panel passes over before the next panel's turn: half of a common L2 cache.
const INPUT_BLOCK_BYTES: usize = 256 * 1024;
/// Most panels that a thread takes at a time.
const PANELS_A_TASK: usize = 4;

/// In which form weights are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Precision {
    F32,
    /// Half the bytes to read. Rounds by 2^-11 at most, far below the error of any quantised source.
    F16,
}

/// A weight matrix, packed.
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    panels: Panels,
}

/// `[panel][column]` of 16 rows; rows past the last are zeros.
enum Panels {
    F32(Vec<[f32; PANEL]>),
    F16(Vec<[f16; PANEL]>),
}

impl PackedMatrix {
    /// Packs a matrix of `outputs` rows and `inputs` columns.
    ///
    /// `fill(first_row, values)` writes rows `first_row..` into `values`, `[rows, inputs]`; it is called from many
    /// threads. A matrix whose values don't fit f16 is kept in f32.
    pub fn pack<E: Send>(
        outputs: usize,
        inputs: usize,
        precision: Precision,
        fill: impl Fn(usize, &mut [f32]) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<Self, E> {
        assert!(outputs > 0 && inputs > 0, "an empty matrix");
        let panels = match precision {
            Precision::F32 => Panels::F32(pack_panels(outputs, inputs, &fill, <[f32]>::copy_from_slice)?),
            Precision::F16 => {
                let panels =
                    pack_panels(outputs, inputs, &fill, |to: &mut [f16], from| to.convert_from_f32_slice(from))?;
                if panels.par_iter().flatten().all(|value| value.is_finite()) {
                    Panels::F16(panels)
                } else {
                    return Self::pack(outputs, inputs, Precision::F32, fill);
                }
            }
        };
        Ok(Self { outputs, inputs, panels })
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes that the weights take.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => size_of_val(panels.as_slice()),
            Panels::F16(panels) => size_of_val(panels.as_slice()),
        }
    }

    /// Copies row `row` to `out`, `[inputs]`: what an embedding does.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.outputs, "row {row} of a matrix of {} rows", self.outputs);
        let (first, lane) = (row / PANEL * self.inputs, row % PANEL);
        match &self.panels {
            Panels::F32(panels) => {
                for (out, weights) in out.iter_mut().zip(&panels[first..][..self.inputs]) {
                    *out = weights[lane];
                }
            }
            Panels::F16(panels) => {
                for (out, weights) in out.iter_mut().zip(&panels[first..][..self.inputs]) {
                    *out = weights[lane].to_f32();
                }
            }
        }
    }

    /// `out[r][o] = bias[o] + Σ input[r][i] * weight[o][i]`. `input`: `[rows, inputs]`; `out`: `[rows, outputs]`.
    pub fn multiply(&self, input: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if super::has_avx2() {
            return self.multiply_with(Kernel::Avx2, input, bias, out);
        }
        self.multiply_with(Kernel::Scalar, input, bias, out);
    }

    fn multiply_with(&self, kernel: Kernel, input: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        match &self.panels {
            Panels::F32(panels) => self.multiply_panels(kernel, panels, input, bias, out),
            Panels::F16(panels) => self.multiply_panels(kernel, panels, input, bias, out),
        }
    }

    fn multiply_panels<W: Weight>(
        &self,
        kernel: Kernel,
        panels: &[[W; PANEL]],
        input: &[f32],
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let rows = input.len() / self.inputs;
        assert_eq!(input.len(), rows * self.inputs, "a part of a row");
        assert_eq!(out.len(), rows * self.outputs, "an output of another shape");
        assert!(bias.is_none_or(|bias| bias.len() == self.outputs), "a bias of another length");
        let shared = SharedOut::new(out);
        let count = self.outputs.div_ceil(PANEL);
        let a_task = count.div_ceil(4 * rayon::current_num_threads()).clamp(1, PANELS_A_TASK);
        let block = (INPUT_BLOCK_BYTES / (self.inputs * size_of::<f32>())).next_multiple_of(TILE);
        let store = |panel: usize, row: usize, sums: &mut [f32; PANEL]| {
            let first = panel * PANEL;
            let width = PANEL.min(self.outputs - first);
            if let Some(bias) = bias {
                for (sum, bias) in sums.iter_mut().zip(&bias[first..][..width]) {
                    *sum += bias;
                }
            }
            // SAFETY: `out` is borrowed until this call returns, and only this task has these panels' columns.
            unsafe { shared.write(row * self.outputs + first, &sums[..width]) }
        };
        panels.par_chunks(a_task * self.inputs).enumerate().for_each(|(task, panels)| {
            let task = Task { panels, first_panel: task * a_task, inputs: self.inputs };
            for (index, input) in input.chunks(block * self.inputs).enumerate() {
                let store = |panel, row, sums: &mut [f32; PANEL]| store(panel, index * block + row, sums);
                match kernel {
                    Kernel::Scalar => scalar::multiply(&task, input, store),
                    // SAFETY: the kernel was chosen by `has_avx2`.
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx2 => unsafe { avx2::multiply(&task, input, store) },
                }
            }
        });
    }
}

/// Panels that one thread multiplies.
struct Task<'a, W> {
    /// `[panel][column]`.
    panels: &'a [[W; PANEL]],
    first_panel: usize,
    inputs: usize,
}

#[derive(Clone, Copy)]
enum Kernel {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

/// A form of weight that the kernels read.
trait Weight: Copy + Default + Send + Sync {
    fn to_f32(self) -> f32;
    /// Sixteen weights as two vectors.
    ///
    /// # Safety
    /// The machine has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn widen(weights: &[Self; PANEL]) -> [std::arch::x86_64::__m256; 2];
}

fn pack_panels<W: Weight, E: Send>(
    outputs: usize,
    inputs: usize,
    fill: &(impl Fn(usize, &mut [f32]) -> std::result::Result<(), E> + Sync),
    convert: impl Fn(&mut [W], &[f32]) + Sync,
) -> std::result::Result<Vec<[W; PANEL]>, E> {
    let mut panels = vec![[W::default(); PANEL]; outputs.div_ceil(PANEL) * inputs];
    panels.par_chunks_mut(inputs).enumerate().try_for_each_init(
        || (vec![0.0; PANEL * inputs], vec![W::default(); PANEL * inputs]),
        |(values, converted), (panel, packed)| {
            let first = panel * PANEL;
            let used = PANEL.min(outputs - first) * inputs;
            fill(first, &mut values[..used])?;
            convert(&mut converted[..used], &values[..used]);
            for (lane, row) in converted[..used].chunks_exact(inputs).enumerate() {
                for (weights, &value) in packed.iter_mut().zip(row) {
                    weights[lane] = value;
                }
            }
            Ok(())
        },
    )?;
    Ok(panels)
}

/// A linear layer, as candle runs it: `[rows, inputs]` to `[rows, outputs]`.
#[derive(Clone)]
pub struct Linear {
    pub weight: Arc<PackedMatrix>,
    /// `[outputs]`.
    pub bias: Option<Arc<[f32]>>,
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inputs) = layout.shape().dims2()?;
        if inputs != self.weight.inputs {
            candle_core::bail!("a layer of {} inputs was given {inputs}", self.weight.inputs);
        }
        let mut out = vec![0.0; rows * self.weight.outputs];
        self.weight.multiply(contiguous(storage, layout)?, self.bias.as_deref(), &mut out);
        Ok((CpuStorage::F32(out), Shape::from((rows, self.weight.outputs))))
    }
}
