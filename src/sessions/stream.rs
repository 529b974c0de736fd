//! How does a turn's text reach clients that read at their own pace?
//!
//! Through a log, not a queue: the writer adds to what was told, and each reader has its own place in it. Every reader
//! gets the same deltas, however late it comes, so that events can be numbered and replayed; the writer never waits, and
//! the log holds one answer. When the last reader goes, the writer is told; dropping the writer before its end tells the
//! readers.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::messages::{Audience, TokenLogprob, TurnError, TurnUpdate};
use crate::types::TokenCount;

/// Where a delta ends: bytes of text, and log probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub text: usize,
    pub logprobs: usize,
}

/// What was told so far.
#[derive(Default)]
struct Told {
    started: Option<TokenCount>,
    text: String,
    logprobs: Vec<TokenLogprob>,
    cuts: Vec<Cut>,
    end: Option<TurnUpdate>,
    readers: usize,
}

/// Why a turn ends before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// Nobody reads any more.
    Abandoned,
    Asked,
}

struct Shared {
    told: Mutex<Told>,
    audience: Audience,
    item_id: String,
    written: watch::Sender<()>,
    stop: watch::Sender<Option<Stop>>,
}

/// A turn as its client sees it. When the last one of a turn is dropped, the turn is cancelled, unless it runs in the
/// background.
pub struct TurnStream {
    shared: Arc<Shared>,
    written: watch::Receiver<()>,
    /// What this reader has had.
    started: bool,
    deltas: usize,
    ended: bool,
}

/// The other end: what runs the turn.
pub(super) struct TurnWriter {
    shared: Arc<Shared>,
    ended: bool,
}

/// A turn that others may join, or stop.
#[derive(Clone)]
pub(super) struct TurnLog {
    shared: Arc<Shared>,
}

/// Both ends of a turn's stream.
pub(super) fn turn_stream(item_id: String, audience: Audience) -> (TurnWriter, TurnStream) {
    let shared = Arc::new(Shared {
        told: Mutex::default(),
        audience,
        item_id,
        written: watch::Sender::new(()),
        stop: watch::Sender::new(None),
    });
    let writer = TurnWriter { shared: Arc::clone(&shared), ended: false };
    (writer, TurnStream::of(&shared))
}

/// A turn that is over, as a late reader finds it.
pub(super) fn told_stream(item_id: String, end: TurnUpdate, cuts: Vec<Cut>) -> TurnStream {
    let (text, logprobs) = match &end {
        TurnUpdate::Done(done) => (done.text.clone(), done.logprobs.clone()),
        TurnUpdate::Started { .. } | TurnUpdate::Text { .. } | TurnUpdate::Failed(_) => Default::default(),
    };
    let (writer, stream) = turn_stream(item_id, Audience::Background);
    {
        let mut told = stream.shared.told.lock();
        *told = Told { text, logprobs, cuts, ..std::mem::take(&mut *told) };
    }
    writer.end(end);
    stream
}

impl TurnStream {
    fn of(shared: &Arc<Shared>) -> Self {
        shared.told.lock().readers += 1;
        let written = shared.written.subscribe();
        Self { shared: Arc::clone(shared), written, started: false, deltas: 0, ended: false }
    }

    /// The next update; `None` after `Done` or `Failed`.
    pub async fn next(&mut self) -> Option<TurnUpdate> {
        while !self.ended {
            if let Some(update) = self.take() {
                return Some(update);
            }
            // The sender lives as long as this does.
            self.written.changed().await.ok()?;
        }
        None
    }

    /// The id that the answer has, or will have, as an item.
    pub fn item_id(&self) -> &str {
        &self.shared.item_id
    }

    /// How the turn ended, if it has; whatever this reader has had of it.
    pub fn end(&self) -> Option<TurnUpdate> {
        self.shared.told.lock().end.clone()
    }

    /// Waits for the end.
    pub async fn finished(&mut self) {
        while self.shared.told.lock().end.is_none() && self.written.changed().await.is_ok() {}
    }

    fn take(&mut self) -> Option<TurnUpdate> {
        let told = self.shared.told.lock();
        if let (false, Some(prompt_tokens)) = (self.started, told.started) {
            self.started = true;
            return Some(TurnUpdate::Started { prompt_tokens });
        }
        if let Some(cut) = told.cuts.get(self.deltas) {
            let from = self.deltas.checked_sub(1).and_then(|last| told.cuts.get(last));
            let from = from.copied().unwrap_or(Cut { text: 0, logprobs: 0 });
            self.deltas += 1;
            let delta = told.text.get(from.text..cut.text).unwrap_or_default().to_owned();
            let logprobs = told.logprobs.get(from.logprobs..cut.logprobs).unwrap_or_default().to_vec();
            return Some(TurnUpdate::Text { delta, logprobs });
        }
        let end = told.end.clone();
        self.ended = end.is_some();
        end
    }
}

impl Drop for TurnStream {
    fn drop(&mut self) {
        let mut told = self.shared.told.lock();
        told.readers -= 1;
        if told.readers == 0 && self.shared.audience == Audience::Readers {
            self.shared.stop.send_if_modified(|stop| stop.replace(stop.unwrap_or(Stop::Abandoned)).is_none());
        }
    }
}

