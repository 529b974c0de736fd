//! What was said in a conversation, and where does its next prompt go on?
//!
//! Items are what clients see; the token log is what the KV holds, and keeps generated tokens as they were generated.
//! Invariant: what is known of the last prompt is of items that are still there, in their order.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::messages::{Item, Message, Part, Role};
use super::prompt::Known;
use super::token_log::TokenLog;
use super::unix_now;
use crate::engine::{ChatMessage, Language, Rendered};

/// A conversation's history, as its actor holds it.
#[derive(Clone, Debug, Default)]
pub struct Transcript {
    pub items: Vec<Arc<Item>>,
    pub log: TokenLog,
    /// How the prompt was made that the log begins with.
    pub known: Option<Arc<Known>>,
    /// Seconds since 1970.
    pub last_used_at: i64,
    /// Made, but not in the store yet: its first turn puts it there, whole.
    pub unborn: Option<Birth>,
}

/// What a conversation is made with.
#[derive(Clone, Debug)]
pub struct Birth {
    pub created_at: i64,
    pub metadata: BTreeMap<String, String>,
    pub chain: bool,
}

impl Transcript {
    /// A conversation that the store doesn't have yet, with this history.
    pub fn newborn(history: Transcript, metadata: BTreeMap<String, String>, chain: bool) -> Self {
        let created_at = unix_now();
        Self { unborn: Some(Birth { created_at, metadata, chain }), last_used_at: created_at, ..history }
    }

    /// The history up to this item, and the tokens that stand for it; `None` if there is no such item. The KV of them is
    /// another conversation's, so none counts as encoded.
    pub fn up_to(&self, item: &str) -> Option<Self> {
        let end = self.items.iter().rposition(|known| known.id == item)? + 1;
        let items = self.items.get(..end)?.to_vec();
        let known = self.known.clone().filter(|_| end == self.items.len());
        let mut log = self.log.clone();
        log.set_encoded(0);
        Some(Self { items, log, known, last_used_at: self.last_used_at, unborn: None })
    }

    /// The history without one of its items.
    pub fn without(&self, item: &str) -> Self {
        let mut rest = self.clone();
        rest.items.retain(|known| known.id != item);
        rest.known = None;
        rest
    }

    /// Takes an item out, and the tokens that don't stand for the rest.
    pub fn remove(&mut self, index: usize, log_keep: usize) {
        self.items.remove(index);
        self.log.truncate(log_keep);
        self.known = None;
    }

    /// Takes in what a turn left.
    pub fn take(&mut self, log: TokenLog, known: Known) {
        self.log = log;
        self.known = Some(Arc::new(known));
    }

    /// The last item's id.
    pub fn tip(&self) -> Option<&str> {
        self.items.last().map(|item| item.id.as_str())
    }

    /// Answers in the history.
    pub fn turns(&self) -> usize {
        self.items.iter().filter(|item| item.message.role == Role::Assistant).count()
    }
}

impl TokenLog {
    /// Tokens at the front that stand for the front of `rendered`, and the byte of it where they end.
    pub fn prefix_of(&self, language: &Language, rendered: &Rendered) -> (usize, usize) {
        let log = self.from(rendered.tokens_before()).map(|token| (token.id, token.bytes));
        match language.common_prefix(rendered, log) {
            // Tokens that stand for no text come again with the first that does.
            (_, 0) => (0, 0),
            common => common,
        }
    }

    /// How many of its tokens stand for the front of these messages. What the template can't render has no front in common
    /// with anything.
    pub fn standing_for<'a>(&self, language: &Language, messages: impl Iterator<Item = &'a Message>) -> usize {
        let messages: Vec<_> = messages.map(chat_message).collect();
        language.render(&messages, false, &[]).map_or(0, |rendered| self.prefix_of(language, &rendered).0)
    }
}

/// A message as the chat template gets it.
pub fn chat_message(message: &Message) -> ChatMessage<'_> {
    ChatMessage {
        role: message.role.name(),
        name: message.name.as_deref(),
        content: text_of(message),
        calls: &message.calls,
        call_id: message.call_id.as_deref(),
    }
}

/// A message's text; parts are lines.
pub(super) fn text_of(message: &Message) -> Cow<'_, str> {
    let mut texts = message.content.iter().map(|part| match part {
        Part::Text(text) | Part::Refusal(text) => text.as_str(),
    });
    match (texts.next(), texts.len()) {
        (None, _) => Cow::Borrowed(""),
        (Some(only), 0) => Cow::Borrowed(only),
        (Some(first), _) => Cow::Owned(texts.fold(first.to_string(), |joined, text| joined + "\n" + text)),
    }
}
