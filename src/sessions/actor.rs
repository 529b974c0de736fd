//! In which order do a conversation's turns and changes happen?
//!
//! One at a time, in the order they came: a session works on one command and queues the others. Handlers never wait; a
//! command's work is a future whose end begins the next. Invariant: memory follows the store. Nothing is in the transcript
//! that is not durable, and no client hears `Done` before its answer is.

use std::collections::VecDeque;
use std::sync::Arc;

use actix::{Actor, ActorContext, ActorFutureExt, AsyncContext, Context, Handler, WrapFuture};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{Instrument, Span};

use super::command::{Command, Description, Follows, Outlook, Passivate, QueuedTurn, Refusal, Reply, Taken, answer};
use super::kept::Kept;
use super::live::Running;
use super::messages::{
    Audience, Deleted, Goal, Item, NewItem, OffloadTo, Offloaded, OnConflict, SessionError, TurnError, TurnLimits,
    TurnUsage,
};
use super::prompt::PromptRules;
use super::registry::Identity;
use super::stream::turn_stream;
use super::traced;
use super::transcript::Transcript;
use super::turn::start;
use super::warm::warm;
use super::work::{
    Closing, Opened, Opening, Outcome, Started, Work, close, commit_items, delete, load, new_items, open, remove,
};
use super::{Shared, new_item_id, unix_now};
use crate::engine::KvHandle;
use crate::types::KvKey;

/// Commands other than turns that may wait; turns have `sessions.queue_depth`.
const QUEUED_CHANGES: usize = 64;

/// A live conversation.
pub(super) struct Session {
    shared: Arc<Shared>,
    who: Identity,
    phase: Phase,
    transcript: Arc<Transcript>,
    waiting: VecDeque<Command>,
    /// The digest of the newest turn's request, if this actor has seen it.
    newest: Option<[u8; 32]>,
}

enum Phase {
    /// The history is on its way from the store.
    Loading,
    Idle(KvHandle),
    /// A command's future runs and has the handle. `turn`: set to true, it ends the turn that runs.
    Working {
        turn: Option<watch::Sender<bool>>,
    },
    /// Out of the registry. What still reaches it goes to its successor.
    Retired,
}

impl Session {
    pub fn new(shared: Arc<Shared>, who: Identity) -> Self {
        let (transcript, waiting) = (Arc::default(), VecDeque::new());
        Self { shared, who, phase: Phase::Loading, transcript, waiting, newest: None }
    }

    /// One whose history is not in the store yet.
    pub fn newborn(shared: Arc<Shared>, who: Identity, transcript: Transcript) -> Self {
        Self { transcript: Arc::new(transcript), ..Self::new(shared, who) }
    }
}

impl Actor for Session {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Context<Self>) {
        if self.transcript.unborn.is_some() {
            return self.rest(self.claim(), context);
        }
        let loaded = load(self.work()).into_actor(self).map(|loaded, session, context| match loaded {
            Ok(transcript) => {
                session.transcript = Arc::new(transcript);
                let kv = session.claim();
                session.rest(kv, context);
            }
            Err(refusal) => session.retire(&refusal, context),
        });
        context.spawn(loaded);
    }
}

impl Handler<Passivate> for Session {
    type Result = ();

    fn handle(&mut self, _: Passivate, context: &mut Context<Self>) {
        match self.phase {
            Phase::Idle(_) => self.retire(&Refusal::Lost, context),
            // It touches the idle clock when it is done.
            Phase::Loading | Phase::Working { .. } | Phase::Retired => {}
        }
    }
}

impl Handler<Command> for Session {
    type Result = ();

