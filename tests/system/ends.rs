//! Is a conversation that is over the first to lose its memory, and one whose client comes back not?

use std::time::Duration;

use serde_json::{Value, json};

use super::client::Client;
use super::server::{Home, Server, eventually, machine};
use super::socket::{FIN, Socket, kind};
use super::workload::BLOCK_BYTES;

const SOON: Duration = Duration::from_secs(20);

/// A pool that holds two conversations, but no third beside both.
fn small() -> Vec<String> {
    vec![format!("kv.device_bytes={}", 64 * BLOCK_BYTES)]
}

fn words(name: &str) -> String {
    format!("My name is {name}. ").repeat(70)
}

async fn say(client: &Client, conversation: &str, input: &str) -> Value {
    let body = json!({"conversation": conversation, "input": input, "max_output_tokens": 2, "temperature": 0});
    client.json(client.post("/v1/responses", &body)).await["usage"]["rekindle"].clone()
}

/// Says the same over a socket.
async fn say_on(socket: &mut Socket, conversation: &str, input: &str) {
    let create = json!({
        "type": "response.create", "conversation": conversation, "input": input, "max_output_tokens": 2, "temperature": 0,
    });
    socket.send(&create).await;
    assert_ne!(kind(socket.response().await.last().unwrap()), "error");
}

async fn hang_up(mut socket: Socket) {
    socket.frame(FIN | 8, &1000_u16.to_be_bytes()).await;
    assert_eq!(socket.goodbye().await, Some(1000));
}

/// Waits until the sockets' leaving has ended so many conversations.
async fn ended(client: &Client, many: u64) {
    eventually(SOON, "the conversations that were left are over", async || {
        (client.metrics().await.count("rekindle_conversations_ended_total{by=\"left\"}") == many).then_some(())
    })
    .await;
}

/// Says more than there is room for beside two others.
async fn crowd_out(client: &Client) -> String {
    let large = client.conversation().await;
    say(client, &large, &"All work and no play makes Jack a dull boy. ".repeat(42)).await;
    large
}

