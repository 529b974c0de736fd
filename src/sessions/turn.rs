//! What happens in one turn, from its messages to the end of its answer?
//!
//! Render and tokenise, start the engine's turn, then follow its events. The same for stored conversations, whose actor
//! commits what came of it, and for stateless ones. Whatever ends a turn early, the engine's account is waited for, which
//! takes a step at most.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Span;

use super::messages::{Goal, Message, Respond, TurnDone, TurnError, TurnLimits};
use super::prompt::{Draft, Prompt, PromptRules};
use super::speech::{Said, Speech};
use super::stream::{Stop, TurnWriter};
use super::traced::{self, Begun};
use super::transcript::Transcript;
use super::{Shared, unix_now};
use crate::engine::{
    FinishReason, KvHandle, Path, SubmitError, TurnEvent, TurnEvents, TurnFailure, TurnHandle, TurnRequest, TurnShape,
    TurnUsage,
};
use crate::telemetry::metrics;
use crate::tenants::Tenant;
use crate::types::TokenCount;

impl PromptRules {
    /// Those of a turn.
    pub(super) fn of(shared: &Shared, turn: &mut Respond) -> Self {
        Self {
            instructions: turn.instructions.take(),
            overflow: turn.overflow,
            goal: turn.goal,
            answer: turn.limits.max_tokens.unwrap_or(shared.settings.default_max_tokens),
            arguments: std::mem::take(&mut turn.limits.arguments),
        }
    }
}

/// Makes the prompt of history and new messages, away from the actors' thread: a long history that comes for the first time
/// takes milliseconds.
pub(super) async fn prepare(
    shared: &Arc<Shared>,
    tenant: &Tenant,
    transcript: Arc<Transcript>,
    input: Arc<[Message]>,
    rules: PromptRules,
) -> Result<Prompt, TurnError> {
    if transcript.items.is_empty() && input.is_empty() {
        return Err(TurnError::NothingToAnswer);
    }
    let (asker, id, tenant_key) = (Arc::clone(shared), tenant.id, tenant.key);
    let span = Span::current();
    let make = move || -> Result<Prompt, TurnError> {
        let _entered = span.entered();
        let (empty, window) = (asker.engine.empty_prompt(tenant_key), asker.engine.window());
        let draft = Draft { language: &asker.language, tenant_key, empty, window, transcript, input, rules };
        draft.make(|conversation| asker.recall.find(id, conversation))
    };
    let made = tokio::task::spawn_blocking(make).await;
    let prompt = made.map_err(|failed| TurnError::Internal(format!("the prompt could not be made: {failed}")))??;
    metrics::PROMPT_RENDERED_BYTES.add(prompt.work.rendered_bytes as u64, &[]);
    metrics::PROMPT_TOKENIZED_TOKENS.add(prompt.work.tokenized as u64, &[]);
    metrics::PROMPT_HASHED_BLOCKS.add(prompt.work.hashed_blocks as u64, &[]);
    shared.engine.admits(prompt.len())?;
    Ok(prompt)
}

/// A turn that the engine has taken.
pub(super) struct RunningTurn {
    handle: TurnHandle,
    events: TurnEvents,
    speech: Speech,
    begun: Begun,
    prompt_tokens: TokenCount,
    dropped_items: usize,
    goal: Goal,
}

