//! What does a conversation cost while nobody talks?
//!
//! The server's memory, at its start and after each step of what conversations go through: stored and never touched, live
//! (each has its actor), passivated, and after a turn. KV has its pools and its bounds; it is told apart.

use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Parser;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::Common;
use crate::client::Client;
use crate::numbers::figure;
use crate::report::{Bound, Limit, Report, Table};
use crate::server::{Memory, Server};

/// Requests at a time while conversations are made and woken.
const CONCURRENT: usize = 32;
/// `sessions.idle_s` of this server. Long enough that all can be live at once.
const IDLE_S: u64 = 20;
const IDLE: Duration = Duration::from_secs(IDLE_S);
/// Freed memory that the allocator keeps for later would hide what is used.
const RETURNS_MEMORY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "0");
/// What the configuration promises of a live session (`sessions.max_live`).
const LIVE_LIMIT_BYTES: f64 = 10_000.0;
/// What leaks with each life of a session is at most this; a part of it is the allocator's unevenness.
const AGAIN_LIMIT_BYTES: f64 = 1_000.0;
const MIB: f64 = (1 << 20) as f64;

#[derive(Parser)]
pub struct Args {
    /// Conversations in the store
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(2..))]
    conversations: u32,
    /// How many of them have a turn at the end
    #[arg(long, default_value_t = 200)]
    turns: u32,
}

pub async fn measure(common: &Common, args: &Args) -> anyhow::Result<Report> {
    let (idle, max_live) =
        (format!("sessions.idle_s={IDLE_S}"), format!("sessions.max_live={}", args.conversations + 1));
    let server = Server::start_with(common, &[&idle, &max_live], &[RETURNS_MEMORY])?;
    let client = Client::new(server.url())?;
    // A first conversation of each kind, so that what is set up once is not counted against the others.
    let first = client.create(Some("Hello")).await?;
    client.turn(&first, "Hello again", 1).await?;
    client.settle(&first).await?;
    let start = server.memory()?;

    let count = usize::try_from(args.conversations)?;
    let half = count / 2;
    eprintln!("[idle] making {count} conversations");
    let mut conversations = make(&client, half).await?;
    let half_stored = server.memory()?;
    conversations.extend(make(&client, count - half).await?);
    let stored = server.memory()?;

    eprintln!("[idle] waking all of them");
    let began = Instant::now();
    wake(&client, &conversations[..half]).await?;
    let half_live = server.memory()?;
    wake(&client, &conversations[half..]).await?;
    let live = server.memory()?;
    ensure!(began.elapsed() < IDLE, "waking them took so long that the first are passivated; ask for fewer");

    let silence = IDLE + Duration::from_secs(5);
    eprintln!("[idle] waiting {} s, so that all are passivated", silence.as_secs());
    tokio::time::sleep(silence).await;
    let passivated = server.memory()?;

    // What passivating gave back is used again; what it lost is taken once more.
    eprintln!("[idle] waking all of them a second time");
    let began = Instant::now();
    wake(&client, &conversations).await?;
    let live_again = server.memory()?;
    ensure!(began.elapsed() < IDLE, "waking them took so long that the first are passivated; ask for fewer");

    let turns = count.min(usize::try_from(args.turns)?);
    eprintln!("[idle] one turn in each of {turns}");
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

    let (all, rest) = (count as f64, (count - half) as f64);
    let row = |what: &str, now: Memory, growth: Option<(f64, Memory)>| {
        let each = |part: fn(&Memory) -> f64| {
            growth.map_or("–".to_owned(), |(count, since)| format!("{:.0}", (part(&now) - part(&since)) / count))
        };
        vec![
            what.to_owned(),
            figure(now.resident_bytes / MIB),
            figure(now.own_bytes / MIB),
            each(|memory| memory.resident_bytes),
            each(|memory| memory.own_bytes),
        ]
    };
    let mut rows = vec![
        row("none", start, None),
        row("half stored", half_stored, None),
        row("all stored, never touched since", stored, Some((rest, half_stored))),
        row("half live: each has its actor", half_live, None),
        row("all live", live, Some((rest, half_live))),
        row("all passivated", passivated, Some((all, stored))),
        row("all live a second time", live_again, Some((all, live))),
    ];
    let mut notes = vec![
        format!(
            "{count} conversations of one message of six words. Bytes for each are a growth over a number of them: stored \
             and live, from half to all of them, so that room that the allocator had left is filled already; passivated, \
             since all were stored; live a second time, since all were live; turns, since that. `sessions.idle_s` was \
             {}, and the allocator was told to return freed memory at once (`{}={}`).",
            IDLE.as_secs(),
            RETURNS_MEMORY.0,
            RETURNS_MEMORY.1
        ),
        "RSS has the store's mapped file in it, whose pages the system takes back when it needs them; own memory is heap \
         and pools, with the store's page cache, which has a bound."
            .to_owned(),
        "*Passivated* is above *stored*, and this measurement does not say by what: part-used pages and tables that keep \
             their size would look so. What leaked would be added once more by the second life; the bound is on that."
            .to_owned(),
    ];
    if turns > 0 {
        rows.push(row(&format!("{turns} had a turn"), after_turns, Some((turns as f64, live_again))));
        notes.push(format!(
            "A turn leaves {} bytes of KV for each in device and host pool together, which the pools bound \
             (`kv.device_bytes`, `kv.host_bytes`).",
            figure(kv_bytes / turns as f64)
        ));
    }
    Ok(Report {
        name: "idle",
        title: "Memory of idle conversations",
        tables: Table::only(
            vec!["conversations", "RSS MiB", "own memory MiB", "RSS bytes for each", "own bytes for each"],
            rows,
        ),
        bounds: vec![
            Bound {
                what: "own memory of a live session".into(),
                measured: (live.own_bytes - half_live.own_bytes) / rest,
                limit: Limit::AtMost(LIVE_LIMIT_BYTES),
                unit: "bytes",
            },
            Bound {
                what: "own memory that a session's second life adds".into(),
                measured: (live_again.own_bytes - live.own_bytes) / all,
                limit: Limit::AtMost(AGAIN_LIMIT_BYTES),
                unit: "bytes",
            },
        ],
        notes,
        raw: None,
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
