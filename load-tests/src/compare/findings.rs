//! What was found, what was wanted, and does it hold?

use std::process::Command;
use std::time::Duration;

use rekindle::kernels::isa::Isa;
use rekindle::model::families;
use rekindle::model::weights::WeightFile;
use serde_json::{Map, Value, json};

use super::busy;
use super::chats::Workload;
use super::limits;
use super::peer::{Level, Peer};
use super::servers::{Arm, Pair, Room};
use super::shapes::{Shape, Work};
use super::speed::{self, Cell, Row};
use crate::numbers::{figure, median, p95};
use crate::process::{Usage, Watch};
use crate::report::{Bound, Limit, Report, Table};

/// Of the bandwidth of memory, while one conversation answers: each token reads all weights once.
const DECODE_SHARE: f64 = 0.8;
/// Of the rate at which bytes can be multiplied at all, while a prompt is read.
const PREFILL_SHARE: f64 = 0.6;
/// llama.cpp's threads wait for one another by spinning: beside other work it is many times slower.
const OTHERS_CORES: f64 = 0.05;
/// Ours to llama.cpp's.
const LATER_TTFT: f64 = 0.7;
const GENERATED: f64 = 1.3;
const LATER_TTFT_IN_LITTLE_MEMORY: f64 = 0.3;

/// Ours to llama.cpp's, in tokens/s; `None` for a shape that is measured for information.
fn wanted(format: &str, shape: Shape, level: Level, has_avx512: bool) -> Option<f64> {
    // Only llama.cpp has all its kernels for AVX-512.
    let against_avx512 = level == Level::Native && has_avx512;
    match (shape.work, shape.depth) {
        (Work::Prefill, 0) if against_avx512 => Some(1.1),
        (Work::Prefill, 0) => Some(if format == "Q4_1" { 3.5 } else { 1.5 }),
        (Work::Prefill, _) => Some(1.6),
        (Work::Decode { sequences: 1 }, 0) => Some(1.1),
        (Work::Decode { sequences: 1 }, _) => Some(1.8),
        (Work::Decode { sequences: 4 }, 0) => Some(1.5),
        (Work::Decode { .. }, 0) => Some(if against_avx512 { 1.3 } else { 1.8 }),
        (Work::Decode { .. }, _) => None,
    }
}

/// Tables, bounds and raw figures, part by part.
#[derive(Default)]
pub struct Findings {
    tables: Vec<Table>,
    bounds: Vec<Bound>,
    notes: Vec<String>,
    raw: Map<String, Value>,
    /// Of everything that was timed.
    usage: Usage,
    chats: Vec<Vec<String>>,
}

impl Findings {
    fn at_least(&mut self, what: String, measured: f64, limit: f64) {
        self.bounds.push(Bound { what, measured, limit: Limit::AtLeast(limit), unit: "" });
    }

    fn at_most(&mut self, what: String, measured: f64, limit: f64) {
        self.bounds.push(Bound { what, measured, limit: Limit::AtMost(limit), unit: "" });
    }

    pub fn limits(&mut self, threads: &[usize]) -> anyhow::Result<()> {
        let mut rates = Vec::new();
        for threads in threads {
            let watch = Watch::start(None)?;
            let rate = limits::read_bytes_per_s(*threads);
            self.usage += watch.usage()?;
            eprintln!("[compare] reading memory, {threads} threads: {} GB/s", figure(rate / 1e9));
            rates.push((*threads, rate));
        }
        let row = |(threads, rate): &(usize, f64)| vec![threads.to_string(), figure(rate / 1e9)];
        let rows = rates.iter().map(row).collect();
        self.tables.push(Table { heading: "This machine", columns: vec!["threads", "reads memory, GB/s"], rows });
        for level in Level::ALL {
            if let Some(rate) = limits::multiply_adds_per_s(level.isa()) {
                let (name, isa, giga) = (level.name(), level.isa(), figure(rate / 1e9));
                eprintln!("[compare] multiplying bytes, {name}: {giga} G/s");
                self.notes.push(format!("`{name}` is {isa}: one core does {giga} G multiply-adds of bytes a second."));
            }
        }
        let raw = |(threads, rate): &(usize, f64)| json!({"threads": threads, "read_bytes_per_s": rate});
        self.raw.insert("limits".into(), rates.iter().map(raw).collect());
        Ok(())
    }

