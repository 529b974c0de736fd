//! What do the layers above hold of the engine?
//!
//! An `EngineHandle` for everyone; a `KvHandle` for the one actor of a conversation; a `TurnHandle` while a turn runs.
//! Commands go down through one bounded mailbox; events come up through one bounded channel a turn, with room for all
//! that the turn may say, so that the engine never waits for a reader and a slow one fills only its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::core::StartTurn;
use super::prompt::HashedPrompt;
use super::status::accounts::{Accounts, HeldBytes, TIERS};
use super::status::happened::Happened;
use super::status::{EngineStatus, Residency};
use super::thread::micros;
use super::{TurnEvent, TurnRequest};
use crate::kv::return_rate::Learned;
use crate::kv::transfer::TransferDone;
use crate::model::ModelSpec;
use crate::types::{BlockSize, Grant, KvKey, TenantId, TenantKey, Tick, TokenCount, TurnId, counted};

/// Why the engine did not take a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error(
        "{} already, the bound of `engine.queue_depth`; retry in a moment",
        counted(*queued, "turn waits", "turns wait")
    )]
    Overloaded { queued: usize },
    #[error("the prompt has {prompt} tokens and the window {window}; shorten it")]
    PromptTooLong { prompt: TokenCount, window: TokenCount },
    #[error("the prompt is empty")]
    PromptEmpty,
    #[error("a turn of this conversation runs")]
    Busy,
    #[error("the engine has stopped")]
    Gone,
}

/// Why the engine does not go on from what was learned before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GoOnError {
    #[error("it was kept by another version, or is damaged")]
    OtherForm,
    #[error(transparent)]
    NotHeard(#[from] SubmitError),
}

/// What forgetting a conversation gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forgotten {
    pub device_bytes: u64,
    pub host_bytes: u64,
    pub disk_bytes: u64,
    /// Bytes on disk that could not be overwritten; the log says why.
    pub remaining_bytes: u64,
    /// Bytes that stay, because other conversations of the tenant share them.
    pub kept_shared_bytes: u64,
}

/// What an offload moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloaded {
    /// Device bytes given up.
    pub bytes: u64,
    /// From the request to the last copy.
    pub ms: u64,
}

/// A conversation's pin, and what of its tenant's budget all its pins keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// `None`: it isn't pinned.
    pub until: Option<Tick>,
    pub limit_bytes: u64,
    pub used_bytes: u64,
}

/// Why a conversation was not pinned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    #[error(
        "it takes {size_bytes} bytes on the device, {used_bytes} are pinned already, and the tenant may pin {limit_bytes}; \
         unpin another conversation, or raise `pin_budget`"
    )]
    OverBudget { size_bytes: u64, used_bytes: u64, limit_bytes: u64 },
    /// Deleted meanwhile.
    #[error("the conversation is being forgotten")]
    Forgetting,
    #[error(transparent)]
    NotAsked(#[from] SubmitError),
}

/// Where an asked-for offload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffloadTo {
    Host,
    /// Full blocks; a part-full last one is encoded again.
    Disk,
    /// Forget the KV in every tier; the transcript stays.
    None,
}

/// A message to the engine's thread.
pub(super) enum Message {
    Start(Box<StartTurn>, mpsc::Sender<TurnEvent>),
    Forget(KvKey, oneshot::Sender<Forgotten>),
    Offload(KvKey, OffloadTo, oneshot::Sender<Result<Offloaded, SubmitError>>),
    End(KvKey),
    Reopen(KvKey),
    Pin {
        key: KvKey,
        tenant: TenantId,
        tenant_key: TenantKey,
        for_us: Option<u64>,
        reply: oneshot::Sender<Result<Pinned, PinError>>,
    },
    /// Asks what a conversation holds.
    Holding(KvKey, oneshot::Sender<[HeldBytes; TIERS.len()]>),
    Transferred(TransferDone),
    Grant(Vec<Grant>),
    /// Asks for what was learned of conversations' returns.
    Learned(oneshot::Sender<Vec<u8>>),
    GoOnFrom(Learned),
    /// Cancels wait in `Shared::cancels`.
    Wake,
    Shutdown,
}

