use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use proptest::collection::vec;
use proptest::prelude::*;
use rusqlite::Connection;

use super::*;
use crate::store::{LogToken, LogWrite, ResponseRecord};
use crate::types::TokenId;

const CHILD_DIR: &str = "REKINDLE_TEST_STORE_CHILD";

fn record(tenant: &str, id: u128) -> ConversationRecord {
    let metadata = BTreeMap::from([("topic".to_owned(), "päper".to_owned())]);
    ConversationRecord {
        id,
        tenant: tenant.to_owned(),
        created_at: 1_790_000_000,
        last_used_at: 1_790_000_000,
        metadata,
        chain: false,
        parent: None,
    }
}

fn item(id: &str, body: &str) -> (String, String) {
    (id.to_owned(), body.to_owned())
}

fn tokens(range: std::ops::Range<u32>) -> Vec<LogToken> {
    range.map(|n| LogToken { id: TokenId(n), bytes: (n % 7) as u16 }).collect()
}

fn bodies(stored: &StoredConversation) -> Vec<&str> {
    stored.items.iter().map(|item| item.body.as_str()).collect()
}

/// Whether any file of the folder holds these bytes.
fn on_disk(dir: &Path, needle: &str) -> bool {
    std::fs::read_dir(dir).unwrap().any(|entry| {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        bytes.windows(needle.len()).any(|window| window == needle.as_bytes())
    })
}

/// Changes the file behind the store's back.
fn tamper(dir: &Path, sql: &str) {
    Connection::open(dir.join("rekindle.db")).unwrap().execute_batch(sql).unwrap();
}

#[tokio::test]
async fn a_conversation_comes_back_after_a_restart_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("made/by/open");
    let store = Embedded::open(&data).unwrap();
    store.create(record("a", 1), vec![item("i0", "zero")]).await.unwrap();
    let commit = Commit {
        items: vec![item("i1", "one"), item("i2", "zwei ☕")],
        log: Some(LogWrite { keep: 0, append: tokens(0..1300) }),
        encoded: Some(1299),
        last_used_at: 1_790_000_777,
        ..Commit::default()
    };
    store.commit(1, commit).await.unwrap();
    store.close().await.unwrap();
    drop(store);

    let store = Embedded::open(&data).unwrap();
    let back = store.load("a", 1).await.unwrap().unwrap();
    assert_eq!(back.conversation, ConversationRecord { last_used_at: 1_790_000_777, ..record("a", 1) });
    assert_eq!(bodies(&back), ["zero", "one", "zwei ☕"]);
    assert!(back.items.is_sorted_by(|a, b| a.seq < b.seq));
    assert_eq!(back.log, tokens(0..1300));
    assert_eq!(back.encoded, 1299);
}

#[tokio::test]
async fn dropping_the_store_finishes_what_was_sent() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.create(record("a", 1), vec![]).await.unwrap();
    // Polled once, the request is in the queue; then the caller goes away.
    let mut sent = store.commit(1, Commit { items: vec![item("i", "said")], ..Commit::default() });
    let waker = std::task::Waker::noop();
    drop(sent.as_mut().poll(&mut std::task::Context::from_waker(waker)));
    drop(sent);
    drop(store);
    assert!(!dir.path().join("rekindle.db-wal").exists(), "one tidy file is left");
    let store = Embedded::open(dir.path()).unwrap();
    assert_eq!(bodies(&store.load("a", 1).await.unwrap().unwrap()), ["said"]);
}

