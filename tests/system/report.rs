//! What did a run measure, and on which machine?

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{Answer, Metrics};
use super::workload::{Workload, is_soak};

/// One run under short memory, beside the same run undisturbed.
pub struct Figures<'a> {
    pub name: &'a str,
    pub workload: Workload,
    pub answers: &'a [Vec<Answer>],
    pub undisturbed: &'a [Vec<Answer>],
    pub metrics: &'a Metrics,
    pub took: Duration,
}

impl Figures<'_> {
    fn all(&self) -> impl Iterator<Item = &Answer> {
        self.answers.iter().flatten()
    }

    fn table(&self) -> Vec<(String, Value)> {
        let Workload { conversations, turns } = self.workload;
        let count = |name: &str| json!(self.metrics.count(name));
        let mut table = vec![
            ("conversations".to_owned(), json!(conversations)),
            ("turns of each".to_owned(), json!(turns)),
            ("device pool, bytes".to_owned(), json!(self.metrics.pool_bytes("device"))),
            ("host pool, bytes".to_owned(), json!(self.metrics.pool_bytes("host"))),
            ("time, s".to_owned(), json!(self.took.as_secs())),
            ("answers unlike the undisturbed".to_owned(), json!(0)),
            ("evictions".to_owned(), count("rekindle_evictions_total")),
            ("preemptions".to_owned(), count("rekindle_preemptions_total")),
        ];
        for source in ["resident", "shared", "reloaded_host", "encoded"] {
            table.push((format!("prompt tokens, {source}"), json!(self.metrics.prompt_tokens(source))));
        }
        table.push(("of the encoded, encoded again".to_owned(), count("rekindle_reencoded_tokens_total")));
        for (decision, answers) in by_decision(self.all()) {
            let times = answers.iter().map(|answer| answer.usage.ttft_ms).collect();
            let (median, worst) = median_and_worst(times);
            table.push((format!("first token, {decision} ({} turns), median ms", answers.len()), json!(median)));
            table.push((format!("first token, {decision}, worst ms"), json!(worst)));
        }
        let alone = self.undisturbed.iter().flatten().map(|answer| answer.took.as_millis() as u64).collect();
        let (median, worst) = median_and_worst(alone);
        table.push(("whole turn, undisturbed and alone, median ms".to_owned(), json!(median)));
        table.push(("whole turn, undisturbed and alone, worst ms".to_owned(), json!(worst)));
        table
    }

    pub fn print(&self) {
        println!("{}: {}", self.name, json!(self.table().into_iter().collect::<serde_json::Map<_, _>>()));
    }

    /// Keeps the figures of a soak beside the other measurements.
    pub fn write_if_soak(&self) {
        if !is_soak() {
            return;
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("load-tests/results");
        std::fs::create_dir_all(&folder).unwrap();
        let stem = folder.join(format!("soak-{}", self.name.replace(' ', "-")));
        let (date, machine, table) = (today(), machine(), self.table());

        let mut page = format!("# Soak: {}\n\n{date}, {machine}, rekindle {}.\n", self.name, env!("CARGO_PKG_VERSION"));
        page += "Repeat with `REKINDLE_SOAK=1 cargo test --profile ci --test system many`.\n\n| what | value |\n|---|---|\n";
        for (what, value) in &table {
            writeln!(page, "| {what} | {value} |").unwrap();
        }
        std::fs::write(stem.with_extension("md"), page).unwrap();

        let figures: serde_json::Map<_, _> = table.into_iter().collect();
        let file = json!({"run": self.name, "date": date, "machine": machine, "figures": figures});
        std::fs::write(stem.with_extension("json"), format!("{file:#}\n")).unwrap();
    }
}

fn by_decision<'a>(answers: impl Iterator<Item = &'a Answer>) -> std::collections::BTreeMap<&'a str, Vec<&'a Answer>> {
    let mut groups = std::collections::BTreeMap::<_, Vec<_>>::new();
    for answer in answers {
        groups.entry(answer.usage.decision.as_str()).or_default().push(answer);
    }
    groups
}

fn median_and_worst(mut values: Vec<u64>) -> (u64, u64) {
    values.sort_unstable();
    (values[values.len() / 2], values[values.len() - 1])
}

/// The date in UTC, such as 2026-11-25.
fn today() -> String {
    let told = Command::new("date").args(["-u", "+%F"]).output().unwrap();
    String::from_utf8(told.stdout).unwrap().trim().to_owned()
}

/// The processor's name, and how many of it this process may use.
fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    format!("{} ({processors} processors)", name.unwrap_or("an unknown processor"))
}
