//! How fast is the model alone, ours and llama.cpp's, on the same file and the same threads?
//!
//! Both run in turn, in short processes of their own, several rounds, and the fastest of each side counts: what disturbs a
//! measurement only ever makes it slower. llama.cpp is tried with flash attention and without; the better one counts.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::limits::Limits;
use super::peer::{Level, Peer};
use super::shapes::{Group, PREFILL_TOKENS, Shape};
use crate::numbers::figure;
use crate::process::{self, Usage};

/// Measurements of each shape in one process, where llama.cpp's program can do more than one.
const REPEAT: usize = 2;

/// What both programs are run on, by one process of each a round.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cell {
    pub format: String,
    pub file: PathBuf,
    pub level: Level,
    pub threads: usize,
    pub group: Group,
}

impl Cell {
    /// Without the work, which is the rows'.
    pub fn name(&self) -> String {
        let Self { format, level, threads, .. } = self;
        format!("{format}, {}, {threads} thread{}", level.name(), if *threads == 1 { "" } else { "s" })
    }
}

/// Who runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    Ours,
    Peer { flash: bool },
}

impl Side {
    const ALL: [Self; 3] = [Self::Peer { flash: false }, Self::Ours, Self::Peer { flash: true }];

    fn name(self) -> &'static str {
        match self {
            Self::Ours => "rekindle",
            Self::Peer { flash: false } => "llama.cpp",
            Self::Peer { flash: true } => "llama.cpp with flash attention",
        }
    }
}

/// How a program says what it measured of a shape: tokens/s of each measurement.
type ReadRates = fn(&str, Shape) -> anyhow::Result<Vec<f64>>;

/// All rounds of a side on one cell.
struct Runs {
    side: Side,
    /// In the order of the group's shapes; tokens/s of each measurement.
    rates: Vec<Vec<f64>>,
    usage: Usage,
    command: String,
}

/// One shape of a cell, measured on both sides.
pub struct Row {
    pub cell: Cell,
    pub shape: Shape,
    /// The fastest, in tokens/s.
    pub ours: f64,
    pub peer: f64,
    /// Whether llama.cpp was faster with flash attention.
    pub flash: bool,
    /// What the machine could do meanwhile, where it was measured.
    pub limits: Option<Limits>,
    /// CPU seconds a second of the whole processes, loading included.
    pub ours_busy: f64,
    pub peer_busy: f64,
}

impl Row {
    pub fn ratio(&self) -> f64 {
        self.ours / self.peer
    }
}

/// A cell, measured.
pub struct Measured {
    pub rows: Vec<Row>,
    /// Of all processes.
    pub usage: Usage,
    /// All of it, for programs.
    pub raw: Value,
}

pub fn measure(peer: &Peer, cell: &Cell, rounds: usize) -> anyhow::Result<Measured> {
    let shapes = cell.group.shapes();
    // Before and after: what a machine gives changes with what its neighbours do.
    let limits = || (cell.group == Group::Short).then(|| Limits::measure(cell.level.isa(), cell.threads));
    let before = limits();
    let mut usage = Usage::default();
    let mut all: Vec<Runs> = Side::ALL.map(|side| Runs::new(side, shapes.len())).into();
    for round in 0..rounds {
        // Neither side always comes first.
        all.rotate_left(usize::from(round > 0));
        for runs in &mut all {
            usage += runs.run(peer, cell)?;
        }
        drop_the_slower(&mut all);
    }
    let limits = before.zip(limits()).map(|(before, after)| before.or_better(after));
    let raw = json!({
        "file": cell.format, "level": cell.level.name(), "threads": cell.threads,
        "limits": limits.map(Limits::json),
        "sides": all.iter().map(|runs| runs.json(shapes)).collect::<Vec<_>>(),
    });
    let rows = shapes.iter().enumerate().map(|(index, shape)| row(cell, *shape, index, &all, limits));
    Ok(Measured { rows: rows.collect::<anyhow::Result<_>>()?, usage, raw })
}

