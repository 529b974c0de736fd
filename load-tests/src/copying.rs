//! What does copying down in the background cost those who are being answered?
//!
//! The same work on two servers, one with tiers below the device and one without, in turn: some conversations are
//! answered at length, while others come one after another, are encoded, and rest. The server with tiers copies each of
//! those to the host and to disk meanwhile. Both have the same turns to encode, so that the difference is the copies'.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use futures_util::future::try_join_all;

use crate::Common;
use crate::client::Client;
use crate::numbers::{figure, median};
use crate::report::{Bound, Limit, Report, Table};
use crate::server::Server;
use crate::text::words;

/// More of their time may not go to copies.
const LIMIT: f64 = 1.03;
/// What comes is on disk by then.
const STORED: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(50);
const BELOW: [&str; 2] = ["kv.host_bytes=1GiB", "kv.disk_bytes=1GiB"];
const NOTHING_BELOW: [&str; 2] = ["kv.host_bytes=0", "kv.disk_bytes=0"];

#[derive(Parser, Clone, Copy)]
pub struct Args {
    /// Rounds of each server
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Conversations that are answered at once
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    answered: u32,
    /// Tokens of each of their answers
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
    output_tokens: u32,
    /// Conversations that come meanwhile
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    coming: u32,
    /// Words that each of them begins with
    #[arg(long, default_value_t = 500)]
    words: usize,
}

/// A server, and what was measured on it.
struct Arm {
    name: &'static str,
    client: Client,
    copies: bool,
    rounds_ms: Vec<f64>,
    _server: Server,
}

impl Arm {
    fn start(common: &Common, name: &'static str, settings: &[&str], copies: bool) -> anyhow::Result<Self> {
        let server = Server::start(common, settings)?;
        Ok(Self { name, client: Client::new(server.url())?, copies, rounds_ms: Vec::new(), _server: server })
    }

    /// All that is done in a round. Notes the time of a token of those who were answered.
    async fn round(&mut self, args: Args, round: u32) -> anyhow::Result<()> {
        let seed = |number: u32| u64::from(round) * 1_000 + u64::from(number);
        let answered = (0..args.answered).map(|number| answered(&self.client, args, seed(number)));
        let coming = coming(&self.client, args, seed(500));
        let (answered_ms, came) = futures_util::future::try_join(try_join_all(answered), coming).await?;
        for conversation in &came {
            self.is_copied(conversation).await?;
        }
        self.rounds_ms.push(median(&answered_ms));
        Ok(())
    }

    /// Waits until a conversation is where this server should bring it.
    async fn is_copied(&self, conversation: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + STORED;
        while Instant::now() < deadline {
            let residency = self.client.residency(conversation).await?;
            let tokens = |tier: &str| residency["tiers"][tier]["tokens"].as_u64().unwrap_or(0);
            let (device, host, disk) = (tokens("device"), tokens("host"), tokens("disk"));
            match self.copies {
                true if host >= device && disk > 0 && disk + 16 > device => return Ok(()),
                false if host + disk == 0 && device > 0 => return Ok(()),
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
        bail!("{conversation} is not where {} has it after {STORED:?}", self.name)
    }
}

/// A long answer. Returns the time of one of its tokens, in ms.
async fn answered(client: &Client, args: Args, seed: u64) -> anyhow::Result<f64> {
    let id = client.create(None).await?;
    let sent = Instant::now();
    let turn = client.turn(&id, &words(seed, 64), args.output_tokens).await?;
    let whole_ms = sent.elapsed().as_secs_f64() * 1e3;
    Ok((whole_ms - turn.ttft_ms) / f64::from(args.output_tokens - 1))
}

/// Those who come, one after another. Returns their ids.
async fn coming(client: &Client, args: Args, seed: u64) -> anyhow::Result<Vec<String>> {
    let mut came = Vec::new();
    for number in 0..args.coming {
        let id = client.create(None).await?;
        client.turn(&id, &words(seed + u64::from(number), args.words), 1).await?;
        came.push(id);
    }
    Ok(came)
}

pub async fn measure(common: &Common, args: &Args) -> anyhow::Result<Report> {
    let mut arms = [
        Arm::start(common, "device, host and disk", &BELOW, true)?,
        Arm::start(common, "the device alone", &NOTHING_BELOW, false)?,
    ];
    for round in 0..=args.rounds {
        // Who is first changes, so that a machine that gets slower meets both alike.
        for turn in 0..arms.len() {
            let arm = &mut arms[(turn + round as usize) % 2];
            arm.round(*args, round).await.with_context(|| format!("the server with {}", arm.name))?;
        }
        let [with, without] = [0, 1].map(|arm: usize| arms[arm].rounds_ms[round as usize]);
        eprintln!("[copying] {round}/{}: {} ms a token, without {}", args.rounds, figure(with), figure(without));
    }
    // Not counted: the first round of a server touches weights and pools for the first time.
    for arm in &mut arms {
        arm.rounds_ms.remove(0);
    }
    Ok(report(args, &arms.map(|arm| (arm.name, arm.rounds_ms))))
}

fn report(args: &Args, [with, without]: &[(&'static str, Vec<f64>); 2]) -> Report {
    let ratios: Vec<f64> = with.1.iter().zip(&without.1).map(|(with, without)| with / without).collect();
    let row = |(name, rounds): &(&str, Vec<f64>)| {
        let least = rounds.iter().copied().fold(f64::INFINITY, f64::min);
        let most = rounds.iter().copied().fold(0.0, f64::max);
        vec![(*name).to_owned(), figure(median(rounds)), figure(least), figure(most)]
    };
    Report {
        name: "copying",
        title: "What copying in the background costs those who are being answered",
        tables: Table::only(
            vec!["tiers", "a token, median of rounds, ms", "least", "most"],
            vec![row(with), row(without)],
        ),
        bounds: vec![Bound {
            what: "a token's time with copies / without, median of rounds".into(),
            measured: 1000.0 * median(&ratios),
            limit: Limit::AtMost(1000.0 * LIMIT),
            unit: "‰",
        }],
        notes: vec![
            format!(
                "{} rounds of each server, in turn, the first of each not counted: {} conversations get answers of {} \
                 tokens, while {} others of about {} tokens come one after another, are encoded and rest. A round ends \
                 when all of those are on the host and on disk, where there are such.",
                args.rounds + 1,
                args.answered,
                args.output_tokens,
                args.coming,
                args.words
            ),
            format!(
                "The ratio in each round: {}.",
                ratios.iter().map(|ratio| format!("{ratio:.3}")).collect::<Vec<_>>().join(", ")
            ),
        ],
        raw: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_that_cost_more_than_three_in_a_hundred_break_the_bound() {
        let args = Args::parse_from([""]);
        let with = |ms: [f64; 3]| report(&args, &[("with", ms.to_vec()), ("without", vec![10.0, 11.0, 12.0])]);
        assert!(with([10.2, 11.2, 12.2]).bounds[0].holds());
        assert!(!with([10.4, 11.4, 13.0]).bounds[0].holds());
    }
}
