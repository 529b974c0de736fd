//! Do the kernels give what the file's weights say, and all the same bits?

use proptest::prelude::*;

use super::super::activations::Activations;
use super::super::{Linear, Source, Update};
use super::pack::{Block, Encoding, decode};
use super::*;
use crate::kernels::SharedOut;
use crate::kernels::huge_pages::HugePages;
use crate::kernels::threads::Threads;

const ENCODINGS: [Encoding; 7] =
    [Encoding::Q4_0, Encoding::Q4_1, Encoding::Q5_0, Encoding::Q5_1, Encoding::Q8_0, Encoding::Q4K, Encoding::Q5K];

/// Random numbers out of a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// -1..1.
    fn float(&mut self) -> f32 {
        self.next() as f32 / (1_u32 << 30) as f32 - 1.0
    }
}

/// Rows as a file might have them: any quants, scales of a usual size.
fn file(encoding: Encoding, outputs: usize, inputs: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..outputs * encoding.row_bytes(inputs)).map(|_| random.next() as u8).collect();
    let block_bytes = encoding.row_bytes(256) / if matches!(encoding, Encoding::Q4K | Encoding::Q5K) { 1 } else { 8 };
    for block in bytes.chunks_exact_mut(block_bytes) {
        block[..2].copy_from_slice(&f16::from_f32(random.float() / 50.0).to_le_bytes());
        if !matches!(encoding, Encoding::Q4_0 | Encoding::Q5_0 | Encoding::Q8_0) {
            block[2..4].copy_from_slice(&f16::from_f32(random.float() / 10.0).to_le_bytes());
        }
    }
    bytes
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Each kernel that this machine can run, with the rows of its tiles.
fn kernels() -> Vec<(&'static str, Isa, Kernel)> {
    let mut kernels: Vec<(&'static str, Isa, Kernel)> = Vec::new();
    for isa in Isa::available() {
        kernels.push(("a chosen one", isa, kernel(isa).0));
        // Its tiles are of the same size.
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Avx512 {
            assert_eq!(vnni::TILE, avx512::TILE);
            kernels.push(("VNNI in 256 bits", isa, vnni::avx512vl::multiply));
        }
    }
    kernels
}

/// All rows by all panels, with this kernel.
fn multiply(kernel: Kernel, panels: &Panels, input: &Activations, update: Update, out: &mut [f32]) {
    let (stride, shared) = (panels.outputs, SharedOut::new(out));
    for tile in 0..input.rows().div_ceil(input.tile_rows()) {
        let row = tile * input.tile_rows();
        let out = Out { out: shared, row, panel: 0, first: 0, outputs: panels.outputs, stride, update };
        // SAFETY: the kernel is one that this machine can run, and all of `out` is this thread's.
        unsafe { kernel(panels, 0..panels.panels(), &input.tile(tile), &out) };
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_kernel_gives_the_same_bits_and_those_are_the_product_of_what_the_file_holds(
        encoding in proptest::sample::select(&ENCODINGS),
        rows in 1..20_usize,
        outputs in 1..70_usize,
        columns in 1..8_usize,
        seed in any::<u64>(),
    ) {
        let inputs = if matches!(encoding, Encoding::Q4K | Encoding::Q5K) { columns.min(2) * 256 } else { columns * BLOCK };
        let mut random = Random(seed);
        let bytes = file(encoding, outputs, inputs, &mut random);
        let values: Vec<f32> = (0..rows * inputs).map(|_| random.float() * 3.0).collect();
        let before: Vec<f32> = (0..rows * outputs).map(|_| random.float()).collect();
        let mut threads = Threads::new(2).unwrap();
        let panels = Panels::pack((&mut threads, &mut HugePages::default()), outputs, inputs, encoding, &bytes);
        let mut first: Option<Vec<u32>> = None;
        for (name, isa, kernel) in kernels() {
            let mut input = Activations::new(isa, 2);
            input.fill(&mut threads, rows, inputs, panels.wants(isa), |row, out| {
                out.copy_from_slice(&values[row * inputs..][..inputs]);
            });
            let mut out = vec![f32::NAN; rows * outputs];
            multiply(kernel, &panels, &input, Update::Set, &mut out);
            let mut added = before.clone();
            multiply(kernel, &panels, &input, Update::Add, &mut added);
            let sums: Vec<f32> = before.iter().zip(&out).map(|(before, out)| before + out).collect();
            prop_assert_eq!(bits(&added), bits(&sums), "{} of {}", name, isa);
            match &first {
                Some(first) => prop_assert_eq!(first, &bits(&out), "{} of {}", name, isa),
                None => first = Some(bits(&out)),
            }
            // In f64, from the quants of the file and of the rows.
            for row in 0..rows {
                let tile = input.tile(row / input.tile_rows());
                let place = row % input.tile_rows();
                for output in [0, outputs / 2, outputs - 1] {
                    let (mut wanted, mut size) = (0.0, 0.0);
                    let file_row = &bytes[output * encoding.row_bytes(inputs)..][..encoding.row_bytes(inputs)];
                    for block in 0..inputs / BLOCK {
                        let decoded = decode(encoding, file_row, block);
                        let scale = f64::from(tile.scales[block * tile.rows + place]);
                        for (column, &quant) in decoded.quants.iter().enumerate() {
                            let zero = panels.form.zero().cast_signed();
                            let weight = f64::from(quant - zero) * decoded.scale.to_f64() + decoded.min.to_f64();
                            let product = weight * scale * f64::from(tile.quant(place, block, column));
                            wanted += product;
                            size += product.abs();
                        }
                    }
                    let found = f64::from(out[row * outputs + output]);
                    prop_assert!((found - wanted).abs() <= 1e-5 * (size + 1e-3), "{found} for {wanted}");
                }
            }
        }
    }

    #[test]
    fn a_row_of_an_embedding_is_what_candle_dequantises(
        encoding in proptest::sample::select(&ENCODINGS),
        outputs in 1..40_usize,
        seed in any::<u64>(),
    ) {
        let inputs = 256;
        let bytes = file(encoding, outputs, inputs, &mut Random(seed));
        let panels = Panels::pack((&mut Threads::new(1).unwrap(), &mut HugePages::default()), outputs, inputs, encoding, &bytes);
        let wanted = dequantised(encoding, &bytes, outputs, inputs);
        let mut row = vec![0.0; inputs];
        for at in 0..outputs {
            panels.copy_row(at, &mut row);
            let file_row = &bytes[at * encoding.row_bytes(inputs)..][..encoding.row_bytes(inputs)];
            for (column, (found, wanted)) in row.iter().zip(&wanted[at * inputs..]).enumerate() {
                let Block { scale, min, .. } = decode(encoding, file_row, column / BLOCK);
                // Scales of K-quants are multiplied out and rounded to f16.
                let rounding = if matches!(encoding, Encoding::Q4K | Encoding::Q5K) { 5e-4 } else { 1e-6 };
                let largest = 31.0 * scale.to_f32().abs() + min.to_f32().abs();
                prop_assert!((found - wanted).abs() <= rounding * largest + 1e-6, "{found} for {wanted}");
            }
        }
    }
}

/// What an independent reader makes of the same bytes.
fn dequantised(encoding: Encoding, bytes: &[u8], outputs: usize, inputs: usize) -> Vec<f32> {
    use candle_core::quantized::{GgmlDType, ggml_file};
    let dtype = match encoding {
        Encoding::Q4_0 => GgmlDType::Q4_0,
        Encoding::Q4_1 => GgmlDType::Q4_1,
        Encoding::Q5_0 => GgmlDType::Q5_0,
        Encoding::Q5_1 => GgmlDType::Q5_1,
        Encoding::Q8_0 => GgmlDType::Q8_0,
        Encoding::Q4K => GgmlDType::Q4K,
        Encoding::Q5K => GgmlDType::Q5K,
    };
    // Candle reads the bytes as blocks, which are aligned to two bytes.
    let mut aligned = vec![0_u16; bytes.len().div_ceil(2)];
    let aligned = bytemuck::cast_slice_mut::<_, u8>(&mut aligned);
    aligned[..bytes.len()].copy_from_slice(bytes);
    let cpu = candle_core::Device::Cpu;
    let tensor = ggml_file::qtensor_from_ggml(dtype, &aligned[..bytes.len()], vec![outputs, inputs], &cpu).unwrap();
    tensor.dequantize(&cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn the_largest_and_the_smallest_quants_saturate_nowhere() {
    let inputs = 64;
    for encoding in [Encoding::Q8_0, Encoding::Q4_0, Encoding::Q4_1, Encoding::Q5_0, Encoding::Q5_1] {
        for extreme in [0x80, 0x7f, 0x81, 0xff, 0x00] {
            let one = f16::ONE.to_le_bytes();
            let mut bytes = vec![extreme; 16 * encoding.row_bytes(inputs)];
            let block_bytes = encoding.row_bytes(inputs) / 2;
            for block in bytes.chunks_exact_mut(block_bytes) {
                block[..2].copy_from_slice(&one);
                if matches!(encoding, Encoding::Q4_1 | Encoding::Q5_1) {
                    block[2..4].copy_from_slice(&one);
                }
            }
            let mut threads = Threads::new(1).unwrap();
            let panels = Panels::pack((&mut threads, &mut HugePages::default()), 16, inputs, encoding, &bytes);
            // A row alone, and rows that make a tile.
            for (rows, value) in [(1, 1.0), (1, -1.0), (3, 1.0), (3, -1.0)] {
                for (name, isa, kernel) in kernels() {
                    let mut input = Activations::new(isa, 1);
                    input.fill(&mut threads, rows, inputs, panels.wants(isa), |_, out| out.fill(value));
                    let mut out = vec![0.0; rows * 16];
                    multiply(kernel, &panels, &input, Update::Set, &mut out);
                    let mut weights = vec![0.0; inputs];
                    panels.copy_row(3, &mut weights);
                    let wanted: f32 = weights.iter().map(|weight| weight * value).sum();
                    for out in out.chunks_exact(16) {
                        assert!((out[3] - wanted).abs() <= 1e-3, "{name} of {isa}: {} for {wanted}", out[3]);
                    }
                }
            }
        }
    }
}

#[test]
fn quantising_keeps_every_value_within_half_a_step() {
    let (outputs, inputs) = (21, 64);
    let mut random = Random(5);
    let values: Vec<f32> = (0..outputs * inputs).map(|_| random.float()).collect();
    let mut threads = Threads::new(2).unwrap();
    let panels = Panels::quantise((&mut threads, &mut HugePages::default()), outputs, inputs, |row, out| {
        out.copy_from_slice(&values[row * inputs..][..inputs]);
        Ok::<_, ()>(())
    })
    .unwrap();
    let mut row = vec![0.0; inputs];
    for at in 0..outputs {
        panels.copy_row(at, &mut row);
        let largest = values[at * inputs..][..inputs].iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        for (found, wanted) in row.iter().zip(&values[at * inputs..]) {
            assert!((found - wanted).abs() <= largest / 127.0 * 0.55, "{found} for {wanted}");
        }
    }
    let failed = Panels::quantise((&mut threads, &mut HugePages::default()), 40, 32, |row, _| {
        if row == 33 { Err("row 33") } else { Ok(()) }
    });
    assert_eq!(failed.err(), Some("row 33"));
}

#[test]
fn what_is_not_finite_in_a_row_is_not_finite_in_its_outputs_and_touches_no_other_row() {
    let inputs = 64;
    let mut threads = Threads::new(1).unwrap();
    let bytes = file(Encoding::Q4_1, 20, inputs, &mut Random(3));
    for isa in Isa::available() {
        let mut layer = Linear::new(isa, inputs);
        layer
            .push::<()>((&mut threads, &mut HugePages::default()), 20, Source::Blocks(Encoding::Q4_1, &bytes))
            .unwrap();
        let mut input = Activations::new(isa, 1);
        input.fill(&mut threads, 3, inputs, layer.wants(), |row, out| {
            out.fill(0.5);
            out[40] = if row == 1 { f32::NAN } else { 0.1 };
        });
        let mut out = vec![0.0; 60];
        layer.multiply(&mut threads, &input, Update::Set, &mut out);
        assert!(out[20..40].iter().all(|value| value.is_nan()), "{isa}");
        assert!(out[..20].iter().chain(&out[40..]).all(|value| value.is_finite()), "{isa}");
    }
}
