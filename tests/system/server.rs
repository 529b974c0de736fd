//! How does a test start the program, watch it, and end it?
//!
//! Invariant: no server outlives its test, and a test whose server warned, failed or panicked unexpectedly fails too.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

/// Longest start, model load included, on a busy machine and with debug assertions.
const START: Duration = Duration::from_secs(60);
/// Longest end of an idle server.
pub const END: Duration = Duration::from_secs(15);
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(5);

/// The whole machine: tests that time things or fill both cores run one after another.
pub async fn machine() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::const_new(());
    MACHINE.lock().await
}

/// The model that the tests talk to.
pub fn model() -> PathBuf {
    let path = std::env::var_os("REKINDLE_TEST_MODEL").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "there is no model at {}; `make test` fetches it, or name another with REKINDLE_TEST_MODEL",
        path.display()
    );
    path
}

/// The program, told where the model is and nothing of the environment's settings.
pub fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rekindle"));
    command.args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("REKINDLE_")) {
        command.env_remove(name);
    }
    command
}

/// What a server leaves on disk; outlives the processes that use it.
pub struct Home {
    folder: TempDir,
}

impl Home {
    pub fn new() -> Self {
        Self { folder: TempDir::with_prefix("rekindle-system-").unwrap() }
    }

    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The admins' key that a server without a tenants file makes.
    pub fn admin_key(&self) -> String {
        std::fs::read_to_string(self.data().join("admin.key")).unwrap().trim().to_owned()
    }

    pub fn log(&self) -> PathBuf {
        self.folder.path().join("log.jsonl")
    }

    /// Everything that servers logged here so far.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap()
    }

    /// Fails on a line that asks a person to look, and on one that is no event at all, such as a panic's.
    pub fn assert_nothing_odd_was_logged(&self) {
        for line in self.logged().lines() {
            let event: Option<serde_json::Value> = serde_json::from_str(line).ok();
            let level = event.as_ref().and_then(|event| event["level"].as_str()).unwrap_or("none");
            assert!(["INFO", "DEBUG", "TRACE"].contains(&level), "the server logged: {line}");
        }
    }

    /// A `serve` of this home on a free port, with `--set` pairs.
    pub fn serve(&self, settings: &[String]) -> Command {
        self.serve_at("127.0.0.1:0", settings)
    }

    pub fn serve_at(&self, address: &str, settings: &[String]) -> Command {
        let mut command = program(&["serve", "--listen", address, "--set", "log.format=json"]);
        command.arg("--model").arg(model()).arg("--data-dir").arg(self.data());
        for pair in settings {
            command.args(["--set", pair]);
        }
        command
    }
}

/// A running server.
pub struct Server<'home> {
    child: Child,
    home: &'home Home,
    /// `http://127.0.0.1:…`
    pub url: String,
    /// From the process's start to its first readiness.
    pub start_time: Duration,
}

impl<'home> Server<'home> {
    /// Starts a server and returns when it listens.
    pub fn start(home: &'home Home, settings: &[String]) -> Self {
        Self::start_at(home, "127.0.0.1:0", settings)
    }

    /// The same at an address.
    pub fn start_at(home: &'home Home, address: &str, settings: &[String]) -> Self {
        Self::spawn(home, home.serve_at(address, settings))
    }

    /// Starts a server by a command of `Home::serve`.
    pub fn spawn(home: &'home Home, mut command: Command) -> Self {
        let started = Instant::now();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(home.log()).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (told, heard) = sync_channel(1);
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some(url) = line.strip_prefix("listening on ") {
                    // A test that has given up doesn't listen any more.
                    drop(told.try_send(url.to_owned()));
                }
            }
        });
        // From here on the child ends with the server, whatever happens.
        let mut server = Self { child, home, url: String::new(), start_time: Duration::ZERO };
        server.url = heard.recv_timeout(START).expect("the server does not say where it listens");
        server.start_time = started.elapsed();
        server
    }

    /// Ends the process at once, as a power failure would.
    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Time on the processors that the threads of this name have had.
    pub fn cpu_time(&self, thread: &str) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let of = |task: &std::path::Path| {
            let name = std::fs::read_to_string(task.join("comm")).ok()?;
            let spent = std::fs::read_to_string(task.join("schedstat")).ok()?;
            let ns = spent.split_whitespace().next()?.parse().ok()?;
            (name.trim() == thread).then_some(Duration::from_nanos(ns))
        };
        tasks.filter_map(|task| of(&task.ok()?.path())).sum()
    }

    /// Asks the server to drain and end.
    pub fn terminate(&self) {
        let sent = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success(), "the server could not be signalled");
    }

    /// Waits until the process has ended.
    pub async fn ended(&mut self, deadline: Duration) -> ExitStatus {
        eventually(deadline, "the server ends", async || self.child.try_wait().unwrap()).await
    }

    /// Ends the server in good order and checks that it had nothing to complain about.
    pub async fn finish(mut self) {
        self.terminate();
        let status = self.ended(END).await;
        assert!(status.success(), "the server ended with {status}");
        self.home.assert_nothing_odd_was_logged();
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.home.log()).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines.iter().skip(lines.len().saturating_sub(20));
            eprintln!("--- the server's last words\n{}", tail.copied().collect::<Vec<_>>().join("\n"));
        }
    }
}

/// Looks again and again until there is an answer; fails with `what` at the deadline.
pub async fn eventually<T>(deadline: Duration, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    let mut polls = tokio::time::interval(POLL);
    loop {
        polls.tick().await;
        if let Some(answer) = look().await {
            return answer;
        }
        assert!(started.elapsed() < deadline, "not within {deadline:?}: {what}");
    }
}
