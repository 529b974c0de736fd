//! Is a layer one matrix, however many it was made of?

use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::kernels::elementwise::swiglu;

/// Values in -1..1 out of a seed, with some zeros.
fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|index| if index % 17 == 3 { 0.0 } else { next() }).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// In which form a part of a layer is.
#[derive(Clone, Copy, Debug)]
enum Kind {
    F32,
    F16,
    BF16,
    Quantised,
}

/// A layer of parts; and its weights as they were rounded, `[outputs, inputs]`.
fn layer(isa: Isa, inputs: usize, parts: &[(usize, Kind)], seed: u64) -> (Linear, Vec<f32>) {
    let mut threads = Threads::new(2).unwrap();
    let mut memory = HugePages::default();
    let mut layer = Linear::new(isa, inputs);
    let mut weights = Vec::new();
    for (index, &(outputs, kind)) in parts.iter().enumerate() {
        let part = values(seed + index as u64, outputs * inputs);
        let bytes: Vec<u8> = match kind {
            Kind::F32 => part.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Kind::F16 => part.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
            Kind::BF16 => part.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
            Kind::Quantised => Vec::new(),
        };
        let fill = |row: usize, out: &mut [f32]| {
            out.copy_from_slice(&part[row * inputs..][..inputs]);
            Ok::<_, Infallible>(())
        };
        let source = match kind {
            Kind::F32 => Source::F32(&bytes),
            Kind::F16 => Source::F16(&bytes),
            Kind::BF16 => Source::BF16(&bytes),
            Kind::Quantised => Source::Quantise(&fill),
        };
        layer.push((&mut threads, &mut memory), outputs, source).unwrap();
    }
    for row in 0..layer.outputs() {
        let start = weights.len();
        weights.resize(start + inputs, 0.0);
        layer.copy_row(row, &mut weights[start..]);
    }
    (layer, weights)
}

/// The product of some rows.
fn product(layer: &Linear, threads: usize, input: &[f32]) -> Vec<f32> {
    let mut threads = Threads::new(threads).unwrap();
    let mut rows = Activations::new(layer.isa, threads.count());
    let inputs = layer.inputs();
    rows.fill(&mut threads, input.len() / inputs, inputs, layer.wants(), |row, out| {
        out.copy_from_slice(&input[row * inputs..][..inputs]);
    });
    let mut out = vec![f32::NAN; input.len() / inputs * layer.outputs()];
    layer.multiply(&mut threads, &rows, Update::Set, &mut out);
    out
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::F32), Just(Kind::F16), Just(Kind::BF16), Just(Kind::Quantised)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_layer_of_several_matrices_is_their_product_in_f64_and_the_same_bits_with_all_instructions(
        rows in 1..40_usize,
        parts in proptest::collection::vec((1..90_usize, kind()), 1..4),
        blocks in 1..6_usize,
        seed in any::<u64>(),
    ) {
        let inputs = blocks * 32;
        let input = values(seed ^ 7, rows * inputs);
        let mut first: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let (layer, weights) = layer(isa, inputs, &parts, seed);
            let out = product(&layer, 2, &input);
            for (row, out) in out.chunks_exact(layer.outputs()).enumerate() {
                let input = &input[row * inputs..][..inputs];
                for (output, &value) in out.iter().enumerate() {
                    let products = || input.iter().zip(&weights[output * inputs..]).map(|(a, b)| f64::from(a * b));
                    let (wanted, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>() + 1.0);
                    // Quantised rows lose up to half a step of 1/127 each; mostly far less.
                    let quantised = output >= parts[0].0 || matches!(parts[0].1, Kind::Quantised);
                    let tolerance = if quantised { 8e-3 } else { 1e-5 };
                    prop_assert!((f64::from(value) - wanted).abs() <= tolerance * size, "{value} for {wanted}");
                }
            }
            match &first {
                Some(first) => prop_assert_eq!(first, &bits(&out), "{}", isa),
                None => first = Some(bits(&out)),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_gated_layer_gives_the_bits_of_a_product_then_swiglu_then_the_next_input(
        rows in prop_oneof![1..20_usize, 250..270_usize],
        width in 1..140_usize,
        kinds in [kind(), kind()],
        wants in prop_oneof![Just((true, false)), Just((false, true)), Just((true, true))],
        threads in 1..4_usize,
        seed in any::<u64>(),
    ) {
        let (inputs, wants) = (64, Wants { quantised: wants.0, words: wants.0, float: wants.1 });
        let width = if wants.quantised { width.next_multiple_of(32) } else { width };
        let input = values(seed ^ 9, rows * inputs);
        for isa in Isa::available() {
            let (layer, _) = layer(isa, inputs, &[(width, kinds[0]), (width, kinds[1])], seed);
            let mut products = product(&layer, 1, &input);
            swiglu(isa, &mut products, width);
            let mut pool = Threads::new(threads).unwrap();
            let mut wanted = Activations::new(isa, threads);
            wanted.fill(&mut pool, rows, width, wants, |row, out| {
                out.copy_from_slice(&products[row * 2 * width..][..width]);
            });
            let (mut filled, mut gated) = (Activations::new(isa, threads), Activations::new(isa, threads));
            filled.fill(&mut pool, rows, inputs, layer.wants(), |row, out| {
                out.copy_from_slice(&input[row * inputs..][..inputs]);
            });
            layer.multiply_gated(&mut pool, &filled, wants, &mut gated);
            prop_assert!(gated.equals(&wanted), "{}", isa);
        }
    }
}

#[test]
fn a_row_gives_the_same_bits_alone_and_among_7_and_33_on_one_thread_and_on_three() {
    let inputs = 576;
    for isa in Isa::available() {
        for kind in [Kind::F32, Kind::F16, Kind::Quantised] {
            let (layer, _) = layer(isa, inputs, &[(100, kind), (30, kind), (31, Kind::Quantised)], 3);
            let outputs = layer.outputs();
            // Long enough for several blocks of input.
            let total = if isa == Isa::Scalar { 40 } else { 300 };
            let input = values(5, total * inputs);
            let whole = product(&layer, 1, &input);
            assert_eq!(bits(&whole), bits(&product(&layer, 3, &input)), "three threads");
            for rows in [1, 2, 3, 4, 5, 7, 33] {
                for first in [0, 1, 20, total - rows] {
                    if first + rows > total {
                        continue;
                    }
                    let part = product(&layer, 2, &input[first * inputs..][..rows * inputs]);
                    let wanted = &whole[first * outputs..][..rows * outputs];
                    assert_eq!(bits(&part), bits(wanted), "{isa}: {rows} rows at {first}");
                }
            }
        }
    }
}
