//! What does the server do for a turn before the model runs, after 10, 100 and 1,000 turns?
//!
//! The session's side of it, on the real model's template and vocabulary (`make test` fetches it, or set
//! REKINDLE_TEST_MODEL): prompt, hashes of its blocks, and afterwards the log with the answer. Going on from the turn before,
//! and, beside it, with all that was known of it forgotten: the whole history rendered, compared and hashed, as in the first
//! turn after a restart.

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use rekindle::engine::{HashedPrompt, Language};
use rekindle::model::weights::WeightFile;
use rekindle::sessions::messages::{Goal, Item, ItemStatus, Message, Overflow, Part, Role};
use rekindle::sessions::prompt::{Draft, Prompt, PromptRules};
use rekindle::sessions::speech::Said;
use rekindle::sessions::token_log::TokenLog;
use rekindle::sessions::transcript::Transcript;
use rekindle::store::LogToken;
use rekindle::types::{BlockSize, TenantKey, TokenCount};

/// As in the server.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const KEY: TenantKey = TenantKey([9; 32]);
const QUESTION: &str = "Could you tell me, in a sentence or two, how that came about and what followed from it?";
const ANSWER: &str = "It began with a small change that nobody thought much of, and within a year it had become the way in \
                      which everyone worked, so that the old one was soon forgotten.";

fn language() -> Language {
    let path = std::env::var_os("REKINDLE_TEST_MODEL").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    let file = WeightFile::open(&path).expect("the test model; `make test` fetches it");
    Language::from_metadata(file.metadata()).expect("a language")
}

fn message(role: Role, text: &str) -> Message {
    Message::new(role, vec![Part::Text(text.to_owned())])
}

fn item(id: usize, message: Message) -> Arc<Item> {
    Arc::new(Item { id: format!("msg_{id}"), message, status: ItemStatus::Completed })
}

fn prompt(language: &Language, transcript: &Arc<Transcript>, question: &str) -> Prompt {
    let rules = PromptRules {
        instructions: None,
        overflow: Overflow::Refuse,
        goal: Goal::Answer,
        answer: TokenCount(256),
        arguments: Vec::new(),
    };
    let draft = Draft {
        language,
        tenant_key: KEY,
        empty: HashedPrompt::empty(KEY, BlockSize(16)),
        window: TokenCount(1_000_000),
        transcript: Arc::clone(transcript),
        input: Arc::from([message(Role::User, question)]),
        rules,
    };
    draft.make(|_| None).expect("a prompt")
}

/// The answer, as the model would have said it.
fn said(language: &Language) -> Said {
    let history = Arc::new(Transcript { items: vec![item(0, message(Role::User, ANSWER))], ..Transcript::default() });
    let (log, ..) = prompt(language, &history, "").answered(&Said::default());
    let text = log.from(0).filter(|token| !language.is_control(token.id));
    Said { tokens: text.take(40).collect::<Vec<LogToken>>(), text: ANSWER.to_owned(), ..Said::default() }
}

/// A conversation of this many turns.
fn chat(language: &Language, said: &Said, turns: usize) -> Transcript {
    let mut chat = Arc::new(Transcript::default());
    for turn in 0..turns {
        let question = format!("{turn}: {QUESTION}");
        let made = prompt(language, &chat, &question);
        let answer = message(Role::Assistant, ANSWER);
        let (log, _, known) = made.answered(said);
        let chat = Arc::make_mut(&mut chat);
        chat.items.extend([item(2 * turn, message(Role::User, &question)), item(2 * turn + 1, answer.clone())]);
        chat.take(log, known.answered(&answer));
    }
    Arc::unwrap_or_clone(chat)
}

fn turns(c: &mut Criterion) {
    let language = language();
    let said = said(&language);
    let mut group = c.benchmark_group("a turn before the model runs");
    for turns in [10, 100, 1000] {
        let known = chat(&language, &said, turns);
        let stored: Vec<LogToken> = known.log.from(0).collect();
        let log = TokenLog::new(stored, known.log.encoded());
        let forgotten = Arc::new(Transcript { log, known: None, ..known.clone() });
        let known = Arc::new(known);
        let turn = |chat: &Arc<Transcript>| black_box(prompt(&language, chat, QUESTION).answered(&said));
        group.bench_function(BenchmarkId::new("going on", turns), |b| b.iter(|| turn(&known)));
        group.bench_function(BenchmarkId::new("whole history", turns), |b| b.iter(|| turn(&forgotten)));
        // The one part that a longer history does make longer.
        let ids = prompt(&language, &known, QUESTION).ids().to_vec();
        group.bench_function(BenchmarkId::new("copying the tokens", turns), |b| b.iter(|| black_box(ids.clone())));
    }
}

criterion_group!(benches, turns);
criterion_main!(benches);
