//! Do the program's commands help a person who types them?

use std::io::Write as _;
use std::process::{Output, Stdio};

use super::server::{Home, Server, machine, program};
use super::workload::BLOCK_BYTES;

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn run(arguments: &[&str]) -> Output {
    program(arguments).output().unwrap()
}

#[test]
fn each_command_has_help_that_names_its_flags() {
    for (arguments, words) in [
        (&["--help"][..], &["serve", "pull", "chat"][..]),
        (&["serve", "--help"], &["--model", "--listen", "--data-dir", "--set", "--config"]),
        (&["pull", "--help"], &["Usage: rekindle pull"]),
        (&["chat", "--help"], &["--url", "--conversation"]),
        (&["replay", "--help"], &["--data-dir", "--policy", "--device-share", "--journal", "as recorded"]),
        (&["--version"], &[env!("CARGO_PKG_VERSION")]),
    ] {
        let told = run(arguments);
        assert!(told.status.success(), "{arguments:?}: {}", text(&told.stderr));
        for word in words {
            assert!(
                text(&told.stdout).contains(word),
                "{arguments:?} does not tell of {word}:\n{}",
                text(&told.stdout)
            );
        }
    }
}

#[test]
fn a_mistyped_setting_is_refused_with_the_one_that_was_meant() {
    let home = Home::new();
    let refused = home.serve(&["kv.device_byte=1GiB".to_owned()]).output().unwrap();
    let said = text(&refused.stderr);
    assert!(!refused.status.success());
    assert!(said.contains("`kv.device_byte`") && said.contains("did you mean `kv.device_bytes`?"), "{said}");
    assert!(!home.data().exists(), "a refused start left a folder behind");
}

#[test]
fn a_missing_model_is_one_sentence_that_says_how_to_get_it() {
    let home = Home::new();
    let mut serve = program(&["serve", "--listen", "127.0.0.1:0", "--model", "/nowhere/model.gguf"]);
    let refused = serve.arg("--data-dir").arg(home.data()).output().unwrap();
    let said = text(&refused.stderr);
    assert!(!refused.status.success());
    assert!(said.contains("there is no model at /nowhere/model.gguf") && said.contains("rekindle pull"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_answers_each_line_of_a_pipe_and_says_what_it_reused() {
    let _alone = machine().await;
    let home = Home::new();
    let pools = [format!("kv.device_bytes={}", 128 * BLOCK_BYTES)];
    let server = Server::start(&home, &pools);
    let chat = program(&["chat", "--url", &server.url])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut chat = chat.unwrap();
    chat.stdin.take().unwrap().write_all(b"Say the word yes.\nSay it again.\n").unwrap();
    let told = tokio::task::spawn_blocking(|| chat.wait_with_output().unwrap()).await.unwrap();
    let (said, complaints) = (text(&told.stdout), text(&told.stderr));
    assert!(told.status.success() && complaints.is_empty(), "{complaints}");
    let accounts: Vec<_> = said.lines().filter(|line| line.contains(" tokens reused · ")).collect();
    assert_eq!(accounts.len(), 2, "{said}");
    assert!(said.lines().next().is_some_and(|line| !line.is_empty() && line != accounts[0]), "no answer: {said}");
    assert!(!accounts[1].starts_with("0 tokens reused"), "the second turn reused nothing: {said}");
    assert!(!said.contains('\u{1b}'), "colours in a pipe: {said:?}");
    server.finish().await;
}
