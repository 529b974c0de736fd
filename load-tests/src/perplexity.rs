//! How well does each format of the model predict a text, here and in llama.cpp?
//!
//! Perplexity as `llama-perplexity` has it, over the same file, the same windows and the same positions: the text's tokens
//! are cut into windows of 512 that know nothing of each other, and of each the second half is scored, so that every scored
//! token has 256 before it at least. What differs is then arithmetic alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use rekindle::kernels::isa::Isa;
use rekindle::kernels::memory::Arena;
use rekindle::model::decoder::{BLOCK_SIZE, Compute, Decoder};
use rekindle::model::tokenizer::Tokenizer;
use rekindle::model::weights::WeightFile;
use rekindle::model::{Batch, Logits, Model, SequenceRows};
use rekindle::types::{BlockId, KvDtype, TokenCount, TokenId};

use crate::compare::peer::{Level, Peer};
use crate::numbers::figure;
use crate::process;
use crate::report::{Bound, Limit, Report, Table};

/// Tokens of a window, and those at its front that are only read.
const WINDOW: usize = 512;
const CONTEXT: usize = WINDOW / 2;
/// Rows whose logits are scored: the window's last one would predict a token of the next.
const SCORED: std::ops::Range<usize> = CONTEXT..WINDOW - 1;
/// The most that perplexities may differ.
const LIMIT_PERCENT: f64 = 0.5;
/// What a file is made into to know its exact perplexity: every weight as it is, multiplied by rows as they are.
const EXACT: &str = "F32";

#[derive(clap::Parser)]
pub struct Args {
    /// Formats to make of the model, as `llama-quantize` names them
    #[arg(default_values = ["Q4_1", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q4_K_M", "Q6_K", "F16", "BF16", "F32"])]
    formats: Vec<String>,
    /// The text to predict
    #[arg(long, default_value = "load-tests/text/alice.txt")]
    text: PathBuf,
    /// Read only this many windows of 512 tokens
    #[arg(long, default_value_t = usize::MAX)]
    windows: usize,
}

/// What one program made of a text.
struct Scored {
    perplexity: f64,
    tokens: usize,
    seconds: f64,
}

pub fn measure(model: &Path, args: &Args) -> anyhow::Result<Report> {
    let peer = Peer::ready(&[Level::Native])?;
    let mut rows = Vec::new();
    let mut bounds = Vec::new();
    for format in &args.formats {
        let file = peer.file(model, format)?;
        let theirs = theirs(&peer, &file, args)?;
        let ours = ours(&file, args)?;
        ensure!(
            ours.tokens == theirs.tokens,
            "{format}: {} tokens scored here and {} there: not the same text",
            ours.tokens,
            theirs.tokens
        );
        let percent = percent_above(&ours, &theirs);
        eprintln!("[perplexity] {format}: {:.4}, llama.cpp {:.4}", ours.perplexity, theirs.perplexity);
        // Where the two disagree, the same weights without any rounding of rows say who is nearer.
        let exact = if percent.abs() > LIMIT_PERCENT { Some(exact(&peer, &file, args)?) } else { None };
        rows.push(vec![
            format.clone(),
            format!("{:.4}", ours.perplexity),
            format!("{:.4}", theirs.perplexity),
            format!("{percent:+.3}"),
            exact.as_ref().map_or_else(|| "–".to_owned(), |exact| format!("{:.4}", exact.perplexity)),
            ours.tokens.to_string(),
            figure(ours.seconds),
            figure(theirs.seconds),
        ]);
        bounds.extend(bounds_of(format, &ours, &theirs, exact.as_ref()));
    }
    let columns = vec![
        "format",
        "ours",
        "llama.cpp",
        "difference %",
        "exact",
        "tokens scored",
        "seconds, ours",
        "seconds, llama.cpp",
    ];
    Ok(Report {
        name: "perplexity",
        title: "Perplexity beside llama.cpp",
        tables: Table::only(columns, rows),
        bounds,
        notes: vec![
            format!(
                "The text is {}, in windows of {WINDOW} tokens; scored are the last {} of each. Lower is better; an instruct \
                 model is worse at a book than the model it was made from.",
                args.text.display(),
                SCORED.len()
            ),
            format!(
                "Every format but the model's own was made from it by `llama-quantize`, so the table says nothing of how \
                 good a format is, only that both compute the same from it. Built from {}.",
                Peer::version()
            ),
            "Exact: where the two differ by more than the bound, llama.cpp's own figure for the same weights as f32, which \
             rounds neither weights nor rows; we must then be within the bound of it, and nearer than llama.cpp is."
                .to_owned(),
            "The seconds include loading, and are no measure of speed: see `compare`.".to_owned(),
        ],
        raw: None,
    })
}

/// By how many percent ours is larger.
fn percent_above(ours: &Scored, other: &Scored) -> f64 {
    (ours.perplexity / other.perplexity - 1.0) * 100.0
}

fn bounds_of(format: &str, ours: &Scored, theirs: &Scored, exact: Option<&Scored>) -> Vec<Bound> {
    let at_most = |what: String, measured: f64, limit| Bound { what, measured, limit: Limit::AtMost(limit), unit: "%" };
    let Some(exact) = exact else {
        let what = format!("{format}, from llama.cpp's either way");
        return vec![at_most(what, percent_above(ours, theirs).abs(), LIMIT_PERCENT)];
    };
    let [ours, theirs] = [ours, theirs].map(|scored| percent_above(scored, exact).abs());
    vec![
        at_most(format!("{format}, from the exact one either way"), ours, LIMIT_PERCENT),
        at_most(format!("{format}, from the exact one beside llama.cpp's distance from it"), ours, theirs),
    ]
}

