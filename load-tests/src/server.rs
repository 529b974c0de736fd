//! How does a measurement get a server of its own?
//!
//! The real program, on a free port, in a data folder that goes when the server does.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::Common;
use crate::process::thread_s;

/// A model may be on a slow disk.
const START_DEADLINE: Duration = Duration::from_secs(120);
const LISTENS: &str = "listening on ";

/// A running server. Dropping it ends it, and removes its data.
pub struct Server {
    process: Child,
    url: String,
    data: DataFolder,
}

impl Server {
    /// Starts a server and waits until it listens. `settings`: `key=value`, over the defaults.
    pub fn start(common: &Common, settings: &[&str]) -> anyhow::Result<Self> {
        Self::start_with(common, settings, &[])
    }

    /// As `start`, with these variables in the server's environment.
    pub fn start_with(common: &Common, settings: &[&str], environment: &[(&str, &str)]) -> anyhow::Result<Self> {
        let program = program(common)?;
        let data = DataFolder::new()?;
        let model = &common.model;
        let fixed = [
            "server.listen=127.0.0.1:0".to_owned(),
            format!("server.data_dir={}", data.0.display()),
            format!("model.path={}", model.display()),
            "log.level=warn".to_owned(),
        ];
        let mut command = Command::new(&program);
        // What is measured is the defaults, not what the shell has set.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("REKINDLE__")) {
            command.env_remove(name);
        }
        command.arg("serve").stdin(Stdio::null()).stdout(Stdio::piped());
        for setting in fixed.iter().map(String::as_str).chain(settings.iter().copied()) {
            command.args(["--set", setting]);
        }
        command.envs(environment.iter().copied());
        let process = command.spawn().with_context(|| format!("{} can't be started", program.display()))?;
        // From here on the process ends with the value, whatever goes wrong.
        let mut server = Self { process, url: String::new(), data };
        let output = server.process.stdout.take().context("the server's output is not a pipe")?;
        let (tell, told) = sync_channel(1);
        std::thread::spawn(move || read(output, &tell));
        match told.recv_timeout(START_DEADLINE) {
            Ok(url) => server.url = url,
            Err(_) => bail!("the server did not say that it listens; its own words are above"),
        }
        Ok(server)
    }

    /// Such as `http://127.0.0.1:41234`.
    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The key that the server made for admins.
    pub fn admin_key(&self) -> anyhow::Result<String> {
        let path = self.data.0.join("admin.key");
        let key = std::fs::read_to_string(&path).with_context(|| format!("{} can't be read", path.display()))?;
        Ok(key.trim().to_owned())
    }

    /// CPU time of the threads of this name until now, in seconds.
    pub fn thread_s(&self, name: &str) -> anyhow::Result<f64> {
        thread_s(self.pid(), name)
    }

    /// Memory that the server has now.
    pub fn memory(&self) -> anyhow::Result<Memory> {
        Memory::of(self.pid())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself, which is as well.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// Tells the address as soon as the server does, and reads on, so that it never waits for a full pipe.
fn read(output: ChildStdout, tell: &SyncSender<String>) {
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        if let Some(url) = line.strip_prefix(LISTENS) {
            // Nobody listens any more if it took too long.
            drop(tell.send(url.trim().to_owned()));
        }
    }
}

fn program(common: &Common) -> anyhow::Result<PathBuf> {
    let program = match &common.server {
        Some(program) => program.clone(),
        None => std::env::current_exe().context("this program's own path is unknown")?.with_file_name("rekindle"),
    };
    if !program.exists() {
        bail!("there is no server at {}; build it with `make`, or name it with --server", program.display());
    }
    if !common.model.exists() {
        bail!("there is no model at {}; `rekindle pull` gets one, or name it with --model", common.model.display());
    }
    Ok(program)
}

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Memory {
    /// All that is in RAM, pages of files included.
    pub resident_bytes: f64,
    /// The process's own: heap, stacks, pools.
    pub own_bytes: f64,
    /// The most that ever was in RAM.
    pub peak_bytes: f64,
}

impl Memory {
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/status");
        let status = std::fs::read_to_string(&path).with_context(|| format!("{path}: the server has ended"))?;
        Self::parse(&status).with_context(|| format!("{path} does not say how much memory is used"))
    }

    fn parse(status: &str) -> Option<Self> {
        let bytes = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
            let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(kib * 1024.0)
        };
        Some(Self { resident_bytes: bytes("VmRSS")?, own_bytes: bytes("RssAnon")?, peak_bytes: bytes("VmHWM")? })
    }
}

/// A folder of this process's own, removed with its contents.
struct DataFolder(PathBuf);

impl DataFolder {
    fn new() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("rekindle-load-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).with_context(|| format!("{} can't be made", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for DataFolder {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_dir_all(path) {
        eprintln!("{} stays behind: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_what_the_kernel_says() {
        let status =
            "Name:\trekindle\nVmHWM:\t    4096 kB\nVmRSS:\t  2048 kB\nRssAnon:\t    1024 kB\nRssFile:\t 1024 kB\n";
        let (resident_bytes, own_bytes, peak_bytes) = (2_097_152.0, 1_048_576.0, 4_194_304.0);
        assert_eq!(Memory::parse(status), Some(Memory { resident_bytes, own_bytes, peak_bytes }));
        assert_eq!(Memory::parse("VmRSS: 1 kB"), None);
    }

    #[test]
    fn two_data_folders_are_two_and_both_go() {
        let (first, second) = (DataFolder::new().unwrap(), DataFolder::new().unwrap());
        let paths = [first.0.clone(), second.0.clone()];
        assert!(paths[0] != paths[1] && paths.iter().all(|path| path.is_dir()));
        drop((first, second));
        assert!(!paths.iter().any(|path| path.exists()));
    }
}
