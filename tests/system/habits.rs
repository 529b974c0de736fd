//! Does the evictor still know after a restart how conversations come back?

use super::client::Client;
use super::server::{END, Home, Server, eventually, machine};

#[tokio::test(flavor = "multi_thread")]
async fn what_was_learned_of_returns_survives_a_restart() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let id = client.conversation().await;
    for said in ["One.", "Two.", "Three."] {
        client.say(&id, said).await;
    }
    server.finish().await;
    assert!(!home.logged().contains("eviction goes on"), "there was nothing to go on from");

    let server = Server::start(&home, &[]);
    let goes_on = |line: &str| line.contains("eviction goes on") && line.contains("\"silences\":3");
    let heard = async || home.logged().lines().any(goes_on).then_some(());
    eventually(END, "the engine hears of three silences", heard).await;
    server.finish().await;
}
