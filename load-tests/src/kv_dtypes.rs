//! What does each dtype of the KV cost in accuracy, and what does it save?
//!
//! The same model over the same text, with keys and values stored in each form: perplexity, and how often the likeliest next
//! token is the one that f16 gives. Teacher-forced: every position is read after the text itself, so that one other choice
//! says nothing about the next. A window is long and read in steps, so that almost all that a token attends to was stored
//! before, as in a conversation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use rekindle::kernels::cold::ColdForm;
use rekindle::kernels::isa::Isa;
use rekindle::kernels::memory::Arena;
use rekindle::model::decoder::{BLOCK_SIZE, Compute, Decoder};
use rekindle::model::{Batch, KvShape, Logits, Model, SequenceRows};
use rekindle::types::{BlockId, KvDtype, TokenCount, TokenId};

use crate::numbers::figure;
use crate::perplexity::{surprise_at, tokens_of};
use crate::report::{Bound, Limit, Report, Table};

/// Tokens of a step.
const STEP: usize = 256;
/// The most of f16's bytes that int8 may take.
const INT8_BYTES_PERCENT: f64 = 53.0;

#[derive(clap::Parser)]
pub struct Args {
    /// The text to predict
    #[arg(long, default_value = "load-tests/text/alice.txt")]
    text: PathBuf,
    /// Tokens of a window, a multiple of 256; of each all but the first 256 are scored
    #[arg(long, default_value_t = 2048)]
    window: usize,
    /// Read only this many windows
    #[arg(long, default_value_t = usize::MAX)]
    windows: usize,
}

/// How keys and values are stored.
#[derive(Clone, Copy)]
struct Form {
    name: &'static str,
    dtype: KvDtype,
    /// All that a step attends to, but for its own tokens, has been to the host as int8 and back.
    through_int8: bool,
    /// By how many percent its perplexity may differ from f16's, and where the likeliest token must be f16's, at the least.
    limits: (f64, f64),
}

/// f16 first: the others are held to it.
const FORMS: [Form; 6] = [
    Form { name: "f16", dtype: KvDtype::F16, through_int8: false, limits: (0.0, 100.0) },
    Form { name: "f32", dtype: KvDtype::F32, through_int8: false, limits: (0.1, 95.0) },
    Form { name: "bf16", dtype: KvDtype::Bf16, through_int8: false, limits: (0.5, 95.0) },
    Form { name: "int8", dtype: KvDtype::Int8, through_int8: false, limits: (0.5, 94.0) },
    Form { name: "fp8", dtype: KvDtype::Fp8, through_int8: false, limits: (3.0, 90.0) },
    Form { name: "f16, cold int8", dtype: KvDtype::F16, through_int8: true, limits: (0.5, 94.0) },
];

/// What one form made of a text.
struct Scored {
    perplexity: f64,
    /// The likeliest token after each scored position.
    likeliest: Vec<u32>,
    kv: KvShape,
    /// Bytes of a block that is at rest.
    block_bytes: usize,
    seconds: f64,
}

pub fn measure(model: &Path, args: &Args) -> anyhow::Result<Report> {
    ensure!(args.window > STEP && args.window.is_multiple_of(STEP), "`--window` is no multiple of {STEP} beyond it");
    let tokens = tokens_of(model, &args.text)?;
    let windows: Vec<&[TokenId]> = tokens.chunks_exact(args.window).take(args.windows).collect();
    ensure!(!windows.is_empty(), "{} has less than {} tokens", args.text.display(), args.window);
    let mut scored = Vec::new();
    for form in FORMS {
        let found = score(model, form, &windows)?;
        eprintln!("[kv-dtypes] {}: {:.4} in {} s", form.name, found.perplexity, figure(found.seconds));
        scored.push(found);
    }
    let positions = scored[0].likeliest.len();
    let (mut rows, mut bounds) = (Vec::new(), Vec::new());
    for (form, found) in FORMS.iter().zip(&scored) {
        let percent = (found.perplexity / scored[0].perplexity - 1.0) * 100.0;
        let same = found.likeliest.iter().zip(&scored[0].likeliest).filter(|(ours, f16)| ours == f16).count();
        let agreement = same as f64 / positions as f64 * 100.0;
        let bytes = found.block_bytes as f64 / scored[0].block_bytes as f64 * 100.0;
        rows.push(vec![
            form.name.to_owned(),
            (found.block_bytes / BLOCK_SIZE.0 as usize).to_string(),
            format!("{bytes:.1}"),
            format!("{:.4}", found.perplexity),
            format!("{percent:+.3}"),
            format!("{agreement:.2}"),
        ]);
        if form.name == "f16" {
            continue;
        }
        let (most, least) = form.limits;
        let bound = |what: String, measured, limit| Bound { what, measured, limit, unit: "%" };
        let name = form.name;
        bounds.push(bound(format!("{name}, perplexity from f16's either way"), percent.abs(), Limit::AtMost(most)));
        bounds.push(bound(format!("{name}, likeliest token is f16's"), agreement, Limit::AtLeast(least)));
        if form.dtype == KvDtype::Int8 || form.through_int8 {
            bounds.push(bound(format!("{name}, bytes of f16's"), bytes, Limit::AtMost(INT8_BYTES_PERCENT)));
        }
    }
    let columns =
        vec!["KV", "bytes a token", "% of f16's", "perplexity", "difference %", "likeliest token as with f16, %"];
    let KvShape { layers, kv_heads, head_dim, .. } = scored[0].kv;
    Ok(Report {
        name: "kv-dtypes",
        title: "What each dtype of the KV costs",
        tables: Table::only(columns, rows),
        bounds,
        notes: vec![
            format!(
                "The text is {}, {} windows of {} tokens, read in steps of {STEP}; scored are {positions} positions: all but \
                 the first {STEP} of each window. Each position is read after the text itself, whatever was likeliest before.",
                args.text.display(),
                windows.len(),
                args.window
            ),
            format!(
                "The model is {}: {layers} layers, {kv_heads} KV heads, {head_dim} wide.",
                model.file_name().unwrap_or_default().to_string_lossy()
            ),
            "Cold int8: the device stores f16, and after each step what it stored went to the host tier's int8 and back, \
             so that every token attends to at most the last 256 tokens as they were, and to all before as they came back. \
             Its bytes are those of the host and disk tiers."
                .to_owned(),
            "Even f32 is not always at one with f16: the linear layers round rows to int8, and the least change turns some \
             of these roundings. What f32 and f16 differ by is what cannot be told from none."
                .to_owned(),
        ],
        raw: None,
    })
}

