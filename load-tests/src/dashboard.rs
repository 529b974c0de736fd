//! What does the engine pay for an operator who looks?
//!
//! A server that knows 100,000 conversations decodes a fixed batch, in turn with no page of the dashboard open and with four,
//! which do what the page does: they follow the stream, and fetch what it does not tell. Compared is the engine's own
//! account of its steps. The engine has one thread, so that on two cores the clients, which are as real as the pages, have
//! the other.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::Common;
use crate::client::Client;
use crate::numbers::{figure, median};
use crate::process::Watch;
use crate::report::{Bound, Limit, Report, Table};
use crate::server::Server;

/// Steps may take this many times as long with open pages.
const LIMIT: f64 = 1.01;
const PAGES: usize = 4;
/// Answers that are written at once.
const BATCH: usize = 8;
/// More than any of them comes to before it is broken off.
const ANSWER_TOKENS: u32 = 1900;
/// Requests at a time while conversations are made.
const CONCURRENT: usize = 64;
/// From the last first token to the first look, so that nothing of a beginning is timed.
const SETTLES: Duration = Duration::from_secs(1);
/// How often the page fetches each.
const MAPS_EVERY: Duration = Duration::from_secs(5);
const POLICY_EVERY: Duration = Duration::from_secs(2);

#[derive(Parser)]
pub struct Args {
    /// Conversations in the store
    #[arg(long, default_value_t = 100_000)]
    conversations: u32,
    /// Times that both are measured; an odd number has a middle one
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of each measurement
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=20))]
    seconds: u64,
}

/// What was seen while a batch was decoded.
struct Seen {
    step_ms: f64,
    steps: f64,
    /// CPU time of the dashboard's thread and of the whole server, in parts of one core.
    books: f64,
    server: f64,
    /// CPU time of all that is neither the server nor this program.
    others: f64,
}

/// The engine's totals of decoding steps.
struct Steps {
    seconds: f64,
    steps: f64,
    prefills: f64,
    rows: f64,
}

pub async fn measure(common: &Common, args: &Args) -> anyhow::Result<Report> {
    ensure!(args.rounds % 2 == 1, "{} rounds have no middle one; ask for an odd number", args.rounds);
    let server = Server::start(common, &["engine.threads=1"])?;
    let client = Client::new(server.url())?;
    let admin = client.clone().with_key(&server.admin_key()?);
    eprintln!("[dashboard] making {} conversations", args.conversations);
    let made = (0..args.conversations).map(|_| client.create(None));
    stream::iter(made).buffer_unordered(CONCURRENT).try_for_each(|_| std::future::ready(Ok(()))).await?;

    let (mut rows, mut ratios, mut alone_ms) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        // Each is first in turn, so that drift meets both alike.
        let (without, with) = if round % 2 == 1 {
            let without = seen(&server, &client, &admin, 0, args.seconds).await?;
            (without, seen(&server, &client, &admin, PAGES, args.seconds).await?)
        } else {
            let with = seen(&server, &client, &admin, PAGES, args.seconds).await?;
            (seen(&server, &client, &admin, 0, args.seconds).await?, with)
        };
        let ratio = with.step_ms / without.step_ms;
        eprintln!("[dashboard] round {round}: {:.3} ms, {:.3} with pages: {ratio:.4}", without.step_ms, with.step_ms);
        let percent = |part: f64| format!("{:.2}", part * 100.0);
        rows.push(vec![
            round.to_string(),
            format!("{:.3}", without.step_ms),
            format!("{:.3}", with.step_ms),
            format!("{ratio:.4}"),
            format!("{:.0}", without.steps.min(with.steps)),
            percent(without.books),
            percent(with.books),
            percent(without.server),
            percent(with.server),
            percent(without.others.max(with.others)),
        ]);
        ratios.push(ratio);
        alone_ms.push(without.step_ms);
    }
    let spread = |values: &[f64]| {
        let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(least, most), v| (least.min(*v), most.max(*v)));
        (least, most)
    };
    let ((least, most), (quickest, slowest)) = (spread(&ratios), spread(&alone_ms));
    Ok(Report {
        name: "dashboard",
        title: "What open pages of the dashboard cost the engine",
        tables: Table::only(
            vec![
                "round",
                "mean step ms, no page",
                "4 pages",
                "ratio",
                "steps, at least",
                "books' thread, no page: % of a core",
                "4 pages",
                "server, no page: % of a core",
                "4 pages",
                "others, at most: % of a core",
            ],
            rows,
        ),
        bounds: vec![Bound {
            what: "median ratio of step times, 4 pages to none".to_owned(),
            measured: median(&ratios),
            limit: Limit::AtMost(LIMIT),
            unit: "",
        }],
        notes: vec![
            format!(
                "The median ratio is {:.4}; single rounds lie between {least:.4} and {most:.4}. Steps without a page differ by \
                 {} % among themselves: what is smaller than that can't be told from one round.",
                median(&ratios),
                figure((slowest / quickest - 1.0) * 100.0)
            ),
            format!(
                "{} conversations in the store. {BATCH} answers are decoded for {} s without a page and for as long with \
                 {PAGES}, which is first in turn; then they are broken off, and others begun. A step's time is that of \
                 `rekindle_engine_step_seconds`, kind decode, sum over count. A measurement in which the batch was not {BATCH} \
                 throughout, or a prompt was encoded, fails.",
                args.conversations, args.seconds
            ),
            format!(
                "A page follows `/admin/api/stream`, fetches `/overview`, `/tenants` and the device's map once, those of host \
                 and disk each {} s, and `/policy` each {} s: more than any one view of it does.",
                MAPS_EVERY.as_secs(),
                POLICY_EVERY.as_secs()
            ),
            "`engine.threads=1`: clients and pages run on the same machine, and are to have a core beside the engine's. With as \
             many engine threads as cores their own work would be counted as the server's. The books' thread (`dashboard`) runs \
             whether anybody looks or not."
                .to_owned(),
        ],
        raw: None,
    })
}