#[tokio::test]
async fn what_was_acknowledged_survives_sigkill_in_the_middle_of_commits() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    for round in 1..=3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["store::embedded::tests::the_process_that_is_killed", "--exact", "--nocapture"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut promised: Vec<(u128, usize)> = Vec::new();
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            if let Some(ack) = line.unwrap().strip_prefix("ack ") {
                let (conversation, number) = ack.split_once(' ').unwrap();
                promised.push((conversation.parse().unwrap(), number.parse().unwrap()));
            }
            if promised.len() == 150 {
                child.kill().unwrap(); // SIGKILL; what is in the pipe is read all the same
            }
        }
        assert!(!child.wait().unwrap().success(), "the child ended by itself");
        assert!(promised.len() >= 150, "round {round}: only {} commits", promised.len());
        acknowledged += promised.len();

        let store = Embedded::open(dir.path()).unwrap();
        for conversation in 0..8 {
            let stored = store.load("a", conversation).await.unwrap().unwrap();
            let last = promised.iter().filter(|(c, _)| *c == conversation).map(|(_, n)| *n).max().unwrap_or(0);
            assert!(stored.items.len() >= last, "round {round}: {last} promised, {} there", stored.items.len());
            // One commit is one item and three tokens: never one without the other.
            assert_eq!(stored.log.len(), 3 * stored.items.len(), "round {round}: a torn commit");
        }
    }
    assert!(acknowledged >= 450);
}

/// Not a test by itself: the process that the test above kills. Eight writers, so that groups are cut as well.
#[tokio::test]
async fn the_process_that_is_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let store = Arc::new(Embedded::open(Path::new(&dir)).unwrap());
    let mut writers = tokio::task::JoinSet::new();
    for id in 0..8u128 {
        let store = Arc::clone(&store);
        writers.spawn(async move {
            if store.conversation("a", id).await.unwrap().is_none() {
                store.create(record("a", id), vec![]).await.unwrap();
            }
            let stored = store.load("a", id).await.unwrap().unwrap();
            let (mut count, mut length) = (stored.items.len(), stored.log.len());
            loop {
                let log = LogWrite { keep: length, append: tokens(0..3) };
                let items = vec![item(&format!("i{count}"), "said")];
                store.commit(id, Commit { items, log: Some(log), ..Commit::default() }).await.unwrap();
                (count, length) = (count + 1, length + 3);
                println!("ack {id} {count}");
            }
        });
    }
    writers.join_next().await;
}

#[tokio::test]
async fn a_request_that_fails_takes_nothing_of_its_group_with_it_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.create(record("a", 1), vec![item("i0", "zero")]).await.unwrap();
    let commits = (0..200).map(|n| {
        // Every third has a new item first, then one that is there already.
        let doubled = if n % 3 == 0 { vec![item("i0", "again")] } else { vec![] };
        let items = [vec![item(&format!("n{n}"), "new")], doubled].concat();
        store.commit(1, Commit { items, ..Commit::default() })
    });
    for (n, result) in futures_util::future::join_all(commits).await.into_iter().enumerate() {
        match result {
            Err(StoreError::DuplicateItem(id)) => assert!(n % 3 == 0 && id == "i0"),
            other => assert!(n % 3 != 0 && other.is_ok(), "{n}: {other:?}"),
        }
    }
    assert_eq!(store.load("a", 1).await.unwrap().unwrap().items.len(), 1 + 200 - 67);
    assert!(matches!(store.commit(2, Commit::default()).await, Err(StoreError::NoConversation)));
}

#[tokio::test]
async fn an_item_id_is_used_once_in_a_conversation_and_freely_in_others() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.create(record("a", 1), vec![item("i", "x")]).await.unwrap();
    store.create(record("a", 2), vec![item("i", "y")]).await.unwrap();
    let twice = store.create(record("a", 3), vec![item("i", "x"), item("i", "x")]).await;
    assert!(matches!(twice, Err(StoreError::DuplicateItem(id)) if id == "i"));
    assert_eq!(store.conversation("a", 3).await.unwrap(), None, "a failed create leaves nothing");
    assert!(store.create(record("b", 1), vec![]).await.unwrap_err().to_string().contains("there already"));
}

