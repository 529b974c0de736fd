//! What is the prompt of a conversation's next turn, and what of it is new?
//!
//! Rendered, hashed and tokenised is what the conversation's last prompt did not have: how that one was made is *known*, and
//! the next goes on from there. Where it can't (a first turn, a deleted item, other instructions, a template that looks at the
//! whole conversation), the whole history is rendered once, and the tokens that still stand for it are kept.
//! Invariant: a prompt's tokens stand for exactly the text that the chat template makes of the whole conversation.

use std::sync::Arc;

use super::digests::Digests;
use super::messages::{Argument, Goal, Message, Overflow, Role, TurnError};
use super::speech::Said;
use super::token_log::TokenLog;
use super::transcript::{Transcript, chat_message};
use crate::engine::{ChatMessage, Front, HashedPrompt, History, Language, Rendered};
use crate::store::{LogToken, LogWrite};
use crate::types::{TenantKey, TokenCount, TokenId};

/// How a prompt is to be made.
#[derive(Clone, Debug)]
pub struct PromptRules {
    pub instructions: Option<String>,
    pub overflow: Overflow,
    pub goal: Goal,
    /// Tokens that the answer may have.
    pub answer: TokenCount,
    /// Values for variables of the chat template.
    pub arguments: Vec<(String, Argument)>,
}

/// How a conversation's last prompt was made: where the next one goes on.
#[derive(Clone, Debug)]
pub struct Known {
    instructions: Option<String>,
    arguments: Vec<(String, Argument)>,
    /// Items of the transcript that the digests are of.
    items: usize,
    digests: Digests,
    /// Oldest turns that were left out: with one of them more, the prompt was not shorter than the limit.
    dropped_turns: usize,
    limit: TokenCount,
    /// Of the text of the log's prompt.
    front: Option<Front>,
}

/// What is remembered of a history that came as text.
pub struct Recalled {
    pub log: TokenLog,
    pub front: Option<Front>,
}

/// A prompt in tokens.
#[derive(Debug)]
pub struct Prompt {
    log: TokenLog,
    hashed: Arc<HashedPrompt>,
    /// Tokens at the front that the conversation's log before it has too.
    kept: usize,
    /// Tokens at the front that an earlier turn of the conversation encoded.
    pub encoded_before: TokenCount,
    /// Which turn of the conversation it is for, from 1, as its messages tell: one and its answer are a turn.
    pub turn: u32,
    /// Items of the history that are not in it.
    pub dropped_items: usize,
    pub work: PromptWork,
    known: Known,
}

/// What making a prompt took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptWork {
    /// Messages that were digested.
    pub messages: usize,
    /// Bytes that the template wrote.
    pub rendered_bytes: usize,
    /// Tokens that came of new text.
    pub tokenized: usize,
    /// Blocks that were hashed.
    pub hashed_blocks: usize,
}

/// A turn whose prompt is to be made.
pub struct Draft<'a> {
    pub language: &'a Language,
    pub tenant_key: TenantKey,
    /// A prompt of this tenant's without tokens.
    pub empty: HashedPrompt,
    pub window: TokenCount,
    pub transcript: Arc<Transcript>,
    pub input: Arc<[Message]>,
    pub rules: PromptRules,
}

