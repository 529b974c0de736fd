//! Does the server stand a clock that jumps?
//!
//! The real server under libfaketime, which shows it another time of day than the system's; what measures time that passes
//! is left alone, as a real jump leaves it.

use std::path::PathBuf;
use std::time::Duration;

use super::client::Client;
use super::server::{Home, Server, machine};

/// An hour that there never was for most software; and some time after the last year with four digits.
const JUMPS: [&str; 5] = ["-7200", "+400d", "@1969-12-31 12:00:00", "@9999-12-31 23:59:00", "+0"];
/// The HTTP library looks at the clock twice a second.
const LOOKED_AT: Duration = Duration::from_millis(1_200);

fn library() -> PathBuf {
    let folders = std::fs::read_dir("/usr/lib").unwrap();
    let found = folders.map(|folder| folder.unwrap().path().join("faketime/libfaketime.so.1"));
    found.into_iter().find(|path| path.exists()).expect("libfaketime is there; `scripts/setup test` installs it")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_ends_nothing() {
    let _alone = machine().await;
    let home = Home::new();
    let file = home.data().with_file_name("clock");
    let show = |time: &str| std::fs::write(&file, time).unwrap();
    show("+0");
    let mut command = home.serve(&[]);
    command.env("LD_PRELOAD", library()).env("FAKETIME_TIMESTAMP_FILE", &file);
    command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let server = Server::spawn(&home, command);
    let client = Client::of(&server.url);
    let id = client.conversation().await;
    client.say(&id, "remember 5").await;
    let mut dates = Vec::new();
    for jump in JUMPS {
        show(jump);
        tokio::time::sleep(LOOKED_AT).await;
        client.say(&id, &format!("it is {jump}")).await;
        let answer = client.get("/healthz").send().await.unwrap();
        dates.push(answer.headers()["date"].to_str().unwrap().to_owned());
        let log = home.logged();
        assert!(!log.contains("panicked at"), "after {jump}: {log}");
    }
    assert_eq!(client.items(&id).await.len(), 2 * (1 + JUMPS.len()), "nothing of the history was lost");
    assert_eq!(dates[2], "Thu, 01 Jan 1970 00:00:00 GMT");
    assert_eq!(client.metrics().await.turns("failed"), 0);
    server.finish().await;
}
