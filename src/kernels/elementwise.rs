//! What happens to each row between the matrix products: norms, rotary positions and SwiGLU.
//!
//! Every function works row by row, so a row's result doesn't depend on what else is in the batch.

use super::isa::{Isa, vectorised};

/// Below this, `exp` is as good as zero, and its result would leave the range of normal floats.
const EXP_LOWEST: f32 = -87.0;
/// Above this, `exp` would overflow.
const EXP_HIGHEST: f32 = 88.0;
/// Coefficients of 2^f for f in -0.5..=0.5, highest power first: `ln(2)^n / n!`. Relative error below 2e-7.
const EXP2: [f32; 7] = [1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, 6.931_472e-1, 1.0];

/// Added to a small number, it leaves the nearest whole one, even at ties, in the lowest bits: 1.5 * 2^23.
pub(super) const ROUND: f32 = 12_582_912.0;

/// `e^x`, clamped to the range of normal floats; for NaN, any number.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let scaled = x.clamp(EXP_LOWEST, EXP_HIGHEST) * std::f32::consts::LOG2_E;
    // Not `as i32`, which asks each lane of a vector whether it is NaN.
    let rounded = scaled + ROUND;
    let fraction = scaled - (rounded - ROUND);
    let power = EXP2[1..].iter().fold(EXP2[0], |power, &coefficient| power.mul_add(fraction, coefficient));
    // Adds the whole number to the exponent; the clamp keeps it in range.
    f32::from_bits(power.to_bits().wrapping_add(rounded.to_bits() << 23))
}

/// Sums kept side by side, so that a vector's lanes can hold them.
const LANES: usize = 16;

