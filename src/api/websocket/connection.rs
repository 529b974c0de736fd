//! How does one socket live, from its upgrade to its goodbye?
//!
//! Reading never waits for writing: pings are answered, and cancels heard, while a client reads nothing. When the socket
//! ends, however it does, its lanes are dropped and with them its turns; what was said is kept, as after any cancel.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::io::ErrorKind;
use std::rc::Rc;
use std::time::{Duration, Instant};

use actix_web::{rt, web};
use actix_ws::{AggregatedMessage, AggregatedMessageStream, CloseCode, MessageStream, ProtocolError, Session};
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use serde_json::{Map, Value, json};
use tracing::{Instrument, Span};

use super::super::edge::Trail;
use super::super::error::ApiError;
use super::super::fields::Fields;
use super::super::responses::events::Events;
use super::super::responses::request::{self, Sent};
use super::super::warming::{self, Wanted};
use super::super::{ApiState, auth, body, ids, unix_now};
use super::lanes::{Bounds, Full, Lanes, Name};
use super::outbox::{Close, Outbox};
use super::requests::{self, Ask, Refused, error_event, in_lane};
use crate::sessions::Attendance;
use crate::sessions::messages::{ConversationId, Place, ResponseId};
use crate::telemetry::metrics::SOCKETS;
use crate::telemetry::trace;
use crate::tenants::Tenant;
use crate::tenants::quota::SocketPermit;
use crate::types::counted;

/// A ping is sent this often, and one without an answer ends the socket as late again.
const PING_EVERY: Duration = Duration::from_secs(20);
/// A client that takes nothing for so long, while something waits, is too slow.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_secs(5);
/// How often clocks are looked at.
const TICK: Duration = Duration::from_millis(500);
/// `session.typing` is acted on once in this time.
const TYPING_EVERY: Duration = Duration::from_secs(5);

/// Cancels and warmings that are under way at once.
const MOST_ERRANDS: usize = 32;

/// Conversations that one socket attends; of more than these its end says nothing.
const MOST_ATTENDED: usize = 1024;

/// What a socket's lanes and errands share.
struct On {
    state: web::Data<ApiState>,
    tenant: Tenant,
    outbox: Outbox,
    /// The last response of each lane that was not to be stored: it can be continued here, and nowhere else.
    unstored: RefCell<HashMap<Name, ResponseId>>,
    /// What was talked about here.
    attends: RefCell<HashMap<ConversationId, Attendance>>,
    /// With which the socket was opened: it must stay good.
    key: Option<String>,
    /// The upgrade's.
    trail: Trail,
    /// Given back when the socket has ended.
    _permit: SocketPermit,
}

/// A socket and what it runs.
pub struct Connection {
    on: Rc<On>,
    lanes: Lanes<Map<String, Value>>,
    errands: FuturesUnordered<LocalBoxFuture<'static, ()>>,
    born: Instant,
    /// The last frame, or the last begin or end of a turn.
    used: Instant,
    /// The last frame of any kind.
    heard: Instant,
    pinged: Instant,
    /// Whether the client was told that the socket is too old.
    aged: bool,
    /// When somebody last typed.
    typed: HashMap<Wanted, Instant>,
}

/// How a socket ends.
enum End {
    /// There is nobody to talk to.
    Gone,
    /// After what waits was said.
    Close(Close),
    /// Without it.
    CloseAtOnce(Close),
}

impl End {
    /// Whether a client that did nothing wrong was sent away, and asked to come again.
    fn is_the_servers_wish(&self) -> bool {
        matches!(self, End::Close(Close { code: CloseCode::Away | CloseCode::Restart, .. }))
    }
}

fn close(code: CloseCode, reason: &'static str) -> End {
    End::Close(Close { code, reason })
}

impl Connection {
    pub fn new(
        state: web::Data<ApiState>,
        tenant: Tenant,
        key: Option<String>,
        trail: Trail,
        permit: SocketPermit,
    ) -> Self {
        let now = Instant::now();
        let bounds = state.settings.sockets.bounds;
        let (unstored, attends) = (RefCell::default(), RefCell::default());
        let on = On { state, tenant, outbox: Outbox::default(), unstored, attends, key, trail, _permit: permit };
        Self {
            on: Rc::new(on),
            lanes: Lanes::new(bounds),
            errands: FuturesUnordered::new(),
            born: now,
            used: now,
            heard: now,
            pinged: now,
            aged: false,
            typed: HashMap::new(),
        }
    }