#[tokio::test]
async fn two_tenants_do_not_see_or_touch_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.create(record("a", 1), vec![item("i", "secret")]).await.unwrap();
    assert_eq!(store.conversation("b", 1).await.unwrap(), None);
    assert_eq!(store.load("b", 1).await.unwrap(), None);
    assert!(!store.set_metadata("b", 1, BTreeMap::new()).await.unwrap());
    assert!(!store.delete("b", 1).await.unwrap());
    let mine = store.load("a", 1).await.unwrap().unwrap();
    assert_eq!((mine.conversation, mine.items.len()), (record("a", 1), 1));
}

#[tokio::test]
async fn a_deleted_conversation_leaves_no_byte_of_its_text_in_any_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let long = |word: &str| format!("{word} ").repeat(5000); // overflow pages as well
    let secret = ConversationRecord { metadata: [("k".into(), "quagga-note".into())].into(), ..record("a", 1) };
    store.create(secret, vec![item("i0", &long("xylophone-one")), item("i1", "short xylophone-two")]).await.unwrap();
    store.create(record("a", 2), vec![item("i", "kept marimba")]).await.unwrap();
    let log = Some(LogWrite { keep: 0, append: vec![LogToken { id: TokenId(0x6c6c_6568), bytes: 0x6f6f }; 700] });
    store.commit(1, Commit { log, ..Commit::default() }).await.unwrap();
    for there in ["xylophone-one", "xylophone-two", "quagga-note", "helloohelloo", "marimba"] {
        assert!(on_disk(dir.path(), there), "{there} should be there before the delete");
    }
    assert!(store.delete("a", 1).await.unwrap());
    for gone in ["xylophone", "quagga", "helloohelloo"] {
        assert!(!on_disk(dir.path(), gone), "{gone} is still there");
    }
    assert!(on_disk(dir.path(), "marimba"));
    assert!(!store.delete("a", 1).await.unwrap());
}

#[tokio::test]
async fn a_deleted_item_and_replaced_metadata_leave_no_byte_either() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let items = vec![item("i0", "stays put"), item("i1", "vanishing act")];
    store.create(record("a", 1), items).await.unwrap();
    let log = Some(LogWrite { keep: 0, append: tokens(0..600) });
    store.commit(1, Commit { log, encoded: Some(600), ..Commit::default() }).await.unwrap();
    assert!(store.delete_item(1, "i1", 520).await.unwrap());
    assert!(!store.delete_item(1, "i1", 0).await.unwrap());
    assert!(!store.delete_item(9, "i1", 0).await.unwrap());
    assert!(store.set_metadata("a", 1, BTreeMap::new()).await.unwrap());
    let stored = store.load("a", 1).await.unwrap().unwrap();
    assert_eq!((bodies(&stored), &stored.log, stored.encoded), (vec!["stays put"], &tokens(0..520), 520));
    assert!(stored.conversation.metadata.is_empty());
    assert!(!on_disk(dir.path(), "vanishing") && !on_disk(dir.path(), "päper"));
    // The deleted item's place in the order is not given again.
    store.commit(1, Commit { items: vec![item("i1", "back")], ..Commit::default() }).await.unwrap();
    assert_eq!(store.load("a", 1).await.unwrap().unwrap().items[1].seq, 2);
}

#[tokio::test]
async fn a_folder_has_one_process_at_a_time_and_is_free_when_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    assert!(matches!(Embedded::open(dir.path()), Err(StoreError::Locked { .. })));
    drop(store);
    drop(Embedded::open(dir.path()).unwrap());
}

#[tokio::test]
async fn another_builds_version_and_files_that_are_no_store_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Embedded::open(dir.path()).unwrap());
    tamper(dir.path(), "PRAGMA user_version = 99");
    let refused = Embedded::open(dir.path()).err().unwrap();
    assert!(matches!(refused, StoreError::Version { found: 99, expected: schema::VERSION, .. }), "{refused}");

    let foreign = tempfile::tempdir().unwrap();
    tamper(foreign.path(), "CREATE TABLE notes (text)");
    assert!(Embedded::open(foreign.path()).err().unwrap().to_string().contains("not a store of rekindle"));

    let noise = tempfile::tempdir().unwrap();
    std::fs::write(noise.path().join("rekindle.db"), [0xa5; 20_000]).unwrap();
    assert!(matches!(Embedded::open(noise.path()), Err(StoreError::Open { .. })));
}