/// Decodes a batch for a while, and looks.
async fn seen(server: &Server, client: &Client, admin: &Client, pages: usize, seconds: u64) -> anyhow::Result<Seen> {
    let mut answers = JoinSet::new();
    let mut begun = Vec::new();
    for number in 0..BATCH {
        let conversation = client.create(None).await?;
        let response = client.begin(&conversation, &format!("Tell me story number {number}."), ANSWER_TOKENS).await?;
        let (tell, told) = oneshot::channel();
        begun.push(told);
        answers.spawn(async move {
            let mut tell = Some(tell);
            let mut pieces = response.bytes_stream();
            while let Some(piece) = pieces.next().await {
                let Ok(piece) = piece else { return };
                if piece.windows(5).any(|five| five == b"delta")
                    && let Some(tell) = tell.take()
                    && tell.send(()).is_err()
                {
                    // Nobody waits for it any more.
                    return;
                }
            }
        });
    }
    for told in begun {
        told.await.context("an answer ended before its first word")?;
    }
    let mut open = JoinSet::new();
    for _ in 0..pages {
        let admin = admin.clone();
        open.spawn(async move { page(&admin).await });
    }
    tokio::time::sleep(SETTLES).await;
    let (watch, books, before) =
        (Watch::start(Some(server.pid()))?, server.thread_s("dashboard")?, steps(admin).await?);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let (after, usage, books_after) = (steps(admin).await?, watch.usage()?, server.thread_s("dashboard")?);
    if let Some(ended) = open.try_join_next() {
        ended??;
        bail!("a page's stream ended");
    }
    ensure!(open.len() == pages && answers.len() == BATCH, "not all were there to the end");
    open.shutdown().await;
    answers.shutdown().await;
    idle(admin).await?;
    let count = after.steps - before.steps;
    let rows = (after.rows - before.rows) / count;
    ensure!(count > 0.0 && after.prefills == before.prefills, "a prompt was encoded meanwhile");
    ensure!((rows - BATCH as f64).abs() < 1e-6, "a step had {rows} rows, not {BATCH}");
    Ok(Seen {
        step_ms: (after.seconds - before.seconds) * 1e3 / count,
        steps: count,
        books: (books_after - books) / usage.wall_s,
        server: usage.cpu_s / usage.wall_s,
        others: usage.others_s / usage.wall_s,
    })
}

/// What one open page asks for, until nobody wants it any more.
async fn page(admin: &Client) -> anyhow::Result<()> {
    let mut told = admin.open("/admin/api/stream").await?.bytes_stream();
    for path in ["/admin/api/overview", "/admin/api/tenants", "/admin/api/map?tier=device"] {
        admin.get(path).await?;
    }
    let (mut maps, mut policy) = (tokio::time::interval(MAPS_EVERY), tokio::time::interval(POLICY_EVERY));
    loop {
        tokio::select! {
            piece = told.next() => match piece {
                Some(piece) => drop(piece?),
                None => return Ok(()),
            },
            _ = maps.tick() => {
                for tier in ["host", "disk"] {
                    admin.get(&format!("/admin/api/map?tier={tier}")).await?;
                }
            }
            _ = policy.tick() => drop(admin.get("/admin/api/policy").await?),
        }
    }
}

async fn steps(admin: &Client) -> anyhow::Result<Steps> {
    Steps::parse(&admin.open("/metrics").await?.text().await?).context("/metrics has not all of the engine's steps")
}

/// Waits until no turn runs.
async fn idle(admin: &Client) -> anyhow::Result<()> {
    for _ in 0..200 {
        let overview = admin.get("/admin/api/overview").await?;
        if overview["sessions"]["running"] == 0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("turns that were broken off still run after 10 s")
}

impl Steps {
    fn parse(metrics: &str) -> Option<Self> {
        let value = |name: &str, label: &str| {
            let line = metrics.lines().find(|line| line.starts_with(name) && line.contains(label))?;
            line.rsplit(' ').next()?.parse::<f64>().ok()
        };
        Some(Self {
            seconds: value("rekindle_engine_step_seconds_sum{", "kind=\"decode\"")?,
            steps: value("rekindle_engine_step_seconds_count{", "kind=\"decode\"")?,
            prefills: value("rekindle_engine_step_seconds_count{", "kind=\"prefill\"")?,
            rows: value("rekindle_engine_step_rows_sum", "")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_by_kind_and_one_that_is_missing_is_told() {
        let text = "rekindle_engine_step_seconds_sum{kind=\"prefill\"} 9\n\
                    rekindle_engine_step_seconds_count{kind=\"prefill\"} 3\n\
                    rekindle_engine_step_seconds_sum{kind=\"decode\"} 1.5\n\
                    rekindle_engine_step_seconds_count{kind=\"decode\"} 100\n\
                    rekindle_engine_step_rows_sum 811\n";
        let steps = Steps::parse(text).unwrap();
        assert_eq!((steps.seconds, steps.steps, steps.prefills, steps.rows), (1.5, 100.0, 3.0, 811.0));
        assert!(Steps::parse("rekindle_engine_step_rows_sum 1\n").is_none());
    }
}
