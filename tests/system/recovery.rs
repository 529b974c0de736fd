//! What is left of conversations when the process is killed in the middle of their turns?

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::client::{Client, Item};
use super::server::{Home, Server, eventually, machine};
use super::workload::{Workload, among_clients, said, undisturbed};

/// Longest way to the middle of the talk.
const HALF_WAY: Duration = Duration::from_secs(240);

/// A conversation and what its client heard back: user, assistant, user, …
struct Known {
    id: String,
    heard: Vec<(&'static str, String)>,
    /// A turn was sent and not answered.
    in_flight: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn after_kill_9_every_answer_that_was_heard_is_there_once_and_the_conversations_go_on() {
    let _alone = machine().await;
    let workload = Workload::chosen();
    let expected = undisturbed().await;
    let pools = workload.pools(Some(workload.conversations / 4), workload.conversations);
    let home = Home::new();

    let server = Server::start(&home, &pools);
    let known = talk_until_killed(workload, server).await;
    let broken_off = known.iter().filter(|known| known.in_flight && !known.heard.is_empty()).count();
    assert!(broken_off > 0, "no conversation was in the middle, so nothing was shown");

    let server = Server::start(&home, &pools);
    println!("killed with {broken_off} conversations in the middle; started again in {:?}", server.start_time);
    let client = Client::of(&server.url);
    let mut beyond = [0; 3];
    for (conversation, known) in known.iter().enumerate() {
        let stored = client.items(&known.id).await;
        beyond[stored.len().saturating_sub(known.heard.len()).min(2)] += usize::from(known.in_flight);
        assert_whole(conversation, known, &stored, expected[conversation].iter().map(|answer| &*answer.text));
    }
    println!(
        "of the unanswered turns {} left nothing, {} the message, {} the answer too",
        beyond[0], beyond[1], beyond[2]
    );
    among_clients(workload.conversations, |conversation| {
        let (client, id) = (client.clone(), known[conversation].id.clone());
        async move {
            let mut stored = client.items(&id).await.len();
            for (turn, undisturbed) in expected[conversation].iter().enumerate().skip(stored / 2) {
                // A message whose answer was lost is there: it is answered, not sent again.
                let said = stored.is_multiple_of(2).then(|| said(conversation, turn));
                let answer = client.try_turn(&id, said.as_deref()).await.expect("the server answers");
                answer.assert_same(undisturbed, &format!("turn {turn} of conversation {conversation}"));
                stored = 2 * (turn + 1);
            }
            assert_eq!(client.items(&id).await.len(), 2 * workload.turns);
        }
    })
    .await;
    server.finish().await;
}

/// Talks with each conversation, and kills the server when more than half of all turns have been answered: some
/// conversations are complete then, some in the middle, some not begun.
async fn talk_until_killed(workload: Workload, server: Server<'_>) -> Vec<Known> {
    let client = Client::of(&server.url);
    let answered = Arc::new(AtomicUsize::new(0));
    let talking = tokio::spawn({
        let (client, answered) = (client.clone(), Arc::clone(&answered));
        async move {
            let mut ids = Vec::new();
            for _ in 0..workload.conversations {
                ids.push(client.conversation().await);
            }
            let talks = among_clients(workload.conversations, |conversation| {
                let (client, id, answered) = (client.clone(), ids[conversation].clone(), Arc::clone(&answered));
                async move {
                    let mut known = Known { id, heard: Vec::new(), in_flight: false };
                    for turn in 0..workload.turns {
                        let said = said(conversation, turn);
                        let Ok(answer) = client.try_turn(&known.id, Some(&said)).await else {
                            known.in_flight = true;
                            break;
                        };
                        known.heard.extend([("user", said), ("assistant", answer.text)]);
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                    known
                }
            });
            talks.await
        }
    });
    let enough = workload.conversations * workload.turns * 11 / 16;
    let half_way = async || (answered.load(Ordering::Relaxed) >= enough || talking.is_finished()).then_some(());
    eventually(HALF_WAY, "more than half of the turns are answered", half_way).await;
    server.kill();
    talking.await.unwrap()
}

/// What was heard is stored, in order and once; beyond it there is at most the turn that was in flight.
fn assert_whole<'a>(conversation: usize, known: &Known, stored: &[Item], mut expected: impl Iterator<Item = &'a str>) {
    let told: Vec<_> = stored.iter().map(|item| (item.role.as_str(), item.text.as_str())).collect();
    let heard: Vec<_> = known.heard.iter().map(|(role, text)| (*role, text.as_str())).collect();
    assert!(told.starts_with(&heard), "conversation {conversation} lost what was heard: {told:?}, not {heard:?}");
    let turn = heard.len() / 2;
    let sent = said(conversation, turn);
    let whole = [("user", sent.as_str()), ("assistant", expected.nth(turn).unwrap_or_default())];
    let most = if known.in_flight { &whole[..] } else { &[] };
    let beyond = &told[heard.len()..];
    assert!(most.starts_with(beyond), "conversation {conversation} holds {beyond:?} that nobody sent");
    let ids: std::collections::BTreeSet<_> = stored.iter().map(|item| &item.id).collect();
    assert_eq!(ids.len(), stored.len(), "conversation {conversation} holds an item twice");
}