/// Gives the engine a turn. `deadline` is when it should have started.
pub(super) fn start(
    shared: &Shared,
    kv: &mut KvHandle,
    prompt: &Prompt,
    limits: TurnLimits,
    goal: Goal,
    deadline: Instant,
) -> Result<RunningTurn, TurnError> {
    let room = shared.engine.window().0.saturating_sub(prompt.len().0);
    let wanted = match goal {
        Goal::Answer => limits.max_tokens.unwrap_or(shared.settings.default_max_tokens).0,
        // The engine samples one token where a prompt ends; nobody is told.
        Goal::Encode => 1,
    };
    let request = TurnRequest {
        prompt: Arc::clone(prompt.ids()),
        encoded_before: prompt.encoded_before,
        shape: TurnShape { number: prompt.turn, new_tokens: prompt.fresh() },
        sampling: limits.sampling,
        max_tokens: TokenCount(wanted.min(room).max(1)),
        stop_tokens: Arc::clone(shared.language.stop_tokens()),
        queue_deadline: deadline.saturating_duration_since(Instant::now()),
        logprobs: limits.logprobs,
    };
    let begun = Begun { at: SystemTime::now(), number: prompt.turn };
    let (handle, events) = kv.start_hashed(prompt.hashed(), request)?;
    traced::given(handle.id(), prompt.len().0);
    let speech = Speech::new(limits.stop);
    let (prompt_tokens, dropped_items) = (prompt.len(), prompt.dropped_items);
    Ok(RunningTurn { handle, events, speech, begun, prompt_tokens, dropped_items, goal })
}

/// How a turn ended.
pub(super) enum Ended {
    Answered(Answered),
    Failed(TurnError),
}

impl Ended {
    fn lost(error: TurnError) -> Self {
        traced::failed(&Span::current(), &error);
        Self::Failed(error)
    }
}

/// A turn's answer, whole or cut off.
pub(super) struct Answered {
    pub said: Said,
    pub finish: FinishReason,
    pub usage: TurnUsage,
    pub prompt_tokens: TokenCount,
    pub dropped_items: usize,
    pub goal: Goal,
    /// Why it ended before its time, if it did.
    pub stopped: Option<Stop>,
    /// False if the turn was cancelled before its prompt was encoded.
    pub encoded: bool,
}

impl Answered {
    /// Nothing came of it: cancelled before the first character, or not meant to say anything.
    pub fn is_silent(&self) -> bool {
        self.goal == Goal::Encode || (self.finish == FinishReason::Cancelled && self.said.text.is_empty())
    }

    /// What the client is told at the end.
    pub fn done(&self, item_id: String) -> TurnDone {
        TurnDone {
            text: self.said.text.clone(),
            finish: self.finish,
            prompt_tokens: self.prompt_tokens,
            usage: self.usage,
            item_id,
            logprobs: self.said.logprobs.clone(),
            goal: self.goal,
            dropped_items: self.dropped_items,
            ended_at: unix_now(),
        }
    }
}

/// Why a turn goes on without its engine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    StopString,
    Cancelled(Stop),
}

