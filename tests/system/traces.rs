//! Do log and traces tell of each turn whose it was and where its time went, and never what was said?

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::client::Client;
use super::collector::{Collector, Told};
use super::server::{Home, Server, eventually, machine};
use super::socket::Socket;
use super::workload::BLOCK_BYTES;

/// Within this what has ended is with the collector.
const EXPORTED: Duration = Duration::from_secs(10);
/// Longest end of a server whose collector takes nothing.
const END: Duration = Duration::from_secs(4);

fn settings(collector: &str) -> Vec<String> {
    vec![
        format!("telemetry.otlp_endpoint={collector}"),
        format!("kv.device_bytes={}", 128 * BLOCK_BYTES),
        format!("kv.host_bytes={}", 256 * BLOCK_BYTES),
    ]
}

fn named<'a>(spans: &'a [Told], name: &str) -> &'a Told {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    assert_eq!(found.len(), 1, "{name} in {spans:#?}");
    found[0]
}

/// Waits until the trace has all these spans, and no others.
async fn trace(collector: &Collector, id: &str, names: &[&str]) -> Vec<Told> {
    let spans = eventually(EXPORTED, "the trace is whole", async || {
        let spans = collector.trace(id);
        (spans.len() >= names.len()).then_some(spans)
    })
    .await;
    let mut told: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
    let mut wanted = names.to_vec();
    told.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(told, wanted);
    spans
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_is_reloaded_is_one_trace_from_the_clients_own_span_to_its_last_token() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const CALLER: &str = "00f067aa0ba902b7";
    let _alone = machine().await;
    let (home, collector) = (Home::new(), Collector::start().await);
    let server = Server::start(&home, &settings(&collector.url));
    let client = Client::of(&server.url);
    let id = client.conversation().await;
    client.say(&id, &"The harbour lantern swings. ".repeat(40)).await;
    client.offload(&id, "host").await;

    let body = json!({"conversation": id, "input": "Why?", "max_output_tokens": 8, "stream": true});
    let request = client.post("/v1/responses", &body).header("traceparent", format!("00-{TRACE}-{CALLER}-01"));
    let response = request.send().await.unwrap();
    let request_id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let events = response.text().await.unwrap();
    let completed = events.lines().filter_map(|line| line.strip_prefix("data: ")).rfind(|data| *data != "[DONE]");
    let completed: Value = serde_json::from_str(completed.unwrap()).unwrap();
    let (response, usage) = (&completed["response"], &completed["response"]["usage"]);
    assert_eq!(usage["rekindle"]["decision"], "reload", "{completed}");

    let names = ["POST /v1/responses", "turn", "queue", "reload", "prefill", "decode"];
    let spans = trace(&collector, TRACE, &names).await;
    let [request, turn] = ["POST /v1/responses", "turn"].map(|name| named(&spans, name));
    assert_eq!((request.parent.as_str(), request.is_of_a_server), (CALLER, true));
    assert_eq!((request.says("http.route"), request.says("http.response.status_code")), ("/v1/responses", "200"));
    assert_eq!((request.says("request"), request.says("tenant")), (request_id.as_str(), "default"));
    assert_eq!((&turn.parent, turn.is_of_a_server), (&request.id, false));
    assert_eq!((turn.says("session"), turn.says("gen_ai.conversation.id")), (id.as_str(), id.as_str()));
    assert_eq!(turn.says("response"), response["id"].as_str().unwrap());
    assert_eq!((turn.says("rekindle.path"), turn.says("rekindle.decision")), ("reloaded", "reload"));
    for (key, path) in [
        ("gen_ai.usage.input_tokens", "/input_tokens"),
        ("gen_ai.usage.output_tokens", "/output_tokens"),
        ("gen_ai.usage.cache_read.input_tokens", "/input_tokens_details/cached_tokens"),
        ("rekindle.tokens.encoded", "/rekindle/encoded_tokens"),
        ("rekindle.tokens.reloaded_host", "/rekindle/reloaded_tokens"),
    ] {
        assert_eq!(turn.says(key), usage.pointer(path).unwrap().to_string(), "{key}");
    }
    let phases = ["queue", "reload", "prefill", "decode"].map(|name| named(&spans, name));
    for phase in phases {
        assert_eq!(phase.parent, turn.id, "{phase:?}");
        assert!(turn.from <= phase.from && phase.from <= phase.to && phase.to <= turn.to, "{phase:?} of {turn:?}");
    }
    let [queue, reload, prefill, decode] = phases;
    assert!(queue.to == reload.from && reload.from <= prefill.to && prefill.to == decode.from, "{phases:?}");
    assert!(request.from <= turn.from && decode.to <= request.to, "the request ends with the stream");
    let ms = |span: &Told| (span.to - span.from) / 1_000_000;
    assert_eq!(Some(ms(decode)), usage["rekindle"]["decode_ms"].as_u64());
    assert!(spans.iter().all(|span| !span.failed && span.events.is_empty()), "{spans:#?}");

    // A create over a socket is a trace of its own, and a probe is none. What ended last is sent before the process ends.
    client.json(client.get("/healthz")).await;
    let mut socket = Socket::open(&server.url).await;
    let create = json!({"type": "response.create", "conversation": id, "input": "And?", "max_output_tokens": 2});
    socket.send(&create).await;
    socket.until(&["response.completed", "response.incomplete"]).await;
    drop(socket);
    server.finish().await;
    let spans = collector.spans();
    let root = named(&spans, "response.create");
    assert!(root.parent.is_empty() && root.is_of_a_server && root.says("request").starts_with("req_"), "{root:?}");
    let of_socket = collector.trace(&root.trace);
    assert_eq!(named(&of_socket, "turn").parent, root.id);
    assert_eq!(named(&of_socket, "decode").parent, named(&of_socket, "turn").id);
    assert!(!spans.iter().any(|span| span.attributes.values().any(|value| value == "/healthz")), "{spans:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_gone_or_silent_slows_no_turn_and_no_end() {
    const TURNS: usize = 8;
    let _alone = machine().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_url = format!("http://{}", silent.local_addr().unwrap());
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone_url = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    // Side by side, so that whatever else the machine does is the same for all.
    let homes = [Home::new(), Home::new(), Home::new()];
    let urls = ["", &gone_url, &silent_url];
    let servers = [0, 1, 2].map(|number: usize| Server::start(&homes[number], &settings(urls[number])));
    let clients = [0, 1, 2].map(|number: usize| Client::of(&servers[number].url));
    let mut took = [const { Vec::new() }; 3];
    let mut conversations = Vec::new();
    for client in &clients {
        conversations.push(client.conversation().await);
    }
    for _ in 0..TURNS {
        for (client, (id, took)) in clients.iter().zip(conversations.iter().zip(&mut took)) {
            took.push(client.say(id, "Go on.").await.took);
        }
    }
    let medians = took.map(|mut took| {
        took.sort();
        took[TURNS / 2]
    });
    let most = medians[0].mul_f64(1.3) + Duration::from_millis(20);
    assert!(medians.iter().all(|median| *median < most), "with none, one gone, one silent: {medians:?}");

    eventually(EXPORTED, "the collector's absence is logged", async || {
        homes[1].logged().contains("takes no traces").then_some(())
    })
    .await;
    assert!(clients[1].metrics().await.count("rekindle_trace_spans_total{outcome=\"failed\"}") > 0);
    for (mut server, home) in servers.into_iter().zip(&homes) {
        let ending = Instant::now();
        server.terminate();
        assert!(server.ended(END).await.success());
        assert!(ending.elapsed() < END);
        let warned = home.logged().lines().filter(|line| line.contains("\"WARN\"")).count();
        assert!(warned <= 1, "a warning is enough: {}", home.logged());
    }
    homes[0].assert_nothing_odd_was_logged();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_is_in_no_log_line_no_metric_and_no_span_and_the_ids_are() {
    const MARKER: &str = "xylographomancy";
    let _alone = machine().await;
    let (home, collector) = (Home::new(), Collector::start().await);
    let mut all = settings(&collector.url);
    all.push("log.level=warn,rekindle=trace".to_owned());
    let server = Server::start(&home, &all);
    let client = Client::of(&server.url);
    let said = format!("Say {MARKER}, and {MARKER} again. {MARKER}!");
    let id = client.conversation().await;
    let body = json!({"conversation": id, "input": said, "instructions": said, "max_output_tokens": 8, "metadata": {"a": MARKER}});
    let response = client.post("/v1/responses", &body).send().await.unwrap();
    let request_id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert!(response.status().is_success(), "{}", response.text().await.unwrap());
    let chat = json!({"messages": [{"role": "user", "content": said}], "max_tokens": 4, "stop": [MARKER], "n": 2,
        "model": client.json(client.get("/v1/models")).await["data"][0]["id"]});
    client.json(client.post("/v1/chat/completions", &chat)).await;
    let mut socket = Socket::open(&server.url).await;
    socket.send(&json!({"type": "response.create", "input": said, "max_output_tokens": 4})).await;
    socket.until(&["response.completed", "response.incomplete"]).await;
    drop(socket);
    // What is refused may quote it to its client, and to nobody else.
    for wrong in
        [json!({"input": said, "max_output_tokens": MARKER}), json!({"input": [{"type": MARKER}]}), json!({MARKER: 1})]
    {
        client.post("/v1/responses", &wrong).send().await.unwrap();
    }
    let page = client.get("/metrics").send().await.unwrap().text().await.unwrap();
    server.finish().await;

    let (log, spans) = (home.logged(), collector.spans());
    assert!(!log.contains(MARKER), "{}", log.lines().find(|line| line.contains(MARKER)).unwrap());
    assert!(!page.contains(MARKER));
    assert!(!format!("{spans:?}").contains(MARKER), "{spans:?}");
    // One response, two choices, one create over a socket.
    let answered: Vec<Value> = log
        .lines()
        .filter(|line| line.contains("the turn is answered"))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answered.len(), 4, "{log}");
    assert_eq!(spans.iter().filter(|span| span.name == "turn").count(), 4);
    for event in &answered {
        let within = event["spans"].as_array().unwrap();
        let id = |key: &str| within.iter().find_map(|span| span[key].as_str());
        assert!(id("request").is_some_and(|id| id.starts_with("req_")) && id("tenant") == Some("default"), "{event}");
    }
    let of_conversation = |event: &Value| {
        let within = event["spans"].to_string();
        within.contains(&id) && within.contains(&request_id)
    };
    assert_eq!(answered.iter().filter(|event| of_conversation(event)).count(), 1, "{answered:#?}");
}
