//! Does the dashboard's page show what the server does, in a real browser?
//!
//! The checks are in `tests/dashboard`, one script for each question; each says at its head in which state it wants the
//! server, and that is made here. `scripts/setup test` brings Chromium and what the scripts need.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rekindle::tenants::key::{KeyHash, KeyKind, generate};
use serde_json::{Value, json};

use super::client::Client;
use super::server::{Home, Server, eventually, machine};
use super::tenants::{Served, Tenants};
use super::workload::BLOCK_BYTES;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dashboard")
}

/// Runs a script against a server, with more about it in the environment; fails with what it said.
fn script(name: &str, server: &str, admin: &str, more: &[(&str, String)]) -> Command {
    let installed = folder().join("node_modules/playwright-core");
    assert!(installed.exists(), "{} is missing; `scripts/setup test` installs it", installed.display());
    let mut command = Command::new("node");
    command.arg(folder().join(name)).env("REKINDLE_URL", server).env("REKINDLE_ADMIN_KEY", admin);
    command.envs(more.iter().map(|(name, value)| (*name, value)));
    // Pictures stay beside the build, for whoever wants to look.
    let shots = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dashboard");
    if std::env::var_os("SHOTS").is_none() {
        command.env("SHOTS", shots);
    }
    command
}

async fn holds(mut script: Command) {
    let output = tokio::task::spawn_blocking(move || script.output().expect("node runs")).await.unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{said}\n{complained}", output.status);
    assert!(said.contains("all so"), "it checked nothing:\n{said}");
    println!("{said}");
}

async fn say(client: &Client, conversation: &str, input: &str) -> reqwest::Result<Value> {
    let body = json!({"conversation": conversation, "input": input, "max_output_tokens": 4, "temperature": 0});
    client.post("/v1/responses", &body).send().await?.json().await
}

