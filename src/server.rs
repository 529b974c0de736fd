//! How does a server come to life, and how does it end?
//!
//! Builds everything once, from the bottom up, and takes it down in the opposite order: first nobody new, then nobody
//! running, then the engine, then the store. If the engine's thread panics the process ends: half an engine is worse than
//! a restart, and sessions recover from the store.

mod dashboard;
mod settings;

use std::io::{IsTerminal, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use actix_web::middleware::{NormalizePath, TrailingSlash, from_fn};
use actix_web::{App, HttpServer, web};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::api::{self, ApiSettings, ApiState};
use crate::config::tenants::TenantsError;
use crate::config::{self, Config};
use crate::dashboard::{Dashboard, Known};
use crate::engine::status::EngineStatus;
use crate::engine::thread::{Engine, StartError};
use crate::engine::{EngineHandle, Language};
use crate::model::decoder::{Compute, Decoder, IsaError, LoadError};
use crate::model::language::LanguageError;
use crate::model::weights::{OpenError, WeightFile};
use crate::model::{KvShape, Model, ModelSpec};
use crate::sessions::Sessions;
use crate::store::embedded::Embedded;
use crate::store::{Store, StoreError};
use crate::telemetry::metrics::{DISK_CONFIGURED, LIVE_SESSIONS, Metrics};
use crate::telemetry::process;
use crate::tenants::admin_key::{self, AdminKeyError};
use crate::tenants::directory::Directory;
use crate::tenants::key::KeyHash;
use crate::tenants::quota;
use crate::tenants::secret::{Secret, SecretError};
use crate::tenants::watch::Watch;
use crate::types::{Grant, KvDtype, KvKey, TokenCount, counted};
use settings::{api_settings, disk_settings, engine_settings, session_settings};

/// HTTP work is parsing and copying: the model gets the cores.
const HTTP_WORKERS: usize = 2;
/// Silence on a stream after which a comment is sent.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// All headers of a request together.
const HEADER_BYTES: usize = 32 << 10;
/// An engine with work that makes no step for this long is not ready for more.
const STALLED: Duration = Duration::from_secs(20);
/// How long open connections may take to send what is left, once their turns have ended.
const HTTP_SHUTDOWN_S: u64 = 5;
/// A connection whose client takes nothing of what was written to it for so long is closed by the kernel.
const STUCK: Duration = Duration::from_secs(30);
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
/// `EX_SOFTWARE`: the engine panicked.
const EXIT_ENGINE_PANICKED: i32 = 70;
/// As a shell reports an interrupted process.
const EXIT_SECOND_SIGNAL: i32 = 130;

/// Why the server did not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("can't listen on {address}: another process does; stop it, or choose another port with --listen")]
    AddressInUse { address: SocketAddr },
    #[error("can't listen on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("there is no model at {path}; `rekindle pull` gets one, or give another with --model")]
    NoModel { path: PathBuf },
    #[error("the model at {path} can't be opened")]
    Open { path: PathBuf, source: OpenError },
    #[error("the model at {path} can't be loaded")]
    Load { path: PathBuf, source: Box<LoadError> },
    #[error("the tokenizer or the chat template of {path} can't be used")]
    Language { path: PathBuf, source: LanguageError },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tenants(#[from] TenantsError),
    #[error(transparent)]
    AdminKey(#[from] AdminKeyError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the engine did not start")]
    Engine(#[from] StartError),
    #[error("`engine.instructions`: {0}")]
    Instructions(#[from] IsaError),
    #[error("the metrics could not be set up: {0}")]
    Metrics(String),
    #[error("signals can't be listened for")]
    Signals(#[source] std::io::Error),
    #[error("the HTTP server failed")]
    Http(#[source] std::io::Error),
    #[error("the engine stopped by itself; its log says why")]
    EngineStopped,
}

/// Serves until a signal, then drains. Runs on any tokio runtime.
pub async fn run(config: Config) -> Result<(), ServeError> {
    // The port comes first, so that a taken one shows before a slow load.
    let listener = listen(config.server.listen)?;
    let address =
        listener.local_addr().map_err(|source| ServeError::Listen { address: config.server.listen, source })?;
    let mut signals = Signals::new().map_err(ServeError::Signals)?;
    let metrics = Metrics::install().map_err(|error| ServeError::Metrics(error.to_string()))?;
    process::raise_file_limit();
    let store = Arc::new(Embedded::open(&config.server.data_dir)?);

    let (model, language) = load(&config)?;
    let spec = model.spec().clone();
    let (tenants, followed) = tenants(&config)?;
    let census = store.census().await?;
    let lives = census.iter().map(|counted| KvKey(counted.id)).collect();
    let disk = disk_settings(&config, tenants.hash_keys(), lives);
    DISK_CONFIGURED.set(f64::from(u8::from(disk.is_some())), &[]);
    let engine = crate::engine::thread::start(Box::new(model), engine_settings(&config, disk))?;
    let tick_zero_us = unix_us();
    let (engine, engine_ended) = watch(engine);
    print(&capacity(&config, &spec, engine.window()));

    let longest_token_bytes = language.longest_token_bytes();
    if let Some((watch, grants, admin)) = followed {
        engine.grant(grants).map_err(|_| ServeError::EngineStopped)?;
        tokio::spawn(follow(watch, Arc::clone(&tenants), admin, engine.clone()));
    }
    let sessions = Sessions::new(
        engine.clone(),
        Arc::new(language),
        Arc::clone(&store) as Arc<dyn Store>,
        session_settings(&config),
    );
    let known = census.into_iter().map(|counted| Known {
        key: KvKey(counted.id),
        tenant: counted.tenant.to_string(),
        tokens: counted.log_tokens,
        created_at: counted.created_at,
        parent: counted.parent.map(KvKey),
        turns: counted.turns,
    });
    let shown = dashboard::settings(&config, &spec, tick_zero_us);
    let dashboard = Dashboard::start(engine.clone(), sessions.clone(), Arc::clone(&tenants), known, shown);
    let readiness = Arc::new(Readiness::new(engine.clone(), Arc::clone(&store) as Arc<dyn Store>));
    let settings = api_settings(&config, &spec, engine.window(), longest_token_bytes, tick_zero_us);
    let state = web::Data::new(api_state(settings, tenants, &engine, &sessions, &readiness, &metrics));
    tokio::spawn(keep_up(metrics));

    let (bare_paths, pages) = (config.api.bare_paths, dashboard.clone());
    let app = move || {
        App::new()
            .app_data(state.clone())
            .wrap(NormalizePath::new(TrailingSlash::Trim))
            .wrap(from_fn(api::edge::edge::<actix_web::body::BoxBody>))
            .configure(|app| crate::dashboard::routes::routes(app, &pages))
            .configure(|app| api::routes::routes(app, bare_paths))
    };
    // A client that goes away ends its request at once, which cancels its turn; a half-closed connection counts as that.
    let server = HttpServer::new(app)
        .workers(HTTP_WORKERS)
        .h1_allow_half_closed(false)
        .on_connect(|io, _| give_up_on_the_stuck(io))
        .disable_signals()
        .shutdown_timeout(HTTP_SHUTDOWN_S)
        .listen(listener)
        .map_err(ServeError::Http)?
        .run();
    let http = server.handle();
    tokio::pin!(server);
    print(&format!("listening on http://{address}\n"));

    let stopped = tokio::select! {
        ended = &mut server => Err(ServeError::Http(ended.err().unwrap_or_else(|| std::io::Error::other("it ended")))),
        _ = engine_ended => Err(ServeError::EngineStopped),
        () = signals.next() => Ok(()),
    };
    readiness.draining.store(true, Ordering::Relaxed);
    let deadline = Duration::from_secs(config.server.drain_deadline_s);
    tracing::info!(deadline_s = deadline.as_secs(), live_sessions = sessions.live(), "draining");
    dashboard.end();
    let down = async {
        sessions.drain(deadline).await;
        http.stop(true).await;
    };
    tokio::select! {
        _ = futures_util::future::join(down, async { if stopped.is_ok() { drop(server.await) } }) => {}
        () = signals.next() => {
            tracing::warn!("a second signal: ending at once, what runs is lost");
            std::process::exit(EXIT_SECOND_SIGNAL);
        }
    }
    engine.shut_down();
    store.close().await?;
    tracing::info!("stopped");
    stopped
}

fn listen(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).map_err(|source| match source.kind() {
        std::io::ErrorKind::AddrInUse => ServeError::AddressInUse { address },
        _ => ServeError::Listen { address, source },
    })
}

/// Loads model and language on the threads that will run the model, with a line of progress.
fn load(config: &Config) -> Result<(Decoder, Language), ServeError> {
    let path = &config.model.path;
    if !path.exists() {
        return Err(ServeError::NoModel { path: path.clone() });
    }
    let started = Instant::now();
    process::look_for_huge_pages();
    let compute = Compute::choose(config.engine.thread_count(), &config.engine.instructions, config.kv.dtype)?;
    let file = WeightFile::open(path).map_err(|source| ServeError::Open { path: path.clone(), source })?;
    let language = Language::from_metadata(file.metadata())
        .map_err(|source| ServeError::Language { path: path.clone(), source })?;
    let mut progress = Progress::new(path);
    let decoder = Decoder::load(path, compute, &mut |done, total| progress.tell(done, total))
        .map_err(|source| ServeError::Load { path: path.clone(), source: Box::new(source) })?;
    progress.clear();
    let ms = started.elapsed().as_millis();
    tracing::info!(path = %path.display(), threads = compute.threads, instructions = %compute.isa, ms, "model loaded");
    Ok((decoder, language))
}

/// A tenants file to follow, what it comes to at the start, and the admins' key if it names none.
type Followed = (Watch, Vec<Grant>, KeyHash);

/// Who may use the server.
fn tenants(config: &Config) -> Result<(Arc<Directory>, Option<Followed>), ServeError> {
    let admin = admin_key::find_or_make(&config.server.data_dir)?;
    let secret = Secret::find_or_make(&config.server.data_dir)?;
    let limits = &config.api.limits;
    let usual =
        quota::Limits { requests_per_minute: None, concurrent_turns: limits.concurrent_turns, sockets: limits.sockets };
    let Some(path) = &config.tenants.file else {
        return Ok((Arc::new(Directory::open_to_all(admin, usual, secret)), None));
    };
    let (watch, file) = Watch::begin(path.clone(), config.kv.clone())?;
    tracing::info!(path = %path.display(), tenants = file.tenants.len(), "tenants file read");
    let (directory, grants) = Directory::of_file(&file, admin, usual, secret);
    Ok((Arc::new(directory), Some((watch, grants, admin))))
}

/// Keeps keys, limits and budgets as the tenants file has them.
async fn follow(watch: Watch, tenants: Arc<Directory>, admin: KeyHash, engine: EngineHandle) {
    let apply = |file| {
        let grants = tenants.apply(&file, admin);
        if let Err(error) = engine.grant(grants) {
            tracing::error!(%error, "the engine did not hear of the edited tenants");
        }
    };
    watch.follow(apply).await;
}

/// A line on the terminal that says how far the load is; nothing where nobody looks.
struct Progress<'a> {
    path: &'a Path,
    percent: Option<u64>,
    shown: bool,
}

impl<'a> Progress<'a> {
    fn new(path: &'a Path) -> Self {
        Self { path, percent: None, shown: std::io::stderr().is_terminal() }
    }

    fn tell(&mut self, done: u64, total: u64) {
        let percent = (done * 100).checked_div(total).unwrap_or(100);
        if self.shown && self.percent != Some(percent) {
            self.percent = Some(percent);
            eprint!("\rloading {} {percent:3} %", self.path.display());
        }
    }

    fn clear(&self) {
        if self.percent.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

/// Lets the kernel close a connection whose client acknowledges or reads nothing of what waits for it, as nobody else
/// can: what is written to it is in the kernel's hands. RFC 5482; elsewhere than on Linux such a one stays.
fn give_up_on_the_stuck(io: &dyn std::any::Any) {
    #[cfg(target_os = "linux")]
    if let Some(stream) = io.downcast_ref::<TcpStream>() {
        let set = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(STUCK));
        if let Err(error) = set {
            tracing::debug!(%error, "a connection has no bound for a client that reads nothing");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = io;
}

fn api_state(
    settings: ApiSettings,
    tenants: Arc<Directory>,
    engine: &EngineHandle,
    sessions: &Sessions,
    readiness: &Arc<Readiness>,
    metrics: &Metrics,
) -> ApiState {
    let (looking, scraped, readiness, metrics) =
        (engine.clone(), engine.clone(), Arc::clone(readiness), metrics.clone());
    let (alive, named) = (sessions.clone(), Arc::clone(&tenants));
    ApiState {
        sessions: sessions.clone(),
        tenants,
        settings,
        status: Arc::new(move || looking.status()),
        not_ready: Arc::new(move || {
            let readiness = Arc::clone(&readiness);
            Box::pin(async move { readiness.reasons().await })
        }),
        metrics: Arc::new(move || {
            scraped.status().publish();
            let (accounts, now) = scraped.accounts();
            accounts.publish(now, &named.names());
            LIVE_SESSIONS.set(alive.live() as f64, &[]);
            metrics.render()
        }),
    }
}

/// Histograms keep every value until somebody tidies up.
async fn keep_up(metrics: Metrics) {
    let mut every = tokio::time::interval(METRICS_UPKEEP);
    loop {
        every.tick().await;
        metrics.upkeep();
    }
}

/// Ends the process if the engine's thread panics; resolves if it ends otherwise.
fn watch(engine: Engine) -> (EngineHandle, oneshot::Receiver<()>) {
    let (told, ended) = oneshot::channel();
    let Engine { handle, join } = engine;
    std::thread::spawn(move || match join.join() {
        Ok(()) => drop(told.send(())),
        Err(_) => {
            tracing::error!("the engine panicked; the process ends, and conversations come back from the store");
            std::process::exit(EXIT_ENGINE_PANICKED);
        }
    });
    (handle, ended)
}

/// Whether the server can take work.
struct Readiness {
    engine: EngineHandle,
    store: Arc<dyn Store>,
    draining: AtomicBool,
    pulse: Mutex<Pulse>,
}

impl Readiness {
    fn new(engine: EngineHandle, store: Arc<dyn Store>) -> Self {
        let pulse = Mutex::new(Pulse { steps: 0, since: Instant::now() });
        Self { engine, store, draining: AtomicBool::new(false), pulse }
    }

    /// Why not; empty if it can.
    async fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.draining.load(Ordering::Relaxed) {
            reasons.push("draining".to_owned());
        }
        let stalled = self.pulse.lock().stalled(&self.engine.status(), Instant::now());
        reasons.extend(stalled.map(|time| format!("the engine has made no step for {} s", time.as_secs())));
        if let Err(error) = self.store.ping().await {
            reasons.push(error.to_string());
        }
        reasons
    }
}

/// When the engine was last seen to step.
struct Pulse {
    steps: u64,
    since: Instant,
}

impl Pulse {
    /// For how long the engine has had work and made no step, if that is too long.
    fn stalled(&mut self, status: &EngineStatus, now: Instant) -> Option<Duration> {
        let has_work = status.running + status.queued + status.reloading > 0;
        if status.steps != self.steps || !has_work {
            *self = Self { steps: status.steps, since: now };
        }
        Some(now.duration_since(self.since)).filter(|time| *time > STALLED)
    }
}

/// The signals that end a server.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What the server has, for the one who started it: a few lines.
fn capacity(config: &Config, spec: &ModelSpec, window: TokenCount) -> String {
    const CONVERSATION_TOKENS: u64 = 2000;
    let name = config.model.name.as_ref().unwrap_or(&spec.name);
    let token_bytes = spec.kv.token_bytes() as u64;
    let (cold_bytes, below) = match config.kv.cold_dtype {
        config::ColdDtype::Same => (token_bytes, String::new()),
        config::ColdDtype::Int8 => {
            let bytes = KvShape { dtype: KvDtype::Int8, ..spec.kv }.token_bytes() as u64;
            (bytes, format!("; {:.1} KiB as {} on host and disk", bytes as f64 / 1024.0, KvDtype::Int8))
        }
    };
    let block_tokens = u64::from(config.kv.block_size);
    let tier = |tier: &str, bytes: config::Bytes, token_bytes: u64| {
        let tokens = bytes.0.checked_div(token_bytes * block_tokens).unwrap_or(0) * block_tokens;
        let conversations = tokens / CONVERSATION_TOKENS;
        let tokens = counted(tokens, "token", "tokens");
        let conversations = counted(conversations, "conversation", "conversations");
        format!("{tier:7} {bytes}: {tokens}, {conversations} of {CONVERSATION_TOKENS} tokens\n")
    };
    [
        format!("model   {name}, trained for {} tokens, window {window} tokens\n", spec.context_length),
        format!("kv      {:.1} KiB a token as {}{below}\n", token_bytes as f64 / 1024.0, spec.kv.dtype),
        tier("device", config.kv.device_bytes, token_bytes),
        tier("host", config.kv.host_bytes, cold_bytes),
        tier("disk", config.kv.disk_bytes, cold_bytes),
        format!("data    {}\n", config.server.data_dir.display()),
    ]
    .concat()
}

/// Standard output may be a closed pipe: that is no reason to stop serving.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        tracing::debug!("nobody reads the standard output");
    }
}

fn unix_us() -> i64 {
    let since = SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.ok().and_then(|since| i64::try_from(since.as_micros()).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_one_clear_sentence() {
        let first = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let error = listen(first.local_addr().unwrap()).unwrap_err().to_string();
        assert!(error.contains("another process does; stop it, or choose another port"), "{error}");
    }

    #[test]
    fn the_start_says_how_many_tokens_and_conversations_fit_each_tier() {
        let mut config = Config::defaults().unwrap();
        let spec = ModelSpec {
            name: "smollm2".into(),
            vocab: 49152,
            context_length: TokenCount(8192),
            kv: KvShape { layers: 30, kv_heads: 3, head_dim: 64, dtype: KvDtype::F16 },
            doubles_at: TokenCount(3072),
            fingerprint: [0; 32],
        };
        let lines = capacity(&config, &spec, TokenCount(8192));
        assert!(lines.contains("22.5 KiB a token as f16\n"), "{lines}");
        // 512 MiB in blocks of 16 tokens of 23,040 bytes.
        assert!(lines.contains("23296 tokens, 11 conversations of 2000 tokens"), "{lines}");
        config.kv.cold_dtype = config::ColdDtype::Int8;
        let lines = capacity(&config, &spec, TokenCount(8192));
        assert!(lines.contains("22.5 KiB a token as f16; 11.6 KiB as int8 on host and disk"), "{lines}");
        // 2 GiB in blocks of 16 tokens of 11,880 bytes.
        assert!(lines.contains("180752 tokens, 90 conversations of 2000 tokens"), "{lines}");
    }

    #[test]
    fn an_engine_with_work_and_no_step_is_stalled_and_an_idle_one_is_not() {
        let started = Instant::now();
        let later = started + STALLED + Duration::from_secs(1);
        let mut pulse = Pulse { steps: 0, since: started };
        let busy = EngineStatus { running: 1, steps: 5, ..EngineStatus::default() };
        assert_eq!(pulse.stalled(&busy, started), None);
        assert_eq!(pulse.stalled(&busy, later), Some(STALLED + Duration::from_secs(1)));
        assert_eq!(pulse.stalled(&EngineStatus { steps: 6, ..busy.clone() }, later), None);
        let idle = EngineStatus { running: 0, steps: 6, ..busy };
        assert_eq!(pulse.stalled(&idle, later + STALLED * 2), None);
    }
}
