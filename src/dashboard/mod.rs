//! What does an operator see, and what may he do?
//!
//! The page at `/admin` and what it asks for under `/admin/api`. A thread of its own keeps the books (`books`) out of what
//! the engine and the sessions have to tell, four times a second, and tells pages what changed (`events`). Handlers read the
//! books; none waits for the engine's loop, but for an action, which is a request as any client's.

mod access;
mod actions;
mod assets;
mod books;
mod events;
mod history;
mod index;
mod journal;
mod logins;
mod pages;
mod replay;
pub mod routes;
mod turns;
mod verdict;
mod view;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;

use crate::api::{ApiState, ids};
use crate::engine::EngineHandle;
use crate::sessions::Sessions;
use crate::sessions::messages::ConversationId;
use crate::tenants::directory::Directory;
use crate::types::{KvKey, TenantId};
use books::{Books, Changes, Stored};
use events::Events;
use logins::Logins;
use verdict::verdict;
use view::{View, as_of, changed};

/// How often the books are brought up to date, and pages hear of it.
const EVERY: Duration = Duration::from_millis(250);
/// Cells of the map, and entries of the journal, in one event.
const CELLS: usize = 60;
const ENTRIES: usize = 200;

/// What the dashboard must know of the configuration.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The node's name.
    pub node: String,
    pub model: String,
    pub kv_dtype: &'static str,
    pub block_size: u32,
    pub active: Active,
    /// The same as a configuration file has it.
    pub config: String,
    /// Actions are refused.
    pub read_only: bool,
    /// The cookie goes over TLS alone: the server can be reached from elsewhere.
    pub secure_cookie: bool,
    pub data_dir: PathBuf,
    pub tick_zero_us: i64,
}

/// What decides who is evicted, as the configuration has it.
#[derive(Clone, Debug)]
pub struct Active {
    pub policy: &'static str,
    pub eviction_doubles_at: Option<u32>,
    /// From which length on a conversation loses its first tokens first.
    pub front_first_from: Option<u32>,
    pub device_bytes: u64,
    pub host_bytes: u64,
    pub disk_bytes: u64,
    pub cold_dtype: &'static str,
    pub background_offload: bool,
}

/// The dashboard, for its handlers. Cheap to clone.
#[derive(Clone)]
pub struct Dashboard {
    inner: Arc<Inner>,
}

struct Inner {
    books: RwLock<Books>,
    /// Looks follow each other, so that what has happened is taken in in order.
    looking: Mutex<()>,
    told: Mutex<Told>,
    events: Events,
    logins: Logins,
    undo: actions::Undo,
    /// One replay at a time.
    replaying: Semaphore,
    engine: EngineHandle,
    sessions: Sessions,
    tenants: Arc<Directory>,
    settings: Settings,
}

/// What pages have been told last.
#[derive(Default)]
struct Told {
    overview: Map<String, Value>,
    tenants: HashMap<String, Map<String, Value>>,
    displaced: Map<String, Value>,
    /// Conversations whose cells are to be told, and those that have gone.
    pending: BTreeSet<KvKey>,
    gone: BTreeSet<KvKey>,
    /// The bottleneck, and since when.
    verdict: (&'static str, i64),
}

/// A conversation of the store, at the start.
pub struct Known {
    pub key: KvKey,
    pub tenant: String,
    pub tokens: usize,
    /// Seconds since 1970.
    pub created_at: i64,
    /// The conversation that it branched off.
    pub parent: Option<KvKey>,
    /// The number of its newest turn.
    pub turns: Option<u32>,
}

impl Dashboard {
    /// Begins to keep the books. Panics if the system has no thread to give, as nothing works without.
    pub fn start(
        engine: EngineHandle,
        sessions: Sessions,
        tenants: Arc<Directory>,
        known: impl IntoIterator<Item = Known>,
        settings: Settings,
    ) -> Self {
        let ids: HashMap<String, TenantId> = tenants.names().into_iter().map(|(id, name)| (name, id)).collect();
        let stored = known.into_iter().filter_map(|known| {
            // One of a tenant that is gone is nobody's to look at.
            let tenant = *ids.get(&known.tenant)?;
            let tokens = u32::try_from(known.tokens).unwrap_or(u32::MAX);
            let Known { key, parent, turns, created_at, .. } = known;
            Some(Stored { key, tenant, tokens, created: created_at * 1000, parent, turns })
        });
        let inner = Arc::new(Inner {
            books: RwLock::new(Books::new(settings.tick_zero_us, stored.collect())),
            looking: Mutex::new(()),
            told: Mutex::default(),
            events: Events::new(format!("{:016x}", rand::random::<u64>())),
            logins: Logins::default(),
            undo: actions::Undo::default(),
            replaying: Semaphore::new(1),
            engine,
            sessions,
            tenants,
            settings,
        });
        inner.look();
        let follower = Arc::downgrade(&inner);
        let follow = move || {
            while let Some(inner) = follower.upgrade() {
                inner.look();
                drop(inner);
                std::thread::sleep(EVERY);
            }
        };
        std::thread::Builder::new().name("dashboard".into()).spawn(follow).expect("the system gives a thread at start");
        Self { inner }
    }

    /// Says to open pages that the server ends.
    pub fn end(&self) {
        self.inner.events.say_goodbye("the server ends");
    }
}

impl Inner {
    /// Takes in what has happened, and tells it.
    fn look(&self) {
        let _alone = self.looking.lock();
        let happened = self.engine.take_happened();
        let news = self.sessions.take_news();
        let (accounts, now) = self.engine.accounts();
        let changes = self.books.write().take_in(
            happened,
            news,
            (self.engine.status(), accounts, now),
            &|key| self.engine.residency(key),
            &|| self.engine.residencies().map(|(key, _)| key).collect(),
            self.events.seq() + 1,
        );
        if self.events.is_heard() {
            self.tell(&changes);
        } else {
            if !changes.is_empty() {
                self.events.pass();
            }
            let mut told = self.told.lock();
            *told = Told { verdict: told.verdict, ..Told::default() };
        }
    }

