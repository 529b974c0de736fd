//! What did a measurement find, on which machine, and did its bounds hold?

use std::fmt::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;

use crate::numbers::figure;

/// A figure that must not be above its limit.
pub struct Bound {
    pub what: &'static str,
    pub measured: f64,
    pub limit: f64,
    /// `""` for a ratio or a count.
    pub unit: &'static str,
}

impl Bound {
    fn holds(&self) -> bool {
        // Written so that a figure that is no number does not pass.
        self.measured <= self.limit
    }
}

/// One measurement, ready to be read.
pub struct Report {
    /// The command, and the file's name.
    pub name: &'static str,
    pub title: &'static str,
    pub columns: Vec<&'static str>,
    pub rows: Vec<Vec<String>>,
    pub bounds: Vec<Bound>,
    /// Sentences that a reader needs beside the table.
    pub notes: Vec<String>,
}

impl Report {
    /// Prints the report and writes it to `<folder>/<name>.md`. Whether every bound held.
    pub fn keep(&self, folder: &Path) -> anyhow::Result<bool> {
        let text = self.markdown(&Machine::this()?);
        println!("\n{text}");
        let path = folder.join(self.name).with_extension("md");
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&path, &text))
            .with_context(|| format!("the table can't be kept in {}", path.display()))?;
        eprintln!("[{}] kept in {}", self.name, path.display());
        Ok(self.bounds.iter().all(Bound::holds))
    }

    fn markdown(&self, machine: &Machine) -> String {
        let mut text = format!("# {}\n\n", self.title);
        table(&mut text, &self.columns, &self.rows);
        if !self.bounds.is_empty() {
            let rows = self.bounds.iter().map(|bound| {
                let with_unit = |value| format!("{} {}", figure(value), bound.unit).trim_end().to_owned();
                let verdict = if bound.holds() { "yes" } else { "**NO**" };
                vec![bound.what.to_owned(), with_unit(bound.measured), with_unit(bound.limit), verdict.to_owned()]
            });
            text.push('\n');
            table(&mut text, &["bound", "measured", "at most", "holds"], &rows.collect::<Vec<_>>());
        }
        text.push('\n');
        for note in &self.notes {
            // Writing to a string can't fail.
            let _ = writeln!(text, "- {note}");
        }
        let Machine { cpu, cores, date, command } = machine;
        let _ = writeln!(text, "- Machine: {cpu}, {cores} cores. Date: {date} (UTC). Command: `{command}`.");
        text
    }
}

fn table(text: &mut String, columns: &[&str], rows: &[Vec<String>]) {
    let _ = writeln!(text, "| {} |", columns.join(" | "));
    // Everything but the first column is a figure.
    let rules: Vec<&str> = (0..columns.len()).map(|column| if column == 0 { "---" } else { "---:" }).collect();
    let _ = writeln!(text, "|{}|", rules.join("|"));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
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
            columns: vec!["path", "ms"],
            rows: vec![vec!["resident".into(), "31".into()]],
            bounds: vec![Bound { what: "reloaded / resident", measured, limit: 1.25, unit: "" }],
            notes: vec!["A note.".into()],
        }
    }

    #[test]
    fn a_report_is_a_table_its_bounds_its_notes_and_its_machine() {
        let machine = Machine { cpu: "CPU".into(), cores: 2, date: "2026-11-25".into(), command: "run".into() };
        let expected = "# Time\n\n| path | ms |\n|---|---:|\n| resident | 31 |\n\n\
            | bound | measured | at most | holds |\n|---|---:|---:|---:|\n| reloaded / resident | 1.20 | 1.25 | yes |\n\n\
            - A note.\n- Machine: CPU, 2 cores. Date: 2026-11-25 (UTC). Command: `run`.\n";
        assert_eq!(report(1.2).markdown(&machine), expected);
        assert!(report(1.3).markdown(&machine).contains("| 1.30 | 1.25 | **NO** |"));
    }

    #[test]
    fn a_figure_that_is_no_number_holds_no_bound() {
        assert!(!report(f64::NAN).bounds.iter().all(Bound::holds));
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
