//! Who drives the core?
//!
//! One thread owns core, model and KV memory. Each round it takes in what the mailbox holds, plans, does the plan's chores,
//! hands its transfers to a copier thread, runs the model, commits, and tells. It waits for nobody but the model: the
//! mailbox is bounded at the senders' side, a turn's channel has room for all it may say, and copies go on beside the steps.
//! Invariant: what a listener is told is in the published status and residency already.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot};

use super::core::{Command, Core, CoreSettings, Event};
use super::flight::recorder::Recorder;
use super::flight::{Beginning, DiskBefore, FlightSettings};
use super::handle::{EngineHandle, Forgotten, Message, OffloadTo, Offloaded, PinError, Pinned, Shared, SubmitError};
use super::metrics::Steps;
use super::movers::{Movers, OpenDisk, open_disk};
use super::status::Why;
use super::status::happened::{Happened, TurnNote, TurnStep};
use super::{Path, TurnEvent};
use crate::kernels::cold::ColdForm;
use crate::kernels::memory::{Arena, ArenaError};
use crate::kv::evictor::Policy;
use crate::kv::pins::{PinBudget, PinRefused};
use crate::kv::{KvSettings, Manager};
use crate::model::{Logits, Model};
use crate::types::{
    BlockBytes, BlockCount, BlockSize, KvDtype, KvKey, TenantId, TenantKey, Tick, Tier, TokenCount, TurnId, counted,
};

/// Sizes and switches of the engine.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    pub block_size: BlockSize,
    pub cold: ColdDtype,
    pub device_bytes: u64,
    pub host_bytes: u64,
    pub disk: Option<DiskSettings>,
    pub background_offload: bool,
    pub policy: Policy,
    pub doubles_at: Option<TokenCount>,
    pub journal_entries: usize,
    pub max_running: usize,
    pub step_tokens: TokenCount,
    pub queue_depth: usize,
    pub reuse: bool,
    /// `None`: no flight record is kept.
    pub flight: Option<FlightSettings>,
}

/// As what host and disk store KV.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ColdDtype {
    /// As the device does.
    Same,
    /// What the device has as f16.
    Int8,
}

/// The disk tier.
#[derive(Clone, Debug)]
pub struct DiskSettings {
    pub folder: PathBuf,
    pub bytes: u64,
    /// Those whose blocks are taken over from the process before; what others left is overwritten.
    pub tenants: Vec<(TenantId, TenantKey)>,
    /// Conversations that there are: what others left is overwritten too, unless they were over when it was written.
    pub lives: HashSet<KvKey>,
}