    /// Lives until either side has enough.
    pub async fn run(mut self, session: Session, frames: MessageStream, warms: Option<ConversationId>) {
        SOCKETS.step(1.0, &[]);
        let on = Rc::clone(&self.on);
        let writer = rt::spawn(on.outbox.clone().write_out(session));
        if let Some(id) = warms {
            self.warm(None, Wanted::Conversation(id), None).unwrap_or_default();
        }
        let most = on.state.settings.sockets.message_bytes;
        let frames = frames.max_frame_size(most).aggregate_continuations().max_continuation_size(most);
        let end = self.serve(frames).await;
        // Before the goodbye: nothing of a turn comes after it.
        drop(self);
        on.leave(&end);
        match end {
            End::Gone => writer.abort(),
            End::Close(close) => on.outbox.close(close),
            End::CloseAtOnce(close) => on.outbox.close_at_once(close),
        }
        let aborts = writer.abort_handle();
        if tokio::time::timeout(GOODBYE, writer).await.is_err() {
            aborts.abort();
        }
        on.forget_unstored().await;
        SOCKETS.step(-1.0, &[]);
    }

    async fn serve(&mut self, mut frames: AggregatedMessageStream) -> End {
        let mut clock = tokio::time::interval(TICK);
        let mut activity = self.lanes.activity();
        loop {
            let end = tokio::select! {
                frame = frames.next() => self.hear(frame),
                _ = clock.tick() => self.look_at_clocks(),
                // The sender is in `lanes`, so this can't fail.
                _ = activity.changed() => {
                    self.used = Instant::now();
                    self.lanes.is_broken().then(|| close(CloseCode::Error, "the server failed in a turn; its log says why"))
                }
                Some(()) = self.errands.next() => None,
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    fn hear(&mut self, frame: Option<Result<AggregatedMessage, ProtocolError>>) -> Option<End> {
        self.heard = Instant::now();
        match frame {
            None => return Some(End::Gone),
            Some(Err(error)) => return Some(broken(&error)),
            Some(Ok(AggregatedMessage::Binary(_))) => {
                return Some(close(CloseCode::Unsupported, "events are text frames of JSON"));
            }
            Some(Ok(AggregatedMessage::Close(_))) => return Some(close(CloseCode::Normal, "")),
            Some(Ok(AggregatedMessage::Ping(payload))) => self.on.outbox.pong(&payload),
            Some(Ok(AggregatedMessage::Pong(_))) => {}
            Some(Ok(AggregatedMessage::Text(text))) => {
                self.used = self.heard;
                self.obey(&text);
            }
        }
        self.is_slow()
    }

    fn obey(&mut self, text: &str) {
        let refused = match requests::read(text, self.on.state.settings.limits.json_depth) {
            Ok((lane, ask)) => self.begin(&lane, ask).err().map(|error| Refused { lane, error }),
            Err(refused) => Some(*refused),
        };
        if let Some(Refused { lane, error }) = refused {
            self.on.outbox.push(error_event(&error, &lane));
        }
    }

    fn begin(&mut self, lane: &Name, ask: Ask) -> Result<(), ApiError> {
        match ask {
            Ask::Create(_) if self.aged => Err(ApiError::connection_limit_reached(self.max_age())),
            Ask::Create(fields) => {
                let on = Rc::clone(&self.on);
                let run = Rc::new(move |lane, fields| {
                    let (on, span) = (Rc::clone(&on), on.create_span());
                    async move { on.run(&lane, &fields).await }.instrument(span)
                });
                let Bounds { lanes, depth } = self.on.state.settings.sockets.bounds;
                self.lanes.submit(lane, fields, &run).map_err(|full| match full {
                    Full::Lanes => ApiError::too_many_pending(format!(
                        "{} turns that run or wait, the bound of `ws.max_lanes`",
                        counted(lanes, "lane of this socket has", "lanes of this socket have")
                    )),
                    Full::Depth => ApiError::too_many_pending(format!(
                        "{} in this lane already, the bound of `ws.lane_depth`",
                        counted(depth, "turn waits", "turns wait")
                    )),
                })
            }
            Ask::Cancel(id) => {
                let (on, lane) = (Rc::clone(&self.on), lane.clone());
                self.errand(async move {
                    // What it ended with is told by the response's own events.
                    if let Err(error) = on.state.sessions.cancel(&on.tenant, id).await {
                        on.outbox.push(error_event(&error.into(), &lane));
                    }
                })
            }
            Ask::Steer(input) => {
                let message = "a running turn can't be steered here; cancel it and create another";
                let error = json!({
                    "type": "invalid_request_error", "code": "steering_not_supported", "message": message, "param": null,
                });
                let event = json!({"type": "response.steer.failed", "error": error, "input": input});
                self.on.outbox.push(in_lane(event, lane));
                Ok(())
            }
            Ask::Warm { wanted, instructions, typing } => {
                if typing {
                    let last = self.typed.insert(wanted, self.heard);
                    if last.is_some_and(|last| self.heard - last < TYPING_EVERY) {
                        return Ok(());
                    }
                    self.typed.retain(|_, at| self.heard - *at < TYPING_EVERY);
                }
                self.warm(lane.clone(), wanted, instructions)
            }
            Ask::Done(wanted) => {
                // Whoever types then is back.
                self.typed.remove(&wanted);
                let (on, lane) = (Rc::clone(&self.on), lane.clone());
                self.errand(async move {
                    let told = match on.end(wanted).await {
                        Ok(id) => {
                            in_lane(json!({"type": "session.done", "conversation": ids::conversation(id)}), &lane)
                        }
                        Err(error) => error_event(&error, &lane),
                    };
                    on.outbox.push(told);
                })
            }
        }
    }

    fn warm(&mut self, lane: Name, wanted: Wanted, instructions: Option<String>) -> Result<(), ApiError> {
        let on = Rc::clone(&self.on);
        let wanted = on.as_seen_here(wanted);
        self.errand(async move {
            let told = |step: warming::Step| {
                on.attend(step.id);
                let mut event = step.object();
                if let Value::Object(event) = &mut event {
                    event.insert("type".into(), json!("session.warm"));
                }
                on.outbox.push(in_lane(event, &lane));
            };
            if let Err(error) = warming::warm(&on.state, &on.tenant, wanted, instructions, told).await {
                on.outbox.push(error_event(&error, &lane));
            }
        })
    }

    fn errand(&mut self, errand: impl Future<Output = ()> + 'static) -> Result<(), ApiError> {
        if self.errands.len() >= MOST_ERRANDS {
            let message = format!("{MOST_ERRANDS} cancels and warmings of this socket are under way; wait for some");
            return Err(ApiError::too_many_pending(message));
        }
        self.errands.push(errand.boxed_local());
        Ok(())
    }

    fn max_age(&self) -> Duration {
        self.on.state.settings.sockets.max_age
    }

    fn is_slow(&self) -> Option<End> {
        let slow = Close { code: CloseCode::Again, reason: "the client reads too slowly" };
        self.on.outbox.is_stuck(PATIENCE).then_some(End::CloseAtOnce(slow))
    }

    fn look_at_clocks(&mut self) -> Option<End> {
        let now = Instant::now();
        if let Some(end) = self.is_slow() {
            return Some(end);
        }
        // Whatever runs: a key that is taken away must not go on by never resting.
        if self.on.state.tenants.tenant_of(self.on.key.as_deref(), unix_now()).is_err() {
            return Some(close(CloseCode::Policy, "the key is no longer good"));
        }
        if now - self.heard >= 2 * PING_EVERY {
            return Some(End::Gone);
        }
        if now - self.pinged >= PING_EVERY {
            self.pinged = now;
            self.on.outbox.ping();
        }
        if !self.aged && now - self.born >= self.max_age() {
            self.aged = true;
            self.on.outbox.push(error_event(&ApiError::connection_limit_reached(self.max_age()), &None));
        }
        if !self.lanes.is_idle() {
            return None;
        }
        if self.on.state.sessions.is_draining() {
            return Some(close(CloseCode::Restart, "the server restarts; connect again"));
        }
        if self.aged {
            return Some(close(CloseCode::Away, "the connection is too old; connect again"));
        }
        if now - self.used >= self.on.state.settings.sockets.idle {
            return Some(close(CloseCode::Away, "the connection was idle"));
        }
        None
    }
}

/// What a frame that is none means.
fn broken(error: &ProtocolError) -> End {
    let (code, reason) = match error {
        ProtocolError::Overflow => (CloseCode::Size, "the message is too large"),
        // What was put together of pieces is told apart by the kind of its error alone.
        ProtocolError::Io(error) if error.kind() == ErrorKind::Other => (CloseCode::Size, "the message is too large"),
        ProtocolError::Io(error) if error.kind() == ErrorKind::InvalidData => {
            (CloseCode::Invalid, "text must be UTF-8")
        }
        ProtocolError::Io(_) => return End::Gone,
        _ => (CloseCode::Protocol, "not a frame of a client"),
    };
    close(code, reason)
}

impl On {
    /// The span of one create: a request of its own, that bears the upgrade's id.
    fn create_span(&self) -> Span {
        let (request, tenant) = (self.trail.request.as_str(), self.tenant.name.as_str());
        let span = tracing::info_span!(parent: None, "request", request, tenant, event = "response.create");
        self.trail.claims(&span);
        trace::rename(&span, "response.create".to_owned());
        span
    }

    /// Runs one create to its last event.
    async fn run(&self, lane: &Name, fields: &Map<String, Value>) {
        let mut events = match self.create(lane, fields).await {
            Ok(events) => events,
            Err(error) => return self.outbox.push(error_event(&error, lane)),
        };
        loop {
            self.outbox.room().await;
            let Some(event) = events.next().await else { return };
            self.outbox.push(in_lane(event.body.into(), lane));
        }
    }

    async fn create(&self, lane: &Name, body: &Map<String, Value>) -> Result<Events, ApiError> {
        let settings = &self.state.settings;
        // As the tenants file has it by now: its limits, and the models that it may use.
        let tenant = self.state.tenants.tenant_of(self.key.as_deref(), unix_now())?;
        auth::count(&tenant)?;
        let mut fields = Fields::of(body);
        let sent = Sent { digest: [0; 32], is_retry: false, deadline: settings.queue_deadline };
        let mut turn = request::read(&self.state, &tenant, body, &mut fields, sent).await?;
        body::unknown(&fields, settings)?;
        let (id, kept) = (turn.response.id, turn.response.kept);
        if !kept && turn.place == Place::Alone {
            turn.place = Place::NewChain;
        }
        if let Place::After(previous) = turn.place {
            turn.sees_unkept = self.has_unstored(previous);
        }
        let turn = self.state.sessions.respond(&tenant, turn).await;
        let turn = turn.map_err(|error| ApiError::from(error).of_param("messages", "input"))?;
        if !kept {
            self.unstored.borrow_mut().insert(lane.clone(), id);
        }
        if let Some(conversation) = turn.conversation {
            self.attend(conversation);
        }
        Events::of(turn, None)
    }

    fn attend(&self, id: ConversationId) {
        let mut attends = self.attends.borrow_mut();
        if attends.len() < MOST_ATTENDED {
            attends.entry(id).or_insert_with(|| self.state.sessions.attend(&self.tenant, id));
        }
    }

    /// Ends a conversation, and attends it no more.
    async fn end(&self, wanted: Wanted) -> Result<ConversationId, ApiError> {
        let id = self.as_seen_here(wanted).find(&self.state, &self.tenant).await?;
        self.state.sessions.end(&self.tenant, id).await?;
        if let Some(attendance) = self.attends.borrow_mut().remove(&id) {
            attendance.release();
        }
        Ok(id)
    }

    /// Attends nothing any more.
    fn leave(&self, end: &End) {
        for (_, attendance) in self.attends.borrow_mut().drain() {
            if end.is_the_servers_wish() { attendance.release() } else { drop(attendance) }
        }
    }

    /// Chains that were not to be stored can be named here.
    fn as_seen_here(&self, wanted: Wanted) -> Wanted {
        match wanted {
            Wanted::Chain { tip, .. } => Wanted::Chain { tip, sees_unkept: self.has_unstored(tip) },
            Wanted::Conversation(_) => wanted,
        }
    }

    /// Whether this response is one that only this socket may continue.
    fn has_unstored(&self, response: ResponseId) -> bool {
        self.unstored.borrow().values().any(|unstored| *unstored == response)
    }

    /// What was not to be stored goes with the socket.
    async fn forget_unstored(&self) {
        let unstored: Vec<_> = self.unstored.borrow_mut().drain().map(|(_, id)| id).collect();
        for id in unstored {
            if let Err(error) = self.state.sessions.forget_unkept(&self.tenant, id).await {
                tracing::warn!(%error, "a response that was not to be stored stays until it expires");
            }
        }
    }
}
