//! What was said in a conversation, and which tokens stand for it?
//!
//! Items are what clients see; the token log is what the KV holds. The log keeps generated tokens as they were generated,
//! and only what is new is tokenised. Invariant: a prompt's tokens stand for exactly the rendered text.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::messages::{Item, Message, Part, Role};
use super::recall::Digests;
use super::speech::Said;
use super::unix_now;
use crate::engine::{Argument, ChatMessage, Language, Rendered, TemplateError};
use crate::store::{LogToken, LogWrite};
use crate::types::{TokenCount, TokenId};

/// A conversation's history, as its actor holds it.
#[derive(Clone, Debug, Default)]
pub(super) struct Transcript {
    pub items: Vec<Arc<Item>>,
    pub log: TokenLog,
    /// Seconds since 1970.
    pub last_used_at: i64,
    /// Made, but not in the store yet: its first turn puts it there, whole.
    pub unborn: Option<Birth>,
}

/// What a conversation is made with.
#[derive(Clone, Debug)]
pub(super) struct Birth {
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
        let log = TokenLog { encoded: 0, ..self.log.clone() };
        Some(Self { items, log, last_used_at: self.last_used_at, unborn: None })
    }

    /// The history without one of its items.
    pub fn without(&self, item: &str) -> Self {
        let mut rest = self.clone();
        rest.items.retain(|known| known.id != item);
        rest
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

/// The tokens that the KV of a conversation holds, or held, and how many bytes of text each stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TokenLog {
    tokens: Vec<LogToken>,
    /// Tokens at the front whose KV has been computed once.
    encoded: usize,
}

/// A prompt in tokens.
#[derive(Debug)]
pub(super) struct Prompt {
    tokens: Vec<LogToken>,
    /// Tokens at the front that the log before it has too.
    kept: usize,
    /// Tokens at the front that an earlier turn of the conversation encoded.
    pub encoded_before: TokenCount,
    /// Items of the history that are not in it.
    pub dropped_items: usize,
    /// What the messages of history and input are known by.
    pub conversation: Digests,
}

impl TokenLog {
    /// A log as the store had it.
    pub fn new(tokens: Vec<LogToken>, encoded: usize) -> Self {
        let encoded = encoded.min(tokens.len());
        Self { tokens, encoded }
    }

    /// How long the history is for the KV.
    pub fn len(&self) -> TokenCount {
        TokenCount(u32::try_from(self.tokens.len()).expect("the window bounds a log"))
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    pub fn encoded(&self) -> usize {
        self.encoded
    }

    /// All of it, for a store that has none of it.
    pub fn whole(&self) -> LogWrite {
        LogWrite { keep: 0, append: self.tokens.clone() }
    }

    /// The tokens of a rendered text: those of the log as far as they stand for its front, or those of a `remembered` one
    /// where they stand for more of it; then new ones.
    pub fn prompt(&self, language: &Language, rendered: &Rendered, remembered: Option<&TokenLog>) -> Prompt {
        let own = (self, self.prefix_of(language, rendered));
        let other = remembered.map(|log| (log, log.prefix_of(language, rendered)));
        let (front, (reused, from_byte)) = match other {
            Some(other) if other.1.1 > own.1.1 => other,
            Some(_) | None => own,
        };
        let fresh = language.tokenize(rendered, from_byte);
        let fresh = fresh.into_iter().map(|(id, bytes)| LogToken { id, bytes });
        let tokens: Vec<LogToken> = front.tokens[..reused].iter().copied().chain(fresh).collect();
        let kept = tokens.iter().zip(&self.tokens).take_while(|(new, old)| new == old).count();
        let encoded_before = u32::try_from(kept.min(self.encoded)).expect("the window bounds a log");
        Prompt {
            tokens,
            kept,
            encoded_before: TokenCount(encoded_before),
            dropped_items: 0,
            conversation: Digests::default(),
        }
    }

    /// Tokens at the front that stand for the front of `rendered`, and the byte of it where they end.
    pub fn prefix_of(&self, language: &Language, rendered: &Rendered) -> (usize, usize) {
        let log: Vec<(TokenId, u16)> = self.tokens.iter().map(|token| (token.id, token.bytes)).collect();
        match language.common_prefix(rendered, &log) {
            // Tokens that stand for no text come again with the first that does.
            (_, 0) => (0, 0),
            common => common,
        }
    }

    /// Keeps this many tokens of the front.
    /// How many of its tokens stand for the front of these messages. What the template can't render has no front in common
    /// with anything.
    pub fn standing_for<'a>(&self, language: &Language, messages: impl Iterator<Item = &'a Message>) -> usize {
        render(language, None, messages, false, &[]).map_or(0, |rendered| self.prefix_of(language, &rendered).0)
    }