/// A way to run llama.cpp that was the faster one for no shape need not be run again.
fn drop_the_slower(all: &mut Vec<Runs>) {
    let peers: Vec<(Side, Vec<f64>)> =
        all.iter().filter(|runs| runs.side != Side::Ours).map(|runs| (runs.side, runs.fastest())).collect();
    if let [(one, one_rates), (other, other_rates)] = &peers[..] {
        let wins = one_rates.iter().zip(other_rates).filter(|(one, other)| one >= other).count();
        if wins == 0 {
            all.retain(|runs| runs.side != *one);
        } else if wins == one_rates.len() {
            all.retain(|runs| runs.side != *other);
        }
    }
}

fn row(cell: &Cell, shape: Shape, index: usize, all: &[Runs], limits: Option<Limits>) -> anyhow::Result<Row> {
    let ours = all.iter().find(|runs| runs.side == Side::Ours).context("our side was not run")?;
    let fastest = |runs: &Runs| runs.fastest()[index];
    let peer = all
        .iter()
        .filter(|runs| runs.side != Side::Ours)
        .max_by(|one, other| fastest(one).total_cmp(&fastest(other)))
        .context("llama.cpp was not run")?;
    Ok(Row {
        cell: cell.clone(),
        shape,
        ours: fastest(ours),
        peer: fastest(peer),
        limits,
        flash: peer.side == Side::Peer { flash: true },
        ours_busy: ours.usage.cpu_s / ours.usage.wall_s,
        peer_busy: peer.usage.cpu_s / peer.usage.wall_s,
    })
}

impl Runs {
    fn new(side: Side, shapes: usize) -> Self {
        Self { side, rates: vec![Vec::new(); shapes], usage: Usage::default(), command: String::new() }
    }

    fn fastest(&self) -> Vec<f64> {
        self.rates.iter().map(|rates| rates.iter().copied().fold(0.0, f64::max)).collect()
    }

    /// Runs once more.
    fn run(&mut self, peer: &Peer, cell: &Cell) -> anyhow::Result<Usage> {
        let (mut command, read): (Command, ReadRates) = match (self.side, cell.group) {
            (Side::Ours, _) => (ours(cell)?, our_rates),
            (Side::Peer { flash }, Group::Short | Group::Deep) => (bench(peer, cell, flash), bench_rates),
            (Side::Peer { flash }, Group::Batch | Group::Crowd) => (batched_bench(peer, cell, flash), batched_rates),
        };
        let (output, usage) = process::run(&mut command)?;
        let mut said = Vec::new();
        for (shape, all) in cell.group.shapes().iter().zip(&mut self.rates) {
            let new = read(&output, *shape).with_context(|| format!("{command:?}"))?;
            if new.is_empty() {
                bail!("{command:?} did not measure {shape}");
            }
            said.push(format!("{shape} {}", figure(new.iter().copied().fold(0.0, f64::max))));
            all.extend(new);
        }
        eprintln!("[compare]   {}: {} tokens/s", self.side.name(), said.join(", "));
        self.usage += usage;
        self.command = without_folders(&command);
        Ok(usage)
    }

    fn json(&self, shapes: &[Shape]) -> Value {
        let rates: Vec<Value> = shapes
            .iter()
            .zip(&self.rates)
            .map(|(shape, rates)| json!({"shape": shape.to_string(), "tokens_per_s": rates}))
            .collect();
        json!({
            "side": self.side.name(), "measured": rates, "wall_s": self.usage.wall_s, "cpu_s": self.usage.cpu_s,
            "others_cpu_s": self.usage.others_s, "command": self.command,
        })
    }
}

/// A command as it may be kept: of paths the last part, since the others are this machine's.
fn without_folders(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words = words.map(|word| Path::new(word).file_name().unwrap_or(word).to_string_lossy().into_owned());
    words.collect::<Vec<_>>().join(" ")
}

