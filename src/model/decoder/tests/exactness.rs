//! How far are our logits from those of exact arithmetic, for each kind of weights?
//!
//! Two oracles work in f32 throughout: transformers, whose logits of the shared model are kept in `tests/golden` (see
//! `make_real_logits.py`), and candle's own Llama on the same weights dequantised, which is held to the first one here. So
//! what is measured is our arithmetic alone, not what quantising did to the model.

use candle_core::quantized::GgmlDType;

use super::*;

/// The most that logits may differ: about twice what is measured on the shared model, on any processor, since all kernels
/// give the same bits.
struct Bounds {
    /// Of any logit. They are between -30 and 30.
    worst: f64,
    /// Root of the mean square over the logits of a position, at the worst position.
    rms: f64,
    /// Kullback-Leibler divergence of our distribution from the exact one at the worst position, in nats.
    divergence: f64,
}

/// What differs between two lists of logits of the same positions.
#[derive(Debug, Default)]
struct Difference {
    worst: f64,
    rms: f64,
    divergence: f64,
    positions: usize,
    /// Positions whose likeliest token is the same.
    agreeing: usize,
}

impl Difference {
    /// Takes in a position: logits of some tokens, the likeliest of the exact ones first, and the logarithm of the sum of all
    /// exponentials. What the tokens leave of the whole counts as one more.
    fn add(&mut self, ours: &[f32], our_log_sum: f64, exact: &[f32], exact_log_sum: f64) {
        let pairs = || ours.iter().zip(exact).map(|(ours, exact)| (f64::from(*ours), f64::from(*exact)));
        let squares: f64 = pairs().map(|(ours, exact)| (ours - exact).powi(2)).sum();
        self.rms = self.rms.max((squares / exact.len() as f64).sqrt());
        self.worst = pairs().map(|(ours, exact)| (ours - exact).abs()).fold(self.worst, f64::max);
        let (mut divergence, mut our_rest, mut exact_rest) = (0.0, 1.0, 1.0);
        for (ours, exact) in pairs() {
            let (ours, exact) = (ours - our_log_sum, exact - exact_log_sum);
            divergence += exact.exp() * (exact - ours);
            our_rest -= ours.exp();
            exact_rest -= exact.exp();
        }
        if our_rest > 1e-6 && exact_rest > 1e-6 {
            divergence += exact_rest * (exact_rest / our_rest).ln();
        }
        self.divergence = self.divergence.max(divergence);
        self.positions += 1;
        self.agreeing += usize::from(likeliest(ours) == likeliest(exact));
    }

    fn assert_within(&self, bounds: &Bounds, what: &str) {
        eprintln!("{what}: {self:?}");
        assert!(self.worst < bounds.worst && self.rms < bounds.rms, "{what}: {self:?}");
        assert!(self.divergence < bounds.divergence, "{what}: {self:?}");
        // Two tokens that are all but equal may change places.
        assert!(self.agreeing * 10 >= self.positions * 9, "{what}: {self:?}");
    }
}

fn likeliest(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
}

fn log_sum(logits: &[f32]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    top + logits.iter().map(|logit| (f64::from(*logit) - top).exp()).sum::<f64>().ln()
}

/// What transformers gives for the shared model.
struct Transformers {
    sequences: Vec<Vec<u32>>,
    positions: Vec<Position>,
}

struct Position {
    sequence: usize,
    position: usize,
    log_sum: f32,
    logits: Vec<(usize, f32)>,
}

impl Transformers {
    fn read() -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.logits");
        let bytes = std::fs::read(path).unwrap();
        let mut words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
        let mut next = || words.next().unwrap();
        let sequences = (0..next()).map(|_| (0..next()).map(|_| next()).collect()).collect();
        let positions = 0..next();
        let position = |_| Position {
            sequence: next() as usize,
            position: next() as usize,
            log_sum: f32::from_bits(next()),
            logits: (0..next()).map(|_| (next() as usize, f32::from_bits(next()))).collect(),
        };
        Self { sequences, positions: positions.map(position).collect() }
    }

    /// How logits of every position of every sequence differ from these.
    fn difference(&self, ours: &[Vec<Vec<f32>>]) -> Difference {
        let mut difference = Difference::default();
        for Position { sequence, position, log_sum: exact_log_sum, logits } in &self.positions {
            let Some(row) = ours.get(*sequence).and_then(|rows| rows.get(*position)) else { continue };
            let ours: Vec<_> = logits.iter().map(|(token, _)| row[*token]).collect();
            let exact: Vec<_> = logits.iter().map(|(_, logit)| *logit).collect();
            difference.add(&ours, log_sum(row), &exact, f64::from(*exact_log_sum));
        }
        difference
    }
}

/// Candle's own Llama on the weights of a file, dequantised.
struct Oracle(quantized_llama::ModelWeights);

impl Oracle {
    fn of(weights: &[(String, Tensor)], metadata: &[(&str, &gguf_file::Value)]) -> Self {
        let bytes = weights.iter().map(|(_, weight)| weight.elem_count() * size_of::<f32>()).sum::<usize>();
        // And as much again as names and the tokenizer take, so that it need not grow.
        let mut file = std::io::Cursor::new(Vec::with_capacity(bytes + (16 << 20)));
        write(&mut file, weights, metadata, |_| GgmlDType::F32);
        file.set_position(0);
        let content = gguf_file::Content::read(&mut file).unwrap();
        Self(quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap())
    }

