//! How does a turn's text reach a client that reads at its own pace?
//!
//! Through a box, not a queue: the writer adds to what lies there, the reader takes it all at once. A reader that keeps up
//! gets a delta a token, a slow one fewer and longer ones; either way the writer never waits, and the box holds at most
//! one answer. Dropping the reader tells the writer; dropping the writer before its end tells the reader.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::messages::{ConversationId, TokenLogprob, TurnError, TurnUpdate};
use crate::types::TokenCount;

/// What lies between the two ends.
#[derive(Default)]
struct Waiting {
    started: Option<TokenCount>,
    delta: String,
    logprobs: Vec<TokenLogprob>,
    end: Option<TurnUpdate>,
    reader_gone: bool,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    written: Notify,
    reader_gone: Notify,
}

/// A running turn as its client sees it. Dropping it cancels the turn.
pub struct TurnStream {
    shared: Arc<Shared>,
    conversation: Option<ConversationId>,
    item_id: String,
    ended: bool,
}

/// The other end: what runs the turn.
pub(super) struct TurnWriter {
    shared: Arc<Shared>,
    ended: bool,
}

/// Both ends of a turn's stream.
pub(super) fn turn_stream(conversation: Option<ConversationId>, item_id: String) -> (TurnWriter, TurnStream) {
    let shared = Arc::new(Shared::default());
    let writer = TurnWriter { shared: Arc::clone(&shared), ended: false };
    (writer, TurnStream { shared, conversation, item_id, ended: false })
}

impl TurnStream {
    /// The next update; `None` after `Done` or `Failed`.
    pub async fn next(&mut self) -> Option<TurnUpdate> {
        while !self.ended {
            if let Some(update) = self.take() {
                return Some(update);
            }
            self.shared.written.notified().await;
        }
        None
    }

    /// The conversation that the turn belongs to; `None` if it is one that nobody can name.
    pub fn conversation(&self) -> Option<ConversationId> {
        self.conversation
    }

    /// The id that the answer has, or will have, as an item.
    pub fn item_id(&self) -> &str {
        &self.item_id
    }

    fn take(&mut self) -> Option<TurnUpdate> {
        let mut waiting = self.shared.waiting.lock();
        if let Some(prompt_tokens) = waiting.started.take() {
            return Some(TurnUpdate::Started { prompt_tokens });
        }
        if !waiting.delta.is_empty() || !waiting.logprobs.is_empty() {
            let delta = std::mem::take(&mut waiting.delta);
            return Some(TurnUpdate::Text { delta, logprobs: std::mem::take(&mut waiting.logprobs) });
        }
        let end = waiting.end.take();
        self.ended = end.is_some();
        end
    }
}

impl Drop for TurnStream {
    fn drop(&mut self) {
        self.shared.waiting.lock().reader_gone = true;
        self.shared.reader_gone.notify_one();
    }
}

impl TurnWriter {
    pub fn started(&mut self, prompt_tokens: TokenCount) {
        self.write(|waiting| waiting.started = Some(prompt_tokens));
    }

    /// Adds text and the log probabilities that belong to it; nothing at all is not an update.
    pub fn text(&mut self, delta: &str, logprobs: Vec<TokenLogprob>) {
        if !delta.is_empty() || !logprobs.is_empty() {
            self.write(|waiting| {
                waiting.delta.push_str(delta);
                waiting.logprobs.extend(logprobs);
            });
        }
    }

    /// The last update: `Done` or `Failed`.
    pub fn end(mut self, end: TurnUpdate) {
        self.ended = true;
        self.write(|waiting| waiting.end = Some(end));
    }

    /// Resolves when nobody reads any more.
    pub async fn reader_gone(&self) {
        while !self.shared.waiting.lock().reader_gone {
            self.shared.reader_gone.notified().await;
        }
    }

    fn write(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.shared.waiting.lock());
        self.shared.written.notify_one();
    }
}

impl Drop for TurnWriter {
    fn drop(&mut self) {
        if !self.ended {
            let lost = TurnError::Internal("the session failed in this turn; what was stored before is kept".into());
            self.write(|waiting| waiting.end = Some(TurnUpdate::Failed(lost)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_reader_gets_one_long_delta_and_holds_up_nobody() {
        let (mut writer, mut stream) = turn_stream(None, "msg_1".into());
        writer.started(TokenCount(5));
        for _ in 0..10_000 {
            writer.text("ab", Vec::new());
        }
        writer.end(TurnUpdate::Failed(TurnError::Draining));
        assert_eq!(stream.next().await, Some(TurnUpdate::Started { prompt_tokens: TokenCount(5) }));
        let Some(TurnUpdate::Text { delta, .. }) = stream.next().await else { panic!("no text") };
        assert_eq!(delta, "ab".repeat(10_000));
        assert_eq!(stream.next().await, Some(TurnUpdate::Failed(TurnError::Draining)));
        assert_eq!(stream.next().await, None);
    }

    #[tokio::test]
    async fn a_reader_that_goes_away_is_noticed() {
        let (writer, stream) = turn_stream(None, "msg_1".into());
        let noticed = tokio::spawn(async move { writer.reader_gone().await });
        drop(stream);
        noticed.await.unwrap();
    }

    #[tokio::test]
    async fn a_turn_whose_session_fails_says_so() {
        let (mut writer, mut stream) = turn_stream(None, "msg_1".into());
        writer.text("Hel", Vec::new());
        drop(writer);
        assert!(matches!(stream.next().await, Some(TurnUpdate::Text { .. })));
        assert!(matches!(stream.next().await, Some(TurnUpdate::Failed(TurnError::Internal(_)))));
        assert_eq!(stream.next().await, None);
    }
}
