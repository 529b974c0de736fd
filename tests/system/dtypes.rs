//! Does a server answer, and its KV come back, where keys and values are stored in fewer bits?

use std::time::Duration;

use serde_json::Value;

use super::client::Client;
use super::server::{Home, Server, eventually, machine};
use super::workload::{BLOCK_BYTES, said};

const TURNS: usize = 3;
/// Within this what a turn left is copied down.
const COPIED: Duration = Duration::from_secs(20);
/// Of 16 tokens: a byte a number, and a scale of two bytes for each token and head.
const INT8_BLOCK_BYTES: u64 = 16 * 30 * 2 * 3 * (64 + 2);

fn settings(pairs: &[&str]) -> Vec<String> {
    let pools = ["kv.device_bytes=64MiB", "kv.host_bytes=64MiB"];
    pools.iter().chain(pairs).map(|pair| (*pair).to_owned()).collect()
}

async fn residency(client: &Client, id: &str) -> Value {
    client.json(client.get(&format!("/v1/conversations/{id}/residency"))).await
}

/// What a tier has of a conversation: tokens, and bytes.
fn held(residency: &Value, tier: &str) -> (u64, u64) {
    let share = &residency["tiers"][tier];
    let of = |key: &str| share[key].as_u64().unwrap();
    (of("tokens"), of("bytes_private") + of("bytes_shared"))
}

/// Waits until a tier has all full blocks of a conversation; their tokens.
async fn copied(client: &Client, id: &str, tier: &str) -> u64 {
    eventually(COPIED, "the conversation is copied down", async || {
        let seen = residency(client, id).await;
        let full = held(&seen, "device").0 / 16 * 16;
        (full > 0 && held(&seen, tier).0 >= full).then_some(full)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_int8_takes_half_the_bytes_and_gives_the_same_answers_after_a_reload() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &settings(&["kv.dtype=int8"]));
    let client = Client::of(&server.url);
    let mut last = Vec::new();
    for is_offloaded in [false, true] {
        let id = client.conversation().await;
        for turn in 0..TURNS {
            if is_offloaded && turn + 1 == TURNS {
                copied(&client, &id, "host").await;
                client.offload(&id, "host").await;
            }
            let answer = client.say(&id, &said(0, turn)).await;
            if turn + 1 == TURNS {
                last.push(answer);
            }
        }
        let (tokens, bytes) = held(&residency(&client, &id).await, "device");
        assert_eq!(bytes, tokens.div_ceil(16) * INT8_BLOCK_BYTES);
        assert!(bytes * 100 <= tokens.div_ceil(16) * BLOCK_BYTES * 53);
        client.delete_conversation(&id).await;
    }
    assert!(last[1].usage.reloaded > 0, "{:?}", last[1].usage);
    // What is int8 on the device goes down and comes up as it is.
    last[1].assert_same(&last[0], "after a reload");
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_int8_below_the_device_comes_back_from_host_and_after_kill_9_from_disk() {
    let _alone = machine().await;
    let home = Home::new();
    let with_disk = settings(&["kv.cold_dtype=int8", "kv.disk_bytes=64MiB"]);
    let server = Server::start(&home, &with_disk);
    let client = Client::of(&server.url);
    let id = client.conversation().await;
    client.say(&id, &said(0, 0)).await;
    copied(&client, &id, "host").await;
    let seen = residency(&client, &id).await;
    let (device, host) = (held(&seen, "device"), held(&seen, "host"));
    assert_eq!(device.1, device.0.div_ceil(16) * BLOCK_BYTES);
    assert_eq!(host.1, host.0.div_ceil(16) * INT8_BLOCK_BYTES);
    client.offload(&id, "host").await;
    let answer = client.say(&id, &said(0, 1)).await;
    // The last block, which was not full, too.
    assert!(answer.usage.reloaded >= host.0, "{:?} of {host:?}", answer.usage);
    let tokens = copied(&client, &id, "disk").await;
    server.kill();

    let server = Server::start(&home, &with_disk);
    let client = Client::of(&server.url);
    assert_eq!(held(&residency(&client, &id).await, "disk"), (tokens, tokens / 16 * INT8_BLOCK_BYTES));
    let answer = client.say(&id, &said(0, 2)).await;
    assert_eq!(answer.usage.reloaded, tokens, "{:?}", answer.usage);
    assert!(!answer.text.is_empty());
    let metrics = client.metrics().await;
    assert_eq!(metrics.prompt_tokens("reloaded_disk"), tokens);
    assert_eq!(metrics.count("rekindle_verification_failures_total"), 0);
    server.finish().await;
}
