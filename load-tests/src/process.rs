//! How much of the processors does a program take, and how long does it run?

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};

/// The kernel's unit in `/proc/*/stat`: the same on all of Linux that programs see.
const TICKS_PER_S: f64 = 100.0;

/// A program that has ended well.
pub struct Finished {
    pub output: String,
    pub wall_s: f64,
    /// Of all its threads, in user and kernel mode.
    pub cpu_s: f64,
}

/// Runs a program to its end. No other child may be waited for meanwhile: its time would be counted too.
pub fn run(command: &mut Command) -> anyhow::Result<Finished> {
    let (started, before_s) = (Instant::now(), children_cpu_s()?);
    let output = command.output().with_context(|| format!("{command:?} can't be started"))?;
    let (wall_s, cpu_s) = (started.elapsed().as_secs_f64(), children_cpu_s()? - before_s);
    if !output.status.success() {
        bail!("{command:?} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(Finished { output: String::from_utf8_lossy(&output.stdout).into_owned(), wall_s, cpu_s })
}

/// What a running program has taken so far.
pub fn cpu_s(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("{path}: the program has ended"))?;
    times(&stat).map(|times| times.own_s).with_context(|| format!("{path} has no times"))
}

fn children_cpu_s() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").context("no /proc/self/stat")?;
    times(&stat).map(|times| times.children_s).context("/proc/self/stat has no times")
}

#[derive(Debug, PartialEq)]
struct Times {
    own_s: f64,
    /// Of children that ended and were waited for.
    children_s: f64,
}

/// Fields 14 to 17; the second is a name that may hold anything, a bracket too.
fn times(stat: &str) -> Option<Times> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let ticks: Vec<f64> = after_name.split_whitespace().skip(11).take(4).filter_map(|tick| tick.parse().ok()).collect();
    match ticks[..] {
        [user, system, children_user, children_system] => Some(Times {
            own_s: (user + system) / TICKS_PER_S,
            children_s: (children_user + children_system) / TICKS_PER_S,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_past_a_name_with_brackets() {
        let stat = "12 (a) b) S 1 12 12 0 -1 4194304 90 0 0 0 150 50 400 100 20 0 3 0 1";
        assert_eq!(times(stat), Some(Times { own_s: 2.0, children_s: 5.0 }));
        assert_eq!(times("12 (a) S 1"), None);
    }

    #[test]
    fn a_program_that_fails_is_an_error_with_its_own_words() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).err().unwrap().to_string();
        assert!(error.contains("broken"), "{error}");
        assert_eq!(run(Command::new("echo").arg("said")).unwrap().output, "said\n");
    }
}
