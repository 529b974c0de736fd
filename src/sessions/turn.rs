//! What happens in one turn, from its messages to the end of its answer?
//!
//! Render and tokenise, start the engine's turn, then follow its events. The same for stored conversations, whose actor
//! commits what came of it, and for stateless ones. Whatever ends a turn early, the engine's account is waited for, which
//! takes a step at most.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::Shared;
use super::messages::{Message, TurnDone, TurnError, TurnLimits, TurnUpdate};
use super::speech::{Said, Speech};
use super::stream::TurnWriter;
use super::transcript::{Prompt, Transcript, render};
use crate::engine::{
    FinishReason, KvHandle, SubmitError, TurnEvent, TurnEvents, TurnFailure, TurnHandle, TurnRequest, TurnUsage,
};
use crate::telemetry::metrics;
use crate::types::TokenCount;

/// Makes the prompt of history and new messages, away from the actors' thread: a long history takes milliseconds.
pub(super) async fn prepare(
    shared: &Arc<Shared>,
    transcript: Arc<Transcript>,
    input: Arc<[Message]>,
    instructions: Option<String>,
) -> Result<Prompt, TurnError> {
    if transcript.items.is_empty() && input.is_empty() {
        return Err(TurnError::NothingToAnswer);
    }
    let (language, window) = (Arc::clone(&shared.language), shared.engine.window());
    let made = tokio::task::spawn_blocking(move || {
        let history = transcript.items.iter().map(|item| &item.message);
        let rendered = render(&language, instructions.as_deref(), history.chain(input.iter()), true)
            .map_err(|refused| TurnError::Template(refused.to_string()))?;
        // What is far too long is refused for what it has at least: counting it exactly would take seconds.
        let fewest = TokenCount(u32::try_from(language.fewest_tokens(rendered.text.len())).unwrap_or(u32::MAX));
        if fewest >= window {
            return Err(TurnError::ContextLength { prompt: fewest, window });
        }
        Ok(transcript.log.prompt(&language, &rendered))
    });
    let prompt =
        made.await.map_err(|failed| TurnError::Internal(format!("the prompt could not be made: {failed}")))??;
    shared.engine.admits(prompt.len())?;
    Ok(prompt)
}

/// A turn that the engine has taken.
pub(super) struct RunningTurn {
    handle: TurnHandle,
    events: TurnEvents,
    speech: Speech,
    prompt_tokens: TokenCount,
}

/// Gives the engine a turn. `deadline` is when it should have started.
pub(super) fn start(
    shared: &Shared,
    kv: &mut KvHandle,
    prompt: &Prompt,
    limits: TurnLimits,
    deadline: Instant,
) -> Result<RunningTurn, TurnError> {
    let room = shared.engine.window().0.saturating_sub(prompt.len().0);
    let wanted = limits.max_tokens.unwrap_or(shared.settings.default_max_tokens).0;
    let request = TurnRequest {
        prompt: prompt.ids(),
        encoded_before: prompt.encoded_before,
        sampling: limits.sampling,
        max_tokens: TokenCount(wanted.min(room).max(1)),
        stop_tokens: Arc::clone(shared.language.stop_tokens()),
        queue_deadline: deadline.saturating_duration_since(Instant::now()),
        logprobs: limits.logprobs,
    };
    let (handle, events) = kv.start_turn(request)?;
    Ok(RunningTurn { handle, events, speech: Speech::new(limits.stop), prompt_tokens: prompt.len() })
}

/// How a turn ended.
pub(super) enum Ended {
    Answered(Answered),
    Failed(TurnError),
}

/// A turn's answer, whole or cut off.
pub(super) struct Answered {
    pub said: Said,
    pub finish: FinishReason,
    pub usage: TurnUsage,
    pub prompt_tokens: TokenCount,
    /// False if the turn was cancelled before its prompt was encoded.
    pub encoded: bool,
}