fn ours(cell: &Cell) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("this program's own path is unknown")?);
    command.arg("step").arg("--model").arg(&cell.file).args(["--threads", &cell.threads.to_string()]);
    if cell.level == Level::Avx2 {
        command.args(["--isa", "avx2"]);
    }
    let repeat = match cell.group {
        Group::Short | Group::Deep => REPEAT,
        Group::Batch | Group::Crowd => 1,
    };
    command.args(["--repeat", &repeat.to_string()]);
    command.args(cell.group.shapes().iter().map(Shape::to_string));
    Ok(command)
}

fn our_rates(output: &str, shape: Shape) -> anyhow::Result<Vec<f64>> {
    let all: Vec<Value> = serde_json::from_str(output)?;
    let measured = all.iter().find(|one| one["shape"] == shape.to_string()).context("no such shape")?;
    let seconds = measured["seconds"].as_array().context("no `seconds`")?;
    Ok(seconds.iter().filter_map(Value::as_f64).map(|seconds| shape.tokens() as f64 / seconds).collect())
}

fn bench(peer: &Peer, cell: &Cell, flash: bool) -> Command {
    let mut command = Command::new(peer.program(cell.level, "llama-bench"));
    command.arg("-m").arg(&cell.file).args(["-t", &cell.threads.to_string(), "-fa", if flash { "1" } else { "0" }]);
    command.args(["-p", &PREFILL_TOKENS.to_string()]);
    command.args(["-n", &list(cell, Shape::generated), "-d", &list(cell, |shape| Some(shape.depth))]);
    command.args(["-r", &REPEAT.to_string(), "-o", "json"]);
    command
}

fn bench_rates(output: &str, shape: Shape) -> anyhow::Result<Vec<f64>> {
    let all: Vec<Value> = serde_json::from_str(output)?;
    let (prompt, generated) = if shape.rows() > 1 { (shape.tokens(), 0) } else { (0, shape.tokens()) };
    let is_it = |one: &&Value| one["n_prompt"] == prompt && one["n_gen"] == generated && one["n_depth"] == shape.depth;
    let measured = all.iter().find(is_it).context("no such test")?;
    let samples = measured["samples_ns"].as_array().context("no `samples_ns`")?;
    Ok(samples.iter().filter_map(Value::as_f64).map(|ns| shape.tokens() as f64 / ns * 1e9).collect())
}

fn batched_bench(peer: &Peer, cell: &Cell, flash: bool) -> Command {
    let mut command = Command::new(peer.program(cell.level, "llama-batched-bench"));
    command.arg("-m").arg(&cell.file).args(["-t", &cell.threads.to_string(), "-fa", if flash { "on" } else { "off" }]);
    command.args([
        "-npp",
        &list(cell, |shape| Some(shape.depth)),
        "-npl",
        &list(cell, |shape| Some(shape.sequences())),
    ]);
    command.args(["-ntg", &list(cell, Shape::generated)]);
    // The prompt is encoded once and copied, so that each sequence has KV of its own, as on our side.
    let longest = cell.group.shapes().iter().map(|shape| shape.sequences() * (shape.depth + shape.steps())).max();
    let longest = longest.unwrap_or(0).to_string();
    command.args(["-pps", "--no-kv-unified", "-c", &longest, "--output-format", "jsonl"]);
    command
}