    pub fn speed(&mut self, peer: &Peer, cells: &[Cell], rounds: usize) -> anyhow::Result<()> {
        let (mut rows, mut raw) = (Vec::new(), Vec::new());
        for (index, cell) in cells.iter().enumerate() {
            eprintln!("[compare] {}/{}: {}", index + 1, cells.len(), cell.name());
            let measured = speed::measure(peer, cell, rounds)?;
            rows.extend(measured.rows);
            raw.push(measured.raw);
            self.usage += measured.usage;
        }
        let has_avx512 = Isa::best() == Isa::Avx512;
        for row in &rows {
            if let Some(limit) = wanted(&row.cell.format, row.shape, row.cell.level, has_avx512) {
                self.at_least(
                    format!("tokens/s, ours / llama.cpp: {}, {}", row.shape, row.cell.name()),
                    row.ratio(),
                    limit,
                );
            }
        }
        let mut shares = Vec::new();
        for row in &rows {
            shares.extend(self.share_of_memory(row)?);
            shares.extend(self.share_of_multiplying(row)?);
        }
        self.tables.push(Table {
            heading: "The model alone, tokens/s",
            columns: vec![
                "work",
                "file",
                "instructions",
                "threads",
                "rekindle",
                "llama.cpp",
                "its flash attention",
                "ratio",
                "rekindle, cores busy",
                "llama.cpp, cores busy",
            ],
            rows: rows.iter().map(speed_row).collect(),
        });
        if !shares.is_empty() {
            self.tables.push(Table {
                heading: "Beside the machine's own limit, measured just before and after",
                columns: vec!["work", "file", "instructions", "threads", "limited by", "machine", "rekindle", "share"],
                rows: shares,
            });
            self.notes.push(
                "The machine reads memory that lies as the weights do, in huge pages, and multiplies bytes in registers. A \
                 decode reads the file's bytes once a token; a prefill multiplies its layers' weights with every row. What else a \
                 step does (attention, norms, scales of blocks) counts as time, not as work."
                    .into(),
            );
        }
        self.notes.push(format!(
            "`prefill@D`: 512 tokens in one step after D others. `decodeB@D`: B conversations, D tokens in, one token each a \
             step; 64 steps, 32 with several. Logits of a prefill's last token, of each decoded one; no token is chosen. \
             Both sides in turn, in {rounds} round(s) of short processes; the fastest measurement counts. llama.cpp with flash \
             attention and without; the better one counts. Cores busy: CPU time of the whole processes by their time, \
             loading included."
        ));
        self.raw.insert("speed".into(), raw.into());
        Ok(())
    }

    /// What reading the weights alone allows one conversation.
    fn share_of_memory(&mut self, row: &Row) -> anyhow::Result<Option<Vec<String>>> {
        if row.shape != Shape::DECODE_ALONE {
            return Ok(None);
        }
        let did = row.ours * std::fs::metadata(&row.cell.file)?.len() as f64;
        let bound = ("memory's bandwidth", "reading, GB/s", DECODE_SHARE);
        Ok(row.limits.map(|limits| self.share(row, bound, did, limits.read_bytes_per_s)))
    }

    /// What multiplying the layers' weights alone allows a prefill, where it is known how fast that could be.
    fn share_of_multiplying(&mut self, row: &Row) -> anyhow::Result<Option<Vec<String>>> {
        if row.shape != Shape::PREFILL {
            return Ok(None);
        }
        let file = WeightFile::open(&row.cell.file)?;
        let (_, sizes) = families::read(file.metadata())?;
        let did = row.ours * sizes.multiply_adds_a_row() as f64;
        let limit = row.limits.and_then(|limits| limits.multiply_adds_per_s);
        let bound = ("multiplying bytes", "multiplying, G/s", PREFILL_SHARE);
        Ok(limit.map(|limit| self.share(row, bound, did, limit * row.cell.threads as f64)))
    }

    fn share(&mut self, row: &Row, bound: (&str, &str, f64), did: f64, limit: f64) -> Vec<String> {
        let ((name, unit, wanted), share) = (bound, did / limit);
        self.at_least(format!("share of {name}: {}, {}", row.shape, row.cell.name()), share, wanted);
        let Cell { format, level, threads, .. } = &row.cell;
        let (work, giga) = (format!("`{}`", row.shape), |rate: f64| figure(rate / 1e9));
        let what = [work, format.clone(), level.name().to_owned(), threads.to_string(), unit.to_owned()];
        what.into_iter().chain([giga(limit), giga(did), figure(share)]).collect()
    }

    /// On busy cores, several threads must do what one does at least.
    pub fn busy(&mut self, format: &str, threads: usize, rows: &[busy::Row]) {
        let mut table = Vec::new();
        for row in rows {
            let ratio = row.alone_s / row.together_s;
            self.at_least(format!("speed on busy cores, {threads} threads / 1: {}, {format}", row.shape), ratio, 1.0);
            table.push(vec![format!("`{}`", row.shape), figure(row.alone_s), figure(row.together_s), figure(ratio)]);
        }
        self.tables.push(Table {
            heading: "The model alone, while a thread on each core counts to no end",
            columns: vec!["work", "1 thread, s", "all cores, s", "ratio"],
            rows: table,
        });
        let raw = |row: &busy::Row| json!({"shape": row.shape.to_string(), "alone_s": row.alone_s, "together_s": row.together_s});
        self.raw.insert("busy".into(), rows.iter().map(raw).collect());
    }

    pub fn servers(&mut self, format: &str, pair: &Pair, is_bound: bool) {
        self.chat(format!("16 chats, {format}"), pair);
        if is_bound {
            let ttft = pair.ttft_ratio(median);
            self.at_most(format!("later turns' TTFT p50, ours / llama.cpp: 16 chats, {format}"), ttft, LATER_TTFT);
            let generated = pair.generated_ratio();
            self.at_least(format!("generated tokens/s, ours / llama.cpp: 16 chats, {format}"), generated, GENERATED);
        }
    }

