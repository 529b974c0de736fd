//! Does the dashboard's API say what the engine did, and do what it is asked?

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::header::{HeaderValue, ORIGIN, SET_COOKIE};
use serde_json::{Value, json};

use super::accounts::say;
use super::client::Client;
use super::server::{Home, Server, eventually, machine, program};
use super::tenants::{Served, Tenants};
use super::workload::BLOCK_BYTES;

const SOON: Duration = Duration::from_secs(5);

/// A server without tenants, a client of it, and its admin.
fn start<'home>(home: &'home Home, settings: &[String]) -> (Server<'home>, Client, Client) {
    let server = Server::start(home, settings);
    let (client, admin) = (Client::of(&server.url), Client::with_key(&server.url, &home.admin_key()));
    (server, client, admin)
}

/// What the dashboard says of a conversation, as soon as that is so.
async fn until(admin: &Client, id: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    eventually(SOON, what, async || {
        let response = admin.get(&format!("/admin/api/sessions/{id}")).send().await.unwrap();
        let row: Value = response.json().await.unwrap();
        is_so(&row).then_some(row)
    })
    .await
}

/// What a replay under these settings comes to, as soon as so many turns are in the record, which comes behind.
async fn replayed(admin: &Client, settings: &Value, turns: u64) -> Value {
    eventually(SOON, "all turns are recorded", async || {
        let told = admin.json(admin.post("/admin/api/policy/replay", settings)).await;
        (told["base"]["turns"] == turns).then_some(told)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_displaced_whom_is_told_as_the_metrics_have_it() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let Served { server, a, b, admin } = tenants.serve(&home, &tenants.settings());
    let (ours, theirs) = (a.conversation().await, b.conversation().await);
    say(&a, &ours, &"My name is Ann. ".repeat(120)).await;
    let row = until(&admin, &ours, "the turn is told of", |row| row["rank"] == 1).await;
    assert_eq!((&row["tenant"], &row["last_path"], &row["turns"]), (&"a".into(), &"fresh".into(), &1.into()));
    let next = admin.json(admin.get("/admin/api/policy")).await["victims"][0].clone();
    assert_eq!(
        (&next["session"], &next["rule"], &next["clean"]),
        (&ours.as_str().into(), &"lru".into(), &false.into())
    );

    say(&b, &theirs, &"All work and no play makes Jack a dull boy. ".repeat(130)).await;
    let metrics = admin.metrics().await;
    let evictions = metrics.count("rekindle_evictions_total");
    assert!(evictions > 0);
    let journal = eventually(SOON, "the evictions are told of", async || {
        let journal = admin.json(admin.get("/admin/api/evictions?kind=evict")).await;
        (journal["items"].as_array().unwrap().len() as u64 == evictions).then_some(journal)
    })
    .await;
    for entry in journal["items"].as_array().unwrap() {
        assert_eq!((&entry["session"], &entry["tenant"]), (&ours.as_str().into(), &"a".into()), "{entry}");
        assert_eq!((&entry["for"]["tenant"], &entry["rule"]), (&"b".into(), &"lru".into()), "{entry}");
        assert!(entry["sentence"].as_str().unwrap().contains("encoded again if it goes on"), "{entry}");
    }
    let freed: u64 =
        journal["items"].as_array().unwrap().iter().map(|entry| entry["freed_bytes"].as_u64().unwrap()).sum();
    let shown = admin.json(admin.get("/admin/api/tenants")).await;
    assert_eq!(shown["displaced"]["a>b"], evictions, "{shown}");
    let of = |name: &str| shown["items"].as_array().unwrap().iter().find(|item| item["id"] == name).unwrap().clone();
    assert_eq!(
        (&of("a")["evictions"]["suffered"], &of("b")["evictions"]["caused"]),
        (&evictions.into(), &evictions.into())
    );
    let used = |name: &str| of(name)["device"]["used_bytes"].as_u64().unwrap();
    let overview = admin.json(admin.get("/admin/api/overview")).await;
    let device = &overview["tiers"][0];
    assert_eq!(device["used_bytes"], used("a") + used("b"), "{device}");
    assert_eq!(device["used_bytes"], metrics.pool_bytes("device") - metrics.free_bytes("device"));
    assert!(freed > 0 && overview["isolation_faults"] == 0);
    // By state they are as many as there are.
    let sessions = overview["sessions"].as_object().unwrap();
    let states = ["running", "reloading", "hot", "warm", "cold", "none"];
    let sum: u64 = states.iter().map(|state| sessions[*state].as_u64().unwrap()).sum();
    assert_eq!((sum, &sessions["total"]), (2, &2.into()));

    // It was back at once, and had to encode its history again.
    let back = say(&a, &ours, "And now?").await;
    assert_eq!(back["decision"], "reencode", "{back}");
    let row = until(&admin, &ours, "the return is told of", |row| row["turns"] == 2).await;
    assert_eq!(row["last_path"], "reencoded");
    let turns = row["turns_detail"].as_array().unwrap();
    assert_eq!((turns.len(), &turns[0]["path"], &turns[1]["path"]), (2, &"reencoded".into(), &"fresh".into()));
    let kinds: Vec<&str> =
        row["evictions"].as_array().unwrap().iter().map(|entry| entry["kind"].as_str().unwrap()).collect();
    assert!(kinds.contains(&"reencode") && kinds.contains(&"evict"), "{kinds:?}");
    let early = admin.json(admin.get("/admin/api/tenants")).await;
    let early = early["items"].as_array().unwrap().iter().find(|item| item["id"] == "a").unwrap()["early"].clone();
    assert_eq!(early, json!({"evicted": 1, "returned": 1}));

    // What if: as it ran it is what was counted, and with four times the memory nothing is encoded again.
    let bytes = metrics.pool_bytes("device") * 4;
    let replayed = replayed(&admin, &json!({"device_bytes": bytes}), 3).await;
    assert_eq!(
        (&replayed["base"]["turns"], &replayed["base"]["evictions"]),
        (&3.into(), &admin.metrics().await.count("rekindle_evictions_total").into()),
        "{replayed}"
    );
    assert!(replayed["base"]["reencoded_tokens"].as_u64() > Some(0), "{replayed}");
    assert_eq!(
        (&replayed["sim"]["reencoded_tokens"], &replayed["sim"]["evictions"]),
        (&0.into(), &0.into()),
        "{replayed}"
    );
    let recorded = (&replayed["base"]["replayed"], &replayed["sim"]["replayed"]);
    assert_eq!(recorded, (&"as_recorded".into(), &"what_if".into()), "{replayed}");
    // What encodes less is foretold to answer sooner, by the same speeds; what was measured stands beside it.
    let p95 = |side: &str| replayed[side]["ttft"]["p95_ms"].as_u64().unwrap();
    assert!(p95("sim") <= p95("base") && p95("sim") > 0, "{replayed}");
    assert_eq!((&replayed["base"]["measured"]["turns"], &replayed["window"]["turns"]), (&3.into(), &3.into()));
    let window = |end: &str| replayed["window"][end].as_i64().unwrap();
    let ago_ms = overview["as_of"]["ts"].as_i64().unwrap() - window("from");
    assert!(window("from") < window("to") && (0..600_000).contains(&ago_ms), "{replayed}");
    let by_tenant = replayed["by_tenant"].as_array().unwrap();
    let of_a = by_tenant.iter().find(|tenant| tenant["id"] == "a").unwrap();
    assert_eq!((&of_a["turns"], &of_a["sim_reencoded_tokens"]), (&2.into(), &0.into()), "{of_a}");
    assert!(of_a["base_ms"].as_u64() > Some(0) && of_a["measured_ms"].as_u64() > Some(0), "{of_a}");
    assert!(replayed["assumptions"].as_str().unwrap().contains("encoding rate"), "{replayed}");
    // Another floor for a tenant is another policy; who is not known has none.
    let ask = async |tenants: Value| {
        let asked = admin.post("/admin/api/policy/replay", &json!({"tenants": tenants})).send().await.unwrap();
        (asked.status().as_u16(), asked.json::<Value>().await.unwrap())
    };
    let (status, other) = ask(json!({"b": {"floor": 0, "ceiling": bytes}})).await;
    assert_eq!(
        (status, &other["sim"]["replayed"], &other["sim"]["turns"]),
        (200, &"what_if".into(), &3.into()),
        "{other}"
    );
    for (tenants, param) in [
        (json!({"nobody": {"floor": 1}}), "tenants.nobody"),
        (json!({"a": {"floor": 2, "ceiling": 1}}), "tenants.a.floor"),
        (json!({"a": {"ceiling": -1}}), "tenants.a.ceiling"),
    ] {
        let (status, refused) = ask(tenants).await;
        assert_eq!((status, &refused["error"]["param"]), (400, &param.into()), "{refused}");
    }
    server.finish().await;
}

/// Blocks of the device that a floor may keep, besides those of one window.
pub const SPARE_BLOCKS: u64 = 64;

/// A server on which tenant `a` filled the pool while `b` was silent, whose conversation went, and `b` then went on. `a` goes
/// on with nothing, so that a floor for `b` would have changed what `b` met with and nothing else.
pub async fn displaced<'home>(home: &'home Home, tenants: &Tenants) -> Served<'home> {
    const WINDOW_BLOCKS: u64 = 512;
    let without_floor = "floor = { device = 0 }\nceiling = { device = \"100%\" }";
    tenants.write(without_floor, without_floor);
    let device = format!("kv.device_bytes={}", (WINDOW_BLOCKS + SPARE_BLOCKS) * BLOCK_BYTES);
    let served = tenants.serve(home, &[tenants.setting(), device, "kv.host_bytes=0".to_owned()]);
    let theirs = served.b.conversation().await;
    say(&served.b, &theirs, &"My name is Ann. ".repeat(150)).await;
    // Less than its ceiling, at which it would displace its own alone.
    for (sea, length) in [("Baltic", 640), ("Aegean", 640), ("Adriatic", 500)] {
        let ours = served.a.conversation().await;
        say(&served.a, &ours, &format!("{sea}! {}", "My name is Tom. ".repeat(length))).await;
    }
    let back = say(&served.b, &theirs, "And now?").await;
    assert_eq!(back["decision"], "reencode", "{back}");
    replayed(&served.admin, &json!({}), 5).await;
    served
}

