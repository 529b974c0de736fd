//! What is it worth to keep KV between turns, when many converse at once?
//!
//! The same conversations on two servers, one with `engine.reuse` and one without, in turn. Both must give the same
//! answers, word for word: reuse may change when an answer comes, never what it is.

use std::time::Instant;

use clap::Parser;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::Common;
use crate::client::{Client, Turn};
use crate::numbers::{figure, median, p95};
use crate::report::{Bound, Limit, Report, Table};
use crate::server::Server;
use crate::text::words;

/// Words of each message after the first.
const MESSAGE_WORDS: usize = 24;

#[derive(Parser, Clone, Copy)]
pub struct Args {
    /// Conversations in all
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    conversations: u32,
    /// Turns of each
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..))]
    turns: u32,
    /// Conversations at a time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    concurrent: u32,
    /// Words of each conversation's first message
    #[arg(long, default_value_t = 200)]
    first_words: usize,
    /// Tokens of each answer
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..))]
    output_tokens: u32,
    /// How often both servers are measured
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// All turns of one server's conversations.
#[derive(Default)]
struct Arm {
    wall_s: f64,
    /// Conversation by conversation, each in order.
    conversations: Vec<Vec<Turn>>,
}

impl Arm {
    fn turns(&self) -> impl Iterator<Item = &Turn> {
        self.conversations.iter().flatten()
    }

    fn later_turns(&self) -> impl Iterator<Item = &Turn> {
        self.conversations.iter().flat_map(|turns| turns.iter().skip(1))
    }

    fn sum(&self, part: fn(&Turn) -> u64) -> u64 {
        self.turns().map(part).sum()
    }

    fn generated_per_s(&self) -> f64 {
        self.sum(|turn| turn.usage.output_tokens) as f64 / self.wall_s
    }

    fn later_ttfts_ms(&self) -> Vec<f64> {
        self.later_turns().map(|turn| turn.ttft_ms).collect()
    }

    fn answers(&self) -> impl Iterator<Item = &str> {
        self.turns().map(|turn| turn.text.as_str())
    }

    fn row(&self, name: &str) -> Vec<String> {
        let ttfts: Vec<f64> = self.turns().map(|turn| turn.ttft_ms).collect();
        let later = self.later_ttfts_ms();
        vec![
            name.to_owned(),
            figure(self.wall_s),
            figure(self.generated_per_s()),
            self.sum(|turn| turn.usage.input_tokens).to_string(),
            self.sum(|turn| turn.usage.encoded_tokens).to_string(),
            figure(median(&ttfts)),
            figure(median(&later)),
            figure(p95(&later)),
        ]
    }
}

pub async fn measure(common: &Common, args: &Args) -> anyhow::Result<Report> {
    let mut arms = [Arm::default(), Arm::default()];
    for round in 1..=args.rounds {
        for (setting, arm) in ["engine.reuse=true", "engine.reuse=false"].into_iter().zip(&mut arms) {
            let server = Server::start(common, &[setting])?;
            let run = converse(&Client::new(server.url())?, *args).await?;
            let rate = figure(run.generated_per_s());
            eprintln!("[throughput] {round}/{}: {setting}: {rate} generated tokens/s", args.rounds);
            arm.wall_s += run.wall_s;
            arm.conversations.extend(run.conversations);
        }
    }
    Ok(report(args, &arms))
}

/// Plays all conversations, `concurrent` at a time.
async fn converse(client: &Client, args: Args) -> anyhow::Result<Arm> {
    // Not timed: the first turn of a server touches weights and pools for the first time.
    let warm_up = client.create(None).await?;
    client.turn(&warm_up, "Hello", args.output_tokens).await?;
    let started = Instant::now();
    let all = (0..args.conversations).map(|number| conversation(client, args, number));
    let at_a_time = usize::try_from(args.concurrent)?;
    let mut played: Vec<(u32, Vec<Turn>)> = stream::iter(all).buffer_unordered(at_a_time).try_collect().await?;
    let wall_s = started.elapsed().as_secs_f64();
    played.sort_unstable_by_key(|(number, _)| *number);
    Ok(Arm { wall_s, conversations: played.into_iter().map(|(_, turns)| turns).collect() })
}

/// One conversation's turns, with its number.
async fn conversation(client: &Client, args: Args, number: u32) -> anyhow::Result<(u32, Vec<Turn>)> {
    let id = client.create(None).await?;
    let mut turns = Vec::new();
    for turn in 0..args.turns {
        let length = if turn == 0 { args.first_words } else { MESSAGE_WORDS };
        let said = words(u64::from(number * args.turns + turn), length);
        turns.push(client.turn(&id, &said, args.output_tokens).await?);
    }
    Ok((number, turns))
}

fn report(args: &Args, [with, without]: &[Arm; 2]) -> Report {
    let differ = with.answers().zip(without.answers()).filter(|(one, other)| one != other).count();
    let ttft = median(&without.later_ttfts_ms()) / median(&with.later_ttfts_ms());
    Report {
        name: "throughput",
        title: "Conversations of several turns, with KV kept between turns and without",
        tables: Table::only(
            vec![
                "server",
                "wall s",
                "generated tokens/s",
                "prompt tokens",
                "of them encoded",
                "TTFT median ms",
                "later turns' TTFT median ms",
                "later turns' TTFT p95 ms",
            ],
            vec![with.row("`engine.reuse=true`"), without.row("`engine.reuse=false`")],
        ),
        bounds: vec![Bound {
            what: "answers that differ".into(),
            measured: differ as f64,
            limit: Limit::AtMost(0.0),
            unit: "",
        }],
        notes: vec![
            format!(
                "With reuse: {} times the generated tokens/s, and {} times as fast to a later turn's first token.",
                figure(with.generated_per_s() / without.generated_per_s()),
                figure(ttft)
            ),
            format!(
                "{} rounds on fresh servers, in turn; each {} conversations of {} turns, {} at a time; first messages of \
                 {} words, later ones of {MESSAGE_WORDS}; answers of {} tokens, greedy.",
                args.rounds, args.conversations, args.turns, args.concurrent, args.first_words, args.output_tokens
            ),
        ],
        raw: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Usage;

    fn arm(wall_s: f64, answers: &[&str]) -> Arm {
        let turn = |text: &&str| Turn {
            ttft_ms: wall_s,
            text: (*text).to_owned(),
            usage: Usage { output_tokens: 10, ..Usage::default() },
        };
        Arm { wall_s, conversations: vec![answers.iter().map(turn).collect()] }
    }

    #[test]
    fn an_answer_that_reuse_changed_breaks_the_bound() {
        let args = Args::parse_from([""]);
        let same = report(&args, &[arm(1.0, &["a", "b"]), arm(2.0, &["a", "b"])]);
        assert_eq!(same.bounds[0].measured, 0.0);
        assert!(same.notes[0].starts_with("With reuse: 2.00 times the generated"), "{}", same.notes[0]);
        let other = report(&args, &[arm(1.0, &["a", "b"]), arm(2.0, &["a", "c"])]);
        assert_eq!(other.bounds[0].measured, 1.0);
    }
}
