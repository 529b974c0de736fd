//! How does an operator learn what another policy, or more memory, would have been worth?
//!
//! Reads a trace, replays it through the engine's own decisions (`engine::replay`), and prints a table or one JSON object
//! on standard output; how far it is goes to standard error.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::engine::replay::trace::Trace;
use crate::engine::replay::{Outcome, Policy, ReplaySettings, Reuse, replay};

/// Replays a trace of turns through the engine's scheduler, block manager and evictor, without a model.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  rekindle replay day.csv --device-share 0.02              what the default policy encodes again
  rekindle replay day.csv --device-share 0.02 --policy lru the same by silence alone
  rekindle replay day.csv --device-tokens 500000 --host-tokens 2000000 --json
  rekindle replay day.csv --device-share 0.02 --ends 0.5   if clients said of half of the conversations that they are over
  rekindle replay day.csv --device-share 0.02 --journal 20 and the last 20 decisions, in words
  zcat day.csv.gz | rekindle replay - --device-share 0.02

The trace is CSV with a header: t (ms), tenant, conv, turn, in, out (tokens of prompt and answer), ref and shared (the
first `shared` tokens of the prompt are those of request number `ref`, from 0; -1: none), stop (t: a tool call).")]
pub struct ReplayArgs {
    /// The trace; - is standard input
    trace: PathBuf,
    /// Which conversation goes first when memory is short
    #[arg(long, value_enum, default_value_t = PolicyName::ReturnRate)]
    policy: PolicyName,
    #[command(flatten)]
    device: DeviceSize,
    /// Tokens that the host tier holds
    #[arg(long, value_name = "N", conflicts_with = "host_share")]
    host_tokens: Option<u64>,
    /// The same, as a share of the trace's distinct tokens
    #[arg(long, value_name = "SHARE")]
    host_share: Option<f64>,
    /// Tokens that the disk tier holds
    #[arg(long, value_name = "N", conflicts_with = "disk_share")]
    disk_tokens: Option<u64>,
    /// The same, as a share of the trace's distinct tokens
    #[arg(long, value_name = "SHARE")]
    disk_share: Option<f64>,
    /// Tokens of a block; fewer are more exact, and slower
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    block_tokens: u32,
    /// Bytes of one token's KV, for the bytes moved between tiers; the default model's
    #[arg(long, value_name = "N", default_value_t = 23_040)]
    token_bytes: u64,
    /// Part of the trace that is not counted, while memory fills and habits are learned
    #[arg(long, value_name = "SHARE", default_value_t = 0.25)]
    warm_up: f64,
    /// Part of the conversations whose end the server is told
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    ends: f64,
    /// Take all turns for one tenant's, so that there are no floors and ceilings
    #[arg(long)]
    one_tenant: bool,
    /// Position at which a token costs twice what the first one does, for the cost of encoding again
    #[arg(long, value_name = "TOKENS", default_value_t = 30_000.0)]
    doubles_at: f64,
    /// Let the policy take that cost into account, as kv.eviction_doubles_at does
    #[arg(long)]
    weigh_length: bool,
    /// Print so many of the newest decisions, in words
    #[arg(long, value_name = "N", default_value_t = 0)]
    journal: usize,
    /// One JSON object rather than a table
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct DeviceSize {
    /// Tokens that the device holds
    #[arg(long, value_name = "N")]
    device_tokens: Option<u64>,
    /// The same, as a share of the trace's distinct tokens
    #[arg(long, value_name = "SHARE")]
    device_share: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum PolicyName {
    /// The least likely to be continued soon, as learned on the way
    ReturnRate,
    /// The longest silent
    Lru,
}

impl PolicyName {
    fn name(self) -> &'static str {
        match self {
            Self::ReturnRate => "return_rate",
            Self::Lru => "lru",
        }
    }
}

pub fn run(arguments: &ReplayArgs) -> Result<()> {
    let trace = read(&arguments.trace)?;
    let settings = settings(arguments, &trace)?;
    let outcome = replay(&trace, &settings, &mut progress())?;
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
    let text = if arguments.json {
        format!("{}\n", object(arguments, &trace, &settings, &outcome))
    } else {
        table(arguments, &trace, &settings, &outcome)
    };
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

fn read(path: &Path) -> Result<Trace> {
    let input: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        let file = File::open(path).with_context(|| format!("can't open the trace {}", path.display()))?;
        Box::new(BufReader::new(file))
    };
    Trace::read(input).with_context(|| format!("the trace {}", path.display()))
}

/// Checks what was asked for, and makes tokens of shares.
fn settings(arguments: &ReplayArgs, trace: &Trace) -> Result<ReplaySettings> {
    for (name, share) in [("--warm-up", arguments.warm_up), ("--ends", arguments.ends)] {
        ensure!((0.0..=1.0).contains(&share), "{name} is a share, from 0 to 1");
    }
    ensure!(arguments.warm_up < 1.0, "--warm-up leaves nothing to measure");
    ensure!(arguments.doubles_at > 0.0, "--doubles-at is a number of tokens, more than 0");
    let distinct = trace.distinct_tokens();
    let tokens = |name: &str, tokens: Option<u64>, share: Option<f64>| -> Result<u64> {
        let share = share.unwrap_or(0.0);
        ensure!((0.0..=1.0).contains(&share), "{name} is a share, from 0 to 1");
        Ok(tokens.unwrap_or((distinct as f64 * share) as u64))
    };
    let device = &arguments.device;
    Ok(ReplaySettings {
        policy: match arguments.policy {
            PolicyName::ReturnRate => Policy::ReturnRate,
            PolicyName::Lru => Policy::Lru,
        },
        device_tokens: tokens("--device-share", device.device_tokens, device.device_share)?,
        host_tokens: tokens("--host-share", arguments.host_tokens, arguments.host_share)?,
        disk_tokens: tokens("--disk-share", arguments.disk_tokens, arguments.disk_share)?,
        block_tokens: arguments.block_tokens,
        token_bytes: arguments.token_bytes,
        warm_up: arguments.warm_up,
        ends: arguments.ends,
        one_tenant: arguments.one_tenant,
        doubles_at: arguments.doubles_at,
        weighs_length: arguments.weigh_length,
        journal_entries: arguments.journal,
    })
}

/// A line that says how far it is; nothing where nobody looks.
fn progress() -> impl FnMut(usize, usize) {
    let shown = io::stderr().is_terminal();
    move |done, total| {
        if shown {
            eprint!("\rreplaying {:3} %", (done * 100).checked_div(total).unwrap_or(100));
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn object(arguments: &ReplayArgs, trace: &Trace, settings: &ReplaySettings, outcome: &Outcome) -> Value {
    let reuse = |reuse: &Reuse| {
        json!({
            "requests": reuse.requests,
            "prompt_tokens": reuse.prompt_tokens,
            "reusable_tokens": reuse.reusable_tokens,
            "reencoded_tokens": reuse.reencoded_tokens,
            "reencoded_share": share(reuse.reencoded_tokens, reuse.reusable_tokens),
            "reencode_cost": reuse.reencode_cost,
            "hit_share": {
                "device": share(reuse.device_tokens, reuse.reusable_tokens),
                "host": share(reuse.host_tokens, reuse.reusable_tokens),
                "disk": share(reuse.disk_tokens, reuse.reusable_tokens),
            },
        })
    };
    let mut object = json!({
        "policy": arguments.policy.name(),
        "distinct_tokens": trace.distinct_tokens(),
        "device_tokens": settings.device_tokens,
        "host_tokens": settings.host_tokens,
        "disk_tokens": settings.disk_tokens,
        "block_tokens": settings.block_tokens,
        "ends": settings.ends,
        "bytes_moved": { "down": outcome.bytes_down, "up": outcome.bytes_up },
        "evictions": outcome.evictions,
        "too_long": outcome.too_long,
        "tenants": outcome.tenants.iter().map(reuse).collect::<Vec<_>>(),
    });
    if let (Value::Object(object), Value::Object(all)) = (&mut object, reuse(&outcome.all)) {
        object.extend(all);
    }
    if arguments.journal > 0 {
        object["journal"] = sentences(settings, outcome).collect();
    }
    object
}

fn sentences(settings: &ReplaySettings, outcome: &Outcome) -> impl Iterator<Item = String> {
    outcome.journal.iter().map(|entry| {
        let seconds = entry.at.0 / 1_000_000;
        format!("{seconds} s, conversation {}: {}", entry.victim.0, settings.sentence(entry))
    })
}

fn table(arguments: &ReplayArgs, trace: &Trace, settings: &ReplaySettings, outcome: &Outcome) -> String {
    let all = &outcome.all;
    let row = |what: &str, tokens: u64| {
        let percent = 100.0 * share(tokens, all.reusable_tokens);
        format!("{what:<24}{:>18}  {percent:6.2} %\n", grouped(tokens))
    };
    let sizes = format!(
        "{} on {} tokens of device, {} of host and {} of disk; the trace has {} distinct ones\n\n",
        arguments.policy.name(),
        grouped(settings.device_tokens),
        grouped(settings.host_tokens),
        grouped(settings.disk_tokens),
        grouped(trace.distinct_tokens()),
    );
    let mut text = sizes
        + &row("re-usable tokens", all.reusable_tokens)
        + &row("  found on the device", all.device_tokens)
        + &row("  reloaded from the host", all.host_tokens)
        + &row("  loaded from disk", all.disk_tokens)
        + &row("  encoded again", all.reencoded_tokens)
        + &format!("{:<24}{:>18}\n", "cost of encoding again", grouped(all.reencode_cost as u64))
        + &format!("{:<24}{:>18}\n", "bytes copied down", grouped(outcome.bytes_down))
        + &format!("{:<24}{:>18}\n", "bytes copied up", grouped(outcome.bytes_up))
        + &format!("{:<24}{:>18}\n", "evictions", grouped(outcome.evictions));
    if outcome.too_long > 0 {
        text += &format!("{:<24}{:>18}\n", "longer than the device", grouped(outcome.too_long));
    }
    if arguments.journal > 0 {
        text.push('\n');
        sentences(settings, outcome).for_each(|sentence| text += &format!("{sentence}\n"));
    }
    text
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let (first, rest) = digits.split_at((digits.len() - 1) % 3 + 1);
    let (threes, _) = rest.as_bytes().as_chunks::<3>();
    threes.iter().fold(first.to_owned(), |text, three| text + "," + &String::from_utf8_lossy(three))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        arguments: ReplayArgs,
    }

    fn parse(arguments: &[&str]) -> Result<ReplayArgs, clap::Error> {
        Program::try_parse_from(["replay"].iter().chain(arguments)).map(|program| program.arguments)
    }

    fn trace() -> Trace {
        let lines = "t,tenant,conv,turn,in,out,ref,shared,stop\n0,0,1,1,640,64,-1,0,e\n9000,0,1,2,768,64,0,704,e\n";
        Trace::read(lines.as_bytes()).unwrap()
    }

    #[test]
    fn the_object_has_what_was_found_where_and_the_table_says_the_same() {
        let arguments = parse(&["t.csv", "--device-tokens", "6400", "--warm-up", "0", "--json"]).unwrap();
        let trace = trace();
        let settings = settings(&arguments, &trace).unwrap();
        let outcome = replay(&trace, &settings, &mut |_, _| {}).unwrap();
        let object = object(&arguments, &trace, &settings, &outcome);
        assert_eq!((&object["reusable_tokens"], &object["reencoded_tokens"]), (&json!(704), &json!(0)));
        assert_eq!(object["hit_share"], json!({"device": 1.0, "host": 0.0, "disk": 0.0}));
        assert_eq!(object["bytes_moved"], json!({"down": 0, "up": 0}));
        assert!(table(&arguments, &trace, &settings, &outcome).contains("found on the device"));
    }

    #[test]
    fn sizes_are_asked_for_once_and_shares_are_of_distinct_tokens() {
        assert!(parse(&["t.csv"]).unwrap_err().to_string().contains("--device-share"));
        assert!(parse(&["t.csv", "--device-share", "0.1", "--device-tokens", "9"]).is_err());
        let of = |arguments: &[&str]| settings(&parse(arguments).unwrap(), &trace());
        assert_eq!(of(&["t.csv", "--device-share", "0.5"]).unwrap().device_tokens, 416);
        assert!(of(&["t.csv", "--device-share", "2"]).unwrap_err().to_string().contains("--device-share"));
        assert!(of(&["t.csv", "--device-share", "0.1", "--ends", "7"]).unwrap_err().to_string().contains("--ends"));
    }

    #[test]
    fn numbers_are_grouped_by_threes() {
        assert_eq!([0, 12, 123, 1234, 1_234_567].map(grouped), ["0", "12", "123", "1,234", "1,234,567"]);
    }
}