#[tokio::test]
async fn the_file_has_the_settings_that_its_promises_rest_on() {
    let dir = tempfile::tempdir().unwrap();
    drop(Embedded::open(dir.path()).unwrap());
    let db = schema::open_writer(&dir.path().join("rekindle.db")).unwrap();
    let setting = |name: &str| -> String {
        db.query_row(&format!("SELECT CAST({name} AS TEXT) FROM pragma_{name}"), [], |row| row.get(0)).unwrap()
    };
    for (name, value) in [
        ("journal_mode", "wal"),
        ("synchronous", "2"),
        ("secure_delete", "1"),
        ("auto_vacuum", "2"),
        ("foreign_keys", "1"),
    ] {
        assert_eq!(setting(name), value, "{name}");
    }
}

#[tokio::test]
async fn a_record_that_does_not_fit_is_corrupt_and_the_rest_is_served() {
    for (n, damage) in [
        "UPDATE conversations SET metadata = 'no json' WHERE row = 1",
        "UPDATE conversations SET log_tokens = 3 WHERE row = 1",
        "UPDATE conversations SET log_tokens = -1 WHERE row = 1",
        "UPDATE conversations SET encoded = 4000000000 WHERE row = 1",
        "UPDATE conversations SET next_seq = 1 << 40 WHERE row = 1",
        "UPDATE log_chunks SET tokens = x'0102030405' WHERE conversation = 1 AND chunk = 0",
        "UPDATE log_chunks SET tokens = x'' WHERE conversation = 1 AND chunk = 1",
        "UPDATE log_chunks SET tokens = zeroblob(60000) WHERE conversation = 1 AND chunk = 1",
        "DELETE FROM log_chunks WHERE conversation = 1 AND chunk = 0",
        "UPDATE log_chunks SET chunk = -5 WHERE conversation = 1 AND chunk = 0",
        "UPDATE items SET seq = -1 WHERE conversation = 1",
    ]
    .into_iter()
    .enumerate()
    {
        let dir = tempfile::tempdir().unwrap();
        let store = Embedded::open(dir.path()).unwrap();
        for id in [1, 2] {
            store.create(record("a", id), vec![item("i", "x")]).await.unwrap();
            let log = Some(LogWrite { keep: 0, append: tokens(0..600) });
            store.commit(id, Commit { log, ..Commit::default() }).await.unwrap();
        }
        drop(store);
        tamper(dir.path(), damage);
        let store = Embedded::open(dir.path()).unwrap();
        let result = store.load("a", 1).await;
        assert!(matches!(result, Err(StoreError::Corrupt(_))), "{n}: {damage}: {result:?}");
        assert_eq!(store.load("a", 2).await.unwrap().unwrap().log.len(), 600);
        assert!(store.delete("a", 1).await.unwrap(), "{damage}: what can't be read can be deleted");
    }
}

#[tokio::test]
async fn a_closed_store_refuses_politely_and_a_live_one_answers_its_ping() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.ping().await.unwrap();
    store.close().await.unwrap();
    assert!(matches!(store.ping().await, Err(StoreError::Closed)));
    assert!(matches!(store.close().await, Err(StoreError::Closed)));
}