fn score(model: &Path, form: Form, windows: &[&[TokenId]]) -> anyhow::Result<Scored> {
    let started = Instant::now();
    let compute = Compute { threads: std::thread::available_parallelism()?.get(), isa: Isa::best(), kv: form.dtype };
    let mut decoder = Decoder::load(model, compute, &mut |_, _| {})
        .with_context(|| format!("{} can't be loaded", model.display()))?;
    let kv = decoder.spec().kv;
    let window = windows.first().map_or(0, |window| window.len());
    let blocks = TokenCount(u32::try_from(window)?).blocks(BLOCK_SIZE).0;
    let arena = Arc::new(Arena::new(blocks as usize, kv.block_bytes(BLOCK_SIZE))?);
    let cold = if form.through_int8 { ColdForm::int8(kv.layout()) } else { Some(ColdForm::Same) };
    let cold = cold.context("only f16 becomes int8")?;
    let block_bytes = cold.block_bytes(arena.block_bytes());
    let host = Arena::new(1, block_bytes)?;
    let table: Vec<BlockId> = (0..blocks).map(BlockId).collect();
    let mut logits = Logits::default();
    let (mut surprise, mut likeliest) = (0.0, Vec::new());
    for window in windows {
        for (step, tokens) in window.chunks_exact(STEP).enumerate() {
            let context = step * STEP;
            // The window's last row would predict a token of the next.
            let last = STEP - usize::from(context + STEP == window.len());
            let sampled: Vec<usize> = if step == 0 { Vec::new() } else { (0..last).collect() };
            let sequences = [SequenceRows { first_row: 0, rows: STEP, context, table: &table }];
            decoder.forward(&Batch { tokens, sequences: &sequences, sampled: &sampled }, &arena, &mut logits)?;
            for row in sampled {
                surprise += surprise_at(logits.row(row), window[context + row + 1]);
                likeliest.push(likeliest_of(logits.row(row)));
            }
            if form.through_int8 {
                for block in &table[context / BLOCK_SIZE.0 as usize..][..STEP / BLOCK_SIZE.0 as usize] {
                    cold.offload(&arena, block.0, &host, 0);
                    cold.reload(&host, 0, &arena, block.0);
                }
            }
        }
    }
    let perplexity = (surprise / likeliest.len() as f64).exp();
    Ok(Scored { perplexity, likeliest, kv, block_bytes, seconds: started.elapsed().as_secs_f64() })
}

/// The first of the highest.
fn likeliest_of(logits: &[f32]) -> u32 {
    let (best, _) = (0..)
        .zip(logits)
        .fold((0, f32::NEG_INFINITY), |best, (token, logit)| if *logit > best.1 { (token, *logit) } else { best });
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_is_the_first_of_the_highest() {
        assert_eq!(likeliest_of(&[0.5, 2.0, -1.0, 2.0]), 1);
    }

    #[test]
    fn the_others_are_held_to_f16() {
        assert_eq!((FORMS[0].dtype, FORMS[0].through_int8), (KvDtype::F16, false));
        assert!(
            KvDtype::ALL.iter().all(|dtype| FORMS.iter().any(|form| form.dtype == *dtype)),
            "each dtype is measured"
        );
    }
}