impl Answered {
    /// Nothing came of it: cancelled before the first character.
    pub fn is_silent(&self) -> bool {
        self.finish == FinishReason::Cancelled && self.said.text.is_empty()
    }

    /// What the client is told at the end.
    pub fn done(&self, item_id: String) -> TurnUpdate {
        TurnUpdate::Done(TurnDone {
            text: self.said.text.clone(),
            finish: self.finish,
            prompt_tokens: self.prompt_tokens,
            usage: self.usage,
            item_id,
            logprobs: self.said.logprobs.clone(),
        })
    }
}

/// Why a turn goes on without its engine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    StopString,
    Cancelled,
}

impl RunningTurn {
    /// Follows the engine's events to the last, telling the client what is said. `cancelled`: one flag turning true ends
    /// the turn, as does the client's going away.
    pub async fn follow(self, shared: &Shared, writer: &mut TurnWriter, cancelled: watch::Receiver<bool>) -> Ended {
        let Self { handle, mut events, mut speech, prompt_tokens } = self;
        let mut draining = shared.gate.cancelled();
        let mut handle = Some(handle);
        let (mut cut, mut encoded) = (None, false);
        let mut cancelled = cancelled;
        let (reason, usage) = loop {
            let event = tokio::select! {
                biased;
                () = first_cancel(writer, &mut cancelled, &mut draining), if handle.is_some() => {
                    cut = Some(Cut::Cancelled);
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
                Some(TurnEvent::Token(token)) if cut.is_none() => {
                    let delta = speech.push(&shared.language, token);
                    writer.text(&delta.text, delta.logprobs);
                    if delta.stopped {
                        cut = Some(Cut::StopString);
                        handle = None;
                    }
                }
                // On its way when the turn was cut.
                Some(TurnEvent::Token(_)) => {}
                Some(TurnEvent::Finished { reason, usage }) => break (reason, usage),
                Some(TurnEvent::Failed(_)) if cut.is_some() => break (FinishReason::Cancelled, TurnUsage::default()),
                Some(TurnEvent::Failed(failure)) => return Ended::Failed(failure.into()),
                None => return Ended::Failed(SubmitError::Gone.into()),
            }
        };
        if encoded {
            metrics::QUEUE_SECONDS.record(usage.prompt.queue_ms as f64 / 1e3, &[]);
            metrics::TTFT_SECONDS.record(usage.ttft_ms as f64 / 1e3, &[]);
        }
        drop(handle);
        let (said, finish) = match cut {
            Some(Cut::StopString) => (speech.stopped(), FinishReason::Stop),
            Some(Cut::Cancelled) => (last_words(speech, writer).0, FinishReason::Cancelled),
            None => {
                let (said, stopped) = last_words(speech, writer);
                (said, if stopped { FinishReason::Stop } else { reason })
            }
        };
        let generated = TokenCount(u32::try_from(said.tokens.len()).expect("the window bounds an answer"));
        let usage = TurnUsage { generated, ..usage };
        Ended::Answered(Answered { said, finish, usage, prompt_tokens, encoded })
    }
}

/// Says what was held back; true if a stop string ended it after all.
fn last_words(speech: Speech, writer: &mut TurnWriter) -> (Said, bool) {
    let (last, said) = speech.finish();
    writer.text(&last.text, last.logprobs);
    (said, last.stopped)
}

/// Resolves when the client goes away, the conversation is deleted, or the server won't wait longer.
async fn first_cancel(writer: &TurnWriter, turn: &mut watch::Receiver<bool>, server: &mut watch::Receiver<bool>) {
    tokio::select! {
        () = writer.reader_gone() => {}
        () = turned_true(turn) => {}
        () = turned_true(server) => {}
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
            TurnFailure::QueueTimeout { .. } => TurnError::QueueTimeout(failure.to_string()),
            TurnFailure::Model(_) => TurnError::Internal(failure.to_string()),
        }
    }
}