impl Draft<'_> {
    /// Makes the prompt. `recall` is asked for the tokens of a history that has none of its own.
    pub fn make(self, recall: impl FnOnce(&Digests) -> Option<Recalled>) -> Result<Prompt, TurnError> {
        let Self { transcript, input, rules, .. } = &self;
        let known = transcript.known.as_deref().filter(|known| known.was_made_by(rules));
        let mut digests = match known {
            Some(known) => known.digests.clone(),
            None => Digests::new(&self.tenant_key, rules.instructions.as_deref()),
        };
        let digested = digests.messages();
        let items = transcript.items.get(known.map_or(0, |known| known.items)..).unwrap_or_default();
        items.iter().map(|item| &item.message).chain(input.iter()).for_each(|message| digests.add(message));
        // A history that is new here may be one that a client has read from us and sends back.
        let recalled = if transcript.log.is_empty() { recall(&digests) } else { None };
        let (log, dropped_turns, front) = match &recalled {
            Some(Recalled { log, front }) => (log, 0, front.as_ref()),
            None => (
                &transcript.log,
                known.map_or(0, |known| known.dropped_turns),
                known.and_then(|known| known.front.as_ref()),
            ),
        };
        let base = Base { log, front, dropped_turns, is_own: recalled.is_none() };
        let made = match rules.overflow {
            Overflow::Refuse => self.whole(&base)?,
            Overflow::DropOldest => self.shortened(&base, known)?,
        };
        let Made { rendered, mut log, kept, tokenized, dropped_items, dropped_turns, limit } = made;
        let rendered_bytes = rendered.written_bytes;
        let bytes = rendered.prompt_bytes();
        let front = self.language.front(rendered, log.ends(bytes));
        let hashed = Arc::new(log.hashed(|| self.empty.clone()));
        log.is_prompt(Arc::clone(&hashed));
        let encoded_before = if base.is_own { kept.min(transcript.log.encoded()) } else { 0 };
        let turn = u32::try_from(digests.messages().div_ceil(2)).unwrap_or(u32::MAX);
        let work = PromptWork {
            messages: digests.messages() - digested,
            rendered_bytes,
            tokenized,
            hashed_blocks: hashed.fresh_blocks(),
        };
        // Without as many turns the next prompt would lack messages that this one has.
        let front = front.filter(|_| !self.begins_in_one_of(dropped_turns));
        digests.keep_exact_from(front.as_ref().map_or(usize::MAX, Front::depends_on));
        let known = Known {
            instructions: rules.instructions.clone(),
            arguments: rules.arguments.clone(),
            items: transcript.items.len() + input.len(),
            digests,
            dropped_turns,
            limit,
            front,
        };
        let encoded_before = TokenCount(u32::try_from(encoded_before).expect("the window bounds a log"));
        Ok(Prompt { log, hashed, kept, encoded_before, turn, dropped_items, work, known })
    }

    /// The prompt of the whole history.
    fn whole(&self, base: &Base<'_>) -> Result<Made, TurnError> {
        self.without_oldest(0, base, self.window)
    }

    /// The prompt without the oldest `turns`; refused if it leaves no room in `limit` tokens.
    fn without_oldest(&self, turns: usize, base: &Base<'_>, limit: TokenCount) -> Result<Made, TurnError> {
        let Self { language, transcript, input, rules, .. } = self;
        let said = Spoken::new(rules.instructions.clone(), Arc::clone(transcript), Arc::clone(input), turns);
        let dropped_items = said.dropped;
        let history: Arc<dyn History> = Arc::new(said);
        let front = base.front.filter(|_| base.dropped_turns == turns);
        let rendered = language
            .render_history(&history, front, rules.goal == Goal::Answer, &rules.arguments)
            .map_err(|refused| TurnError::Template(refused.to_string()))?;
        // What is far too long is refused for what it has at least: counting it exactly would take seconds.
        let fewest = TokenCount(u32::try_from(language.fewest_tokens(rendered.prompt_bytes())).unwrap_or(u32::MAX));
        if fewest >= limit {
            return Err(TurnError::ContextLength { prompt: fewest, window: limit });
        }
        let (reused, from_byte) = base.log.prefix_of(language, &rendered);
        let fresh = language.tokenize(&rendered, from_byte).into_iter();
        let fresh: Vec<LogToken> = fresh.map(|(id, bytes)| LogToken { id, bytes }).collect();
        let same = base.log.from(reused).zip(&fresh).take_while(|(old, new)| old == *new).count();
        let kept = if base.is_own { reused + same } else { 0 };
        let mut log = base.log.clone();
        log.truncate(reused);
        log.extend(&fresh);
        if log.len() >= limit {
            return Err(TurnError::ContextLength { prompt: log.len(), window: limit });
        }
        Ok(Made { rendered, log, kept, tokenized: fresh.len(), dropped_items, dropped_turns: turns, limit })
    }

    /// The prompt with as few of the oldest turns left out as give the answer room.
    fn shortened(&self, base: &Base<'_>, known: Option<&Known>) -> Result<Made, TurnError> {
        let room = self.rules.answer.0.min(self.window.0 / 4);
        let limit = TokenCount(self.window.0 - room);
        // Fewer did not do when the history was shorter.
        let fewest = known.filter(|known| limit <= known.limit).map_or(0, |known| known.dropped_turns);
        match self.without_oldest(fewest, base, limit) {
            Err(TurnError::ContextLength { .. }) => {}
            fits_or_fails => return fits_or_fails,
        }
        // What is to be answered stays: if nothing in the input is the user's, it is the last that was said before.
        let begun = self.turns();
        let turns = if self.input.iter().any(is_users) { begun } else { begun.saturating_sub(1) };
        let (mut few, mut many) = (fewest + 1, turns);
        let mut found = None;
        while few <= many {
            let middle = few + (many - few) / 2;
            match self.without_oldest(middle, base, limit) {
                Ok(made) => {
                    found = Some(made);
                    many = middle - 1;
                }
                Err(TurnError::ContextLength { .. }) => few = middle + 1,
                Err(error) => return Err(error),
            }
        }
        // With nothing left to drop, the answer takes what room there is.
        let whatever_is_left = || self.without_oldest(turns, base, self.window).map(|made| Made { limit, ..made });
        found.map_or_else(whatever_is_left, Ok)
    }

    /// Turns that the history has.
    fn turns(&self) -> usize {
        self.transcript.items.iter().filter(|item| is_users(&item.message)).count()
    }

    /// Whether the input begins with messages that, once they are history, belong to one of this many oldest turns.
    fn begins_in_one_of(&self, dropped_turns: usize) -> bool {
        let mut before_question = self.input.iter().take_while(|message| !is_users(message));
        dropped_turns > 0 && before_question.any(|message| !always_stays(message.role)) && self.turns() <= dropped_turns
    }
}

