//! What can an operator do to a conversation?
//!
//! What its own tenant could, through the same doors: warm, pin, offload, cancel; and give up its device copy, or all of
//! them. Each is an entry of the journal with the actor's name, and an event. What can be undone can for some seconds.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use actix_web::{HttpRequest, HttpResponse, web};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::access::Who;
use super::journal::Entry;
use super::pages::key_of;
use super::{Api, Dashboard, session_id};
use crate::api::body;
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::sessions::messages::{ConversationId, OffloadTo};
use crate::tenants::Tenant;
use crate::types::{KvKey, counted};

const UNDO: Duration = Duration::from_secs(10);
/// A pin, if nobody says for how long.
const PINNED: Duration = Duration::from_secs(3600);

/// What can be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verb {
    Warm,
    Pin,
    Unpin,
    Offload,
    Evict,
    Drop,
    Cancel,
}

impl Verb {
    fn named(name: &str) -> Option<Self> {
        match name {
            "warm" => Some(Verb::Warm),
            "pin" => Some(Verb::Pin),
            "unpin" => Some(Verb::Unpin),
            "offload" => Some(Verb::Offload),
            "evict" => Some(Verb::Evict),
            "drop" => Some(Verb::Drop),
            "cancel" => Some(Verb::Cancel),
            _ => None,
        }
    }

    /// What takes it back.
    fn opposite(self) -> Option<Self> {
        match self {
            Verb::Warm => Some(Verb::Evict),
            Verb::Pin => Some(Verb::Unpin),
            Verb::Unpin => Some(Verb::Pin),
            Verb::Offload | Verb::Evict => Some(Verb::Warm),
            Verb::Drop | Verb::Cancel => None,
        }
    }
}

/// What can be taken back, for a while.
#[derive(Default)]
pub struct Undo(Mutex<HashMap<String, (Verb, KvKey, Instant)>>);

impl Undo {
    fn offer(&self, verb: Verb, key: KvKey) -> String {
        let token = format!("{:032x}", rand::random::<u128>());
        let mut offers = self.0.lock();
        offers.retain(|_, (_, _, until)| *until > Instant::now());
        offers.insert(token.clone(), (verb, key, Instant::now() + UNDO));
        token
    }

    fn take(&self, token: &str) -> Option<(Verb, KvKey)> {
        let (verb, key, until) = self.0.lock().remove(token)?;
        (until > Instant::now()).then_some((verb, key))
    }
}

/// What came of it, and how the journal says it.
struct Done {
    sentence: String,
    can_be_undone: bool,
}