/// By which rule a conversation last lost memory.
async fn lost_by(client: &Client, id: &str) -> Value {
    client.json(client.get(&format!("/v1/conversations/{id}/residency"))).await["last_eviction"]["rule"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_whose_socket_has_gone_is_evicted_first_though_used_last() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[small(), vec!["ws.done_after_s=1".to_owned()]].concat());
    let client = Client::of(&server.url);
    let (quiet, left) = (client.conversation().await, client.conversation().await);
    say(&client, &quiet, &words("Ann")).await;
    let mut socket = Socket::open(&server.url).await;
    say_on(&mut socket, &left, &words("Bob")).await;
    hang_up(socket).await;
    ended(&client, 1).await;
    crowd_out(&client).await;
    assert_eq!((lost_by(&client, &left).await, lost_by(&client, &quiet).await), (json!("ended"), Value::Null));
    // Nothing was dropped.
    let next = say(&client, &left, "And now?").await;
    assert!(next["reloaded_tokens"].as_u64() > Some(0) && next["reencoded_tokens"] == 0, "{next}");
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_back_in_time_or_was_sent_away_by_the_server_keeps_its_place() {
    let _alone = machine().await;
    for comes_back in [true, false] {
        let home = Home::new();
        let idle_s = if comes_back { 600 } else { 3 };
        let own = [format!("ws.idle_s={idle_s}"), "ws.done_after_s=2".to_owned()];
        let server = Server::start(&home, &[small(), own.to_vec()].concat());
        let client = Client::of(&server.url);
        let (quiet, kept, other) =
            (client.conversation().await, client.conversation().await, client.conversation().await);
        say(&client, &quiet, &words("Ann")).await;
        let mut socket = Socket::open(&server.url).await;
        say_on(&mut socket, &kept, &words("Bob")).await;
        let mut again = None;
        if comes_back {
            hang_up(socket).await;
            let mut back = Socket::open(&server.url).await;
            back.send(&json!({"type": "session.typing", "conversation": kept})).await;
            assert_eq!(back.event().await["state"], "skipped");
            again = Some(back);
        } else {
            assert_eq!(socket.goodbye().await, Some(1001));
        }
        // Left later, so that it is over later than the one that was kept would have been.
        let mut socket = Socket::open(&server.url).await;
        say_on(&mut socket, &other, "Hi.").await;
        hang_up(socket).await;
        ended(&client, 1).await;
        crowd_out(&client).await;
        assert_eq!((lost_by(&client, &quiet).await, lost_by(&client, &kept).await), (json!("lru"), Value::Null));
        assert_eq!(lost_by(&client, &other).await, "ended");
        drop(again);
        server.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_calls_done_is_evicted_first_unless_it_goes_on() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &small());
    let client = Client::of(&server.url);
    let mut socket = Socket::open(&server.url).await;
    let mut told = 0;
    for then in ["session.done", "nothing", "session.typing", "warm", "turn"] {
        let (quiet, done) = (client.conversation().await, client.conversation().await);
        say(&client, &quiet, &words("Ann")).await;
        say(&client, &done, &words("Bob")).await;
        if then == "session.done" {
            socket.send(&json!({"type": "session.done", "conversation": done, "stream_id": "a"})).await;
            let event = socket.event().await;
            assert_eq!(event, json!({"type": "session.done", "conversation": done, "stream_id": "a"}));
        } else {
            let answer = client.json(client.post(&format!("/v1/conversations/{done}/done"), &json!({}))).await;
            assert_eq!(answer, json!({"object": "conversation.done", "conversation": done}));
        }
        told += 1;
        match then {
            "session.typing" => {
                socket.send(&json!({"type": then, "conversation": done})).await;
                assert_eq!(socket.event().await["state"], "skipped", "it is there");
            }
            "warm" => {
                let path = format!("/v1/conversations/{done}/warm");
                assert_eq!(client.json(client.post(&path, &json!({"wait": true}))).await["state"], "skipped");
            }
            "turn" => drop(say(&client, &done, "And now?").await),
            _ => {}
        }
        let large = crowd_out(&client).await;
        let lost = (lost_by(&client, &done).await, lost_by(&client, &quiet).await);
        let goes_on = ["session.typing", "warm", "turn"].contains(&then);
        let expected = if goes_on { (Value::Null, json!("lru")) } else { (json!("ended"), Value::Null) };
        assert_eq!(lost, expected, "done, and then: {then}");
        for id in [quiet, done, large] {
            client.delete_conversation(&id).await;
        }
    }
    assert_eq!(client.metrics().await.count("rekindle_conversations_ended_total{by=\"done\"}"), told);
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_is_done_by_its_newest_response_and_what_is_not_there_is_not_found() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let mut socket = Socket::open(&server.url).await;
    let turn = json!({"input": "Hi.", "max_output_tokens": 2});
    let tip = client.json(client.post("/v1/responses", &turn)).await["id"].as_str().unwrap().to_owned();
    let over = client.json(client.post(&format!("/v1/conversations/{tip}/done"), &json!({}))).await;
    assert!(over["conversation"].as_str().unwrap().starts_with("conv_"), "{over}");
    socket.send(&json!({"type": "session.done", "previous_response_id": tip})).await;
    assert_eq!(socket.event().await, json!({"type": "session.done", "conversation": over["conversation"]}));

    // One that was not to be stored is known on its own socket alone.
    socket.send(&json!({"type": "response.create", "input": "Hi.", "store": false, "max_output_tokens": 2})).await;
    let last = socket.response().await.pop().unwrap();
    let unstored = json!({"type": "session.done", "previous_response_id": last["response"]["id"]});
    socket.send(&unstored).await;
    assert_eq!(kind(&socket.event().await), "session.done");
    let mut stranger = Socket::open(&server.url).await;
    stranger.send(&unstored).await;
    assert_eq!(stranger.event().await["error"]["code"], "response_not_found");

    let never = format!("conv_{:032x}", 1);
    stranger.send(&json!({"type": "session.done", "conversation": never, "stream_id": "b"})).await;
    let refused = stranger.event().await;
    assert_eq!((&refused["error"]["code"], &refused["stream_id"]), (&json!("conversation_not_found"), &json!("b")));
    let refused = client.post(&format!("/v1/conversations/{never}/done"), &json!({})).send().await.unwrap();
    assert_eq!(refused.status(), 404);
    server.finish().await;
}
