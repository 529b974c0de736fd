//! Do many conversations answer as if memory were endless, when it is short?

use std::time::Instant;

use super::client::{Answer, Client, Metrics};
use super::report::Figures;
use super::server::{Home, Server, machine};
use super::workload::{Workload, among_clients, said, undisturbed};

/// The device holds this part of the conversations.
const DEVICE_PART: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn with_a_host_tier_for_all_no_history_is_encoded_twice_and_every_answer_is_the_same() {
    let _alone = machine().await;
    let workload = Workload::chosen();
    let (answers, metrics) =
        talk(workload, "host tier for all", Some(workload.conversations / DEVICE_PART), 2 * workload.conversations)
            .await;
    for answer in answers.iter().flatten() {
        assert_eq!(answer.usage.reencoded, 0, "history was encoded again: {:?}", answer.usage);
    }
    assert_eq!(metrics.count("rekindle_reencoded_tokens_total"), 0);
    assert!(metrics.count("rekindle_evictions_total") > 0, "nothing was evicted, so nothing was shown");
    assert!(metrics.prompt_tokens("reloaded_host") > 0, "nothing was reloaded, so nothing was shown");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_host_tier_for_half_some_history_is_encoded_again_and_every_answer_is_the_same() {
    let _alone = machine().await;
    let workload = Workload::chosen();
    let (_, metrics) =
        talk(workload, "host tier for half", Some(workload.conversations / DEVICE_PART), workload.conversations / 2)
            .await;
    assert!(metrics.count("rekindle_reencoded_tokens_total") > 0, "half a host tier was enough for all");
}

/// Talks in rounds, several clients at a time, and compares each answer with that of an undisturbed server, and the sums
/// of what the turns say of themselves with what the server counts.
async fn talk(
    workload: Workload,
    name: &str,
    device_conversations: Option<usize>,
    host_conversations: usize,
) -> (Vec<Vec<Answer>>, Metrics) {
    let expected = undisturbed().await;
    let home = Home::new();
    let server = Server::start(&home, &workload.pools(device_conversations, host_conversations));
    let client = Client::of(&server.url);
    let mut ids = Vec::new();
    for _ in 0..workload.conversations {
        ids.push(client.conversation().await);
    }

    let started = Instant::now();
    let mut answers = vec![Vec::new(); workload.conversations];
    for turn in 0..workload.turns {
        let round = among_clients(workload.conversations, |conversation| {
            let (client, id) = (client.clone(), ids[conversation].clone());
            async move { client.say(&id, &said(conversation, turn)).await }
        });
        for ((conversation, answer), undisturbed) in round.await.into_iter().enumerate().zip(expected) {
            answer.usage.assert_adds_up();
            let undisturbed = &undisturbed[turn];
            answer.assert_same(undisturbed, &format!("turn {turn} of conversation {conversation}"));
            answers[conversation].push(answer);
        }
    }
    let took = started.elapsed();

    let metrics = client.metrics().await;
    assert_agrees(&answers, &metrics);
    let figures = Figures { name, workload, answers: &answers, undisturbed: expected, metrics: &metrics, took };
    figures.print();
    figures.write_if_soak();
    server.finish().await;
    (answers, metrics)
}

/// What the turns say of themselves and what the server counts are the same numbers.
fn assert_agrees(answers: &[Vec<Answer>], metrics: &Metrics) {
    let all: Vec<_> = answers.iter().flatten().map(|answer| &answer.usage).collect();
    assert_eq!(metrics.turns("finished"), all.len() as u64);
    assert_eq!((metrics.turns("cancelled"), metrics.turns("failed")), (0, 0));
    for (source, told) in [
        ("resident", all.iter().map(|usage| usage.resident).sum::<u64>()),
        ("shared", all.iter().map(|usage| usage.shared).sum()),
        ("reloaded_host", all.iter().map(|usage| usage.reloaded).sum()),
        ("encoded", all.iter().map(|usage| usage.encoded).sum()),
    ] {
        assert_eq!(metrics.prompt_tokens(source), told, "{source} tokens, counted and told");
    }
    let reencoded: u64 = all.iter().map(|usage| usage.reencoded).sum();
    assert_eq!(metrics.count("rekindle_reencoded_tokens_total"), reencoded);
    let generated: u64 = all.iter().map(|usage| usage.output).sum();
    assert_eq!(metrics.count("rekindle_generated_tokens_total"), generated);
    assert_eq!(metrics.count("rekindle_isolation_faults_total"), 0);
    assert_eq!(metrics.count("rekindle_verification_failures_total"), 0);
}
