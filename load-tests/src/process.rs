//! How much of the processors does a program take, for how long, and what else did the machine do meanwhile?

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};

/// The kernel's unit in `/proc/*/stat`: the same on all of Linux that programs see.
const TICKS_PER_S: f64 = 100.0;

/// What a program took.
#[derive(Clone, Copy, Default, Debug)]
pub struct Usage {
    pub wall_s: f64,
    /// CPU time of all its threads, in user and kernel mode.
    pub cpu_s: f64,
    /// CPU time that others had meanwhile, other machines on the same processors among them.
    pub others_s: f64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.wall_s += other.wall_s;
        self.cpu_s += other.cpu_s;
        self.others_s += other.others_s;
    }
}

/// Runs a program to its end. Returns what it printed. No other child may be waited for meanwhile: its time would be
/// counted too.
pub fn run(command: &mut Command) -> anyhow::Result<(String, Usage)> {
    let watch = Watch::start(None)?;
    let output = command.output().with_context(|| format!("{command:?} can't be started"))?;
    let usage = watch.usage()?;
    if !output.status.success() {
        bail!("{command:?} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok((String::from_utf8_lossy(&output.stdout).into_owned(), usage))
}

/// Watches a running program, or this one's children until they have been waited for.
pub struct Watch {
    program: Option<u32>,
    started: Instant,
    before: Clocks,
}

/// CPU time since the start of each.
struct Clocks {
    program_s: f64,
    own_s: f64,
    machine_s: f64,
}

impl Watch {
    pub fn start(program: Option<u32>) -> anyhow::Result<Self> {
        Ok(Self { program, started: Instant::now(), before: Clocks::read(program)? })
    }

    /// What was taken since the start.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        let (before, now) = (&self.before, Clocks::read(self.program)?);
        let cpu_s = now.program_s - before.program_s;
        let own_s = now.own_s - before.own_s;
        // The clocks are not read at the same moment.
        let others_s = (now.machine_s - before.machine_s - own_s - cpu_s).max(0.0);
        Ok(Usage { wall_s: self.started.elapsed().as_secs_f64(), cpu_s, others_s })
    }
}

impl Clocks {
    fn read(program: Option<u32>) -> anyhow::Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("{path} can't be read"));
        let own = times(&read("/proc/self/stat")?).context("/proc/self/stat has no times")?;
        let machine_s = busy(&read("/proc/stat")?).context("/proc/stat has no times")?;
        let program_s = match program {
            Some(pid) => times(&read(&format!("/proc/{pid}/stat"))?).context("the program has no times")?.own_s,
            None => own.children_s,
        };
        Ok(Self { program_s, own_s: own.own_s, machine_s })
    }
}

/// CPU time of a program's threads of this name since they began, in seconds.
pub fn thread_s(pid: u32, name: &str) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/task");
    let tasks = std::fs::read_dir(&path).with_context(|| format!("{path}: the program has ended"))?;
    let of = |task: std::path::PathBuf| {
        let comm = std::fs::read_to_string(task.join("comm")).ok()?;
        let spent = std::fs::read_to_string(task.join("schedstat")).ok()?;
        let ns: f64 = spent.split_whitespace().next()?.parse().ok()?;
        (comm.trim() == name).then_some(ns / 1e9)
    };
    // Some end while they are looked at.
    let found: Vec<f64> = tasks.filter_map(|task| of(task.ok()?.path())).collect();
    if found.is_empty() {
        bail!("the program has no thread `{name}`");
    }
    Ok(found.iter().sum())
}

/// The first line of `/proc/stat`: user, nice, system, idle, waiting for disks, interrupts of two kinds, other machines.
fn busy(stat: &str) -> Option<f64> {
    let ticks: Vec<f64> =
        stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().filter_map(|tick| tick.parse().ok()).collect();
    match ticks[..] {
        [user, nice, system, _, _, hard, soft, others, ..] => {
            Some((user + nice + system + hard + soft + others) / TICKS_PER_S)
        }
        _ => None,
    }
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
    fn a_machine_is_busy_with_all_but_idling_and_waiting() {
        assert_eq!(busy("cpu  100 20 30 9000 800 4 5 6 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n"), Some(1.65));
        assert_eq!(busy("intr 1\n"), None);
    }

    #[test]
    fn a_threads_time_is_its_own_and_one_that_there_is_not_is_told() {
        let work = || {
            std::hint::black_box((0..20_000_000_u64).fold(0, |sum, n| std::hint::black_box(sum ^ n)));
            thread_s(std::process::id(), "worker-of-test").unwrap()
        };
        let spent = std::thread::Builder::new().name("worker-of-test".into()).spawn(work).unwrap().join().unwrap();
        assert!(spent > 0.0);
        assert!(thread_s(std::process::id(), "nobody").is_err());
    }

    #[test]
    fn a_program_that_fails_is_an_error_with_its_own_words() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).err().unwrap().to_string();
        assert!(error.contains("broken"), "{error}");
        assert_eq!(run(Command::new("echo").arg("said")).unwrap().0, "said\n");
    }
}