/// Why the engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "`kv.device_bytes` = {bytes} holds {} of {block_bytes} bytes, and a conversation needs {LEAST_BLOCKS} \
         or more; set it to {} or more", counted(*blocks, "block", "blocks"), block_bytes * u64::from(LEAST_BLOCKS)
    )]
    DeviceTooSmall { bytes: u64, blocks: u32, block_bytes: u64 },
    #[error("`{key}` = {bytes} is more than {} blocks of {block_bytes} bytes", u32::MAX)]
    PoolTooLarge { key: &'static str, bytes: u64, block_bytes: u64 },
    #[error("`{key}` is too much for this machine")]
    Memory { key: &'static str, source: ArenaError },
    #[error("KV of {dtype} can't be stored as int8 on host and disk; only f16 can: set `kv.dtype` or `kv.cold_dtype`")]
    NoColdForm { dtype: KvDtype },
    #[error("a thread could not be started")]
    Thread(#[from] std::io::Error),
}

/// A running engine.
pub struct Engine {
    pub handle: EngineHandle,
    /// Ends after `EngineHandle::shut_down`; an error means that the engine panicked.
    pub join: JoinHandle<()>,
}

/// Blocks of the smallest device pool that is of any use.
const LEAST_BLOCKS: u32 = 4;
/// Messages that wait for the thread; it drains them each step.
const MAILBOX: usize = 4096;
/// Longest time that what tenants hold is shown unchanged while there is work.
const ACCOUNTS_EVERY_US: u64 = 250_000;
/// How long the thread sleeps at most while turns wait for copies, memory or their deadline.
const NAP: Duration = Duration::from_millis(1);

/// Starts the engine's threads. They end after `EngineHandle::shut_down`.
pub fn start(model: Box<dyn Model + Send>, settings: EngineSettings) -> Result<Engine, StartError> {
    let spec = model.spec().clone();
    let device_block = spec.kv.block_bytes(settings.block_size);
    let cold = match settings.cold {
        ColdDtype::Same => ColdForm::Same,
        ColdDtype::Int8 => ColdForm::int8(spec.kv.layout()).ok_or(StartError::NoColdForm { dtype: spec.kv.dtype })?,
    };
    let cold_block = cold.block_bytes(device_block);
    let block_bytes = BlockBytes { device: device_block as u64, cold: cold_block as u64 };
    let blocks = |key, bytes: u64, tier| {
        let block_bytes = block_bytes.of(tier);
        let blocks = u32::try_from(bytes / block_bytes);
        blocks.map(BlockCount).map_err(|_| StartError::PoolTooLarge { key, bytes, block_bytes })
    };
    let device_blocks = blocks("kv.device_bytes", settings.device_bytes, Tier::Device)?;
    let host_blocks = blocks("kv.host_bytes", settings.host_bytes, Tier::Host)?;
    if device_blocks.0 < LEAST_BLOCKS {
        let (bytes, blocks) = (settings.device_bytes, device_blocks.0);
        return Err(StartError::DeviceTooSmall { bytes, blocks, block_bytes: block_bytes.device });
    }
    let arena = |key, blocks: BlockCount, block_bytes| {
        Arena::new(blocks.get(), block_bytes).map(Arc::new).map_err(|source| StartError::Memory { key, source })
    };
    let device = arena("kv.device_bytes", device_blocks, device_block)?;
    let host = arena("kv.host_bytes", host_blocks, cold_block)?;
    let pool_tokens = u64::from(device_blocks.0) * u64::from(settings.block_size.0);
    let window =
        u32::try_from(pool_tokens).map_or(spec.context_length, |tokens| spec.context_length.min(TokenCount(tokens)));

    let front_first_from = settings.policy.front_first_from(spec.doubles_at);
    let disk = settings.disk.and_then(|disk| open_disk(disk, cold_block, cold.fingerprint(spec.fingerprint)));
    let disk_blocks = BlockCount(disk.as_ref().map_or(0, |disk| disk.slots.count()));
    let (mailbox, inbox) = sync_channel(MAILBOX);
    let shared = Arc::new(Shared::new(spec, settings.block_size, window, settings.queue_depth));
    let handle = EngineHandle { mailbox: mailbox.clone(), shared: Arc::clone(&shared) };
    let kv = KvSettings {
        block_size: settings.block_size,
        block_bytes,
        device_blocks,
        host_blocks,
        disk_blocks,
        window,
        background_offload: settings.background_offload,
        policy: settings.policy,
        doubles_at: settings.doubles_at,
        front_first_from,
        journal_entries: settings.journal_entries,
        reuse: settings.reuse,
    };
    let core = CoreSettings { max_running: settings.max_running, step_tokens: settings.step_tokens.get() };
    let (slots, before) = match disk {
        Some(OpenDisk { slots, found, tenants, lives }) => (Some(slots), DiskBefore { found, tenants, lives }),
        None => (None, DiskBefore::default()),
    };
    let flight = settings.flight.and_then(|flight| record(&flight, core, kv, &before));
    let mut manager = Manager::new(kv);
    let DiskBefore { found, tenants, lives } = before;
    manager.recover(found, &tenants, |key| lives.contains(&key));
    let movers = Movers::start(&mailbox, &device, &host, cold, slots)?;
    drop(mailbox);
    let join = std::thread::Builder::new().name("engine".into()).spawn(move || {
        let driver = Driver {
            core: Core::over(core, manager),
            model,
            device,
            host,
            inbox,
            shared,
            accounts_due: Tick(0),
            accounts_are_old: false,
            movers,
            flight,
            listeners: HashMap::new(),
            turns: HashMap::new(),
            happened: Happened::default(),
            decisions: 0,
            replies: HashMap::new(),
            pin_replies: VecDeque::new(),
            learned_asked: Vec::new(),
            commands: Vec::new(),
            started: 0,
            left_queue: 0,
            ran: false,
            logits: Logits::default(),
            steps: Steps::new(),
        };
        // The inbox is gone then, so that whoever waits to report gives up.
        let (movers, flight) = driver.run();
        movers.end();
        flight.into_iter().for_each(Recorder::end);
    })?;
    Ok(Engine { handle, join })
}

/// Begins a run of the flight record.
fn record(settings: &FlightSettings, core: CoreSettings, kv: KvSettings, before: &DiskBefore) -> Option<Recorder> {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let beginning = Beginning { version, tick_zero_us: micros(since_1970), core, kv };
    let disk = Some(before).filter(|before| settings.has_room_for_disk(before.found.blocks.len()));
    Recorder::start(settings, beginning, disk)
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Someone who waits until a conversation's KV has gone.
enum Reply {
    Forget(oneshot::Sender<Forgotten>),
    Offload(oneshot::Sender<Result<Offloaded, SubmitError>>, Tick),
}

/// What is told of a turn that has begun.
struct Begun {
    key: KvKey,
    tenant: TenantId,
    number: u32,
    at: Tick,
}

/// Whether there is another round.
#[derive(PartialEq, Eq)]
enum Goes {
    On,
    Down,
}

struct Driver {
    core: Core,
    model: Box<dyn Model + Send>,
    device: Arc<Arena>,
    host: Arc<Arena>,
    inbox: Receiver<Message>,
    shared: Arc<Shared>,
    /// When what tenants hold is shown next, if there is no rest before.
    accounts_due: Tick,
    /// Something happened since they were shown.
    accounts_are_old: bool,
    movers: Movers,
    flight: Option<Recorder>,
    listeners: HashMap<TurnId, mpsc::Sender<TurnEvent>>,
    /// Turns that have not ended.
    turns: HashMap<TurnId, Begun>,
    /// What is to be told with the next publication.
    happened: Happened,
    /// Decisions of the journal that have been told.
    decisions: u64,
    replies: HashMap<KvKey, Vec<Reply>>,
    /// In the order in which pins were asked for.
    pin_replies: VecDeque<oneshot::Sender<Result<Pinned, PinError>>>,
    /// Who wants to know what was learned.
    learned_asked: Vec<oneshot::Sender<Vec<u8>>>,
    commands: Vec<Command>,
    /// Turns ever started, and those of them that are in the queue no more.
    started: usize,
    left_queue: usize,
    /// The last step had rows.
    ran: bool,
    logits: Logits,
    steps: Steps,
}

impl Driver {
    fn now(&self) -> Tick {
        self.shared.now()
    }

    fn run(mut self) -> (Movers, Option<Recorder>) {
        // What was taken over from the process before is seen before anything happens.
        self.publish();
        while self.take_in() == Goes::On {
            self.step();
        }
        self.commands.extend(self.core.turns().map(Command::Cancel));
        self.step();
        (self.movers, self.flight)
    }

    /// Takes in all that waits in the mailbox; sleeps if there is nothing to do.
    fn take_in(&mut self) -> Goes {
        let may_sleep = self.commands.is_empty() && !self.shared.has_cancels();
        let first = match self.rest(may_sleep) {
            Ok(first) => first,
            Err(goes) => return goes,
        };
        // Cancels first: their turns' starts were in the mailbox before them.
        let cancels = self.shared.take_cancels();
        let waiting: Vec<Message> = first.into_iter().chain(self.inbox.try_iter().take(MAILBOX)).collect();
        for message in waiting {
            if self.open(message) == Goes::Down {
                return Goes::Down;
            }
        }
        self.commands.extend(cancels.into_iter().map(Command::Cancel));
        Goes::On
    }

    /// Waits for a message if no turn can go on: for long if there is none, for a nap if one waits.
    fn rest(&mut self, may_sleep: bool) -> Result<Option<Message>, Goes> {
        if !may_sleep || self.ran {
            return Ok(None);
        }
        if self.is_at_rest() {
            // Whoever asks while nothing happens sees what is so.
            if self.accounts_are_old {
                match self.inbox.try_recv() {
                    Ok(message) => return Ok(Some(message)),
                    Err(TryRecvError::Empty) => self.publish_accounts(self.now()),
                    Err(TryRecvError::Disconnected) => return Err(Goes::Down),
                }
            }
            return self.inbox.recv().map(Some).map_err(|_| Goes::Down);
        }
        match self.inbox.recv_timeout(NAP) {
            Ok(message) => Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Goes::Down),
        }
    }

    /// Whether nothing happens before the next message.
    fn is_at_rest(&self) -> bool {
        self.core.is_idle() && self.movers.has_passed_on_all()
    }

    fn open(&mut self, message: Message) -> Goes {
        match message {
            Message::Start(start, listener) => {
                self.started += 1;
                let (number, at) = (start.request.shape.number, self.now());
                self.turns.insert(start.turn, Begun { key: start.key, tenant: start.tenant, number, at });
                self.listeners.insert(start.turn, listener);
                self.commands.push(Command::Start(start));
            }
            Message::Forget(key, reply) => {
                self.replies.entry(key).or_default().push(Reply::Forget(reply));
                self.commands.push(Command::Forget(key));
            }
            Message::Offload(key, to, reply) => {
                let asked = self.now();
                self.replies.entry(key).or_default().push(Reply::Offload(reply, asked));
                self.commands.push(match to {
                    OffloadTo::Host => Command::Leave(key, Tier::Host),
                    OffloadTo::Disk => Command::Leave(key, Tier::Disk),
                    OffloadTo::None => Command::LetGo(key),
                });
            }
            Message::End(key) => self.commands.push(Command::End(key)),
            Message::Reopen(key) => self.commands.push(Command::Reopen(key)),
            Message::Pin { key, tenant, tenant_key, for_us, reply } => {
                self.pin_replies.push_back(reply);
                self.commands.push(Command::Pin { key, tenant, tenant_key, for_us });
            }
            Message::Holding(key, reply) => drop(reply.send(self.core.holding(self.now(), key))),
            Message::Transferred(done) => self.commands.push(Command::Transferred(done)),
            Message::Grant(grants) => self.commands.push(Command::Grant(grants)),
            // Answered after the step, which takes in what it is to go on from.
            Message::Learned(reply) => self.learned_asked.push(reply),
            Message::GoOnFrom(learned) => self.commands.push(Command::GoOnFrom(learned)),
            Message::Wake => {}
            Message::Shutdown => return Goes::Down,
        }
        Goes::On
    }

    /// One step: plan, copy, run, commit, tell.
    fn step(&mut self) {
        let mut commands = std::mem::take(&mut self.commands);
        let began = self.now();
        self.note(|flight| flight.begin(began, &commands));
        let mut plan = self.core.plan(began, &mut commands);
        self.note(|flight| flight.planned(&plan.events));
        self.commands = commands;
        std::mem::take(&mut plan.chores).execute(&self.device, &self.host);
        self.movers.hand_over(std::mem::take(&mut plan.orders));
        let mut events = std::mem::take(&mut plan.events);
        self.ran = !plan.is_empty();
        if !plan.is_empty() {
            if !events.is_empty() {
                self.publish();
                self.tell(std::mem::take(&mut events));
            }
            let ran = {
                let rows = self.core.rows(&plan);
                self.model.forward(&rows.batch(), &self.device, &mut self.logits)
            };
            if let Err(error) = &ran {
                tracing::error!(%error, turns = plan.spans.len(), "a step failed, and its turns with it");
            }
            let now = self.now();
            let prefills = plan.spans.iter().any(|span| span.rows > 1);
            self.steps.note((began, now), plan.tokens.len(), prefills);
            let failed = ran.is_err();
            self.core.commit(now, &plan, ran.map(|()| &mut self.logits), &mut events);
            self.note(|flight| flight.committed(now, failed, &events));
        }
        self.note(Recorder::end_step);
        self.publish();
        self.tell(events);
        for reply in std::mem::take(&mut self.learned_asked) {
            drop(reply.send(self.core.manager().learned().to_bytes()));
        }
    }

    /// Notes something in the flight record, if one is kept.
    fn note(&mut self, note: impl FnOnce(&mut Recorder)) {
        if let Some(flight) = &mut self.flight {
            note(flight);
        }
    }

    /// Shows what tenants hold. Cost: O(tenants), so that it is not done each step.
    fn publish_accounts(&mut self, now: Tick) {
        self.shared.accounts.store(Arc::new(self.core.accounts(now)));
        self.accounts_due = Tick(now.0 + ACCOUNTS_EVERY_US);
        self.accounts_are_old = false;
    }

    /// Shows the state to those who only look.
    fn publish(&mut self) {
        for (key, residency) in self.core.take_residencies() {
            self.happened.changed.push(key);
            match residency {
                Some(residency) => drop(self.shared.residency.insert(key, residency)),
                None => drop(self.shared.residency.remove(&key)),
            }
        }
        self.note_decisions();
        let status = self.core.status(self.now());
        let now = status.now;
        self.accounts_are_old = true;
        if now >= self.accounts_due {
            self.publish_accounts(now);
        }
        let left_queue = self.started - status.queued as usize;
        self.shared.status.store(Arc::new(status));
        // A preempted turn is back in the queue: the difference may be negative, and the sum is right all the same.
        self.shared.queued.fetch_sub(left_queue.wrapping_sub(self.left_queue), Ordering::Relaxed);
        self.left_queue = left_queue;
    }

    /// Notes what was decided since the last time.
    fn note_decisions(&mut self) {
        let journal = self.core.manager().journal();
        let fresh = usize::try_from(journal.total() - self.decisions).unwrap_or(usize::MAX);
        if fresh > 0 {
            let block_size = self.core.manager().settings().block_size;
            let known = journal.entries().len();
            let entries = journal.entries().skip(known.saturating_sub(fresh));
            self.happened.decisions.extend(entries.map(|entry| Why { entry: *entry, block_size }));
            self.decisions = journal.total();
        }
    }

    /// Shows what has happened to those who keep books of it, if somebody does.
    fn show_happened(&mut self) {
        if self.happened.is_empty() {
            return;
        }
        match &mut *self.shared.happened.lock() {
            Some(kept) => kept.append(&mut self.happened),
            None => self.happened = Happened::default(),
        }
    }

    /// Notes how far a turn has come.
    fn note_turn(&mut self, turn: TurnId, event: &TurnEvent) {
        let Some(begun) = self.turns.get(&turn) else { return };
        let at = self.shared.now();
        let step = match event {
            TurnEvent::Started(prompt) => {
                let (number, path) = (begun.number, Path::of(prompt.decision(), begun.number));
                TurnStep::FirstToken { number, path, prompt: *prompt, ttft_ms: at.ms_since(begun.at) }
            }
            TurnEvent::Token(_) => return,
            TurnEvent::Finished { usage, .. } => TurnStep::Ended(*usage),
            TurnEvent::Failed(_) => TurnStep::Failed,
        };
        self.happened.turns.push(TurnNote { turn, key: begun.key, tenant: begun.tenant, at, step });
        if !matches!(event, TurnEvent::Started(_)) {
            self.turns.remove(&turn);
        }
    }

    fn tell(&mut self, events: Vec<Event>) {
        for event in &events {
            if let Event::Turn(turn, event) = event {
                self.note_turn(*turn, event);
            }
        }
        self.show_happened();
        for event in events {
            match event {
                Event::Turn(turn, event) => self.tell_turn(turn, event),
                Event::Forgotten(key, freed) => {
                    let block_bytes = self.core.manager().settings().block_bytes;
                    let bytes = |tier, blocks: BlockCount| u64::from(blocks.0) * block_bytes.of(tier);
                    let forgotten = Forgotten {
                        device_bytes: bytes(Tier::Device, freed.device),
                        host_bytes: bytes(Tier::Host, freed.host),
                        disk_bytes: bytes(Tier::Disk, freed.disk),
                        remaining_bytes: bytes(Tier::Disk, freed.remaining),
                        kept_shared_bytes: freed.kept_shared_bytes,
                    };
                    for reply in self.replies.remove(&key).unwrap_or_default() {
                        match reply {
                            Reply::Forget(reply) => drop(reply.send(forgotten)),
                            Reply::Offload(reply, asked) => self.offloaded(reply, asked, forgotten.device_bytes),
                        }
                    }
                }
                Event::Pinned(pinned) => {
                    let block_bytes = self.core.manager().settings().block_bytes.device;
                    let bytes = |blocks: BlockCount| u64::from(blocks.0) * block_bytes;
                    let told = match pinned {
                        Ok((PinBudget { limit, used }, until)) => {
                            Ok(Pinned { until, limit_bytes: bytes(limit), used_bytes: bytes(used) })
                        }
                        Err(PinRefused::OverBudget(PinBudget { limit, used }, size)) => Err(PinError::OverBudget {
                            size_bytes: bytes(size),
                            used_bytes: bytes(used),
                            limit_bytes: bytes(limit),
                        }),
                        Err(PinRefused::Forgetting) => Err(PinError::Forgetting),
                    };
                    let reply = self.pin_replies.pop_front().expect("each answer was asked for");
                    drop(reply.send(told));
                }
                Event::Left(key, bytes) => {
                    for reply in self.replies.remove(&key).unwrap_or_default() {
                        match (reply, bytes) {
                            (reply @ Reply::Forget(_), _) => self.replies.entry(key).or_default().push(reply),
                            (Reply::Offload(reply, asked), Some(bytes)) => self.offloaded(reply, asked, bytes),
                            (Reply::Offload(reply, _), None) => drop(reply.send(Err(SubmitError::Busy))),
                        }
                    }
                }
            }
        }
    }

    fn offloaded(&self, reply: oneshot::Sender<Result<Offloaded, SubmitError>>, asked: Tick, bytes: u64) {
        drop(reply.send(Ok(Offloaded { bytes, ms: self.now().ms_since(asked) })));
    }

    fn tell_turn(&mut self, turn: TurnId, event: TurnEvent) {
        let last = matches!(event, TurnEvent::Finished { .. } | TurnEvent::Failed(_));
        let Some(listener) = self.listeners.get(&turn) else { return };
        // The channel has room for all that a turn may say: an error means that nobody listens any more.
        let gone = listener.try_send(event).is_err();
        if last || gone {
            self.listeners.remove(&turn);
        }
        if gone && !last {
            self.commands.push(Command::Cancel(turn));
        }
    }
}

#[cfg(test)]
mod tests;
