//! Does WebSocket mode keep its word, to clients that behave and to those that don't?

use std::time::Duration;

use serde_json::{Value, json};

use super::client::Client;
use super::server::{END, Home, Server, eventually, machine};
use super::socket::{BINARY, CONTINUATION, FIN, Heard, PING, Socket, TEXT, kind};

const STORY: &str = "Tell a very long story about a lighthouse.";
const SOON: Duration = Duration::from_secs(20);

/// A create with a short answer, and whatever else.
fn create(input: &str, more: Value) -> Value {
    let mut create = json!({"type": "response.create", "input": input, "max_output_tokens": 4, "temperature": 0});
    create.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    create
}

fn long_create(more: Value) -> Value {
    let mut long = create(STORY, more);
    long["max_output_tokens"] = json!(2000);
    long
}

/// The id of the response that an event is about.
fn response_id(event: &Value) -> String {
    event["response"]["id"].as_str().unwrap().to_owned()
}

async fn nothing_runs(client: &Client) {
    eventually(SOON, "no turn runs", async || {
        (client.metrics().await.count("rekindle_engine_running_turns") == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_tells_what_http_tells_and_lanes_keep_their_order() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let mut socket = Socket::open(&server.url).await;

    socket.send(&create("Hi.", json!({"stream": true}))).await;
    let told = socket.response().await;
    assert_eq!(
        told.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect::<Vec<_>>(),
        Vec::from_iter(0..told.len() as u64)
    );
    assert!(told.iter().all(|event| event.get("stream_id").is_none()));
    let last = told.last().unwrap();
    let text: String = told.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], text);
    let kept = client.json(client.get(&format!("/v1/responses/{}", response_id(last)))).await;
    assert_eq!(kept, last["response"], "the stored response is the one that was told");

    // Two lanes at once, two creates in one of them.
    for (lane, input) in [("a", "One."), ("b", "Two."), ("a", "Three.")] {
        socket.send(&create(input, json!({"stream_id": lane}))).await;
    }
    let mut order = Vec::new();
    while order.iter().filter(|(kind, _)| kind != "response.created").count() < 3 {
        let event = socket.event().await;
        let lane = event["stream_id"].as_str().unwrap().to_owned();
        if ["response.created", "response.completed", "response.incomplete"].contains(&kind(&event)) {
            let kind = if kind(&event) == "response.created" { "response.created" } else { "end" };
            order.push((kind.to_owned(), lane));
        }
    }
    let of_a: Vec<_> = order.iter().filter(|(_, lane)| lane == "a").map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(of_a, ["response.created", "end", "response.created", "end"]);

    // What is wrong is said, and harms nothing.
    for (wrong, status, code, param) in [
        (create("x", json!({"stream_id": "l", "temperature": 9})), 400, "invalid_value", json!("temperature")),
        (
            create("x", json!({"previous_response_id": format!("resp_{:032x}", 7)})),
            400,
            "previous_response_not_found",
            json!("previous_response_id"),
        ),
        (create("x", json!({"background": true})), 400, "unsupported_value", json!("background")),
        (
            json!({"type": "response.cancel", "response_id": format!("resp_{:032x}", 7)}),
            404,
            "response_not_found",
            Value::Null,
        ),
        (json!({"type": "response.rewind"}), 400, "invalid_value", json!("type")),
    ] {
        socket.send(&wrong).await;
        let event = socket.event().await;
        let found = (kind(&event), &event["status"], &event["error"]["code"], &event["error"]["param"]);
        assert_eq!(found, ("error", &json!(status), &json!(code), &param), "{wrong}");
        assert_eq!(event.get("stream_id"), wrong.get("stream_id"));
    }
    socket.frame(FIN | TEXT, b"{no json").await;
    assert_eq!(socket.event().await["error"]["code"], "invalid_json");
    socket.send(&json!({"type": "response.steer", "input": "left", "stream_id": "a"})).await;
    let steered = socket.event().await;
    assert_eq!(
        (kind(&steered), &steered["error"]["code"], &steered["input"]),
        ("response.steer.failed", &json!("steering_not_supported"), &json!("left"))
    );
    socket.send(&create("Still there?", json!({}))).await;
    assert!(kind(socket.response().await.last().unwrap()).starts_with("response."));

    // Without an upgrade there is no socket.
    let refused = client.get("/v1/responses").send().await.unwrap();
    assert_eq!(refused.status(), 426);
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_ends_with_its_cancel_or_its_socket_and_what_was_said_is_kept() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);

    let said = async |ends: &str| {
        let conversation = client.conversation().await;
        let mut socket = Socket::open(&server.url).await;
        socket.send(&long_create(json!({"conversation": conversation}))).await;
        let began = socket.until(&["response.output_text.delta"]).await;
        match ends {
            "cancel" => {
                socket.send(&json!({"type": "response.cancel", "response_id": response_id(&began[0])})).await;
                let last = socket.response().await.pop().unwrap();
                assert_eq!((kind(&last), &last["response"]["status"]), ("response.incomplete", &json!("cancelled")));
                assert!(last["response"]["incomplete_details"].is_null());
            }
            "close" => {
                socket.frame(FIN | 8, &1000_u16.to_be_bytes()).await;
                assert_eq!(socket.goodbye().await, Some(1000));
            }
            _ => {
                // Half a frame, and then nothing ever again.
                socket.raw(&[FIN | TEXT, 0x80 | 100, 1, 2, 3, 4, b'{']).await;
                drop(socket);
            }
        }
        nothing_runs(&client).await;
        let items = eventually(SOON, "the answer is kept", async || {
            let items = client.items(&conversation).await;
            (items.len() == 2).then_some(items)
        });
        assert!(!items.await[1].text.is_empty());
    };
    for ends in ["cancel", "close", "dies"] {
        said(ends).await;
    }
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_in_pieces_are_put_together_and_bad_ones_end_the_socket_with_their_code() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &["ws.message_bytes=64KiB".to_owned()]);
    let client = Client::of(&server.url);

    let mut socket = Socket::open(&server.url).await;
    let text = create("Hi, Zoë.", json!({})).to_string();
    let (start, rest) = text.as_bytes().split_at(text.find('ë').unwrap() + 1);
    socket.frame(TEXT, start).await;
    socket.frame(FIN | PING, b"now").await;
    socket.frame(CONTINUATION, b"").await;
    socket.frame(FIN | CONTINUATION, rest).await;
    assert_eq!(socket.next().await, Heard::Pong(b"now".to_vec()));
    assert!(kind(socket.response().await.last().unwrap()).starts_with("response."));

    let huge = vec![b' '; 65 << 10];
    type Frames<'a> = Vec<(u8, &'a [u8])>;
    let ends: [(&str, Frames<'_>, u16); 5] = [
        ("binary", vec![(FIN | BINARY, b"{}")], 1003),
        ("huge", vec![(FIN | TEXT, &huge)], 1009),
        ("huge in pieces", vec![(TEXT, &huge[..40 << 10]), (FIN | CONTINUATION, &huge[..40 << 10])], 1009),
        ("not UTF-8", vec![(FIN | TEXT, b"{\"type\":\"\xff\xfe\"}")], 1007),
        ("an unknown kind", vec![(FIN | 5, b"")], 1002),
    ];
    for (name, frames, code) in ends {
        let mut socket = Socket::open(&server.url).await;
        for (first, payload) in frames {
            socket.frame(first, payload).await;
        }
        assert_eq!(socket.goodbye().await, Some(code), "{name}");
    }
    let mut unmasked = Socket::open(&server.url).await;
    unmasked.raw(&[FIN | TEXT, 2, b'{', b'}']).await;
    assert_eq!(unmasked.goodbye().await, Some(1002));
    eventually(SOON, "no socket is left", async || {
        (client.metrics().await.count("rekindle_websocket_connections") == 1).then_some(())
    })
    .await;
    drop(socket);
    eventually(SOON, "no socket is left", async || {
        (client.metrics().await.count("rekindle_websocket_connections") == 0).then_some(())
    })
    .await;
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_stored_can_be_continued_on_its_own_socket_alone() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let mut socket = Socket::open(&server.url).await;
    socket.send(&create("My name is Ada.", json!({"store": false}))).await;
    let first = socket.response().await.pop().unwrap();
    let previous = response_id(&first);
    assert_eq!(first["response"]["store"], false);

    let mut other = Socket::open(&server.url).await;
    other.send(&create("Who am I?", json!({"store": false, "previous_response_id": previous}))).await;
    assert_eq!(other.event().await["error"]["code"], "previous_response_not_found");
    let looked_up = client.get(&format!("/v1/responses/{previous}")).send().await.unwrap();
    assert_eq!(looked_up.status(), 404);

    socket.send(&create("Who am I?", json!({"store": false, "previous_response_id": previous}))).await;
    let second = socket.response().await.pop().unwrap();
    let usage = &second["response"]["usage"];
    assert!(usage["input_tokens_details"]["cached_tokens"].as_u64() > Some(0), "{usage}");
    assert_eq!(usage["rekindle"]["reencoded_tokens"], 0);
    // A failed create forgets nothing.
    socket
        .send(&create("x", json!({"store": false, "previous_response_id": response_id(&second), "temperature": 9})))
        .await;
    assert_eq!(kind(&socket.event().await), "error");
    socket.send(&create("And?", json!({"store": false, "previous_response_id": response_id(&second)}))).await;
    assert!(kind(socket.response().await.last().unwrap()).starts_with("response."));
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_takes_so_many_and_a_socket_so_many_lanes() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &["ws.max_lanes=2".to_owned(), "ws.lane_depth=1".to_owned()]);
    let client = Client::of(&server.url);
    let mut socket = Socket::open(&server.url).await;
    for lane in ["a", "a", "a", "b", "c"] {
        socket.send(&long_create(json!({"stream_id": lane}))).await;
    }
    let mut refused = Vec::new();
    while refused.len() < 2 {
        let event = socket.event().await;
        if kind(&event) == "error" {
            assert_eq!((&event["status"], &event["error"]["code"]), (&json!(429), &json!("too_many_pending")));
            refused.push(event["stream_id"].as_str().unwrap().to_owned());
        }
    }
    assert_eq!(refused, ["a", "c"]);
    drop(socket);
    nothing_runs(&client).await;
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_an_idle_and_a_draining_socket_say_why_they_close() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &["ws.max_age_s=2".to_owned()]);
    let mut socket = Socket::open(&server.url).await;
    let told = socket.until(&["error"]).await.pop().unwrap();
    assert_eq!(told["error"]["code"], "websocket_connection_limit_reached");
    assert_eq!(socket.goodbye().await, Some(1001));
    server.finish().await;

    let home = Home::new();
    let mut server = Server::start(&home, &["ws.idle_s=1".to_owned()]);
    let mut socket = Socket::open(&server.url).await;
    assert_eq!(socket.goodbye().await, Some(1001));

    // A drain lets the turn finish, then says that it restarts.
    let mut socket = Socket::open(&server.url).await;
    let mut turn = create("Count to ten.", json!({}));
    turn["max_output_tokens"] = json!(40);
    socket.send(&turn).await;
    socket.until(&["response.output_text.delta"]).await;
    server.terminate();
    let last = socket.response().await.pop().unwrap();
    assert_ne!(last["response"]["status"], "cancelled");
    assert_eq!(socket.goodbye().await, Some(1012));
    assert!(server.ended(END).await.success());
}

