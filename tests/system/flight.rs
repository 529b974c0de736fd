//! Does the server's flight record lead to the decisions that it made, over its death too, and without a word of what was
//! said?

use std::path::Path;

use serde_json::Value;

use super::client::{Client, Metrics};
use super::server::{END, Home, Server, eventually, machine, program};
use super::workload::{BLOCK_BYTES, said};

const CONVERSATIONS: usize = 6;
/// A label's page, and a block's bytes.
const SLOT_BYTES: u64 = 4096 + BLOCK_BYTES;

/// Two conversations fit the device, one the host, and a few the disk.
fn pools() -> Vec<String> {
    vec![
        format!("kv.device_bytes={}", 16 * BLOCK_BYTES),
        format!("kv.host_bytes={}", 8 * BLOCK_BYTES),
        format!("kv.disk_bytes={}", 40 * SLOT_BYTES),
    ]
}

fn replay(data: &Path, more: &[&str]) -> Value {
    let mut command = program(&["replay", "--json", "--warm-up", "0", "--data-dir"]);
    let told = command.arg(data).args(more).output().unwrap();
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    serde_json::from_slice(&told.stdout).unwrap()
}

/// Evictions, and prompt tokens that were found on device, host and disk.
fn of_server(metrics: &Metrics) -> [u64; 4] {
    let tokens = |source| metrics.prompt_tokens(source);
    let device = tokens("resident") + tokens("shared");
    [metrics.count("rekindle_evictions_total"), device, tokens("reloaded_host"), tokens("reloaded_disk")]
}

fn of_replay(replayed: &Value) -> [u64; 4] {
    let reusable = replayed["reusable_tokens"].as_f64().unwrap();
    let tokens = |tier: &str| (replayed["hit_share"][tier].as_f64().unwrap() * reusable).round() as u64;
    [replayed["evictions"].as_u64().unwrap(), tokens("device"), tokens("host"), tokens("disk")]
}

async fn talk(client: &Client, ids: &[String], turn: usize) {
    for (conversation, id) in ids.iter().enumerate() {
        client.say(id, &said(conversation, turn)).await;
    }
}

/// Waits until a replay of the record, which is being written, says what the server does; that is what it says then.
async fn agrees(home: &Home, client: &Client, before: [u64; 4]) -> [u64; 4] {
    eventually(END, "the record says what the server says", async || {
        let server = of_server(&client.metrics().await);
        let both: [u64; 4] = std::array::from_fn(|index| before[index] + server[index]);
        (of_replay(&replay(&home.data(), &[])) == both).then_some(both)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_decides_what_the_server_decided_before_and_after_kill_9() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &pools());
    let client = Client::of(&server.url);
    let mut ids = Vec::new();
    for _ in 0..CONVERSATIONS {
        ids.push(client.conversation().await);
    }
    talk(&client, &ids, 0).await;
    talk(&client, &ids, 1).await;
    let killed = agrees(&home, &client, [0; 4]).await;
    server.kill();

    let server = Server::start(&home, &pools());
    let client = Client::of(&server.url);
    talk(&client, &ids, 2).await;
    let both = agrees(&home, &client, killed).await;
    assert!(killed[0] > 0 && both[0] > killed[0] && both[1] > 0 && both[2] + both[3] > 0, "{killed:?}, {both:?}");
    assert_eq!(client.metrics().await.count("rekindle_flight_record_lost_steps_total"), 0);
    server.finish().await;

    let replayed = replay(&home.data(), &["--journal", "1000"]);
    assert_eq!(of_replay(&replayed), both, "at the end");
    let record = &replayed["record"];
    assert_eq!((&record["replayed"], &record["runs"]), (&"as_recorded".into(), &2.into()), "{record}");
    assert_eq!(record["faults"], serde_json::json!([]));
    assert!(replayed["journal"].as_array().unwrap().len() as u64 >= both[0]);
    // With room for all, nothing would have gone.
    let roomy = replay(&home.data(), &["--device-tokens", "100000"]);
    assert_eq!((&roomy["record"]["replayed"], &roomy["evictions"]), (&"what_if".into(), &0.into()));

    for file in std::fs::read_dir(home.data().join("flight")).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        for conversation in 0..CONVERSATIONS {
            for word in said(conversation, 0).split(' ').filter(|word| word.len() > 4) {
                assert!(!text.contains(word), "`{word}` is in the record");
            }
        }
    }
}