#[tokio::test]
async fn more_of_a_log_than_there_is_cannot_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.create(record("a", 1), vec![]).await.unwrap();
    let commit = |keep| Commit { log: Some(LogWrite { keep, append: tokens(0..4) }), ..Commit::default() };
    store.commit(1, commit(0)).await.unwrap();
    assert!(store.commit(1, commit(5)).await.unwrap_err().to_string().contains("4 tokens"));
    assert_eq!(store.load("a", 1).await.unwrap().unwrap().log.len(), 4);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_log_that_is_cut_and_appended_to_agrees_with_a_vector(
        writes in vec((0.0f64..=1.0, 0u32..1200, proptest::option::of(0usize..3000)), 1..12)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let store = Embedded::open(dir.path()).unwrap();
        runtime.block_on(store.create(record("a", 1), vec![])).unwrap();
        let (mut reference, mut reference_encoded) = (Vec::new(), 0);
        for (step, (kept, appended, encoded)) in (0u32..).zip(writes) {
            let keep = (kept * reference.len() as f64) as usize;
            let append = tokens(step * 10_000..step * 10_000 + appended);
            reference.truncate(keep);
            reference.extend(append.iter().copied());
            reference_encoded = encoded.unwrap_or(reference_encoded.min(keep)).min(reference.len());
            let commit = Commit { log: Some(LogWrite { keep, append }), encoded, ..Commit::default() };
            runtime.block_on(store.commit(1, commit)).unwrap();
            let stored = runtime.block_on(store.load("a", 1)).unwrap().unwrap();
            prop_assert_eq!(&stored.log, &reference);
            prop_assert_eq!(stored.encoded, reference_encoded);
        }
    }
}

fn response(id: u128, body: &str) -> ResponseRecord {
    ResponseRecord {
        id,
        created_at: 1_790_000_000,
        expires_at: 1_790_000_100,
        kept: true,
        request: [7; 32],
        previous: None,
        body: body.to_owned(),
        answer: None,
        logprobs: None,
    }
}

fn with_response(items: &[&str], response: ResponseRecord) -> Commit {
    let items = items.iter().map(|id| item(id, "said")).collect();
    Commit { items, response: Some(response), ..Commit::default() }
}

#[tokio::test]
async fn a_response_is_its_tenants_goes_with_its_conversation_and_is_replaced_by_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let chain = ConversationRecord { chain: true, ..record("a", 1) };
    store.begin(chain, with_response(&["i0"], response(10, "runs"))).await.unwrap();
    let ended = ResponseRecord { answer: Some("i1".into()), logprobs: Some("[]".into()), ..response(10, "over") };
    store.commit(1, with_response(&["i1"], ended.clone())).await.unwrap();
    let found = store.response("a", 10).await.unwrap().unwrap();
    assert_eq!(found, StoredResponse { response: ended, conversation: 1, chain: true });
    assert_eq!(store.response("b", 10).await.unwrap(), None);
    assert!(!store.delete_response("b", 10).await.unwrap());
    assert!(store.delete("a", 1).await.unwrap());
    assert_eq!(store.response("a", 10).await.unwrap(), None);
}

#[tokio::test]
async fn the_newest_response_is_the_one_made_last_in_its_conversation_or_behind_its_predecessor() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.create(record("a", 1), vec![]).await.unwrap();
    store.create(record("a", 2), vec![]).await.unwrap();
    let behind = |id, previous| ResponseRecord { previous: Some(previous), ..response(id, "x") };
    for (conversation, made) in [(1, response(30, "x")), (1, behind(20, 30)), (2, behind(10, 30))] {
        store.commit(conversation, with_response(&[], made)).await.unwrap();
    }
    // Its end does not make an older one newer.
    store.commit(1, with_response(&[], response(30, "over"))).await.unwrap();
    let newest = async |of| store.newest_response("a", of).await.unwrap().map(|found| found.response.id);
    assert_eq!(newest(NewestOf::Conversation(1)).await, Some(20));
    assert_eq!(newest(NewestOf::Continuations(30)).await, Some(10));
    assert_eq!(newest(NewestOf::Continuations(20)).await, None);
    assert_eq!(store.newest_response("b", NewestOf::Conversation(1)).await.unwrap(), None);
}

