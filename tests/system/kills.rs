//! Is anything lost, doubled or wrong after a process that was killed again and again in the middle of its work?
//!
//! A few times here; two hundred times when `REKINDLE_SOAK=1`.

use std::time::{Duration, Instant};

use super::client::{Answer, Client};
use super::server::{Home, Server, machine};
use super::workload::{BLOCK_BYTES, Workload, is_soak, said, undisturbed};

/// Conversations that talk at a time.
const CHATS: usize = 6;
const SLOT_BYTES: u64 = 4096 + BLOCK_BYTES;

/// Not all of them fit the device, fewer the host, and all the disk.
fn pools(workload: Workload) -> Vec<String> {
    let blocks = workload.conversation_blocks();
    vec![
        format!("kv.device_bytes={}", 3 * blocks * BLOCK_BYTES),
        format!("kv.host_bytes={}", 2 * blocks * BLOCK_BYTES),
        format!("kv.disk_bytes={}", 4 * CHATS as u64 * blocks * SLOT_BYTES),
    ]
}

/// One client, which has a conversation of the workload after another.
struct Chat {
    /// Which conversation of the workload it has.
    script: usize,
    id: Option<String>,
    /// Answers that it heard, which must be there whatever happens.
    heard: usize,
    /// Its conversation's end was asked for.
    deleting: bool,
    turns: usize,
    from_disk: u64,
    wrong: Vec<String>,
}

impl Chat {
    /// Talks until the server dies.
    async fn talk(mut self, client: Client, workload: Workload, expected: &'static [Vec<Answer>]) -> Self {
        while self.step(&client, workload, &expected[self.script]).await.is_some() {}
        self
    }

    fn next(&mut self, workload: Workload) {
        (self.id, self.heard, self.deleting) = (None, 0, false);
        self.script = (self.script + CHATS) % workload.conversations;
    }

    /// One turn, or the end of a conversation and the begin of the next. `None`: the server is gone.
    async fn step(&mut self, client: &Client, workload: Workload, expected: &[Answer]) -> Option<()> {
        let Some(id) = self.id.clone() else {
            let made = client.post("/v1/conversations", &serde_json::json!({})).send().await.ok()?;
            let made: serde_json::Value = made.json().await.ok()?;
            self.id = Some(made["id"].as_str()?.to_owned());
            return Some(());
        };
        let path = format!("/v1/conversations/{id}/items?order=asc&limit=100");
        let page = client.get(&path).send().await.ok()?;
        if page.status() == 404 && self.deleting {
            // Deleted, and the answer to that was lost.
            self.next(workload);
            return Some(());
        }
        let page: serde_json::Value = page.json().await.ok()?;
        let stored = page["data"].as_array()?;
        let text = |index: usize| stored[index]["content"][0]["text"].as_str().unwrap_or_default().to_owned();
        for index in 0..stored.len() {
            let right = if index % 2 == 0 { said(self.script, index / 2) } else { expected[index / 2].text.clone() };
            if text(index) != right {
                self.wrong.push(format!("item {index} of {id} is {:?}, not {right:?}", text(index)));
            }
        }
        if stored.len() / 2 < self.heard {
            self.wrong.push(format!(
                "{} answers of {id} were heard, and {} items are stored",
                self.heard,
                stored.len()
            ));
        }
        let turn = stored.len() / 2;
        if turn == workload.turns {
            self.deleting = true;
            let deleted = client.delete(&format!("/v1/conversations/{id}")).send().await.ok()?;
            if deleted.status().is_success() {
                self.next(workload);
            }
            return Some(());
        }
        // A message whose answer was lost is there: it is answered, not sent again.
        let asked = stored.len().is_multiple_of(2).then(|| said(self.script, turn));
        let answer = client.try_turn(&id, asked.as_deref()).await.ok()?;
        if answer.text != expected[turn].text || answer.tokens != expected[turn].tokens {
            self.wrong.push(format!("turn {turn} of {id} is {:?}, not {:?}", answer.text, expected[turn].text));
        }
        self.heard = turn + 1;
        self.turns += 1;
        self.from_disk += answer.usage.reloaded;
        Some(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_again_and_again_loses_nothing_and_makes_nothing_wrong() {
    let _alone = machine().await;
    let kills = if is_soak() { 200 } else { 4 };
    let (workload, expected) = (Workload::chosen(), undisturbed().await);
    let home = Home::new();
    let chat = |script| Chat { script, id: None, heard: 0, deleting: false, turns: 0, from_disk: 0, wrong: Vec::new() };
    let mut chats: Vec<Chat> = (0..CHATS).map(chat).collect();
    let (started, mut failures) = (Instant::now(), 0);
    for kill in 0..kills {
        let server = Server::start(&home, &pools(workload));
        let client = Client::of(&server.url);
        let talks: Vec<_> =
            chats.drain(..).map(|chat| tokio::spawn(chat.talk(client.clone(), workload, expected))).collect();
        // At a moment that nobody chose: sooner or later in a turn, a store, an erasure, a commit.
        let moment = Duration::from_millis(200 + (kill * 379 + 97) % 1800);
        tokio::time::sleep(moment).await;
        failures += client.metrics().await.count("rekindle_verification_failures_total");
        server.kill();
        for talk in talks {
            chats.push(talk.await.expect("a client panicked"));
        }
    }
    // The last server is not killed: all that is begun is ended, and deleted.
    let server = Server::start(&home, &pools(workload));
    let client = Client::of(&server.url);
    for chat in &mut chats {
        while chat.id.is_some() {
            let script = chat.script;
            chat.step(&client, workload, &expected[script]).await.expect("the server answers");
        }
    }
    let wrong: Vec<_> = chats.iter().flat_map(|chat| &chat.wrong).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let sum = |of: fn(&Chat) -> u64| chats.iter().map(of).sum::<u64>();
    let (turns, reloaded) = (sum(|chat| chat.turns as u64), sum(|chat| chat.from_disk));
    println!("{kills} kills in {:?}: {turns} answers, {reloaded} tokens reloaded", started.elapsed());
    assert!(turns > kills && reloaded > 0, "too little happened to show anything");
    failures += client.metrics().await.count("rekindle_verification_failures_total");
    assert_eq!(failures, 0, "a block on disk was not what its label says");
    let slots = std::fs::read(home.data().join("kv/slots.0000")).unwrap();
    assert!(slots.iter().all(|byte| *byte == 0), "something of a deleted conversation is on disk");
    server.finish().await;
}