/// Conversations of some clients that go on and on, until this is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    /// `each`: conversations of a client, which it takes in turn. One is said something every `pause`.
    async fn begin(url: &str, keys: &[Option<String>], each: usize, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        for (number, key) in keys.iter().enumerate() {
            let client = key.as_ref().map_or_else(|| Client::of(url), |key| Client::with_key(url, key));
            let mut conversations = Vec::new();
            for _ in 0..each {
                conversations.push(client.conversation().await);
            }
            let stop = Arc::clone(&stop);
            tasks.push(tokio::spawn(async move {
                for turn in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let which = (turn * 7 + turn / 5 + number) % conversations.len();
                    let words = "Tell me more about the sea and the ships on it. ".repeat(1 + turn % 5);
                    // The server may be in the middle of a restart.
                    drop(say(&client, &conversations[which], &words).await);
                    tokio::time::sleep(pause).await;
                }
            }));
        }
        Self { stop, tasks }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_page_looks_right_and_shows_what_the_engine_did() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let mut settings = vec![tenants.setting(), "kv.eviction_policy=lru".to_owned(), "kv.disk_bytes=64MiB".to_owned()];
    settings.extend([format!("kv.device_bytes={}", 96 * BLOCK_BYTES), format!("kv.host_bytes={}", 64 * BLOCK_BYTES)]);
    let server = Server::start(&home, &settings);
    let keys = [Some(tenants.a.clone()), Some(tenants.b.clone())];
    let load = Load::begin(&server.url, &keys, 6, Duration::from_millis(20)).await;
    let admin = Client::with_key(&server.url, &tenants.admin);
    eventually(Duration::from_secs(60), "both tenants lose memory", async || {
        let shown = admin.json(admin.get("/admin/api/tenants")).await;
        let items = shown["items"].as_array().unwrap();
        let lost = |item: &Value| item["evictions"]["suffered"].as_u64() > Some(2);
        (items.len() == 2 && items.iter().all(lost)).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    load.end().await;
    holds(script("routes.mjs", &server.url, &tenants.admin, &[])).await;
    holds(script("truth.mjs", &server.url, &tenants.admin, &[])).await;
    holds(script("offline.mjs", &server.url, &tenants.admin, &[])).await;
    holds(script("pictures.mjs", &server.url, &tenants.admin, &[])).await;
    server.finish().await;
    if let Some(folder) = std::env::var_os("REKINDLE_PICTURES") {
        take_picture(&folder).await;
    }
}

/// README's picture, of a server as one has it in a day: three tenants past the pool, pins, ends, minutes of history.
async fn take_picture(folder: &OsStr) {
    const NAMES: [&str; 3] = ["acme", "northwind", "pixelforge"];
    let home = Home::new();
    let admin_key = generate(KeyKind::Admin);
    let keys = NAMES.map(|_| generate(KeyKind::Tenant));
    let mut text = format!("admin_key = [{{ sha256 = \"{}\" }}]\n", KeyHash::of(&admin_key).hex());
    for (name, key) in NAMES.iter().zip(&keys) {
        text += &format!("[[tenant]]\nid = \"{name}\"\nkeys = [{{ sha256 = \"{}\" }}]\n", KeyHash::of(key).hex());
        if *name == "acme" {
            text += "weight = 2.0\nceiling = { device = \"100%\" }\npin_budget = { device = \"64MiB\" }\n";
        }
    }
    let file = home.data().with_file_name("tenants.toml");
    std::fs::write(&file, text).unwrap();
    let mut settings = vec![format!("tenants.file={}", file.display()), "admin.node=node-a".to_owned()];
    for (tier, blocks) in [("device", 640), ("host", 800), ("disk", 1400)] {
        settings.push(format!("kv.{tier}_bytes={}", blocks * BLOCK_BYTES));
    }
    let server = Server::start(&home, &settings);
    let load = Load::begin(&server.url, &keys.clone().map(Some), 40, Duration::from_millis(500)).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let admin = Client::with_key(&server.url, &admin_key);
    let listed = admin.json(admin.get("/admin/api/sessions?tenant=acme&sort=-turns&limit=3")).await;
    let ids: Vec<&str> = listed["items"].as_array().unwrap().iter().filter_map(|row| row["id"].as_str()).collect();
    for id in &ids[..2] {
        admin.post(&format!("/admin/api/sessions/{id}/pin"), &json!({})).send().await.unwrap();
    }
    let acme = Client::with_key(&server.url, &keys[0]);
    acme.post(&format!("/v1/conversations/{}/done", ids[2]), &json!({})).send().await.unwrap();
    tokio::time::sleep(Duration::from_secs(360)).await;
    let mut shots = script("shots.mjs", &server.url, &admin_key, &[]);
    shots.env("SHOTS", folder);
    holds(shots).await;
    load.end().await;
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_what_a_replay_came_to_and_leaves_none_behind() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let Served { server, .. } = super::dashboard::displaced(&home, &tenants).await;
    let more = [("REKINDLE_PID", server.id().to_string()), ("REKINDLE_TENANT_KEY", tenants.a.clone())];
    holds(script("whatif.mjs", &server.url, &tenants.admin, &more)).await;
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_does_on_the_page_is_done() {
    let _alone = machine().await;
    let (home, other) = (Home::new(), Home::new());
    // What is left beside a window's blocks is the pins' budget: enough for one, and not for all.
    let sizes = [format!("kv.device_bytes={}", (512 + 48) * BLOCK_BYTES), "admin.node=node-a".to_owned()];
    let server = Server::start(&home, &sizes);
    let key = home.admin_key();
    // Before it is started, so that both have the same.
    std::fs::create_dir_all(other.data()).unwrap();
    std::fs::write(other.data().join("admin.key"), &key).unwrap();
    let read_only = Server::start(&other, &["admin.read_only=true".to_owned()]);
    for server in [&server, &read_only] {
        let client = Client::of(&server.url);
        for length in [20, 60, 90] {
            let id = client.conversation().await;
            say(&client, &id, &"My name is Ann. ".repeat(length)).await.unwrap();
        }
    }
    let more = [("REKINDLE_READONLY_URL", read_only.url.clone())];
    holds(script("actions.mjs", &server.url, &key, &more)).await;
    read_only.finish().await;
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_stays_true_through_cuts_and_restarts() {
    let _alone = machine().await;
    let home = Home::new();
    let mut server = Server::start(&home, &[]);
    let (url, key) = (server.url.clone(), home.admin_key());
    let load = Load::begin(&url, &[None, None], 4, Duration::from_millis(50)).await;
    // The script asks for a restart by a file, and waits for another.
    let (asked, done) = (home.data().with_file_name("restart"), home.data().with_file_name("restarted"));
    let restart = format!("touch {} && until [ -f {} ]; do sleep 0.1; done", asked.display(), done.display());
    let more = [("REKINDLE_RESTART", restart), ("STALL_S", "6".to_owned())];
    let mut running = tokio::spawn(holds(script("stream.mjs", &url, &key, &more)));
    let address = url.strip_prefix("http://").unwrap().to_owned();
    loop {
        tokio::select! {
            ended = &mut running => break ended.unwrap(),
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
        if asked.exists() && !done.exists() {
            server.kill();
            server = Server::start_at(&home, &address, &[]);
            std::fs::write(&done, "").unwrap();
        }
    }
    assert!(done.exists(), "the script never asked for a restart");
    load.end().await;
    server.terminate();
    let status = server.ended(super::server::END).await;
    assert!(status.success(), "the server ended with {status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_hundred_thousand_conversations_the_page_is_quick_and_stays_small() {
    let _alone = machine().await;
    let home = Home::new();
    super::dashboard::fill_store(&home, 100_000).await;
    let server = Server::start(&home, &[]);
    // So that there are rows that differ. What is asked of the page is asked of it alone, without a model beside it.
    let load = Load::begin(&server.url, &[None], 4, Duration::from_millis(50)).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    load.end().await;
    let minutes = if std::env::var_os("REKINDLE_SOAK").is_some() { "10" } else { "0.2" };
    let more = [("SCALE_MINUTES", minutes.to_owned())];
    holds(script("scale.mjs", &server.url, &home.admin_key(), &more)).await;
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_gets_in_and_no_secret_gets_out() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let server = Server::start(&home, &[tenants.setting()]);
    let client = Client::with_key(&server.url, &tenants.a);
    let id = client.conversation().await;
    say(&client, &id, "Hello!").await.unwrap();
    holds(script("words.mjs", &server.url, &tenants.admin, &[])).await;
    let more = [("REKINDLE_TENANT_KEY", tenants.a.clone()), ("REKINDLE_LOG", home.log().display().to_string())];
    holds(script("security.mjs", &server.url, &tenants.admin, &more)).await;
    server.terminate();
}
