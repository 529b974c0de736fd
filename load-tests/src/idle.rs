//! What does a conversation cost while nobody talks?
//!
//! The server's memory, at its start and after each step of what conversations go through: stored and never touched, live
//! (each has its actor), passivated, and after a turn. KV has its pools and its bounds; it is told apart.

use std::time::Duration;

use clap::Parser;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::Common;
use crate::client::Client;
use crate::numbers::figure;
use crate::report::{Bound, Report};
use crate::server::{Memory, Server};

/// Requests at a time while conversations are made and woken.
const CONCURRENT: usize = 32;
/// `sessions.idle_s` of this server. Long enough that all can be live at once.
const IDLE_S: u64 = 20;
/// What the configuration promises of a live session (`sessions.max_live`).
const LIVE_LIMIT_BYTES: f64 = 10_000.0;
const MIB: f64 = (1 << 20) as f64;

#[derive(Parser)]
pub struct Args {
    /// Conversations in the store
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    conversations: u32,
    /// How many of them have a turn at the end
    #[arg(long, default_value_t = 200)]
    turns: u32,
}

pub async fn measure(common: &Common, args: &Args) -> anyhow::Result<Report> {
    let (idle, max_live) = (format!("sessions.idle_s={IDLE_S}"), format!("sessions.max_live={}", args.conversations));
    let server = Server::start(common, &[&idle, &max_live])?;
    let client = Client::new(server.url())?;
    // A first conversation of each kind, so that what is set up once is not counted against the others.
    let first = client.create(Some("Hello")).await?;
    client.turn(&first, "Hello again", 1).await?;
    client.settle(&first).await?;
    let start = server.memory()?;

    eprintln!("[idle] making {} conversations", args.conversations);
    let count = usize::try_from(args.conversations)?;
    let conversations = make(&client, count).await?;
    let stored = server.memory()?;

    eprintln!("[idle] waking all of them");
    wake(&client, &conversations).await?;
    let live = server.memory()?;

    let silence = Duration::from_secs(IDLE_S + 5);
    eprintln!("[idle] waiting {} s, so that all are passivated", silence.as_secs());
    tokio::time::sleep(silence).await;
    let passivated = server.memory()?;

    // What passivating gave back is used again, or it was not given back.
    eprintln!("[idle] waking all of them a second time");
    wake(&client, &conversations).await?;
    let live_again = server.memory()?;

    let turns = count.min(usize::try_from(args.turns)?);
    eprintln!("[idle] one turn in each of {turns}");
    let before_turns = server.memory()?;
    let mut kv_bytes = 0.0;
    for conversation in &conversations[..turns] {
        client.turn(conversation, "Say hello.", 1).await?;
    }
    for conversation in &conversations[..turns] {
        client.settle(conversation).await?;
        let tiers = &client.residency(conversation).await?["tiers"];
        let private = |tier: &str| tiers[tier]["bytes_private"].as_f64().unwrap_or(0.0);
        kv_bytes += private("device") + private("host");
    }
    let after_turns = server.memory()?;

    let each = args.conversations.into();
    let row = |what: &str, count: f64, now: Memory, since: Memory| {
        vec![
            what.to_owned(),
            format!("{count:.0}"),
            figure(now.resident_bytes / MIB),
            figure(now.own_bytes / MIB),
            figure((now.resident_bytes - since.resident_bytes) / count),
            figure((now.own_bytes - since.own_bytes) / count),
        ]
    };
    let mut rows = vec![
        vec![
            "at the start".to_owned(),
            "1".to_owned(),
            figure(start.resident_bytes / MIB),
            figure(start.own_bytes / MIB),
            "–".to_owned(),
            "–".to_owned(),
        ],
        row("stored, never touched since", each, stored, start),
        row("all live: each has its actor", each, live, stored),
        row("all passivated", each, passivated, stored),
        row("all live a second time", each, live_again, live),
    ];
    let mut notes = vec![
        format!(
            "Bytes for each are the growth since the start (stored), since they were stored (live, passivated), since they \
             were first live (live a second time), before the turns (turns). Conversations of one message of six words. \
             `sessions.idle_s` was {IDLE_S}."
        ),
        "RSS counts the store's mapped file too, whose pages the system takes back when it needs them; own memory is heap \
         and pools. The store's page cache is in it, and is bounded (128 MiB for its writer)."
            .to_owned(),
        "Passivated: the allocator keeps some freed memory for later. That it is free shows in the row below it: \
         becoming live again takes no more."
            .to_owned(),
    ];
    if turns > 0 {
        let count = turns as f64;
        rows.push(row("after a turn of each", count, after_turns, before_turns));
        notes.push(format!(
            "A turn leaves {} KiB of KV for each in device and host pool together, which the pools bound (`kv.device_bytes`, \
             `kv.host_bytes`).",
            figure(kv_bytes / count / 1024.0)
        ));
    }
    Ok(Report {
        name: "idle",
        title: "Memory of idle conversations",
        columns: vec![
            "conversations are",
            "how many",
            "RSS MiB",
            "own memory MiB",
            "RSS bytes for each",
            "own bytes for each",
        ],
        rows,
        bounds: vec![Bound {
            what: "own memory of a live session",
            measured: (live.own_bytes - stored.own_bytes) / each,
            limit: LIVE_LIMIT_BYTES,
            unit: "bytes",
        }],
        notes,
    })
}

/// Makes conversations of one short message.
async fn make(client: &Client, count: usize) -> anyhow::Result<Vec<String>> {
    each(count, async |number| client.create(Some(&format!("Good morning, this is number {number}"))).await).await
}

/// Makes every conversation's session live.
async fn wake(client: &Client, conversations: &[String]) -> anyhow::Result<()> {
    each(conversations.len(), async |number| client.residency(&conversations[number]).await.map(drop)).await.map(drop)
}

/// Does `work` for each number below `count`, `CONCURRENT` at a time; in no order.
async fn each<T>(count: usize, work: impl AsyncFn(usize) -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
    stream::iter((0..count).map(|number| work(number))).buffer_unordered(CONCURRENT).try_collect().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_number_is_worked_on_once() {
        let mut done = each(1000, async |number| Ok(number)).await.unwrap();
        done.sort_unstable();
        assert_eq!(done, (0..1000).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn one_failure_fails_all() {
        let work = async |number| if number == 7 { anyhow::bail!("no") } else { Ok(()) };
        assert!(each(100, work).await.is_err());
    }
}