    /// The books, to be told of.
    fn read<T>(&self, told: impl FnOnce(&View<'_>) -> T) -> T {
        let books = self.books.read();
        let names = self.tenants.names();
        told(&View { books: &books, engine: &self.engine, settings: &self.settings, names: &names })
    }

    /// GET `/overview`, without `as_of`.
    fn overview(&self, view: &View<'_>) -> Map<String, Value> {
        let verdict = verdict(view.books, &|tenant| view.name(tenant));
        let since = {
            let mut told = self.told.lock();
            if told.verdict.0 != verdict.bottleneck {
                told.verdict = (verdict.bottleneck, view.books.ms(view.books.now));
            }
            told.verdict.1
        };
        view.overview(&verdict, since, self.sessions.is_draining())
    }

    fn as_of(&self, view: &View<'_>) -> Value {
        as_of(self.events.seq(), view.books.ms(view.books.now), self.events.boot())
    }

    fn tell(&self, changes: &Changes) {
        let (tick, journal, sessions) = self.read(|view| {
            let entries: Vec<Value> = changes.entries.iter().take(ENTRIES).map(|entry| view.entry(entry)).collect();
            let watched = self.events.watched();
            let rows = changes.rows.iter().filter_map(|key| {
                let id = session_id(*key);
                let row = view.books.index.get(*key).filter(|_| watched.contains(&id))?;
                Some((id, view.row(*key, row)))
            });
            (self.tick(view, changes), entries, rows.collect::<Vec<_>>())
        });
        if let Some(tick) = tick {
            self.events.send("tick", tick);
        }
        if !journal.is_empty() {
            let mut data = json!({"items": journal});
            let dropped = changes.entries.len().saturating_sub(ENTRIES);
            if let (true, Value::Object(fields)) = (dropped > 0, &mut data) {
                fields.insert("dropped".into(), dropped.into());
            }
            self.events.send("journal", data);
        }
        for (id, row) in sessions {
            self.events.send_to_watchers(&id, &json!({"row": row}));
        }
    }

    /// The largest tenants as the page shows them, but for what grows by itself.
    fn tenants_now(&self, view: &View<'_>) -> Vec<(String, Map<String, Value>)> {
        let tenants = view.tenants_by_size().into_iter().take(CELLS);
        let fields = tenants.map(|(id, account)| match view.tenant(id, account, view.running(id)) {
            Value::Object(mut fields) => {
                fields.remove("byte_seconds");
                (view.name(id), fields)
            }
            _ => (view.name(id), Map::new()),
        });
        fields.collect()
    }

    /// What is not as it was told last; `None`: nothing.
    fn tick(&self, view: &View<'_>, changes: &Changes) -> Option<Value> {
        let overview = self.overview(view);
        // Once a second: they look at all first tokens of some minutes.
        let tenants = if changes.sample.is_some() { self.tenants_now(view) } else { Vec::new() };
        let mut told = self.told.lock();
        let mut tick = Map::new();
        let fresh = changed(&overview, &told.overview);
        told.overview = overview;
        let mut changed_tenants = Map::new();
        for (name, fields) in tenants {
            let before = told.tenants.insert(name.clone(), fields.clone()).unwrap_or_default();
            let fresh = changed(&fields, &before);
            if !fresh.is_empty() {
                changed_tenants.insert(name, Value::Object(fresh));
            }
        }
        if changes.sample.is_some() {
            let displaced = view.displaced();
            if displaced != told.displaced {
                changed_tenants.insert("displaced".into(), Value::Object(displaced.clone()));
                told.displaced = displaced;
            }
        }
        told.pending.extend(&changes.rows);
        told.gone.extend(&changes.gone);
        let (mut upsert, mut drop) = (Vec::new(), Vec::new());
        for _ in 0..CELLS {
            let Some(key) = told.pending.pop_first() else { break };
            match view.books.index.get(key).filter(|row| row.bytes[0] > 0) {
                Some(row) => {
                    let mut cell = view.cell(key, row);
                    if let Value::Object(fields) = &mut cell {
                        fields.insert("tenant".into(), view.name(row.tenant).into());
                    }
                    upsert.push(cell);
                }
                None => drop.push(session_id(key)),
            }
        }
        for _ in 0..CELLS {
            let Some(key) = told.gone.pop_first() else { break };
            drop.push(session_id(key));
        }
        if !fresh.is_empty() {
            tick.insert("ov".into(), Value::Object(fresh));
        }
        if !changed_tenants.is_empty() {
            tick.insert("tenants".into(), Value::Object(changed_tenants));
        }
        if !upsert.is_empty() || !drop.is_empty() {
            tick.insert("map".into(), json!({"upsert": upsert, "drop": drop}));
        }
        if let Some(sample) = &changes.sample {
            tick.insert("hist".into(), pages::sample(sample));
        }
        if tick.is_empty() {
            return None;
        }
        tick.insert("ts".into(), view.books.ms(view.books.now).into());
        Some(Value::Object(tick))
    }
}

/// A conversation's id, as clients know it.
fn session_id(key: KvKey) -> String {
    ids::conversation(ConversationId(key.0))
}

/// What handlers of this room share with those of the API.
type Api = actix_web::web::Data<ApiState>;
