//! The `rekindle` program: reads its arguments and runs one command.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use rekindle::cli::chat::{self, ChatArgs};
use rekindle::cli::key::{self, KeyArgs};
use rekindle::cli::pull::{self, PullArgs};
use rekindle::cli::replay::{self, ReplayArgs};
use rekindle::config::{Config, Layers, LogFormat};
use rekindle::telemetry::trace::{TraceSettings, Traces};
use rekindle::telemetry::{log, metrics};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A chat server whose conversations keep their KV cache
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "To begin: `rekindle pull`, `rekindle serve`, then `rekindle chat` in another terminal."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a model over HTTP, until a signal ends it
    Serve(ServeArgs),
    /// Chat with a running server from the terminal
    Chat(ChatArgs),
    /// Fetch a model file, or go on where a broken download broke
    Pull(PullArgs),
    /// Make an API key, for a tenant or an admin
    Key(KeyArgs),
    /// Repeat what the server decided, or say what other settings would have cost
    Replay(ReplayArgs),
    /// Print what the server's metrics are called and mean, as Markdown
    Metrics,
}

/// Every key of config/default.toml can be set by --set, by a file or by the environment: `kv.device_bytes` is
/// `REKINDLE__KV__DEVICE_BYTES`. Later ones win: defaults, file, environment, --set, the flags here.
#[derive(clap::Args)]
struct ServeArgs {
    /// The model, a GGUF file [default: models/SmolLM2-135M-Instruct.Q4_1.gguf]
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Address and port to listen on [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Folder of what outlives the process [default: data]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// A TOML file with tenants and the hashes of their keys [default: one tenant, any key or none]
    #[arg(long, value_name = "FILE")]
    tenants: Option<PathBuf>,
    /// A TOML file with any of the keys of config/default.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set any key, such as kv.device_bytes=256MiB or engine.threads=2; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pairs: Vec<String>,
}

impl ServeArgs {
    fn config(&self) -> anyhow::Result<Config> {
        let text = |path: &Option<PathBuf>| -> anyhow::Result<Option<String>> {
            let Some(path) = path else { return Ok(None) };
            let text = path.to_str().with_context(|| format!("{} is not valid UTF-8", path.display()))?;
            Ok(Some(text.to_owned()))
        };
        let mut layers = Layers::defaults()?;
        if let Some(path) = &self.config {
            layers = layers.file(path)?;
        }
        let config = layers
            .environment(
                std::env::vars_os()
                    .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?))),
            )?
            .pairs(self.pairs.iter().map(String::as_str))?
            .flag("--model", "model.path", text(&self.model)?.as_deref())?
            .flag("--listen", "server.listen", self.listen.as_deref())?
            .flag("--data-dir", "server.data_dir", text(&self.data_dir)?.as_deref())?
            .flag("--tenants", "tenants.file", text(&self.tenants)?.as_deref())?
            .build()?;
        Ok(config)
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rekindle: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(arguments) => {
            let config = arguments.config()?;
            let format = match config.log.format {
                LogFormat::Text => log::Format::Text,
                LogFormat::Json => log::Format::Json,
            };
            let collector = config.telemetry.otlp_endpoint.clone();
            let collector = collector.map(|endpoint| TraceSettings { endpoint, ratio: config.telemetry.trace_ratio });
            let traces = collector.as_ref().map(Traces::start).transpose()?;
            log::init(format, &config.log.level, traces.as_ref())?;
            let served = rekindle::server::run(config).await;
            traces.into_iter().for_each(Traces::end);
            Ok(served?)
        }
        Command::Chat(arguments) => chat::run(arguments).await,
        Command::Pull(arguments) => pull::run(arguments).await,
        Command::Key(arguments) => Ok(key::run(&arguments)?),
        Command::Replay(arguments) => replay::run(&arguments),
        Command::Metrics => {
            print!("{}", metrics::page());
            Ok(())
        }
    }
}