    fn handle(&mut self, command: Command, context: &mut Context<Self>) {
        match std::mem::replace(&mut self.phase, Phase::Working { turn: None }) {
            Phase::Idle(kv) => self.begin(command, kv, context),
            phase @ Phase::Loading => {
                self.phase = phase;
                self.enqueue(command, 0, context);
            }
            phase @ Phase::Working { .. } => {
                let turns = usize::from(matches!(phase, Phase::Working { turn: Some(_) }));
                self.phase = phase;
                match command {
                    Command::Fork { after_item: None, reply } if turns + self.turns_waiting() > 0 => {
                        answer(reply, Err(SessionError::Busy));
                    }
                    // The turns that wait were asked for before.
                    Command::Expect { outlook: Outlook::Over, .. } if self.turns_waiting() > 0 => {
                        self.enqueue(command, turns, context);
                    }
                    Command::Items { .. }
                    | Command::Copy { .. }
                    | Command::Fork { .. }
                    | Command::Describe { .. }
                    | Command::Expect { .. }
                    | Command::Pin { .. } => self.tell(command),
                    Command::Respond(queued) if queued.follows.tip().is_some() && turns + self.turns_waiting() > 0 => {
                        answer(queued.reply, Ok(Taken::NotTip));
                    }
                    Command::Offload { reply, .. } if turns + self.turns_waiting() > 0 => {
                        answer(reply, Err(SessionError::Busy));
                    }
                    // What works brings the KV itself, or takes it away.
                    Command::Warm { reply, .. } => answer(reply, Err(SessionError::Busy)),
                    Command::Delete { .. } => self.delete_next(command),
                    Command::Respond(_)
                    | Command::Append { .. }
                    | Command::DeleteItem { .. }
                    | Command::Offload { .. } => self.enqueue(command, turns, context),
                }
            }
            Phase::Retired => {
                self.phase = Phase::Retired;
                self.shared.registry.deliver(&self.shared, &self.who, command);
            }
        }
    }
}

/// The queue.
impl Session {
    /// Lets a command wait, or says why it can't. `running`: turns that run now, 0 or 1.
    fn enqueue(&mut self, command: Command, running: usize, context: &mut Context<Self>) {
        self.waiting.retain(|waiting| !waiting.is_abandoned());
        let turns_waiting = self.turns_waiting();
        match command {
            Command::Respond(queued) => {
                let ahead = running + turns_waiting;
                let may_wait =
                    queued.turn.on_conflict == OnConflict::Queue && ahead <= self.shared.settings.queue_depth;
                if ahead > 0 && !may_wait {
                    return answer(queued.reply, Err(TurnError::Locked { waiting: turns_waiting }));
                }
                let left = queued.deadline.saturating_duration_since(Instant::now());
                context.run_later(left, |session, _| session.expire());
                self.waiting.push_back(Command::Respond(queued));
            }
            change if self.waiting.len() - turns_waiting < QUEUED_CHANGES => self.waiting.push_back(change),
            change => change.refuse(Refusal::Overloaded),
        }
    }

    fn turns_waiting(&self) -> usize {
        self.waiting.iter().filter(|command| matches!(command, Command::Respond(_))).count()
    }

    /// Answers the turns that have waited past their deadline.
    fn expire(&mut self) {
        let now = Instant::now();
        for command in std::mem::take(&mut self.waiting) {
            match command {
                Command::Respond(queued) if queued.deadline <= now => answer(queued.reply, Err(waited_too_long())),
                waits => self.waiting.push_back(waits),
            }
        }
    }

    /// Ends the running turn and lets nothing but the deletion come after it.
    fn delete_next(&mut self, deletion: Command) {
        if let Phase::Working { turn: Some(cancel) } = &self.phase {
            cancel.send_replace(true);
        }
        for waiting in std::mem::take(&mut self.waiting) {
            match waiting {
                Command::Delete { .. } => self.waiting.push_back(waiting),
                other => other.refuse(Refusal::NoConversation),
            }
        }
        self.waiting.push_back(deletion);
    }

    /// Begins the next command that waits, or is idle.
    fn rest(&mut self, kv: KvHandle, context: &mut Context<Self>) {
        match self.waiting.pop_front() {
            Some(abandoned) if abandoned.is_abandoned() => self.rest(kv, context),
            Some(next) => self.begin(next, kv, context),
            None => {
                self.phase = Phase::Idle(kv);
                let (shared, who) = (Arc::clone(&self.shared), self.who.clone());
                context.spawn(async move { shared.registry.touch(&who).await }.into_actor(self));
            }
        }
    }

    /// Leaves the registry. The KV handle goes, and leaves the blocks to the evictor. What was sent before is in the mailbox
    /// by now, which is emptied before the last future is looked at.
    fn retire(&mut self, refusal: &Refusal, context: &mut Context<Self>) {
        self.phase = Phase::Retired;
        self.shared.registry.remove(&self.who, &context.address());
        for command in std::mem::take(&mut self.waiting) {
            command.refuse(refusal.clone());
        }
        context.spawn(std::future::ready(()).into_actor(self).map(|(), _, context| context.stop()));
    }