fn is_users(message: &Message) -> bool {
    message.role == Role::User
}

/// Whether messages of this role are never dropped.
fn always_stays(role: Role) -> bool {
    matches!(role, Role::System | Role::Developer)
}

/// The tokens that a prompt goes on from.
struct Base<'a> {
    log: &'a TokenLog,
    front: Option<&'a Front>,
    /// Turns that the front leaves out.
    dropped_turns: usize,
    /// Whether the log is the conversation's own, as the store has it.
    is_own: bool,
}

/// A prompt's tokens.
struct Made {
    rendered: Rendered,
    log: TokenLog,
    kept: usize,
    tokenized: usize,
    dropped_items: usize,
    dropped_turns: usize,
    limit: TokenCount,
}

impl Known {
    /// Whether a prompt of these rules begins with the same messages.
    fn was_made_by(&self, rules: &PromptRules) -> bool {
        self.instructions == rules.instructions && self.arguments == rules.arguments
    }

    #[cfg(test)]
    pub fn of(digests: Digests) -> Self {
        let (instructions, limit) = (None, TokenCount(0));
        Self { instructions, arguments: Vec::new(), items: 0, digests, dropped_turns: 0, limit, front: None }
    }

    pub fn digests(&self) -> &Digests {
        &self.digests
    }

    /// The front that a client who sends all of this back as text may go on from.
    pub fn front(&self) -> Option<&Front> {
        self.front.as_ref().filter(|_| self.dropped_turns == 0)
    }

    /// The same, with what was said to it.
    pub fn answered(mut self, answer: &Message) -> Self {
        self.items += 1;
        self.digests.add(answer);
        self
    }
}

impl Prompt {
    pub fn len(&self) -> TokenCount {
        self.log.len()
    }

    pub fn is_empty(&self) -> bool {
        self.log.is_empty()
    }

    /// Tokens that the log before it doesn't have.
    pub fn fresh(&self) -> TokenCount {
        TokenCount(self.len().0.saturating_sub(u32::try_from(self.kept).unwrap_or(u32::MAX)))
    }

    pub fn ids(&self) -> &Arc<[TokenId]> {
        self.hashed.tokens()
    }

    pub fn hashed(&self) -> &HashedPrompt {
        &self.hashed
    }

    pub fn known(&self) -> &Known {
        &self.known
    }

    /// The log after this prompt and what was said to it, how it differs from the log before, and how it was made.
    pub fn answered(self, said: &Said) -> (TokenLog, LogWrite, Known) {
        let log = self.after(said);
        let append = log.from(self.kept).collect();
        (log, LogWrite { keep: self.kept, append }, self.known)
    }

    /// The log after this prompt and what was said to it.
    pub fn after(&self, said: &Said) -> TokenLog {
        let mut log = self.log.clone();
        log.extend(&said.tokens);
        // The last token's KV would be computed with the token after it.
        log.set_encoded(self.len().get() + said.tokens.len().saturating_sub(1));
        log
    }
}

/// The messages of a prompt: the turn's own instructions, the history or what is not dropped of it, and the input.
struct Spoken {
    instructions: Option<String>,
    transcript: Arc<Transcript>,
    input: Arc<[Message]>,
    /// Items that are in it; `None`: all.
    items: Option<Vec<usize>>,
    dropped: usize,
}

impl Spoken {
    fn new(
        instructions: Option<String>,
        transcript: Arc<Transcript>,
        input: Arc<[Message]>,
        dropped_turns: usize,
    ) -> Self {
        let items = (dropped_turns > 0).then(|| without_oldest(&transcript, dropped_turns));
        let dropped = items.as_ref().map_or(0, |items| transcript.items.len() - items.len());
        Self { instructions, transcript, input, items, dropped }
    }
}

impl History for Spoken {
    fn count(&self) -> usize {
        usize::from(self.instructions.is_some()) + self.transcript.items.len() - self.dropped + self.input.len()
    }

    fn message(&self, index: usize) -> ChatMessage<'_> {
        let index = match (&self.instructions, index) {
            (Some(content), 0) => {
                let content = content.as_str().into();
                return ChatMessage { role: "system", name: None, content, calls: &[], call_id: None };
            }
            (Some(_), index) => index - 1,
            (None, index) => index,
        };
        let items = self.transcript.items.len() - self.dropped;
        let item = self.items.as_ref().map_or(Some(index), |items| items.get(index).copied());
        let message = match item {
            Some(item) if index < items => &self.transcript.items[item].message,
            Some(_) | None => &self.input[index - items],
        };
        chat_message(message)
    }
}

/// The items without those of the oldest turns; what the system says stays. A turn goes from one user's message to the
/// next.
fn without_oldest(transcript: &Transcript, turns: usize) -> Vec<usize> {
    let mut begun = 0_usize;
    let roles = transcript.items.iter().map(|item| item.message.role).enumerate();
    let kept = roles.filter(|(_, role)| {
        begun += usize::from(*role == Role::User);
        begun.max(1) > turns || always_stays(*role)
    });
    kept.map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests;
