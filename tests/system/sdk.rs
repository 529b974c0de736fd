//! Do the real SDKs, and what people build on them, work with the real server, unchanged?
//!
//! The checks are in `tests/sdk`, one script for each SDK; `scripts/setup test` installs what they need beside the build.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::client::Client;
use super::server::{Home, Server, machine};
use super::tenants::Tenants;

#[tokio::test(flavor = "multi_thread")]
async fn the_python_sdk_finds_what_it_expects() {
    let python = folder().join("python/bin/python");
    assert_installed(&python);
    let mut script = Command::new(python);
    script.arg(script_path("conformance.py"));
    check(script, |tenants| vec!["--api-key2".to_owned(), tenants.b.clone()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_sdk_finds_what_it_expects() {
    assert_installed(&folder().join("node_modules/openai"));
    let mut script = Command::new("node");
    script.arg(script_path("conformance.mjs")).current_dir(folder());
    check(script, |_| Vec::new()).await;
}

/// Chats of several turns, in all ways that a framework has; each fails unless its history was reused.
#[tokio::test(flavor = "multi_thread")]
async fn frameworks_keep_their_conversations_and_find_their_history() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let models = client.json(client.get("/v1/models")).await;
    let (base, model) = (format!("{}/v1", server.url), models["data"][0]["id"].as_str().unwrap());
    let llm = tempfile::tempdir().unwrap();
    // A module is looked for beside its script, whose folder must then be that of the packages.
    let ai_sdk = folder().join("with_ai_sdk.mjs");
    std::fs::copy(script_path("with_ai_sdk.mjs"), &ai_sdk).unwrap();
    let python = |environment: &str| folder().join(environment).join("bin/python");
    for (program, script) in [
        (python("python"), script_path("with_agents.py")),
        (python("python"), script_path("with_langchain.py")),
        (python("python"), script_path("with_llm.py")),
        (python("llamaindex"), script_path("with_llamaindex.py")),
        (PathBuf::from("node"), ai_sdk),
    ] {
        if program.is_absolute() {
            assert_installed(&program);
        }
        let mut command = Command::new(program);
        let output = command.arg(&script).args([&base, model]).arg(llm.path()).output().expect("the script runs");
        let told = String::from_utf8_lossy(&output.stdout);
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {}\n{told}\n{complained}", script.display(), output.status);
        assert!(told.contains("cached"), "{} checked nothing:\n{told}", script.display());
    }
    server.finish().await;
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