#[tokio::test]
async fn log_probabilities_go_with_the_item_whose_text_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.create(record("a", 1), vec![]).await.unwrap();
    let logprobs = Some("quagga in tokens".to_owned());
    let ended = ResponseRecord { answer: Some("i0".into()), logprobs, ..response(10, "over") };
    store.commit(1, with_response(&["i0", "i1"], ended)).await.unwrap();
    assert!(on_disk(dir.path(), "quagga"));
    // By itself, or to be replaced.
    store.commit(1, Commit { remove: Some("i0".into()), ..Commit::default() }).await.unwrap();
    assert!(!on_disk(dir.path(), "quagga"));
    assert_eq!(store.response("a", 10).await.unwrap().unwrap().response.logprobs, None);
    let there = store.items(1, vec!["i1".into(), "i0".into()]).await.unwrap();
    assert_eq!(there.iter().map(|item| item.id.as_str()).collect::<Vec<_>>(), ["i1"]);
    assert_eq!(store.item("a", "i1").await.unwrap().unwrap().body, "said");
    assert_eq!(store.item("b", "i1").await.unwrap(), None);
}

#[tokio::test]
async fn a_list_has_the_named_conversations_with_all_pairs_page_by_page() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    for id in 1..=6 {
        let mut made = record(if id == 6 { "b" } else { "a" }, id);
        made.chain = id == 5;
        made.metadata = [("n".to_owned(), (id % 2).to_string()), ("a\"b".to_owned(), "ü'".to_owned())].into();
        store.create(made, vec![]).await.unwrap();
    }
    let page = async |query: ListQuery| {
        let page = store.conversations("a", query).await.unwrap();
        page.map(|page| page.iter().map(|listed| listed.conversation.id).collect::<Vec<_>>())
    };
    let all = ListQuery { limit: 10, ..ListQuery::default() };
    assert_eq!(page(all.clone()).await, Some(vec![1, 2, 3, 4]));
    let newest = ListQuery { newest_first: true, limit: 2, ..all.clone() };
    assert_eq!(page(newest.clone()).await, Some(vec![4, 3]));
    assert_eq!(page(ListQuery { after: Some(3), ..newest.clone() }).await, Some(vec![2, 1]));
    for nobodys in [5, 6, 99] {
        assert_eq!(page(ListQuery { after: Some(nobodys), ..newest.clone() }).await, None);
    }
    let pairs = |pairs: &[(&str, &str)]| {
        let metadata = pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        page(ListQuery { metadata, ..all.clone() })
    };
    assert_eq!(pairs(&[("n", "1"), ("a\"b", "ü'")]).await, Some(vec![1, 3]));
    assert_eq!(pairs(&[("n", "1"), ("a\"b", "u")]).await, Some(vec![]));
    assert_eq!(pairs(&[("N", "1")]).await, Some(vec![]));
}

#[tokio::test]
async fn a_sweep_forgets_what_is_over_and_names_the_chains_that_nothing_leads_to() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    for (id, expires_at) in [(1, 100), (2, 200)] {
        let chain = ConversationRecord { chain: true, ..record("a", id) };
        let made = ResponseRecord { expires_at, ..response(id + 10, "x") };
        store.begin(chain, with_response(&["i0"], made)).await.unwrap();
    }
    store.create(record("a", 3), vec![]).await.unwrap();
    let result = ResultRecord { request: [1; 32], body: b"done".to_vec() };
    store.keep_result([1; 32], 50, result.clone()).await.unwrap();
    store.keep_result([2; 32], 60, result.clone()).await.unwrap();
    assert_eq!(store.sweep(150, 55).await.unwrap(), [("a".to_owned(), 1)]);
    assert_eq!(store.response("a", 11).await.unwrap(), None);
    assert!(store.response("a", 12).await.unwrap().is_some());
    assert_eq!(store.result([1; 32], 0).await.unwrap(), None);
    assert_eq!(store.result([2; 32], 60).await.unwrap(), Some(result));
    assert_eq!(store.result([2; 32], 61).await.unwrap(), None, "older than asked for");
}

