//! What does the system say of this process, how many files may it have open, and does it get huge pages?
//!
//! Read when somebody scrapes, from `/proc`; where there is none, what it would have said is left out.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

/// A conversation that runs, a socket and a connection each take one.
const FEW_FILES: u64 = 4096;

pub(super) fn cpu_seconds() -> Option<f64> {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Some(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

pub(super) fn resident_bytes() -> Option<f64> {
    Some(status("VmRSS:")?.strip_suffix("kB")?.trim().parse::<f64>().ok()? * 1024.0)
}

pub(super) fn threads() -> Option<f64> {
    status("Threads:")?.parse().ok()
}

pub(super) fn open_fds() -> Option<f64> {
    // One of them is the folder's own.
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as f64)
}

pub(super) fn max_fds() -> Option<f64> {
    Some(getrlimit(Resource::Nofile).current.map_or(f64::INFINITY, |most| most as f64))
}

/// Seconds since 1970.
pub(super) fn start_time_s() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is a name that may hold anything, in brackets; the 22nd is ticks since the machine's start.
    let ticks: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let machine = std::fs::read_to_string("/proc/stat").ok()?;
    let booted: f64 = machine.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(booted + ticks / rustix::param::clock_ticks_per_second() as f64)
}

/// A line of `/proc/self/status`.
fn status(name: &str) -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()))
}

/// Says so where the system never gives huge pages: weights and KV ask for them.
pub fn look_for_huge_pages() {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    // The choice in force stands in brackets: `always [madvise] never`.
    if std::fs::read_to_string(SETTING).is_ok_and(|choices| choices.contains("[never]")) {
        tracing::warn!("{SETTING} is `never`; with `madvise` decoding is a quarter faster");
    }
}

/// Lets the process have as many files open as the system ever gives it, and says so where that is few.
pub fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let at_most = |limit: Option<u64>| limit.unwrap_or(u64::MAX);
    if at_most(current) < at_most(maximum)
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, files = at_most(current), "the limit of open files could not be raised");
    }
    let files = at_most(getrlimit(Resource::Nofile).current);
    if files < FEW_FILES {
        tracing::warn!(files, "few files may be open, and each connection is one: raise the hard limit (`ulimit -Hn`)");
    } else {
        tracing::debug!(files, "so many files may be open");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_files_may_be_open_as_the_system_gives() {
        raise_file_limit();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
    }
}
