//! What did a measurement find, on which machine, and did its bounds hold?

use std::fmt::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde_json::{Value, json};

use crate::numbers::figure;

/// A figure, and what it must be.
pub struct Bound {
    pub what: String,
    pub measured: f64,
    pub limit: Limit,
    /// `""` for a ratio or a count.
    pub unit: &'static str,
}

#[derive(Clone, Copy)]
pub enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Bound {
    /// Not for a figure that is no number.
    pub fn holds(&self) -> bool {
        match self.limit {
            Limit::AtMost(limit) => self.measured <= limit,
            Limit::AtLeast(limit) => self.measured >= limit,
        }
    }

    fn row(&self) -> Vec<String> {
        let with_unit = |value| format!("{} {}", figure(value), self.unit).trim_end().to_owned();
        let limit = match self.limit {
            Limit::AtMost(limit) => format!("at most {}", with_unit(limit)),
            Limit::AtLeast(limit) => format!("at least {}", with_unit(limit)),
        };
        let verdict = if self.holds() { "yes" } else { "**NO**" };
        vec![self.what.clone(), with_unit(self.measured), limit, verdict.to_owned()]
    }

    fn json(&self) -> Value {
        let (kind, limit) = match self.limit {
            Limit::AtMost(limit) => ("at_most", limit),
            Limit::AtLeast(limit) => ("at_least", limit),
        };
        json!({"what": self.what, "measured": self.measured, kind: limit, "holds": self.holds()})
    }
}

/// Figures of one kind. Everything but the first column is a number, or as short.
pub struct Table {
    /// `""` where the report's title says it.
    pub heading: &'static str,
    pub columns: Vec<&'static str>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// The only one of its report.
    pub fn only(columns: Vec<&'static str>, rows: Vec<Vec<String>>) -> Vec<Self> {
        vec![Self { heading: "", columns, rows }]
    }

    fn write(&self, text: &mut String) {
        // Writing to a string can't fail.
        if !self.heading.is_empty() {
            let _ = writeln!(text, "## {}\n", self.heading);
        }
        let _ = writeln!(text, "| {} |", self.columns.join(" | "));
        let rules = (0..self.columns.len()).map(|column| if column == 0 { "---" } else { "---:" });
        let _ = writeln!(text, "|{}|", rules.collect::<Vec<_>>().join("|"));
        for row in &self.rows {
            let _ = writeln!(text, "| {} |", row.join(" | "));
        }
        text.push('\n');
    }
}

/// One measurement, ready to be read.
pub struct Report {
    /// The command, and the file's name.
    pub name: &'static str,
    pub title: &'static str,
    pub tables: Vec<Table>,
    pub bounds: Vec<Bound>,
    /// Sentences that a reader needs beside the tables.
    pub notes: Vec<String>,
    /// Everything that was measured, for programs, if the tables don't have it all.
    pub raw: Option<Value>,
}

impl Report {
    /// Prints the report and writes it to `<folder>/<name>.md`, and what is for programs to `.json`. Whether every bound
    /// held.
    pub fn keep(&self, folder: &Path) -> anyhow::Result<bool> {
        let machine = Machine::this()?;
        let text = self.markdown(&machine);
        println!("\n{text}");
        std::fs::create_dir_all(folder).with_context(|| format!("{} can't be made", folder.display()))?;
        let keep = |extension, text: &str| {
            let path = folder.join(self.name).with_extension(extension);
            std::fs::write(&path, text).with_context(|| format!("the table can't be kept in {}", path.display()))?;
            eprintln!("[{}] kept in {}", self.name, path.display());
            anyhow::Ok(())
        };
        keep("md", &text)?;
        if let Some(raw) = &self.raw {
            keep("json", &format!("{:#}\n", self.json(&machine, raw)))?;
        }
        Ok(self.bounds.iter().all(Bound::holds))
    }