    /// Says that nothing of it was encoded for this conversation.
    pub fn forget_encoded(&mut self) {
        self.encoded = 0;
    }

    pub fn truncate(&mut self, tokens: usize) {
        self.tokens.truncate(tokens);
        self.encoded = self.encoded.min(tokens);
    }
}

impl Prompt {
    pub fn len(&self) -> TokenCount {
        TokenCount(u32::try_from(self.tokens.len()).expect("a request's size bounds its prompt"))
    }

    pub fn ids(&self) -> Arc<[TokenId]> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    /// The log after this prompt and what was said to it, and how it differs from the log before.
    pub fn answered(self, said: &Said) -> (TokenLog, LogWrite) {
        let log = self.after(said);
        let append = log.tokens[self.kept..].to_vec();
        (log, LogWrite { keep: self.kept, append })
    }

    /// The log after this prompt and what was said to it.
    pub fn after(&self, said: &Said) -> TokenLog {
        let tokens = [self.tokens.as_slice(), said.tokens.as_slice()].concat();
        // The last token's KV would be computed with the token after it.
        let encoded = self.tokens.len() + said.tokens.len().saturating_sub(1);
        TokenLog { tokens, encoded }
    }
}

/// Renders messages through the model's chat template, after an optional system message of this turn alone.
pub(super) fn render<'a>(
    language: &Language,
    instructions: Option<&str>,
    messages: impl Iterator<Item = &'a Message>,
    to_be_answered: bool,
    arguments: &[(String, Argument)],
) -> Result<Rendered, TemplateError> {
    let texts: Vec<(&Message, Cow<'_, str>)> = messages.map(|message| (message, text_of(message))).collect();
    let said = texts.iter().map(|(message, content)| ChatMessage {
        role: message.role.name(),
        name: message.name.as_deref(),
        content,
        calls: &message.calls,
        call_id: message.call_id.as_deref(),
    });
    let first =
        instructions.map(|content| ChatMessage { role: "system", name: None, content, calls: &[], call_id: None });
    let all: Vec<ChatMessage<'_>> = first.into_iter().chain(said).collect();
    language.render(&all, to_be_answered, arguments)
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::sessions::fixtures::{language, message, tokens_of};

    fn rendered(language: &Language, messages: &[Message]) -> Rendered {
        render(language, None, messages.iter(), true, &[]).unwrap()
    }

    /// What the model said: this text, and a stop token if it came to its end.
    fn said(language: &Language, text: &str, whole: bool) -> Said {
        let stop = language.stop_tokens().last().copied().filter(|_| whole);
        let ids = tokens_of(language, text).into_iter().chain(stop);
        let bytes = |id| u16::try_from(language.token_bytes(id).len()).unwrap();
        Said { tokens: ids.map(|id| LogToken { id, bytes: bytes(id) }).collect(), text: text.into(), ..Said::default() }
    }

    fn text(language: &Language, prompt: &Prompt) -> String {
        let bytes = prompt.tokens.iter().flat_map(|token| language.token_bytes(token.id)).copied().collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_next_turn_keeps_every_token_of_the_one_before() {
        let language = language();
        let mut messages = vec![message(Role::User, "Hi")];
        let prompt = TokenLog::default().prompt(&language, &rendered(&language, &messages), None);
        assert_eq!(prompt.encoded_before, TokenCount(0));
        let (log, write) = prompt.answered(&said(&language, "Hello", true));
        assert_eq!((write.keep, write.append.len()), (0, log.tokens.len()));
        messages.extend([message(Role::Assistant, "Hello"), message(Role::User, "More")]);
        let next = log.prompt(&language, &rendered(&language, &messages), None);
        assert_eq!(next.kept, log.tokens.len());
        // The stop token was sampled, and never fed.
        assert_eq!(next.encoded_before.get(), log.tokens.len() - 1);
    }

    #[test]
    fn an_answer_whose_text_was_cut_is_kept_up_to_the_cut() {
        let language = language();
        let first = [message(Role::User, "Hi")];
        let prompt = TokenLog::default().prompt(&language, &rendered(&language, &first), None);
        let before = prompt.tokens.len();
        let (log, _) = prompt.answered(&said(&language, "Hello STOP", false));
        let messages = [message(Role::User, "Hi"), message(Role::Assistant, "Hello "), message(Role::User, "More")];
        let next = log.prompt(&language, &rendered(&language, &messages), None);
        assert_eq!(next.kept, before + tokens_of(&language, "Hello ").len());
    }

    #[test]
    fn a_change_inside_a_character_keeps_only_what_is_before_it() {
        let language = language();
        let prompt = TokenLog::default().prompt(&language, &rendered(&language, &[message(Role::User, "a😀")]), None);
        let (log, _) = prompt.answered(&Said::default());
        // The two emoji share three bytes of four.
        let changed = rendered(&language, &[message(Role::User, "a😁")]);
        let next = log.prompt(&language, &changed, None);
        assert_eq!(text(&language, &next), changed.text);
        assert!(changed.text.is_char_boundary(log.prefix_of(&language, &changed).1));
    }

    #[test]
    fn instructions_of_one_turn_are_gone_in_the_next() {
        let language = language();
        let messages = [message(Role::User, "Hi")];
        let instructed = render(&language, Some("Be brief"), messages.iter(), true, &[]).unwrap();
        let (log, _) = TokenLog::default().prompt(&language, &instructed, None).answered(&Said::default());
        let plain = rendered(&language, &messages);
        let next = log.prompt(&language, &plain, None);
        assert_eq!(text(&language, &next), plain.text);
        assert!(next.encoded_before < next.len());
    }

    #[test]
    fn a_stored_log_claims_no_more_than_it_has() {
        let tokens = vec![LogToken { id: TokenId(7), bytes: 1 }; 3];
        assert_eq!(TokenLog::new(tokens, 9).encoded(), 3);
    }

    proptest! {
        #[test]
        fn a_prompt_stands_for_exactly_the_rendered_text(
            before in vec("[ab😀<|>é_mrtsi]{0,8}", 1..5),
            after in vec("[ab😀<|>é_mrtsi]{0,8}", 1..5),
            common in 0..4usize,
            answer in "[ab😀é]{0,6}",
            whole in any::<bool>(),
        ) {
            let language = language();
            let messages = |texts: &[String]| -> Vec<Message> {
                let roles = [Role::User, Role::Assistant].into_iter().cycle();
                texts.iter().zip(roles).map(|(text, role)| message(role, text)).collect()
            };
            let (old, mut new) = (messages(&before), messages(&after));
            for (new, old) in new.iter_mut().zip(&old).take(common) {
                new.clone_from(old);
            }
            let prompt = TokenLog::default().prompt(&language, &rendered(&language, &old), None);
            let (log, _) = prompt.answered(&said(&language, &answer, whole));
            let text_now = rendered(&language, &new);
            let next = log.prompt(&language, &text_now, None);
            prop_assert_eq!(&text(&language, &next), &text_now.text);
            prop_assert!(next.encoded_before.get() <= next.kept);
            let (again, write) = next.answered(&Said::default());
            let mut stored = log.tokens.clone();
            stored.truncate(write.keep);
            stored.extend(write.append);
            prop_assert_eq!(stored, again.tokens);
        }
    }
}
