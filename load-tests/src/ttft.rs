//! How long until a long conversation's next answer begins, by where its KV was?
//!
//! One conversation, its turns alternating between the three ways, so that whatever drifts (clock speed, neighbours, the
//! growing conversation) meets all three alike. Each turn's account must show the way that was set up.

use anyhow::{Context, bail};
use clap::Parser;

use crate::Common;
use crate::client::{Client, Turn};
use crate::numbers::{figure, median, p95};
use crate::report::{Bound, Limit, Report, Table};
use crate::server::Server;
use crate::text::words;

/// A reloaded turn may take this much of a resident one's time.
const RELOADED_LIMIT: f64 = 1.25;
/// A part of the prompt that must have come the way that was set up.
const MOSTLY: f64 = 0.9;
/// Room for the conversation on disk, and for what of it goes another way.
const DISK: &str = "kv.disk_bytes=256MiB";
/// Tokens of an answer: the first is what counts.
const OUTPUT_TOKENS: u32 = 4;
/// Words of each new message: a sentence or two.
const MESSAGE_WORDS: usize = 24;
/// What a turn adds to the conversation: message, answer, and the template's marks.
const TURN_TOKENS: u64 = MESSAGE_WORDS as u64 + OUTPUT_TOKENS as u64 + 10;

#[derive(Parser)]
pub struct Args {
    /// Turns of each kind
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of the conversation in the middle of the measurement
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(256..))]
    tokens: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Resident,
    Reloaded,
    Loaded,
    Reencoded,
}

impl Way {
    const ALL: [Way; 4] = [Way::Resident, Way::Reloaded, Way::Loaded, Way::Reencoded];

    fn name(self) -> &'static str {
        match self {
            Way::Resident => "resident",
            Way::Reloaded => "reloaded from host",
            Way::Loaded => "loaded from disk",
            Way::Reencoded => "re-encoded",
        }
    }

    /// Puts an idle conversation's KV where this way begins.
    async fn prepare(self, client: &Client, conversation: &str) -> anyhow::Result<()> {
        client.settle(conversation).await?;
        match self {
            Way::Resident => Ok(()),
            Way::Reloaded => client.offload(conversation, "host").await,
            Way::Loaded => client.offload(conversation, "disk").await,
            Way::Reencoded => client.offload(conversation, "none").await,
        }
    }

    /// Fails if the turn's prompt came another way.
    fn check(self, turn: &Turn) -> anyhow::Result<()> {
        let usage = &turn.usage;
        let came = match self {
            Way::Resident => usage.resident_tokens,
            Way::Reloaded | Way::Loaded => usage.reloaded_tokens,
            Way::Reencoded => usage.encoded_tokens,
        };
        if (came as f64) < MOSTLY * usage.input_tokens as f64 {
            bail!("a turn that was to be {} was not: {usage:?}", self.name());
        }
        Ok(())
    }
}

pub async fn measure(common: &Common, args: &Args) -> anyhow::Result<Report> {
    eprintln!("[ttft] starting a server");
    let server = Server::start(common, &[DISK])?;
    let client = Client::new(server.url())?;
    let turns = u64::from(args.rounds) * 4 + 3;
    let growth = turns * TURN_TOKENS;
    let window = client.window().await?;
    let tokens = args.tokens.min(window.saturating_sub(growth / 2 + TURN_TOKENS));
    let first = tokens.checked_sub(growth / 2).filter(|first| *first > growth / 2);
    let first = first.context("so many rounds would outgrow the conversation; ask for fewer, or for more tokens")?;

    eprintln!("[ttft] encoding the conversation's first {first} tokens");
    let conversation = client.create(None).await?;
    let said = words(0, usize::try_from(first.saturating_sub(TURN_TOKENS))?);
    client.turn(&conversation, &said, OUTPUT_TOKENS).await?;
    let mut next = 1..;
    let mut turn = async |way: Way| -> anyhow::Result<Turn> {
        way.prepare(&client, &conversation).await?;
        let said = words(next.next().context("numbers don't end")?, MESSAGE_WORDS);
        let turn = client.turn(&conversation, &said, OUTPUT_TOKENS).await?;
        way.check(&turn)?;
        Ok(turn)
    };
    // The first of a kind pays for what is done once: pages never touched before, connections, caches.
    for way in [Way::Resident, Way::Reloaded, Way::Loaded] {
        turn(way).await?;
    }
    let mut measured: [Vec<Turn>; 4] = Default::default();
    for round in 1..=args.rounds {
        for (way, turns) in Way::ALL.into_iter().zip(&mut measured) {
            turns.push(turn(way).await?);
        }
        let last = measured.each_ref().map(|turns| turns.last().map_or(0.0, |turn| turn.ttft_ms));
        let [resident, reloaded, loaded, reencoded] = last.map(figure);
        let rounds = args.rounds;
        eprintln!(
            "[ttft] {round}/{rounds}: resident {resident} ms, reloaded {reloaded} ms, loaded {loaded} ms, re-encoded \
             {reencoded} ms"
        );
    }
    report(args, tokens, &measured)
}

