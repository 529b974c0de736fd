//! Does a pinned conversation stay while others are evicted, within its tenant's budget?

use serde_json::{Value, json};

use super::client::Client;
use super::server::{Home, Server, machine};

/// A pool for the window of 8,192 tokens and 768 more; a token's KV has 23,040 bytes.
const DEVICE: &str = "kv.device_bytes=206438400";

/// Encodes this as the first words of a conversation.
async fn say(client: &Client, conversation: &str, input: &str) -> Value {
    let body = json!({"conversation": conversation, "input": input, "max_output_tokens": 2, "temperature": 0});
    client.json(client.post("/v1/responses", &body)).await["usage"]["rekindle"].clone()
}

async fn residency(client: &Client, conversation: &str) -> Value {
    client.json(client.get(&format!("/v1/conversations/{conversation}/residency"))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_conversation_stays_on_the_device_while_others_go() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[DEVICE.to_owned()]);
    let client = Client::of(&server.url);
    let (pinned, other, large) =
        (client.conversation().await, client.conversation().await, client.conversation().await);
    say(&client, &pinned, &"My name is Ann. ".repeat(70)).await;
    say(&client, &other, &"My name is Bob. ".repeat(300)).await;

    let path = format!("/v1/conversations/{pinned}/pin");
    let pin = client.json(client.post(&path, &json!({"ttl_seconds": 600}))).await;
    assert_eq!((&pin["object"], &pin["conversation"]), (&json!("conversation.pin"), &json!(pinned)));
    assert_eq!(pin["pinned"], true);
    let (limit, used) = (pin["budget"]["limit_bytes"].as_u64().unwrap(), pin["budget"]["used_bytes"].as_u64().unwrap());
    assert!(used > 350 * 23_040 && used <= limit && limit == 768 * 23_040, "{pin}");
    let shown = residency(&client, &pinned).await;
    assert_eq!((&shown["pinned"], &shown["pin_expires_at"]), (&json!(true), &pin["expires_at"]));

    let before = residency(&client, &other).await["tiers"]["device"]["tokens"].as_u64().unwrap();
    // More than there is room for beside both.
    say(&client, &large, &"All work and no play makes Jack a dull boy. ".repeat(720)).await;
    let left = residency(&client, &other).await["tiers"]["device"]["tokens"].as_u64().unwrap();
    assert!(left < before, "the other one, used later than the pinned one, gave way: {left} of {before}");
    assert_eq!(residency(&client, &pinned).await["state"], "resident");
    let next = say(&client, &pinned, "And now?").await;
    assert_eq!((&next["reloaded_tokens"], &next["reencoded_tokens"]), (&json!(0), &json!(0)), "{next}");
    assert!(next["resident_tokens"].as_u64().unwrap() > 350, "{next}");

    // What does not fit is refused with what to do about it, and not tried again.
    let refused = client.post(&format!("/v1/conversations/{large}/pin"), &json!({})).send().await.unwrap();
    assert_eq!((refused.status().as_u16(), &refused.headers()["x-should-retry"]), (409, &"false".parse().unwrap()));
    let refused: Value = refused.json().await.unwrap();
    assert_eq!(refused["error"]["code"], "pin_budget_exceeded");
    assert!(refused["error"]["message"].as_str().unwrap().contains("unpin another"), "{refused}");

    for ttl in [json!(0), json!(-1), json!(86_401), json!("an hour")] {
        let wrong = client.post(&path, &json!({"ttl_seconds": ttl})).send().await.unwrap();
        assert_eq!(wrong.status(), 400, "{ttl}");
    }
    let unknown = format!("/v1/conversations/conv_{:032x}/pin", 1);
    assert_eq!(client.post(&unknown, &json!({})).send().await.unwrap().status(), 404);

    let unpinned = client.json(client.delete(&path)).await;
    assert_eq!((&unpinned["pinned"], &unpinned["expires_at"]), (&json!(false), &json!(null)));
    assert_eq!(unpinned["budget"]["used_bytes"], 0);
    assert_eq!(residency(&client, &pinned).await["pinned"], false);
    server.finish().await;
}