/// What the handles and the thread share. Nothing here makes the engine wait.
pub(super) struct Shared {
    pub spec: ModelSpec,
    pub block_size: BlockSize,
    pub window: TokenCount,
    pub queue_depth: usize,
    pub queued: AtomicUsize,
    pub next_turn: AtomicU64,
    pub cancels: Mutex<Vec<TurnId>>,
    pub clock: Instant,
    pub status: ArcSwap<EngineStatus>,
    pub accounts: ArcSwap<Accounts>,
    pub residency: DashMap<KvKey, Residency>,
    /// What nobody has asked for yet; `None` as long as nobody wants to know.
    pub happened: Mutex<Option<Happened>>,
}

impl Shared {
    pub fn new(spec: ModelSpec, block_size: BlockSize, window: TokenCount, queue_depth: usize) -> Self {
        Self {
            spec,
            block_size,
            window,
            queue_depth,
            queued: AtomicUsize::new(0),
            next_turn: AtomicU64::new(0),
            cancels: Mutex::default(),
            clock: Instant::now(),
            status: ArcSwap::default(),
            accounts: ArcSwap::default(),
            residency: DashMap::new(),
            happened: Mutex::default(),
        }
    }

    pub fn has_cancels(&self) -> bool {
        !self.cancels.lock().is_empty()
    }

    pub fn take_cancels(&self) -> Vec<TurnId> {
        std::mem::take(&mut *self.cancels.lock())
    }

    pub fn now(&self) -> Tick {
        Tick(micros(self.clock.elapsed()))
    }
}

/// The engine, for all who submit work or look on. Cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    pub(super) mailbox: SyncSender<Message>,
    pub(super) shared: Arc<Shared>,
}

impl EngineHandle {
    pub fn spec(&self) -> &ModelSpec {
        &self.shared.spec
    }

    /// The longest sequence that can run: the model's context, or what the device pool holds.
    pub fn window(&self) -> TokenCount {
        self.shared.window
    }

    /// The newest snapshot; never waits for the engine.
    pub fn status(&self) -> Arc<EngineStatus> {
        self.shared.status.load_full()
    }

    /// What tenants hold, lose, take and gain; a quarter of a second old at most while turns run, and never waits for the
    /// engine. And what time it is there.
    pub fn accounts(&self) -> (Arc<Accounts>, Tick) {
        (self.shared.accounts.load_full(), self.shared.now())
    }

