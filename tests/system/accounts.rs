//! Does the metrics page say who displaced whom, who was back at once, and what was saved, as it happened?

use serde_json::{Value, json};

use super::client::{Client, Metrics};
use super::server::{Home, machine};
use super::tenants::{Served, Tenants};

/// A turn of two tokens, and its account.
pub async fn say(client: &Client, conversation: &str, input: &str) -> Value {
    let body = json!({"conversation": conversation, "input": input, "max_output_tokens": 2, "temperature": 0});
    client.json(client.post("/v1/responses", &body)).await["usage"]["rekindle"].clone()
}

fn device_bytes(metrics: &Metrics, tenant: &str) -> u64 {
    metrics.count(&format!("rekindle_tenant_bytes{{tenant=\"{tenant}\",tier=\"device\"}}"))
}

/// What a tenant's conversations lost to turns of its `own`, or of an `other` tenant.
fn displaced(metrics: &Metrics, what: &str, (tenant, whose): (&str, &str)) -> u64 {
    metrics.count(&format!("rekindle_displaced_{what}_total{{tenant=\"{tenant}\",for_tenant=\"{whose}\"}}"))
}

fn of(metrics: &Metrics, name: &str, tenant: &str) -> u64 {
    metrics.count(&format!("rekindle_{name}{{tenant=\"{tenant}\"}}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_eviction_is_told_of_by_whose_turn_it_was_by_path_and_as_an_early_return() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let Served { server, a, b, admin } = tenants.serve(&home, &tenants.settings());
    let (ours, theirs) = (a.conversation().await, b.conversation().await);
    say(&a, &ours, &"My name is Ann. ".repeat(120)).await;
    let again = say(&a, &ours, "And now?").await;
    let before = admin.metrics().await;
    let held = device_bytes(&before, "a");
    assert!(held > 500 * super::workload::TOKEN_BYTES, "{held}");
    assert_eq!(held, before.pool_bytes("device") - before.free_bytes("device"), "nobody else holds anything");
    assert_eq!(of(&before, "saved_prefill_tokens_total", "a"), again["resident_tokens"].as_u64().unwrap());
    assert!(of(&before, "saved_prefill_milliseconds_total", "a") > 0);

    say(&b, &theirs, &"All work and no play makes Jack a dull boy. ".repeat(130)).await;
    let metrics = admin.metrics().await;
    let (left, taken) = (device_bytes(&metrics, "a"), device_bytes(&metrics, "b"));
    assert_eq!(left + taken, metrics.pool_bytes("device") - metrics.free_bytes("device"));
    let evictions = metrics.count("rekindle_evictions_total");
    assert!(evictions > 0 && left < held, "{left} of {held} bytes are left");
    assert_eq!(displaced(&metrics, "evictions", ("a", "other")), evictions);
    assert_eq!(displaced(&metrics, "bytes", ("a", "other")), held - left);
    assert_eq!(displaced(&metrics, "lost_bytes", ("a", "other")), held - left, "there is no tier below");
    let nothing = [("a", "own"), ("b", "own"), ("b", "other")].map(|whose| displaced(&metrics, "evictions", whose));
    assert_eq!(nothing, [0; 3]);
    assert_eq!(["a", "b"].map(|tenant| of(&metrics, "caused_evictions_total", tenant)), [0, evictions]);
    let by_rule: u64 = ["ended", "lru", "return_rate", "over_ceiling"]
        .map(|rule| metrics.count(&format!("rekindle_tenant_evictions_total{{tenant=\"a\",rule=\"{rule}\"}}")))
        .iter()
        .sum();
    assert_eq!(by_rule, evictions);
    assert_eq!((of(&metrics, "evicted_silences_total", "a"), of(&metrics, "early_returns_total", "a")), (1, 0));
    let shown = a.json(a.get(&format!("/v1/conversations/{ours}/residency"))).await;
    assert_eq!(shown["last_eviction"]["for_tenant"], "other", "{shown}");

    // Sooner than in a minute.
    let back = say(&a, &ours, "And now?").await;
    assert_eq!(back["decision"], "reencode", "{back}");
    let metrics = admin.metrics().await;
    assert_eq!((of(&metrics, "evicted_silences_total", "a"), of(&metrics, "early_returns_total", "a")), (1, 1));
    let turns = |path| metrics.count(&format!("rekindle_path_turns_total{{tenant=\"a\",path=\"{path}\"}}"));
    assert_eq!(["fresh", "hot", "reloaded", "reencoded"].map(turns), [1, 1, 0, 1]);
    let slow = metrics.count("rekindle_turn_first_token_seconds_count{path=\"reencoded\"}");
    assert_eq!(slow, 1);
    assert_eq!(metrics.count("rekindle_isolation_faults_total"), 0);

    // What is held goes on counting while nothing happens.
    let seconds = |metrics: &Metrics| metrics.count("rekindle_tenant_byte_seconds_total{tenant=\"a\",tier=\"device\"}");
    let later = admin.metrics().await;
    assert!(seconds(&later) > seconds(&metrics) && seconds(&metrics) > 0);
    server.finish().await;
}
