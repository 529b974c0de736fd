//! How often is the likeliest next token another one, where keys and values are stored in fewer bits?
//!
//! On a page of a book. The long measurement, with perplexity, is `load-tests kv-dtypes`. Even f32 is not always at one with
//! f16: linear layers round rows to int8, and the least change turns some of these roundings.

use super::*;
use crate::kernels::cold::ColdForm;
use crate::model::tokenizer::Tokenizer;

const TOKENS: usize = 768;
/// Tokens of a step.
const CHUNK: usize = 64;

fn page() -> Vec<u32> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("load-tests/text/alice.txt");
    let file = WeightFile::open(&real_model_path()).unwrap();
    let tokenizer = Tokenizer::from_metadata(file.metadata()).unwrap();
    let text: String = std::fs::read_to_string(path).unwrap().chars().take(6 * TOKENS).collect();
    let tokens = tokenizer.tokenize(&text, &[], 0).into_iter().map(|(token, _)| token.0);
    let tokens: Vec<u32> = tokens.take(TOKENS).collect();
    assert_eq!(tokens.len(), TOKENS);
    tokens
}

/// The form below the device, of the device's.
type Down = fn(KvLayout) -> ColdForm;

/// The likeliest token after each of the page's, from the second step on. What a step stored then goes `down` and up again.
fn likeliest(dtype: KvDtype, down: Down, tokens: &[u32]) -> Vec<usize> {
    let model = Decoder::load(&real_model_path(), Compute { kv: dtype, ..compute() }, &mut |_, _| {}).unwrap();
    let cold = down(model.spec().kv.layout());
    let mut bench = Bench::new(&model);
    let host = Arena::new(1, cold.block_bytes(bench.arena.block_bytes())).unwrap();
    let mut running = bench.start(tokens);
    let mut likeliest = Vec::new();
    while running.cached < tokens.len() {
        let first = running.table.len();
        let logits = bench.step(&mut [(&mut running, CHUNK)]);
        if first > 0 {
            let best = |row: &Vec<f32>| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
            likeliest.extend(logits.iter().map(best));
        }
        for block in &running.table[first..] {
            let below = cold.offload(&bench.arena, block.0, &host, 0);
            assert_eq!(cold.reload(&host, 0, &bench.arena, block.0), below);
        }
    }
    likeliest
}

#[test]
fn kv_in_fewer_bits_seldom_changes_the_likeliest_token() {
    let tokens = page();
    let same = |_| ColdForm::Same;
    let wanted = likeliest(KvDtype::F16, same, &tokens);
    let int8 = |layout| ColdForm::int8(layout).unwrap();
    let forms: [(&str, KvDtype, Down, f64); 5] = [
        ("f32", KvDtype::F32, same, 0.93),
        ("bf16", KvDtype::Bf16, same, 0.93),
        ("int8", KvDtype::Int8, same, 0.92),
        ("fp8", KvDtype::Fp8, same, 0.88),
        ("cold int8", KvDtype::F16, int8, 0.93),
    ];
    for (name, dtype, down, least) in forms {
        let found = likeliest(dtype, down, &tokens);
        let agree = found.iter().zip(&wanted).filter(|(ours, wanted)| ours == wanted).count();
        let share = agree as f64 / wanted.len() as f64;
        println!("{name}: {share:.4}");
        assert!(share >= least, "{name}: {share} of the likeliest tokens are f16's");
        assert!(share < 1.0, "{name}: nothing is stored in another way");
    }
}