    /// What a conversation holds of each tier, in the order of `TIERS`: of what it shares with others, its part.
    pub async fn holding(&self, key: KvKey) -> Result<[HeldBytes; TIERS.len()], SubmitError> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Holding(key, reply))?;
        answer.await.map_err(|_| SubmitError::Gone)
    }

    /// Where a conversation's KV is; `None` if no tier holds any. Never waits for the engine.
    pub fn residency(&self, key: KvKey) -> Option<Residency> {
        self.shared.residency.get(&key).map(|entry| entry.value().clone())
    }

    /// What has happened since the last call; the first one asks for it. For one asker.
    pub fn take_happened(&self) -> Happened {
        self.shared
            .happened
            .lock()
            .replace(Happened::default())
            .unwrap_or(Happened { overflowed: true, ..Happened::default() })
    }

    /// All conversations of which some tier holds something, or that are pinned, in no order.
    pub fn residencies(&self) -> impl Iterator<Item = (KvKey, Residency)> + '_ {
        self.shared.residency.iter().map(|entry| (*entry.key(), entry.value().clone()))
    }

    /// What time it is in the engine.
    pub fn now(&self) -> Tick {
        self.shared.now()
    }

    /// Whether a turn with a prompt this long would be taken now. For those who must do something lasting before they start
    /// it; the queue may have filled by then.
    pub fn admits(&self, prompt: TokenCount) -> Result<(), SubmitError> {
        if prompt.0 == 0 {
            return Err(SubmitError::PromptEmpty);
        }
        if prompt >= self.shared.window {
            return Err(SubmitError::PromptTooLong { prompt, window: self.shared.window });
        }
        let queued = self.shared.queued.load(Ordering::Relaxed);
        if queued >= self.shared.queue_depth {
            return Err(SubmitError::Overloaded { queued });
        }
        Ok(())
    }

    /// A prompt of a tenant's without tokens, for those that come.
    pub fn empty_prompt(&self, tenant_key: TenantKey) -> HashedPrompt {
        HashedPrompt::empty(tenant_key, self.shared.block_size)
    }

    /// The handle of one conversation's KV. The caller keeps to one a key: `sessions` has one actor a conversation.
    pub fn kv(&self, tenant: TenantId, tenant_key: TenantKey, key: KvKey) -> KvHandle {
        KvHandle { key, tenant, tenant_key, engine: self.clone() }
    }

    /// Replaces what all tenants are given: whoever is not named is gone. Heard with the next step.
    pub fn grant(&self, grants: Vec<Grant>) -> Result<(), SubmitError> {
        self.send(Message::Grant(grants))
    }

    /// What was learned of how conversations come back, to be kept over a restart.
    pub async fn learned(&self) -> Result<Vec<u8>, SubmitError> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Learned(reply))?;
        answer.await.map_err(|_| SubmitError::Gone)
    }

    /// Goes on from what was learned before a restart: from so many silences.
    pub fn go_on_from(&self, learned: &[u8]) -> Result<u64, GoOnError> {
        let learned = Learned::from_bytes(learned).ok_or(GoOnError::OtherForm)?;
        let silences = learned.silences();
        self.send(Message::GoOnFrom(learned))?;
        Ok(silences)
    }

    /// Keeps a conversation's blocks from the evictor for so long, within its tenant's budget; `None`: no longer. Asked of
    /// the engine at once, whether or not a turn runs; resolves with its next step.
    pub fn pin(
        &self,
        tenant: TenantId,
        tenant_key: TenantKey,
        key: KvKey,
        time: Option<Duration>,
    ) -> impl Future<Output = Result<Pinned, PinError>> + use<> {
        let for_us = time.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        let (reply, answer) = oneshot::channel();
        let asked = self.send(Message::Pin { key, tenant, tenant_key, for_us, reply });
        async move {
            asked?;
            answer.await.map_err(|_| SubmitError::Gone)?
        }
    }

    /// Says that a conversation is over: its blocks are the first to go, and serve as shared prefixes until then. One that
    /// runs is over after its turn.
    pub fn end(&self, key: KvKey) -> Result<(), SubmitError> {
        self.send(Message::End(key))
    }

    /// Says that a conversation is not over after all: it goes back in line with those like it.
    pub fn reopen(&self, key: KvKey) -> Result<(), SubmitError> {
        self.send(Message::Reopen(key))
    }

    /// Asks the engine to end its running turns as cancelled and stop. Returns at once.
    pub fn shut_down(&self) {
        // A full mailbox is drained each step and a closed one means that it has stopped: a blocking send is short.
        if self.mailbox.send(Message::Shutdown).is_err() {
            tracing::debug!("the engine has stopped already");
        }
    }

    fn send(&self, message: Message) -> Result<(), SubmitError> {
        self.mailbox.try_send(message).map_err(|error| match error {
            TrySendError::Full(_) => SubmitError::Overloaded { queued: self.shared.queued.load(Ordering::Relaxed) },
            TrySendError::Disconnected(_) => SubmitError::Gone,
        })
    }
}

/// A conversation's claim on its KV. Not `Clone`: one owner, the conversation's actor. Dropping it leaves the blocks to
/// the evictor; `forget` gives them up.
pub struct KvHandle {
    key: KvKey,
    tenant: TenantId,
    tenant_key: TenantKey,
    engine: EngineHandle,
}

