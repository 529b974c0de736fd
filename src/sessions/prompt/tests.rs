//! Is the prompt that goes on from the last one that of the whole history, at the cost of what is new?

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::engine::TextDecoder;
use crate::sessions::fixtures::{language, message, tokens_of};
use crate::sessions::messages::{Item, ItemStatus};
use crate::types::BlockSize;

const KEY: TenantKey = TenantKey([5; 32]);
const SIZE: BlockSize = BlockSize(16);
const WINDOW: TokenCount = TokenCount(1_000_000);

fn rules() -> PromptRules {
    PromptRules {
        instructions: None,
        overflow: Overflow::Refuse,
        goal: Goal::Answer,
        answer: TokenCount(64),
        arguments: Vec::new(),
    }
}

/// A conversation, as the actor keeps it between turns, and the log that the store would have.
struct Chat {
    language: Language,
    transcript: Arc<Transcript>,
    stored: Vec<LogToken>,
    window: TokenCount,
    /// Items made.
    made: usize,
}

impl Chat {
    fn new() -> Self {
        Self { language: language(), transcript: Arc::default(), stored: Vec::new(), window: WINDOW, made: 0 }
    }

    fn of(items: &[Message]) -> Self {
        let mut chat = Self::new();
        items.iter().for_each(|message| chat.keep(message.clone()));
        chat
    }

    fn keep(&mut self, message: Message) {
        self.made += 1;
        let item = Item { id: format!("msg_{}", self.made), message, status: ItemStatus::Completed };
        Arc::make_mut(&mut self.transcript).items.push(Arc::new(item));
    }

    fn prompt(&self, input: &[Message], rules: PromptRules) -> Result<Prompt, TurnError> {
        let (transcript, empty) = (Arc::clone(&self.transcript), HashedPrompt::empty(KEY, SIZE));
        let (language, window, input) = (&self.language, self.window, Arc::from(input));
        let draft = Draft { language, tenant_key: KEY, empty, window, transcript, input, rules };
        draft.make(|_| None)
    }

    /// A whole turn: what its prompt took, and whether the prompt is what one makes that knows nothing.
    fn turn(&mut self, input: &[Message], said: &Said, rules: PromptRules) -> Result<PromptWork, TestCaseError> {
        let prompt = self.prompt(input, rules.clone());
        let unknown = Transcript { known: None, ..(*self.transcript).clone() };
        let whole = Self { transcript: Arc::new(unknown), window: self.window, ..Self::new() }.prompt(input, rules);
        let (prompt, whole) = match (prompt, whole) {
            (Ok(prompt), Ok(whole)) => (prompt, whole),
            (prompt, whole) => {
                let refusal = |made: Result<Prompt, TurnError>| made.map(|_| ()).map_err(|error| error.to_string());
                prop_assert_eq!(refusal(prompt), refusal(whole));
                return Ok(PromptWork::default());
            }
        };
        prop_assert_eq!(&**prompt.ids(), &**whole.ids());
        prop_assert!(prompt.log.from(0).eq(whole.log.from(0)));
        let facts = |prompt: &Prompt| (prompt.kept, prompt.encoded_before, prompt.dropped_items);
        prop_assert_eq!(facts(&prompt), facts(&whole));
        prop_assert_eq!(prompt.known.digests.answers(), whole.known.digests.answers());
        let work = prompt.work;
        self.answer(input, prompt, said);
        prop_assert!(self.transcript.log.from(0).eq(self.stored.iter().copied()));
        Ok(work)
    }

    fn answer(&mut self, input: &[Message], prompt: Prompt, said: &Said) {
        input.iter().for_each(|message| self.keep(message.clone()));
        let (log, write, known) = prompt.answered(said);
        let answer = message(Role::Assistant, &said.text);
        self.keep(answer.clone());
        Arc::make_mut(&mut self.transcript).take(log, known.answered(&answer));
        self.stored.truncate(write.keep);
        self.stored.extend(write.append);
    }

