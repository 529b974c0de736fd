//! What was said in a conversation, and which tokens stand for it?
//!
//! Items are what clients see; the token log is what the KV holds. The log keeps generated tokens as they were generated,
//! and only what is new is tokenised. Invariant: a prompt's tokens stand for exactly the rendered text.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::messages::{Item, Message, Part, Role};
use super::speech::Said;
use crate::engine::{ChatMessage, Language, Rendered, TemplateError};
use crate::store::{LogToken, LogWrite};
use crate::types::{TokenCount, TokenId};

/// A conversation's history, as its actor holds it.
#[derive(Clone, Debug, Default)]
pub(super) struct Transcript {
    pub items: Vec<Arc<Item>>,
    pub log: TokenLog,
    /// Seconds since 1970.
    pub last_used_at: i64,
}

impl Transcript {
    /// Answers in the history.
    pub fn turns(&self) -> usize {
        self.items.iter().filter(|item| item.message.role == Role::Assistant).count()
    }
}

/// The tokens that the KV of a conversation holds, or held, and the text they stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TokenLog {
    tokens: Vec<LogToken>,
    /// As long as the sum of `tokens`' bytes. Generated text need not be valid UTF-8.
    text: Vec<u8>,
    /// Tokens at the front whose KV has been computed once.
    encoded: usize,
}

/// A prompt in tokens.
#[derive(Debug)]
pub(super) struct Prompt {
    tokens: Vec<LogToken>,
    text: String,
    /// Tokens at the front that the log before it has too.
    kept: usize,
    /// Tokens at the front that an earlier turn of the conversation encoded.
    pub encoded_before: TokenCount,
}

impl TokenLog {
    /// A log as the store had it. A token that stands for fewer bytes than it has stands for the last of them: a
    /// tokeniser that puts a space before the text does so.
    pub fn from_store(language: &Language, mut tokens: Vec<LogToken>, encoded: usize) -> Self {
        let mut text = Vec::new();
        let whole = tokens.iter().take_while(|token| {
            let bytes = language.token_bytes(token.id);
            let own = bytes.len().checked_sub(usize::from(token.bytes)).and_then(|skipped| bytes.get(skipped..));
            own.map(|own| text.extend_from_slice(own)).is_some()
        });
        let whole = whole.count();
        tokens.truncate(whole);
        Self { tokens, text, encoded: encoded.min(whole) }
    }

    /// How long the history is for the KV.
    pub fn len(&self) -> TokenCount {
        TokenCount(u32::try_from(self.tokens.len()).expect("the window bounds a log"))
    }

    pub fn encoded(&self) -> usize {
        self.encoded
    }

    /// The tokens of a rendered text: those of the log as far as they go, then new ones.
    pub fn prompt(&self, language: &Language, rendered: Rendered) -> Prompt {
        let reused = self.reusable(language, &rendered);
        let fresh = language.tokenize(&rendered, reused.bytes);
        let mut tokens = Vec::with_capacity(reused.tokens + fresh.len());
        tokens.extend_from_slice(&self.tokens[..reused.tokens]);
        tokens.extend(fresh.into_iter().map(|(id, bytes)| LogToken { id, bytes }));
        let kept = tokens.iter().zip(&self.tokens).take_while(|(new, old)| new == old).count();
        let encoded_before = u32::try_from(kept.min(self.encoded)).expect("the window bounds a log");
        Prompt { tokens, text: rendered.text, kept, encoded_before: TokenCount(encoded_before) }
    }

    /// Tokens of the log that a text without the removed part still begins with.
    pub fn kept_by(&self, language: &Language, rendered: &Rendered) -> usize {
        self.reusable(language, rendered).tokens
    }

    pub fn truncate(&mut self, tokens: usize) {
        self.tokens.truncate(tokens);
        self.text.truncate(self.tokens.iter().map(|token| usize::from(token.bytes)).sum());
        self.encoded = self.encoded.min(self.tokens.len());
    }

    /// How far the log's tokens can stand for the front of `rendered`.
    ///
    /// As far as the bytes are equal and mean the same (control or typed text), back to a border between a message and
    /// the template's own control tokens, so that what is new is cut into tokens as if it had been alone. In a template
    /// without control tokens any token's end will do. A log that the text continues is kept whole.
    fn reusable(&self, language: &Language, rendered: &Rendered) -> Reused {
        let common = self.common_bytes(language, rendered);
        let borders = self.control_starts(language, rendered, common);
        let (mut at, mut last, mut border) = (0, Reused::NONE, Reused::NONE);
        for (index, token) in self.tokens.iter().enumerate() {
            at += usize::from(token.bytes);
            if at > common {
                break;
            }
            if at > 0 && rendered.text.is_char_boundary(at) {
                last = Reused { tokens: index + 1, bytes: at };
                if language.is_control(token.id) || borders.contains(&at) {
                    border = last;
                }
            }
        }
        if last.tokens == self.tokens.len() || border.tokens == 0 { last } else { border }
    }