impl KvHandle {
    pub fn key(&self) -> KvKey {
        self.key
    }

    /// Starts a turn whose prompt is no other's continuation.
    pub fn start_turn(&mut self, request: TurnRequest) -> Result<(TurnHandle, TurnEvents), SubmitError> {
        let prompt = self.engine.empty_prompt(self.tenant_key).after(0, request.prompt.iter().copied());
        let request = TurnRequest { prompt: Arc::clone(prompt.tokens()), ..request };
        self.start_hashed(&prompt, request)
    }

    /// Starts a turn whose prompt, `request.prompt`, is hashed. Returns at once; the tokens come through `TurnEvents`.
    pub fn start_hashed(
        &mut self,
        prompt: &HashedPrompt,
        request: TurnRequest,
    ) -> Result<(TurnHandle, TurnEvents), SubmitError> {
        assert!(Arc::ptr_eq(prompt.tokens(), &request.prompt), "the hashes are another prompt's");
        assert_eq!(prompt.key().0, self.tenant_key.0, "a prompt crossed tenants");
        let hashes = prompt.hashes().to_vec();
        let shared = &self.engine.shared;
        let prompt = TokenCount::of(&request.prompt);
        self.engine.admits(prompt)?;
        let turn = TurnId(shared.next_turn.fetch_add(1, Ordering::Relaxed));
        let room = request.max_tokens.0.min(shared.window.0 - prompt.0) as usize + 2;
        let (events, listener) = mpsc::channel(room);
        let start =
            StartTurn { turn, key: self.key, tenant: self.tenant, tenant_key: self.tenant_key, hashes, request };
        // Counted before it is sent: the engine counts it out, and may be quick.
        shared.queued.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.engine.send(Message::Start(Box::new(start), events)) {
            shared.queued.fetch_sub(1, Ordering::Relaxed);
            return Err(error);
        }
        Ok((TurnHandle { turn, engine: self.engine.clone() }, TurnEvents { listener }))
    }

    /// Gives up every copy of this conversation's KV, zeroed, and waits until all tiers have let go.
    pub async fn forget(self) -> Result<Forgotten, SubmitError> {
        let (reply, answer) = oneshot::channel();
        self.engine.send(Message::Forget(self.key, reply))?;
        answer.await.map_err(|_| SubmitError::Gone)
    }

    /// Copies down and gives up the device copy; resolves when that is done. `Busy` while a turn runs.
    pub async fn offload(&self, to: OffloadTo) -> Result<Offloaded, SubmitError> {
        let (reply, answer) = oneshot::channel();
        self.engine.send(Message::Offload(self.key, to, reply))?;
        answer.await.map_err(|_| SubmitError::Gone)?
    }

    /// Says that the conversation is over.
    pub fn end(self) {
        if let Err(error) = self.engine.end(self.key) {
            tracing::debug!(%error, "the end of a conversation was not told to the engine");
        }
    }
}

/// A running turn. Dropping it cancels the turn within a step; after the turn's end that does nothing.
pub struct TurnHandle {
    turn: TurnId,
    engine: EngineHandle,
}

impl TurnHandle {
    /// As the engine's own events name it.
    pub fn id(&self) -> TurnId {
        self.turn
    }
}

impl Drop for TurnHandle {
    fn drop(&mut self) {
        self.engine.shared.cancels.lock().push(self.turn);
        // Only an idle engine needs waking; a full mailbox is being drained already.
        match self.engine.mailbox.try_send(Message::Wake) {
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }
}

/// The events of one turn, in order.
pub struct TurnEvents {
    listener: mpsc::Receiver<TurnEvent>,
}

impl TurnEvents {
    /// The next event; `None` after the last, or if the engine has stopped.
    pub async fn next(&mut self) -> Option<TurnEvent> {
        self.listener.recv().await
    }
}