    fn text(&self, prompt: &Prompt) -> String {
        let mut decoder = TextDecoder::default();
        let text: String = prompt.ids().iter().map(|id| decoder.push(self.language.token_bytes(*id))).collect();
        text + &decoder.finish()
    }
}

/// What the model said: this text, of which the client saw the first part, and a stop token if it came to its end.
fn said(language: &Language, text: &str, shown: usize, whole: bool) -> Said {
    let stop = language.stop_tokens().last().copied().filter(|_| whole);
    let ids = tokens_of(language, text).into_iter().chain(stop);
    let bytes = |id| u16::try_from(language.token_bytes(id).len()).unwrap();
    let tokens = ids.map(|id| LogToken { id, bytes: bytes(id) }).collect();
    Said { tokens, text: text.chars().take(shown).collect(), ..Said::default() }
}

fn says(language: &Language, text: &str) -> Said {
    said(language, text, usize::MAX, true)
}

#[test]
fn the_next_turn_keeps_every_token_of_the_one_before() {
    let mut chat = Chat::new();
    let answer = says(&chat.language, "Hello");
    let prompt = chat.prompt(&[message(Role::User, "Hi")], rules()).unwrap();
    assert_eq!((prompt.kept, prompt.encoded_before), (0, TokenCount(0)));
    chat.answer(&[message(Role::User, "Hi")], prompt, &answer);
    let log = chat.transcript.log.len().get();
    let next = chat.prompt(&[message(Role::User, "More")], rules()).unwrap();
    assert_eq!(next.kept, log);
    // The stop token was sampled, and never fed.
    assert_eq!(next.encoded_before.get(), log - 1);
}

#[test]
fn an_answer_whose_text_was_cut_is_kept_up_to_the_cut() {
    let mut chat = Chat::new();
    let prompt = chat.prompt(&[message(Role::User, "Hi")], rules()).unwrap();
    let before = prompt.len().get();
    let cut = said(&chat.language, "Hello STOP", "Hello ".len(), false);
    chat.answer(&[message(Role::User, "Hi")], prompt, &cut);
    let next = chat.prompt(&[message(Role::User, "More")], rules()).unwrap();
    assert_eq!(next.kept, before + tokens_of(&chat.language, "Hello ").len());
}

#[test]
fn a_change_inside_a_character_keeps_only_what_is_before_it() {
    let mut chat = Chat::of(&[message(Role::User, "a😀")]);
    let prompt = chat.prompt(&[], rules()).unwrap();
    chat.answer(&[], prompt, &Said::default());
    // The two emoji share three bytes of four.
    let (items, log) = (Vec::new(), chat.transcript.log.clone());
    let changed = Chat { transcript: Arc::new(Transcript { items, log, ..Transcript::default() }), ..Chat::new() };
    let next = changed.prompt(&[message(Role::User, "a😁")], rules()).unwrap();
    assert!(chat.text(&next).contains("a😁<"));
    // A token a byte, and one for the role's opening. The tokens of the three bytes are made anew, and the same.
    let before = "_user\na".len();
    assert_eq!((next.len().get() - next.work.tokenized, next.kept), (before, before + 3));
}

#[test]
fn instructions_of_one_turn_are_gone_in_the_next() {
    let mut chat = Chat::new();
    let brief = PromptRules { instructions: Some("Be brief".to_owned()), ..rules() };
    let prompt = chat.prompt(&[message(Role::User, "Hi")], brief).unwrap();
    let answer = says(&chat.language, "Hello");
    chat.answer(&[message(Role::User, "Hi")], prompt, &answer);
    let next = chat.prompt(&[message(Role::User, "More")], rules()).unwrap();
    assert!(!chat.text(&next).contains("brief"));
    assert!(next.encoded_before < next.len());
}

