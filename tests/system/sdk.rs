//! Do the real SDKs work with the real server, unchanged?
//!
//! The checks are in `tests/sdk`, one script for each SDK; `scripts/setup test` installs what they need beside the build.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::client::Client;
use super::server::{Home, Server, machine};
use super::tenants::Tenants;

/// Without checks of what this server doesn't have yet: sockets, and the verbs on a conversation's KV.
const PYTHON_PARTS: &str = "chat,errors,responses,conversations";
const NODE_WITHOUT: &str = "websocket";

#[tokio::test(flavor = "multi_thread")]
async fn the_python_sdk_finds_what_it_expects() {
    let python = folder().join("python/bin/python");
    assert_installed(&python);
    let mut script = Command::new(python);
    script.arg(script_path("conformance.py")).args(["--part", PYTHON_PARTS]);
    check(script, |tenants| vec!["--api-key2".to_owned(), tenants.b.clone()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_sdk_finds_what_it_expects() {
    assert_installed(&folder().join("node_modules/openai"));
    let mut script = Command::new("node");
    script.arg(script_path("conformance.mjs")).args(["--without", NODE_WITHOUT]).current_dir(folder());
    check(script, |_| Vec::new()).await;
}

/// Runs a script against a server of its own; it names each check and what was wrong.
async fn check(mut script: Command, arguments: impl Fn(&Tenants) -> Vec<String>) {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let cors = "api.cors.allow_origins=[\"https://app.example\"]".to_owned();
    let server = Server::start(&home, &[tenants.setting(), cors]);
    let models = Client::with_key(&server.url, &tenants.a);
    let models = models.json(models.get("/v1/models")).await;
    let model = models["data"][0]["id"].as_str().unwrap();
    let script = script.args(["--base-url", &format!("{}/v1", server.url), "--api-key", &tenants.a, "--model", model]);
    script.args(arguments(&tenants));
    let output = script.output().expect("the script runs");
    let told = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{told}\n{complained}", output.status);
    assert!(told.contains("PASS"), "nothing was checked:\n{told}");
    server.finish().await;
}

/// Where `scripts/setup test` puts the SDKs: beside the profile's folder.
fn folder() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_rekindle"));
    program.ancestors().nth(2).unwrap().join("sdk")
}

fn script_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk").join(name)
}

#[track_caller]
fn assert_installed(path: &Path) {
    assert!(path.exists(), "the SDK is not at {}; `scripts/setup test` installs it", path.display());
}