    fn claim(&self) -> KvHandle {
        self.shared.engine.kv(self.who.tenant.id, self.who.tenant.key, KvKey(self.who.id.0))
    }
}

/// The commands.
impl Session {
    fn begin(&mut self, command: Command, kv: KvHandle, context: &mut Context<Self>) {
        self.phase = Phase::Working { turn: None };
        match command {
            Command::Respond(queued) => self.respond(*queued, kv, context),
            Command::Append { items, reply } => self.append(items, reply, kv, context),
            Command::DeleteItem { item, reply } => self.delete_item(item, reply, kv, context),
            Command::Warm { instructions, reply } => self.warm(instructions, reply, kv, context),
            Command::Offload { to, reply } => self.offload(to, reply, kv, context),
            Command::Delete { reply } => self.delete(reply, kv, context),
            Command::Items { .. }
            | Command::Copy { .. }
            | Command::Fork { .. }
            | Command::Describe { .. }
            | Command::Expect { .. }
            | Command::Pin { .. } => {
                self.tell(command);
                self.rest(kv, context);
            }
        }
    }

    /// Answers what needs no work.
    fn tell(&self, command: Command) {
        match command {
            Command::Items { reply } => answer(reply, Ok(self.transcript.items.clone())),
            Command::Copy { up_to, reply } => answer(reply, Ok(self.transcript.up_to(&up_to))),
            Command::Fork { after_item, reply } => {
                let history = match after_item {
                    Some(item) => self.transcript.up_to(&item).ok_or(SessionError::NoItem(item)),
                    None => Ok((*self.transcript).clone()),
                };
                answer(reply, history);
            }
            Command::Describe { reply } => {
                let Transcript { log, last_used_at, .. } = &*self.transcript;
                let turns = self.transcript.turns();
                answer(reply, Ok(Description { tokens: log.len(), turns, last_used_at: *last_used_at }));
            }
            Command::Expect { outlook, reply } => {
                let key = KvKey(self.who.id.0);
                let told = match outlook {
                    Outlook::Over => self.shared.engine.end(key),
                    Outlook::Open => self.shared.engine.reopen(key),
                };
                answer(reply, told.map_err(SessionError::from));
            }
            // Asked of the engine now, so that a deletion comes after it there too.
            Command::Pin { time, reply } => {
                let Identity { tenant, id } = &self.who;
                let pinned = self.shared.engine.pin(tenant.id, tenant.key, KvKey(id.0), time);
                actix::spawn(async move { answer(reply, pinned.await.map_err(SessionError::from)) });
            }
            other @ (Command::Respond(_)
            | Command::Append { .. }
            | Command::DeleteItem { .. }
            | Command::Warm { .. }
            | Command::Offload { .. }
            | Command::Delete { .. }) => other.refuse(Refusal::Lost),
        }
    }