#[test]
fn the_hundredth_turn_takes_no_more_than_the_third() {
    let mut chat = Chat::of(&[message(Role::System, "Answer in one word.")]);
    let answer = says(&chat.language, "a word of an answer");
    let mut work = Vec::new();
    for turn in 0..100 {
        work.push(chat.turn(&[message(Role::User, &format!("question number {turn:03}"))], &answer, rules()).unwrap());
    }
    let third = work[2];
    // Where blocks begin moves from turn to turn.
    let is_no_more = |work: &PromptWork| {
        work.messages <= third.messages
            && work.rendered_bytes <= third.rendered_bytes
            && work.tokenized <= third.tokenized
            && work.hashed_blocks <= third.hashed_blocks + 1
    };
    assert!(work[2..].iter().all(is_no_more), "{work:?}");
    assert!(third.rendered_bytes > 0 && third.tokenized > 0 && third.hashed_blocks > 0, "{third:?}");
}

#[test]
fn a_client_that_sends_everything_back_has_it_rendered_and_hashed_once() {
    use crate::sessions::recall::Recall;
    use crate::types::{KvKey, TenantId};
    let (chat, recall) = (Chat::new(), Recall::new(1_000_000));
    let answer = says(&chat.language, "An answer");
    let mut messages = vec![message(Role::System, "Be brief.")];
    let mut work = Vec::new();
    for turn in 0..40_u32 {
        messages.push(message(Role::User, &format!("question number {turn:03}")));
        let draft = |recall: &Recall| {
            let (transcript, empty) = (Arc::default(), HashedPrompt::empty(KEY, SIZE));
            let (language, input, rules) = (&chat.language, messages.clone().into(), rules());
            let draft = Draft { language, tenant_key: KEY, empty, window: WINDOW, transcript, input, rules };
            draft.make(|digests| recall.find(TenantId(1), digests)).unwrap()
        };
        let (prompt, whole) = (draft(&recall), draft(&Recall::new(0)));
        assert_eq!(prompt.ids(), whole.ids());
        assert_eq!(prompt.encoded_before, TokenCount(0), "another conversation's");
        work.push(prompt.work);
        messages.push(message(Role::Assistant, &answer.text));
        let known = prompt.known().clone().answered(messages.last().unwrap());
        recall.keep(TenantId(1), KvKey(turn.into()), &known, prompt.after(&answer));
    }
    let third = work[2];
    let is_no_more = |work: &PromptWork| {
        work.rendered_bytes <= third.rendered_bytes
            && work.tokenized <= third.tokenized
            && work.hashed_blocks <= third.hashed_blocks + 1
    };
    assert!(work[2..].iter().all(is_no_more), "{work:?}");
    // One that changed a space has other text.
    messages[3] = message(Role::User, "question number 001 ");
    let empty = HashedPrompt::empty(KEY, SIZE);
    let (language, input, transcript) = (&chat.language, Arc::from(messages), Arc::default());
    let draft = Draft { language, tenant_key: KEY, empty, window: WINDOW, transcript, input, rules: rules() };
    let changed = draft.make(|digests| recall.find(TenantId(1), digests)).unwrap();
    assert!(chat.text(&changed).contains("number 001 <"));
    assert!(changed.work.rendered_bytes > 10 * third.rendered_bytes);
}

#[test]
fn turns_that_were_dropped_once_stay_dropped_without_trying_again() {
    let mut chat = Chat { window: TokenCount(600), ..Chat::of(&[message(Role::System, "Answer in one word.")]) };
    let answer = says(&chat.language, "a word of an answer");
    let dropping = PromptRules { overflow: Overflow::DropOldest, ..rules() };
    for turn in 0..30 {
        chat.turn(&[message(Role::User, &format!("question number {turn:03}"))], &answer, dropping.clone()).unwrap();
    }
    let prompt = chat.prompt(&[message(Role::User, "?")], dropping).unwrap();
    assert!(prompt.dropped_items > 30, "{}", prompt.dropped_items);
    assert!(chat.text(&prompt).contains("Answer in one word."));
}

