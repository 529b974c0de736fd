//! Does KV on disk survive the end of the process, prove what it is, and go when its conversation is deleted?

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use super::client::{Answer, Client};
use super::server::{Home, Server, eventually, machine};
use super::workload::{BLOCK_BYTES, said};

const TURNS: usize = 3;
/// Within this what a turn left is on disk.
const STORED: Duration = Duration::from_secs(20);
/// A label's page, and a block's bytes.
const SLOT_BYTES: u64 = 4096 + BLOCK_BYTES;
const SLOTS: u64 = 200;

fn with_disk() -> Vec<String> {
    vec![
        format!("kv.device_bytes={}", 400 * BLOCK_BYTES),
        format!("kv.host_bytes={}", 400 * BLOCK_BYTES),
        format!("kv.disk_bytes={}", SLOTS * SLOT_BYTES),
    ]
}

fn slots(home: &Home) -> PathBuf {
    home.data().join("kv/slots.0000")
}

async fn turns(client: &Client, id: &str, turns: std::ops::Range<usize>) -> Vec<Answer> {
    let mut answers = Vec::new();
    for turn in turns {
        answers.push(client.say(id, &said(0, turn)).await);
    }
    answers
}

/// Waits until all full blocks of a conversation are on disk; their tokens.
async fn stored(client: &Client, id: &str) -> u64 {
    eventually(STORED, "the conversation is on disk", async || {
        let seen = client.json(client.get(&format!("/v1/conversations/{id}/residency"))).await;
        let tokens = |tier: &str| seen["tiers"][tier]["tokens"].as_u64().unwrap();
        let full = tokens("device") / 16 * 16;
        (full > 0 && tokens("disk") == full).then_some(full)
    })
    .await
}

/// A conversation of all turns but the last on a server that is killed then; its tokens on disk.
async fn killed_before_the_last_turn(home: &Home) -> (String, u64) {
    let server = Server::start(home, &with_disk());
    let client = Client::of(&server.url);
    let id = client.conversation().await;
    turns(&client, &id, 0..TURNS - 1).await;
    let tokens = stored(&client, &id).await;
    server.kill();
    (id, tokens)
}

/// The last answer of a conversation that nothing happened to.
async fn undisturbed() -> Answer {
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let id = client.conversation().await;
    let answer = turns(&client, &id, 0..TURNS).await.pop().unwrap();
    server.finish().await;
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn after_kill_9_a_conversation_comes_back_from_disk_and_a_deleted_one_leaves_nothing_there() {
    let _alone = machine().await;
    let expected = undisturbed().await;
    let home = Home::new();
    let (id, tokens) = killed_before_the_last_turn(&home).await;

    let server = Server::start(&home, &with_disk());
    let client = Client::of(&server.url);
    let seen = client.json(client.get(&format!("/v1/conversations/{id}/residency"))).await;
    assert_eq!((&seen["state"], &seen["tiers"]["disk"]["tokens"]), (&"offloaded".into(), &tokens.into()));
    let answer = turns(&client, &id, TURNS - 1..TURNS).await.pop().unwrap();
    answer.assert_same(&expected, "after a restart");
    assert_eq!(answer.usage.reloaded, tokens, "{:?}", answer.usage);
    assert_eq!(client.metrics().await.prompt_tokens("reloaded_disk"), tokens);

    // Down to disk and to none above, and up again.
    stored(&client, &id).await;
    assert_eq!(client.offload(&id, "disk").await["to"], "disk");
    let seen = client.json(client.get(&format!("/v1/conversations/{id}/residency"))).await;
    let tier = |tier: &str| seen["tiers"][tier]["tokens"].as_u64().unwrap();
    assert_eq!((tier("device"), tier("host")), (0, 0));
    let disk = tier("disk");
    let next = client.say(&id, "And now?").await;
    assert_eq!(next.usage.reloaded, disk, "{:?}", next.usage);

    let whole = client.json(client.delete(&format!("/v1/conversations/{id}"))).await;
    let proof = &whole["rekindle"];
    assert!(proof["freed"]["disk_bytes"].as_u64() > Some(0), "{whole}");
    assert_eq!(proof["remaining_bytes"], 0);
    let bytes = std::fs::read(slots(&home)).unwrap();
    assert_eq!(bytes.len() as u64, SLOTS * SLOT_BYTES);
    assert!(bytes.iter().all(|byte| *byte == 0), "something of a deleted conversation is on disk");
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_damaged_on_disk_is_noticed_and_encoded_again() {
    let _alone = machine().await;
    let expected = undisturbed().await;
    let home = Home::new();
    let (id, tokens) = killed_before_the_last_turn(&home).await;
    // One byte in the middle of each slot that holds something.
    let file = OpenOptions::new().read(true).write(true).open(slots(&home)).unwrap();
    for slot in 0..SLOTS {
        let (mut byte, at) = ([0], slot * SLOT_BYTES + 4096 + BLOCK_BYTES / 2);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
    drop(file);

    let server = Server::start(&home, &with_disk());
    let client = Client::of(&server.url);
    let answer = turns(&client, &id, TURNS - 1..TURNS).await.pop().unwrap();
    answer.assert_same(&expected, "over a damaged disk");
    assert_eq!(answer.usage.reloaded, 0);
    assert!(answer.usage.reencoded >= tokens, "{:?}", answer.usage);
    let metrics = client.metrics().await;
    let (failures, bad) =
        (metrics.count("rekindle_verification_failures_total"), metrics.count("rekindle_disk_bad_slots"));
    assert_eq!((failures, bad), (tokens / 16, tokens / 16), "each is counted, and its slot not used again");
    let told = home.logged().lines().filter(|line| line.contains("is not what it should be")).count();
    assert_eq!(told, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_tier_that_can_not_be_used_is_left_out_and_said_so() {
    let _alone = machine().await;
    let home = Home::new();
    let folder = home.data().with_file_name("elsewhere");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("letters.txt"), "Dear Ann,").unwrap();
    let mut settings = with_disk();
    settings.push(format!("kv.disk_dir={}", folder.display()));
    let server = Server::start(&home, &settings);
    let client = Client::of(&server.url);
    let id = client.conversation().await;
    client.say(&id, "Hello.").await;
    assert_eq!(client.metrics().await.count("rekindle_disk_tier_up"), 0);
    let refused = client
        .post(&format!("/v1/conversations/{id}/offload"), &serde_json::json!({"to": "disk"}))
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), 400);
    let log = home.logged();
    assert!(log.contains("the disk tier is left out") && log.contains("holds other things than a tier"), "{log}");
    assert_eq!(std::fs::read_to_string(folder.join("letters.txt")).unwrap(), "Dear Ann,");
}