    fn respond(&mut self, queued: QueuedTurn, kv: KvHandle, context: &mut Context<Self>) {
        let QueuedTurn { mut turn, previous, follows, deadline, span, reply } = queued;
        traced::belongs_to(&span, self.who.id);
        if deadline <= Instant::now() {
            answer(reply, Err(waited_too_long()));
            return self.settle(kv, context);
        }
        let moved_on = follows.tip().is_some_and(|tip| tip != self.transcript.tip());
        let repeats = turn.response.is_retry && self.newest == Some(turn.response.request);
        if moved_on || (repeats && matches!(follows, Follows::Anything)) {
            answer(reply, Ok(if moved_on { Taken::NotTip } else { Taken::Repeats }));
            return self.settle(kv, context);
        }
        // One more for the answer.
        if let Err((items, most)) = self.room_for(turn.input.len() + 1) {
            answer(reply, Err(TurnError::TooManyItems { items, most }));
            return self.settle(kv, context);
        }
        let pass = match self.shared.gate.enter(&self.who.tenant) {
            Ok(pass) => pass,
            Err(refused) => {
                answer(reply, Err(refused));
                return self.settle(kv, context);
            }
        };
        let (cancel, cancelled) = watch::channel(false);
        self.phase = Phase::Working { turn: Some(cancel) };
        let rules = PromptRules::of(&self.shared, &mut turn);
        let mut response = Kept::new(turn.response, previous.map(|id| id.0), self.shared.settings.response_ttl_s);
        let (input, replaces, transcript) = match follows {
            Follows::Anything | Follows::Tip(_) => (new_items(turn.input), None, Arc::clone(&self.transcript)),
            Follows::Broken { answer: said, input, .. } => {
                response.body.input = input;
                let history = said.as_deref().map(|said| Arc::new(self.transcript.without(said)));
                (Vec::new(), said, history.unwrap_or_else(|| Arc::clone(&self.transcript)))
            }
        };
        let opening = open(self.work(), Opening { transcript, input, rules, replaces, response });
        let (opening, of_close) = (opening.instrument(span.clone()), span.clone());
        let (limits, goal, audience) = (turn.limits, turn.goal, turn.audience);
        let starting = Starting { kv, limits, goal, audience, deadline, span, reply, cancelled };
        let whole = opening
            .into_actor(self)
            .map(move |opened, session, _| session.start(opened, starting))
            .then(move |(kv, outcome), session, _| {
                close(session.work(), kv, outcome).instrument(of_close).into_actor(session)
            })
            .map(move |(kv, closing), session, context| {
                if let Some(closing) = closing {
                    session.close(closing);
                }
                drop(pass);
                session.settle(kv, context);
            });
        context.spawn(whole);
    }

    /// Rests, unless the conversation never came to be: then nobody knows of it.
    fn settle(&mut self, kv: KvHandle, context: &mut Context<Self>) {
        if self.transcript.unborn.is_some() {
            self.retire(&Refusal::NoConversation, context);
        } else {
            self.rest(kv, context);
        }
    }

    /// Whether as many more items fit; else how many there would be, and the bound.
    fn room_for(&self, more: usize) -> Result<(), (usize, usize)> {
        let (items, most) = (self.transcript.items.len() + more, self.shared.settings.max_items);
        if items > most { Err((items, most)) } else { Ok(()) }
    }

    /// Keeps the input, which is durable by now, gives the engine the turn, and answers whoever asked for it.
    fn start(&mut self, opened: Result<Opened, TurnError>, starting: Starting) -> (KvHandle, Outcome) {
        let Starting { mut kv, limits, goal, audience, deadline, span, reply, cancelled } = starting;
        let _entered = span.entered();
        let Opened { input, replaces, prompt, response } = match opened {
            Ok(opened) => opened,
            Err(error) => {
                traced::failed(&Span::current(), &error);
                answer(reply, Err(error));
                return (kv, Outcome::Refused);
            }
        };
        if let Some(replaced) = replaces {
            self.transcript = Arc::new(self.transcript.without(&replaced));
        }
        Arc::make_mut(&mut self.transcript).unborn = None;
        self.newest = Some(response.request());
        self.keep(input);
        match start(&self.shared, &mut kv, &prompt, limits, goal, deadline) {
            Ok(running) => {
                let item_id = new_item_id();
                let (writer, stream) = turn_stream(item_id.clone(), audience);
                let (id, about) = (response.id(), response.body.about.as_str().into());
                let (conversation, kept) = (Some(self.who.id), response.is_kept());
                let alive = Running { id, conversation, about, log: writer.log(), kept };
                let turn = alive.turn(stream);
                let presence = self.shared.live.enter(self.who.tenant.id, alive);
                // A caller that has gone away drops the stream here, which cancels the turn.
                answer(reply, Ok(Taken::Runs(turn)));
                let started = Started { running, prompt, response, item_id, writer, cancelled, presence };
                (kv, Outcome::Started(Box::new(started)))
            }
            Err(error) => {
                traced::failed(&Span::current(), &error);
                answer(reply, Err(error.clone()));
                (kv, Outcome::Unstarted(Box::new(response), error))
            }
        }
    }

    /// Takes what is durable by now into the transcript, then tells the client.
    fn close(&mut self, closing: Closing) {
        let Closing { writer, end, left, presence } = closing;
        if let Some(left) = left {
            self.keep(left.item);
            Arc::make_mut(&mut self.transcript).take(left.log, left.known);
        }
        writer.end(end);
        drop(presence);
    }