    fn markdown(&self, machine: &Machine) -> String {
        let mut text = format!("# {}\n\n", self.title);
        for table in &self.tables {
            table.write(&mut text);
        }
        if !self.bounds.is_empty() {
            let heading = if self.tables.len() > 1 { "Bounds" } else { "" };
            let rows = self.bounds.iter().map(Bound::row).collect();
            Table { heading, columns: vec!["bound", "measured", "wanted", "holds"], rows }.write(&mut text);
        }
        for note in &self.notes {
            // Writing to a string can't fail.
            let _ = writeln!(text, "- {note}");
        }
        let Machine { cpu, cores, date, command } = machine;
        let _ = writeln!(text, "- Machine: {cpu}, {cores} cores. Date: {date} (UTC). Command: `{command}`.");
        text
    }

    fn json(&self, machine: &Machine, raw: &Value) -> Value {
        json!({
            "machine": {"cpu": machine.cpu, "cores": machine.cores},
            "date": machine.date,
            "command": machine.command,
            "notes": self.notes,
            "bounds": self.bounds.iter().map(Bound::json).collect::<Vec<_>>(),
            "measured": raw,
        })
    }
}

/// Where and how a measurement was made.
struct Machine {
    cpu: String,
    cores: usize,
    date: String,
    command: String,
}

impl Machine {
    fn this() -> anyhow::Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").context("no /proc/cpuinfo")?;
        let cpu = cpu_model(&cpuinfo).unwrap_or("unknown CPU").to_owned();
        let cores = std::thread::available_parallelism().context("the number of cores is unknown")?.get();
        let days = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs() / 86_400;
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let command = format!("cargo run --release -p load-tests -- {}", arguments.join(" "));
        Ok(Self { cpu, cores, date: date(days), command })
    }
}

fn cpu_model(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim())
}

/// The date of a day, counted from 1970-01-01.
fn date(mut day: u64) -> String {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if day < length {
            break;
        }
        day -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(measured: f64) -> Report {
        Report {
            name: "ttft",
            title: "Time",
            tables: Table::only(vec!["path", "ms"], vec![vec!["resident".into(), "31".into()]]),
            bounds: vec![Bound { what: "reloaded / resident".into(), measured, limit: Limit::AtMost(1.25), unit: "" }],
            notes: vec!["A note.".into()],
            raw: None,
        }
    }

    #[test]
    fn a_report_is_a_table_its_bounds_its_notes_and_its_machine() {
        let machine = Machine { cpu: "CPU".into(), cores: 2, date: "2026-11-25".into(), command: "run".into() };
        let expected = "# Time\n\n| path | ms |\n|---|---:|\n| resident | 31 |\n\n\
            | bound | measured | wanted | holds |\n|---|---:|---:|---:|\n\
            | reloaded / resident | 1.20 | at most 1.25 | yes |\n\n\
            - A note.\n- Machine: CPU, 2 cores. Date: 2026-11-25 (UTC). Command: `run`.\n";
        assert_eq!(report(1.2).markdown(&machine), expected);
        assert!(report(1.3).markdown(&machine).contains("| 1.30 | at most 1.25 | **NO** |"));
    }

    #[test]
    fn a_figure_that_is_no_number_holds_no_bound() {
        let at_least = Limit::AtLeast(2.0);
        let holds = |measured, limit| Bound { what: String::new(), measured, limit, unit: "" }.holds();
        assert_eq!([1.9, 2.0, f64::NAN].map(|measured| holds(measured, at_least)), [false, true, false]);
        let at_most = Limit::AtMost(2.0);
        assert_eq!([2.0, 2.1, f64::NAN].map(|measured| holds(measured, at_most)), [true, false, false]);
    }

    #[test]
    fn days_become_dates() {
        let dates = [0, 58, 59, 11_016, 20_782].map(date);
        assert_eq!(dates, ["1970-01-01", "1970-02-28", "1970-03-01", "2000-02-29", "2026-11-25"]);
    }

    #[test]
    fn the_cpu_has_a_name() {
        assert_eq!(cpu_model("processor\t: 0\nmodel name\t: AMD EPYC\nmodel\t: 1\n"), Some("AMD EPYC"));
    }
}
