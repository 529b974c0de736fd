//! The `load-tests` program: how fast and how frugal is the real server on this machine?
//!
//! Each command starts its own server, measures one thing, prints a table, and keeps it in `load-tests/results/`. A bound
//! that does not hold, or an answer that is not what the measurement is about, ends it with a status other than 0.

mod client;
mod compare;
mod copying;
mod dashboard;
mod eviction;
mod idle;
mod kv_dtypes;
mod numbers;
mod overhead;
mod perplexity;
mod process;
mod report;
mod server;
mod text;
mod throughput;
mod ttft;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use report::Report;

/// Measures the real server on this machine.
#[derive(Parser)]
#[command(name = "load-tests", version, infer_subcommands = true)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What every measurement needs.
#[derive(clap::Args, Clone)]
struct Common {
    /// The server's program; the `rekindle` beside this one if left out
    #[arg(long, global = true, env = "REKINDLE_SERVER")]
    server: Option<PathBuf>,
    /// The model to serve
    #[arg(long, global = true, default_value = "models/SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: PathBuf,
    /// Where the tables are kept
    #[arg(long, global = true, default_value = "load-tests/results")]
    results: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// All measurements of the server, one after another, as they come
    Bench,
    /// Time to first token of a turn whose KV is resident, reloaded from the host, or re-encoded
    Ttft(ttft::Args),
    /// Many conversations of several turns at once, with KV kept between turns and without
    Throughput(throughput::Args),
    /// What the engine itself takes of each step, without the model
    Overhead(overhead::Args),
    /// What copying down in the background costs those who are being answered
    Copying(copying::Args),
    /// What the evictor is worth on traces of real servers
    Eviction(eviction::Args),
    /// What open pages of the dashboard cost the engine
    Dashboard(dashboard::Args),
    /// Memory that idle conversations take
    Idle(idle::Args),
    /// The model and the server beside llama.cpp, which is fetched and built for it
    Compare(compare::Args),
    /// How well the model predicts a text in each format, here and in llama.cpp
    Perplexity(perplexity::Args),
    /// What each dtype of the KV costs in accuracy, and what it saves
    KvDtypes(kv_dtypes::Args),
    /// Fetch and build llama.cpp, as `compare` does by itself, and make files of other formats with it
    Peer(compare::peer::Args),
    /// Our side of `compare`: the model alone, in a process of its own
    #[command(hide = true)]
    Step(compare::step::Args),
}

/// The arguments of a command when none are given.
fn defaults<A: Parser>() -> A {
    A::parse_from([""])
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every bound held.
fn run(cli: Cli) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Runtime::new().context("no async runtime")?;
    let common = &cli.common;
    let keep = |report: anyhow::Result<Report>| report?.keep(&common.results);
    match cli.command {
        Command::Ttft(args) => keep(runtime.block_on(ttft::measure(common, &args))),
        Command::Throughput(args) => keep(runtime.block_on(throughput::measure(common, &args))),
        Command::Overhead(args) => keep(overhead::measure(&args)),
        Command::Copying(args) => keep(runtime.block_on(copying::measure(common, &args))),
        Command::Eviction(args) => keep(eviction::measure(&args)),
        Command::Dashboard(args) => keep(runtime.block_on(dashboard::measure(common, &args))),
        Command::Idle(args) => keep(runtime.block_on(idle::measure(common, &args))),
        Command::Compare(args) => keep(compare::measure(common, &args, &runtime)),
        Command::Perplexity(args) => keep(perplexity::measure(&common.model, &args)),
        Command::KvDtypes(args) => keep(kv_dtypes::measure(&common.model, &args)),
        Command::Peer(args) => compare::peer::set_up(&common.model, &args).map(|()| true),
        Command::Step(args) => compare::step::measure(&common.model, &args).map(|()| true),
        Command::Bench => {
            // One that fails does not hide the others.
            let outcomes = [
                ("overhead", keep(overhead::measure(&defaults()))),
                ("ttft", keep(runtime.block_on(ttft::measure(common, &defaults())))),
                ("throughput", keep(runtime.block_on(throughput::measure(common, &defaults())))),
                ("copying", keep(runtime.block_on(copying::measure(common, &defaults())))),
                ("idle", keep(runtime.block_on(idle::measure(common, &defaults())))),
            ];
            println!("\n# All\n");
            let mut all_held = true;
            for (name, outcome) in outcomes {
                all_held &= matches!(outcome, Ok(true));
                match outcome {
                    Ok(true) => println!("{name}: measured, every bound holds"),
                    Ok(false) => println!("{name}: measured, A BOUND DOES NOT HOLD"),
                    Err(error) => println!("{name}: FAILED: {error:#}"),
                }
            }
            Ok(all_held)
        }
    }
}