#[test]
fn what_an_input_said_before_its_question_goes_with_the_turn_before_and_takes_nothing_along() {
    let said_before = [message(Role::User, &"x".repeat(200)), message(Role::Assistant, &"y".repeat(200))];
    let mut chat = Chat { window: TokenCount(500), ..Chat::of(&said_before) };
    let answer = says(&chat.language, "An answer");
    let dropping = PromptRules { overflow: Overflow::DropOldest, ..rules() };
    let input = [message(Role::Assistant, "By the way"), message(Role::User, "the second question")];
    chat.turn(&input, &answer, dropping.clone()).unwrap();
    let third = [message(Role::User, "the third question")];
    let prompt = chat.prompt(&third, dropping.clone()).unwrap();
    assert_eq!(prompt.dropped_items, 3);
    assert!(chat.text(&prompt).contains("the second question"));
    chat.turn(&third, &answer, dropping).unwrap();
}

#[test]
fn a_question_is_never_dropped_to_make_room_for_its_answer() {
    let long = message(Role::User, &"x".repeat(400));
    let question = message(Role::User, "the question");
    let dropping = || PromptRules { overflow: Overflow::DropOldest, ..rules() };
    let chat = |items: &[Message]| Chat { window: TokenCount(300), ..Chat::of(items) };
    for input in [vec![], vec![message(Role::Developer, "Be brief.")], vec![message(Role::Tool, "sunny")]] {
        let refused = chat(std::slice::from_ref(&long)).prompt(&input, dropping());
        assert!(matches!(refused, Err(TurnError::ContextLength { .. })), "{refused:?}");
        let chat = chat(&[long.clone(), message(Role::Assistant, "an answer"), question.clone()]);
        let prompt = chat.prompt(&input, dropping()).unwrap();
        assert_eq!(prompt.dropped_items, 2);
        assert!(chat.text(&prompt).contains("the question"));
    }
    // One that comes with the input may push out all that was said before.
    let chat = chat(&[long]);
    let prompt = chat.prompt(&[question], dropping()).unwrap();
    assert_eq!(prompt.dropped_items, 1);
}

/// Writes results of tools as Qwen 2.5's does: as one user's message, whose end depends on what follows.
const TOOLS: &str = "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}\
                     {% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}<|im_end|>\n\
                     {% else %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user\n{% endif %}[{{ m.content }}]\
                     {% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}\
                     {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[test]
fn a_client_that_branches_where_the_template_looked_ahead_gets_its_own_prompt() {
    use crate::engine::ToolCall;
    use crate::sessions::recall::Recall;
    use crate::types::{KvKey, TenantId};
    let language = Language::over_bytes(TOOLS);
    let call = ToolCall { id: "1".into(), name: "weather".into(), arguments: "{}".into() };
    let tool = |text| Message { call_id: Some("1".into()), ..message(Role::Tool, text) };
    let asks = Message { calls: vec![call], ..message(Role::Assistant, "") };
    let begun = [message(Role::User, "What is it like, here and there?"), asks, tool("sunny")];
    let made = |recall: &Recall, messages: &[Message]| {
        let (transcript, empty) = (Arc::default(), HashedPrompt::empty(KEY, SIZE));
        let (language, input, rules) = (&language, messages.into(), rules());
        let draft = Draft { language, tenant_key: KEY, empty, window: WINDOW, transcript, input, rules };
        draft.make(|digests| recall.find(TenantId(1), digests)).unwrap()
    };
    let ways = [message(Role::User, "And there?"), tool("windy")];
    for (first, second) in [(0, 1), (1, 0), (0, 0), (1, 1)] {
        let recall = Recall::new(1_000_000);
        let mut messages: Vec<Message> = begun.iter().chain([&ways[first]]).cloned().collect();
        let prompt = made(&recall, &messages);
        let answer = says(&language, "An answer");
        messages.push(message(Role::Assistant, &answer.text));
        let known = prompt.known().clone().answered(&messages[4]);
        recall.keep(TenantId(1), KvKey(1), &known, prompt.after(&answer));
        messages[3] = ways[second].clone();
        messages.push(message(Role::User, "Thanks"));
        for end in [4, 6] {
            let (prompt, whole) = (made(&recall, &messages[..end]), made(&Recall::new(0), &messages[..end]));
            assert_eq!(prompt.ids(), whole.ids(), "{first} then {second}, {end} messages");
            let goes_on = prompt.work.rendered_bytes < whole.work.rendered_bytes;
            assert_eq!(goes_on, first == second, "{first} then {second}, {end} messages");
        }
    }
}