fn report(args: &Args, tokens: u64, measured: &[Vec<Turn>; 4]) -> anyhow::Result<Report> {
    let of = |turns: &[Turn], part: fn(&Turn) -> f64| turns.iter().map(part).collect::<Vec<f64>>();
    let rows = Way::ALL.into_iter().zip(measured).map(|(way, turns)| {
        let client = of(turns, |turn| turn.ttft_ms);
        let mut row = vec![way.name().to_owned(), figure(median(&client)), figure(p95(&client))];
        let parts: [fn(&Turn) -> f64; 6] = [
            |turn| turn.usage.ttft_ms,
            |turn| turn.usage.reload_ms,
            |turn| turn.usage.prefill_ms,
            |turn| (turn.usage.resident_tokens + turn.usage.shared_tokens) as f64,
            |turn| turn.usage.reloaded_tokens as f64,
            |turn| turn.usage.encoded_tokens as f64,
        ];
        row.extend(parts.map(|part| format!("{:.0}", median(&of(turns, part)))));
        row
    });
    let rows = rows.collect();
    let [resident, reloaded, loaded, reencoded] =
        measured.each_ref().map(|turns| median(&of(turns, |turn| turn.ttft_ms)));
    let lengths = || measured.iter().flatten().map(|turn| turn.usage.input_tokens);
    let (shortest, longest) = (lengths().min().context("no turn")?, lengths().max().context("no turn")?);
    let mut notes = vec![
        format!(
            "Median re-encoded / reloaded: {}, / loaded from disk: {}, / resident: {}.",
            figure(reencoded / reloaded),
            figure(reencoded / loaded),
            figure(reencoded / resident)
        ),
        format!(
            "{} turns of each kind, in turn, in one conversation that grew from {shortest} to {longest} tokens; each sends \
             a message of {MESSAGE_WORDS} words. TTFT: from the client's request to its first text, over HTTP. The \
             server's own parts are medians, in whole milliseconds. With so few turns p95 is close to the slowest.",
            args.rounds
        ),
    ];
    if tokens < args.tokens {
        notes.push(format!("The window is too small for {} tokens; {tokens} were used.", args.tokens));
    }
    Ok(Report {
        name: "ttft",
        title: "Time to first token in a long conversation, by where its KV was",
        tables: Table::only(
            vec![
                "KV was",
                "TTFT median ms",
                "TTFT p95 ms",
                "server's TTFT ms",
                "reload ms",
                "prefill ms",
                "tokens on the device",
                "reloaded",
                "encoded",
            ],
            rows,
        ),
        bounds: [
            ("reloaded / resident", reloaded / resident, RELOADED_LIMIT),
            ("loaded / re-encoded", loaded / reencoded, 1.0),
        ]
        .map(|(what, measured, limit)| Bound {
            what: format!("median TTFT, {what}"),
            measured,
            limit: Limit::AtMost(limit),
            unit: "",
        })
        .into(),
        notes,
        raw: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Usage;

    fn turn(usage: Usage) -> Turn {
        Turn { ttft_ms: 1.0, text: String::new(), usage }
    }

    #[test]
    fn a_turn_that_came_another_way_is_not_counted() {
        let reloaded = Usage { input_tokens: 100, reloaded_tokens: 95, encoded_tokens: 5, ..Usage::default() };
        assert!(Way::Reloaded.check(&turn(reloaded)).is_ok());
        assert!(Way::Resident.check(&turn(reloaded)).is_err());
        assert!(Way::Reencoded.check(&turn(reloaded)).is_err());
    }

    #[test]
    fn a_reload_that_is_too_slow_shows_in_the_bound() {
        let with = |ttft_ms| vec![Turn { ttft_ms, ..turn(Usage::default()) }];
        let report =
            report(&Args { rounds: 1, tokens: 2000 }, 2000, &[with(100.0), with(130.0), with(300.0), with(900.0)]);
        assert_eq!(report.unwrap().bounds[0].measured, 1.3);
    }
}