/// POST `/admin/api/sessions/{id}/{verb}`.
pub async fn act(
    request: HttpRequest,
    path: web::Path<(String, String)>,
    payload: web::Payload,
    api: Api,
    dashboard: web::Data<Dashboard>,
    who: Who,
) -> Result<HttpResponse, ApiError> {
    may_act(&dashboard)?;
    let (id, verb) = path.into_inner();
    let verb = Verb::named(&verb).ok_or_else(|| ApiError::unknown_url("POST", request.path()))?;
    let key = key_of(&id)?;
    let parsed = body::object(&request, payload, &api.settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let if_seq = fields.integer_in("if_seq", 0..=i64::MAX)?.and_then(|seq| u64::try_from(seq).ok());
    let ttl =
        fields.integer_in("ttl_seconds", 1..=i64::try_from(api.settings.max_pin_ttl.as_secs()).unwrap_or(i64::MAX))?;
    let ttl = ttl.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    let to = match fields.string("to")? {
        None | Some("host") => OffloadTo::Host,
        Some("disk") => OffloadTo::Disk,
        Some(_) => return Err(ApiError::invalid_value("to", "`to` must be host or disk")),
    };
    let (tenant, changed) = whose(&dashboard, key)?;
    if if_seq.is_some_and(|seq| seq < changed) {
        return Err(ApiError::session_changed());
    }
    let done = perform(&api, &dashboard, &tenant, key, verb, ttl, to).await?;
    settle(&dashboard, &who.name, &tenant, key, done.sentence);
    let undo = verb.opposite().filter(|_| done.can_be_undone);
    let undo = undo.map(|verb| json!({"token": dashboard.inner.undo.offer(verb, key), "expires_s": UNDO.as_secs()}));
    Ok(answer(&dashboard, key, json!(undo)))
}

/// POST `/admin/api/undo/{token}`.
pub async fn undo(
    token: web::Path<String>,
    api: Api,
    dashboard: web::Data<Dashboard>,
    who: Who,
) -> Result<HttpResponse, ApiError> {
    may_act(&dashboard)?;
    let (verb, key) = dashboard.inner.undo.take(&token).ok_or_else(ApiError::undo_expired)?;
    let (tenant, _) = whose(&dashboard, key)?;
    let done = perform(&api, &dashboard, &tenant, key, verb, None, OffloadTo::Host).await?;
    settle(&dashboard, &who.name, &tenant, key, format!("Taken back: {}", done.sentence));
    Ok(answer(&dashboard, key, Value::Null))
}

fn may_act(dashboard: &Dashboard) -> Result<(), ApiError> {
    if dashboard.inner.settings.read_only { Err(ApiError::read_only()) } else { Ok(()) }
}

/// Whose conversation it is, and the event after which it was as it is.
fn whose(dashboard: &Dashboard, key: KvKey) -> Result<(Tenant, u64), ApiError> {
    let found = dashboard.inner.read(|view| view.books.index.get(key).map(|row| (row.tenant, row.changed, row.stored)));
    let (tenant, changed, stored) = found.ok_or_else(ApiError::conversation_not_found)?;
    if !stored {
        return Err(ApiError::stateless_session());
    }
    let tenant = dashboard.inner.tenants.tenant_by_id(tenant).ok_or_else(ApiError::conversation_not_found)?;
    Ok((tenant, changed))
}

async fn perform(
    api: &Api,
    dashboard: &Dashboard,
    tenant: &Tenant,
    key: KvKey,
    verb: Verb,
    ttl: Option<Duration>,
    to: OffloadTo,
) -> Result<Done, ApiError> {
    let (sessions, id) = (&api.sessions, ConversationId(key.0));
    let status = dashboard.inner.engine.status();
    let (has_host, has_disk) = (status.host.total.0 > 0, status.disk.total.0 > 0);
    let device_bytes = |bytes: u64| counted(bytes, "device byte", "device bytes");
    let undoable = |sentence: String| Done { sentence, can_be_undone: true };
    Ok(match verb {
        Verb::Warm => {
            sessions.reopen(tenant, id).await?;
            match sessions.warm(tenant, id, None).await? {
                Some(usage) => undoable(format!(
                    "An operator warmed it: {} came back and {} encoded.",
                    counted(usage.prompt.reloaded().0, "token", "tokens"),
                    counted(usage.prompt.encoded.0, "was", "were")
                )),
                None => Done {
                    sentence: "An operator warmed it, and there was no history to bring.".into(),
                    can_be_undone: false,
                },
            }
        }
        Verb::Pin => {
            let ttl = ttl.unwrap_or(PINNED).min(api.settings.max_pin_ttl);
            let pinned = sessions.pin(tenant, id, Some(ttl)).await?;
            let (used, limit) = (pinned.used_bytes, pinned.limit_bytes);
            undoable(format!(
                "An operator pinned it for {} s; its tenant's pins keep {used} of {limit} bytes.",
                ttl.as_secs()
            ))
        }
        Verb::Unpin => {
            sessions.pin(tenant, id, None).await?;
            undoable("An operator unpinned it.".into())
        }
        Verb::Offload if to == OffloadTo::Disk && !has_disk => {
            return Err(ApiError::not_possible("this server has no disk tier; offload to the host"));
        }
        Verb::Evict | Verb::Offload if !has_host && !has_disk => {
            return Err(ApiError::not_possible(
                "there is no tier below the device that could keep a copy; `drop` gives up the last one",
            ));
        }
        Verb::Offload => {
            let to = if has_host { to } else { OffloadTo::Disk };
            let moved = sessions.offload(tenant, id, to).await?;
            let tier = if to == OffloadTo::Disk { "disk" } else { "the host" };
            undoable(format!("An operator offloaded it to {tier}: {} became free.", device_bytes(moved.bytes)))
        }
        Verb::Evict => {
            let moved = sessions.offload(tenant, id, if has_host { OffloadTo::Host } else { OffloadTo::Disk }).await?;
            undoable(format!(
                "An operator evicted it: {} became free, and a copy stays below.",
                device_bytes(moved.bytes)
            ))
        }
        Verb::Drop => {
            let moved = sessions.offload(tenant, id, OffloadTo::None).await?;
            let sentence = format!(
                "An operator dropped its KV in every tier: {} became free, and its next turn encodes its history again.",
                device_bytes(moved.bytes)
            );
            Done { sentence, can_be_undone: false }
        }
        Verb::Cancel => {
            let cancelled = sessions.cancel_turn_of(tenant, id).await;
            if !cancelled {
                return Err(ApiError::not_possible("no turn of this conversation runs that could be cancelled"));
            }
            Done {
                sentence: "An operator cancelled its running turn; what was said is kept.".into(),
                can_be_undone: false,
            }
        }
    })
}

/// Notes what was done, after the books have taken in what came of it: the engine tells that before it answers.
fn settle(dashboard: &Dashboard, actor: &str, tenant: &Tenant, key: KvKey, sentence: String) {
    tracing::info!(actor, session = session_id(key), tenant = tenant.name, action = sentence, "an operator acted");
    let inner = &dashboard.inner;
    inner.look();
    let entry = inner.books.write().add(Entry::acted(inner.engine.now(), actor, key, tenant.id, sentence));
    let told = inner.read(|view| view.entry(&entry));
    inner.events.send("journal", json!({"items": [told]}));
}

/// How the conversation is now, and what takes back what was done.
fn answer(dashboard: &Dashboard, key: KvKey, undo: Value) -> HttpResponse {
    let (as_of, row) = dashboard.inner.read(|view| {
        let row = view.books.index.get(key).map_or(Value::Null, |row| view.row(key, row));
        (dashboard.inner.as_of(view), row)
    });
    HttpResponse::Ok().json(json!({"as_of": as_of, "ok": true, "session": row, "undo": undo}))
}