    /// Logits of every position of a new sequence.
    fn logits(&mut self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let mut one = |(position, token): (usize, &u32)| {
            let token = Tensor::new(&[[*token]], &Device::Cpu).unwrap();
            self.0.forward(&token, position).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        tokens.iter().enumerate().map(&mut one).collect()
    }
}

/// All weights of a file, dequantised.
fn weights(file: &mut std::fs::File, content: &gguf_file::Content) -> Vec<(String, Tensor)> {
    let mut weight = |name: &String| {
        let weight = content.tensor(file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
        (name.clone(), weight)
    };
    content.tensor_infos.keys().map(&mut weight).collect()
}

fn write(
    file: &mut (impl std::io::Write + std::io::Seek),
    weights: &[(String, Tensor)],
    metadata: &[(&str, &gguf_file::Value)],
    kind: impl Fn(&Tensor) -> GgmlDType,
) {
    let quantised =
        weights.iter().map(|(name, weight)| (name.as_str(), QTensor::quantize(weight, kind(weight)).unwrap()));
    let quantised: Vec<_> = quantised.collect();
    let tensors: Vec<_> = quantised.iter().map(|(name, weight)| (*name, weight)).collect();
    gguf_file::write(file, metadata, &tensors).unwrap();
}

fn load(path: &Path) -> Decoder {
    Decoder::load(path, compute(), &mut |_, _| {}).unwrap()
}

#[test]
fn the_shared_models_logits_are_those_of_transformers() {
    let golden = Transformers::read();
    let mut bench = Bench::new(real_model());
    let ours: Vec<_> = golden.sequences.iter().map(|tokens| bench.alone(tokens, tokens.len())).collect();
    let difference = golden.difference(&ours);
    assert_eq!(difference.positions, golden.positions.len());
    difference.assert_within(&Bounds { worst: 2.2, rms: 1.2, divergence: 0.03 }, "the shared model");
}

#[test]
fn candles_own_llama_in_f32_is_exact_by_transformers() {
    let golden = Transformers::read();
    let mut file = std::fs::File::open(real_model_path()).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let mut oracle = Oracle::of(&weights(&mut file, &content), &metadata);
    let difference = golden.difference(&[oracle.logits(&golden.sequences[0])]);
    assert!(difference.positions > 5);
    difference.assert_within(&Bounds { worst: 1e-3, rms: 2e-4, divergence: 1e-6 }, "candle's own Llama");
}

/// Writes the shared model anew with matrices of a kind, and compares on that file.
///
/// Where a matrix is no whole number of blocks wide, it has the kind that such files have there: eight bits.
fn compare(kind: GgmlDType, bounds: &Bounds) {
    const TOKENS: usize = 12;
    let mut shared = std::fs::File::open(real_model_path()).unwrap();
    let content = gguf_file::Content::read(&mut shared).unwrap();
    let metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let written = tempfile::NamedTempFile::new().unwrap();
    write(&mut written.as_file(), &weights(&mut shared, &content), &metadata, |weight| match weight.dims() {
        [_, width] if width % kind.block_size() == 0 => kind,
        [_, _] => GgmlDType::Q8_0,
        _ => GgmlDType::F32,
    });
    let tokens = &Transformers::read().sequences[2][..TOKENS];
    let ours = {
        let model = load(written.path());
        Bench::new(&model).alone(tokens, TOKENS)
    };
    let mut written = std::fs::File::open(written.path()).unwrap();
    let content = gguf_file::Content::read(&mut written).unwrap();
    let exact = Oracle::of(&weights(&mut written, &content), &metadata).logits(tokens);
    let mut difference = Difference::default();
    for (ours, exact) in ours.iter().zip(&exact) {
        difference.add(ours, log_sum(ours), exact, log_sum(exact));
    }
    difference.assert_within(bounds, &format!("{kind:?}"));
}

macro_rules! each_kind {
    ($($test:ident: $kind:ident, $worst:literal, $rms:literal, $divergence:literal;)*) => {
        $(#[test]
        fn $test() {
            compare(GgmlDType::$kind, &Bounds { worst: $worst, rms: $rms, divergence: $divergence });
        })*
    };
}

// A test for each, so that they run side by side and a failure names its kind. Quantised weights are multiplied by rows that
// are rounded to int8, and that is their error; those of 16 and 32 bits by rows in f32.
each_kind! {
    q4_0_is_within_its_bounds: Q4_0, 2.2, 1.0, 0.02;
    q4_1_is_within_its_bounds: Q4_1, 3.0, 1.3, 0.02;
    q5_0_is_within_its_bounds: Q5_0, 2.0, 1.0, 0.02;
    q5_1_is_within_its_bounds: Q5_1, 2.2, 1.0, 0.02;
    q8_0_is_within_its_bounds: Q8_0, 2.2, 1.1, 0.02;
    q4_k_is_within_its_bounds: Q4K, 3.2, 1.6, 0.04;
    q5_k_is_within_its_bounds: Q5K, 2.2, 0.9, 0.02;
    q6_k_is_within_its_bounds: Q6K, 3.0, 1.0, 0.02;
    f16_is_within_its_bounds: F16, 0.02, 0.01, 2e-6;
    bf16_is_within_its_bounds: BF16, 0.02, 0.01, 2e-6;
    f32_is_within_its_bounds: F32, 0.02, 0.01, 2e-6;
}