    fn append(
        &mut self,
        items: Vec<NewItem>,
        reply: Reply<Vec<Arc<Item>>, SessionError>,
        kv: KvHandle,
        context: &mut Context<Self>,
    ) {
        if let Err((items, most)) = self.room_for(items.len()) {
            answer(reply, Err(SessionError::TooManyItems { items, most }));
            return self.rest(kv, context);
        }
        let (work, items) = (self.work(), new_items(items));
        let committing = async move { commit_items(&work, &items).await.map(|()| items) };
        context.spawn(committing.into_actor(self).map(move |committed, session, context| {
            if let Ok(items) = &committed {
                session.keep(items.iter().cloned());
            }
            answer(reply, committed.map_err(SessionError::from));
            session.rest(kv, context);
        }));
    }

    fn delete_item(&mut self, item: String, reply: Reply<(), SessionError>, kv: KvHandle, context: &mut Context<Self>) {
        let Some(index) = self.transcript.items.iter().position(|known| known.id == item) else {
            answer(reply, Err(SessionError::NoItem(item)));
            return self.rest(kv, context);
        };
        let removing = remove(self.work(), Arc::clone(&self.transcript), index, kv);
        context.spawn(removing.into_actor(self).map(move |(kv, removed), session, context| {
            let removed = removed.map(|log_keep| Arc::make_mut(&mut session.transcript).remove(index, log_keep));
            answer(reply, removed);
            session.rest(kv, context);
        }));
    }

    fn warm(
        &mut self,
        instructions: Option<String>,
        mut reply: Reply<Option<TurnUsage>, SessionError>,
        kv: KvHandle,
        context: &mut Context<Self>,
    ) {
        let (cancel, cancelled) = watch::channel(false);
        let (tenant, session) = (&self.who.tenant.name, self.who.id);
        let span = tracing::info_span!(parent: None, "warm", tenant, %session, turn = tracing::field::Empty);
        let warming = warm(self.work(), Arc::clone(&self.transcript), kv, instructions, cancelled).instrument(span);
        let warming = async move {
            tokio::pin!(warming);
            tokio::select! {
                warmed = &mut warming => (warmed, reply),
                // Whoever wished for it is gone: so is the wish.
                () = reply.closed() => {
                    cancel.send_replace(true);
                    (warming.await, reply)
                }
            }
        };
        context.spawn(warming.into_actor(self).map(|((kv, warmed), reply), session, context| {
            answer(reply, warmed);
            session.rest(kv, context);
        }));
    }

    fn offload(
        &mut self,
        to: OffloadTo,
        reply: Reply<Offloaded, SessionError>,
        kv: KvHandle,
        context: &mut Context<Self>,
    ) {
        let moving = async move { (kv.offload(to).await, kv) };
        context.spawn(moving.into_actor(self).map(move |(moved, kv), session, context| {
            answer(reply, moved.map_err(SessionError::from));
            session.rest(kv, context);
        }));
    }

    fn delete(&mut self, reply: Reply<Deleted, SessionError>, kv: KvHandle, context: &mut Context<Self>) {
        context.spawn(delete(self.work(), kv).into_actor(self).map(move |deleted, session, context| match deleted {
            Ok(deleted) => {
                session.retire(&Refusal::NoConversation, context);
                answer(reply, Ok(deleted));
            }
            Err(error) => {
                answer(reply, Err(error));
                session.rest(session.claim(), context);
            }
        }));
    }

    fn keep(&mut self, items: impl IntoIterator<Item = Arc<Item>>) {
        let transcript = Arc::make_mut(&mut self.transcript);
        transcript.items.extend(items);
        transcript.last_used_at = unix_now();
    }

    fn work(&self) -> Work {
        Work { shared: Arc::clone(&self.shared), who: self.who.clone() }
    }
}

/// A turn whose prompt is being made.
struct Starting {
    kv: KvHandle,
    limits: TurnLimits,
    goal: Goal,
    audience: Audience,
    deadline: Instant,
    span: Span,
    reply: Reply<Taken, TurnError>,
    cancelled: watch::Receiver<bool>,
}

fn waited_too_long() -> TurnError {
    TurnError::QueueTimeout("the turns before this one in its conversation took longer than it may wait; retry".into())
}
