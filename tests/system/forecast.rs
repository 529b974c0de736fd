//! Does a conversation come back in the time that its residency foretold?
//!
//! Conversations of several lengths come back by each way, one after another. What was foretold just before a turn is
//! held against the turn's own account of the way that it took.

use std::time::Duration;

use serde_json::Value;

use super::client::Client;
use super::server::{Home, Server, eventually, machine};
use super::workload::said;

/// Messages, of about nine tokens each, that a conversation begins with.
const LENGTHS: [usize; 4] = [50, 110, 200, 340];
const ROUNDS: usize = 2;
/// The middle one of all forecasts may be off by this part of what it took.
const OFF_AT_MOST: f64 = 0.3;
/// What took less is not counted: the figures are whole milliseconds.
const LEAST_MS: f64 = 20.0;
/// Within this what a turn left is on disk.
const STORED: Duration = Duration::from_secs(20);

async fn residency(client: &Client, id: &str) -> Value {
    client.json(client.get(&format!("/v1/conversations/{id}/residency"))).await
}

/// Waits until nothing of a conversation is being copied any more.
async fn settled(client: &Client, id: &str) {
    eventually(STORED, "the conversation is on disk", async || {
        let seen = residency(client, id).await;
        let tokens = |tier: &str| seen["tiers"][tier]["tokens"].as_u64().unwrap();
        (tokens("device") > 0 && tokens("disk") == tokens("device") / 16 * 16).then_some(())
    })
    .await;
}

/// The forecast of the way that a turn took, and the time that its history took by its account: until the first token,
/// less what of encoding was the new message's.
fn foretold_and_taken(predicted: &Value, usage: &Value) -> (Option<f64>, f64) {
    let of = |key: &str| usage[key].as_f64().unwrap();
    let new_part = 1.0 - of("reencoded_tokens") / of("encoded_tokens");
    let taken = of("ttft_ms") - of("queue_ms") - of("prefill_ms") * new_part;
    let way = if usage["decision"] == "reencode" { "reencode_ms" } else { "reload_ms" };
    (predicted[way].as_f64(), taken)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_middle_forecast_is_within_thirty_percent_of_what_happens() {
    let _alone = machine().await;
    let home = Home::new();
    let settings = ["kv.device_bytes=1GiB", "kv.host_bytes=1GiB", "kv.disk_bytes=1GiB"].map(str::to_owned);
    let server = Server::start(&home, &settings);
    let client = Client::of(&server.url);
    let mut ids = Vec::new();
    for (number, messages) in LENGTHS.into_iter().enumerate() {
        let text: Vec<String> = (0..messages).map(|message| said(number + message, message)).collect();
        let id = client.conversation().await;
        client.say(&id, &text.join(" ")).await;
        ids.push(id);
    }
    let mut offs = Vec::new();
    for round in 0..ROUNDS {
        for way in ["resident", "host", "disk", "none"] {
            for id in &ids {
                settled(&client, id).await;
                if way != "resident" {
                    client.offload(id, way).await;
                }
                let predicted = residency(&client, id).await["predicted"].clone();
                let answer = client.json(client.turn(id, Some(&said(0, round)))).await;
                let usage = &answer["usage"]["rekindle"];
                let (foretold, taken) = foretold_and_taken(&predicted, usage);
                println!("{way}: {predicted}, then {usage}");
                if taken >= LEAST_MS && way != "resident" {
                    // Of the first load nothing is known yet.
                    let Some(foretold) = foretold else { continue };
                    offs.push((foretold - taken).abs() / taken);
                }
            }
        }
    }
    offs.sort_unstable_by(f64::total_cmp);
    println!("off by, in order: {offs:.2?}");
    assert!(offs.len() >= LENGTHS.len() * ROUNDS, "all that was encoded again counts: {offs:?}");
    let middle = offs[offs.len() / 2];
    assert!(middle <= OFF_AT_MOST, "{middle} of {offs:?}");
    server.finish().await;
}