#[tokio::test(flavor = "multi_thread")]
async fn what_if_a_tenant_had_a_floor_is_asked_by_its_name_and_changes_its_row_alone() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let Served { server, admin, .. } = displaced(&home, &tenants).await;
    let ask = async |floor_of: &str, blocks: u64| {
        let body = json!({"tenants": {floor_of: {"floor": blocks * BLOCK_BYTES}}});
        let told = admin.json(admin.post("/admin/api/policy/replay", &body)).await;
        let rows = told["by_tenant"].as_array().unwrap();
        assert_eq!(rows.len(), 2, "{told}");
        ["a", "b"].map(|tenant| {
            let row = rows.iter().find(|row| row["id"] == tenant).unwrap();
            ["base", "sim"].map(|side| {
                [format!("{side}_reencoded_tokens"), format!("{side}_ms")].map(|of| row[&of].as_u64().unwrap())
            })
        })
    };
    // What was recorded has its own times, so that what-ifs are compared with a what-if in which nothing is another.
    let without = ask("b", 0).await;
    let [[a, a_if], [b, b_if]] = ask("b", SPARE_BLOCKS).await;
    assert_eq!(([a, b], a_if), (without.map(|[base, _]| base), without[0][1]), "a floor for b changed what a met with");
    assert!(without[1][1][0] > 200 && b_if[0] == 0, "b encoded tokens again: {without:?}, and with a floor {b_if:?}");
    assert!(b_if[1] <= b[1], "{b_if:?}, {b:?}");
    // The command knows the name by the tenants file.
    let setting = tenants.setting();
    let (_, file) = setting.split_once('=').unwrap();
    let floor = format!("b={}:", SPARE_BLOCKS * BLOCK_BYTES);
    let mut command =
        program(&["replay", "--json", "--last", "3600", "--tenants", file, "--tenant", &floor, "--data-dir"]);
    let told = command.arg(home.data()).output().unwrap();
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    let again = [0, 1].map(|tenant| told["tenants"][tenant]["reencoded_tokens"].as_u64().unwrap());
    assert_eq!(again, [a_if[0], b_if[0]], "{told}");
    assert_eq!(ask("a", SPARE_BLOCKS).await, without, "a floor for a changed something, as if it were b's");
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_evicts_warms_pins_and_drops_and_takes_it_back() {
    let _alone = machine().await;
    let home = Home::new();
    let (server, client, admin) = start(&home, &[]);
    let id = client.conversation().await;
    say(&client, &id, &"My name is Ann. ".repeat(40)).await;
    until(&admin, &id, "it is idle", |row| row["state"] == "hot").await;
    let act = async |id: &str, verb: &str| {
        let response = admin.post(&format!("/admin/api/sessions/{id}/{verb}"), &json!({})).send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let (status, evicted) = act(&id, "evict").await;
    assert_eq!((status, &evicted["session"]["state"]), (200, &"warm".into()), "{evicted}");
    assert_eq!(evicted["session"]["bytes"]["device"], 0);
    let token = evicted["undo"]["token"].as_str().unwrap();
    let undone = admin.json(admin.post(&format!("/admin/api/undo/{token}"), &json!({}))).await;
    assert_eq!(undone["session"]["state"], "hot", "{undone}");
    let again = admin.post(&format!("/admin/api/undo/{token}"), &json!({})).send().await.unwrap();
    assert_eq!(again.status(), 404);

    let (_, pinned) = act(&id, "pin").await;
    assert_eq!(pinned["session"]["pinned"], true, "{pinned}");
    assert_eq!(admin.json(admin.get("/admin/api/sessions?state=pinned")).await["total"], 1);
    let (_, unpinned) = act(&id, "unpin").await;
    assert_eq!(unpinned["session"]["pinned"], false);

    // Older than what is there.
    let stale = admin.post(&format!("/admin/api/sessions/{id}/drop"), &json!({"if_seq": 0})).send().await.unwrap();
    assert_eq!(stale.json::<Value>().await.unwrap()["error"]["code"], "session_changed");
    let (_, dropped) = act(&id, "drop").await;
    assert_eq!((&dropped["session"]["state"], &dropped["undo"]), (&"none".into(), &Value::Null), "{dropped}");
    let back = say(&client, &id, "And now?").await;
    assert_eq!(back["decision"], "reencode");
    let (status, _) = act("conv_00000000000000000000000000000000", "evict").await;
    assert_eq!(status, 404);
    let (status, refused) = act(&id, "cancel").await;
    assert_eq!((status, &refused["error"]["code"]), (409, &"not_possible".into()));

    // A chat that is sent whole each time leaves KV, and no conversation that could be acted on.
    let model = client.json(client.get("/v1/models")).await["data"][0]["id"].clone();
    let messages = json!([{"role": "user", "content": "Who sails at night? ".repeat(20)}]);
    let body = json!({"model": model, "messages": messages, "max_tokens": 2});
    client.json(client.post("/v1/chat/completions", &body)).await;
    let chat = eventually(SOON, "the chat is told of", async || {
        let rows = admin.json(admin.get("/admin/api/sessions")).await["items"].clone();
        rows.as_array().unwrap().iter().find(|row| row["id"] != id.as_str()).cloned()
    })
    .await;
    assert_eq!(chat["stateless"], true, "{chat}");
    for verb in ["warm", "pin", "evict", "drop", "cancel"] {
        let (status, refused) = act(chat["id"].as_str().unwrap(), verb).await;
        assert_eq!((status, &refused["error"]["code"]), (409, &"stateless_session".into()), "{verb}: {refused}");
    }
    let row = admin.json(admin.get(&format!("/admin/api/sessions/{id}"))).await;
    assert_eq!(row["stateless"], false, "{row}");

    let actions = admin.json(admin.get("/admin/api/evictions?kind=action")).await;
    let actions = actions["items"].as_array().unwrap().clone();
    assert_eq!(actions.len(), 5, "{actions:?}");
    assert!(actions.iter().all(|entry| entry["actor"].as_str().unwrap().starts_with("admin-")));
    assert!(actions.iter().all(|entry| entry["session"] == id.as_str()));
    client.delete_conversation(&id).await;
    eventually(SOON, "it is gone", async || {
        let response = admin.get(&format!("/admin/api/sessions/{id}")).send().await.unwrap();
        (response.status() == 404).then_some(())
    })
    .await;
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_admin_gets_in_and_only_his_page_may_change_things() {
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let server = Server::start(&home, &tenants.settings());
    let http = reqwest::Client::new();
    let url = |path: &str| format!("{}{path}", server.url);
    let page = http.get(url("/admin")).send().await.unwrap();
    let policy = page.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
    let refused = http.get(url("/admin/api/overview")).send().await.unwrap();
    assert_eq!((refused.status().as_u16(), refused.headers()["x-request-id"].is_empty()), (401, false));
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "invalid_api_key");
    let tenant = Client::with_key(&server.url, &tenants.a).get("/admin/api/overview").send().await.unwrap();
    assert_eq!(tenant.json::<Value>().await.unwrap()["error"]["code"], "wrong_key_kind");

    let login = async |key: &str| http.post(url("/admin/api/login")).json(&json!({"key": key})).send().await.unwrap();
    for _ in 0..4 {
        assert_eq!(login(&tenants.a).await.status(), 401, "a tenant's key opens nothing here");
    }
    let answer = login(&tenants.admin).await;
    let cookie = answer.headers()[SET_COOKIE].to_str().unwrap().to_owned();
    assert!(
        cookie.starts_with("rk_admin=") && cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"),
        "{cookie}"
    );
    assert!(!cookie.contains(&tenants.admin), "the key is not in the cookie");
    let cookie = cookie.split(';').next().unwrap().to_owned();
    let me = http.get(url("/admin/api/me")).header("cookie", &cookie).send().await.unwrap();
    assert_eq!(me.headers()["cache-control"], "no-store");
    let me: Value = me.json().await.unwrap();
    let csrf = me["csrf"].as_str().unwrap();
    let change = async |origin: Option<&str>, csrf: &str| {
        let request = http.post(url("/admin/api/policy/replay")).header("cookie", &cookie).header("x-rk-csrf", csrf);
        let request = match origin {
            Some(origin) => request.header(ORIGIN, HeaderValue::from_str(origin).unwrap()),
            None => request,
        };
        request.json(&json!({})).send().await.unwrap().json::<Value>().await.unwrap()["error"]["code"].clone()
    };
    assert_eq!(change(Some(&server.url), csrf).await, "nothing_recorded");
    assert_eq!(change(None, csrf).await, "csrf_failed");
    assert_eq!(change(Some("https://elsewhere.example"), csrf).await, "csrf_failed");
    assert_eq!(change(Some(&server.url), "another").await, "csrf_failed");
    let out = http.post(url("/admin/api/logout")).header("cookie", &cookie).header("x-rk-csrf", csrf);
    assert_eq!(out.header(ORIGIN, &server.url).send().await.unwrap().status(), 200);
    assert_eq!(http.get(url("/admin/api/me")).header("cookie", &cookie).send().await.unwrap().status(), 401);

    // Five wrong ones in a minute, and even the right one has to wait.
    for _ in 0..5 {
        assert_eq!(login("rk_admin_wrong").await.status(), 401);
    }
    let waits = login(&tenants.admin).await;
    assert_eq!(waits.status(), 429);
    assert!(waits.headers().contains_key("retry-after"));
    let logged = home.logged();
    assert!(logged.contains("a login with a key that is no admin's") && !logged.contains(&tenants.a), "{logged}");
    server.terminate();
}

/// Reads events until one of them is what is waited for.
async fn read_until(
    stream: &mut (impl futures_util::Stream<Item = reqwest::Result<bytes::Bytes>> + Unpin),
    text: &mut String,
    is_it: impl Fn(&str, &Value) -> bool,
) -> Vec<(String, Option<u64>, Value)> {
    let mut events = Vec::new();
    loop {
        while let Some(end) = text.find("\n\n") {
            let block: String = text.drain(..end + 2).collect();
            let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
            let (Some(name), Some(data)) = (field("event: "), field("data: ")) else { continue };
            let (id, data) = (field("id: ").and_then(|id| id.parse().ok()), serde_json::from_str(&data).unwrap());
            let found = is_it(&name, &data);
            events.push((name, id, data));
            if found {
                return events;
            }
        }
        let next = tokio::time::timeout(SOON, stream.next()).await.expect("an event comes in time");
        text.push_str(std::str::from_utf8(&next.expect("the stream goes on").unwrap()).unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_tells_each_change_once_and_goes_on_where_it_was_cut() {
    let _alone = machine().await;
    let home = Home::new();
    let (server, client, admin) = start(&home, &[]);
    let id = client.conversation().await;
    let mut stream = admin.get(&format!("/admin/api/stream?watch={id}")).send().await.unwrap().bytes_stream();
    let mut text = String::new();
    let hello = read_until(&mut stream, &mut text, |name, _| name == "hello").await;
    let boot = hello[0].2["boot"].as_str().unwrap().to_owned();
    say(&client, &id, "Hello!").await;
    let is_idle =
        |name: &str, data: &Value| name == "session" && data["row"]["turns"] == 1 && data["row"]["state"] == "hot";
    let events = read_until(&mut stream, &mut text, is_idle).await;
    let numbers: Vec<u64> = events.iter().filter_map(|(_, id, _)| *id).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    assert!(events.iter().any(|(name, _, data)| name == "tick" && data["map"]["upsert"][0]["s"] == id.as_str()));
    let last = *numbers.last().unwrap();
    drop(stream);

    admin.json(admin.post(&format!("/admin/api/sessions/{id}/evict"), &json!({}))).await;
    let again = admin.get(&format!("/admin/api/stream?boot={boot}")).header("last-event-id", last.to_string());
    let mut stream = again.send().await.unwrap().bytes_stream();
    text.clear();
    let is_evicted = |name: &str, data: &Value| {
        name == "journal" && data["items"].as_array().unwrap().iter().any(|entry| entry["kind"] == "action")
    };
    let events = read_until(&mut stream, &mut text, is_evicted).await;
    let numbers: Vec<u64> = events.iter().filter_map(|(_, id, _)| *id).collect();
    assert_eq!((events[0].0.as_str(), numbers[0], numbers[1]), ("hello", last, last + 1), "{events:?}");
    assert!(numbers[1..].windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");

    // Of another process: from the beginning.
    let other = admin.get("/admin/api/stream?boot=another&after=1").send().await.unwrap();
    let mut other = other.bytes_stream();
    text.clear();
    let events = read_until(&mut other, &mut text, |name, _| name == "reset").await;
    assert_eq!(events.len(), 2);
    server.terminate();
    text.clear();
    read_until(&mut stream, &mut text, |name, _| name == "bye").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_and_numbers_of_turns_are_known_after_a_kill() {
    let _alone = machine().await;
    let home = Home::new();
    let (server, client, admin) = start(&home, &[]);
    let (root, silent) = (client.conversation().await, client.conversation().await);
    say(&client, &root, "My name is Ann.").await;
    say(&client, &root, "And now?").await;
    let fork = async |of: &str| {
        let forked = client.json(client.post(&format!("/v1/conversations/{of}/fork"), &json!({}))).await;
        forked["id"].as_str().unwrap().to_owned()
    };
    let (first, second) = (fork(&root).await, fork(&root).await);
    say(&client, &first, "And then?").await;
    let grandchild = fork(&first).await;
    let family = [&root, &first, &second, &grandchild, &silent];
    // The number of its newest turn, and who is of its family; nothing of what isn't told of yet.
    let told = async |admin: &Client| {
        let mut rows = Vec::new();
        for id in family {
            let answer = admin.get(&format!("/admin/api/sessions/{id}")).send().await.unwrap();
            let row: Value = answer.json().await.unwrap();
            let forks = row["forks"].as_array().into_iter().flatten();
            let mut forks: Vec<String> = forks.map(|fork| format!("{} of {}", fork["id"], fork["parent"])).collect();
            forks.sort_unstable();
            rows.push((row["turns"].as_u64(), forks));
        }
        rows
    };
    let before = eventually(SOON, "all turns and forks are told of", async || {
        let rows = told(&admin).await;
        let sizes: Vec<_> = rows.iter().map(|(turns, forks)| (*turns, forks.len())).collect();
        (sizes == [(Some(2), 3), (Some(3), 4), (None, 3), (None, 2), (None, 1)]).then_some(rows)
    })
    .await;
    server.kill();

    let (server, client, admin) = start(&home, &[]);
    assert_eq!(told(&admin).await, before, "after the kill");
    say(&client, &first, "And who?").await;
    until(&admin, &first, "turns are counted on", |row| row["turns"] == 4).await;
    client.delete_conversation(&root).await;
    server.kill();

    let (server, _, admin) = start(&home, &[]);
    let orphan = admin.json(admin.get(&format!("/admin/api/sessions/{second}"))).await;
    assert_eq!(
        orphan["forks"],
        json!([{"id": second, "parent": null, "tokens": orphan["tokens"], "state": "none", "self": true}])
    );
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_dashboard_shows_and_does_nothing() {
    let home = Home::new();
    let (server, client, admin) = start(&home, &["admin.read_only=true".to_owned(), "admin.node=node-a".to_owned()]);
    assert_eq!(admin.json(admin.get("/admin/api/me")).await["read_only"], true);
    assert_eq!(admin.json(admin.get("/admin/api/overview")).await["node"]["id"], "node-a");
    let id = client.conversation().await;
    let refused = admin.post(&format!("/admin/api/sessions/{id}/drop"), &json!({})).send().await.unwrap();
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "read_only");
    server.finish().await;
}

/// Puts so many conversations without a turn into a store.
pub async fn fill_store(home: &Home, many: usize) {
    // The tables are the server's own.
    Server::start(home, &[]).finish().await;
    let db = rusqlite::Connection::open(home.data().join("rekindle.db")).unwrap();
    db.execute_batch(&format!(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {many})
         INSERT INTO conversations (id, tenant, created_at, last_used_at, metadata, next_seq, log_tokens, encoded, chain)
         SELECT randomblob(16), 'default', 1790000000, 1790000000, '{{}}', 1, 0, 0, 0 FROM n"
    ))
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn among_a_hundred_thousand_conversations_no_answer_takes_long() {
    const MANY: usize = 100_000;
    let _alone = machine().await;
    let home = Home::new();
    fill_store(&home, MANY).await;
    let (server, client, admin) = start(&home, &[]);
    let id = client.conversation().await;
    say(&client, &id, "Hello!").await;
    until(&admin, &id, "the turn is told of", |row| row["state"] == "hot").await;
    let paths = [
        "/admin/api/overview",
        "/admin/api/tenants",
        "/admin/api/map?tier=device",
        "/admin/api/sessions?sort=-tokens",
        "/admin/api/sessions?sort=idle",
        "/admin/api/sessions?sort=rank",
        "/admin/api/sessions?state=none&sort=-return",
        "/admin/api/sessions?q=conv_ab",
        "/admin/api/policy",
        "/admin/api/evictions",
    ];
    for path in paths {
        let mut times: Vec<Duration> = Vec::new();
        for _ in 0..9 {
            let started = Instant::now();
            let answer = admin.get(path).send().await.unwrap();
            assert_eq!(answer.status(), 200, "{path}");
            let bytes = answer.bytes().await.unwrap().len();
            times.push(started.elapsed());
            assert!(bytes < 100_000, "{path}: {bytes} bytes");
        }
        times.sort_unstable();
        println!("{path}: {:?}", times[4]);
        // With debug assertions, over HTTP, on a busy machine.
        assert!(times[4] < Duration::from_millis(30), "{path}: {:?}", times[4]);
    }

    // Four pages follow while it works, and that takes next to nothing.
    let mut pages = Vec::new();
    for _ in 0..4 {
        let mut stream = admin.get("/admin/api/stream").send().await.unwrap().bytes_stream();
        pages.push(tokio::spawn(async move {
            let mut bytes = 0;
            while let Some(Ok(piece)) = stream.next().await {
                bytes += piece.len();
            }
            bytes
        }));
    }
    let (started, before) = (Instant::now(), server.cpu_time("dashboard"));
    while started.elapsed() < Duration::from_secs(6) {
        say(&client, &id, "And then?").await;
    }
    let (took, spent) = (started.elapsed(), server.cpu_time("dashboard") - before);
    println!("the books and four pages took {spent:?} of {took:?}");
    assert!(spent > Duration::ZERO && spent < took / 100, "{spent:?} of {took:?}");
    let page = admin.json(admin.get("/admin/api/sessions?sort=-idle&limit=100")).await;
    assert_eq!((&page["total"], page["items"].as_array().unwrap().len()), (&(MANY + 1).into(), 100));
    let next = page["next"].as_str().unwrap();
    let second = admin.json(admin.get(&format!("/admin/api/sessions?sort=-idle&limit=100&after={next}"))).await;
    assert_ne!(second["items"][0]["id"], page["items"][99]["id"]);
    server.finish().await;
    for page in pages {
        let bytes = page.await.unwrap() as u64;
        let a_second = bytes / took.as_secs();
        assert!(bytes > 1000 && a_second < 15_000, "{a_second} bytes a second");
    }
}