/// Within this the kernel lets go of a connection whose client reads nothing.
const LET_GO: Duration = Duration::from_secs(90);

/// Whether some socket of this machine is connected to this port of it (proc(5), `/proc/net/tcp`).
fn is_connected_to(port: u16) -> bool {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let remote = table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(2));
    remote.into_iter().any(|address| address.ends_with(&format!(":{port:04X}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_without_end_and_never_reads_is_dropped_and_holds_up_nobody() {
    /// Far more answers than the buffers of both systems hold.
    const QUESTIONS: usize = 400_000;
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let mut deaf = Socket::open(&server.url).await;
    let mut other = Socket::open(&server.url).await;
    let before = client.metrics().await.count("process_resident_memory_bytes");
    let question = json!({"type": "nonsense", "padding": "x".repeat(100)});
    let mut asked = 0;
    while client.metrics().await.count("rekindle_websocket_connections") > 1 {
        assert!(asked < QUESTIONS, "{asked} answers wait for a client that reads none");
        for _ in 0..QUESTIONS / 40 {
            deaf.send(&question).await;
        }
        asked += QUESTIONS / 40;
        other.send(&json!({"type": "response.steer", "input": asked})).await;
        assert_eq!(other.event().await["input"], asked);
    }
    let grown = client.metrics().await.count("process_resident_memory_bytes").saturating_sub(before);
    assert!(grown < 32 << 20, "{} MiB more than before", grown >> 20);
    // The kernel holds what is written, and lets go of it too.
    let port = deaf.port();
    assert!(is_connected_to(port), "the connection is in the kernel's table");
    eventually(LET_GO, "the connection is closed", async || (!is_connected_to(port)).then_some(())).await;
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_warms_what_was_offloaded_and_tells_only_who_asked() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let conversation = client.conversation().await;
    client.say(&conversation, "My name is Ada, and I come from Turin.").await;
    client.offload(&conversation, "host").await;

    let mut socket = Socket::open(&server.url).await;
    for _ in 0..3 {
        socket.send(&json!({"type": "session.typing", "conversation": conversation})).await;
    }
    let warming = socket.event().await;
    assert_eq!(
        (kind(&warming), &warming["state"], &warming["cost"]["from"]),
        ("session.warm", &json!("warming"), &json!("host"))
    );
    let warm = socket.event().await;
    assert_eq!((&warm["state"], &warm["conversation"]), (&json!("warm"), &json!(conversation)));
    assert!(warm["cost"]["reload_tokens"].as_u64() > Some(0) && warm["cost"]["elapsed_ms"].is_u64(), "{warm}");
    assert_eq!(warm["cost"]["reencode_tokens"], 0);
    // Typing more is not acted on again, and asking for what is there is skipped.
    socket.send(&json!({"type": "session.warm", "conversation": conversation})).await;
    let skipped = socket.event().await;
    assert_eq!((&skipped["state"], &skipped["cost"]["from"]), (&json!("skipped"), &json!("device")));
    let answer = client.say(&conversation, "Who am I?").await;
    assert_eq!((answer.usage.decision.as_str(), answer.usage.reloaded, answer.usage.reencoded), ("resident", 0, 0));

    client.offload(&conversation, "host").await;
    let path = format!("/v1/responses?conversation={conversation}");
    let mut connected = Socket::try_open(&server.url, &path, &[]).await.unwrap_or_else(|_| panic!("no socket"));
    let states: Vec<Value> = vec![connected.event().await["state"].clone(), connected.event().await["state"].clone()];
    assert_eq!(states, ["warming", "warm"]);

    socket.send(&json!({"type": "session.warm", "conversation": format!("conv_{:032x}", 1)})).await;
    assert_eq!(socket.event().await["error"]["code"], "conversation_not_found");
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_brings_its_key_as_a_subprotocol_and_foreign_pages_are_turned_away() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &["api.cors.allow_origins=[\"https://app.example\"]".to_owned()]);
    let offered = ("Sec-WebSocket-Protocol", "rekindle.v1, openai-insecure-api-key.rk_any");
    let open = async |origin| Socket::try_open(&server.url, "/v1/responses", &[offered, ("Origin", origin)]).await;
    let Ok(socket) = open("https://app.example").await else { panic!("no socket for a page that may") };
    assert_eq!(socket.protocol.as_deref(), Some("rekindle.v1"), "never the one with the key");
    let Err((status, body)) = open("https://evil.example").await else { panic!("a socket for a page that may not") };
    assert_eq!((status, &body["error"]["code"]), (403, &json!("origin_not_allowed")));
    drop(socket);
    server.finish().await;
}
