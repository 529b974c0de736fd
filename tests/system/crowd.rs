//! Do 500 clients at once, some of whom never read, leave the others and the server's memory alone?

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::client::Client;
use super::server::{Home, Server, eventually, machine};
use super::socket::{Socket, kind};

const CLIENTS: usize = 500;
/// Where some never read: two of so many, one over HTTP and one over a socket.
const SLOW_OF: usize = 10;
const ANSWER_TOKENS: usize = 10;
/// The KV pool, all of which is touched.
const POOL_BYTES: u64 = 64 << 20;
/// Memory that so many clients may take besides, buffers of both ways included.
const MEMORY_BYTES: u64 = 128 << 20;
const SOON: Duration = Duration::from_secs(60);

/// What one crowd saw.
struct Crowd {
    /// The median time between two deltas of a client that reads.
    gap: Duration,
    took: Duration,
}

/// All clients ask at once, half of them over HTTP and half over sockets.
async fn crowd(client: &Client, url: &str, model: &str, some_are_slow: bool) -> Crowd {
    let started = Instant::now();
    let (release, released) = watch::channel(false);
    let (mut reading, mut slow) = (JoinSet::new(), JoinSet::new());
    for number in 0..CLIENTS {
        let is_slow = some_are_slow && number % SLOW_OF < 2;
        let (client, url, model, released) = (client.clone(), url.to_owned(), model.to_owned(), released.clone());
        let said = format!("Client {number} says hello.");
        let told = is_slow.then_some(released);
        let talk = async move {
            if number % 2 == 0 {
                over_http(&client, &model, &said, told).await
            } else {
                over_socket(&url, &said, told).await
            }
        };
        if is_slow {
            slow.spawn(talk)
        } else {
            reading.spawn(talk)
        };
    }
    let mut gaps: Vec<Duration> = reading.join_all().await.into_iter().flatten().collect();
    release.send_replace(true);
    slow.join_all().await;
    gaps.sort_unstable();
    assert!(gaps.len() > CLIENTS, "too few deltas to say anything: {}", gaps.len());
    Crowd { gap: gaps[gaps.len() / 2], took: started.elapsed() }
}

/// Times between deltas; none of a client that is told when to go, and reads nothing until then.
async fn over_http(client: &Client, model: &str, said: &str, slow: Option<watch::Receiver<bool>>) -> Vec<Duration> {
    let body = json!({
        "model": model, "messages": [{"role": "user", "content": said}], "stream": true,
        "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": true,
    });
    let mut response = client.post("/v1/chat/completions", &body).send().await.unwrap();
    assert_eq!(response.status(), 200);
    if let Some(mut told) = slow {
        told.wait_for(|told| *told).await.unwrap();
        return Vec::new();
    }
    let (mut times, mut text) = (Vec::new(), String::new());
    while let Some(chunk) = response.chunk().await.unwrap() {
        let chunk = String::from_utf8(chunk.to_vec()).unwrap();
        if chunk.contains("\"content\":\"") {
            times.push(Instant::now());
        }
        text += &chunk;
    }
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    gaps(&times)
}

/// The same over a socket.
async fn over_socket(url: &str, said: &str, slow: Option<watch::Receiver<bool>>) -> Vec<Duration> {
    let mut socket = Socket::open(url).await;
    let create = json!({
        "type": "response.create", "input": said, "store": false, "max_output_tokens": ANSWER_TOKENS,
        "temperature": 0, "ignore_eos": true,
    });
    socket.send(&create).await;
    if let Some(mut told) = slow {
        told.wait_for(|told| *told).await.unwrap();
        return Vec::new();
    }
    let mut times = Vec::new();
    loop {
        let event = socket.event_within(SOON * 5).await;
        match kind(&event) {
            "response.output_text.delta" => times.push(Instant::now()),
            "response.incomplete" => return gaps(&times),
            "error" | "response.failed" | "response.completed" => panic!("{event}"),
            _ => {}
        }
    }
}

fn gaps(times: &[Instant]) -> Vec<Duration> {
    times.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_slow_nobody_and_all_that_500_clients_took_is_given_back() {
    let _alone = machine().await;
    let home = Home::new();
    let settings = [
        "api.limits.concurrent_turns=1000",
        "api.limits.sockets=1000",
        "engine.queue_depth=1000",
        "engine.queue_deadline_s=600",
        "kv.host_bytes=0",
        &format!("kv.device_bytes={POOL_BYTES}"),
    ];
    let server = Server::start(&home, &settings.map(str::to_owned));
    let client = Client::of(&server.url);
    let models = client.json(client.get("/v1/models")).await;
    let model = models["data"][0]["id"].as_str().unwrap();
    let resident = async || client.metrics().await.count("process_resident_memory_bytes");

    let before = resident().await;
    let all_read = crowd(&client, &server.url, model, false).await;
    let some_slow = crowd(&client, &server.url, model, true).await;
    let (slower, grown) = (some_slow.gap.as_secs_f64() / all_read.gap.as_secs_f64(), resident().await - before);
    println!(
        "{CLIENTS} clients: {:?} between deltas in {:?}, with slow readers {:?} in {:?}; {} MiB more",
        all_read.gap,
        all_read.took,
        some_slow.gap,
        some_slow.took,
        grown >> 20
    );
    assert!(slower < 1.3, "with slow readers among them the others wait {slower:.2} times as long");
    assert!(grown < POOL_BYTES + MEMORY_BYTES, "{} MiB more than before", grown >> 20);

    eventually(SOON, "all is given back", async || {
        let metrics = client.metrics().await;
        let left = [
            "rekindle_engine_running_turns",
            "rekindle_engine_queued_turns",
            "rekindle_engine_reloading_turns",
            "rekindle_running_bytes",
            "rekindle_websocket_connections",
        ];
        left.iter().all(|name| metrics.count(name) == 0).then_some(())
    })
    .await;
    server.finish().await;
}
