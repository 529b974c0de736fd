//! How do the two servers stand the same chats?
//!
//! Each on a process of its own, one at a time, on the same file and as many threads.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::chats::{Answer, Played, Workload, play};
use super::peer::{Level, Peer};
use crate::Common;
use crate::numbers::{figure, median, p95};
use crate::process::{Usage, Watch};
use crate::server::{Memory, Server};

/// A model may be on a slow disk.
const START_DEADLINE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const SLOTS: &str = "4";
const MIB: u64 = 1 << 20;

/// Memory that each server may have for KV.
#[derive(Clone, Copy, Debug)]
pub enum Room {
    /// What each takes if it isn't told otherwise, which is more than the chats need.
    Plenty,
    /// The same for both.
    Equal { device_tokens: u64, device_bytes: u64, host_mib: u64 },
}

/// One server, all its runs.
#[derive(Default)]
pub struct Arm {
    pub runs: Vec<Played>,
    /// While chats ran.
    pub usage: Usage,
    pub peak_bytes: f64,
    pub command: String,
}

impl Arm {
    fn answers(&self) -> impl Iterator<Item = &Answer> {
        self.runs.iter().flat_map(|run| &run.turns).flatten()
    }

    pub fn first_ttfts_ms(&self) -> Vec<f64> {
        self.runs.iter().flat_map(|run| run.turns.iter().take(1)).flatten().map(|answer| answer.ttft_ms).collect()
    }

    pub fn later_ttfts_ms(&self) -> Vec<f64> {
        self.runs.iter().flat_map(|run| run.turns.iter().skip(1)).flatten().map(|answer| answer.ttft_ms).collect()
    }

    pub fn wall_s(&self) -> f64 {
        self.runs.iter().map(|run| run.wall_s).sum()
    }

    pub fn generated_per_s(&self) -> f64 {
        self.answers().map(|answer| answer.output_tokens as f64).sum::<f64>() / self.wall_s()
    }

    pub fn prompt_tokens(&self) -> u64 {
        self.answers().map(|answer| answer.prompt_tokens).sum()
    }

    pub fn cached_tokens(&self) -> u64 {
        self.answers().map(|answer| answer.cached_tokens).sum()
    }

    pub fn json(&self) -> Value {
        let ttfts = |run: &Played| -> Vec<Vec<f64>> {
            let rounded = |answer: &Answer| (answer.ttft_ms * 10.0).round() / 10.0;
            run.turns.iter().map(|turn| turn.iter().map(rounded).collect()).collect()
        };
        json!({
            "command": self.command, "wall_s": self.wall_s(), "cpu_s": self.usage.cpu_s, "others_cpu_s": self.usage.others_s, "peak_bytes": self.peak_bytes,
            "generated_tokens_per_s": self.generated_per_s(),
            "prompt_tokens": self.prompt_tokens(), "cached_tokens": self.cached_tokens(),
            "ttft_ms_by_run_and_turn": self.runs.iter().map(ttfts).collect::<Vec<_>>(),
        })
    }

    async fn run(&mut self, url: &str, pid: u32, workload: Workload) -> anyhow::Result<()> {
        let watch = Watch::start(Some(pid))?;
        let played = play(url, workload).await?;
        self.usage += watch.usage()?;
        self.peak_bytes = self.peak_bytes.max(Memory::of(pid)?.peak_bytes);
        self.runs.push(played);
        let later = self.later_ttfts_ms();
        eprintln!(
            "[compare]   {}: later turns' TTFT median {} ms, p95 {} ms, {} generated tokens/s",
            self.command.split(' ').next().unwrap_or_default(),
            figure(median(&later)),
            figure(p95(&later)),
            figure(self.generated_per_s())
        );
        Ok(())
    }
}

/// Both servers on one file.
pub struct Pair {
    pub ours: Arm,
    pub peer: Arm,
}

impl Pair {
    pub fn generated_ratio(&self) -> f64 {
        self.ours.generated_per_s() / self.peer.generated_per_s()
    }

    /// Of a figure of the later turns' TTFT.
    pub fn ttft_ratio(&self, of: fn(&[f64]) -> f64) -> f64 {
        of(&self.ours.later_ttfts_ms()) / of(&self.peer.later_ttfts_ms())
    }
}

/// Runs both servers in turn, `rounds` times.
pub async fn measure(
    common: &Common,
    peer: &Peer,
    file: &Path,
    (workload, room): (Workload, Room),
    (threads, rounds): (usize, usize),
) -> anyhow::Result<Pair> {
    let mut pair = Pair { ours: Arm::default(), peer: Arm::default() };
    for round in 0..rounds {
        // Neither always comes first.
        for is_ours in [round % 2 == 0, round % 2 == 1] {
            if is_ours {
                let settings = settings(room, threads);
                let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
                let model = Common { model: file.to_owned(), ..common.clone() };
                let server = Server::start(&model, &settings)?;
                pair.ours.command = format!("rekindle serve --set {}", settings.join(" --set "));
                pair.ours.run(server.url(), server.pid(), workload).await?;
            } else {
                let arguments = arguments(room, threads);
                let server = LlamaServer::start(peer, file, &arguments).await?;
                pair.peer.command = format!("llama-server {}", arguments.join(" "));
                pair.peer.run(&server.url, server.process.id(), workload).await?;
            }
        }
    }
    Ok(pair)
}

fn settings(room: Room, threads: usize) -> Vec<String> {
    let mut settings = vec![format!("engine.threads={threads}")];
    if let Room::Equal { device_bytes, host_mib, .. } = room {
        settings.push(format!("kv.device_bytes={device_bytes}"));
        settings.push(format!("kv.host_bytes={}", host_mib * MIB));
    }
    settings
}

fn arguments(room: Room, threads: usize) -> Vec<String> {
    let window = match room {
        Room::Plenty => 8192,
        Room::Equal { device_tokens, .. } => device_tokens,
    };
    let (window, threads) = (window.to_string(), threads.to_string());
    let mut arguments: Vec<String> = ["-np", SLOTS, "-c", &window, "-kvu", "-t", &threads].map(str::to_owned).into();
    if let Room::Equal { host_mib, .. } = room {
        arguments.extend(["--cache-ram".to_owned(), host_mib.to_string()]);
    }
    arguments
}

/// A running `llama-server`. Dropping it ends it.
struct LlamaServer {
    process: Child,
    url: String,
}

impl LlamaServer {
    async fn start(peer: &Peer, file: &Path, arguments: &[String]) -> anyhow::Result<Self> {
        // It takes no port 0. Nobody else should take this one in the moment between.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).context("no free port")?.port();
        let mut command = Command::new(peer.program(Level::Native, "llama-server"));
        command.arg("-m").arg(file).args(arguments).args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        let log = peer.server_log();
        let lines = std::fs::File::create(&log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(lines);
        let process = command.spawn().with_context(|| format!("{command:?} can't be started"))?;
        let mut server = Self { process, url: format!("http://127.0.0.1:{port}") };
        let client = reqwest::Client::builder().no_proxy().build()?;
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let health = client.get(format!("{}/health", server.url)).send().await;
            if health.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(server);
            }
            if server.process.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("{command:?} did not start; its own words are in {}", log.display());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

impl Drop for LlamaServer {
    fn drop(&mut self) {
        // It may have ended by itself, which is as well.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
