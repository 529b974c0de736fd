//! Is a greedy answer the same whatever happened to the conversation's KV, and whoever shared its steps?

use super::client::{Answer, Client, Usage};
use super::server::{Home, Server, machine};
use super::workload::{BLOCK_BYTES, among_clients, said};

const TURNS: usize = 3;

#[tokio::test(flavor = "multi_thread")]
async fn a_greedy_answer_is_the_same_alone_batched_hot_reloaded_encoded_again_and_shared() {
    let _alone = machine().await;
    let home = Home::new();
    let pools = [format!("kv.device_bytes={}", 400 * BLOCK_BYTES), format!("kv.host_bytes={}", 400 * BLOCK_BYTES)];
    let server = Server::start(&home, &pools);
    let client = Client::of(&server.url);

    // Each conversation is deleted before the next, since all say the same and would share blocks.
    let (first, alone) = talk(&client, None).await;
    // Each turn after the first finds its history where the last left it.
    for answer in &alone[1..] {
        assert!(answer.usage.resident > 0 && answer.usage.reloaded == 0, "{:?}", answer.usage);
    }
    client.delete_conversation(&first).await;

    let (second, reloaded) = talk(&client, Some("host")).await;
    assert_same(&reloaded, &alone, "reloaded", |usage| usage.reloaded);
    client.delete_conversation(&second).await;

    let (_, encoded_again) = talk(&client, Some("none")).await;
    assert_same(&encoded_again, &alone, "encoded again", |usage| usage.reencoded);

    // The third conversation's blocks are there, of the same text and the same tenant.
    let (_, shared) = talk(&client, None).await;
    assert_same(&shared, &alone, "shared", |usage| usage.shared);

    let batched = among_clients(6, |conversation| {
        let client = client.clone();
        async move {
            let id = client.conversation().await;
            let mut answers = Vec::new();
            for turn in 0..TURNS {
                answers.push(client.say(&id, &said(conversation, turn)).await);
            }
            answers
        }
    });
    assert_same(&batched.await[0], &alone, "batched", |usage| usage.input);
    server.finish().await;
}

/// A conversation whose KV is sent to another place before each turn but the first.
async fn talk(client: &Client, offload_to: Option<&str>) -> (String, Vec<Answer>) {
    let id = client.conversation().await;
    let mut answers = Vec::new();
    for turn in 0..TURNS {
        if let Some(to) = offload_to.filter(|_| turn > 0) {
            client.offload(&id, to).await;
        }
        let answer = client.say(&id, &said(0, turn)).await;
        answer.usage.assert_adds_up();
        answers.push(answer);
    }
    (id, answers)
}

/// The answers are those of the conversation alone, and the last turn came by the path that is to be shown.
fn assert_same(answers: &[Answer], alone: &[Answer], path: &str, tokens_of_path: impl Fn(&Usage) -> u64) {
    for (turn, (answer, alone)) in answers.iter().zip(alone).enumerate() {
        answer.assert_same(alone, &format!("{path}, turn {turn}"));
    }
    let last = &answers[TURNS - 1].usage;
    assert!(tokens_of_path(last) > 0, "the last turn was not {path}: {last:?}");
}