vectorised! {
    /// `x / sqrt(mean(x^2) + epsilon) * weight`, all `[width]`.
    pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let (chunks, rest) = x.as_chunks::<LANES>();
        let mut lanes = [0.0; LANES];
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += x * x;
            }
        }
        let mut sum = rest.iter().map(|x| x * x).sum::<f32>();
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        sum += lanes[0];
        let scale = 1.0 / (sum / x.len() as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

vectorised! {
    /// `silu(gate) * up` in the place of the gates. `rows`: `[rows, 2 * width]`, in each row gates, then ups.
    pub fn swiglu(rows: &mut [f32], width: usize) {
        for row in rows.chunks_exact_mut(2 * width) {
            let (gate, up) = row.split_at_mut(width);
            for (gate, up) in gate.iter_mut().zip(up) {
                *gate = *gate / (1.0 + exp(-*gate)) * *up;
            }
        }
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
    pairs: RopePairs,
    /// `[head_dim / 2]`, in radians a position.
    frequencies: Vec<f64>,
    /// `[rows, head_dim / 2]`.
    cos: Vec<f32>,
    /// As `cos`.
    sin: Vec<f32>,
}

impl Rotation {
    /// Of no rows. `base`: the wavelength's base.
    pub fn new(head_dim: usize, base: f32, pairs: RopePairs) -> Self {
        let frequency = |i| f64::from(base).powf(-2.0 * i as f64 / head_dim as f64);
        Self { pairs, frequencies: (0..head_dim / 2).map(frequency).collect(), cos: Vec::new(), sin: Vec::new() }
    }

    /// Takes the positions of a step's rows. Angles are taken in f64, so that far positions lose nothing.
    pub fn set(&mut self, positions: impl Iterator<Item = usize>) {
        self.cos.clear();
        self.sin.clear();
        for position in positions {
            for frequency in &self.frequencies {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// Turns a head, `[head_dim]`, to the position of row `row`.
    pub fn turn(&self, isa: Isa, row: usize, head: &mut [f32]) {
        let half = self.frequencies.len();
        let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
        match self.pairs {
            RopePairs::Interleaved => turn_interleaved(isa, head, cos, sin),
            RopePairs::Halves => turn_halves(isa, head, cos, sin),
        }
    }
}

vectorised! {
    fn turn_interleaved(head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (pairs, _) = head.as_chunks_mut::<2>();
        for (([a, b], cos), sin) in pairs.iter_mut().zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        }
    }
}

vectorised! {
    fn turn_halves(head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (first, second) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn exp_is_within_3e_7_of_f64_and_exact_at_zero() {
        assert_eq!(exp(0.0), 1.0);
        for step in -8700..8800 {
            let x = step as f32 / 100.0;
            let wanted = f64::from(x).exp();
            // The argument's own rounding, scaled by its size, is part of the error.
            let tolerance = 3e-7 + 1e-7 * f64::from(x.abs());
            assert!((f64::from(exp(x)) - wanted).abs() <= tolerance * wanted, "exp({x}) = {}", exp(x));
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
        assert!(exp(f32::INFINITY).is_finite());
    }

    #[test]
    fn swiglu_is_silu_of_the_gate_times_up_and_the_same_bits_with_all_instructions() {
        let width = 37;
        let rows: Vec<f32> = (0..4 * width).map(|i| ((i * 37) % 101) as f32 / 5.0 - 10.0).collect();
        let mut plain = rows.clone();
        swiglu(Isa::Scalar, &mut plain, width);
        for (row, out) in rows.chunks(2 * width).zip(plain.chunks(2 * width)) {
            for column in 0..width {
                let (gate, up, out) = (row[column], row[width + column], out[column]);
                let wanted = gate / (1.0 + (-gate).exp()) * up;
                assert!((out - wanted).abs() <= 2e-6 * wanted.abs(), "{out} for {wanted}");
            }
            assert_eq!(row[width..], out[width..], "the ups stay");
        }
        for isa in Isa::available() {
            let mut out = rows.clone();
            swiglu(isa, &mut out, width);
            assert_eq!(bits(&out), bits(&plain), "{isa}");
        }
        let mut bad = [f32::NAN, 1.0, f32::INFINITY, 1.0];
        Isa::available().into_iter().for_each(|isa| swiglu(isa, &mut bad, 2));
        assert!(bad[0].is_nan(), "what is no number stays none");
    }

    #[test]
    fn a_normed_row_has_the_mean_square_of_its_weights_and_the_same_bits_with_all_instructions() {
        let x: Vec<f32> = (0..83).map(|i| ((i * 29) % 53) as f32 - 20.0).collect();
        let weight: Vec<f32> = (0..83).map(|i| 1.0 + i as f32 / 100.0).collect();
        let mut plain = vec![0.0; 83];
        rms_norm(Isa::Scalar, &x, &weight, 1e-5, &mut plain);
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 83.0;
        for ((x, weight), out) in x.iter().zip(&weight).zip(&plain) {
            let wanted = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*weight);
            assert!((f64::from(*out) - wanted).abs() <= 1e-6 * wanted.abs(), "{out} for {wanted}");
        }
        for isa in Isa::available() {
            let mut out = vec![0.0; 83];
            rms_norm(isa, &x, &weight, 1e-5, &mut out);
            assert_eq!(bits(&out), bits(&plain), "{isa}");
        }
    }

    #[test]
    fn position_zero_turns_nothing_and_a_turn_keeps_every_pairs_length() {
        for (pairs, other) in [(RopePairs::Interleaved, 1), (RopePairs::Halves, 4)] {
            let mut rotation = Rotation::new(8, 10_000.0, pairs);
            rotation.set([0, 5000].into_iter());
            let head: [f32; 8] = std::array::from_fn(|i| i as f32 + 1.0);
            for isa in Isa::available() {
                let mut turned = head;
                rotation.turn(isa, 0, &mut turned);
                assert_eq!(turned, head);
                rotation.turn(isa, 1, &mut turned);
                assert!((turned[0].hypot(turned[other]) - head[0].hypot(head[other])).abs() < 1e-5);
                let angle = 5000.0_f64 as f32;
                assert!((turned[0] - (head[0] * angle.cos() - head[other] * angle.sin())).abs() < 1e-3, "{pairs:?}");
            }
        }
    }
}
