//! Which conversations do the tests have, and what does each say?
//!
//! Many short ones, each unlike the others from its first word on, so that they share no more than what the chat template
//! puts in front of all.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::{Mutex, OnceCell};

use super::client::{Answer, Client};
use super::server::{Home, Server};

/// KV of a token of SmolLM2-135M: 30 layers, K and V, 3 heads of 64 f16 values.
pub const TOKEN_BYTES: u64 = 30 * 2 * 3 * 64 * 2;
/// 16 tokens.
pub const BLOCK_BYTES: u64 = 16 * TOKEN_BYTES;
/// Clients at a time.
const CLIENTS: usize = 8;

/// How much is talked.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub conversations: usize,
    pub turns: usize,
}

impl Workload {
    /// Short, or the whole length when `REKINDLE_SOAK=1`.
    pub fn chosen() -> Self {
        if is_soak() { Self { conversations: 64, turns: 6 } } else { Self { conversations: 16, turns: 4 } }
    }

    /// Blocks that hold a conversation to its end: the template's opening, and a message and an answer a turn.
    pub fn conversation_blocks(self) -> u64 {
        const OPENING_TOKENS: u64 = 40;
        const TURN_TOKENS: u64 = 32;
        (OPENING_TOKENS + TURN_TOKENS * self.turns as u64).div_ceil(16)
    }

    /// `--set` pairs for pools that hold this many conversations; `None`: all, with room to spare.
    pub fn pools(self, device_conversations: Option<usize>, host_conversations: usize) -> [String; 2] {
        let bytes = |conversations: usize| conversations as u64 * self.conversation_blocks() * BLOCK_BYTES;
        [
            format!("kv.device_bytes={}", bytes(device_conversations.unwrap_or(2 * self.conversations))),
            format!("kv.host_bytes={}", bytes(host_conversations)),
        ]
    }
}

pub fn is_soak() -> bool {
    std::env::var("REKINDLE_SOAK").is_ok_and(|value| value == "1")
}

/// What the user says in a turn of a conversation: 6 to 12 words.
pub fn said(conversation: usize, turn: usize) -> String {
    const WHAT: [&str; 8] = ["rivers", "clocks", "bridges", "whales", "kites", "volcanoes", "violins", "bees"];
    const WHERE: [&str; 8] = ["Norway", "Peru", "Kenya", "Japan", "Malta", "Chile", "Nepal", "Iceland"];
    let (what, place) = (WHAT[conversation % 8], WHERE[conversation / 8 % 8]);
    match turn % 3 {
        0 => format!("{what} of {place}: tell me one thing about them."),
        1 => format!("Why is that so for {what}, in short?"),
        _ => format!("And what would a child in {place} ask?"),
    }
}

/// The answers of the workload on a server that never had to make room, one conversation after another. By
/// conversation, then turn. Made once for all tests.
pub async fn undisturbed() -> &'static Vec<Vec<Answer>> {
    static ANSWERS: OnceCell<Vec<Vec<Answer>>> = OnceCell::const_new();
    ANSWERS.get_or_init(talk_undisturbed).await
}

async fn talk_undisturbed() -> Vec<Vec<Answer>> {
    let workload = Workload::chosen();
    let home = Home::new();
    let server = Server::start(&home, &workload.pools(None, 0));
    let client = Client::of(&server.url);
    let mut answers = Vec::new();
    for conversation in 0..workload.conversations {
        let id = client.conversation().await;
        let mut said_back = Vec::new();
        for turn in 0..workload.turns {
            said_back.push(client.say(&id, &said(conversation, turn)).await);
        }
        answers.push(said_back);
    }
    let metrics = client.metrics().await;
    assert_eq!(metrics.count("rekindle_evictions_total"), 0, "a pool with room for all evicted");
    server.finish().await;
    answers
}

/// Does one piece of work for each conversation of a list, with as many at a time as there are clients.
pub async fn among_clients<T, F>(count: usize, work: impl Fn(usize) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let waiting: VecDeque<_> = (0..count).map(|index| (index, work(index))).collect();
    let waiting = Arc::new(Mutex::new(waiting));
    let clients = (0..CLIENTS).map(|_| {
        let waiting = Arc::clone(&waiting);
        tokio::spawn(async move {
            let mut done = Vec::new();
            loop {
                let next = waiting.lock().await.pop_front();
                let Some((index, work)) = next else { return done };
                done.push((index, work.await));
            }
        })
    });
    let mut done = Vec::new();
    for client in clients.collect::<Vec<_>>() {
        done.extend(client.await.expect("a client panicked"));
    }
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}
