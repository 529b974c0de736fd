//! What happens when a client goes away, and when the server is told to?

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::client::Client;
use super::server::{END, Home, Server, eventually, machine};
use super::workload::BLOCK_BYTES;

/// Memory for a long answer.
fn pools() -> [String; 2] {
    [format!("kv.device_bytes={}", 128 * BLOCK_BYTES), "kv.host_bytes=0".to_owned()]
}

/// Bytes of a response's stream as they come.
struct Stream {
    response: reqwest::Response,
    heard: String,
}

impl Stream {
    async fn open(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        assert!(response.status().is_success(), "{}", response.status());
        Self { response, heard: String::new() }
    }

    /// Reads on until this was said.
    async fn until(&mut self, word: &str) {
        while !self.heard.contains(word) {
            let piece = self.response.chunk().await.unwrap();
            let piece = piece.unwrap_or_else(|| panic!("the stream ended without {word}"));
            self.heard += std::str::from_utf8(&piece).unwrap();
        }
    }

    async fn rest(mut self) -> String {
        while let Some(piece) = self.response.chunk().await.unwrap() {
            self.heard += std::str::from_utf8(&piece).unwrap();
        }
        self.heard
    }
}

fn long_chat() -> Value {
    json!({
        "model": "unknown",
        "messages": [{"role": "user", "content": "Count upwards from one, and never stop."}],
        "max_tokens": 1500, "temperature": 0, "ignore_eos": true, "stream": true,
    })
}

async fn with_served_model(client: &Client, mut body: Value) -> Value {
    let models = client.json(client.get("/v1/models")).await;
    body["model"] = models["data"][0]["id"].clone();
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_ends_its_generation_within_a_second() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &pools());
    let client = Client::of(&server.url);
    let all_free = client.metrics().await.free_bytes("device");

    let mut stream =
        Stream::open(client.post("/v1/chat/completions", &with_served_model(&client, long_chat()).await)).await;
    stream.until("{\"content\":\"").await;
    assert_eq!(client.metrics().await.count("rekindle_engine_running_turns"), 1);
    drop(stream);
    let left = Instant::now();
    at_rest(&client, 1).await;
    println!("a chat's turn ended {:?} after its client had gone", left.elapsed());

    // The same in a conversation; deleting that leaves no byte behind.
    let id = client.conversation().await;
    let body = json!({"conversation": id, "input": "Count upwards from one, and never stop.", "temperature": 0,
        "ignore_eos": true, "max_output_tokens": 1500, "stream": true});
    let mut stream = Stream::open(client.post("/v1/responses", &body)).await;
    stream.until("response.output_text.delta").await;
    drop(stream);
    at_rest(&client, 2).await;
    // What was said is kept, as incomplete, once it is durable.
    let kept = eventually(Duration::from_secs(5), "the cut answer is kept", async || {
        let list = client.json(client.get(&format!("/v1/conversations/{id}/items?order=asc"))).await;
        list["data"].get(1).cloned()
    });
    let kept = kept.await;
    assert_eq!((kept["role"].as_str(), kept["status"].as_str()), (Some("assistant"), Some("incomplete")));

    client.delete_conversation(&id).await;
    let free = client.metrics().await.free_bytes("device");
    let ended_chat = 10 * BLOCK_BYTES;
    assert!(free + ended_chat >= all_free, "{} bytes are still held", all_free - free);
    server.finish().await;
}

/// Waits until so many turns are cancelled and nothing runs; within a second, or the test fails.
async fn at_rest(client: &Client, cancelled: u64) {
    eventually(Duration::from_secs(1), "the turn is cancelled and nothing runs", async || {
        let metrics = client.metrics().await;
        let idle = metrics.count("rekindle_engine_running_turns") + metrics.count("rekindle_engine_queued_turns") == 0;
        (idle && metrics.turns("cancelled") == cancelled).then_some(())
    })
    .await;
    let before = client.metrics().await;
    let after = client.metrics().await;
    assert_eq!(before.count("rekindle_engine_steps_total"), after.count("rekindle_engine_steps_total"));
    assert_eq!(before.free_bytes("device"), after.free_bytes("device"));
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_end_the_server_finishes_what_runs_refuses_what_comes_and_exits_with_0() {
    let _alone = machine().await;
    let home = Home::new();
    let mut server = Server::start(&home, &pools());
    let client = Client::of(&server.url);
    let (running, late) = (client.conversation().await, client.conversation().await);
    let body = json!({"conversation": running, "input": "Count upwards from one.", "temperature": 0,
        "ignore_eos": true, "max_output_tokens": 96, "stream": true});
    let mut stream = Stream::open(client.post("/v1/responses", &body)).await;
    stream.until("response.output_text.delta").await;

    server.terminate();
    let refused = eventually(Duration::from_secs(5), "new turns are refused", async || {
        let response = client.turn(&late, Some("Am I late?")).send().await.unwrap();
        (!response.status().is_success()).then_some(response)
    });
    let refused = refused.await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"), "{:?}", refused.headers());
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "draining");
    let ready = client.get("/readyz").send().await.unwrap();
    assert_eq!(ready.status(), 503);

    let heard = stream.rest().await;
    assert_eq!(heard.matches("event: response.incomplete\n").count(), 1, "{heard}");
    assert!(heard.contains("\"output_tokens\":96"), "the answer was cut short: {heard}");
    let status = server.ended(END).await;
    assert_eq!(status.code(), Some(0));
    home.assert_nothing_odd_was_logged();

    // What was said before is there afterwards.
    let server = Server::start(&home, &pools());
    let client = Client::of(&server.url);
    let items = client.items(&running).await;
    assert_eq!(items.iter().map(|item| item.role.as_str()).collect::<Vec<_>>(), ["user", "assistant"]);
    println!("a second start took {:?}", server.start_time);
    assert!(server.start_time < Duration::from_secs(10), "a start took {:?}", server.start_time);
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_on_a_taken_port_or_folder_says_so_and_fails() {
    let _alone = machine().await;
    let (home, other) = (Home::new(), Home::new());
    let server = Server::start(&home, &pools());
    let address = server.url.strip_prefix("http://").unwrap().to_owned();

    let taken_port = other.serve_at(&address, &pools()).stdout(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&taken_port.stderr);
    assert!(!taken_port.status.success());
    assert!(said.contains(&format!("can't listen on {address}: another process does")), "{said}");

    let taken_folder = home.serve(&pools()).stdout(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&taken_folder.stderr);
    assert!(!taken_folder.status.success());
    assert!(said.contains(&*home.data().to_string_lossy()) && !said.contains("panicked"), "{said}");
    server.finish().await;
}
