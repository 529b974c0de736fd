//! Is rekindle faster than llama.cpp on this machine, and by how much?
//!
//! Both are measured in one run, in turn, on the same files with as many threads. Nothing is taken from an earlier run.

mod busy;
mod chats;
mod findings;
mod limits;
pub mod peer;
mod servers;
mod shapes;
mod speed;
pub mod step;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use rekindle::model::weights::WeightFile;
use rekindle::model::{KvShape, families};
use rekindle::types::KvDtype;
use tokio::runtime::Runtime;

use crate::Common;
use crate::report::Report;
use chats::Workload;
use findings::Findings;
use peer::{Level, Peer};
use servers::Room;
use shapes::Group;
use speed::Cell;

/// What the chats in plenty of memory are.
const CHATS: Workload = Workload { conversations: 16, turns: 4, at_a_time: 4 };
/// llama.cpp makes its window of pieces of so many tokens; our blocks divide them.
const WINDOW_TOKENS: u64 = 256;
const MIB: u64 = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// How fast this machine reads memory
    Limits,
    /// The model alone
    Speed,
    /// The model alone, while other threads keep all cores busy
    Busy,
    /// 16 conversations of 4 turns, with memory for all of them
    Servers,
    /// Many conversations, with memory for few
    Memory,
}

/// Measures rekindle beside llama.cpp. Takes some 25 minutes in all on 2 cores, after the builds; less with fewer parts.
#[derive(Parser)]
pub struct Args {
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::value_variants().to_vec())]
    parts: Vec<Part>,
    /// Formats to measure the model in, made of the model's own; the servers take the first two
    #[arg(long, value_delimiter = ',', default_value = "Q4_1,Q4_0,Q8_0")]
    formats: Vec<String>,
    /// Instructions that the model may use
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Level::ALL)]
    levels: Vec<Level>,
    /// Work that the model does
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Group::ALL)]
    groups: Vec<Group>,
    /// Every combination of these. Without it one thread does less than all cores do, and other formats less than the
    /// first
    #[arg(long)]
    all: bool,
    /// Threads of the model; one and all cores if left out. The servers take the most of them
    #[arg(long, value_delimiter = ',')]
    threads: Vec<usize>,
    /// Rounds of the model and of the servers in turn
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Conversations that share little memory
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(9..))]
    conversations: u32,
    /// Turns of each of them
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(2..))]
    turns: u32,
    /// Conversations for which there is memory in the device pool, or in llama.cpp's window
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(4..))]
    device_conversations: u32,
    /// Conversations for which there is memory in the host tier, or in llama.cpp's cache
    #[arg(long, default_value_t = 32)]
    host_conversations: u32,
}

impl Args {
    fn threads(&self) -> anyhow::Result<Vec<usize>> {
        let cores = std::thread::available_parallelism().context("the number of cores is unknown")?.get();
        let mut threads = if self.threads.is_empty() { vec![1, cores] } else { self.threads.clone() };
        threads.sort_unstable();
        threads.dedup();
        Ok(threads)
    }
}

pub fn measure(common: &Common, args: &Args, runtime: &Runtime) -> anyhow::Result<Report> {
    let peer = Peer::ready(&Level::ALL)?;
    let formats = args.formats.iter().map(|format| Ok((format.as_str(), peer.file(&common.model, format)?)));
    let formats: Vec<_> = formats.collect::<anyhow::Result<_>>()?;
    let threads = args.threads()?;
    let most = *threads.last().context("no number of threads")?;
    let started = Instant::now();
    let mut findings = Findings::default();
    if args.parts.contains(&Part::Limits) {
        findings.limits(&threads)?;
    }
    if args.parts.contains(&Part::Speed) {
        findings.speed(&peer, &cells(args, &formats, &threads), args.rounds as usize)?;
    }
    if args.parts.contains(&Part::Busy)
        && let Some((format, file)) = formats.first()
    {
        eprintln!("[compare] busy cores, {format}");
        findings.busy(format, most, &busy::measure(file, most)?);
    }
    if args.parts.contains(&Part::Servers) {
        for (index, (format, file)) in formats.iter().take(2).enumerate() {
            eprintln!("[compare] servers, {format}");
            let chats = (CHATS, Room::Plenty);
            let pair = runtime.block_on(servers::measure(common, &peer, file, chats, (most, args.rounds as usize)))?;
            // Of the second format the figures are for information.
            findings.servers(format, &pair, index == 0);
        }
    }
    if args.parts.contains(&Part::Memory)
        && let Some((format, file)) = formats.first()
    {
        eprintln!("[compare] servers with little memory, {format}");
        let chats = little_memory(file, args)?;
        let pair = runtime.block_on(servers::measure(common, &peer, file, chats, (most, 1)))?;
        findings.memory(format, chats, &pair);
    }
    Ok(findings.report(started.elapsed()))
}

/// Everything that the model alone is measured on. The first format is the model's own.
fn cells(args: &Args, formats: &[(&str, PathBuf)], threads: &[usize]) -> Vec<Cell> {
    let most = threads.last();
    let mut cells = Vec::new();
    for (index, (format, file)) in formats.iter().enumerate() {
        for level in &args.levels {
            for threads in threads {
                let all_cores = Some(threads) == most;
                let is_main = |group: &Group| match group {
                    Group::Short => true,
                    Group::Deep => all_cores && index == 0,
                    Group::Batch => all_cores,
                    Group::Crowd => all_cores && index == 0 && *level == Level::Native,
                };
                let groups = args.groups.iter().filter(|group| args.all || is_main(group));
                cells.extend(groups.map(|group| Cell {
                    format: (*format).to_owned(),
                    file: file.clone(),
                    level: *level,
                    threads: *threads,
                    group: *group,
                }));
            }
        }
    }
    cells
}

/// More conversations than there is memory for, and the same memory for both servers.
fn little_memory(file: &Path, args: &Args) -> anyhow::Result<(Workload, Room)> {
    let workload = Workload { conversations: args.conversations, turns: args.turns, at_a_time: CHATS.at_a_time };
    let (_, sizes) = families::read(WeightFile::open(file)?.metadata())?;
    let kv = KvShape { layers: sizes.layers, kv_heads: sizes.kv_heads, head_dim: sizes.head_dim, dtype: KvDtype::F16 };
    let tokens = |conversations: u32| u64::from(conversations * workload.conversation_tokens());
    let device_tokens = tokens(args.device_conversations).next_multiple_of(WINDOW_TOKENS);
    let token_bytes = kv.token_bytes() as u64;
    let host_mib = (tokens(args.host_conversations) * token_bytes).div_ceil(MIB);
    Ok((workload, Room::Equal { device_tokens, device_bytes: device_tokens * token_bytes, host_mib }))
}
