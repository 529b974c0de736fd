//! How is a turn answered that belongs to no stored conversation?
//!
//! The client sends all messages; nothing is stored. Its KV has a key that nobody else knows and ends with the turn: its
//! blocks are the first to go, and serve as shared prefixes until then. Several choices share the prompt's blocks: the
//! first encodes it, the others begin when it is there.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{Instrument, Span};

use super::Shared;
use super::gate::Pass;
use super::live::{Presence, Running, Turn};
use super::messages::{
    Audience, Complete, Goal, Message, NewResponse, Overflow, Respond, TurnError, TurnLimits, TurnUpdate,
};
use super::prompt::{Prompt, PromptRules};
use super::stream::{TurnStream, TurnWriter, turn_stream};
use super::traced::{self, turn_span};
use super::turn::{Ended, RunningTurn, prepare, start};
use super::work::answer_message;
use crate::engine::KvHandle;
use crate::tenants::Tenant;
use crate::types::KvKey;

/// What a stateless answer is made of, before it runs.
#[derive(Clone)]
struct Asked {
    shared: Arc<Shared>,
    tenant: Tenant,
    prompt: Arc<Prompt>,
    limits: TurnLimits,
    goal: Goal,
    deadline: Instant,
    span: Span,
    pass: Arc<Pass>,
}

/// A response that nobody keeps.
pub(super) async fn respond(shared: &Arc<Shared>, tenant: &Tenant, mut turn: Respond) -> Result<Turn, TurnError> {
    let rules = PromptRules::of(shared, &mut turn);
    let messages: Vec<Message> = turn.input.into_iter().map(|item| item.message).collect();
    let asked = ask(shared, tenant, messages, rules, turn.limits, turn_span(Some(turn.response.id))).await?;
    let item_id = super::new_item_id();
    let (writer, stream) = turn_stream(item_id.clone(), turn.audience);
    let NewResponse { id, about, .. } = turn.response;
    let alive = Running { id, conversation: None, about: about.into(), log: writer.log(), kept: false };
    let turn = alive.turn(stream);
    let presence = shared.live.enter(tenant.id, alive);
    let begun = asked.begin()?;
    asked.spawn(begun, writer, item_id, Some(presence));
    Ok(turn)
}

/// The choices of a chat completion, in their order. Resolves when the engine has taken the first.
pub(super) async fn complete(
    shared: &Arc<Shared>,
    tenant: &Tenant,
    mut turn: Complete,
) -> Result<Vec<TurnStream>, TurnError> {
    let rules = PromptRules {
        instructions: None,
        overflow: Overflow::Refuse,
        goal: Goal::Answer,
        answer: turn.limits.max_tokens.unwrap_or(shared.settings.default_max_tokens),
        arguments: std::mem::take(&mut turn.limits.arguments),
    };
    let asked = ask(shared, tenant, turn.messages, rules, turn.limits, turn_span(None)).await?;
    let item_id = super::new_item_id();
    let (writer, first) = turn_stream(item_id.clone(), Audience::Readers);
    let log = writer.log();
    let begun = asked.begin()?;
    let (mut others, mut streams) = (Vec::new(), vec![first]);
    for choice in 1..turn.choices {
        let (writer, stream) = turn_stream(item_id.clone(), Audience::Readers);
        others.push((asked.other(choice), writer));
        streams.push(stream);
    }
    if !others.is_empty() {
        let (mut first, item_id) = (log.join(), item_id.clone());
        tokio::spawn(async move {
            // Its prompt is encoded, or never will be.
            first.next().await;
            drop(first);
            for (asked, writer) in others {
                match asked.begin() {
                    Ok(begun) => asked.spawn(begun, writer, item_id.clone(), None),
                    Err(error) => writer.end(TurnUpdate::Failed(error)),
                }
            }
        });
    }
    asked.spawn(begun, writer, item_id, None);
    Ok(streams)
}

async fn ask(
    shared: &Arc<Shared>,
    tenant: &Tenant,
    messages: Vec<Message>,
    rules: PromptRules,
    limits: TurnLimits,
    span: Span,
) -> Result<Asked, TurnError> {
    let deadline = Instant::now() + limits.queue_deadline;
    let pass = Arc::new(shared.gate.enter(tenant)?);
    let goal = rules.goal;
    let prompt = prepare(shared, tenant, Arc::default(), messages.into(), rules).instrument(span.clone()).await;
    let prompt = Arc::new(prompt.inspect_err(|error| traced::failed(&span, error))?);
    Ok(Asked { shared: Arc::clone(shared), tenant: tenant.clone(), prompt, limits, goal, deadline, span, pass })
}

impl Asked {
    /// Gives the engine the turn.
    fn begin(&self) -> Result<(KvHandle, RunningTurn), TurnError> {
        let _entered = self.span.enter();
        let mut kv = self.shared.engine.kv(self.tenant.id, self.tenant.key, KvKey(rand::random()));
        let started = start(&self.shared, &mut kv, &self.prompt, self.limits.clone(), self.goal, self.deadline);
        let running = started.inspect_err(|error| traced::failed(&self.span, error))?;
        Ok((kv, running))
    }

    /// Another choice of the same: it draws other numbers, in a way that repeats.
    fn other(&self, choice: u8) -> Self {
        let mut other = self.clone();
        other.limits.sampling.seed = other.limits.sampling.seed.wrapping_add(u64::from(choice));
        other.span = turn_span(None);
        other
    }

    /// Follows the turn to its end, as a task of its own.
    fn spawn(self, begun: (KvHandle, RunningTurn), writer: TurnWriter, item_id: String, presence: Option<Presence>) {
        let span = self.span.clone();
        drop(tokio::spawn(self.run(begun, writer, item_id, presence).instrument(span)));
    }

    async fn run(
        self,
        (kv, running): (KvHandle, RunningTurn),
        mut writer: TurnWriter,
        item_id: String,
        presence: Option<Presence>,
    ) {
        let (_never, uncancelled) = watch::channel(false);
        let key = kv.key();
        let ended = running.follow(&self.shared, &mut writer, uncancelled).await;
        kv.end();
        writer.end(match ended {
            Ended::Answered(answered) => {
                if answered.encoded && !answered.is_silent() {
                    let known = self.prompt.known().clone().answered(&answer_message(&answered));
                    let log = self.prompt.after(&answered.said);
                    self.shared.recall.keep(self.tenant.id, key, &known, log);
                }
                TurnUpdate::Done(answered.done(item_id))
            }
            Ended::Failed(error) => TurnUpdate::Failed(error),
        });
        drop((presence, self.pass));
    }
}