/// The perplexity of the very weights of a file.
fn exact(peer: &Peer, file: &Path, args: &Args) -> anyhow::Result<Scored> {
    let part = file.with_extension(EXACT);
    peer.convert(file, &part, EXACT)?;
    let scored = theirs(peer, &part, args);
    std::fs::remove_file(&part).with_context(|| part.display().to_string())?;
    scored
}

/// Runs `llama-perplexity`.
fn theirs(peer: &Peer, file: &Path, args: &Args) -> anyhow::Result<Scored> {
    let mut command = Command::new(peer.program(Level::Native, "llama-perplexity"));
    command.arg("-m").arg(file).arg("-f").arg(&args.text).arg("-c").arg(WINDOW.to_string());
    command.arg("-t").arg(std::thread::available_parallelism()?.to_string());
    if args.windows < usize::MAX {
        command.arg("--chunks").arg(args.windows.to_string());
    }
    let (said, usage) = process::run(&mut command)?;
    let (perplexity, windows) = read(&said).with_context(|| format!("llama-perplexity said: {said}"))?;
    Ok(Scored { perplexity, tokens: windows * SCORED.len(), seconds: usage.wall_s })
}

/// The last estimate and the number of its window, out of a line such as `[1]19.5,[2]20.1,`.
fn read(said: &str) -> Option<(f64, usize)> {
    let estimates = said.lines().find(|line| line.starts_with('['))?;
    let (window, perplexity) = estimates.trim_end_matches(',').rsplit_once('[')?.1.split_once(']')?;
    Some((perplexity.parse().ok()?, window.parse().ok()?))
}

fn ours(file: &Path, args: &Args) -> anyhow::Result<Scored> {
    let started = Instant::now();
    let tokens = tokens_of(file, &args.text)?;
    let mut decoder = load(file)?;
    let blocks = TokenCount(WINDOW as u32).blocks(BLOCK_SIZE).0;
    let arena = Arc::new(Arena::new(blocks as usize, decoder.spec().kv.block_bytes(BLOCK_SIZE))?);
    let table: Vec<BlockId> = (0..blocks).map(BlockId).collect();
    let sampled: Vec<usize> = SCORED.collect();
    let mut logits = Logits::default();
    let (mut surprise, mut scored) = (0.0, 0);
    for window in tokens.chunks_exact(WINDOW).take(args.windows) {
        let sequences = [SequenceRows { first_row: 0, rows: WINDOW, context: 0, table: &table }];
        let batch = Batch { tokens: window, sequences: &sequences, sampled: &sampled };
        decoder.forward(&batch, &arena, &mut logits)?;
        for (index, row) in SCORED.enumerate() {
            surprise += surprise_at(logits.row(index), window[row + 1]);
            scored += 1;
        }
    }
    ensure!(scored > 0, "{} has less than {WINDOW} tokens", args.text.display());
    let perplexity = (surprise / f64::from(scored)).exp();
    Ok(Scored { perplexity, tokens: scored as usize, seconds: started.elapsed().as_secs_f64() })
}

/// A text as a model's file reads it.
pub fn tokens_of(file: &Path, text: &Path) -> anyhow::Result<Vec<TokenId>> {
    let content = std::fs::read_to_string(text).with_context(|| text.display().to_string())?;
    // As llama.cpp reads it: without the last line's end.
    let content = content.strip_suffix('\n').unwrap_or(&content);
    let weights = WeightFile::open(file)?;
    let tokenizer = Tokenizer::from_metadata(weights.metadata())?;
    Ok(tokenizer.tokenize(content, &[], 0).into_iter().map(|(token, _)| token).collect())
}

fn load(file: &Path) -> anyhow::Result<Decoder> {
    let compute = Compute { threads: std::thread::available_parallelism()?.get(), isa: Isa::best(), kv: KvDtype::F16 };
    Decoder::load(file, compute, &mut |_, _| {}).with_context(|| format!("{} can't be loaded", file.display()))
}

/// Minus the log probability of a token.
pub fn surprise_at(logits: &[f32], token: TokenId) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - top).exp()).sum();
    sum.ln() + top - f64::from(logits[token.0 as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_estimate_is_read_and_its_window() {
        assert_eq!(read("0.47 minutes\n[1]18.9348,[2]21.0226,\n\n"), Some((21.0226, 2)));
        assert_eq!(read("[1]18.9348,"), Some((18.9348, 1)));
        assert_eq!(read("no estimate"), None);
    }

    #[test]
    fn where_llama_cpp_is_further_from_the_exact_value_only_our_own_distance_counts() {
        let [ours, theirs, exact] =
            [20.02, 20.2, 20.0].map(|perplexity| Scored { perplexity, tokens: 1, seconds: 1.0 });
        let holds = |bounds: Vec<Bound>| bounds.iter().all(Bound::holds);
        assert!(!holds(bounds_of("Q4_K_M", &ours, &theirs, None)));
        assert!(holds(bounds_of("Q4_K_M", &ours, &theirs, Some(&exact))));
        assert!(!holds(bounds_of("Q4_K_M", &theirs, &ours, Some(&exact))), "the other way round");
    }

    #[test]
    fn what_is_certain_surprises_nobody_and_two_equals_do_by_half() {
        assert!(surprise_at(&[100.0, 0.0], TokenId(0)) < 1e-9);
        assert!((surprise_at(&[3.0, 3.0], TokenId(1)) - 2.0_f64.ln()).abs() < 1e-12);
    }
}