    pub fn memory(&mut self, format: &str, (workload, room): (Workload, Room), pair: &Pair) {
        let name = format!("{} chats in little memory, {format}", workload.conversations);
        let ttft = pair.ttft_ratio(p95);
        self.at_most(format!("later turns' TTFT p95, ours / llama.cpp: {name}"), ttft, LATER_TTFT_IN_LITTLE_MEMORY);
        if let Room::Equal { device_tokens, device_bytes, host_mib } = room {
            self.notes.push(format!(
                "Little memory: {} conversations of {} turns, about {} tokens each at the end. Both servers have {device_tokens} \
                 tokens' place for what runs ({device_bytes} bytes of f16) and {host_mib} MiB for what rests.",
                workload.conversations,
                workload.turns,
                workload.conversation_tokens(),
            ));
        }
        self.chat(name, pair);
    }

    fn chat(&mut self, name: String, pair: &Pair) {
        for (server, arm) in [("rekindle", &pair.ours), ("llama.cpp", &pair.peer)] {
            self.chats.push(chat_row(&name, server, arm));
            self.usage += arm.usage;
            self.notes.push(format!("{name}: `{}`.", arm.command));
        }
        self.raw.insert(name, json!({"rekindle": pair.ours.json(), "llama.cpp": pair.peer.json()}));
    }

    pub fn report(mut self, took: Duration) -> Report {
        if !self.chats.is_empty() {
            self.tables.push(Table {
                heading: "The servers",
                columns: vec![
                    "chats",
                    "server",
                    "first turns' TTFT p50 ms",
                    "later turns' p50",
                    "p95",
                    "generated tokens/s",
                    "wall s",
                    "CPU s",
                    "peak RSS MiB",
                    "prompt tokens",
                    "of them cached",
                ],
                rows: std::mem::take(&mut self.chats),
            });
            self.notes.push(
                "Chats: through `/v1/chat/completions`, streamed, 4 at once; all have their first turn, then all their second; \
                 messages of about 85 tokens, answers of 32, greedy. TTFT: from the client's request to its first text. \
                 Answers are each server's own. The servers run in turn, their rounds are put together."
                    .into(),
            );
        }
        if self.usage.wall_s > 0.0 {
            let others = self.usage.others_s / self.usage.wall_s;
            self.at_most("cores that other programs took meanwhile".into(), others, OTHERS_CORES);
        }
        let (ours, peer, best) = (env!("CARGO_PKG_VERSION"), Peer::version(), Isa::best());
        self.notes.push(format!(
            "rekindle {ours}{}, its kernels for {best} at the level `native`. llama.cpp: built here from {peer}, as a release. \
             Measured in {} minutes.",
            commit().map(|commit| format!(" at {commit}")).unwrap_or_default(),
            figure(took.as_secs_f64() / 60.0)
        ));
        let (name, title) = ("compare", "rekindle beside llama.cpp");
        let raw = Some(Value::Object(self.raw));
        Report { name, title, tables: self.tables, bounds: self.bounds, notes: self.notes, raw }
    }
}

/// The commit of the folder that this runs in, marked if something was changed since.
fn commit() -> Option<String> {
    let output = Command::new("git").args(["describe", "--always", "--dirty", "--exclude=*"]).output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| said.trim().to_owned())
}

fn speed_row(row: &Row) -> Vec<String> {
    vec![
        format!("`{}`", row.shape),
        row.cell.format.clone(),
        row.cell.level.name().to_owned(),
        row.cell.threads.to_string(),
        figure(row.ours),
        figure(row.peer),
        if row.flash { "on" } else { "off" }.to_owned(),
        figure(row.ratio()),
        figure(row.ours_busy),
        figure(row.peer_busy),
    ]
}

fn chat_row(name: &str, server: &str, arm: &Arm) -> Vec<String> {
    let later = arm.later_ttfts_ms();
    vec![
        name.to_owned(),
        server.to_owned(),
        figure(median(&arm.first_ttfts_ms())),
        figure(median(&later)),
        figure(p95(&later)),
        figure(arm.generated_per_s()),
        figure(arm.wall_s()),
        figure(arm.usage.cpu_s),
        figure(arm.peak_bytes / f64::from(1 << 20)),
        arm.prompt_tokens().to_string(),
        arm.cached_tokens().to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_but_those_for_information_has_a_ratio_to_reach() {
        let want = |format, shape: &str, level, avx512| wanted(format, shape.parse().unwrap(), level, avx512);
        assert_eq!(want("Q4_1", "prefill@0", Level::Avx2, true), Some(3.5));
        assert_eq!(want("Q8_0", "prefill@0", Level::Avx2, true), Some(1.5));
        assert_eq!(want("Q4_1", "prefill@0", Level::Native, true), Some(1.1));
        assert_eq!(want("Q4_1", "prefill@0", Level::Native, false), Some(3.5));
        assert_eq!(want("Q4_0", "decode16@0", Level::Native, true), Some(1.3));
        assert_eq!(want("Q4_0", "decode16@512", Level::Native, true), None);
    }
}