/// The different values that a group's shapes have, as llama.cpp's programs take them.
fn list(cell: &Cell, part: fn(Shape) -> Option<usize>) -> String {
    let mut values: Vec<usize> = cell.group.shapes().iter().copied().filter_map(part).collect();
    values.sort_unstable();
    values.dedup();
    values.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

fn batched_rates(output: &str, shape: Shape) -> anyhow::Result<Vec<f64>> {
    let mut rates = Vec::new();
    for line in output.lines().filter(|line| line.starts_with('{')) {
        // The rate of a prompt of no tokens, which JSON has no word for.
        let one: Value = serde_json::from_str(&line.replace("-nan", "null"))?;
        if one["pp"] == shape.depth && one["pl"] == shape.sequences() {
            rates.push(shape.tokens() as f64 / one["t_tg"].as_f64().context("no `t_tg`")?);
        }
    }
    Ok(rates)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(side: Side, rates: [f64; 2]) -> Runs {
        let usage = Usage { wall_s: 2.0, cpu_s: 3.0, others_s: 0.0 };
        Runs { rates: rates.map(|rate| vec![rate / 2.0, rate]).into(), usage, ..Runs::new(side, 2) }
    }

    fn cell() -> Cell {
        let (format, file) = ("Q4_1".to_owned(), PathBuf::from("model.gguf"));
        Cell { format, file, level: Level::Native, threads: 2, group: Group::Short }
    }

    #[test]
    fn the_fastest_of_each_side_counts_and_llama_cpp_may_choose_flash_attention_for_each_shape() {
        let all = [
            runs(Side::Peer { flash: false }, [100.0, 50.0]),
            runs(Side::Ours, [300.0, 60.0]),
            runs(Side::Peer { flash: true }, [80.0, 60.0]),
        ];
        let rows = [0, 1].map(|index| row(&cell(), Group::Short.shapes()[index], index, &all, None).unwrap());
        assert_eq!(rows.each_ref().map(Row::ratio), [3.0, 1.0]);
        assert_eq!(rows.each_ref().map(|row| row.flash), [false, true]);
        assert_eq!(rows[0].ours_busy, 1.5);
        assert_eq!(rows[0].cell.name(), "Q4_1, native, 2 threads");
    }

    #[test]
    fn a_kept_command_names_no_folder_of_this_machine() {
        let mut command = Command::new("/somewhere/bin/llama-bench");
        command.args(["-m", "/elsewhere/model.gguf", "-t", "2"]);
        assert_eq!(without_folders(&command), "llama-bench -m model.gguf -t 2");
    }

    #[test]
    fn a_way_to_run_llama_cpp_is_given_up_only_when_it_wins_nowhere() {
        let sides = |flash_rates| {
            let mut all = vec![runs(Side::Peer { flash: false }, [100.0, 50.0]), runs(Side::Ours, [1.0, 1.0])];
            all.push(runs(Side::Peer { flash: true }, flash_rates));
            drop_the_slower(&mut all);
            all.iter().map(|runs| runs.side).collect::<Vec<_>>()
        };
        assert_eq!(sides([80.0, 60.0]).len(), 3);
        assert_eq!(sides([80.0, 40.0]), [Side::Peer { flash: false }, Side::Ours]);
        assert_eq!(sides([110.0, 60.0]), [Side::Ours, Side::Peer { flash: true }]);
    }

    #[test]
    fn rates_are_read_from_what_each_program_prints() {
        let [prefill, decode] = [0, 1].map(|index| Group::Deep.shapes()[index]);
        let ours = r#"[{"shape":"prefill@2048","seconds":[2.0,1.0]}]"#;
        assert_eq!(our_rates(ours, prefill).unwrap(), [256.0, 512.0]);
        assert!(our_rates(ours, decode).is_err());
        let bench = r#"[{"n_prompt":512,"n_gen":0,"n_depth":2048,"samples_ns":[2000000000]},
            {"n_prompt":0,"n_gen":64,"n_depth":2048,"samples_ns":[1000000000,500000000]}]"#;
        assert_eq!(bench_rates(bench, prefill).unwrap(), [256.0]);
        assert_eq!(bench_rates(bench, decode).unwrap(), [64.0, 128.0]);
        let batched = "main: n_kv_max = 1\n{\"pp\": 0, \"tg\": 32, \"pl\": 16, \"speed_pp\": -nan, \"t_tg\": 2.0}\n";
        assert_eq!(batched_rates(batched, Group::Batch.shapes()[1]).unwrap(), [256.0]);
        assert_eq!(batched_rates(batched, Group::Batch.shapes()[0]).unwrap(), [0.0; 0]);
    }
}