impl TurnLog {
    /// One more reader, from the beginning. It does not bring back a turn that has been stopped.
    pub fn join(&self) -> TurnStream {
        TurnStream::of(&self.shared)
    }

    pub fn is_stopped(&self) -> bool {
        self.shared.stop.borrow().is_some()
    }

    /// Ends the turn where it is.
    pub fn stop(&self) {
        self.shared.stop.send_if_modified(|stop| stop.replace(stop.unwrap_or(Stop::Asked)).is_none());
    }
}

impl TurnWriter {
    /// What others reach the turn by.
    pub fn log(&self) -> TurnLog {
        TurnLog { shared: Arc::clone(&self.shared) }
    }

    pub fn started(&mut self, prompt_tokens: TokenCount) {
        self.write(|told| told.started = Some(prompt_tokens));
    }

    /// Adds text and the log probabilities that belong to it; nothing at all is not an update.
    pub fn text(&mut self, delta: &str, logprobs: Vec<TokenLogprob>) {
        if !delta.is_empty() || !logprobs.is_empty() {
            self.write(|told| {
                told.text.push_str(delta);
                told.logprobs.extend(logprobs);
                told.cuts.push(Cut { text: told.text.len(), logprobs: told.logprobs.len() });
            });
        }
    }

    /// Where the deltas so far end.
    pub fn cuts(&self) -> Vec<Cut> {
        self.shared.told.lock().cuts.clone()
    }

    /// The last update: `Done` or `Failed`.
    pub fn end(mut self, end: TurnUpdate) {
        self.ended = true;
        self.write(|told| told.end = Some(end));
    }

    /// Resolves when the turn must end before its time.
    pub async fn stopped(&self) -> Stop {
        let mut stop = self.shared.stop.subscribe();
        let stopped = stop.wait_for(Option::is_some).await.map(|stop| *stop);
        stopped.ok().flatten().unwrap_or(Stop::Abandoned)
    }

    fn write(&self, change: impl FnOnce(&mut Told)) {
        change(&mut self.shared.told.lock());
        self.shared.written.send_replace(());
    }
}

impl Drop for TurnWriter {
    fn drop(&mut self) {
        if !self.ended {
            let lost = TurnError::Internal("the session failed in this turn; what was stored before is kept".into());
            self.write(|told| told.end = Some(TurnUpdate::Failed(lost)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams() -> (TurnWriter, TurnStream) {
        turn_stream("msg_1".into(), Audience::Readers)
    }

    async fn deltas(stream: &mut TurnStream) -> Vec<String> {
        let mut deltas = Vec::new();
        while let Some(update) = stream.next().await {
            if let TurnUpdate::Text { delta, .. } = update {
                deltas.push(delta);
            }
        }
        deltas
    }

    #[tokio::test]
    async fn every_reader_gets_the_same_deltas_however_late_it_comes() {
        let (mut writer, mut early) = streams();
        let log = writer.log();
        writer.started(TokenCount(5));
        for delta in ["Hel", "", "lo"] {
            writer.text(delta, Vec::new());
        }
        let mut late = log.join();
        writer.text("!", Vec::new());
        writer.end(TurnUpdate::Failed(TurnError::Draining));
        assert_eq!(late.next().await, Some(TurnUpdate::Started { prompt_tokens: TokenCount(5) }));
        assert_eq!(deltas(&mut late).await, ["Hel", "lo", "!"]);
        assert_eq!(deltas(&mut early).await, ["Hel", "lo", "!"]);
        assert_eq!(late.end(), Some(TurnUpdate::Failed(TurnError::Draining)));
        assert_eq!(late.next().await, None);
    }

    #[tokio::test]
    async fn the_last_reader_that_goes_away_is_noticed_and_others_are_not() {
        let (writer, stream) = streams();
        let log = writer.log();
        let second = log.join();
        drop(stream);
        assert!(!log.is_stopped());
        drop(second);
        assert_eq!(writer.stopped().await, Stop::Abandoned);
        log.stop();
        assert_eq!(writer.stopped().await, Stop::Abandoned, "the first reason stays");
    }

    #[tokio::test]
    async fn a_turn_in_the_background_needs_no_reader_and_ends_when_asked() {
        let (writer, stream) = turn_stream("msg_1".into(), Audience::Background);
        let log = writer.log();
        drop(stream);
        assert!(!log.is_stopped());
        log.stop();
        assert_eq!(writer.stopped().await, Stop::Asked);
    }

    #[tokio::test]
    async fn a_turn_whose_session_fails_says_so() {
        let (mut writer, mut stream) = streams();
        writer.text("Hel", Vec::new());
        drop(writer);
        assert!(matches!(stream.next().await, Some(TurnUpdate::Text { .. })));
        assert!(matches!(stream.next().await, Some(TurnUpdate::Failed(TurnError::Internal(_)))));
        assert_eq!(stream.next().await, None);
    }
}