/// What happens between two turns.
#[derive(Clone, Debug)]
enum Between {
    Nothing,
    Appended(Role, String),
    Removed(usize),
    Forked(usize),
    Rewritten(usize, String),
}

fn text() -> impl Strategy<Value = String> {
    "[ab😀<|>é_mrtsi ]{0,12}"
}

/// A question, or any messages at all.
fn input() -> impl Strategy<Value = Vec<Message>> {
    let roles = vec![Role::User, Role::User, Role::Assistant, Role::System, Role::Developer, Role::Tool];
    let any = (prop::sample::select(roles), text()).prop_map(|(role, text)| message(role, &text));
    prop_oneof![
        2 => text().prop_map(|text| vec![message(Role::User, &text)]),
        2 => vec(any, 0..4),
    ]
}

fn between() -> impl Strategy<Value = Between> {
    let role = prop::sample::select(vec![Role::User, Role::Assistant, Role::System, Role::Developer]);
    prop_oneof![
        6 => Just(Between::Nothing),
        1 => (role, text()).prop_map(|(role, text)| Between::Appended(role, text)),
        1 => any::<usize>().prop_map(Between::Removed),
        1 => any::<usize>().prop_map(Between::Forked),
        1 => (any::<usize>(), text()).prop_map(|(index, text)| Between::Rewritten(index, text)),
    ]
}

proptest! {
    #[test]
    fn a_prompt_that_goes_on_from_the_last_is_the_one_of_the_whole_history(
        turns in vec((between(), input(), text(), 0..14_usize, any::<bool>(), 0..6_u8), 1..9),
        window in 150..2000_u32,
    ) {
        let mut chat = Chat::new();
        for (between, input, answer, shown, whole, kind) in turns {
            let count = chat.transcript.items.len();
            match between {
                Between::Appended(role, text) => chat.keep(message(role, &text)),
                Between::Removed(index) if count > 0 => {
                    let index = index % count;
                    let rest = chat.transcript.items.iter().enumerate().filter(|(at, _)| *at != index);
                    let keep = chat.transcript.log.standing_for(&chat.language, rest.map(|(_, item)| &item.message));
                    Arc::make_mut(&mut chat.transcript).remove(index, keep);
                    chat.stored.truncate(keep);
                }
                Between::Forked(index) if count > 0 => {
                    let id = chat.transcript.items[index % count].id.clone();
                    chat.transcript = Arc::new(chat.transcript.up_to(&id).unwrap());
                }
                Between::Rewritten(index, text) if count > 0 => {
                    // As when a broken answer is made again.
                    let id = chat.transcript.items[index % count].id.clone();
                    let mut rest = chat.transcript.without(&id);
                    let item = Item { id, message: message(Role::User, &text), status: ItemStatus::Completed };
                    rest.items.push(Arc::new(item));
                    chat.transcript = Arc::new(rest);
                }
                Between::Nothing | Between::Removed(_) | Between::Forked(_) | Between::Rewritten(..) => {}
            }
            let said = said(&chat.language, &answer, shown, whole);
            let rules = match kind {
                0 => PromptRules { instructions: Some(answer.clone()), ..rules() },
                1 => PromptRules { goal: Goal::Encode, ..rules() },
                2 => PromptRules { overflow: Overflow::DropOldest, ..rules() },
                3 => PromptRules { overflow: Overflow::DropOldest, answer: TokenCount(1), ..rules() },
                _ => rules(),
            };
            chat.window = if rules.overflow == Overflow::DropOldest { TokenCount(window) } else { WINDOW };
            // The gate refuses a turn with nothing at all.
            if !(chat.transcript.items.is_empty() && input.is_empty()) {
                chat.turn(&input, &said, rules)?;
            }
        }
    }
}