#[tokio::test]
async fn a_note_is_what_was_kept_last_and_a_store_without_any_gets_room_for_them() {
    let dir = tempfile::tempdir().unwrap();
    drop(Embedded::open(dir.path()).unwrap());
    tamper(dir.path(), &format!("{WITHOUT_LINEAGE} DROP TABLE notes; PRAGMA user_version = 2"));
    let store = Embedded::open(dir.path()).unwrap();
    assert_eq!(store.note("habits").await.unwrap(), None);
    for value in [vec![1, 2], vec![3]] {
        store.keep_note("habits", value).await.unwrap();
    }
    drop(store);
    let store = Embedded::open(dir.path()).unwrap();
    assert_eq!(store.note("habits").await.unwrap(), Some(vec![3]));
}

/// A store as it was before version 4.
const WITHOUT_LINEAGE: &str = "DROP INDEX conversations_by_parent; ALTER TABLE conversations DROP COLUMN parent;
    ALTER TABLE conversations DROP COLUMN turns;";

#[tokio::test]
async fn parents_and_turns_are_kept_and_those_of_an_older_store_are_not_known() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    let fork = |id| ConversationRecord { parent: Some(1), ..record("a", id) };
    store.create(record("a", 1), Vec::new()).await.unwrap();
    store.begin(fork(2), Commit { turns: Some(3), ..Commit::default() }).await.unwrap();
    store.commit(2, Commit { items: vec![item("i0", "x")], ..Commit::default() }).await.unwrap();
    drop(store);
    let lineage = async |store: &Embedded| {
        let mut told: Vec<_> = store
            .census()
            .await
            .unwrap()
            .into_iter()
            .map(|counted| (counted.id, counted.parent, counted.turns))
            .collect();
        told.sort_unstable();
        told
    };
    let store = Embedded::open(dir.path()).unwrap();
    assert_eq!(lineage(&store).await, [(1, None, None), (2, Some(1), Some(3))]);
    assert_eq!(store.conversation("a", 2).await.unwrap(), Some(ConversationRecord { last_used_at: 0, ..fork(2) }));
    drop(store);

    tamper(dir.path(), &format!("{WITHOUT_LINEAGE} PRAGMA user_version = 3"));
    let store = Embedded::open(dir.path()).unwrap();
    assert_eq!(lineage(&store).await, [(1, None, None), (2, None, None)]);
    store.commit(1, Commit { turns: Some(8), ..Commit::default() }).await.unwrap();
    store.begin(fork(3), Commit::default()).await.unwrap();
    assert_eq!(lineage(&store).await, [(1, None, Some(8)), (2, None, None), (3, Some(1), None)]);
    // Nothing names what is deleted.
    assert!(store.delete("a", 1).await.unwrap());
    assert_eq!(lineage(&store).await, [(2, None, None), (3, None, None)]);
}

#[tokio::test]
async fn a_store_of_the_first_release_is_opened_with_all_that_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path()).unwrap();
    store.create(record("a", 1), vec![item("i0", "old")]).await.unwrap();
    drop(store);
    tamper(
        dir.path(),
        &format!(
            "{WITHOUT_LINEAGE} DROP TABLE notes; DROP TABLE responses; DROP TABLE results; DROP INDEX items_by_id;
             ALTER TABLE conversations DROP COLUMN chain; PRAGMA user_version = 1"
        ),
    );
    let store = Embedded::open(dir.path()).unwrap();
    let stored = store.load("a", 1).await.unwrap().unwrap();
    assert_eq!((bodies(&stored), &stored.conversation), (vec!["old"], &record("a", 1)));
    store.commit(1, with_response(&["i1"], response(10, "x"))).await.unwrap();
    assert!(store.response("a", 10).await.unwrap().is_some());
}