    /// Bytes at the front of log and text that are equal, and control in both or in neither.
    fn common_bytes(&self, language: &Language, rendered: &Rendered) -> usize {
        let equal = self.text.iter().zip(rendered.text.as_bytes()).take_while(|(old, new)| old == new).count();
        let controls = self.controls(language);
        let typed_now = controls.iter().copied().find(|&at| at < equal && rendered.is_plain(at));
        let starts = self.control_starts(language, rendered, equal);
        let typed_before = starts.into_iter().find(|at| *at < equal && controls.binary_search(at).is_err());
        [typed_now, typed_before].into_iter().flatten().fold(equal, usize::min)
    }

    /// Where the log's control tokens begin, ascending.
    fn controls(&self, language: &Language) -> Vec<usize> {
        let mut at = 0;
        let starts = self.tokens.iter().filter_map(|token| {
            let start = at;
            at += usize::from(token.bytes);
            (token.bytes > 0 && language.is_control(token.id)).then_some(start)
        });
        starts.collect()
    }

    /// Where in `rendered`, up to byte `end`, the template wrote one of the control tokens that this conversation uses.
    fn control_starts(&self, language: &Language, rendered: &Rendered, end: usize) -> BTreeSet<usize> {
        let used = self.tokens.iter().filter(|token| token.bytes > 0).map(|token| token.id);
        let used = used.filter(|id| language.is_control(*id)).chain(language.stop_tokens().iter().copied());
        let used: BTreeSet<TokenId> = used.collect();
        let texts = used.iter().filter_map(|id| std::str::from_utf8(language.token_bytes(*id)).ok());
        let starts = texts
            .filter(|text| !text.is_empty())
            .flat_map(|text| rendered.text.match_indices(text).map(|(at, _)| at).take_while(|at| *at <= end));
        starts.filter(|at| !rendered.is_plain(*at)).collect()
    }
}

/// A front of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Reused {
    tokens: usize,
    bytes: usize,
}

impl Reused {
    const NONE: Reused = Reused { tokens: 0, bytes: 0 };
}

impl Prompt {
    pub fn len(&self) -> TokenCount {
        TokenCount(u32::try_from(self.tokens.len()).expect("a longer prompt is refused before it is made"))
    }

    pub fn ids(&self) -> Arc<[TokenId]> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    /// The log after this prompt and what was said to it, and how it differs from the log before.
    pub fn answered(self, said: &Said) -> (TokenLog, LogWrite) {
        let Prompt { mut tokens, text, kept, .. } = self;
        // The last token's KV would be computed with the token after it.
        let encoded = tokens.len() + said.tokens.len().saturating_sub(1);
        tokens.extend_from_slice(&said.tokens);
        let mut text = text.into_bytes();
        text.extend_from_slice(&said.bytes);
        let append = tokens[kept..].to_vec();
        (TokenLog { tokens, text, encoded }, LogWrite { keep: kept, append })
    }
}

/// Renders messages through the model's chat template, after an optional system message of this turn alone.
pub(super) fn render<'a>(
    language: &Language,
    instructions: Option<&str>,
    messages: impl Iterator<Item = &'a Message>,
    to_be_answered: bool,
) -> Result<Rendered, TemplateError> {
    let texts: Vec<(&Message, Cow<'_, str>)> = messages.map(|message| (message, text_of(message))).collect();
    let said = texts.iter().map(|(message, content)| ChatMessage {
        role: role_name(message.role),
        name: message.name.as_deref(),
        content,
    });
    let first = instructions.map(|content| ChatMessage { role: "system", name: None, content });
    let all: Vec<ChatMessage<'_>> = first.into_iter().chain(said).collect();
    language.render(&all, to_be_answered)
}

/// A message's text; parts are lines.
fn text_of(message: &Message) -> Cow<'_, str> {
    let mut texts = message.content.iter().map(|part| match part {
        Part::Text(text) | Part::Refusal(text) => text.as_str(),
    });
    match (texts.next(), texts.len()) {
        (None, _) => Cow::Borrowed(""),
        (Some(only), 0) => Cow::Borrowed(only),
        (Some(first), _) => Cow::Owned(texts.fold(first.to_string(), |joined, text| joined + "\n" + text)),
    }
}

/// A role as chat templates know it.
fn role_name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::Developer => "developer",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}