impl RunningTurn {
    /// Follows the engine's events to the last, telling the client what is said. `cancelled`: one flag turning true ends
    /// the turn, as do its readers' going away and their asking.
    pub async fn follow(self, shared: &Shared, writer: &mut TurnWriter, cancelled: watch::Receiver<bool>) -> Ended {
        let Self { handle, mut events, mut speech, begun, prompt_tokens, dropped_items, goal } = self;
        let mut draining = shared.gate.cancelled();
        let mut handle = Some(handle);
        let (mut cut, mut encoded) = (None, false);
        let mut cancelled = cancelled;
        let (gaps, mut last_token) = (metrics::TOKEN_GAP_SECONDS.recorder(&[]), None::<Instant>);
        let (reason, usage) = loop {
            let event = tokio::select! {
                biased;
                stop = first_cancel(writer, &mut cancelled, &mut draining), if handle.is_some() => {
                    cut = Some(Cut::Cancelled(stop));
                    handle = None;
                    continue;
                }
                event = events.next() => event,
            };
            match event {
                Some(TurnEvent::Started(_)) => {
                    encoded = true;
                    writer.started(prompt_tokens);
                }
                Some(TurnEvent::Token(token)) if cut.is_none() && goal == Goal::Answer => {
                    let delta = speech.push(&shared.language, token);
                    writer.text(&delta.text, delta.logprobs);
                    let now = Instant::now();
                    if let Some(before) = last_token.replace(now) {
                        gaps.record((now - before).as_secs_f64());
                    }
                    if delta.stopped {
                        cut = Some(Cut::StopString);
                        handle = None;
                    }
                }
                // On its way when the turn was cut, or where nothing is to be said.
                Some(TurnEvent::Token(_)) => {}
                Some(TurnEvent::Finished { reason, usage }) => break (reason, usage),
                Some(TurnEvent::Failed(_)) if cut.is_some() => break (FinishReason::Cancelled, TurnUsage::default()),
                Some(TurnEvent::Failed(failure)) => {
                    if let TurnFailure::Model(_) = &failure {
                        tracing::error!(%failure, "a turn failed");
                    }
                    return Ended::lost(failure.into());
                }
                None => return Ended::lost(SubmitError::Gone.into()),
            }
        };
        if encoded {
            metrics::QUEUE_SECONDS.record(usage.prompt.queue_ms as f64 / 1e3, &[]);
            let path = Path::of(usage.prompt.decision(), begun.number);
            metrics::TTFT_SECONDS.record(usage.ttft_ms as f64 / 1e3, &[("path", path.name())]);
        }
        drop(handle);
        let (said, finish) = match cut {
            Some(Cut::StopString) => (speech.stopped(), FinishReason::Stop),
            Some(Cut::Cancelled(_)) => (last_words(speech, writer).0, FinishReason::Cancelled),
            None if goal == Goal::Encode => (Said::default(), FinishReason::Stop),
            None => {
                let (said, stopped) = last_words(speech, writer);
                (said, if stopped { FinishReason::Stop } else { reason })
            }
        };
        let generated = TokenCount(u32::try_from(said.tokens.len()).expect("the window bounds an answer"));
        let usage = TurnUsage { generated, ..usage };
        let stopped = match cut {
            Some(Cut::Cancelled(stop)) => Some(stop),
            Some(Cut::StopString) | None => None,
        };
        let answered = Answered { said, finish, usage, prompt_tokens, dropped_items, goal, stopped, encoded };
        traced::answered(begun, &answered, &shared.engine.spec().name);
        Ended::Answered(answered)
    }
}

/// Says what was held back; true if a stop string ended it after all.
fn last_words(speech: Speech, writer: &mut TurnWriter) -> (Said, bool) {
    let (last, said) = speech.finish();
    writer.text(&last.text, last.logprobs);
    (said, last.stopped)
}

/// Resolves when nobody reads any more or somebody asks for the end, the conversation is deleted, or the server won't wait
/// longer.
async fn first_cancel(
    writer: &TurnWriter,
    turn: &mut watch::Receiver<bool>,
    server: &mut watch::Receiver<bool>,
) -> Stop {
    tokio::select! {
        stop = writer.stopped() => stop,
        () = turned_true(turn) => Stop::Asked,
        () = turned_true(server) => Stop::Asked,
    }
}

/// Resolves when the flag is true; never if its sender goes before.
async fn turned_true(flag: &mut watch::Receiver<bool>) {
    if flag.wait_for(|set| *set).await.is_err() {
        std::future::pending::<()>().await;
    }
}

impl From<SubmitError> for TurnError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Overloaded { .. } => TurnError::Overloaded(error.to_string()),
            SubmitError::PromptTooLong { prompt, window } => TurnError::ContextLength { prompt, window },
            SubmitError::PromptEmpty => TurnError::NothingToAnswer,
            SubmitError::Busy => TurnError::Locked { waiting: 0 },
            SubmitError::Gone => TurnError::Internal(error.to_string()),
        }
    }
}

impl From<TurnFailure> for TurnError {
    fn from(failure: TurnFailure) -> Self {
        match failure {
            TurnFailure::QueueTimeout { .. } | TurnFailure::AtCeiling { .. } => {
                TurnError::QueueTimeout(failure.to_string())
            }
            TurnFailure::Model(_) => TurnError::Internal(failure.to_string()),
        }
    }
}
