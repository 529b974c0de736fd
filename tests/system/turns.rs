//! Is what was said found again: by a client that sends it back as text, and by one that the server died under?

use std::time::Duration;

use serde_json::{Value, json};

use super::client::Client;
use super::server::{Home, Server, eventually, machine};

const LONG: &str = "Please count from 1 to 300, one number after another, and do not stop early.";

/// Two completions: the second sends the first's answer back as text. Their usage, and that text.
async fn twice(client: &Client, model: &str, seed: u32) -> (Value, Value, String) {
    let question = json!({"role": "user", "content": "Tell me an unusual story."});
    let body = json!({"model": model, "messages": [question], "seed": seed, "temperature": 1.3, "max_tokens": 60});
    let first = client.json(client.post("/v1/chat/completions", &body)).await;
    let answer = &first["choices"][0]["message"];
    let messages = json!([question, answer, {"role": "user", "content": "Go on."}]);
    let body = json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 2});
    let second = client.json(client.post("/v1/chat/completions", &body)).await;
    (first["usage"].clone(), second["usage"].clone(), answer["content"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_is_sent_back_as_text_is_the_tokens_that_were_generated() {
    const BLOCK: u64 = 16;
    let _alone = machine().await;
    let (home, forgetful_home) = (Home::new(), Home::new());
    let server = Server::start(&home, &[]);
    let forgetful = Server::start(&forgetful_home, &["sessions.recalled_tokens=0".to_owned()]);
    let (client, other) = (Client::of(&server.url), Client::of(&forgetful.url));
    let models = client.json(client.get("/v1/models")).await;
    let model = models["data"][0]["id"].as_str().unwrap();

    let number = |usage: &Value, path: &str| usage.pointer(path).and_then(Value::as_u64).unwrap();
    let cached = |usage: &Value| number(usage, "/prompt_tokens_details/cached_tokens");
    let mut became_other_ids = 0;
    for seed in 0..8 {
        let (first, second, text) = twice(&client, model, seed).await;
        let (_, anew, same) = twice(&other, model, seed).await;
        assert_eq!(text, same, "one seed, one answer");
        if text.contains('\u{FFFD}') {
            continue; // the text doesn't say which bytes were generated
        }
        // The last token was sampled and never fed; only full blocks are shared.
        let known = number(&first, "/prompt_tokens") + number(&first, "/completion_tokens") - 1;
        assert!(cached(&second) >= known / BLOCK * BLOCK, "seed {seed}: of {known} tokens: {second}");
        assert_eq!(number(&second, "/rekindle/reencoded_tokens"), 0);
        became_other_ids += u32::from(cached(&anew) < cached(&second));
    }
    assert!(became_other_ids > 0, "no answer tokenises to other ids than were generated, so nothing was shown");
    server.finish().await;
    forgetful.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_the_server_died_under_is_told_as_failed_and_sent_again_it_is_one_turn() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let conversation = client.conversation().await;
    let body = json!({"conversation": conversation, "input": LONG, "background": true, "temperature": 0});
    let running = client.json(client.post("/v1/responses", &body)).await;
    assert_eq!(running["status"], "in_progress");
    server.kill();

    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let path = format!("/v1/responses/{}", running["id"].as_str().unwrap());
    let dead = client.json(client.get(&path)).await;
    assert_eq!((&dead["status"], &dead["error"]["code"]), (&json!("failed"), &json!("server_error")));
    let again = client.post("/v1/responses", &body).header("x-stainless-retry-count", "1");
    let again = client.json(again).await;
    let path = format!("/v1/responses/{}", again["id"].as_str().unwrap());
    eventually(Duration::from_secs(60), "the turn says something", async || {
        let events = client.get(&format!("{path}?stream=true&starting_after=3")).send().await.unwrap();
        let mut events = events;
        events.chunk().await.unwrap()
    })
    .await;
    let cancelled = client.json(client.post(&format!("{path}/cancel"), &json!({}))).await;
    assert_eq!(cancelled["status"], "cancelled");
    let items = client.items(&conversation).await;
    let roles: Vec<_> = items.iter().map(|item| item.role.as_str()).collect();
    assert_eq!(roles, ["user", "assistant"]);
    assert_eq!(items[1].text, cancelled["output"][0]["content"][0]["text"]);
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_response_is_continued_beside_the_newer_one_and_shares_its_history() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let turn = |input: &str, previous: Option<&Value>| {
        let body = json!({"input": input, "previous_response_id": previous, "max_output_tokens": 8, "temperature": 0});
        client.json(client.post("/v1/responses", &body))
    };
    let first = turn(&"My name is Ann. ".repeat(12), None).await;
    let second = turn("And now?", Some(&first["id"])).await;
    let forked = turn("And now?", Some(&first["id"])).await;
    assert_eq!(forked["output"][0]["content"], second["output"][0]["content"], "the same history, the same answer");
    assert_eq!(forked["usage"]["input_tokens"], second["usage"]["input_tokens"]);
    assert!(forked["usage"]["rekindle"]["shared_tokens"].as_u64() >= Some(32), "{}", forked["usage"]);
    let third = turn("Well?", Some(&second["id"])).await;
    assert!(third["usage"]["rekindle"]["resident_tokens"].as_u64() > Some(0), "{}", third["usage"]);

    // A chain is known by its newest response alone.
    let residency = |of: &Value| client.get(&format!("/v1/conversations/{}/residency", of["id"].as_str().unwrap()));
    assert_eq!(client.json(residency(&third)).await["object"], "conversation.residency");
    for older in [&first, &second] {
        assert_eq!(residency(older).send().await.unwrap().status(), 404);
    }

    // A chain has no name, and ends with its last response.
    let listed = client.json(client.get("/v1/conversations")).await;
    assert_eq!(listed["data"], json!([]));
    for response in [&first, &second, &third, &forked] {
        let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
        let deleted = client.json(client.delete(&path)).await;
        assert_eq!((&deleted["deleted"], &deleted["object"]), (&json!(true), &json!("response")));
        assert_eq!(client.get(&path).send().await.unwrap().status(), 404);
    }
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_longer_than_the_window_loses_its_oldest_turns_where_the_client_allows_it() {
    let _alone = machine().await;
    let home = Home::new();
    // 40 blocks of 16 tokens are the longest sequence.
    let server = Server::start(&home, &[format!("kv.device_bytes={}", 40 * super::workload::BLOCK_BYTES)]);
    let client = Client::of(&server.url);
    let conversation = client.conversation().await;
    let rule = json!({"items": [{"role": "system", "content": "Answer in one word."}]});
    client.json(client.post(&format!("/v1/conversations/{conversation}/items"), &rule)).await;
    let turn = |truncation: &str| {
        let body = json!({"conversation": conversation, "input": "one two three four five ".repeat(20),
            "truncation": truncation, "max_output_tokens": 4, "temperature": 0});
        client.post("/v1/responses", &body)
    };
    let mut dropped = Vec::new();
    for _ in 0..7 {
        let answer = client.json(turn("auto")).await;
        dropped.push(answer["usage"]["rekindle"]["dropped_items"].as_u64().unwrap());
    }
    assert_eq!(dropped[0], 0);
    assert!(dropped.is_sorted() && dropped[6] >= 4 && dropped.iter().all(|items| items % 2 == 0), "{dropped:?}");
    let refused = turn("disabled").send().await.unwrap();
    assert_eq!(refused.status(), 400);
    let refused: Value = refused.json().await.unwrap();
    assert_eq!(refused["error"]["code"], "context_length_exceeded");
    assert_eq!(client.items(&conversation).await.len(), 15, "what is left out of a prompt stays in the history");
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_twelfth_turn_of_a_conversation_is_no_more_work_to_prepare_than_the_third() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let conversation = client.conversation().await;
    let prepared = async || {
        let metrics = client.metrics().await;
        ["rendered_bytes", "tokenized_tokens", "hashed_blocks"]
            .map(|work| metrics.count(&format!("rekindle_prompt_{work}_total")))
    };
    let (mut took, mut prompt_tokens) = (Vec::new(), 0);
    for turn in 0..12 {
        let before = if turn == 0 { [0; 3] } else { prepared().await };
        let body = json!({"conversation": conversation, "input": format!("Question {turn:02}? {}", "word ".repeat(20)),
            "max_output_tokens": 4, "temperature": 0});
        let answer = client.json(client.post("/v1/responses", &body)).await;
        prompt_tokens = answer["usage"]["input_tokens"].as_u64().unwrap();
        let after = prepared().await;
        took.push([0, 1, 2].map(|work| after[work] - before[work]));
    }
    assert!(prompt_tokens > 400, "a history of {prompt_tokens} tokens shows nothing");
    // Answers of four tokens differ by some bytes; where a block begins differs, too.
    let more = [40, 8, 1];
    let is_no_more = |turn: &[u64; 3]| (0..3).all(|work| turn[work] <= took[2][work] + more[work]);
    assert!(took[2..].iter().all(is_no_more), "{took:?}");
    assert!(took[2].iter().all(|work| *work > 0), "{took:?}");
    server.finish().await;
}
