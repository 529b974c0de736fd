//! Does the program tell a person, and a script, what came of it?

#![expect(clippy::unwrap_used, reason = "a test: what can't be done fails it")]

use std::path::Path;
use std::process::{Command, Output};

fn load_tests(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_load-tests")).args(arguments).output().unwrap()
}

#[test]
fn a_measurement_keeps_its_table_and_its_status_says_whether_the_bound_holds() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("overhead");
    let output = load_tests(&["overhead", "--steps", "3", "--resting", "8", "--results", folder.to_str().unwrap()]);
    let table = std::fs::read_to_string(folder.join("overhead.md")).unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains(&table));
    assert!(table.contains("\n| 64 | 8 | 256 |"), "{table}");
    assert!(table.contains("- Machine: "), "{table}");
    // A busy machine may break the bound; what must be so is that both say the same.
    assert_eq!(output.status.success(), !table.contains("**NO**"), "{table}");
}

#[test]
fn a_missing_server_is_one_clear_sentence_and_a_failure() {
    for command in ["ttft", "throughput", "idle", "dashboard"] {
        let output = load_tests(&["--server", "/no/such/rekindle", command]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(said.contains("there is no server at /no/such/rekindle; build it"), "{said}");
    }
}

#[test]
fn work_that_is_none_and_a_model_that_is_missing_are_one_clear_sentence_each() {
    let step = |model: &str, shape: &str| {
        let output = load_tests(&["step", "--model", model, "--threads", "1", shape]);
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let said = step("/no/such.gguf", "prefill@0");
    assert!(said.contains("/no/such.gguf can't be loaded"), "{said}");
    let said = step("/no/such.gguf", "idle@0");
    assert!(said.contains("`idle` is neither `prefill` nor `decode`"), "{said}");
}
